// Host side of the streamed schedule: apart from the others, because its kernels take as long to compile as those do.
#include "launch.h"
#include "stream.cuh"

namespace kda {
namespace {

template <Gate kGate, bool kFp32Gate, int kSlices, bool kSegments = false>
cudaError_t launch_kernel(StreamParams const& params, int sms, cudaStream_t stream) {
  auto constexpr kKernel = stream_kernel<kGate, kFp32Gate, kSlices, kSegments>;
  constexpr size_t kSmem = sizeof(StreamSmem<kSlices, kSegments>);
  if (cudaError_t const error = allow_shared_memory<kKernel>(kSmem)) return error;
  return launch(kKernel, dim3(sms), kStreamThreads, kSmem, Start::kAtOnce, params, stream);
}

}  // namespace

cudaError_t launch_stream(Gate gate, bool fp32_gate, StreamParams const& params, int sms, cudaStream_t stream) {
  if (params.taken == nullptr)  // else the fused kernel has cleared them
    if (cudaError_t const error = cudaMemsetAsync(params.ring.flags, 0, sizeof(RingFlags), stream)) return error;
  return for_gate(gate, fp32_gate, [&](auto gate_constant, auto fp32) {
    auto constexpr kGate = decltype(gate_constant)::value;
    auto constexpr kFp32 = decltype(fp32)::value;
    auto* const launch_it = params.left.segments.count > 1 ? launch_kernel<kGate, kFp32, 2, true>
                            : params.ring.slices == 1      ? launch_kernel<kGate, kFp32, 1>
                                                           : launch_kernel<kGate, kFp32, 2>;
    return launch_it(params, sms, stream);
  });
}

}  // namespace kda
