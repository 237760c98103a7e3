// What a step knows of one parameter's tensors, as plain data.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cm_fused {

// The values are in tables, which Python reads (cm_fused/_backends/triton/columns.py).
enum class ParamDtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// How state is stored: as the update computes, or rounded (cm_fused/rounding.py). The values are in
// tables.
enum class StoredDtype { kUnchanged, kBFloat16, kFloat16, kFloat8, kInt8 };

inline bool is_half(ParamDtype dtype) {
  return dtype == ParamDtype::kBFloat16 || dtype == ParamDtype::kFloat16;
}

// Elements that share a scale: BLOCK_SIZE of cm_fused/rounding.py.
inline constexpr int64_t kScaleBlock = 256;

inline int64_t num_scales(int64_t numel) {
  return (numel + kScaleBlock - 1) / kScaleBlock;
}

inline int64_t stored_bytes(StoredDtype dtype, int64_t unchanged_bytes) {
  switch (dtype) {
    case StoredDtype::kBFloat16:
    case StoredDtype::kFloat16:
      return 2;
    case StoredDtype::kFloat8:
    case StoredDtype::kInt8:
      return 1;
    case StoredDtype::kUnchanged:
      break;
  }
  return unchanged_bytes;
}

inline bool has_scales(StoredDtype dtype) {
  return dtype == StoredDtype::kFloat8 || dtype == StoredDtype::kInt8;
}

// Where the elements of a parameter lie in the whole of it, of which this process may hold a part
// (cm_fused/philox.py): element e is the whole's element offset + e / length * stride + e % length.
struct Places {
  int64_t offset = 0;
  int64_t length = 1;
  int64_t stride = 1;  // equal to length where there are no gaps
};

inline constexpr size_t kNumbersOfPlaces = 3;

// Addresses are nullptr where there is no such tensor, or an op does without it.
struct ParamData {
  ParamDtype dtype;
  StoredDtype moment_dtype;  // of exp_avg and exp_avg_sq
  StoredDtype slot_dtype;
  int64_t numel;
  int64_t capacity;
  int64_t param_index;  // keys the random words, and so do the elements' places
  Places places;

  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // nullptr without amsgrad
  void* critical_buffer;
  void* critical_sum;  // nullptr: the sum is read from the slots

  // nullptr where the dtype has no scales.
  float* critical_scales;
  float* exp_avg_scales;
  float* exp_avg_sq_scales;
  void* compensation;  // nullptr where there is none

  float* priorities;
  int64_t* pending_slot;
  // The last to be set: with it, the state has been checked. It has one element and so an address.
  float* step_count;
};

}  // namespace cm_fused
