// The CPU step over one chunk of one tensor, written once and compiled once per instruction set:
// each including file names the target and the namespace CM_FUSED_ISA. No operation may be
// contracted or reordered, so every instruction set gives the same bits.
//
// No include guard: it is included once per translation unit, and the other headers here are its
// parts, in the order in which they use each other.
#include "../step.h"

#if defined(CM_FUSED_TARGET)
#define CM_FUSED_STRING_PRAGMA(text) _Pragma(#text)
#define CM_FUSED_PRAGMA(text) CM_FUSED_STRING_PRAGMA(text)
#if defined(__clang__)
CM_FUSED_PRAGMA(clang attribute push(__attribute__((target(CM_FUSED_TARGET))), apply_to = function))
#else
CM_FUSED_PRAGMA(GCC push_options)
CM_FUSED_PRAGMA(GCC target(CM_FUSED_TARGET))
#endif
#endif

namespace cm_fused::CM_FUSED_ISA {

// clang-format off
#include "vector.h"
#include "element.h"
#include "conversion.h"
#include "block.h"
#include "gradient.h"
#include "philox.h"
#include "update.h"
#include "moments.h"
#include "slots.h"
#include "copies.h"
#include "range.h"
// clang-format on

// One chunk's step: all of it at once where tiles read the tensors themselves, else a block at a
// time, of which copies are made.
template <typename state_t>
class ChunkStep {
 public:
  ChunkStep(
      const TensorStep& tensor, const StepOptions& options, bool critical_gradients, int64_t chunk)
      : tensor_(tensor),
        options_(options),
        step_range_(
            critical_gradients ? find_step_range<true>(tensor) : find_step_range<false>(tensor)),
        chunk_(chunk),
        rebuilds_sum_(rebuilds_sum(tensor, chunk)),
        scalars_(tensor, options),
        gradients_(options),
        copies_(tensor, options) {}

  // Returns the sum of g^2, of critical momenta.
  CompensatedSum<double> run() {
    // A block at a time of what is copied, or whose words are made by blocks.
    const bool by_blocks = copies_.are_needed() || makes_words();
    const int64_t size = by_blocks ? kLargestBlock : kChunkSize;
    const int64_t end = std::min((chunk_ + 1) * kChunkSize, tensor_.numel);
    for (int64_t begin = chunk_ * kChunkSize; begin < end; begin += size) {
      step(begin, std::min(size, end - begin));
    }
    if (options_.past_cache) {
      order_stores_past_cache();
    }
    return {squares_.total()};
  }

 private:
  using StepRange = void (*)(const RangeInputs<state_t>&, SquareSum&);

  // Of an element of a parameter or gradient.
  static int64_t data_bytes(ParamDtype dtype) {
    return is_half(dtype) ? 2 : sizeof(state_t);
  }

  bool has_int8_moments() const {
    return tensor_.moment_dtype == StoredDtype::kInt8;
  }

  // Whether words are made for a whole range. Else tiles make those that round to bfloat16.
  bool makes_words() const {
    if (has_int8_moments() || copies_.rounds_stochastically()) {
      return true;
    }
    return tensor_.moment_dtype == StoredDtype::kBFloat16 &&
           !has_own_counters(tensor_.shard_layout, chunk_ * kChunkSize, kChunkSize);
  }

  void step(int64_t begin, int64_t n) {
    Range<state_t> range{};
    range.begin = begin;
    range.n = n;
    range.rebuilds_sum = rebuilds_sum_;
    if (copies_.are_needed()) {
      copies_.load(range);
    } else {
      range.param = static_cast<char*>(tensor_.param) + begin * data_bytes(tensor_.dtype);
      range.param_dtype = tensor_.dtype;
      range.remainder = remainders(tensor_, begin);
      range.grad = static_cast<const char*>(tensor_.grad) + begin * data_bytes(tensor_.grad_dtype);
      range.grad_dtype = tensor_.grad_dtype;
    }
    if (makes_words()) {
      random_words(tensor_, options_, begin, words_);
      range.words = words_;
    }
    set_moments(range);
    step_range_({tensor_, options_, scalars_, gradients_, range}, squares_);
    if (has_int8_moments()) {
      store_int8_moments(range);
    }
    if (copies_.are_needed()) {
      copies_.store(begin, n, words_);
    }
  }

  // The function for this kind of step.
  template <bool kCriticalGradients>
  static StepRange find_step_range(const TensorStep& tensor) {
    return with_slot_code<state_t>(tensor.slot_dtype, [&](auto slot_code) {
      using SlotCode = decltype(slot_code);
      if constexpr (std::is_same_v<state_t, float>) {
        if (tensor.moment_dtype == StoredDtype::kBFloat16) {
          return &step_range<KindOf<kCriticalGradients, SlotCode, true>, state_t>;
        }
      }
      return &step_range<KindOf<kCriticalGradients, SlotCode, false>, state_t>;
    });
  }

  // Sets the moments.
  void set_moments(Range<state_t>& range) {
    if (tensor_.max_exp_avg_sq != nullptr) {
      range.max_exp_avg_sq = static_cast<state_t*>(tensor_.max_exp_avg_sq) + range.begin;
    }
    if constexpr (std::is_same_v<state_t, float>) {
      if (has_int8_moments()) {
        load_moment<true>(tensor_, range.begin, range.n, exp_avg_scratch_);
        load_moment<false>(tensor_, range.begin, range.n, exp_avg_sq_scratch_);
        range.copies_moments = true;
        range.exp_avg = exp_avg_scratch_;
        range.exp_avg_sq = exp_avg_sq_scratch_;
        return;
      }
    }
    const int64_t offset = range.begin * stored_bytes(tensor_.moment_dtype, sizeof(state_t));
    range.exp_avg = static_cast<char*>(tensor_.exp_avg) + offset;
    range.exp_avg_sq = static_cast<char*>(tensor_.exp_avg_sq) + offset;
  }

  void store_int8_moments(const Range<state_t>& range) {
    if constexpr (std::is_same_v<state_t, float>) {
      store_moment<true>(tensor_, range.begin, range.n, exp_avg_scratch_, words_);
      store_moment<false>(tensor_, range.begin, range.n, exp_avg_sq_scratch_, words_);
    }
  }

  const TensorStep& tensor_;
  const StepOptions& options_;
  const StepRange step_range_;
  const int64_t chunk_;
  const bool rebuilds_sum_;
  const Scalars<Vector<state_t>> scalars_;
  const Gradients<state_t> gradients_;
  Copies<state_t> copies_;
  SquareSum squares_;
  alignas(64) state_t exp_avg_scratch_[kLargestBlock];
  alignas(64) state_t exp_avg_sq_scratch_[kLargestBlock];
  alignas(64) uint32_t words_[kLargestBlock];
};

// The sum of g^2 of elements from `begin` to `end`; of float64 gradients it is rounded once.
template <typename state_t>
double sq_norm_part(
    const TensorStep& tensor, const StepOptions& options, int64_t begin, int64_t end) {
  alignas(64) state_t grad_scratch[kLargestBlock];
  alignas(64) state_t param_scratch[kLargestBlock];
  const Gradients<state_t> gradients(options);
  std::conditional_t<std::is_same_v<state_t, double>, CompensatedSquareSum, SquareSum> squares;
  for (; begin < end; begin += kLargestBlock) {
    const int64_t n = std::min(kLargestBlock, end - begin);
    const state_t* const g = load_grad(tensor, begin, n, grad_scratch);
    const state_t* param = nullptr;
    if (gradients.adds_l2_term()) {
      with_param_type<state_t>(tensor.dtype, [&](auto type) {
        using param_t = decltype(type);
        param = load_block(static_cast<const param_t*>(tensor.param), tensor.param_layout.get(),
            begin, n, param_scratch);
        if constexpr (std::is_same_v<param_t, c10::BFloat16>) {
          join_master(tensor, begin, n, param_scratch);
        }
      });
    }
    squares.add(gradients.effective(g, param, n, grad_scratch), n);
  }
  return squares.total();
}

template <typename state_t>
CompensatedSum<double> sq_norm_chunk(
    const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  const int64_t chunk_end = std::min((chunk + 1) * kChunkSize, tensor.numel);
  CompensatedSum<double> sum;
  for (int64_t begin = chunk * kChunkSize; begin < chunk_end; begin += kNormSize) {
    const int64_t end = std::min(begin + kNormSize, chunk_end);
    sum.add(sq_norm_part<state_t>(tensor, options, begin, end));
  }
  return sum;
}

// A block of exp_avg in the update's type.
template <typename state_t>
inline const state_t* exp_avg_block(
    const TensorStep& tensor, int64_t begin, int64_t n, state_t* scratch) {
  if constexpr (std::is_same_v<state_t, float>) {
    if (tensor.moment_dtype == StoredDtype::kInt8) {
      load_moment<true>(tensor, begin, n, scratch);
      return scratch;
    }
    if (tensor.moment_dtype == StoredDtype::kBFloat16) {
      return load_block(
          static_cast<const c10::BFloat16*>(tensor.exp_avg), nullptr, begin, n, scratch);
    }
  }
  return static_cast<const state_t*>(tensor.exp_avg) + begin;
}

// Only the deferred commit of a chunk.
template <typename state_t>
CompensatedSum<double> commit_chunk(const TensorStep& tensor, int64_t chunk) {
  alignas(64) state_t scratch[kLargestBlock];
  const int64_t chunk_end = std::min((chunk + 1) * kChunkSize, tensor.numel);
  for (int64_t begin = chunk * kChunkSize; begin < chunk_end; begin += kLargestBlock) {
    const int64_t n = std::min(kLargestBlock, chunk_end - begin);
    const state_t* const item = exp_avg_block(tensor, begin, n, scratch);
    with_slot_code<state_t>(tensor.slot_dtype, [&](auto slot_code) {
      Buffer<state_t> buffer(slot_code, tensor, rebuilds_sum(tensor, chunk), false, begin);
      buffer.find_scale(slot_code, item, n);
      buffer.set_scale();
      int64_t at = 0;
      for (; at + kWidth<Vector<state_t>> <= n; at += kWidth<Vector<state_t>>) {
        const Vector<state_t> values[] = {load_vector<Vector<state_t>>(item + at)};
        buffer.commit(slot_code, at, values);
      }
      for (; at < n; ++at) {
        const state_t values[] = {item[at]};
        buffer.commit(slot_code, at, values);
      }
    });
  }
  return {};
}

// Calls visit with a value of the state's type.
template <typename Visit>
inline CompensatedSum<double> with_state_type(ParamDtype dtype, Visit visit) {
  return dtype == ParamDtype::kFloat64 ? visit(double{}) : visit(float{});
}

template <bool kCriticalGradients>
CompensatedSum<double> step(const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  return with_state_type(tensor.dtype, [&](auto state) {
    return ChunkStep<decltype(state)>(tensor, options, kCriticalGradients, chunk).run();
  });
}

CompensatedSum<double> sq_norm(
    const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  return with_state_type(tensor.dtype,
      [&](auto state) { return sq_norm_chunk<decltype(state)>(tensor, options, chunk); });
}

CompensatedSum<double> commit(const TensorStep& tensor, const StepOptions&, int64_t chunk) {
  return with_state_type(
      tensor.dtype, [&](auto state) { return commit_chunk<decltype(state)>(tensor, chunk); });
}

}  // namespace cm_fused::CM_FUSED_ISA

const cm_fused::Kernels cm_fused::CM_FUSED_KERNELS = {CM_FUSED_ISA_NAME, &CM_FUSED_ISA::step<false>,
    &CM_FUSED_ISA::step<true>, &CM_FUSED_ISA::sq_norm, &CM_FUSED_ISA::commit};

#if defined(CM_FUSED_TARGET) && defined(__clang__)
CM_FUSED_PRAGMA(clang attribute pop)
#elif defined(CM_FUSED_TARGET)
CM_FUSED_PRAGMA(GCC pop_options)
#endif
