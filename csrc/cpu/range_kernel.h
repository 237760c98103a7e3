// The loop of a step: a tile of every stream at a time, so that one tile's divisions overlap the
// next one's loads.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// Elements that a tile has: a multiple of the norms' lanes and of the elements that a vector of
// counters gives words to.
constexpr int64_t kTile = 32;
static_assert(kBlockSize % kTile == 0 && kTile % kLanes == 0);
static_assert(kTile % (kWordsPerCounter * static_cast<int64_t>(kNumLanes)) == 0);

// Consecutive elements of a tensor, as a step reads and changes them: its own memory, or copies in
// the update's type.
template <typename state_t, typename moment_t>
struct Range {
  int64_t begin;  // with scales or random words, a multiple of kLargestBlock
  int64_t n;
  const state_t* grad;
  moment_t* exp_avg;
  moment_t* exp_avg_sq;
  state_t* max_exp_avg_sq;  // nullptr without amsgrad
  state_t* param;
  const uint32_t* words;  // of rounded moments; nullptr: to be made by tiles

  // Of copies, made by who has asked for what comes next: the gradients as critical gradients store
  // them and as the update uses them. nullptr: to be found from grad by tiles.
  const state_t* stored_g;
  const state_t* update_g;
};

template <bool kCriticalGradients, typename state_t, typename SlotCode, typename MomentCode>
class RangeStep {
 public:
  using moment_t = typename MomentCode::stored_t;
  using DataRange = Range<state_t, moment_t>;

  CM_FUSED_INLINE RangeStep(const TensorStep& tensor, const StepOptions& options, int64_t chunk,
      const Scalars<state_t>& scalars, const DataRange& range)
      : tensor_(tensor),
        chunk_(chunk),
        options_(options),
        scalars_(scalars),
        range_(range),
        philox_(tensor, options, Stream::kMoments) {}

  // Adds the sum of g^2, of critical momenta, to `squares`.
  CM_FUSED_INLINE void run(SquareSum& squares) {
    squares_ = squares;
    const int64_t block_size = SlotCode::kScaled ? kScaleBlock : range_.n;
    for (int64_t at = 0; at < range_.n; at += block_size) {
      step_block(at, std::min(block_size, range_.n - at));
    }
    squares = squares_;
  }

 private:
  using SlotBuffer = Buffer<state_t, SlotCode>;

  CM_FUSED_INLINE void step_block(int64_t block, int64_t n) {
    SlotBuffer buffer(tensor_, chunk_, range_.begin + block);
    if (buffer.admits()) {
      find_scale(buffer, block, n);
      if (!kCriticalGradients) {
        buffer.set_scale();
      }
    }
    step_tiles(buffer, block, n);
    if (kCriticalGradients && buffer.admits()) {
      buffer.set_scale();
    }
  }

  CM_FUSED_INLINE void step_tiles(const SlotBuffer& buffer, int64_t block, int64_t n) {
    int64_t at = 0;
    for (; at + kTile <= n; at += kTile) {
      if (!is_copy() && at % kBlockSize == 0) {
        prefetch_block<state_t, state_t>(tensor_, range_.begin + block + at + kPrefetchDistance);
      }
      begin_tile(block + at, std::integral_constant<int64_t, kTile>{});
      step_tile<Vector<state_t>, kTile / kWidth<Vector<state_t>>>(buffer, block, at, 0);
    }
    if (at == n) {
      return;
    }
    begin_tile(block + at, n - at);
    const int64_t tile = at;
    for (; at + kWidth<Vector<state_t>> <= n; at += kWidth<Vector<state_t>>) {
      step_tile<Vector<state_t>, 1>(buffer, block, at, at - tile);
    }
    for (; at < n; ++at) {
      step_tile<state_t, 1>(buffer, block, at, at - tile);
    }
  }

  CM_FUSED_INLINE bool is_copy() const {
    return range_.stored_g != nullptr;
  }

  CM_FUSED_INLINE void find_scale(SlotBuffer& buffer, int64_t block, int64_t n) {
    if constexpr (SlotCode::kScaled) {
      if constexpr (!kCriticalGradients) {
        buffer.find_scale(range_.exp_avg + block, n);
      } else if (is_copy()) {
        buffer.find_scale(range_.stored_g + block, n);
      } else {
        alignas(64) state_t scratch[kScaleBlock];
        buffer.find_scale(
            effective_gradient(range_.grad + block, range_.param + block, n, options_, scratch), n);
      }
    }
  }

  // What is done of a whole tile before its step: its gradients, their part of the norm, its words.
  CM_FUSED_INLINE void begin_tile(int64_t at, auto n) {
    if (is_copy()) {
      stored_g_ = range_.stored_g + at;
      update_g_ = range_.update_g + at;
    } else {
      const state_t* const param = range_.param + at;
      stored_g_ = effective_gradient(range_.grad + at, param, n, options_, stored_scratch_);
      update_g_ = with_late_l2_term(stored_g_, param, n, options_, update_scratch_);
    }
    if constexpr (!kCriticalGradients) {
      squares_.add(stored_g_, n);
    }
    if constexpr (kRounds) {
      if (range_.words == nullptr) {
        const auto first =
            static_cast<uint64_t>((tensor_.places.offset + range_.begin + at) / kWordsPerCounter);
        philox_.set_words(
            first, std::integral_constant<uint64_t, kTile / kWordsPerCounter>{}, words_);
      }
    }
  }

  // The step of kCount vectors at `at` of a block, which are at `in_tile` of a tile.
  template <typename vector_t, int64_t kCount>
  CM_FUSED_INLINE void step_tile(
      const SlotBuffer& buffer, int64_t block, int64_t at, int64_t in_tile) {
    const int64_t begin = block + at;
    vector_t g[kCount];
    vector_t exp_avg[kCount];
    vector_t exp_avg_sq[kCount];
    vector_t param[kCount];
    vector_t sum[kCount];
    load_vectors<MomentCode>(range_.exp_avg + begin, exp_avg);
    if constexpr (kCriticalGradients) {
      buffer.sum(at, sum);
      if (buffer.admits()) {
        load_vectors<Unchanged<state_t>>(stored_g_ + in_tile, g);
        buffer.put(at, g);
      }
    } else {
      if (buffer.admits()) {
        buffer.put_before_sum(at, exp_avg);
      }
      buffer.sum(at, sum);
    }
    load_vectors<Unchanged<state_t>>(update_g_ + in_tile, g);
    load_vectors<MomentCode>(range_.exp_avg_sq + begin, exp_avg_sq);
    load_vectors<Unchanged<state_t>>(range_.param + begin, param);
    for (int64_t v = 0; v < kCount; ++v) {
      state_t* const max_exp_avg_sq = range_.max_exp_avg_sq == nullptr
                                          ? nullptr
                                          : range_.max_exp_avg_sq + begin + v * kWidth<vector_t>;
      update<kCriticalGradients>(
          scalars_, g[v], sum[v], exp_avg[v], exp_avg_sq[v], max_exp_avg_sq, param[v]);
    }
    const uint32_t* const words = range_.words == nullptr ? words_ + in_tile : range_.words + begin;
    store_moments<true, MomentCode>(range_.exp_avg + begin, exp_avg, words);
    store_moments<false, MomentCode>(range_.exp_avg_sq + begin, exp_avg_sq, words);
    store_vectors<Unchanged<state_t>>(range_.param + begin, param);
  }

  static constexpr bool kRounds = !std::is_same_v<MomentCode, Unchanged<state_t>>;

  const TensorStep& tensor_;
  const int64_t chunk_;
  const StepOptions options_;
  const Scalars<state_t> scalars_;
  const DataRange range_;
  const Philox philox_;
  SquareSum squares_;

  // Of one tile.
  const state_t* stored_g_ = nullptr;
  const state_t* update_g_ = nullptr;
  alignas(64) state_t stored_scratch_[kTile];
  alignas(64) state_t update_scratch_[kTile];
  alignas(64) uint32_t words_[kTile];
};

// Once for each kind of state, whatever the parameter's dtype. All is inlined and copied here,
// where no store through a pointer to bytes can change it.
template <bool kCriticalGradients, typename SlotCode, typename MomentCode, typename state_t>
[[gnu::noinline]] void step_range(const TensorStep& tensor, const StepOptions& options,
    int64_t chunk, const Scalars<state_t>& scalars,
    const Range<state_t, typename MomentCode::stored_t>& range, SquareSum& squares) {
  RangeStep<kCriticalGradients, state_t, SlotCode, MomentCode>(
      tensor, options, chunk, scalars, range)
      .run(squares);
}

}  // namespace cm_fused::CM_FUSED_ISA
