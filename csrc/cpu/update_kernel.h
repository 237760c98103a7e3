// The update of elements, Eqs. (3) to (7).
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// The scalars of an element update, rounded once to the state's type.
template <typename state_t>
struct Scalars {
  state_t beta1, one_minus_beta1, beta2, one_minus_beta2;
  state_t inverse_divisor, step_size, inverse_bias_correction2, decay_factor;
  state_t eps_inside_sqrt, eps;  // one of them is 0, which changes nothing that it is added to

  Scalars(const TensorStep& tensor, const StepOptions& options)
      : beta1(static_cast<state_t>(options.beta1)),
        one_minus_beta1(static_cast<state_t>(1.0 - options.beta1)),
        beta2(static_cast<state_t>(options.beta2)),
        one_minus_beta2(static_cast<state_t>(1.0 - options.beta2)),
        inverse_divisor(static_cast<state_t>(1.0 / static_cast<double>(tensor.mean_divisor))),
        step_size(static_cast<state_t>(options.lr / tensor.bias_correction1)),
        inverse_bias_correction2(static_cast<state_t>(1.0 / tensor.bias_correction2)),
        decay_factor(static_cast<state_t>(
            options.decoupled_weight_decay ? 1.0 - options.lr * options.weight_decay : 1.0)),
        eps_inside_sqrt(static_cast<state_t>(options.eps_inside_sqrt ? options.eps : 0.0)),
        eps(static_cast<state_t>(options.eps_inside_sqrt ? 0.0 : options.eps)) {}
};

// Eqs. (3) to (7) for one vector of elements; max_exp_avg_sq is a nullptr without amsgrad.
template <bool kCriticalGradients, typename vector_t, typename state_t>
CM_FUSED_INLINE void update(const Scalars<state_t>& s, vector_t g, vector_t buffer_sum,
    vector_t& exp_avg, vector_t& exp_avg_sq, state_t* max_exp_avg_sq, vector_t& param) {
  const vector_t mean = s.inverse_divisor * buffer_sum;  // Eq. (6)
  vector_t aggregate;
  vector_t numerator;
  if constexpr (kCriticalGradients) {
    aggregate = g + mean;  // Eq. (3)
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * aggregate;
    numerator = exp_avg;
  } else {
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * g;  // Eq. (4)
    aggregate = exp_avg + mean;                           // Eq. (5)
    numerator = aggregate;
  }
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (aggregate * aggregate);  // Eq. (5)
  vector_t second_moment = exp_avg_sq;
  if (max_exp_avg_sq != nullptr) {
    const auto largest = load_vector<vector_t>(max_exp_avg_sq);
    // In this order a NaN in exp_avg_sq is kept.
    second_moment = largest > second_moment ? largest : second_moment;
    store_vector(max_exp_avg_sq, second_moment);
  }
  const vector_t corrected = s.inverse_bias_correction2 * second_moment;
  const vector_t denominator = square_root(corrected + s.eps_inside_sqrt) + s.eps;
  param = s.decay_factor * param - s.step_size * (numerator / denominator);  // Eq. (7)
}

}  // namespace cm_fused::CM_FUSED_ISA
