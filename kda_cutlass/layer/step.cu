// One token a sequence through everything between a layer's projections: convolution, KDA, gated norm. Each of them
// alone is shorter than the wait between two kernels. A CTA takes a head of a sequence; where there are few, a cluster
// of four takes one, a slice of the value channels each.
#include <cuda_runtime.h>

#include <algorithm>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>

#include "kda_cutlass/decode/state_tile.cuh"
#include "kda_cutlass/layer/vector.cuh"
#include "kda_cutlass/prefill/gate.cuh"

namespace kda {
namespace {

using Tile = ColumnTile<float>;

constexpr int kLaneChannels = 4;  // of a head, of each lane of a warp

// Four bf16 or fp32 weights of each of a lane's channels, or four inputs: [channel][tap].
struct Taps {
  float at[kLaneChannels][kStepTaps];

  __device__ __forceinline__ void unpack(uint4 first, uint4 second) {
    uint32_t const words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      at[i / 2][i % 2 * 2] = unpack_lo(words[i]);
      at[i / 2][i % 2 * 2 + 1] = unpack_hi(words[i]);
    }
  }
  __device__ __forceinline__ void load(void const* data, int64_t channel, bool is_fp32) {
    if (is_fp32) {
      float4 const* const source = static_cast<float4 const*>(data) + channel;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        float4 const taps = source[c];
        at[c][0] = taps.x, at[c][1] = taps.y, at[c][2] = taps.z, at[c][3] = taps.w;
      }
    } else {
      uint4 const* const source = reinterpret_cast<uint4 const*>(static_cast<bf16 const*>(data) + channel * kStepTaps);
      unpack(source[0], source[1]);
    }
  }
};

__device__ __forceinline__ float4 load_lane(void const* data, int64_t element) {
  uint2 const words = *reinterpret_cast<uint2 const*>(static_cast<bf16 const*>(data) + element);
  return make_float4(unpack_lo(words.x), unpack_hi(words.x), unpack_lo(words.y), unpack_hi(words.y));
}

__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// The convolution of four channels of q, k or v.
struct Convolution {
  Taps weight;
  uint4 past[2];  // the state: four inputs of a channel, the newest last
  uint2 present;
  int64_t channel, state;

  __device__ __forceinline__ void load_weight(StepParams const& p, int part, int hv, int lane) {
    channel = (int64_t(part) * p.heads + hv) * kHeadDim + kLaneChannels * lane;
    weight.load(p.conv_weight, channel, p.conv_weight_is_fp32);
  }
  __device__ __forceinline__ void load(StepParams const& p, int part, int hv, int n, int lane) {
    int64_t const channels = int64_t(p.heads) * kHeadDim;
    state = (int64_t(n) * kConvParts * channels + channel) * kStepTaps;
    uint4 const* const source = reinterpret_cast<uint4 const*>(static_cast<bf16 const*>(p.conv_state) + state);
    past[0] = source[0], past[1] = source[1];
    present = *reinterpret_cast<uint2 const*>(static_cast<bf16 const*>(p.qkv[part]) + n * channels + channel -
                                              part * channels);
  }
  // After SiLU, rounded as the convolution's own kernel rounds.
  __device__ __forceinline__ float4 result() const {
    Taps inputs;
    inputs.unpack(past[0], past[1]);
    float const now[kLaneChannels] = {unpack_lo(present.x), unpack_hi(present.x), unpack_lo(present.y),
                                      unpack_hi(present.y)};
    float y[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      float sum = 0.f;
#pragma unroll
      for (int tap = 0; tap + 1 < kStepTaps; ++tap) sum += weight.at[c][tap] * inputs.at[c][tap + 1];
      sum += weight.at[c][kStepTaps - 1] * now[c];
      y[c] = round_bf16(sum * sigmoid(sum));
    }
    return make_float4(y[0], y[1], y[2], y[3]);
  }
  // The state with its oldest column gone and the present input in the last.
  __device__ __forceinline__ void store_state(StepParams const& p) const {
    auto shift = [](uint32_t low, uint32_t high, uint32_t next) {
      return make_uint2(__funnelshift_r(low, high, 16), __funnelshift_r(high, next, 16));
    };
    uint2 const first = shift(past[0].x, past[0].y, present.x), second = shift(past[0].z, past[0].w, present.x >> 16);
    uint2 const third = shift(past[1].x, past[1].y, present.y), fourth = shift(past[1].z, past[1].w, present.y >> 16);
    uint4* const target = reinterpret_cast<uint4*>(static_cast<bf16*>(p.conv_state) + state);
    target[0] = make_uint4(first.x, first.y, second.x, second.y);
    target[1] = make_uint4(third.x, third.y, fourth.x, fourth.y);
  }
};

template <Gate kGate>
__device__ __forceinline__ float4 decays(StepParams const& p, float4 x, float a_log, float4 bias) {
  float const rate = exp2_approx(a_log * kLog2e);
  auto decay = [&](float y, float b) { return exp2_approx(LogDecay<kGate>(rate, p.lower_bound, b)(y)); };
  return make_float4(decay(x.x, bias.x), decay(x.y, bias.y), decay(x.z, bias.z), decay(x.w, bias.w));
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Writes a number to the same shared variable of another CTA of the cluster.
__device__ __forceinline__ void store_in_cta(float* variable, int rank, float value) {
  uint32_t const address = cute::set_block_rank(cute::cast_smem_ptr_to_uint(variable), rank);
  asm volatile("st.shared::cluster.f32 [%0], %1;" : : "r"(address), "f"(value) : "memory");
}

template <int kSlicesHere>
__global__ void __launch_bounds__(kDecodeThreads, kSlicesHere == 1 ? 5 : 4)
    step_kernel(const __grid_constant__ StepParams p) {
  constexpr int kStages = std::min(kSlicesHere, 2);
  constexpr bool kCluster = kSlicesHere == 1;
  __shared__ uint4 staged[kStages][Tile::kVectors][kDecodeThreads];  // each thread reads what it has itself fetched
  __shared__ __align__(16) Token token;
  __shared__ __align__(16) typename Tile::Shared sums[2];  // used in turn
  __shared__ __align__(16) float gate[kHeadDim];           // the norm's weight times the sigmoid of its gate
  __shared__ __align__(16) float outputs[kSlicesHere][kSlice];
  __shared__ float squares[kSlices];  // sums of a slice's outputs squared

  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const hv = blockIdx.x / (kSlices / kSlicesHere), first_slice = blockIdx.x % (kSlices / kSlicesHere) * kSlicesHere;
  int const n = blockIdx.y;
  int64_t const channels = int64_t(p.heads) * kHeadDim, row = n * channels + hv * kHeadDim;
  Tile tile(warp, lane);
  if constexpr (kCluster) cute::cluster_arrive_relaxed();

  // Before the kernel before has ended: the state's way to the L2, and parameters, which none of those kernels writes.
  float* state = p.state + row * kHeadDim + first_slice * Tile::kSliceStride;
#pragma unroll
  for (int i = 0; i < kSlicesHere; ++i) prefetch_l2(state + threadIdx.x * kHeadDim + i * Tile::kSliceStride);
  state += tile.origin();
  Convolution first, second;  // q and k of warp 0, v of warp 1
  float a_log = 0.f, norm_weight[kLaneChannels];
  float4 dt_bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (warp == 0) {
    first.load_weight(p, 0, hv, lane);
    second.load_weight(p, 1, hv, lane);
  } else if (warp == 1) {
    first.load_weight(p, 2, hv, lane);
  } else if (warp == 2) {
    if (p.A_log != nullptr) a_log = p.A_log[hv];
    if (p.dt_bias != nullptr) dt_bias = reinterpret_cast<float4 const*>(p.dt_bias)[hv * (kHeadDim / 4) + lane];
  } else {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      int const channel = kLaneChannels * lane + c;
      norm_weight[c] = p.norm_weight_is_fp32 ? static_cast<float const*>(p.norm_weight)[channel]
                                             : __bfloat162float(static_cast<bf16 const*>(p.norm_weight)[channel]);
    }
  }
  wait_for_previous_kernel();

  float4 raw = make_float4(0.f, 0.f, 0.f, 0.f);
  float beta = 0.f;
  if (warp == 0) {
    first.load(p, 0, hv, n, lane);
    second.load(p, 1, hv, n, lane);
    beta = __bfloat162float(static_cast<bf16 const*>(p.beta)[int64_t(n) * p.heads + hv]);
  } else if (warp == 1) {
    first.load(p, 2, hv, n, lane);
  } else {
    raw = load_lane(warp == 2 ? p.decay : p.gate, row + kLaneChannels * lane);
  }
  auto fetch = [&](int s) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(
          *reinterpret_cast<uint4 const*>(state + s * Tile::kSliceStride + Tile::vector_offset(i)),
          staged[s % kStages][i][threadIdx.x]);
    }
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    fetch(s);
    cute::cp_async_fence();
  }
  let_next_kernel_start();

  auto put = [&](float* target, float4 x) { reinterpret_cast<float4*>(target)[lane] = x; };
  if (warp == 0) {
    float4 const q = first.result(), k = second.result();
    put(token.q, q), put(token.k, k);
    auto dot = [](float4 x, float4 y) { return warp_sum((x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w)); };
    float const k_factor = rsqrtf(dot(k, k) + 1e-6f), q_factor = p.scale * rsqrtf(dot(q, q) + 1e-6f), qk = dot(q, k);
    float const step = sigmoid(beta) * k_factor;
    if (lane == 0) *reinterpret_cast<float4*>(&token.k_factor) = make_float4(k_factor, step, q_factor, qk);
  } else if (warp == 1) {
    put(token.v, first.result());
  } else if (warp == 2) {
    put(token.decay, p.softplus ? decays<Gate::kSoftplus>(p, raw, a_log, dt_bias)
                                : decays<Gate::kLowerBound>(p, raw, a_log, dt_bias));
  } else {
    put(gate, make_float4(norm_weight[0] * sigmoid(raw.x), norm_weight[1] * sigmoid(raw.y),
                          norm_weight[2] * sigmoid(raw.z), norm_weight[3] * sigmoid(raw.w)));
  }
  __syncthreads();

#pragma unroll 1
  for (int s = 0; s < kSlicesHere; ++s) {
    cute::cp_async_wait<kStages - 1>();
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) unpack<float>(staged[s % kStages][i][threadIdx.x], tile.state[i]);
    if (s + kStages < kSlicesHere) fetch(s + kStages);
    cute::cp_async_fence();  // empty groups keep the count
    float o[Tile::kOwned];
    tile.step(token, token.v + (first_slice + s) * kSlice, sums[s % 2], o);
    if (tile.writes_output()) {
#pragma unroll
      for (int i = 0; i < Tile::kOwned; ++i) outputs[s][tile.value_channel(i)] = round_bf16(o[i]);
    }
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      store_elements<!kCluster>(state + s * Tile::kSliceStride + Tile::vector_offset(i), tile.state[i]);
    }
    if (warp == 0) {  // which has written these outputs
      __syncwarp();
      float const sum = warp_sum(outputs[s][lane] * outputs[s][lane]);
      if constexpr (kCluster) {
        cute::cluster_wait();  // all CTAs of the cluster have begun
        if (lane < kSlices) store_in_cta(&squares[first_slice], lane, sum);
      } else if (lane == 0) {
        squares[s] = sum;
      }
    }
  }
  if constexpr (kCluster) {
    if (warp != 0) cute::cluster_wait();
    cute::cluster_arrive();
    cute::cluster_wait();
  }
  // Every CTA of the head has its token by now.
  if (first_slice == 0 && warp < 2) {
    first.store_state(p);
    if (warp == 0) second.store_state(p);
  }
  if (warp == 0) {
    __syncwarp();
    float const inverse = rsqrtf(((squares[0] + squares[1]) + (squares[2] + squares[3])) / kHeadDim + p.eps);
#pragma unroll
    for (int s = 0; s < kSlicesHere; ++s) {
      int const channel = (first_slice + s) * kSlice + lane;
      static_cast<bf16*>(p.out)[row + channel] = __float2bfloat16_rn(outputs[s][lane] * inverse * gate[channel]);
    }
  }
}

template <int kSlicesHere>
cudaError_t launch(StepParams const& p, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kSlices, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.heads * (kSlices / kSlicesHere), p.sequences);
  config.blockDim = dim3(kDecodeThreads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kSlicesHere == 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, step_kernel<kSlicesHere>, p);
}

}  // namespace

cudaError_t launch_step(StepParams const& p, cudaStream_t stream) {
  constexpr int kFewHeads = 128;  // which need their slices to reach every SM
  return p.heads * p.sequences < kFewHeads ? launch<1>(p, stream) : launch<kSlices>(p, stream);
}

}  // namespace kda
