// What every CUDA kernel needs: the type to sum in, conversions, a deterministic block sum, dispatch on the dtype.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"

namespace metakern::cuda {

// Sums are kept in float32, or float64 for float64.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

// Sum over the warp, returned to every thread.
template <typename Sum>
__device__ Sum warp_sum(Sum value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over the block, returned to every thread; always in the same order. Blocks are whole warps.
template <typename Sum>
__device__ Sum block_sum(Sum value) {
  __shared__ Sum partial[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  value = warp_sum(value);
  __syncthreads();  // a previous call may still be read
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : Sum(0));
}

// Number of blocks of a grid; 0, which the launch rejects, if there are too many for one.
inline unsigned grid(int64_t blocks) { return blocks > 0x7fffffff ? 0 : static_cast<unsigned>(blocks); }

template <typename T>
struct Type {
  using type = T;
};

// Calls `launch(Type<T>{})` with the element type of `dtype`.
template <typename Launch>
cudaError_t with_scalar(Scalar dtype, Launch&& launch) {
  switch (dtype) {
    case Scalar::f16: return launch(Type<__half>{});
    case Scalar::bf16: return launch(Type<__nv_bfloat16>{});
    case Scalar::f32: return launch(Type<float>{});
    case Scalar::f64: return launch(Type<double>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace metakern::cuda
