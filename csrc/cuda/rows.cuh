// Rows that are summed by several blocks: wide loads, and partial sums added in a fixed order.
#pragma once
#include "cuda/scalars.cuh"

namespace metakern::cuda {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// Whether rows of this many bytes from one to the next can be read 16 bytes at a time.
inline bool rows_aligned(const void* base, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_bytes % 16 == 0;
}

// A thread adds the chunks of its row in order, so the result is the same in every run.
template <typename Sum>
static __global__ void add_chunks_kernel(const Sum* __restrict__ partial, Sum* __restrict__ out, int64_t n,
                                         int64_t chunks) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (row >= n) return;
  Sum total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[row * chunks + chunk];
  out[row] = total;
}

template <typename Sum>
void add_chunks(const Sum* partial, Sum* out, int64_t n, int64_t chunks, cudaStream_t stream) {
  constexpr int kThreads = 256;
  add_chunks_kernel<<<grid((n + kThreads - 1) / kThreads), kThreads, 0, stream>>>(partial, out, n, chunks);
}

}  // namespace metakern::cuda
