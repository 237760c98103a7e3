// Schemas of the operators; each device's library implements them.
#include <torch/csrc/stable/library.h>

#define CM_FUSED_HYPERPARAMETERS                                                              \
  "float lr, float beta1, float beta2, float eps, float weight_decay, float priority_decay, " \
  "bool group_scope, bool mean_over_capacity, bool eps_inside_sqrt, bool maximize, "          \
  "bool decoupled_weight_decay, bool stochastic_update, int seed, "                           \
  "bool l2_in_aggregate=False, bool sum_of_norms=False"

#define CM_FUSED_SCALARS \
  "Tensor? sq_norm, Tensor? lr_tensor, Tensor? grad_factor, Tensor? found_inf"

#define CM_FUSED_LOW_PRECISION_STATE                                                  \
  "Tensor(k!)[] critical_scales, Tensor(l!)[] exp_avg_scales, "                       \
  "Tensor(m!)[] exp_avg_sq_scales, Tensor(n!)[] compensations, int[] param_indices, " \
  "int[] element_places"

// Lists run over the tensors of one bucket: those of a param group that share a device. Real dtypes
// only; complex tensors are passed as views of pairs. `grads` are never written.
// max_exp_avg_sqs is empty without amsgrad, critical_sums where the sum is read from the slots, a
// list of scales where the dtype has none, compensations but for Kahan's summation, param_indices
// where parameters are counted as the list has them, element_places, which has three numbers for
// each parameter (Places in param_data.h), where all of them are whole.
//
// Scalars that a device may hold, float64, as tensors of one element: lr_tensor replaces lr;
// grad_factor multiplies every gradient before all else; where found_inf is not 0 nothing changes.
// l2_in_aggregate adds the L2 term, of critical gradients, not to the gradient but to what the
// buffer's mean is added to: neither norms nor slots have it. With sum_of_norms a group's key is
// the sum of its tensors' norms, not the norm of them all. sq_norm is the sum of g^2 over the
// priority scope, of one element or one for each tensor, and is computed from the bucket where it
// is not given. local_sq_norms receives each tensor's sum of g^2 and leaves the books to
// keep_books_, for whoever has to add to it what other processes have.
STABLE_TORCH_LIBRARY(cm_fused, m) {
  m.def(
      "adam_cm_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] critical_buffers, "
      "Tensor(f!)[] critical_sums, Tensor(g!)[] priorities, Tensor(h!)[] pending_slots, "
      "Tensor(i!)[] steps, " CM_FUSED_LOW_PRECISION_STATE ", " CM_FUSED_SCALARS
      ", Tensor(o!)? local_sq_norms, *, " CM_FUSED_HYPERPARAMETERS ") -> ()");
  m.def(
      "adam_cg_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] critical_buffers, "
      "Tensor(f!)[] critical_sums, Tensor(g!)[] priorities, "
      "Tensor(h!)[] steps, " CM_FUSED_LOW_PRECISION_STATE ", " CM_FUSED_SCALARS
      ", *, " CM_FUSED_HYPERPARAMETERS ") -> ()");
  m.def(
      "sq_norms(Tensor[] params, Tensor[] grads, Tensor? grad_factor, *, float weight_decay, "
      "bool maximize, bool decoupled_weight_decay) -> Tensor");
  m.def(
      "keep_books_(Tensor(a!)[] priorities, Tensor(b!)[] pending_slots, Tensor(c!)[] steps, "
      "Tensor sq_norm, Tensor? found_inf, *, float priority_decay) -> ()");
  m.def(
      "commit_(Tensor[] exp_avgs, Tensor(a!)[] critical_buffers, Tensor(b!)[] critical_sums, "
      "Tensor(c!)[] pending_slots, Tensor(d!)[] critical_scales, Tensor[] exp_avg_scales) -> ()");

  // The same steps with the state handed over once: passing a list of small tensors costs more than
  // stepping them. What is held is tensors, not addresses: each step looks at them anew, and checks
  // again those whose address or number of elements changed; but that a tensor keeps its dtype and
  // strides in its place is not looked at, of the state other than exp_avgs. Steps of one held
  // state take turns. They change the state that hold_state was given, which no schema can say:
  // tracing compilers are to be given the operators above.
  //
  // One call steps any number of held states: all of them, or none where it raises. `params` and
  // `grads` are those of all, one state after the other, and so is local_sq_norms. A state without
  // pending slots is one of critical gradients. The lists of scalars have one for each state or are
  // empty; hyperparameters has the 14 numbers above for each state, in their order, but for the
  // seed.
  m.def(
      "hold_state(Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor[] max_exp_avg_sqs, "
      "Tensor[] critical_buffers, Tensor[] critical_sums, Tensor[] priorities, "
      "Tensor[] pending_slots, Tensor[] steps, Tensor[] critical_scales, "
      "Tensor[] exp_avg_scales, Tensor[] exp_avg_sq_scales, Tensor[] compensations, "
      "int[] param_indices, int[] element_places) -> int");
  m.def("release_state(int held) -> ()");
  m.def(
      "step_held_(int[] held, Tensor(a!)[] params, Tensor[] grads, Tensor[] sq_norms, "
      "Tensor[] lr_tensors, Tensor[] grad_factors, Tensor[] found_infs, "
      "Tensor(b!)? local_sq_norms, *, float[] hyperparameters, int[] seeds) -> ()");
  m.def(
      "keep_books_held_(int[] held, Tensor[] sq_norms, Tensor[] found_infs, *, "
      "float[] priority_decays) -> ()");

  // The table of a held state, for kernels that find a bucket's tensors by their addresses: see
  // table.h. Returns 0 when nothing changed since the table was last refreshed, 1 when it was
  // written, 2 when nothing was written because a param or a grad does not lie in memory as its
  // exp_avg does. `table` is the host's copy; the tensors may be on any device, none is read.
  m.def("refresh_table_(int held, Tensor[] params, Tensor[] grads, Tensor(a!) table) -> int");

  // What follows a pass over a bucket: its partial sums of g^2 to keys, then admission, decay and
  // step count of every row. Changes what the table's addresses name, which no schema can say:
  // tracing compilers are not to be given it. sq_norm, of one element or one for each row, replaces
  // the sums of chunk_sq_norms. Where found_inf, float64 (), is not 0 nothing changes.
  m.def(
      "update_priorities_(Tensor table, Tensor chunk_sq_norms, Tensor? sq_norm, Tensor? found_inf, "
      "*, "
      "int capacity, float priority_decay, bool group_scope) -> ()");

  m.def("cpu_capability() -> str");
}
