// Copies of a tensor's data in the update's type: of what is in half precision, or does not lie in
// memory as the state does.

// Calls visit with a value of the parameter's type.
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

// Of at most kLargestBlock elements at a time. Once for each type of state, called from where a
// step is inlined.
template <typename state_t>
class Copies {
 public:
  Copies(const TensorStep& tensor, const StepOptions& options)
      : tensor_(tensor), options_(options), gradients_(options) {}

  bool are_needed() const {
    return is_half(tensor_.dtype) || tensor_.param_layout != nullptr ||
           tensor_.grad_layout != nullptr;
  }

  // Copies the elements [begin, begin + n).
  [[gnu::noinline]] void load(int64_t begin, int64_t n) {
    with_param_type<state_t>(
        tensor_.dtype, [&](auto param) { load_data<decltype(param)>(begin, n); });
    with_block_size(n, [&](auto size) {
      stored_g_ = gradients_.effective(stored_g_, param_, size, grad_scratch_);
      update_g_ = gradients_.with_late_l2_term(stored_g_, param_, size, late_grad_scratch_);
    });
    with_param_type<state_t>(tensor_.dtype,
        [&](auto param) { add_compensation<state_t, decltype(param)>(tensor_, begin, n, param_); });
  }

  // Writes the parameters back.
  [[gnu::noinline]] void store(int64_t begin, int64_t n) {
    with_param_type<state_t>(
        tensor_.dtype, [&](auto param) { store_data<decltype(param)>(begin, n); });
  }

  state_t* param() {
    return param_;
  }

  // The gradients as critical gradients store them, and as the update uses them.
  const state_t* stored_g() const {
    return stored_g_;
  }
  const state_t* update_g() const {
    return update_g_;
  }

 private:
  template <typename param_t>
  CM_FUSED_INLINE void load_data(int64_t begin, int64_t n) {
    param_ = load_block(
        static_cast<param_t*>(tensor_.param), tensor_.param_layout.get(), begin, n, param_scratch_);
    stored_g_ = load_block(static_cast<const param_t*>(tensor_.grad), tensor_.grad_layout.get(),
        begin, n, grad_scratch_);
  }

  template <typename param_t>
  CM_FUSED_INLINE void store_data(int64_t begin, int64_t n) {
    constexpr bool kRounds = !std::is_same_v<state_t, param_t>;
    if constexpr (kRounds) {
      if (options_.stochastic_update) {
        alignas(64) uint32_t words[kLargestBlock];
        random_words(tensor_, options_, begin, Stream::kParam, words);
        round_stochastically<state_t, param_t>(words, n, param_);
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
  const state_t* stored_g_ = nullptr;
  const state_t* update_g_ = nullptr;
  alignas(64) state_t grad_scratch_[kLargestBlock];
  alignas(64) state_t late_grad_scratch_[kLargestBlock];
  alignas(64) state_t param_scratch_[kLargestBlock];
};
