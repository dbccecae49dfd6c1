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

// out[row, column] = sum over chunks of partial[row, chunk, column]. A thread adds its chunks in order, so the result
// is the same in every run.
template <typename Sum>
static __global__ void add_chunks_kernel(const Sum* __restrict__ partial, Sum* __restrict__ out, int64_t size,
                                         int64_t width, int64_t chunks) {
  const int64_t place = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (place >= size) return;
  const Sum* from = partial + place / width * chunks * width + place % width;
  Sum total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += from[chunk * width];
  out[place] = total;
}

template <typename Sum>
void add_chunks(const Sum* partial, Sum* out, int64_t n, int64_t width, int64_t chunks, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t size = n * width;
  add_chunks_kernel<<<grid((size + kThreads - 1) / kThreads), kThreads, 0, stream>>>(partial, out, size, width, chunks);
}

}  // namespace metakern::cuda
