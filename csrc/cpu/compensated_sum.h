// A sum to twice the digits of a double, which is then rounded to one. The result depends on the
// order of what is added only where the exact sum lies, to all those digits, half way between two
// doubles.
#pragma once

#include <cmath>

namespace cm_fused {

// T is double or a vector of doubles. Always inlined: a copy for one instruction set must not serve
// another.
template <typename T>
struct CompensatedSum {
  T sum{};
  T error{};  // what rounding has left out of `sum`

  [[gnu::always_inline]] inline void add(T value) {
    // Knuth's two-sum: sum + value == next + what is added to `error`, exactly.
    const T next = sum + value;
    const T added = next - sum;
    error += (sum - (next - added)) + (value - added);
    sum = next;
  }

  [[gnu::always_inline]] inline double total() const {
    return std::isfinite(sum) ? sum + error : sum;
  }
};

}  // namespace cm_fused
