// The random words of a block (cm_fused/philox.py).
//
// No include guard: a part of step_kernel.h.

namespace cm_fused::CM_FUSED_ISA {

constexpr int kPhiloxRounds = 7;
constexpr int kWordsPerCounter = 4;
constexpr uint64_t kCounters = kLargestBlock / kWordsPerCounter;

enum class Stream : uint32_t { kMoments, kParam };

// Words of some counters in the lower halves of 64-bit lanes; what is in the upper ones is ignored.
using Lanes = Vector<uint64_t>;
using Words = Vector<uint32_t>;
constexpr size_t kNumLanes = sizeof(Lanes) / sizeof(uint64_t);
constexpr size_t kNumWords = sizeof(Words) / sizeof(uint32_t);

// The products of lower halves. Left to the compiler, which does not know that the upper halves do
// not count, this is a product of 64 bits: three instructions, and 40 % of a step's time.
inline Lanes multiply(Lanes a, Lanes b) {
#if defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 64
  return reinterpret_cast<Lanes>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__x86_64__) && CM_FUSED_VECTOR_BYTES == 32
  return reinterpret_cast<Lanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Lanes>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFU) * (b & 0xFFFFFFFFU);
#endif
}

inline Lanes spread(uint64_t value) {
  return value - Lanes{};
}

// The lower halves of a, and as the upper ones the lower halves of b.
template <size_t... kWords>
inline Lanes join(Lanes a, Lanes b, std::index_sequence<kWords...>) {
  return reinterpret_cast<Lanes>(__builtin_shufflevector(reinterpret_cast<Words>(a),
      reinterpret_cast<Words>(b << 32), kWords + (kWords % 2) * kNumWords...));
}

// Of every two lanes of a and of b the first ones, or the second ones, side by side: one
// instruction, which moves nothing between halves of a register.
template <int kSecond, size_t... kItems>
inline Lanes interleave(Lanes a, Lanes b, std::index_sequence<kItems...>) {
  return __builtin_shufflevector(a, b, kItems / 2 * 2 + kSecond + (kItems % 2) * kNumLanes...);
}

// The words of one stream of a tensor's step.
class Philox {
 public:
  CM_FUSED_INLINE Philox(const TensorStep& tensor, const StepOptions& options, Stream stream)
      : stream_(static_cast<uint64_t>(stream) << 31),
        param_index_(spread(static_cast<uint64_t>(tensor.param_index))),
        step_(spread(static_cast<uint64_t>(tensor.step))) {
    const auto seed = static_cast<uint64_t>(options.seed);
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys0_[round] = spread(static_cast<uint32_t>(seed) + round * 0x9E3779B9U);
      keys1_[round] = spread(static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85U);
    }
  }

  // Sets the words of the counters [first, first + count), and of some more to fill whole vectors.
  // None of them may differ from the others in more than the counter's first 32 bits. `count` is a
  // uint64_t, or a constant.
  CM_FUSED_INLINE void set_words(uint64_t first, auto count, uint32_t* words) const {
    constexpr auto kItems = std::make_index_sequence<kNumLanes>{};
    constexpr auto kWords = std::make_index_sequence<kNumWords>{};
    // In the order that interleave leaves them: 0, 2, 1, 3 of four.
    Lanes counters;
    for (uint64_t lane = 0; lane < kNumLanes; ++lane) {
      counters[lane] = lane / 2 + (lane % 2) * (kNumLanes / 2);
    }
    counters += first;
    const Lanes high = spread((first >> 32) | stream_);
    for (uint64_t i = 0; i < count; i += kNumLanes) {
      Lanes c0 = counters + i;
      Lanes c1 = high;
      Lanes c2 = param_index_;
      Lanes c3 = step_;
#pragma GCC unroll 7
      for (int round = 0; round < kPhiloxRounds; ++round) {
        const Lanes product0 = multiply(c0, spread(0xD2511F53U));
        const Lanes product1 = multiply(c2, spread(0xCD9E8D57U));
        c0 = (product1 >> 32) ^ c1 ^ keys0_[round];
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ keys1_[round];
        c3 = product0;
      }
      const Lanes lower = join(c0, c1, kWords);
      const Lanes upper = join(c2, c3, kWords);
      uint32_t* const group = words + kWordsPerCounter * i;
      store_vector(group, reinterpret_cast<Words>(interleave<0>(lower, upper, kItems)));
      store_vector(group + kNumWords, reinterpret_cast<Words>(interleave<1>(lower, upper, kItems)));
    }
  }

 private:
  const uint64_t stream_;
  const Lanes param_index_;
  const Lanes step_;
  Lanes keys0_[kPhiloxRounds];
  Lanes keys1_[kPhiloxRounds];
};

// So placed, each block of a tensor has counters of its own, which share all but their first 32
// bits.
inline bool has_own_counters(const Places& places) {
  return places.length == places.stride && places.offset % kLargestBlock == 0;
}

// As random_words, of elements that are part of a larger tensor: run by run of those that are
// consecutive there and share all but the first 32 bits of their counters.
[[gnu::noinline]] inline void random_words_of_runs(const TensorStep& tensor,
    const StepOptions& options, int64_t begin, Stream stream, uint32_t* words) {
  constexpr int64_t kShared = int64_t{kWordsPerCounter} << 32;
  const Places& places = tensor.places;
  const Philox philox(tensor, options, stream);
  alignas(64) uint32_t run_words[kLargestBlock + kWordsPerCounter * (1 + kNumLanes)];
  for (int64_t at = 0; at < kLargestBlock;) {
    const int64_t run = (begin + at) / places.length;
    const int64_t within = (begin + at) % places.length;
    const int64_t place = places.offset + run * places.stride + within;
    int64_t n = std::min(kLargestBlock - at, kShared - place % kShared);
    if (places.length != places.stride) {
      n = std::min(n, places.length - within);
    }
    const int64_t skipped = place % kWordsPerCounter;
    philox.set_words(static_cast<uint64_t>(place / kWordsPerCounter),
        static_cast<uint64_t>((skipped + n + kWordsPerCounter - 1) / kWordsPerCounter), run_words);
    std::memcpy(words + at, run_words + skipped, static_cast<size_t>(n) * sizeof(uint32_t));
    at += n;
  }
}

// Sets the words of the elements [begin, begin + kLargestBlock) of a tensor; begin is a multiple of
// kLargestBlock.
inline void random_words(const TensorStep& tensor, const StepOptions& options, int64_t begin,
    Stream stream, uint32_t* words) {
  const Places& places = tensor.places;
  if (has_own_counters(places)) {
    const auto first = static_cast<uint64_t>((places.offset + begin) / kWordsPerCounter);
    Philox(tensor, options, stream)
        .set_words(first, std::integral_constant<uint64_t, kCounters>{}, words);
  } else {
    random_words_of_runs(tensor, options, begin, stream, words);
  }
}

}  // namespace cm_fused::CM_FUSED_ISA
