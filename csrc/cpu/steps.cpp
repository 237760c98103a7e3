#include "steps.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

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

int64_t param_bytes(ParamDtype dtype) {
  return dtype == ParamDtype::kFloat64 ? sizeof(double) : is_half(dtype) ? 2 : sizeof(float);
}

}  // namespace

void Steps::add(const StateTensors& state, std::span<const Tensor> params,
    std::span<const Tensor> grads, StepScalars scalars, BucketStep& bucket) {
  bind_bucket(state, params, grads, scalars.options, bucket);
  const bool has_sq_norms = !scalars.sq_norms.empty();
  scalars.sq_norms.resize(params.size());
  parts_.push_back(
      {!state.has(kPendingSlot), &bucket, has_sq_norms, std::move(scalars), nullptr, 0});
}

int64_t Steps::num_moves() const {
  int64_t moves = 0;
  for (const auto& part : parts_) {
    for (const auto& tensor : *part.bucket) {
      moves += tensor.num_moves;
    }
  }
  return moves;
}

bool Steps::find_overlap() const {
  std::vector<std::pair<const char*, const char*>> extents;
  for (const auto& part : parts_) {
    for (const auto& tensor : *part.bucket) {
      if (tensor.numel > 0) {
        const auto* const begin = static_cast<const char*>(tensor.param);
        extents.emplace_back(begin, begin + tensor.param_extent * param_bytes(tensor.dtype));
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
    if (part.scalars.is_skipped) {
      continue;
    }
    if (!part.critical_gradients) {
      part.first_chunk = momenta.add(*part.bucket, part.scalars.options);
      continue;
    }
    if (!part.has_sq_norms) {
      part.first_chunk = norms.add(*part.bucket, part.scalars.options);
    }
    gradients.add(*part.bucket, part.scalars.options);
  }
  // From here on nothing fails.
  norms.run(chosen.sq_norm);
  momenta.run(chosen.adam_cm, one_by_one);
  for (auto& part : parts_) {
    if (!part.scalars.is_skipped) {
      finish_(part, part.critical_gradients ? norms : momenta);
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
  const StepOptions& options = part.scalars.options;
  auto& sq_norms = part.scalars.sq_norms;
  if (!part.has_sq_norms) {
    pass.add_up(bucket, part.first_chunk, sq_norms.data());
    if (options.group_scope) {
      std::fill(sq_norms.begin(), sq_norms.end(), over_group(sq_norms, options.sum_of_norms));
    }
  }
  for (size_t i = 0; i < bucket.size(); ++i) {
    auto* const slot = part.critical_gradients ? &bucket[i].slot : bucket[i].pending_slot;
    update_priorities({bucket[i].priorities, slot, bucket[i].step, nullptr}, bucket[i].capacity,
        static_cast<float>(options.priority_decay), priority_key(sq_norms[i]));
  }
}

}  // namespace cm_fused
