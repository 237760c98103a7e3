// Describing a parameter's part in a step, on any device: check its tensors, take their addresses.
#pragma once

#include <cstdint>
#include <span>

#include "checks.h"
#include "param_data.h"
#include "state.h"

namespace cm_fused {

// The views that describing a parameter took. `order` is exp_avg's: the state's memory order.
struct ParamViews {
  TensorView param;
  TensorView grad;
  TensorView order;
};

ParamDtype param_dtype(const char* role, size_t index, int32_t dtype);

// The dtype that a parameter's update is computed in, and its state has unless it has low
// precision; as aoti_torch_dtype_*().
int32_t state_dtype(ParamDtype dtype);

// How a tensor of exp_avgs is stored; `dtype` is its own, as aoti_torch_dtype_*().
StoredDtype moment_dtype(size_t i, int32_t dtype, ParamDtype param_dtype);

// Whether a tensor's elements lie in memory in the order of `order`.
bool lies_as(const TensorView& tensor, const TensorView& order);

TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad);

// The state's memory order is exp_avg's.
void check_dense(size_t i, const TensorView& exp_avg);

// The address of a state tensor of the parameter's shape and some dtype.
void* state_data(
    const char* role, size_t i, const Tensor& tensor, const TensorView& order, int32_t dtype);

// Takes the buffer's capacity, dtype and address.
void describe_buffer(
    size_t i, const Tensor& critical_buffer, const TensorView& order, ParamData& data);

// The scales of a tensor of state, `slots` times those of the parameter's shape, or nullptr where
// its dtype has none.
float* scales_data(const char* role, size_t i, const Tensors& list, StoredDtype dtype,
    int64_t slots, const TensorView& order);

int64_t* pending_slot_data(size_t i, const Tensor& pending_slot, Device device);

void check_lengths(
    const StateTensors& state, std::span<const Tensor> params, std::span<const Tensor> grads);

// Describes parameter i. What `data` knows of the state from an earlier step is kept where it
// still holds: only metadata is looked at, and the state is checked again only when it moved.
ParamViews describe_param(
    size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad, ParamData& data);

}  // namespace cm_fused
