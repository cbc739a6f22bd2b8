// Host side of the prefill: tensor maps, and the launches of all kernels but the streamed ones (stream.cu).
#include <cuda.h>

#include <algorithm>

#include "fused.cuh"
#include "launch.h"
#include "prepare.cuh"
#include "prove.cuh"
#include "recurrence.cuh"
#include "stream.cuh"

namespace kda {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Fetched at run time, so that the library does not link libcuda.
EncodeTiled encode_tiled() {
  static EncodeTiled const function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &result);
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(symbol) : nullptr;
  }();
  return function;
}

// A [B, T, heads, 128] tensor as boxes of `box_tokens` tokens of one head, which land as `box_panels` panels of 128 bytes
// a token, one after another. Dimensions: channel of a panel, token, panel, head, batch.
cudaError_t encode_boxes(CUtensorMap& map, TensorView const& view, PrefillParams const& p, int heads, int box_tokens,
                         int box_panels, bool fp32 = false) {
  auto const encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  int64_t const element = fp32 ? sizeof(float) : sizeof(bf16), panel = kPanelRowBytes / element;
  auto stride = [&](int64_t elements,
                    int64_t extent) {  // a dimension of one element may have any stride: give it a legal one
    return static_cast<cuuint64_t>((extent > 1 ? elements : kHeadDim) * element);
  };
  int64_t const tokens = std::max<int64_t>(p.tokens, 1);
  cuuint64_t const extents[5] = {cuuint64_t(panel), cuuint64_t(tokens), cuuint64_t(kHeadDim / panel), cuuint64_t(heads),
                                 cuuint64_t(p.batch)};
  cuuint64_t const strides[4] = {stride(view.stride_token, tokens), cuuint64_t(kPanelRowBytes),
                                 stride(view.stride_head, heads), stride(view.stride_batch, p.batch)};
  cuuint32_t const box[5] = {cuuint32_t(panel), cuuint32_t(box_tokens), cuuint32_t(box_panels), 1, 1};
  cuuint32_t const element_strides[5] = {1, 1, 1, 1, 1};
  CUresult const result = encode(&map, fp32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
                                 p.tokens > 0 ? const_cast<void*>(view.data) : p.workspace, extents, strides, box,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool has_fp32_gate(PrefillParams const& p) { return p.g_dtype == Dtype::kFp32; }
template <class F>
cudaError_t for_gate(PrefillParams const& p, F&& f) {
  return for_gate(p.gate, has_fp32_gate(p), f);
}

template <Gate kGate, bool kFp32Gate>
cudaError_t launch_prepare(PrepareParams const& params, Start start, cudaStream_t stream) {
  auto constexpr kKernel = prepare_kernel<kGate, kFp32Gate>;
  if (cudaError_t const error = allow_shared_memory<kKernel>(sizeof(PrepareSmem))) return error;
  // Neighbouring heads together, for DRAM's sake.
  dim3 const grid(params.chunk.value_heads, params.slab.end - params.slab.begin);
  return launch(kKernel, grid, kChunkThreads, sizeof(PrepareSmem), start, params, stream);
}

template <Gate kGate, bool kFp32Gate, Dealing kDealing>
cudaError_t launch_fused(FusedParams const& params, int sms, Start start, cudaStream_t stream) {
  auto constexpr kKernel = fused_kernel<kGate, kFp32Gate, kDealing>;
  if (cudaError_t const error = allow_shared_memory<kKernel>(sizeof(FusedSmem))) return error;
  int64_t const chains = int64_t(params.chunk.sequences.num_seqs) * params.chunk.value_heads;
  dim3 const grid(static_cast<unsigned>(std::min<int64_t>(chains * params.cut.pieces, sms)));
  return launch(kKernel, grid, kFusedThreads, sizeof(FusedSmem), start, params, stream);
}

template <Gate kGate, bool kFp32Gate>
cudaError_t launch_prove(ProveParams const& params, cudaStream_t stream) {
  auto constexpr kKernel = prove_kernel<kGate, kFp32Gate>;
  if (cudaError_t const error = once_a_device([=] { return prefer_shared_memory(kKernel); })) return error;
  dim3 const grid(params.chunk.value_heads, params.chunk.sequences.num_seqs, params.cut.pieces - 1);
  return launch(kKernel, grid, kProofThreads, 0, Start::kAlone, params, stream);
}

template <int kWarpgroups, bool kCheckpoints>
cudaError_t launch_recurrence(RecurrenceParams const& params, cudaStream_t stream) {
  using Shape = RecurrenceShape<kWarpgroups>;
  constexpr size_t kSmem = sizeof(RecurrenceSmem<kWarpgroups>);
  static_assert(kSmem <= 227 * 1024);
  auto constexpr kKernel = recurrence_kernel<kWarpgroups, kCheckpoints>;
  if (cudaError_t const error = allow_shared_memory<kKernel>(kSmem)) return error;
  dim3 const grid(static_cast<unsigned>(int64_t(params.sequences.num_seqs) * params.value_heads * Shape::kSlices));
  return launch(kKernel, grid, Shape::kThreads, kSmem, Start::kOverlap, params, stream);
}

// The checkpoints between chunks (checkpoints.cuh): a prepare and a recurrence over the pieces of as many entries as
// the workspace holds records, whose list lies where the recurrence before kept its carries. The host does not see the
// offsets; where none asks for it the kernels return at once.
cudaError_t launch_pieces(PrefillParams const& p, PrepareParams prepare, RecurrenceParams recurrence,
                          cudaStream_t stream) {
  CheckpointParams const& checkpoints = p.checkpoints;
  int64_t const entries = checkpoints.indptr != nullptr ? checkpoints.columns : p.num_seqs * checkpoints.columns;
  int64_t const list_bytes = 2 * carry_bytes(p.value_heads);
  char* const list = static_cast<char*>(p.workspace) + kFlagBytes;
  Piece* const pieces = reinterpret_cast<Piece*>(list);
  Record* const records = reinterpret_cast<Record*>(list + list_bytes);
  int64_t const most =
      std::min({slot_capacity(p.workspace_bytes, p.value_heads), list_bytes / int64_t(sizeof(Piece)), kMostSlots});
  PiecesParams params = {checkpoints, recurrence.sequences, p.state, pieces};

  StateParams& state = recurrence.values.state = {};
  state.initial = state.final = checkpoints.states;
  state.v_first = p.state.v_first;
  state.slots = {&pieces->slot, sizeof(Piece) / sizeof(int), 0, false};
  state.num_slots = checkpoints.num_slots;
  state.final_in_slots = true;
  recurrence.checkpoints = {};
  recurrence.values.out = {};
  for (params.begin = 0; params.begin < entries; params.begin = params.end) {
    params.end = std::min(params.begin + most, entries);
    int const count = static_cast<int>(params.end - params.begin);
    if (checkpoints.indptr != nullptr)  // which may pass over some
      if (cudaError_t const error = cudaMemsetAsync(pieces, 0, count * sizeof(Piece), stream)) return error;
    if (cudaError_t const error = launch(list_pieces_kernel, dim3(p.num_seqs), 32, 0, Start::kAlone, params, stream))
      return error;
    recurrence.sequences = {nullptr, false, count, 1, p.tokens, pieces};
    prepare.chunk.sequences = recurrence.sequences;
    prepare.slab = recurrence.slab = {0, count, records, nullptr, nullptr};
    cudaError_t error = for_gate(p, [&](auto gate, auto fp32) {
      return launch_prepare<decltype(gate)::value, decltype(fp32)::value>(prepare, Start::kAlone, stream);
    });
    if (error != cudaSuccess) return error;
    bool const split_values = 2 * count * int64_t(p.value_heads) <= sm_count();
    error = (split_values ? launch_recurrence<1, false> : launch_recurrence<2, false>)(recurrence, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t prefill_workspace_size(int64_t tokens, int batch, int num_seqs, int value_heads, bool packed) {
  return workspace_size({tokens, batch, num_seqs, value_heads, packed, false, false});
}

int64_t prefill_workspace_needed(int64_t tokens, int batch, int num_seqs, int value_heads, bool packed,
                                 bool checkpoints, bool batch_invariant, int sms) {
  if (num_seqs == 0 || value_heads == 0) return 0;
  CallShape const call = {tokens, batch, num_seqs, value_heads, packed, checkpoints, batch_invariant};
  if (sms <= 0) sms = sm_count();
  return needed_workspace(call, choose_schedules(call, sms), sms);
}

cudaError_t launch_prefill(PrefillParams const& p, Schedules const& schedules, cudaStream_t stream) {
  if (p.num_seqs == 0 || p.value_heads == 0) return cudaSuccess;
  CallShape const shape = call_shape(p);
  int const sms = sm_count();
  Slabs const slabs = make_slabs(shape, p.workspace_bytes, sms);
  Sequences const sequences = {p.cu_seqlens, p.cu_seqlens_is_int64, p.num_seqs,
                               static_cast<int>((p.tokens + kChunk - 1) / kChunk), p.tokens};
  char* const carries = static_cast<char*>(p.workspace) + kFlagBytes;
  char* const records = carries + 2 * slabs.carry_bytes;
  auto carry = [&](int index) { return reinterpret_cast<float*>(carries + (index & 1) * slabs.carry_bytes); };

  ChunkParams chunk = {{},
                       {},
                       {},
                       p.beta,
                       p.beta_dtype == Dtype::kFp32,
                       p.A_log,
                       p.dt_bias,
                       sequences,
                       p.value_heads,
                       p.value_heads / p.heads,
                       p.scale,
                       p.lower_bound,
                       p.qk_l2norm,
                       p.beta_sigmoid,
                       p.allow_neg_eigval};
  OutputParams const out = {static_cast<bf16*>(p.out), p.out_stride_batch, p.out_stride_token, p.out_stride_head};
  ValueParams values = {{}, {}, p.state, out, static_cast<int>(std::max<int64_t>(p.tokens, 1))};
  if (cudaError_t const error = encode_boxes(chunk.q_map, p.q, p, p.heads, kChunk, 2)) return error;
  if (cudaError_t const error = encode_boxes(chunk.k_map, p.k, p, p.heads, kChunk, 2)) return error;
  bool const fp32_gate = has_fp32_gate(p);
  if (cudaError_t const error = encode_boxes(chunk.g_map, p.g, p, p.value_heads, kChunk, fp32_gate ? 4 : 2, fp32_gate))
    return error;
  if (cudaError_t const error = encode_boxes(values.map, p.v, p, p.value_heads, kChunk, 1)) return error;
  if (cudaError_t const error = encode_boxes(values.token_map, p.v, p, p.value_heads, 1, 1)) return error;

  int* const flags = static_cast<int*>(p.workspace);
  auto* const ring_flags = reinterpret_cast<RingFlags*>(carries);
  static_assert(sizeof(RingFlags) <= 2 * kHeadDim * kHeadDim * sizeof(float), "they lie where carries would");
  Walkers const& chosen = schedules.walkers;
  bool const segments = chosen.segments.count > 1;
  int const slots = chosen.count > 0 ? ring_slots(shape, chosen, p.workspace_bytes) : 0;
  int const walkers = slots >= kLeastRingSlots ? chosen.count : 0;
  bool const others = schedules.split || chosen.count > 0;
  // Not where states are updated in place: a CTA would read what another writes.
  bool const in_place = p.state.initial.data != nullptr && p.state.initial.data == p.state.final.data;
  bool const cuts = schedules.cut.pieces > 1 && !in_place && !p.batch_invariant;
  Cut const cut = cuts ? schedules.cut : Cut{};
  bool const fused = schedules.fused || cuts;
  bool const shared = !cuts && shares(shape, sms) && p.workspace_bytes >= kFlagBytes + sms * carry_bytes(1);
  Dealing const dealing = cuts ? Dealing::kCut : shared ? Dealing::kShared : Dealing::kWhole;
  int* const taken = fused && others ? flags : nullptr;
  int* const dealt = schedules.fused && p.cu_seqlens != nullptr && p.num_seqs > 1 ? flags + 1 : nullptr;
  Forgotten forgotten = {nullptr, 0};
  if (cuts) {
    forgotten = {static_cast<uint8_t*>(p.workspace) + kForgottenBytes, p.num_seqs * p.value_heads * (cut.pieces - 1)};
    ProveParams const prove = {chunk, p.k, p.g, p.state, cut, forgotten};
    cudaError_t const error = for_gate(p, [&](auto gate, auto fp32) {
      return launch_prove<decltype(gate)::value, decltype(fp32)::value>(prove, stream);
    });
    if (error != cudaSuccess) return error;
  }
  if (fused) {
    int* const handed_over = static_cast<int*>(p.workspace) + kForgottenBytes / sizeof(int);
    // What the kernel counts with is cleared by one that it starts beside; but where two kernels stand behind it, by no
    // kernel, so that a call has three at most.
    bool const clears = dealt != nullptr || shared, beside = clears && (!others || walkers > 0);
    if (clears) {
      int* const first = dealt != nullptr ? dealt : handed_over;
      ClearParams const clear = {first, static_cast<int>((shared ? handed_over + sms : dealt + 1) - first)};
      cudaError_t const error = beside ? launch(clear_kernel, dim3(1), kFusedThreads, 0, Start::kAlone, clear, stream)
                                       : cudaMemsetAsync(clear.words, 0, clear.count * sizeof(int), stream);
      if (error != cudaSuccess) return error;
    }
    FusedParams const params = {chunk,
                                values,
                                taken,
                                sms,
                                walkers,
                                chosen.step,
                                ring_flags,
                                dealt,
                                cut,
                                forgotten,
                                {handed_over, reinterpret_cast<float*>(carries)}};
    cudaError_t const error = for_gate(p, [&](auto gate, auto fp32) {
      auto constexpr kGate = decltype(gate)::value;
      auto constexpr kFp32 = decltype(fp32)::value;
      auto* const launch_it = dealing == Dealing::kCut      ? launch_fused<kGate, kFp32, Dealing::kCut>
                              : dealing == Dealing::kShared ? launch_fused<kGate, kFp32, Dealing::kShared>
                                                            : launch_fused<kGate, kFp32, Dealing::kWhole>;
      return launch_it(params, sms, cuts || beside ? Start::kOverlap : Start::kAlone, stream);
    });
    if (error != cudaSuccess || !others) return error;
  }

  if (walkers > 0) {
    SegmentParams left = {chosen.segments, nullptr, nullptr, nullptr, {}};
    if (segments) {
      left.states = reinterpret_cast<float*>(records);
      left.maps = left.states + walkers * kStateElements;
      left.map_outputs = reinterpret_cast<bf16*>(left.maps + (walkers - chosen.first()) * kStateElements);
      TensorView const view = {p.out, p.out_stride_batch, p.out_stride_token, p.out_stride_head};
      if (cudaError_t const error = encode_boxes(left.out_map, view, p, p.value_heads, kChunk, 1)) return error;
    }
    StreamParams const params = {taken,
                                 chunk,
                                 values,
                                 left,
                                 {reinterpret_cast<Record*>(records + segments_bytes(chosen)), ring_flags, walkers,
                                  slots, chosen.first(), chosen.slices},
                                 {walkers, p.value_heads, sms - chosen.ctas()}};
    cudaError_t const error = launch_stream(p.gate, fp32_gate, params, sms, stream);
    // The process may have been given fewer SMs than the device has.
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
    cudaGetLastError();
  }

  PrepareParams prepare = {chunk, {}, taken};
  RecurrenceParams recurrence = {values, sequences, {}, taken, p.value_heads, p.checkpoints};
  int index = 0;
  for (int begin = 0; begin < slabs.slots || index == 0; begin += slabs.slab_slots, ++index) {
    Slab const slab = {begin, std::min(begin + slabs.slab_slots, slabs.slots),
                       reinterpret_cast<Record*>(records + index % slabs.buffers * slabs.records_bytes), carry(index),
                       carry(index + 1)};
    prepare.slab = recurrence.slab = slab;
    bool const overlaps = index > 0 ? slabs.buffers == 2 : cuts;
    Start const start = overlaps ? Start::kOverlap : Start::kAlone;
    if (slab.end > slab.begin) {
      cudaError_t const error = for_gate(p, [&](auto gate, auto fp32) {
        return launch_prepare<decltype(gate)::value, decltype(fp32)::value>(prepare, start, stream);
      });
      if (error != cudaSuccess) return error;
    }
    auto* const launch_it = slabs.split_values
                                ? shape.checkpoints ? launch_recurrence<1, true> : launch_recurrence<1, false>
                            : shape.checkpoints ? launch_recurrence<2, true>
                                                : launch_recurrence<2, false>;
    cudaError_t const error = launch_it(recurrence, stream);
    if (error != cudaSuccess) return error;
  }
  bool const between = shape.checkpoints && p.checkpoints.multiple < kChunk;
  return between ? launch_pieces(p, prepare, recurrence, stream) : cudaSuccess;
}

}  // namespace kda
