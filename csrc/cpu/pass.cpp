#include "pass.h"

#include <algorithm>
#include <numeric>

#include <torch/csrc/stable/ops.h>

namespace cm_fused {

namespace {

// Below this many elements a thread's start costs more than it saves (as at::internal::GRAIN_SIZE).
constexpr int64_t kGrainSize = 32768;

int64_t count_chunks(const TensorStep& tensor) {
  return (tensor.numel + kChunkSize - 1) / kChunkSize;
}

}  // namespace

size_t Pass::add(const BucketStep& bucket, const StepOptions& options) {
  const size_t first_chunk = chunks_.size();
  for (const auto& tensor : bucket) {
    for (int64_t index = 0; index < count_chunks(tensor); ++index) {
      chunks_.push_back({&tensor, &options, index});
    }
    numel_ += tensor.numel;
  }
  results_.resize(chunks_.size());
  return first_chunk;
}

void Pass::run(ChunkKernel kernel) {
  const auto count = static_cast<int64_t>(chunks_.size());
  const int64_t grain = std::max<int64_t>(1, kGrainSize * count / std::max<int64_t>(numel_, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      results_[c] = kernel(*chunks_[c].tensor, *chunks_[c].options, chunks_[c].index);
    }
  });
}

void Pass::add_up(const BucketStep& bucket, size_t first_chunk, double* sums) const {
  auto next = results_.begin() + static_cast<int64_t>(first_chunk);
  for (const auto& tensor : bucket) {
    const auto end = next + count_chunks(tensor);
    *sums++ = std::accumulate(next, end, 0.0);
    next = end;
  }
}

}  // namespace cm_fused
