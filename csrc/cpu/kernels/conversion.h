// Vectors to and from what is stored.

// The values of a vector of stored elements, and what is stored of a vector of bits. Left to GCC
// 12, int8 goes by way of int16, which takes four instructions for one, and float16 and float8 take
// two to three times as long.
#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES > 16

// Values whose NaNs have but a sign: as c10's arithmetic has them, where the instruction for
// float16 keeps the rest.
CM_FUSED_INLINE Vector<float> with_plain_nans(Vector<float> values) {
  const auto raw = reinterpret_cast<Vector<uint32_t>>(values);
  const auto nans = reinterpret_cast<Vector<float>>((raw & 0x80000000U) | 0x7FC00000U);
  return values == values ? values : nans;
}

#endif

#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 64

// Conversions under a mask of all lanes: of those without, GCC 12 says that they read what is not
// initialized.
constexpr __mmask16 kAllLanes = 0xFFFF;

CM_FUSED_INLINE Vector<float> load_codes(Int8, const int8_t* stored) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  return _mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepi8_epi32(kAllLanes, bytes));
}

CM_FUSED_INLINE Vector<float> load_codes(Halved<c10::BFloat16>, const c10::BFloat16* stored) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored));
  return reinterpret_cast<Vector<float>>(
      reinterpret_cast<Vector<uint32_t>>(_mm512_maskz_cvtepu16_epi32(kAllLanes, halves)) << 16);
}

CM_FUSED_INLINE Vector<float> load_codes(Halved<c10::Half>, const c10::Half* stored) {
  return _mm512_maskz_cvtph_ps(
      kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
}

// The bits of a code's magnitude, moved to those of a float16, are 2^-8 times its value, and its
// subnormal numbers float16's.
CM_FUSED_INLINE Vector<float> load_codes(Float8, const uint8_t* stored) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xBF80)));
  return _mm512_maskz_cvtph_ps(kAllLanes, halves) * 0x1p8F;
}

// A permutation looks at the last four bits of an index.
CM_FUSED_INLINE Vector<float> load_codes(Int4, HalfBytes stored) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored.bytes));
  const __m512i codes = _mm512_maskz_srlv_epi32(
      kAllLanes, _mm512_maskz_cvtepu8_epi32(kAllLanes, bytes), _mm512_set1_epi32(stored.shift));
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_maskz_permutexvar_ps(kAllLanes, codes, values);
}

CM_FUSED_INLINE Vector<float> load_codes(UnsignedFloat8, const uint8_t* stored) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stored));
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7));
}

CM_FUSED_INLINE void store_codes(int8_t* stored, Vector<uint32_t> codes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(stored),
      _mm512_maskz_cvtepi32_epi8(kAllLanes, reinterpret_cast<__m512i>(codes)));
}

CM_FUSED_INLINE void store_codes(c10::BFloat16* stored, Vector<uint32_t> codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(stored),
      _mm512_maskz_cvtepi32_epi16(kAllLanes, reinterpret_cast<__m512i>(codes >> 16)));
}

CM_FUSED_INLINE void store_codes(c10::Half* stored, Vector<float> values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(stored),
      _mm512_maskz_cvtps_ph(kAllLanes, with_plain_nans(values), _MM_FROUND_TO_NEAREST_INT));
}

// Two vectors of them: fewer instructions than twice one.
CM_FUSED_INLINE void store_codes(
    c10::BFloat16* stored, Vector<uint32_t> first, Vector<uint32_t> second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  Halves upper;
  for (int16_t i = 0; i < 32; ++i) {
    upper[i] = static_cast<uint16_t>(2 * i + 1);
  }
  _mm512_storeu_si512(
      stored, _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(first),
                  reinterpret_cast<__m512i>(upper), reinterpret_cast<__m512i>(second)));
}

#elif defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 32

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

CM_FUSED_INLINE Vector<float> load_codes(Float8, const uint8_t* stored) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored));
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  const __m128i halves = _mm_and_si128(shifted, _mm_set1_epi16(static_cast<int16_t>(0xBF80)));
  return _mm256_cvtph_ps(halves) * 0x1p8F;
}

CM_FUSED_INLINE Vector<float> load_codes(Int4, HalfBytes stored) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored.bytes));
  const __m256i upper =
      _mm256_sllv_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(28 - stored.shift));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(upper, 28));
}

CM_FUSED_INLINE Vector<float> load_codes(UnsignedFloat8, const uint8_t* stored) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored));
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7));
}

CM_FUSED_INLINE void store_codes(int8_t* stored, Vector<uint32_t> codes) {
  // The first bytes of both halves' elements, side by side.
  const __m256i first_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
      -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(codes), first_bytes);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(stored),
      _mm_or_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}

CM_FUSED_INLINE void store_codes(c10::Half* stored, Vector<float> values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(stored),
      _mm256_cvtps_ph(with_plain_nans(values), _MM_FROUND_TO_NEAREST_INT));
}

CM_FUSED_INLINE void store_codes(c10::BFloat16* stored, Vector<uint32_t> codes) {
  const __m256i halves =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(codes >> 16), _mm256_setzero_si256());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(stored),
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xD8)));
}

CM_FUSED_INLINE void store_codes(
    c10::BFloat16* stored, Vector<uint32_t> first, Vector<uint32_t> second) {
  const __m256i halves = _mm256_packus_epi32(
      reinterpret_cast<__m256i>(first >> 16), reinterpret_cast<__m256i>(second >> 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(stored), _mm256_permute4x64_epi64(halves, 0xD8));
}

#endif

#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES > 16
constexpr bool kConvertsVectors = true;
#else
// Left to the compiler, which sees a whole tile as a loop.
constexpr bool kConvertsVectors = false;
void load_codes();
void store_codes();
#endif

// Sets values to the elements at `stored`, as Code restores them.
template <typename Code, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void load_vectors(
    const typename Code::stored_t* stored, vector_t (&values)[kCount]) {
  using stored_t = typename Code::stored_t;
  using value_t = Element<vector_t>;
  constexpr int64_t width = kWidth<vector_t>;
  if constexpr (std::is_same_v<stored_t, value_t>) {
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_vector<vector_t>(stored + v * width);
    }
  } else if constexpr (kConvertsVectors && width > 1) {
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_codes(Code{}, stored + v * width);
    }
  } else {
    value_t elements[kCount * width];
    for (size_t i = 0; i < std::size(elements); ++i) {
      elements[i] = Code::load(stored[i]);
    }
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_vector<vector_t>(elements + v * width);
    }
  }
}

// Stores bits.
template <typename stored_t, typename bits_t, int64_t kCount>
CM_FUSED_INLINE void store_bits(stored_t* stored, const bits_t (&bits)[kCount]) {
  constexpr int64_t width = kWidth<bits_t>;
  if constexpr (kCount % 2 == 0 && requires { store_codes(stored, bits[0], bits[1]); }) {
    for (int64_t v = 0; v < kCount; v += 2) {
      store_codes(stored + v * width, bits[v], bits[v + 1]);
    }
  } else if constexpr (kConvertsVectors && width > 1) {
    for (int64_t v = 0; v < kCount; ++v) {
      store_codes(stored + v * width, bits[v]);
    }
  } else {
    uint32_t elements[kCount * width];
    for (int64_t v = 0; v < kCount; ++v) {
      store_vector(elements + v * width, bits[v]);
    }
    for (size_t i = 0; i < std::size(elements); ++i) {
      stored[i] = stored_bits<stored_t>(elements[i]);
    }
  }
}

// Stores values as Code does.
template <typename Code, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void store_vectors(
    typename Code::stored_t* stored, const vector_t (&values)[kCount]) {
  constexpr int64_t width = kWidth<vector_t>;
  if constexpr (std::is_same_v<typename Code::stored_t, Element<vector_t>>) {
    for (int64_t v = 0; v < kCount; ++v) {
      store_vector(stored + v * width, values[v]);
    }
  } else if constexpr (requires { Code::bits(values[0]); }) {
    Bits<vector_t> bits[kCount];
    for (int64_t v = 0; v < kCount; ++v) {
      bits[v] = Code::bits(values[v]);
    }
    store_bits(stored, bits);
  } else if constexpr (requires { store_codes(stored, values[0]); }) {
    for (int64_t v = 0; v < kCount; ++v) {
      store_codes(stored + v * width, values[v]);
    }
  } else {
    Element<vector_t> elements[kCount * width];
    for (int64_t v = 0; v < kCount; ++v) {
      store_vector(elements + v * width, values[v]);
    }
    for (size_t i = 0; i < std::size(elements); ++i) {
      stored[i] = Code::store(elements[i]);
    }
  }
}

// Sets values to the codes in halves of bytes.
template <typename Code, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void load_vectors(HalfBytes stored, vector_t (&values)[kCount]) {
  constexpr int64_t width = kWidth<vector_t>;
  if constexpr (kConvertsVectors && width > 1) {
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_codes(Code{}, HalfBytes{stored.bytes + v * width, stored.shift});
    }
  } else {
    Element<vector_t> elements[kCount * width];
    for (size_t i = 0; i < std::size(elements); ++i) {
      elements[i] = Code::load(stored.bytes[i], stored.shift);
    }
    for (int64_t v = 0; v < kCount; ++v) {
      values[v] = load_vector<vector_t>(elements + v * width);
    }
  }
}

// Stores values in halves of bytes, whose other halves stay.
template <typename Code, typename vector_t, int64_t kCount>
CM_FUSED_INLINE void store_vectors(HalfBytes stored, const vector_t (&values)[kCount]) {
  constexpr int64_t count = kCount * kWidth<vector_t>;
  using joined_t = std::conditional_t<count % 8 == 0, uint64_t,
      std::conditional_t<count % 4 == 0, uint32_t, uint8_t>>;
  constexpr auto kLowerHalves = static_cast<joined_t>(0x0F0F0F0F0F0F0F0FU);
  int8_t codes[count];
  store_vectors<Int8>(codes, values);
  for (int64_t i = 0; i < count; i += sizeof(joined_t)) {
    joined_t code;
    joined_t old;
    std::memcpy(&code, codes + i, sizeof(code));
    std::memcpy(&old, stored.bytes + i, sizeof(old));
    old &= static_cast<joined_t>(~(kLowerHalves << stored.shift));
    old |= static_cast<joined_t>((code & kLowerHalves) << stored.shift);
    std::memcpy(stored.bytes + i, &old, sizeof(old));
  }
}
