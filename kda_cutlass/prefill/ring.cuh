// How the CTAs of the streamed schedule share the work, and the ring in memory (in the L2, being small) through which
// records go from those that make them to those that walk chains with them.
#pragma once

#include "record.cuh"
#include "schedule.h"
#include "state.cuh"

namespace kda {

// Chains (sequence, head) are numbered with all heads of a sequence together. Walker w takes the chains w, w + walkers,
// w + 2 walkers, ... one after another; the chunks of all of these are its steps. So the walkers are at one chunk of
// neighbouring heads at a time, which lie side by side in memory. Of chains in segments each segment counts as a chain,
// those that chains begin with first.
template <bool kSegments>
struct Deal {
  Sequences const& sequences;
  StateParams const& state;
  int value_heads, whole, walkers;  // `whole` chains
  Segments const& segments;

  __device__ __forceinline__ int chains() const { return kSegments ? whole * segments.count : whole; }
  __device__ __forceinline__ int segment(int chain) const { return kSegments ? chain / whole : 0; }
  __device__ __forceinline__ int sequence(int chain) const { return (chain - segment(chain) * whole) / value_heads; }
  __device__ __forceinline__ int head(int chain) const { return chain % value_heads; }
  __device__ __forceinline__ int64_t first_token(int chain) const {
    return sequences.first_token(sequence(chain)) + segment(chain) * segments.tokens();
  }
  __device__ __forceinline__ int64_t length(int chain) const {
    int64_t const length = live_length(sequences, state, sequence(chain));
    if (!kSegments) return length;
    return max(min(length - segment(chain) * segments.tokens(), segments.tokens()), int64_t(0));
  }
};

// Flags between CTAs. Who has seen a bulk copy end may tell of it; who has read a flag needs a fence before bulk copies
// that rely on it, being on the other side of a proxy.
__device__ __forceinline__ int load_acquire(int const* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int* flag, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void add_release(int* flag, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void fence_bulk_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

struct RingFlags {                        // all 0 at first
  int made[kRingRecords];                 // [walkers][slots]: one more than the step whose record is there
  int taken[kMostWalkers][kMostReaders];  // how many records a walker's CTA has taken
  int placed[kMostPlaces];                // whether a CTA has the place
  int ended;                              // walkers' CTAs that are done with their segments
  int joined[kMostWalkers];               // parts of the state at the end of a segment that have been made

  __device__ __forceinline__ void clear(int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < kRingRecords; i += threads) made[i] = 0;
#pragma unroll 1
    for (int i = thread; i < kMostWalkers * kMostReaders; i += threads) taken[0][i] = 0;
#pragma unroll 1
    for (int i = thread; i < kMostPlaces; i += threads) placed[i] = 0;
#pragma unroll 1
    for (int i = thread; i < kMostWalkers; i += threads) joined[i] = 0;
    if (thread == 0) ended = 0;
  }

  // By one thread of each CTA, of which every SM has one: its place among them, that of its SM where it can be had.
  __device__ __forceinline__ int take_place(int ctas) {
    if (ctas > kMostPlaces) return blockIdx.x;
    unsigned place;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(place));
    for (place %= ctas; atomicExch(&placed[place], 1) != 0;) place = (place + 1) % ctas;
    return static_cast<int>(place);
  }
};

struct Ring {
  Record* records;  // [walkers][slots]
  RingFlags* flags;
  int walkers, slots;
  int first;   // walkers of chains, or first segments: those of others are twice as many CTAs
  int slices;  // CTAs of these

  __device__ __forceinline__ int readers(int walker) const { return walker < first ? slices : 2 * slices; }
  __device__ __forceinline__ int slot(int walker, int step) const { return walker * slots + step % slots; }

  // By one thread, before the slot is written: whether it may be. `known` is what it has seen of `taken`.
  __device__ __forceinline__ bool is_free(int& known, int walker, int step) const {
    if (known > step - slots) return true;
    known = load_acquire(&flags->taken[walker][0]);
    int const others = readers(walker);
#pragma unroll 1
    for (int i = 1; i < others; ++i) known = min(known, load_acquire(&flags->taken[walker][i]));
    fence_bulk_copies();
    return known > step - slots;
  }
  // By the thread that has seen the copy to the slot end.
  __device__ __forceinline__ void tell_made(int walker, int step) const {
    store_release(&flags->made[slot(walker, step)], step + 1);
  }
  // Wants the fence, where true.
  __device__ __forceinline__ bool is_made(int walker, int step) const {
    return load_acquire(&flags->made[slot(walker, step)]) == step + 1;
  }
  // By one thread of a walker's CTA, once its copies of the first `steps` records have ended.
  __device__ __forceinline__ void tell_taken(int walker, int reader, int steps) const {
    store_release(&flags->taken[walker][reader], steps);
  }
};

}  // namespace kda
