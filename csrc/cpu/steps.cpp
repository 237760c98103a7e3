#include "steps.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "../priority/bookkeeping.h"

namespace cm_fused {

namespace {

// The sum of squares over a group of tensors.
double over_group(std::span<const double> sq_norms, bool sum_of_norms) {
  if (!sum_of_norms) {
    return std::accumulate(sq_norms.begin(), sq_norms.end(), 0.0);
  }
  double norm = 0.0;
  for (const double sq_norm : sq_norms) {
    norm += std::sqrt(sq_norm);
  }
  return norm * norm;
}

}  // namespace

double read_scalar(const char* role, const std::optional<Tensor>& tensor, double otherwise) {
  if (!tensor.has_value()) {
    return otherwise;
  }
  return *bookkeeping<double>(role, kNoIndex, *tensor, 1, aoti_torch_dtype_float64(), cpu_device());
}

bool is_skipped(const std::optional<Tensor>& found_inf) {
  return read_scalar("found_inf", found_inf, 0.0) != 0.0;
}

std::vector<double> read_sq_norm(const Tensor& sq_norm, size_t count) {
  const int64_t numel = sq_norm.numel() == 1 ? 1 : static_cast<int64_t>(count);
  const double* values = bookkeeping<double>(
      "sq_norm", kNoIndex, sq_norm, numel, aoti_torch_dtype_float64(), cpu_device());
  return numel == 1 ? std::vector<double>(count, *values)
                    : std::vector<double>(values, values + count);
}

void keep_books(const TensorStep& tensor, double sq_norm, double priority_decay, int64_t* slot) {
  update_bookkeeping({tensor.priorities, slot, tensor.step_count, nullptr}, tensor.capacity,
      static_cast<float>(priority_decay), priority_key(sq_norm));
}

void Steps::add(Critical critical, const StateTensors& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, const ScalarTensors& scalars, const StepOptions& hyperparameters,
    BucketStep& bucket) {
  StepOptions options = hyperparameters;
  options.lr = read_scalar("lr_tensor", scalars.lr, options.lr);
  options.grad_factor = read_scalar("grad_factor", scalars.grad_factor, options.grad_factor);
  if (critical == Critical::kMomenta) {
    check_length("pending_slots", state.pending_slots.size(), params.size());
  }
  describe_bucket(state, params, grads, options, bucket);
  auto sq_norms = scalars.sq_norm.has_value() ? read_sq_norm(*scalars.sq_norm, params.size())
                                              : std::vector<double>(params.size());
  parts_.push_back({critical, &bucket, options, is_skipped(scalars.found_inf),
      scalars.sq_norm.has_value(), std::move(sq_norms), nullptr, 0});
}

bool Steps::has_moved() const {
  return std::any_of(parts_.begin(), parts_.end(), [](const Part& part) {
    return std::any_of(part.bucket->begin(), part.bucket->end(),
        [](const TensorStep& tensor) { return tensor.param_moved; });
  });
}

bool Steps::find_overlap() {
  std::vector<std::pair<const char*, const char*>> extents;
  for (const auto& part : parts_) {
    for (auto& tensor : *part.bucket) {
      tensor.param_moved = false;
      if (tensor.numel > 0) {
        extents.emplace_back(static_cast<const char*>(tensor.param), tensor.param_end);
      }
    }
  }
  std::sort(extents.begin(), extents.end());
  return std::adjacent_find(extents.begin(), extents.end(),
             [](const auto& a, const auto& b) { return b.first < a.second; }) != extents.end();
}

void Steps::take_(double* local_sq_norms, bool one_by_one) {
  const Kernels& chosen = kernels();
  Pass momenta;
  Pass norms;  // the gradient is gone by the next step: to be stored now, its norm comes first
  Pass gradients;
  for (auto& part : parts_) {
    if (local_sq_norms != nullptr) {
      part.local_sq_norms = local_sq_norms;
      local_sq_norms += part.bucket->size();
    }
    if (part.is_skipped) {
      continue;
    }
    if (part.critical == Critical::kMomenta) {
      part.first_chunk = momenta.add(*part.bucket, part.options);
      continue;
    }
    if (!part.has_sq_norms) {
      part.first_chunk = norms.add(*part.bucket, part.options);
    }
    gradients.add(*part.bucket, part.options);
  }
  // From here on nothing fails.
  norms.run(chosen.sq_norm);
  momenta.run(chosen.adam_cm, one_by_one);
  for (auto& part : parts_) {
    if (!part.is_skipped) {
      finish_(part, part.critical == Critical::kMomenta ? momenta : norms);
    }
  }
  gradients.run(chosen.adam_cg, one_by_one);
}

void Steps::finish_(Part& part, const Pass& pass) {
  BucketStep& bucket = *part.bucket;
  if (part.local_sq_norms != nullptr) {
    pass.add_up(bucket, part.first_chunk, part.local_sq_norms);
    return;
  }
  auto& sq_norms = part.sq_norms;
  if (!part.has_sq_norms) {
    pass.add_up(bucket, part.first_chunk, sq_norms.data());
    if (part.options.group_scope) {
      std::fill(sq_norms.begin(), sq_norms.end(), over_group(sq_norms, part.options.sum_of_norms));
    }
  }
  for (size_t i = 0; i < bucket.size(); ++i) {
    auto* const slot =
        part.critical == Critical::kMomenta ? bucket[i].pending_slot : &bucket[i].slot;
    keep_books(bucket[i], sq_norms[i], part.options.priority_decay, slot);
  }
}

}  // namespace cm_fused
