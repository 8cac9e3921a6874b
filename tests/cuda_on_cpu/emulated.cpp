// The launcher of cuda_runtime_api.h beside this file.
#include "cuda_runtime_api.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace emulated {

Settings settings = {false, 0x7fffffff, 0x7fffffff};
dim3 thread, block, threads, blocks;

namespace {

constexpr size_t STACK = 256 << 10, GUARD = 256;
constexpr int NAN_BYTE = 0xff;  // fills a float or a double with NaN

std::string faults;

struct Range {
  uintptr_t begin, end;
};
std::vector<Range> readable;  // none: anything

// One thread of a block. Its stack stays when the thread ends, for the next one. ucontext makes the stack, but
// setjmp changes over to it from then on: swapcontext asks the kernel for the signal mask each time.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  void* stack = nullptr;
  bool made = false, done = false;
  size_t arrays = 0;  // shared arrays it has met
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
size_t current;
const std::function<void()>* work;

struct Array {
  std::vector<unsigned char> memory;  // with GUARD on both sides
  size_t bytes = 0;
};
std::vector<Array> arrays;

[[noreturn]] void body() {
  for (;;) {
    (*work)();
    fibers[current].done = true;
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
  }
}

void resume(size_t i) {
  Fiber& fiber = fibers[i];
  current = i;
  const unsigned n = unsigned(i);
  thread = dim3(n % threads.x, n / threads.x % threads.y, n / threads.x / threads.y);
  if (_setjmp(scheduler)) return;
  if (fiber.made) _longjmp(fiber.at, 1);
  fiber.made = true;
  fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fiber.stack == MAP_FAILED) abort();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(body), 0);
  setcontext(&fiber.context);
  abort();
}

void run_block(size_t count) {
  for (Array& array : arrays) array.bytes = 0;
  for (size_t i = 0; i < count; ++i) fibers[i].done = false, fibers[i].arrays = 0;
  for (bool waiting = true; waiting;) {
    size_t done = 0;
    for (size_t n = 0; n < count; ++n) {
      const size_t i = settings.reversed ? count - 1 - n : n;
      resume(i);
      done += fibers[i].done;
    }
    waiting = done < count;
    if (waiting && done) {
      fault("a barrier that part of a block misses");
      // The rest cannot go on: their stacks are left as they are, and made anew.
      for (size_t i = 0; i < count; ++i)
        if (!fibers[i].done) munmap(fibers[i].stack, STACK), fibers[i].made = false;
      break;
    }
  }
  for (const Array& array : arrays)
    for (size_t i = 0; array.bytes && i < GUARD; ++i)
      if (array.memory[i] != NAN_BYTE || array.memory[GUARD + array.bytes + i] != NAN_BYTE)
        return fault("a write past a shared array");
}

}  // namespace

void fault(const char* what) {
  if (faults.find(what) == std::string::npos) faults += (faults.empty() ? "" : "; ") + std::string(what);
}

void check_read(const void* p, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  bool inside = readable.empty();
  for (const Range& range : readable) inside = inside || (at >= range.begin && at + bytes <= range.end);
  if (inside) return;
  fault("a read outside of every array");
}

void barrier() {
  if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

void* shared(size_t bytes) {
  const size_t n = fibers[current].arrays++;
  if (n == arrays.size()) arrays.emplace_back();
  Array& array = arrays[n];
  if (!array.bytes) {
    array.bytes = bytes;
    array.memory.assign(bytes + 2 * GUARD, NAN_BYTE);
  }
  return array.memory.data() + GUARD;
}

void launch(dim3 grid, dim3 block_of, const std::function<void()>& kernel) {
  const size_t count = size_t(block_of.x) * block_of.y * block_of.z;
  if (!count || count > 1024 || !grid.x || grid.x > 0x7fffffff || grid.y != 1 || grid.z != 1)
    return fault("a launch out of limits");
  if (fibers.size() < count) fibers.resize(1024);
  threads = block_of, blocks = grid, work = &kernel;
  const int64_t all = grid.x, first = all > settings.only_last ? all - settings.only_last : 0;
  for (int64_t n = first; n < all; ++n) {
    block = dim3(unsigned(settings.reversed ? all - 1 - (n - first) : n), 0, 0);
    run_block(count);
  }
}

}  // namespace emulated

// What went wrong since the last call, or "".
extern "C" const char* emulated_faults() {
  static std::string said;
  said.swap(emulated::faults);
  emulated::faults.clear();
  return said.c_str();
}

extern "C" void emulated_settings(bool reversed, int64_t most_blocks, int64_t only_last) {
  emulated::settings = {reversed, most_blocks, only_last};
}

// Makes an array known that may be read from; null forgets them all.
extern "C" void emulated_readable(const void* data, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  if (!data) return emulated::readable.clear();
  emulated::readable.push_back({begin, begin + uintptr_t(bytes)});
}
