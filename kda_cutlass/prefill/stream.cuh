// Stream: walkers (walk.cuh) carry the states of chains, the other CTAs make their records (produce.cuh), which go
// through a ring in the L2 (ring.cuh). They wait for each other, so all must run at once: a cooperative launch of one
// CTA an SM.
#pragma once

#include "produce.cuh"
#include "walk.cuh"

namespace kda {

struct StreamParams {
  int const* taken;  // not null: whether the fused kernel has done the call
  ChunkParams chunk;
  ValueParams values;
  Ring ring;
  Teams teams;
};

constexpr int kStreamThreads = kGroupsAnSm * kChunkThreads;

struct StreamSmem {
  union {
    ProducerSmem producers[kGroupsAnSm];
    WalkSmem walk;
  };
  int place;
  alignas(8) uint64_t second_starts;  // group of producers
};
static_assert(sizeof(StreamSmem) <= 227 * 1024);

template <Gate kGate, bool kFp32Gate>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const __grid_constant__ StreamParams p) {
  if (p.taken != nullptr && *p.taken) return;
  extern __shared__ __align__(1024) char smem_bytes[];
  StreamSmem& smem = *reinterpret_cast<StreamSmem*>(smem_bytes);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  Sequences const& sequences = p.chunk.sequences;
  int const walkers = p.ring.walkers, makers = gridDim.x - walkers;
  Deal const deal = {sequences, p.values.state, p.chunk.value_heads, sequences.num_seqs * p.chunk.value_heads, walkers};

  // The first CTAs walk. Each of the others is two groups of producers.
  // They go by the number of their SM: the two of a TPC do the same kind of work then, and it is the same in each call.
  if (threadIdx.x == 0) smem.place = p.ring.flags->take_place(gridDim.x);
  __syncthreads();
  int const cta = smem.place;
  if (cta < walkers) {
    if (threadIdx.x == 0) smem.walk.init();
    if (threadIdx.x < kHeadDim) smem.walk.none.decay[threadIdx.x] = 1.f;
    __syncthreads();
    if (warp < 8) {
      cutlass::arch::warpgroup_reg_alloc<216>();
      carry_states(p.values, deal, smem.walk, cta, warp / 4, warp % 4, lane);
    } else {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      if (warp == 8) feed_early(p.values, deal, p.ring, smem.walk, cta, lane);
      if (warp == 11) feed_late(deal, p.ring, smem.walk, cta, lane);
      if (warp == 9 || warp == 10) write_outputs(p.values, deal, smem.walk, cta, warp - 9, lane);
      if (warp == 12) tell_taken(deal, p.ring, smem.walk, cta, lane);
    }
  } else {
    int const group = warp / 8;
    ProducerSmem& own = smem.producers[group];
    if (threadIdx.x % kChunkThreads == 0) own.init();
    if (threadIdx.x == 0) EmptyBarrier::init(&smem.second_starts, 1);
    __syncthreads();
    Share const share = deal_share(group * makers + cta - walkers, walkers, p.teams);
    if (share.first >= 0)
      produce<kGate, kFp32Gate>(p.chunk, deal, p.ring, own, share, &smem.second_starts, group == 1, warp % 8, lane);
  }
}

}  // namespace kda
