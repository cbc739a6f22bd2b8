// The torch binding on the stable ABI: operators -> kda::PrefillParams.
//
// flash_kda.contract has already told the user what is wrong with the arguments, in his words. The checks here are the
// last line: whatever passes them cannot make a kernel read or write outside a tensor, whoever called the operator.
// The contents of cu_seqlens are on the device; the kernels clamp them.

#include "torch_binding.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <climits>

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
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment == 0, "prefill: ", name,
                  " must start at a multiple of ", alignment, " bytes");
}

void check_device(const Tensor& tensor, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == q.get_device_index(), "prefill: ", name,
                  " must be on the CUDA device of q");
}

void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), "prefill: ", name, " must have ", shape.size(),
                  " dimensions, got ", tensor.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(dim) == size, "prefill: ", name, " must have size ", size, " in dimension ", dim,
                    ", got ", tensor.size(dim));
    ++dim;
  }
}

kda::Dtype check_dtype(const Tensor& tensor, bool allow_fp32, bool allow_bf16, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  if (allow_bf16 && dtype == ScalarType::BFloat16) return kda::Dtype::kBf16;
  STD_TORCH_CHECK(allow_fp32 && dtype == ScalarType::Float, "prefill: ", name, " must be ",
                  allow_bf16 ? "bfloat16" : "", allow_bf16 && allow_fp32 ? " or " : "", allow_fp32 ? "float32" : "");
  return kda::Dtype::kFp32;
}

// Nothing steps along a dimension of size 1, so torch leaves its stride to chance; TMA still wants an aligned one.
int64_t stride(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) <= 1 ? kda::kHeadDim : tensor.stride(dim);
}

// A [B, T, heads, 128] tensor that TMA can read or write in place.
kda::TensorView rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.stride(3) == 1, "prefill: the last dimension of ", name, " must be contiguous");
  check_alignment(tensor, kAlignment, name);
  for (int64_t dim = 0; dim < 3; ++dim) {
    const int64_t bytes = stride(tensor, dim) * static_cast<int64_t>(tensor.element_size());
    STD_TORCH_CHECK(bytes > 0 && bytes % kAlignment == 0, "prefill: ", name, "'s stride in dimension ", dim,
                    " must be a positive multiple of ", kAlignment, " bytes, got ", bytes);
  }
  return {tensor.data_ptr(), stride(tensor, 0), stride(tensor, 1), stride(tensor, 2)};
}

const void* contiguous(const Tensor& tensor, const Tensor& q, const char* name) {
  check_device(tensor, q, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), "prefill: ", name, " must be contiguous");
  return tensor.data_ptr();
}

int narrow(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT_MAX, "prefill: ", name, " = ", value, " is more than the kernels count");
  return static_cast<int>(value);
}

}  // namespace

int64_t prefill_workspace_size(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                               bool packed) {
  return kda::prefill_workspace_size(tokens_per_batch, narrow(batch, "B"), narrow(num_seqs, "N"),
                                     narrow(value_heads, "HV"), packed);
}

void prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
             const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
             const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens, Tensor& out,
             const std::optional<Tensor>& final_state, Tensor& workspace, double scale,
             std::optional<double> lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel,
             bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first) {
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
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "prefill: cu_seqlens must be int32 or int64");
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
      params.dt_bias = static_cast<const float*>(contiguous(*dt_bias, q, "dt_bias"));
    }
  }

  if (initial_state) {
    check_shape(*initial_state, {N, HV, D, D}, "initial_state");
    check_alignment(*initial_state, kAlignment, "initial_state");
    params.initial_state_dtype = check_dtype(*initial_state, true, true, "initial_state");
    params.initial_state = contiguous(*initial_state, q, "initial_state");
  }
  if (final_state) {
    check_shape(*final_state, {N, HV, D, D}, "final_state");
    check_alignment(*final_state, kAlignment, "final_state");
    params.final_state_dtype = check_dtype(*final_state, true, true, "final_state");
    params.final_state = const_cast<void*>(contiguous(*final_state, q, "final_state"));
  }
  params.state_v_first = state_v_first;

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

  const int64_t wanted = kda::prefill_workspace_size(T, params.batch, params.num_seqs, params.value_heads, packed);
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.numel() >= wanted,
                  "prefill: workspace must be ", wanted, " bytes of uint8, got ", workspace.numel());
  contiguous(workspace, q, "workspace");
  check_alignment(workspace, kWorkspaceAlignment, "workspace");
  params.workspace = workspace.data_ptr();
  params.workspace_bytes = workspace.numel();

  if (N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const cudaError_t error = kda::launch_prefill(params, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "prefill: ", cudaGetErrorString(error));
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!) workspace, "
      "float scale, float? lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, "
      "bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first) -> ()");
  ops.def(
      "prefill_workspace_size(int tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed) -> int");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("prefill", TORCH_BOX(&prefill));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("prefill_workspace_size", TORCH_BOX(&prefill_workspace_size));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
