#include <cmath>
#include <limits>

#include "cpu/dot.h"

namespace metakern::cpu {
namespace {

constexpr int64_t kLanes = 32;
constexpr int64_t kChunk = 1024;  // elements of a row that stay in the nearest cache

// exp(x) for x <= 0, written so that the compiler can vectorise it, which it cannot do with a call to expf: 2^k times a
// polynomial in the remainder, |r| <= ln(2)/2. The coefficients are the Taylor series, whose remainder r^8/8! is below
// a quarter of a unit in the last place.
inline __attribute__((always_inline)) float exp_of_nonpositive(float x) {
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes a whole number, in the lowest bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kRounds;
  const float k = shifted - kRounds;
  float r = clamped - k * 0.693359375f;  // ln(2) in two parts, the first exact in few bits
  r += k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
}

inline __attribute__((always_inline)) void store(float* place, float value) { *place = value; }
inline __attribute__((always_inline)) void store(bfloat16* place, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to even
  place->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

struct Row {
  float high = -std::numeric_limits<float>::infinity();  // the largest logit
  float sum = 0;                                         // of exp(z - high)
  float total = 0;                                       // of z
};

template <int64_t kWidth, typename Combine>
inline __attribute__((always_inline)) float over_lanes(const float* lanes, Combine combine) {
  if constexpr (kWidth == 1) {
    return lanes[0];
  } else {
    float half[kWidth / 2];
    for (int64_t lane = 0; lane < kWidth / 2; ++lane) half[lane] = combine(lanes[lane], lanes[lane + kWidth / 2]);
    return over_lanes<kWidth / 2>(half, combine);
  }
}

// A chunk is widened once; then its largest logit, its exponentials and its sum are found in turn.
template <typename T>
inline __attribute__((always_inline)) void add_chunk(const T* z, int64_t count, bool summed, Row& row) {
  const auto larger = [](float x, float y) { return x > y ? x : y; };
  const auto plus = [](float x, float y) { return x + y; };
  alignas(64) float values[kChunk], highs[kLanes], sums[kLanes] = {};
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t c = count; c < padded; ++c) values[c] = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < count; ++c) values[c] = widen(z[c]);
  for (float& high : highs) high = row.high;
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) highs[lane] = larger(values[c + lane], highs[lane]);
  const float high = over_lanes<kLanes>(highs, larger);
  // where all logits so far are -inf, a difference of infinities would be NaN
  const float shift = high == -std::numeric_limits<float>::infinity() ? 0.0f : high;
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += exp_of_nonpositive(values[c + lane] - shift);
  if (high > row.high) row.sum *= exp_of_nonpositive(row.high - high);
  row.sum += over_lanes<kLanes>(sums, plus);
  row.high = high;
  if (!summed) return;
  for (int64_t c = count; c < padded; ++c) values[c] = 0;
  for (float& sum : sums) sum = 0;
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += values[c + lane];
  row.total += over_lanes<kLanes>(sums, plus);
}

template <typename T>
inline __attribute__((always_inline)) Row read_row(const T* z, int64_t classes, bool summed) {
  Row row;
  for (int64_t first = 0; first < classes; first += kChunk)
    add_chunk(z + first, classes - first < kChunk ? classes - first : kChunk, summed, row);
  return row;
}

METAKERN_VECTORISED Row read(const float* z, int64_t classes, bool summed) { return read_row(z, classes, summed); }
METAKERN_VECTORISED Row read(const bfloat16* z, int64_t classes, bool summed) { return read_row(z, classes, summed); }

// dz_c = grad (exp(z_c - high) / sum - uniform), without what the target adds.
template <typename T>
inline __attribute__((always_inline)) void write_row(const T* __restrict__ z, T* __restrict__ dz, int64_t classes,
                                                     float high, float scale, float shift) {
  for (int64_t c = 0; c < classes; ++c) store(dz + c, exp_of_nonpositive(widen(z[c]) - high) * scale - shift);
}

METAKERN_VECTORISED void write(const float* z, float* dz, int64_t classes, float high, float scale, float shift) {
  write_row(z, dz, classes, high, scale, shift);
}
METAKERN_VECTORISED void write(const bfloat16* z, bfloat16* dz, int64_t classes, float high, float scale, float shift) {
  write_row(z, dz, classes, high, scale, shift);
}

int64_t first_wrong(const int64_t* targets, int64_t rows, int64_t classes, int64_t ignored) {
  for (int64_t r = 0; r < rows; ++r)
    if (targets[r] != ignored && (targets[r] < 0 || targets[r] >= classes)) return r;
  return -1;
}

}  // namespace

template <typename T>
int64_t cross_entropy_rows(const T* logits, const int64_t* targets, float* losses, float* highs, float* sums,
                           int64_t rows, int64_t classes, int64_t stride, int64_t ignored, float smoothing) {
  const int64_t wrong = first_wrong(targets, rows, classes, ignored);
  if (wrong >= 0) return wrong;
#pragma omp parallel for schedule(static) if (rows * classes > kParallel / 4)
  for (int64_t r = 0; r < rows; ++r) {
    const T* z = logits + r * stride;
    const Row row = read(z, classes, smoothing != 0);
    highs[r] = row.high;
    sums[r] = row.sum;
    losses[r] = 0;
    if (targets[r] == ignored) continue;
    const float normaliser = std::log(row.sum);
    losses[r] = (1 - smoothing) * (row.high - widen(z[targets[r]]) + normaliser);
    // a masked class has -inf in its logit, and so has the total
    if (smoothing != 0) losses[r] += smoothing * (row.high - row.total / static_cast<float>(classes) + normaliser);
  }
  return -1;
}

template <typename T>
int64_t cross_entropy_rows_backward(const T* logits, const int64_t* targets, const float* highs, const float* sums,
                                    const float* grad, T* out, int64_t rows, int64_t classes, int64_t stride,
                                    int64_t ignored, float smoothing) {
  const int64_t wrong = first_wrong(targets, rows, classes, ignored);
  if (wrong >= 0) return wrong;
  const float uniform = smoothing / static_cast<float>(classes);
#pragma omp parallel for schedule(static) if (rows * classes > kParallel / 4)
  for (int64_t r = 0; r < rows; ++r) {
    const T* z = logits + r * stride;
    T* dz = out + r * classes;
    if (targets[r] == ignored) {
      std::memset(static_cast<void*>(dz), 0, classes * sizeof(T));
      continue;
    }
    write(z, dz, classes, highs[r], grad[r] / sums[r], grad[r] * uniform);
    const float share = exp_of_nonpositive(widen(z[targets[r]]) - highs[r]) / sums[r];
    store(dz + targets[r], grad[r] * (share - (1 - smoothing) - uniform));
  }
  return -1;
}

template int64_t cross_entropy_rows(const float*, const int64_t*, float*, float*, float*, int64_t, int64_t, int64_t,
                                    int64_t, float);
template int64_t cross_entropy_rows(const bfloat16*, const int64_t*, float*, float*, float*, int64_t, int64_t, int64_t,
                                    int64_t, float);
template int64_t cross_entropy_rows_backward(const float*, const int64_t*, const float*, const float*, const float*,
                                             float*, int64_t, int64_t, int64_t, int64_t, float);
template int64_t cross_entropy_rows_backward(const bfloat16*, const int64_t*, const float*, const float*, const float*,
                                             bfloat16*, int64_t, int64_t, int64_t, int64_t, float);

}  // namespace metakern::cpu
