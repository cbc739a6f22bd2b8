// What the prepare kernel leaves for the recurrence kernel, and which chunk of which sequence lies where.
#pragma once

#include "../sm90.cuh"
#include "params.h"

namespace kda {

// A thread of the recurrence wants the entries 8j + 2c and 8j + 2c + 1 of both vectors for one c < 4 and all j. They are
// kept in the order (j / 2, c, j % 2, e), so that it reads four at a time and a warp's reads lie side by side. G is the
// inclusive cumulative log decay inside the chunk.
struct ChunkFactors {
  float decay[kHeadDim];  // exp(G_end)
  float beta[kChunk];     // times r; 0 past the end of the sequence

  static __device__ __forceinline__ constexpr int index(int n) {
    return (n & ~15) | (n >> 1 & 3) << 2 | (n >> 3 & 1) << 1 | (n & 1);
  }
};
// One chunk of one value head, in the order and the shared-memory layout in which the recurrence wants it, so that one
// bulk copy brings it. Panels are those of sm90.cuh.
struct Record {
  // With r_i = 1 / |k_i| where keys are normalised, else 1; see chunk.cuh.
  char k_decayed[2]
                [64 * kPanelRowBytes];  // -beta_i r_i^2 k_i exp(G_i)  [token, key channel], two panels of 64 channels
  char q_decayed[2][64 * kPanelRowBytes];    // scale q_i exp(G_i), q normalised if asked
  char k_remaining[2][64 * kPanelRowBytes];  // k_j exp(G_end - G_j)
  char t[64 * kPanelRowBytes];               // (I + Akk)^-1_ij r_i / r_j   [token i, token j]
  char a_qk[64 * kPanelRowBytes];            // Aqk_ij / r_j, lower triangle with the diagonal
  ChunkFactors factors;
};
constexpr int kRecordPanelBytes = 8 * 64 * kPanelRowBytes;
static_assert(sizeof(Record) == kRecordBytes);

// A chunk or less of a sequence, as a sequence of its own.
struct alignas(16) Piece {
  int first_token, tokens, batch;
  int slot;  // of its state
};
// Chunks are numbered by slots: sequence n owns the slots from slot_base(n) on. With cu_seqlens the base is
// cu[n] / 64 + n, which leaves room for every partial chunk without a scan or a look at the lengths on the host.
struct Sequences {
  const void* cu_seqlens;
  bool is_int64;
  int num_seqs;
  int chunks_per_seq;  // without cu_seqlens
  int64_t tokens;
  Piece const* pieces = nullptr;  // not null: these, without cu_seqlens and with chunks_per_seq = 1

  __device__ __forceinline__ bool packed() const { return cu_seqlens != nullptr; }
  __device__ __forceinline__ int64_t cu(int n) const {
    int64_t const value = is_int64 ? __ldg(static_cast<long long const*>(cu_seqlens) + n)
                                   : static_cast<int64_t>(__ldg(static_cast<int const*>(cu_seqlens) + n));
    return min(max(value, int64_t(0)), tokens);  // whatever the buffer holds, no access leaves the tensors
  }
  __device__ __forceinline__ int slot_base(int n) const {
    return packed() ? static_cast<int>(cu(n) / kChunk) + n : n * chunks_per_seq;
  }
  __device__ __forceinline__ int batch(int n) const { return pieces != nullptr ? pieces[n].batch : packed() ? 0 : n; }
  __device__ __forceinline__ int64_t first_token(int n) const {
    return pieces != nullptr ? pieces[n].first_token : packed() ? cu(n) : 0;
  }
  __device__ __forceinline__ int64_t length(int n) const {
    if (pieces != nullptr) return pieces[n].tokens;
    return packed() ? max(cu(n + 1) - cu(n), int64_t(0)) : tokens;
  }
  __device__ __forceinline__ int chunks(int n) const { return static_cast<int>((length(n) + kChunk - 1) / kChunk); }

  // The sequence that owns `slot`, found by a whole warp: 32 probes a step.
  __device__ __forceinline__ int owner(int slot, int lane) const {
    if (num_seqs == 1) return 0;
    if (!packed()) return slot / chunks_per_seq;
    int lo = 0, hi = num_seqs;
    while (hi - lo > 1) {
      int const step = (hi - lo + 31) / 32;
      int const probe = lo + lane * step;
      bool const before = probe < hi && slot_base(probe) <= slot;
      int const count = max(__popc(__ballot_sync(0xffffffffu, before)), 1);
      lo += (count - 1) * step;
      hi = min(lo + step, hi);
    }
    return lo;
  }
};

// One launch handles the slots [begin, end) of every sequence; the fp32 state of the one sequence that goes on beyond
// `end` is carried in the workspace (two buffers, used in turn).
struct Slab {
  int begin, end;
  Record* records;  // [end - begin][HV]
  float* carry_in;  // [HV][V][K]
  float* carry_out;
};

}  // namespace kda
