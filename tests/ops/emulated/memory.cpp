// Looks at every access to memory that a kernel makes. The compiler calls the functions at the end before each one:
// they are those of its own sanitizers, whose libraries are not linked, so that what is right can be what holds on a
// device.
//
// * Global memory is what the tests have lent, to the byte: operands to read, outputs and workspaces also to write. An
//   element is read only after it was written, and in one launch by one thread.
// * Shared memory is read only after it was written in the same block, and between two barriers not by one thread where
//   another writes.
// * Beyond these there are a thread's own variables and the arguments of the kernel; nothing of the host's.
#include <cstdint>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

namespace emulated {
namespace {

struct Lent {
  std::string name;
  std::size_t item, count;
  bool writable;
  std::vector<std::uint64_t> launches, threads;  // by which an element was written last; 0 for none
};

std::map<std::uintptr_t, Lent> lent;

constexpr std::uint64_t kSeveral = ~std::uint64_t{0};

struct Byte {
  std::uint64_t written = 0, read = 0;  // after which barrier
  std::uint64_t writer = 0, reader = 0;
};

Byte bytes[kShared];

const char* verb(bool writes) { return writes ? "writes" : "reads"; }

void touch_shared(std::size_t offset, std::size_t size, bool writes) {
  if (offset + size > kShared) fail("%s past the end of shared memory", verb(writes));
  for (std::size_t k = offset; k < offset + size; ++k) {
    Byte& byte = bytes[k];
    const bool written_now = byte.written == running.barrier, read_now = byte.read == running.barrier;
    if (!writes && byte.written < running.block_begins)
      fail("reads shared memory at byte %zu, which was not written in this block", k);
    if ((written_now && byte.writer != running.thread) || (writes && read_now && byte.reader != running.thread))
      fail("%s shared memory at byte %zu, which another thread uses before the same barrier", verb(writes), k);
    if (writes) {
      byte.written = running.barrier;
      byte.writer = running.thread;
    } else {
      byte.reader = read_now && byte.reader != running.thread ? kSeveral : running.thread;
      byte.read = running.barrier;
    }
  }
}

void touch_lent(std::uintptr_t address, std::size_t size, bool writes) {
  auto found = lent.upper_bound(address);
  if (found == lent.begin()) fail("%s %zu bytes of no operand", verb(writes), size);
  auto& [begin, operand] = *std::prev(found);
  const std::size_t offset = address - begin, first = offset / operand.item;
  const std::size_t last = (offset + size - 1) / operand.item;
  if (last >= operand.count)
    fail("%s %zu bytes at element %zu after the start of a part of %s, which has %zu", verb(writes), size, first,
         operand.name.c_str(), operand.count);
  if (writes && !operand.writable) fail("writes to %s", operand.name.c_str());
  if (!operand.writable) return;
  for (std::size_t k = first; k <= last; ++k) {
    if (!writes && operand.launches[k] == 0) fail("reads element %zu of %s, never written", k, operand.name.c_str());
    if (operand.launches[k] == running.launch && operand.threads[k] != running.thread)
      fail("%s element %zu of %s, which another thread has written", verb(writes), k, operand.name.c_str());
    if (!writes) continue;
    operand.launches[k] = running.launch;
    operand.threads[k] = running.thread;
  }
}

void touch(const void* place, std::size_t size, bool writes) {
  if (!running.inside) return;
  const char* const at = static_cast<const char*>(place);
  if (at >= running.stack && at < running.stack_end) return;
  if (!writes && at >= running.parameters && at < running.parameters_end) return;
  const auto address = reinterpret_cast<std::uintptr_t>(place);
  if ((size & (size - 1)) == 0 && size <= 16 && address % size != 0)
    fail("%s %zu bytes at an address that is no multiple of that", verb(writes), size);
  if (at >= shared_memory && at < shared_memory + kShared)
    touch_shared(static_cast<std::size_t>(at - shared_memory), size, writes);
  else
    touch_lent(address, size, writes);
}

// Every description that a check of undefined behaviour passes begins with the place in the source.
struct Place {
  const char* file;
  std::uint32_t line, column;
};

[[noreturn]] void undefined(const void* description, const char* what) {
  const auto& place = *static_cast<const Place*>(description);
  fail("%s:%u:%u: %s", place.file, place.line, place.column, what);
}

}  // namespace
}  // namespace emulated

extern "C" {

void emulated_lend(const char* name, std::uintptr_t begin, std::size_t item, std::size_t count, bool writable) {
  if (count == 0) return;
  emulated::Lent operand{name, item, count, writable, {}, {}};
  if (writable) operand.launches.assign(count, 0), operand.threads.assign(count, 0);
  emulated::lent.insert_or_assign(begin, std::move(operand));
}

void emulated_take_back() { emulated::lent.clear(); }

#define ACCESS(size)                                                                     \
  void __tsan_read##size(void* place) { emulated::touch(place, size, false); }           \
  void __tsan_write##size(void* place) { emulated::touch(place, size, true); }           \
  void __tsan_unaligned_read##size(void* place) { emulated::touch(place, size, false); } \
  void __tsan_unaligned_write##size(void* place) { emulated::touch(place, size, true); } \
  void __tsan_volatile_read##size(void* place) { emulated::touch(place, size, false); }  \
  void __tsan_volatile_write##size(void* place) { emulated::touch(place, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* place, std::size_t size) { emulated::touch(place, size, false); }
void __tsan_write_range(void* place, std::size_t size) { emulated::touch(place, size, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}

#define UNDEFINED(name, what) \
  void __ubsan_handle_##name##_abort(const void* description) { emulated::undefined(description, what); }
UNDEFINED(type_mismatch_v1, "a pointer that is null or not aligned for its type")
UNDEFINED(out_of_bounds, "an index outside of its array")
UNDEFINED(shift_out_of_bounds, "a shift by too much")
UNDEFINED(add_overflow, "a sum outside of its type")
UNDEFINED(sub_overflow, "a difference outside of its type")
UNDEFINED(mul_overflow, "a product outside of its type")
UNDEFINED(negate_overflow, "a negative outside of its type")
UNDEFINED(divrem_overflow, "a division by zero")
}
