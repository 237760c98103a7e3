// Blocks of the moments: to and from the update's type.

// Of a word's bits, the first that rounds exp_avg (which has a sign) to bfloat16, or exp_avg_sq.
template <bool kSigned>
constexpr int kFirstBit = kSigned ? 16 : 0;

// The 8-bit floats of an int8 moment (cm_fused/rounding.py).
template <bool kSigned>
struct MomentFloat {
  using Code = std::conditional_t<kSigned, Float8, UnsignedFloat8>;
  static constexpr uint32_t kTop = kSigned ? 8U : 15U;
  static constexpr float kSmallestNormal = kSigned ? 0x1p-6F : 0x1p-14F;
  static constexpr uint32_t kFirstBits = Code::kBias << 23;
  static constexpr int kRoundedBits = 20;

  // Powers of two: what a block is multiplied by, and restored by.
  static BlockScale scale(const float* values, int64_t n) {
    constexpr uint32_t kRounded = (1U << kRoundedBits) - 1U;
    const uint32_t raw = std::min(block_largest_bits(values, n), kInfinityBits);
    // The next power of two where the largest value is above the largest number with its own.
    const uint32_t power = (raw + kRounded) & kInfinityBits;
    const bool usable = bit_cast<float>(raw) >= 0x1p-100F && power < kInfinityBits;
    return {bit_cast<float>(usable ? (254U << 23) - power + (kTop << 23) : 0U),
        bit_cast<float>(usable ? power - (kTop << 23) : power)};
  }

  // The code of a scaled value in the last 8 bits. `words` are random.
  template <typename vector_t>
  CM_FUSED_INLINE static Bits<vector_t> bits(vector_t scaled, Bits<vector_t> words) {
    using bits_t = Bits<vector_t>;
    const auto raw = bit_cast<bits_t>(scaled);
    const auto magnitude = bit_cast<vector_t>(raw & kMagnitudeBits);
    const auto is_normal = magnitude >= kSmallestNormal;
    // A number below the smallest normal one is added to it: the last bits of the sum are those of
    // a subnormal number.
    const vector_t shifted = is_normal ? magnitude : magnitude + kSmallestNormal;
    const bits_t first = is_normal ? bits_t{} + kFirstBits : bits_t{} + (kFirstBits + (1U << 23));
    const bits_t random =
        kSigned ? words >> (32 - kRoundedBits) : words & ((1U << kRoundedBits) - 1U);
    const bits_t code = (bit_cast<bits_t>(shifted) - first + random) >> kRoundedBits;
    if constexpr (kSigned) {
      return code | (raw >> 24 & 0x80U);
    } else {
      // It is divided by: what is positive stays so.
      return scaled > 0.0F && code == 0U ? bits_t{} + 1U : code;
    }
  }
};

// One block of an int8 moment as float.
template <bool kSigned>
[[gnu::noinline]] inline void load_moment(
    const TensorStep& tensor, int64_t begin, int64_t n, float* values) {
  using Code = typename MomentFloat<kSigned>::Code;
  const auto* const codes =
      static_cast<const uint8_t*>(kSigned ? tensor.exp_avg : tensor.exp_avg_sq) + begin;
  const float* const scales = kSigned ? tensor.exp_avg_scales : tensor.exp_avg_sq_scales;
  prefetch_ahead(tensor, codes, begin, n);
  const float scale = scales[begin / kScaleBlock];
  for_each_vector(n, [&](auto zero, int64_t at) {
    decltype(zero) loaded[1];
    load_vectors<Code>(codes + at, loaded);
    store_vector(values + at, loaded[0] * scale);
  });
}

// Writes it back, rounded stochastically by some bits of each word.
template <bool kSigned>
[[gnu::noinline]] inline void store_moment(const TensorStep& tensor, int64_t begin, int64_t n,
    const float* values, const uint32_t* words) {
  using Float = MomentFloat<kSigned>;
  auto* const codes = static_cast<int8_t*>(kSigned ? tensor.exp_avg : tensor.exp_avg_sq) + begin;
  float* const scales = kSigned ? tensor.exp_avg_scales : tensor.exp_avg_sq_scales;
  const BlockScale scale = Float::scale(values, n);
  scales[begin / kScaleBlock] = scale.scale;
  for_each_vector(n, [&](auto zero, int64_t at) {
    using vector_t = decltype(zero);
    const auto value = load_vector<vector_t>(values + at);
    // Without a usable scale also what is not finite is stored as 0.
    const vector_t scaled = scale.inverse == 0.0F ? vector_t{} : value * scale.inverse;
    const Bits<vector_t> bits[] = {Float::bits(scaled, load_vector<Bits<vector_t>>(words + at))};
    store_bits(codes + at, bits);
  });
}

// The values at `index` of a moment, which is stored as the update computes, or rounded to
// bfloat16.
template <typename vector_t, int64_t kCount>
CM_FUSED_INLINE void load_moments(
    const void* data, int64_t index, auto rounded, vector_t (&values)[kCount]) {
  using value_t = Element<vector_t>;
  if constexpr (std::is_same_v<value_t, float>) {
    if (rounded) {
      load_vectors<Halved<c10::BFloat16>>(static_cast<const c10::BFloat16*>(data) + index, values);
      return;
    }
  }
  load_vectors<Unchanged<value_t>>(static_cast<const value_t*>(data) + index, values);
}

// Stores them; to round them, stochastically by 16 bits of each word.
template <bool kSigned, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void store_moments(void* data, int64_t index, auto rounded,
    const vector_t (&values)[kCount], const uint32_t* words) {
  using value_t = Element<vector_t>;
  if constexpr (std::is_same_v<value_t, float>) {
    if (rounded) {
      Bits<vector_t> bits[kCount];
      for (int64_t v = 0; v < kCount; ++v) {
        const auto random = load_vector<Bits<vector_t>>(words + v * kWidth<vector_t>);
        bits[v] = bfloat16_bits(values[v], (random >> kFirstBit<kSigned>)&0xFFFFU);
      }
      store_bits(static_cast<c10::BFloat16*>(data) + index, bits);
      return;
    }
  }
  store_vectors<Unchanged<value_t>>(static_cast<value_t*>(data) + index, values);
}
