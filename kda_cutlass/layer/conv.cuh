// The short causal convolution. A thread owns eight neighbouring channels and walks a run of tokens with the taps'
// inputs in registers, so each input is read once but for the W - 1 tokens before a run.
#pragma once

#include "kda_cutlass/layer/vector.cuh"

namespace kda {

constexpr int kConvThreads = 128;
constexpr int kConvBatch = 4;        // tokens whose loads are in flight together
constexpr int kConvBlocksPerSm = 4;  // 128 registers

// Where a packed sequence begins; wrong contents stay inside [0, T].
__device__ __forceinline__ int bound(ConvParams const& p, int n) {
  int64_t const value = p.cu_seqlens_is_int64 ? static_cast<int64_t const*>(p.cu_seqlens)[n]
                                              : static_cast<int32_t const*>(p.cu_seqlens)[n];
  return static_cast<int>(min(max(value, int64_t(0)), int64_t(p.tokens)));
}

// The sequence that holds a token: the last that begins at or before it. Tokens after the last sequence belong to it.
__device__ __forceinline__ int sequence_of(ConvParams const& p, int token) {
  int low = 0, high = p.num_seqs;
  while (high - low > 1) {
    int const middle = (low + high) / 2;
    (bound(p, middle) <= token ? low : high) = middle;
  }
  return low;
}

// A block's place in a grid of channel blocks (fastest) times something else: one dimension has no limit that matters.
struct ConvBlock {
  int vectors;  // of eight channels, in all
  int vector;   // of this thread; may be past the last
  int rest;     // the other coordinate

  __device__ explicit ConvBlock(ConvParams const& p) {
    vectors = p.parts * p.channels / kVectorChannels;
    int const blocks = (vectors + kConvThreads - 1) / kConvThreads;
    rest = blockIdx.x / blocks;
    vector = (blockIdx.x - rest * blocks) * kConvThreads + threadIdx.x;
  }
};

// Eight channels of one part: where a thread reads and writes.
struct ConvLane {
  bf16 const* x;   // token 0 of the batch entry
  int64_t stride;  // from a token to the next
  int channel;     // of weight, bias and state

  __device__ ConvLane(ConvParams const& p, int vector, int b) {
    int const vectors = p.channels / kVectorChannels, part = vector / vectors;
    ConvInput const& input = part == 0 ? p.x[0] : part == 1 ? p.x[1] : p.x[2];
    int const first = (vector - part * vectors) * kVectorChannels;
    x = static_cast<bf16 const*>(input.data) + b * input.stride_batch + first;
    stride = input.stride_token;
    channel = part * p.channels + first;
  }
};

__device__ __forceinline__ int64_t state_offset(ConvParams const& p, int n, int channel) {
  return (int64_t(n) * p.parts * p.channels + channel) * p.columns;
}

// The inputs `back` = 1, 2, .. tokens before `token` of sequence n, which begins at `start`, into past[back - 1].
template <int kColumns, int kPast>
__device__ __forceinline__ void load_past(ConvParams const& p, ConvLane const& lane, int n, int start, int token,
                                          Channels (&past)[kPast]) {
  float state[kVectorChannels * kColumns] = {};
  int const seen = token - start;  // tokens of the sequence before this one
  if (p.initial_state && seen < kPast) {
    load_floats(p.initial_state, state_offset(p, n, lane.channel), false, state);
#pragma unroll
    for (int i = 0; i + 1 < kPast; ++i) {  // each of them moves the state by a column
      if (i >= seen) break;
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c) {
#pragma unroll
        for (int column = 0; column + 1 < kColumns; ++column) {
          state[c * kColumns + column] = state[c * kColumns + column + 1];
        }
      }
    }
  }
#pragma unroll
  for (int back = 1; back <= kPast; ++back) {
    if (back <= seen) {
      unpack(load_vector(lane.x + (token - back) * lane.stride), past[back - 1]);
    } else {
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c) past[back - 1][c] = state[c * kColumns + kColumns - back];
    }
  }
}

// The state after the last token of sequence n, [start, end): its last inputs, older ones from the state before.
template <int kColumns>
__device__ __forceinline__ void store_state(ConvParams const& p, ConvLane const& lane, int n, int start, int end) {
  Channels past[kColumns];
  load_past<kColumns>(p, lane, n, start, end, past);
  float state[kVectorChannels * kColumns];
#pragma unroll
  for (int back = 1; back <= kColumns; ++back) {
#pragma unroll
    for (int c = 0; c < kVectorChannels; ++c) state[c * kColumns + kColumns - back] = past[back - 1][c];
  }
  store_floats(p.final_state, state_offset(p, n, lane.channel), state);
}

// One block: 1024 channels of a run of tokens of a batch entry. A run that is a whole sequence also leaves the state
// behind, which no other thread reads then; launch_conv says so by `whole`.
template <int kWidth, int kColumns, bool kPacked>
__global__ void __launch_bounds__(kConvThreads, kConvBlocksPerSm)
    conv_kernel(ConvParams const p, int run, int runs, bool whole) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  ConvBlock const block(p);
  if (block.vector >= block.vectors) return;
  int const vector = block.vector, b = block.rest / runs;
  int const first = (block.rest - b * runs) * run, last = min(first + run, p.tokens);
  ConvLane const lane(p, vector, b);

  int sequence = b, start = 0, border = p.tokens;  // border: where the next sequence begins
  if (kPacked) {
    sequence = sequence_of(p, first);
    start = bound(p, sequence);
    border = sequence + 1 < p.num_seqs ? bound(p, sequence + 1) : p.tokens;
  }

  constexpr int kPast = kWidth - 1;
  Channels past[kPast];
  load_past<kColumns>(p, lane, sequence, start, first, past);

  float weight[kVectorChannels * kWidth];  // [channel][tap], the last tap is the present token's
  load_floats(p.weight, int64_t(lane.channel) * kWidth, p.weight_is_fp32, weight);
  Channels bias = {};
  if (p.bias) load_floats(p.bias, lane.channel, p.weight_is_fp32, bias);
  if (whole) store_state<kColumns>(p, lane, sequence, 0, p.tokens);

  int const part = lane.channel / p.channels;
  bf16* out = static_cast<bf16*>(p.out) + ((int64_t(part) * p.batch + b) * p.tokens + first) * p.channels +
              lane.channel - part * p.channels;
  bf16 const* x = lane.x + first * lane.stride;

  for (int t = first; t < last; t += kConvBatch) {
    uint4 packed[kConvBatch];
#pragma unroll
    for (int i = 0; i < kConvBatch; ++i) packed[i] = t + i < last ? load_vector(x + i * lane.stride) : uint4{};
#pragma unroll
    for (int i = 0; i < kConvBatch; ++i) {
      if (kPacked && t + i == border) {
        sequence = sequence_of(p, t + i);
        border = sequence + 1 < p.num_seqs ? bound(p, sequence + 1) : p.tokens;
        load_past<kColumns>(p, lane, sequence, t + i, t + i, past);
      }
      Channels present, y;
      unpack(packed[i], present);
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c) {
        float sum = bias[c];
#pragma unroll
        for (int back = kPast; back > 0; --back) sum += weight[c * kWidth + kPast - back] * past[back - 1][c];
        sum += weight[c * kWidth + kPast] * present[c];
        y[c] = p.silu ? sum * sigmoid(sum) : sum;
#pragma unroll
        for (int back = kPast; back > 1; --back) past[back - 1][c] = past[back - 2][c];
        past[0][c] = present[c];
      }
      if (t + i < last) store_vector(out + int64_t(i) * p.channels, pack(y));
    }
    x += kConvBatch * lane.stride;
    out += int64_t(kConvBatch) * p.channels;
  }
}

// The states of all sequences, after conv_kernel has read those before.
template <int kColumns>
__global__ void __launch_bounds__(kConvThreads) conv_state_kernel(ConvParams const p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  ConvBlock const block(p);
  if (block.vector >= block.vectors) return;
  int const n = block.rest;
  bool const packed = p.cu_seqlens != nullptr;
  ConvLane const lane(p, block.vector, packed ? 0 : n);
  int const start = packed ? bound(p, n) : 0;
  store_state<kColumns>(p, lane, n, start, packed ? max(bound(p, n + 1), start) : p.tokens);
}

}  // namespace kda
