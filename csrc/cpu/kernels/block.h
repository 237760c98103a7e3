// Blocks of parameters and gradients: to and from the update's type, in the state's order, and what
// rounding takes from a parameter. And asking for memory ahead of its use.

// Asks for n elements of a stream.
template <typename stored_t>
CM_FUSED_INLINE void prefetch(const stored_t* data, int64_t n) {
  const auto* const first = reinterpret_cast<const char*>(data);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(stored_t));
  for (int64_t offset = 0; offset < bytes; offset += 64) {
    __builtin_prefetch(first + offset, 0, 2);
  }
}

// Asks for n elements of a tensor's stream, kPrefetchDistance after element `begin`, which `data`
// points to, if it has them.
template <typename stored_t>
CM_FUSED_INLINE void prefetch_ahead(
    const TensorStep& tensor, const stored_t* data, int64_t begin, int64_t n) {
  if (begin + kPrefetchDistance + n <= tensor.numel) {
    prefetch(data + kPrefetchDistance, n);
  }
}

// Below and in the other parts, `n` is the number of elements of a block: an int64_t, or a
// constant, which saves the loops their remainders.

// Calls visit with n, as a constant for whole blocks.
template <typename Visit>
CM_FUSED_INLINE void with_block_size(int64_t n, Visit visit) {
  if (n == kLargestBlock) {
    visit(std::integral_constant<int64_t, kLargestBlock>{});
  } else {
    visit(n);
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

// Sets n consecutive elements, as To stores them, to others, as From restores them.
template <typename From, typename To>
[[gnu::noinline]] void convert_elements(
    const typename From::stored_t* from, int64_t n, typename To::stored_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = To::store(From::load(from[i]));
  }
}

// As that; whole blocks by vectors, since GCC 12 leaves float16 to arithmetic: half the time of a
// step of float16 parameters with compensation.
template <typename From, typename To>
CM_FUSED_INLINE void convert(
    const typename From::stored_t* from, int64_t n, typename To::stored_t* to) {
  if (!kConvertsVectors || n != kLargestBlock) {
    convert_elements<From, To>(from, n, to);
    return;
  }
  Vector<float> vectors[2];
  for (int64_t i = 0; i < kLargestBlock; i += std::size(vectors) * kWidth<Vector<float>>) {
    load_vectors<From>(from + i, vectors);
    store_vectors<To>(to + i, vectors);
  }
}

// Copies what lies otherwise in memory than the state, in the state's type, to `scratch`.
template <typename state_t, typename data_t>
[[gnu::noinline]] void copy_runs(
    const data_t* data, const StridedLayout& layout, int64_t begin, int64_t n, state_t* scratch) {
  for_each_run(layout, begin, n, [&](int64_t offset, int64_t at, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      scratch[at + i] = DataCode<state_t, data_t>::load(data[offset + i * stride]);
    }
  });
}

// Writes such a copy back.
template <typename state_t, typename data_t>
[[gnu::noinline]] void store_runs(
    data_t* data, const StridedLayout& layout, int64_t begin, int64_t n, const state_t* block) {
  for_each_run(layout, begin, n, [&](int64_t offset, int64_t at, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      data[offset + i * stride] = DataCode<state_t, data_t>::store(block[at + i]);
    }
  });
}

// A block's elements in the state's type: the tensor's own memory where that serves, else a copy
// in `scratch`.
template <typename state_t, typename data_t>
CM_FUSED_INLINE auto load_block(data_t* data, const StridedLayout* layout, int64_t begin, int64_t n,
    state_t* scratch) -> std::conditional_t<std::is_const_v<data_t>, const state_t*, state_t*> {
  using value_t = std::remove_const_t<data_t>;
  if (layout != nullptr) {
    copy_runs<state_t, value_t>(data, *layout, begin, n, scratch);
  } else if constexpr (std::is_same_v<state_t, value_t>) {
    return data + begin;
  } else {
    convert<Halved<value_t>, Unchanged<state_t>>(data + begin, n, scratch);
  }
  return scratch;
}

// Writes back what load_block copied; nothing to do where it gave the tensor's own memory.
template <typename state_t, typename param_t>
CM_FUSED_INLINE void store_block(
    param_t* data, const StridedLayout* layout, int64_t begin, int64_t n, const state_t* block) {
  if (layout != nullptr) {
    store_runs<state_t, param_t>(data, *layout, begin, n, block);
  } else if constexpr (!std::is_same_v<state_t, param_t>) {
    convert<Unchanged<state_t>, Halved<param_t>>(block, n, data + begin);
  }
}

// What rounding took from the parameter when it was last stored.
template <typename state_t, typename param_t>
inline void add_compensation(const TensorStep& tensor, int64_t begin, int64_t n, state_t* param) {
  if (tensor.compensation == nullptr) {
    return;
  }
  if constexpr (!std::is_same_v<state_t, param_t>) {
    alignas(64) state_t compensation[kLargestBlock];
    convert<Halved<param_t>, Unchanged<state_t>>(
        static_cast<const param_t*>(tensor.compensation) + begin, n, compensation);
    with_block_size(n, [&](auto size) {
      for (int64_t i = 0; i < size; ++i) {
        param[i] += compensation[i];
      }
    });
  }
}

template <typename state_t, typename param_t>
inline void keep_compensation(
    const TensorStep& tensor, int64_t begin, int64_t n, const state_t* param) {
  if (tensor.compensation == nullptr) {
    return;
  }
  alignas(64) param_t stored[kLargestBlock];
  alignas(64) state_t compensation[kLargestBlock];
  convert<Unchanged<state_t>, Halved<param_t>>(param, n, stored);
  convert<Halved<param_t>, Unchanged<state_t>>(stored, n, compensation);
  with_block_size(n, [&](auto size) {
    for (int64_t i = 0; i < size; ++i) {
      compensation[i] = param[i] - compensation[i];
    }
  });
  convert<Unchanged<state_t>, Halved<param_t>>(
      compensation, n, static_cast<param_t*>(tensor.compensation) + begin);
}

// The 16 bits below those of a bfloat16 parameter's float32 masters (cm_fused/rounding.py), read
// and written as the bits above them are.
inline c10::BFloat16* remainders(const TensorStep& tensor, int64_t begin) {
  return tensor.master_remainder == nullptr
             ? nullptr
             : static_cast<c10::BFloat16*>(tensor.master_remainder) + begin;
}

// Makes the values of a bfloat16 parameter its masters. One that was set since keeps to its value
// where the remainder, which was of another, would make it NaN.
template <typename vector_t, int64_t kCount>
CM_FUSED_INLINE void join_masters(const c10::BFloat16* remainder, vector_t (&values)[kCount]) {
  vector_t upper[kCount];
  load_vectors<Halved<c10::BFloat16>>(remainder, upper);
  for (int64_t v = 0; v < kCount; ++v) {
    const auto lower = bit_cast<Bits<vector_t>>(bit_cast<SignedBits<vector_t>>(upper[v]) >> 16);
    const auto master = bit_cast<vector_t>(bit_cast<Bits<vector_t>>(values[v]) + lower);
    values[v] = master == master ? master : values[v];
  }
}

// Stores the remainders of masters, and sets bits whose upper half is the bfloat16 above them: the
// nearest one, of ties the one away from 0.
template <typename vector_t, int64_t kCount>
CM_FUSED_INLINE void split_masters(
    const vector_t (&masters)[kCount], c10::BFloat16* remainder, Bits<vector_t> (&bits)[kCount]) {
  Bits<vector_t> lower[kCount];
  for (int64_t v = 0; v < kCount; ++v) {
    bits[v] = masters[v] == masters[v] ? bit_cast<Bits<vector_t>>(masters[v])
                                       : Bits<vector_t>{} + kNanBits;
    lower[v] = bits[v] << 16;
    bits[v] += 0x8000U;
  }
  store_bits(remainder, lower);
}

// Those two for a block, which is a copy of the parameter's.
template <typename state_t>
CM_FUSED_INLINE void join_master(
    const TensorStep& tensor, int64_t begin, int64_t n, state_t* param) {
  if constexpr (std::is_same_v<state_t, float>) {
    if (const c10::BFloat16* const remainder = remainders(tensor, begin)) {
      for_each_vector(n, [&](auto zero, int64_t at) {
        decltype(zero) values[] = {load_vector<decltype(zero)>(param + at)};
        join_masters(remainder + at, values);
        store_vector(param + at, values[0]);
      });
    }
  }
}

template <typename state_t>
[[gnu::noinline]] void split_master(
    const TensorStep& tensor, int64_t begin, int64_t n, state_t* master) {
  if constexpr (std::is_same_v<state_t, float>) {
    c10::BFloat16* const remainder = remainders(tensor, begin);
    for_each_vector(n, [&](auto zero, int64_t at) {
      using vector_t = decltype(zero);
      const vector_t values[] = {load_vector<vector_t>(master + at)};
      Bits<vector_t> bits[1];
      split_masters(values, remainder + at, bits);
      store_vector(master + at, bit_cast<vector_t>(bits[0] & 0xFFFF0000U));
    });
  }
}

// Rounds a block to values of param_t, so that storing them loses nothing more (of the words,
// param_bits in cm_fused/rounding.py).
template <typename state_t, typename param_t>
[[gnu::noinline]] void round_stochastically(const uint32_t* words, int64_t n, state_t* param) {
  with_block_size(n, [&](auto size) {
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t random = words[i] >> 16 ^ (words[i] & 0xFFFFU);
      if constexpr (std::is_same_v<param_t, c10::BFloat16>) {
        param[i] = bit_cast<float>(bfloat16_bits(param[i], random) & 0xFFFF0000U);
      } else {
        param[i] = round_to_float16(param[i], random);
      }
    }
  });
}
