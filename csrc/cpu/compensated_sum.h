// A sum that does not depend on the order of what is added, but where it lies, to twice the digits
// of a double, half way between two doubles.
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
