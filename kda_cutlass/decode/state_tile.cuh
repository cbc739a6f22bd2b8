// The piece of a state that a CTA holds in registers while tokens pass: all 128 key channels of kSlice value channels.
// Two layouts of the state in memory, two ways to lie in registers; both move 16 bytes a thread and whole 128-byte
// lines.
#pragma once

#include "../sm90.cuh"
#include "params.h"

namespace kda {

constexpr int kSlice = 32;  // value channels: 16 KB of fp32 state
constexpr int kSlices = kHeadDim / kSlice;
constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kHeld = kSlice * kHeadDim / kDecodeThreads;  // elements of the state that a thread holds

// One token of one head, as every thread of the CTA wants it.
struct Token {
  float decay[kHeadDim];  // exp(g)
  float k[kHeadDim];      // neither q nor k is normalised: their factors go to the sums over channels
  float q[kHeadDim];
  float v[kHeadDim];
  float k_factor;  // 1 / |k|, or 1
  float step;      // beta k_factor
  float q_factor;  // scale / |q|, or scale
  float qk;        // sum of q k, neither normalised
};

// The step of one value channel, from the sums of k and q with the decayed state: what k is multiplied by when it is
// added to the state, and the output. o = q (S + k u) = q S + (q k) u spares a second sum over the new state.
struct ChannelStep {
  float update, out;
  __device__ __forceinline__ ChannelStep(float4 factors, float v, float k_state, float q_state) {
    update = factors.y * (v - factors.x * k_state);
    out = factors.z * (q_state + factors.w * update);
  }
  static __device__ __forceinline__ float4 factors(Token const& token) {
    return *reinterpret_cast<float4 const*>(&token.k_factor);
  }
};

// 16 bytes of the state: elements that lie side by side in memory.
template <class State>
constexpr int kWideOf = 16 / sizeof(State);

template <class State>
__device__ __forceinline__ void unpack(uint4 words, float (&values)[kWideOf<State>]) {
  uint32_t const w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<State, float>) {
      values[i] = __uint_as_float(w[i]);
    } else {
      values[2 * i] = unpack_lo(w[i]), values[2 * i + 1] = unpack_hi(w[i]);
    }
  }
}

// Streaming stores ask the L2 to give these lines up first.
template <bool kStreaming, class Words>
__device__ __forceinline__ void store_words(void* target, Words words) {
  if constexpr (kStreaming) {
    __stcs(static_cast<Words*>(target), words);
  } else {
    *static_cast<Words*>(target) = words;
  }
}
template <bool kStreaming, int kCount>
__device__ __forceinline__ void store_elements(float* target, float const (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    store_words<kStreaming>(target + i, make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
  }
}
template <bool kStreaming, int kCount>
__device__ __forceinline__ void store_elements(bf16* target, float const (&values)[kCount]) {
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
  if constexpr (kCount == 4) {
    store_words<kStreaming>(target, make_uint2(words[0], words[1]));
  } else {
    store_words<kStreaming>(target, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

template <int kCount>
__device__ __forceinline__ void read_shared(float const* source, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float4 const x = *reinterpret_cast<float4 const*>(source + i);
    values[i] = x.x, values[i + 1] = x.y, values[i + 2] = x.z, values[i + 3] = x.w;
  }
}

// [V, K]: 8 lanes share a row, so that sums over key channels stay inside a warp.
template <class State>
struct RowTile {
  static constexpr int kWide = kWideOf<State>;
  static constexpr int kPieces = kHeadDim / (8 * kWide);    // vectors of a row, a lane
  static constexpr int kOwned = kHeld / (kPieces * kWide);  // rows of a thread, which are its value channels
  static constexpr int kVectors = kOwned * kPieces;
  struct Shared {};

  float state[kVectors][kWide];
  int row, channel;  // of the first element

  __device__ __forceinline__ RowTile(int warp, int lane)
      : row(warp * (kSlice / kDecodeWarps) + lane / 8), channel(lane % 8 * kWide) {}

  __device__ __forceinline__ int value_channel(int i) const { return row + 4 * i; }
  __device__ __forceinline__ bool writes_output() const { return channel == 0; }

  // Offset in the state of a head: of the first element of slice 0, of slice s from there, of vector i from there.
  __device__ __forceinline__ int origin() const { return row * kHeadDim + channel; }
  static constexpr int kSliceStride = kSlice * kHeadDim;
  static constexpr int vector_offset(int i) { return i / kPieces * 4 * kHeadDim + i % kPieces * 8 * kWide; }

  __device__ __forceinline__ void step(Token const& token, float const* v, Shared&, float (&out)[kOwned]) {
    float k_state[kOwned] = {}, q_state[kOwned] = {};
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      float decay[kWide], k[kWide], q[kWide];
      int const c = channel + j * 8 * kWide;
      read_shared(token.decay + c, decay), read_shared(token.k + c, k), read_shared(token.q + c, q);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
#pragma unroll
        for (int e = 0; e < kWide; ++e) {
          float& s = state[i * kPieces + j][e];
          s *= decay[e];
          k_state[i] += s * k[e];
          q_state[i] += s * q[e];
        }
      }
    }
    float4 const factors = ChannelStep::factors(token);
    float update[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
#pragma unroll
      for (int mask = 4; mask > 0; mask /= 2) {
        k_state[i] += __shfl_xor_sync(0xffffffffu, k_state[i], mask);
        q_state[i] += __shfl_xor_sync(0xffffffffu, q_state[i], mask);
      }
      ChannelStep const step(factors, v[value_channel(i)], k_state[i], q_state[i]);
      update[i] = step.update, out[i] = step.out;
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      float k[kWide];
      read_shared(token.k + channel + j * 8 * kWide, k);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
#pragma unroll
        for (int e = 0; e < kWide; ++e) state[i * kPieces + j][e] += update[i] * k[e];
      }
    }
  }
};

// [K, V]: a thread holds kWide value channels of kVectors key channels; the warps share out the key channels, so that
// the sums over them pass through shared memory.
template <class State>
struct ColumnTile {
  static constexpr int kWide = kWideOf<State>;
  static constexpr int kLanes = kSlice / kWide;                         // side by side in a row
  static constexpr int kGroups = 32 / kLanes;                           // rows of a warp at a time
  static constexpr int kVectors = kHeadDim / (kDecodeWarps * kGroups);  // rows of a thread
  static constexpr int kOwned = kWide;
  static constexpr int kExchanges = kGroups == 4 ? 2 : 3;
  static constexpr int kKept = 2 * kOwned / kGroups;  // sums that a lane has after them
  struct Shared {
    float sums[kDecodeWarps][2][kSlice];  // with k, with q
  };

  float state[kVectors][kWide];
  int warp, group, row, column;

  __device__ __forceinline__ ColumnTile(int warp, int lane)
      : warp(warp),
        group(lane / kLanes),
        row((warp * kGroups + lane / kLanes) * kVectors),
        column(lane % kLanes * kWide) {}

  __device__ __forceinline__ int value_channel(int i) const { return column + i; }
  __device__ __forceinline__ bool writes_output() const { return row == 0; }

  __device__ __forceinline__ int origin() const { return row * kHeadDim + column; }
  static constexpr int kSliceStride = kSlice;
  static constexpr int vector_offset(int i) { return i * kHeadDim; }

  __device__ __forceinline__ void step(Token const& token, float const* v, Shared& shared, float (&out)[kOwned]) {
    float k[kVectors];
    read_shared(token.k + row, k);
    float sums[2 * kOwned] = {};
    {
      float decay[kVectors], q[kVectors];
      read_shared(token.decay + row, decay), read_shared(token.q + row, q);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int e = 0; e < kWide; ++e) {
          float& s = state[i][e];
          s *= decay[i];
          sums[e] += s * k[i];
          sums[kOwned + e] += s * q[i];
        }
      }
    }
    // Each exchange halves how many sums a lane cares for and doubles the rows that they cover.
    static_for<kExchanges>([&](auto i) {
      constexpr int kMask = 16 >> i, kCount = kOwned >> i;
      bool const upper = group * kLanes & kMask;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        float const mine = upper ? sums[kCount + j] : sums[j];
        float const other = upper ? sums[j] : sums[kCount + j];
        sums[j] = mine + __shfl_xor_sync(0xffffffffu, other, kMask);
      }
    });
    int const first = group * kKept;  // of [2][kOwned]
    float* const kept = &shared.sums[warp][first / kOwned][column + first % kOwned];
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = sums[i];
    __syncthreads();
    float4 const factors = ChannelStep::factors(token);
    float k_state[kOwned] = {}, q_state[kOwned] = {};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      float with_k[kOwned], with_q[kOwned];
      read_shared(&shared.sums[w][0][column], with_k), read_shared(&shared.sums[w][1][column], with_q);
#pragma unroll
      for (int e = 0; e < kOwned; ++e) k_state[e] += with_k[e], q_state[e] += with_q[e];
    }
#pragma unroll
    for (int e = 0; e < kOwned; ++e) {
      ChannelStep const step(factors, v[column + e], k_state[e], q_state[e]);
      out[e] = step.out;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) state[i][e] += step.update * k[i];
    }
  }
};

}  // namespace kda
