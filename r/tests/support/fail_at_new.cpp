// Preloaded, makes the n-th `operator new` from now on throw: see tests/support/allocation_faults.py.
#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>

namespace {

constexpr long kNever = std::numeric_limits<long>::max();
std::atomic<long> left{kNever};

}  // namespace

extern "C" void fail_at_new(long n) {
  left = n;
}
// Returns whether it has failed.
extern "C" int stop_failing() {
  return left.exchange(kNever) < 0;
}

void* operator new(std::size_t size) {
  if (left != kNever && left-- == 0) {
    throw std::bad_alloc();
  }
  if (void* memory = std::malloc(size > 0 ? size : 1)) {
    return memory;
  }
  throw std::bad_alloc();
}

void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
