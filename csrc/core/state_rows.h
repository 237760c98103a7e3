// The tensors of a parameter's state, as plain data. A new one costs a row here, besides the
// kernels' lines: ParamData's members, register_state's mask, the checks of every operator and the
// columns of a table come from the rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace cm_fused {

// What the shape of a state tensor must be.
enum class StateShape {
  kParam,       // the parameter's, with the strides of exp_avg
  kSlots,       // (capacity, *shape), slots one after the other, each with the strides of exp_avg
  kScales,      // contiguous, one element for each block of the parameter
  kSlotScales,  // contiguous, as many for each slot
  kKeys,        // contiguous, one element for each slot
  kOne,         // of one element
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
// shape, dtype.
#define CM_FUSED_STATE(ROW)                                                             \
  ROW(ExpAvg, exp_avg, "exp_avgs", void, kParam, kMoment)                               \
  ROW(ExpAvgSq, exp_avg_sq, "exp_avg_sqs", void, kParam, kMoment)                       \
  ROW(MaxExpAvgSq, max_exp_avg_sq, "max_exp_avg_sqs", void, kParam, kUpdate)            \
  ROW(CriticalBuffer, critical_buffer, "critical_buffers", void, kSlots, kSlot)         \
  ROW(CriticalSum, critical_sum, "critical_sums", void, kParam, kUpdate)                \
  ROW(Compensation, compensation, "compensations", void, kParam, kHalf)                 \
  ROW(CriticalScales, critical_scales, "critical_scales", float, kSlotScales, kFloat32) \
  ROW(ExpAvgScales, exp_avg_scales, "exp_avg_scales", float, kScales, kFloat32)         \
  ROW(ExpAvgSqScales, exp_avg_sq_scales, "exp_avg_sq_scales", float, kScales, kFloat32) \
  ROW(Priorities, priorities, "priorities", float, kKeys, kFloat32)                     \
  ROW(PendingSlot, pending_slot, "pending_slots", int64_t, kOne, kInt64)                \
  ROW(Step, step, "steps", float, kOne, kFloat32)

enum StateRow : size_t {
#define CM_FUSED_ROW(Name, ...) k##Name,
  CM_FUSED_STATE(CM_FUSED_ROW)
#undef CM_FUSED_ROW
      kNumStateRows,
};

struct StateRowInfo {
  const char* key;
  const char* role;
  StateShape shape;
  StateDtype dtype;
};

inline constexpr StateRowInfo kStateRows[] = {
#define CM_FUSED_ROW(Name, key, role, type, shape, dtype) \
  {#key, role, StateShape::shape, StateDtype::dtype},
    CM_FUSED_STATE(CM_FUSED_ROW)
#undef CM_FUSED_ROW
};

// A set of rows: bit r is row r.
using StateRows = int64_t;

constexpr StateRows rows_of(std::initializer_list<StateRow> rows) {
  StateRows set = 0;
  for (const StateRow row : rows) {
    set |= StateRows{1} << row;
  }
  return set;
}

inline constexpr StateRows kAllStateRows = (StateRows{1} << kNumStateRows) - 1;

}  // namespace cm_fused
