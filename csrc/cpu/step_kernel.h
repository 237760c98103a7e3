// The CPU step over one chunk of one tensor, written once and compiled once per instruction set:
// each including file sets the target and names the namespace CM_FUSED_ISA. No operation may be
// contracted or reordered, so every instruction set gives the same bits.
//
// No include guard: it is meant to be included once per translation unit, after step.h.
#include "vector_kernel.h"

// This uses it.
#include "element_kernel.h"

// This uses both.
#include "conversion_kernel.h"

// These use them.
#include "block_kernel.h"
#include "gradient_kernel.h"
#include "moments_kernel.h"
#include "philox_kernel.h"
#include "prefetch_kernel.h"
#include "slots_kernel.h"
#include "update_kernel.h"

// This uses all of these.
#include "range_kernel.h"

namespace cm_fused::CM_FUSED_ISA {

// One chunk's step: all of it at once where the tensors are as the step computes, else a block at a
// time, of which copies are made.
template <bool kCriticalGradients, typename state_t, typename param_t, typename SlotCode,
    typename MomentCode>
class ChunkStep {
 public:
  ChunkStep(const TensorStep& tensor, const StepOptions& options, int64_t chunk)
      : tensor_(tensor), options_(options), chunk_(chunk), scalars_(tensor, options) {}

  // Returns the sum of g^2, of critical momenta.
  double run() {
    const int64_t size = range_size();
    const int64_t end = std::min((chunk_ + 1) * kChunkSize, tensor_.numel);
    for (int64_t begin = chunk_ * kChunkSize; begin < end; begin += size) {
      const int64_t n = std::min(size, end - begin);
      if (copies_data()) {
        for (int64_t at = 0; at < n; at += kBlockSize) {
          prefetch_block<state_t, param_t>(tensor_, begin + at + kPrefetchDistance);
        }
      }
      step(begin, n);
    }
    return squares_.total();
  }

 private:
  using moment_t = typename MomentCode::stored_t;
  static constexpr bool kHalf =
      std::is_same_v<param_t, c10::BFloat16> || std::is_same_v<param_t, c10::Half>;

  using DataRange = Range<state_t, moment_t>;

  bool has_int8_moments() const {
    return tensor_.moment_dtype == StoredDtype::kInt8;
  }

  bool copies_data() const {
    return kHalf || tensor_.param_layout != nullptr || tensor_.grad_layout != nullptr;
  }

  bool makes_words_by_tiles() const {
    return !has_int8_moments() && has_own_counters(tensor_.places);
  }

  // Elements of which copies are made at a time: a block of what has scales or random words, else
  // few, so that the streams run side by side.
  int64_t range_size() const {
    const bool rounds_moments = tensor_.moment_dtype != StoredDtype::kUnchanged;
    if (rounds_moments && !makes_words_by_tiles()) {
      return kLargestBlock;
    }
    if (!copies_data()) {
      return kChunkSize;
    }
    return SlotCode::kScaled || rounds_moments || options_.stochastic_update ? kLargestBlock
                                                                             : kBlockSize;
  }

  void step(int64_t begin, int64_t n) {
    auto* const param_data = static_cast<param_t*>(tensor_.param);
    state_t* const param =
        load_block(param_data, tensor_.param_layout.get(), begin, n, param_scratch_);
    DataRange range = range_of_moments(begin, n);
    range.grad = load_block(static_cast<const param_t*>(tensor_.grad), tensor_.grad_layout.get(),
        begin, n, grad_scratch_);
    range.param = param;
    if (tensor_.max_exp_avg_sq != nullptr) {
      range.max_exp_avg_sq = static_cast<state_t*>(tensor_.max_exp_avg_sq) + begin;
    }
    if (copies_data()) {
      range.stored_g = effective_gradient(range.grad, param, n, options_, grad_scratch_);
      range.update_g = with_late_l2_term(range.stored_g, param, n, options_, late_grad_scratch_);
      add_compensation<state_t, param_t>(tensor_, begin, n, param);
    }
    step_range<kCriticalGradients, SlotCode, MomentCode>(
        tensor_, options_, chunk_, scalars_, range, squares_);
    if (has_int8_moments()) {
      store_int8_moments(range);
    }
    if (copies_data()) {
      store_param(begin, n, param_data, param);
    }
  }

  // With the moments, and the words for them that tiles don't make.
  DataRange range_of_moments(int64_t begin, int64_t n) {
    DataRange range{};
    range.begin = begin;
    range.n = n;
    if constexpr (std::is_same_v<moment_t, float>) {
      if (has_int8_moments()) {
        load_moment<true>(tensor_.exp_avg, tensor_.exp_avg_scales, begin, n, exp_avg_scratch_);
        load_moment<false>(
            tensor_.exp_avg_sq, tensor_.exp_avg_sq_scales, begin, n, exp_avg_sq_scratch_);
        range.exp_avg = exp_avg_scratch_;
        range.exp_avg_sq = exp_avg_sq_scratch_;
        return range;
      }
    }
    range.exp_avg = static_cast<moment_t*>(tensor_.exp_avg) + begin;
    range.exp_avg_sq = static_cast<moment_t*>(tensor_.exp_avg_sq) + begin;
    if (tensor_.moment_dtype == StoredDtype::kBFloat16 && !makes_words_by_tiles()) {
      random_words(tensor_, options_, begin, Stream::kMoments, words_);
      range.words = words_;
    }
    return range;
  }

  void store_int8_moments(const DataRange& range) {
    if constexpr (std::is_same_v<moment_t, float>) {
      random_words(tensor_, options_, range.begin, Stream::kMoments, words_);
      store_moment<true>(
          tensor_.exp_avg, tensor_.exp_avg_scales, range.begin, range.n, range.exp_avg, words_);
      store_moment<false>(tensor_.exp_avg_sq, tensor_.exp_avg_sq_scales, range.begin, range.n,
          range.exp_avg_sq, words_);
    }
  }

  void store_param(int64_t begin, int64_t n, param_t* data, state_t* param) {
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
  // Copies in the update's type, and the words of a block.
  alignas(64) state_t grad_scratch_[kLargestBlock];
  alignas(64) state_t late_grad_scratch_[kLargestBlock];
  alignas(64) state_t param_scratch_[kLargestBlock];
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

// Only the deferred commit of a chunk.
template <typename state_t, typename SlotCode>
class ChunkCommit {
 public:
  ChunkCommit(const TensorStep& tensor, int64_t chunk) : tensor_(tensor), chunk_(chunk) {}

  void run() {
    const int64_t chunk_end = std::min((chunk_ + 1) * kChunkSize, tensor_.numel);
    for (int64_t begin = chunk_ * kChunkSize; begin < chunk_end; begin += kLargestBlock) {
      commit(begin, std::min(kLargestBlock, chunk_end - begin));
    }
  }

 private:
  void commit(int64_t begin, int64_t n) {
    const state_t* const item = as_state(begin, n);
    Buffer<state_t, SlotCode> buffer(tensor_, chunk_, begin);
    buffer.find_scale(item, n);
    buffer.set_scale();
    int64_t at = 0;
    for (; at + kWidth<Vector<state_t>> <= n; at += kWidth<Vector<state_t>>) {
      const Vector<state_t> values[] = {load_vector<Vector<state_t>>(item + at)};
      buffer.put(at, values);
    }
    for (; at < n; ++at) {
      const state_t values[] = {item[at]};
      buffer.put(at, values);
    }
  }

  // exp_avg in the update's type.
  const state_t* as_state(int64_t begin, int64_t n) {
    if constexpr (std::is_same_v<state_t, float>) {
      if (tensor_.moment_dtype == StoredDtype::kInt8) {
        load_moment<true>(tensor_.exp_avg, tensor_.exp_avg_scales, begin, n, scratch_);
        return scratch_;
      }
      if (tensor_.moment_dtype == StoredDtype::kBFloat16) {
        return load_block(
            static_cast<const c10::BFloat16*>(tensor_.exp_avg), nullptr, begin, n, scratch_);
      }
    }
    return static_cast<const state_t*>(tensor_.exp_avg) + begin;
  }

  const TensorStep& tensor_;
  const int64_t chunk_;
  alignas(64) state_t scratch_[kLargestBlock];
};

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
    using state_t = decltype(state);
    return with_slot_code<state_t>(tensor.slot_dtype, [&](auto slot_code) {
      return with_moment_code<state_t>(tensor.moment_dtype, [&](auto moment_code) {
        return ChunkStep<kCriticalGradients, state_t, decltype(param), decltype(slot_code),
            decltype(moment_code)>(tensor, options, chunk)
            .run();
      });
    });
  });
}

double sq_norm(const TensorStep& tensor, const StepOptions& options, int64_t chunk) {
  return dispatch(tensor.dtype, [&](auto state, auto param) {
    return sq_norm_chunk<decltype(state), decltype(param)>(tensor, options, chunk);
  });
}

double commit(const TensorStep& tensor, const StepOptions&, int64_t chunk) {
  dispatch(tensor.dtype, [&](auto state, auto) {
    return with_slot_code<decltype(state)>(tensor.slot_dtype, [&](auto slot_code) {
      ChunkCommit<decltype(state), decltype(slot_code)>(tensor, chunk).run();
      return 0.0;
    });
  });
  return 0.0;
}

}  // namespace cm_fused::CM_FUSED_ISA

namespace cm_fused {

const Kernels CM_FUSED_KERNELS = {CM_FUSED_ISA_NAME, &CM_FUSED_ISA::step<false>,
    &CM_FUSED_ISA::step<true>, &CM_FUSED_ISA::sq_norm, &CM_FUSED_ISA::commit};

}  // namespace cm_fused
