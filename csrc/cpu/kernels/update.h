// The update of elements, Eqs. (3) to (7).

// The scalars of an update, rounded once to the state's type. In vectors, so that no step of a tile
// spreads them anew.
template <typename vector_t>
struct Scalars {
  vector_t beta1, one_minus_beta1, beta2, one_minus_beta2;
  vector_t inverse_divisor, step_size, inverse_bias_correction2, decay_factor;
  vector_t eps_inside_sqrt, eps;  // one of them is 0, which changes nothing that it is added to

  Scalars(const TensorStep& tensor, const StepOptions& options)
      : beta1(spread(options.beta1)),
        one_minus_beta1(spread(1.0 - options.beta1)),
        beta2(spread(options.beta2)),
        one_minus_beta2(spread(1.0 - options.beta2)),
        inverse_divisor(spread(1.0 / static_cast<double>(tensor.mean_divisor))),
        step_size(spread(options.lr / tensor.bias_correction1)),
        inverse_bias_correction2(spread(1.0 / tensor.bias_correction2)),
        decay_factor(
            spread(options.decoupled_weight_decay ? 1.0 - options.lr * options.weight_decay : 1.0)),
        eps_inside_sqrt(spread(options.eps_inside_sqrt ? options.eps : 0.0)),
        eps(spread(options.eps_inside_sqrt ? 0.0 : options.eps)) {}

 private:
  static vector_t spread(double value) {
    return static_cast<Element<vector_t>>(value) - vector_t{};
  }
};

// Eqs. (3) to (6) for a tile; max_exp_avg_sq is a nullptr without amsgrad. Sets what Eq. (7)
// divides and what it divides by the root of.
template <typename vector_t, int64_t kCount>
CM_FUSED_INLINE void update_moments(const Scalars<vector_t>& s, auto critical_gradients,
    const vector_t (&g)[kCount], const vector_t (&buffer_sum)[kCount], vector_t (&exp_avg)[kCount],
    vector_t (&exp_avg_sq)[kCount], Element<vector_t>* max_exp_avg_sq,
    vector_t (&numerator)[kCount], vector_t (&second_moment)[kCount]) {
  for (int64_t v = 0; v < kCount; ++v) {
    const vector_t mean = s.inverse_divisor * buffer_sum[v];  // Eq. (6)
    vector_t aggregate;
    if (critical_gradients) {
      aggregate = g[v] + mean;  // Eq. (3)
      exp_avg[v] = s.beta1 * exp_avg[v] + s.one_minus_beta1 * aggregate;
      numerator[v] = exp_avg[v];
    } else {
      exp_avg[v] = s.beta1 * exp_avg[v] + s.one_minus_beta1 * g[v];  // Eq. (4)
      aggregate = exp_avg[v] + mean;                                 // Eq. (5)
      numerator[v] = aggregate;
    }
    exp_avg_sq[v] =
        s.beta2 * exp_avg_sq[v] + s.one_minus_beta2 * (aggregate * aggregate);  // Eq. (5)
    second_moment[v] = exp_avg_sq[v];
  }
  if (max_exp_avg_sq != nullptr) {
    for (int64_t v = 0; v < kCount; ++v) {
      Element<vector_t>* const stored = max_exp_avg_sq + v * kWidth<vector_t>;
      const auto largest = load_vector<vector_t>(stored);
      // In this order a NaN in exp_avg_sq is kept.
      second_moment[v] = largest > second_moment[v] ? largest : second_moment[v];
      store_vector(stored, second_moment[v]);
    }
  }
}

// Eq. (7) for a tile of a parameter.
template <typename vector_t, int64_t kCount>
CM_FUSED_INLINE void update_param(const Scalars<vector_t>& s, const vector_t (&numerator)[kCount],
    const vector_t (&second_moment)[kCount], vector_t (&param)[kCount]) {
  for (int64_t v = 0; v < kCount; ++v) {
    const vector_t corrected = s.inverse_bias_correction2 * second_moment[v];
    const vector_t denominator = square_root(corrected + s.eps_inside_sqrt) + s.eps;
    param[v] = s.decay_factor * param[v] - s.step_size * (numerator[v] / denominator);  // Eq. (7)
  }
}
