#include <cmath>

#include "cpu/dot.h"

namespace metakern::cpu {
namespace {

constexpr int64_t kLanes = 16;

template <typename Sum>
inline __attribute__((always_inline)) Sum add_lanes(Sum* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// sum_i (x_i - centre)^power / width of one row, power 1 or 2.
template <bool kSquared, typename Sum, typename T>
inline __attribute__((always_inline)) Sum moment(const T* x, int64_t width, Sum centre) {
  Sum sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Sum distance = widen(x[i + lane]) - centre;
      sums[lane] += kSquared ? distance * distance : distance;
    }
  for (int64_t lane = 0; i < width; ++i, ++lane) {
    const Sum distance = widen(x[i]) - centre;
    sums[lane] += kSquared ? distance * distance : distance;
  }
  return add_lanes(sums) / static_cast<Sum>(width);
}

template <typename T>
struct Rows {
  const T *X, *B;
  int64_t t, width, x_stride, b_stride;
};

// Adds kRows positions to the sums of an example. Several at once, so that the sums are read and written less often.
template <int64_t kRows, bool kShift, typename Sum, typename T>
inline __attribute__((always_inline)) void add_positions(const Rows<T>& rows, int64_t first, Sum eps, bool centred,
                                                         Sum* __restrict__ scale, Sum* __restrict__ shift) {
  const T* __restrict__ x = rows.X + first * rows.x_stride;
  const T* __restrict__ b = rows.B + first * rows.b_stride;
  Sum mean[kRows], inverse[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    const T* row = x + r * rows.x_stride;
    mean[r] = centred ? moment<false>(row, rows.width, Sum(0)) : Sum(0);
    inverse[r] = Sum(1) / std::sqrt(moment<true>(row, rows.width, mean[r]) + eps);
  }
  for (int64_t i = 0; i < rows.width; ++i) {
    Sum products = 0, sums = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      const Sum grad = widen(b[r * rows.b_stride + i]);
      products += grad * ((widen(x[r * rows.x_stride + i]) - mean[r]) * inverse[r]);
      sums += grad;
    }
    scale[i] += products;
    if (kShift) shift[i] += sums;
  }
}

template <bool kShift, typename Sum, typename T>
inline __attribute__((always_inline)) void add_example(const Rows<T>& rows, Sum eps, bool centred, Sum* scale,
                                                       Sum* shift) {
  for (int64_t i = 0; i < rows.width; ++i) scale[i] = 0;
  if (kShift)
    for (int64_t i = 0; i < rows.width; ++i) shift[i] = 0;
  int64_t k = 0;
  for (; k + 4 <= rows.t; k += 4) add_positions<4, kShift>(rows, k, eps, centred, scale, shift);
  for (; k < rows.t; ++k) add_positions<1, kShift>(rows, k, eps, centred, scale, shift);
}

METAKERN_VECTORISED void example(const Rows<float>& rows, float eps, bool centred, float* scale, float* shift) {
  shift ? add_example<true>(rows, eps, centred, scale, shift) : add_example<false>(rows, eps, centred, scale, shift);
}
METAKERN_VECTORISED void example(const Rows<double>& rows, double eps, bool centred, double* scale, double* shift) {
  shift ? add_example<true>(rows, eps, centred, scale, shift) : add_example<false>(rows, eps, centred, scale, shift);
}
METAKERN_VECTORISED void example(const Rows<bfloat16>& rows, float eps, bool centred, float* scale, float* shift) {
  shift ? add_example<true>(rows, eps, centred, scale, shift) : add_example<false>(rows, eps, centred, scale, shift);
}

}  // namespace

template <typename T, typename Sum>
void affine_grads(const T* X, const T* B, Sum* scale, Sum* shift, int64_t n, int64_t t, int64_t width,
                  int64_t x_stride_n, int64_t x_stride_t, int64_t b_stride_n, int64_t b_stride_t, double eps,
                  bool centred) {
#pragma omp parallel for schedule(static) if (n > 1 && n * t * width > kParallel / 2)
  for (int64_t k = 0; k < n; ++k)
    example({X + k * x_stride_n, B + k * b_stride_n, t, width, x_stride_t, b_stride_t}, static_cast<Sum>(eps), centred,
            scale + k * width, shift == nullptr ? nullptr : shift + k * width);
}

template void affine_grads(const float*, const float*, float*, float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t, double, bool);
template void affine_grads(const double*, const double*, double*, double*, int64_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t, double, bool);
template void affine_grads(const bfloat16*, const bfloat16*, float*, float*, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t, int64_t, double, bool);

}  // namespace metakern::cpu
