// What a step needs of one parameter's tensors, as plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "state_rows.h"

namespace cm_fused {

// The values are in tables, which Python reads (cm_fused/_backends/triton/columns.py).
enum class ParamDtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// How state is stored: as the update computes, or rounded (cm_fused/rounding.py). The values are in
// tables.
enum class StoredDtype { kUnchanged, kBFloat16, kFloat16, kFloat8, kInt8 };

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
  return dtype == StoredDtype::kFloat8 || dtype == StoredDtype::kInt8;
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
  StoredDtype moment_dtype;  // of exp_avg and exp_avg_sq
  StoredDtype slot_dtype;
  int64_t numel;
  int64_t capacity;
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
