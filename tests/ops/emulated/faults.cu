// Kernels with one mistake each, which the emulated device has to find.
#include <stdexcept>
#include <string>

#include "cuda/scalars.cuh"

namespace {

using metakern::cuda::block_sum;

struct alignas(16) Wide {
  float values[4];
};

// A sum over the threads by way of memory, in one of several wrong ways.
template <int kFault>
__global__ void __launch_bounds__(64) fault_kernel(const float* __restrict__ x, float* __restrict__ out, int n) {
  __shared__ float parts[64];
  const int k = threadIdx.x;
  float value = k < n ? x[k] : 0.0f;
  if (kFault == 1 && k == 63) value += x[n];
  if (kFault == 2 && k == 63) value += x[-1];
  if (kFault == 3 && k == 0) value += reinterpret_cast<const Wide*>(x + 1)->values[n % 4];
  if (kFault == 4 && k == 0) {
    const Wide last = *reinterpret_cast<const Wide*>(x + n - n % 4);
    value += last.values[n % 4 - 1];
  }
  if (kFault == 5 && k == 0) const_cast<float*>(x)[0] = 1.0f;
  if (kFault == 6 && k == 0) value += out[0];
  if (kFault == 7 && k >= 48) return;
  if (kFault == 8 && k >= 48) value = block_sum(value);
  if (kFault == 9 && k >= 32) __trap();
  if (kFault == 19 && k == 48) return;
  if (kFault == 14) value += __shfl_xor_sync(0xffffu, value, 1);
  if (kFault == 15) value += __shfl_xor_sync(0xffffffffu, value, 32);
  if (kFault == 19) value += __shfl_xor_sync(0xffffffffu, value, 1);
  if (kFault != 10) parts[k] = value;
  if (kFault != 11) __syncthreads();
  float total = 0.0f;
  for (int other = 0; other < 64; ++other) total += parts[other + (kFault == 12 ? 1 : 0)];
  if (kFault == 13) parts[k] = total;
  if (k == 0 || kFault == 16) out[blockIdx.x] = total;
  if (kFault == 17 && k == 0) out[1 - blockIdx.x] = total;
  if (kFault == 18 && k == 0) out[0] = static_cast<float>(n * (1 << 30));
}

template <int kLast>
void launch_fault(int fault, const float* x, float* out, int n, int blocks, int threads, cudaStream_t stream) {
  if (fault == kLast) fault_kernel<kLast><<<blocks, threads, 0, stream>>>(x, out, n);
  if constexpr (kLast > 0) launch_fault<kLast - 1>(fault, x, out, n, blocks, threads, stream);
}

std::string found;

}  // namespace

// What was found, or nothing.
extern "C" const char* emulated_fault(int fault, const float* x, float* out, int n, int blocks, int threads,
                                      cudaStream_t stream) {
  found.clear();
  try {
    launch_fault<19>(fault, x, out, n, blocks, threads, stream);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) found = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    found = error.what();
  }
  return found.c_str();
}
