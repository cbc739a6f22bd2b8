// Fused: the whole prefill of a (sequence, head) in one CTA, for calls with enough of them to fill the card. Nothing but q,
// k, v, g, beta and the output touches memory.
//
// Two warpgroups make factors (chunk.cuh) of a chunk. Two others, with half of the value channels each, solve the chunk before it and carry
// the state through it (state.cuh). Raw q, k and g arrive where their factors go; the output leaves from where the values
// came. CTAs are persistent and take the chains in turn, so that the next chain's first chunk is made ready while the
// last one's outputs are still computed.
#pragma once

#include <cuda.h>

#include "pipeline.cuh"
#include "state.cuh"

namespace kda {

struct FusedParams {
  ChunkParams chunk;
  CUtensorMap v_map;        // boxes of 64 channels x 64 tokens of one head, as panels
  CUtensorMap v_token_map;  // boxes of 64 channels of one token
  StateParams state;
  OutputParams out;
  int tensor_tokens;  // T
  int* taken;         // where to say whether this kernel does the call; null where the host has decided that it does
};

constexpr int kFusedThreads = 2 * kChunkThreads;

// The chunks of a CTA's chains (sequence, head), one after another, as far as they are asked for.
struct ChunkWalk {
  int chain, chunk, chunks;
  int64_t first_token, length;
};

struct FusedSmem {
  struct Stage : FactorStage {
    char v[2][kPanelBytes];  // [token, value channel], then the output
  };
  Stage stages[kStages];
  alignas(1024) char t[kPanelBytes];
  char a_qk[kPanelBytes];
  Pipeline pipe;
  ChunkWalk walk;
  int longest, chunks;
};
static_assert(sizeof(FusedSmem) <= 227 * 1024);

// By all threads: whether the lengths let this schedule pay.
__device__ __forceinline__ bool fused_pays(FusedSmem& smem, Sequences const& sequences, int value_heads) {
  if (threadIdx.x == 0) smem.longest = smem.chunks = 0;
  __syncthreads();
  int longest = 0, chunks = 0;
  for (int n = threadIdx.x; n < sequences.num_seqs; n += kFusedThreads) {
    int const here = static_cast<int>((sequences.length(n) + kChunk - 1) / kChunk);
    longest = max(longest, here), chunks += here;
  }
  atomicMax(&smem.longest, longest);
  atomicAdd(&smem.chunks, chunks);
  __syncthreads();
  return Choice::fused_pays(smem.longest, int64_t(smem.chunks) * value_heads, int64_t(sequences.num_seqs) * value_heads,
                            gridDim.x);
}

template <Gate kGate, bool kFp32Gate>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_kernel(const __grid_constant__ FusedParams p) {
  extern __shared__ __align__(1024) char smem_bytes[];
  FusedSmem& smem = *reinterpret_cast<FusedSmem*>(smem_bytes);
  Pipeline& pipe = smem.pipe;
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Sequences const& sequences = p.chunk.sequences;
  int const value_heads = p.chunk.value_heads, chains = sequences.num_seqs * value_heads;

  if (p.taken != nullptr) {
    bool const pays = fused_pays(smem, sequences, value_heads);
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.taken = pays;
    if (!pays) return;
  }
  if (threadIdx.x == 0) {
    pipe.init();
    smem.walk = {static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x), 0, 0, 0, 0};
  }
  for (int i = threadIdx.x; i < 2 * kPanelBytes / 16; i += kFusedThreads)  // above the diagonal blocks they stay zero
    reinterpret_cast<uint4*>(smem.t)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<80>();
    return make_all_factors<kGate, kFp32Gate, 2>(p.chunk, pipe, warp - 8, lane,
                                                 [&](int n) -> FactorStage& { return smem.stages[n % kStages]; });
  }

  // By a warp: asks for the n-th chunk of this CTA.
  auto const request = [&](int n) {
    int const stage = n % kStages;
    ChunkWalk walk = smem.walk;
    while (walk.chunk >= walk.chunks && walk.chain < chains) {  // on to the next chain that has a chunk
      walk.chain += gridDim.x;
      if (walk.chain >= chains) break;
      int const seq = walk.chain / value_heads;
      walk.first_token = sequences.first_token(seq);
      walk.length = live_length(sequences, p.state, seq);
      walk.chunk = 0, walk.chunks = static_cast<int>((walk.length + kChunk - 1) / kChunk);
    }
    ChunkPlace at = {0, 0, 0, 0};
    if (walk.chain < chains) {
      int64_t const start = int64_t(walk.chunk) * kChunk;
      int const seq = walk.chain / value_heads;
      at = {walk.first_token + start, static_cast<int>(min(walk.length - start, int64_t(kChunk))), sequences.batch(seq),
            walk.chain - seq * value_heads};
    }
    ++walk.chunk;
    EmptyBarrier::wait(&pipe.empty[stage], (n / kStages & 1) ^ 1);
    uint64_t* const loaded = &pipe.loaded[stage];
    __syncwarp();
    if (lane == 0) {
      smem.walk = walk;
      request_stage<kFp32Gate>(p.chunk, pipe, smem.stages[stage], n, at, kOperandBytes);
      if (at.tokens == kChunk) request_panels(p.v_map, loaded, smem.stages[stage].v[0], at, at.head);
      if (kFp32Gate && n == 0 && at.tokens > 0) request_fp32_gate(p.chunk, at, loaded, pipe.factor_scratch);
    }
    __syncwarp();
    if (at.tokens > 0 && at.tokens < kChunk) {
      // A partial chunk token by token: behind its end lie another sequence's values, so those rows are read past the end
      // of the tensor, which gives zeros.
      for (int row = lane; row < kChunk; row += 32)
        for (int h = 0; h < 2; ++h)
          cute::SM90_TMA_LOAD_4D::copy(
              &p.v_token_map, loaded, kStreamed, smem.stages[stage].v[h] + row * kPanelRowBytes, 64 * h, at.head,
              row < at.tokens ? static_cast<int>(at.first_token) + row : p.tensor_tokens, at.batch);
    }
  };

  // ---- solve, and carry the state
  cutlass::arch::warpgroup_reg_alloc<176>();
  int const warpgroup = warp / 4;
  SolvePanels const solved = {smem.t, smem.a_qk};
  StateLanes const lanes(kValueTile * warpgroup, warp % 4, lane);
  float s[64];
  bool const requests = warp == 7;
  int n = 0;
  if (requests) {
    request(0);
    request(1);
  }
#pragma unroll 1
  for (int chain = blockIdx.x; chain < chains; chain += gridDim.x) {
    int const seq = chain / value_heads, head = chain - seq * value_heads;
    int64_t tokens = live_length(sequences, p.state, seq);
    if (tokens == 0) p.out.store_zeros(sequences, seq, head, threadIdx.x, kChunkThreads);
    lanes.load_initial(s, p.state, initial_offset(p.state, seq, head));
    bf16* out = p.out.data + p.out.stride_batch * sequences.batch(seq) + p.out.stride_head * head +
                p.out.stride_token * (sequences.first_token(seq) + lane / 2) + kValueTile * warpgroup +
                16 * (warp % 4) + 8 * (lane % 2);
#pragma unroll 1
    for (; tokens > 0; tokens -= kChunk, ++n) {
      int const stage = n % kStages, phase = n / kStages & 1;
      auto& x = smem.stages[stage];
      ChunkFactors const& factors = pipe.factors[stage];
      EmptyBarrier::wait(&pipe.ready[stage], phase);
      solve_chunk(pipe, solved, warp, lane, [&] {
        if constexpr (kFp32Gate) {  // the next chunk's goes where the factors just read were
          if (requests && lane == 0 && pipe.places[stage ^ 1].tokens > 0) {
            EmptyBarrier::wait(&pipe.multiplied, n & 1);
            request_fp32_gate(p.chunk, pipe.places[stage ^ 1], &pipe.loaded[stage ^ 1], pipe.factor_scratch);
          }
          __syncwarp();
        }
      });
      TransactionBarrier::wait(&pipe.loaded[stage], phase);  // the values
      uint32_t s_operand[32], operand[16];
      {  // W^T = beta V^T - S^T (beta K e^G)^T, the values being the accumulator's seed
        float w[32];
        pack_operand(s_operand, s);
        lanes.seed_with_values(w, x.v[warpgroup], factors);
        lanes.decay(s, factors.decay);
        fence_registers(w);
        cute::warpgroup_arrive();
        wgmma_k_major<2>(w, s_operand, x.k[0], true);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_registers(w);
        pack_operand(operand, w);
      }
      {  // V'^T = W^T T^T
        float v_new[32];
        fence_registers(v_new);
        cute::warpgroup_arrive();
        wgmma_k_major<1>(v_new, operand, smem.t, false);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_registers(v_new);
        pack_operand(operand, v_new);
      }
      // S^T += V'^T (K e^{G_end - G}),  O^T = S^T (Q e^G)^T + V'^T Aqk^T; not earlier, for want of registers
      float o[32];
      fence_registers(s);
      fence_registers(o);
      cute::warpgroup_arrive();
      wgmma_mn_major(s, operand, x.k_remaining[0]);
      wgmma_k_major<2>(o, s_operand, x.q[0], false);
      wgmma_k_major<1>(o, operand, smem.a_qk, true);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      fence_registers(s);
      fence_registers(o);
      pack_operand(operand, o);
      lanes.store_output(x.v[warpgroup], operand);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 4; ++j, out += 16 * p.out.stride_token) {
        int const token = lane / 2 + 16 * j;
        if (token < tokens)
          *reinterpret_cast<uint4*>(out) =
              *reinterpret_cast<uint4 const*>(x.v[warpgroup] + panel_offset(token, 2 * (warp % 4) + lane % 2));
      }
      cutlass::arch::fence_view_async_shared();  // the next values come over what was written here
      EmptyBarrier::arrive(&pipe.empty[stage]);
      if (requests) request(n + 2);
    }
    StateLanes(kValueTile * warpgroup, warp % 4, recomputed(lane))
        .store_final(s, p.state, final_offset(p.state, seq, head));
  }
}

}  // namespace kda
