// Takes the place of torch's threads under ThreadSanitizer: they meet in libgomp, which is not
// instrumented, so that every use of what one thread left another would look like a race. These
// threads ThreadSanitizer knows. Each range is cut whatever the grain, for more interleavings than
// torch would give.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" int32_t torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
    void (*function)(int64_t begin, int64_t end, void* context), void* context) {
  const int64_t part = std::max<int64_t>(1, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += part) {
    threads.emplace_back(function, first, std::min(first + part, end), context);
  }
  for (auto& thread : threads) {
    thread.join();
  }
  return 0;
}
