// The CPU step over one chunk of one tensor, written once and compiled once per instruction set:
// each including file sets the target and names the namespace CM_FUSED_ISA. Loops are plain and
// branch-free for the vectorizer; no operation may be contracted or reordered, so every
// instruction set gives the same bits.
//
// No include guard: it is meant to be included once per translation unit, after step.h.

namespace cm_fused::CM_FUSED_ISA {

// Lanes of a norm's accumulator: two AVX-512 registers of doubles, and a part of the definition
// of its bits on every instruction set.
constexpr int kLanes = 16;

template <typename state_t, typename param_t>
inline state_t load_element(param_t value) {
  if constexpr (std::is_same_v<param_t, c10::Half>) {
    return c10::detail::fp16_ieee_to_fp32_value(value.x);
  } else if constexpr (std::is_same_v<param_t, c10::BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  } else {
    return value;
  }
}

// Rounds to nearest even. The bfloat16 form is c10's without its branch, which would keep the
// loop from being vectorized.
template <typename param_t, typename state_t>
inline param_t store_element(state_t value) {
  if constexpr (std::is_same_v<param_t, c10::Half>) {
    return c10::Half(c10::detail::fp16_ieee_from_fp32_value(value), c10::Half::from_bits());
  } else if constexpr (std::is_same_v<param_t, c10::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    return c10::BFloat16(
        static_cast<uint16_t>(is_nan ? 0x7FC0U : rounded), c10::BFloat16::from_bits());
  } else {
    return value;
  }
}

// Calls visit(offset, at, count, stride) for every run of elements [begin, begin + n) of a
// strided tensor: `count` elements from `offset`, `stride` apart, are the block's from `at`.
template <typename Visit>
inline void for_each_run(const StridedLayout& layout, int64_t begin, int64_t n, Visit visit) {
  const size_t inner = layout.sizes.size() - 1;
  int64_t position = 0;
  while (position < n) {
    int64_t remainder = begin + position;
    int64_t offset = 0;
    int64_t inner_index = 0;
    for (size_t d = inner + 1; d-- > 0;) {
      const int64_t index = remainder % layout.sizes[d];
      remainder /= layout.sizes[d];
      offset += index * layout.strides[d];
      inner_index = d == inner ? index : inner_index;
    }
    const int64_t count = std::min(n - position, layout.sizes[inner] - inner_index);
    visit(offset, position, count, layout.strides[inner]);
    position += count;
  }
}

// A block's elements in the state's type: the tensor's own memory where that serves, else a copy
// in `scratch`.
template <typename state_t, typename data_t>
inline auto load_block(data_t* data, const StridedLayout* layout, int64_t begin, int64_t n,
    state_t* scratch) -> std::conditional_t<std::is_const_v<data_t>, const state_t*, state_t*> {
  if (layout != nullptr) {
    for_each_run(*layout, begin, n, [&](int64_t offset, int64_t at, int64_t count, int64_t stride) {
      for (int64_t i = 0; i < count; ++i) {
        scratch[at + i] = load_element<state_t>(data[offset + i * stride]);
      }
    });
    return scratch;
  }
  if constexpr (std::is_same_v<state_t, std::remove_const_t<data_t>>) {
    return data + begin;
  } else {
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = load_element<state_t>(data[begin + i]);
    }
    return scratch;
  }
}

// Writes back what load_block copied; nothing to do where it gave the tensor's own memory.
template <typename state_t, typename param_t>
inline void store_block(
    param_t* data, const StridedLayout* layout, int64_t begin, int64_t n, const state_t* block) {
  if (layout != nullptr) {
    for_each_run(*layout, begin, n, [&](int64_t offset, int64_t at, int64_t count, int64_t stride) {
      for (int64_t i = 0; i < count; ++i) {
        data[offset + i * stride] = store_element<param_t>(block[at + i]);
      }
    });
  } else if constexpr (!std::is_same_v<state_t, param_t>) {
    for (int64_t i = 0; i < n; ++i) {
      data[begin + i] = store_element<param_t>(block[i]);
    }
  }
}

inline bool adds_l2_term(const StepOptions& options) {
  return options.weight_decay != 0.0 && !options.decoupled_weight_decay;
}

// The gradient the step uses: negated to maximize, plus the L2 term.
template <typename state_t>
inline const state_t* effective_gradient(const state_t* grad, const state_t* param, int64_t n,
    const StepOptions& options, state_t* scratch) {
  const bool l2 = adds_l2_term(options);
  if (!options.maximize && !l2) {
    return grad;
  }
  const state_t sign = options.maximize ? state_t(-1) : state_t(1);
  if (l2) {
    const state_t weight_decay = static_cast<state_t>(options.weight_decay);
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = sign * grad[i] + weight_decay * param[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = sign * grad[i];
    }
  }
  return scratch;
}

struct SquareSum {
  double lanes[kLanes] = {};

  template <typename state_t>
  inline void add(const state_t* __restrict g, int64_t n) {
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

// Sum of the slots over a block, in slot order. `slots` points at the block in slot 0.
template <typename state_t>
inline void sum_slots(const state_t* __restrict slots, int64_t numel, int64_t capacity, int64_t n,
    state_t* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = slots[i];
  }
  for (int64_t slot = 1; slot < capacity; ++slot) {
    const state_t* __restrict row = slots + slot * numel;
    for (int64_t i = 0; i < n; ++i) {
      sum[i] += row[i];
    }
  }
}

// Puts `item` in a slot; a running sum, where given, follows.
template <typename state_t>
inline void put_in_slot(
    const state_t* __restrict item, state_t* __restrict slot, state_t* __restrict sum, int64_t n) {
  if (sum == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      slot[i] = item[i];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    sum[i] += item[i] - slot[i];
    slot[i] = item[i];
  }
}

// A running sum loses a rounding with every admission. Each chunk is therefore summed anew from
// its slots once in 4 C steps, a different chunk each step, which bounds the error by the
// roundings of 4 C admissions and costs (4 (C - 1) - 8) / (4 C) bytes an element: at most 2 % of
// the 44 of a step.
inline bool rebuilds_sum(const TensorStep& tensor, int64_t chunk) {
  return (tensor.step + chunk) % (4 * tensor.capacity) == 0;
}

// The buffer over one block: slots and, where one is kept, the running sum.
template <typename state_t>
struct BufferBlock {
  state_t* slots;  // the block in slot 0
  state_t* sum;    // nullptr: no running sum
  state_t* slot;   // the block in the slot to be replaced, or nullptr
  bool from_slots;
};

template <typename state_t>
inline BufferBlock<state_t> buffer_block(const TensorStep& tensor, int64_t chunk, int64_t begin) {
  auto* slots = static_cast<state_t*>(tensor.critical_buffer) + begin;
  auto* sum = static_cast<state_t*>(tensor.critical_sum);
  return {slots, sum == nullptr ? nullptr : sum + begin,
      tensor.slot == kNoSlot ? nullptr : slots + tensor.slot * tensor.numel,
      sum == nullptr || rebuilds_sum(tensor, chunk)};
}

// The sum over the slots after `item`, last step's momentum, took its slot: the deferred commit.
template <typename state_t>
inline const state_t* commit_then_sum(const TensorStep& tensor, const BufferBlock<state_t>& buffer,
    const state_t* item, int64_t n, state_t* scratch) {
  if (buffer.slot != nullptr) {
    put_in_slot(item, buffer.slot, buffer.from_slots ? nullptr : buffer.sum, n);
  }
  if (!buffer.from_slots) {
    return buffer.sum;
  }
  state_t* sum = buffer.sum == nullptr ? scratch : buffer.sum;
  sum_slots(buffer.slots, tensor.numel, tensor.capacity, n, sum);
  return sum;
}

// The sum over the slots before `item`, this step's gradient, takes its slot.
template <typename state_t>
inline const state_t* sum_then_commit(const TensorStep& tensor, const BufferBlock<state_t>& buffer,
    const state_t* item, int64_t n, state_t* scratch) {
  const size_t bytes = static_cast<size_t>(n) * sizeof(state_t);
  if (!buffer.from_slots) {
    std::memcpy(scratch, buffer.sum, bytes);
  } else {
    sum_slots(buffer.slots, tensor.numel, tensor.capacity, n, scratch);
    if (buffer.sum != nullptr) {
      std::memcpy(buffer.sum, scratch, bytes);
    }
  }
  if (buffer.slot != nullptr) {
    put_in_slot(item, buffer.slot, buffer.sum, n);
  }
  return scratch;
}

// The scalars of an element update, rounded once to the state's type.
template <typename state_t>
struct Scalars {
  state_t beta1, one_minus_beta1, beta2, one_minus_beta2;
  state_t inverse_divisor, step_size, bias_correction2, eps, decay_factor;

  Scalars(const TensorStep& tensor, const StepOptions& options)
      : beta1(static_cast<state_t>(options.beta1)),
        one_minus_beta1(static_cast<state_t>(1.0 - options.beta1)),
        beta2(static_cast<state_t>(options.beta2)),
        one_minus_beta2(static_cast<state_t>(1.0 - options.beta2)),
        inverse_divisor(static_cast<state_t>(1.0 / static_cast<double>(tensor.mean_divisor))),
        step_size(static_cast<state_t>(options.lr / tensor.bias_correction1)),
        bias_correction2(static_cast<state_t>(tensor.bias_correction2)),
        eps(static_cast<state_t>(options.eps)),
        decay_factor(static_cast<state_t>(
            options.decoupled_weight_decay ? 1.0 - options.lr * options.weight_decay : 1.0)) {}
};

template <bool kCriticalGradients, bool kAmsgrad, bool kEpsInsideSqrt, typename state_t>
inline void update_block(const Scalars<state_t>& s, int64_t n, const state_t* __restrict g,
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
    const state_t corrected = second_moment / s.bias_correction2;
    const state_t denominator =
        kEpsInsideSqrt ? std::sqrt(corrected + s.eps) : std::sqrt(corrected) + s.eps;
    param[i] = s.decay_factor * param[i] - s.step_size * (numerator / denominator);  // Eq. (7)
  }
}

template <typename data_t>
inline void prefetch(const void* data, int64_t begin) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(data_t));
  for (int64_t i = 0; i < kBlockSize; i += line) {
    __builtin_prefetch(static_cast<const data_t*>(data) + begin + i, 0, 2);
  }
}

// Asks for the block at `begin` of every stream a step reads: they are more than the hardware
// follows by itself.
template <typename state_t, typename param_t>
inline void prefetch_block(const TensorStep& tensor, int64_t begin) {
  if (begin + kBlockSize > tensor.numel) {
    return;
  }
  if (tensor.grad_layout == nullptr) {
    prefetch<param_t>(tensor.grad, begin);
  }
  if (tensor.param_layout == nullptr) {
    prefetch<param_t>(tensor.param, begin);
  }
  prefetch<state_t>(tensor.exp_avg, begin);
  prefetch<state_t>(tensor.exp_avg_sq, begin);
  if (tensor.max_exp_avg_sq != nullptr) {
    prefetch<state_t>(tensor.max_exp_avg_sq, begin);
  }
  if (tensor.critical_sum == nullptr) {
    for (int64_t slot = 0; slot < tensor.capacity; ++slot) {
      prefetch<state_t>(tensor.critical_buffer, slot * tensor.numel + begin);
    }
  } else {
    prefetch<state_t>(tensor.critical_sum, begin);
    if (tensor.slot != kNoSlot) {
      prefetch<state_t>(tensor.critical_buffer, tensor.slot * tensor.numel + begin);
    }
  }
}

template <typename state_t, typename param_t, bool kCriticalGradients>
double step_chunk(const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  alignas(64) state_t grad_scratch[kBlockSize];
  alignas(64) state_t param_scratch[kBlockSize];
  alignas(64) state_t sum_scratch[kBlockSize];
  const Scalars<state_t> scalars(tensor, options);
  auto* const param_data = static_cast<param_t*>(tensor.param);
  const auto* const grad_data = static_cast<const param_t*>(tensor.grad);
  const bool amsgrad = tensor.max_exp_avg_sq != nullptr;
  const auto update =
      amsgrad
          ? (options.eps_inside_sqrt ? &update_block<kCriticalGradients, true, true, state_t>
                                     : &update_block<kCriticalGradients, true, false, state_t>)
          : (options.eps_inside_sqrt ? &update_block<kCriticalGradients, false, true, state_t>
                                     : &update_block<kCriticalGradients, false, false, state_t>);
  SquareSum squares;
  const int64_t chunk_end = std::min((chunk + 1) * kChunkSize, tensor.numel);
  for (int64_t begin = chunk * kChunkSize; begin < chunk_end; begin += kBlockSize) {
    const int64_t n = std::min(kBlockSize, chunk_end - begin);
    prefetch_block<state_t, param_t>(tensor, begin + kPrefetchDistance);
    state_t* param = load_block(param_data, tensor.param_layout.get(), begin, n, param_scratch);
    const state_t* g = load_block(grad_data, tensor.grad_layout.get(), begin, n, grad_scratch);
    g = effective_gradient(g, param, n, options, grad_scratch);
    state_t* exp_avg = static_cast<state_t*>(tensor.exp_avg) + begin;
    const auto buffer = buffer_block<state_t>(tensor, chunk, begin);
    const state_t* sum;
    if constexpr (kCriticalGradients) {
      sum = sum_then_commit(tensor, buffer, g, n, sum_scratch);
    } else {
      squares.add(g, n);
      sum = commit_then_sum<state_t>(tensor, buffer, exp_avg, n, sum_scratch);
    }
    update(scalars, n, g, sum, exp_avg, static_cast<state_t*>(tensor.exp_avg_sq) + begin,
        amsgrad ? static_cast<state_t*>(tensor.max_exp_avg_sq) + begin : nullptr, param);
    store_block(param_data, tensor.param_layout.get(), begin, n, param);
  }
  return squares.total();
}

template <typename state_t, typename param_t>
double sq_norm_chunk(const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  alignas(64) state_t grad_scratch[kBlockSize];
  alignas(64) state_t param_scratch[kBlockSize];
  SquareSum squares;
  const int64_t chunk_end = std::min((chunk + 1) * kChunkSize, tensor.numel);
  for (int64_t begin = chunk * kChunkSize; begin < chunk_end; begin += kBlockSize) {
    const int64_t n = std::min(kBlockSize, chunk_end - begin);
    const state_t* param = nullptr;
    if (adds_l2_term(options)) {
      param = load_block(static_cast<const param_t*>(tensor.param), tensor.param_layout.get(),
          begin, n, param_scratch);
    }
    const state_t* g = load_block(
        static_cast<const param_t*>(tensor.grad), tensor.grad_layout.get(), begin, n, grad_scratch);
    squares.add(effective_gradient(g, param, n, options, grad_scratch), n);
  }
  return squares.total();
}

template <typename state_t>
double commit_chunk(const TensorStep& tensor, int64_t chunk) {
  const int64_t chunk_end = std::min((chunk + 1) * kChunkSize, tensor.numel);
  for (int64_t begin = chunk * kChunkSize; begin < chunk_end; begin += kBlockSize) {
    const int64_t n = std::min(kBlockSize, chunk_end - begin);
    const auto buffer = buffer_block<state_t>(tensor, chunk, begin);
    put_in_slot(static_cast<const state_t*>(tensor.exp_avg) + begin, buffer.slot, buffer.sum, n);
  }
  return 0.0;
}

// Calls visit with a value of the state's type and one of the parameter's.
template <typename Visit>
inline double dispatch(ParamDtype dtype, Visit visit) {
  switch (dtype) {
    case ParamDtype::kFloat64:
      return visit(double{}, double{});
    case ParamDtype::kBFloat16:
      return visit(float{}, c10::BFloat16{});
    case ParamDtype::kFloat16:
      return visit(float{}, c10::Half{});
    case ParamDtype::kFloat32:
      break;
  }
  return visit(float{}, float{});
}

template <bool kCriticalGradients>
double step(const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  return dispatch(tensor.dtype, [&](auto state, auto param) {
    return step_chunk<decltype(state), decltype(param), kCriticalGradients>(tensor, options, chunk);
  });
}

double sq_norm(const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  return dispatch(tensor.dtype, [&](auto state, auto param) {
    return sq_norm_chunk<decltype(state), decltype(param)>(tensor, options, chunk);
  });
}

double commit(const TensorStep& tensor, const StepOptions&, int64_t chunk) {
  return dispatch(
      tensor.dtype, [&](auto state, auto) { return commit_chunk<decltype(state)>(tensor, chunk); });
}

}  // namespace cm_fused::CM_FUSED_ISA

namespace cm_fused {

const Kernels CM_FUSED_KERNELS = {CM_FUSED_ISA_NAME, &CM_FUSED_ISA::step<false>,
    &CM_FUSED_ISA::step<true>, &CM_FUSED_ISA::sq_norm, &CM_FUSED_ISA::commit};

}  // namespace cm_fused
