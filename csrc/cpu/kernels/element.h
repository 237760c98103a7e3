// Elements: how each dtype is read and rounded (cm_fused/rounding.py).

// The value whose bits these are, or the bits of a value.
template <typename to_t, typename from_t>
inline to_t bit_cast(from_t value) {
  return __builtin_bit_cast(to_t, value);
}

constexpr uint32_t kMagnitudeBits = 0x7FFFFFFFU;
constexpr uint32_t kInfinityBits = 0x7F800000U;
constexpr uint32_t kNanBits = 0x7FC00000U;

// Bits whose upper half is a bfloat16, rounded to nearest even: c10's form without its branch.
template <typename vector_t>
CM_FUSED_INLINE Bits<vector_t> bfloat16_bits(vector_t value) {
  const auto raw = bit_cast<Bits<vector_t>>(value);
  const Bits<vector_t> rounded = raw + 0x7FFFU + ((raw >> 16) & 1U);
  return value == value ? rounded : Bits<vector_t>{} + kNanBits;
}

// Those of one of its two neighbours: up with the probability of the distance from the lower one.
// `random` is in [0, 2^16). A value that is not finite stays.
template <typename vector_t>
CM_FUSED_INLINE Bits<vector_t> bfloat16_bits(vector_t value, Bits<vector_t> random) {
  // Infinity has no bits for these to carry out of. Written as a choice of bits or none, this is
  // not vectorized (GCC 12).
  const Bits<vector_t> mask = value == value ? Bits<vector_t>{} + 0xFFFFU : Bits<vector_t>{};
  return bit_cast<Bits<vector_t>>(value) + (random & mask);
}

// What is stored of such bits, and of others.
template <typename stored_t>
inline stored_t stored_bits(uint32_t bits) {
  if constexpr (std::is_same_v<stored_t, c10::BFloat16>) {
    return c10::BFloat16(static_cast<uint16_t>(bits >> 16), c10::BFloat16::from_bits());
  } else {
    return static_cast<stored_t>(bits);
  }
}

// Rounds to one of float16's two neighbours, as a float. Added to 2^-14, a subnormal number has its
// last bits where a normal one has.
inline float round_to_float16(float value, uint32_t bits) {
  const auto raw = bit_cast<uint32_t>(value);
  const auto magnitude = bit_cast<float>(raw & kMagnitudeBits);
  const float offset = magnitude < 0x1p-14F ? 0x1p-14F : 0.0F;
  const uint32_t carried = bit_cast<uint32_t>(magnitude + offset) + (bits & 0x1FFFU);
  const float rounded = bit_cast<float>(carried & ~0x1FFFU) - offset;
  const uint32_t sign = raw & ~kMagnitudeBits;
  return value == value ? bit_cast<float>(bit_cast<uint32_t>(rounded) | sign) : value;
}

// How elements are stored. Rounding is to nearest even (cm_fused/rounding.py).
template <typename value_t>
struct Unchanged {
  using stored_t = value_t;
  static constexpr bool kScaled = false;
  static value_t load(value_t stored) {
    return stored;
  }
  static value_t store(value_t value) {
    return value;
  }
};

template <typename half_t>
struct Halved {
  using stored_t = half_t;
  static constexpr bool kScaled = false;
  static float load(half_t stored) {
    if constexpr (std::is_same_v<half_t, c10::Half>) {
      return c10::detail::fp16_ieee_to_fp32_value(stored.x);
    } else {
      return bit_cast<float>(static_cast<uint32_t>(stored.x) << 16);
    }
  }
  static half_t store(float value) {
    if constexpr (std::is_same_v<half_t, c10::Half>) {
      return c10::Half(c10::detail::fp16_ieee_from_fp32_value(value), c10::Half::from_bits());
    } else {
      return stored_bits<c10::BFloat16>(bfloat16_bits(value));
    }
  }
  // The first 16 of these are what is stored.
  template <typename vector_t>
    requires std::is_same_v<half_t, c10::BFloat16>
  CM_FUSED_INLINE static Bits<vector_t> bits(vector_t value) {
    return bfloat16_bits(value);
  }
};

// Of parameters and gradients.
template <typename state_t, typename data_t>
using DataCode =
    std::conditional_t<std::is_same_v<state_t, data_t>, Unchanged<state_t>, Halved<data_t>>;

struct Int8 {
  using stored_t = int8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = 127.0F;
  static float load(int8_t stored) {
    return static_cast<float>(stored);
  }
  static int8_t store(float value) {
    return stored_bits<int8_t>(bits(value));
  }
  // The sum with 1.5 * 2^23 is rounded to an integer, which its last bits hold.
  template <typename vector_t>
  CM_FUSED_INLINE static Bits<vector_t> bits(vector_t value) {
    return bit_cast<Bits<vector_t>>(value + 0x1.8p23F);
  }
};

// Two elements a byte, one from each half of a block: which half `HalfBytes` says.
struct Int4 {
  using stored_t = uint8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = 7.0F;
  static float load(uint8_t byte, int shift) {
    return static_cast<float>(static_cast<int8_t>(byte << (4 - shift)) >> 4);
  }
};

// The lower or the upper halves of bytes.
struct HalfBytes {
  uint8_t* bytes;
  int shift;  // 0 or 4
};

// torch.float8_e4m3fn: bias 7, three bits of mantissa, no infinity.
struct Float8 {
  using stored_t = uint8_t;
  static constexpr bool kScaled = true;
  static constexpr float kLargest = 448.0F;
  static constexpr uint32_t kBias = 120U;  // float32's less its own
  static float load(uint8_t stored) {
    const uint32_t magnitude = stored & 0x7FU;
    const auto normal = bit_cast<float>((magnitude << 20) + (kBias << 23));
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9F;
    const float value = magnitude < 8U ? subnormal : normal;
    return bit_cast<float>(
        bit_cast<uint32_t>(value) | (static_cast<uint32_t>(stored & 0x80U) << 24));
  }
  // The sum with 2^14 is rounded to a multiple of 2^-9, the spacing of subnormal numbers.
  static uint8_t store(float value) {
    const auto bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & kMagnitudeBits;
    const uint32_t normal =
        ((magnitude + 0x7FFFFU + ((magnitude >> 20) & 1U)) >> 20) - (kBias << 3);
    const uint32_t subnormal =
        bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0x1p14F) - bit_cast<uint32_t>(0x1p14F);
    const bool is_normal = magnitude >= bit_cast<uint32_t>(0x1p-6F);
    return static_cast<uint8_t>((is_normal ? normal : subnormal) | (bits >> 24 & 0x80U));
  }
};

// An exponent of 5 bits with bias 15, three bits of mantissa, no infinity: the first bits of a
// float16 without its sign. That of a moment, which is rounded otherwise (moments.h).
struct UnsignedFloat8 {
  using stored_t = uint8_t;
  static constexpr uint32_t kBias = 112U;  // float32's less its own
  static float load(uint8_t stored) {
    const auto normal = bit_cast<float>((uint32_t{stored} << 20) + (kBias << 23));
    const float subnormal = static_cast<float>(static_cast<int32_t>(stored)) * 0x1p-17F;
    return stored < 8U ? subnormal : normal;
  }
};

// The bits that a slot's scale may have, so that its product with a code is exact.
constexpr uint32_t kScaleBits = 0xFFFFFF00U;

// Of a block that is stored with a scale: what its values are multiplied by, and restored by.
struct BlockScale {
  float inverse;  // 0 where the largest value is too small or not finite
  float scale;
};

// The bits of the largest magnitude as a float's. The order of magnitudes is that of their bits, in
// which NaN is above infinity.
inline uint32_t largest_magnitude_bits(const float* values, auto n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, bit_cast<int32_t>(values[i]) & 0x7FFFFFFF);
  }
  return static_cast<uint32_t>(largest);
}

inline uint32_t largest_magnitude_bits(const c10::BFloat16* values, auto n) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, static_cast<uint16_t>(values[i].x & 0x7FFFU));
  }
  return static_cast<uint32_t>(largest) << 16;
}

// Those of a block with a scale. All but a tensor's last one are whole: without remainders for the
// loop.
template <typename stored_t>
inline uint32_t block_largest_bits(const stored_t* values, int64_t n) {
  constexpr std::integral_constant<int64_t, kScaleBlock> kWhole;
  return n == kWhole ? largest_magnitude_bits(values, kWhole) : largest_magnitude_bits(values, n);
}

template <typename stored_t>
inline BlockScale block_scale(const stored_t* values, int64_t n, float largest_stored) {
  const uint32_t largest_bits = block_largest_bits(values, n);
  const auto largest = bit_cast<float>(largest_bits);
  const bool usable = largest >= 0x1p-100F && largest_bits < kInfinityBits;
  if (!usable) {
    return {0.0F, largest};
  }
  const auto scale = bit_cast<float>(bit_cast<uint32_t>(largest / largest_stored) & kScaleBits);
  return {1.0F / scale, scale};
}
