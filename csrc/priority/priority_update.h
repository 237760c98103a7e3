// One call of update_priorities_, as plain data, and the checks of its arguments.
#pragma once

#include <cstdint>
#include <optional>

#include "table_checks.h"

namespace cm_fused {

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
};

inline PriorityUpdate check_priority_update(const Tensor& table, const Tensor& chunk_sq_norms,
    const std::optional<Tensor>& sq_norm, const std::optional<Tensor>& found_inf, int64_t capacity,
    double priority_decay) {
  const Device device = view("table", kNoIndex, table).device;
  const TensorView rows = view_table(table, device);
  const TensorView norms = view("chunk_sq_norms", kNoIndex, chunk_sq_norms);
  STD_TORCH_CHECK(norms.sizes.size() == 1, "chunk_sq_norms must have one dimension, got shape ",
      to_string(norms.sizes));
  STD_TORCH_CHECK(capacity >= 1, "capacity must be >= 1, got ", capacity);
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
