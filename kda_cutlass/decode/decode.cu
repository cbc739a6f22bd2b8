// Decode: a few new tokens a sequence. The state is all that weighs: it is read once, stays in registers in fp32 while
// the tokens pass, and is written once. A CTA takes a head of a sequence, or one slice of its value channels.
#include <cuda_runtime.h>

#include <algorithm>
#include <cute/arch/copy_sm80.hpp>

#include "../device.h"
#include "../prefill/gate.cuh"
#include "state_tile.cuh"

namespace kda {
namespace {

constexpr int kTokens = kDecodeWarps;  // that are kept in shared memory at a time, one brought by each warp

// Four neighbouring numbers of bf16 or fp32 as they lie in memory. Loading waits for nothing: converting at once, or
// one register for two kinds of loads, would make each load wait for the one before.
struct RawFloats {
  uint2 first, second;
  __device__ __forceinline__ void load(void const* data, int64_t offset, bool is_fp32) {
    uint2 const* const source =
        reinterpret_cast<uint2 const*>(static_cast<char const*>(data) + (offset << (is_fp32 ? 2 : 1)));
    first = source[0];
    if (is_fp32) second = source[1];
  }
  __device__ __forceinline__ float4 get(bool is_fp32) const {
    uint2 const low = is_fp32 ? first : make_uint2(first.x << 16, first.x & 0xffff0000u);
    uint2 const high = is_fp32 ? second : make_uint2(first.y << 16, first.y & 0xffff0000u);
    return make_float4(__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(high.x),
                       __uint_as_float(high.y));
  }
};

// The tokens of a sequence.
struct Span {
  int batch, first, length;

  __device__ __forceinline__ Span(DecodeParams const& p, int n) : batch(n), first(0), length(p.tokens) {
    if (p.cu_seqlens == nullptr) return;
    auto bound = [&](int i) {  // whatever the buffer holds, no access leaves the tensors
      int64_t const value = load_index(p.cu_seqlens, i, p.cu_seqlens_is_int64);
      return static_cast<int>(min(max(value, int64_t(0)), int64_t(p.tokens)));
    };
    batch = 0, first = bound(n);
    length = max(bound(n + 1) - first, 0);
  }
};

// The slot in column `column` of a sequence's row, or -1 for one that is none.
__device__ __forceinline__ int64_t slot(DecodeParams const& p, int n, int column) {
  if (column >= p.slot_columns) return -1;
  int64_t const index =
      load_index(p.slots.data, n * p.slots.stride_row + column * p.slots.stride_column, p.slots.is_int64);
  return index >= p.min_slot && index < p.num_slots ? index : -1;
}

__device__ __forceinline__ int64_t initial_slot(DecodeParams const& p, int n) {
  if (p.slots.data == nullptr) return n;
  int column = 0;
  if (p.num_accepted.data != nullptr) {
    int64_t const accepted = load_index(p.num_accepted.data, n * p.num_accepted.stride_row, p.num_accepted.is_int64);
    column = static_cast<int>(min(max(accepted, int64_t(1)), int64_t(p.slot_columns))) - 1;
  }
  return slot(p, n, column);
}

// One token of one head on its way from memory to shared memory, by one warp: lane l has the channels 4 l to 4 l + 3.
struct TokenInput {
  RawFloats q, k, v, g;
  uint16_t beta_high, beta_low;
  float a_log;
  float4 dt_bias;

  __device__ __forceinline__ void load(DecodeParams const& p, Span const& span, int t, int hv, int lane) {
    asm volatile(""
                 : "+r"(hv), "+r"(lane));  // addresses are worked out here, not kept in registers from token to token
    auto at = [&](TensorView const& view, int head) {
      return span.batch * view.stride_batch + (span.first + t) * view.stride_token + head * view.stride_head;
    };
    int const h = p.group == 1 ? hv : hv / p.group;
    q.load(p.q.data, at(p.q, h) + 4 * lane, false);
    k.load(p.k.data, at(p.k, h) + 4 * lane, false);
    g.load(p.g.data, at(p.g, hv) + 4 * lane, p.g_dtype == Dtype::kFp32);
    a_log = p.A_log != nullptr ? p.A_log[hv] : 0.f;
    dt_bias = make_float4(0.f, 0.f, 0.f, 0.f);
    if (p.dt_bias != nullptr) dt_bias = reinterpret_cast<float4 const*>(p.dt_bias)[hv * (kHeadDim / 4) + lane];
    v.load(p.v.data, at(p.v, hv) + 4 * lane, false);
    bool const is_fp32 = p.beta_dtype == Dtype::kFp32;
    uint16_t const* const beta = static_cast<uint16_t const*>(p.beta.data) + (at(p.beta, hv) << (is_fp32 ? 1 : 0));
    beta_high = beta[is_fp32 ? 1 : 0];
    beta_low = is_fp32 ? beta[0] : 0;
  }

  template <Gate kGate>
  __device__ __forceinline__ float4 decays(DecodeParams const& p) const {
    float const rate = exp2_approx(a_log * kLog2e);
    auto decay = [&](float x, float bias) { return exp2_approx(LogDecay<kGate>(rate, p.lower_bound, bias)(x)); };
    float4 const x = g.get(p.g_dtype == Dtype::kFp32);
    return make_float4(decay(x.x, dt_bias.x), decay(x.y, dt_bias.y), decay(x.z, dt_bias.z), decay(x.w, dt_bias.w));
  }

  __device__ __forceinline__ void write(DecodeParams const& p, Token& token, int lane) const {
    auto put = [&](float* channels, float4 x) { reinterpret_cast<float4*>(channels)[lane] = x; };
    float4 const query = q.get(false), key = k.get(false);
    put(token.q, query), put(token.k, key), put(token.v, v.get(false));
    put(token.decay, p.gate == Gate::kLowerBound ? decays<Gate::kLowerBound>(p)
                     : p.gate == Gate::kSoftplus ? decays<Gate::kSoftplus>(p)
                                                 : decays<Gate::kGiven>(p));
    auto dot = [](float4 x, float4 y) { return (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w); };
    float qq = dot(query, query), kk = dot(key, key), qk = dot(query, key);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      qq += __shfl_xor_sync(0xffffffffu, qq, mask);
      kk += __shfl_xor_sync(0xffffffffu, kk, mask);
      qk += __shfl_xor_sync(0xffffffffu, qk, mask);
    }
    float beta = __uint_as_float(uint32_t(beta_high) << 16 | beta_low);
    if (p.beta_sigmoid) beta = (p.allow_neg_eigval ? 2.f : 1.f) * rcp_approx(1.f + exp2_approx(-kLog2e * beta));
    float const k_factor = p.qk_l2norm ? rsqrtf(kk + 1e-6f) : 1.f;
    float const q_factor = p.qk_l2norm ? p.scale * rsqrtf(qq + 1e-6f) : p.scale;
    if (lane == 0) *reinterpret_cast<float4*>(&token.k_factor) = make_float4(k_factor, beta * k_factor, q_factor, qk);
  }
};

template <bool kStreaming, class Tile>
__device__ __forceinline__ void store_state(Tile const& tile, StateView const& view, int64_t offset) {
  auto store = [&](auto* target) {
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) store_elements<kStreaming>(target + Tile::vector_offset(i), tile.state[i]);
  };
  if (view.dtype == Dtype::kFp32) {
    store(static_cast<float*>(view.data) + offset);
  } else {
    store(static_cast<bf16*>(view.data) + offset);
  }
}

// kSlicesHere slices one after the other, each on its way to shared memory while the one before it is worked on.
template <class State, class Tile, int kSlicesHere, int kCtasPerSm>
__global__ void __launch_bounds__(kDecodeThreads, kCtasPerSm) decode_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kStages = std::min(kSlicesHere, 2);
  constexpr bool kStreaming = kSlicesHere > 1;
  __shared__ uint4 staged[kStages][Tile::kVectors][kDecodeThreads];  // each thread reads what it has itself fetched
  __shared__ __align__(16) Token tokens[kTokens];
  __shared__ __align__(16) typename Tile::Shared sums[2];  // used in turn

  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const hv = blockIdx.x / (kSlices / kSlicesHere), first_slice = blockIdx.x % (kSlices / kSlicesHere) * kSlicesHere;
  int const n = blockIdx.y + blockIdx.z * gridDim.y;
  Tile tile(warp, lane);
  wait_for_previous_kernel();
  if (n >= p.num_seqs) return;

  Span const span(p, n);
  int64_t const source = initial_slot(p, n);
  int64_t const origin = int64_t(hv) * kHeadDim * kHeadDim + first_slice * Tile::kSliceStride + tile.origin();
  bf16* out = static_cast<bf16*>(const_cast<void*>(p.out.data)) + span.batch * p.out.stride_batch +
              span.first * p.out.stride_token + hv * p.out.stride_head + first_slice * kSlice;
  bool const padding = source < 0;
  if (padding) {
#pragma unroll 1
    for (int t = 0; t < span.length; ++t) {
      int const channel = threadIdx.x;
      if (channel < kSlicesHere * kSlice) out[t * p.out.stride_token + channel] = __float2bfloat16(0.f);
    }
    if (p.keep != Keep::kLast) return;  // a slot is left alone; a state that is asked for is zero
  }

  int const length = padding ? 0 : span.length;
  TokenInput input;
  if (warp < length) input.load(p, span, warp, hv, lane);

  bool const has_state = p.initial_state.data != nullptr && !padding;
  State const* state = static_cast<State const*>(p.initial_state.data) + source * p.initial_state.stride + origin;
  auto fetch = [&](int stage) {  // zeros where there is no state
#pragma unroll
    for (int i = 0; i < Tile::kVectors; ++i) {
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(
          *reinterpret_cast<uint4 const*>(state + Tile::vector_offset(i)), staged[stage][i][threadIdx.x], has_state);
    }
    state += Tile::kSliceStride;
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    fetch(stage);
    cute::cp_async_fence();
  }

  if (warp < length) input.write(p, tokens[warp], lane);
  let_next_kernel_start();
  __syncthreads();

  int turn = 0;
#pragma unroll 1
  for (int s = 0; s < kSlicesHere; ++s) {
    int64_t const here = origin + s * Tile::kSliceStride;
    int begin = 0;
    do {  // tokens in groups of kTokens; without tokens the state just passes
      int const end = min(begin + kTokens, length);
      if (length > kTokens && s + begin > 0) {
        __syncthreads();
        TokenInput later;
        if (begin + warp < end) {
          later.load(p, span, begin + warp, hv, lane);
          later.write(p, tokens[warp], lane);
        }
        __syncthreads();
      }
      if (begin == 0) {
        cute::cp_async_wait<kStages - 1>();
#pragma unroll
        for (int i = 0; i < Tile::kVectors; ++i) unpack<State>(staged[s % kStages][i][threadIdx.x], tile.state[i]);
        if (s + kStages < kSlicesHere) fetch(s % kStages);
        cute::cp_async_fence();  // empty groups keep the count
      }
#pragma unroll 1
      for (int t = begin; t < end; ++t) {
        Token const& token = tokens[t - begin];
        float o[Tile::kOwned];
        tile.step(token, token.v + (first_slice + s) * kSlice, sums[turn], o);
        turn ^= 1;
        if (tile.writes_output()) {
          bf16* const row = out + t * p.out.stride_token + s * kSlice;
#pragma unroll
          for (int i = 0; i < Tile::kOwned; ++i) row[tile.value_channel(i)] = __float2bfloat16(o[i]);
        }
        if (p.keep == Keep::kEveryInSlot) {
          int64_t const target = slot(p, n, t);
          if (target >= 0) store_state<kStreaming>(tile, p.final_state, target * p.final_state.stride + here);
        }
        if (p.token_states.data != nullptr) {
          store_state<kStreaming>(
              tile, p.token_states,
              span.batch * p.token_states_stride_batch + (span.first + t) * p.token_states.stride + here);
        }
      }
      begin = end;
    } while (begin < length);
    int64_t const target = p.keep == Keep::kLast ? n : p.keep == Keep::kLastInSlot && length > 0 ? slot(p, n, 0) : -1;
    if (target >= 0) store_state<kStreaming>(tile, p.final_state, target * p.final_state.stride + here);
  }
}

template <class State, class Tile, int kSlicesHere, int kCtasPerSm>
cudaError_t launch(DecodeParams const& p, cudaStream_t stream) {
  constexpr int kMost = 65535;  // of the second dimension of a grid
  dim3 const grid(p.value_heads * (kSlices / kSlicesHere), std::min(p.num_seqs, kMost),
                  (p.num_seqs + kMost - 1) / kMost);
  // The kernel may be set up while the one before it in the stream ends; it touches no memory before that has. Slices
  // run in pairs on neighbouring SMs, which read and write halves of the same DRAM pages: half a percent at 64
  // sequences.
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kDecodeThreads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kSlicesHere == 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, decode_kernel<State, Tile, kSlicesHere, kCtasPerSm>, p);
}

// A CTA a head works out once what a token asks for, and a CTA a slice does so four times. Yet few heads need the
// slices to reach every SM, and many heads of an fp32 state stream faster in slices (docs/decode-notes.md). The bits
// are the same.
template <class State, class Tile>
cudaError_t launch(DecodeParams const& p, cudaStream_t stream) {
  constexpr int kWholeHeadCtas = 4;  // of an SM
  constexpr int kFewHeads = 128;
  int64_t const heads = int64_t(p.num_seqs) * p.value_heads;
  bool const resident = heads <= kWholeHeadCtas * sm_count();
  return heads >= kFewHeads && (resident || sizeof(State) == 2)
             ? launch<State, Tile, kSlices, kWholeHeadCtas>(p, stream)
             : launch<State, Tile, 1, 6>(p, stream);
}

}  // namespace

cudaError_t launch_decode(DecodeParams const& p, cudaStream_t stream) {
  if (p.num_seqs == 0 || p.value_heads == 0) return cudaSuccess;
  if (p.initial_state.dtype == Dtype::kFp32) {
    return p.state_v_first ? launch<float, RowTile<float>>(p, stream) : launch<float, ColumnTile<float>>(p, stream);
  }
  return p.state_v_first ? launch<bf16, RowTile<bf16>>(p, stream) : launch<bf16, ColumnTile<bf16>>(p, stream);
}

}  // namespace kda
