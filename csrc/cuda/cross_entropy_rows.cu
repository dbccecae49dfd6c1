#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;

// Unrolled, float64 exponentials make the compiler spill.
template <typename Sum>
constexpr int kUnroll = sizeof(Sum) == 8 ? 1 : 4;

// Maximum and sum of exponentials below it, of the part of a row that one thread or warp has seen.
template <typename Sum>
struct Running {
  Sum high, sum;

  __device__ void include(Sum z) {
    if (z > high) {
      sum = sum * exp(high - z) + Sum(1);
      high = z;
    } else if (high != -INFINITY || z != z) {
      sum += exp(z - high);
    }
  }

  __device__ void merge(Sum other_high, Sum other_sum) {
    const Sum top = high > other_high ? high : other_high;
    if (top == -INFINITY) return;  // neither has seen a value: a difference of infinities would be NaN
    sum = sum * exp(high - top) + other_sum * exp(other_high - top);
    high = top;
  }
};

template <typename Sum>
__device__ Running<Sum> block_merge(Running<Sum> mine) {
  __shared__ Sum highs[32], sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll kUnroll < Sum>
  for (int offset = 16; offset > 0; offset /= 2)
    mine.merge(__shfl_xor_sync(0xffffffffu, mine.high, offset), __shfl_xor_sync(0xffffffffu, mine.sum, offset));
  if (lane == 0) {
    highs[warp] = mine.high;
    sums[warp] = mine.sum;
  }
  __syncthreads();
  Running<Sum> all{highs[0], sums[0]};
#pragma unroll kUnroll < Sum>
  for (int w = 1; w < kThreads / 32; ++w) all.merge(highs[w], sums[w]);
  return all;
}

// One block per row: one pass for the normaliser, one for the gradient, which finds the row in the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                         accumulator_t<T>* __restrict__ losses, T* __restrict__ grad, int64_t classes, int64_t stride,
                         int64_t ignore, double smoothing) {
  using Sum = accumulator_t<T>;
  const int64_t row = blockIdx.x, target = targets[row];
  const T* z = logits + row * stride;
  T* g = grad + row * classes;
  if (target == ignore) {
    for (int64_t c = threadIdx.x; c < classes; c += kThreads) g[c] = T(0.0f);
    if (threadIdx.x == 0) losses[row] = 0;
    return;
  }
  if (target < 0 || target >= classes) __trap();  // as the loss itself would have stopped
  Running<Sum> mine{-INFINITY, 0};
  Sum total = 0;
#pragma unroll kUnroll < Sum>
  for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
    const Sum value = static_cast<Sum>(z[c]);
    mine.include(value);
    total += value;
  }
  const Running<Sum> all = block_merge(mine);
  const Sum share = static_cast<Sum>(smoothing), uniform = share / static_cast<Sum>(classes);
  const Sum inverse = Sum(1) / all.sum;
#pragma unroll kUnroll < Sum>
  for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
    const Sum p = exp(static_cast<Sum>(z[c]) - all.high) * inverse - uniform;
    g[c] = static_cast<T>(c == target ? p - (Sum(1) - share) : p);
  }
  if (smoothing != 0) total = block_sum(total);
  if (threadIdx.x != 0) return;
  const Sum loss = all.high + log(all.sum) - (Sum(1) - share) * static_cast<Sum>(z[target]);
  losses[row] = smoothing == 0 ? loss : loss - uniform * total;  // a masked class has -inf in its logit and the total
}

}  // namespace

cudaError_t cross_entropy_rows(Scalar dtype, const void* logits, const int64_t* targets, void* losses, void* grad,
                               int64_t rows, int64_t classes, int64_t stride, int64_t ignore, double smoothing,
                               cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    cross_entropy_kernel<T><<<rows, kThreads, 0, stream>>>(static_cast<const T*>(logits), targets,
                                                           static_cast<accumulator_t<T>*>(losses),
                                                           static_cast<T*>(grad), classes, stride, ignore, smoothing);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
