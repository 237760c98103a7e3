// A pass: a kernel over all chunks of some buckets, in parallel.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "step.h"

namespace cm_fused {

// What is added is referred to until the pass has run.
class Pass {
 public:
  // Adds a bucket's chunks, and allocates all that a run of them needs. Returns the first one's
  // number.
  size_t add(const BucketStep& bucket, const StepOptions& options);

  // Runs a kernel over all chunks and keeps its result for each. Cannot fail. Which thread takes a
  // chunk, and when, does not matter: each chunk's result is its own. Only if tensors overlap are
  // they to be taken one after the other.
  void run(ChunkKernel kernel, bool one_by_one = false);

  // Adds up the results of each of a bucket's tensors, in the order of its chunks, into `sums`, one
  // for each tensor.
  void add_up(const BucketStep& bucket, size_t first_chunk, double* sums) const;

 private:
  struct Chunk {
    const TensorStep* tensor;
    const StepOptions* options;
    int64_t index;
    int64_t first_element;  // among those of the pass
  };

  // The chunks that one thread begins with, the same ones in every step, for its caches' sake. Who
  // has none left takes others': a core may be slower than another, or shared.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // Runs it over the chunks from `first` to before `last`.
  void run_(ChunkKernel kernel, int64_t first, int64_t last);
  // Deals them out, as many elements to each thread; returns the number of shares.
  int64_t deal_(int64_t first, int64_t last);
  // The elements before a chunk, which may be the one after the last.
  [[nodiscard]] int64_t elements_before(int64_t chunk) const;
  void take_all_(ChunkKernel kernel, Share& share);

  std::vector<Chunk> chunks_;
  std::vector<double> results_;
  std::unique_ptr<Share[]> shares_;
  int64_t num_threads_ = 0;
  int64_t numel_ = 0;
};

}  // namespace cm_fused
