// The steps of some buckets, all of them or none.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "describe.h"
#include "pass.h"

namespace cm_fused {

// Scalars that may come in tensors: see library.cpp.
struct ScalarTensors {
  std::optional<Tensor> sq_norm;
  std::optional<Tensor> lr;
  std::optional<Tensor> grad_factor;
  std::optional<Tensor> found_inf;
};

double read_scalar(const char* role, const std::optional<Tensor>& tensor, double otherwise);

bool is_skipped(const std::optional<Tensor>& found_inf);

// The sums of squares over the priority scope, one for each of `count` tensors.
std::vector<double> read_sq_norm(const Tensor& sq_norm, size_t count);

// Keeps one parameter's books; `slot` is set to the slot that the step's item takes.
void keep_books(const TensorStep& tensor, double sq_norm, double priority_decay, int64_t* slot);

enum class Critical { kMomenta, kGradients };

class Steps {
 public:
  // Adds a bucket's step: checks everything and changes nothing. `bucket` is described for it, and
  // is to live until the steps are taken.
  void add(Critical critical, const StateTensors& state, std::span<const Tensor> params,
      std::span<const Tensor> grads, const ScalarTensors& scalars,
      const StepOptions& hyperparameters, BucketStep& bucket);

  // Whether a parameter has moved since parameters that overlap were last looked for.
  [[nodiscard]] bool has_moved() const;

  // Looks whether two parameters have memory in common, or lie between each other's elements.
  [[nodiscard]] bool find_overlap();

  // Takes the steps, but for those that are to be skipped. With local_sq_norms, which has a number
  // for each parameter in the order they were added, the sums of squares go there and the books are
  // left. Parameters that overlap are stepped one by one, in the order they were added. Whatever
  // can fail comes before the first change.
  void take_(double* local_sq_norms, bool one_by_one);

 private:
  struct Part {
    Critical critical;
    BucketStep* bucket;
    StepOptions options;
    bool is_skipped;
    bool has_sq_norms;
    std::vector<double> sq_norms;  // over the priority scope, one for each parameter
    double* local_sq_norms;        // or nullptr
    size_t first_chunk;            // of the pass that has the norms
  };

  static void finish_(Part& part, const Pass& pass);

  std::vector<Part> parts_;
};

}  // namespace cm_fused
