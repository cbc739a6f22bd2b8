// The states that the recurrence leaves inside a sequence.
#pragma once

#include <climits>

#include "chunk.cuh"
#include "state.cuh"

namespace kda {

// What one sequence is asked for, in any order, looked through by the 32 lanes of a warp.
struct CheckpointList {
  CheckpointParams const& p;
  int seq, lane;
  int chunks;           // whole ones of the sequence
  int64_t first, last;  // its entries in their row

  __device__ __forceinline__ CheckpointList(CheckpointParams const& p, Sequences const& sequences, int seq, int lane)
      : p(p),
        seq(seq),
        lane(lane),
        chunks(static_cast<int>(sequences.length(seq) / kChunk)),
        first(0),
        last(p.columns) {
    if (p.indptr != nullptr) {
      auto bound = [&](int n) {  // whatever it holds, no access leaves the row
        return min(max(load_index(p.indptr, n, p.indptr_is_int64), int64_t(0)), p.columns);
      };
      first = bound(seq), last = bound(seq + 1);
    }
  }

  __device__ __forceinline__ int64_t at(IndexView const& view, int64_t i) const {
    return (p.indptr != nullptr ? 0 : seq * view.stride_row) + i * view.stride_column;
  }
  // After how many whole chunks entry i wants the state; 0 for none.
  __device__ __forceinline__ int chunks_before(int64_t i) const {
    if (i >= last) return 0;
    int64_t const offset = load_index(p.offsets.data, at(p.offsets, i), p.offsets.is_int64);
    return offset > 0 && offset % kChunk == 0 && offset / kChunk <= chunks ? static_cast<int>(offset / kChunk) : 0;
  }
  __device__ __forceinline__ int64_t slot(int64_t i) const {
    int64_t const slot = p.slots.data != nullptr ? load_index(p.slots.data, at(p.slots, i), p.slots.is_int64)
                         : p.indptr != nullptr   ? i
                                                 : seq * p.columns + i;
    return slot >= p.min_slot && slot < p.num_slots ? slot : -1;
  }

  // After how many whole chunks, more than `done`, the next state is wanted.
  __device__ __forceinline__ int next(int done) const {
    int nearest = INT_MAX;
#pragma unroll 1
    for (int64_t i = first + lane; i < last; i += 32) {
      int const here = chunks_before(i);
      if (here > done) nearest = min(nearest, here);
    }
    return __reduce_min_sync(0xffffffffu, nearest);
  }
  // S after `done` whole chunks, wherever it is wanted.
  __device__ __forceinline__ void store(float const (&s)[64], StateLanes const& lanes, bool v_first, int head,
                                        int done) const {
#pragma unroll 1
    for (int64_t i = first; i < last; i += 32) {
      int64_t const mine = chunks_before(i + lane) == done ? slot(i + lane) : -1;
#pragma unroll 1
      for (uint32_t hits = __ballot_sync(0xffffffffu, mine >= 0); hits != 0; hits &= hits - 1) {
        int64_t const target = __shfl_sync(0xffffffffu, static_cast<long long>(mine), __ffs(hits) - 1);
        lanes.store(s, p.states, v_first, target * p.states.stride + head * kStateElements);
      }
    }
  }
};

}  // namespace kda
