// The table of a bucket: one row of int64 per parameter, by which a GPU's kernels find its tensors.
// And one call of update_priorities_, which works on it, as plain data.
#pragma once

#include <cstdint>
#include <optional>

#include "../core/checks.h"
#include "../core/param_data.h"
#include "priority.h"

namespace cm_fused {

// The columns of a row, in order: name, key. Addresses first, 0 where there is no such tensor;
// pending_slot's is of critical momenta, else any int64 that may be written. Then numbers;
// dtypes is the ParamDtype of the parameter, and that of its gradient times their number. The last
// three are the caller's to set: the parameter's part of the partial norms, and the address of an
// int64, or 0, for the number of slots filled.
#define CM_FUSED_REFRESHED_COLUMNS(COLUMN) \
  COLUMN(Param, param)                     \
  COLUMN(Grad, grad)                       \
  CM_FUSED_STATE(COLUMN)                   \
  COLUMN(Numel, numel)                     \
  COLUMN(Dtypes, dtypes)                   \
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
  CM_FUSED_REFRESHED_COLUMNS(CM_FUSED_COLUMN_NAME) CM_FUSED_CALLERS_COLUMNS(CM_FUSED_COLUMN_NAME)
      kNumColumns
};
// The caller's follow them.
inline constexpr int64_t kNumRefreshedColumns = kFirstChunkColumn;

// In int64: 192 bytes, three cache lines of a CPU and whole sectors of a GPU's.
inline constexpr int64_t kTableWidth = 24;
// A column behind the row's end would be one of the next parameter's.
static_assert(kNumColumns <= kTableWidth, "raise kTableWidth, and WIDTH in columns.py");

template <typename column_t>
CM_FUSED_HOST_DEVICE inline column_t* row_of(column_t* table, int64_t i) {
  return table + i * kTableWidth;
}

CM_FUSED_HOST_DEVICE inline Priorities priorities_of(const int64_t* row) {
  return {reinterpret_cast<float*>(row[kPrioritiesColumn]),
      reinterpret_cast<int64_t*>(row[kPendingSlotColumn]),
      reinterpret_cast<float*>(row[kStepColumn]), reinterpret_cast<int64_t*>(row[kFilledColumn])};
}

inline TensorView view_table(const Tensor& table, Device device) {
  const TensorView rows = view("table", kNoIndex, table);
  check_device("table", kNoIndex, rows.device, device);
  check_dtype("table", kNoIndex, rows.dtype, aoti_torch_dtype_int64());
  STD_TORCH_CHECK(rows.sizes.size() == 2 && rows.sizes[1] == kTableWidth,
      "table must have shape (params, ", kTableWidth, "), got ", to_string(rows.sizes));
  STD_TORCH_CHECK(
      table.is_contiguous(), "table must be contiguous, got strides ", to_string(rows.strides));
  return rows;
}

struct PriorityUpdate {
  const int64_t* table;
  int64_t num_rows;
  const double* chunk_sq_norms;
  int64_t num_chunks;
  const double* sq_norm;    // nullptr: sums of chunk_sq_norms
  int64_t sq_norm_stride;   // from a row's to the next one's; 0: one for all
  const double* found_inf;  // nullptr or 0: the priorities are updated
  int64_t capacity;
  float priority_decay;

  // Whether chunk_sq_norms are read: keys are to be found, from these.
  [[nodiscard]] CM_FUSED_HOST_DEVICE bool adds_up_chunks() const {
    return capacity > 0 && sq_norm == nullptr;
  }

  [[nodiscard]] CM_FUSED_HOST_DEVICE bool is_skipped() const {
    return found_inf != nullptr && *found_inf != 0.0;
  }
};

inline PriorityUpdate check_priority_update(const Tensor& table, const Tensor& chunk_sq_norms,
    const std::optional<Tensor>& sq_norm, const std::optional<Tensor>& found_inf, int64_t capacity,
    double priority_decay) {
  const Device device = view("table", kNoIndex, table).device;
  const TensorView rows = view_table(table, device);
  const TensorView norms = view("chunk_sq_norms", kNoIndex, chunk_sq_norms);
  STD_TORCH_CHECK(norms.sizes.size() == 1, "chunk_sq_norms must have one dimension, got shape ",
      to_string(norms.sizes));
  STD_TORCH_CHECK(capacity >= 0, "capacity must be >= 0, got ", capacity);
  STD_TORCH_CHECK(priority_decay >= 0.0 && priority_decay <= 1.0,
      "priority_decay must be in [0, 1], got ", priority_decay);
  const auto float64 = [device](const char* role, const Tensor& tensor, int64_t numel) {
    return float64_data(role, kNoIndex, tensor, numel, device);
  };
  const bool for_each_row = sq_norm.has_value() && sq_norm->numel() != 1;
  const int64_t num_sq_norms = for_each_row ? rows.sizes[0] : 1;
  return {static_cast<const int64_t*>(rows.data), rows.sizes[0],
      float64("chunk_sq_norms", chunk_sq_norms, norms.numel), norms.numel,
      sq_norm.has_value() ? float64("sq_norm", *sq_norm, num_sq_norms) : nullptr,
      for_each_row ? 1 : 0, found_inf.has_value() ? float64("found_inf", *found_inf, 1) : nullptr,
      capacity, static_cast<float>(priority_decay)};
}

}  // namespace cm_fused
