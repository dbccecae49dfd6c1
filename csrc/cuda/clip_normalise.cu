#include "cuda/scalars.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 1024;

// One block, two passes over the dots: a batch fits the cache, and one launch is what there is to save.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    clip_normalise_kernel(const T* __restrict__ dots, T* __restrict__ weights, int64_t n, int64_t stride) {
  using Sum = accumulator_t<T>;
  const auto clipped = [=](int64_t k) {
    const Sum dot = static_cast<Sum>(dots[k * stride]);
    return dot < Sum(0) ? Sum(0) : dot;  // a NaN passes
  };
  Sum total = 0;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) total += clipped(k);
  total = block_sum(total);
  const Sum divisor = total == Sum(0) ? Sum(1) : total;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) weights[k] = static_cast<T>(clipped(k) / divisor);
}

}  // namespace

cudaError_t usable() {
  cudaFuncAttributes found;  // of any kernel: all are compiled for the same devices
  const cudaError_t error = cudaFuncGetAttributes(&found, clip_normalise_kernel<float>);
  cudaGetLastError();
  return error;
}

cudaError_t clip_normalise(Scalar dtype, const void* dots, void* weights, int64_t n, int64_t stride,
                           cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    clip_normalise_kernel<T>
        <<<1, kThreads, 0, stream>>>(static_cast<const T*>(dots), static_cast<T*>(weights), n, stride);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
