#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kPositions = 32;  // positions of an example that one block sums

template <typename Sum>
__device__ Sum warp_sum(Sum value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <typename T>
struct Rows {
  const T *X, *B, *V, *v;
  int64_t t, width, x_stride_n, x_stride_t, b_stride_n, b_stride_t;
};

// A warp per position: one pass for the mean, one for the variance and the products; the second finds the row in the
// cache.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) affine_dots_kernel(Rows<T> rows, accumulator_t<T>* __restrict__ partial,
                                                               accumulator_t<T> eps, bool centred, int64_t chunks) {
  using Sum = accumulator_t<T>;
  using Wide = Pack<T, kWidth>;
  const int64_t example = blockIdx.x / chunks, first = blockIdx.x % chunks * kPositions;
  const int64_t last = min(rows.t, first + kPositions), width = rows.width;
  const int lane = threadIdx.x % 32;
  const auto load = [](const T* p) { return *reinterpret_cast<const Wide*>(p); };
  Sum total = 0;
  for (int64_t position = first + threadIdx.x / 32; position < last; position += kWarps) {
    const T* x = rows.X + example * rows.x_stride_n + position * rows.x_stride_t;
    const T* b = rows.B + example * rows.b_stride_n + position * rows.b_stride_t;
    Sum mean = 0;
    if (centred) {
      for (int64_t i = lane * kWidth; i < width; i += 32 * kWidth) {
        const Wide xs = load(x + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) mean += static_cast<Sum>(xs.values[j]);
      }
      mean = warp_sum(mean) / static_cast<Sum>(width);
    }
    Sum squares = 0, products = 0, shifts = 0;
    for (int64_t i = lane * kWidth; i < width; i += 32 * kWidth) {
      const Wide xs = load(x + i), bs = load(b + i), Vs = load(rows.V + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Sum distance = static_cast<Sum>(xs.values[j]) - mean;
        squares += distance * distance;
        products += distance * static_cast<Sum>(bs.values[j]) * static_cast<Sum>(Vs.values[j]);
      }
      if (rows.v != nullptr) {
        const Wide vs = load(rows.v + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) shifts += static_cast<Sum>(bs.values[j]) * static_cast<Sum>(vs.values[j]);
      }
    }
    const Sum variance = warp_sum(squares) / static_cast<Sum>(width);
    total += products / sqrt(variance + eps) + shifts;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace

int64_t affine_dots_chunks(int64_t t) { return t > kPositions ? (t + kPositions - 1) / kPositions : 1; }

cudaError_t affine_dots(Scalar dtype, const void* X, const void* B, const void* V, const void* v, void* workspace,
                        void* out, int64_t n, int64_t t, int64_t width, int64_t x_stride_n, int64_t x_stride_t,
                        int64_t b_stride_n, int64_t b_stride_t, double eps, bool centred, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t chunks = affine_dots_chunks(t);
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const int64_t size = sizeof(T);
    const bool wide = width % kWide == 0 && rows_aligned(X, x_stride_t * size) && rows_aligned(B, b_stride_t * size) &&
                      x_stride_n * size % 16 == 0 && b_stride_n * size % 16 == 0 && rows_aligned(V, 0) &&
                      rows_aligned(v, 0);
    const auto kernel = wide ? affine_dots_kernel<T, kWide> : affine_dots_kernel<T, 1>;
    const Rows<T> rows{static_cast<const T*>(X),
                       static_cast<const T*>(B),
                       static_cast<const T*>(V),
                       static_cast<const T*>(v),
                       t,
                       width,
                       x_stride_n,
                       x_stride_t,
                       b_stride_n,
                       b_stride_t};
    Sum* partial = static_cast<Sum*>(chunks == 1 ? out : workspace);
    kernel<<<n * chunks, kThreads, 0, stream>>>(rows, partial, static_cast<Sum>(eps), centred, chunks);
    if (chunks > 1) add_chunks(partial, static_cast<Sum*>(out), n, chunks, stream);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
