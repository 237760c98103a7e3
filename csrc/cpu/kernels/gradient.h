// The gradient that a step uses, and the sum of its squares.

// Lanes of a norm's accumulator: two AVX-512 registers of doubles, and a part of the definition
// of its bits on every instruction set.
constexpr int kLanes = 16;

// The gradients that a step stores and uses.
template <typename state_t>
class Gradients {
 public:
  explicit Gradients(const StepOptions& options)
      : factor_(
            static_cast<state_t>(options.maximize ? -options.grad_factor : options.grad_factor)),
        weight_decay_(static_cast<state_t>(options.weight_decay)),
        has_l2_term_(options.weight_decay != 0.0 && !options.decoupled_weight_decay),
        adds_l2_term_(has_l2_term_ && !options.l2_in_aggregate),
        adds_late_l2_term_(has_l2_term_ && options.l2_in_aggregate),
        unchanged_(factor_ == state_t(1) && !adds_l2_term_) {}

  // Whether any gradient has a term of the parameter.
  bool has_l2_term() const {
    return has_l2_term_;
  }

  // Whether effective() reads the parameter.
  bool adds_l2_term() const {
    return adds_l2_term_;
  }

  // Unscaled and clipped, negated to maximize, plus the L2 term. In `scratch` if it isn't `grad`.
  CM_FUSED_INLINE const state_t* effective(
      const state_t* grad, const state_t* param, auto n, state_t* scratch) const {
    if (unchanged_) {
      return grad;
    }
    if (adds_l2_term_) {
      for (int64_t i = 0; i < n; ++i) {
        scratch[i] = factor_ * grad[i] + weight_decay_ * param[i];
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        scratch[i] = factor_ * grad[i];
      }
    }
    return scratch;
  }

  // With the L2 term that is no part of what critical gradients store.
  CM_FUSED_INLINE const state_t* with_late_l2_term(
      const state_t* g, const state_t* param, auto n, state_t* scratch) const {
    if (!adds_late_l2_term_) {
      return g;
    }
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = g[i] + weight_decay_ * param[i];
    }
    return scratch;
  }

 private:
  const state_t factor_;
  const state_t weight_decay_;
  const bool has_l2_term_;
  const bool adds_l2_term_;
  const bool adds_late_l2_term_;
  const bool unchanged_;
};

// The sum of squares, in lanes.
class SquareSum {
 public:
  template <typename state_t>
  CM_FUSED_INLINE void add(const state_t* g, auto n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t v = 0; v < kVectors; ++v) {
        lanes_[v] = add_square<state_t>(lanes_[v], load_doubles(g + i + v * kWidth<Doubles>));
      }
    }
    if (i == n) {
      return;
    }
    // Element by element in memory: a vector that is so indexed stays there.
    double sums[kLanes];
    store(sums);
    for (int64_t lane = 0; i + lane < n; ++lane) {
      const auto value = static_cast<double>(g[i + lane]);
      sums[lane] += value * value;
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      lanes_[v] = load_vector<Doubles>(sums + v * kWidth<Doubles>);
    }
  }

  double total() const {
    double sums[kLanes];
    store(sums);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        sums[lane] += sums[lane + width];
      }
    }
    return sums[0];
  }

 private:
  using Doubles = Vector<double>;
  static constexpr int64_t kVectors = kLanes / kWidth<Doubles>;

  CM_FUSED_INLINE void store(double (&sums)[kLanes]) const {
    for (int64_t v = 0; v < kVectors; ++v) {
      store_vector(sums + v * kWidth<Doubles>, lanes_[v]);
    }
  }

  // A float's square is exact as a double, and so rounded once with or without a fused
  // multiply-add.
  template <typename state_t>
  CM_FUSED_INLINE static Doubles add_square(Doubles sum, Doubles values) {
#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES > 16
    if constexpr (std::is_same_v<state_t, float>) {
#if CM_FUSED_VECTOR_BYTES == 64
      return _mm512_fmadd_pd(values, values, sum);
#else
      return _mm256_fmadd_pd(values, values, sum);
#endif
    }
#endif
    return sum + values * values;
  }

  Doubles lanes_[kVectors] = {};
};

// The sum of the squares of float64 gradients, in any order.
class CompensatedSquareSum {
 public:
  CM_FUSED_INLINE void add(const double* g, int64_t n) {
    int64_t i = 0;
    for (; i + kWidth<Doubles> <= n; i += kWidth<Doubles>) {
      const auto values = load_vector<Doubles>(g + i);
      lanes_.add(values * values);
    }
    for (; i < n; ++i) {
      rest_.add(g[i] * g[i]);
    }
  }

  double total() const {
    CompensatedSum<double> all = rest_;
    for (int64_t lane = 0; lane < kWidth<Doubles>; ++lane) {
      all.add(lanes_.sum[lane]);
      all.error += lanes_.error[lane];
    }
    return all.total();
  }

 private:
  using Doubles = Vector<double>;

  CompensatedSum<Doubles> lanes_;
  CompensatedSum<double> rest_;
};
