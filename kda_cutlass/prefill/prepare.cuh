// Prepare: a CTA leaves a chunk's record in memory, for all chunks and heads in parallel.
#pragma once

#include "chunk.cuh"

namespace kda {

struct PrepareParams {
  ChunkParams chunk;
  Slab slab;
  int const* taken;  // not null: whether the fused kernel has done the call
};

struct PrepareSmem {
  alignas(1024) char panels[6][kPanelBytes];  // k_decayed, q_decayed, k_remaining, in the order of Record
  union {
    alignas(1024) FactorScratch factor_scratch;
    struct {                                      // once that is read
      alignas(1024) char solved[2][kPanelBytes];  // T, Aqk
      SolveScratch solve_scratch;
    };
  };
  alignas(16) ChunkFactors factors;
  alignas(8) uint64_t gate_loaded, keys_loaded;
};
static_assert(sizeof(PrepareSmem) <= 113 * 1024, "two CTAs an SM");

// The kernel before this one is the recurrence of the slab before. One CTA makes this kernel's end mean the end of that
// one too, so that the next prepare, which takes its buffer, need only come after the recurrence of this slab.
__device__ __forceinline__ void outlast_previous_kernel() {
  if (blockIdx.x == 0 && blockIdx.y == 0) wait_for_previous_kernel();
}

template <Gate kGate, bool kFp32Gate>
__global__ void __launch_bounds__(kChunkThreads, 2) prepare_kernel(const __grid_constant__ PrepareParams p) {
  extern __shared__ __align__(1024) char smem_bytes[];
  PrepareSmem& smem = *reinterpret_cast<PrepareSmem*>(smem_bytes);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  let_next_kernel_start();  // the recurrence of this slab may take SMs that fall idle; it waits for all CTAs

  if (p.taken != nullptr) {
    if (p.slab.begin == 0) wait_for_previous_kernel();  // which says so
    if (*p.taken) return;
  }

  Sequences const& sequences = p.chunk.sequences;
  FactorPanels const panels = {smem.panels[0], smem.panels[0], smem.panels[2], smem.panels[4]};
  SolvePanels const solved = {smem.solved[0], smem.solved[1]};
  // ---- which chunk, which head
  int const head = blockIdx.x, row = blockIdx.y, slot = p.slab.begin + row;
  int const seq = sequences.owner(slot, lane);
  int64_t const chunk_start = int64_t(slot - sequences.slot_base(seq)) * kChunk;
  int64_t const remaining = sequences.length(seq) - chunk_start;
  if (chunk_start < 0 || remaining <= 0) return outlast_previous_kernel();
  ChunkPlace const at = {sequences.first_token(seq) + chunk_start, static_cast<int>(min(remaining, int64_t(kChunk))),
                         sequences.batch(seq), head};
  Record& record = p.slab.records[int64_t(row) * p.chunk.value_heads + head];

  if (threadIdx.x == 0) {
    TransactionBarrier::init(&smem.gate_loaded, 1);
    TransactionBarrier::init(&smem.keys_loaded, 1);
    cutlass::arch::fence_barrier_init();
    TransactionBarrier::arrive_and_expect_tx(&smem.gate_loaded, kGateBytes<kFp32Gate>);
    request_panels(p.chunk.g_map, &smem.gate_loaded, kFp32Gate ? smem.factor_scratch.fp32_gate[0] : panels.gate, at,
                   at.head);
    TransactionBarrier::arrive_and_expect_tx(&smem.keys_loaded, kKeyBytes);
    request_keys(p.chunk, at, &smem.keys_loaded, panels);
  }
  int const block = warp % kBlocks;
  bool const of_q = warp < kBlocks;
  RawBeta beta;
  if (!of_q) beta.load(p.chunk, at, block, lane);
  GateParameters<kGate> const gate(p.chunk, head, warp, lane);
  __syncthreads();
  TransactionBarrier::wait(&smem.gate_loaded, 0);
  Product q_product, k_product, below[2];
  make_factors<kGate, kFp32Gate>(
      q_product, k_product, p.chunk, at, gate, panels, smem.factor_scratch, smem.factors, 1, warp, lane,
      [&] {
        TransactionBarrier::wait(&smem.keys_loaded, 0);
        scale_tokens(smem.factor_scratch, smem.factors, p.chunk, at, panels, beta, warp, lane);
      },
      [] {}, [&](int token, bool) { return read_scales(smem.factor_scratch, token); });
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {  // the operands leave at once: all CTAs' records at the end would be a queue
    cute::SM90_BULK_COPY_S2G::copy(smem.panels, record.k_decayed, sizeof(smem.panels));
    cute::SM90_BULK_COPY_S2G::copy(&smem.factors, &record.factors, sizeof(ChunkFactors));
    cute::tma_store_arrive();
  }
  __syncwarp();
  SolveRole const role(warp);
  multiply_below(below, role, smem.factor_scratch, lane);
  __syncthreads();
  store_diagonal_parts(smem.solve_scratch, q_product, k_product, warp, lane);
  for (int j = block + 1; j < kBlocks; ++j) store_to_panel(smem.solved[of_q ? 0 : 1], block, j, Product{}, lane);
  __syncthreads();
  solve(solved, smem.solve_scratch, below, role, 1, lane, [] {});
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    static_assert(offsetof(Record, t) == sizeof(PrepareSmem::panels) &&
                  offsetof(Record, a_qk) == offsetof(Record, t) + kPanelBytes);
    cute::SM90_BULK_COPY_S2G::copy(smem.solved, record.t, 2 * kPanelBytes);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
  }
  outlast_previous_kernel();
}

}  // namespace kda
