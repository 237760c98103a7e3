// The table of a bucket: one row of int64 per parameter, by which a GPU's kernels find its tensors.
#pragma once

#include <cstdint>

#include "bookkeeping.h"

namespace cm_fused {

// Of a row, in the order of the columns. Those before kNumRefreshedColumns are refresh_table_'s,
// the others are left to whoever makes the table.
enum TableColumn : int64_t {
  // Addresses; 0 where there is no such tensor.
  kParamColumn,
  kGradColumn,
  kExpAvgColumn,
  kExpAvgSqColumn,
  kMaxExpAvgSqColumn,
  kCriticalBufferColumn,
  kCriticalSumColumn,
  kCompensationColumn,
  kCriticalScalesColumn,
  kExpAvgScalesColumn,
  kExpAvgSqScalesColumn,
  kPrioritiesColumn,
  kSlotColumn,  // an int64: critical momenta's pending slot, else any place that may be written
  kStepColumn,
  kNumelColumn,         // a number
  kParamDtypeColumn,    // a ParamDtype
  kParamIndexColumn,    // a number
  kPlacesOffsetColumn,  // the numbers of Places
  kPlacesLengthColumn,
  kPlacesStrideColumn,
  kNumRefreshedColumns,
  // The parameter's part of the partial norms: numbers.
  kFirstChunkColumn = kNumRefreshedColumns,
  kNumChunksColumn,
  kFilledColumn,  // the address of an int64, or 0
};

// In int64: 192 bytes, three cache lines of a CPU and whole sectors of a GPU's.
inline constexpr int64_t kTableWidth = 24;

template <typename column_t>
CM_FUSED_HOST_DEVICE inline column_t* row_of(column_t* table, int64_t i) {
  return table + i * kTableWidth;
}

CM_FUSED_HOST_DEVICE inline Bookkeeping bookkeeping_of(const int64_t* row) {
  return {reinterpret_cast<float*>(row[kPrioritiesColumn]),
      reinterpret_cast<int64_t*>(row[kSlotColumn]), reinterpret_cast<float*>(row[kStepColumn]),
      reinterpret_cast<int64_t*>(row[kFilledColumn])};
}

}  // namespace cm_fused
