// The steps of some buckets, all of them or none.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "../core/state.h"
#include "step.h"

namespace cm_fused {

// Puts a parameter and its gradient in the memory order of `views.order`.
void bind_layouts(const ParamViews& views, TensorStep& tensor);

// Reads the slot that exp_avg is still to be copied to.
void read_pending_slot(size_t i, TensorStep& tensor);

// A pass: a kernel over all chunks of some buckets, in parallel.
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

  // Adds up the results of each of a bucket's tensors into `sums`, one for each tensor, unless it
  // is nullptr. Returns the sum of all.
  double add_up(const BucketStep& bucket, size_t first_chunk, double* sums) const;

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

  // Runs it over the chunks from `first` to before `last`, of which each thread is dealt as many
  // elements.
  void run_(ChunkKernel kernel, int64_t first, int64_t last);
  // The elements before a chunk, which may be the one after the last.
  [[nodiscard]] int64_t elements_before(int64_t chunk) const;
  void take_all_(ChunkKernel kernel, Share& share);

  std::vector<Chunk> chunks_;
  std::vector<CompensatedSum<double>> results_;
  std::unique_ptr<Share[]> shares_;
  int64_t num_threads_ = 0;
  int64_t numel_ = 0;
};

// What one state's step is given besides its tensors.
struct StepScalars {
  StepOptions options;
  bool is_skipped;
  std::vector<double> sq_norms;  // over the priority scope, one for each parameter, or empty
};

class Steps {
 public:
  // Adds a bucket's step: checks everything and changes nothing but what `state` caches. That is
  // bound to the step, and is to live until the steps are taken.
  void add(RegisteredState& state, std::span<const Tensor> params, std::span<const Tensor> grads,
      StepScalars scalars);

  // How often the parameters have moved: more each time that one has.
  [[nodiscard]] int64_t num_moves() const;

  // The elements of all parameters.
  [[nodiscard]] int64_t numel() const;

  // Looks whether two parameters have memory in common, or lie between each other's elements.
  [[nodiscard]] bool find_overlap() const;

  // Takes the steps, except those that are to be skipped. With local_sq_norms, which has a number
  // for each parameter in the order they were added, the sums of squares go there and the
  // priorities are left. Parameters that overlap are stepped one by one, in the order they were
  // added. Whatever can fail comes before the first change.
  void take_(double* local_sq_norms, bool one_by_one);

 private:
  struct Part {
    BucketStep* bucket;
    bool has_sq_norms;  // over the priority scopes
    bool adds_up;       // each tensor's sum of squares
    StepScalars scalars;
    double* local_sq_norms;  // or nullptr
    size_t first_chunk;      // of the pass that has the norms
    double* sq_norm;         // the state's
  };

  static void finish_(Part& part, const Pass& pass);

  std::vector<Part> parts_;
};

}  // namespace cm_fused
