// The CPU implementations of the operators: check the lists, describe each tensor's part, run the
// kernels over chunks in parallel, keep the priority buffers' books.
#include <cmath>
#include <cstdint>
#include <exception>
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
constexpr int64_t kTensorGrainSize = 256;

using BucketStep = std::vector<TensorStep>;

// The error of the lowest index, of those that threads met.
class FirstError {
 public:
  template <typename Function>
  void run(int64_t index, Function function) {
    try {
      function();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (error_ == nullptr || index < index_) {
        index_ = index;
        error_ = std::current_exception();
      }
    }
  }

  void rethrow() const {
    if (error_ != nullptr) {
      std::rethrow_exception(error_);
    }
  }

 private:
  std::mutex mutex_;
  int64_t index_ = 0;
  std::exception_ptr error_;
};

// The state that a step changes. Item i of every list belongs to parameter i.
struct StateTensors {
  Tensors exp_avgs;
  Tensors exp_avg_sqs;
  Tensors max_exp_avg_sqs;
  Tensors critical_buffers;
  Tensors critical_sums;
  Tensors priorities;
  Tensors pending_slots;  // critical momenta only
  Tensors steps;
};

ParamDtype param_dtype(const char* role, size_t index, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) {
    return ParamDtype::kFloat32;
  }
  if (dtype == aoti_torch_dtype_float64()) {
    return ParamDtype::kFloat64;
  }
  if (dtype == aoti_torch_dtype_bfloat16()) {
    return ParamDtype::kBFloat16;
  }
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), role, "[", index,
      "] must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  return ParamDtype::kFloat16;
}

int32_t state_dtype(ParamDtype dtype) {
  return dtype == ParamDtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Where a tensor's elements lie in the order of `order`, or nullptr: as there.
std::unique_ptr<const StridedLayout> strided_layout(
    const TensorView& tensor, const TensorView& order) {
  if (tensor.numel == 0 || same_strides(order.sizes, tensor.strides, order.strides)) {
    return nullptr;
  }
  auto layout = std::make_unique<StridedLayout>();
  for (const size_t d : memory_order(order.sizes, order.strides)) {
    const int64_t size = order.sizes[d];
    const int64_t stride = tensor.strides[d];
    if (!layout->sizes.empty() && layout->strides.back() == stride * size) {
      layout->sizes.back() *= size;
      layout->strides.back() = stride;
    } else {
      layout->sizes.push_back(size);
      layout->strides.push_back(stride);
    }
  }
  return layout;
}

TensorView view_gradient(size_t i, const TensorView& param, const Tensor& grad) {
  const TensorView view_of_grad = view("grads", i, grad);
  check_dtype("grads", i, view_of_grad.dtype, param.dtype);
  check_sizes("grads", i, view_of_grad.sizes, param.sizes);
  return view_of_grad;
}

// Puts a parameter and its gradient in the memory order of `order`.
void describe_gradient(size_t i, const TensorView& param, const TensorView& grad,
    const TensorView& order, TensorStep& tensor) {
  tensor.dtype = param_dtype("params", i, param.dtype);
  tensor.numel = param.numel;
  tensor.param = param.data;
  tensor.grad = grad.data;
  tensor.param_layout = strided_layout(param, order);
  tensor.grad_layout = strided_layout(grad, order);
  tensor.slot = kNoSlot;
}

// The state's memory order is exp_avg's.
void check_dense(size_t i, const TensorView& exp_avg) {
  STD_TORCH_CHECK(exp_avg.numel == 0 || is_dense(exp_avg.sizes, exp_avg.strides), "exp_avgs[", i,
      "] must fill its memory without gaps or overlaps, got shape ", to_string(exp_avg.sizes),
      " and strides ", to_string(exp_avg.strides));
}

// A state tensor of the parameter's shape.
void* state_data(const char* role, size_t i, const Tensor& tensor, const TensorView& order) {
  const TensorView state = view(role, i, tensor);
  check_dtype(role, i, state.dtype, order.dtype);
  check_sizes(role, i, state.sizes, order.sizes);
  check_strides(role, i, order.sizes, state.strides, order.strides);
  return state.data;
}

void describe_buffer(
    size_t i, const Tensor& critical_buffer, const TensorView& order, TensorStep& tensor) {
  const TensorView buffer = view("critical_buffers", i, critical_buffer);
  check_dtype("critical_buffers", i, buffer.dtype, order.dtype);
  STD_TORCH_CHECK(buffer.sizes.size() == order.sizes.size() + 1 && buffer.sizes[0] >= 1 &&
                      std::equal(order.sizes.begin(), order.sizes.end(), buffer.sizes.begin() + 1),
      "critical_buffers[", i, "] must have shape (capacity, *", to_string(order.sizes), "), got ",
      to_string(buffer.sizes));
  tensor.capacity = buffer.sizes[0];
  const IntHeaderOnlyArrayRef slot_strides(buffer.strides.data() + 1, order.strides.size());
  if (tensor.numel > 0) {
    check_strides("critical_buffers", i, order.sizes, slot_strides, order.strides);
    STD_TORCH_CHECK(tensor.capacity == 1 || buffer.strides[0] == tensor.numel, "critical_buffers[",
        i, "] must hold its slots one after the other, ", tensor.numel, " elements apart, got ",
        buffer.strides[0]);
  }
  tensor.critical_buffer = buffer.data;
}

void read_pending_slot(size_t i, TensorStep& tensor) {
  tensor.slot = *tensor.pending_slot;
  STD_TORCH_CHECK(tensor.slot >= kNoSlot && tensor.slot < tensor.capacity, "pending_slots[", i,
      "] must be in [-1, ", tensor.capacity, "), got ", tensor.slot);
}

void read_step_count(size_t i, TensorStep& tensor) {
  const float count = *tensor.step_count;
  STD_TORCH_CHECK(
      count >= 0.0F && std::isfinite(count), "steps[", i, "] must be finite and >= 0, got ", count);
  tensor.step = static_cast<int64_t>(count) + 1;
}

int64_t* pending_slot_data(size_t i, const Tensor& pending_slot) {
  return bookkeeping<int64_t>("pending_slots", i, pending_slot, 1, aoti_torch_dtype_int64());
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

// Checks the state of parameter i and takes its addresses.
void describe_state(
    size_t i, const StateTensors& state, const TensorView& order, TensorStep& tensor) {
  check_dense(i, order);
  tensor.exp_avg = order.data;
  tensor.exp_avg_sq = state_data("exp_avg_sqs", i, state.exp_avg_sqs[i], order);
  if (!state.max_exp_avg_sqs.empty()) {
    tensor.max_exp_avg_sq = state_data("max_exp_avg_sqs", i, state.max_exp_avg_sqs[i], order);
  }
  if (!state.critical_sums.empty()) {
    tensor.critical_sum = state_data("critical_sums", i, state.critical_sums[i], order);
  }
  describe_buffer(i, state.critical_buffers[i], order, tensor);
  tensor.priorities = bookkeeping<float>(
      "priorities", i, state.priorities[i], tensor.capacity, aoti_torch_dtype_float32());
  if (!state.pending_slots.empty()) {
    tensor.pending_slot = pending_slot_data(i, state.pending_slots[i]);
  }
  tensor.step_count = bookkeeping<float>("steps", i, state.steps[i], 1, aoti_torch_dtype_float32());
  tensor.has_state = true;
}

// Whether a state tensor of parameter i lies elsewhere than when its addresses were taken.
bool state_moved(
    size_t i, const StateTensors& state, const TensorView& order, const TensorStep& tensor) {
  const auto moved = [i](const Tensors& list, const void* address) {
    return !list.empty() && list[i].data_ptr() != address;
  };
  return order.data != tensor.exp_avg || moved(state.exp_avg_sqs, tensor.exp_avg_sq) ||
         moved(state.max_exp_avg_sqs, tensor.max_exp_avg_sq) ||
         moved(state.critical_buffers, tensor.critical_buffer) ||
         moved(state.critical_sums, tensor.critical_sum) ||
         moved(state.priorities, tensor.priorities) ||
         moved(state.pending_slots, tensor.pending_slot) || moved(state.steps, tensor.step_count);
}

// Describes parameter i's part in this step. What `tensor` knows of the state from an earlier step
// is kept where it still holds.
void describe(size_t i, const StateTensors& state, const Tensor& param, const Tensor& grad,
    const StepOptions& options, TensorStep& tensor) {
  const TensorView param_view = view("params", i, param);
  const TensorView order = view("exp_avgs", i, state.exp_avgs[i]);
  check_sizes("exp_avgs", i, order.sizes, param_view.sizes);
  describe_gradient(i, param_view, view_gradient(i, param_view, grad), order, tensor);
  check_dtype("exp_avgs", i, order.dtype, state_dtype(tensor.dtype));
  STD_TORCH_CHECK(
      tensor.param_layout == nullptr || has_no_overlap(param_view.sizes, param_view.strides),
      "params[", i, "] must not hold two elements in one place (an expanded tensor?), got shape ",
      to_string(param_view.sizes), " and strides ", to_string(param_view.strides));
  if (!tensor.has_state || state_moved(i, state, order, tensor)) {
    describe_state(i, state, order, tensor);
  }
  if (tensor.pending_slot != nullptr) {
    read_pending_slot(i, tensor);
  }
  read_step_count(i, tensor);
  // An empty buffer's sum is 0 whatever divides it.
  tensor.mean_divisor =
      options.mean_over_capacity
          ? tensor.capacity
          : std::max<int64_t>(count_filled(tensor.priorities, tensor.capacity), 1);
}

void check_lengths(const StateTensors& state, const Tensors& params, const Tensors& grads) {
  const size_t count = params.size();
  const auto optional_length = [&](const Tensors& list) { return list.empty() ? 0 : count; };
  check_length("grads", grads.size(), count);
  check_length("exp_avgs", state.exp_avgs.size(), count);
  check_length("exp_avg_sqs", state.exp_avg_sqs.size(), count);
  check_length(
      "max_exp_avg_sqs", state.max_exp_avg_sqs.size(), optional_length(state.max_exp_avg_sqs));
  check_length("critical_buffers", state.critical_buffers.size(), count);
  check_length("critical_sums", state.critical_sums.size(), optional_length(state.critical_sums));
  check_length("priorities", state.priorities.size(), count);
  check_length("pending_slots", state.pending_slots.size(), optional_length(state.pending_slots));
  check_length("steps", state.steps.size(), count);
}

// Checks everything; a step of what it describes cannot fail. Runs over tensors in parallel: with
// many small ones the time goes into cache misses on their metadata.
void describe_bucket(const StateTensors& state, const Tensors& params, const Tensors& grads,
    const StepOptions& options, BucketStep& bucket) {
  check_lengths(state, params, grads);
  bucket.resize(params.size());
  FirstError error;
  const auto count = static_cast<int64_t>(bucket.size());
  torch::stable::parallel_for(0, count, kTensorGrainSize, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      error.run(i, [&] { describe(i, state, params[i], grads[i], options, bucket[i]); });
    }
  });
  error.rethrow();
  BiasCorrections bias_corrections(options);
  for (auto& tensor : bucket) {
    bias_corrections.set(tensor);
  }
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
  for (const auto& tensor : bucket) {
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
  result.reserve(bucket.size());
  auto next = chunk_sq_norms.begin();
  for (const auto& tensor : bucket) {
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
  return *bookkeeping<double>("sq_norm", 0, *sq_norm, 1, aoti_torch_dtype_float64());
}

// The keys with which the bucket's tensors ask for a slot.
std::vector<float> priority_keys(const BucketStep& bucket,
    const std::vector<double>& chunk_sq_norms, const StepOptions& options,
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

// Admission, decay and step count of one tensor; returns the slot its item takes.
int64_t update_bookkeeping(const TensorStep& tensor, float key, const StepOptions& options) {
  const int64_t slot = admit(tensor.priorities, tensor.capacity, key);
  decay(tensor.priorities, tensor.capacity, static_cast<float>(options.priority_decay));
  *tensor.step_count = static_cast<float>(tensor.step);
  return slot;
}

void step_critical_momenta(const StateTensors& state, const Tensors& params, const Tensors& grads,
    const std::optional<Tensor>& sq_norm, const StepOptions& options, BucketStep& bucket) {
  check_length("pending_slots", state.pending_slots.size(), params.size());
  describe_bucket(state, params, grads, options, bucket);
  const auto group_sq_norm = read_sq_norm(sq_norm);
  const auto chunk_sq_norms = run(kernels().adam_cm, bucket, options);
  const auto keys = priority_keys(bucket, chunk_sq_norms, options, group_sq_norm);
  for (size_t i = 0; i < bucket.size(); ++i) {
    *bucket[i].pending_slot = update_bookkeeping(bucket[i], keys[i], options);
  }
}

void step_critical_gradients(const StateTensors& state, const Tensors& params, const Tensors& grads,
    const std::optional<Tensor>& sq_norm, const StepOptions& options, BucketStep& bucket) {
  describe_bucket(state, params, grads, options, bucket);
  const auto group_sq_norm = read_sq_norm(sq_norm);
  // The gradient is gone by the next step: its norm comes first, so that it can be stored at once.
  const auto chunk_sq_norms = run(kernels().sq_norm, bucket, options);
  const auto keys = priority_keys(bucket, chunk_sq_norms, options, group_sq_norm);
  for (size_t i = 0; i < bucket.size(); ++i) {
    bucket[i].slot = update_bookkeeping(bucket[i], keys[i], options);
  }
  run(kernels().adam_cg, bucket, options);
}

void adam_cm_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
    Tensors max_exp_avg_sqs, Tensors critical_buffers, Tensors critical_sums, Tensors priorities,
    Tensors pending_slots, Tensors steps, std::optional<Tensor> sq_norm, double lr, double beta1,
    double beta2, double eps, double weight_decay, double priority_decay, bool group_scope,
    bool mean_over_capacity, bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay) {
  BucketStep bucket;
  step_critical_momenta({std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
                            std::move(critical_buffers), std::move(critical_sums),
                            std::move(priorities), std::move(pending_slots), std::move(steps)},
      params, grads, sq_norm,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay},
      bucket);
}

void adam_cg_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
    Tensors max_exp_avg_sqs, Tensors critical_buffers, Tensors critical_sums, Tensors priorities,
    Tensors steps, std::optional<Tensor> sq_norm, double lr, double beta1, double beta2, double eps,
    double weight_decay, double priority_decay, bool group_scope, bool mean_over_capacity,
    bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay) {
  BucketStep bucket;
  step_critical_gradients({std::move(exp_avgs), std::move(exp_avg_sqs), std::move(max_exp_avg_sqs),
                              std::move(critical_buffers), std::move(critical_sums),
                              std::move(priorities), {}, std::move(steps)},
      params, grads, sq_norm,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay},
      bucket);
}

struct HeldState {
  StateTensors tensors;
  // What the last step knew of them.
  BucketStep described;
};

// The state handed over with hold_state. Never destroyed: tensors must not be released after
// torch's own statics are gone.
class HeldStates {
 public:
  static HeldStates& instance() {
    static auto* const states = new HeldStates;
    return *states;
  }

  int64_t add(StateTensors tensors) {
    const std::lock_guard lock(mutex_);
    states_.emplace(++last_id_, std::make_shared<HeldState>(HeldState{std::move(tensors), {}}));
    return last_id_;
  }

  std::shared_ptr<HeldState> get(int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto found = states_.find(id);
    STD_TORCH_CHECK(found != states_.end(), "held must name a state that is held, got ", id);
    return found->second;
  }

  void remove(int64_t id) {
    std::shared_ptr<HeldState> released;  // outlives the lock
    const std::lock_guard lock(mutex_);
    if (const auto found = states_.find(id); found != states_.end()) {
      released = std::move(found->second);
      states_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<HeldState>> states_;
  int64_t last_id_ = 0;
};

int64_t hold_state(Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
    Tensors critical_buffers, Tensors critical_sums, Tensors priorities, Tensors pending_slots,
    Tensors steps) {
  return HeldStates::instance().add({std::move(exp_avgs), std::move(exp_avg_sqs),
      std::move(max_exp_avg_sqs), std::move(critical_buffers), std::move(critical_sums),
      std::move(priorities), std::move(pending_slots), std::move(steps)});
}

void release_state(int64_t held) {
  HeldStates::instance().remove(held);
}

void step_held_(int64_t held, Tensors params, Tensors grads, std::optional<Tensor> sq_norm,
    bool critical_gradients, double lr, double beta1, double beta2, double eps, double weight_decay,
    double priority_decay, bool group_scope, bool mean_over_capacity, bool eps_inside_sqrt,
    bool maximize, bool decoupled_weight_decay) {
  const auto state = HeldStates::instance().get(held);
  const auto step = critical_gradients ? &step_critical_gradients : &step_critical_momenta;
  step(state->tensors, params, grads, sq_norm,
      {lr, beta1, beta2, eps, weight_decay, priority_decay, group_scope, mean_over_capacity,
          eps_inside_sqrt, maximize, decoupled_weight_decay},
      state->described);
}

Tensor sq_norm(Tensors params, Tensors grads, double weight_decay, bool maximize,
    bool decoupled_weight_decay) {
  StepOptions options{};
  options.weight_decay = weight_decay;
  options.maximize = maximize;
  options.decoupled_weight_decay = decoupled_weight_decay;
  check_length("grads", grads.size(), params.size());
  BucketStep bucket;
  for (size_t i = 0; i < params.size(); ++i) {
    const TensorView param = view("params", i, params[i]);
    const TensorView grad = view_gradient(i, param, grads[i]);
    // Any order without gaps will do.
    const auto contiguous = contiguous_strides(param.sizes);
    TensorView order = param;
    if (!is_dense(param.sizes, param.strides)) {
      order.strides = {contiguous.data(), contiguous.size()};
    }
    describe_gradient(i, param, grad, order, bucket.emplace_back());
  }
  auto result = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(result.data_ptr()) =
      total(sq_norms(bucket, run(kernels().sq_norm, bucket, options)));
  return result;
}

void commit_(
    Tensors exp_avgs, Tensors critical_buffers, Tensors critical_sums, Tensors pending_slots) {
  check_length("critical_buffers", critical_buffers.size(), exp_avgs.size());
  check_length("critical_sums", critical_sums.size(), critical_sums.empty() ? 0 : exp_avgs.size());
  check_length("pending_slots", pending_slots.size(), exp_avgs.size());
  BucketStep bucket;
  for (size_t i = 0; i < exp_avgs.size(); ++i) {
    const TensorView order = view("exp_avgs", i, exp_avgs[i]);
    check_dense(i, order);
    TensorStep tensor{};
    tensor.dtype = param_dtype("exp_avgs", i, order.dtype);
    check_dtype("exp_avgs", i, order.dtype, state_dtype(tensor.dtype));
    tensor.numel = order.numel;
    tensor.exp_avg = order.data;
    describe_buffer(i, critical_buffers[i], order, tensor);
    if (!critical_sums.empty()) {
      tensor.critical_sum = state_data("critical_sums", i, critical_sums[i], order);
    }
    tensor.pending_slot = pending_slot_data(i, pending_slots[i]);
    read_pending_slot(i, tensor);
    if (tensor.slot != kNoSlot) {
      bucket.push_back(std::move(tensor));
    }
  }
  run(kernels().commit, bucket, {});
  for (const auto& tensor : bucket) {
    *tensor.pending_slot = kNoSlot;
  }
}

std::string cpu_capability() {
  return kernels().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CPU, m) {
  m.impl("adam_cm_", TORCH_BOX(&adam_cm_));
  m.impl("adam_cg_", TORCH_BOX(&adam_cg_));
  m.impl("sq_norm", TORCH_BOX(&sq_norm));
  m.impl("commit_", TORCH_BOX(&commit_));
  m.impl("hold_state", TORCH_BOX(&hold_state));
  m.impl("step_held_", TORCH_BOX(&step_held_));
}

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CompositeExplicitAutograd, m) {
  m.impl("release_state", TORCH_BOX(&release_state));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace cm_fused
