// The CPU implementations of the operators: check the lists, describe each tensor's part, run the
// kernels over chunks in parallel, keep the priority buffers' books.
#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "step.h"

namespace cm_fused {

namespace {

using Tensors = std::vector<Tensor>;

// Below this many elements a thread's start costs more than it saves (as at::internal::GRAIN_SIZE).
constexpr int64_t kGrainSize = 32768;

// One bucket's tensors, described for the kernels. Owns what the descriptions point to.
struct BucketStep {
  std::vector<TensorStep> tensors;
  std::deque<StridedLayout> layouts;
};

// What a step changes. Item i of every list belongs to parameter i.
struct BucketTensors {
  Tensors params;
  Tensors exp_avgs;
  Tensors exp_avg_sqs;
  Tensors max_exp_avg_sqs;
  Tensors critical_buffers;
  Tensors critical_sums;
  Tensors priorities;
  Tensors pending_slots; // critical momenta only
  Tensors steps;
};

ParamDtype param_dtype(size_t index, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ParamDtype::kFloat32;
    case ScalarType::Double:
      return ParamDtype::kFloat64;
    case ScalarType::BFloat16:
      return ParamDtype::kBFloat16;
    case ScalarType::Half:
      return ParamDtype::kFloat16;
    default:
      STD_TORCH_CHECK(
          false, "params[", index, "] must be float32, float64, bfloat16 or float16, got ",
          torch::headeronly::toString(dtype));
  }
}

// The order of the state's memory, which the kernels follow.
struct Order {
  IntHeaderOnlyArrayRef sizes;
  IntHeaderOnlyArrayRef strides;
};

const StridedLayout* strided_layout(const Tensor& tensor, const Order& order, BucketStep& bucket) {
  const auto strides = tensor.strides();
  if (same_strides(order.sizes, strides, order.strides)) {
    return nullptr;
  }
  auto& layout = bucket.layouts.emplace_back();
  for (const size_t d : memory_order(order.sizes, order.strides)) {
    const bool merges = !layout.sizes.empty() && layout.strides.back() == strides[d] * order.sizes[d];
    if (merges) {
      layout.sizes.back() *= order.sizes[d];
      layout.strides.back() = strides[d];
    } else {
      layout.sizes.push_back(order.sizes[d]);
      layout.strides.push_back(strides[d]);
    }
  }
  return &layout;
}

void check_gradient(size_t i, const Tensor& param, const Tensor& grad) {
  check_cpu_strided("params", i, param);
  check_cpu_strided("grads", i, grad);
  check_dtype("grads", i, grad.scalar_type(), param.scalar_type());
  check_sizes("grads", i, grad.sizes(), param.sizes());
}

// A parameter and its gradient in the memory order of `order`.
TensorStep describe_gradient(size_t i, const Tensor& param, const Tensor& grad, const Order& order, BucketStep& bucket) {
  TensorStep tensor{};
  tensor.dtype = param_dtype(i, param.scalar_type());
  tensor.numel = param.numel();
  tensor.param = param.data_ptr();
  tensor.grad = grad.data_ptr();
  if (tensor.numel > 0) {
    tensor.param_layout = strided_layout(param, order, bucket);
    tensor.grad_layout = strided_layout(grad, order, bucket);
  }
  tensor.slot = kNoSlot;
  return tensor;
}

// A state tensor of the parameter's shape, in the memory order of exp_avg.
void* state_data(const char* role, size_t i, const Tensor& state, const Order& order, ScalarType dtype) {
  check_cpu_strided(role, i, state);
  check_dtype(role, i, state.scalar_type(), dtype);
  check_sizes(role, i, state.sizes(), order.sizes);
  check_strides(role, i, order.sizes, state.strides(), order.strides);
  return state.data_ptr();
}

void describe_buffer(size_t i, const Tensor& buffer, const Order& order, ScalarType dtype, TensorStep& tensor) {
  check_cpu_strided("critical_buffers", i, buffer);
  check_dtype("critical_buffers", i, buffer.scalar_type(), dtype);
  const auto sizes = buffer.sizes();
  const auto strides = buffer.strides();
  STD_TORCH_CHECK(
      sizes.size() == order.sizes.size() + 1 && sizes[0] >= 1 &&
          std::equal(order.sizes.begin(), order.sizes.end(), sizes.begin() + 1),
      "critical_buffers[", i, "] must have shape (capacity, *", to_string(order.sizes), "), got ",
      to_string(sizes));
  tensor.capacity = sizes[0];
  const IntHeaderOnlyArrayRef slot_strides(strides.data() + 1, order.strides.size());
  if (tensor.numel > 0) {
    check_strides("critical_buffers", i, order.sizes, slot_strides, order.strides);
    STD_TORCH_CHECK(
        tensor.capacity == 1 || strides[0] == tensor.numel, "critical_buffers[", i,
        "] must hold its slots one after the other, ", tensor.numel, " elements apart, got ", strides[0]);
  }
  tensor.critical_buffer = buffer.data_ptr();
}

Order order_of(size_t i, const Tensor& exp_avg) {
  const Order order{exp_avg.sizes(), exp_avg.strides()};
  STD_TORCH_CHECK(
      exp_avg.numel() == 0 || exp_avg.is_contiguous() || is_dense(order.sizes, order.strides),
      "exp_avgs[", i, "] must fill its memory without gaps or overlaps, got shape ",
      to_string(order.sizes), " and strides ", to_string(order.strides));
  return order;
}

ScalarType state_dtype(ParamDtype dtype) {
  return dtype == ParamDtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

int64_t next_step(size_t i, const Tensor& step) {
  check_bookkeeping("steps", i, step, 1, ScalarType::Float);
  const float value = *static_cast<const float*>(step.data_ptr());
  STD_TORCH_CHECK(value >= 0.0F && std::isfinite(value), "steps[", i, "] must be finite and >= 0, got ", value);
  return static_cast<int64_t>(value) + 1;
}

// 1 - beta^t in float64. Tensors of a group mostly share their t, so the last result is kept.
class BiasCorrections {
 public:
  explicit BiasCorrections(const StepOptions& options) : options_(options) {}

  void set(TensorStep& tensor) {
    if (tensor.step != step_) {
      step_ = tensor.step;
      bias_correction1_ = 1.0 - std::pow(options_.beta1, static_cast<double>(step_));
      bias_correction2_ = 1.0 - std::pow(options_.beta2, static_cast<double>(step_));
    }
    tensor.bias_correction1 = bias_correction1_;
    tensor.bias_correction2 = bias_correction2_;
  }

 private:
  const StepOptions& options_;
  int64_t step_ = 0;
  double bias_correction1_ = 0.0;
  double bias_correction2_ = 0.0;
};

TensorStep describe(
    size_t i, const BucketTensors& tensors, const Tensor& grad, const StepOptions& options,
    BucketStep& bucket) {
  const Tensor& param = tensors.params[i];
  check_gradient(i, param, grad);
  const Order order = order_of(i, tensors.exp_avgs[i]);
  check_sizes("exp_avgs", i, order.sizes, param.sizes());
  auto tensor = describe_gradient(i, param, grad, order, bucket);
  STD_TORCH_CHECK(
      tensor.param_layout == nullptr || has_no_overlap(order.sizes, param.strides()), "params[", i,
      "] must not hold two elements in one place (an expanded tensor?), got shape ",
      to_string(order.sizes), " and strides ", to_string(param.strides()));
  const ScalarType dtype = state_dtype(tensor.dtype);
  tensor.exp_avg = state_data("exp_avgs", i, tensors.exp_avgs[i], order, dtype);
  tensor.exp_avg_sq = state_data("exp_avg_sqs", i, tensors.exp_avg_sqs[i], order, dtype);
  if (!tensors.max_exp_avg_sqs.empty()) {
    tensor.max_exp_avg_sq = state_data("max_exp_avg_sqs", i, tensors.max_exp_avg_sqs[i], order, dtype);
  }
  if (!tensors.critical_sums.empty()) {
    tensor.critical_sum = state_data("critical_sums", i, tensors.critical_sums[i], order, dtype);
  }
  describe_buffer(i, tensors.critical_buffers[i], order, dtype, tensor);
  check_bookkeeping("priorities", i, tensors.priorities[i], tensor.capacity, ScalarType::Float);
  tensor.step = next_step(i, tensors.steps[i]);
  const auto* keys = static_cast<const float*>(tensors.priorities[i].data_ptr());
  // An empty buffer's sum is 0 whatever divides it.
  tensor.mean_divisor = options.mean_over_capacity
      ? tensor.capacity
      : std::max<int64_t>(count_filled(keys, tensor.capacity), 1);
  return tensor;
}

// Checks everything; a step of what it returns cannot fail.
BucketStep describe_bucket(
    const BucketTensors& tensors, const Tensors& grads, const StepOptions& options) {
  const size_t count = tensors.params.size();
  const auto optional_length = [&](const Tensors& list) { return list.empty() ? 0 : count; };
  check_length("grads", grads.size(), count);
  check_length("exp_avgs", tensors.exp_avgs.size(), count);
  check_length("exp_avg_sqs", tensors.exp_avg_sqs.size(), count);
  check_length("max_exp_avg_sqs", tensors.max_exp_avg_sqs.size(), optional_length(tensors.max_exp_avg_sqs));
  check_length("critical_buffers", tensors.critical_buffers.size(), count);
  check_length("critical_sums", tensors.critical_sums.size(), optional_length(tensors.critical_sums));
  check_length("priorities", tensors.priorities.size(), count);
  check_length("steps", tensors.steps.size(), count);
  BucketStep bucket;
  bucket.tensors.reserve(count);
  BiasCorrections bias_corrections(options);
  for (size_t i = 0; i < count; ++i) {
    bucket.tensors.push_back(describe(i, tensors, grads[i], options, bucket));
    bias_corrections.set(bucket.tensors.back());
  }
  return bucket;
}

int64_t& slot_of(const Tensor& pending_slot) {
  return *static_cast<int64_t*>(pending_slot.data_ptr());
}

void check_pending_slot(size_t i, const Tensor& pending_slot, int64_t capacity) {
  check_bookkeeping("pending_slots", i, pending_slot, 1, ScalarType::Long);
  const int64_t slot = slot_of(pending_slot);
  STD_TORCH_CHECK(
      slot >= kNoSlot && slot < capacity, "pending_slots[", i, "] must be in [-1, ", capacity, "), got ", slot);
}

struct Chunk {
  const TensorStep* tensor;
  int64_t index;
};

int64_t count_chunks(const TensorStep& tensor) {
  return (tensor.numel + kChunkSize - 1) / kChunkSize;
}

// Runs a kernel over all chunks and returns its result for each. The order in which threads take
// chunks does not matter: each chunk's result is its own.
std::vector<double> run(ChunkKernel kernel, const BucketStep& bucket, const StepOptions& options) {
  std::vector<Chunk> chunks;
  int64_t numel = 0;
  for (const auto& tensor : bucket.tensors) {
    for (int64_t index = 0; index < count_chunks(tensor); ++index) {
      chunks.push_back({&tensor, index});
    }
    numel += tensor.numel;
  }
  std::vector<double> results(chunks.size());
  const auto count = static_cast<int64_t>(chunks.size());
  const int64_t grain = std::max<int64_t>(1, kGrainSize * count / std::max<int64_t>(numel, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      results[c] = kernel(*chunks[c].tensor, options, chunks[c].index);
    }
  });
  return results;
}

// Adds up each tensor's chunks in order.
std::vector<double> sq_norms(const BucketStep& bucket, const std::vector<double>& chunk_sq_norms) {
  std::vector<double> result;
  result.reserve(bucket.tensors.size());
  auto next = chunk_sq_norms.begin();
  for (const auto& tensor : bucket.tensors) {
    const auto end = next + count_chunks(tensor);
    result.push_back(std::accumulate(next, end, 0.0));
    next = end;
  }
  return result;
}

double total(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

std::optional<double> read_sq_norm(const std::optional<Tensor>& sq_norm) {
  if (!sq_norm.has_value()) {
    return std::nullopt;
  }
  check_bookkeeping("sq_norm", 0, *sq_norm, 1, ScalarType::Double);
  return *static_cast<const double*>(sq_norm->data_ptr());
}

// The keys with which the bucket's tensors ask for a slot.
std::vector<float> priority_keys(
    const BucketStep& bucket, const std::vector<double>& chunk_sq_norms, const StepOptions& options,
    std::optional<double> group_sq_norm) {
  const auto tensor_sq_norms = sq_norms(bucket, chunk_sq_norms);
  const double group = group_sq_norm.value_or(total(tensor_sq_norms));
  std::vector<float> keys;
  keys.reserve(tensor_sq_norms.size());
  for (const double sq_norm : tensor_sq_norms) {
    keys.push_back(priority_key(options.group_scope ? group : sq_norm));
  }
  return keys;
}

// Admission and decay for tensor i; returns the slot its item takes.
int64_t update_priorities(const Tensor& priorities, int64_t capacity, float key, const StepOptions& options) {
  auto* keys = static_cast<float*>(priorities.data_ptr());
  const int64_t slot = admit(keys, capacity, key);
  decay(keys, capacity, static_cast<float>(options.priority_decay));
  return slot;
}

void write_step(const Tensor& step, const TensorStep& tensor) {
  *static_cast<float*>(step.data_ptr()) = static_cast<float>(tensor.step);
}

void step_critical_momenta(
    const BucketTensors& tensors, const Tensors& grads, const std::optional<Tensor>& sq_norm,
    const StepOptions& options) {
  auto bucket = describe_bucket(tensors, grads, options);
  check_length("pending_slots", tensors.pending_slots.size(), tensors.params.size());
  for (size_t i = 0; i < bucket.tensors.size(); ++i) {
    check_pending_slot(i, tensors.pending_slots[i], bucket.tensors[i].capacity);
    bucket.tensors[i].slot = slot_of(tensors.pending_slots[i]);
  }
  const auto group_sq_norm = read_sq_norm(sq_norm);
  const auto chunk_sq_norms = run(kernels().adam_cm, bucket, options);
  const auto keys = priority_keys(bucket, chunk_sq_norms, options, group_sq_norm);
  for (size_t i = 0; i < bucket.tensors.size(); ++i) {
    slot_of(tensors.pending_slots[i]) =
        update_priorities(tensors.priorities[i], bucket.tensors[i].capacity, keys[i], options);
    write_step(tensors.steps[i], bucket.tensors[i]);
  }
}

void step_critical_gradients(
    const BucketTensors& tensors, const Tensors& grads, const std::optional<Tensor>& sq_norm,
    const StepOptions& options) {
  auto bucket = describe_bucket(tensors, grads, options);
  const auto group_sq_norm = read_sq_norm(sq_norm);
  // The gradient is gone by the next step: its norm comes first, so that it can be stored at once.
  const auto chunk_sq_norms = run(kernels().sq_norm, bucket, options);
  const auto keys = priority_keys(bucket, chunk_sq_norms, options, group_sq_norm);
  for (size_t i = 0; i < bucket.tensors.size(); ++i) {
    auto& tensor = bucket.tensors[i];
    tensor.slot = update_priorities(tensors.priorities[i], tensor.capacity, keys[i], options);
    write_step(tensors.steps[i], tensor);
  }
  run(kernels().adam_cg, bucket, options);
}

void adam_cm_(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
    Tensors critical_buffers, Tensors critical_sums, Tensors priorities, Tensors pending_slots,
    Tensors steps, std::optional<Tensor> sq_norm, double lr, double beta1, double beta2, double eps,
    double weight_decay, double priority_decay, bool group_scope, bool mean_over_capacity,
    bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay) {
  step_critical_momenta(
      {std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
       std::move(critical_buffers), std::move(critical_sums), std::move(priorities),
       std::move(pending_slots), std::move(steps)},
      grads, sq_norm,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
       eps_inside_sqrt, maximize, decoupled_weight_decay});
}

void adam_cg_(
    Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
    Tensors critical_buffers, Tensors critical_sums, Tensors priorities, Tensors steps,
    std::optional<Tensor> sq_norm, double lr, double beta1, double beta2, double eps,
    double weight_decay, double priority_decay, bool group_scope, bool mean_over_capacity,
    bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay) {
  step_critical_gradients(
      {std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
       std::move(critical_buffers), std::move(critical_sums), std::move(priorities), {},
       std::move(steps)},
      grads, sq_norm,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
       eps_inside_sqrt, maximize, decoupled_weight_decay});
}

// The buckets handed over with hold_bucket. Never destroyed: tensors must not be released after
// torch's own statics are gone.
class HeldBuckets {
 public:
  static HeldBuckets& instance() {
    static auto* const buckets = new HeldBuckets;
    return *buckets;
  }

  int64_t add(BucketTensors tensors) {
    const std::lock_guard lock(mutex_);
    buckets_.emplace(++last_id_, std::make_shared<const BucketTensors>(std::move(tensors)));
    return last_id_;
  }

  std::shared_ptr<const BucketTensors> get(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = buckets_.find(id);
    STD_TORCH_CHECK(found != buckets_.end(), "bucket must be one that is held, got ", id);
    return found->second;
  }

  void remove(int64_t id) {
    std::shared_ptr<const BucketTensors> released; // outlives the lock
    const std::lock_guard lock(mutex_);
    if (const auto found = buckets_.find(id); found != buckets_.end()) {
      released = std::move(found->second);
      buckets_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const BucketTensors>> buckets_;
  int64_t last_id_ = 0;
};

int64_t hold_bucket(
    Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
    Tensors critical_buffers, Tensors critical_sums, Tensors priorities, Tensors pending_slots,
    Tensors steps) {
  return HeldBuckets::instance().add(
      {std::move(params), std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
       std::move(critical_buffers), std::move(critical_sums), std::move(priorities),
       std::move(pending_slots), std::move(steps)});
}

void release_bucket(int64_t bucket) {
  HeldBuckets::instance().remove(bucket);
}

void step_bucket_(
    int64_t bucket, Tensors grads, std::optional<Tensor> sq_norm, bool critical_gradients, double lr,
    double beta1, double beta2, double eps, double weight_decay, double priority_decay,
    bool group_scope, bool mean_over_capacity, bool eps_inside_sqrt, bool maximize,
    bool decoupled_weight_decay) {
  const auto tensors = HeldBuckets::instance().get(bucket);
  const auto step = critical_gradients ? &step_critical_gradients : &step_critical_momenta;
  step(
      *tensors, grads, sq_norm,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
       eps_inside_sqrt, maximize, decoupled_weight_decay});
}

Tensor sq_norm(Tensors params, Tensors grads, double weight_decay, bool maximize, bool decoupled_weight_decay) {
  StepOptions options{};
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.decoupled_weight_decay = decoupled_weight_decay;
  check_length("grads", grads.size(), params.size());
  BucketStep bucket;
  for (size_t i = 0; i < params.size(); ++i) {
    check_gradient(i, params[i], grads[i]);
    const Order order{grads[i].sizes(), grads[i].strides()};
    bucket.tensors.push_back(describe_gradient(i, params[i], grads[i], order, bucket));
  }
  auto result = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(result.data_ptr()) = total(sq_norms(bucket, run(kernels().sq_norm, bucket, options)));
  return result;
}

void commit_(Tensors exp_avgs, Tensors critical_buffers, Tensors critical_sums, Tensors pending_slots) {
  check_length("critical_buffers", critical_buffers.size(), exp_avgs.size());
  check_length("critical_sums", critical_sums.size(), critical_sums.empty() ? 0 : exp_avgs.size());
  check_length("pending_slots", pending_slots.size(), exp_avgs.size());
  BucketStep bucket;
  for (size_t i = 0; i < exp_avgs.size(); ++i) {
    const Order order = order_of(i, exp_avgs[i]);
    TensorStep tensor{};
    const ScalarType dtype = exp_avgs[i].scalar_type();
    tensor.dtype = param_dtype(i, dtype);
    check_dtype("exp_avgs", i, dtype, state_dtype(tensor.dtype));
    tensor.numel = exp_avgs[i].numel();
    tensor.exp_avg = state_data("exp_avgs", i, exp_avgs[i], order, dtype);
    describe_buffer(i, critical_buffers[i], order, dtype, tensor);
    if (!critical_sums.empty()) {
      tensor.critical_sum = state_data("critical_sums", i, critical_sums[i], order, dtype);
    }
    check_pending_slot(i, pending_slots[i], tensor.capacity);
    tensor.slot = slot_of(pending_slots[i]);
    if (tensor.slot != kNoSlot) {
      bucket.tensors.push_back(tensor);
    }
  }
  run(kernels().commit, bucket, {});
  for (const auto& pending_slot : pending_slots) {
    slot_of(pending_slot) = kNoSlot;
  }
}

std::string cpu_capability() {
  return kernels().name;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CPU, m) {
  m.impl("adam_cm_", TORCH_BOX(&adam_cm_));
  m.impl("adam_cg_", TORCH_BOX(&adam_cg_));
  m.impl("sq_norm", TORCH_BOX(&sq_norm));
  m.impl("commit_", TORCH_BOX(&commit_));
  m.impl("hold_bucket", TORCH_BOX(&hold_bucket));
  m.impl("step_bucket_", TORCH_BOX(&step_bucket_));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("release_bucket", TORCH_BOX(&release_bucket));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

} // namespace cm_fused
