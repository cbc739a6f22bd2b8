// What launches need to know of the device.
#pragma once

#include <cuda_runtime_api.h>

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
