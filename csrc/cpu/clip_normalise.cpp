#include "cpu/kernels.h"

namespace metakern::cpu {
namespace {

// The clip is written so that a NaN passes through it. Sixteen partial sums vectorise in a fixed order.
template <typename T>
inline T clip_and_sum(const T* dots, T* weights, int64_t n, int64_t stride) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T dot = dots[(k + lane) * stride];
      const T clipped = dot < T(0) ? T(0) : dot;
      weights[k + lane] = clipped;
      sums[lane] += clipped;
    }
  T total = 0;
  for (; k < n; ++k) {
    const T dot = dots[k * stride];
    weights[k] = dot < T(0) ? T(0) : dot;
    total += weights[k];
  }
  for (const T sum : sums) total += sum;
  return total;
}

template <typename T>
inline void divide(T* weights, int64_t n, T total) {
  const T divisor = total == T(0) ? T(1) : total;
  for (int64_t k = 0; k < n; ++k) weights[k] /= divisor;
}

}  // namespace

// target_clones does not reach templates, hence one line per dtype.
METAKERN_VECTORISED void clip_normalise_f32(const float* dots, float* weights, int64_t n, int64_t stride) {
  divide(weights, n, clip_and_sum(dots, weights, n, stride));
}

METAKERN_VECTORISED void clip_normalise_f64(const double* dots, double* weights, int64_t n, int64_t stride) {
  divide(weights, n, clip_and_sum(dots, weights, n, stride));
}

template <>
void clip_normalise<float>(const float* dots, float* weights, int64_t n, int64_t stride) {
  clip_normalise_f32(dots, weights, n, stride);
}

template <>
void clip_normalise<double>(const double* dots, double* weights, int64_t n, int64_t stride) {
  clip_normalise_f64(dots, weights, n, stride);
}

}  // namespace metakern::cpu
