// Prepare: everything of a chunk that does not need the state, for all chunks and heads in parallel.
//
// One CTA of 8 warps takes one chunk of one value head. Warp w works on the 16 tokens of block w / 2 and the 64
// channels of half w % 2; a lane owns two neighbouring channels and walks the block's tokens, so cumulative decays
// are running sums in registers. Every pair (i, j) of the chunk's two 64 x 64 products is factored through an anchor
// between i and j (DESIGN section 3), so both factors are at most 1 whatever the gate:
//   blocks below the diagonal: row factor  a_i = exp(G_i - G_start(block i)),  column factor c_j = exp(G_end(block j) - G_j),
//                              and for blocks further apart the decay of the blocks between, folded into one side;
//   diagonal blocks:           anchored at token 7, with the log decay of one token clamped to -10.
#pragma once

#include "gate.cuh"
#include "record.cuh"

namespace kda {

constexpr int kPrepareThreads = 256;
constexpr int kBlock = 16;
constexpr int kBlocks = kChunk / kBlock;
constexpr float kDiagonalClamp = -10.f * kLog2e;  // lets through at most e^-10, under the rounding of bf16

// bf16 operand tiles of 16 tokens x 128 channels, two half panels each.
enum OperandTile : int {
  kDiagonalQ = 0,   // + 3 * block: row factors of q and k, column factor of k
  kDiagonalK = 1,
  kDiagonalCol = 2,
  kRowQ = 12,       // + block - 1: blocks 1, 2, 3; then block 3 seen across block 2
  kRowK = 16,
  kColK = 20,       // block 0, block 0 seen across block 1, block 1, block 2
  kOperandTiles = 24
};
constexpr int kRowFar = 3;   // kRowQ + kRowFar, kRowK + kRowFar
constexpr int kColFar = kColK + 1;
constexpr int kTileBytes = kBlock * kHeadDim * 2;
constexpr int kHalfTileBytes = kTileBytes / 2;

constexpr int kBlockPitch = 20;  // floats a row of an fp32 16 x 16 block: rows fall into different banks
using Block = float[kBlock * kBlockPitch];

struct PrepareSmem {
  alignas(1024) char operands[kOperandTiles][kTileBytes];
  Block a_below[6];                     // beta_i Akk of the blocks below the diagonal, see below_index()
  float total[kBlocks][kHeadDim];       // log2 decay of a whole block
  float square_sum[8][32];              // per warp: 16 sums for q, 16 for k
  float4 token_scale[8][kBlock];        // per warp and token: factor of q, of k, beta, unused
  float beta[kChunk];
  // Reused once the operand tiles are read: a warp's own diagonal tiles hold its fp32 blocks.
  __device__ Block& diagonal_a(int b) { return *reinterpret_cast<Block*>(operands[3 * b]); }
  __device__ Block& diagonal_t(int b) { return *reinterpret_cast<Block*>(operands[3 * b] + sizeof(Block)); }
  __device__ Block& merged_t(int p) { return *reinterpret_cast<Block*>(operands[3 * p + 1]); }
};
static_assert(sizeof(PrepareSmem) <= 113 * 1024, "two CTAs an SM");

__device__ __forceinline__ int below_index(int i, int j) { return i * (i - 1) / 2 + j; }  // block (i, j), j < i

struct PrepareParams {
  TensorView q, k, v, g, beta;
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
    int const half = (s >> 2) * kHalfTileBytes, unit = 2 * (s & 3);
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
// Block (i, j) of a 64 x 64 bf16 panel of the record.
__device__ __forceinline__ void store_to_panel(char* panel, int i, int j, Product const& p, int lane) {
  for_each_pair(lane, [&](int n, int e, int row, int col) {
    *reinterpret_cast<uint32_t*>(panel + panel_offset(16 * i + row, 2 * j + (col >> 3)) + 2 * (col & 7)) =
        pack_bf16(p.d[n][e], p.d[n][e + 1]);
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

// d += x * y for 16 x 16 fp32 blocks by tf32 MMA. Within 8 columns the inner index runs in the order 0, 2, 4, 6, 1,
// 3, 5, 7, so that an accumulator can be the next product's left operand as it stands.
__device__ __forceinline__ void multiply_tf32(Product& d, uint32_t const (&x)[2][4], Block const& y, int lane) {
  int const row = lane >> 2, inner = 2 * (lane & 3);
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int n = 0; n < 2; ++n)
      mma_tf32(d.d[n], x[s], to_tf32(y[(8 * s + inner) * kBlockPitch + 8 * n + row]),
               to_tf32(y[(8 * s + inner + 1) * kBlockPitch + 8 * n + row]));
}
__device__ __forceinline__ void left_operand(uint32_t (&x)[2][4], Block const& block, int lane) {
  int const row = lane >> 2, inner = 2 * (lane & 3);
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 const pair = *reinterpret_cast<float2 const*>(&block[(row + 8 * h) * kBlockPitch + 8 * s + inner]);
      x[s][h] = to_tf32(pair.x);
      x[s][2 + h] = to_tf32(pair.y);
    }
}
__device__ __forceinline__ void left_operand(uint32_t (&x)[2][4], Product const& p) {  // negated
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    x[s][0] = to_tf32(-p.d[s][0]);
    x[s][1] = to_tf32(-p.d[s][2]);
    x[s][2] = to_tf32(-p.d[s][1]);
    x[s][3] = to_tf32(-p.d[s][3]);
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

// Halves the tokens a lane is responsible for until one is left: lane l ends with token l % 16.
template <int kWidth>
__device__ __forceinline__ void fold_tokens(float (&sum)[kBlock], int lane) {
  bool const upper = lane & kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    float const give = upper ? sum[i] : sum[i + kWidth];
    float const keep = upper ? sum[i + kWidth] : sum[i];
    sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, kWidth);
  }
  if constexpr (kWidth > 1) fold_tokens<kWidth / 2>(sum, lane);
}
// Sum of squares over the warp's 64 channels of each of 16 tokens; lane l gets that of token l % 16.
__device__ __forceinline__ float square_sums(uint32_t const (&pair)[kBlock], int lane) {
  float sum[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float const x = unpack_lo(pair[i]), y = unpack_hi(pair[i]);
    sum[i] = x * x + y * y;
  }
  fold_tokens<kBlock / 2>(sum, lane);
  return sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 16);
}

// A lane's pair of channels of a block's tokens, one token a row; zero from `tokens` on.
template <class Pair>
__device__ __forceinline__ void load_rows(Pair (&pairs)[kBlock], void const* first, int64_t row_bytes, int tokens) {
  auto const* row = static_cast<char const*>(first);
  if (tokens >= kBlock) {
#pragma unroll
    for (int i = 0; i < kBlock; ++i, row += row_bytes) pairs[i] = __ldcs(reinterpret_cast<Pair const*>(row));
  } else {
#pragma unroll
    for (int i = 0; i < kBlock; ++i, row += row_bytes)
      pairs[i] = i < tokens ? __ldcs(reinterpret_cast<Pair const*>(row)) : Pair{};
  }
}

template <Gate kGate>
__global__ void __launch_bounds__(kPrepareThreads, 2) prepare_kernel(const __grid_constant__ PrepareParams p) {
  extern __shared__ __align__(1024) char smem_bytes[];
  PrepareSmem& smem = *reinterpret_cast<PrepareSmem*>(smem_bytes);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int const block = warp / 2, half = warp % 2, channel = 64 * half + 2 * lane;

  // ---- which chunk, which head
  int const head = blockIdx.x % p.value_heads;
  int const slot = p.slab.begin + static_cast<int>(blockIdx.x / p.value_heads);
  int const seq = p.sequences.owner(slot, lane);
  int64_t const chunk_start = int64_t(slot - p.sequences.slot_base(seq)) * kChunk;
  int64_t const remaining = p.sequences.length(seq) - chunk_start;
  if (chunk_start < 0 || remaining <= 0) return;
  int const chunk_tokens = static_cast<int>(min(remaining, int64_t(kChunk)));
  int const tokens = chunk_tokens - kBlock * block;  // of this warp's block, if positive
  int const batch = p.sequences.batch(seq);
  int64_t const first_token = p.sequences.first_token(seq) + chunk_start;
  Record& record = p.slab.records[int64_t(slot - p.slab.begin) * p.value_heads + head];

  // ---- load g, k and q: one pair of channels a lane and token, 128 (or 256) contiguous bytes a warp
  auto load = [&](auto& pairs, TensorView const& view, int h, int element_bytes) {
    int64_t const first =
        view.stride_batch * batch + view.stride_token * (first_token + kBlock * block) + view.stride_head * h + channel;
    load_rows(pairs, static_cast<char const*>(view.data) + first * element_bytes, view.stride_token * element_bytes,
              tokens);
  };
  uint32_t q_pair[kBlock], k_pair[kBlock];
  float2 g[kBlock];  // log2 decay a token
  int const key_head = head / p.heads_per_key;
  if (p.g_is_fp32) {
    load(g, p.g, head, sizeof(float));
    load(k_pair, p.k, key_head, sizeof(bf16));
    load(q_pair, p.q, key_head, sizeof(bf16));
  } else {
    uint32_t g_pair[kBlock];
    load(g_pair, p.g, head, sizeof(bf16));
    load(k_pair, p.k, key_head, sizeof(bf16));
    load(q_pair, p.q, key_head, sizeof(bf16));
#pragma unroll
    for (int i = 0; i < kBlock; ++i) g[i] = make_float2(unpack_lo(g_pair[i]), unpack_hi(g_pair[i]));
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
    for (int i = 0; i < kBlock; ++i) g[i] = make_float2(x_decay(g[i].x), y_decay(g[i].y));
    if (tokens < kBlock) {  // past the end of the sequence the state must stand still
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
        if (i >= tokens) g[i] = make_float2(0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      total.x += g[i].x;
      total.y += g[i].y;
    }
    *reinterpret_cast<float2*>(&smem.total[block][channel]) = total;
  }

  // ---- norms: lane l of both warps of a block ends with the factor of q (l < 16) or k of token l % 16
  if (p.qk_l2norm) {
    float const q_sum = square_sums(q_pair, lane), k_sum = square_sums(k_pair, lane);
    smem.square_sum[warp][lane] = lane < kBlock ? q_sum : k_sum;
  }
  __syncthreads();
  {
    float norm = 1.f;
    if (p.qk_l2norm) norm = rsqrtf(smem.square_sum[2 * block][lane] + smem.square_sum[2 * block + 1][lane] + 1e-6f);
    float4& scales = smem.token_scale[warp][lane % kBlock];
    if (lane < kBlock) {
      scales.x = norm * p.scale;
      scales.z = -smem.beta[kBlock * block + lane];
    } else {
      scales.y = norm;
    }
    __syncwarp();
  }

  // ---- decays of the other blocks
  float2 prefix = make_float2(0.f, 0.f), suffix = prefix, middle = prefix;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    float2 const total = *reinterpret_cast<float2 const*>(&smem.total[b][channel]);
    if (b < block) prefix.x += total.x, prefix.y += total.y;
    if (b > block) suffix.x += total.x, suffix.y += total.y;
    if ((block == 0 && b == 1) || (block == kBlocks - 1 && b == kBlocks - 2)) middle = total;
  }
  if (block == 0) {
    float2 const own = *reinterpret_cast<float2 const*>(&smem.total[0][channel]);
    *reinterpret_cast<float2*>(&record.factors.decay[ChunkFactors::index(channel)]) =
        make_float2(exp2f(own.x + suffix.x), exp2f(own.y + suffix.y));
  }
  prefix = make_float2(exp2_approx(prefix.x), exp2_approx(prefix.y));
  suffix = make_float2(exp2_approx(suffix.x), exp2_approx(suffix.y));
  middle = make_float2(exp2_approx(middle.x), exp2_approx(middle.y));

  // ---- factors: operands of the two products to shared memory, operands of the recurrence to the record
  uint32_t word_offset[8];  // of this lane's pair in row i % 8 of a panel
#pragma unroll
  for (int i = 0; i < 8; ++i) word_offset[i] = panel_offset(i, lane >> 2) + 4 * (lane & 3);
  auto tile_word = [&](int tile, int i) -> uint32_t& {
    return *reinterpret_cast<uint32_t*>(smem.operands[tile] + half * kHalfTileBytes + (i & 8) * kPanelRowBytes +
                                        word_offset[i & 7]);
  };
  auto record_word = [&](char (&panels)[2][64 * kPanelRowBytes], int i) -> uint32_t& {
    return *reinterpret_cast<uint32_t*>(panels[half] + (block * kBlock + (i & 8)) * kPanelRowBytes +
                                        word_offset[i & 7]);
  };
  auto scaled = [](uint32_t pair, float by) { return make_float2(unpack_lo(pair) * by, unpack_hi(pair) * by); };
  auto times = [](float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); };
  auto packed = [](float2 a) { return pack_bf16(a.x, a.y); };
  auto store_diagonal = [&](int i, float2 q, float2 k, float2 from_middle) {
    float2 const down = make_float2(exp2_approx(from_middle.x), exp2_approx(from_middle.y));
    float2 const up = make_float2(exp2_approx(-from_middle.x), exp2_approx(-from_middle.y));
    tile_word(3 * block + kDiagonalQ, i) = packed(times(q, down));
    tile_word(3 * block + kDiagonalK, i) = packed(times(k, down));
    tile_word(3 * block + kDiagonalCol, i) = packed(times(k, up));
  };
  bool const has_row = block > 0, is_last = block == kBlocks - 1, is_first = block == 0;
  {
    float2 sum = make_float2(0.f, 0.f), from_middle = sum;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {  // decay from the block's start through token i
      sum.x += g[i].x;
      sum.y += g[i].y;
      float4 const scales = smem.token_scale[warp][i];
      float2 const a = make_float2(exp2_approx(sum.x), exp2_approx(sum.y));
      float2 const q = scaled(q_pair[i], scales.x), k = scaled(k_pair[i], scales.y);
      float2 const qa = times(q, a), ka = times(k, a);
      float2 const kd = times(ka, prefix);
      record_word(record.q_decayed, i) = packed(times(qa, prefix));
      record_word(record.k_decayed, i) = pack_bf16(kd.x * scales.z, kd.y * scales.z);
      if (has_row) {
        tile_word(kRowQ + block - 1, i) = packed(qa);
        tile_word(kRowK + block - 1, i) = packed(ka);
      }
      if (is_last) {
        tile_word(kRowQ + kRowFar, i) = packed(times(qa, middle));
        tile_word(kRowK + kRowFar, i) = packed(times(ka, middle));
      }
      if (i >= kBlock / 2) {
        from_middle.x += fmaxf(g[i].x, kDiagonalClamp);
        from_middle.y += fmaxf(g[i].y, kDiagonalClamp);
        store_diagonal(i, q, k, from_middle);
      }
    }
  }
  {
    float2 sum = make_float2(0.f, 0.f), from_middle = sum;
#pragma unroll
    for (int i = kBlock - 1; i >= 0; --i) {  // decay after token i to the block's end
      float4 const scales = smem.token_scale[warp][i];
      float2 const c = make_float2(exp2_approx(sum.x), exp2_approx(sum.y));
      float2 const k = scaled(k_pair[i], scales.y);
      float2 const kc = times(k, c);
      record_word(record.k_remaining, i) = packed(times(kc, suffix));
      if (!is_last) tile_word(is_first ? kColK : kColK + 1 + block, i) = packed(kc);
      if (is_first) tile_word(kColFar, i) = packed(times(kc, middle));
      if (i < kBlock / 2) {
        store_diagonal(i, scaled(q_pair[i], scales.x), k, from_middle);
        from_middle.x -= fmaxf(g[i].x, kDiagonalClamp);
        from_middle.y -= fmaxf(g[i].y, kDiagonalClamp);
      }
      sum.x += g[i].x;
      sum.y += g[i].y;
    }
  }
  __syncthreads();

  // ---- the two products: warps 0-3 a diagonal block each, warps 4-7 the six blocks below. A far block reads its row
  // or column factor with the decay of the block between: (2, 0), (3, 0) the column, (3, 0), (3, 1) the row.
  struct BlockPair {
    int i, j, rows, cols;  // rows: offset from kRowQ and kRowK
  };
  int const job_count = warp < kBlocks ? 1 : warp < 6 ? 2 : 1;
#pragma unroll 1
  for (int job = 0; job < job_count; ++job) {
    BlockPair pair;
    if (job == 1) {
      pair = warp == 4 ? BlockPair{3, 0, kRowFar, kColFar} : BlockPair{3, 1, kRowFar, kColK + 2};
    } else {
      pair = warp == 4   ? BlockPair{1, 0, 0, kColK}
             : warp == 5 ? BlockPair{3, 2, 2, kColK + 3}
             : warp == 6 ? BlockPair{2, 0, 1, kColFar}
                         : BlockPair{2, 1, 1, kColK + 2};
    }
    bool const diagonal = warp < kBlocks;
    if (diagonal) pair.i = pair.j = warp;
    Product q_product, k_product;
    multiply(q_product, k_product, smem.operands[diagonal ? 3 * warp + kDiagonalQ : kRowQ + pair.rows],
             smem.operands[diagonal ? 3 * warp + kDiagonalK : kRowK + pair.rows],
             smem.operands[diagonal ? 3 * warp + kDiagonalCol : pair.cols], lane);
    int const below = diagonal ? 0 : kChunk;  // rows by which the block lies below the diagonal, or enough of them
    for_each_pair(lane, [&](int n, int e, int row, int col) {  // above the diagonal lies anything: select, never scale
      float const beta = smem.beta[kBlock * pair.i + row];
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        q_product.d[n][e + x] = row + below >= col + x ? q_product.d[n][e + x] : 0.f;
        k_product.d[n][e + x] = row + below > col + x ? beta * k_product.d[n][e + x] : 0.f;
      }
    });
    store_to_panel(record.a_qk, pair.i, pair.j, q_product, lane);
    __syncwarp();  // a diagonal warp has read its tiles, which its block overlays
    store_block(diagonal ? smem.diagonal_a(warp) : smem.a_below[below_index(pair.i, pair.j)], k_product, lane);
  }
  if (warp < kBlocks) {
    __syncwarp();
    invert_diagonal(smem.diagonal_t(warp), smem.diagonal_a(warp), lane);
    __syncwarp();
    store_to_panel(record.t, warp, warp, load_block(smem.diagonal_t(warp), lane), lane);
  } else if (warp >= 6) {  // above the diagonal
    Product const zero;
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      int const i = warp == 6 ? 0 : n < 2 ? 1 : 2, j = warp == 6 ? n + 1 : n < 2 ? n + 2 : 3;
      store_to_panel(record.t, i, j, zero, lane);
      store_to_panel(record.a_qk, i, j, zero, lane);
    }
  }
  __syncthreads();

  // ---- the inverse of the two 32 x 32 diagonal blocks: -T_i A_ij T_j below the diagonal
  if (warp < 2) {
    int const i = 2 * warp + 1, j = 2 * warp;
    uint32_t x[2][4];
    Product left, merged;
    left_operand(x, smem.diagonal_t(i), lane);
    multiply_tf32(left, x, smem.a_below[below_index(i, j)], lane);
    left_operand(x, left);
    multiply_tf32(merged, x, smem.diagonal_t(j), lane);
    store_block(smem.merged_t(warp), merged, lane);
    store_to_panel(record.t, i, j, merged, lane);
  }
  __syncthreads();

  // ---- and the 32 x 32 block below: row block 2 + warp / 2, column block warp % 2 of -T_B A_BA T_A
  if (warp < 4) {
    int const i = 2 + warp / 2, j = warp % 2;
    uint32_t x[2][4];
    Product left[2], merged;
    left_operand(x, i == 2 ? smem.diagonal_t(2) : smem.merged_t(1), lane);
    multiply_tf32(left[0], x, smem.a_below[below_index(2, 0)], lane);
    multiply_tf32(left[1], x, smem.a_below[below_index(2, 1)], lane);
    if (i == 3) {
      left_operand(x, smem.diagonal_t(3), lane);
      multiply_tf32(left[0], x, smem.a_below[below_index(3, 0)], lane);
      multiply_tf32(left[1], x, smem.a_below[below_index(3, 1)], lane);
    }
    left_operand(x, left[1]);
    multiply_tf32(merged, x, j == 0 ? smem.merged_t(0) : smem.diagonal_t(1), lane);
    if (j == 0) {
      left_operand(x, left[0]);
      multiply_tf32(merged, x, smem.diagonal_t(0), lane);
    }
    store_to_panel(record.t, i, j, merged, lane);
  }
}

}  // namespace kda
