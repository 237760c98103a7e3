// Vectors of the update's type: a step's arithmetic is written once for them and for what whole
// vectors leave over. Plain loops over blocks keep the streams of a step from advancing together.

// A loop over vectors is one only when all of it is inlined.
#define CM_FUSED_INLINE [[gnu::always_inline]] inline

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
template <typename vector_t>
auto first_element(const vector_t& values) {
  if constexpr (std::is_arithmetic_v<vector_t>) {
    return values;
  } else {
    return values[0];
  }
}

template <typename vector_t>
using Element = decltype(first_element(std::declval<vector_t>()));

template <typename vector_t>
constexpr int64_t kWidth = sizeof(vector_t) / sizeof(Element<vector_t>);

// Unsigned integers, as many as vector_t has floats.
template <typename vector_t>
using Bits = std::conditional_t<std::is_arithmetic_v<vector_t>, uint32_t, Vector<uint32_t>>;

// As many signed ones.
template <typename vector_t>
using SignedBits = std::conditional_t<std::is_arithmetic_v<vector_t>, int32_t, Vector<int32_t>>;

template <typename vector_t>
CM_FUSED_INLINE vector_t load_vector(const Element<vector_t>* data) {
  using value_t = Element<vector_t>;
  if constexpr (std::is_same_v<vector_t, value_t>) {
    return *data;
  } else {
    return *reinterpret_cast<const typename VectorOf<value_t>::in_memory*>(data);
  }
}

// A vector of doubles from as many elements. GCC 12 converts floats in halves, and joins them.
template <typename value_t>
CM_FUSED_INLINE Vector<double> load_doubles(const value_t* data) {
  if constexpr (std::is_same_v<value_t, double>) {
    return load_vector<Vector<double>>(data);
  } else {
#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 64
    return _mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(data));
#elif defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 32
    return _mm256_cvtps_pd(_mm_loadu_ps(data));
#else
    Vector<double> values;
    for (int64_t lane = 0; lane < kWidth<Vector<double>>; ++lane) {
      values[lane] = data[lane];
    }
    return values;
#endif
  }
}

template <typename vector_t>
CM_FUSED_INLINE void store_vector(Element<vector_t>* data, vector_t values) {
  using value_t = Element<vector_t>;
  if constexpr (std::is_same_v<vector_t, value_t>) {
    *data = values;
  } else {
    *reinterpret_cast<typename VectorOf<value_t>::in_memory*>(data) = values;
  }
}

constexpr int64_t kLineBytes = 64;

// Copies whole cache lines to memory that is not read before: an ordinary store reads the line into
// the cache first. Both are aligned to a line.
#if defined(__x86_64__)
constexpr bool kStoresPastCache = true;
template <int64_t kBytes>
CM_FUSED_INLINE void store_past_cache(void* to, const void* from) {
  static_assert(kBytes % kLineBytes == 0);
  auto* const pieces = static_cast<__m128i*>(to);
  for (int64_t i = 0; i < kBytes / 16; ++i) {
    _mm_stream_si128(pieces + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
  }
}
// Other threads see what was stored that way before what is stored from here on.
CM_FUSED_INLINE void order_stores_past_cache() {
  _mm_sfence();
}
#else
constexpr bool kStoresPastCache = false;
template <int64_t kBytes>
CM_FUSED_INLINE void store_past_cache(void* to, const void* from) {
  std::memcpy(to, from, kBytes);
}
CM_FUSED_INLINE void order_stores_past_cache() {}
#endif

// Calls visit(vector_t{}, at) for each whole vector of n elements, then for each element left.
template <typename Visit>
CM_FUSED_INLINE void for_each_vector(int64_t n, Visit visit) {
  int64_t at = 0;
  for (; at + kWidth<Vector<float>> <= n; at += kWidth<Vector<float>>) {
    visit(Vector<float>{}, at);
  }
  for (; at < n; ++at) {
    visit(float{}, at);
  }
}

// total + values * factor, where that product is exact: one instruction has the bits of two.
template <typename vector_t>
CM_FUSED_INLINE vector_t add_exact_product(
    vector_t total, vector_t values, Element<vector_t> factor) {
#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES > 16
  if constexpr (std::is_same_v<vector_t, Vector<float>>) {
#if CM_FUSED_VECTOR_BYTES == 64
    return _mm512_fmadd_ps(values, _mm512_set1_ps(factor), total);
#else
    return _mm256_fmadd_ps(values, _mm256_set1_ps(factor), total);
#endif
  }
#endif
  return total + values * factor;
}

template <typename vector_t>
CM_FUSED_INLINE vector_t square_root(vector_t values) {
  if constexpr (std::is_floating_point_v<vector_t>) {
    return std::sqrt(values);
  } else {
    // One instruction: GCC 12 joins the lanes.
    vector_t roots;
    for (int64_t lane = 0; lane < kWidth<vector_t>; ++lane) {
      roots[lane] = std::sqrt(values[lane]);
    }
    return roots;
  }
}
