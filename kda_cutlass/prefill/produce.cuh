// Produce: eight warps make chunks' records, one after another, for all chains in parallel. Two such groups share an SM
// and hide each other's latencies.
#pragma once

#include "chunk.cuh"
#include "ring.cuh"

namespace kda {

struct ProducerSmem {
  alignas(1024) char panels[6][kPanelBytes];  // k_decayed, q_decayed, k_remaining, in the order of Record
  union {
    alignas(1024) FactorScratch factor_scratch;
    struct {                                      // once that is read
      alignas(1024) char solved[2][kPanelBytes];  // T, Aqk
      SolveScratch solve_scratch;
      alignas(1024) char raw_gate[2][kPanelBytes];  // of the next chunk
    };
  };
  alignas(16) ChunkFactors factors;
  ChunkPlace place;                 // of the chunk whose gate is asked for; no tokens: there are no more
  alignas(8) uint64_t gate_loaded;  // and the place
  alignas(8) uint64_t keys_loaded;
  alignas(8) uint64_t stored;  // T and Aqk have left

  __device__ __forceinline__ void init() {  // by one thread
    TransactionBarrier::init(&gate_loaded, 1);
    TransactionBarrier::init(&keys_loaded, 1);
    EmptyBarrier::init(&stored, 1);
    cutlass::arch::fence_barrier_init();
  }
  __device__ __forceinline__ void invalidate() {  // by one thread, once all are done
    for (uint64_t* barrier : {&gate_loaded, &keys_loaded, &stored}) EmptyBarrier::invalidate(barrier);
  }
};
static_assert(sizeof(ProducerSmem) <= 113 * 1024 + 512, "two groups an SM");
static_assert(sizeof(SolveScratch) <= 2 * kPanelBytes &&
              offsetof(FactorScratch, run) >=
                  offsetof(ProducerSmem, raw_gate) + 2 * kPanelBytes - offsetof(ProducerSmem, factor_scratch));

// Where the chunk of a walker's step lies, from step to step: of the share's first walker. Others that it goes to have the
// same sequences.
struct StepPlace {
  int chain, head;
  int64_t left;   // the chain's tokens from `at` on
  ChunkPlace at;  // without tokens: there are no more steps

  // Before the first advance(), which is by 0.
  template <bool kSegments>
  __device__ __forceinline__ StepPlace(Deal<kSegments> const& deal, Share const& share)
      : chain(share.walker - deal.walkers), head(0), left(-int64_t(share.step) * kChunk), at{} {}

  template <bool kSegments>
  __device__ __forceinline__ void advance(Deal<kSegments> const& deal, int steps) {
    at.first_token += int64_t(steps) * kChunk, left -= int64_t(steps) * kChunk;
#pragma unroll 1
    while (left <= 0 && (chain += deal.walkers) < deal.chains()) {  // the step lies behind the chain's end
      int const seq = deal.sequence(chain);
      int64_t const length = deal.length(chain), skipped = -left / kChunk * kChunk;
      head = deal.head(chain);
      at = {deal.first_token(chain) + skipped, 0, deal.sequences.batch(seq), head};
      left = length - skipped;
    }
    at.tokens = static_cast<int>(max(min(left, int64_t(kChunk)), int64_t(0)));
  }
};

// Until the thread's bulk stores are written, not only read.
__device__ __forceinline__ void wait_stored() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// By a group of eight warps, which share the named barriers `barrier`, `barrier` + 2 and `barrier` + 4. smem's barriers
// are ready. The SM's second group lets the first one make its first factors alone, so that a walker has something to
// start with early, and the two do different things from then on. `second_starts` tells it.
template <Gate kGate, bool kFp32Gate, bool kSegments>
__device__ __forceinline__ void produce(ChunkParams const& p, Deal<kSegments> const& deal, Ring const& ring,
                                        ProducerSmem& smem, Share const& share, uint64_t* second_starts, bool second,
                                        int warp, int lane) {
  int const barrier = second ? 2 : 1;
  FactorPanels const panels = {smem.raw_gate[0], smem.panels[0], smem.panels[2], smem.panels[4]};
  SolvePanels const solved = {smem.solved[0], smem.solved[1]};
  bool const leads = warp == kBlocks && lane == 0;  // of the warps that are done with their factors first
  StepPlace next(deal, share);
  auto const find_next = [&](int steps, int walker) {
    next.advance(deal, steps);
    next.at.head = next.head + walker - share.walker;
    smem.place = next.at;
  };
  auto const request_gate = [&] {
    if (next.at.tokens == 0) return EmptyBarrier::arrive(&smem.gate_loaded);
    TransactionBarrier::arrive_and_expect_tx(&smem.gate_loaded, kGateBytes<kFp32Gate>);
    request_panels(p.g_map, &smem.gate_loaded, kFp32Gate ? smem.factor_scratch.fp32_gate[0] : panels.raw_gate, next.at,
                   next.at.head);
  };
  auto const request_rest = [&] {
    if (next.at.tokens == 0) return;
    TransactionBarrier::arrive_and_expect_tx(&smem.keys_loaded, kKeyBytes);
    request_keys(p, next.at, &smem.keys_loaded, panels);
  };
  if (leads) {
    find_next(0, share.walker);
    request_gate();
    request_rest();
  }
  Share::Turn untold = {0, -1};  // whose record has left without the walker's knowing; no step: none
  int taken = 0;                 // records that the walker has taken, at least
  auto const tell_made = [&] {
    if (untold.step < 0) return;
    wait_stored();
    ring.tell_made(untold.walker, untold.step);
    untold.step = -1;
  };
  RawBeta beta;  // of the next step, of the warps that scale k
  auto const load_beta = [&] {
    if (warp >= kBlocks) {
      beta = {};
      beta.load(p, smem.place, warp % kBlocks, lane);
    }
  };
  TransactionBarrier::wait(&smem.gate_loaded, 0);
  load_beta();
  auto const let_second_start = [&] {
    if (leads && !second) EmptyBarrier::arrive(second_starts);
  };
  if (smem.place.tokens == 0) let_second_start();
  if (second) EmptyBarrier::wait(second_starts, 0);
  int phase = 0;
#pragma unroll 1
  for (Share::Turn turn = share.begin();; turn = share.next(turn), phase ^= 1) {
    TransactionBarrier::wait(&smem.gate_loaded, phase);
    ChunkPlace const at = smem.place;
    if (at.tokens == 0) break;
    Product q_product, k_product, below[2];
    make_factors<kGate, kFp32Gate>(
        q_product, k_product, p, at, {p, at.head, recomputed(warp), recomputed(lane)}, panels, smem.factor_scratch,
        smem.factors, barrier, recomputed(warp), recomputed(lane),
        [&] {
          TransactionBarrier::wait(&smem.keys_loaded, phase);
          scale_tokens(smem.factor_scratch, smem.factors, p, at, panels, beta, warp, lane);
        },
        [&] {
          if (leads) tell_made();  // its warp would wait for the others at the end of the factors
          __syncwarp();
          EmptyBarrier::wait(&smem.stored, phase ^ 1);
        },
        [&](int token, bool) { return read_scales(smem.factor_scratch, token); });
    cutlass::arch::fence_view_async_shared();
    sync_chunk_warps(barrier);
    if (turn.step == share.step) let_second_start();
    Record& record = ring.records[ring.slot(turn.walker, turn.step)];
    if (leads) {  // the operands leave at once
      while (!ring.is_free(taken, turn.walker, turn.step)) __nanosleep(40);
      static_assert(offsetof(Record, t) == sizeof(ProducerSmem::panels) &&
                    offsetof(Record, a_qk) == offsetof(Record, t) + kPanelBytes);
      cute::SM90_BULK_COPY_S2G::copy(smem.panels, record.k_decayed, sizeof(smem.panels));
      cute::SM90_BULK_COPY_S2G::copy(&smem.factors, &record.factors, sizeof(ChunkFactors));
      cute::tma_store_arrive();
    }
    __syncwarp();
    lane = recomputed(lane), warp = recomputed(warp);
    SolveRole const role(warp);
    multiply_below(below, role, smem.factor_scratch, lane);
    cutlass::arch::fence_view_async_shared();  // the next gate comes over what was read here
    sync_chunk_warps(barrier);
    store_diagonal_parts(smem.solve_scratch, q_product, k_product, warp, lane);
    int const i = warp % kBlocks;
    for (int j = i + 1; j < kBlocks; ++j) store_to_panel(smem.solved[warp / kBlocks], i, j, Product{}, lane);
    sync_chunk_warps(barrier);
    solve(solved, smem.solve_scratch, below, role, barrier, lane, [&] {
      if (leads) {
        Share::Turn const later = share.next(turn);
        find_next(later.step - turn.step, later.walker);
        if (share.moves()) {
          taken = 0;
          ring.is_free(taken, later.walker, later.step);  // which takes a while
        }
        if constexpr (!kFp32Gate) {
          request_gate();
          cute::tma_store_wait<0>();  // the operands are read
          request_rest();
        }
      }
      __syncwarp();
    });
    load_beta();  // by the warps of Aqk, which have seen the next place
    cutlass::arch::fence_view_async_shared();
    sync_chunk_warps(barrier);
    if (leads) {
      cute::SM90_BULK_COPY_S2G::copy(smem.solved, record.t, 2 * kPanelBytes);
      cute::tma_store_arrive();
      untold = turn;
      cute::tma_store_wait<0>();
      EmptyBarrier::arrive(&smem.stored);
      if (turn.step == 0 && ring.slices > 1) tell_made();  // a walker waits for it, and is what bounds such calls
      if constexpr (kFp32Gate) {                           // whose gate takes the place of more than is free earlier
        request_gate();
        request_rest();
      }
    }
    __syncwarp();
  }
  if (leads) tell_made();
}

}  // namespace kda
