// What a step knows of one parameter's tensors, as plain data.
#pragma once

#include <cstdint>

namespace cm_fused {

// The values are in tables, which Python reads (cm_fused/ops/table.py).
enum class ParamDtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Addresses are nullptr where there is no such tensor, or an op does without it.
struct ParamData {
  ParamDtype dtype;
  int64_t numel;
  int64_t capacity;

  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // nullptr without amsgrad
  void* critical_buffer;
  void* critical_sum;  // nullptr: the sum is read from the slots

  float* priorities;
  int64_t* pending_slot;
  // The last to be set: with it, the state has been checked. It has one element and so an address.
  float* step_count;
};

}  // namespace cm_fused
