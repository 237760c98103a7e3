// The loop of a step: a tile of every stream at a time, so that one tile's divisions overlap the
// next one's loads. It converts what is of half precision as it goes, except what `Copies` copies.

// Elements that a tile has, four vectors: a multiple of the norms' lanes and of the elements that a
// group of counters gives words to. With int8 slots and bfloat16 moments, on two cores of a
// Sapphire Rapids, 64 took 0.91 of the time of 32; in AVX2, of half as many and as wide registers,
// 16 and 64 took 1.09 and 1.02 of it.
constexpr int64_t kTile = CM_FUSED_VECTOR_BYTES == 64 ? 64 : 32;
static_assert(kBlockSize % kTile == 0 && kTile % kLanes == 0);
static_assert(kTile % (kWordsPerCounter * static_cast<int64_t>(kCountersOfGroup)) == 0);

// A kind of step that is compiled for.
template <bool kCriticalGradients, typename SlotCode, bool kRoundsMoments>
struct KindOf {
  static constexpr SlotCode slot_code{};
  static constexpr std::bool_constant<kCriticalGradients> critical_gradients{};
  static constexpr std::bool_constant<kRoundsMoments> rounds_moments{};
};

// One that is looked up as it goes.
struct AnyKind {
  AnyCode slot_code;
  bool critical_gradients;
  bool rounds_moments;
};

// What the step of a range is given, besides its kind.
template <typename state_t>
struct RangeInputs {
  const TensorStep& tensor;
  const StepOptions& options;
  const Scalars<Vector<state_t>>& scalars;
  const Gradients<state_t>& gradients;
  const Range<state_t>& range;
};

template <typename state_t>
SquareSum step_tail(const RangeInputs<state_t>& inputs, AnyKind kind, Buffer<state_t> buffer,
    int64_t block, int64_t at, int64_t n, SquareSum squares);

template <typename state_t, typename Kind>
class RangeStep {
  using SlotBuffer = Buffer<state_t>;
  using vector_t = Vector<state_t>;
  static constexpr int64_t kVectors = kTile / kWidth<vector_t>;
  static constexpr int64_t kNoTile = -1;

 public:
  CM_FUSED_INLINE RangeStep(const RangeInputs<state_t>& inputs, Kind kind)
      : inputs_(inputs),
        tensor_(inputs.tensor),
        scalars_(inputs.scalars),
        gradients_(inputs.gradients),
        range_(inputs.range),
        kind_(kind),
        philox_(tensor_, inputs.options, first_counter(0)) {}

  // Adds the sum of g^2, of critical momenta, to `squares`.
  CM_FUSED_INLINE void run(SquareSum& squares) {
    SquareSum sum = squares;
    const int64_t block_size = kIsScaled ? kScaleBlock : range_.n;
    for (int64_t at = 0; at < range_.n; at += block_size) {
      step_block(at, std::min(block_size, range_.n - at), sum);
    }
    step_last_param();
    squares = sum;
  }

  // Steps the elements [at, n) of a block, fewer than a tile.
  CM_FUSED_INLINE void step_tail(
      const SlotBuffer& buffer, int64_t block, int64_t at, int64_t n, SquareSum& squares) {
    begin_tile(block + at, n - at, squares);
    const int64_t tile = at;
    for (; at + kWidth<vector_t> <= n; at += kWidth<vector_t>) {
      step_remainder(scalars_, buffer, block, at, at - tile);
    }
    const Scalars<state_t> scalars(tensor_, inputs_.options);
    for (; at < n; ++at) {
      step_remainder(scalars, buffer, block, at, at - tile);
    }
  }

 private:
  CM_FUSED_INLINE void step_block(int64_t block, int64_t n, SquareSum& squares) {
    SlotBuffer buffer(kind_.slot_code, tensor_, range_.rebuilds_sum, inputs_.options.past_cache,
        range_.begin + block);
    const bool finds_scale = kIsScaled && buffer.admits();
    if (finds_scale) {
      find_scale(buffer, block, n);
      if (!kind_.critical_gradients) {
        buffer.set_scale();
      }
    }
    step_tiles(buffer, block, n, squares);
    if (finds_scale && kind_.critical_gradients) {
      buffer.set_scale();
    }
  }

  CM_FUSED_INLINE void step_tiles(
      const SlotBuffer& buffer, int64_t block, int64_t n, SquareSum& squares) {
    int64_t at = 0;
    for (; at + kTile <= n; at += kTile) {
      if (at % kBlockSize == 0) {
        prefetch_streams(buffer, block, at + kPrefetchDistance);
      }
      begin_tile(block + at, std::integral_constant<int64_t, kTile>{}, squares);
      vector_t numerator[kVectors];
      vector_t second_moment[kVectors];
      step_moments(scalars_, buffer, block, at, 0, numerator, second_moment);
      step_last_param();
      last_tile_ = block + at;
      store_vectors<Unchanged<state_t>>(last_numerator_, numerator);
      store_vectors<Unchanged<state_t>>(last_second_moment_, second_moment);
    }
    if (at < n) {
      const AnyKind kind{{}, kind_.critical_gradients, kind_.rounds_moments};
      squares = cm_fused::CM_FUSED_ISA::step_tail(inputs_, kind, buffer, block, at, n, squares);
    }
  }

  // The step of one vector, as step_moments.
  template <typename one_t>
  CM_FUSED_INLINE void step_remainder(const Scalars<one_t>& s, const SlotBuffer& buffer,
      int64_t block, int64_t at, int64_t in_tile) {
    one_t numerator[1];
    one_t second_moment[1];
    step_moments(s, buffer, block, at, in_tile, numerator, second_moment);
    step_param(s, numerator, second_moment, block + at);
  }

  // A tile's parameters follow when the next one's moments are under way, so that there is
  // something to do while they wait for their divisions.
  CM_FUSED_INLINE void step_last_param() {
    if (last_tile_ == kNoTile) {
      return;
    }
    vector_t numerator[kVectors];
    vector_t second_moment[kVectors];
    load_vectors<Unchanged<state_t>>(last_numerator_, numerator);
    load_vectors<Unchanged<state_t>>(last_second_moment_, second_moment);
    step_param(scalars_, numerator, second_moment, last_tile_);
  }

  // Eq. (7) for kCount vectors of the parameter.
  template <typename one_t, int64_t kCount>
  CM_FUSED_INLINE void step_param(const Scalars<one_t>& s, const one_t (&numerator)[kCount],
      const one_t (&second_moment)[kCount], int64_t at) {
    one_t param[kCount];
    load_param(range_, at, param);
    update_param(s, numerator, second_moment, param);
    store_param(range_, at, param);
  }

  // Asks for kBlockSize elements of every stream that is not copied by blocks: they are more than
  // the hardware follows by itself.
  CM_FUSED_INLINE void prefetch_streams(const SlotBuffer& buffer, int64_t block, int64_t at) const {
    const int64_t begin = block + at;
    if (range_.begin + begin + kBlockSize > tensor_.numel) {
      return;
    }
    if (!is_copy()) {
      prefetch_data(range_.grad, range_.grad_dtype, begin);
      prefetch_data(range_.param, range_.param_dtype, begin);
      if (range_.remainder != nullptr) {
        prefetch(range_.remainder + begin, kBlockSize);
      }
    }
    if (!range_.copies_moments) {
      const int64_t bytes = kind_.rounds_moments ? sizeof(c10::BFloat16) : sizeof(state_t);
      prefetch(static_cast<const char*>(range_.exp_avg) + begin * bytes, kBlockSize * bytes);
      prefetch(static_cast<const char*>(range_.exp_avg_sq) + begin * bytes, kBlockSize * bytes);
    }
    if (range_.max_exp_avg_sq != nullptr) {
      prefetch(range_.max_exp_avg_sq + begin, kBlockSize);
    }
    buffer.prefetch_slots(kind_.slot_code, at);
  }

  CM_FUSED_INLINE static void prefetch_data(const void* data, ParamDtype dtype, int64_t begin) {
    if (is_half(dtype)) {
      prefetch(static_cast<const c10::BFloat16*>(data) + begin, kBlockSize);
    } else {
      prefetch(static_cast<const state_t*>(data) + begin, kBlockSize);
    }
  }

  CM_FUSED_INLINE bool is_copy() const {
    return range_.stored_g != nullptr;
  }

  CM_FUSED_INLINE void find_scale(SlotBuffer& buffer, int64_t block, int64_t n) {
    if (kind_.critical_gradients) {
      alignas(64) state_t scratch[kScaleBlock];
      const state_t* const item =
          is_copy() ? range_.stored_g + block
                    : gradients_.effective(static_cast<const state_t*>(range_.grad) + block,
                          l2_param() + block, n, scratch);
      buffer.find_scale(kind_.slot_code, item, n);
    } else if (kind_.rounds_moments) {
      buffer.find_scale(
          kind_.slot_code, static_cast<const c10::BFloat16*>(range_.exp_avg) + block, n);
    } else {
      buffer.find_scale(kind_.slot_code, static_cast<const state_t*>(range_.exp_avg) + block, n);
    }
  }

  // What is done of a whole tile before its step: its gradients, their part of the norm, its words.
  CM_FUSED_INLINE void begin_tile(int64_t at, auto n, SquareSum& squares) {
    if (is_copy()) {
      stored_g_ = range_.stored_g + at;
      update_g_ = range_.update_g + at;
    } else {
      const state_t* const param = l2_param() + at;
      stored_g_ = gradients_.effective(grad_at(at, n), param, n, stored_scratch_);
      update_g_ = gradients_.with_late_l2_term(stored_g_, param, n, update_scratch_);
    }
    if (!kind_.critical_gradients) {
      squares.add(stored_g_, n);
    }
    if (kind_.rounds_moments && range_.words == nullptr) {
      constexpr std::integral_constant<uint64_t, kTile / kWordsPerCounter> kCount;
      philox_.set_words(first_counter(at), kCount, words_);
    }
  }

  // The parameter that an L2 term is of, which is read only if there is one: else it may be of
  // another type.
  CM_FUSED_INLINE const state_t* l2_param() const {
    return static_cast<const state_t*>(range_.param);
  }

  // A tile's gradients in the update's type.
  CM_FUSED_INLINE const state_t* grad_at(int64_t at, auto n) {
    if constexpr (std::is_same_v<state_t, float>) {
      if (range_.grad_dtype == ParamDtype::kBFloat16) {
        return load_tile<c10::BFloat16>(at, n);
      }
      if (range_.grad_dtype == ParamDtype::kFloat16) {
        return load_tile<c10::Half>(at, n);
      }
    }
    return static_cast<const state_t*>(range_.grad) + at;
  }

  template <typename half_t>
  CM_FUSED_INLINE const state_t* load_tile(int64_t at, auto n) {
    const half_t* const stored = static_cast<const half_t*>(range_.grad) + at;
    if constexpr (std::is_same_v<decltype(n), int64_t>) {
      convert_elements<Halved<half_t>, Unchanged<float>>(stored, n, grad_scratch_);
    } else {
      vector_t values[kVectors];
      load_vectors<Halved<half_t>>(stored, values);
      store_vectors<Unchanged<float>>(grad_scratch_, values);
    }
    return grad_scratch_;
  }

  // Of the elements from `at` on.
  CM_FUSED_INLINE uint64_t first_counter(int64_t at) const {
    return static_cast<uint64_t>(
        (tensor_.shard_layout.offset + range_.begin + at) / kWordsPerCounter);
  }

  // The step of kCount vectors at `at` of a block, which are at `in_tile` of a tile, except the
  // parameters.
  template <typename item_t, int64_t kCount>
  CM_FUSED_INLINE void step_moments(const Scalars<item_t>& s, const SlotBuffer& buffer,
      int64_t block, int64_t at, int64_t in_tile, item_t (&numerator)[kCount],
      item_t (&second_moment)[kCount]) {
    const int64_t begin = block + at;
    item_t g[kCount];
    item_t exp_avg[kCount];
    item_t exp_avg_sq[kCount];
    item_t sum[kCount];
    load_moments(range_.exp_avg, begin, kind_.rounds_moments, exp_avg);
    if (kind_.critical_gradients) {
      load_vectors<Unchanged<state_t>>(stored_g_ + in_tile, g);
      buffer.exchange(kind_.slot_code, kind_.critical_gradients, at, g, sum);
    } else {
      buffer.exchange(kind_.slot_code, kind_.critical_gradients, at, exp_avg, sum);
    }
    load_vectors<Unchanged<state_t>>(update_g_ + in_tile, g);
    load_moments(range_.exp_avg_sq, begin, kind_.rounds_moments, exp_avg_sq);
    update_moments(s, kind_.critical_gradients, g, sum, exp_avg, exp_avg_sq,
        range_.max_exp_avg_sq == nullptr ? nullptr : range_.max_exp_avg_sq + begin, numerator,
        second_moment);
    const uint32_t* const words = range_.words == nullptr ? words_ + in_tile : range_.words + begin;
    store_moments<true>(range_.exp_avg, begin, kind_.rounds_moments, exp_avg, words);
    store_moments<false>(range_.exp_avg_sq, begin, kind_.rounds_moments, exp_avg_sq, words);
  }

  static constexpr bool kIsScaled = std::remove_cvref_t<decltype(Kind::slot_code)>::kScaled;

  const RangeInputs<state_t>& inputs_;
  const TensorStep& tensor_;
  const Scalars<Vector<state_t>>& scalars_;
  const Gradients<state_t> gradients_;
  const Range<state_t> range_;
  const Kind kind_;
  const Philox philox_;

  // Of one tile.
  const state_t* stored_g_ = nullptr;
  const state_t* update_g_ = nullptr;
  alignas(64) state_t grad_scratch_[kTile];
  alignas(64) state_t stored_scratch_[kTile];
  alignas(64) state_t update_scratch_[kTile];
  alignas(64) uint32_t words_[kTile];

  // Of the tile before: where it is, and what its parameters are still to be stepped by.
  int64_t last_tile_ = kNoTile;
  alignas(64) state_t last_numerator_[kTile];
  alignas(64) state_t last_second_moment_[kTile];
};

// The rest of a tensor that is no whole tile: code that all kinds of step share, since most of a
// kind's code would be this. What changes is passed as copies, so that callers may keep theirs in
// registers.
template <typename state_t>
[[gnu::noinline]] SquareSum step_tail(const RangeInputs<state_t>& inputs, AnyKind kind,
    Buffer<state_t> buffer, int64_t block, int64_t at, int64_t n, SquareSum squares) {
  RangeStep<state_t, AnyKind>(inputs, kind).step_tail(buffer, block, at, n, squares);
  return squares;
}

// Once for each kind, whatever the parameter's dtype. All is inlined and copied here, where no
// store through a pointer to bytes can change it.
template <typename Kind, typename state_t>
[[gnu::noinline]] void step_range(const RangeInputs<state_t>& inputs, SquareSum& squares) {
  RangeStep<state_t, Kind>(inputs, Kind{}).run(squares);
}
