// Keeps the host's copy of a bucket's table up to date.
#include "table.h"

#include <algorithm>
#include <array>
#include <iterator>

#include <torch/csrc/stable/library.h>

#include "../core/state.h"

namespace cm_fused {
namespace {

// What differs from the table: nothing, gradients' addresses alone, more than those.
enum Refreshed : int64_t { kUnchanged, kGradsMoved, kChanged, kNeedsCopies };

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
  const int64_t dtypes =
      static_cast<int64_t>(data.dtype) + kNumParamDtypes * static_cast<int64_t>(data.grad_dtype);
  const int64_t numbers[] = {
      data.numel, dtypes, data.param_index, layout.offset, layout.length, layout.stride};
  std::copy(std::begin(numbers), std::end(numbers), &result[kNumelColumn]);
  return result;
}

Refreshed difference(Row now, const int64_t* row) {
  const bool grad_moved = now[kGradColumn] != row[kGradColumn];
  now[kGradColumn] = row[kGradColumn];
  if (!std::equal(now.begin(), now.end(), row)) {
    return kChanged;
  }
  return grad_moved ? kGradsMoved : kUnchanged;
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
  bool needs_copies = false;
  Refreshed result = kUnchanged;
  // By one thread: others are the data loaders', and a start costs more than a thousand tensors.
  for (size_t i = 0; i < params.size(); ++i) {
    const ParamViews views = bind_param(i, state, params[i], grads[i], bound[i]);
    needs_copies |= !lies_as(views.param, views.order) || !lies_as(views.grad, views.order);
    result = std::max(result, difference(refreshed(bound[i], row(i)), row(i)));
  }
  if (needs_copies || result == kUnchanged) {
    return needs_copies ? kNeedsCopies : kUnchanged;
  }
  for (size_t i = 0; i < params.size(); ++i) {
    const Row now = refreshed(bound[i], row(i));
    std::copy(now.begin(), now.end(), row(i));
  }
  return result;
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
