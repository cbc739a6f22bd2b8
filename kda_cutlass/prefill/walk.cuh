// Walk: a CTA walks its chains' chunks, one chain after another, carrying the state. (Or a segment's of a chain, once.)
//
// With the record's operands (signs and scales folded in), S the state before the chunk and everything transposed so
// that the value channels are the rows of every accumulator:
//   W^T  = beta V^T - S^T (beta K e^G)^T   64 x 64 x 128
//   V'^T = W^T T^T                    64 x 64 x 64
//   O^T  = S^T (Q e^G)^T + V'^T Aqk^T 64 x 64 x 128 and 64 x 64 x 64
//   S^T  = S^T e^{G_end} + V'^T (K e^{G_end - G})
// A warpgroup owns 64 value channels: its state stays in registers in fp32 for the whole sequence, and every left
// operand (S, W, V') is made from accumulators in registers, without a trip through shared memory. A walker is one CTA
// with two of them, or, where chains are few, two CTAs with one each, which is faster, for the two share no tensor cores.
// Two warps of a third warpgroup fill the stages in shared memory, others write outputs, and one more tells the producers
// what was taken.
#pragma once

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>

#include "chunk.cuh"
#include "ring.cuh"

namespace kda {

constexpr int kStreamThreads = 512;  // of a CTA of the streamed schedule
constexpr int kAhead = 3;            // steps: values come to the L2 so much earlier
constexpr int kTellEvery = 4;        // steps; oftener slows everyone (docs/kernel-notes.md)
static_assert(kLeastRingSlots > kTellEvery, "or walkers and producers wait for each other");

template <int kSlices>
struct WalkSmem {
  static constexpr int kWarpgroups = kHeadDim / kValueTile / kSlices;
  static constexpr int kWalkStages = kSlices == 1 ? 2 : 3;  // what 227 KB hold
  struct Operands {                                         // the panels of Record, in its order
    char k_decayed[2][64 * kPanelRowBytes];
    char q_decayed[2][64 * kPanelRowBytes];
    char k_remaining[2][64 * kPanelRowBytes];
    char t[64 * kPanelRowBytes];
    char a_qk[64 * kPanelRowBytes];
  };
  static_assert(sizeof(Operands) == kRecordPanelBytes);
  alignas(1024) Operands operands[kWalkStages];
  alignas(1024) char v[kWalkStages][kWarpgroups][64 * kPanelRowBytes];  // [token, value channel]
  alignas(1024) char out[kWarpgroups][64 * kPanelRowBytes];             // [token, value channel]
  alignas(16) ChunkFactors factors[kWalkStages];
  alignas(16) float ones[kHeadDim];  // after the last chunk: no decay, and betas of values that nobody uses
  // Of a stage: k_decayed, factors and values, which are read first; and the rest.
  alignas(8) uint64_t early_full[kWalkStages], early_empty[kWalkStages];
  alignas(8) uint64_t made[kWalkStages];  // the record is there to be loaded
  alignas(8) uint64_t late_full[kWalkStages], late_empty[kWalkStages];
  alignas(8) uint64_t out_full[kWarpgroups];
  alignas(8) uint64_t out_empty[kWarpgroups];
  alignas(8) uint64_t taken, told;  // kTellEvery records more

  __device__ __forceinline__ void init() {  // by one thread
    for (int s = 0; s < kWalkStages; ++s) {
      TransactionBarrier::init(&early_full[s], 1);
      TransactionBarrier::init(&late_full[s], 1);
      EmptyBarrier::init(&made[s], 1);
      EmptyBarrier::init(&early_empty[s], 128 * kWarpgroups);  // threads, not warps: racecheck follows no warp barrier
      EmptyBarrier::init(&late_empty[s], 128 * kWarpgroups);
    }
    for (int w = 0; w < kWarpgroups; ++w) {
      EmptyBarrier::init(&out_full[w], 128);
      EmptyBarrier::init(&out_empty[w], 32);
    }
    EmptyBarrier::init(&taken, 32);
    EmptyBarrier::init(&told, 32);
    cutlass::arch::fence_barrier_init();
  }
  __device__ __forceinline__ void invalidate() {  // by one thread, once all are done
    for (int s = 0; s < kWalkStages; ++s)
      for (uint64_t* barrier : {&early_full[s], &late_full[s], &made[s], &early_empty[s], &late_empty[s]})
        EmptyBarrier::invalidate(barrier);
    for (int w = 0; w < kWarpgroups; ++w)
      for (uint64_t* barrier : {&out_full[w], &out_empty[w]}) EmptyBarrier::invalidate(barrier);
    for (uint64_t* barrier : {&taken, &told}) EmptyBarrier::invalidate(barrier);
  }
};

// What segments leave, to be joined. Later walkers are those of later segments.
struct SegmentParams {
  Segments segments;
  float* states;  // [walkers][V][K]: where a segment ends, which has started from zero unless it is the first
  float* maps;    // [later walkers][K][K]: what it makes of the state before it, columns first
  // [later walkers][chunks][2] panels [token, key channel]: what that state, multiplied by it, adds to the outputs.
  bf16* map_outputs;
  CUtensorMap out_map;  // of the outputs, as that of the values

  template <bool kSegments>
  __device__ __forceinline__ float* end(bool map, Deal<kSegments> const& deal, int chain) const {
    return map ? maps + (chain - deal.whole) * kStateElements : states + chain * kStateElements;
  }
};

// Of a segment without tokens, by `threads` threads: it ends where it starts.
__device__ __forceinline__ void keep_segment(StateParams const& p, float* end, int64_t from, bool map, int thread,
                                             int threads) {
  for (int i = thread; i < kHeadDim * kHeadDim; i += threads) {
    int const row = i / kHeadDim, column = i % kHeadDim;
    end[i] = map ? (row == column ? 1.f : 0.f) : initial_element(p, from, p.v_first ? i : column * kHeadDim + row);
  }
}

// Which walker a CTA is part of, and what it carries: a slice of the value channels of the state, or of a later segment's
// map, which is walked like a state that begins as the identity and has no values.
struct Walker {
  int number, slice;
  bool map;
  __device__ __forceinline__ Walker(Ring const& ring, int slices, bool segments, int cta)
      : number(cta / slices), slice(cta % slices), map(false) {
    if (segments && number >= ring.first) {
      int const behind = number - ring.first;
      number = ring.first + behind / 2, map = behind % 2;
    }
  }
  __device__ __forceinline__ int reader(Ring const& ring) const { return map ? ring.slices + slice : slice; }
};

// A chain as all warps of the CTA see it.
struct Chain {
  int seq, head, batch, steps;
  int64_t first_token, length;
  template <bool kSegments>
  __device__ __forceinline__ Chain(Deal<kSegments> const& deal, int chain)
      : seq(deal.sequence(chain)), head(deal.head(chain)) {
    batch = deal.sequences.batch(seq), first_token = deal.first_token(chain);
    length = deal.length(chain);
    steps = __shfl_sync(0xffffffffu, static_cast<int>((length + kChunk - 1) / kChunk), 0);  // for the compiler's sake
  }
};

// One warp: of each step's record what is wanted first, and the values.
template <int kSlices, bool kSegments>
__device__ __forceinline__ void feed_early(ValueParams const& p, Deal<kSegments> const& deal, Ring const& ring,
                                           WalkSmem<kSlices>& smem, Walker const& walker, int lane) {
  constexpr int kWarpgroups = WalkSmem<kSlices>::kWarpgroups, kWalkStages = WalkSmem<kSlices>::kWalkStages;
  uint32_t phases = (1u << kWalkStages) - 1;  // the first pass over the stages finds them empty
  int step = 0, known = 0;                    // steps before `known` are made
  for (int number = walker.number; number < deal.chains(); number += deal.walkers) {
    Chain const chain(deal, number);
    int64_t left = chain.length;
    int token = static_cast<int>(chain.first_token);
    for (int i = 0; i < chain.steps; ++i, ++step, left -= kChunk, token += kChunk) {
      int const stage = i % kWalkStages;
      auto& operands = smem.operands[stage];
      uint64_t* const full = &smem.early_full[stage];
      while (known <= step) {  // looks ahead, one step a lane
        bool const made = lane < ring.slots && ring.is_made(walker.number, step + lane);
        uint32_t const missing = ~__ballot_sync(0xffffffffu, made);
        known = step + (missing != 0 ? __ffs(missing) - 1 : 32);
        if (known > step) fence_bulk_copies();
      }
      EmptyBarrier::wait(&smem.early_empty[stage], phases >> stage & 1);
      phases ^= 1u << stage;
      if (lane == 0)
        TransactionBarrier::arrive_and_expect_tx(
            full, sizeof(operands.k_decayed) + sizeof(ChunkFactors) + (walker.map ? 0 : sizeof(smem.v[0])));
      __syncwarp();
      if (!walker.map) {
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w)
          request_values(p.map, p.token_map, p.tensor_tokens, full, smem.v[stage][w], token, left,
                         walker.slice * kWarpgroups + w, chain.head, chain.batch, lane);
        if (lane == 0 && left > kAhead * kChunk)
          for (int w = 0; w < kWarpgroups; ++w)
            cute::SM90_TMA_LOAD_5D::PREFETCH::copy(&p.map, 0, token + kAhead * kChunk, walker.slice * kWarpgroups + w,
                                                   chain.head, chain.batch);
      }
      if (lane == 0) {
        EmptyBarrier::arrive(&smem.made[stage]);
        Record const& record = ring.records[ring.slot(walker.number, step)];
        cute::SM90_BULK_COPY_G2S::copy(record.k_decayed, full, operands.k_decayed, sizeof(operands.k_decayed));
        cute::SM90_BULK_COPY_G2S::copy(&record.factors, full, &smem.factors[stage], sizeof(ChunkFactors));
      }
      __syncwarp();
    }
  }
}

// One warp: the rest of it.
template <int kSlices, bool kSegments>
__device__ __forceinline__ void feed_late(Deal<kSegments> const& deal, Ring const& ring, WalkSmem<kSlices>& smem,
                                          Walker const& walker, int lane) {
  constexpr int kWalkStages = WalkSmem<kSlices>::kWalkStages;
  uint32_t empty_phases = (1u << kWalkStages) - 1, made_phases = 0;
  int step = 0;
  for (int number = walker.number; number < deal.chains(); number += deal.walkers) {
    Chain const chain(deal, number);
    for (int i = 0; i < chain.steps; ++i, ++step) {
      int const stage = i % kWalkStages;
      auto& operands = smem.operands[stage];
      uint64_t* const full = &smem.late_full[stage];
      EmptyBarrier::wait(&smem.late_empty[stage], empty_phases >> stage & 1);
      empty_phases ^= 1u << stage;
      // It does not go on before this is seen: the warpgroups free the stage for the next record once they have what is
      // asked for here.
      EmptyBarrier::wait(&smem.made[stage], made_phases >> stage & 1);
      made_phases ^= 1u << stage;
      if (lane == 0) {
        Record const& record = ring.records[ring.slot(walker.number, step)];
        constexpr int kLate = kRecordPanelBytes - sizeof(operands.k_decayed);
        TransactionBarrier::arrive_and_expect_tx(full, kLate);
        cute::SM90_BULK_COPY_G2S::copy(record.q_decayed, full, operands.q_decayed, kLate);
      }
      __syncwarp();
    }
  }
}

// One warp: a warpgroup's outputs, 128 bytes a token.
template <int kSlices, bool kSegments>
__device__ __forceinline__ void write_outputs(ValueParams const& p, Deal<kSegments> const& deal,
                                              SegmentParams const& left, WalkSmem<kSlices>& smem, Walker const& walker,
                                              int w, int lane) {
  constexpr int kWarpgroups = WalkSmem<kSlices>::kWarpgroups, kPanelUnits = 64 * kPanelRowBytes / sizeof(uint4);
  int const unit = lane % 8;
  int written = 0;
  for (int number = walker.number; number < deal.chains(); number += deal.walkers) {
    Chain const chain(deal, number);
    int const panel = walker.slice * kWarpgroups + w;
    bf16* out = p.out.data + p.out.stride_batch * chain.batch + p.out.stride_token * (chain.first_token + lane / 8) +
                p.out.stride_head * chain.head + kValueTile * panel + 8 * unit;
    uint4* map =
        reinterpret_cast<uint4*>(left.map_outputs + (number - deal.whole) * deal.segments.tokens() * kHeadDim) +
        panel * kPanelUnits + lane;
    int64_t tokens = chain.length;
    for (int i = 0; i < chain.steps; ++i, ++written, tokens -= kChunk) {
      EmptyBarrier::wait(&smem.out_full[w], written & 1);
      if (walker.map) {
#pragma unroll 4
        for (int i = 0; i < kPanelUnits; i += 32)
          map[i] = *reinterpret_cast<uint4 const*>(smem.out[w] + (i + lane) * sizeof(uint4));
        map += 2 * kPanelUnits;
      } else {
#pragma unroll 4
        for (int row = lane / 8; row < kChunk; row += 4, out += 4 * p.out.stride_token)
          if (row < tokens)
            __stcs(reinterpret_cast<uint4*>(out),
                   *reinterpret_cast<uint4 const*>(smem.out[w] + panel_offset(row, unit)));
      }
      EmptyBarrier::arrive(&smem.out_empty[w]);
      if (w == 0 && written % kTellEvery == 0) {  // where there are outputs, the whole record has come
        EmptyBarrier::wait(&smem.told, written / kTellEvery & 1 ^ 1);
        EmptyBarrier::arrive(&smem.taken);
      }
      __syncwarp();
    }
  }
}

// One warp: tells the producers what has been taken. To tell is to fence, which takes longer than a step: who writes
// outputs has no time for it.
template <int kSlices, bool kSegments>
__device__ __forceinline__ void tell_taken(Deal<kSegments> const& deal, Ring const& ring, WalkSmem<kSlices>& smem,
                                           Walker const& walker, int lane) {
  int step = 0;
  for (int number = walker.number; number < deal.chains(); number += deal.walkers) {
    for (int const end = step + Chain(deal, number).steps; step < end; ++step) {
      if (step % kTellEvery != 0) continue;
      EmptyBarrier::wait(&smem.taken, step / kTellEvery & 1);
      if (lane == 0) ring.tell_taken(walker.number, walker.reader(ring), step + 1);
      __syncwarp();
      EmptyBarrier::arrive(&smem.told);
    }
  }
}

// The CTA's warpgroups.
template <int kSlices, bool kSegments>
__device__ __forceinline__ void carry_states(ValueParams const& p, Deal<kSegments> const& deal,
                                             SegmentParams const& left, WalkSmem<kSlices>& smem, Walker const& walker,
                                             int warpgroup, int warp, int lane) {
  constexpr int kWarpgroups = WalkSmem<kSlices>::kWarpgroups, kWalkStages = WalkSmem<kSlices>::kWalkStages;
  int const first_value = kValueTile * (walker.slice * kWarpgroups + warpgroup);
  StateLanes const lanes(first_value, warp, lane);
  float s[64], w[32], o[32], v_new[32];
  uint32_t s_operand[32], w_operand[16], v_operand[16], o_packed[16];
  uint32_t phases = 0;
  int handed = 0;
  auto hand_out = [&] {  // to the writer; the panel is free once the chunk before has left it
    EmptyBarrier::wait(&smem.out_empty[warpgroup], handed & 1 ^ 1);
    lanes.store_output(smem.out[warpgroup], o_packed);
    EmptyBarrier::arrive(&smem.out_full[warpgroup]);
    ++handed;
  };
  auto wait_early = [&](int stage) { TransactionBarrier::wait(&smem.early_full[stage], phases >> stage & 1); };
  auto wait_late = [&](int stage) {
    TransactionBarrier::wait(&smem.late_full[stage], phases >> stage & 1);
    phases ^= 1u << stage;
  };
#pragma unroll 1
  for (int number = walker.number; number < deal.chains(); number += deal.walkers) {
    Chain const chain(deal, number);
    int const seq = chain.seq, head = chain.head, steps = chain.steps;
    if (steps == 0) {
      int const part = walker.slice * kWarpgroups + warpgroup, thread = 128 * part + 32 * warp + lane;
      if (number < deal.whole) p.out.store_zeros(deal.sequences, seq, head, thread, 256);
      if constexpr (!kSegments)
        keep_state(p.state, seq, head, thread, 256);
      else
        keep_segment(p.state, left.end(walker.map, deal, number),
                     number < deal.whole ? initial_offset(p.state, seq, head) : -1, walker.map, thread, 256);
      continue;
    }
    // Nothing that only this needs is to be kept from chain to chain: ptxas would spill.
    StateLanes const here(first_value, warp, recomputed(lane));
    here.load_initial<true>(s, p.state, number < deal.whole ? initial_offset(p.state, seq, head) : -1);
    if (walker.map) here.set_identity(s);
    pack_operand(s_operand, s);
    wait_early(0);
    lanes.seed_with_values(w, smem.v[0][warpgroup], smem.factors[0].beta);
    lanes.decay(s, smem.factors[0].decay);
    auto step = [&](auto stage_constant, int i) {
      constexpr int stage = decltype(stage_constant)::value;
      auto& operands = smem.operands[stage];
      // W^T = beta V^T - S^T (beta K e^G)^T, the values being the accumulator's seed
      fence_registers(w);
      cute::warpgroup_arrive();
      wgmma_k_major<2>(w, s_operand, Place(operands.k_decayed[0]), true);
      cute::warpgroup_commit_batch();

      wait_late(stage);

      fence_registers(o);
      cute::warpgroup_arrive();
      wgmma_k_major<1>(o, reinterpret_cast<uint32_t const(&)[16]>(s_operand[0]), Place(operands.q_decayed[0]), false);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      fence_registers(w);
      EmptyBarrier::arrive(&smem.early_empty[stage]);
      pack_operand(w_operand, w);

      // V'^T = W^T T^T; the other half of S^T (Q e^G)^T fills the tensor cores while V' becomes an operand
      fence_registers(v_new);
      cute::warpgroup_arrive();
      wgmma_k_major<1>(v_new, w_operand, Place(operands.t), false);
      cute::warpgroup_commit_batch();
      wgmma_k_major<1>(o, reinterpret_cast<uint32_t const(&)[16]>(s_operand[16]), Place(operands.q_decayed[1]), true);
      cute::warpgroup_commit_batch();
      if (i > 0) hand_out();
      cute::warpgroup_wait<1>();
      fence_registers(v_new);
      pack_operand(v_operand, v_new);

      // S^T += V'^T (K e^{G_end - G}),  O^T += V'^T Aqk^T
      fence_registers(s);
      cute::warpgroup_arrive();
      wgmma_mn_major(s, v_operand, Place(operands.k_remaining));
      cute::warpgroup_commit_batch();
      wgmma_k_major<1>(o, v_operand, Place(operands.a_qk), true);
      cute::warpgroup_commit_batch();

      constexpr int next_stage = stage + 1 == kWalkStages ? 0 : stage + 1;
      bool const last = i + 1 == steps;
      ChunkFactors const& next = smem.factors[next_stage];
      if (!last) wait_early(next_stage);
      lanes.seed_with_values(w, last ? operands.a_qk : smem.v[next_stage][warpgroup], last ? smem.ones : next.beta);
      cute::warpgroup_wait<1>();
      fence_registers(s);
      pack_operand(s_operand, s);
      // Not behind the next product: ptxas would wait for that one first.
      lanes.decay(s, last ? smem.ones : next.decay);

      cute::warpgroup_wait<0>();
      fence_registers(o);
      pack_operand(o_packed, o);
      EmptyBarrier::arrive(&smem.late_empty[stage]);
    };
    // Whole rounds of the ring, so that every address and descriptor is a constant.
#pragma unroll 1
    for (int first = 0; first < steps; first += kWalkStages)
      static_for<kWalkStages>([&](auto stage) {
        if (first + stage < steps) step(stage, first + stage);
      });
    hand_out();
    if constexpr (!kSegments)
      lanes.store_final(s, p.state, final_offset(p.state, seq, head));
    else
      store_state(s, left.end(walker.map, deal, number), true, lanes.value, lane);
  }
}

// Once it has walked: all warps have as many registers again.
__device__ __forceinline__ void even_registers(int warp) {
  if (warp < 8)
    cutlass::arch::warpgroup_reg_dealloc<128>();
  else
    cutlass::arch::warpgroup_reg_alloc<128>();
}

// A CTA: a walker, or the half of one.
template <int kSlices, bool kSegments>
__device__ __forceinline__ void walk_chains(ValueParams const& p, Deal<kSegments> const& deal,
                                            SegmentParams const& left, Ring const& ring, WalkSmem<kSlices>& smem,
                                            Walker const& walker, int warp, int lane) {
  constexpr int kWarpgroups = WalkSmem<kSlices>::kWarpgroups;
  if (threadIdx.x == 0) smem.init();
  if (threadIdx.x < kHeadDim) smem.ones[threadIdx.x] = 1.f;
  if (walker.map)
    for (int i = threadIdx.x; i < sizeof(smem.v) / sizeof(uint4); i += kStreamThreads)
      reinterpret_cast<uint4*>(smem.v)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (warp < 8) {
    cutlass::arch::warpgroup_reg_alloc<216>();
    if (warp < 4 * kWarpgroups) carry_states(p, deal, left, smem, walker, warp / 4, warp % 4, lane);
  } else {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp == 8) feed_early(p, deal, ring, smem, walker, lane);
    if (warp == 11) feed_late(deal, ring, smem, walker, lane);
    if (warp == 9 || warp == 8 + kWarpgroups) write_outputs(p, deal, left, smem, walker, warp - 9, lane);
    if (warp == 12) tell_taken(deal, ring, smem, walker, lane);
  }
  if constexpr (kSegments) {
    fence_bulk_copies();
    __syncthreads();
    if (threadIdx.x == 0) {
      add_release(&ring.flags->ended, 1);
      smem.invalidate();  // for join_states(), which has this memory next and waits for all threads first
    }
    cutlass::arch::fence_view_async_shared();
  }
}

}  // namespace kda
