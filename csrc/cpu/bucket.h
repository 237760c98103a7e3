// Binding a bucket to a CPU step: what bind_param gives, and what the step reads of it.
#pragma once

#include <span>
#include <vector>

#include "../core/bind.h"
#include "step.h"

namespace cm_fused {

using BucketStep = std::vector<TensorStep>;

// Puts a parameter and its gradient in the memory order of `views.order`.
void bind_layouts(const ParamViews& views, TensorStep& tensor);

// Reads the slot that exp_avg is still to be copied to.
void read_pending_slot(size_t i, TensorStep& tensor);

// Checks everything; a step of what it binds cannot fail. What `bucket` was bound to before stays
// where it holds.
void bind_bucket(const StateTensors& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, const StepOptions& options, BucketStep& bucket);

}  // namespace cm_fused
