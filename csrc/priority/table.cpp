// Keeps the host's copy of a bucket's table up to date.
#include "table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../core/describe.h"
#include "../core/parallel.h"
#include "table_checks.h"

namespace cm_fused {

namespace {

enum Refreshed : int64_t { kUnchanged, kChanged, kNeedsCopies };

using Row = std::array<int64_t, kNumRefreshedColumns>;

int64_t address(const void* data) {
  return reinterpret_cast<int64_t>(data);
}

// `row` is the table's: without a pending slot the place for one is not ours to change.
Row refreshed(const ParamData& data, const int64_t* row) {
  return {address(data.param), address(data.grad), address(data.exp_avg), address(data.exp_avg_sq),
      address(data.max_exp_avg_sq), address(data.critical_buffer), address(data.critical_sum),
      address(data.compensation), address(data.critical_scales), address(data.exp_avg_scales),
      address(data.exp_avg_sq_scales), address(data.priorities),
      data.pending_slot == nullptr ? row[kSlotColumn] : address(data.pending_slot),
      address(data.step_count), data.numel, static_cast<int64_t>(data.dtype), data.param_index,
      data.places.offset, data.places.length, data.places.stride};
}

int64_t refresh_table_(int64_t held, Tensors params, Tensors grads, Tensor table) {
  const auto state = HeldStates::instance().get(held);
  const auto lock = state->lock();
  check_lengths(state->tensors, params, grads);
  const TensorView table_view = view_table(table, cpu_device());
  STD_TORCH_CHECK(table_view.sizes[0] == static_cast<int64_t>(params.size()),
      "table must have one row for each of the ", params.size(), " params, got ",
      table_view.sizes[0]);
  auto* const rows = static_cast<int64_t*>(table_view.data);
  const auto row = [rows](size_t i) { return row_of(rows, static_cast<int64_t>(i)); };

  auto& described = state->knowledge<std::vector<ParamData>>();
  described.resize(params.size());
  std::atomic<bool> needs_copies = false;
  std::atomic<bool> changed = false;
  for_each_tensor(params.size(), [&](size_t i) {
    const ParamViews views = describe_param(i, state->tensors, params[i], grads[i], described[i]);
    if (!lies_as(views.param, views.order) || !lies_as(views.grad, views.order)) {
      needs_copies.store(true, std::memory_order_relaxed);
    }
    const Row now = refreshed(described[i], row(i));
    if (!std::equal(now.begin(), now.end(), row(i))) {
      changed.store(true, std::memory_order_relaxed);
    }
  });
  if (needs_copies) {
    return kNeedsCopies;
  }
  if (!changed) {
    return kUnchanged;
  }
  for_each_tensor(params.size(), [&](size_t i) {
    const Row now = refreshed(described[i], row(i));
    std::copy(now.begin(), now.end(), row(i));
  });
  return kChanged;
}

// The values of a negated view or of a tensor of implied zeros lie nowhere. Left to torch, the
// kernel above would be given a temporary copy, whose address dies with the call.
int64_t refuse_implied(int64_t, Tensors, Tensors, Tensor) {
  return kNeedsCopies;
}

}  // namespace

// Only metadata is looked at, but for the table's: any device will do.
STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("refresh_table_", TORCH_BOX(&refresh_table_));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, Negative, m) {
  m.impl("refresh_table_", TORCH_BOX(&refuse_implied));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, ZeroTensor, m) {
  m.impl("refresh_table_", TORCH_BOX(&refuse_implied));
}

}  // namespace cm_fused
