// What launches need to know of the device.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <vector>

namespace kda {

// Multiprocessors of the device that is current at the first call; the supported ones in a machine are alike.
inline int sm_count() {
  static int const count = [] {
    int device = 0, sms = 132;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    return sms;
  }();
  return count;
}

// Calls `set`, which prepares a kernel, at the first call on each device: attributes of a kernel are those of one device.
template <class Set>
cudaError_t once_a_device(Set const& set) {
  constexpr int kDevices = 64;
  static std::atomic<bool> done[kDevices] = {};
  int device = 0;
  if (cudaError_t const error = cudaGetDevice(&device)) return error;
  if (device < kDevices && done[device].load(std::memory_order_relaxed)) return cudaSuccess;
  cudaError_t const error = set();
  if (error == cudaSuccess && device < kDevices) done[device].store(true, std::memory_order_relaxed);
  return error;
}

// For kernels that run beside one that needs much shared memory: an SM changes its share between that and the L1 only when
// nothing runs there.
template <class... Params>
cudaError_t prefer_shared_memory(void (*kernel)(Params...)) {
  return cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// Whether the kernels run on a device: compute capability 9.0.
inline bool is_hopper(int device) {
  static std::vector<bool> const hopper = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<bool> found(count);
    for (int i = 0; i < count; ++i) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      found[i] = major == 9 && minor == 0;
    }
    return found;
  }();
  return device >= 0 && device < static_cast<int>(hopper.size()) && hopper[device];
}

}  // namespace kda
