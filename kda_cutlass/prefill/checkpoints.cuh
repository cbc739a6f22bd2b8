// The states that a prefill leaves inside a sequence. The recurrence writes S after whole chunks, to the slots of all
// entries that lie in the chunk behind. Of those that want 16, 32 or 48 tokens more each is then a piece of its own for
// another prepare and recurrence, which take the state in the slot through these tokens.
#pragma once

#include <climits>

#include "chunk.cuh"
#include "state.cuh"

namespace kda {

// What one sequence is asked for, in any order, looked through by the 32 lanes of a warp.
struct CheckpointList {
  CheckpointParams const& p;
  int seq, lane;
  int64_t length;       // of the sequence
  int64_t first, last;  // its entries in their row

  __device__ __forceinline__ CheckpointList(CheckpointParams const& p, Sequences const& sequences,
                                            StateParams const& state, int seq, int lane)
      : p(p), seq(seq), lane(lane), length(live_length(sequences, state, seq)), first(0), last(p.columns) {
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
  // Among the entries of all sequences.
  __device__ __forceinline__ int64_t number(int64_t i) const { return p.indptr != nullptr ? i : seq * p.columns + i; }
  // After how many tokens entry i wants the state; 0 for none.
  __device__ __forceinline__ int64_t tokens_before(int64_t i) const {
    if (i >= last) return 0;
    int64_t const offset = load_index(p.offsets.data, at(p.offsets, i), p.offsets.is_int64);
    return offset > 0 && offset % p.multiple == 0 && offset <= length ? offset : 0;
  }
  // How many chunks lie wholly before that; -1 for none wanted.
  __device__ __forceinline__ int chunks_before(int64_t i) const {
    int64_t const tokens = tokens_before(i);
    return tokens > 0 ? static_cast<int>(tokens / kChunk) : -1;
  }
  __device__ __forceinline__ int64_t slot(int64_t i) const {
    int64_t const slot =
        p.slots.data != nullptr ? load_index(p.slots.data, at(p.slots, i), p.slots.is_int64) : number(i);
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
  // S after `done` whole chunks, wherever it or one in the chunk behind is wanted.
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

struct PiecesParams {
  CheckpointParams checkpoints;
  Sequences sequences;
  StateParams state;
  Piece* pieces;       // of the entries [begin, end)
  int64_t begin, end;  // numbers among all
};

// A warp a sequence: for each of its entries the tokens that are left between a whole chunk and where its state is
// wanted.
__global__ void __launch_bounds__(32) list_pieces_kernel(const __grid_constant__ PiecesParams p) {
  int const seq = blockIdx.x;
  CheckpointList const list(p.checkpoints, p.sequences, p.state, seq, threadIdx.x);
#pragma unroll 1
  for (int64_t i = list.first + list.lane; i < list.last; i += 32) {
    int64_t const number = list.number(i);
    if (number < p.begin || number >= p.end) continue;
    int64_t const tokens = list.tokens_before(i), slot = list.slot(i), rest = slot < 0 ? 0 : tokens % kChunk;
    int64_t const first = p.sequences.first_token(seq) + tokens - rest;
    // In one store: where indptr gives an entry to two sequences it is the piece of one of them.
    int4 const piece = make_int4(first, rest, p.sequences.batch(seq), slot);
    *reinterpret_cast<int4*>(p.pieces + (number - p.begin)) = piece;
  }
}

}  // namespace kda
