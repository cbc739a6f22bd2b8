// The torch binding on the stable ABI: operators -> kda::PrefillParams, kda::DecodeParams.
//
// flash_kda.contract has already told the user what is wrong with the arguments, in his words. The checks here are the
// last line: whatever passes them cannot make a kernel read or write outside a tensor, whoever called the operator.
// The contents of cu_seqlens are on the device; the kernels clamp them.

#include "torch_binding.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <climits>
#include <cmath>

#include "kda_cutlass/decode/params.h"
#include "kda_cutlass/prefill/params.h"
#include "registration.h"

// The CPU wheel's header hides this function behind USE_CUDA; the CUDA torch that loads the library has it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;            // bytes: TMA's for base addresses and strides
constexpr int64_t kWorkspaceAlignment = 256;  // bytes: what the caching allocator gives

void check_alignment(const Tensor& tensor, int64_t alignment, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0, name,
                  " must start at a multiple of ", alignment, " bytes");
}

void check_device(const Tensor& tensor, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == q.get_device_index(), name,
                  " must be on the CUDA device of q");
}

void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(),
                  " dimensions, got ", tensor.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ",
                    tensor.size(dim));
    ++dim;
  }
}

kda::Dtype check_dtype(const Tensor& tensor, bool allow_fp32, bool allow_bf16, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  if (allow_bf16 && dtype == ScalarType::BFloat16) return kda::Dtype::kBf16;
  STD_TORCH_CHECK(allow_fp32 && dtype == ScalarType::Float, name, " must be ", allow_bf16 ? "bfloat16" : "",
                  allow_bf16 && allow_fp32 ? " or " : "", allow_fp32 ? "float32" : "");
  return kda::Dtype::kFp32;
}

// Nothing steps along a dimension of size 1, so torch leaves its stride to chance; TMA still wants an aligned one.
int64_t stride(const Tensor& tensor, int64_t dim) { return tensor.size(dim) <= 1 ? kda::kHeadDim : tensor.stride(dim); }

// A [B, T, heads, 128] tensor that TMA can read or write in place.
kda::TensorView rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.stride(3) == 1, "the last dimension of ", name, " must be contiguous");
  check_alignment(tensor, kAlignment, name);
  for (int64_t dim = 0; dim < 3; ++dim) {
    const int64_t bytes = stride(tensor, dim) * static_cast<int64_t>(tensor.element_size());
    STD_TORCH_CHECK(bytes > 0 && bytes % kAlignment == 0, name, "'s stride in dimension ", dim,
                    " must be a positive multiple of ", kAlignment, " bytes, got ", bytes);
  }
  return {tensor.data_ptr(), stride(tensor, 0), stride(tensor, 1), stride(tensor, 2)};
}

const void* contiguous(const Tensor& tensor, const Tensor& q, const char* name) {
  check_device(tensor, q, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return tensor.data_ptr();
}

// States [count, HV, 128, 128] or, with `lead` = 2, [B, T, HV, 128, 128]: dense but for the leading strides.
kda::StateView states(const Tensor& tensor, const Tensor& q, int64_t lead, int64_t HV, const char* name) {
  constexpr int64_t D = kda::kHeadDim;
  check_device(tensor, q, name);
  STD_TORCH_CHECK(
      tensor.dim() == lead + 3 && tensor.size(lead) == HV && tensor.size(lead + 1) == D && tensor.size(lead + 2) == D,
      name, " must end in [HV, 128, 128]");
  STD_TORCH_CHECK(
      (HV == 1 || tensor.stride(lead) == D * D) && tensor.stride(lead + 1) == D && tensor.stride(lead + 2) == 1, name,
      " must be dense in its last three dimensions");
  return {tensor.data_ptr(), tensor.stride(lead - 1), check_dtype(tensor, true, true, name)};
}

kda::IndexView indices(const Tensor& tensor, const Tensor& q, int64_t N, int64_t most_dims, const char* name) {
  check_device(tensor, q, name);
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name, " must be int32 or int64");
  STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.dim() <= most_dims && tensor.size(0) == N, name, " must have N = ", N,
                  " rows");
  return {tensor.data_ptr(), tensor.stride(0), tensor.dim() == 2 ? tensor.stride(1) : 0, dtype == ScalarType::Long};
}

int narrow(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT_MAX, name, " = ", value, " is more than the kernels count");
  return static_cast<int>(value);
}

}  // namespace

int64_t prefill_workspace_size(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                               bool packed) {
  return kda::prefill_workspace_size(tokens_per_batch, narrow(batch, "B"), narrow(num_seqs, "N"),
                                     narrow(value_heads, "HV"), packed);
}

int64_t prefill_workspace_needed(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                                 bool packed, bool checkpoints, int64_t sms) {
  return kda::prefill_workspace_needed(tokens_per_batch, narrow(batch, "B"), narrow(num_seqs, "N"),
                                       narrow(value_heads, "HV"), packed, checkpoints, narrow(sms, "sms"));
}

void prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
             const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
             const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, Tensor& out,
             const std::optional<Tensor>& final_state, Tensor& workspace, double scale,
             std::optional<double> lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel,
             bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first,
             const std::optional<Tensor>& ssm_state_indices, const std::optional<Tensor>& has_initial_state,
             bool final_state_in_slots, int64_t min_state_index, const std::optional<Tensor>& checkpoint_state,
             const std::optional<Tensor>& checkpoint_offsets, const std::optional<Tensor>& checkpoint_indices,
             const std::optional<Tensor>& checkpoint_indptr, int64_t checkpoint_multiple, bool batch_invariant) {
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4 && v.dim() == 4, "prefill: q and v must be CUDA tensors of 4 dimensions");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), HV = v.size(2), D = kda::kHeadDim;
  STD_TORCH_CHECK(H > 0 && HV > 0 && HV % H == 0, "prefill: HV = ", HV, " must be a positive multiple of H = ", H);

  kda::PrefillParams params;
  check_shape(q, {B, T, H, D}, "q");
  check_shape(k, {B, T, H, D}, "k");
  check_shape(v, {B, T, HV, D}, "v");
  check_shape(g, {B, T, HV, D}, "g");
  check_shape(beta, {B, T, HV}, "beta");
  check_shape(out, {B, T, HV, D}, "out");
  for (const auto& [tensor, name] : {std::pair{&k, "k"}, {&v, "v"}, {&g, "g"}, {&beta, "beta"}, {&out, "out"}}) {
    check_device(*tensor, q, name);
  }
  for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}, {&out, "out"}}) {
    check_dtype(*tensor, false, true, name);
  }
  params.g_dtype = check_dtype(g, true, true, "g");
  params.beta_dtype = check_dtype(beta, true, true, "beta");
  params.q = rows(q, "q");
  params.k = rows(k, "k");
  params.v = rows(v, "v");
  params.g = rows(g, "g");
  params.beta = {beta.data_ptr(), beta.stride(0), beta.stride(1), beta.stride(2)};
  const kda::TensorView out_rows = rows(out, "out");
  params.out = out.data_ptr();
  params.out_stride_batch = out_rows.stride_batch;
  params.out_stride_token = out_rows.stride_token;
  params.out_stride_head = out_rows.stride_head;

  const bool packed = cu_seqlens.has_value();
  int64_t N = B;
  if (packed) {
    STD_TORCH_CHECK(B == 1, "prefill: B must be 1 with cu_seqlens, got ", B);
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1, "prefill: cu_seqlens must be [N + 1]");
    const ScalarType dtype = cu_seqlens->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
                    "prefill: cu_seqlens must be int32 or int64");
    params.cu_seqlens = contiguous(*cu_seqlens, q, "cu_seqlens");
    params.cu_seqlens_is_int64 = dtype == ScalarType::Long;
    N = cu_seqlens->numel() - 1;
  }

  if (use_gate_in_kernel) {
    params.gate = lower_bound ? kda::Gate::kLowerBound : kda::Gate::kSoftplus;
    params.lower_bound = static_cast<float>(lower_bound.value_or(0.0));
    STD_TORCH_CHECK(A_log || lower_bound, "prefill: the softplus gate needs A_log");
    if (A_log) {
      check_shape(*A_log, {HV}, "A_log");
      check_dtype(*A_log, true, false, "A_log");
      params.A_log = static_cast<const float*>(contiguous(*A_log, q, "A_log"));
    }
    if (dt_bias) {
      check_shape(*dt_bias, {HV, D}, "dt_bias");
      check_dtype(*dt_bias, true, false, "dt_bias");
      check_alignment(*dt_bias, kAlignment, "dt_bias");
      params.dt_bias = static_cast<const float*>(contiguous(*dt_bias, q, "dt_bias"));
    }
  }

  kda::StateParams& state = params.state;
  state.v_first = state_v_first;
  state.num_slots = INT64_MAX;  // of the smaller pool, where both are one
  STD_TORCH_CHECK(min_state_index >= 0, "prefill: min_state_index must not be negative");
  if (ssm_state_indices) {
    state.slots = indices(*ssm_state_indices, q, N, 1, "ssm_state_indices");
    state.min_slot = min_state_index;
  }
  STD_TORCH_CHECK(ssm_state_indices || !final_state_in_slots, "prefill: final_state_in_slots needs ssm_state_indices");
  state.final_in_slots = final_state_in_slots;
  auto place = [&](const Tensor& tensor, bool in_slots, const char* name) {
    STD_TORCH_CHECK(in_slots || tensor.size(0) == N, "prefill: ", name, " must hold N = ", N, " states");
    if (in_slots && tensor.size(0) < state.num_slots) state.num_slots = tensor.size(0);
    return states(tensor, q, 1, HV, name);
  };
  if (initial_state) state.initial = place(*initial_state, ssm_state_indices.has_value(), "initial_state");
  if (final_state) state.final = place(*final_state, final_state_in_slots, "final_state");
  if (has_initial_state) {
    check_device(*has_initial_state, q, "has_initial_state");
    check_shape(*has_initial_state, {N}, "has_initial_state");
    STD_TORCH_CHECK(has_initial_state->scalar_type() == ScalarType::Bool, "prefill: has_initial_state must be bool");
    state.has_initial = static_cast<const bool*>(has_initial_state->data_ptr());
    state.has_initial_stride = has_initial_state->stride(0);
  }

  if (checkpoint_state) {
    kda::CheckpointParams& checkpoints = params.checkpoints;
    checkpoints.states = states(*checkpoint_state, q, 1, HV, "checkpoint_state");
    checkpoints.num_slots = checkpoint_state->size(0);
    STD_TORCH_CHECK(checkpoint_offsets, "prefill: checkpoint_state needs checkpoint_offsets");
    STD_TORCH_CHECK(checkpoint_multiple == 16 || checkpoint_multiple == kda::kChunk,
                    "prefill: checkpoint_multiple must be 16 or 64, got ", checkpoint_multiple);
    checkpoints.multiple = static_cast<int>(checkpoint_multiple);
    const int64_t rows = checkpoint_indptr ? checkpoint_offsets->size(0) : N;
    const int64_t most_dims = checkpoint_indptr ? 1 : 2;
    auto entries = [&](const Tensor& tensor, const char* name) {
      kda::IndexView view = indices(tensor, q, rows, most_dims, name);
      if (checkpoint_indptr) view.stride_column = view.stride_row;  // one row
      return view;
    };
    checkpoints.offsets = entries(*checkpoint_offsets, "checkpoint_offsets");
    checkpoints.columns = checkpoint_indptr ? rows : checkpoint_offsets->dim() == 2 ? checkpoint_offsets->size(1) : 1;
    if (checkpoint_indices) {
      checkpoints.slots = entries(*checkpoint_indices, "checkpoint_indices");
      STD_TORCH_CHECK(checkpoint_indices->dim() == checkpoint_offsets->dim() &&
                          checkpoint_indices->numel() == checkpoint_offsets->numel(),
                      "prefill: checkpoint_indices must have the shape of checkpoint_offsets");
      checkpoints.min_slot = min_state_index;
    }
    if (checkpoint_indptr) {
      checkpoints.indptr_is_int64 = indices(*checkpoint_indptr, q, N + 1, 1, "checkpoint_indptr").is_int64;
      checkpoints.indptr = contiguous(*checkpoint_indptr, q, "checkpoint_indptr");
    }
  }

  params.batch = narrow(B, "B");
  params.tokens = narrow(T, "T");  // TMA coordinates
  params.num_seqs = narrow(N, "N");
  params.heads = narrow(H, "H");
  params.value_heads = narrow(HV, "HV");
  narrow(2 * N * HV, "2 * N * HV");  // CTAs of the recurrence
  params.scale = static_cast<float>(scale);
  params.qk_l2norm = use_qk_l2norm_in_kernel;
  params.beta_sigmoid = use_beta_sigmoid_in_kernel;
  params.allow_neg_eigval = allow_neg_eigval;
  params.batch_invariant = batch_invariant;

  contiguous(workspace, q, "workspace");
  check_alignment(workspace, kWorkspaceAlignment, "workspace");
  params.workspace = workspace.data_ptr();
  params.workspace_bytes = workspace.numel();

  if (N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t wanted = kda::prefill_workspace_needed(T, params.batch, params.num_seqs, params.value_heads, packed,
                                                       checkpoint_state.has_value(), 0);
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.numel() >= wanted,
                  "prefill: workspace must be ", wanted, " bytes of uint8, got ", workspace.numel());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const cudaError_t error = kda::launch_prefill(params, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "prefill: ", cudaGetErrorString(error));
}

namespace {

// The decode kernel reads four channels of a token at a time.
kda::TensorView decode_rows(const Tensor& tensor, const char* name) {
  const int64_t alignment = 4 * static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(tensor.stride(3) == 1, "decode: the last dimension of ", name, " must be contiguous");
  check_alignment(tensor, alignment, name);
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(stride(tensor, dim) % 4 == 0, name, "'s stride in dimension ", dim,
                    " must be a multiple of 4 elements, got ", stride(tensor, dim));
  }
  return {tensor.data_ptr(), stride(tensor, 0), stride(tensor, 1), stride(tensor, 2)};
}

// The same where the decode kernel moves them, in pieces of 16 bytes.
kda::StateView decode_states(const Tensor& tensor, const Tensor& q, int64_t lead, int64_t HV, const char* name) {
  const kda::StateView view = states(tensor, q, lead, HV, name);
  check_alignment(tensor, kAlignment, name);
  for (int64_t dim = 0; dim < lead; ++dim) {
    STD_TORCH_CHECK(
        tensor.size(dim) <= 1 || tensor.stride(dim) * static_cast<int64_t>(tensor.element_size()) % kAlignment == 0,
        name, "'s stride in dimension ", dim, " must be a multiple of ", kAlignment, " bytes");
  }
  return view;
}

}  // namespace

void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
            const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
            const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
            const std::optional<Tensor>& ssm_state_indices, const std::optional<Tensor>& num_accepted_tokens,
            Tensor& out, const std::optional<Tensor>& final_state, const std::optional<Tensor>& token_states,
            double scale, std::optional<double> lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel,
            bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first, bool inplace_final_state,
            int64_t min_state_index) {
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4 && v.dim() == 4, "decode: q and v must be CUDA tensors of 4 dimensions");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), HV = v.size(2), D = kda::kHeadDim;
  STD_TORCH_CHECK(H > 0 && HV > 0 && HV % H == 0, "decode: HV = ", HV, " must be a positive multiple of H = ", H);

  kda::DecodeParams params;
  check_shape(q, {B, T, H, D}, "q");
  check_shape(k, {B, T, H, D}, "k");
  check_shape(v, {B, T, HV, D}, "v");
  check_shape(g, {B, T, HV, D}, "g");
  check_shape(beta, {B, T, HV}, "beta");
  check_shape(out, {B, T, HV, D}, "out");
  for (const auto& [tensor, name] : {std::pair{&k, "k"}, {&v, "v"}, {&g, "g"}, {&beta, "beta"}, {&out, "out"}}) {
    check_device(*tensor, q, name);
  }
  for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}, {&out, "out"}}) {
    check_dtype(*tensor, false, true, name);
  }
  params.g_dtype = check_dtype(g, true, true, "g");
  params.beta_dtype = check_dtype(beta, true, true, "beta");
  params.q = decode_rows(q, "q");
  params.k = decode_rows(k, "k");
  params.v = decode_rows(v, "v");
  params.g = decode_rows(g, "g");
  params.beta = {beta.data_ptr(), beta.stride(0), beta.stride(1), beta.stride(2)};
  STD_TORCH_CHECK(out.stride(3) == 1, "decode: the last dimension of out must be contiguous");
  params.out = {out.data_ptr(), out.stride(0), out.stride(1), out.stride(2)};

  int64_t N = B;
  if (cu_seqlens) {
    STD_TORCH_CHECK(B == 1, "decode: B must be 1 with cu_seqlens, got ", B);
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1, "decode: cu_seqlens must be [N + 1]");
    const ScalarType dtype = cu_seqlens->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "decode: cu_seqlens must be int32 or int64");
    params.cu_seqlens = contiguous(*cu_seqlens, q, "cu_seqlens");
    params.cu_seqlens_is_int64 = dtype == ScalarType::Long;
    N = cu_seqlens->numel() - 1;
  }

  STD_TORCH_CHECK(std::isfinite(scale), "decode: scale must be finite");
  STD_TORCH_CHECK(!lower_bound || (std::isfinite(*lower_bound) && *lower_bound < 0),
                  "decode: lower_bound must be finite and negative");
  STD_TORCH_CHECK(use_beta_sigmoid_in_kernel || !allow_neg_eigval,
                  "decode: allow_neg_eigval needs use_beta_sigmoid_in_kernel");
  if (use_gate_in_kernel) {
    params.gate = lower_bound ? kda::Gate::kLowerBound : kda::Gate::kSoftplus;
    params.lower_bound = static_cast<float>(lower_bound.value_or(0.0));
    STD_TORCH_CHECK(A_log || lower_bound, "decode: the softplus gate needs A_log");
    if (A_log) {
      STD_TORCH_CHECK(A_log->numel() == HV, "decode: A_log must have HV elements");
      check_dtype(*A_log, true, false, "A_log");
      params.A_log = static_cast<const float*>(contiguous(*A_log, q, "A_log"));
    }
    if (dt_bias) {
      STD_TORCH_CHECK(dt_bias->numel() == HV * D, "decode: dt_bias must have HV * 128 elements");
      check_dtype(*dt_bias, true, false, "dt_bias");
      check_alignment(*dt_bias, kAlignment, "dt_bias");
      params.dt_bias = static_cast<const float*>(contiguous(*dt_bias, q, "dt_bias"));
    }
  }

  if (initial_state) {
    params.initial_state = decode_states(*initial_state, q, 1, HV, "initial_state");
    params.num_slots = initial_state->size(0);
    STD_TORCH_CHECK(ssm_state_indices || params.num_slots == N, "decode: initial_state must hold N = ", N, " states");
  }
  STD_TORCH_CHECK(initial_state || !(inplace_final_state || ssm_state_indices),
                  "decode: inplace_final_state and ssm_state_indices need initial_state");
  STD_TORCH_CHECK(min_state_index >= 0, "decode: min_state_index must not be negative");
  params.min_slot = min_state_index;
  if (ssm_state_indices) {
    params.slots = indices(*ssm_state_indices, q, N, 2, "ssm_state_indices");
    const bool by_token = ssm_state_indices->dim() == 2;
    params.slot_columns = by_token ? narrow(ssm_state_indices->size(1), "columns of ssm_state_indices") : 1;
    STD_TORCH_CHECK(params.slot_columns > 0 && (!by_token || cu_seqlens || T <= params.slot_columns),
                    "decode: ssm_state_indices must have a column for every token");
    if (inplace_final_state) params.keep = by_token ? kda::Keep::kEveryInSlot : kda::Keep::kLastInSlot;
  } else if (inplace_final_state) {
    STD_TORCH_CHECK(initial_state->is_contiguous(), "decode: initial_state must be contiguous");
    params.keep = kda::Keep::kLast;
  }
  if (num_accepted_tokens) {
    STD_TORCH_CHECK(ssm_state_indices, "decode: num_accepted_tokens needs ssm_state_indices");
    params.num_accepted = indices(*num_accepted_tokens, q, N, 1, "num_accepted_tokens");
  }
  if (inplace_final_state) {
    STD_TORCH_CHECK(!final_state, "decode: final_state must be absent with inplace_final_state");
    params.final_state = params.initial_state;
  } else if (final_state) {
    params.final_state = decode_states(*final_state, q, 1, HV, "final_state");
    STD_TORCH_CHECK(final_state->size(0) == N, "decode: final_state must hold N = ", N, " states");
    params.keep = kda::Keep::kLast;
  }
  if (token_states) {
    params.token_states = decode_states(*token_states, q, 2, HV, "token_states");
    STD_TORCH_CHECK(token_states->size(0) == B && token_states->size(1) == T,
                    "decode: token_states must begin with [B, T]");
    params.token_states_stride_batch = token_states->stride(0);
  }
  params.state_v_first = state_v_first;

  params.tokens = narrow(T, "T");
  params.num_seqs = narrow(N, "N");
  params.group = narrow(HV / H, "HV / H");
  params.value_heads = narrow(4 * HV, "4 * HV") / 4;  // four CTAs a head in the first dimension of the grid
  params.scale = static_cast<float>(scale);
  params.qk_l2norm = use_qk_l2norm_in_kernel;
  params.beta_sigmoid = use_beta_sigmoid_in_kernel;
  params.allow_neg_eigval = allow_neg_eigval;

  if (N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const cudaError_t error = kda::launch_decode(params, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "decode: ", cudaGetErrorString(error));
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!) workspace, "
      "float scale, float? lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, "
      "bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first, "
      "Tensor? ssm_state_indices=None, Tensor? has_initial_state=None, bool final_state_in_slots=False, "
      "int min_state_index=0, Tensor(d!)? checkpoint_state=None, Tensor? checkpoint_offsets=None, "
      "Tensor? checkpoint_indices=None, Tensor? checkpoint_indptr=None, int checkpoint_multiple=16, "
      "bool batch_invariant=False) -> ()");
  ops.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor(a!)? initial_state, Tensor? cu_seqlens, Tensor? ssm_state_indices, Tensor? num_accepted_tokens, "
      "Tensor(b!) out, Tensor(c!)? final_state, Tensor(d!)? token_states, float scale, float? lower_bound, "
      "bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, "
      "bool state_v_first, bool inplace_final_state, int min_state_index) -> ()");
  ops.def("prefill_workspace_size(int tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed) -> int");
  ops.def(
      "prefill_workspace_needed(int tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed, "
      "bool checkpoints, int sms) -> int");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("prefill", TORCH_BOX(&prefill));
  ops.impl("decode", TORCH_BOX(&decode));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("prefill_workspace_size", TORCH_BOX(&prefill_workspace_size));
  ops.impl("prefill_workspace_needed", TORCH_BOX(&prefill_workspace_needed));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
