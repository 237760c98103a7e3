// The gradient that a step uses, and the sum of its squares.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// Lanes of a norm's accumulator: two AVX-512 registers of doubles, and a part of the definition
// of its bits on every instruction set.
constexpr int kLanes = 16;

inline bool has_l2_term(const StepOptions& options) {
  return options.weight_decay != 0.0 && !options.decoupled_weight_decay;
}

inline bool adds_l2_term(const StepOptions& options) {
  return has_l2_term(options) && !options.l2_in_aggregate;
}

// The gradient the step uses: unscaled and clipped, negated to maximize, plus the L2 term.
template <typename state_t>
inline const state_t* effective_gradient(const state_t* grad, const state_t* param, auto n,
    const StepOptions& options, state_t* scratch) {
  const bool l2 = adds_l2_term(options);
  const auto factor =
      static_cast<state_t>(options.maximize ? -options.grad_factor : options.grad_factor);
  if (factor == state_t(1) && !l2) {
    return grad;
  }
  if (l2) {
    const state_t weight_decay = static_cast<state_t>(options.weight_decay);
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = factor * grad[i] + weight_decay * param[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = factor * grad[i];
    }
  }
  return scratch;
}

// With the L2 term that is no part of what critical gradients store.
template <typename state_t>
inline const state_t* with_late_l2_term(
    const state_t* g, const state_t* param, auto n, const StepOptions& options, state_t* scratch) {
  if (!options.l2_in_aggregate || !has_l2_term(options)) {
    return g;
  }
  const state_t weight_decay = static_cast<state_t>(options.weight_decay);
  for (int64_t i = 0; i < n; ++i) {
    scratch[i] = g[i] + weight_decay * param[i];
  }
  return scratch;
}

struct SquareSum {
  double lanes[kLanes] = {};

  template <typename state_t>
  inline void add(const state_t* __restrict g, auto n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(g[i + lane]) * static_cast<double>(g[i + lane]);
      }
    }
    for (int lane = 0; i + lane < n; ++lane) {
      lanes[lane] += static_cast<double>(g[i + lane]) * static_cast<double>(g[i + lane]);
    }
  }

  inline double total() {
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        lanes[lane] += lanes[lane + width];
      }
    }
    return lanes[0];
  }
};

}  // namespace cm_fused::CM_FUSED_ISA
