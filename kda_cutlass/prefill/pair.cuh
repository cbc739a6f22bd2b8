// Pair: the recurrence of few chains, where what takes time is one chunk after another. Two warpgroups carry the state of
// the same 64 value channels, each that of half of the keys, and make W, V' and O of half of the tokens; the operations
// are those of recurrence.cuh, in the same order. What one needs of the other's packed S, W and V' its threads hold just
// where its own need them, so a thread hands over to its like through shared memory.
//
// T and Aqk are lower triangular: the first half of the tokens takes nothing of the second.
#pragma once

#include "recurrence.cuh"

namespace kda {

constexpr int kPairThreads = 256 + 64;  // one warp loads, one writes outputs
constexpr int kPairSlices = kHeadDim / kValueTile;

struct PairSmem {
  static constexpr int kStateStages = 3, kOutputStages = 2;
  static constexpr int kRound = kStateStages * kOutputStages;  // steps, after which the stages are the same again
  struct StateOperands {  // what the way of the state through a chunk takes; the panels of Record, and the values
    char k_decayed[2][64 * kPanelRowBytes];
    char k_remaining[2][64 * kPanelRowBytes];
    char t[64 * kPanelRowBytes];
    char v[64 * kPanelRowBytes];  // [token, value channel]
  };
  struct OutputOperands {
    char q_decayed[2][64 * kPanelRowBytes];
    char a_qk[64 * kPanelRowBytes];
  };
  alignas(1024) StateOperands state[kStateStages];
  alignas(1024) OutputOperands output[kOutputStages];
  alignas(1024) char out[64 * kPanelRowBytes];  // [token, value channel]
  // Handed over, a thread to its like: S; V', the second half of which is W of the first warpgroup before.
  alignas(16) uint4 states[2][4][128];
  alignas(16) uint4 values[2][2][128];
  alignas(16) ChunkFactors factors[kStateStages];
  alignas(16) float no_decay[kHeadDim];  // ones, for after the last chunk
  alignas(8) uint64_t state_full[kStateStages], state_empty[kStateStages];
  alignas(8) uint64_t output_full[kOutputStages], output_empty[kOutputStages];
  alignas(8) uint64_t out_full, out_empty;
};
static_assert(sizeof(PairSmem) <= 227 * 1024);

// A slab's chunks of a chain and slice, as all warps of the CTA see them.
struct PairChain {
  int slice, head, seq, batch;
  int begin, end, steps;  // chunks of the sequence
  int chunks;
  int64_t first_token, length;
};

// One warp.
__device__ __forceinline__ void feed_pair(RecurrenceParams const& p, PairChain const& chain, PairSmem& smem, int lane) {
  Record const* record = p.slab.records +
                         int64_t(p.sequences.slot_base(chain.seq) + chain.begin - p.slab.begin) * p.value_heads +
                         chain.head;
  int64_t const first = chain.first_token + int64_t(chain.begin) * kChunk;
  for (int i = 0; i < chain.steps; ++i, record += p.value_heads) {
    int const stage = i % PairSmem::kStateStages, out_stage = i % PairSmem::kOutputStages;
    int const token = static_cast<int>(first) + i * kChunk;
    int const tokens = static_cast<int>(min(chain.first_token + chain.length - token, int64_t(kChunk)));
    auto& state = smem.state[stage];
    auto& output = smem.output[out_stage];
    uint64_t* const full = &smem.state_full[stage];
    EmptyBarrier::wait(&smem.state_empty[stage], i / PairSmem::kStateStages & 1 ^ 1);
    if (lane == 0) {
      TransactionBarrier::arrive_and_expect_tx(full, sizeof(state) + sizeof(ChunkFactors));
      constexpr int kRest = sizeof(state.k_remaining) + sizeof(state.t);
      static_assert(offsetof(Record, t) == offsetof(Record, k_remaining) + sizeof(state.k_remaining));
      cute::SM90_BULK_COPY_G2S::copy(record->k_decayed, full, state.k_decayed, sizeof(state.k_decayed));
      cute::SM90_BULK_COPY_G2S::copy(record->k_remaining, full, state.k_remaining, kRest);
      cute::SM90_BULK_COPY_G2S::copy(&record->factors, full, &smem.factors[stage], sizeof(ChunkFactors));
    }
    __syncwarp();
    request_values(p.values.map, p.values.token_map, p.values.tensor_tokens, full, state.v, token, tokens, chain.slice,
                   chain.head, chain.batch, lane);
    EmptyBarrier::wait(&smem.output_empty[out_stage], i / PairSmem::kOutputStages & 1 ^ 1);
    if (lane == 0) {
      uint64_t* const output_full = &smem.output_full[out_stage];
      TransactionBarrier::arrive_and_expect_tx(output_full, sizeof(output));
      cute::SM90_BULK_COPY_G2S::copy(record->q_decayed, output_full, output.q_decayed, sizeof(output.q_decayed));
      cute::SM90_BULK_COPY_G2S::copy(record->a_qk, output_full, output.a_qk, sizeof(output.a_qk));
    }
    __syncwarp();
  }
}

// One warp: outputs of a chunk, 128 bytes a token.
__device__ __forceinline__ void write_pair(RecurrenceParams const& p, PairChain const& chain, PairSmem& smem,
                                           int lane) {
  int const unit = lane % 8;
  int64_t const first = chain.first_token + int64_t(chain.begin) * kChunk;
  bf16* out = p.values.out.data + p.values.out.stride_batch * chain.batch +
              p.values.out.stride_token * (first + lane / 8) + p.values.out.stride_head * chain.head +
              kValueTile * chain.slice + 8 * unit;
  int64_t tokens = chain.first_token + chain.length - first;
  for (int i = 0; i < chain.steps; ++i, tokens -= kChunk) {
    EmptyBarrier::wait(&smem.out_full, i & 1);
#pragma unroll 4
    for (int row = lane / 8; row < kChunk; row += 4, out += 4 * p.values.out.stride_token)
      if (row < tokens)
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<uint4 const*>(smem.out + panel_offset(row, unit));
    EmptyBarrier::arrive(&smem.out_empty);
  }
}

// A warpgroup: of the keys and of the tokens the half kHalf.
template <int kHalf>
__device__ __forceinline__ void carry_pair(RecurrenceParams const& p, PairChain const& chain, PairSmem& smem, int warp,
                                           int lane) {
  constexpr int kOther = 1 - kHalf, kFirst = 2 * kHalf;    // 16 tokens
  constexpr int kInner = kHalf == 0 ? 2 : 4;               // 16 tokens that T and Aqk take
  constexpr uint32_t kRows = 32 * kHalf * kPanelRowBytes;  // bytes to the own tokens' rows of a panel
  int const thread = 32 * warp + lane, steps = chain.steps;
  StateLanes const lanes(kValueTile * chain.slice, warp, lane, 64 * kHalf);
  auto const sync = [&] { asm volatile("bar.sync %0, 64;" : : "r"(1 + warp) : "memory"); };  // with its like
  // Stores kCount registers where its like finds them, and gives what that has stored.
  auto const exchange = [&](auto& own, auto& other, auto& from, auto& to) {
    constexpr int kUnits = sizeof(own) / sizeof(uint4);
#pragma unroll
    for (int j = 0; j < kUnits; ++j)
      to[j][thread] = make_uint4(own[4 * j], own[4 * j + 1], own[4 * j + 2], own[4 * j + 3]);
    sync();
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      uint4 const x = from[j][thread];
      other[4 * j] = x.x, other[4 * j + 1] = x.y, other[4 * j + 2] = x.z, other[4 * j + 3] = x.w;
    }
  };
  float s[32], w[16], o[16], v_new[16];
  uint32_t s_operand[32], w_operand[16], v_operand[16], o_packed[8];
  auto const share_state = [&] {
    uint32_t own[16], other[16];
    pack_operand(own, s);
    exchange(own, other, smem.states[kOther], smem.states[kHalf]);
#pragma unroll
    for (int i = 0; i < 16; ++i) s_operand[16 * kHalf + i] = own[i], s_operand[16 * kOther + i] = other[i];
  };
  auto const hand_out = [&](int before) {  // to the writer; the panel is free once the chunk before has left it
    EmptyBarrier::wait(&smem.out_empty, before & 1 ^ 1);
    lanes.template store_output<kFirst>(smem.out, o_packed);
    EmptyBarrier::arrive(&smem.out_full);
  };

  int64_t const carry = int64_t(chain.head) * kHeadDim * kHeadDim;
  if (chain.begin > 0)
    load_state(s, p.slab.carry_in + carry, true, lanes.value, lane, lanes.first_key);
  else
    lanes.load_initial(s, p.values.state, initial_offset(p.values.state, chain.seq, chain.head));
  if (steps > 0) {
    share_state();
    TransactionBarrier::wait(&smem.state_full[0], 0);
    lanes.template seed_with_values<kFirst>(w, smem.state[0].v, smem.factors[0]);
    lanes.decay(s, smem.factors[0].decay);
  }
  auto const step = [&](auto index, int i) {
    constexpr int stage = index % PairSmem::kStateStages, out_stage = index % PairSmem::kOutputStages,
                  next_stage = (index + 1) % PairSmem::kStateStages,
                  next_phase = (index + 1) / PairSmem::kStateStages & 1;
    auto& state = smem.state[stage];
    auto& output = smem.output[out_stage];
    // W^T = beta V^T - S^T (beta K e^G)^T, the values being the accumulator's seed
    fence_registers(w);
    cute::warpgroup_arrive();
    wgmma_k_major<2>(w, s_operand, Place(state.k_decayed[0]) + kRows, true);
    cute::warpgroup_commit_batch();

    TransactionBarrier::wait(&smem.output_full[out_stage], i / PairSmem::kOutputStages & 1);
    fence_registers(o);
    cute::warpgroup_arrive();
    wgmma_k_major<2>(o, s_operand, Place(output.q_decayed[0]) + kRows, false);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    fence_registers(w);
    uint32_t own[8], other[8];
    pack_operand(own, w);
    if constexpr (kHalf == 0) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        smem.values[1][j][thread] = make_uint4(own[4 * j], own[4 * j + 1], own[4 * j + 2], own[4 * j + 3]);
      sync();
#pragma unroll
      for (int j = 0; j < 8; ++j) w_operand[j] = own[j];
    } else {
      sync();
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint4 const x = smem.values[1][j][thread];
        w_operand[4 * j] = x.x, w_operand[4 * j + 1] = x.y, w_operand[4 * j + 2] = x.z, w_operand[4 * j + 3] = x.w;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) w_operand[8 + j] = own[j];
    }

    // V'^T = W^T T^T
    fence_registers(v_new);
    cute::warpgroup_arrive();
    wgmma_k_major<1, kInner>(v_new, w_operand, Place(state.t) + kRows, false);
    cute::warpgroup_commit_batch();
    if (i > 0) hand_out(i - 1);
    cute::warpgroup_wait<0>();
    fence_registers(v_new);
    fence_registers(o);
    pack_operand(own, v_new);
    exchange(own, other, smem.values[kOther], smem.values[kHalf]);
#pragma unroll
    for (int j = 0; j < 8; ++j) v_operand[8 * kHalf + j] = own[j], v_operand[8 * kOther + j] = other[j];

    // S^T += V'^T (K e^{G_end - G}),  O^T += V'^T Aqk^T
    fence_registers(s);
    cute::warpgroup_arrive();
    wgmma_mn_major(s, v_operand, Place(state.k_remaining[kHalf]));
    cute::warpgroup_commit_batch();
    fence_registers(o);
    cute::warpgroup_arrive();
    wgmma_k_major<1, kInner>(o, v_operand, Place(output.a_qk) + kRows, true);
    cute::warpgroup_commit_batch();

    bool const last = i + 1 == steps;
    if (!last) TransactionBarrier::wait(&smem.state_full[next_stage], next_phase);
    // After the last chunk with anything: nobody uses it.
    lanes.template seed_with_values<kFirst>(w, smem.state[next_stage].v, smem.factors[next_stage]);
    cute::warpgroup_wait<1>();
    fence_registers(s);
    EmptyBarrier::arrive(&smem.state_empty[stage]);
    share_state();
    lanes.decay(s, last ? smem.no_decay : smem.factors[next_stage].decay);

    cute::warpgroup_wait<0>();
    fence_registers(o);
    pack_operand(o_packed, o);
    EmptyBarrier::arrive(&smem.output_empty[out_stage]);
  };
  // Whole rounds of the stages, so that every address and descriptor is a constant.
#pragma unroll 1
  for (int first = 0; first < steps; first += PairSmem::kRound)
    static_for<PairSmem::kRound>([&](auto index) {
      if (first + index < steps) step(index, first + index);
    });
  if (steps > 0) hand_out(steps - 1);

  if (chain.end < chain.chunks)
    store_state(s, p.slab.carry_out + carry, true, lanes.value, lane, lanes.first_key);
  else
    lanes.store_final(s, p.values.state, final_offset(p.values.state, chain.seq, chain.head));
}

__global__ void __launch_bounds__(kPairThreads, 1) pair_kernel(const __grid_constant__ RecurrenceParams p) {
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<PairSmem*>(smem_bytes);
  int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  // The records and carried states are there, and the recurrence of the slab before has ended: the next prepare, which
  // takes its buffer, may start.
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (p.taken != nullptr && *p.taken) return;

  PairChain chain;
  chain.slice = blockIdx.x % kPairSlices;
  chain.head = blockIdx.x / kPairSlices % p.value_heads;
  chain.seq = blockIdx.x / (kPairSlices * p.value_heads);
  chain.batch = p.sequences.batch(chain.seq);
  chain.first_token = p.sequences.first_token(chain.seq);
  chain.length = live_length(p.sequences, p.values.state, chain.seq);
  int const slot_base = p.sequences.slot_base(chain.seq);
  chain.chunks = static_cast<int>((chain.length + kChunk - 1) / kChunk);
  chain.begin = max(p.slab.begin - slot_base, 0);
  chain.end = max(min(p.slab.end - slot_base, chain.chunks), chain.begin);
  chain.steps = __shfl_sync(0xffffffffu, chain.end - chain.begin, 0);  // uniform for the compiler's sake
  bool const only_state = chain.chunks == 0 && p.slab.begin == 0;
  if (chain.begin == chain.end && !only_state) return;
  if (only_state && chain.slice == 0)
    p.values.out.store_zeros(p.sequences, chain.seq, chain.head, threadIdx.x, kPairThreads);

  if (threadIdx.x == 0) {
    for (int s = 0; s < PairSmem::kStateStages; ++s) {
      TransactionBarrier::init(&smem.state_full[s], 1);
      EmptyBarrier::init(&smem.state_empty[s], 256);  // threads, not warps: racecheck follows no warp barrier
    }
    for (int s = 0; s < PairSmem::kOutputStages; ++s) {
      TransactionBarrier::init(&smem.output_full[s], 1);
      EmptyBarrier::init(&smem.output_empty[s], 256);
    }
    EmptyBarrier::init(&smem.out_full, 256);
    EmptyBarrier::init(&smem.out_empty, 32);
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < kHeadDim) smem.no_decay[threadIdx.x] = 1.f;
  __syncthreads();

  if (warp == 8) return feed_pair(p, chain, smem, lane);
  if (warp == 9) return write_pair(p, chain, smem, lane);
  if (warp < 4)
    carry_pair<0>(p, chain, smem, warp, lane);
  else
    carry_pair<1>(p, chain, smem, warp - 4, lane);
}

}  // namespace kda
