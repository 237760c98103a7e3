// Blocks of parameters and gradients: to and from the update's type, in the state's order, and what
// rounding takes from a parameter.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

// Below and in the other parts, `n` is the number of elements of a block: an int64_t, or a
// constant, which saves the loops their remainders.

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

// Sets n consecutive elements, as To stores them, to others, as From restores them; of whole blocks
// by vectors, since GCC 12 leaves float16 to arithmetic: half the time of a step of float16
// parameters with compensation.
template <typename From, typename To>
inline void convert(const typename From::stored_t* from, auto n, typename To::stored_t* to) {
  if constexpr (kConvertsVectors && !std::is_integral_v<decltype(n)>) {
    Vector<float> vectors[2];
    for (int64_t i = 0; i < n; i += std::size(vectors) * kWidth<Vector<float>>) {
      load_vectors<From>(from + i, vectors);
      store_vectors<To>(to + i, vectors);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = To::store(From::load(from[i]));
    }
  }
}

// A block's elements in the state's type: the tensor's own memory where that serves, else a copy
// in `scratch`.
template <typename state_t, typename data_t>
inline auto load_block(data_t* data, const StridedLayout* layout, int64_t begin, auto n,
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
    convert<Halved<std::remove_const_t<data_t>>, Unchanged<state_t>>(data + begin, n, scratch);
    return scratch;
  }
}

// Writes back what load_block copied; nothing to do where it gave the tensor's own memory.
template <typename state_t, typename param_t>
inline void store_block(
    param_t* data, const StridedLayout* layout, int64_t begin, auto n, const state_t* block) {
  if (layout != nullptr) {
    for_each_run(*layout, begin, n, [&](int64_t offset, int64_t at, int64_t count, int64_t stride) {
      for (int64_t i = 0; i < count; ++i) {
        data[offset + i * stride] = store_element<param_t>(block[at + i]);
      }
    });
  } else if constexpr (!std::is_same_v<state_t, param_t>) {
    convert<Unchanged<state_t>, Halved<param_t>>(block, n, data + begin);
  }
}

// What rounding took from the parameter when it was last stored.
template <typename state_t, typename param_t>
inline void add_compensation(const TensorStep& tensor, int64_t begin, auto n, state_t* param) {
  if (tensor.compensation == nullptr) {
    return;
  }
  if constexpr (!std::is_same_v<state_t, param_t>) {
    alignas(64) state_t compensation[kLargestBlock];
    convert<Halved<param_t>, Unchanged<state_t>>(
        static_cast<const param_t*>(tensor.compensation) + begin, n, compensation);
    for (int64_t i = 0; i < n; ++i) {
      param[i] += compensation[i];
    }
  }
}

template <typename state_t, typename param_t>
inline void keep_compensation(
    const TensorStep& tensor, int64_t begin, auto n, const state_t* param) {
  if (tensor.compensation == nullptr) {
    return;
  }
  alignas(64) param_t stored[kLargestBlock];
  alignas(64) state_t compensation[kLargestBlock];
  convert<Unchanged<state_t>, Halved<param_t>>(param, n, stored);
  convert<Halved<param_t>, Unchanged<state_t>>(stored, n, compensation);
  for (int64_t i = 0; i < n; ++i) {
    compensation[i] = param[i] - compensation[i];
  }
  convert<Unchanged<state_t>, Halved<param_t>>(
      compensation, n, static_cast<param_t*>(tensor.compensation) + begin);
}

// Rounds a block to values of param_t, so that storing them loses nothing more.
template <typename state_t, typename param_t>
inline void round_stochastically(const uint32_t* words, auto n, state_t* param) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<param_t, c10::BFloat16>) {
      param[i] = bit_cast<float>(bfloat16_bits(param[i], words[i] >> 16) & 0xFFFF0000U);
    } else {
      param[i] = round_to_float16(param[i], words[i] >> 16);
    }
  }
}

}  // namespace cm_fused::CM_FUSED_ISA
