// Fused: the whole prefill of a (sequence, head) in one CTA, for calls with enough of them to fill the card. Nothing
// but q, k, v, g, beta and the output touches memory.
//
// Two warpgroups make factors (chunk.cuh) of a chunk. Two others, with half of the value channels each, solve the chunk
// before it and carry the state through it (state.cuh). Raw q, k and g arrive where their factors go; the output leaves
// from where the values came. CTAs are persistent, so that the next chain's first chunk is made ready while the last
// one's outputs are still computed. Chains of one length are dealt in turn, or shared where that would leave many CTAs
// without work at the end (Portion in schedule.h); of unequal lengths, whoever is free takes the next of the longest.
// Where the gates let it (prove.cuh), a few long chains are cut into pieces to fill the card.
#pragma once

#include <cuda.h>

#include "pipeline.cuh"
#include "prove.cuh"
#include "ring.cuh"

namespace kda {

// States of shared chains that a CTA hands to the next, in the workspace.
struct HandOver {
  int* warps;     // [CTAs] that have left their part of it, cleared before
  float* states;  // [CTAs][value, key]

  // Of the CTA before, which has begun no later and has waited for nobody until it leaves this.
  __device__ __forceinline__ void wait() const {
    while (load_acquire(warps + blockIdx.x - 1) < kChunkThreads / 32) {
    }
    __syncwarp();
  }
  __device__ __forceinline__ void tell(int lane) const {
    __syncwarp();
    if (lane == 0) add_release(warps + blockIdx.x, 1);
    __syncwarp();
  }
};

struct FusedParams {
  ChunkParams chunk;
  ValueParams values;
  int* taken;        // where to say whether this kernel does the call; null where the host has decided that it does
  int sms, walkers;  // of the streamed schedule, which does it otherwise; no walkers: the split one does
  float walker_step;
  RingFlags* flags;  // which that one wants to find empty
  int* dealt;        // how many chains are dealt, cleared before; null where all have one length
  Cut cut;
  Forgotten forgotten;  // what has to hold for the cut; null without one
  HandOver hand_over;   // where chains are shared
};

constexpr int kFusedThreads = 2 * kChunkThreads;

// In front of the fused kernel, which starts beside it: sets what that counts with to 0.
struct ClearParams {
  int* words;
  int count;
};
__global__ void __launch_bounds__(kFusedThreads) clear_kernel(const __grid_constant__ ClearParams p) {
  let_next_kernel_start();
  for (int i = threadIdx.x; i < p.count; i += kFusedThreads) p.words[i] = 0;
}

// The chunks of a CTA's chains (sequence, head), one after another, as far as they are asked for.
struct ChunkWalk {
  int turn;                 // where chains are shared
  int item, chunk, chunks;  // item: -1 in a turn without one
  int64_t first_token, length;
  int batch, head, silent;  // of the item
};
// What is walked at a stretch: a chain, or a piece of one where they are cut or shared. First all chains' first pieces;
// of shared ones 0 is the whole, 1 the front, which is handed over, and 2 the rest.
template <Dealing kDealing>
struct Item {
  int seq, head;
  int64_t begin, end;  // tokens of the sequence
  int silent = 0;      // of these, in front, whose outputs are the piece's before
  bool handed_over = false, to_end = true;

  __device__ __forceinline__ Item(FusedParams const& p, Portion const& portion, int item, int chains) {
    int const piece = kDealing == Dealing::kWhole ? 0 : item / chains, chain = item - piece * chains;
    seq = chain / p.chunk.value_heads, head = chain - seq * p.chunk.value_heads;
    int64_t const length = live_length(p.chunk.sequences, p.values.state, seq);
    begin = 0, end = length;
    if constexpr (kDealing == Dealing::kCut) {
      int64_t const own = p.cut.start(piece), next = p.cut.start(piece + 1);
      if (piece > 0) silent = kWarmUp * kChunk;
      to_end = piece + 1 == p.cut.pieces || next >= length;
      begin = own - silent, end = to_end ? length : next;
      if (piece > 0 && own >= length) begin = end, to_end = false;  // the chain has fewer pieces
    }
    if constexpr (kDealing == Dealing::kShared) {
      handed_over = piece == 2, to_end = piece != 1;
      if (piece == 1) end = min(length, int64_t(portion.front_chunks) * kChunk);
      if (piece == 2) begin = min(length, int64_t(portion.rest_chunk) * kChunk);
    }
  }
  __device__ __forceinline__ int64_t tokens() const { return end - begin; }
  __device__ __forceinline__ bool from_start() const { return silent == 0 && !handed_over; }
};
constexpr int kMostOrdered = 448;  // sequences, what shared memory holds; more are dealt in turn

struct FusedSmem {
  struct Stage : FactorStage {
    char v[2][kPanelBytes];  // [token, value channel], then the output
  };
  Stage stages[kStages];
  alignas(1024) char t[kPanelBytes];
  char a_qk[kPanelBytes];
  Pipeline pipe;
  ChunkWalk walk;
  Portion portion;
  alignas(8) uint64_t decayed_read;  // the chunk's k_decayed by all
  int items[kStages];                // of the stages' chunks; -1: there are no more
  int shown[2 * kStages];            // how many of a chunk's outputs are stored
  int longest, chunks;               // of all sequences
  bool in_turn, shared;
  uint16_t order[kMostOrdered];  // the sequences, longest first
};
static_assert(sizeof(FusedSmem) <= 227 * 1024);

// By all threads: smem.longest and smem.chunks.
__device__ __forceinline__ void measure(FusedSmem& smem, Sequences const& sequences) {
  if (threadIdx.x == 0) smem.longest = smem.chunks = 0;
  __syncthreads();
  int longest = 0, chunks = 0;
  for (int n = threadIdx.x; n < sequences.num_seqs; n += kFusedThreads) {
    int const here = sequences.chunks(n);
    longest = max(longest, here), chunks += here;
  }
  atomicMax(&smem.longest, longest);
  atomicAdd(&smem.chunks, chunks);
  __syncthreads();
}

// By all threads, of at most kMostOrdered sequences: smem.order.
__device__ __forceinline__ void order_by_length(FusedSmem& smem, Sequences const& sequences) {
  int* const chunks = reinterpret_cast<int*>(smem.stages);
  int const n = threadIdx.x;
  if (n < sequences.num_seqs) chunks[n] = sequences.chunks(n);
  __syncthreads();
  if (n < sequences.num_seqs) {
    int rank = 0;
    for (int m = 0; m < sequences.num_seqs; ++m) rank += chunks[m] > chunks[n] || (chunks[m] == chunks[n] && m < n);
    smem.order[rank] = n;
  }
  cutlass::arch::fence_view_async_shared();  // inputs come there
  __syncthreads();
}

template <Gate kGate, bool kFp32Gate, Dealing kDealing>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_kernel(const __grid_constant__ FusedParams p) {
  extern __shared__ __align__(1024) char smem_bytes[];
  FusedSmem& smem = *reinterpret_cast<FusedSmem*>(smem_bytes);
  Pipeline& pipe = smem.pipe;
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Sequences const& sequences = p.chunk.sequences;
  int const value_heads = p.chunk.value_heads, chains = sequences.num_seqs * value_heads;

  bool constexpr kCut = kDealing == Dealing::kCut, kShared = kDealing == Dealing::kShared;
  int const items = chains * (kCut ? p.cut.pieces : kShared ? Portion::kPieces : 1);
  if (!kCut && p.dealt != nullptr) measure(smem, sequences);  // chains that are cut have one length
  auto const tell = [&](bool pays) {
    if (blockIdx.x != 0) return;
    if (threadIdx.x == 0) *p.taken = pays;
    if (!pays && p.walkers > 0) p.flags->clear(threadIdx.x, kFusedThreads);
  };
  if (!kCut && p.taken != nullptr) {
    bool const pays =
        Choice::fused_pays(smem.longest, smem.chunks, sequences.num_seqs, value_heads, p.walkers, p.walker_step, p.sms);
    tell(pays);
    if (!pays) return wait_for_previous_kernel();  // or a kernel behind this one could start before that has ended
  }
  if (threadIdx.x == 0) {
    pipe.init();
    EmptyBarrier::init(&smem.decayed_read, kChunkThreads);
    cutlass::arch::fence_barrier_init();
    smem.in_turn =
        p.dealt == nullptr || sequences.num_seqs > kMostOrdered || smem.longest * sequences.num_seqs == smem.chunks;
    if constexpr (kShared) {
      int const each = p.dealt == nullptr ? sequences.chunks(0) : smem.longest;
      smem.shared = p.dealt == nullptr || smem.longest * sequences.num_seqs == smem.chunks;
      if (smem.shared) smem.portion = deal_portion(chains, each, blockIdx.x, gridDim.x);
    }
    smem.walk = {-1, static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x), 0, 0, 0, 0, 0, 0, 0};
  }
  for (int i = threadIdx.x; i < 2 * kPanelBytes / 16; i += kFusedThreads)  // above the diagonal blocks they stay zero
    reinterpret_cast<uint4*>(smem.t)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (!kCut && !smem.in_turn) order_by_length(smem, sequences);

  // By a warp: finds the n-th chunk of this CTA.
  auto const find = [&](int n) {
    int const stage = n % kStages;
    ChunkWalk walk = smem.walk;
    while (walk.chunk >= walk.chunks && walk.item < items) {  // on to the next item that has a chunk
      if (kShared && smem.shared) {
        walk.item = smem.portion.item(++walk.turn, chains, blockIdx.x, gridDim.x);
        if (walk.item < 0) continue;
      } else if (smem.in_turn) {
        walk.item += gridDim.x;
      } else {
        int rank = 0;
        if (lane == 0) rank = atomicAdd(p.dealt, 1);
        rank = __shfl_sync(0xffffffffu, rank, 0);
        walk.item = rank < chains ? smem.order[rank / value_heads] * value_heads + rank % value_heads : chains;
      }
      if (walk.item >= (kShared && !smem.shared ? chains : items)) walk.item = items;
      if (walk.item == items) break;
      Item<kDealing> const item(p, smem.portion, walk.item, chains);
      walk.first_token = sequences.first_token(item.seq) + item.begin;
      walk.length = item.tokens();
      walk.chunk = 0, walk.chunks = static_cast<int>((walk.length + kChunk - 1) / kChunk);
      walk.batch = sequences.batch(item.seq), walk.head = item.head, walk.silent = item.silent;
    }
    ChunkPlace at = {0, 0, 0, 0};
    int shown = 0;
    if (walk.item < items) {
      int64_t const start = int64_t(walk.chunk) * kChunk;
      at = {walk.first_token + start, static_cast<int>(min(walk.length - start, int64_t(kChunk))), walk.batch,
            walk.head};
      shown = start < walk.silent ? 0 : at.tokens;
    }
    ++walk.chunk;
    __syncwarp();
    if (lane == 0) {
      smem.walk = walk;
      smem.items[stage] = walk.item < items ? walk.item : -1;
      if (kDealing != Dealing::kWhole) smem.shown[n % (2 * kStages)] = shown;
      pipe.places[stage] = at;
    }
    __syncwarp();
  };
  auto const request_first = [&](int n) {
    if (lane == 0) request_gate<kFp32Gate>(p.chunk, pipe, smem.stages[n % kStages], n);
    __syncwarp();
  };
  // By a warp: asks for the rest, once the stage is empty.
  auto const request_rest = [&](int n) {
    int const stage = n % kStages;
    ChunkPlace const at = pipe.places[stage];
    if (at.tokens == 0) return;
    EmptyBarrier::wait(&pipe.empty[stage], (n / kStages & 1) ^ 1);
    auto& x = smem.stages[stage];
    uint64_t* const loaded = &pipe.loaded[stage];
    if (lane == 0) {
      TransactionBarrier::arrive_and_expect_tx(loaded, kKeyBytes + kOperandBytes);
      request_keys(p.chunk, at, loaded, panels_of(x));
      if (at.tokens == kChunk)
        for (int h = 0; h < 2; ++h) request_panels(p.values.map, loaded, x.v[h], at, at.head, h);
    }
    __syncwarp();
    if (at.tokens < kChunk) {
      // A partial chunk token by token: behind its end lie another sequence's values, so those rows are read past the
      // end of the tensor, which gives zeros.
      for (int row = lane; row < kChunk; row += 32)
        for (int h = 0; h < 2; ++h)
          cute::SM90_TMA_LOAD_5D::copy(
              &p.values.token_map, loaded, kStreamed, x.v[h] + row * kPanelRowBytes, 0,
              row < at.tokens ? static_cast<int>(at.first_token) + row : p.values.tensor_tokens, h, at.head, at.batch);
    }
  };

  auto const request_fp32_gate = [&](int stage) {
    ChunkPlace const at = pipe.places[stage];
    request_panels(p.chunk.g_map, &pipe.gate_loaded[stage], pipe.factor_scratch.fp32_gate[0], at, at.head);
  };

  bool const requests = warp == 7;
  if (kShared || (requests && !smem.in_turn)) wait_for_previous_kernel();  // counters are 0 from here on
  if (requests) {
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) find(i);  // both places, before any of the others learns of the first
#pragma unroll 1
    for (int i = 0; i < (kCut ? 1 : kStages); ++i) {
      request_first(i);
      request_rest(i);
    }
    if (kFp32Gate && lane == 0 && pipe.places[0].tokens > 0) request_fp32_gate(0);
    __syncwarp();
  }
  if constexpr (kCut) {  // the first chunk is under way by then
    wait_for_previous_kernel();
    bool const pays = p.forgotten.holds(threadIdx.x, kFusedThreads);
    tell(pays);
    if (!pays) {
      if (pipe.places[0].tokens == 0) return;
      TransactionBarrier::wait(&pipe.gate_loaded[0], 0);
      return TransactionBarrier::wait(&pipe.loaded[0], 0);
    }
    if (requests) {
      request_first(1);
      request_rest(1);
    }
  }

  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<88>();
    return make_all_factors<kGate, kFp32Gate>(p.chunk, pipe, warp - 8, lane,
                                              [&](int n) -> FactorStage& { return smem.stages[n % kStages]; });
  }

  // ---- solve, and carry the state
  cutlass::arch::warpgroup_reg_alloc<168>();
  int const warpgroup = warp / 4;
  SolvePanels const solved = {smem.t, smem.a_qk};
  StateLanes const lanes(kValueTile * warpgroup, warp % 4, lane);
  // Of 16 tokens the one whose outputs a pair of lanes stores: eight lanes' reads from the panel meet in no bank.
  auto const out_row = [](uint32_t lane) { return lane / 16 * 8 + lane % 8 / 2 * 2 + lane / 8 % 2; };
  float s[64];
  int n = 0;
  if (warpgroup == 1) {
    TransactionBarrier::wait(&pipe.gate_loaded[0], 0);  // the place is there
    find_chunk_norms(p.chunk, pipe, smem.stages[0], 0, warp, recomputed(lane));
  }
#pragma unroll 1
  while (true) {
    TransactionBarrier::wait(&pipe.gate_loaded[n % kStages], n / kStages & 1);
    int const number = smem.items[n % kStages];
    if (number < 0) break;
    Item<kDealing> const item(p, smem.portion, number, chains);
    int64_t tokens = item.tokens();
    if constexpr (kShared) {
      StateView from = p.values.state.initial;
      int64_t offset;
      if (item.handed_over) {
        p.hand_over.wait();
        from = {p.hand_over.states, 0, Dtype::kFp32}, offset = (blockIdx.x - 1) * kStateElements;
      } else {
        offset = initial_offset(p.values.state, item.seq, item.head);
      }
      lanes.load(s, from, item.handed_over || p.values.state.v_first, offset);
    } else {
      lanes.load_initial(s, p.values.state,
                         item.from_start() ? initial_offset(p.values.state, item.seq, item.head) : -1);
    }
    bf16* out = p.values.out.data + p.values.out.stride_batch * sequences.batch(item.seq) +
                p.values.out.stride_head * item.head +
                p.values.out.stride_token * (sequences.first_token(item.seq) + item.begin + out_row(lane)) +
                kValueTile * warpgroup + 16 * (warp % 4) + 8 * (lane % 2);
#pragma unroll 1
    for (; tokens > 0; tokens -= kChunk, ++n) {
      int const stage = n % kStages, phase = n / kStages & 1;
      auto& x = smem.stages[stage];
      ChunkFactors const& factors = pipe.factors[stage];
      EmptyBarrier::wait(&pipe.ready[stage], phase);
      solve_chunk(
          pipe, solved, warp, lane,
          [&] {
            if constexpr (kFp32Gate) {  // the next chunk's goes where the factors just read were
              if (requests && lane == 0 && pipe.places[stage ^ 1].tokens > 0) {
                EmptyBarrier::wait(&pipe.multiplied, n & 1);
                request_fp32_gate(stage ^ 1);
              }
              __syncwarp();
            }
          },
          [&] {
            find_chunk_norms(p.chunk, pipe, smem.stages[stage ^ 1], n + 1, warp, recomputed(lane));
            if (requests) find(n + kStages);
          });
      TransactionBarrier::wait(&pipe.loaded[stage], phase);  // the values
      uint32_t s_operand[32], operand[16];
      {  // W^T = beta V^T - S^T (beta K e^G)^T, the values being the accumulator's seed
        float w[32];
        pack_operand(s_operand, s);
        lanes.seed_with_values(w, x.v[warpgroup], factors.beta);
        lanes.decay(s, factors.decay);
        fence_registers(w);
        cute::warpgroup_arrive();
        wgmma_k_major<2>(w, s_operand, uniform_place(x.k_decayed), true);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_registers(w);
        EmptyBarrier::arrive(&smem.decayed_read);
        pack_operand(operand, w);
      }
      wait_for_solution();
      if (requests) {
        EmptyBarrier::wait(&smem.decayed_read, n & 1);
        request_first(n + kStages);
      }
      // V'^T = W^T T^T, then S^T += V'^T (K e^{G_end - G}) and O^T = S^T (Q e^G)^T + V'^T Aqk^T, not earlier and by
      // halves of the tokens for want of registers. T and Aqk are lower triangular.
      Place const panels = uniform_place(&x), t = uniform_place(smem.t), a_qk = t + kPanelBytes;
      uint32_t v_operand[16];
      static_for<2>([&](auto index) {
        std::integral_constant<int, 1 - index> constexpr half;  // the second first: it alone wants all of W
        float v_new[16];
        cute::warpgroup_arrive();
        wgmma_k_major<1, 2 + 2 * half>(v_new, operand, t + half * (kPanelBytes / 2), false);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_registers(v_new);
#pragma unroll
        for (int i = 0; i < 8; ++i) v_operand[8 * half + i] = pack_bf16(v_new[2 * i], v_new[2 * i + 1]);
      });
      static_for<2>([&](auto half) {
        float o[16];
        uint32_t o_packed[8];
        if constexpr (half == 0) fence_registers(s);
        cute::warpgroup_arrive();
        if constexpr (half == 0) wgmma_mn_major(s, v_operand, panels + offsetof(FactorStage, k_remaining));
        wgmma_k_major<2>(o, s_operand, panels + (offsetof(FactorStage, q_decayed) + half * (kPanelBytes / 2)), false);
        wgmma_k_major<1, 2 + 2 * half>(o, v_operand, a_qk + half * (kPanelBytes / 2), true);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        if constexpr (half == 0) fence_registers(s);
        fence_registers(o);
        pack_operand(o_packed, o);
        lanes.store_output<2 * half>(x.v[warpgroup], o_packed);
      });
      __syncwarp();
      uint32_t const here = recomputed(lane);
      int const shown =
          kDealing != Dealing::kWhole ? smem.shown[n % (2 * kStages)] : static_cast<int>(min(tokens, int64_t(kChunk)));
      char const* const row = x.v[warpgroup] + panel_offset(out_row(here), 2 * (warp % 4) + here % 2);
#pragma unroll
      for (int j = 0; j < 4; ++j, out += 16 * p.values.out.stride_token)
        if (static_cast<int>(out_row(here)) + 16 * j < shown)
          __stcs(reinterpret_cast<uint4*>(out), *reinterpret_cast<uint4 const*>(row + 16 * j * kPanelRowBytes));
      cutlass::arch::fence_view_async_shared();  // the next values come over what was written here
      EmptyBarrier::arrive(&pipe.empty[stage]);
      if (requests) request_rest(n + kStages);
    }
    if constexpr (kDealing == Dealing::kWhole) {
      StateLanes(kValueTile * warpgroup, warp % 4, recomputed(lane))
          .store_final(s, p.values.state, final_offset(p.values.state, item.seq, item.head));
    } else {
      Item<kDealing> const done(p, smem.portion, recomputed(number), chains);
      bool const hand_over = kShared && !done.to_end;
      StateView to = p.values.state.final;
      if (hand_over) to = {p.hand_over.states, 0, Dtype::kFp32};
      int64_t const offset = hand_over     ? blockIdx.x * kStateElements
                             : done.to_end ? final_offset(p.values.state, done.seq, done.head)
                                           : -1;
      StateLanes(kValueTile * warpgroup, warp % 4, recomputed(lane))
          .store(s, to, hand_over || p.values.state.v_first, offset);
      if (hand_over) p.hand_over.tell(lane);
    }
  }
  // Sequences without tokens keep their state; those that are padding get zeros for outputs.
  for (int first = 0; first < sequences.num_seqs; first += 32) {
    bool const live = first + lane >= sequences.num_seqs || live_length(sequences, p.values.state, first + lane) > 0;
    for (uint32_t empty = ~__ballot_sync(0xffffffffu, live); empty != 0; empty &= empty - 1)
      for (int head = blockIdx.x; head < value_heads; head += gridDim.x) {
        int const seq = first + __ffs(empty) - 1;
        p.values.out.store_zeros(sequences, seq, head, threadIdx.x, kChunkThreads);
        keep_state(p.values.state, seq, head, threadIdx.x, kChunkThreads);
      }
  }
}

}  // namespace kda
