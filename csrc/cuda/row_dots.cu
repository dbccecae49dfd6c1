#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;  // elements of a row that one block sums

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
    const bool wide = rows_aligned(x, x_stride * sizeof(T)) && rows_aligned(y, y_stride * sizeof(T));
    const auto kernel = wide ? row_dots_kernel<T, kWide> : row_dots_kernel<T, 1>;
    Sum* partial = static_cast<Sum*>(chunks == 1 ? out : workspace);
    kernel<<<grid(n * chunks), kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(y), partial, k,
                                                      x_stride, y_stride, chunks);
    if (chunks > 1) add_chunks(partial, static_cast<Sum*>(out), n, 1, chunks, stream);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
