// Host-side queries and page-locked memory; see runtime.h.
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/common/check.h"
#include "cuda/runtime.h"

namespace headway::cuda {

namespace {

// The thread's current device, as it was before once this ends.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device_idx) {
    check(cudaGetDevice(&before_), "launch_graph");
    if (device_idx == before_) return;
    check(cudaSetDevice(device_idx), "launch_graph");
    has_moved_ = true;
  }
  ~DeviceGuard() {
    if (has_moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool has_moved_ = false;
};

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device is an answer here, not an error for the next launch to find
    return 0;
  }
  return count;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

void* pinned_alloc(int64_t num_bytes) {
  constexpr char kOp[] = "pinned_alloc";
  require(num_bytes > 0, kOp, "num_bytes must be positive");
  void* memory = nullptr;
  const unsigned flags = cudaHostAllocPortable | cudaHostAllocMapped;
  check(cudaHostAlloc(&memory, static_cast<size_t>(num_bytes), flags), kOp);
  // Kernels are handed the host's address; unified addressing makes it the device's too.
  void* on_device = nullptr;
  check(cudaHostGetDevicePointer(&on_device, memory, 0), kOp);
  if (on_device != memory) {
    cudaFreeHost(memory);
    require(false, kOp, "this device maps host memory at another address");
  }
  std::memset(memory, 0, static_cast<size_t>(num_bytes));
  return memory;
}

void pinned_free(void* memory) {
  if (memory != nullptr) check(cudaFreeHost(memory), "pinned_free");
}

void launch_graph(void* graph, Stream stream, int device_idx, void* inbox, const void* news, int64_t news_bytes) {
  constexpr char kOp[] = "launch_graph";
  const DeviceGuard guard(device_idx);
  auto* const queue = static_cast<cudaStream_t>(stream);
  if (news_bytes > 0) {
    check(cudaMemcpyAsync(inbox, news, static_cast<size_t>(news_bytes), cudaMemcpyHostToDevice, queue), kOp);
  }
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), queue), kOp);
}

}  // namespace headway::cuda
