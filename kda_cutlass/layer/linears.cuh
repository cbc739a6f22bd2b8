// Projections of a few rows: every weight is read once, by as many threads as the card holds, and that is all the time there
// is. Several projections share a launch, because each of them alone is shorter than a launch and too small for the card.
#pragma once

#include "kda_cutlass/layer/vector.cuh"

namespace kda {

constexpr int kLinearThreads = 128;
constexpr int kLinearLoads =
    9;  // of a lane, in flight together: 32 of them read a row of 2304, the 48B model's hidden size

// Read once: not worth a place in the L1, which holds the inputs.
__device__ __forceinline__ uint4 load_weights(bf16 const* address) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}

// kLanes lanes compute one output of every row. A row's result does not depend on how many there are.
template <int kLanes, int kRows>
__global__ void __launch_bounds__(kLinearThreads) linears_kernel(LinearsParams const p) {
  int const lane = threadIdx.x % kLanes, vectors = p.depth / kVectorChannels;
  int const output = blockIdx.x * (kLinearThreads / kLanes) + threadIdx.x / kLanes;
  int const n = min(output, p.outputs - 1);
  int job = 0;
  while (job + 1 < p.count && n >= p.jobs[job + 1].first) ++job;
  LinearJob const& mine = p.jobs[job];
  bf16 const* const weight = static_cast<bf16 const*>(mine.weight) + int64_t(n - mine.first) * p.depth;
  bf16 const* const x = static_cast<bf16 const*>(mine.x);

  float sum[kRows] = {};
  for (int first = lane; first < vectors; first += kLanes * kLinearLoads) {
    uint4 packed[kLinearLoads];
#pragma unroll
    for (int i = 0; i < kLinearLoads; ++i) {
      int const v = first + i * kLanes;
      packed[i] = v < vectors ? load_weights(weight + v * kVectorChannels) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLinearLoads; ++i) {
      int const v = first + i * kLanes;
      if (v >= vectors) break;
      Channels w, input;
      unpack(packed[i], w);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        unpack(load_vector(x + int64_t(min(row, p.rows - 1)) * p.depth + v * kVectorChannels), input);
#pragma unroll
        for (int c = 0; c < kVectorChannels; ++c) sum[row] += w[c] * input[c];
      }
    }
  }
  bf16* const out = static_cast<bf16*>(p.out) + int64_t(mine.first) * p.rows + n - mine.first;
  int const stride = (job + 1 < p.count ? p.jobs[job + 1].first : p.outputs) - mine.first;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], step);
    if (lane == 0 && row < p.rows && output < p.outputs) out[int64_t(row) * stride] = __float2bfloat16_rn(sum[row]);
  }
}

}  // namespace kda
