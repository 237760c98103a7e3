// The steps of some buckets, all of them or none.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "../core/bind.h"
#include "pass.h"

namespace cm_fused {

// Puts a parameter and its gradient in the memory order of `views.order`.
void bind_layouts(const ParamViews& views, TensorStep& tensor);

// Reads the slot that exp_avg is still to be copied to.
void read_pending_slot(size_t i, TensorStep& tensor);

// What one state's step is given besides its tensors.
struct StepScalars {
  StepOptions options;
  bool is_skipped;
  std::vector<double> sq_norms;  // over the priority scope, one for each parameter, or empty
};

class Steps {
 public:
  // Adds a bucket's step: checks everything and changes nothing. `bucket` is bound to it, and is to
  // live until the steps are taken. A state without pending slots is one of critical gradients.
  void add(const StateTensors& state, std::span<const Tensor> params, std::span<const Tensor> grads,
      StepScalars scalars, BucketStep& bucket);

  // How often the parameters have moved: more each time that one has.
  [[nodiscard]] int64_t num_moves() const;

  // Looks whether two parameters have memory in common, or lie between each other's elements.
  [[nodiscard]] bool find_overlap() const;

  // Takes the steps, but for those that are to be skipped. With local_sq_norms, which has a number
  // for each parameter in the order they were added, the sums of squares go there and the
  // priorities are left. Parameters that overlap are stepped one by one, in the order they were
  // added. Whatever can fail comes before the first change.
  void take_(double* local_sq_norms, bool one_by_one);

 private:
  struct Part {
    bool critical_gradients;
    BucketStep* bucket;
    bool has_sq_norms;  // else they are computed
    StepScalars scalars;
    double* local_sq_norms;  // or nullptr
    size_t first_chunk;      // of the pass that has the norms
  };

  static void finish_(Part& part, const Pass& pass);

  std::vector<Part> parts_;
};

}  // namespace cm_fused
