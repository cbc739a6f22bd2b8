// Recurrence: walks the chunks of one sequence and head, carrying the state.
//
// With the record's operands (signs and scales folded in), S the state before the chunk and everything transposed so
// that the value channels are the rows of every accumulator:
//   W^T  = beta V^T - S^T (beta K e^G)^T   64 x 64 x 128
//   V'^T = W^T T^T                    64 x 64 x 64
//   O^T  = S^T (Q e^G)^T + V'^T Aqk^T 64 x 64 x 128 and 64 x 64 x 64
//   S^T  = S^T e^{G_end} + V'^T (K e^{G_end - G})
// A warpgroup owns 64 value channels: its state stays in registers in fp32 for the whole sequence, and every left
// operand (S, W, V') is made from accumulators in registers, without a trip through shared memory. The last warp
// feeds the shared-memory ring.
#pragma once

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>

#include "checkpoints.cuh"

namespace kda {

template <int kWarpgroups>
struct RecurrenceShape {
  // Behind the consumers: one warp feeds the ring, one a warpgroup writes outputs. Beside two consumer warpgroups they
  // come as a warpgroup, so that setmaxnreg can move the registers to where the state is.
  static constexpr int kThreads = 128 * kWarpgroups + (kWarpgroups == 1 ? 64 : 128);
  static constexpr int kStages = kWarpgroups == 1 ? 3 : 2;               // what 227 KB hold
  static constexpr int kSlices = kHeadDim / (kValueTile * kWarpgroups);  // CTAs a head
};

template <int kWarpgroups>
struct RecurrenceSmem {
  using Shape = RecurrenceShape<kWarpgroups>;
  struct Operands {  // the panels of Record, in its order
    char k_decayed[2][64 * kPanelRowBytes];
    char q_decayed[2][64 * kPanelRowBytes];
    char k_remaining[2][64 * kPanelRowBytes];
    char t[64 * kPanelRowBytes];
    char a_qk[64 * kPanelRowBytes];
  };
  static_assert(sizeof(Operands) == kRecordPanelBytes);
  alignas(1024) Operands operands[Shape::kStages];
  alignas(1024) char v[Shape::kStages][kWarpgroups][64 * kPanelRowBytes];  // [token, value channel]
  alignas(1024) char out[kWarpgroups][64 * kPanelRowBytes];                // [token, value channel]
  alignas(16) ChunkFactors factors[Shape::kStages];
  alignas(16) float no_decay[kHeadDim];           // ones, for after the last chunk
  alignas(8) uint64_t full[Shape::kStages];       // k_decayed, factors and values, which are read first
  alignas(8) uint64_t late_full[Shape::kStages];  // the rest
  alignas(8) uint64_t empty[Shape::kStages];
  alignas(8) uint64_t out_full[kWarpgroups];
  alignas(8) uint64_t out_empty[kWarpgroups];
};

struct RecurrenceParams {
  ValueParams values;
  Sequences sequences;
  Slab slab;
  int const* taken;  // not null: whether the fused kernel has done the call
  int value_heads;
  CheckpointParams checkpoints;
};

template <int kWarpgroups, bool kCheckpoints>
__global__ void __launch_bounds__(RecurrenceShape<kWarpgroups>::kThreads, 1)
    recurrence_kernel(const __grid_constant__ RecurrenceParams p) {
  using Shape = RecurrenceShape<kWarpgroups>;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<RecurrenceSmem<kWarpgroups>*>(smem_bytes);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // ---- which sequence, head and slice of value channels; which of its chunks lie in this slab
  int const slice = blockIdx.x % Shape::kSlices;
  int const head = blockIdx.x / Shape::kSlices % p.value_heads;
  int const seq = blockIdx.x / (Shape::kSlices * p.value_heads);
  int64_t const first_token = p.sequences.first_token(seq), length = live_length(p.sequences, p.values.state, seq);
  int const slot_base = p.sequences.slot_base(seq), chunks = static_cast<int>((length + kChunk - 1) / kChunk);
  int const begin = max(p.slab.begin - slot_base, 0);
  int const end = max(min(p.slab.end - slot_base, chunks), begin);
  // Pieces that lead to checkpoints have no outputs, and nothing to do without tokens.
  bool const only_state = chunks == 0 && p.slab.begin == 0 && p.sequences.pieces == nullptr;
  // The kernel before makes records. Where a sequence begins, nothing else that it writes is read here, so only who asks
  // for records waits until it has ended, and does what it can before.
  bool const begins = begin == 0 && end > 0 && p.taken == nullptr;
  if (!begins) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (p.taken != nullptr && *p.taken) return;
    if (begin == end && !only_state) return;
  }
  if (only_state && slice == 0) p.values.out.store_zeros(p.sequences, seq, head, threadIdx.x, Shape::kThreads);

  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      TransactionBarrier::init(&smem.full[s], 1);
      TransactionBarrier::init(&smem.late_full[s], 1);
      EmptyBarrier::init(&smem.empty[s], 128 * kWarpgroups);  // threads, not warps: racecheck follows no warp barrier
    }
    for (int w = 0; w < kWarpgroups; ++w) {
      EmptyBarrier::init(&smem.out_full[w], 128);
      EmptyBarrier::init(&smem.out_empty[w], 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < kHeadDim) smem.no_decay[threadIdx.x] = 1.f;
  __syncthreads();

  // The first chunk's slot in this slab and how many there are, uniform over the warp for the compiler's sake.
  int const steps = __shfl_sync(0xffffffffu, end - begin, 0);
  int const batch = p.sequences.batch(seq);
  int64_t const first_chunk_token = first_token + int64_t(begin) * kChunk;

  if (warp >= 4 * kWarpgroups) {
    if constexpr (kWarpgroups > 1) cutlass::arch::warpgroup_reg_dealloc<40>();
    if (warp == 4 * kWarpgroups) {
      // ---- producer: one record and its values a stage
      Record const* record = p.slab.records + int64_t(slot_base + begin - p.slab.begin) * p.value_heads + head;
      int stage = 0, phase = 1;  // the first pass over the ring finds it empty
      constexpr int kEarly = sizeof(smem.operands[0].k_decayed), kLate = kRecordPanelBytes - kEarly;
      auto const request_values_of = [&](int i, int stage, auto tokens) {
        if (lane == 0)
          TransactionBarrier::arrive_and_expect_tx(&smem.full[stage],
                                                   kEarly + sizeof(ChunkFactors) + sizeof(smem.v[0]));
        __syncwarp();
#pragma unroll
        for (int w = 0; w < kWarpgroups; ++w)
          request_values(p.values.map, p.values.token_map, p.values.tensor_tokens, &smem.full[stage], smem.v[stage][w],
                         static_cast<int>(first_chunk_token) + i * kChunk, tokens, slice * kWarpgroups + w, head, batch,
                         lane);
      };
      int early = 0;  // chunks whose values are asked for before there are records: whole ones
      if (begins) {
        early = static_cast<int>(min(length / kChunk, int64_t(min(steps, Shape::kStages))));
        for (int i = 0; i < early; ++i) request_values_of(i, i, std::integral_constant<int, kChunk>{});
        wait_for_previous_kernel();
        let_next_kernel_start();
      }
      for (int i = 0; i < steps; ++i, record += p.value_heads) {
        int const token = static_cast<int>(first_chunk_token) + i * kChunk;
        int const tokens = static_cast<int>(min(first_token + length - token, int64_t(kChunk)));
        uint64_t* const full = &smem.full[stage];
        EmptyBarrier::wait(&smem.empty[stage], phase);
        if (i >= early) request_values_of(i, stage, tokens);
        if (lane == 0) {
          cute::SM90_BULK_COPY_G2S::copy(record->k_decayed, full, smem.operands[stage].k_decayed, kEarly);
          cute::SM90_BULK_COPY_G2S::copy(&record->factors, full, &smem.factors[stage], sizeof(ChunkFactors));
          TransactionBarrier::arrive_and_expect_tx(&smem.late_full[stage], kLate);
          cute::SM90_BULK_COPY_G2S::copy(record->q_decayed, &smem.late_full[stage], smem.operands[stage].q_decayed,
                                         kLate);
        }
        __syncwarp();
        if (++stage == Shape::kStages) stage = 0, phase ^= 1;
      }
    } else if (warp <= 4 * kWarpgroups + kWarpgroups) {
      // ---- writers: a warpgroup's outputs of a chunk, 128 bytes a token
      int const w = warp - 4 * kWarpgroups - 1, unit = lane % 8;
      bf16* out = p.values.out.data + p.values.out.stride_batch * batch +
                  p.values.out.stride_token * (first_chunk_token + lane / 8) + p.values.out.stride_head * head +
                  kValueTile * (slice * kWarpgroups + w) + 8 * unit;
      int64_t tokens = p.sequences.pieces == nullptr ? first_token + length - first_chunk_token : 0;
      for (int i = 0; i < steps; ++i, tokens -= kChunk) {
        EmptyBarrier::wait(&smem.out_full[w], i & 1);
#pragma unroll 4
        for (int row = lane / 8; row < kChunk; row += 4, out += 4 * p.values.out.stride_token)
          if (row < tokens)
            __stcs(reinterpret_cast<uint4*>(out),
                   *reinterpret_cast<uint4 const*>(smem.out[w] + panel_offset(row, unit)));
        EmptyBarrier::arrive(&smem.out_empty[w]);
      }
    }
    return;
  }

  // ---- consumers
  if constexpr (kWarpgroups > 1) cutlass::arch::warpgroup_reg_alloc<232>();
  int const warpgroup = warp / 4;
  int const first_value = kValueTile * (slice * kWarpgroups + warpgroup);
  StateLanes const lanes(first_value, warp % 4, lane);
  float s[64];
  if (begin > 0)
    load_state_by_offsets(s, p.slab.carry_in + int64_t(head) * kHeadDim * kHeadDim, true, lanes.value, lane);
  else
    lanes.load_initial<true>(s, p.values.state, initial_offset(p.values.state, seq, head));
  float w[32], o[32], v_new[32];
  uint32_t s_operand[32], w_operand[16], v_operand[16], o_packed[16];
  auto hand_out = [&](int chunks_before) {  // to the writer; the panel is free once the chunk before has left it
    EmptyBarrier::wait(&smem.out_empty[warpgroup], chunks_before & 1 ^ 1);
    lanes.store_output(smem.out[warpgroup], o_packed);
    EmptyBarrier::arrive(&smem.out_full[warpgroup]);
  };

  [[maybe_unused]] int checkpoint = 0;  // whole chunks before the next one
  if constexpr (kCheckpoints) {
    CheckpointList const list(p.checkpoints, p.sequences, p.values.state, seq, lane);
    if (begin == 0) list.store(s, lanes, p.values.state.v_first, head, 0);
    checkpoint = list.next(begin);
  }
  pack_operand(s_operand, s);
  if (steps > 0) {
    TransactionBarrier::wait(&smem.full[0], 0);
    lanes.seed_with_values(w, smem.v[0][warpgroup], smem.factors[0].beta);
    lanes.decay(s, smem.factors[0].decay);
  }
  auto step = [&](auto stage_constant, int i, int phase) {
    constexpr int stage = decltype(stage_constant)::value;
    auto& operands = smem.operands[stage];
    // W^T = beta V^T - S^T (beta K e^G)^T, the values being the accumulator's seed
    fence_registers(w);
    cute::warpgroup_arrive();
    wgmma_k_major<2>(w, s_operand, Place(operands.k_decayed[0]), true);
    cute::warpgroup_commit_batch();

    if (i > 0) hand_out(i - 1);
    TransactionBarrier::wait(&smem.late_full[stage], phase);

    fence_registers(o);
    cute::warpgroup_arrive();
    wgmma_k_major<1>(o, reinterpret_cast<uint32_t const(&)[16]>(s_operand[0]), Place(operands.q_decayed[0]), false);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    fence_registers(w);
    pack_operand(w_operand, w);

    // V'^T = W^T T^T; the other half of S^T (Q e^G)^T fills the tensor cores while V' becomes an operand
    fence_registers(v_new);
    cute::warpgroup_arrive();
    wgmma_k_major<1>(v_new, w_operand, Place(operands.t), false);
    cute::warpgroup_commit_batch();
    wgmma_k_major<1>(o, reinterpret_cast<uint32_t const(&)[16]>(s_operand[16]), Place(operands.q_decayed[1]), true);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    fence_registers(v_new);
    pack_operand(v_operand, v_new);

    // S^T += V'^T (K e^{G_end - G}),  O^T += V'^T Aqk^T
    fence_registers(s);
    cute::warpgroup_arrive();
    wgmma_mn_major(s, v_operand, Place(operands.k_remaining));
    cute::warpgroup_commit_batch();
    wgmma_k_major<1>(o, v_operand, Place(operands.a_qk), true);
    cute::warpgroup_commit_batch();

    constexpr int next_stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
    bool const last = i + 1 == steps;
    if (!last) TransactionBarrier::wait(&smem.full[next_stage], phase ^ (next_stage == 0));
    lanes.seed_with_values(w, smem.v[next_stage][warpgroup],
                           smem.factors[next_stage].beta);  // after the last chunk with anything: nobody uses it
    cute::warpgroup_wait<1>();
    fence_registers(s);
    pack_operand(s_operand, s);
    if constexpr (kCheckpoints) {
      if (int const done = begin + i + 1; done == checkpoint) {
        int const here = recomputed(lane);  // nothing of this is worth a register in the loop
        CheckpointList const list(p.checkpoints, p.sequences, p.values.state, recomputed(seq), here);
        list.store(s, StateLanes(first_value, warp % 4, here), p.values.state.v_first, recomputed(head), done);
        checkpoint = list.next(done);
      }
    }
    // Not behind the next product: ptxas would wait for that one first.
    lanes.decay(s, last ? smem.no_decay : smem.factors[next_stage].decay);

    cute::warpgroup_wait<0>();
    fence_registers(o);
    pack_operand(o_packed, o);
    EmptyBarrier::arrive(&smem.empty[stage]);
  };
  // Whole rounds of the ring, so that every address and descriptor is a constant.
#pragma unroll 1
  for (int first = 0, phase = 0; first < steps; first += Shape::kStages, phase ^= 1)
    static_for<Shape::kStages>([&](auto stage) {
      if (first + stage < steps) step(stage, first + stage, phase);
    });

  if (steps > 0) hand_out(steps - 1);

  if (end < chunks)
    store_state(s, p.slab.carry_out + int64_t(head) * kHeadDim * kHeadDim, true, lanes.value, lane);
  else
    lanes.store_final(s, p.values.state, final_offset(p.values.state, seq, head));
}

}  // namespace kda
