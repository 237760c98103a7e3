// What one parameter's priority buffer goes through in a step, once the step's key is known.
// Written once for every backend, as priority.h.
#pragma once

#include <cstdint>

#include "priority.h"

namespace cm_fused {

// One parameter's bookkeeping. Changed by every step.
struct Bookkeeping {
  float* priorities;
  int64_t* slot;    // set to the slot the step's item takes, or kNoSlot
  float* step;      // steps taken so far
  int64_t* filled;  // set to the number of slots filled before the step, or nullptr
};

CM_FUSED_HOST_DEVICE inline void update_bookkeeping(
    const Bookkeeping& books, int64_t capacity, float priority_decay, float key) {
  if (books.filled != nullptr) {
    *books.filled = count_filled(books.priorities, capacity);
  }
  *books.slot = admit(books.priorities, capacity, key);
  decay(books.priorities, capacity, priority_decay);
  *books.step += 1.0F;
}

}  // namespace cm_fused
