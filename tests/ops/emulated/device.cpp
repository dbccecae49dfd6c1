// Runs kernels: every thread of a block is a fiber, resumed in order until all wait. What can be released then is; if
// nothing can, threads wait for some that never come, which on a device hangs or is undefined.
#include "device.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

// those of CUDA's language are no names here
#undef threadIdx
#undef blockIdx
#undef blockDim

namespace emulated {

Running running;
alignas(16) char shared_memory[kShared];

namespace {

constexpr std::size_t kStack = 64 << 10, kGuard = 4 << 10, kPoison = 8 << 10, kFrame = 512;
constexpr int kMostThreads = 1024, kLanes = 32;
constexpr std::int64_t kMostBlocks = 0x7fffffff;

enum class State { ready, at_barrier, at_shuffle, finished };

struct Fiber {
  char* stack = nullptr;
  char* unused = nullptr;  // end of the part that no frame of the scheduler's is in
  bool started = false;
  ucontext_t start;
  jmp_buf resume;
  State state = State::finished;
  unsigned mask = 0;
  std::uint64_t value = 0;
  int from_lane = 0;
};

struct Variable {
  const void* key;
  std::size_t offset;
};

Fiber fibers[kMostThreads];
jmp_buf scheduler;
Fiber* current = nullptr;
Geometry geometry;
std::int64_t block = 0;
void (*body)(const void*) = nullptr;
std::vector<Variable> variables;
std::size_t shared_used = 0;
std::string failure, notes;
cudaError_t last_error = cudaSuccess;

int multiprocessors = 132, resident = 2;
bool has_image = true, backwards = false;
CUstream_st* expected_stream = nullptr;

int number(const Fiber& fiber) { return static_cast<int>(&fiber - fibers); }

void wait(State state) {
  current->state = state;
  current->unused = static_cast<char*>(__builtin_frame_address(0)) - kFrame;
  running.inside = false;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
  running.inside = true;
}

void live() {
  for (;;) {
    running.inside = true;
    body(running.parameters);
    wait(State::finished);
  }
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* found = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED || mprotect(found, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(found);
  }
  // a variable that is read before it is written is NaN
  std::memset((fiber.started ? fiber.unused : fiber.stack + kStack) - kPoison, 0xff, kPoison);
  if (!fiber.started) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, live, 0);
  }
  fiber.state = State::ready;
}

void resume(Fiber& fiber) {
  current = &fiber;
  running.stack = fiber.stack;
  running.stack_end = fiber.stack + kStack;
  running.thread = static_cast<std::uint64_t>(block * geometry.block + number(fiber));
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  if (!failure.empty()) {
    for (Fiber& each : fibers) each.started = false;  // in the middle of a kernel that is given up
    throw std::runtime_error(failure);
  }
}

// Of a thread that waits in vain.
[[noreturn]] void give_up(const Fiber& fiber, const std::string& what) {
  for (Fiber& each : fibers) each.started = false;
  throw std::runtime_error("block " + std::to_string(block) + ", thread " + std::to_string(number(fiber)) + ": " +
                           what);
}

// Whether every lane that this one names waits in the same shuffle.
bool complete(const Fiber& fiber) {
  const int warp = number(fiber) / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((fiber.mask >> lane & 1) == 0) continue;
    const bool exists = warp + lane < geometry.block;
    const Fiber& other = fibers[warp + lane];
    if (!exists || other.state == State::finished)
      give_up(fiber, "a shuffle names lane " + std::to_string(lane) + ", which has left or never was");
    if (other.state != State::at_shuffle) return false;
    if (other.mask != fiber.mask) give_up(fiber, "lanes of one shuffle name different lanes");
  }
  return true;
}

bool release_shuffles() {
  bool released = false;
  std::uint64_t values[kLanes] = {};
  for (int warp = 0; warp < geometry.block; warp += kLanes)
    for (int first = warp; first < std::min<std::int64_t>(warp + kLanes, geometry.block); ++first) {
      if (fibers[first].state != State::at_shuffle || !complete(fibers[first])) continue;
      const unsigned mask = fibers[first].mask;
      for (int lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1) values[lane] = fibers[warp + lane].value;
      for (int lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1) {
          fibers[warp + lane].value = values[fibers[warp + lane].from_lane];
          fibers[warp + lane].state = State::ready;
        }
      released = true;
    }
  return released;
}

bool release_barrier() {
  const Fiber* waiting = nullptr;
  const Fiber* finished = nullptr;
  for (int k = 0; k < geometry.block; ++k) {
    if (fibers[k].state == State::at_shuffle) return false;
    (fibers[k].state == State::at_barrier ? waiting : finished) = &fibers[k];
  }
  if (waiting == nullptr) return false;
  if (finished != nullptr)
    give_up(*waiting, "waits in __syncthreads(), which thread " + std::to_string(number(*finished)) + " never reaches");
  for (int k = 0; k < geometry.block; ++k) fibers[k].state = State::ready;
  ++running.barrier;
  return true;
}

void run_block() {
  const int threads = static_cast<int>(geometry.block);
  for (int k = 0; k < threads; ++k) prepare(fibers[k]);
  running.block_begins = ++running.barrier;
  for (bool more = true; more;) {
    for (int k = 0; k < threads; ++k) {
      Fiber& fiber = fibers[backwards ? threads - 1 - k : k];
      if (fiber.state == State::ready) resume(fiber);
    }
    more = release_shuffles();
    more = more || release_barrier();
  }
  for (const State state : {State::at_shuffle, State::at_barrier})
    for (int k = 0; k < threads; ++k)
      if (fibers[k].state == state) give_up(fibers[k], "waits for lanes or threads that wait elsewhere");
}

}  // namespace

Index thread_index() { return {static_cast<unsigned>(number(*current)), 0, 0}; }
Index block_index() { return {static_cast<unsigned>(block), 0, 0}; }
Index block_size() { return {static_cast<unsigned>(geometry.block), 1, 1}; }

void barrier() { wait(State::at_barrier); }

std::uint64_t exchange(unsigned mask, std::uint64_t value, int from_lane) {
  if ((mask >> (number(*current) % kLanes) & 1) == 0) fail("a shuffle does not name the lane that calls it");
  if (from_lane < 0 || from_lane >= kLanes || (mask >> from_lane & 1) == 0)
    fail("a shuffle reads lane %d, which it does not name", from_lane);
  current->mask = mask;
  current->value = value;
  current->from_lane = from_lane;
  wait(State::at_shuffle);
  return current->value;
}

void* shared(const void* key, std::size_t size, std::size_t alignment) {
  for (const Variable& variable : variables)
    if (variable.key == key) return shared_memory + variable.offset;
  const std::size_t offset = (shared_used + alignment - 1) / alignment * alignment;
  if (offset + size > kShared) fail("more than %zu bytes of shared memory", kShared);
  shared_used = offset + size;
  variables.push_back({key, offset});
  return shared_memory + offset;
}

void enter(int most_threads) {
  if (geometry.block > most_threads)
    fail("%lld threads, of which __launch_bounds__ allows %d", static_cast<long long>(geometry.block), most_threads);
  if (running.thread != 0) return;
  Dl_info module;
  dladdr(__builtin_return_address(0), &module);
  const char* const place = static_cast<const char*>(__builtin_return_address(0));
  notes += std::to_string(place - static_cast<const char*>(module.dli_fbase)) + "\n";
}

bool occupancy(int* blocks, int threads) {
  *blocks = resident;
  return threads > 0 && threads <= kMostThreads;
}

void fail(const char* format, ...) {
  char text[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!running.inside) {
    std::fprintf(stderr, "%s\n", text);
    std::abort();
  }
  running.inside = false;
  failure = "block " + std::to_string(block) + ", thread " + std::to_string(number(*current)) + ": " + text;
  _longjmp(scheduler, 1);
}

void run(const Geometry& wanted, void (*thread)(const void*), const void* parameters, std::size_t size) {
  const bool launches =
      wanted.grid > 0 && wanted.grid <= kMostBlocks && wanted.block > 0 && wanted.block <= kMostThreads;
  if (!launches || wanted.shared > kShared) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (wanted.stream != expected_stream) throw std::runtime_error("a launch on another stream than was given");
  geometry = wanted;
  body = thread;
  failure.clear();
  variables.clear();
  shared_used = 0;
  ++running.launch;
  running.parameters = static_cast<const char*>(parameters);
  running.parameters_end = running.parameters + size;
  for (std::int64_t k = 0; k < wanted.grid; ++k) {
    block = backwards ? wanted.grid - 1 - k : k;
    run_block();
  }
}

}  // namespace emulated

cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "invalid argument";
  }
}

cudaError_t emulated_find_image() {
  return emulated::has_image ? cudaSuccess : emulated::last_error = cudaErrorNoKernelImageForDevice;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// What the tests set and read.
extern "C" {

void emulated_settings(int multiprocessors, int resident, bool has_image, bool backwards, std::uintptr_t stream) {
  emulated::has_image = has_image;
  emulated::multiprocessors = multiprocessors;
  emulated::resident = resident;
  emulated::backwards = backwards;
  emulated::expected_stream = reinterpret_cast<CUstream_st*>(stream);
}

// The launches since the last call, a line each: a place in the kernel, as the module's file counts them.
const char* emulated_notes() {
  static std::string given;
  given = std::exchange(emulated::notes, {});
  return given.c_str();
}
}
