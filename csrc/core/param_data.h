// What a step needs of one parameter's tensors, as plain data. A new state tensor costs a row here,
// besides the kernels' lines: ParamData's members, register_state's mask, the checks of every
// operator and the columns of a table come from the rows.
#pragma once

#include <algorithm>
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
  kInt16,   // of a bfloat16 parameter; other parameters' tensor is not looked at
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
  ROW(MasterRemainder, master_remainder, "master_remainders", void, kElement, false, kInt16)  \
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
inline constexpr StateRows kBufferRows = bit(kCriticalBuffer) | bit(kCriticalSum) |
                                         bit(kCriticalScales) | bit(kPriorities) |
                                         bit(kPendingSlot);

// The values are in tables, which Python reads (cm_fused/_backends/triton/columns.py).
enum class ParamDtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
inline constexpr int64_t kNumParamDtypes = 4;

// How state is stored: as the update computes, or rounded (cm_fused/rounding.py). The values are in
// tables.
enum class StoredDtype { kUnchanged, kBFloat16, kFloat16, kFloat8, kInt8, kInt4 };

inline bool is_half(ParamDtype dtype) {
  return dtype == ParamDtype::kBFloat16 || dtype == ParamDtype::kFloat16;
}

// Elements that share a scale: BLOCK_SIZE of cm_fused/rounding.py.
inline constexpr int64_t kScaleBlock = 256;

inline int64_t num_scales(int64_t numel) {
  return (numel + kScaleBlock - 1) / kScaleBlock;
}

inline int64_t stored_bytes(StoredDtype dtype, int64_t unchanged_bytes) {
  if (dtype == StoredDtype::kUnchanged) {
    return unchanged_bytes;
  }
  return dtype == StoredDtype::kBFloat16 || dtype == StoredDtype::kFloat16 ? 2 : 1;
}

inline bool has_scales(StoredDtype dtype) {
  return dtype == StoredDtype::kFloat8 || dtype == StoredDtype::kInt8 ||
         dtype == StoredDtype::kInt4;
}

// What is stored of a slot: a number for each element, or a byte for two, one from each half of a
// block (cm_fused/rounding.py).
inline int64_t stored_numel(int64_t numel, StoredDtype dtype) {
  constexpr int64_t kHalf = kScaleBlock / 2;
  return dtype != StoredDtype::kInt4
             ? numel
             : numel / kScaleBlock * kHalf + std::min(numel % kScaleBlock, kHalf);
}

// The position of a parameter's elements in the full parameter, of which this process may have a
// part (cm_fused/philox.py): element e is the full parameter's element
// offset + e / length * stride + e % length.
struct ShardLayout {
  int64_t offset = 0;
  int64_t length = 1;
  int64_t stride = 1;  // equal to length where there are no gaps
};

inline constexpr size_t kShardLayoutNumbers = 3;

// Addresses are nullptr where there is no such tensor, or an operator does without it.
struct ParamData {
  ParamDtype dtype;
  ParamDtype grad_dtype;     // the parameter's, or a half-precision one of a float32 parameter
  StoredDtype moment_dtype;  // of exp_avg and exp_avg_sq
  StoredDtype slot_dtype;
  int64_t numel;
  int64_t capacity;     // 0 where there is no buffer
  int64_t param_index;  // keys the random bits, and so does the position in the full parameter
  ShardLayout shard_layout;

  void* param;
  const void* grad;
#define CM_FUSED_ROW_MEMBER(Name, key, role, type, ...) type* key;
  CM_FUSED_STATE(CM_FUSED_ROW_MEMBER)

  // For the next step. The state has been checked, and its addresses are those above.
  bool is_bound;
  // How often the parameter has moved, for whoever looks for parameters that overlap.
  int64_t num_moves;
  // Elements from the first to behind the last in memory.
  int64_t param_extent;
  int64_t grad_extent;
};

// Calls visit(row, address) for every row of the state.
template <typename Data, typename Visit>
void visit_state(Data& data, Visit visit) {
#define CM_FUSED_VISIT_ROW(Name, key, ...) visit(k##Name, data.key);
  CM_FUSED_STATE(CM_FUSED_VISIT_ROW)
}

}  // namespace cm_fused
