#include <vector>

#include "cpu/dot.h"

namespace metakern::cpu {
namespace {

// An example is summed in chunks of fixed length, so the result does not depend on the number of threads.
constexpr int64_t kPositions = 64;

template <typename T>
struct Rows {
  const T* V;
  const T* B;
  int64_t width, v_stride, b_stride;
};

template <typename Sum, typename T>
inline __attribute__((always_inline)) Sum gather(const int64_t* indices, Rows<T> rows, int64_t count, int64_t padding) {
  Sum total = 0;
  for (int64_t k = 0; k < count; ++k)
    if (indices[k] != padding)
      total += dot<Sum>(rows.V + indices[k] * rows.v_stride, rows.B + k * rows.b_stride, rows.width);
  return total;
}

METAKERN_VECTORISED float chunk(const int64_t* indices, Rows<float> rows, int64_t count, int64_t padding) {
  return gather<float>(indices, rows, count, padding);
}
METAKERN_VECTORISED double chunk(const int64_t* indices, Rows<double> rows, int64_t count, int64_t padding) {
  return gather<double>(indices, rows, count, padding);
}
METAKERN_VECTORISED float chunk(const int64_t* indices, Rows<bfloat16> rows, int64_t count, int64_t padding) {
  return gather<float>(indices, rows, count, padding);
}

}  // namespace

template <typename T, typename Sum>
int64_t embedding_dots(const int64_t* indices, const T* V, const T* B, Sum* out, int64_t n, int64_t t, int64_t width,
                       int64_t rows, int64_t v_stride, int64_t b_stride_n, int64_t b_stride_t, int64_t padding) {
  for (int64_t k = 0; k < n * t; ++k)
    if (indices[k] < 0 || indices[k] >= rows) return k;
  const int64_t chunks = (t + kPositions - 1) / kPositions;
  std::vector<Sum> partial(n * chunks);
#pragma omp parallel for schedule(static) if (n * t * width > kParallel)
  for (int64_t task = 0; task < n * chunks; ++task) {
    const int64_t example = task / chunks, first = task % chunks * kPositions;
    const int64_t count = t - first < kPositions ? t - first : kPositions;
    const Rows<T> operands{V, B + example * b_stride_n + first * b_stride_t, width, v_stride, b_stride_t};
    partial[task] = chunk(indices + example * t + first, operands, count, padding);
  }
  for (int64_t example = 0; example < n; ++example) {
    Sum total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[example * chunks + c];
    out[example] = total;
  }
  return -1;
}

template int64_t embedding_dots(const int64_t*, const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t,
                                int64_t, int64_t, int64_t, int64_t);
template int64_t embedding_dots(const int64_t*, const double*, const double*, double*, int64_t, int64_t, int64_t,
                                int64_t, int64_t, int64_t, int64_t, int64_t);
template int64_t embedding_dots(const int64_t*, const bfloat16*, const bfloat16*, float*, int64_t, int64_t, int64_t,
                                int64_t, int64_t, int64_t, int64_t, int64_t);

}  // namespace metakern::cpu
