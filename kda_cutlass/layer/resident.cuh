// A projection of a few rows, the last of a row of kernels: its weights are on their way to shared memory while the kernels
// before it still run, so that only the product is left when these have ended. A CTA an SM takes an equal part of the
// outputs, whose weights lie side by side in memory.
//
// A product of the tensor cores takes 256 weights at a time, whatever their place: its left operand is 8 pieces of the depth
// of two outputs, its right one the same pieces of x, a column each, and what matters of the result is where row and
// column speak of the same piece. (With 16 outputs on the left, 18 of a CTA would cost as much as 32.)
#pragma once

#include "kda_cutlass/layer/linears.cuh"

namespace kda {

constexpr int kResidentWarps = 8;
constexpr int kResidentStep = 32 * kVectorChannels;  // of the depth: what the depth is a multiple of
constexpr int kResidentMost = 24;                    // outputs of a CTA
constexpr int kResidentRows = 4;                     // at most
constexpr int kResidentWave = 6;                     // outputs whose weights are on their way together
constexpr int kResidentWaves = kResidentMost / kResidentWave;

struct ResidentParams {
  LinearJob job;
  int depth = 0, rows = 0;
  int each = 0;  // outputs of a CTA
  void* out = nullptr;
};

// In shared memory: barriers, sums, weights.
struct ResidentLayout {
  static constexpr int kBarrierBytes = kResidentWaves * sizeof(uint64_t);
  static constexpr int kPieces = 8 * kResidentWarps;  // sums of an output
  int row_bytes, sums_bytes, bytes;

  __host__ __device__ ResidentLayout(int depth, int pairs)
      : row_bytes(depth * static_cast<int>(sizeof(bf16))),
        sums_bytes(2 * pairs * kPieces * static_cast<int>(sizeof(float))),
        bytes(kBarrierBytes + sums_bytes + 2 * pairs * row_bytes) {}
};

// kPairs: of outputs, at least p.each. What is read behind the last output only goes to sums that nobody reads.
template <int kPairs>
__global__ void __launch_bounds__(32 * kResidentWarps, 1) resident_linears_kernel(ResidentParams const p) {
  extern __shared__ __align__(128) char memory[];
  ResidentLayout const layout(p.depth, kPairs);
  auto* const arrived = reinterpret_cast<TransactionBarrier*>(memory);                   // a wave each
  float* const sums = reinterpret_cast<float*>(memory + ResidentLayout::kBarrierBytes);  // [output][piece]
  char* const weights = memory + ResidentLayout::kBarrierBytes + layout.sums_bytes;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
  int const first = blockIdx.x * p.each, count = min(p.each, p.job.outputs - first);
  int const waves = (count + kResidentWave - 1) / kResidentWave;

  if (threadIdx.x == 0) {
    for (int wave = 0; wave < waves; ++wave) {
      arrived[wave].init(1);
      arrived[wave].arrive_and_expect_tx(min(kResidentWave, count - wave * kResidentWave) * layout.row_bytes);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (warp == 0) {  // not all waves at once: what the kernels before still load would stand behind them
#pragma unroll 1
    for (int wave = 0; wave < waves; ++wave) {
      if (wave > 0) arrived[wave - 1].wait(0);
      int const o = wave * kResidentWave + lane;
      if (lane < kResidentWave && o < count) {
        cute::SM90_BULK_COPY_G2S::copy(static_cast<bf16 const*>(p.job.weight) + int64_t(first + o) * p.depth,
                                       reinterpret_cast<uint64_t*>(&arrived[wave]), weights + o * layout.row_bytes,
                                       layout.row_bytes);
      }
    }
  }

  // First once for the sake of the instructions, whose way here takes longer than they do: with what lies there, while the
  // kernels before still run.
#pragma unroll 1
  for (int r = -1; r < p.rows; ++r) {
    if (r == 0) start_reading_inputs();
    char const* const x = static_cast<char const*>(p.job.x) + int64_t(max(r, 0)) * layout.row_bytes;
    float sum[kPairs][4] = {};
#pragma unroll 1
    for (int at = threadIdx.x * sizeof(uint4); at < layout.row_bytes; at += 32 * kResidentWarps * sizeof(uint4)) {
      uint4 const input = __ldcg(reinterpret_cast<uint4 const*>(x + at));  // not to be found in the L1 the second time
      if (r == 0) {
        for (int wave = 0; wave < waves; ++wave) arrived[wave].wait(0);
      }
      char const* weight = weights + at;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        mma_linear_step(sum[i], *reinterpret_cast<uint4 const*>(weight),
                        *reinterpret_cast<uint4 const*>(weight + layout.row_bytes), input);
        weight += 2 * layout.row_bytes;
      }
    }
    // Accumulator i of a lane: piece `group` of the first output (of the second from i = 2 on), column 2 * quarter (+ 1
    // where i is odd).
    if (group / 2 == quarter) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        float* const target = sums + 2 * i * ResidentLayout::kPieces + 8 * warp + group;
        target[0] = group % 2 ? sum[i][1] : sum[i][0];
        target[ResidentLayout::kPieces] = group % 2 ? sum[i][3] : sum[i][2];
      }
    }
    __syncthreads();
    // Eight lanes an output.
    constexpr int kLanes = 8;
    static_assert(ResidentLayout::kPieces == 8 * kLanes && 32 * kResidentWarps / kLanes >= kResidentMost);
    int const o = threadIdx.x / kLanes;
    float4 const* const pieces =
        reinterpret_cast<float4 const*>(sums + min(o, 2 * kPairs - 1) * ResidentLayout::kPieces) + threadIdx.x % kLanes;
    float4 const low = pieces[0], high = pieces[kLanes];
    float total = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
    if (r >= 0 && o < count && threadIdx.x % kLanes == 0) {
      static_cast<bf16*>(p.out)[int64_t(r) * p.job.outputs + first + o] = __float2bfloat16_rn(total);
    }
    __syncthreads();
  }
}

}  // namespace kda
