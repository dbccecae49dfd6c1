#include <vector>

#include "cpu/dot.h"

namespace metakern::cpu {
namespace {

// A row is summed in chunks of fixed length, so the result does not depend on the number of threads.
constexpr int64_t kChunk = 16384;
METAKERN_VECTORISED float chunk_dot(const float* x, const float* y, int64_t k) { return dot<float>(x, y, k); }
METAKERN_VECTORISED double chunk_dot(const double* x, const double* y, int64_t k) { return dot<double>(x, y, k); }
METAKERN_VECTORISED float chunk_dot(const bfloat16* x, const bfloat16* y, int64_t k) { return dot<float>(x, y, k); }

}  // namespace

template <typename T, typename Sum>
void row_dots(const T* x, const T* y, Sum* out, int64_t n, int64_t k, int64_t x_stride, int64_t y_stride) {
  const int64_t chunks = k > kChunk ? (k + kChunk - 1) / kChunk : 1;
  std::vector<Sum> sums(chunks > 1 ? n * chunks : 0);
  Sum* partial = chunks > 1 ? sums.data() : out;
#pragma omp parallel for schedule(static) if (n * k > kParallel)
  for (int64_t task = 0; task < n * chunks; ++task) {
    const int64_t row = task / chunks, first = task % chunks * kChunk;
    const int64_t length = k - first < kChunk ? k - first : kChunk;
    partial[task] = chunk_dot(x + row * x_stride + first, y + row * y_stride + first, length);
  }
  if (chunks == 1) return;
  for (int64_t row = 0; row < n; ++row) {
    Sum total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[row * chunks + chunk];
    out[row] = total;
  }
}

template void row_dots(const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t);
template void row_dots(const double*, const double*, double*, int64_t, int64_t, int64_t, int64_t);
template void row_dots(const bfloat16*, const bfloat16*, float*, int64_t, int64_t, int64_t, int64_t);

}  // namespace metakern::cpu
