// The dot product of two rows, to be inlined into functions that METAKERN_VECTORISED compiles per vector width.
#pragma once
#include <cstring>

#include "cpu/kernels.h"

namespace metakern::cpu {

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

}  // namespace metakern::cpu
