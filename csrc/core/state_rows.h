// The tensors of a parameter's state, as plain data. A new one costs a row here, besides the
// kernels' lines: ParamData's members, register_state's mask, the checks of every operator and the
// columns of a table come from the rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cm_fused {

// What a state tensor has an element for, or each of the buffer's slots has.
enum class StateUnit {
  kElement,  // each of the parameter's elements, in its shape, with the strides of exp_avg
  kBlock,    // each block of elements that share a scale; only where the dtype has scales
  kOne,
};

// What its dtype must be.
enum class StateDtype {
  kMoment,  // of exp_avg
  kUpdate,  // the one that the parameter's update is computed in
  kSlot,    // any that slots are stored in
  kHalf,    // a half-precision parameter's own; other parameters' tensor is not looked at
  kFloat32,
  kInt64,
};

// In the order of register_state's mask: name, key, role in messages, type behind the address,
// unit, whether for each slot, dtype. Slots come first in their shape, one after the other.
#define CM_FUSED_STATE(ROW)                                                                   \
  ROW(ExpAvg, exp_avg, "exp_avgs", void, kElement, false, kMoment)                            \
  ROW(ExpAvgSq, exp_avg_sq, "exp_avg_sqs", void, kElement, false, kMoment)                    \
  ROW(MaxExpAvgSq, max_exp_avg_sq, "max_exp_avg_sqs", void, kElement, false, kUpdate)         \
  ROW(CriticalBuffer, critical_buffer, "critical_buffers", void, kElement, true, kSlot)       \
  ROW(CriticalSum, critical_sum, "critical_sums", void, kElement, false, kUpdate)             \
  ROW(Compensation, compensation, "compensations", void, kElement, false, kHalf)              \
  ROW(CriticalScales, critical_scales, "critical_scales", float, kBlock, true, kFloat32)      \
  ROW(ExpAvgScales, exp_avg_scales, "exp_avg_scales", float, kBlock, false, kFloat32)         \
  ROW(ExpAvgSqScales, exp_avg_sq_scales, "exp_avg_sq_scales", float, kBlock, false, kFloat32) \
  ROW(Priorities, priorities, "priorities", float, kOne, true, kFloat32)                      \
  ROW(PendingSlot, pending_slot, "pending_slots", int64_t, kOne, false, kInt64)               \
  ROW(Step, step, "steps", float, kOne, false, kFloat32)

#define CM_FUSED_ROW_NAME(Name, ...) k##Name,
enum StateRow : size_t { CM_FUSED_STATE(CM_FUSED_ROW_NAME) kNumStateRows };

struct StateRowInfo {
  const char* key;
  const char* role;
  StateUnit unit;
  bool each_slot;
  StateDtype dtype;
};

#define CM_FUSED_ROW_INFO(Name, key, role, type, unit, each_slot, dtype) \
  {#key, role, StateUnit::unit, each_slot, StateDtype::dtype},
inline constexpr StateRowInfo kStateRows[] = {CM_FUSED_STATE(CM_FUSED_ROW_INFO)};

// A set of rows.
using StateRows = int64_t;

constexpr StateRows bit(size_t row) {
  return StateRows{1} << row;
}

inline constexpr StateRows kAllStateRows = bit(kNumStateRows) - 1;

}  // namespace cm_fused
