// Prepare: everything of a chunk that does not need the state, for all chunks and heads in parallel.
//
// One CTA of 16 warps takes one chunk of one value head. Warp w works on the 8 tokens of run w / 2 and the 64 channels
// of half w % 2; a lane owns two neighbouring channels and walks the run's tokens, so cumulative decays are running
// sums in registers. Two runs are a block of 16 tokens. Every pair (i, j) of the chunk's two 64 x 64 products is factored
// through an anchor between i and j, so that no factor overflows whatever the gate:
//   blocks below the diagonal: row factor exp(G_i - G_start(block i)), column factor exp(G_end(block j) - G_j), both at
//                              most 1, and for blocks further apart the decay of the block between, folded into one side;
//   diagonal blocks:           anchored between the two runs, with the log decay of one token clamped to -10, so that both
//                              factors stay within e^+-80; what the clamp lets through is under the rounding of bf16.
#pragma once

#include <cuda.h>

#include "gate.cuh"
#include "record.cuh"

namespace kda {

constexpr int kRun = 8;
constexpr int kRuns = kChunk / kRun;
constexpr int kPrepareThreads = 2 * kRuns * 32;
constexpr int kBlock = 16;
constexpr int kBlocks = kChunk / kBlock;
constexpr float kDiagonalClamp = -10.f * kLog2e;  // lets through at most e^-10, under the rounding of bf16

// bf16 operands, each of four tiles of 16 tokens x 128 channels, as two panels of 64 channels.
enum Operand : int {
  kDiagonalQ,  // tiles: the blocks. Row factors of q and k, column factor of k; first q and k themselves
  kDiagonalK,
  kDiagonalCol,
  kRowQ,  // tiles: blocks 1, 2, 3 and block 3 seen across block 2
  kRowK,
  kColK,  // tiles: block 0, block 0 seen across block 1, blocks 1 and 2
  kOperands
};
constexpr int kRowFar = 3, kColFar = 1;
constexpr int kTileBytes = kBlock * kPanelRowBytes;  // of one panel
constexpr int kPanelBytes = kChunk * kPanelRowBytes;
constexpr int kOperandBytes = 2 * kPanelBytes;

constexpr int kBlockPitch = 20;  // floats a row of an fp32 16 x 16 block: rows fall into different banks
using Block = float[kBlock * kBlockPitch];

struct PrepareSmem {
  alignas(1024) char operands[kOperands][2][kPanelBytes];
  alignas(8) uint64_t loaded;     // q and k
  Block a_below[6];               // beta_i Akk of the blocks below the diagonal, see below_index()
  float total[kRuns][kHeadDim];   // log2 decay of a whole run
  float square_sum[2][kChunk];    // of q and of k, per token
  float4 token_scale[2][kChunk];  // factor of q, factor of k, beta times that, unused; a copy for each half
  float beta[kChunk];
  // Reused once their operand tiles are read, the diagonal ones by the warp that read them.
  __device__ Block& diagonal_a(int b) { return *reinterpret_cast<Block*>(operands[kDiagonalQ][0] + b * kTileBytes); }
  __device__ Block& diagonal_t(int b) { return *reinterpret_cast<Block*>(operands[kDiagonalQ][1] + b * kTileBytes); }
  __device__ Block& merged_t(int p) { return *reinterpret_cast<Block*>(operands[kDiagonalK][0] + p * kTileBytes); }
  __device__ char* t_panel() { return operands[kRowQ][0]; }
  __device__ char* a_qk_panel() { return operands[kRowQ][1]; }
};
static_assert(sizeof(Block) <= kTileBytes);
static_assert(sizeof(PrepareSmem) <= 113 * 1024, "two CTAs an SM");

__device__ __forceinline__ int below_index(int i, int j) { return i * (i - 1) / 2 + j; }  // block (i, j), j < i

constexpr uint64_t kStreamed = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

struct PrepareParams {
  CUtensorMap q_map, k_map;  // boxes of 64 channels x 64 tokens of one head, as panels
  TensorView g, beta;
  bool g_is_fp32, beta_is_fp32;
  const float* A_log;
  const float* dt_bias;
  Sequences sequences;
  Slab slab;
  int value_heads, heads_per_key;  // HV, HV / H
  float scale, lower_bound;
  bool qk_l2norm, beta_sigmoid, allow_neg_eigval;
};

struct Product {  // 16 x 16, as two halves of 8 columns
  float d[2][4] = {};
};
// rows[16 x 128] * cols[16 x 128]^T for the rows of q and of k.
__device__ __forceinline__ void multiply(Product& q_out, Product& k_out, char const* rows_q, char const* rows_k,
                                         char const* cols, int lane) {
  int const matrix = lane >> 3, row = lane & 7;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    int const half = (s >> 2) * kPanelBytes, unit = 2 * (s & 3);
    int const a_offset = half + panel_offset((matrix & 1) * 8 + row, unit + (matrix >> 1));
    uint32_t a[4], b[4];
    ldmatrix_x4(b, cols + half + panel_offset((matrix >> 1) * 8 + row, unit + (matrix & 1)));
    ldmatrix_x4(a, rows_q + a_offset);
    mma_bf16(q_out.d[0], a, b[0], b[1]);
    mma_bf16(q_out.d[1], a, b[2], b[3]);
    ldmatrix_x4(a, rows_k + a_offset);
    mma_bf16(k_out.d[0], a, b[0], b[1]);
    mma_bf16(k_out.d[1], a, b[2], b[3]);
  }
}

// Accumulator layout of a 16 x 16 product: element e of half n is row lane/4 + 8*(e/2), column 8n + 2*(lane%4) + e%2.
template <class F>
__device__ __forceinline__ void for_each_pair(int lane, F&& f) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(n, 2 * h, (lane >> 2) + 8 * h, 8 * n + 2 * (lane & 3));
}

__device__ __forceinline__ void store_block(Block& block, Product const& p, int lane) {
  for_each_pair(lane, [&](int n, int e, int row, int col) {
    *reinterpret_cast<float2*>(&block[row * kBlockPitch + col]) = make_float2(p.d[n][e], p.d[n][e + 1]);
  });
}
// A block rounded to bf16: the pairs of columns of for_each_pair.
struct RoundedBlock {
  uint32_t pair[2][2] = {};
};
__device__ __forceinline__ RoundedBlock rounded(Product const& p) {
  RoundedBlock block;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) block.pair[n][h] = pack_bf16(p.d[n][2 * h], p.d[n][2 * h + 1]);
  return block;
}
// Block (i, j) of a 64 x 64 panel.
__device__ __forceinline__ void store_to_panel(char* panel, int i, int j, RoundedBlock const& block, int lane) {
  for_each_pair(lane, [&](int n, int e, int row, int col) {
    *reinterpret_cast<uint32_t*>(panel + panel_offset(16 * i + row, 2 * j + (col >> 3)) + 2 * (col & 7)) =
        block.pair[n][e / 2];
  });
}
__device__ __forceinline__ Product load_block(Block const& block, int lane) {
  Product p;
  for_each_pair(lane, [&](int n, int e, int row, int col) {
    float2 const pair = *reinterpret_cast<float2 const*>(&block[row * kBlockPitch + col]);
    p.d[n][e] = pair.x;
    p.d[n][e + 1] = pair.y;
  });
  return p;
}

// A 16 x 16 fp32 block as left operand of tf32 MMAs, in two parts whose sum holds 22 bits of it. Within 8 columns the
// inner index runs in the order 0, 2, 4, 6, 1, 3, 5, 7, so that an accumulator can be the next product's left operand
// as it stands.
struct LeftOperand {
  uint32_t high[2][4], low[2][4];
  __device__ __forceinline__ void set(int s, int e, float x) {
    high[s][e] = to_tf32(x);
    low[s][e] = to_tf32(x - __uint_as_float(high[s][e]));
  }
};
__device__ __forceinline__ LeftOperand left_operand(Block const& block, int lane) {
  LeftOperand x;
  int const row = lane >> 2, inner = 2 * (lane & 3);
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 const pair = *reinterpret_cast<float2 const*>(&block[(row + 8 * h) * kBlockPitch + 8 * s + inner]);
      x.set(s, h, pair.x);
      x.set(s, 2 + h, pair.y);
    }
  return x;
}
__device__ __forceinline__ LeftOperand negated_left_operand(Product const& p) {
  LeftOperand x;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    x.set(s, 0, -p.d[s][0]);
    x.set(s, 1, -p.d[s][2]);
    x.set(s, 2, -p.d[s][1]);
    x.set(s, 3, -p.d[s][3]);
  }
  return x;
}
// d += x * y, as exact as fp32 but for the products of the two low parts: with equal keys the merges below cancel nearly
// everything, and what tf32 alone leaves behind would be as large as the rounding of T to bf16.
__device__ __forceinline__ void multiply_fp32(Product& d, LeftOperand const& x, Block const& y, int lane) {
  int const row = lane >> 2, inner = 2 * (lane & 3);
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float const y0 = y[(8 * s + inner) * kBlockPitch + 8 * n + row];
      float const y1 = y[(8 * s + inner + 1) * kBlockPitch + 8 * n + row];
      uint32_t const high0 = to_tf32(y0), high1 = to_tf32(y1);
      mma_tf32(d.d[n], x.high[s], to_tf32(y0 - __uint_as_float(high0)), to_tf32(y1 - __uint_as_float(high1)));
      mma_tf32(d.d[n], x.low[s], high0, high1);
      mma_tf32(d.d[n], x.high[s], high0, high1);
    }
}

// (I + A)^-1 of a strictly lower 16 x 16 block by forward substitution in fp32, one column a lane.
__device__ __forceinline__ void invert_diagonal(Block& t, Block const& a, int lane) {
  int const column = lane & 15;
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float sum[4] = {i == column ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int m = 0; m < i; m += 4) {
      float4 const row = *reinterpret_cast<float4 const*>(&a[i * kBlockPitch + m]);
      sum[0] -= row.x * x[m];
      if (m + 1 < i) sum[1] -= row.y * x[m + 1];
      if (m + 2 < i) sum[2] -= row.z * x[m + 2];
      if (m + 3 < i) sum[3] -= row.w * x[m + 3];
    }
    x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  if (lane < kBlock) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) t[i * kBlockPitch + column] = x[i];
  }
}

// Squares summed over the channels for 16 tokens: the diagonal of the tile's product with itself.
__device__ __forceinline__ void store_square_sums(float* sums, char const* tile, int lane) {
  int const matrix = lane >> 3, row = lane & 7;
  Product product;
#pragma unroll
  for (int s = 0; s < kHeadDim / 16; ++s) {
    int const half = (s >> 2) * kPanelBytes, unit = 2 * (s & 3);
    uint32_t a[4], b[4];
    ldmatrix_x4(a, tile + half + panel_offset((matrix & 1) * 8 + row, unit + (matrix >> 1)));
    ldmatrix_x4(b, tile + half + panel_offset((matrix >> 1) * 8 + row, unit + (matrix & 1)));
    mma_bf16(product.d[0], a, b[0], b[1]);
    mma_bf16(product.d[1], a, b[2], b[3]);
  }
  int const diagonal = lane >> 2;
  if ((lane & 3) == diagonal >> 1) {
    sums[diagonal] = product.d[0][diagonal & 1];
    sums[8 + diagonal] = product.d[1][2 + (diagonal & 1)];
  }
}

// A lane's pair of channels of a run's tokens, one token a row; zero from `tokens` on.
template <class Pair>
__device__ __forceinline__ void load_rows(Pair (&pairs)[kRun], void const* first, int64_t row_bytes, int tokens) {
  auto const* row = static_cast<char const*>(first);
  if (tokens >= kRun) {
#pragma unroll
    for (int i = 0; i < kRun; ++i, row += row_bytes) pairs[i] = __ldcs(reinterpret_cast<Pair const*>(row));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i, row += row_bytes)
      pairs[i] = i < tokens ? __ldcs(reinterpret_cast<Pair const*>(row)) : Pair{};
  }
}

// The kernel before this one is the recurrence of the slab before. One CTA makes this kernel's end mean the end of that
// one too, so that the next prepare, which takes its buffer, need only come after the recurrence of this slab.
__device__ __forceinline__ void outlast_previous_kernel() {
  if (blockIdx.x == 0 && blockIdx.y == 0) wait_for_previous_kernel();
}

template <Gate kGate>
__global__ void __launch_bounds__(kPrepareThreads, 2) prepare_kernel(const __grid_constant__ PrepareParams p) {
  extern __shared__ __align__(1024) char smem_bytes[];
  PrepareSmem& smem = *reinterpret_cast<PrepareSmem*>(smem_bytes);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int const run = warp / 2, block = run / 2, half = warp % 2, channel = 64 * half + 2 * lane;

  let_next_kernel_start();  // the recurrence of this slab may take SMs that fall idle; it waits for all CTAs

  // ---- which chunk, which head
  int const head = blockIdx.x, slot = p.slab.begin + static_cast<int>(blockIdx.y);
  int const seq = p.sequences.owner(slot, lane);
  int64_t const chunk_start = int64_t(slot - p.sequences.slot_base(seq)) * kChunk;
  int64_t const remaining = p.sequences.length(seq) - chunk_start;
  if (chunk_start < 0 || remaining <= 0) return outlast_previous_kernel();
  int const chunk_tokens = static_cast<int>(min(remaining, int64_t(kChunk)));
  int const tokens = chunk_tokens - kRun * run;  // of this warp's run, if positive
  int const batch = p.sequences.batch(seq);
  int64_t const first_token = p.sequences.first_token(seq) + chunk_start;
  Record& record = p.slab.records[int64_t(blockIdx.y) * p.value_heads + head];

  // ---- load: q and k by TMA to where their diagonal factors will lie, g by a pair of channels a lane and token
  if (threadIdx.x == 0) {
    TransactionBarrier::init(&smem.loaded, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    TransactionBarrier::arrive_and_expect_tx(&smem.loaded, 2 * kOperandBytes);
    int const key_head = head / p.heads_per_key;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      cute::SM90_TMA_LOAD_4D::copy(&p.k_map, &smem.loaded, kStreamed, smem.operands[kDiagonalK][h], 64 * h, key_head,
                                   static_cast<int32_t>(first_token), batch);
      cute::SM90_TMA_LOAD_4D::copy(&p.q_map, &smem.loaded, kStreamed, smem.operands[kDiagonalQ][h], 64 * h, key_head,
                                   static_cast<int32_t>(first_token), batch);
    }
  }
  float2 g[kRun];  // log2 decay a token
  {
    int64_t const first =
        p.g.stride_batch * batch + p.g.stride_token * (first_token + kRun * run) + p.g.stride_head * head + channel;
    if (p.g_is_fp32) {
      load_rows(g, static_cast<float const*>(p.g.data) + first, p.g.stride_token * sizeof(float), tokens);
    } else {
      uint32_t g_pair[kRun];
      load_rows(g_pair, static_cast<bf16 const*>(p.g.data) + first, p.g.stride_token * sizeof(bf16), tokens);
#pragma unroll
      for (int i = 0; i < kRun; ++i) g[i] = make_float2(unpack_lo(g_pair[i]), unpack_hi(g_pair[i]));
    }
  }

  if (threadIdx.x < kChunk) {
    float beta = 0.f;
    if (threadIdx.x < chunk_tokens) {
      int64_t const offset =
          p.beta.stride_batch * batch + p.beta.stride_token * (first_token + threadIdx.x) + p.beta.stride_head * head;
      beta = p.beta_is_fp32 ? static_cast<float const*>(p.beta.data)[offset]
                            : __bfloat162float(static_cast<bf16 const*>(p.beta.data)[offset]);
      if (p.beta_sigmoid) beta = (p.allow_neg_eigval ? 2.f : 1.f) / (1.f + __expf(-beta));
    }
    smem.beta[threadIdx.x] = beta;
    record.factors.beta[ChunkFactors::index(threadIdx.x)] = beta;
  }

  // ---- gate
  {
    float const rate = kGate != Gate::kGiven && p.A_log != nullptr ? exp2f(p.A_log[head] * kLog2e) : 1.f;
    float2 dt_bias = make_float2(0.f, 0.f);
    if (kGate != Gate::kGiven && p.dt_bias != nullptr)
      dt_bias = *reinterpret_cast<float2 const*>(p.dt_bias + head * kHeadDim + channel);
    LogDecay<kGate> const x_decay(rate, p.lower_bound, dt_bias.x), y_decay(rate, p.lower_bound, dt_bias.y);
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kRun; ++i) g[i] = make_float2(x_decay(g[i].x), y_decay(g[i].y));
    if (tokens < kRun) {  // past the end of the sequence the state must stand still
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (i >= tokens) g[i] = make_float2(0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      total.x += g[i].x;
      total.y += g[i].y;
    }
    *reinterpret_cast<float2*>(&smem.total[run][channel]) = total;
  }

  // ---- norms
  TransactionBarrier::wait(&smem.loaded, 0);
  if (p.qk_l2norm && warp < 2 * kBlocks)
    store_square_sums(&smem.square_sum[warp % 2][kBlock * (warp / 2)],
                      smem.operands[warp % 2 == 0 ? kDiagonalQ : kDiagonalK][0] + warp / 2 * kTileBytes, lane);
  __syncthreads();
  float4* const token_scale = smem.token_scale[half] + kRun * run;
  if (lane < kRun) {
    int const token = kRun * run + lane;
    float q_scale = 1.f, k_scale = 1.f;
    if (p.qk_l2norm && lane < tokens) {
      q_scale = rsqrtf(smem.square_sum[0][token] + 1e-6f);
      k_scale = rsqrtf(smem.square_sum[1][token] + 1e-6f);
    }
    token_scale[lane] = make_float4(q_scale * p.scale, k_scale, k_scale * smem.beta[token], 0.f);
  }
  __syncwarp();

  // ---- decays of the other runs and blocks
  bool const odd_run = run & 1, has_row = block > 0, is_last = block == kBlocks - 1, is_first = block == 0;
  float2 before = make_float2(0.f, 0.f), after = before;     // of the block's other run, if it lies before or after
  float2 prefix = before, suffix = before, middle = before;  // of the blocks before, after, and next towards the middle
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    float2 const total = *reinterpret_cast<float2 const*>(&smem.total[r][channel]);
    if (r / 2 < block) prefix.x += total.x, prefix.y += total.y;
    if (r / 2 > block) suffix.x += total.x, suffix.y += total.y;
    if (r + 1 == run && odd_run) before = total;
    if (r == run + 1 && !odd_run) after = total;
    if ((is_first && r / 2 == 1) || (is_last && r / 2 == kBlocks - 2)) middle.x += total.x, middle.y += total.y;
  }
  if (run == 0) {
    float2 const own = *reinterpret_cast<float2 const*>(&smem.total[0][channel]);
    *reinterpret_cast<float2*>(&record.factors.decay[ChunkFactors::index(channel)]) =
        make_float2(exp2f(own.x + after.x + suffix.x), exp2f(own.y + after.y + suffix.y));
  }
  prefix = make_float2(exp2_approx(prefix.x), exp2_approx(prefix.y));
  suffix = make_float2(exp2_approx(suffix.x), exp2_approx(suffix.y));
  middle = make_float2(exp2_approx(middle.x), exp2_approx(middle.y));

  // ---- factors: operands of the two products to shared memory, operands of the recurrence to the record. This lane's
  // word of row i lies at (base ^ 16 i) + 128 i, the swizzle of a panel, for a base that holds the lane's own unit.
  uint32_t const lane_word = (lane >> 2) << 4 | (lane & 3) << 2;
  uint32_t const first_tile =
      cute::cast_smem_ptr_to_uint(smem.operands) + half * kPanelBytes + (run & 1) * kRun * kPanelRowBytes + lane_word;
  uint32_t const own_tile = first_tile + block * kTileBytes;
  uint32_t const row_tile = first_tile + (block - 1) * kTileBytes + kRowQ * kOperandBytes;
  uint32_t const col_tile = first_tile + (is_first ? 0 : 1 + block) * kTileBytes + kColK * kOperandBytes;
  uint64_t const record_word =
      reinterpret_cast<uint64_t>(record.k_decayed[half]) + run * kRun * kPanelRowBytes + lane_word;
  if (tokens < kRun) {  // the rows past the end are another sequence's
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i >= tokens) {
        uint32_t const word = (own_tile ^ i << 4) + i * kPanelRowBytes;
        store_word<kDiagonalQ * kOperandBytes>(word, 0);
        store_word<kDiagonalK * kOperandBytes>(word, 0);
      }
  }
  auto times = [](float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); };
  auto scaled = [](float2 a, float by) { return pack_bf16(a.x * by, a.y * by); };
  auto packed = [](float2 a) { return pack_bf16(a.x, a.y); };
  auto unpacked = [](uint32_t pair) { return make_float2(unpack_lo(pair), unpack_hi(pair)); };
  auto exp2_pair = [](float2 a) { return make_float2(exp2_approx(a.x), exp2_approx(a.y)); };
  auto add = [](float2& a, float2 b) { a.x += b.x, a.y += b.y; };
  auto clamped = [](float2 a) { return make_float2(fmaxf(a.x, kDiagonalClamp), fmaxf(a.y, kDiagonalClamp)); };
  {
    float2 sum = before;
    static_for<kRun>([&](auto index) {  // decay from the block's start through token i
      constexpr int i = index.value, kRow = i * kPanelRowBytes;
      add(sum, g[i]);
      float4 const scales = token_scale[i];
      float2 const a = exp2_pair(sum);
      uint32_t const word = own_tile ^ i << 4;
      float2 const qa = times(unpacked(load_word<kDiagonalQ * kOperandBytes + kRow>(word)), a);
      float2 const ka = times(unpacked(load_word<kDiagonalK * kOperandBytes + kRow>(word)), a);
      uint64_t const out = record_word ^ i << 4;
      store_word_global<offsetof(Record, q_decayed) + kRow>(out, scaled(times(qa, prefix), scales.x));
      store_word_global<offsetof(Record, k_decayed) + kRow>(out, scaled(times(ka, prefix), -scales.z));
      if (has_row) {
        store_word<kRow>(row_tile ^ i << 4, packed(qa));
        store_word<kRow + (kRowK - kRowQ) * kOperandBytes>(row_tile ^ i << 4, packed(ka));
      }
      if (is_last) {
        store_word<kRow + kRowQ * kOperandBytes + kRowFar * kTileBytes>(first_tile ^ i << 4, packed(times(qa, middle)));
        store_word<kRow + kRowK * kOperandBytes + kRowFar * kTileBytes>(first_tile ^ i << 4, packed(times(ka, middle)));
      }
    });
  }
  {
    // The clamped decay from the block's middle through token i: the odd run's tokens lie behind it, the even run's before.
    float2 from_middle = make_float2(0.f, 0.f), sum = after;
    if (odd_run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) add(from_middle, clamped(g[i]));
    }
    static_for<kRun>([&](auto index) {  // decay after token i to the block's end
      constexpr int i = kRun - 1 - index.value, kRow = i * kPanelRowBytes;
      uint32_t const word = own_tile ^ i << 4;
      float2 const q = unpacked(load_word<kDiagonalQ * kOperandBytes + kRow>(word));
      float2 const k = unpacked(load_word<kDiagonalK * kOperandBytes + kRow>(word));
      float2 const kc = times(k, exp2_pair(sum));
      uint64_t const out = record_word ^ i << 4;
      store_word_global<offsetof(Record, k_remaining) + kRow>(out, scaled(times(kc, suffix), token_scale[i].y));
      if (!is_last) store_word<kRow>(col_tile ^ i << 4, packed(kc));
      if (is_first)
        store_word<kRow + kColK * kOperandBytes + kColFar * kTileBytes>(first_tile ^ i << 4, packed(times(kc, middle)));
      float2 const down = exp2_pair(from_middle), up = exp2_pair(make_float2(-from_middle.x, -from_middle.y));
      store_word<kDiagonalQ * kOperandBytes + kRow>(word,
                                                    packed(times(q, down)));  // over q and k, read for the last time
      store_word<kDiagonalK * kOperandBytes + kRow>(word, packed(times(k, down)));
      store_word<kDiagonalCol * kOperandBytes + kRow>(word, packed(times(k, up)));
      float2 const own = clamped(g[i]);
      add(from_middle, make_float2(-own.x, -own.y));
      add(sum, g[i]);
    });
  }
  __syncthreads();

  // ---- the two products: warps 0-3 a diagonal block each, with its inverse, warps 4-9 a block below the diagonal each.
  // A far block reads its row or column factor with the decay of the block between: (2, 0), (3, 0) the column, (3, 0),
  // (3, 1) the row.
  bool const diagonal = warp < kBlocks;
  RoundedBlock a_qk;
  if (warp < kBlocks + 6) {
    int const below = warp - kBlocks;  // (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2): the order of below_index()
    int const i = diagonal ? warp : below == 0 ? 1 : below < 3 ? 2 : 3;
    int const j = diagonal ? warp : below - i * (i - 1) / 2;
    int const rows = diagonal ? i : i == 3 && j < 2 ? kRowFar : i - 1;
    int const cols = diagonal ? i : j > 0 ? 1 + j : i == 1 ? 0 : kColFar;
    Product q_product, k_product;
    multiply(q_product, k_product, smem.operands[diagonal ? kDiagonalQ : kRowQ][0] + rows * kTileBytes,
             smem.operands[diagonal ? kDiagonalK : kRowK][0] + rows * kTileBytes,
             smem.operands[diagonal ? kDiagonalCol : kColK][0] + cols * kTileBytes, lane);
    int const shift = diagonal ? 0 : kBlock;  // every entry of the other blocks lies below the diagonal
    for_each_pair(lane, [&](int n, int e, int row, int col) {  // above the diagonal lies anything: select, never scale
      float4 const scales = smem.token_scale[0][kBlock * i + row];
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float const k_scale = smem.token_scale[0][kBlock * j + col + x].y;
        q_product.d[n][e + x] = row + shift >= col + x ? scales.x * k_scale * q_product.d[n][e + x] : 0.f;
        k_product.d[n][e + x] = row + shift > col + x ? scales.z * k_scale * k_product.d[n][e + x] : 0.f;
      }
    });
    a_qk = rounded(q_product);
    __syncwarp();  // a diagonal warp has read its tiles, which its block overlays
    store_block(diagonal ? smem.diagonal_a(warp) : smem.a_below[below], k_product, lane);
    if (diagonal) {
      __syncwarp();
      invert_diagonal(smem.diagonal_t(warp), smem.diagonal_a(warp), lane);
    }
  }
  __syncthreads();

  // ---- Aqk, and T as it gets ready, to panels over the row factors
  if (warp < kBlocks) {
    store_to_panel(smem.a_qk_panel(), warp, warp, a_qk, lane);
  } else if (warp < kBlocks + 6) {
    int const below = warp - kBlocks, i = below == 0 ? 1 : below < 3 ? 2 : 3;
    store_to_panel(smem.a_qk_panel(), i, below - i * (i - 1) / 2, a_qk, lane);
    if (below < kBlocks)
      store_to_panel(smem.t_panel(), below, below, rounded(load_block(smem.diagonal_t(below), lane)), lane);
  } else {  // above the diagonal, where both are zero: (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)
    int const above = warp - kBlocks - 6;
    int const i = above < 3 ? 0 : above < 5 ? 1 : 2, j = above < 3 ? above + 1 : above < 5 ? above - 1 : 3;
    store_to_panel(smem.t_panel(), i, j, RoundedBlock{}, lane);
    store_to_panel(smem.a_qk_panel(), i, j, RoundedBlock{}, lane);
  }

  // ---- the inverse of the two 32 x 32 diagonal blocks: -T_i A_ij T_j below the diagonal
  if (warp < 2) {
    int const i = 2 * warp + 1, j = 2 * warp;
    Product left, merged;
    multiply_fp32(left, left_operand(smem.diagonal_t(i), lane), smem.a_below[below_index(i, j)], lane);
    multiply_fp32(merged, negated_left_operand(left), smem.diagonal_t(j), lane);
    store_block(smem.merged_t(warp), merged, lane);
    store_to_panel(smem.t_panel(), i, j, rounded(merged), lane);
  }
  __syncthreads();

  // ---- and the 32 x 32 block below: row block 2 + warp / 2, column block warp % 2 of -T_B A_BA T_A
  if (warp < 4) {
    int const i = 2 + warp / 2, j = warp % 2;
    Product left[2], merged;
    {
      LeftOperand const x = left_operand(i == 2 ? smem.diagonal_t(2) : smem.merged_t(1), lane);
      multiply_fp32(left[0], x, smem.a_below[below_index(2, 0)], lane);
      multiply_fp32(left[1], x, smem.a_below[below_index(2, 1)], lane);
    }
    if (i == 3) {
      LeftOperand const x = left_operand(smem.diagonal_t(3), lane);
      multiply_fp32(left[0], x, smem.a_below[below_index(3, 0)], lane);
      multiply_fp32(left[1], x, smem.a_below[below_index(3, 1)], lane);
    }
    multiply_fp32(merged, negated_left_operand(left[1]), j == 0 ? smem.merged_t(0) : smem.diagonal_t(1), lane);
    if (j == 0) multiply_fp32(merged, negated_left_operand(left[0]), smem.diagonal_t(0), lane);
    store_to_panel(smem.t_panel(), i, j, rounded(merged), lane);
  }
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    static_assert(offsetof(Record, a_qk) == offsetof(Record, t) + kPanelBytes);
    cute::SM90_BULK_COPY_S2G::copy(smem.t_panel(), record.t, 2 * kPanelBytes);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
  }
  outlast_previous_kernel();
}

}  // namespace kda
