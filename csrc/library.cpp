// Schemas of the operators; each device's library implements them.
#include <torch/csrc/stable/library.h>

// Real dtypes only; complex tensors are passed as views of pairs. Lists of params and grads are
// those of one bucket, or of several in order. `grads` are never written; those of float32 params
// may be bfloat16 or float16. Scalars that a device may hold are float64 tensors of one element.
STABLE_TORCH_LIBRARY(cm_fused, m) {
  // Hands over the state of a bucket once: passing a list of small tensors costs more than stepping
  // them. Bit r of `mask` says that row r of CM_FUSED_STATE (csrc/core/param_data.h) is there;
  // `state` has, for each of these rows in order, one tensor for each parameter. A buffer of
  // critical momenta has a pending_slot, one of critical gradients has none; with a capacity of 0
  // there is no row of a buffer. `param_indices` is empty where parameters are counted as the list
  // has them, `shard_layouts`, three numbers for each (ShardLayout), where all are whole.
  //
  // What is registered is tensors, not addresses: each operator looks at them anew, and checks
  // again those whose address or number of elements changed; dtype and strides only of exp_avg.
  // Operators on one state take turns. They change the state that register_state was given, which
  // no schema can say: tracing compilers are not to be given them.
  m.def(
      "register_state(Tensor[] state, int mask, int[] param_indices, int[] shard_layouts) -> int");
  m.def("release_state(int id) -> ()");
  m.def("state_keys() -> str");

  // Steps any number of registered states: all of them, or none where it raises. `params` and
  // `grads` are those of all, one state after the other, and so is local_sq_norms. The other lists
  // have one for each state or are empty: `lrs` replace the numbers; `grad_factors` multiply every
  // gradient before all else; where one of `found_infs` is not 0 the state's step changes nothing;
  // `sq_norms` are sums of g^2 over the priority scope, one or one for each tensor. local_sq_norms
  // receives each tensor's sum of g^2 and leaves the priorities to update_registered_priorities_,
  // once other processes' are added. `hyperparameters` are by hyperparameter_names().
  m.def(
      "step_registered_(int[] ids, Tensor(a!)[] params, Tensor[] grads, Tensor[] sq_norms, "
      "Tensor[] lrs, Tensor[] grad_factors, Tensor[] found_infs, Tensor(b!)? local_sq_norms, *, "
      "float[] hyperparameters, int[] seeds) -> ()");
  m.def("hyperparameter_names() -> str");
  m.def(
      "update_registered_priorities_(int[] ids, Tensor[] sq_norms, Tensor[] found_infs, *, "
      "float[] priority_decays) -> ()");

  // The sum of g^2 that the last step of each registered state has found, float64 (ids,) on the
  // CPU. NaN before the first, after a skipped one, and of critical gradients whose sq_norms were
  // given or that have no buffer.
  m.def("last_sq_norms(int[] ids) -> Tensor");

  // Copies each momentum to its pending slot at once. Rows without a part in it may be missing.
  m.def("flush_registered_(int[] ids) -> ()");

  m.def(
      "sq_norms(Tensor[] params, Tensor[] grads, Tensor? grad_factor, *, float weight_decay, "
      "bool maximize, bool decoupled_weight_decay) -> Tensor");

  // Brings the host's copy of a registered state's table (priority/table.h) up to date. Returns 0
  // when nothing changed, 1 when only addresses of grads were written, 2 when more was, 3 when
  // nothing was written because a param or a grad does not have the strides of its exp_avg. The
  // tensors may be on any device, none is read.
  m.def("refresh_table_(int id, Tensor[] params, Tensor[] grads, Tensor(a!) table) -> int");
  m.def("table_columns() -> str");

  // After a pass over a bucket: its partial sums of g^2 to keys, then admission, decay and step
  // count of every row. Changes what the table's addresses name: no tracing compiler may be given
  // it. sq_norm, one or one for each row, replaces the sums of chunk_sq_norms. Where found_inf,
  // float64 (), is not 0 nothing changes.
  m.def(
      "update_priorities_(Tensor table, Tensor chunk_sq_norms, Tensor? sq_norm, Tensor? found_inf, "
      "*, int capacity, float priority_decay, bool group_scope) -> ()");

  m.def("cpu_capability() -> str");
}
