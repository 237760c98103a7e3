// Describing a bucket's part in a CPU step: what describe_param gives, and what the step reads of
// it.
#pragma once

#include <span>
#include <vector>

#include "../core/describe.h"
#include "step.h"

namespace cm_fused {

using BucketStep = std::vector<TensorStep>;

// Puts a parameter and its gradient in the memory order of `views.order`.
void describe_layouts(const ParamViews& views, TensorStep& tensor);

// Reads the slot that exp_avg is still to be copied to.
void read_pending_slot(size_t i, TensorStep& tensor);

// Checks everything; a step of what it describes cannot fail. What `bucket` knows of the state from
// an earlier step is kept where it still holds.
void describe_bucket(const StateTensors& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, const StepOptions& options, BucketStep& bucket);

}  // namespace cm_fused
