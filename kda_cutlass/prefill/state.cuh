// The state of 64 value channels, transposed, in the registers of a warpgroup: value channels are the rows of every
// accumulator, so that state, W and V' become left operands of the next WGMMA without a trip through shared memory.
#pragma once

#include <cuda.h>

#include "record.cuh"

namespace kda {

constexpr int kValueTile = 64;  // value channels of a warpgroup
constexpr int64_t kStateElements = kHeadDim * kHeadDim;

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
// By one address and constant offsets: half the instructions, but registers that not every kernel has.
template <class T>
__device__ __forceinline__ void load_state_by_offsets(float (&s)[64], T const* state, bool v_first, int value,
                                                      int lane) {
  auto load = [&](int v_stride, int key_stride) {
    T const* const own = state + value * v_stride + 2 * (lane & 3) * key_stride;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[4 * j + e] = static_cast<float>(own[(e / 2 * 8) * v_stride + (8 * j + e % 2) * key_stride]);
  };
  if (v_first)
    load(kHeadDim, 1);
  else
    load(1, kHeadDim);
}
template <class T>
__device__ __forceinline__ void store_state(float const (&s)[64], T* state, bool v_first, int value, int lane) {
  auto store = [&](int v_stride, int key_stride) {  // called with constants, so that one address serves all elements
    T* const own = state + value * v_stride + 2 * (lane & 3) * key_stride;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        own[(e / 2 * 8) * v_stride + (8 * j + e % 2) * key_stride] = static_cast<T>(s[4 * j + e]);
  };
  if (v_first)
    store(kHeadDim, 1);
  else
    store(1, kHeadDim);
}

// An accumulator is, pair by pair, the register layout of a left operand.
template <int kCount>
__device__ __forceinline__ void pack_operand(uint32_t (&packed)[kCount / 2], float const (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i] = pack_bf16(acc[2 * i], acc[2 * i + 1]);
}

// The state in which a sequence starts and, in slots, ends; -1 for a padding sequence, which has none.
__device__ __forceinline__ int64_t state_slot(StateParams const& p, int seq) {
  if (p.slots.data == nullptr) return seq;
  int64_t const slot = load_index(p.slots.data, seq * p.slots.stride_row, p.slots.is_int64);
  return slot >= p.min_slot && slot < p.num_slots ? slot : -1;
}
// Tokens that are to be computed: a padding sequence has none.
__device__ __forceinline__ int64_t live_length(Sequences const& sequences, StateParams const& p, int seq) {
  return state_slot(p, seq) < 0 ? 0 : sequences.length(seq);
}
// Elements from the first state to that of a sequence and head; -1 where it starts from zero or leaves nothing.
__device__ __forceinline__ int64_t initial_offset(StateParams const& p, int seq, int head) {
  int64_t const slot = state_slot(p, seq);
  bool const none = slot < 0 || (p.has_initial != nullptr && !p.has_initial[seq * p.has_initial_stride]);
  return none ? -1 : slot * p.initial.stride + head * kHeadDim * kHeadDim;
}
__device__ __forceinline__ int64_t final_offset(StateParams const& p, int seq, int head) {
  int64_t const slot = p.final_in_slots ? state_slot(p, seq) : seq;
  return slot < 0 ? -1 : slot * p.final.stride + head * kHeadDim * kHeadDim;
}

// An element of the state that starts at initial_offset().
__device__ __forceinline__ float initial_element(StateParams const& p, int64_t offset, int element) {
  if (p.initial.data == nullptr || offset < 0) return 0.f;
  return p.initial.dtype == Dtype::kFp32
             ? static_cast<float const*>(p.initial.data)[offset + element]
             : static_cast<float>(static_cast<bf16 const*>(p.initial.data)[offset + element]);
}

// Of a sequence without tokens, by `threads` threads: its state, [K, V] or [V, K], goes from where it starts to where
// it ends.
__device__ __forceinline__ void keep_state(StateParams const& p, int seq, int head, int thread, int threads) {
  int64_t const from = initial_offset(p, seq, head), to = final_offset(p, seq, head);
  if (p.final.data == nullptr || to < 0) return;
  for (int i = thread; i < kHeadDim * kHeadDim; i += threads) {
    float const x = initial_element(p, from, i);
    if (p.final.dtype == Dtype::kFp32)
      static_cast<float*>(p.final.data)[to + i] = x;
    else
      static_cast<bf16*>(p.final.data)[to + i] = static_cast<bf16>(x);
  }
}

// By a warp: the values of a chunk, 64 channels of one head, as a panel [token, value channel]. `map` gives boxes of one
// panel of 64 tokens, `token_map` of one token.
template <class Tokens>
__device__ __forceinline__ void request_values(CUtensorMap const& map, CUtensorMap const& token_map, int tensor_tokens,
                                               uint64_t* full, char* values, int token, Tokens tokens, int panel,
                                               int head, int batch, int lane) {
  if (tokens >= kChunk) {
    if (lane == 0) cute::SM90_TMA_LOAD_5D::copy(&map, full, kStreamed, values, 0, token, panel, head, batch);
  } else {
    // A partial chunk token by token: behind its end lie another sequence's values, so those rows are read past the end
    // of the tensor, which gives zeros.
    for (int row = lane; row < kChunk; row += 32)
      cute::SM90_TMA_LOAD_5D::copy(&token_map, full, kStreamed, values + row * kPanelRowBytes, 0,
                                   row < tokens ? token + row : tensor_tokens, panel, head, batch);
  }
}

struct OutputParams {
  bf16* data;
  int64_t stride_batch, stride_token, stride_head;

  // By `threads` threads: the outputs of a padding sequence.
  __device__ __forceinline__ void store_zeros(Sequences const& sequences, int seq, int head, int thread,
                                              int threads) const {
    constexpr int kUnits = kHeadDim / 8;  // of 16 bytes a token
    bf16* const rows =
        data + stride_batch * sequences.batch(seq) + stride_token * sequences.first_token(seq) + stride_head * head;
    int64_t const length = sequences.length(seq);
#pragma unroll 1
    for (int64_t token = thread / kUnits; token < length; token += threads / kUnits)
      *reinterpret_cast<uint4*>(rows + stride_token * token + 8 * (thread % kUnits)) = make_uint4(0, 0, 0, 0);
  }
};

// What a kernel that carries states is told of them, and of the values that come in and the outputs that leave.
struct ValueParams {
  CUtensorMap map;        // of the values: boxes of one panel of 64 tokens of one head
  CUtensorMap token_map;  // the same of one token
  StateParams state;
  OutputParams out;
  int tensor_tokens;  // T
};

// What a thread knows of where its part of the state and of a [token, value channel] panel lies.
struct StateLanes {
  int lane, value;      // value channel of the lane's first accumulator row
  uint32_t own_offset;  // of the first of the four 8 x 8 x 4 pieces of a warp's 64 tokens x 16 channels in a panel
  static constexpr int kPieceBytes = 16 * kPanelRowBytes;

  __device__ __forceinline__ StateLanes(int first_value, int warp, int lane)
      : lane(lane), value(first_value + 16 * warp + (lane >> 2)) {
    int const matrix = lane >> 3;
    own_offset = panel_offset(8 * (matrix >> 1) + (lane & 7), 2 * warp + (matrix & 1));
  }

  template <bool kByOffsets = false>
  __device__ __forceinline__ void load_initial(float (&s)[64], StateParams const& p, int64_t offset) const {
    load<kByOffsets>(s, p.initial, p.v_first, offset);
  }
  template <bool kByOffsets = false>
  __device__ __forceinline__ void load(float (&s)[64], StateView const& view, bool v_first, int64_t offset) const {
    auto const from = [&](auto const* state) {
      if constexpr (kByOffsets)
        load_state_by_offsets(s, state + offset, v_first, value, lane);
      else
        load_state(s, state + offset, v_first, value, lane);
    };
    if (view.data == nullptr || offset < 0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = 0.f;
    } else if (view.dtype == Dtype::kFp32) {
      from(static_cast<float const*>(view.data));
    } else {
      from(static_cast<bf16 const*>(view.data));
    }
  }
  __device__ __forceinline__ void store_final(float const (&s)[64], StateParams const& p, int64_t offset) const {
    store(s, p.final, p.v_first, offset);
  }
  __device__ __forceinline__ void store(float const (&s)[64], StateView const& view, bool v_first,
                                        int64_t offset) const {
    if (view.data == nullptr || offset < 0) return;
    if (view.dtype == Dtype::kFp32)
      store_state(s, static_cast<float*>(view.data) + offset, v_first, value, lane);
    else
      store_state(s, static_cast<bf16*>(view.data) + offset, v_first, value, lane);
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
  __device__ __forceinline__ void set_identity(float (&s)[64]) const {
    for_each_state_pair(lane, [&](int e, int dv, int key) {
      s[e] = value + dv == key ? 1.f : 0.f;
      s[e + 1] = value + dv == key + 1 ? 1.f : 0.f;
    });
  }
  // beta V^T, as accumulator.
  __device__ __forceinline__ void seed_with_values(float (&w)[32], char const* v_panel, float const* betas) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, v_panel + own_offset + j * kPieceBytes);
      float4 const beta = *reinterpret_cast<float4 const*>(&betas[16 * j + 4 * (lane & 3)]);
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
      stmatrix_x4_trans(panel + own_offset + (kFirst + j) * kPieceBytes, o[4 * j], o[4 * j + 1], o[4 * j + 2],
                        o[4 * j + 3]);
  }
};

}  // namespace kda
