// Vectors of the update's type, where GCC 12 does not find a good loop by itself.
//
// No include guard: a part of step_kernel.h.

// A loop over vectors is one only when all of it is inlined.
#define CM_FUSED_INLINE [[gnu::always_inline]] inline

namespace cm_fused::CM_FUSED_ISA {

template <typename value_t>
struct VectorOf {
  typedef value_t type __attribute__((vector_size(CM_FUSED_VECTOR_BYTES)));
  // As it lies in memory. Copied with memcpy, a vector would be moved in pieces of 16 bytes.
  typedef value_t in_memory
      __attribute__((vector_size(CM_FUSED_VECTOR_BYTES), aligned(alignof(value_t)), may_alias));
};

template <typename value_t>
using Vector = typename VectorOf<value_t>::type;

// Below, `vector_t` is a Vector<value_t>, or a value_t for what whole vectors leave over.
template <typename vector_t, typename value_t>
constexpr int64_t kWidth = sizeof(vector_t) / sizeof(value_t);

template <typename vector_t, typename value_t>
CM_FUSED_INLINE vector_t load_vector(const value_t* data) {
  if constexpr (std::is_same_v<vector_t, value_t>) {
    return *data;
  } else {
    return *reinterpret_cast<const typename VectorOf<value_t>::in_memory*>(data);
  }
}

template <typename vector_t, typename value_t>
CM_FUSED_INLINE void store_vector(value_t* data, vector_t values) {
  if constexpr (std::is_same_v<vector_t, value_t>) {
    *data = values;
  } else {
    *reinterpret_cast<typename VectorOf<value_t>::in_memory*>(data) = values;
  }
}

#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 32

// The values of eight stored elements. Left to GCC 12, int8 goes by way of int16, which takes four
// instructions for one, and float16 and float8 take two to three times as long.
CM_FUSED_INLINE Vector<float> load_codes(Int8, const int8_t* stored) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

CM_FUSED_INLINE Vector<float> load_codes(Halved<c10::BFloat16>, const c10::BFloat16* stored) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

CM_FUSED_INLINE Vector<float> load_codes(Halved<c10::Half>, const c10::Half* stored) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored)));
}

// The bits of a code's magnitude, moved to those of a float16, are 2^-8 times its value, and its
// subnormal numbers float16's.
CM_FUSED_INLINE Vector<float> load_codes(Float8, const uint8_t* stored) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored));
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  const __m128i halves = _mm_and_si128(shifted, _mm_set1_epi16(static_cast<int16_t>(0xBF80)));
  return _mm256_cvtph_ps(halves) * 0x1p8F;
}

#endif

// Sets values to the elements at `stored`, as Code restores them.
template <typename Code, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void load_vectors(
    const typename Code::stored_t* stored, vector_t (&values)[kCount]) {
  using stored_t = typename Code::stored_t;
  using value_t = decltype(Code::load(*stored));
  if constexpr (std::is_same_v<stored_t, value_t>) {
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_vector<vector_t>(stored + v * kWidth<vector_t, value_t>);
    }
#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 32
  } else if constexpr (std::is_same_v<vector_t, Vector<float>>) {
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_codes(Code{}, stored + v * kWidth<vector_t, value_t>);
    }
#endif
  } else {
    value_t elements[kCount * kWidth<vector_t, value_t>];
    for (size_t i = 0; i < std::size(elements); ++i) {
      elements[i] = Code::load(stored[i]);
    }
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_vector<vector_t>(elements + v * kWidth<vector_t, value_t>);
    }
  }
}

}  // namespace cm_fused::CM_FUSED_ISA
