// Join: one chain of its segments. Where a segment that started from zero ends in B and has the outputs O, and its map M
// takes the state before it to M S and that state's part of the outputs is Q S,
//   S_n = B_n + M_n S_{n-1},   O_n += Q_n S_{n-1}
// When all walkers are done, they find the states, and the CTAs that made records the outputs.
#pragma once

#include "walk.cuh"

namespace kda {

constexpr int kJoinRows = 16;                         // value channels that are joined at a time
constexpr int kMostJoinRows = 32;                     // of a CTA
constexpr int kJoinPitch = kMostJoinRows + 4;         // floats: columns fall into different banks
constexpr int kJoinSums = kStreamThreads / kHeadDim;  // threads of a key channel, with a share of the sum each
constexpr int kJoinAhead = 2;                         // maps that are on their way
constexpr int kJoinTeams = 2;                         // of two warpgroups, which have a chunk each
constexpr int kJoinStages = 3;

union JoinSmem {
  struct {
    alignas(128) float maps[kJoinAhead][kHeadDim][kHeadDim];  // columns first
    alignas(16) float state[kHeadDim][kJoinPitch];            // transposed
    alignas(16) float sums[kJoinSums][kJoinRows][kHeadDim];   // parts of M S
    alignas(8) uint64_t map_full[kJoinAhead];
  } states;
  struct {
    struct {
      alignas(1024) char map[2][64 * kPanelRowBytes];  // [token, key channel]: Q
      alignas(1024) char out[2][64 * kPanelRowBytes];  // [token, value channel]
    } stages[kJoinTeams][kJoinStages];
    alignas(16) float ones[kChunk];
    alignas(8) uint64_t full[kJoinTeams][kJoinStages];
  } outputs;
};
static_assert(sizeof(JoinSmem) <= 227 * 1024);

__device__ __forceinline__ void wait_for_walkers(RingFlags& flags, int walking) {  // by a CTA
  if (threadIdx.x == 0)
    while (load_acquire(&flags.ended) < walking) __nanosleep(100);
  __syncthreads();
  fence_bulk_copies();
}

// Value channels of a CTA's part of a state, so that there are no more parts than CTAs that have walked the chain.
__device__ __forceinline__ int join_rows(Deal<true> const& deal) {
  return deal.segments.count > 2 ? kJoinRows : kMostJoinRows;
}

// By a CTA that has walked, of `walking`: a part of the states of a chain, from segment to segment. That of the last
// segment goes where the chain's final state is wanted, the others to where B was.
__device__ __forceinline__ void join_states(ValueParams const& p, Deal<true> const& deal, SegmentParams const& left,
                                            RingFlags& flags, JoinSmem& all, int walker, int walking) {
  auto& smem = all.states;
  static_assert(kHeadDim / kMostJoinRows <= kMostSlices + kMostReaders &&
                kHeadDim / kJoinRows <= kMostSlices + 2 * kMostReaders);
  static_assert(kJoinRows == 4 * kJoinSums);
  constexpr int kShare = kHeadDim / kJoinSums;
  int const rows = join_rows(deal), parts = kHeadDim / rows;
  int const key = threadIdx.x % kHeadDim, sum = threadIdx.x / kHeadDim;
  int const chain = walker / parts, first_row = walker % parts * rows;
  if (chain >= deal.whole) return;
  auto const request = [&](int segment) {  // by one thread
    if (segment >= deal.segments.count) return;
    int const slot = segment % kJoinAhead;
    TransactionBarrier::arrive_and_expect_tx(&smem.map_full[slot], sizeof(smem.maps[slot]));
    cute::SM90_BULK_COPY_G2S::copy(left.maps + ((segment - 1) * deal.whole + chain) * kStateElements,
                                   &smem.map_full[slot], smem.maps[slot], sizeof(smem.maps[slot]));
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kJoinAhead; ++i) TransactionBarrier::init(&smem.map_full[i], 1);
    cutlass::arch::fence_barrier_init();
  }
  wait_for_walkers(flags, walking);
  // A thread has four rows of a key channel at a time.
  auto const own = [&](int row) -> float4& { return *reinterpret_cast<float4*>(&smem.state[key][row + 4 * sum]); };
  auto const end = [&](int segment, int row) {
    return left.states + (segment * deal.whole + chain) * kStateElements + (first_row + row + 4 * sum) * kHeadDim + key;
  };
  auto const load = [&](float const* from) {
    return make_float4(from[0], from[kHeadDim], from[2 * kHeadDim], from[3 * kHeadDim]);
  };
  for (int row = 0; row < rows; row += kJoinRows) own(row) = load(end(0, row));
  __syncthreads();
#pragma unroll 1
  for (int segment = 1 - kJoinAhead; segment < deal.segments.count; ++segment) {
    bool const last = segment + 1 == deal.segments.count;
    if (segment > 0) TransactionBarrier::wait(&smem.map_full[segment % kJoinAhead], (segment - 1) / kJoinAhead & 1);
#pragma unroll 1
    for (int row = segment > 0 ? 0 : rows; row < rows; row += kJoinRows) {
      float4 const b = load(end(segment, row));
      float product[kJoinRows] = {};
#pragma unroll 4
      for (int i = kShare * sum; i < kShare * (sum + 1); ++i) {
        float const m = smem.maps[segment % kJoinAhead][i][key];
#pragma unroll
        for (int j = 0; j < kJoinRows; j += 4) {
          float4 const s = *reinterpret_cast<float4 const*>(&smem.state[i][row + j]);
          product[j] += m * s.x, product[j + 1] += m * s.y, product[j + 2] += m * s.z, product[j + 3] += m * s.w;
        }
      }
#pragma unroll
      for (int j = 0; j < kJoinRows; ++j) smem.sums[sum][j][key] = product[j];
      __syncthreads();
      float joined[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kJoinSums; ++j) joined[i] += smem.sums[j][4 * sum + i][key];
      own(row) = make_float4(joined[0], joined[1], joined[2], joined[3]);
      StateParams const& state = p.state;
      int64_t const to = last ? final_offset(state, deal.sequence(chain), deal.head(chain)) : 0;
      bool const wanted = state.final.data != nullptr && to >= 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const value = first_row + row + 4 * sum + i;
        int64_t const offset = to + (state.v_first ? value * kHeadDim + key : key * kHeadDim + value);
        if (!last)
          end(segment, row)[i * kHeadDim] = joined[i];
        else if (wanted && state.final.dtype == Dtype::kFp32)
          static_cast<float*>(state.final.data)[offset] = joined[i];
        else if (wanted)
          static_cast<bf16*>(state.final.data)[offset] = static_cast<bf16>(joined[i]);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      if (segment > 0) add_release(&flags.joined[segment * deal.whole + chain], 1);
      request(segment + kJoinAhead);
    }
  }
}

// By a CTA that has made records, of `makers`: the outputs of its share of the chunks of later segments, transposed:
// O^T += S^T Q^T, as walk.cuh has it. A warpgroup of a team has 64 value channels.
__device__ __forceinline__ void join_outputs(ValueParams const& p, Deal<true> const& deal, SegmentParams const& left,
                                             RingFlags& flags, JoinSmem& all, int maker, int makers, int walking,
                                             int warp, int lane) {
  auto& smem = all.outputs;
  int const team = warp / 8, half = warp / 4 % 2;
  bool const leads = threadIdx.x % kChunkThreads == 0;
  if (leads) {
    for (int s = 0; s < kJoinStages; ++s) TransactionBarrier::init(&smem.full[team][s], 1);
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < kChunk) smem.ones[threadIdx.x] = 1.f;
  wait_for_walkers(flags, walking);

  StateLanes const lanes(kValueTile * half, warp % 4, lane);
  float o[32];
  uint32_t state[32], o_packed[16];
  int stage = 0, phases = 0;
  // A CTA has one segment, or more where there are more of them than CTAs, and every so many of its chunks: so all are at
  // about the same tokens, for DRAM's sake.
  int const segments = deal.chains() - deal.whole, shares = max(makers / segments, 1);
#pragma unroll 1
  for (int item = maker; item < segments * shares; item += makers) {
    int const later = item % segments, stride = kJoinTeams * shares, first = item / segments + team * shares;
    Chain const chain(deal, deal.whole + later);
    bf16* const outs = p.out.data + p.out.stride_batch * chain.batch + p.out.stride_head * chain.head +
                       p.out.stride_token * chain.first_token;
    bf16 const* const maps = left.map_outputs + later * deal.segments.tokens() * kHeadDim;
    // Before each turn it asks for what comes kJoinStages turns later, where the turn before was.
#pragma unroll 1
    for (int i = first - kJoinStages * stride; i < chain.steps; i += stride) {
      if (i >= first) {
        if (i == first) {
          if (later >= deal.whole) {  // the segment before has not started from the chain's state
            while (load_acquire(&flags.joined[later]) < kHeadDim / join_rows(deal)) __nanosleep(40);
            __syncwarp();
          }
          float s[64];
          load_state_by_offsets(s, left.states + later * kStateElements, true, lanes.value, lane);
          pack_operand(state, s);
        }
        auto& here = smem.stages[team][stage];
        TransactionBarrier::wait(&smem.full[team][stage], phases >> stage & 1);
        phases ^= 1 << stage;
        lanes.seed_with_values(o, here.out[half], smem.ones);
        fence_registers(o);
        cute::warpgroup_arrive();
        wgmma_k_major<2>(o, state, Place(here.map[0]), true);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_registers(o);
        pack_operand(o_packed, o);
        lanes.store_output(here.out[half], o_packed);
        cutlass::arch::NamedBarrier::sync(128, 3 + 2 * team + half);
        int const unit = lane % 8, first_row = 4 * (warp % 4) + lane / 8;
        int64_t const token = int64_t(i) * kChunk + first_row;
        bf16* const out = outs + p.out.stride_token * token + kValueTile * half + 8 * unit;
#pragma unroll
        for (int row = 0; row < kChunk; row += 16)
          if (token + row < chain.length)
            __stcs(reinterpret_cast<uint4*>(out + p.out.stride_token * row),
                   *reinterpret_cast<uint4 const*>(here.out[half] + panel_offset(row + first_row, unit)));
        cutlass::arch::fence_view_async_shared();
      }
      cutlass::arch::NamedBarrier::sync(kChunkThreads, 1 + team);
      if (int const next = i + kJoinStages * stride; leads && next < chain.steps) {
        auto& to = smem.stages[team][stage];
        uint64_t* const full = &smem.full[team][stage];
        TransactionBarrier::arrive_and_expect_tx(full, sizeof(to));
        cute::SM90_BULK_COPY_G2S::copy(maps + int64_t(next) * kChunk * kHeadDim, full, to.map, sizeof(to.map));
        for (int w = 0; w < 2; ++w)
          cute::SM90_TMA_LOAD_5D::copy(&left.out_map, full, kStreamed, to.out[w], 0,
                                       static_cast<int>(chain.first_token) + next * kChunk, w, chain.head, chain.batch);
      }
      if (++stage == kJoinStages) stage = 0;
    }
  }
}

}  // namespace kda
