// Asking for memory ahead of its use.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

CM_FUSED_INLINE void prefetch(const void* data, int64_t begin, int64_t element_bytes) {
  const char* const first = static_cast<const char*>(data) + begin * element_bytes;
  for (int64_t offset = 0; offset < kBlockSize * element_bytes; offset += 64) {
    __builtin_prefetch(first + offset, 0, 2);
  }
}

// Asks for the kBlockSize elements at `begin` of every stream a step reads: they are more than the
// hardware follows by itself.
template <typename state_t, typename param_t>
CM_FUSED_INLINE void prefetch_block(const TensorStep& tensor, int64_t begin) {
  if (begin + kBlockSize > tensor.numel) {
    return;
  }
  if (tensor.grad_layout == nullptr) {
    prefetch(tensor.grad, begin, sizeof(param_t));
  }
  if (tensor.param_layout == nullptr) {
    prefetch(tensor.param, begin, sizeof(param_t));
  }
  const int64_t moment_bytes = stored_bytes(tensor.moment_dtype, sizeof(state_t));
  prefetch(tensor.exp_avg, begin, moment_bytes);
  prefetch(tensor.exp_avg_sq, begin, moment_bytes);
  if (tensor.max_exp_avg_sq != nullptr) {
    prefetch(tensor.max_exp_avg_sq, begin, sizeof(state_t));
  }
  const int64_t slot_bytes = stored_bytes(tensor.slot_dtype, sizeof(state_t));
  if (tensor.critical_sum == nullptr) {
    for (int64_t slot = 0; slot < tensor.capacity; ++slot) {
      prefetch(tensor.critical_buffer, slot * tensor.numel + begin, slot_bytes);
    }
  } else {
    prefetch(tensor.critical_sum, begin, sizeof(state_t));
    if (tensor.slot != kNoSlot) {
      prefetch(tensor.critical_buffer, tensor.slot * tensor.numel + begin, slot_bytes);
    }
  }
}

}  // namespace cm_fused::CM_FUSED_ISA
