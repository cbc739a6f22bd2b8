// What can be made of a chunk of 64 tokens of one value head without the state, in two steps of eight warps each:
// make_factors() makes k, q and g into operands of the recurrence and of the chunk's two 64 x 64 products; solve()
// multiplies those and inverts I + Akk. One step may work on the next chunk while another's warps do the other.
//
// Warps b and 7 - b work on the block of 16 tokens b and half of the channels each. Log decays are summed along the
// tokens from the block's middle, two channels a lane. Factors are then made 16 channels at a time in the register
// layout of a warp-level MMA, so that they become operands of the products as they stand. Every pair (i, j) is factored
// through the middles of the two tokens' blocks: exp(G_i - G_middle) for the row, exp(G_middle - G_j) times what lies
// between the middles for the column.
//   Tame chunks, where no channel decays by more than 2^-60 over 8 tokens (a lower bound of -5 always is): the factors
//   stay within 2^+-60, and the operands of the recurrence are products of them with decays per channel.
//   Any others: in the factors of the pairs the log decay of a token is clamped to -10, so that they stay within
//   e^+-80; what the clamp lets through is under the rounding of bf16. The operands of the recurrence come from sums of
//   exponents.
//
// The sums count from a small number of each pair of channels' own (dither()): decays near 1 would else leave factors
// that round back to the key in every channel alike, an error that grows along equal keys.
//
// With L2-normalised keys k_i / |k_i|, keys stay as they are on the side that is summed over (columns of Akk and Aqk, K
// in the state update), and 1 / |k_i| goes to W and V' instead: V'_i / |k_i| = sum_j T~_ij beta_j / |k_j| (v_j - ...),
// with T~ the inverse for Akk~_ij = Akk_ij |k_j| / |k_i|. So no rounding of k / |k| stands between a key written and a
// key read.
#pragma once

#include <cuda.h>

#include "gate.cuh"
#include "record.cuh"

namespace kda {

constexpr int kBlock = 16;
constexpr int kBlocks = kChunk / kBlock;
constexpr int kSteps = kHeadDim / 16;   // of 16 channels
constexpr int kHalfSteps = kSteps / 2;  // of a warp: 64 channels, a panel
constexpr float kClamp = -10.f * kLog2e;
constexpr float kTame = -60.f;  // log2
constexpr int kPanelBytes = kChunk * kPanelRowBytes;
constexpr int kOperandBytes = 2 * kPanelBytes;
constexpr int kWarpgroup = 128;
constexpr int kChunkThreads = 2 * kWarpgroup;

constexpr int kBlockPitch = 20;  // floats a row of an fp32 16 x 16 block: rows fall into different banks
using Block = float[kBlock * kBlockPitch];

// The same value, but what follows from it is worked out anew in every turn of a loop: kept in registers it would
// spill.
__device__ __forceinline__ int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// An operand of a warp's MMA, 16 tokens x 16 channels, as its lanes hold it.
using Fragment = uint4[32];

__device__ __forceinline__ void load_fragment(uint32_t (&f)[4], Fragment const& from, int lane) {
  uint4 const x = from[lane];
  f[0] = x.x, f[1] = x.y, f[2] = x.z, f[3] = x.w;
}
__device__ __forceinline__ void store_fragment(Fragment& to, uint32_t const (&f)[4], int lane) {
  to[lane] = make_uint4(f[0], f[1], f[2], f[3]);
}

// Columns of a product, in the order that an MMA takes its right operand in: two registers for each 8 of them.
__device__ __forceinline__ void store_columns(Fragment& to, uint32_t const (&f)[4], int lane) {
  to[lane] = make_uint4(f[0], f[2], f[1], f[3]);
}

// Block pairs (i, j), j < i, in the order (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2).
__device__ __forceinline__ constexpr int below_index(int i, int j) { return i * (i - 1) / 2 + j; }
constexpr int kPairs = 6;

// From make_factors() to solve(), and what the former needs besides.
struct alignas(1024) FactorScratch {
  union {
    struct {
      Fragment low[kBlocks][kSteps];  // lower halves of the sums of log decays; then, over them, row factors of q
      union {
        Fragment k_rows[kBlocks - 1][kSteps];  // row factors of k, of blocks 1 to 3
        float clamped_run[2 * kBlocks][kHeadDim];
      };
      Fragment columns[kPairs][kSteps];  // column factors of k of block j, seen from block i
    };
    char fp32_gate[kSteps / 2][kPanelBytes];  // before: an fp32 gate in panels of 32 channels
  };
  float run[2 * kBlocks][kHeadDim];  // log decays (log2) of 8 tokens
  // Decays per channel (their logarithms where the chunk is not tame), a block's for its own warps: from the chunk's
  // start to the block's middle, from there to the end, and from there to the middle of each block after it.
  enum : int { kToStart = 0, kToEnd = kBlocks, kToRows = 2 * kBlocks, kDecays = 2 * kBlocks + kPairs };
  float decay[kDecays][kHeadDim];          // in the order of ChunkFactors
  float q_scale[kChunk], k_scale[kChunk];  // of the tokens, or what these are made of (TokenScales)

  // The lower halves of a warp's 16 tokens x 64 channels: each 16 channels where their row factors go, in an order in
  // which neither rows nor columns of 16-byte units meet in a bank.
  static __device__ __forceinline__ uint32_t low_offset(int row, int unit) {
    int const s = unit >> 1;
    return s * sizeof(Fragment) + (row ^ s) * 32 + (((unit & 1) ^ (row >> 2 & 1)) << 4);
  }
};
// The products of the diagonal blocks over half of the channels each; then, once all have read those, what solve()
// needs.
struct SolveScratch {
  enum : int { kOfQ, kOfK };
  union {
    float4 diagonal_parts[2][2][2][kWarpgroup];  // [q or k][half of the channels][half of the columns]
    struct {
      Block below[kPairs];      // -Akk below the diagonal
      Block diagonal[kBlocks];  // -Akk of the diagonal blocks, then their inverses
      Block merged[2];          // T(1, 0), T(3, 2)
    };
  };
};

struct ChunkParams {
  CUtensorMap q_map, k_map, g_map;  // boxes of 64 tokens of one head as panels of 128 bytes a token, all of them
  TensorView beta;
  bool beta_is_fp32;
  const float* A_log;
  const float* dt_bias;
  Sequences sequences;
  int value_heads, heads_per_key;  // HV, HV / H
  float scale, lower_bound;
  bool qk_l2norm, beta_sigmoid, allow_neg_eigval;
};

struct ChunkPlace {
  int64_t first_token;
  int tokens;  // of the chunk, at most 64
  int batch, head;
};

// Panels in shared memory: raw q, k and (bf16) g at first, operands of the recurrence at last. The gate, which is
// wanted first, comes where the recurrence is done first.
struct FactorPanels {
  char* raw_gate;  // bf16 g
  char* gate;      // may be the same place; upper halves of the sums, then -beta_i / |k_i|^2 k_i exp(G_i)
  char* q;         // q, then scale / |q_i| q_i exp(G_i)
  char* k;         // k, then k_j exp(G_end - G_j)
};
struct SolvePanels {  // both zero above the diagonal blocks
  char* t;            // T~
  char* a_qk;         // Aqk~ = Aqk_ij |k_j|
};

// Requests, by one thread: of a tensor's panels, a gate among them; of q and k.
__device__ __forceinline__ void request_panels(CUtensorMap const& map, uint64_t* loaded, char* panels,
                                               ChunkPlace const& at, int head, int panel = 0) {
  cute::SM90_TMA_LOAD_5D::copy(&map, loaded, kStreamed, panels, 0, static_cast<int32_t>(at.first_token), panel, head,
                               at.batch);
}
__device__ __forceinline__ void request_keys(ChunkParams const& p, ChunkPlace const& at, uint64_t* loaded,
                                             FactorPanels const& to) {
  int const key_head = at.head / p.heads_per_key;
  request_panels(p.k_map, loaded, to.k, at, key_head);
  request_panels(p.q_map, loaded, to.q, at, key_head);
}
template <bool kFp32Gate>
constexpr int kGateBytes = (kFp32Gate ? 2 : 1) * kOperandBytes;
constexpr int kKeyBytes = 2 * kOperandBytes;

// Beta of two tokens of a block, lane / 4 and 8 after it, as it lies in memory.
struct RawBeta {
  uint32_t bits[2] = {};
  __device__ __forceinline__ void load(ChunkParams const& p, ChunkPlace at, int block, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int const token = kBlock * block + 8 * h + lane / 4;
      if (token >= at.tokens) continue;
      int64_t const offset = p.beta.stride_batch * at.batch + p.beta.stride_token * (at.first_token + token) +
                             p.beta.stride_head * at.head;
      bits[h] = p.beta_is_fp32 ? __ldg(static_cast<uint32_t const*>(p.beta.data) + offset)
                               : __ldg(static_cast<unsigned short const*>(p.beta.data) + offset);
    }
  }
  __device__ __forceinline__ float value(ChunkParams const& p, int h) const {
    float const beta = __uint_as_float(p.beta_is_fp32 ? bits[h] : bits[h] << 16);
    if (!p.beta_sigmoid) return beta;
    return (p.allow_neg_eigval ? 2.f : 1.f) * rcp_approx(1.f + exp2_approx(-kLog2e * beta));
  }
};

// What turns a gate into log decays, of channels 2 lane and 2 lane + 1 of a warp's half of them.
template <Gate kGate>
struct GateParameters {
  float rate = 1.f;
  float2 dt_bias = make_float2(0.f, 0.f);
  __device__ __forceinline__ GateParameters(ChunkParams const& p, int head, int warp, int lane) {
    if (kGate == Gate::kGiven) return;
    if (p.A_log != nullptr) rate = exp2f(p.A_log[head] * kLog2e);
    if (p.dt_bias != nullptr)
      dt_bias = __ldg(reinterpret_cast<float2 const*>(p.dt_bias + head * kHeadDim + 64 * (warp / kBlocks) + 2 * lane));
  }
};

struct FloatPair {
  float x, y;
  __device__ __forceinline__ FloatPair operator*(FloatPair b) const { return {x * b.x, y * b.y}; }
  __device__ __forceinline__ FloatPair operator*(float b) const { return {x * b, y * b}; }
  __device__ __forceinline__ uint32_t packed() const { return pack_bf16(x, y); }
};
__device__ __forceinline__ FloatPair unpacked(uint32_t pair) { return {unpack_lo(pair), unpack_hi(pair)}; }

struct Product {  // 16 x 16, as two halves of 8 columns
  float d[2][4] = {};
};
__device__ __forceinline__ void multiply(Product& out, uint32_t const (&rows)[4], uint32_t const (&cols)[4]) {
  mma_bf16(out.d[0], rows, cols[0], cols[2]);
  mma_bf16(out.d[1], rows, cols[1], cols[3]);
}
// The same, columns as store_columns() has them.
__device__ __forceinline__ void multiply_stored(Product& out, uint32_t const (&rows)[4], uint32_t const (&cols)[4]) {
  mma_bf16(out.d[0], rows, cols[0], cols[1]);
  mma_bf16(out.d[1], rows, cols[2], cols[3]);
}
// With itself. By halves of the inner index: the two registers of a whole right operand would not lie side by side.
__device__ __forceinline__ void multiply_by_itself(Product& out, uint32_t const (&rows)[4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int n = 0; n < 2; ++n) mma_bf16_8(out.d[n], rows[2 * h], rows[2 * h + 1], rows[2 * h + n]);
}
// Left operand of an MMA from its entries, which are 0 or +-1.
template <class F>
__device__ __forceinline__ void make_matrix(uint32_t (&matrix)[4], int lane, F&& entry) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    int const row = lane / 4 + 8 * (e & 1), column = 2 * (lane & 3) + 8 * (e >> 1);
    matrix[e] = pack_bf16(entry(row, column), entry(row, column + 1));
  }
}

// What the sums of a channel's log decays (log2) start from, between 0 and 1/64, some units in the last place of bf16:
// multiples of the golden ratio, far apart for neighbours. It cancels between row and column factors, and leaves the
// sums their digits.
__device__ __forceinline__ float dither(int pair) {
  return __uint_as_float(0x3c800000u | static_cast<uint32_t>(pair) * 0x9e3779b9u >> 9) - 0x1p-6f;
}

// The sums from the block's middle again, from 0, 16 tokens x 16 channels in the layout of a product, of clamped log
// decays; `high` and `low` are the halves of the unclamped sums, loaded transposed: tokens 2 (lane % 4) + {0, 1} of 8,
// channel lane / 4 of 8 from `channel` on. A product with a matrix of 0 and +-1, which bf16 holds exactly, of log
// decays in two parts with 16 bits.
__device__ __forceinline__ Product clamped_sums(uint32_t const (&matrix)[4], uint32_t const (&high)[4],
                                                uint32_t const (&low)[4], int channel, int lane) {
  uint32_t first[4], rest[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float const x = __uint_as_float(__byte_perm(low[e], high[e], 0x5410));
    float const y = __uint_as_float(__byte_perm(low[e], high[e], 0x7632));
    float last = __shfl_up_sync(0xffffffffu, y, 1);
    // Token 8 comes after nothing. Token 0's own log decay is in none of the sums.
    if ((lane & 3) == 0) last = (e & 1) ? dither((channel + 8 * (e >> 1) + (lane >> 2)) / 2) : x;
    float const g0 = fmaxf(x - last, kClamp), g1 = fmaxf(y - x, kClamp);
    first[e] = pack_bf16(g0, g1);
    rest[e] = pack_bf16(g0 - unpack_lo(first[e]), g1 - unpack_hi(first[e]));
  }
  Product out;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    mma_bf16(out.d[n], matrix, first[2 * n], first[2 * n + 1]);
    mma_bf16(out.d[n], matrix, rest[2 * n], rest[2 * n + 1]);
  }
  return out;
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
// Block (i, j) of a 64 x 64 panel, rounded.
__device__ __forceinline__ void store_to_panel(char* panel, int i, int j, Product const& p, int lane) {
  int const matrix = lane >> 3;
  stmatrix_x4(panel + panel_offset(16 * i + (matrix & 1) * 8 + (lane & 7), 2 * j + (matrix >> 1)),
              pack_bf16(p.d[0][0], p.d[0][1]), pack_bf16(p.d[0][2], p.d[0][3]), pack_bf16(p.d[1][0], p.d[1][1]),
              pack_bf16(p.d[1][2], p.d[1][3]));
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

// The part of a number that tf32 holds, and what is left of it; the MMA cuts the latter to tf32 by itself.
__device__ __forceinline__ uint32_t tf32_part(float x) { return __float_as_uint(x) & 0xffffe000u; }
__device__ __forceinline__ uint32_t tf32_rest(float x) { return __float_as_uint(x - __uint_as_float(tf32_part(x))); }

// A 16 x 16 fp32 block as left operand of tf32 MMAs, in two parts whose sum holds 21 bits of it.
struct LeftOperand {
  uint32_t high[2][4], low[2][4];
};
__device__ __forceinline__ LeftOperand left_operand(Block const& block, int lane) {
  LeftOperand x;
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const row = (lane >> 2) + 8 * (e & 1), column = 8 * s + (lane & 3) + 4 * (e >> 1);
      float const entry = block[row * kBlockPitch + column];
      x.high[s][e] = tf32_part(entry), x.low[s][e] = tf32_rest(entry);
    }
  return x;
}
__device__ __forceinline__ void mma_fp32(float (&d)[4], uint32_t const (&high)[4], uint32_t const (&low)[4], float y0,
                                         float y1) {
  mma_tf32(d, high, tf32_rest(y0), tf32_rest(y1));
  mma_tf32(d, low, tf32_part(y0), tf32_part(y1));
  mma_tf32(d, high, tf32_part(y0), tf32_part(y1));
}
// d += x * y, as exact as fp32 but for the products of the two low parts: with equal keys the merges below cancel
// nearly everything, and what tf32 alone leaves behind would be as large as the rounding of T to bf16.
__device__ __forceinline__ void multiply_fp32(Product& d, LeftOperand const& x, Block const& y, int lane) {
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float const* const first = &y[(8 * s + (lane & 3)) * kBlockPitch + 8 * n + (lane >> 2)];
      mma_fp32(d.d[n], x.high[s], x.low[s], first[0], first[4 * kBlockPitch]);
    }
}

// (I - a)^-1 of a strictly lower 16 x 16 block in fp32, in place: its two 8 x 8 diagonal blocks by forward substitution,
// one column a lane, then what is left below them.
__device__ __forceinline__ void invert_diagonal(Block& a, int lane) {
  constexpr int kHalf = kBlock / 2;
  int const first = lane & kHalf, column = lane & (kHalf - 1);  // lanes 16 to 31 do what the others do
  float x[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    float sum[4] = {i == column ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int m = 0; m < i; m += 4) {
      float4 const row = *reinterpret_cast<float4 const*>(&a[(first + i) * kBlockPitch + first + m]);
      sum[0] += row.x * x[m];
      if (m + 1 < i) sum[1] += row.y * x[m + 1];
      if (m + 2 < i) sum[2] += row.z * x[m + 2];
      if (m + 3 < i) sum[3] += row.w * x[m + 3];
    }
    x[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  __syncwarp();
  if (lane < kBlock) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) a[(first + i) * kBlockPitch + first + column] = x[i];
  }
  __syncwarp();
  int const row = lane >> 2, inner = 2 * (lane & 3);
  float* const lower = a + kHalf * kBlockPitch;
  // An 8 x 8 product, as multiply_fp32().
  auto const multiply_half = [&](float (&d)[4], float2 x, float const* y) {
    uint32_t const high[4] = {tf32_part(x.x), 0, tf32_part(x.y), 0}, low[4] = {tf32_rest(x.x), 0, tf32_rest(x.y), 0};
    float const y0 = y[inner * kBlockPitch + row], y1 = y[(inner + 1) * kBlockPitch + row];
    mma_fp32(d, high, low, y0, y1);
  };
  float left[4] = {}, merged[4] = {};
  multiply_half(left, *reinterpret_cast<float2 const*>(&lower[row * kBlockPitch + kHalf + inner]), lower);
  multiply_half(merged, make_float2(left[0], left[1]), a);
  __syncwarp();
  *reinterpret_cast<float2*>(&lower[row * kBlockPitch + inner]) = make_float2(merged[0], merged[1]);
  __syncwarp();
}

// Blocks have the more to do the earlier they come. Warps w and w + 4 share a scheduler.
__device__ __forceinline__ int factor_block(int warp) { return warp < kBlocks ? warp : 2 * kBlocks - 1 - warp; }

// Calls f(h, token, 1 / |x|) for the tokens of a block of q or k, each by one lane: h = 0 or 1 for the block's token
// lane / 4 or 8 after it. By a warp. Squares are summed on the diagonal of the block's product with itself.
template <class F>
__device__ __forceinline__ void for_each_norm(bool normalised, char const* panels, int block, int lane, F&& f) {
  int const row = lane >> 2, matrix = lane >> 3;
  float inverse[2] = {1.f, 1.f};
  if (normalised) {
    uint32_t const lane_offset = panel_offset(kBlock * block + (matrix & 1) * 8 + (lane & 7), matrix >> 1);
    Product product[2];  // of a panel's channels
#pragma unroll
    for (int s = 0; s < kHalfSteps; s += 2) {
      uint32_t x[2][2][4];
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ldmatrix_x4(x[t][half], panels + half * kPanelBytes + (lane_offset ^ (s + t) << 5));
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) multiply_by_itself(product[half], x[t][half]);
    }
    auto const sum = [&](Product const& p, int h) {
      return row & 1 ? (h ? p.d[1][3] : p.d[0][1]) : (h ? p.d[1][2] : p.d[0][0]);
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) inverse[h] = rsqrt_approx(sum(product[0], h) + sum(product[1], h) + 1e-6f);
  }
  if ((lane & 3) == row >> 1)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(h, kBlock * block + 8 * h + row, inverse[h]);
}

// Of a lane's two tokens: scale / |q_i| and -beta_i / |k_i|^2.
struct TokenScales {
  float q[2], k[2];
};
// Two ways to them. Either eight warps make them all, those of q warps 0 to 3 and those of k the others, which have
// beta, and then each lane reads its own:
__device__ __forceinline__ void scale_tokens(FactorScratch& scratch, ChunkFactors& factors, ChunkParams const& p,
                                             ChunkPlace at, FactorPanels const& panels, RawBeta const& beta, int warp,
                                             int lane) {
  if (warp < kBlocks)
    for_each_norm(p.qk_l2norm, panels.q, warp, lane, [&](int, int token, float inverse) {
      scratch.q_scale[token] = token < at.tokens ? inverse * p.scale : 0.f;
    });
  else
    for_each_norm(p.qk_l2norm, panels.k, warp - kBlocks, lane, [&](int h, int token, float inverse) {
      float const scaled = token < at.tokens ? beta.value(p, h) * inverse : 0.f;
      factors.beta[ChunkFactors::index(token)] = scaled;
      scratch.k_scale[token] = token < at.tokens ? -scaled * inverse : 0.f;
    });
}
__device__ __forceinline__ TokenScales read_scales(FactorScratch const& scratch, int token) {
  return {{scratch.q_scale[token], scratch.q_scale[token + 8]}, {scratch.k_scale[token], scratch.k_scale[token + 8]}};
}
// Or some warps find the norms, and each lane, which has beta of its tokens, makes its own:
__device__ __forceinline__ void find_norms(FactorScratch& scratch, ChunkParams const& p, FactorPanels const& panels,
                                           int block, int lane) {
  for_each_norm(p.qk_l2norm, panels.k, block, lane,
                [&](int, int token, float inverse) { scratch.k_scale[token] = inverse; });
  for_each_norm(p.qk_l2norm, panels.q, block, lane,
                [&](int, int token, float inverse) { scratch.q_scale[token] = inverse; });
}
__device__ __forceinline__ TokenScales make_scales(FactorScratch const& scratch, ChunkFactors& factors,
                                                   ChunkParams const& p, ChunkPlace at, RawBeta const& beta, int token,
                                                   bool tells) {
  TokenScales x;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int const here = token + 8 * h;
    bool const inside = here < at.tokens;
    float const inverse = scratch.k_scale[here], scaled = inside ? beta.value(p, h) * inverse : 0.f;
    x.q[h] = inside ? scratch.q_scale[here] * p.scale : 0.f;
    x.k[h] = inside ? -scaled * inverse : 0.f;
    if (tells) factors.beta[ChunkFactors::index(here)] = scaled;
  }
  return x;
}

// The named barrier of the eight warps that do a step.
__device__ __forceinline__ void sync_chunk_warps(int barrier) {
  cutlass::arch::NamedBarrier::sync(kChunkThreads, barrier);
}
// The same, and whether `vote` holds for all.
__device__ __forceinline__ bool sync_chunk_warps_and(int barrier, bool vote) {
  int all;
  asm volatile("{.reg .pred p, q; setp.ne.b32 p, %1, 0; barrier.cta.red.and.pred q, %3, %2, p; selp.b32 %0, 1, 0, q;}"
               : "=r"(all)
               : "r"(int(vote)), "n"(kChunkThreads), "r"(barrier)
               : "memory");
  return all;
}

// The first step: panels and scratch.low, k_rows and columns. `warp` is 0 to 7; the gate is there already. Returns the
// warp's parts of its diagonal block's products. All call `before_runs()`, which returns when no warp reads the chunk
// before any more; `before_scratch()` before anything is written that the other step reads; and `scales(token, tells)`,
// after which q and k are there (or were once all had called `before_runs()`) and nobody else reads them any more, and
// which gives the TokenScales of `token` and the one 8 after it, for one lane a token with `tells`.
template <Gate kGate, bool kFp32Gate, class F, class G, class N>
__device__ __forceinline__ void make_factors(Product& q_product, Product& k_product, ChunkParams const& p,
                                             ChunkPlace at, GateParameters<kGate> const& gate,
                                             FactorPanels const& panels, FactorScratch& scratch, ChunkFactors& factors,
                                             int barrier, int warp, int lane, F&& before_runs, G&& before_scratch,
                                             N&& scales) {
  int const block = factor_block(warp), half = warp / kBlocks;
  int const row = lane >> 2, column = 2 * (lane & 3), matrix = lane >> 3;
  int const token = kBlock * block + row;         // a lane's tokens are this one and 8 after it
  int const tokens = at.tokens - kBlock * block;  // of this block, if positive
  // Of 16 channels s of the half's panel: ^ s << 5.
  uint32_t const lane_offset = panel_offset(kBlock * block + (matrix & 1) * 8 + (lane & 7), matrix >> 1);
  uint32_t const lane_low_offset = FactorScratch::low_offset((matrix & 1) * 8 + (lane & 7), matrix >> 1);
  char* const q_panel = panels.q + half * kPanelBytes;
  char* const k_panel = panels.k + half * kPanelBytes;
  char* const gate_panel = panels.gate + half * kPanelBytes;

  // ---- sums of log decays (log2) from the block's middle, of channels 2 lane and 2 lane + 1
  int const channel = 64 * half + 2 * lane;
  // Of token i the word at ^ (i % 8) << 4, + 128 i.
  uint32_t const gate_words = kBlock * block * kPanelRowBytes + ((lane >> 2) << 4) + ((lane & 3) << 2);
  FloatPair sums[kBlock];  // first the gate
  bool tame;
  {
    LogDecay<kGate> const x_decay(gate.rate, p.lower_bound, gate.dt_bias.x),
        y_decay(gate.rate, p.lower_bound, gate.dt_bias.y);
    if constexpr (kFp32Gate) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        float2 const x = *reinterpret_cast<float2 const*>(
            scratch.fp32_gate[2 * half + lane / 16] + panel_offset(kBlock * block + i, lane % 16 / 2) + 8 * (lane & 1));
        sums[i] = {x.x, x.y};
      }
    } else {
      uint32_t const words = cute::cast_smem_ptr_to_uint(panels.raw_gate + half * kPanelBytes) + gate_words;
      static_for<kBlock>([&](auto i) { sums[i] = unpacked(load_word<kPanelRowBytes * i>(words ^ (i & 7) << 4)); });
    }
    float const start = dither(recomputed(lane));
    FloatPair before = {start, start}, after = before;  // of the first run minus its sum
    auto const sum_up = [&](auto whole) {
      auto const decay = [&](int i) {  // the state must stand still behind the end
        bool const inside = decltype(whole)::value || i < tokens;
        return inside ? FloatPair{x_decay(sums[i].x), y_decay(sums[i].y)} : FloatPair{0.f, 0.f};
      };
#pragma unroll
      for (int i = kBlock / 2 - 1; i >= 0; --i) {
        FloatPair const x = decay(i);
        sums[i] = before;
        before = {before.x - x.x, before.y - x.y};
      }
#pragma unroll
      for (int i = kBlock / 2; i < kBlock; ++i) {
        FloatPair const x = decay(i);
        sums[i] = after = {after.x + x.x, after.y + x.y};
      }
    };
    if (tokens >= kBlock)
      sum_up(std::true_type{});
    else
      sum_up(std::false_type{});
    before = {start - before.x, start - before.y}, after = {after.x - start, after.y - start};
    tame = before.x >= kTame && before.y >= kTame && after.x >= kTame && after.y >= kTame;
    before_runs();
    *reinterpret_cast<float2*>(&scratch.run[2 * block][channel]) = make_float2(before.x, before.y);
    *reinterpret_cast<float2*>(&scratch.run[2 * block + 1][channel]) = make_float2(after.x, after.y);
  }
  tame = sync_chunk_warps_and(barrier, tame);
  if (!tame) {  // the runs again, of clamped log decays: differences of the sums
    before_scratch();
    float const start = dither(recomputed(lane));
    float2 const total = *reinterpret_cast<float2 const*>(&scratch.run[2 * block][channel]);
    FloatPair last = {start - total.x, start - total.y}, run = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i == kBlock / 2) {
        *reinterpret_cast<float2*>(&scratch.clamped_run[2 * block][channel]) = make_float2(run.x, run.y);
        last = {start, start}, run = {0.f, 0.f};
      }
      run.x += fmaxf(sums[i].x - last.x, kClamp), run.y += fmaxf(sums[i].y - last.y, kClamp);
      last = sums[i];
    }
    *reinterpret_cast<float2*>(&scratch.clamped_run[2 * block + 1][channel]) = make_float2(run.x, run.y);
    sync_chunk_warps(barrier);
  }

  // ---- decays of whole blocks
  {
    FloatPair run[2 * kBlocks];
#pragma unroll
    for (int r = 0; r < 2 * kBlocks; ++r) {
      float2 const x = *reinterpret_cast<float2 const*>(&scratch.run[r][channel]);
      run[r] = {x.x, x.y};
    }
    // Over the runs [from, to), summed by itself: a difference of long sums has lost its digits.
    auto const over = [&](int from, int to) {
      FloatPair sum = {0.f, 0.f};
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r)
        if (r >= from && r < to) sum = {sum.x + run[r].x, sum.y + run[r].y};
      return sum;
    };
    float const start = dither(recomputed(lane));
    auto const put = [&](int which, FloatPair sum, float more) {
      sum = {sum.x + more, sum.y + more};
      *reinterpret_cast<float2*>(&scratch.decay[which][ChunkFactors::index(channel)]) =
          tame ? make_float2(exp2_approx(sum.x), exp2_approx(sum.y)) : make_float2(sum.x, sum.y);
    };
    put(FactorScratch::kToStart + block, over(0, 2 * block + 1), -start);
    put(FactorScratch::kToEnd + block, over(2 * block + 1, 2 * kBlocks), start);
    if (block == 0) {
      FloatPair const sum = over(0, 2 * kBlocks);
      *reinterpret_cast<float2*>(&factors.decay[ChunkFactors::index(channel)]) =
          make_float2(exp2f(sum.x), exp2f(sum.y));
    }
    if (!tame) {
#pragma unroll
      for (int r = 0; r < 2 * kBlocks; ++r) {
        float2 const x = *reinterpret_cast<float2 const*>(&scratch.clamped_run[r][channel]);
        run[r] = {x.x, x.y};
      }
      sync_chunk_warps(barrier);  // the row factors of k go over them
    }
#pragma unroll
    for (int i = 1; i < kBlocks; ++i)
      if (i > block) put(FactorScratch::kToRows + below_index(i, block), over(2 * block + 1, 2 * i + 1), 0.f);
  }

  // ---- the sums again, for other lanes: upper halves over the gate, lower ones where row factors go
  before_scratch();
  char* const low = reinterpret_cast<char*>(scratch.low[block][kHalfSteps * half]);
  {
    // Of the lower halves the word at ^ (i % 4) << 5 ^ (i / 4 % 2) << 4, + 128 (i / 4).
    uint32_t const high_words = cute::cast_smem_ptr_to_uint(gate_panel) + gate_words;
    uint32_t const low_words =
        cute::cast_smem_ptr_to_uint(low) + FactorScratch::low_offset(0, lane >> 2) + ((lane & 3) << 2);
    static_for<kBlock>([&](auto i) {
      uint32_t const x = __float_as_uint(sums[i].x), y = __float_as_uint(sums[i].y);
      store_word<kPanelRowBytes * i>(high_words ^ (i & 7) << 4, __byte_perm(x, y, 0x7632));
      store_word<128 * (i / 4)>(low_words ^ ((i & 3) << 5 | (i / 4 & 1) << 4), __byte_perm(x, y, 0x5410));
    });
  }
  TokenScales const scale = scales(token, half == 0 && (lane & 3) == 0);
  if (tokens < kBlock) {  // the rows past the end are another sequence's
    for (int i = max(tokens, 0); i < kBlock; ++i) {
      uint32_t const word = panel_offset(kBlock * block + i, lane >> 2) + 4 * (lane & 3);
      *reinterpret_cast<uint32_t*>(q_panel + word) = *reinterpret_cast<uint32_t*>(k_panel + word) = 0;
    }
  }
  __syncwarp();

  // ---- factors, and the products of the diagonal blocks over this half of the channels
  q_product = k_product = Product{};
  {
    auto const all_steps = [&](auto tame_constant) {
      constexpr bool kIsTame = decltype(tame_constant)::value;
      uint32_t from_middle[4];
      if constexpr (!kIsTame) {
        make_matrix(from_middle, lane, [](int i, int t) {
          return i >= kBlock / 2 ? (t >= kBlock / 2 && t <= i ? 1.f : 0.f) : (t < kBlock / 2 && t > i ? -1.f : 0.f);
        });
      }
#pragma unroll 1  // longer code costs every launch its way into the SMs, and the loop no time (docs/kernel-notes.md)
      for (int s = 0; s < kHalfSteps; ++s) {
        uint32_t const offset = lane_offset ^ s << 5;
        uint32_t const low_offset = (lane_low_offset ^ s << 5) + s * sizeof(Fragment);
        int const step = kHalfSteps * half + s;
        uint32_t high_halves[4], low_halves[4], q_raw[4], k_raw[4];
        ldmatrix_x4(high_halves, gate_panel + offset);
        ldmatrix_x4(low_halves, low + low_offset);
        ldmatrix_x4(q_raw, q_panel + offset);
        ldmatrix_x4(k_raw, k_panel + offset);
        FloatPair sum[4], pair_sum[4];  // exponents of the recurrence's operands and of the pairs'
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum[e] = {__uint_as_float(__byte_perm(low_halves[e], high_halves[e], 0x5410)),
                    __uint_as_float(__byte_perm(low_halves[e], high_halves[e], 0x7632))};
        if constexpr (!kIsTame) {
          ldmatrix_x4_trans(high_halves, gate_panel + offset);
          ldmatrix_x4_trans(low_halves, low + low_offset);
          Product const clamped = clamped_sums(from_middle, high_halves, low_halves, 16 * s, lane);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            pair_sum[e] = {clamped.d[e >> 1][2 * (e & 1)], clamped.d[e >> 1][2 * (e & 1) + 1]};
        }
        // Of the channels of pair e.
        auto const load_decays = [&](FloatPair(&values)[2], int which) {
          float4 const x = *reinterpret_cast<float4 const*>(&scratch.decay[which][64 * half + 16 * s + 2 * column]);
          values[0] = {x.x, x.y}, values[1] = {x.z, x.w};
        };
        auto const exp2_pair = [](FloatPair x) { return FloatPair{exp2_approx(x.x), exp2_approx(x.y)}; };
        auto const plus = [](FloatPair a, FloatPair b) { return FloatPair{a.x + b.x, a.y + b.y}; };
        auto const minus = [](FloatPair a) { return FloatPair{-a.x, -a.y}; };
        uint32_t q_row[4], k_row[4], k_column[4], packed[4];
        FloatPair decays[2];
        {  // columns
          FloatPair kc[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            kc[e] = unpacked(k_raw[e]) * exp2_pair(minus(kIsTame ? sum[e] : pair_sum[e]));
            k_column[e] = kc[e].packed();
          }
          load_decays(decays, FactorScratch::kToEnd + block);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            packed[e] = kIsTame ? (kc[e] * decays[e >> 1]).packed()
                                : (unpacked(k_raw[e]) * exp2_pair(plus(minus(sum[e]), decays[e >> 1]))).packed();
          __syncwarp();  // all lanes have read q, k and the sums, over which their factors go
          stmatrix_x4(k_panel + offset, packed[0], packed[1], packed[2], packed[3]);
#pragma unroll
          for (int i = 1; i < kBlocks; ++i)
            if (i > block) {
              load_decays(decays, FactorScratch::kToRows + below_index(i, block));
#pragma unroll
              for (int e = 0; e < 4; ++e)
                packed[e] = kIsTame
                                ? (kc[e] * decays[e >> 1]).packed()
                                : (unpacked(k_raw[e]) * exp2_pair(plus(minus(pair_sum[e]), decays[e >> 1]))).packed();
              store_columns(scratch.columns[below_index(i, block)][step], packed, lane);
            }
        }
        {  // rows
          load_decays(decays, FactorScratch::kToStart + block);
          uint32_t k_packed[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            FloatPair const a = exp2_pair(kIsTame ? sum[e] : pair_sum[e]);
            FloatPair const q = unpacked(q_raw[e]) * scale.q[e & 1], k = unpacked(k_raw[e]) * scale.k[e & 1];
            FloatPair const qa = q * a, ka = k * a;
            q_row[e] = qa.packed(), k_row[e] = ka.packed();
            if constexpr (kIsTame) {
              packed[e] = (qa * decays[e >> 1]).packed(), k_packed[e] = (ka * decays[e >> 1]).packed();
            } else {
              FloatPair const through = exp2_pair(plus(sum[e], decays[e >> 1]));
              packed[e] = (q * through).packed(), k_packed[e] = (k * through).packed();
            }
          }
          stmatrix_x4(q_panel + offset, packed[0], packed[1], packed[2], packed[3]);
          stmatrix_x4(gate_panel + offset, k_packed[0], k_packed[1], k_packed[2], k_packed[3]);
          if (block > 0) {
            store_fragment(scratch.low[block][step], q_row, lane);
            store_fragment(scratch.k_rows[block - 1][step], k_row, lane);
          }
        }
        multiply(q_product, q_row, k_column);
        multiply(k_product, k_row, k_column);
      }
    };
    if (tame)
      all_steps(std::true_type{});
    else
      all_steps(std::false_type{});
  }
}

__device__ __forceinline__ void store_diagonal_parts(SolveScratch& scratch, Product const& q_product,
                                                     Product const& k_product, int warp, int lane) {
  int const slot = 32 * factor_block(warp) + lane, half = warp / kBlocks;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    auto const whole = [&](Product const& p) { return make_float4(p.d[n][0], p.d[n][1], p.d[n][2], p.d[n][3]); };
    scratch.diagonal_parts[SolveScratch::kOfQ][half][n][slot] = whole(q_product);
    scratch.diagonal_parts[SolveScratch::kOfK][half][n][slot] = whole(k_product);
  }
}

// Which part of the second step a warp does: Akk and T by warps 0 to 3, Aqk by warps 4 to 7. Of the blocks below the
// diagonal, (1, 0); (3, 0); (2, 0) and (2, 1); (3, 1) and (3, 2) by one warp each.
struct SolveRole {
  int warp, block;
  bool of_q;
  int row, column, count;
  __device__ __forceinline__ explicit SolveRole(int warp)
      : warp(warp),
        block(warp % kBlocks),
        of_q(warp >= kBlocks),
        row(block == 0   ? 1
            : block == 2 ? 2
                         : 3),
        column(block == 3 ? 1 : 0),
        count(block < 2 ? 1 : 2) {}
};

__device__ __forceinline__ void multiply_below(Product (&below)[2], SolveRole const& role, FactorScratch const& scratch,
                                               int lane) {
  Fragment const* const rows_of = role.of_q ? scratch.low[role.row] : scratch.k_rows[role.row - 1];
  auto const* const columns_of = &scratch.columns[below_index(role.row, role.column)];
  auto const multiply_all = [&](auto count) {
#pragma unroll 4
    for (int s = 0; s < kSteps; ++s) {
      uint32_t rows[4], columns[4];
      load_fragment(rows, rows_of[s], lane);
#pragma unroll
      for (int n = 0; n < count; ++n) {
        load_fragment(columns, columns_of[n][s], lane);
        multiply_stored(below[n], rows, columns);
      }
    }
  };
  if (role.count == 1)
    multiply_all(std::integral_constant<int, 1>{});
  else
    multiply_all(std::integral_constant<int, 2>{});
}

// The second step, given the products below the diagonal: T~ and Aqk~. scratch.diagonal_parts is there already. The
// panels are written after all have come. The warps of Aqk have less to do: then they call `meanwhile()`. The named
// barriers `barrier` and, of the warps of T and of those of Aqk alone, `barrier` + 2 and `barrier` + 4.
template <class F>
__device__ __forceinline__ void solve(SolvePanels const& panels, SolveScratch& scratch, Product const (&below)[2],
                                      SolveRole const& role, int barrier, int lane, F&& meanwhile) {
  int const block = role.block;
  Product product;
  {
    auto const& parts = scratch.diagonal_parts[role.of_q ? SolveScratch::kOfQ : SolveScratch::kOfK];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float4 const x = parts[0][n][32 * block + lane], y = parts[1][n][32 * block + lane];
      product.d[n][0] = x.x + y.x, product.d[n][1] = x.y + y.y;
      product.d[n][2] = x.z + y.z, product.d[n][3] = x.w + y.w;
    }
  }
  // Above the diagonal lies anything: select, never scale.
  for_each_pair(lane, [&](int n, int e, int i, int j) {
    if (role.of_q ? i < j : i <= j) product.d[n][e] = 0.f;
    if (role.of_q ? i <= j : i <= j + 1) product.d[n][e + 1] = 0.f;
  });
  sync_chunk_warps(barrier);

  // ---- Aqk, and T = (I + Akk)^-1: its diagonal blocks, then its two 32 x 32 diagonal blocks, then what is left below
  // them
  if (role.of_q) {
    store_to_panel(panels.a_qk, block, block, product, lane);
#pragma unroll
    for (int n = 0; n < 2; ++n)
      if (n < role.count) store_to_panel(panels.a_qk, role.row, role.column + n, below[n], lane);
    meanwhile();
    // As many as the others pass: racecheck counts them, and would take what follows for unordered.
    for (int n = 0; n < 3; ++n) cutlass::arch::NamedBarrier::sync(kWarpgroup, barrier + 4);
    return;
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
    if (n < role.count) store_block(scratch.below[below_index(role.row, role.column) + n], below[n], lane);
  store_block(scratch.diagonal[block], product, lane);
  __syncwarp();
  invert_diagonal(scratch.diagonal[block], lane);
  store_to_panel(panels.t, block, block, load_block(scratch.diagonal[block], lane), lane);
  auto const sync = [&] { cutlass::arch::NamedBarrier::sync(kWarpgroup, barrier + 2); };
  sync();
  // T_A and T_B by warps 0 and 1, each from the right. T_BA = T_B ((-A_BA) T_A): what is in brackets by warps 2 and 3, a
  // row of blocks each, and over what it is made of: column 1, which needs no T_A, where 0 was, then 0 where 1 was.
  int const warp = role.warp;
  lane = recomputed(lane);
  auto const below_at = [&](int i, int j) -> Block& { return scratch.below[below_index(i, j)]; };
  Product mine;
  if (warp < 2) {
    int const i = 2 * warp + 1, j = 2 * warp;
    Product right, merged;
    multiply_fp32(right, left_operand(below_at(i, j), lane), scratch.diagonal[j], lane);
    __syncwarp();
    store_block(below_at(i, j), right, lane);
    __syncwarp();
    multiply_fp32(merged, left_operand(scratch.diagonal[i], lane), below_at(i, j), lane);
    store_block(scratch.merged[warp], merged, lane);
    store_to_panel(panels.t, i, j, merged, lane);
  } else {
    Product right;
    multiply_fp32(mine, left_operand(below_at(warp, 0), lane), scratch.diagonal[0], lane);
    multiply_fp32(right, left_operand(below_at(warp, 1), lane), scratch.diagonal[1], lane);
    __syncwarp();
    store_block(below_at(warp, 0), right, lane);
  }
  sync();
  if (warp < 2) {
    multiply_fp32(mine, left_operand(warp == 0 ? scratch.diagonal[2] : scratch.merged[1], lane), below_at(2, 0), lane);
    if (warp == 0) store_to_panel(panels.t, 2, 1, mine, lane);
  } else {
    multiply_fp32(mine, left_operand(below_at(warp, 1), lane), scratch.merged[0], lane);
    __syncwarp();
    store_block(below_at(warp, 1), mine, lane);
    mine = {};
  }
  sync();
  if (warp > 0) {  // (3, 1), (2, 0), (3, 0)
    Block const& first = warp == 1 ? scratch.diagonal[3] : warp == 2 ? scratch.diagonal[2] : scratch.merged[1];
    multiply_fp32(mine, left_operand(first, lane), warp == 1 ? below_at(3, 0) : below_at(2, 1), lane);
    if (warp == 3) multiply_fp32(mine, left_operand(scratch.diagonal[3], lane), below_at(3, 1), lane);
    store_to_panel(panels.t, warp == 2 ? 2 : 3, warp == 1 ? 1 : 0, mine, lane);
  }
}

}  // namespace kda
