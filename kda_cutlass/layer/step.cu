// One token a sequence through everything between a layer's projections: convolution, KDA, gated norm. Each of them
// alone is shorter than the wait between two kernels. A CTA takes a head of a sequence; where there are few, a cluster
// of four takes one, a slice of the value channels each.
#include <cuda_runtime.h>

#include <algorithm>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>

#include "kda_cutlass/decode/state_tile.cuh"
#include "kda_cutlass/device.h"
#include "kda_cutlass/layer/vector.cuh"
#include "kda_cutlass/prefill/gate.cuh"

namespace kda {
namespace {

using Tile = ColumnTile<float>;

constexpr int kLaneChannels = 4;  // of a head, of each lane of a warp

// bf16 or fp32 as it lies in memory. Loading waits for nothing; converting at once would.
struct RawFloat {
  uint32_t bits;

  __device__ __forceinline__ void load(void const* data, int64_t element, bool is_fp32) {
    if (is_fp32) {
      bits = static_cast<uint32_t const*>(data)[element];
    } else {
      bits = static_cast<uint16_t const*>(data)[element];
    }
  }
  __device__ __forceinline__ float get(bool is_fp32) const { return __uint_as_float(is_fp32 ? bits : bits << 16); }
};

// Four weights of each of a lane's channels, or four inputs, likewise: [channel][tap].
struct Taps {
  uint4 raw[kLaneChannels];  // of bf16 two

  __device__ __forceinline__ void load(void const* data, int64_t channel, bool is_fp32) {
    uint4 const* const source =
        reinterpret_cast<uint4 const*>(static_cast<char const*>(data) + (channel * kStepTaps << (is_fp32 ? 2 : 1)));
    raw[0] = source[0], raw[1] = source[1];
    if (is_fp32) raw[2] = source[2], raw[3] = source[3];
  }
  __device__ __forceinline__ float4 get(int channel, bool is_fp32) const {
    uint4 const pair = raw[channel / 2];
    uint32_t const low = channel % 2 ? pair.z : pair.x, high = channel % 2 ? pair.w : pair.y;
    uint4 const x = raw[channel];
    return is_fp32 ? make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w))
                   : make_float4(unpack_lo(low), unpack_hi(low), unpack_lo(high), unpack_hi(high));
  }
};

__device__ __forceinline__ float4 load_lane(void const* data, int64_t element) {
  uint2 const words = *reinterpret_cast<uint2 const*>(static_cast<bf16 const*>(data) + element);
  return make_float4(unpack_lo(words.x), unpack_hi(words.x), unpack_lo(words.y), unpack_hi(words.y));
}

__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// The convolution of four channels of q, k or v.
struct Convolution {
  Taps weight, past;  // past: the state, the newest input last
  uint2 present;
  int64_t state;

  __device__ __forceinline__ void load_weight(StepParams const& p, int part, int hv, int n, int lane) {
    int64_t const channel = (int64_t(part) * p.heads + hv) * kHeadDim + kLaneChannels * lane;
    state = int64_t(n) * kConvParts * p.heads * kHeadDim + channel;
    weight.load(p.conv_weight, channel, p.conv_weight_is_fp32);
  }
  __device__ __forceinline__ void load_past(StepParams const& p) { past.load(p.conv_state, state, false); }
  __device__ __forceinline__ void load_present(StepParams const& p, int part, int64_t row, int lane) {
    present = *reinterpret_cast<uint2 const*>(static_cast<bf16 const*>(p.qkv[part]) + row + kLaneChannels * lane);
  }
  // After SiLU, rounded as the convolution's own kernel rounds.
  __device__ __forceinline__ float4 result(bool is_fp32) const {
    float const now[kLaneChannels] = {unpack_lo(present.x), unpack_hi(present.x), unpack_lo(present.y),
                                      unpack_hi(present.y)};
    float y[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      float4 const w = weight.get(c, is_fp32), x = past.get(c, false);
      float sum = 0.f;
      sum += w.x * x.y, sum += w.y * x.z, sum += w.z * x.w, sum += w.w * now[c];
      y[c] = round_bf16(sum * sigmoid(sum));
    }
    return make_float4(y[0], y[1], y[2], y[3]);
  }
  // The state with its oldest column gone and the present input in the last.
  __device__ __forceinline__ void store_state(StepParams const& p) const {
    auto shift = [](uint32_t low, uint32_t high, uint32_t next) {
      return make_uint2(__funnelshift_r(low, high, 16), __funnelshift_r(high, next, 16));
    };
    uint4 const(&x)[kLaneChannels] = past.raw;
    uint2 const first = shift(x[0].x, x[0].y, present.x), second = shift(x[0].z, x[0].w, present.x >> 16);
    uint2 const third = shift(x[1].x, x[1].y, present.y), fourth = shift(x[1].z, x[1].w, present.y >> 16);
    uint4* const target = reinterpret_cast<uint4*>(static_cast<bf16*>(p.conv_state) + state * kStepTaps);
    target[0] = make_uint4(first.x, first.y, second.x, second.y);
    target[1] = make_uint4(third.x, third.y, fourth.x, fourth.y);
  }
};

__device__ __forceinline__ float decay_of(StepParams const& p, float x, float rate, float bias) {
  return exp2_approx(p.softplus ? LogDecay<Gate::kSoftplus>(rate, p.lower_bound, bias)(x)
                                : LogDecay<Gate::kLowerBound>(rate, p.lower_bound, bias)(x));
}

// The second projection of a gate for a slice of channels, by a warp: the bits are those of linears_kernel.
struct SecondProjection {
  static constexpr int kTiles = kSlice / kLinearOutputs, kSteps = kHeadDim / kLinearStep;
  uint4 weight[kTiles][2][kSteps], input[kSteps];

  __device__ __forceinline__ void load_weight(void const* data, int64_t first_channel, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        bf16 const* const source = static_cast<bf16 const*>(data) +
                                   (first_channel + t * kLinearOutputs + half * 8 + lane / 4) * kHeadDim +
                                   lane % 4 * kVectorChannels;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) weight[t][half][i] = load_vector(source + i * kLinearStep);
      }
    }
  }
  __device__ __forceinline__ void load_input(void const* data, int64_t n, int lane) {
    bf16 const* const source = static_cast<bf16 const*>(data) + n * kHeadDim + lane % 4 * kVectorChannels;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) input[i] = load_vector(source + i * kLinearStep);
  }
  // All columns of the product are the same, so each lane takes one output: that of this channel of the slice.
  static __device__ __forceinline__ int channel(int lane) {
    int const quarter = lane % 4;
    return quarter / 2 * kLinearOutputs + quarter % 2 * 8 + lane / 4;
  }
  __device__ __forceinline__ float output(int lane) const {
    float total[kTiles][2] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {  // each by itself first: there it is another warp's
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float sum[4] = {};
        mma_linear_step(sum, weight[t][0][i], weight[t][1][i], input[i]);
        total[t][0] += sum[0], total[t][1] += sum[2];
      }
    }
    float const low = lane & 2 ? total[1][0] : total[0][0], high = lane & 2 ? total[1][1] : total[0][1];
    return round_bf16(lane & 1 ? high : low);
  }
};
static_assert(SecondProjection::kTiles == 2);

// Numbers from all CTAs of a cluster. Each arrives together with word of it, so that nobody waits for the writer's other
// stores, as who waits for all of the cluster does.
struct Mailbox {
  uint64_t barrier;

  __device__ __forceinline__ TransactionBarrier& arrived() { return reinterpret_cast<TransactionBarrier&>(barrier); }
  __device__ __forceinline__ void open(int numbers) {  // by one thread, before the cluster is waited for
    arrived().init(1);
    arrived().arrive_and_expect_tx(numbers * sizeof(float));
  }
  // To the same variable of CTA `rank`, whose mailbox is told.
  __device__ __forceinline__ void send(float* variable, float value, int rank) {
    uint32_t const address = cute::set_block_rank(cute::cast_smem_ptr_to_uint(variable), rank);
    uint32_t const word = cute::set_block_rank(cute::cast_smem_ptr_to_uint(&barrier), rank);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 :
                 : "r"(address), "r"(__float_as_uint(value)), "r"(word)
                 : "memory");
  }
  __device__ __forceinline__ void wait() { arrived().wait(0); }
};

// kWhole: for few heads, behind the kernel of a step's first projections. Decay and gate come before their second
// projections, [N, 128], and what that kernel does not write is on its way before it has ended: it lets this one start
// only when all before itself has ended.
template <int kSlicesHere, bool kWhole>
__global__ void __launch_bounds__(kDecodeThreads, 4) step_kernel(const __grid_constant__ StepParams p) {
  constexpr int kStages = std::min(kSlicesHere, 2);
  constexpr bool kCluster = kSlicesHere == 1;
  static_assert(kCluster || !kWhole);
  __shared__ uint4 staged[kStages][Tile::kVectors][kDecodeThreads];  // each thread reads what it has itself fetched
  __shared__ __align__(16) Token token;
  __shared__ __align__(16) typename Tile::Shared sums[2];  // used in turn
  __shared__ __align__(16) float gate[kHeadDim];           // the norm's weight times the sigmoid of its gate
  __shared__ __align__(16) float outputs[kSlicesHere][kSlice];
  __shared__ __align__(16) float squares[kSlices];  // sums of a slice's outputs squared
  __shared__ Mailbox decays_mail, squares_mail;

  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const hv = blockIdx.x / (kSlices / kSlicesHere), first_slice = blockIdx.x % (kSlices / kSlicesHere) * kSlicesHere;
  int const n = blockIdx.y;
  int64_t const channels = int64_t(p.heads) * kHeadDim, row = n * channels + hv * kHeadDim;
  int const own = first_slice * kSlice + SecondProjection::channel(lane);  // of a lane's second projection, in the head
  Tile tile(warp, lane);
  if constexpr (kCluster) {
    if (threadIdx.x == 0) {
      if constexpr (kWhole) decays_mail.open(kHeadDim);
      squares_mail.open(kSlices);
      cutlass::arch::fence_barrier_init();
    }
    __syncwarp();
    cute::cluster_arrive_relaxed();
  }
  // The next kernel only brings its weights before this one has ended.
  if constexpr (kWhole) let_next_kernel_start();

  float* state = p.state + row * kHeadDim + first_slice * Tile::kSliceStride + tile.origin();
  auto fetch = [&](int s) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(
          *reinterpret_cast<uint4 const*>(state + s * Tile::kSliceStride + Tile::vector_offset(i)),
          staged[s % kStages][i][threadIdx.x]);
    }
    cute::cp_async_fence();
  };
  Convolution first, second;    // q and k of warp 0, v of warp 1
  SecondProjection projection;  // decay's of warp 2, the gate's of warp 3
  float a_log = 0.f;
  RawFloat norm_weight[kLaneChannels];
  float4 dt_bias = make_float4(0.f, 0.f, 0.f, 0.f);
  if (warp == 0) {
    first.load_weight(p, 0, hv, n, lane);
    second.load_weight(p, 1, hv, n, lane);
  } else if (warp == 1) {
    first.load_weight(p, 2, hv, n, lane);
  } else if (warp == 2) {
    if constexpr (kWhole) projection.load_weight(p.decay_weight, hv * kHeadDim + first_slice * kSlice, lane);
    if (p.A_log != nullptr) a_log = p.A_log[hv];
    if (p.dt_bias != nullptr) {
      if constexpr (kWhole) {
        dt_bias.x = p.dt_bias[hv * kHeadDim + own];
      } else {
        dt_bias = reinterpret_cast<float4 const*>(p.dt_bias)[hv * (kHeadDim / 4) + lane];
      }
    }
  } else {
    if constexpr (kWhole) projection.load_weight(p.gate_weight, hv * kHeadDim + first_slice * kSlice, lane);
#pragma unroll
    for (int c = 0; c < (kWhole ? 1 : kLaneChannels); ++c) {
      norm_weight[c].load(p.norm_weight, kWhole ? own : kLaneChannels * lane + c, p.norm_weight_is_fp32);
    }
  }
  auto load_states = [&] {
    if (warp < 2) first.load_past(p);
    if (warp == 0) second.load_past(p);
#pragma unroll
    for (int s = 0; s < kStages; ++s) fetch(s);
  };
  if constexpr (kWhole) {
    load_states();
  } else {  // only their way to the L2
#pragma unroll
    for (int i = 0; i < kSlicesHere; ++i) {
      prefetch_l2(p.state + (row + threadIdx.x) * kHeadDim + (first_slice + i) * Tile::kSliceStride);
    }
  }
  wait_for_previous_kernel();

  float4 raw = make_float4(0.f, 0.f, 0.f, 0.f);
  float beta = 0.f;
  if (warp == 0) {
    first.load_present(p, 0, row, lane);
    second.load_present(p, 1, row, lane);
    beta = __bfloat162float(static_cast<bf16 const*>(p.beta)[int64_t(n) * p.heads + hv]);
  } else if (warp == 1) {
    first.load_present(p, 2, row, lane);
  } else {
    void const* const source = warp == 2 ? p.decay : p.gate;
    if constexpr (kWhole) {
      projection.load_input(source, n, lane);
    } else {
      raw = load_lane(source, row + kLaneChannels * lane);
    }
  }
  if constexpr (!kWhole) {
    load_states();
    let_next_kernel_start();
  }
  if constexpr (kCluster) cute::cluster_wait();  // all CTAs of the cluster have begun

  auto put = [&](float* target, float4 x) { reinterpret_cast<float4*>(target)[lane] = x; };
  if (warp == 0) {
    float4 const q = first.result(p.conv_weight_is_fp32), k = second.result(p.conv_weight_is_fp32);
    put(token.q, q), put(token.k, k);
    auto dot = [](float4 x, float4 y) { return warp_sum((x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w)); };
    float const k_factor = rsqrtf(dot(k, k) + 1e-6f), q_factor = p.scale * rsqrtf(dot(q, q) + 1e-6f), qk = dot(q, k);
    float const step = sigmoid(beta) * k_factor;
    if (lane == 0) *reinterpret_cast<float4*>(&token.k_factor) = make_float4(k_factor, step, q_factor, qk);
  } else if (warp == 1) {
    put(token.v, first.result(p.conv_weight_is_fp32));
  } else if (warp == 2) {
    float const rate = exp2_approx(a_log * kLog2e);
    if constexpr (kWhole) {
      float const decay = decay_of(p, projection.output(lane), rate, dt_bias.x);
#pragma unroll
      for (int cta = 0; cta < kSlices; ++cta) decays_mail.send(&token.decay[own], decay, cta);
    } else {
      put(token.decay, make_float4(decay_of(p, raw.x, rate, dt_bias.x), decay_of(p, raw.y, rate, dt_bias.y),
                                   decay_of(p, raw.z, rate, dt_bias.z), decay_of(p, raw.w, rate, dt_bias.w)));
    }
  } else if constexpr (kWhole) {
    gate[own] = norm_weight[0].get(p.norm_weight_is_fp32) * sigmoid(projection.output(lane));
  } else {
    auto weighted = [&](int c, float x) { return norm_weight[c].get(p.norm_weight_is_fp32) * sigmoid(x); };
    put(gate, make_float4(weighted(0, raw.x), weighted(1, raw.y), weighted(2, raw.z), weighted(3, raw.w)));
  }
  __syncthreads();
  if constexpr (kWhole) decays_mail.wait();

#pragma unroll 1
  for (int s = 0; s < kSlicesHere; ++s) {
    cute::cp_async_wait<kStages - 1>();
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) unpack<float>(staged[s % kStages][i][threadIdx.x], tile.state[i]);
    if (s + kStages < kSlicesHere) {
      fetch(s + kStages);
    } else {
      cute::cp_async_fence();  // empty groups keep the count
    }
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
        if (lane < kSlices) squares_mail.send(&squares[first_slice], sum, lane);
      } else if (lane == 0) {
        squares[s] = sum;
      }
    }
  }
  if (kCluster && warp < 2) squares_mail.wait();
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

template <int kSlicesHere, bool kWhole = false>
cudaError_t launch(StepParams const& p, cudaStream_t stream) {
  auto* const kernel = step_kernel<kSlicesHere, kWhole>;
  if constexpr (kWhole) {
    cudaError_t const error = once_a_device([=] { return prefer_shared_memory(kernel); });
    if (error != cudaSuccess) return error;
  }
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
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t launch_step(StepParams const& p, cudaStream_t stream) {
  if (p.decay_weight != nullptr) return launch<1, true>(p, stream);
  return step_takes_slices(p.heads, p.sequences) ? launch<1>(p, stream) : launch<kSlices>(p, stream);
}

}  // namespace kda
