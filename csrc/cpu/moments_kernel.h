// Blocks of the moments: to and from the update's type.
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

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

// One block of a moment in the update's type: the state's own memory where that serves, else a copy
// in `scratch`.
template <bool kSigned, typename state_t>
inline state_t* load_moment(const TensorStep& tensor, void* data, const float* scales,
    int64_t begin, auto n, state_t* scratch) {
  if constexpr (std::is_same_v<state_t, float>) {
    if (tensor.moment_dtype == StoredDtype::kBFloat16) {
      const auto* __restrict stored = static_cast<const c10::BFloat16*>(data) + begin;
      for (int64_t i = 0; i < n; ++i) {
        scratch[i] = load_element<float>(stored[i]);
      }
      return scratch;
    }
    if (tensor.moment_dtype == StoredDtype::kInt8) {
      MomentCodes<kSigned>::load(
          static_cast<const int8_t*>(data) + begin, scales[begin / kScaleBlock], n, scratch);
      return scratch;
    }
  }
  return static_cast<state_t*>(data) + begin;
}

// Writes back what load_moment copied, rounded stochastically by 16 bits of each word.
template <bool kSigned, typename state_t>
inline void store_moment(const TensorStep& tensor, void* data, float* scales, int64_t begin, auto n,
    const state_t* __restrict values, const uint32_t* __restrict words) {
  if constexpr (std::is_same_v<state_t, float>) {
    constexpr int shift = kSigned ? 16 : 0;
    if (tensor.moment_dtype == StoredDtype::kBFloat16) {
      auto* __restrict stored = static_cast<c10::BFloat16*>(data) + begin;
      for (int64_t i = 0; i < n; ++i) {
        stored[i].x = round_to_bfloat16(values[i], (words[i] >> shift) & 0xFFFFU);
      }
    } else if (tensor.moment_dtype == StoredDtype::kInt8) {
      scales[begin / kScaleBlock] =
          MomentCodes<kSigned>::store(values, words, shift, n, static_cast<int8_t*>(data) + begin);
    }
  }
}

}  // namespace cm_fused::CM_FUSED_ISA
