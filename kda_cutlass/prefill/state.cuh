// The state of 64 value channels, transposed, in the registers of a warpgroup: value channels are the rows of every
// accumulator, so that state, W and V' become left operands of the next WGMMA without a trip through shared memory.
#pragma once

#include "record.cuh"

namespace kda {

constexpr int kValueTile = 64;  // value channels of a warpgroup

// Visits a thread's part of S^T, whose accumulator layout is: element 4j + 2h + e is value channel row + 8h, key
// channel 8j + 2 (lane % 4) + e.
template <class F>
__device__ __forceinline__ void for_each_state_pair(int lane, F&& f) {
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(4 * j + 2 * h, 8 * h, 8 * j + 2 * (lane & 3));
}

template <class T>
__device__ __forceinline__ void load_state(float (&s)[64], T const* state, bool v_first, int value, int lane) {
  for_each_state_pair(lane, [&](int e, int dv, int key) {
    int const v = value + dv;
    s[e] = static_cast<float>(v_first ? state[v * kHeadDim + key] : state[key * kHeadDim + v]);
    s[e + 1] = static_cast<float>(v_first ? state[v * kHeadDim + key + 1] : state[(key + 1) * kHeadDim + v]);
  });
}
template <class T>
__device__ __forceinline__ void store_state(float const (&s)[64], T* state, bool v_first, int value, int lane) {
  for_each_state_pair(lane, [&](int e, int dv, int key) {
    int const v = value + dv;
    state[v_first ? v * kHeadDim + key : key * kHeadDim + v] = static_cast<T>(s[e]);
    state[v_first ? v * kHeadDim + key + 1 : (key + 1) * kHeadDim + v] = static_cast<T>(s[e + 1]);
  });
}

// An accumulator is, pair by pair, the register layout of a left operand.
template <int kCount>
__device__ __forceinline__ void pack_operand(uint32_t (&packed)[kCount / 2], float const (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i] = pack_bf16(acc[2 * i], acc[2 * i + 1]);
}

struct StateParams {
  const void* initial;  // [N, HV, K, V] or, V-first, [N, HV, V, K]; null for zero
  void* final;          // likewise; null when not wanted
  bool initial_is_fp32, final_is_fp32, v_first;

  // Of a sequence without tokens, an element.
  __device__ __forceinline__ void keep(int64_t offset) const {
    if (final == nullptr) return;
    float const x = initial == nullptr ? 0.f
                    : initial_is_fp32  ? static_cast<float const*>(initial)[offset]
                                       : static_cast<float>(static_cast<bf16 const*>(initial)[offset]);
    if (final_is_fp32)
      static_cast<float*>(final)[offset] = x;
    else
      static_cast<bf16*>(final)[offset] = static_cast<bf16>(x);
  }
};
struct OutputParams {
  bf16* data;
  int64_t stride_batch, stride_token, stride_head;
};

// What a thread knows of where its part of the state and of a [token, value channel] panel lies.
struct StateLanes {
  int lane, value;         // value channel of the lane's first accumulator row
  uint32_t own_offset[4];  // of the four 8 x 8 x 4 pieces of a warp's 64 tokens x 16 channels in a panel

  __device__ __forceinline__ StateLanes(int first_value, int warp, int lane)
      : lane(lane), value(first_value + 16 * warp + (lane >> 2)) {
    int const matrix = lane >> 3, unit = 2 * warp + (matrix & 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) own_offset[j] = panel_offset(8 * (2 * j + (matrix >> 1)) + (lane & 7), unit);
  }

  __device__ __forceinline__ void load_initial(float (&s)[64], StateParams const& p, int64_t offset) const {
    if (p.initial == nullptr) {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = 0.f;
    } else if (p.initial_is_fp32) {
      load_state(s, static_cast<float const*>(p.initial) + offset, p.v_first, value, lane);
    } else {
      load_state(s, static_cast<bf16 const*>(p.initial) + offset, p.v_first, value, lane);
    }
  }
  __device__ __forceinline__ void store_final(float const (&s)[64], StateParams const& p, int64_t offset) const {
    if (p.final == nullptr) return;
    if (p.final_is_fp32)
      store_state(s, static_cast<float*>(p.final) + offset, p.v_first, value, lane);
    else
      store_state(s, static_cast<bf16*>(p.final) + offset, p.v_first, value, lane);
  }

  __device__ __forceinline__ void decay(float (&s)[64], float const* factors) const {
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      float4 const decay = *reinterpret_cast<float4 const*>(&factors[16 * j + 4 * (lane & 3)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[8 * j + 2 * h] *= decay.x;
        s[8 * j + 2 * h + 1] *= decay.y;
        s[8 * j + 4 + 2 * h] *= decay.z;
        s[8 * j + 4 + 2 * h + 1] *= decay.w;
      }
    }
  }
  // beta V^T, as accumulator.
  __device__ __forceinline__ void seed_with_values(float (&w)[32], char const* v_panel,
                                                   ChunkFactors const& factors) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, v_panel + own_offset[j]);
      float4 const beta = *reinterpret_cast<float4 const*>(&factors.beta[16 * j + 4 * (lane & 3)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        w[8 * j + 2 * h] = unpack_lo(r[h]) * beta.x;
        w[8 * j + 2 * h + 1] = unpack_hi(r[h]) * beta.y;
        w[8 * j + 4 + 2 * h] = unpack_lo(r[2 + h]) * beta.z;
        w[8 * j + 4 + 2 * h + 1] = unpack_hi(r[2 + h]) * beta.w;
      }
    }
  }
  // O^T of 16 kCount tokens, packed, to a panel, from token 16 kFirst on.
  template <int kFirst = 0, int kCount>
  __device__ __forceinline__ void store_output(char* panel, uint32_t const (&o)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j)
      stmatrix_x4_trans(panel + own_offset[kFirst + j], o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
  }
};

}  // namespace kda
