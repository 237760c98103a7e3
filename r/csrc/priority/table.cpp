// Keeps the host's copy of a bucket's table up to date.
#include "table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <iterator>

#include <torch/csrc/stable/library.h>

#include "../core/state.h"

namespace cm_fused {
namespace {

enum Refreshed : int64_t { kUnchanged, kChanged, kNeedsCopies };

using Row = std::array<int64_t, kNumRefreshedColumns>;

int64_t address(const void* data) {
  return reinterpret_cast<int64_t>(data);
}

// `row` is the table's: without a pending slot its address is not ours to change.
Row refreshed(const ParamData& data, const int64_t* row) {
  Row result{address(data.param), address(data.grad)};
  visit_state(data, [&](StateRow of, const void* data) {
    result[kExpAvgColumn + static_cast<int64_t>(of)] = address(data);
  });
  if (data.pending_slot == nullptr) {
    result[kPendingSlotColumn] = row[kPendingSlotColumn];
  }
  const ShardLayout& layout = data.shard_layout;
  const int64_t numbers[] = {data.numel, static_cast<int64_t>(data.dtype), data.param_index,
      layout.offset, layout.length, layout.stride};
  std::copy(std::begin(numbers), std::end(numbers), &result[kNumelColumn]);
  return result;
}

int64_t refresh_table_(int64_t id, Tensors params, Tensors grads, Tensor table) {
  const LockedStates states({id});
  const StateTensors& state = states[0].tensors;
  check_step(state, params, grads);
  const TensorView table_view = view_table(table, cpu_device());
  STD_TORCH_CHECK(table_view.sizes[0] == static_cast<int64_t>(params.size()),
      "table must have one row for each of the ", params.size(), " params, got ",
      table_view.sizes[0]);
  auto* const rows = static_cast<int64_t*>(table_view.data);
  const auto row = [rows](size_t i) { return row_of(rows, static_cast<int64_t>(i)); };

  auto& bound = states[0].cache<std::vector<ParamData>>();
  bound.resize(params.size());
  std::atomic<bool> needs_copies = false;
  std::atomic<bool> changed = false;
  for_each_tensor(params.size(), [&](size_t i) {
    const ParamViews views = bind_param(i, state, params[i], grads[i], bound[i]);
    if (!lies_as(views.param, views.order) || !lies_as(views.grad, views.order)) {
      needs_copies.store(true, std::memory_order_relaxed);
    }
    const Row now = refreshed(bound[i], row(i));
    if (!std::equal(now.begin(), now.end(), row(i))) {
      changed.store(true, std::memory_order_relaxed);
    }
  });
  if (needs_copies || !changed) {
    return needs_copies ? kNeedsCopies : kUnchanged;
  }
  for_each_tensor(params.size(), [&](size_t i) {
    const Row now = refreshed(bound[i], row(i));
    std::copy(now.begin(), now.end(), row(i));
  });
  return kChanged;
}

// The values of a negated view or of a tensor of implied zeros lie nowhere. Left to torch, the
// kernel above would be given a temporary copy, whose address dies with the call.
int64_t refuse_implied(int64_t, Tensors, Tensors, Tensor) {
  return kNeedsCopies;
}

std::string table_columns() {
#define CM_FUSED_COLUMN_KEY(Name, key, ...) "," #key
  return &CM_FUSED_REFRESHED_COLUMNS(CM_FUSED_COLUMN_KEY)
      CM_FUSED_CALLERS_COLUMNS(CM_FUSED_COLUMN_KEY)[1];
}

}  // namespace

// Only metadata is looked at, except the table's: any device will do.
STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("refresh_table_", TORCH_BOX(&refresh_table_));
  m.impl("table_columns", TORCH_BOX(&table_columns));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, Negative, m) {
  m.impl("refresh_table_", TORCH_BOX(&refuse_implied));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, ZeroTensor, m) {
  m.impl("refresh_table_", TORCH_BOX(&refuse_implied));
}

}  // namespace cm_fused
