// A pass: a kernel over all chunks of some buckets, in parallel.
#pragma once

#include <cstdint>
#include <vector>

#include "describe.h"

namespace cm_fused {

// What is added is referred to until the pass has run.
class Pass {
 public:
  // Adds a bucket's chunks, and allocates all that a run of them needs. Returns the first one's
  // number.
  size_t add(const BucketStep& bucket, const StepOptions& options);

  // Runs a kernel over all chunks and keeps its result for each. Cannot fail. The order in which
  // threads take chunks does not matter: each chunk's result is its own.
  void run(ChunkKernel kernel);

  // Adds up the results of each of a bucket's tensors, in the order of its chunks, into `sums`, one
  // for each tensor.
  void add_up(const BucketStep& bucket, size_t first_chunk, double* sums) const;

 private:
  struct Chunk {
    const TensorStep* tensor;
    const StepOptions* options;
    int64_t index;
  };

  std::vector<Chunk> chunks_;
  std::vector<double> results_;
  int64_t numel_ = 0;
};

}  // namespace cm_fused
