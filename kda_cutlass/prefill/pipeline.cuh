// What the kernels that stream chunks through a CTA share: eight warps make factors of a chunk (chunk.cuh) while the
// others solve the chunk before it and go on from there. Raw q, k and g arrive by TMA where their factors go.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "chunk.cuh"

namespace kda {

constexpr int kStages = 2;
constexpr int kFactorBarrier = 1, kSolveBarrier = 2;  // named ones

struct FactorStage {
  alignas(1024) char k_decayed[2][kPanelBytes], q_decayed[2][kPanelBytes], k_remaining[2][kPanelBytes];  // as in Record
};

struct Pipeline {
  FactorScratch factor_scratch;
  SolveScratch solve_scratch;
  alignas(16) ChunkFactors factors[kStages];
  ChunkPlace places[kStages];                // no tokens: there are no more chunks
  alignas(8) uint64_t gate_loaded[kStages];  // and the place
  alignas(8) uint64_t loaded[kStages];       // the other raw inputs
  alignas(8) uint64_t ready[kStages];        // factors and diagonal_parts
  alignas(8) uint64_t empty[kStages];        // everything of the stage is read
  alignas(8) uint64_t normed;                // the norms are there, and q and k are read
  alignas(8) uint64_t multiplied;            // row and column factors are read
  alignas(8) uint64_t solved;                // solve_scratch is free

  __device__ __forceinline__ void init() {  // by one thread
    for (int s = 0; s < kStages; ++s) {
      TransactionBarrier::init(&gate_loaded[s], 1);
      TransactionBarrier::init(&loaded[s], 1);
      EmptyBarrier::init(&ready[s], kChunkThreads);
      EmptyBarrier::init(&empty[s], kChunkThreads);
    }
    EmptyBarrier::init(&normed, kWarpgroup);
    EmptyBarrier::init(&multiplied, kChunkThreads);
    EmptyBarrier::init(&solved, kChunkThreads);
    cutlass::arch::fence_barrier_init();
  }
};

__device__ __forceinline__ FactorPanels panels_of(FactorStage& stage) {
  return {stage.k_decayed[0], stage.k_decayed[0], stage.q_decayed[0], stage.k_remaining[0]};
}

// By one thread: requests the gate of the n-th chunk of this CTA; an fp32 one comes by itself.
template <bool kFp32Gate>
__device__ __forceinline__ void request_gate(ChunkParams const& p, Pipeline& pipe, FactorStage& stage, int n) {
  ChunkPlace const at = pipe.places[n % kStages];
  uint64_t* const loaded = &pipe.gate_loaded[n % kStages];
  if (at.tokens == 0) {
    EmptyBarrier::arrive(loaded);
    return;
  }
  TransactionBarrier::arrive_and_expect_tx(loaded, kGateBytes<kFp32Gate>);
  if (!kFp32Gate) request_panels(p.g_map, loaded, panels_of(stage).gate, at, at.head);
}

// The factor warps' whole work. `stage_of(n)` gives the stage of the n-th chunk.
template <Gate kGate, bool kFp32Gate, class F>
__device__ __forceinline__ void make_all_factors(ChunkParams const& p, Pipeline& pipe, int warp, int lane,
                                                 F&& stage_of) {
  RawBeta beta;  // of the next chunk
  auto const load_beta = [&](int n) {
    beta = {};
    beta.load(p, pipe.places[n % kStages], factor_block(warp), lane);
  };
  TransactionBarrier::wait(&pipe.gate_loaded[0], 0);
  load_beta(0);
#pragma unroll 1
  for (int n = 0;; ++n) {
    int const s = n % kStages;
    TransactionBarrier::wait(&pipe.gate_loaded[s], n / kStages & 1);
    ChunkPlace const at = pipe.places[s];
    if (at.tokens == 0) break;
    // Until all warps are done with the chunk before.
    auto const wait_for_all = [&] { EmptyBarrier::wait(&pipe.ready[s ^ 1], ((n + 1) / kStages & 1) ^ 1); };
    if constexpr (kFp32Gate) wait_for_all();  // it came after that, by a detour that racecheck does not follow
    Product q_product, k_product;
    FactorPanels const panels = panels_of(stage_of(n));
    make_factors<kGate, kFp32Gate>(
        q_product, k_product, p, at, {p, at.head, recomputed(warp), recomputed(lane)}, panels, pipe.factor_scratch,
        pipe.factors[s], kFactorBarrier, recomputed(warp), recomputed(lane),
        wait_for_all,  // the runs of the chunk before lie where this one's go
        [&] { EmptyBarrier::wait(&pipe.multiplied, (n & 1) ^ 1); },
        [&](int token, bool tells) {
          TransactionBarrier::wait(&pipe.loaded[recomputed(n) % kStages], n / kStages & 1);
          EmptyBarrier::wait(&pipe.normed, n & 1);
          return make_scales(pipe.factor_scratch, pipe.factors[s], p, at, beta, token, tells);
        });
    EmptyBarrier::wait(&pipe.solved, (n & 1) ^ 1);  // and the place of the next chunk is there
    load_beta(n + 1);
    store_diagonal_parts(pipe.solve_scratch, q_product, k_product, warp, lane);
    cutlass::arch::fence_view_async_shared();
    EmptyBarrier::arrive(&pipe.ready[recomputed(n) % kStages]);  // an address less to keep, which would spill
  }
}

// The norms of the n-th chunk's tokens, if there is one, by warps 4 to 7 of the others, which have less to do than 0 to 3.
// The factors of the chunk before are made, and its place is known.
__device__ __forceinline__ void find_chunk_norms(ChunkParams const& p, Pipeline& pipe, FactorStage& stage, int n,
                                                 int warp, int lane) {
  if (pipe.places[n % kStages].tokens == 0) return;
  TransactionBarrier::wait(&pipe.loaded[n % kStages], n / kStages & 1);
  FactorPanels const panels = panels_of(stage);
  find_norms(pipe.factor_scratch, p, panels, warp % kBlocks, lane);
  EmptyBarrier::arrive(&pipe.normed);
}

// The other warps' part in a chunk, once it is ready: T~ and Aqk~, which are there once all have called
// wait_for_solution(). `read()` is called once all factors of the pairs are read; the warps of Aqk, who have less to do,
// call `meanwhile()`, and may do what needs neither while the others are still at T.
template <class F, class G>
__device__ __forceinline__ void solve_chunk(Pipeline& pipe, SolvePanels const& panels, int warp, int lane, F&& read,
                                            G&& meanwhile) {
  SolveRole const role(recomputed(warp));
  lane = recomputed(lane);
  Product below[2];
  multiply_below(below, role, pipe.factor_scratch, lane);
  EmptyBarrier::arrive(&pipe.multiplied);
  read();
  solve(panels, pipe.solve_scratch, below, role, kSolveBarrier, lane, meanwhile);
  cutlass::arch::fence_view_async_shared();
  EmptyBarrier::arrive(&pipe.solved);
}
__device__ __forceinline__ void wait_for_solution() { sync_chunk_warps(kSolveBarrier); }

}  // namespace kda
