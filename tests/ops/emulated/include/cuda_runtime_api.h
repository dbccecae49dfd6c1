// Stands for CUDA's header of this name: the runtime as csrc/ calls it, and what device code finds without an include.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "device.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

extern "C" {
cudaError_t cudaGetLastError();
cudaError_t emulated_find_image();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t) {
  return emulated::occupancy(blocks, threads) ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return emulated_find_image();
}

#define __device__
#define __global__ __attribute__((noinline))
#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define blockDim (emulated::block_size())

inline void __syncthreads() { emulated::barrier(); }
[[noreturn]] inline void __trap() { emulated::fail("__trap() was called"); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulated::exchange(mask, bits, static_cast<int>(emulated::thread_index().x % 32) ^ lanes);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// CUDA's own for two arguments of one type; of a number and a NaN the number.
inline std::int64_t min(std::int64_t x, std::int64_t y) { return x < y ? x : y; }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
using std::exp;
using std::exp2f;
using std::log;
using std::sqrt;

namespace emulated {

// kernel<<<grid, block, shared, stream>>>(given...): every thread starts from copies, as from the constant bank.
template <typename Body>
struct Launch {
  Geometry geometry;
  Body body;

  template <typename... Given>
  void operator()(Given... given) const {
    struct Parameters {
      Body body;
      std::tuple<Given...> given;
    } const parameters{body, {given...}};
    const auto thread = [](const void* found) {
      const auto& copied = *static_cast<const Parameters*>(found);
      std::apply(copied.body, copied.given);
    };
    static_assert((sizeof(Given) + ... + 0) <= 4096, "a kernel takes 4 KiB of arguments");
    run(geometry, thread, &parameters, sizeof(parameters));
  }
};

template <typename Body>
Launch<Body> launch(std::int64_t grid, std::int64_t block, std::size_t shared, cudaStream_t stream, Body body) {
  return {{grid, block, shared, stream}, body};
}

}  // namespace emulated
