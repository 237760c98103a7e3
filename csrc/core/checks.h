// Checks of tensor lists. Every message names the list, the index, what it must be and what it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

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

// The index of a tensor that is an argument by itself.
inline constexpr size_t kNoIndex = std::numeric_limits<size_t>::max();

inline std::string item(const char* role, size_t index) {
  return index == kNoIndex ? role : std::string(role) + "[" + std::to_string(index) + "]";
}

inline void check_length(const char* role, size_t length, size_t expected) {
  STD_TORCH_CHECK(length == expected, role, " must have one tensor for each of the ", expected,
      " params, got ", length);
}

struct Device {
  int32_t type;   // as aoti_torch_device_type_*()
  int32_t index;  // 0 on the CPU

  bool operator==(const Device&) const = default;
};

inline Device cpu_device() {
  return {aoti_torch_device_type_cpu(), 0};
}

inline std::string to_string(Device device) {
  if (device == cpu_device()) {
    return "cpu";
  }
  if (device.type == aoti_torch_device_type_cuda()) {
    return "cuda:" + std::to_string(device.index);
  }
  return "device " + std::to_string(device.index) + " of type " + std::to_string(device.type);
}

// A tensor's metadata, fetched with as few calls as will do: for a small tensor this is most of its
// step.
struct TensorView {
  void* data;
  int64_t numel;
  IntHeaderOnlyArrayRef sizes;
  IntHeaderOnlyArrayRef strides;
  int32_t dtype;  // as aoti_torch_dtype_*()
  Device device;

  // Elements from the first to behind the last in memory.
  [[nodiscard]] int64_t extent() const {
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      last += (sizes[d] - 1) * strides[d];
    }
    return numel == 0 ? 0 : last + 1;
  }
};

// Views a dense tensor on any device, whose memory it does not touch, and may not be there.
inline TensorView view_metadata(const char* role, size_t index, const Tensor& tensor) {
  static const int32_t strided = aoti_torch_layout_strided();
  static const int32_t cpu = aoti_torch_device_type_cpu();
  const AtenTensorHandle handle = tensor.get();
  TensorView result{};
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  STD_TORCH_CHECK(
      layout == strided, item(role, index), " must be a strided tensor, not a sparse one");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &result.device.type));
  if (result.device.type != cpu) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &result.device.index));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &result.data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &result.dtype));
  const auto length = static_cast<size_t>(dim);
  result.sizes = {sizes, length};
  result.strides = {strides, length};
  result.numel = std::accumulate(sizes, sizes + length, int64_t{1}, std::multiplies<>());
  return result;
}

// A storage may have been resized under its tensor, or be none at all: reading it would crash.
inline void check_memory(
    const char* role, size_t index, const Tensor& tensor, const TensorView& metadata) {
  if (metadata.numel == 0 || metadata.device.type == aoti_torch_device_type_meta()) {
    return;
  }
  int64_t storage_bytes = 0;
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  const auto element_bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(metadata.dtype));
  const int64_t end = (offset + metadata.extent()) * element_bytes;
  const auto address = reinterpret_cast<uintptr_t>(metadata.data);
  const bool has_memory = address != static_cast<uintptr_t>(offset * element_bytes);
  STD_TORCH_CHECK(has_memory && end <= storage_bytes, item(role, index),
      " must have its memory: its elements end at byte ", end, " of a storage of ",
      has_memory ? storage_bytes : 0, " bytes");
}

inline TensorView view(const char* role, size_t index, const Tensor& tensor) {
  const TensorView result = view_metadata(role, index, tensor);
  check_memory(role, index, tensor, result);
  return result;
}

inline void check_device(const char* role, size_t index, Device device, Device expected) {
  STD_TORCH_CHECK(device == expected, item(role, index), " must be on ", to_string(expected),
      ", got ", to_string(device));
}

inline const char* dtype_name(int32_t dtype) {
  return torch::headeronly::toString(
      torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype)));
}

inline void check_dtype(const char* role, size_t index, int32_t dtype, int32_t expected) {
  STD_TORCH_CHECK(dtype == expected, item(role, index), " must have dtype ", dtype_name(expected),
      ", got ", dtype_name(dtype));
}

inline void check_sizes(
    const char* role, size_t index, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef expected) {
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()),
      item(role, index), " must have shape ", to_string(expected), ", got ", to_string(sizes));
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

inline void check_strides(const char* role, size_t index, IntHeaderOnlyArrayRef sizes,
    IntHeaderOnlyArrayRef strides, IntHeaderOnlyArrayRef expected) {
  STD_TORCH_CHECK(same_strides(sizes, strides, expected), item(role, index),
      " must have the strides ", to_string(expected), " of exp_avgs[", index, "], got ",
      to_string(strides));
}

inline std::vector<int64_t> contiguous_strides(IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

// Checks that a tensor has `numel` elements, one after the other.
inline void check_flat(const char* role, size_t index, const TensorView& tensor, int64_t numel) {
  const auto strides = contiguous_strides(tensor.sizes);
  const bool is_contiguous = same_strides(tensor.sizes, tensor.strides, strides);
  STD_TORCH_CHECK(tensor.numel == numel && (numel == 0 || is_contiguous), item(role, index),
      " must be contiguous with ", numel, " elements, got shape ", to_string(tensor.sizes),
      " and strides ", to_string(tensor.strides));
}

// The data of a tensor of `numel` float64, one after the other.
inline double* float64_data(
    const char* role, size_t index, const Tensor& tensor, int64_t numel, Device device) {
  const TensorView values = view(role, index, tensor);
  check_device(role, index, values.device, device);
  check_dtype(role, index, values.dtype, aoti_torch_dtype_float64());
  check_flat(role, index, values, numel);
  return static_cast<double*>(values.data);
}

// Dimensions of more than one element, from the largest stride to the smallest.
inline std::vector<size_t> memory_order(
    IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(
      order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  return order;
}

// Elements from the first to behind the last in memory if no two share a place, else 0: sufficient,
// and more than 0 for every slice of a dense tensor.
inline int64_t extent_without_overlap(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  const auto order = memory_order(sizes, strides);
  int64_t extent = 1;
  for (size_t d = order.size(); d-- > 0;) {
    if (strides[order[d]] < extent) {
      return 0;
    }
    extent += (sizes[order[d]] - 1) * strides[order[d]];
  }
  return extent;
}

}  // namespace cm_fused
