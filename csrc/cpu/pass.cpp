// The Pass that steps.h declares: its chunks, dealt out to threads.
#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "steps.h"

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
      chunks_.push_back({&tensor, &options, index, numel_ + index * kChunkSize});
    }
    numel_ += tensor.numel;
  }
  results_.resize(chunks_.size());
  if (shares_ == nullptr) {
    num_threads_ = torch::stable::get_num_threads();
    shares_ = std::make_unique<Share[]>(static_cast<size_t>(num_threads_));
  }
  return first_chunk;
}

void Pass::run(ChunkKernel kernel, bool one_by_one) {
  const auto count = static_cast<int64_t>(chunks_.size());
  int64_t first = 0;
  while (first < count) {
    int64_t last = count;
    if (one_by_one) {
      const TensorStep* const tensor = chunks_[first].tensor;
      last = std::find_if(chunks_.begin() + first, chunks_.end(), [tensor](const Chunk& chunk) {
        return chunk.tensor != tensor;
      }) - chunks_.begin();
    }
    run_(kernel, first, last);
    first = last;
  }
}

int64_t Pass::elements_before(int64_t chunk) const {
  return chunk < static_cast<int64_t>(chunks_.size()) ? chunks_[chunk].first_element : numel_;
}

void Pass::run_(ChunkKernel kernel, int64_t first, int64_t last) {
  const int64_t count = std::min(num_threads_, last - first);
  const int64_t before = elements_before(first);
  const int64_t numel = elements_before(last) - before;
  int64_t next = first;
  for (int64_t i = 0; i < count; ++i) {
    shares_[i].next = next;
    const int64_t end = before + numel * (i + 1) / count;
    const auto beyond = std::partition_point(chunks_.begin() + next, chunks_.begin() + last,
        [end](const Chunk& chunk) { return chunk.first_element < end; });
    next = beyond - chunks_.begin();
    shares_[i].end = next;
  }
  const int64_t grain = std::max<int64_t>(1, kGrainSize * count / std::max<int64_t>(numel, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t) {
    // Its own shares come first.
    for (int64_t i = 0; i < count; ++i) {
      take_all_(kernel, shares_[(begin + i) % count]);
    }
  });
}

void Pass::take_all_(ChunkKernel kernel, Share& share) {
  // A look first: whoever counts up takes the line from all who look.
  while (share.next.load(std::memory_order_relaxed) < share.end) {
    const int64_t c = share.next.fetch_add(1, std::memory_order_relaxed);
    if (c < share.end) {
      results_[c] = kernel(*chunks_[c].tensor, *chunks_[c].options, chunks_[c].index);
    }
  }
}

double Pass::add_up(const BucketStep& bucket, size_t first_chunk, double* sums) const {
  double total = 0.0;
  auto next = results_.begin() + static_cast<int64_t>(first_chunk);
  for (const auto& tensor : bucket) {
    const auto end = next + count_chunks(tensor);
    CompensatedSum<double> sum;
    for (; next != end; ++next) {
      sum.add(next->sum);
      sum.error += next->error;
    }
    total += sum.total();
    if (sums != nullptr) {
      *sums++ = sum.total();
    }
  }
  return total;
}

}  // namespace cm_fused
