// Projections of a few rows: every weight is read once, by as many threads as the card holds, and that is all the time
// there is. Several projections share a launch, because each of them alone is shorter than a launch and too small for
// the card.
//
// One row: a warp computes an output. More rows: a block computes 16 outputs of every row with tensor cores: weights
// are the left operand, 16 outputs x 16 of the depth, and rows the right one, 8 at a time, so eight rows cost what one
// costs. Its warps share the depth between them. A lane's 16-byte access is 8 of the depth for two steps of the
// product, which only permutes the depth, the same way on both sides.
#pragma once

#include "kda_cutlass/layer/vector.cuh"

namespace kda {

constexpr int kVectorWarps = 4;  // of a block for one row

// How a warp of the kernel for one row shares out its loads, all of which are in flight together: kLanes lanes to an
// output, kLoads vectors of each lane, kOutputs outputs one after the other.
template <int kLanes_, int kOutputs_, int kLoads_>
struct VectorShape {
  static constexpr int kLanes = kLanes_, kOutputs = kOutputs_, kLoads = kLoads_;
  static constexpr int kDepth = kLanes * kLoads * kVectorChannels;  // read at a time
  static constexpr int kBlockOutputs = kVectorWarps * (32 / kLanes) * kOutputs;
};
using ShallowVector = VectorShape<16, 8, 1>;  // a depth of 128: the second projections of the gates
using WideVector = VectorShape<32, 1, 9>;     // 2304, the 48B model's hidden size, and more in turns

constexpr int kLinearWarps = 8;
constexpr int kLinearOutputs = 16;  // of a block
constexpr int kLinearStep = 32;     // of the depth: one access of each lane
constexpr int kLinearRowTile = 8;

// Read once: not worth a place in the L1, which holds the inputs.
__device__ __forceinline__ uint4 load_weights(bf16 const* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The job of a block.
__device__ __forceinline__ LinearJob const& job_of(LinearsParams const& p) {
  int job = 0;
  while (job + 1 < p.count && static_cast<int>(blockIdx.x) >= p.jobs[job + 1].first_block) ++job;
  return p.jobs[job];
}

template <class Shape>
__global__ void __launch_bounds__(32 * kVectorWarps) linear_vector_kernel(LinearsParams const p) {
  constexpr int kLanes = Shape::kLanes, kOutputs = Shape::kOutputs, kLoads = Shape::kLoads;
  let_next_kernel_start();
  int const lane = threadIdx.x % kLanes, vectors = p.depth / kVectorChannels;
  LinearJob const& mine = job_of(p);
  int const output = (blockIdx.x - mine.first_block) * Shape::kBlockOutputs + threadIdx.x / kLanes * kOutputs;
  bf16 const* const weight = static_cast<bf16 const*>(mine.weight) + int64_t(output) * p.depth;
  bf16 const* const x = static_cast<bf16 const*>(mine.x);

  float sum[kOutputs] = {};
  for (int first = 0; first < vectors; first += kLanes * kLoads) {
    uint4 packed[kOutputs][kLoads];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        int const v = first + i * kLanes + lane;
        packed[o][i] = output + o < mine.outputs && v < vectors
                           ? load_weights(weight + o * p.depth + v * kVectorChannels)
                           : uint4{};
      }
    }
    if (first == 0) wait_for_previous_kernel();  // which may have written x; the weights were there before it
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int const v = first + i * kLanes + lane;
      if (v >= vectors) break;
      Channels input;
      unpack(load_vector(x + v * kVectorChannels), input);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        Channels w;
        unpack(packed[o][i], w);
#pragma unroll
        for (int c = 0; c < kVectorChannels; ++c) sum[o] += w[c] * input[c];
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum[o] += __shfl_xor_sync(0xffffffffu, sum[o], step);
    if (lane == 0 && output + o < mine.outputs) {
      static_cast<bf16*>(p.out)[mine.first_output + output + o] = __float2bfloat16_rn(sum[o]);
    }
  }
}

// Accesses of a lane in flight, and blocks on an SM, by the registers that the accumulators leave.
constexpr int linear_loads(int row_tiles) { return row_tiles == 1 ? 5 : 9; }
constexpr int linear_blocks(int row_tiles) { return row_tiles == 1 ? 3 : 2; }

template <int kRowTiles>
__global__ void __launch_bounds__(32 * kLinearWarps, linear_blocks(kRowTiles)) linears_kernel(LinearsParams const p) {
  constexpr int kLinearLoads = linear_loads(kRowTiles);
  __shared__ float partial[kLinearWarps][4 * kRowTiles][32];
  let_next_kernel_start();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  LinearJob const& mine = job_of(p);
  int const first_output = (blockIdx.x - mine.first_block) * kLinearOutputs;
  auto weight_row = [&](int output) {
    return static_cast<bf16 const*>(mine.weight) + int64_t(min(first_output + output, mine.outputs - 1)) * p.depth;
  };
  bf16 const* const weights[2] = {weight_row(group), weight_row(group + 8)};
  bf16 const* const x = static_cast<bf16 const*>(mine.x);

  int const steps = (p.depth + kLinearStep - 1) / kLinearStep, share = (steps + kLinearWarps - 1) / kLinearWarps;
  int const begin = warp * share, end = min(begin + share, steps);
  float sum[kRowTiles][4] = {};
  bool waited = false;
  for (int first = begin; first < end; first += kLinearLoads) {
    uint4 w[kLinearLoads][2];
#pragma unroll
    for (int i = 0; i < kLinearLoads; ++i) {
      int const depth = (first + i) * kLinearStep + quarter * kVectorChannels;
      bool const inside = first + i < end && depth < p.depth;
#pragma unroll
      for (int half = 0; half < 2; ++half) w[i][half] = inside ? load_weights(weights[half] + depth) : uint4{};
    }
    if (!waited) wait_for_previous_kernel();  // which may have written x; the weights were there before it
    waited = true;
#pragma unroll
    for (int i = 0; i < kLinearLoads; ++i) {
      if (first + i >= end) break;
      int const depth = (first + i) * kLinearStep + quarter * kVectorChannels;
      uint32_t const step0[4] = {w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y};
      uint32_t const step1[4] = {w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w};
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        int const row = min(tile * kLinearRowTile + group, p.rows - 1);
        uint4 const input = depth < p.depth ? load_vector(x + int64_t(row) * p.depth + depth) : uint4{};
        mma_bf16(sum[tile], step0, input.x, input.y);
        mma_bf16(sum[tile], step1, input.z, input.w);
      }
    }
  }
  if (!waited) wait_for_previous_kernel();

#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp][4 * tile + i][lane] = sum[tile][i];
  }
  __syncthreads();
  // Accumulator i of a lane: output `group` (+ 8 from i = 2 on), row 2 * quarter (+ 1 where i is odd).
  bf16* const out = static_cast<bf16*>(p.out) + int64_t(mine.first_output) * p.rows + first_output;
  for (int slot = warp; slot < 4 * kRowTiles; slot += kLinearWarps) {
    float total = 0.f;
#pragma unroll
    for (int other = 0; other < kLinearWarps; ++other) total += partial[other][slot][lane];
    int const i = slot % 4, output = group + i / 2 * 8;
    int const row = slot / 4 * kLinearRowTile + 2 * quarter + i % 2;
    if (row < p.rows && first_output + output < mine.outputs) {
      out[int64_t(row) * mine.outputs + output] = __float2bfloat16_rn(total);
    }
  }
}

}  // namespace kda
