// Eight channels at a time: one 16-byte access in bf16, arithmetic in fp32 or by tensor cores.
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

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// The product of 16 outputs' weights, a tensor core's left operand, and eight rows, its right one, over 32 of the depth.
constexpr int kLinearOutputs = 16;
constexpr int kLinearRowTile = 8;
constexpr int kLinearStep = 4 * kVectorChannels;

// A lane has eight of the depth, those of lane % 4, of the output and the row lane / 4 (`high`: of the output 8 further on).
// They serve two steps of the tensor core, which permutes the depth the same way on both sides.
__device__ __forceinline__ void mma_linear_step(float (&sum)[4], uint4 low, uint4 high, uint4 x) {
  uint32_t const step0[4] = {low.x, high.x, low.y, high.y}, step1[4] = {low.z, high.z, low.w, high.w};
  mma_bf16(sum, step0, x.x, x.y);
  mma_bf16(sum, step1, x.z, x.w);
}

}  // namespace kda
