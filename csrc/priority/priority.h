// The priority buffer of one parameter tensor: which slot a step's item takes.
//
// Keys are float32, one per slot, -inf where the slot is unfilled. Written once for C++: the CPU
// step calls it from a loop over tensors, a CUDA kernel from a thread per tensor. The definition is
// admit_ of cm_fused/reference.py, and Triton's copy is in cm_fused/_backends/triton/norms.py.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define CM_FUSED_HOST_DEVICE __host__ __device__
#else
#define CM_FUSED_HOST_DEVICE
#endif

namespace cm_fused {

inline constexpr int64_t kNoSlot = -1;

// A filled slot's key is a norm times a decay in [0, 1]: never negative, never NaN.
CM_FUSED_HOST_DEVICE inline bool is_filled(float key) {
  return key >= 0.0F;
}

// Appending always takes the first unfilled slot, so the filled ones are a prefix.
CM_FUSED_HOST_DEVICE inline int64_t count_filled(const float* keys, int64_t capacity) {
  int64_t filled = 0;
  while (filled < capacity && is_filled(keys[filled])) {
    ++filled;
  }
  return filled;
}

// The lowest index among the smallest keys. An unfilled slot's -inf is smaller than any key, so
// while the buffer fills this is the slot to append to.
CM_FUSED_HOST_DEVICE inline int64_t smallest_key(const float* keys, int64_t capacity) {
  int64_t slot = 0;
  for (int64_t i = 1; i < capacity; ++i) {
    if (keys[i] < keys[slot]) {
      slot = i;
    }
  }
  return slot;
}

// The key of a step: the gradient's L2 norm, rounded to float32 before it is compared or stored.
CM_FUSED_HOST_DEVICE inline float priority_key(double sq_norm) {
  return static_cast<float>(std::sqrt(sq_norm));
}

// Algorithm 1's admission. Returns the slot the step's item takes, or kNoSlot: a key that is not
// strictly greater than the smallest is refused, and so is one that is not finite, since it could
// never be evicted again.
CM_FUSED_HOST_DEVICE inline int64_t admit(float* keys, int64_t capacity, float key) {
  const int64_t slot = smallest_key(keys, capacity);
  if (!std::isfinite(key) || !(key > keys[slot])) {
    return kNoSlot;
  }
  keys[slot] = key;
  return slot;
}

// Multiplies every key by lambda; an unfilled slot keeps -inf, which times 0 would be NaN.
CM_FUSED_HOST_DEVICE inline void decay(float* keys, int64_t capacity, float priority_decay) {
  for (int64_t i = 0; i < capacity; ++i) {
    if (is_filled(keys[i])) {
      keys[i] *= priority_decay;
    }
  }
}

// One parameter's priorities, and what goes with them. Changed by every step.
struct Priorities {
  float* keys;
  int64_t* slot;    // set to the slot the step's item takes, or kNoSlot
  float* step;      // steps taken so far
  int64_t* filled;  // set to the number of slots filled before the step, or nullptr
};

// Updates them once the step's key is known. Without slots there is only the step to be counted.
CM_FUSED_HOST_DEVICE inline void update_priorities(
    const Priorities& priorities, int64_t capacity, float priority_decay, float key) {
  *priorities.step += 1.0F;
  if (capacity == 0) {
    return;
  }
  if (priorities.filled != nullptr) {
    *priorities.filled = count_filled(priorities.keys, capacity);
  }
  *priorities.slot = admit(priorities.keys, capacity, key);
  decay(priorities.keys, capacity, priority_decay);
}

}  // namespace cm_fused
