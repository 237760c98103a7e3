// The buffer over one block: what is stored of it, its sum, and putting an item in a slot.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// A running sum loses a rounding with every admission. Each chunk is therefore summed anew from
// its slots once in 4 C steps, a different chunk each step, which bounds the error by the
// roundings of 4 C admissions and costs (4 (C - 1) - 8) / (4 C) bytes an element: at most 2 % of
// the 44 of a step.
inline bool rebuilds_sum(const TensorStep& tensor, int64_t chunk) {
  return (tensor.step + chunk) % (4 * tensor.capacity) == 0;
}

// One block of a tensor's buffer, whose elements are stored as Code says.
template <typename state_t, typename Code, typename Count>
class BufferBlock {
 public:
  using stored_t = typename Code::stored_t;

  BufferBlock(const TensorStep& tensor, int64_t chunk, int64_t begin, Count n)
      : tensor_(tensor),
        slots_(static_cast<stored_t*>(tensor.critical_buffer) + begin),
        scales_(Code::kScaled ? tensor.critical_scales + begin / kScaleBlock : nullptr),
        sum_(tensor.critical_sum == nullptr ? nullptr
                                            : static_cast<state_t*>(tensor.critical_sum) + begin),
        from_slots_(sum_ == nullptr || rebuilds_sum(tensor, chunk)),
        n_(n) {}

  // Puts `item`, last step's momentum, in its slot: the deferred commit, before sum_of is asked
  // for.
  void commit_before_sum(const state_t* item) const {
    if (tensor_.slot != kNoSlot) {
      put_in_slot(item, from_slots_ ? nullptr : sum_);
    }
  }

  // The sum over the slots of `count` elements from `at`.
  template <typename PartCount>
  CM_FUSED_INLINE const state_t* sum_of(int64_t at, PartCount count, state_t* scratch) const {
    if (!from_slots_) {
      return sum_ + at;
    }
    state_t* sum = sum_ == nullptr ? scratch : sum_ + at;
    sum_slots(at, count, sum);
    return sum;
  }

  // The sum over the slots before `item`, this step's gradient, takes its slot.
  const state_t* sum_then_commit(const state_t* item, state_t* scratch) const {
    const size_t bytes = static_cast<size_t>(n_) * sizeof(state_t);
    if (!from_slots_) {
      std::memcpy(scratch, sum_, bytes);
    } else {
      sum_slots(0, n_, scratch);
      if (sum_ != nullptr) {
        std::memcpy(sum_, scratch, bytes);
      }
    }
    if (tensor_.slot != kNoSlot) {
      put_in_slot(item, sum_);
    }
    return scratch;
  }

  // Puts `item` in the slot that is to be replaced; a running sum follows.
  void commit(const state_t* item) const {
    put_in_slot(item, sum_);
  }

 private:
  template <typename PartCount>
  CM_FUSED_INLINE void sum_slots(int64_t at, PartCount count, state_t* __restrict sum) const {
    const int64_t whole = count / kTile * kTile;
    for (int64_t i = 0; i < whole; i += kTile) {
      sum_tile<Vector<state_t>, kTileVectors>(at + i, sum + i);
    }
    for (int64_t i = whole; i < count; ++i) {
      sum_tile<state_t, 1>(at + i, sum + i);
    }
  }

  // In slot order. The sums stay in registers: kCount times as many as vector_t stands for.
  template <typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void sum_tile(int64_t at, state_t* __restrict sum) const {
    vector_t totals[kCount];
    load_tile(0, at, totals);
    for (int64_t slot = 1; slot < tensor_.capacity; ++slot) {
      vector_t values[kCount];
      load_tile(slot, at, values);
      for (int64_t v = 0; v < kCount; ++v) {
        totals[v] += values[v];
      }
    }
    for (int64_t v = 0; v < kCount; ++v) {
      store_vector(sum + v * kWidth<vector_t, state_t>, totals[v]);
    }
  }

  template <typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void load_tile(int64_t slot, int64_t at, vector_t (&values)[kCount]) const {
    load_vectors<Code>(slots_ + slot * tensor_.numel + at, values);
    const state_t scale = scale_of(slot);
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = restore(values[v], scale);
    }
  }

  void put_in_slot(const state_t* __restrict item, state_t* __restrict sum) const {
    stored_t* __restrict slot = slots_ + tensor_.slot * tensor_.numel;
    const state_t old_scale = scale_of(tensor_.slot);
    state_t inverse = 1;
    if constexpr (Code::kScaled) {
      const BlockScale scale = block_scale(item, n_, Code::kLargest);
      scales_[tensor_.slot * num_scales(tensor_.numel)] = scale.scale;
      inverse = scale.inverse;
    }
    const state_t new_scale = scale_of(tensor_.slot);
    if (sum == nullptr) {
      for (int64_t i = 0; i < n_; ++i) {
        slot[i] = Code::store(scaled(item[i], inverse));
      }
      return;
    }
    for (int64_t i = 0; i < n_; ++i) {
      const stored_t stored = Code::store(scaled(item[i], inverse));
      sum[i] += restore(Code::load(stored), new_scale) - restore(Code::load(slot[i]), old_scale);
      slot[i] = stored;
    }
  }

  state_t scale_of(int64_t slot) const {
    if constexpr (Code::kScaled) {
      return scales_[slot * num_scales(tensor_.numel)];
    } else {
      return 1;
    }
  }

  template <typename vector_t>
  CM_FUSED_INLINE static vector_t restore(vector_t values, state_t scale) {
    if constexpr (Code::kScaled) {
      return values * scale;
    } else {
      return values;
    }
  }

  // Without a usable scale also what is not finite is stored as 0.
  static state_t scaled(state_t value, state_t inverse) {
    if constexpr (Code::kScaled) {
      return inverse == 0 ? 0 : value * inverse;
    } else {
      return value;
    }
  }

  static constexpr int64_t kTileVectors = 4;
  static constexpr int64_t kTile = kTileVectors * kWidth<Vector<state_t>, state_t>;

  const TensorStep& tensor_;
  stored_t* const slots_;  // the block in slot 0
  float* const scales_;    // of the block in slot 0, or nullptr
  state_t* const sum_;     // nullptr: no running sum
  const bool from_slots_;
  const Count n_;
};

// Calls visit with one block of a tensor's buffer.
template <typename state_t, typename Count, typename Visit>
inline auto with_buffer_block(
    const TensorStep& tensor, int64_t chunk, int64_t begin, Count n, Visit visit) {
  if constexpr (std::is_same_v<state_t, float>) {
    switch (tensor.slot_dtype) {
      case StoredDtype::kBFloat16:
        return visit(BufferBlock<float, Halved<c10::BFloat16>, Count>(tensor, chunk, begin, n));
      case StoredDtype::kFloat16:
        return visit(BufferBlock<float, Halved<c10::Half>, Count>(tensor, chunk, begin, n));
      case StoredDtype::kFloat8:
        return visit(BufferBlock<float, Float8, Count>(tensor, chunk, begin, n));
      case StoredDtype::kInt8:
        return visit(BufferBlock<float, Int8, Count>(tensor, chunk, begin, n));
      case StoredDtype::kUnchanged:
        break;
    }
  }
  return visit(BufferBlock<state_t, Unchanged<state_t>, Count>(tensor, chunk, begin, n));
}

}  // namespace cm_fused::CM_FUSED_ISA
