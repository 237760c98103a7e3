// The CPU step over one chunk of one tensor, written once and compiled once per instruction set:
// each including file sets the target and names the namespace CM_FUSED_ISA. Loops are plain and
// branch-free for the vectorizer; no operation may be contracted or reordered, so every
// instruction set gives the same bits.
//
// No include guard: it is meant to be included once per translation unit, after step.h.
#include "element_kernel.h"

// This uses it.
#include "vector_kernel.h"

// These use both.
#include "block_kernel.h"
#include "gradient_kernel.h"
#include "moments_kernel.h"
#include "philox_kernel.h"
#include "slots_kernel.h"
#include "update_kernel.h"

namespace cm_fused::CM_FUSED_ISA {

inline void prefetch(const void* data, int64_t begin, int64_t element_bytes) {
  const char* const first = static_cast<const char*>(data) + begin * element_bytes;
  for (int64_t offset = 0; offset < kBlockSize * element_bytes; offset += 64) {
    __builtin_prefetch(first + offset, 0, 2);
  }
}

// Asks for the kBlockSize elements at `begin` of every stream a step reads: they are more than the
// hardware follows by itself.
template <typename state_t, typename param_t>
inline void prefetch_block(const TensorStep& tensor, int64_t begin) {
  if (begin + kBlockSize > tensor.numel) {
    return;
  }
  if (tensor.grad_layout == nullptr) {
    prefetch(tensor.grad, begin, sizeof(param_t));
  }
  if (tensor.param_layout == nullptr) {
    prefetch(tensor.param, begin, sizeof(param_t));
  }
  const int64_t moment_bytes = stored_bytes(tensor.moment_dtype, sizeof(state_t));
  prefetch(tensor.exp_avg, begin, moment_bytes);
  prefetch(tensor.exp_avg_sq, begin, moment_bytes);
  if (tensor.max_exp_avg_sq != nullptr) {
    prefetch(tensor.max_exp_avg_sq, begin, sizeof(state_t));
  }
  const int64_t slot_bytes = stored_bytes(tensor.slot_dtype, sizeof(state_t));
  if (tensor.critical_sum == nullptr) {
    for (int64_t slot = 0; slot < tensor.capacity; ++slot) {
      prefetch(tensor.critical_buffer, slot * tensor.numel + begin, slot_bytes);
    }
  } else {
    prefetch(tensor.critical_sum, begin, sizeof(state_t));
    if (tensor.slot != kNoSlot) {
      prefetch(tensor.critical_buffer, tensor.slot * tensor.numel + begin, slot_bytes);
    }
  }
}

// One chunk's step, a block at a time.
template <typename state_t, typename param_t, bool kCriticalGradients>
class ChunkStep {
 public:
  ChunkStep(const TensorStep& tensor, const StepOptions& options, int64_t chunk)
      : tensor_(tensor), options_(options), chunk_(chunk), scalars_(tensor, options) {}

  // Returns the sum of g^2, of critical momenta.
  double run() {
    const int64_t block_size = block_size_of(tensor_, options_);
    const int64_t end = std::min((chunk_ + 1) * kChunkSize, tensor_.numel);
    for (int64_t begin = chunk_ * kChunkSize; begin < end; begin += block_size) {
      for (int64_t part = 0; part < block_size; part += kBlockSize) {
        prefetch_block<state_t, param_t>(tensor_, begin + part + kPrefetchDistance);
      }
      const int64_t n = std::min(block_size, end - begin);
      if constexpr (std::is_same_v<state_t, float>) {
        if (n == kLargestBlock) {
          step(begin, std::integral_constant<int64_t, kLargestBlock>{});
          continue;
        }
        if (n == kBlockSize) {
          step(begin, Part{});
          continue;
        }
      }
      step(begin, n);
    }
    return squares_.total();
  }

 private:
  static constexpr bool kHalf =
      std::is_same_v<param_t, c10::BFloat16> || std::is_same_v<param_t, c10::Half>;
  using Part = std::integral_constant<int64_t, kBlockSize>;

  // What an update changes of one block, in the update's type.
  struct Block {
    state_t* exp_avg;
    state_t* exp_avg_sq;
    state_t* max_exp_avg_sq;  // nullptr without amsgrad
    state_t* param;
  };

  template <typename Count>
  void step(int64_t begin, Count n) {
    auto* const param_data = static_cast<param_t*>(tensor_.param);
    state_t* param = load_block(param_data, tensor_.param_layout.get(), begin, n, param_scratch_);
    const state_t* g = load_block(static_cast<const param_t*>(tensor_.grad),
        tensor_.grad_layout.get(), begin, n, grad_scratch_);
    g = effective_gradient(g, param, n, options_, grad_scratch_);
    state_t* exp_avg = load_moment<true>(
        tensor_, tensor_.exp_avg, tensor_.exp_avg_scales, begin, n, exp_avg_scratch_);
    state_t* exp_avg_sq = load_moment<false>(
        tensor_, tensor_.exp_avg_sq, tensor_.exp_avg_sq_scales, begin, n, exp_avg_sq_scratch_);
    const Block block{exp_avg, exp_avg_sq,
        tensor_.max_exp_avg_sq == nullptr ? nullptr
                                          : static_cast<state_t*>(tensor_.max_exp_avg_sq) + begin,
        param};
    with_buffer_block<state_t>(tensor_, chunk_, begin, n, [&](const auto& buffer) {
      if constexpr (kCriticalGradients) {
        const state_t* sum = buffer.sum_then_commit(g, sum_scratch_);
        g = with_late_l2_term(g, param, n);
        add_compensation<state_t, param_t>(tensor_, begin, n, param);
        update(block, 0, n, g, sum);
      } else {
        add_compensation<state_t, param_t>(tensor_, begin, n, param);
        buffer.commit_before_sum(exp_avg);
        for_each_part(n, [&](int64_t at, auto count) {
          squares_.add(g + at, count);
          update(block, at, count, g + at, buffer.sum_of(at, count, sum_scratch_));
        });
      }
    });
    store_moments(begin, n, exp_avg, exp_avg_sq);
    store_param(begin, n, param_data, param);
  }

  // Calls visit(at, count) for a block's parts. The sum of a whole block of low precision before
  // its update took longer: two cores of a Zen 3, 30 M elements, C = 5, in parts 0.83 of the time
  // with bfloat16 slots, 0.87 with int8; but in cache 1.18 and 1.08.
  template <typename Count, typename Visit>
  static void for_each_part(Count n, Visit visit) {
    const int64_t whole = n / kBlockSize * kBlockSize;
    for (int64_t at = 0; at < whole; at += kBlockSize) {
      visit(at, Part{});
    }
    if (whole < n) {
      visit(whole, n - whole);
    }
  }

  // The update of `count` elements of a block from `at`, of which g and sum are.
  template <typename Count>
  void update(
      const Block& block, int64_t at, Count count, const state_t* g, const state_t* sum) const {
    const bool amsgrad = block.max_exp_avg_sq != nullptr;
    const auto function =
        update_function<state_t, kCriticalGradients, Count>(amsgrad, options_.eps_inside_sqrt);
    function(scalars_, count, g, sum, block.exp_avg + at, block.exp_avg_sq + at,
        amsgrad ? block.max_exp_avg_sq + at : nullptr, block.param + at);
  }

  // The gradient with the L2 term that is no part of what was stored.
  template <typename Count>
  const state_t* with_late_l2_term(const state_t* g, const state_t* param, Count n) {
    if (!options_.l2_in_aggregate || !has_l2_term(options_)) {
      return g;
    }
    const state_t weight_decay = static_cast<state_t>(options_.weight_decay);
    for (int64_t i = 0; i < n; ++i) {
      grad_scratch_[i] = g[i] + weight_decay * param[i];
    }
    return grad_scratch_;
  }

  template <typename Count>
  void store_moments(int64_t begin, Count n, const state_t* exp_avg, const state_t* exp_avg_sq) {
    if (tensor_.moment_dtype == StoredDtype::kUnchanged) {
      return;
    }
    random_words(tensor_, options_, begin, Stream::kMoments, words_);
    store_moment<true>(tensor_, tensor_.exp_avg, tensor_.exp_avg_scales, begin, n, exp_avg, words_);
    store_moment<false>(
        tensor_, tensor_.exp_avg_sq, tensor_.exp_avg_sq_scales, begin, n, exp_avg_sq, words_);
  }

  template <typename Count>
  void store_param(int64_t begin, Count n, param_t* data, state_t* param) {
    if constexpr (kHalf) {
      if (options_.stochastic_update) {
        random_words(tensor_, options_, begin, Stream::kParam, words_);
        round_stochastically<state_t, param_t>(words_, n, param);
      }
    }
    store_block(data, tensor_.param_layout.get(), begin, n, param);
    if constexpr (kHalf) {
      keep_compensation<state_t, param_t>(tensor_, begin, n, param);
    }
  }

  const TensorStep& tensor_;
  const StepOptions& options_;
  const int64_t chunk_;
  const Scalars<state_t> scalars_;
  SquareSum squares_;
  // Blocks in the update's type, where the tensors themselves are not.
  alignas(64) state_t grad_scratch_[kLargestBlock];
  alignas(64) state_t param_scratch_[kLargestBlock];
  alignas(64) state_t sum_scratch_[kLargestBlock];
  alignas(64) state_t exp_avg_scratch_[kLargestBlock];
  alignas(64) state_t exp_avg_sq_scratch_[kLargestBlock];
  alignas(64) uint32_t words_[kLargestBlock];
};

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
  alignas(64) state_t scratch[kLargestBlock];
  const int64_t chunk_end = std::min((chunk + 1) * kChunkSize, tensor.numel);
  for (int64_t begin = chunk * kChunkSize; begin < chunk_end; begin += kLargestBlock) {
    const int64_t n = std::min(kLargestBlock, chunk_end - begin);
    const state_t* item =
        load_moment<true>(tensor, tensor.exp_avg, tensor.exp_avg_scales, begin, n, scratch);
    with_buffer_block<state_t>(
        tensor, chunk, begin, n, [&](const auto& buffer) { buffer.commit(item); });
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
    return ChunkStep<decltype(state), decltype(param), kCriticalGradients>(tensor, options, chunk)
        .run();
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
