// The table of a bucket: one row of int64 per parameter, by which a GPU's kernels find its tensors.
#pragma once

#include <cstdint>

#include "../core/state_rows.h"
#include "priority.h"

namespace cm_fused {

// The columns of a row, in order: name, key. Addresses first, 0 where there is no such tensor;
// pending_slot's is of critical momenta, else any int64 that may be written. Then numbers;
// param_dtype is a ParamDtype. The last three are the caller's to set: the parameter's part of the
// partial norms, and the address of an int64, or 0, for the number of slots filled.
#define CM_FUSED_REFRESHED_COLUMNS(COLUMN) \
  COLUMN(Param, param)                     \
  COLUMN(Grad, grad)                       \
  CM_FUSED_STATE(COLUMN)                   \
  COLUMN(Numel, numel)                     \
  COLUMN(ParamDtype, param_dtype)          \
  COLUMN(ParamIndex, param_index)          \
  COLUMN(ShardOffset, shard_offset)        \
  COLUMN(ShardLength, shard_length)        \
  COLUMN(ShardStride, shard_stride)
#define CM_FUSED_CALLERS_COLUMNS(COLUMN) \
  COLUMN(FirstChunk, first_chunk)        \
  COLUMN(NumChunks, num_chunks)          \
  COLUMN(Filled, filled)

#define CM_FUSED_COLUMN_NAME(Name, ...) k##Name##Column,
enum TableColumn : int64_t {
  CM_FUSED_REFRESHED_COLUMNS(CM_FUSED_COLUMN_NAME) kNumRefreshedColumns,
  kLastRefreshedColumn = kNumRefreshedColumns - 1,
  CM_FUSED_CALLERS_COLUMNS(CM_FUSED_COLUMN_NAME)
};

// In int64: 192 bytes, three cache lines of a CPU and whole sectors of a GPU's.
inline constexpr int64_t kTableWidth = 24;

template <typename column_t>
CM_FUSED_HOST_DEVICE inline column_t* row_of(column_t* table, int64_t i) {
  return table + i * kTableWidth;
}

CM_FUSED_HOST_DEVICE inline Priorities priorities_of(const int64_t* row) {
  return {reinterpret_cast<float*>(row[kPrioritiesColumn]),
      reinterpret_cast<int64_t*>(row[kPendingSlotColumn]),
      reinterpret_cast<float*>(row[kStepColumn]), reinterpret_cast<int64_t*>(row[kFilledColumn])};
}

}  // namespace cm_fused
