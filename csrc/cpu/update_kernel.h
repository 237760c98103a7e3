// The update of a block of elements, Eqs. (3) to (7).
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// The scalars of an element update, rounded once to the state's type.
template <typename state_t>
struct Scalars {
  state_t beta1, one_minus_beta1, beta2, one_minus_beta2;
  state_t inverse_divisor, step_size, inverse_bias_correction2, eps, decay_factor;

  Scalars(const TensorStep& tensor, const StepOptions& options)
      : beta1(static_cast<state_t>(options.beta1)),
        one_minus_beta1(static_cast<state_t>(1.0 - options.beta1)),
        beta2(static_cast<state_t>(options.beta2)),
        one_minus_beta2(static_cast<state_t>(1.0 - options.beta2)),
        inverse_divisor(static_cast<state_t>(1.0 / static_cast<double>(tensor.mean_divisor))),
        step_size(static_cast<state_t>(options.lr / tensor.bias_correction1)),
        inverse_bias_correction2(static_cast<state_t>(1.0 / tensor.bias_correction2)),
        eps(static_cast<state_t>(options.eps)),
        decay_factor(static_cast<state_t>(
            options.decoupled_weight_decay ? 1.0 - options.lr * options.weight_decay : 1.0)) {}
};

template <bool kCriticalGradients, bool kAmsgrad, bool kEpsInsideSqrt, typename state_t,
    typename Count>
inline void update_block(const Scalars<state_t>& s, Count n, const state_t* __restrict g,
    const state_t* __restrict buffer_sum, state_t* __restrict exp_avg,
    state_t* __restrict exp_avg_sq, state_t* __restrict max_exp_avg_sq, state_t* __restrict param) {
  for (int64_t i = 0; i < n; ++i) {
    const state_t mean = s.inverse_divisor * buffer_sum[i];  // Eq. (6)
    state_t aggregate;
    state_t numerator;
    if constexpr (kCriticalGradients) {
      aggregate = g[i] + mean;  // Eq. (3)
      exp_avg[i] = s.beta1 * exp_avg[i] + s.one_minus_beta1 * aggregate;
      numerator = exp_avg[i];
    } else {
      exp_avg[i] = s.beta1 * exp_avg[i] + s.one_minus_beta1 * g[i];  // Eq. (4)
      aggregate = exp_avg[i] + mean;                                 // Eq. (5)
      numerator = aggregate;
    }
    exp_avg_sq[i] =
        s.beta2 * exp_avg_sq[i] + s.one_minus_beta2 * (aggregate * aggregate);  // Eq. (5)
    state_t second_moment = exp_avg_sq[i];
    if constexpr (kAmsgrad) {
      // In this order a NaN in exp_avg_sq is kept.
      second_moment = max_exp_avg_sq[i] > second_moment ? max_exp_avg_sq[i] : second_moment;
      max_exp_avg_sq[i] = second_moment;
    }
    const state_t corrected = s.inverse_bias_correction2 * second_moment;
    const state_t denominator =
        kEpsInsideSqrt ? std::sqrt(corrected + s.eps) : std::sqrt(corrected) + s.eps;
    param[i] = s.decay_factor * param[i] - s.step_size * (numerator / denominator);  // Eq. (7)
  }
}

template <typename state_t, bool kCriticalGradients, typename Count>
inline auto update_function(bool amsgrad, bool eps_inside_sqrt) {
  if (amsgrad) {
    return eps_inside_sqrt ? &update_block<kCriticalGradients, true, true, state_t, Count>
                           : &update_block<kCriticalGradients, true, false, state_t, Count>;
  }
  return eps_inside_sqrt ? &update_block<kCriticalGradients, false, true, state_t, Count>
                         : &update_block<kCriticalGradients, false, false, state_t, Count>;
}

}  // namespace cm_fused::CM_FUSED_ISA
