#include <cstring>

#include "cpu/kernels.h"

namespace metakern::cpu {
namespace {

// exp(x) for x <= 0 in float32: 2^k times a polynomial in the remainder, |r| <= ln(2)/2; written so that the compiler
// can vectorise it, which it cannot do with a call to expf. The coefficients are the Taylor series, whose remainder
// r^8/8! is below a quarter of a unit in the last place.
inline __attribute__((always_inline)) float exp_of_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float k = __builtin_rintf(clamped * 1.44269504f);
  float r = clamped - k * 0.693359375f;  // ln(2) in two parts, the first exact in few bits
  r -= k * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
}

constexpr int64_t kLanes = 16;

// Three passes over a row that is in the cache after the first: maximum, exponentials, gradient.
METAKERN_VECTORISED float row_loss(const float* logits, float* grad, int64_t classes, int64_t target, float smoothing) {
  float highs[kLanes], sums[kLanes] = {}, totals[kLanes] = {};
  for (float& high : highs) high = logits[0];
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float z = logits[c + lane];
      highs[lane] = z > highs[lane] ? z : highs[lane];
      totals[lane] += z;
    }
  for (int64_t lane = 0; c < classes; ++c, ++lane) {
    highs[lane] = logits[c] > highs[lane] ? logits[c] : highs[lane];
    totals[lane] += logits[c];
  }
  float high = highs[0], sum = 0, total = 0;
  for (const float h : highs) high = h > high ? h : high;
  for (const float t : totals) total += t;
  for (c = 0; c + kLanes <= classes; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float e = exp_of_nonpositive(logits[c + lane] - high);
      grad[c + lane] = e;
      sums[lane] += e;
    }
  for (int64_t lane = 0; c < classes; ++c, ++lane) sums[lane] += grad[c] = exp_of_nonpositive(logits[c] - high);
  for (const float s : sums) sum += s;
  const float inverse = 1.0f / sum, uniform = smoothing / static_cast<float>(classes);
  for (c = 0; c < classes; ++c) grad[c] = grad[c] * inverse - uniform;
  grad[target] -= 1.0f - smoothing;
  const float loss = high + __builtin_logf(sum) - (1.0f - smoothing) * logits[target];
  return smoothing == 0 ? loss : loss - uniform * total;  // a masked class has -inf in its logit, and so has the total
}

}  // namespace

int64_t cross_entropy_rows(const float* logits, const int64_t* targets, float* losses, float* grad, int64_t rows,
                           int64_t classes, int64_t stride, int64_t ignore, float smoothing) {
  for (int64_t r = 0; r < rows; ++r)
    if (targets[r] != ignore && (targets[r] < 0 || targets[r] >= classes)) return r;
#pragma omp parallel for schedule(static) if (rows * classes > kParallel / 4)
  for (int64_t r = 0; r < rows; ++r) {
    float* row_grad = grad + r * classes;
    if (targets[r] == ignore) {
      losses[r] = 0;
      std::memset(row_grad, 0, classes * sizeof(float));
    } else {
      losses[r] = row_loss(logits + r * stride, row_grad, classes, targets[r], smoothing);
    }
  }
  return -1;
}

}  // namespace metakern::cpu
