// The buffer over one block: what is stored of it, its sum, and putting an item in a slot.

// A running sum loses a rounding with every admission. Each chunk is therefore summed anew from
// its slots once in 4 C steps, a different chunk each step, which bounds the error by the
// roundings of 4 C admissions and costs (4 (C - 1) - 8) / (4 C) bytes an element: less than one
// byte, 2.3 % of the 44 of a step.
inline bool rebuilds_sum(const TensorStep& tensor, int64_t chunk) {
  return tensor.critical_sum != nullptr &&
         (tensor.step_number + chunk) % (4 * tensor.capacity) == 0;
}

// Calls visit with the code of a tensor's slots.
template <typename state_t, typename Visit>
inline auto with_slot_code(StoredDtype dtype, Visit visit) {
  if constexpr (std::is_same_v<state_t, float>) {
    switch (dtype) {
      case StoredDtype::kBFloat16:
        return visit(Halved<c10::BFloat16>{});
      case StoredDtype::kFloat16:
        return visit(Halved<c10::Half>{});
      case StoredDtype::kFloat8:
        return visit(Float8{});
      case StoredDtype::kInt8:
        return visit(Int8{});
      case StoredDtype::kInt4:
        return visit(Int4{});
      case StoredDtype::kUnchanged:
        break;
    }
  }
  return visit(Unchanged<state_t>{});
}

// Stands for the code of a tensor's slots where it is looked up, not compiled for.
struct AnyCode {};

// A tensor's buffer from element `begin` on; with scales, the block of that element. Below, Code is
// that of the slots, `at` counts from there, and items are of kCount vectors.
template <typename state_t>
class Buffer {
 public:
  template <typename Code>
  CM_FUSED_INLINE Buffer(
      Code, const TensorStep& tensor, bool rebuilds_sum, bool past_cache, int64_t begin)
      : dtype_(tensor.slot_dtype),
        slot_size_(stored_numel(tensor.numel, tensor.slot_dtype)),
        capacity_(tensor.capacity),
        num_scales_(num_scales(tensor.numel)),
        admitted_(tensor.slot),
        slots_(static_cast<typename Code::stored_t*>(tensor.critical_buffer) +
               stored_numel(begin, tensor.slot_dtype)),
        scales_(Code::kScaled ? tensor.critical_scales + begin / kScaleBlock : nullptr),
        sum_(tensor.critical_sum == nullptr ? nullptr
                                            : static_cast<state_t*>(tensor.critical_sum) + begin),
        from_slots_(sum_ == nullptr || rebuilds_sum),
        past_cache_(past_cache && kStoresPastCache && sum_ == nullptr && admits() &&
                    reinterpret_cast<uintptr_t>(first_of<Code>(admitted_)) % kLineBytes == 0) {}

  CM_FUSED_INLINE bool admits() const {
    return admitted_ != kNoSlot;
  }

  // Finds the scale that a block, `item`, is to be put in its slot with.
  template <typename Code, typename item_t>
  CM_FUSED_INLINE void find_scale(Code, const item_t* item, int64_t n) {
    if constexpr (Code::kScaled) {
      old_scale_ = scales_[admitted_ * num_scales_];
      const BlockScale scale = block_scale(item, n, Code::kLargest);
      inverse_ = scale.inverse;
      new_scale_ = scale.scale;
    }
  }

  // From here on, the slot is restored with that scale.
  CM_FUSED_INLINE void set_scale() const {
    if (scales_ != nullptr) {
      scales_[admitted_ * num_scales_] = new_scale_;
    }
  }

  // Puts `item`, if it is admitted, in its slot and sets `totals` to the sum over the slots: of
  // critical momenta, whose item is last step's momentum, with the item; of critical gradients,
  // whose item is this step's gradient, without it. `critical_gradients` is a bool, or a constant.
  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void exchange(Code, auto critical_gradients, int64_t at,
      const vector_t (&item)[kCount], vector_t (&totals)[kCount]) const {
    if constexpr (kFillsLines<Code, vector_t, kCount>) {
      if (!critical_gradients && past_cache_) {
        put_past_cache<Code>(at, item, totals);
        return;
      }
    }
    if (!critical_gradients && admits()) {
      put<Code>(at, item, from_slots_ ? nullptr : sum_);
    }
    sum<Code>(at, totals);
    if (critical_gradients && admits()) {
      put<Code>(at, item, sum_);
    }
  }
  template <typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void exchange(AnyCode, auto critical_gradients, int64_t at,
      const vector_t (&item)[kCount], vector_t (&totals)[kCount]) const {
    with_slot_code<state_t>(
        dtype_, [&](auto code) { exchange(code, critical_gradients, at, item, totals); });
  }

  // Puts `item` in its slot outside of a step.
  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void commit(Code, int64_t at, const vector_t (&item)[kCount]) const {
    put<Code>(at, item, sum_);
  }

  // Asks for kBlockSize elements of what a step reads; what it stores past the caches it does not.
  template <typename Code>
  CM_FUSED_INLINE void prefetch_slots(Code, int64_t at) const {
    if (sum_ == nullptr) {
      for (int64_t slot = 0; slot < capacity_; ++slot) {
        if (!past_cache_ || slot != admitted_) {
          prefetch_slot<Code>(slot, at);
        }
      }
    } else {
      prefetch(sum_ + at, kBlockSize);
      if (admits()) {
        prefetch_slot<Code>(admitted_, at);
      }
    }
  }

 private:
  // Whether kCount vectors are whole cache lines of a slot.
  template <typename Code, typename vector_t, int64_t kCount>
  static constexpr bool kFillsLines =
      !std::is_same_v<Code, Int4> &&
      kCount * kWidth<vector_t> * sizeof(typename Code::stored_t) % kLineBytes == 0;

  template <typename Code>
  CM_FUSED_INLINE typename Code::stored_t* first_of(int64_t slot) const {
    return static_cast<typename Code::stored_t*>(slots_) + slot * slot_size_;
  }

  template <typename Code>
  CM_FUSED_INLINE auto slot_data(int64_t slot, int64_t at) const {
    if constexpr (std::is_same_v<Code, Int4>) {
      constexpr int64_t kHalf = kScaleBlock / 2;
      return HalfBytes{first_of<Code>(slot) + at % kHalf, at < kHalf ? 0 : 4};
    } else {
      return first_of<Code>(slot) + at;
    }
  }

  // Packed slots are asked for by whole lines, 1024 bytes ahead. At 256, as many elements as of the
  // other streams, a step took 1.3 of the time with int8 slots, at 512 1.1, at 1024 1.0.
  template <typename Code>
  CM_FUSED_INLINE void prefetch_slot(int64_t slot, int64_t at) const {
    if constexpr (!std::is_same_v<Code, Int4>) {
      prefetch(first_of<Code>(slot) + at, kBlockSize);
    } else if (at % (2 * kBlockSize) == 0) {
      prefetch(first_of<Code>(slot) + (at - kPrefetchDistance) / 2 + 1024, kBlockSize);
    }
  }

  // The sum over the slots, in their order.
  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void sum(int64_t at, vector_t (&totals)[kCount]) const {
    if (!from_slots_) {
      load_vectors<Unchanged<state_t>>(sum_ + at, totals);
      return;
    }
    if (capacity_ == 0) {
      // What changes nothing that it is added to: 0 + -0 is 0.
      for (int64_t v = 0; v < kCount; ++v) {
        totals[v] = state_t(-0.0) - vector_t{};
      }
      return;
    }
    sum_slots<Code>([&](int64_t slot) { return slot_data<Code>(slot, at); }, totals);
    if (sum_ != nullptr) {
      store_vectors<Unchanged<state_t>>(sum_ + at, totals);
    }
  }

  // The sum of the slots' elements, those of each from data_of(slot) on.
  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void sum_slots(auto data_of, vector_t (&totals)[kCount]) const {
    load_slot<Code>(0, data_of(0), totals);
    // The default without a loop's overhead, which with int8 slots is 4 % of a step's instructions.
    if (capacity_ == 5) {
      add_slot<Code>(1, data_of(1), totals);
      add_slot<Code>(2, data_of(2), totals);
      add_slot<Code>(3, data_of(3), totals);
      add_slot<Code>(4, data_of(4), totals);
    } else {
      for (int64_t slot = 1; slot < capacity_; ++slot) {
        add_slot<Code>(slot, data_of(slot), totals);
      }
    }
  }

  // As `exchange`, of critical momenta without a running sum: whole lines of the slot are stored
  // without reading them, and the sum takes a copy.
  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void put_past_cache(
      int64_t at, const vector_t (&item)[kCount], vector_t (&totals)[kCount]) const {
    using stored_t = typename Code::stored_t;
    constexpr int64_t kNumel = kCount * kWidth<vector_t>;
    alignas(kLineBytes) stored_t copy[kNumel];
    put_in<Code>(copy, item);
    store_past_cache<kNumel * sizeof(stored_t)>(first_of<Code>(admitted_) + at, copy);
    sum_slots<Code>(
        [&](int64_t slot) -> const stored_t* {
          return slot == admitted_ ? copy : first_of<Code>(slot) + at;
        },
        totals);
  }

  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void put_in(auto stored, const vector_t (&item)[kCount]) const {
    vector_t scaled[kCount];
    for (int64_t v = 0; v < kCount; ++v) {
      scaled[v] = scale_down<Code>(item[v]);
    }
    store_vectors<Code>(stored, scaled);
  }

  // Puts `item` in its slot; a running sum, if there is one, follows.
  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void put(int64_t at, const vector_t (&item)[kCount], state_t* sum) const {
    const auto stored = slot_data<Code>(admitted_, at);
    if (sum == nullptr) {
      put_in<Code>(stored, item);
      return;
    }
    vector_t totals[kCount];
    vector_t replaced[kCount];
    vector_t restored[kCount];
    load_vectors<Code>(stored, replaced);
    put_in<Code>(stored, item);
    load_vectors<Code>(stored, restored);
    load_vectors<Unchanged<state_t>>(sum + at, totals);
    for (int64_t v = 0; v < kCount; ++v) {
      totals[v] += restore<Code>(restored[v], new_scale_) - restore<Code>(replaced[v], old_scale_);
    }
    store_vectors<Unchanged<state_t>>(sum + at, totals);
  }

  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void add_slot(int64_t slot, auto data, vector_t (&totals)[kCount]) const {
    vector_t values[kCount];
    load_vectors<Code>(data, values);
    const state_t scale = Code::kScaled ? scales_[slot * num_scales_] : 1;
    for (int64_t v = 0; v < kCount; ++v) {
      if constexpr (Code::kScaled) {
        totals[v] = add_exact_product(totals[v], values[v], scale);
      } else {
        totals[v] += values[v];
      }
    }
  }

  template <typename Code, typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void load_slot(int64_t slot, auto data, vector_t (&values)[kCount]) const {
    load_vectors<Code>(data, values);
    if constexpr (Code::kScaled) {
      const state_t scale = scales_[slot * num_scales_];
      for (int64_t v = 0; v < kCount; ++v) {
        values[v] = restore<Code>(values[v], scale);
      }
    }
  }

  template <typename Code, typename vector_t>
  CM_FUSED_INLINE static vector_t restore(vector_t values, state_t scale) {
    if constexpr (Code::kScaled) {
      return values * scale;
    } else {
      return values;
    }
  }

  // Without a usable scale also what is not finite is stored as 0.
  template <typename Code, typename vector_t>
  CM_FUSED_INLINE vector_t scale_down(vector_t values) const {
    if constexpr (Code::kScaled) {
      return inverse_ == 0 ? vector_t{} : values * inverse_;
    } else {
      return values;
    }
  }

  const StoredDtype dtype_;
  const int64_t slot_size_;
  const int64_t capacity_;
  const int64_t num_scales_;
  const int64_t admitted_;
  void* const slots_;
  float* const scales_;  // nullptr where there are none
  state_t* const sum_;   // nullptr: no running sum
  const bool from_slots_;
  const bool past_cache_;
  state_t inverse_ = 1;
  state_t old_scale_ = 1;
  state_t new_scale_ = 1;
};
