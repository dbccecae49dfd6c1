// The device that is emulated: blocks one after another, the threads of a block as fibers that meet where they wait.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace emulated {

struct Index {
  unsigned x, y, z;
};

struct Geometry {
  std::int64_t grid, block;
  std::size_t shared;
  CUstream_st* stream;
};

Index thread_index();
Index block_index();
Index block_size();

// Runs the kernel, or leaves an error for cudaGetLastError. Throws std::runtime_error for what a device would let pass,
// or stop the program for.
void run(const Geometry& geometry, void (*thread)(const void*), const void* parameters, std::size_t size);

// First thing in a kernel: its place in the code is noted, and __launch_bounds__ kept.
void enter(int most_threads);
void barrier();
std::uint64_t exchange(unsigned mask, std::uint64_t value, int from_lane);
// Memory of the block for the __shared__ variable that `key` stands for.
void* shared(const void* key, std::size_t size, std::size_t alignment);
bool occupancy(int* blocks, int threads);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Between device.cpp and memory.cpp.
struct Running {
  bool inside = false;             // a thread of a kernel runs, and not the host
  std::uint64_t launch = 0;        // counts launches
  std::uint64_t thread = 0;        // of the launch
  std::uint64_t barrier = 0;       // counts barriers of all blocks
  std::uint64_t block_begins = 0;  // the barrier that this block began with
  const char *stack = nullptr, *stack_end = nullptr;
  const char *parameters = nullptr, *parameters_end = nullptr;
};
extern Running running;
constexpr std::size_t kShared = 48 << 10;
extern char shared_memory[kShared];
void memory_begins_launch();

}  // namespace emulated
