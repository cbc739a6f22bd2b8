// What launches need to know of the device.
#pragma once

#include <cuda_runtime_api.h>

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

}  // namespace kda
