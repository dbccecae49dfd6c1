#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kPositions = 32;  // positions of an example that one block sums

// One warp per position at a time; a lane reads kWidth elements of both rows.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    embedding_dots_kernel(const int64_t* __restrict__ indices, const T* __restrict__ V, const T* __restrict__ B,
                          accumulator_t<T>* __restrict__ partial, int64_t t, int64_t width, int64_t rows,
                          int64_t v_stride, int64_t b_stride_n, int64_t b_stride_t, int64_t padding, int64_t chunks) {
  using Sum = accumulator_t<T>;
  using Wide = Pack<T, kWidth>;
  const int64_t example = blockIdx.x / chunks, first = blockIdx.x % chunks * kPositions;
  const int64_t last = min(t, first + kPositions);
  const int lane = threadIdx.x % 32;
  Sum total = 0;
  for (int64_t position = first + threadIdx.x / 32; position < last; position += kWarps) {
    const int64_t index = indices[example * t + position];
    if (index < 0 || index >= rows) __trap();  // as the embedding itself would have stopped
    if (index == padding) continue;            // never true without padding, which is -1
    const T* v = V + index * v_stride;
    const T* b = B + example * b_stride_n + position * b_stride_t;
    int64_t i = lane * kWidth;
#pragma unroll 4
    for (; i + kWidth <= width; i += 32 * kWidth) {
      const Wide x = *reinterpret_cast<const Wide*>(v + i), y = *reinterpret_cast<const Wide*>(b + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total += static_cast<Sum>(x.values[j]) * static_cast<Sum>(y.values[j]);
    }
    for (; i < width; ++i) total += static_cast<Sum>(v[i]) * static_cast<Sum>(b[i]);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace

int64_t embedding_dots_chunks(int64_t t) { return t > kPositions ? (t + kPositions - 1) / kPositions : 1; }

cudaError_t embedding_dots(Scalar dtype, const int64_t* indices, const void* V, const void* B, void* workspace,
                           void* out, int64_t n, int64_t t, int64_t width, int64_t rows, int64_t v_stride,
                           int64_t b_stride_n, int64_t b_stride_t, int64_t padding, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t chunks = embedding_dots_chunks(t);
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = rows_aligned(V, v_stride * sizeof(T)) && rows_aligned(B, b_stride_t * sizeof(T)) &&
                      b_stride_n * sizeof(T) % 16 == 0;
    const auto kernel = wide ? embedding_dots_kernel<T, kWide> : embedding_dots_kernel<T, 1>;
    Sum* partial = static_cast<Sum*>(chunks == 1 ? out : workspace);
    kernel<<<grid(n * chunks), kThreads, 0, stream>>>(indices, static_cast<const T*>(V), static_cast<const T*>(B),
                                                      partial, t, width, rows, v_stride, b_stride_n, b_stride_t,
                                                      padding, chunks);
    if (chunks > 1) add_chunks(partial, static_cast<Sum*>(out), n, 1, chunks, stream);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
