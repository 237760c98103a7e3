// The CUDA implementation of update_priorities_: one launch for any number of rows. Sums are taken
// in an order that depends on their length alone, without atomics: a last bit of a norm can decide
// what is admitted, so every run must have the same ones.

// The shim declares what it has for CUDA under this.
#if !defined(USE_CUDA)
#define USE_CUDA
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../priority/table.h"

namespace cm_fused {
namespace {

constexpr int kNumThreads = 256;

// The sum of `count` values, for thread 0. Loads are batched; additions keep their order.
__device__ double block_sum(const double* __restrict__ values, int64_t count) {
  using BlockReduce = cub::BlockReduce<double, kNumThreads>;
  __shared__ typename BlockReduce::TempStorage storage;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kNumThreads) {
    sum += values[i];
  }
  const double total = BlockReduce(storage).Sum(sum);
  __syncthreads();  // before the storage is used again
  return total;
}

__device__ void update_row(const PriorityUpdate& update, int64_t row, float key) {
  update_priorities(
      priorities_of(row_of(update.table, row)), update.capacity, update.priority_decay, key);
}

// Norms that are there, or one sum for all rows; a thread for each row. Every block takes the whole
// sum itself, which costs less than a second launch.
__global__ void __launch_bounds__(kNumThreads) update_group_kernel(const PriorityUpdate update) {
  __shared__ double group;
  if (update.is_skipped()) {
    return;
  }
  const double total =
      update.adds_up_chunks() ? block_sum(update.chunk_sq_norms, update.num_chunks) : 0.0;
  if (threadIdx.x == 0) {
    group = total;
  }
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kNumThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
      row < update.num_rows; row += stride) {
    const double sq_norm =
        update.sq_norm == nullptr ? group : update.sq_norm[row * update.sq_norm_stride];
    update_row(update, row, priority_key(sq_norm));
  }
}

// A sum for each row, a block for each row.
__global__ void __launch_bounds__(kNumThreads) update_tensors_kernel(const PriorityUpdate update) {
  if (update.is_skipped()) {
    return;
  }
  for (int64_t row = blockIdx.x; row < update.num_rows; row += gridDim.x) {
    const int64_t* columns = row_of(update.table, row);
    const double sq_norm =
        block_sum(update.chunk_sq_norms + columns[kFirstChunkColumn], columns[kNumChunksColumn]);
    if (threadIdx.x == 0) {
      update_row(update, row, priority_key(sq_norm));
    }
  }
}

void launch(const PriorityUpdate& update, bool group_scope, cudaStream_t stream) {
  const bool sums_rows = !group_scope && update.adds_up_chunks();
  const int64_t rows_per_block = sums_rows ? 1 : kNumThreads;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>((update.num_rows + rows_per_block - 1) / rows_per_block,
          std::numeric_limits<int32_t>::max()));
  if (sums_rows) {
    update_tensors_kernel<<<blocks, kNumThreads, 0, stream>>>(update);
  } else {
    update_group_kernel<<<blocks, kNumThreads, 0, stream>>>(update);
  }
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess,
      "update_priorities_ could not launch its kernel: ", cudaGetErrorString(error));
}

void update_priorities_(Tensor table, Tensor chunk_sq_norms, std::optional<Tensor> sq_norm,
    std::optional<Tensor> found_inf, int64_t capacity, double priority_decay, bool group_scope) {
  const PriorityUpdate update =
      check_priority_update(table, chunk_sq_norms, sq_norm, found_inf, capacity, priority_decay);
  if (update.num_rows == 0) {
    return;
  }
  const int32_t device = table.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch(update, group_scope, static_cast<cudaStream_t>(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cm_fused, CUDA, m) {
  m.impl("update_priorities_", TORCH_BOX(&update_priorities_));
}

}  // namespace cm_fused
