#include <cmath>
#include <vector>

#include "cpu/dot.h"

namespace metakern::cpu {
namespace {

// An example is summed in chunks of fixed length, so the result does not depend on the number of threads.
constexpr int64_t kPositions = 16;
constexpr int64_t kLanes = 16;

template <typename Sum>
inline __attribute__((always_inline)) Sum add_lanes(Sum* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

template <typename Sum, typename T>
inline __attribute__((always_inline)) Sum mean_of(const T* x, int64_t width) {
  Sum sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += widen(x[i + lane]);
  for (int64_t lane = 0; i < width; ++i, ++lane) sums[lane] += widen(x[i]);
  return add_lanes(sums) / static_cast<Sum>(width);
}

// sum_i B_i (x^_i V_i + v_i) of one row, which stays in the first cache between the passes.
template <typename Sum, typename T>
inline __attribute__((always_inline)) Sum row(const T* x, const T* b, const T* V, const T* v, int64_t width, Sum eps,
                                              bool centred) {
  const Sum mean = centred ? mean_of<Sum>(x, width) : Sum(0);
  Sum squares[kLanes] = {}, products[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Sum distance = widen(x[i + lane]) - mean;
      squares[lane] += distance * distance;
      products[lane] += distance * (widen(b[i + lane]) * widen(V[i + lane]));
    }
  for (int64_t lane = 0; i < width; ++i, ++lane) {
    const Sum distance = widen(x[i]) - mean;
    squares[lane] += distance * distance;
    products[lane] += distance * (widen(b[i]) * widen(V[i]));
  }
  const Sum variance = add_lanes(squares) / static_cast<Sum>(width);
  const Sum shift = v == nullptr ? Sum(0) : dot<Sum>(b, v, width);
  return add_lanes(products) / std::sqrt(variance + eps) + shift;
}

template <typename T>
struct Rows {
  const T *X, *B, *V, *v;
  int64_t width, x_stride, b_stride;
};

template <typename Sum, typename T>
inline __attribute__((always_inline)) Sum positions(Rows<T> r, int64_t count, Sum eps, bool centred) {
  Sum total = 0;
  for (int64_t k = 0; k < count; ++k)
    total += row<Sum>(r.X + k * r.x_stride, r.B + k * r.b_stride, r.V, r.v, r.width, eps, centred);
  return total;
}

METAKERN_VECTORISED float chunk(Rows<float> rows, int64_t count, float eps, bool centred) {
  return positions<float>(rows, count, eps, centred);
}
METAKERN_VECTORISED double chunk(Rows<double> rows, int64_t count, double eps, bool centred) {
  return positions<double>(rows, count, eps, centred);
}
METAKERN_VECTORISED float chunk(Rows<bfloat16> rows, int64_t count, float eps, bool centred) {
  return positions<float>(rows, count, eps, centred);
}

}  // namespace

template <typename T, typename Sum>
void affine_dots(const T* X, const T* B, const T* V, const T* v, Sum* out, int64_t n, int64_t t, int64_t width,
                 int64_t x_stride_n, int64_t x_stride_t, int64_t b_stride_n, int64_t b_stride_t, double eps,
                 bool centred) {
  const int64_t chunks = (t + kPositions - 1) / kPositions;
  std::vector<Sum> partial(n * chunks);
#pragma omp parallel for schedule(static) if (n * t * width > kParallel / 2)
  for (int64_t task = 0; task < n * chunks; ++task) {
    const int64_t example = task / chunks, first = task % chunks * kPositions;
    const int64_t count = t - first < kPositions ? t - first : kPositions;
    const T* x = X + example * x_stride_n + first * x_stride_t;
    const T* b = B + example * b_stride_n + first * b_stride_t;
    partial[task] = chunk({x, b, V, v, width, x_stride_t, b_stride_t}, count, static_cast<Sum>(eps), centred);
  }
  for (int64_t example = 0; example < n; ++example) {
    Sum total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[example * chunks + c];
    out[example] = total;
  }
}

template void affine_dots(const float*, const float*, const float*, const float*, float*, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, double, bool);
template void affine_dots(const double*, const double*, const double*, const double*, double*, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, double, bool);
template void affine_dots(const bfloat16*, const bfloat16*, const bfloat16*, const bfloat16*, float*, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, double, bool);

}  // namespace metakern::cpu
