// The CPU implementation of update_priorities_: what the CUDA kernel does, a row after the other.
#include <cstdint>
#include <numeric>
#include <optional>

#include <torch/csrc/stable/library.h>

#include "../priority/table.h"

namespace cm_fused {
namespace {

// The chunks and the priorities of every row must be there before the first row is changed.
void check_rows(const PriorityUpdate& update) {
  for (int64_t i = 0; i < update.num_rows; ++i) {
    const int64_t* row = row_of(update.table, i);
    const int64_t first = row[kFirstChunkColumn];
    const int64_t count = row[kNumChunksColumn];
    STD_TORCH_CHECK(first >= 0 && count >= 0 && first <= update.num_chunks - count, "table[", i,
        "] must name chunks of the ", update.num_chunks, " in chunk_sq_norms, got ", count,
        " from ", first);
    for (const int64_t column : {kPrioritiesColumn, kPendingSlotColumn, kStepColumn}) {
      STD_TORCH_CHECK(row[column] != 0, "table[", i, "] must have an address in column ", column,
          ", got 0: refresh_table_ sets it");
    }
  }
}

double sum(const double* values, int64_t count) {
  return std::accumulate(values, values + count, 0.0);
}

void update_priorities_(Tensor table, Tensor chunk_sq_norms, std::optional<Tensor> sq_norm,
    std::optional<Tensor> found_inf, int64_t capacity, double priority_decay, bool group_scope) {
  const PriorityUpdate update =
      check_priority_update(table, chunk_sq_norms, sq_norm, found_inf, capacity, priority_decay);
  check_rows(update);
  if (update.found_inf != nullptr && *update.found_inf != 0.0) {
    return;
  }
  // Given norms, nobody may have taken those of the chunks.
  const double group =
      update.sq_norm == nullptr ? sum(update.chunk_sq_norms, update.num_chunks) : 0.0;
  for (int64_t i = 0; i < update.num_rows; ++i) {
    const int64_t* row = row_of(update.table, i);
    double sq_norm_of_row = group;
    if (update.sq_norm != nullptr) {
      sq_norm_of_row = update.sq_norm[i * update.sq_norm_stride];
    } else if (!group_scope) {
      sq_norm_of_row = sum(update.chunk_sq_norms + row[kFirstChunkColumn], row[kNumChunksColumn]);
    }
    update_priorities(
        priorities_of(row), update.capacity, update.priority_decay, priority_key(sq_norm_of_row));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CPU, m) {
  m.impl("update_priorities_", TORCH_BOX(&update_priorities_));
}

}  // namespace cm_fused
