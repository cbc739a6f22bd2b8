// Stream: walkers (walk.cuh) carry the states of chains, the other CTAs make their records (produce.cuh), which go
// through a ring in the L2 (ring.cuh). Where chains were walked in segments, all of them join these in the end (join.cuh).
// They wait for each other, so all must run at once: a cooperative launch of one CTA an SM.
#pragma once

#include "join.cuh"
#include "produce.cuh"

namespace kda {

struct StreamParams {
  int const* taken;  // not null: whether the fused kernel has done the call
  ChunkParams chunk;
  ValueParams values;
  SegmentParams left;
  Ring ring;
  Teams teams;
};

// Of a gate mode and type of g; in stream.cu.
cudaError_t launch_stream(Gate gate, bool fp32_gate, StreamParams const& params, int sms, cudaStream_t stream);

static_assert(kStreamThreads == kGroupsAnSm * kChunkThreads);

template <int kSlices, bool kSegments>
union StreamSmem {
  int place;
  struct {
    ProducerSmem groups[kGroupsAnSm];
    alignas(8) uint64_t second_starts;  // of the groups
  } producers;
  WalkSmem<kSlices> walk;
  std::conditional_t<kSegments, JoinSmem, int> join;
};
static_assert(sizeof(StreamSmem<1, false>) <= 227 * 1024 && sizeof(StreamSmem<2, true>) <= 227 * 1024);

// A walker is kSlices CTAs: a kernel for each number, and for chains in segments, for what is launched is brought to the
// SMs whole, 1 us for 12 KB.
template <Gate kGate, bool kFp32Gate, int kSlices, bool kSegments>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const __grid_constant__ StreamParams p) {
  if (p.taken != nullptr && *p.taken) return;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<StreamSmem<kSlices, kSegments>*>(smem_bytes);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  Sequences const& sequences = p.chunk.sequences;
  int const walkers = p.ring.walkers, makers = p.teams.makers, walking = gridDim.x - makers;
  Deal<kSegments> const deal = {
      sequences, p.values.state, p.chunk.value_heads, sequences.num_seqs * p.chunk.value_heads,
      walkers,   p.left.segments};

  // The first CTAs walk. Each of the others is two groups of producers.
  // They go by the number of their SM: the two of a TPC do the same kind of work then, and it is the same in each call.
  if (threadIdx.x == 0) smem.place = p.ring.flags->take_place(gridDim.x);
  __syncthreads();
  int const cta = smem.place;
  __syncthreads();
  if (cta < walking) {
    walk_chains(p.values, deal, p.left, p.ring, smem.walk, Walker(p.ring, kSlices, kSegments, cta), warp, lane);
    if constexpr (kSegments) {
      even_registers(warp);
      join_states(p.values, deal, p.left, *p.ring.flags, smem.join, cta, walking);
    }
  } else {
    int const group = warp / 8;
    ProducerSmem& own = smem.producers.groups[group];
    if (threadIdx.x % kChunkThreads == 0) own.init();
    if (threadIdx.x == 0) EmptyBarrier::init(&smem.producers.second_starts, 1);
    __syncthreads();
    Share const share = deal_share(group * makers + cta - walking, walkers, p.teams);
    if (share.step >= 0)
      produce<kGate, kFp32Gate>(p.chunk, deal, p.ring, own, share, &smem.producers.second_starts, group == 1, warp % 8,
                                lane);
    if constexpr (kSegments) {
      // What has this memory next must find no barriers there: left valid, they come back over its data when processes
      // take turns on the GPU.
      __syncthreads();
      if (threadIdx.x % kChunkThreads == 0) own.invalidate();
      if (threadIdx.x == 0) EmptyBarrier::invalidate(&smem.producers.second_starts);
      cutlass::arch::fence_view_async_shared();
      __syncthreads();
      join_outputs(p.values, deal, p.left, *p.ring.flags, smem.join, cta - walking, makers, walking, warp, lane);
    }
  }
}

}  // namespace kda
