// Asking for memory ahead of its use.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// Asks for n elements of a stream.
template <typename stored_t>
CM_FUSED_INLINE void prefetch(const stored_t* data, int64_t n) {
  const auto* const first = reinterpret_cast<const char*>(data);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(stored_t));
  for (int64_t offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(first + offset, 0, 2);
  }
}

// As long after the elements [begin, begin + n) of a tensor's stream as is asked for ahead.
template <typename stored_t>
CM_FUSED_INLINE void prefetch_ahead(
    const TensorStep& tensor, const stored_t* data, int64_t begin, int64_t n) {
  if (begin + kPrefetchDistance + n <= tensor.numel) {
    prefetch(data + begin + kPrefetchDistance, n);
  }
}

}  // namespace cm_fused::CM_FUSED_ISA
