// The gated RMS norm: channels / 8 lanes share a row, so that a row is read in 16-byte pieces and summed by shuffles.
#pragma once

#include "kda_cutlass/layer/vector.cuh"

namespace kda {

constexpr int kNormThreads = 128;
constexpr int kNormRows = 4;  // of a thread: their loads are in flight together

template <int kChannels>
__global__ void __launch_bounds__(kNormThreads) gated_norm_kernel(GatedNormParams const p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int kLanes = kChannels / kVectorChannels;
  constexpr int kStep = kNormThreads / kLanes;  // rows that a block treats at a time
  static_assert(kLanes <= 32 && 32 % kLanes == 0);

  int const channel = static_cast<int>(threadIdx.x) % kLanes * kVectorChannels;
  int64_t const first = int64_t(blockIdx.x) * kStep * kNormRows + threadIdx.x / kLanes;
  auto offset = [&](int i) { return (first + i * kStep) * kChannels + channel; };
  auto inside = [&](int i) { return first + i * kStep < p.rows; };

  uint4 x_packed[kNormRows], gate_packed[kNormRows];
#pragma unroll
  for (int i = 0; i < kNormRows; ++i) {
    x_packed[i] = gate_packed[i] = {};
    if (inside(i)) {
      x_packed[i] = load_vector(static_cast<bf16 const*>(p.x) + offset(i));
      gate_packed[i] = load_vector(static_cast<bf16 const*>(p.gate) + offset(i));
    }
  }
  Channels weight;
  load_floats(p.weight, channel, p.weight_is_fp32, weight);

#pragma unroll
  for (int i = 0; i < kNormRows; ++i) {
    Channels x, gate;
    unpack(x_packed[i], x);
    unpack(gate_packed[i], gate);
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) sum += x[c] * x[c];
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    float const inverse = rsqrtf(sum / kChannels + p.eps);
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) x[c] *= inverse * weight[c] * sigmoid(gate[c]);
    if (inside(i)) store_vector(static_cast<bf16*>(p.out) + offset(i), pack(x));
  }
}

}  // namespace kda
