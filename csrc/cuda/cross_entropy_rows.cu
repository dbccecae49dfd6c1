#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kOneWarp = 1024;  // elements of a row that a warp takes alone
constexpr int64_t kChunk = 8192;    // elements of a row of the gradient that one block writes

__device__ inline float exponential(float x) { return exp2f(x * 1.4426950408889634f); }
__device__ inline double exponential(double x) { return exp(x); }

template <typename T>
struct Rows {
  const T* logits;
  const int64_t* targets;
  int64_t rows, classes, stride, ignored;
};

// Largest logit, sum of exponentials below it and sum, of the part of a row that a thread, warp or block has seen.
template <typename Sum>
struct Running {
  Sum high = -INFINITY, sum = 0, total = 0;

  // where all logits so far are -inf, a difference of infinities would be NaN
  __device__ static Sum finite(Sum high) { return high == -INFINITY ? Sum(0) : high; }

  template <typename T, int kWidth>
  __device__ void include(const Pack<T, kWidth>& z) {
    Sum top = high;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) top = max(top, static_cast<Sum>(z.values[j]));
    const Sum shift = finite(top);
    sum *= exponential(high - shift);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      sum += exponential(static_cast<Sum>(z.values[j]) - shift);
      total += static_cast<Sum>(z.values[j]);
    }
    high = top;
  }

  __device__ void merge(Sum other_high, Sum other_sum, Sum other_total) {
    const Sum top = max(high, other_high), shift = finite(top);
    sum = sum * exponential(high - shift) + other_sum * exponential(other_high - shift);
    total += other_total;
    high = top;
  }
};

// Over a warp, or over the block that shares a row; the first thread has the result.
template <bool kWholeBlock, typename Sum>
__device__ Running<Sum> together(Running<Sum> mine) {
#pragma unroll 1
  for (int offset = 16; offset > 0; offset /= 2)
    mine.merge(__shfl_xor_sync(0xffffffffu, mine.high, offset), __shfl_xor_sync(0xffffffffu, mine.sum, offset),
               __shfl_xor_sync(0xffffffffu, mine.total, offset));
  if constexpr (kWholeBlock) {
    __shared__ Sum parts[3][kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) {
      parts[0][warp] = mine.high;
      parts[1][warp] = mine.sum;
      parts[2][warp] = mine.total;
    }
    __syncthreads();
    if (threadIdx.x == 0)
#pragma unroll 1
      for (int w = 1; w < kWarps; ++w) mine.merge(parts[0][w], parts[1][w], parts[2][w]);
  }
  return mine;
}

// One reading of each row, by the block, or by a warp if rows are short. Without the bound of 1, float64 spills.
template <typename T, int kWidth, bool kWholeBlock>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_kernel(Rows<T> given, accumulator_t<T>* __restrict__ losses, accumulator_t<T>* __restrict__ highs,
                         accumulator_t<T>* __restrict__ sums, accumulator_t<T> smoothing) {
  using Sum = accumulator_t<T>;
  using Wide = Pack<T, kWidth>;
  constexpr int kGroup = kWholeBlock ? kThreads : 32;
  const int64_t row = blockIdx.x * int64_t{kThreads / kGroup} + threadIdx.x / kGroup;
  const int lane = threadIdx.x % kGroup;
  if (row >= given.rows) return;
  const T* z = given.logits + row * given.stride;
  Running<Sum> mine;
  int64_t c = lane * kWidth;
#pragma unroll(sizeof(T) == 8 ? 1 : 4)
  for (; c + kWidth <= given.classes; c += kGroup * kWidth) {
    const Wide read = *reinterpret_cast<const Wide*>(z + c);  // given as it lies there, it would be read one by one
    mine.include(read);
  }
#pragma unroll 1
  for (; c < given.classes; ++c) mine.include(Pack<T, 1>{{z[c]}});
  mine = together<kWholeBlock>(mine);
  if (lane != 0) return;
  highs[row] = mine.high;
  sums[row] = mine.sum;
  const int64_t target = given.targets[row];
  Sum loss = 0;
  if (target != given.ignored) {
    if (target < 0 || target >= given.classes) __trap();  // as the loss itself would have stopped
    const Sum normaliser = log(mine.sum);
    loss = (Sum(1) - smoothing) * (mine.high - static_cast<Sum>(z[target]) + normaliser);
    // a masked class has -inf in its logit, and so has the total
    if (smoothing != 0) loss += smoothing * (mine.high - mine.total / static_cast<Sum>(given.classes) + normaliser);
  }
  losses[row] = loss;
}

// A block writes a chunk of a row, or a warp a short row.
template <typename T, int kWidth, bool kWholeBlock>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_kernel(Rows<T> given, const accumulator_t<T>* __restrict__ highs,
                                  const accumulator_t<T>* __restrict__ sums, const accumulator_t<T>* __restrict__ grad,
                                  T* __restrict__ out, accumulator_t<T> smoothing, int64_t chunks) {
  using Sum = accumulator_t<T>;
  using Wide = Pack<T, kWidth>;
  constexpr int kGroup = kWholeBlock ? kThreads : 32;
  const int64_t part = blockIdx.x * int64_t{kThreads / kGroup} + threadIdx.x / kGroup;
  const int64_t row = part / chunks, first = part % chunks * kChunk, last = min(given.classes, first + kChunk);
  if (row >= given.rows) return;
  const T* z = given.logits + row * given.stride;
  T* dz = out + row * given.classes;
  const int64_t target = given.targets[row];
  int64_t c = first + threadIdx.x % kGroup * kWidth;  // rows of `out` are aligned: no remainder
  if (target == given.ignored) {
    for (; c < last; c += kGroup * kWidth) *reinterpret_cast<Wide*>(dz + c) = Wide{};
    return;
  }
  const Sum high = highs[row], g = grad[row], inverse = Sum(1) / sums[row];
  const Sum hit = Sum(1) - smoothing, uniform = smoothing / static_cast<Sum>(given.classes);
  const auto derivative = [=](T logit, int64_t place) {
    const Sum share = exponential(static_cast<Sum>(logit) - high) * inverse - uniform;
    return static_cast<T>(g * (place == target ? share - hit : share));
  };
#pragma unroll(sizeof(T) == 8 ? 1 : 4)
  for (; c < last; c += kGroup * kWidth) {
    const Wide read = *reinterpret_cast<const Wide*>(z + c);
    Wide written;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) written.values[j] = derivative(read.values[j], c + j);
    *reinterpret_cast<Wide*>(dz + c) = written;
  }
}

}  // namespace

cudaError_t cross_entropy_rows(Scalar dtype, const void* logits, const int64_t* targets, void* losses, void* highs,
                               void* sums, int64_t rows, int64_t classes, int64_t stride, int64_t ignored,
                               double smoothing, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = rows_aligned(logits, stride * sizeof(T)), whole = classes > kOneWarp;
    const auto kernel = wide ? (whole ? cross_entropy_kernel<T, kWide, true> : cross_entropy_kernel<T, kWide, false>)
                             : (whole ? cross_entropy_kernel<T, 1, true> : cross_entropy_kernel<T, 1, false>);
    const Rows<T> given{static_cast<const T*>(logits), targets, rows, classes, stride, ignored};
    kernel<<<grid(whole ? rows : (rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
        given, static_cast<Sum*>(losses), static_cast<Sum*>(highs), static_cast<Sum*>(sums),
        static_cast<Sum>(smoothing));
    return cudaGetLastError();
  });
}

cudaError_t cross_entropy_rows_backward(Scalar dtype, const void* logits, const int64_t* targets, const void* highs,
                                        const void* sums, const void* grad, void* out, int64_t rows, int64_t classes,
                                        int64_t stride, int64_t ignored, double smoothing, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const int64_t size = sizeof(T);
    const bool wide = rows_aligned(logits, stride * size) && rows_aligned(out, classes * size);
    const bool whole = classes > kOneWarp;
    const auto kernel =
        wide ? (whole ? cross_entropy_backward_kernel<T, kWide, true> : cross_entropy_backward_kernel<T, kWide, false>)
             : (whole ? cross_entropy_backward_kernel<T, 1, true> : cross_entropy_backward_kernel<T, 1, false>);
    const int64_t chunks = whole ? (classes + kChunk - 1) / kChunk : 1;
    const Rows<T> given{static_cast<const T*>(logits), targets, rows, classes, stride, ignored};
    kernel<<<grid(whole ? rows * chunks : (rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(
        given, static_cast<const Sum*>(highs), static_cast<const Sum*>(sums), static_cast<const Sum*>(grad),
        static_cast<T*>(out), static_cast<Sum>(smoothing), chunks);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
