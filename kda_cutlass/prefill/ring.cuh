// How the CTAs of the streamed schedule share the work, and the ring in memory (in the L2, being small) through which
// records go from those that make them to those that walk chains with them.
#pragma once

#include "record.cuh"
#include "schedule.h"
#include "state.cuh"

namespace kda {

// Chains (sequence, head) are numbered with all heads of a sequence together. Walker w takes the chains w, w + walkers,
// w + 2 walkers, ... one after another; the chunks of all of these are its steps. So the walkers are at one chunk of
// neighbouring heads at a time, which lie side by side in memory.
struct Deal {
  Sequences const& sequences;
  StateParams const& state;
  int value_heads, chains, walkers;

  __device__ __forceinline__ int sequence(int chain) const { return chain / value_heads; }
  __device__ __forceinline__ int head(int chain) const { return chain % value_heads; }
  __device__ __forceinline__ int64_t length(int chain) const { return live_length(sequences, state, sequence(chain)); }
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
  int taken[kMostWalkers * kMostSlices];  // [walkers][slices]: how many records a walker's CTA has taken
  int placed[kMostPlaces];                // whether a CTA has the place

  __device__ __forceinline__ void clear(int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < kRingRecords; i += threads) made[i] = 0;
#pragma unroll 1
    for (int i = thread; i < kMostWalkers * kMostSlices; i += threads) taken[i] = 0;
#pragma unroll 1
    for (int i = thread; i < kMostPlaces; i += threads) placed[i] = 0;
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
  int walkers, slices, slots;

  __device__ __forceinline__ int slot(int walker, int step) const { return walker * slots + step % slots; }

  // By one thread, before the slot is written: whether it may be. `known` is what it has seen of `taken`.
  __device__ __forceinline__ bool is_free(int& known, int walker, int step) const {
    if (known > step - slots) return true;
    known = load_acquire(&flags->taken[walker * slices]);
    static_assert(kMostSlices == 2);
    if (slices > 1) known = min(known, load_acquire(&flags->taken[walker * slices + 1]));
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
  __device__ __forceinline__ void tell_taken(int walker, int slice, int steps) const {
    store_release(&flags->taken[walker * slices + slice], steps);
  }
};

}  // namespace kda
