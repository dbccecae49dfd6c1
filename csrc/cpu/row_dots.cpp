#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace metakern::cpu {
namespace {

// A row is summed in chunks of fixed length, so the result does not depend on the number of threads.
constexpr int64_t kChunk = 16384;
constexpr int64_t kParallel = 65536;  // elements below which waking the threads costs more than the work

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int64_t kLanes, typename Sum, typename T>
inline __attribute__((always_inline)) Sum dot_in_lanes(const T* x, const T* y, int64_t k) {
  Sum sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += widen(x[i + lane]) * widen(y[i + lane]);
  for (int64_t lane = 0; i < k; ++i, ++lane) sums[lane] += widen(x[i]) * widen(y[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  return sums[0];
}

// Long rows: four vectors of the widest kind, enough to hide the latency of an addition. Short ones: one narrow vector,
// since adding up the lanes would cost more than the row.
template <typename Sum, typename T>
inline __attribute__((always_inline)) Sum dot(const T* x, const T* y, int64_t k) {
  return k < 128 ? dot_in_lanes<8, Sum>(x, y, k) : dot_in_lanes<64, Sum>(x, y, k);
}

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
