#include "cuda/scalars.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;  // elements of a row that one block sums

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// One block per chunk of a row; a thread reads kWidth elements at a time.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    row_dots_kernel(const T* __restrict__ x, const T* __restrict__ y, accumulator_t<T>* __restrict__ partial, int64_t k,
                    int64_t x_stride, int64_t y_stride, int64_t chunks) {
  using Sum = accumulator_t<T>;
  using Wide = Pack<T, kWidth>;
  const int64_t row = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  const int64_t last = min(k, first + kChunk);
  const T* xs = x + row * x_stride;
  const T* ys = y + row * y_stride;
  Sum total = 0;
  int64_t i = first + threadIdx.x * kWidth;
#pragma unroll 4
  for (; i + kWidth <= last; i += kThreads * kWidth) {
    const Wide a = *reinterpret_cast<const Wide*>(xs + i), b = *reinterpret_cast<const Wide*>(ys + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total += static_cast<Sum>(a.values[j]) * static_cast<Sum>(b.values[j]);
  }
  for (; i < last; ++i) total += static_cast<Sum>(xs[i]) * static_cast<Sum>(ys[i]);
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// A thread adds the chunks of its row in order, so the result is the same in every run.
template <typename Sum>
__global__ void add_chunks_kernel(const Sum* __restrict__ partial, Sum* __restrict__ out, int64_t n, int64_t chunks) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (row >= n) return;
  Sum total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[row * chunks + chunk];
  out[row] = total;
}

template <typename T>
bool rows_aligned(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

}  // namespace

int64_t row_dots_chunks(int64_t k) { return k > kChunk ? (k + kChunk - 1) / kChunk : 1; }

cudaError_t row_dots(Scalar dtype, const void* x, const void* y, void* workspace, void* out, int64_t n, int64_t k,
                     int64_t x_stride, int64_t y_stride, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t chunks = row_dots_chunks(k);
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = rows_aligned<T>(x, x_stride) && rows_aligned<T>(y, y_stride);
    const auto kernel = wide ? row_dots_kernel<T, kWide> : row_dots_kernel<T, 1>;
    Sum* partial = static_cast<Sum*>(chunks == 1 ? out : workspace);
    kernel<<<n * chunks, kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(y), partial, k,
                                                x_stride, y_stride, chunks);
    if (chunks > 1)
      add_chunks_kernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, stream>>>(partial, static_cast<Sum*>(out), n,
                                                                                chunks);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
