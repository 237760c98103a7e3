// Schemas of the operators; each device's library implements them.
#include <torch/csrc/stable/library.h>

// Lists run over the tensors of one bucket: those of a param group that share a device. Real dtypes
// only; complex tensors are passed as views of pairs. `grads` are never written.
// max_exp_avg_sqs is empty without amsgrad, critical_sums where the sum is read from the slots.
// sq_norm, the group's sum of g^2, is computed from the bucket where it is not given.
STABLE_TORCH_LIBRARY(cm_fused, m) {
  m.def(
      "adam_cm_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] critical_buffers, "
      "Tensor(f!)[] critical_sums, Tensor(g!)[] priorities, Tensor(h!)[] pending_slots, "
      "Tensor(i!)[] steps, Tensor? sq_norm, *, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float priority_decay, bool group_scope, bool mean_over_capacity, "
      "bool eps_inside_sqrt, bool maximize, bool decoupled_weight_decay) -> ()");
  m.def(
      "adam_cg_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] critical_buffers, "
      "Tensor(f!)[] critical_sums, Tensor(g!)[] priorities, Tensor(i!)[] steps, Tensor? sq_norm, "
      "*, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "float priority_decay, bool group_scope, bool mean_over_capacity, bool eps_inside_sqrt, "
      "bool maximize, bool decoupled_weight_decay) -> ()");
  m.def(
      "sq_norm(Tensor[] params, Tensor[] grads, *, float weight_decay, bool maximize, "
      "bool decoupled_weight_decay) -> Tensor");
  m.def(
      "commit_(Tensor[] exp_avgs, Tensor(a!)[] critical_buffers, Tensor(b!)[] critical_sums, "
      "Tensor(c!)[] pending_slots) -> ()");
  m.def("cpu_capability() -> str");
}
