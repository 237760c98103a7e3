// Ranges of a tensor's data, which tiles read and write in its own memory; or copies of it in the
// update's type, of what does not lie in memory as the state does, and of half precision that tiles
// do not convert.

// Calls visit with a value of the type of a parameter or gradient.
template <typename state_t, typename Visit>
inline auto with_param_type(ParamDtype dtype, Visit visit) {
  if constexpr (std::is_same_v<state_t, float>) {
    if (dtype == ParamDtype::kBFloat16) {
      return visit(c10::BFloat16{});
    }
    if (dtype == ParamDtype::kFloat16) {
      return visit(c10::Half{});
    }
  }
  return visit(state_t{});
}

// Consecutive elements of a tensor, as a step reads and changes them: its own memory, or copies in
// the update's type.
template <typename state_t>
struct Range {
  int64_t begin;  // with scales or random words, a multiple of kLargestBlock
  int64_t n;
  bool copies_moments;
  bool rebuilds_sum;
  const void* grad;  // of state_t, or as grad_dtype says
  ParamDtype grad_dtype;
  void* exp_avg;  // with exp_avg_sq: of bfloat16 if they are rounded, else of state_t
  void* exp_avg_sq;
  state_t* max_exp_avg_sq;  // nullptr without amsgrad
  void* param;              // of state_t, or of bfloat16 as param_dtype says
  ParamDtype param_dtype;
  c10::BFloat16* remainder;  // nullptr without masters, and where `param` is a copy
  const uint32_t* words;     // random; nullptr: tiles make those of bfloat16 moments

  // The gradients as critical gradients store them and as the update uses them, where copies were
  // made. nullptr: to be found from grad by tiles.
  const state_t* stored_g;
  const state_t* update_g;
};

// The values at `at` of a range's parameter: its masters, where it has a remainder.
template <typename state_t, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void load_param(
    const Range<state_t>& range, int64_t at, vector_t (&values)[kCount]) {
  if constexpr (std::is_same_v<state_t, float>) {
    if (range.param_dtype == ParamDtype::kBFloat16) {
      load_vectors<Halved<c10::BFloat16>>(
          static_cast<const c10::BFloat16*>(range.param) + at, values);
      if (range.remainder != nullptr) {
        join_masters(range.remainder + at, values);
      }
      return;
    }
  }
  load_vectors<Unchanged<state_t>>(static_cast<const state_t*>(range.param) + at, values);
}

template <typename state_t, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void store_param(
    const Range<state_t>& range, int64_t at, const vector_t (&values)[kCount]) {
  if constexpr (std::is_same_v<state_t, float>) {
    if (range.param_dtype == ParamDtype::kBFloat16) {
      auto* const param = static_cast<c10::BFloat16*>(range.param) + at;
      if (range.remainder != nullptr) {
        Bits<vector_t> bits[kCount];
        split_masters(values, range.remainder + at, bits);
        store_bits(param, bits);
      } else {
        store_vectors<Halved<c10::BFloat16>>(param, values);
      }
      return;
    }
  }
  store_vectors<Unchanged<state_t>>(static_cast<state_t*>(range.param) + at, values);
}

// A block of a tensor's gradient in the update's type, in `scratch` if it is not there.
template <typename state_t>
inline const state_t* load_grad(
    const TensorStep& tensor, int64_t begin, int64_t n, state_t* scratch) {
  return with_param_type<state_t>(tensor.grad_dtype, [&](auto type) {
    return load_block(static_cast<const decltype(type)*>(tensor.grad), tensor.grad_layout.get(),
        begin, n, scratch);
  });
}

// Copies of at most kLargestBlock elements at a time. Once for each type of state, called from
// where a step is inlined.
template <typename state_t>
class Copies {
 public:
  Copies(const TensorStep& tensor, const StepOptions& options)
      : tensor_(tensor), options_(options), gradients_(options) {}

  // Tiles convert bfloat16 parameters that are rounded to nearest or split, unless gradients get an
  // L2 term of them; and half-precision gradients, unless a block's scale needs them.
  bool are_needed() const {
    const bool reads_blocks = options_.critical_gradients && has_scales(tensor_.slot_dtype);
    const bool converts_params = tensor_.dtype == ParamDtype::kBFloat16 &&
                                 tensor_.compensation == nullptr && !options_.stochastic_update &&
                                 !gradients_.has_l2_term();
    return (is_half(tensor_.dtype) && !converts_params) ||
           (is_half(tensor_.grad_dtype) && reads_blocks) || tensor_.param_layout != nullptr ||
           tensor_.grad_layout != nullptr;
  }

  bool rounds_stochastically() const {
    return options_.stochastic_update && is_half(tensor_.dtype);
  }

  // Copies a range's parameters and gradients.
  [[gnu::noinline]] void load(Range<state_t>& range) {
    const int64_t begin = range.begin;
    const int64_t n = range.n;
    with_param_type<state_t>(tensor_.dtype, [&](auto type) {
      param_ = load_block(static_cast<decltype(type)*>(tensor_.param), tensor_.param_layout.get(),
          begin, n, param_scratch_);
    });
    join_master(tensor_, begin, n, param_);
    const state_t* const grad = load_grad(tensor_, begin, n, grad_scratch_);
    with_block_size(n, [&](auto size) {
      range.stored_g = gradients_.effective(grad, param_, size, grad_scratch_);
      range.update_g =
          gradients_.with_late_l2_term(range.stored_g, param_, size, late_grad_scratch_);
    });
    with_param_type<state_t>(tensor_.dtype,
        [&](auto param) { add_compensation<state_t, decltype(param)>(tensor_, begin, n, param_); });
    range.param = param_;
  }

  // Writes the parameters back. `words` are random, if they are rounded stochastically.
  [[gnu::noinline]] void store(int64_t begin, int64_t n, const uint32_t* words) {
    with_param_type<state_t>(
        tensor_.dtype, [&](auto param) { store_data<decltype(param)>(begin, n, words); });
  }

 private:
  template <typename param_t>
  CM_FUSED_INLINE void store_data(int64_t begin, int64_t n, const uint32_t* words) {
    constexpr bool kRounds = !std::is_same_v<state_t, param_t>;
    if constexpr (kRounds) {
      if (options_.stochastic_update) {
        round_stochastically<state_t, param_t>(words, n, param_);
      } else if (tensor_.master_remainder != nullptr) {
        split_master(tensor_, begin, n, param_);
      }
    }
    store_block(static_cast<param_t*>(tensor_.param), tensor_.param_layout.get(), begin, n, param_);
    if constexpr (kRounds) {
      keep_compensation<state_t, param_t>(tensor_, begin, n, param_);
    }
  }

  const TensorStep& tensor_;
  const StepOptions& options_;
  const Gradients<state_t> gradients_;
  state_t* param_ = nullptr;
  alignas(64) state_t grad_scratch_[kLargestBlock];
  alignas(64) state_t late_grad_scratch_[kLargestBlock];
  alignas(64) state_t param_scratch_[kLargestBlock];
};
