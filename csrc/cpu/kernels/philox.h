// The random words of a block (cm_fused/philox.py).

constexpr int kPhiloxRounds = 7;
constexpr int kWordsPerCounter = 4;
constexpr uint64_t kCounters = kLargestBlock / kWordsPerCounter;
// As many elements, from a multiple of this on, have counters with but the first 32 bits of their
// own.
constexpr int64_t kElementsThatShare = int64_t{kWordsPerCounter} << 32;

constexpr uint64_t kMultiplier0 = 0xD2511F53U;
constexpr uint64_t kMultiplier1 = 0xCD9E8D57U;

// Words of some counters in the lower halves of 64-bit lanes; what is in the upper ones is ignored.
using Lanes = Vector<uint64_t>;
using Words = Vector<uint32_t>;
constexpr size_t kNumLanes = sizeof(Lanes) / sizeof(uint64_t);
constexpr size_t kNumWords = sizeof(Words) / sizeof(uint32_t);
constexpr uint64_t kLowerHalf = 0xFFFFFFFFU;

// Vectors of counters at a time, each a chain of products that overlaps the other's: with int8
// slots and bfloat16 moments, on two cores of a Sapphire Rapids, 2 took 0.85 of the time of 1.
constexpr size_t kVectorsOfGroup = 2;
constexpr size_t kCountersOfGroup = kVectorsOfGroup * kNumLanes;

inline Lanes spread(uint64_t value) {
  return value - Lanes{};
}

// The product with a constant of the lower halves. Left to the compiler, which does not know that
// the upper halves do not count, this is a product of 64 bits: three instructions, and 40 % of a
// step's time.
inline Lanes multiply(Lanes a, uint64_t constant) {
  const Lanes b = spread(constant);
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
  return (a & kLowerHalf) * (b & kLowerHalf);
#endif
}

// The halves of each lane exchanged: on x86 by another part of the processor than multiplies, which
// is less busy than the one that shifts.
template <size_t... kWords>
inline Lanes exchange_halves(Lanes a, std::index_sequence<kWords...>) {
  const auto words = reinterpret_cast<Words>(a);
  return reinterpret_cast<Lanes>(__builtin_shufflevector(words, words, (kWords ^ 1)...));
}
inline Lanes exchange_halves(Lanes a) {
  return exchange_halves(a, std::make_index_sequence<kNumWords>{});
}

// The first, or the second, of every two lanes of a and of b, side by side: one instruction, which
// moves nothing between halves of a register.
template <int kSecond, size_t... kItems>
inline Lanes interleave(Lanes a, Lanes b, std::index_sequence<kItems...>) {
  return __builtin_shufflevector(a, b, kItems / 2 * 2 + kSecond + (kItems % 2) * kNumLanes...);
}

// The words of a tensor's step, of counters that share all but their first 32 bits.
class Philox {
 public:
  CM_FUSED_INLINE Philox(const TensorStep& tensor, const StepOptions& options, uint64_t counter) {
    const auto seed = static_cast<uint64_t>(options.seed);
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys0_[round] = spread(static_cast<uint32_t>(seed) + round * 0x9E3779B9U);
      keys1_[round] = spread(static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85U);
    }
    // What the first rounds make of the words that all counters share, as part of the keys.
    const Lanes c1 = spread(counter >> 32);
    const Lanes c2 = spread(static_cast<uint64_t>(tensor.param_index));
    const Lanes c3 = spread(static_cast<uint64_t>(tensor.step_number));
    const Lanes product1 = multiply(c2, kMultiplier1);
    const Lanes product0 = multiply((product1 >> 32) ^ c1 ^ keys0_[0], kMultiplier0);
    keys1_[0] ^= c3;
    keys0_[1] ^= product1;
    keys1_[1] ^= product0 >> 32;
    keys1_[2] ^= product0;
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys0_[round] &= kLowerHalf;
      keys1_[round] &= kLowerHalf;
    }
  }

  // Sets the words of the counters [first, first + count), and of some more to fill groups.
  // `count` is a uint64_t, or a constant.
  CM_FUSED_INLINE void set_words(uint64_t first, auto count, uint32_t* words) const {
    // In the order that interleave leaves them: 0, 2, 1, 3 of four.
    Lanes counters;
    for (uint64_t lane = 0; lane < kNumLanes; ++lane) {
      counters[lane] = lane / 2 + (lane % 2) * (kNumLanes / 2);
    }
    counters += first;
    for (uint64_t i = 0; i < count; i += kCountersOfGroup) {
      set_words_of_group(counters + i, words + kWordsPerCounter * i);
    }
  }

 private:
  CM_FUSED_INLINE void set_words_of_group(Lanes counters, uint32_t* words) const {
    Lanes c0[kVectorsOfGroup];
    Lanes c1[kVectorsOfGroup];
    Lanes c2[kVectorsOfGroup];
    Lanes c3[kVectorsOfGroup];
    // The first two rounds, of what differs between counters.
    for (uint64_t v = 0; v < kVectorsOfGroup; ++v) {
      const Lanes product0 = multiply(counters + v * kNumLanes, kMultiplier0);
      c1[v] = multiply(exchange_halves(product0) ^ keys1_[0], kMultiplier1);
      c0[v] = exchange_halves(c1[v]) ^ keys0_[1];
      c2[v] = product0 ^ keys1_[1];
      c3[v] = Lanes{};
    }
#pragma GCC unroll 7
    for (int round = 2; round < kPhiloxRounds - 1; ++round) {
      for (uint64_t v = 0; v < kVectorsOfGroup; ++v) {
        const Lanes product0 = multiply(c0[v], kMultiplier0);
        const Lanes product1 = multiply(c2[v], kMultiplier1);
        c0[v] = exchange_halves(product1) ^ c1[v] ^ keys0_[round];
        c1[v] = product1;
        c2[v] = exchange_halves(product0) ^ c3[v] ^ keys1_[round];
        c3[v] = product0;
      }
    }
    // The last, each two words side by side.
    constexpr auto kItems = std::make_index_sequence<kNumLanes>{};
    for (uint64_t v = 0; v < kVectorsOfGroup; ++v) {
      const Lanes product0 = multiply(c0[v], kMultiplier0);
      const Lanes product1 = multiply(c2[v], kMultiplier1);
      const Lanes lower =
          exchange_halves(product1) ^ ((c1[v] & kLowerHalf) ^ keys0_[kPhiloxRounds - 1]);
      const Lanes upper =
          exchange_halves(product0) ^ ((c3[v] & kLowerHalf) ^ keys1_[kPhiloxRounds - 1]);
      uint32_t* const stored = words + kWordsPerCounter * v * kNumLanes;
      store_vector(stored, reinterpret_cast<Words>(interleave<0>(lower, upper, kItems)));
      store_vector(
          stored + kNumWords, reinterpret_cast<Words>(interleave<1>(lower, upper, kItems)));
    }
  }

  Lanes keys0_[kPhiloxRounds];
  Lanes keys1_[kPhiloxRounds];
};

// So placed, each block of a tensor has counters of its own, and the elements [begin, begin + n)
// have some which share all but their first 32 bits.
inline bool has_own_counters(const ShardLayout& layout, int64_t begin, int64_t n) {
  const int64_t first = layout.offset + begin;
  return layout.length == layout.stride && layout.offset % kLargestBlock == 0 &&
         first / kElementsThatShare == (first + n - 1) / kElementsThatShare;
}

// As random_words, of elements that are part of a larger tensor: run by run of those that are
// consecutive there and share all but the first 32 bits of their counters.
[[gnu::noinline]] inline void random_words_of_runs(
    const TensorStep& tensor, const StepOptions& options, int64_t begin, uint32_t* words) {
  const ShardLayout& layout = tensor.shard_layout;
  alignas(64) uint32_t run_words[kLargestBlock + kWordsPerCounter * (1 + kCountersOfGroup)];
  for (int64_t at = 0; at < kLargestBlock;) {
    const int64_t run = (begin + at) / layout.length;
    const int64_t within = (begin + at) % layout.length;
    const int64_t place = layout.offset + run * layout.stride + within;
    int64_t n = std::min(kLargestBlock - at, kElementsThatShare - place % kElementsThatShare);
    if (layout.length != layout.stride) {
      n = std::min(n, layout.length - within);
    }
    const int64_t skipped = place % kWordsPerCounter;
    const auto first = static_cast<uint64_t>(place / kWordsPerCounter);
    const auto count =
        static_cast<uint64_t>((skipped + n + kWordsPerCounter - 1) / kWordsPerCounter);
    Philox(tensor, options, first).set_words(first, count, run_words);
    std::memcpy(words + at, run_words + skipped, static_cast<size_t>(n) * sizeof(uint32_t));
    at += n;
  }
}

// Sets the words of the elements [begin, begin + kLargestBlock) of a tensor; begin is a multiple of
// kLargestBlock.
[[gnu::noinline]] inline void random_words(
    const TensorStep& tensor, const StepOptions& options, int64_t begin, uint32_t* words) {
  const ShardLayout& layout = tensor.shard_layout;
  if (has_own_counters(layout, begin, kLargestBlock)) {
    const auto first = static_cast<uint64_t>((layout.offset + begin) / kWordsPerCounter);
    Philox(tensor, options, first)
        .set_words(first, std::integral_constant<uint64_t, kCounters>{}, words);
  } else {
    random_words_of_runs(tensor, options, begin, words);
  }
}
