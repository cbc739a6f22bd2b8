// Projections of a few rows: every weight is read once, and that is all the time there is. Several projections share a
// launch, because each of them alone is shorter than a launch and too small for the card.
//
// One row: a warp computes an output, and then the next. More rows: a block computes 16 outputs of every row with tensor
// cores, so eight rows cost what one costs; its warps share the depth between them.
#pragma once

#include "kda_cutlass/layer/vector.cuh"

namespace kda {

// Read once: not worth a place in the L1.
__device__ __forceinline__ uint4 load_weights(bf16 const* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// The kernel before may have written x; the weights were there before it. The one after starts only now, so what it does
// before it waits comes after all kernels before this one: it may read what any of them wrote.
__device__ __forceinline__ void start_reading_inputs() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

constexpr int kRowWarps = 4;   // of a block
constexpr int kRowBlocks = 3;  // of an SM; what they leave of its registers is for a CTA of the step's kernel
constexpr int kRowLoads = 9;   // vectors of a lane at a time: 2304 of the depth, the 48B model's hidden size

// One row, the same for all jobs. The card holds all blocks at once; each warp takes one output after the other, with the
// weights of the next on their way.
__global__ void __launch_bounds__(32 * kRowWarps, kRowBlocks + 1) row_linears_kernel(LinearsParams const p) {
  constexpr int kTurn = 32 * kRowLoads;  // vectors
  int const lane = threadIdx.x % 32, vectors = p.depth / kVectorChannels, turns = (vectors + kTurn - 1) / kTurn;
  LinearJob const& last = p.jobs[p.count - 1];
  int const outputs = last.first_output + last.outputs, warps = gridDim.x * kRowWarps;
  struct Place {
    int output, turn;
  };
  auto advance = [&](Place& at) {
    if (++at.turn == turns) at.turn = 0, at.output += warps;
  };
  auto load = [&](Place const& at, uint4(&weights)[kRowLoads]) {
    if (at.output >= outputs) return;
    int job = 0;
    while (job + 1 < p.count && at.output >= p.jobs[job + 1].first_output) ++job;
    bf16 const* const row =
        static_cast<bf16 const*>(p.jobs[job].weight) + int64_t(at.output - p.jobs[job].first_output) * p.depth;
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      int const v = at.turn * kTurn + i * 32 + lane;
      weights[i] = v < vectors ? load_weights(row + v * kVectorChannels) : uint4{};
    }
  };
  Place here = {static_cast<int>(blockIdx.x * kRowWarps + threadIdx.x / 32), 0}, ahead = here;
  uint4 first[kRowLoads], second[kRowLoads], x[kRowLoads];
  auto load_input = [&] {
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      int const v = here.turn * kTurn + i * 32 + lane;
      x[i] = v < vectors ? load_vector(static_cast<bf16 const*>(p.jobs[0].x) + v * kVectorChannels) : uint4{};
    }
  };
  load(ahead, first), advance(ahead);
  load(ahead, second), advance(ahead);
  start_reading_inputs();
  load_input();
  float sum = 0.f;
  auto work = [&](uint4(&weights)[kRowLoads]) {
    if (turns > 1) load_input();
#pragma unroll
    for (int i = 0; i < kRowLoads; ++i) {
      Channels w, in;
      asm volatile("" : "+r"(x[i].x), "+r"(x[i].y), "+r"(x[i].z), "+r"(x[i].w));  // to be unpacked here, not kept so
      unpack(weights[i], w), unpack(x[i], in);
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c) sum += w[c] * in[c];
    }
    load(ahead, weights), advance(ahead);
    if (here.turn + 1 == turns) {
      sum = warp_sum(sum);
      if (lane == 0) static_cast<bf16*>(p.out)[here.output] = __float2bfloat16_rn(sum);
      sum = 0.f;
    }
    advance(here);
  };
#pragma unroll 1
  while (here.output < outputs) {
    work(first);
    if (here.output < outputs) work(second);
  }
}

constexpr int kLinearWarps = 8;

// The job of a block.
__device__ __forceinline__ LinearJob const& job_of(LinearsParams const& p) {
  int job = 0;
  while (job + 1 < p.count && static_cast<int>(blockIdx.x) >= p.jobs[job + 1].first_block) ++job;
  return p.jobs[job];
}

// Accesses of a lane in flight, and blocks on an SM, by the registers that the accumulators leave.
constexpr int linear_loads(int row_tiles) { return row_tiles == 1 ? 5 : 9; }
constexpr int linear_blocks(int row_tiles) { return row_tiles == 1 ? 3 : 2; }

template <int kRowTiles>
__global__ void __launch_bounds__(32 * kLinearWarps, linear_blocks(kRowTiles)) linears_kernel(LinearsParams const p) {
  constexpr int kLinearLoads = linear_loads(kRowTiles);
  __shared__ float partial[kLinearWarps][4 * kRowTiles][32];
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
    if (!waited) start_reading_inputs();
    waited = true;
#pragma unroll
    for (int i = 0; i < kLinearLoads; ++i) {
      if (first + i >= end) break;
      int const depth = (first + i) * kLinearStep + quarter * kVectorChannels;
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        int const row = min(tile * kLinearRowTile + group, p.rows - 1);
        uint4 const input = depth < p.depth ? load_vector(x + int64_t(row) * p.depth + depth) : uint4{};
        mma_linear_step(sum[tile], w[i][0], w[i][1], input);
      }
    }
  }
  if (!waited) start_reading_inputs();

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
