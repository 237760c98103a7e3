// Checks of a table that came as a tensor.
#pragma once

#include "../core/checks.h"
#include "table.h"

namespace cm_fused {

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

}  // namespace cm_fused
