// What the host sides of the prefill's kernels share.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../device.h"
#include "params.h"

namespace kda {

template <auto kKernel>
cudaError_t allow_shared_memory(size_t bytes) {
  return once_a_device([=] {
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  });
}

enum class Start {
  kAlone,    // when the kernel before it in the stream has ended
  kOverlap,  // once all CTAs of that one have let it (sm90.cuh)
  kAtOnce,   // alone, and all its CTAs at once, or not at all
};

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t smem_bytes, Start start, Params const& params,
                   cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  if (start == Start::kAtOnce) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = start == Start::kAlone ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Calls f(gate, fp32) with a gate mode and whether g is fp32 as constants.
template <class F>
cudaError_t for_gate(Gate gate, bool fp32, F&& f) {
  auto with_type = [&](auto gate) { return fp32 ? f(gate, std::true_type{}) : f(gate, std::false_type{}); };
  switch (gate) {
    case Gate::kSoftplus:
      return with_type(std::integral_constant<Gate, Gate::kSoftplus>{});
    case Gate::kLowerBound:
      return with_type(std::integral_constant<Gate, Gate::kLowerBound>{});
    default:
      return with_type(std::integral_constant<Gate, Gate::kGiven>{});
  }
}

}  // namespace kda
