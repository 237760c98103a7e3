// Checks of tensor lists. Every message names the list, the index, what it must be and what it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace cm_fused {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_string(IntHeaderOnlyArrayRef values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text + ")";
}

inline void check_length(const char* role, size_t length, size_t expected) {
  STD_TORCH_CHECK(
      length == expected, role, " must have one tensor for each of the ", expected,
      " params, got ", length);
}

inline void check_dtype(const char* role, size_t index, ScalarType dtype, ScalarType expected) {
  STD_TORCH_CHECK(
      dtype == expected, role, "[", index, "] must have dtype ",
      torch::headeronly::toString(expected), ", got ", torch::headeronly::toString(dtype));
}

inline void check_cpu_strided(const char* role, size_t index, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), role, "[", index, "] must be on the CPU");
  STD_TORCH_CHECK(
      tensor.layout() == torch::headeronly::Layout::Strided, role, "[", index,
      "] must be a strided tensor, not a sparse one");
}

inline void check_sizes(
    const char* role, size_t index, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef expected) {
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), role, "[", index,
      "] must have shape ", to_string(expected), ", got ", to_string(sizes));
}

// Whether strides a and b put the elements of a tensor of these sizes in the same places.
inline bool same_strides(
    IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef a, IntHeaderOnlyArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && a[d] != b[d]) {
      return false;
    }
  }
  return true;
}

inline void check_strides(
    const char* role, size_t index, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
    IntHeaderOnlyArrayRef expected) {
  STD_TORCH_CHECK(
      same_strides(sizes, strides, expected), role, "[", index, "] must have the strides ",
      to_string(expected), " of exp_avgs[", index, "], got ", to_string(strides));
}

// A small tensor of bookkeeping: `numel` consecutive values of one dtype.
inline void check_bookkeeping(
    const char* role, size_t index, const Tensor& tensor, int64_t numel, ScalarType dtype) {
  check_cpu_strided(role, index, tensor);
  check_dtype(role, index, tensor.scalar_type(), dtype);
  STD_TORCH_CHECK(
      tensor.numel() == numel && tensor.is_contiguous(), role, "[", index,
      "] must be contiguous with ", numel, " elements, got shape ", to_string(tensor.sizes()),
      " and strides ", to_string(tensor.strides()));
}

// Dimensions of more than one element, from the largest stride to the smallest.
inline std::vector<size_t> memory_order(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// Whether the elements fill a range of memory, each its own place.
inline bool is_dense(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const auto order = memory_order(sizes, strides);
  int64_t expected = 1;
  return std::all_of(order.rbegin(), order.rend(), [&](size_t d) {
    const bool matches = strides[d] == expected;
    expected *= sizes[d];
    return matches;
  });
}

// Whether no two elements share a place: sufficient, and true of every slice of a dense tensor.
inline bool has_no_overlap(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const auto order = memory_order(sizes, strides);
  int64_t extent = 0;
  return std::all_of(order.rbegin(), order.rend(), [&](size_t d) {
    const bool clears = strides[d] > extent;
    extent += (sizes[d] - 1) * strides[d];
    return clears;
  });
}

} // namespace cm_fused
