// Eight channels at a time: one 16-byte access in bf16, arithmetic in fp32.
#pragma once

#include "kda_cutlass/layer/params.h"
#include "kda_cutlass/sm90.cuh"

namespace kda {

using Channels = float[kVectorChannels];

__device__ __forceinline__ void unpack(uint4 packed, Channels& values) {
  uint32_t const words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = unpack_lo(words[i]);
    values[2 * i + 1] = unpack_hi(words[i]);
  }
}

__device__ __forceinline__ uint4 pack(Channels const& values) {
  return {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
          pack_bf16(values[6], values[7])};
}

__device__ __forceinline__ uint4 load_vector(bf16 const* address) { return *reinterpret_cast<uint4 const*>(address); }
__device__ __forceinline__ void store_vector(bf16* address, uint4 value) { *reinterpret_cast<uint4*>(address) = value; }

// kCount consecutive values, bf16 or fp32 in memory, from an element whose number is a multiple of 8.
template <int kCount>
__device__ __forceinline__ void load_floats(void const* base, int64_t element, bool is_fp32, float (&values)[kCount]) {
  static_assert(kCount % kVectorChannels == 0);
  if (is_fp32) {
    float4 const* source = reinterpret_cast<float4 const*>(static_cast<float const*>(base) + element);
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      float4 const four = source[i];
      values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
    }
  } else {
    bf16 const* source = static_cast<bf16 const*>(base) + element;
#pragma unroll
    for (int i = 0; i < kCount / kVectorChannels; ++i) {
      Channels eight;
      unpack(load_vector(source + i * kVectorChannels), eight);
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c) values[i * kVectorChannels + c] = eight[c];
    }
  }
}

// kCount consecutive bf16 to an element whose number is a multiple of 8.
template <int kCount>
__device__ __forceinline__ void store_floats(void* base, int64_t element, float const (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / kVectorChannels; ++i) {
    Channels eight;
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) eight[c] = values[i * kVectorChannels + c];
    store_vector(static_cast<bf16*>(base) + element + i * kVectorChannels, pack(eight));
  }
}

__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return rcp_approx(1.f + exp2_approx(-kLog2E * x));
}

}  // namespace kda
