// Prove: whether the pieces of chains (schedule.h: Cut) may be walked each by itself, from a state of zeros, because the
// tokens in front of a piece's own forget what came before them.
//
// A token turns S into (I - beta k k^T) e^g S. Where the entries of channel d were at most u_d in size, those of e^g S
// are at most e_d = e^{g_d} u_d, and afterwards at most e_d + |beta k_d| sum_c |k_c| e_c: for any keys, gates and
// betas. From u = 1 on this gives, after a block of tokens, what is left at most of the largest entry that the state had
// before them (or that what a start from zeros leaves out of it had). Blocks are looked at beside each other: what is left
// after all is at most the product.
#pragma once

#include <type_traits>

#include "chunk.cuh"
#include "state.cuh"

namespace kda {

constexpr int kProofBlock = 8;  // tokens that a warp looks at
constexpr int kProofBlocks = kWarmUp * kChunk / kProofBlock;
constexpr int kProofThreads = 32 * kProofBlocks;
constexpr float kForgotten = 0x1p-64f;  // of the state, at most, is left

// What was found about the cuts: a byte each.
struct Forgotten {
  uint8_t* all;
  int count;

  // By all threads of a CTA: whether the chains may be cut.
  __device__ __forceinline__ bool holds(int thread, int threads) const {
    bool here = true;
    for (int i = thread; i < count; i += threads) here = here && all[i];
    return __syncthreads_and(here);
  }
};

struct ProveParams {
  ChunkParams chunk;
  TensorView k, g;
  StateParams state;
  Cut cut;
  Forgotten forgotten;
};

// Four channels of a token of g or k, as they are in memory.
template <bool kFp32>
struct RawChannels {
  std::conditional_t<kFp32, float4, uint2> raw;
  __device__ __forceinline__ void load(TensorView const& x, int64_t offset) {
    using Element = std::conditional_t<kFp32, float, bf16>;
    raw = __ldg(reinterpret_cast<decltype(raw) const*>(static_cast<Element const*>(x.data) + offset));
  }
  __device__ __forceinline__ float4 value() const {
    if constexpr (kFp32)
      return raw;
    else
      return make_float4(unpack_lo(raw.x), unpack_hi(raw.x), unpack_lo(raw.y), unpack_hi(raw.y));
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// What 128 channels' bounds become over four tokens: u, which a token turns into a u + k (k . a u). The four products with
// k are found together, for each of them takes the warp's lanes a while: of u alone, and of what each k before adds to it.
struct FourTokens {
  float4 a[4], k[4];  // e^g; |k| times the root of |beta|

  static __device__ __forceinline__ float4 times(float4 x, float4 y) {
    return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w);
  }
  static __device__ __forceinline__ float4 plus(float4 x, float4 y, float scale) {
    return make_float4(x.x + scale * y.x, x.y + scale * y.y, x.z + scale * y.z, x.w + scale * y.w);
  }
  static __device__ __forceinline__ float dot(float4 x, float4 y) {
    return warp_sum((x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w));
  }
  __device__ __forceinline__ float4 after(float4 u) const {
    float4 grown[4];  // k of the tokens before, at the present one
    float read[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u = times(a[i], u);
      read[i] = dot(k[i], u);
#pragma unroll
      for (int j = 0; j < i; ++j) {
        grown[j] = times(a[i], grown[j]);
        read[i] += dot(k[i], grown[j]) * read[j];
      }
      grown[i] = k[i];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) u = plus(u, grown[j], read[j]);
    return u;
  }
};

// A CTA a cut: (head, sequence, piece behind it). A warp has a block, a lane four channels.
template <Gate kGate, bool kFp32Gate>
__global__ void __launch_bounds__(kProofThreads) prove_kernel(const __grid_constant__ ProveParams p) {
  let_next_kernel_start();
  __shared__ uint32_t most[kProofBlocks];  // that is left after a block, as bits
  int const head = blockIdx.x, seq = blockIdx.y, block = threadIdx.x / 32, lane = threadIdx.x % 32, channel = 4 * lane;
  int64_t const start = p.cut.start(blockIdx.z + 1);
  Sequences const& sequences = p.chunk.sequences;
  bool forgotten = true;
  if (start < live_length(sequences, p.state, seq)) {  // the chunks before it are whole, then
    float const rate = kGate != Gate::kGiven && p.chunk.A_log != nullptr ? exp2f(p.chunk.A_log[head] * kLog2e) : 1.f;
    float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
    if (kGate != Gate::kGiven && p.chunk.dt_bias != nullptr)
      bias = *reinterpret_cast<float4 const*>(p.chunk.dt_bias + head * kHeadDim + channel);
    LogDecay<kGate> const decay[4] = {{rate, p.chunk.lower_bound, bias.x},
                                      {rate, p.chunk.lower_bound, bias.y},
                                      {rate, p.chunk.lower_bound, bias.z},
                                      {rate, p.chunk.lower_bound, bias.w}};
    int const batch = sequences.batch(seq);
    int64_t const token = sequences.first_token(seq) + start - (kProofBlocks - block) * kProofBlock;
    int64_t const g_offset = p.g.stride_batch * batch + p.g.stride_token * token + p.g.stride_head * head + channel,
                  k_offset = p.k.stride_batch * batch + p.k.stride_token * token +
                             p.k.stride_head * (head / p.chunk.heads_per_key) + channel;
    RawChannels<kFp32Gate> raw_g[kProofBlock];
    RawChannels<false> raw_k[kProofBlock];
    RawBeta raw_beta;  // lane l has that of token l / 4
#pragma unroll
    for (int t = 0; t < kProofBlock; ++t) {
      raw_g[t].load(p.g, g_offset + p.g.stride_token * t);
      raw_k[t].load(p.k, k_offset + p.k.stride_token * t);
    }
    raw_beta.load(p.chunk, {token, kProofBlock, batch, head}, 0, lane);
    float const beta = raw_beta.value(p.chunk, 0);
    FourTokens tokens[kProofBlock / 4];
#pragma unroll
    for (int t = 0; t < kProofBlock; ++t) {
      float4 const g = raw_g[t].value(), raw = raw_k[t].value();
      tokens[t / 4].a[t % 4] = make_float4(exp2_approx(decay[0](g.x)), exp2_approx(decay[1](g.y)),
                                           exp2_approx(decay[2](g.z)), exp2_approx(decay[3](g.w)));
      float scale = sqrt_approx(fabsf(__shfl_sync(0xffffffffu, beta, 4 * t)));
      if (p.chunk.qk_l2norm) scale *= rsqrt_approx(FourTokens::dot(raw, raw) + 1e-6f);
      tokens[t / 4].k[t % 4] =
          make_float4(fabsf(raw.x) * scale, fabsf(raw.y) * scale, fabsf(raw.z) * scale, fabsf(raw.w) * scale);
    }
    float4 u = make_float4(1.f, 1.f, 1.f, 1.f);
#pragma unroll
    for (int i = 0; i < kProofBlock / 4; ++i) u = tokens[i].after(u);
    // None is negative, so that their bits are in their order, infinity and NaN last.
    auto const bits = [](float x) { return __float_as_uint(fabsf(x)); };
    uint32_t const here = __reduce_max_sync(0xffffffffu, max(max(bits(u.x), bits(u.y)), max(bits(u.z), bits(u.w))));
    if (lane == 0) most[block] = here;
    __syncthreads();
    float left = 1.f;
#pragma unroll
    for (int i = 0; i < kProofBlocks; ++i) left *= __uint_as_float(most[i]);
    forgotten = left < kForgotten;  // a NaN is not less than anything
  }
  if (threadIdx.x == 0) p.forgotten.all[(blockIdx.z * gridDim.y + seq) * gridDim.x + head] = forgotten;
}

}  // namespace kda
