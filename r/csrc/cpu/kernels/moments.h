// Blocks of the moments: to and from the update's type.

// Of a word's bits, the first that rounds exp_avg (which has a sign), or exp_avg_sq.
template <bool kSigned>
constexpr int kFirstBit = kSigned ? 16 : 0;

// Int8 codes of a moment, linear in the fourth root of a block's values (cm_fused/rounding.py).
template <bool kSigned>
struct MomentCodes {
  static constexpr int32_t kLargestCode = kSigned ? 127 : 255;

  static float magnitude(int32_t code) {
    const float root = static_cast<float>(code) * (1.0F / kLargestCode);
    const float square = root * root;
    return square * square;
  }

  static void load(const int8_t* __restrict codes, float scale, auto n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (kSigned) {
        const int32_t code = codes[i];
        const float value = magnitude(code < 0 ? -code : code) * scale;
        values[i] = code < 0 ? -value : value;
      } else {
        values[i] = magnitude(static_cast<uint8_t>(codes[i])) * scale;
      }
    }
  }

  // Returns the scale. `words` have the random bits from bit `shift` on.
  static float store(const float* __restrict values, const uint32_t* __restrict words, int shift,
      auto n, int8_t* __restrict codes) {
    const auto [inverse, scale] = block_scale(values, n, 1.0F);
    for (int64_t i = 0; i < n; ++i) {
      const auto product =
          bit_cast<float>(bit_cast<uint32_t>(values[i]) & kMagnitudeBits) * inverse;
      // Without a usable scale also what is not finite is stored as 0.
      const float scaled = inverse == 0.0F ? 0.0F : (product < 1.0F ? product : 1.0F);
      const auto found = static_cast<int32_t>(std::sqrt(std::sqrt(scaled)) * kLargestCode);
      const int32_t lower = found < kLargestCode ? found : kLargestCode - 1;
      const float below = magnitude(lower);
      const auto bits = static_cast<float>(static_cast<int32_t>((words[i] >> shift) & 0xFFFFU));
      const float threshold = bits * (magnitude(lower + 1) - below);
      int32_t code = lower + ((scaled - below) * 65536.0F > threshold ? 1 : 0);
      if constexpr (kSigned) {
        code = values[i] < 0.0F ? -code : code;
      } else {
        // It is divided by: what is positive stays so.
        code = std::max(code, static_cast<int32_t>(scaled > 0.0F));
      }
      codes[i] = static_cast<int8_t>(code);
    }
    return scale;
  }
};

// One block of an int8 moment as float.
template <bool kSigned>
[[gnu::noinline]] inline void load_moment(
    const TensorStep& tensor, int64_t begin, int64_t n, float* values) {
  const auto* const codes =
      static_cast<const int8_t*>(kSigned ? tensor.exp_avg : tensor.exp_avg_sq);
  const float* const scales = kSigned ? tensor.exp_avg_scales : tensor.exp_avg_sq_scales;
  prefetch_ahead(tensor, codes, begin, n);
  MomentCodes<kSigned>::load(codes + begin, scales[begin / kScaleBlock], n, values);
}

// Writes it back, rounded stochastically by 16 bits of each word.
template <bool kSigned>
[[gnu::noinline]] inline void store_moment(const TensorStep& tensor, int64_t begin, int64_t n,
    const float* values, const uint32_t* words) {
  auto* const codes = static_cast<int8_t*>(kSigned ? tensor.exp_avg : tensor.exp_avg_sq);
  float* const scales = kSigned ? tensor.exp_avg_scales : tensor.exp_avg_sq_scales;
  scales[begin / kScaleBlock] =
      MomentCodes<kSigned>::store(values, words, kFirstBit<kSigned>, n, codes + begin);
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
