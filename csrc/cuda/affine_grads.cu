#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;     // of a block that shares a row
constexpr int kWarps = 4;         // of a block whose warps have rows of their own
constexpr int kWidest = 4096;     // elements of a row
constexpr int64_t kBlocks = 512;  // blocks that fill a large chip a few times

// Positions of an example that one block sums: more, so that fewer sums are written and read again, while blocks
// remain.
int64_t positions(int64_t n, int64_t t) {
  int64_t length = 32;
  while (length < 256 && n * ((t + 2 * length - 1) / (2 * length)) >= kBlocks) length *= 2;
  return length;
}

template <typename T>
struct Rows {
  const T *X, *B;
  int64_t t, width, x_stride_n, x_stride_t, b_stride_n, b_stride_t;
};

// Sum over a warp, or over the block that shares a row.
template <bool kWholeBlock, typename Sum>
__device__ Sum row_sum(Sum value) {
  if constexpr (kWholeBlock) {
    return block_sum(value);
  } else {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
  }
}

// A warp, or the block where rows are too wide for one, holds a row in registers: its statistics and its products come
// from one reading. Every thread keeps the sums of its own columns; the warps' are added in order at the end.
// Several blocks to a multiprocessor, so that some read while others add.
template <typename T, int kWidth, int kPacks, bool kWholeBlock>
__global__ void __launch_bounds__(kWholeBlock ? kThreads : 32 * kWarps, sizeof(T) == 8 ? 1
                                                                        : kWholeBlock  ? 2
                                                                                       : 3)
    affine_grads_kernel(Rows<T> rows, accumulator_t<T>* __restrict__ scale, accumulator_t<T>* __restrict__ shift,
                        accumulator_t<T> eps, bool centred, int64_t chunks, int64_t length) {
  using Sum = accumulator_t<T>;
  using Wide = Pack<T, kWidth>;
  constexpr int kGroup = kWholeBlock ? kThreads : 32;
  const int64_t example = blockIdx.x / chunks, first = blockIdx.x % chunks * length, width = rows.width;
  const int64_t last = min(rows.t, first + length);
  const int lane = threadIdx.x % kGroup, warp = threadIdx.x / kGroup, warps = blockDim.x / kGroup;
  Sum products[kPacks][kWidth] = {}, sums[kPacks][kWidth] = {};
  for (int64_t position = first + warp; position < last; position += warps) {
    const T* x = rows.X + example * rows.x_stride_n + position * rows.x_stride_t;
    const T* b = rows.B + example * rows.b_stride_n + position * rows.b_stride_t;
    Wide xs[kPacks], bs[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t i = (p * kGroup + lane) * kWidth;
      if (i < width) {
        xs[p] = *reinterpret_cast<const Wide*>(x + i);
        bs[p] = *reinterpret_cast<const Wide*>(b + i);
      }
    }
    Sum mean = 0, squares = 0;
    if (centred) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        if ((p * kGroup + lane) * kWidth < width)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) mean += static_cast<Sum>(xs[p].values[j]);
      mean = row_sum<kWholeBlock>(mean) / static_cast<Sum>(width);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if ((p * kGroup + lane) * kWidth < width)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Sum distance = static_cast<Sum>(xs[p].values[j]) - mean;
          squares += distance * distance;
        }
    const Sum inverse = Sum(1) / sqrt(row_sum<kWholeBlock>(squares) / static_cast<Sum>(width) + eps);
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if ((p * kGroup + lane) * kWidth < width)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Sum grad = static_cast<Sum>(bs[p].values[j]);
          products[p][j] += grad * ((static_cast<Sum>(xs[p].values[j]) - mean) * inverse);
          sums[p][j] += grad;
        }
  }
  if constexpr (!kWholeBlock) {
    __shared__ Sum others[2][kPacks * kGroup * kWidth];
    for (int turn = warps - 1; turn > 0; --turn) {
      if (warp == turn)
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const int place = (p * kWidth + j) * kGroup + lane;  // neighbours in different banks
            others[0][place] = products[p][j];
            others[1][place] = sums[p][j];
          }
      __syncthreads();
      if (warp == turn - 1)
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const int place = (p * kWidth + j) * kGroup + lane;
            products[p][j] += others[0][place];
            sums[p][j] += others[1][place];
          }
      __syncthreads();
    }
    if (warp > 0) return;
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = (p * kGroup + lane) * kWidth;
    if (i >= width) continue;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      scale[blockIdx.x * width + i + j] = products[p][j];
      if (shift != nullptr) shift[blockIdx.x * width + i + j] = sums[p][j];
    }
  }
}

// A thread adds the chunks of its column in order, so the result is the same in every run.
template <typename Sum>
__global__ void add_columns_kernel(const Sum* __restrict__ partial, Sum* __restrict__ out, int64_t columns,
                                   int64_t width, int64_t chunks) {
  const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (column >= columns) return;
  const Sum* from = partial + column / width * chunks * width + column % width;
  Sum total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += from[chunk * width];
  out[column] = total;
}

template <typename T, int kWidth>
cudaError_t launch(Rows<T> rows, accumulator_t<T>* scale, accumulator_t<T>* shift, int64_t n, double eps, bool centred,
                   int64_t chunks, int64_t length, cudaStream_t stream) {
  constexpr int kPacks = kWidth == 1 ? 16 : sizeof(T) == 8 ? 8 : 4;
  constexpr int kBlockPacks = kWidest / (kThreads * kWidth);
  if (rows.width > kWidest) return cudaErrorInvalidValue;
  const auto sum = static_cast<accumulator_t<T>>(eps);
  if (rows.width > 32 * kWidth * kPacks) {
    affine_grads_kernel<T, kWidth, kBlockPacks, true>
        <<<grid(n * chunks), kThreads, 0, stream>>>(rows, scale, shift, sum, centred, chunks, length);
  } else {
    const int warps = rows.t < kWarps ? (rows.t > 0 ? static_cast<int>(rows.t) : 1) : kWarps;
    affine_grads_kernel<T, kWidth, kPacks, false>
        <<<grid(n * chunks), 32 * warps, 0, stream>>>(rows, scale, shift, sum, centred, chunks, length);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t affine_grads_chunks(int64_t n, int64_t t) {
  const int64_t length = positions(n, t);
  return t > length ? (t + length - 1) / length : 1;
}

cudaError_t affine_grads(Scalar dtype, const void* X, const void* B, void* workspace, void* scale, void* shift,
                         int64_t n, int64_t t, int64_t width, int64_t x_stride_n, int64_t x_stride_t,
                         int64_t b_stride_n, int64_t b_stride_t, double eps, bool centred, cudaStream_t stream) {
  if (n == 0 || width == 0) return cudaSuccess;
  const int64_t chunks = affine_grads_chunks(n, t), columns = n * width;
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const int64_t size = sizeof(T);
    const bool wide = width % kWide == 0 && rows_aligned(X, x_stride_t * size) && rows_aligned(B, b_stride_t * size) &&
                      x_stride_n * size % 16 == 0 && b_stride_n * size % 16 == 0;
    const Rows<T> rows{
        static_cast<const T*>(X), static_cast<const T*>(B), t, width, x_stride_n, x_stride_t, b_stride_n, b_stride_t};
    Sum* const partial = static_cast<Sum*>(workspace);
    Sum* const scales = chunks == 1 ? static_cast<Sum*>(scale) : partial;
    Sum* const shifts = shift == nullptr ? nullptr
                        : chunks == 1    ? static_cast<Sum*>(shift)
                                         : partial + columns * chunks;
    const auto run = wide ? launch<T, kWide> : launch<T, 1>;
    const cudaError_t error = run(rows, scales, shifts, n, eps, centred, chunks, positions(n, t), stream);
    if (error != cudaSuccess || chunks == 1) return error;
    const int64_t blocks = (columns + kThreads - 1) / kThreads;
    add_columns_kernel<<<grid(blocks), kThreads, 0, stream>>>(scales, static_cast<Sum*>(scale), columns, width, chunks);
    if (shift != nullptr)
      add_columns_kernel<<<grid(blocks), kThreads, 0, stream>>>(shifts, static_cast<Sum*>(shift), columns, width,
                                                                chunks);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
