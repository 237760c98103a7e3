// Binding a parameter to a step, on any device: check its tensors, take their addresses.
#pragma once

#include <cstdint>
#include <span>

#include "checks.h"
#include "param_data.h"
#include "state.h"

namespace cm_fused {

// The views that binding a parameter took. `order` is exp_avg's: the state's memory order.
struct ParamViews {
  TensorView param;
  TensorView grad;
  TensorView order;
};

ParamDtype param_dtype(const char* role, size_t index, int32_t dtype);

// How a tensor of exp_avgs is stored; `dtype` is its own, as aoti_torch_dtype_*().
StoredDtype moment_dtype(size_t i, int32_t dtype, ParamDtype param_dtype);

// Whether a tensor's elements lie in memory in the order of `order`.
bool lies_as(const TensorView& tensor, const TensorView& order);

// Its memory is not looked at.
TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad);

// Checks these rows of parameter i's state and takes their addresses. A row that is not there, or
// of no use for these dtypes, is nullptr.
void bind_state(
    size_t i, const StateTensors& state, StateRows rows, const TensorView& order, ParamData& data);

// Checks that the state has what a step needs, and that the lists have its length.
void check_step(
    const StateTensors& state, std::span<const Tensor> params, std::span<const Tensor> grads);

// Binds parameter i to a step. What was bound before stays where it holds: only metadata is looked
// at, and the state is checked again only when it moved.
ParamViews bind_param(
    size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad, ParamData& data);

}  // namespace cm_fused
