#include "cuda/rows.cuh"

namespace metakern::cuda {
namespace {

constexpr int kThreads = 256;     // of a block that shares a row
constexpr int kWarps = 4;         // of a block whose warps have rows of their own
constexpr int kWidest = 4096;     // elements of a row
constexpr int64_t kFewest = 32;   // fewest positions that are worth a block
constexpr int64_t kBlocks = 16;   // most blocks per multiprocessor that examples are cut into: some waves
constexpr int64_t kOverhead = 8;  // cost of starting a block and adding its sums, in positions; not measured

// Into how many chunks the positions of an example are cut, so that the last wave of blocks is about as full as others.
// Minimises the number of waves, of `at_a_time` blocks each, times the length of a chunk and its overhead.
int64_t fitting_chunks(int64_t n, int64_t t, int64_t at_a_time, int64_t most) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t chunks = 1; chunks <= most; ++chunks) {
    const int64_t waves = (n * chunks + at_a_time - 1) / at_a_time;
    const int64_t cost = waves * ((t + chunks - 1) / chunks + kOverhead);
    if (cost < least) least = cost, best = chunks;
  }
  return best;
}

int64_t multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count;
}

template <typename T>
struct Rows {
  const T *X, *B;
  int64_t t, width, x_stride_n, x_stride_t, b_stride_n, b_stride_t;
};

// What a thread holds of a row of X and of B.
template <typename T, int kWidth, int kPacks>
struct Held {
  Pack<T, kWidth> xs[kPacks], bs[kPacks];

  __device__ void load(const Rows<T>& rows, int64_t example, int64_t position, int group, int lane) {
    const T* x = rows.X + example * rows.x_stride_n + position * rows.x_stride_t;
    const T* b = rows.B + example * rows.b_stride_n + position * rows.b_stride_t;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t i = (p * group + lane) * kWidth;
      if (i < rows.width) {
        xs[p] = *reinterpret_cast<const Pack<T, kWidth>*>(x + i);
        bs[p] = *reinterpret_cast<const Pack<T, kWidth>*>(b + i);
      }
    }
  }
};

// Sum over a warp, or over the block that shares a row.
template <bool kWholeBlock, typename Sum>
__device__ Sum row_sum(Sum value) {
  if constexpr (kWholeBlock) {
    return block_sum(value);
  } else {
    return warp_sum(value);
  }
}

// Blocks per multiprocessor that the compiler leaves registers for, so that some read while others add; fewer where a
// thread holds much, so that nothing spills.
template <typename T, int kWidth, int kPacks>
constexpr int resident_blocks(bool whole_block) {
  if (sizeof(T) == 8 || (whole_block && kWidth == 1)) return 1;
  return whole_block || kWidth * kPacks == 32 ? 2 : 3;
}

// A warp, or the block where rows are too wide for one, holds a row in registers: its statistics and its products come
// from one reading, and the next row is on its way while threads wait for the sums of this one. Every thread keeps the
// sums of its own columns; the warps' are added in order at the end.
template <typename T, int kWidth, int kPacks, bool kWholeBlock>
__global__ void __launch_bounds__(kWholeBlock ? kThreads : 32 * kWarps, resident_blocks<T, kWidth, kPacks>(kWholeBlock))
    affine_grads_kernel(Rows<T> rows, accumulator_t<T>* __restrict__ scale, accumulator_t<T>* __restrict__ shift,
                        accumulator_t<T> eps, bool centred, int64_t chunks, int64_t length) {
  using Sum = accumulator_t<T>;
  constexpr int kGroup = kWholeBlock ? kThreads : 32;
  const int64_t example = blockIdx.x / chunks, first = blockIdx.x % chunks * length, width = rows.width;
  const int64_t last = min(rows.t, first + length);
  const int lane = threadIdx.x % kGroup, warp = threadIdx.x / kGroup, warps = blockDim.x / kGroup;
  Sum products[kPacks][kWidth] = {}, sums[kPacks][kWidth] = {};
  Held<T, kWidth, kPacks> row, next;
  if (first + warp < last) next.load(rows, example, first + warp, kGroup, lane);
  for (int64_t position = first + warp; position < last; position += warps) {
    row = next;
    if (position + warps < last) next.load(rows, example, position + warps, kGroup, lane);
    Sum mean = 0, squares = 0;
    if (centred) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        if ((p * kGroup + lane) * kWidth < width)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) mean += static_cast<Sum>(row.xs[p].values[j]);
      mean = row_sum<kWholeBlock>(mean) / static_cast<Sum>(width);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if ((p * kGroup + lane) * kWidth < width)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Sum distance = static_cast<Sum>(row.xs[p].values[j]) - mean;
          squares += distance * distance;
        }
    const Sum inverse = Sum(1) / sqrt(row_sum<kWholeBlock>(squares) / static_cast<Sum>(width) + eps);
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if ((p * kGroup + lane) * kWidth < width)
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Sum grad = static_cast<Sum>(row.bs[p].values[j]);
          products[p][j] += grad * ((static_cast<Sum>(row.xs[p].values[j]) - mean) * inverse);
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
    }  // the thread that has read a place is the next to write it, so one barrier a turn is enough
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

template <typename T>
using Kernel = void (*)(Rows<T>, accumulator_t<T>*, accumulator_t<T>*, accumulator_t<T>, bool, int64_t, int64_t);

// The kernel with the fewest packs per thread that hold a row, `kLeast` at least: more threads then run side by side.
template <typename T, int kWidth, int kPacks, int kLeast, bool kWholeBlock>
Kernel<T> fitting_kernel(int64_t width) {
  if constexpr (kPacks > kLeast)
    if (2 * width <= (kWholeBlock ? kThreads : 32) * kWidth * kPacks)
      return fitting_kernel<T, kWidth, kPacks / 2, kLeast, kWholeBlock>(width);
  return affine_grads_kernel<T, kWidth, kPacks, kWholeBlock>;
}

template <typename T>
struct Launch {
  Kernel<T> kernel;
  int threads;
};

template <typename T, int kWidth>
Launch<T> launch_of(int64_t width, int64_t t) {
  constexpr int kPacks = kWidth == 1 ? 16 : sizeof(T) == 8 ? 8 : 4;
  constexpr int kBlockPacks = kWidest / (kThreads * kWidth);
  constexpr int kHalvings = kWidth == 1 ? 1 : 4;  // rows that are not aligned are rare
  if (width > 32 * kWidth * kPacks) {
    constexpr int kLeast = kBlockPacks > kHalvings ? kBlockPacks / kHalvings : 1;
    return {fitting_kernel<T, kWidth, kBlockPacks, kLeast, true>(width), kThreads};
  }
  const int warps = t < kWarps ? (t > 0 ? static_cast<int>(t) : 1) : kWarps;
  return {fitting_kernel<T, kWidth, kPacks, kPacks / kHalvings, false>(width), 32 * warps};
}

}  // namespace

// The most chunks that a launch may take, for the size of the workspace; how many it takes depends on the kernel.
int64_t affine_grads_chunks(int64_t n, int64_t t) {
  const int64_t most = n > 0 ? kBlocks * multiprocessors() / n : 1, longest = (t + kFewest - 1) / kFewest;
  return most > 1 && longest > 1 ? (most < longest ? most : longest) : 1;
}

cudaError_t affine_grads(Scalar dtype, const void* X, const void* B, void* workspace, void* scale, void* shift,
                         int64_t n, int64_t t, int64_t width, int64_t x_stride_n, int64_t x_stride_t,
                         int64_t b_stride_n, int64_t b_stride_t, double eps, bool centred, cudaStream_t stream) {
  if (n == 0 || width == 0) return cudaSuccess;
  if (width > kWidest) return cudaErrorInvalidValue;
  return with_scalar(dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    using Sum = accumulator_t<T>;
    constexpr int kWide = 16 / sizeof(T);
    const int64_t size = sizeof(T);
    const bool wide = width % kWide == 0 && rows_aligned(X, x_stride_t * size) && rows_aligned(B, b_stride_t * size) &&
                      x_stride_n * size % 16 == 0 && b_stride_n * size % 16 == 0;
    const Rows<T> rows{
        static_cast<const T*>(X), static_cast<const T*>(B), t, width, x_stride_n, x_stride_t, b_stride_n, b_stride_t};
    const Launch<T> chosen = wide ? launch_of<T, kWide>(width, t) : launch_of<T, 1>(width, t);
    int resident = 0;
    const cudaError_t asked =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, chosen.kernel, chosen.threads, 0);
    if (asked != cudaSuccess) return asked;
    const int64_t at_a_time = multiprocessors() * (resident > 0 ? resident : 1);
    const int64_t chunks = fitting_chunks(n, t, at_a_time, affine_grads_chunks(n, t));
    const int64_t length = (t + chunks - 1) / chunks;
    Sum* const partial = static_cast<Sum*>(workspace);
    Sum* const scales = chunks == 1 ? static_cast<Sum*>(scale) : partial;
    Sum* const shifts = shift == nullptr ? nullptr
                        : chunks == 1    ? static_cast<Sum*>(shift)
                                         : partial + n * width * chunks;
    chosen.kernel<<<grid(n * chunks), chosen.threads, 0, stream>>>(rows, scales, shifts, static_cast<Sum>(eps), centred,
                                                                   chunks, length);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || chunks == 1) return error;
    add_chunks(scales, static_cast<Sum*>(scale), n, width, chunks, stream);
    if (shift != nullptr) add_chunks(shifts, static_cast<Sum*>(shift), n, width, chunks, stream);
    return cudaGetLastError();
  });
}

}  // namespace metakern::cuda
