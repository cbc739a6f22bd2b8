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
};
static_assert(sizeof(ProducerSmem) <= 113 * 1024 + 512, "two groups an SM");
static_assert(sizeof(SolveScratch) <= 2 * kPanelBytes &&
              offsetof(FactorScratch, run) >=
                  offsetof(ProducerSmem, raw_gate) + 2 * kPanelBytes - offsetof(ProducerSmem, factor_scratch));

// Which of a walker's steps a group makes: from `first` on every `stride`-th.
struct Share {
  int walker, first, stride;
};

// Where the chunk of a walker's step lies, from step to step.
struct StepPlace {
  int chain;
  int64_t left;   // the chain's tokens from `at` on
  ChunkPlace at;  // without tokens: there are no more steps

  // Before the first advance(), which is by 0.
  __device__ __forceinline__ StepPlace(Deal const& deal, Share const& share)
      : chain(share.walker - deal.walkers), left(-int64_t(share.first) * kChunk), at{} {}

  __device__ __forceinline__ void advance(Deal const& deal, int steps) {
    at.first_token += int64_t(steps) * kChunk, left -= int64_t(steps) * kChunk;
#pragma unroll 1
    while (left <= 0 && (chain += deal.walkers) < deal.chains) {  // the step lies behind the chain's end
      int const seq = deal.sequence(chain);
      int64_t const length = deal.length(chain), skipped = -left / kChunk * kChunk;
      at = {deal.sequences.first_token(seq) + skipped, 0, deal.sequences.batch(seq), deal.head(chain)};
      left = length - skipped;
    }
    at.tokens = static_cast<int>(max(min(left, int64_t(kChunk)), int64_t(0)));
  }
};

// Until the thread's bulk stores, all but the last kLast of them, are written, not only read.
template <int kLast>
__device__ __forceinline__ void wait_stored() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLast) : "memory");
}

// By a group of eight warps, which share the named barriers `barrier`, `barrier` + 2 and `barrier` + 4. smem's barriers
// are ready.
template <Gate kGate, bool kFp32Gate>
__device__ __forceinline__ void produce(ChunkParams const& p, Deal const& deal, Ring const& ring, ProducerSmem& smem,
                                        Share const& share, int barrier, int warp, int lane) {
  FactorPanels const panels = {smem.raw_gate[0], smem.panels[0], smem.panels[2], smem.panels[4]};
  SolvePanels const solved = {smem.solved[0], smem.solved[1]};
  bool const leads = warp == kBlocks + 1 && lane == 0;  // a warp with less to do
  StepPlace next(deal, share);
  auto const find_next = [&](int steps) {
    next.advance(deal, steps);
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
    find_next(0);
    request_gate();
    request_rest();
  }
  int untold = -1;  // the step whose record has left without its walker's knowing
  int taken = 0;    // records that the walker has taken, at least
  auto const tell_made = [&](auto stores_since) {
    if (untold < 0) return;
    wait_stored<decltype(stores_since)::value>();
    ring.tell_made(share.walker, untold);
    untold = -1;
  };
  std::integral_constant<int, 0> constexpr kNone;
  std::integral_constant<int, 1> constexpr kOne;
  RawBeta beta;  // of the next step, of the warps that scale k
  auto const load_beta = [&] {
    if (warp >= kBlocks) {
      beta = {};
      beta.load(p, smem.place, warp % kBlocks, lane);
    }
  };
  TransactionBarrier::wait(&smem.gate_loaded, 0);
  load_beta();
  int phase = 0;
#pragma unroll 1
  for (int step = share.first;; step += share.stride, phase ^= 1) {
    TransactionBarrier::wait(&smem.gate_loaded, phase);
    ChunkPlace const at = smem.place;
    if (at.tokens == 0) break;
    Product q_product, k_product, below[2];
    make_factors<kGate, kFp32Gate, kHalfSteps>(
        q_product, k_product, p, at, panels, smem.factor_scratch, smem.factors, barrier, recomputed(warp),
        recomputed(lane),
        [&] {
          TransactionBarrier::wait(&smem.keys_loaded, phase);
          scale_tokens(smem.factor_scratch, smem.factors, p, at, panels, beta, warp, lane);
        },
        [&] { EmptyBarrier::wait(&smem.stored, phase ^ 1); },
        [&](int token, bool) { return read_scales(smem.factor_scratch, token); });
    cutlass::arch::fence_view_async_shared();
    sync_chunk_warps(barrier);
    Record& record = ring.records[ring.slot(share.walker, step)];
    if (leads) {  // the operands leave at once
      if (!ring.is_free(taken, share.walker, step)) {
        tell_made(kNone);
        while (!ring.is_free(taken, share.walker, step)) __nanosleep(40);
      }
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
        find_next(share.stride);
        if constexpr (!kFp32Gate) {
          request_gate();
          cute::tma_store_wait<0>();  // the operands are read
          request_rest();
        }
        tell_made(kOne);
      }
      __syncwarp();
    });
    load_beta();  // by the warps of Aqk, which have seen the next place
    cutlass::arch::fence_view_async_shared();
    sync_chunk_warps(barrier);
    if (leads) {
      cute::SM90_BULK_COPY_S2G::copy(smem.solved, record.t, 2 * kPanelBytes);
      cute::tma_store_arrive();
      untold = step;
      cute::tma_store_wait<0>();
      EmptyBarrier::arrive(&smem.stored);
      if constexpr (kFp32Gate) {  // whose gate takes the place of more than is free earlier
        request_gate();
        request_rest();
      }
    }
    __syncwarp();
  }
  if (leads) tell_made(kNone);
}

}  // namespace kda
