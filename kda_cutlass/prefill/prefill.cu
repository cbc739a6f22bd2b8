// Host side of the prefill: the slabs, the shape-to-schedule choice and the launches.
#include <algorithm>
#include <cstring>

#include <cuda.h>
#include <cuda_runtime.h>

#include "prepare.cuh"
#include "recurrence.cuh"

namespace kda {
namespace {

constexpr int64_t kWorkspaceLimit = int64_t(256) << 20;
constexpr int64_t kMostSlots = 65535;  // of a launch: the second dimension of a grid

struct Schedule {
  int slots;               // of all sequences
  int slab_slots;          // of one launch pair
  int64_t records_bytes;   // of one slab
  int64_t carry_bytes;     // of one carry buffer; two are needed when there is more than one slab
};

int64_t slot_count(int64_t tokens, int batch, int num_seqs, bool packed) {
  return packed ? tokens / kChunk + num_seqs : batch * ((tokens + kChunk - 1) / kChunk);
}

Schedule make_schedule(int64_t slots, int value_heads, int64_t workspace_bytes) {
  int64_t const slot_bytes = int64_t(value_heads) * kRecordBytes;
  int64_t const carry_bytes = int64_t(value_heads) * kHeadDim * kHeadDim * sizeof(float);
  int64_t slab_slots = slots;
  if (slots * slot_bytes > workspace_bytes || slots > kMostSlots) {
    int64_t const most = std::clamp<int64_t>((workspace_bytes - 2 * carry_bytes) / slot_bytes, 1, kMostSlots);
    int64_t const slabs = (slots + most - 1) / most;
    slab_slots = (slots + slabs - 1) / slabs;  // of about equal size
  }
  return {static_cast<int>(slots), static_cast<int>(slab_slots), slab_slots * slot_bytes, carry_bytes};
}

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

// A [B, T, heads, 128] bf16 tensor as boxes of 64 tokens x 64 channels of one head, which land as panels.
cudaError_t encode_boxes(CUtensorMap& map, TensorView const& view, PrefillParams const& p, int heads) {
  auto const encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr int64_t kElement = sizeof(bf16);
  auto stride = [](int64_t elements, int64_t extent) {  // a dimension of one element may have any stride: give it a legal one
    return static_cast<cuuint64_t>((extent > 1 ? elements : kHeadDim) * kElement);
  };
  int64_t const tokens = std::max<int64_t>(p.tokens, 1);
  cuuint64_t const extents[4] = {kHeadDim, cuuint64_t(heads), cuuint64_t(tokens), cuuint64_t(p.batch)};
  cuuint64_t const strides[3] = {stride(view.stride_head, heads), stride(view.stride_token, tokens),
                                 stride(view.stride_batch, p.batch)};
  cuuint32_t const box[4] = {64, 1, kChunk, 1};
  cuuint32_t const element_strides[4] = {1, 1, 1, 1};
  CUresult const result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(view.data), extents, strides, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t bytes) {  // once a kernel and process
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <Gate kGate>
cudaError_t launch_prepare(PrepareParams const& params, int slots, cudaStream_t stream) {
  static cudaError_t const allowed = allow_shared_memory(prepare_kernel<kGate>, sizeof(PrepareSmem));
  if (allowed != cudaSuccess) return allowed;
  dim3 const grid(params.value_heads, slots);  // neighbouring heads of the same tokens together, for DRAM's sake
  prepare_kernel<kGate><<<grid, kPrepareThreads, sizeof(PrepareSmem), stream>>>(params);
  return cudaGetLastError();
}

template <int kWarpgroups>
cudaError_t launch_recurrence(RecurrenceParams const& params, cudaStream_t stream) {
  using Shape = RecurrenceShape<kWarpgroups>;
  constexpr size_t kSmem = sizeof(RecurrenceSmem<kWarpgroups>);
  static_assert(kSmem <= 227 * 1024);
  static cudaError_t const allowed = allow_shared_memory(recurrence_kernel<kWarpgroups>, kSmem);
  if (allowed != cudaSuccess) return allowed;
  int64_t const ctas = int64_t(params.sequences.num_seqs) * params.value_heads * Shape::kSlices;
  recurrence_kernel<kWarpgroups><<<static_cast<unsigned>(ctas), Shape::kThreads, kSmem, stream>>>(params);
  return cudaGetLastError();
}

int sm_count() {
  static int const count = [] {
    int device = 0, sms = 132;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    return sms;
  }();
  return count;
}

}  // namespace

int64_t prefill_workspace_size(int64_t tokens, int batch, int num_seqs, int value_heads, bool packed) {
  int64_t const slots = slot_count(tokens, batch, num_seqs, packed);
  int64_t const slot_bytes = int64_t(value_heads) * kRecordBytes;
  if (slots * slot_bytes <= kWorkspaceLimit) return std::max<int64_t>(slots * slot_bytes, 256);
  int64_t const carry_bytes = int64_t(value_heads) * kHeadDim * kHeadDim * sizeof(float);
  return std::max<int64_t>(1, (kWorkspaceLimit - 2 * carry_bytes) / slot_bytes) * slot_bytes + 2 * carry_bytes;
}

cudaError_t launch_prefill(PrefillParams const& p, cudaStream_t stream) {
  if (p.num_seqs == 0 || p.value_heads == 0) return cudaSuccess;
  int64_t const slots = slot_count(p.tokens, p.batch, p.num_seqs, p.cu_seqlens != nullptr);
  Schedule const schedule = make_schedule(slots, p.value_heads, p.workspace_bytes);
  Sequences const sequences = {p.cu_seqlens, p.cu_seqlens_is_int64, p.num_seqs,
                               static_cast<int>((p.tokens + kChunk - 1) / kChunk), p.tokens};
  char* const workspace = static_cast<char*>(p.workspace);
  float* const carry[2] = {reinterpret_cast<float*>(workspace + schedule.records_bytes),
                           reinterpret_cast<float*>(workspace + schedule.records_bytes + schedule.carry_bytes)};

  PrepareParams prepare = {{}, {}, p.g, p.beta, p.g_dtype == Dtype::kFp32, p.beta_dtype == Dtype::kFp32,
                           p.A_log, p.dt_bias, sequences, {}, p.value_heads, p.value_heads / p.heads, p.scale,
                           p.lower_bound, p.qk_l2norm, p.beta_sigmoid, p.allow_neg_eigval};
  RecurrenceParams recurrence = {{}, sequences, {}, p.value_heads, p.initial_state, p.final_state,
                                 p.initial_state_dtype == Dtype::kFp32, p.final_state_dtype == Dtype::kFp32,
                                 p.state_v_first, static_cast<bf16*>(p.out), p.out_stride_batch, p.out_stride_token,
                                 p.out_stride_head};
  if (cudaError_t const error = encode_boxes(prepare.q_map, p.q, p, p.heads)) return error;
  if (cudaError_t const error = encode_boxes(prepare.k_map, p.k, p, p.heads)) return error;
  if (cudaError_t const error = encode_boxes(recurrence.v_map, p.v, p, p.value_heads)) return error;

  // Two CTAs a head while that leaves no SM without work that one CTA a head would have given it.
  bool const split_values = 2 * int64_t(p.num_seqs) * p.value_heads <= sm_count();
  int index = 0;
  for (int begin = 0; begin < schedule.slots || index == 0; begin += schedule.slab_slots, ++index) {
    Slab const slab = {begin, std::min(begin + schedule.slab_slots, schedule.slots), reinterpret_cast<Record*>(workspace),
                       carry[index & 1], carry[(index + 1) & 1]};
    prepare.slab = recurrence.slab = slab;
    if (slab.end > slab.begin) {
      int const n = slab.end - slab.begin;
      cudaError_t const error = p.gate == Gate::kSoftplus     ? launch_prepare<Gate::kSoftplus>(prepare, n, stream)
                                : p.gate == Gate::kLowerBound ? launch_prepare<Gate::kLowerBound>(prepare, n, stream)
                                                              : launch_prepare<Gate::kGiven>(prepare, n, stream);
      if (error != cudaSuccess) return error;
    }
    cudaError_t const error = split_values ? launch_recurrence<1>(recurrence, stream)
                                           : launch_recurrence<2>(recurrence, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kda
