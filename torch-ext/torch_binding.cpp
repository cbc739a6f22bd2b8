// The torch binding on the stable ABI: operators -> kda::PrefillParams, kda::DecodeParams.
//
// flash_kda.contract has already told the user what is wrong with the arguments, in his words. The checks here are the
// last line: whatever passes them cannot make a kernel read or write outside a tensor, whoever called the operator.
// The contents of cu_seqlens are on the device; the kernels clamp them.

#include "torch_binding.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "kda_cutlass/decode/params.h"
#include "kda_cutlass/device.h"
#include "kda_cutlass/prefill/params.h"
#include "registration.h"

// The CPU wheel's header hides this function behind USE_CUDA; the CUDA torch that loads the library has it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;            // bytes: TMA's for base addresses and strides
constexpr int64_t kWorkspaceAlignment = 256;  // bytes: what the caching allocator gives

// Bits of the `flags` of prefill_new and decode_new, named as the arguments in Python; flash_kda.prefill has the same.
enum Flag : int64_t {
  kUseQkL2normInKernel = 1,
  kUseGateInKernel = 2,
  kUseBetaSigmoidInKernel = 4,
  kAllowNegEigval = 8,
  kStateVFirst = 16,
  kOutputFinalState = 32,
  kInplaceFinalState = 64,
};

// What the checks ask of a tensor, read once: every question is a call through the stable ABI. Borrows from the tensor.
struct Arg {
  const char* name;
  void* data = nullptr;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0, device_type = 0, device = 0;

  Arg(const Tensor& tensor, const char* name) : name(name) {
    const AtenTensorHandle handle = tensor.get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device));
  }

  bool is_cuda() const { return device_type == aoti_torch_device_type_cuda(); }
  bool is_bf16() const { return dtype == aoti_torch_dtype_bfloat16(); }
  bool is_fp32() const { return dtype == aoti_torch_dtype_float32(); }
  bool is_int64() const { return dtype == aoti_torch_dtype_int64(); }
  bool is_index() const { return is_int64() || dtype == aoti_torch_dtype_int32(); }
  int64_t element_size() const { return aoti_torch_dtype_element_size(dtype); }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
    return count;
  }
  bool is_contiguous() const {
    int64_t dense = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != dense) return false;
      dense *= sizes[d];
    }
    return true;
  }
  // Nothing steps along a dimension of size 1, so torch leaves its stride to chance; TMA still wants an aligned one.
  int64_t stride(int64_t d) const { return sizes[d] <= 1 ? kda::kHeadDim : strides[d]; }
};

void check_alignment(const Arg& arg, int64_t alignment) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(arg.data) % alignment == 0, arg.name, " must start at a multiple of ",
                  alignment, " bytes");
}

void check_device(const Arg& arg, int32_t device) {
  STD_TORCH_CHECK(arg.is_cuda() && arg.device == device, arg.name, " must be on the CUDA device of q");
}

void check_shape(const Arg& arg, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(arg.dim == static_cast<int64_t>(shape.size()), arg.name, " must have ", shape.size(),
                  " dimensions, got ", arg.dim);
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(arg.sizes[dim] == size, arg.name, " must have size ", size, " in dimension ", dim, ", got ",
                    arg.sizes[dim]);
    ++dim;
  }
}

void check_bf16(const Arg& arg) { STD_TORCH_CHECK(arg.is_bf16(), arg.name, " must be bfloat16"); }

kda::Dtype check_float(const Arg& arg) {
  STD_TORCH_CHECK(arg.is_bf16() || arg.is_fp32(), arg.name, " must be bfloat16 or float32");
  return arg.is_bf16() ? kda::Dtype::kBf16 : kda::Dtype::kFp32;
}

// A [B, T, heads, 128] tensor that TMA can read or write in place.
kda::TensorView tma_rows(const Arg& arg) {
  STD_TORCH_CHECK(arg.strides[3] == 1, "the last dimension of ", arg.name, " must be contiguous");
  check_alignment(arg, kAlignment);
  const int64_t element_size = arg.element_size();
  for (int64_t dim = 0; dim < 3; ++dim) {
    const int64_t bytes = arg.stride(dim) * element_size;
    STD_TORCH_CHECK(bytes > 0 && bytes % kAlignment == 0, arg.name, "'s stride in dimension ", dim,
                    " must be a positive multiple of ", kAlignment, " bytes, got ", bytes);
  }
  return {arg.data, arg.stride(0), arg.stride(1), arg.stride(2)};
}

// The decode kernel reads four channels of a token at a time.
kda::TensorView decode_rows(const Arg& arg) {
  STD_TORCH_CHECK(arg.strides[3] == 1, "decode: the last dimension of ", arg.name, " must be contiguous");
  check_alignment(arg, 4 * arg.element_size());
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(arg.stride(dim) % 4 == 0, arg.name, "'s stride in dimension ", dim,
                    " must be a multiple of 4 elements, got ", arg.stride(dim));
  }
  return {arg.data, arg.stride(0), arg.stride(1), arg.stride(2)};
}

const void* contiguous(const Arg& arg, int32_t device) {
  check_device(arg, device);
  STD_TORCH_CHECK(arg.is_contiguous(), arg.name, " must be contiguous");
  return arg.data;
}

// States [count, HV, 128, 128] or, with `lead` = 2, [B, T, HV, 128, 128]: dense but for the leading strides.
kda::StateView states(const Arg& arg, int32_t device, int64_t lead, int64_t HV) {
  constexpr int64_t D = kda::kHeadDim;
  check_device(arg, device);
  STD_TORCH_CHECK(arg.dim == lead + 3 && arg.sizes[lead] == HV && arg.sizes[lead + 1] == D && arg.sizes[lead + 2] == D,
                  arg.name, " must end in [HV, 128, 128]");
  STD_TORCH_CHECK((HV == 1 || arg.strides[lead] == D * D) && arg.strides[lead + 1] == D && arg.strides[lead + 2] == 1,
                  arg.name, " must be dense in its last three dimensions");
  return {arg.data, arg.strides[lead - 1], check_float(arg)};
}

// The same where the decode kernel moves them, in pieces of 16 bytes.
kda::StateView decode_states(const Arg& arg, int32_t device, int64_t lead, int64_t HV) {
  const kda::StateView view = states(arg, device, lead, HV);
  check_alignment(arg, kAlignment);
  for (int64_t dim = 0; dim < lead; ++dim) {
    STD_TORCH_CHECK(arg.sizes[dim] <= 1 || arg.strides[dim] * arg.element_size() % kAlignment == 0, arg.name,
                    "'s stride in dimension ", dim, " must be a multiple of ", kAlignment, " bytes");
  }
  return view;
}

kda::IndexView indices(const Arg& arg, int32_t device, int64_t N, int64_t most_dims) {
  check_device(arg, device);
  STD_TORCH_CHECK(arg.is_index(), arg.name, " must be int32 or int64");
  STD_TORCH_CHECK(arg.dim >= 1 && arg.dim <= most_dims && arg.sizes[0] == N, arg.name, " must have N = ", N, " rows");
  return {arg.data, arg.strides[0], arg.dim == 2 ? arg.strides[1] : 0, arg.is_int64()};
}

int narrow(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT_MAX, name, " = ", value, " is more than the kernels count");
  return static_cast<int>(value);
}

// Uninitialised and contiguous, from the caching allocator; at most 4 dimensions.
Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, int32_t device) {
  int64_t strides[4], dense = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = dense;
    dense *= std::max<int64_t>(sizes.begin()[dim], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                                  aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// ---- what prefill and decode have in common: both kinds of params name it alike

// The tensors that every call has.
struct Inputs {
  const char* op;
  const Tensor &q, &k, &v, &g, &beta;
  const std::optional<Tensor>&A_log, &dt_bias, &cu_seqlens;
};

struct Options {
  double scale;
  std::optional<double> lower_bound;
  bool use_gate, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, state_v_first;

  Options(std::optional<double> scale, std::optional<double> lower_bound, int64_t flags)
      : scale(scale.value_or(1 / std::sqrt(static_cast<double>(kda::kHeadDim)))),
        lower_bound(lower_bound),
        use_gate(flags & kUseGateInKernel),
        use_qk_l2norm(flags & kUseQkL2normInKernel),
        use_beta_sigmoid(flags & kUseBetaSigmoidInKernel),
        allow_neg_eigval(flags & kAllowNegEigval),
        state_v_first(flags & kStateVFirst) {}
  Options(double scale, std::optional<double> lower_bound, bool use_gate, bool use_qk_l2norm, bool use_beta_sigmoid,
          bool allow_neg_eigval, bool state_v_first)
      : scale(scale),
        lower_bound(lower_bound),
        use_gate(use_gate),
        use_qk_l2norm(use_qk_l2norm),
        use_beta_sigmoid(use_beta_sigmoid),
        allow_neg_eigval(allow_neg_eigval),
        state_v_first(state_v_first) {}
};

// A call's sizes, as its tensors have them, and where they are.
struct Sizes {
  int64_t B, T, H, HV, N;
  int32_t device;
};

template <class Params>
Sizes set_inputs(Params& params, const Inputs& in, kda::TensorView (*rows)(const Arg&)) {
  const Arg q(in.q, "q"), k(in.k, "k"), v(in.v, "v"), g(in.g, "g"), beta(in.beta, "beta");
  STD_TORCH_CHECK(q.is_cuda() && q.dim == 4 && v.dim == 4, in.op, ": q and v must be CUDA tensors of 4 dimensions");
  const int64_t B = q.sizes[0], T = q.sizes[1], H = q.sizes[2], HV = v.sizes[2], D = kda::kHeadDim;
  STD_TORCH_CHECK(H > 0 && HV > 0 && HV % H == 0, in.op, ": HV = ", HV, " must be a positive multiple of H = ", H);
  check_shape(q, {B, T, H, D});
  check_shape(k, {B, T, H, D});
  check_shape(v, {B, T, HV, D});
  check_shape(g, {B, T, HV, D});
  check_shape(beta, {B, T, HV});
  for (const Arg* arg : {&k, &v, &g, &beta}) check_device(*arg, q.device);
  for (const Arg* arg : {&q, &k, &v}) check_bf16(*arg);
  params.g_dtype = check_float(g);
  params.beta_dtype = check_float(beta);
  params.q = rows(q);
  params.k = rows(k);
  params.v = rows(v);
  params.g = rows(g);
  params.beta = {beta.data, beta.strides[0], beta.strides[1], beta.strides[2]};

  int64_t N = B;
  if (in.cu_seqlens) {
    const Arg cu_seqlens(*in.cu_seqlens, "cu_seqlens");
    STD_TORCH_CHECK(B == 1, in.op, ": B must be 1 with cu_seqlens, got ", B);
    STD_TORCH_CHECK(cu_seqlens.dim == 1 && cu_seqlens.sizes[0] >= 1, in.op, ": cu_seqlens must be [N + 1]");
    STD_TORCH_CHECK(cu_seqlens.is_index(), in.op, ": cu_seqlens must be int32 or int64");
    params.cu_seqlens = contiguous(cu_seqlens, q.device);
    params.cu_seqlens_is_int64 = cu_seqlens.is_int64();
    N = cu_seqlens.sizes[0] - 1;
  }
  params.tokens = narrow(T, "T");  // TMA coordinates
  params.num_seqs = narrow(N, "N");
  params.value_heads = narrow(HV, "HV");
  return {B, T, H, HV, N, q.device};
}

// A_log and dt_bias may have any shape of HV and HV * 128 elements.
template <class Params>
void set_options(Params& params, const Inputs& in, const Sizes& sizes, const Options& options) {
  STD_TORCH_CHECK(std::isfinite(options.scale), in.op, ": scale must be finite");
  STD_TORCH_CHECK(!options.lower_bound || (std::isfinite(*options.lower_bound) && *options.lower_bound < 0), in.op,
                  ": lower_bound must be finite and negative");
  STD_TORCH_CHECK(options.use_beta_sigmoid || !options.allow_neg_eigval, in.op,
                  ": allow_neg_eigval needs use_beta_sigmoid_in_kernel");
  if (options.use_gate) {
    params.gate = options.lower_bound ? kda::Gate::kLowerBound : kda::Gate::kSoftplus;
    params.lower_bound = static_cast<float>(options.lower_bound.value_or(0.0));
    STD_TORCH_CHECK(in.A_log || options.lower_bound, in.op, ": the softplus gate needs A_log");
    if (in.A_log) {
      const Arg A_log(*in.A_log, "A_log");
      STD_TORCH_CHECK(A_log.numel() == sizes.HV, in.op, ": A_log must have HV elements");
      STD_TORCH_CHECK(A_log.is_fp32(), "A_log must be float32");
      params.A_log = static_cast<const float*>(contiguous(A_log, sizes.device));
    }
    if (in.dt_bias) {
      const Arg dt_bias(*in.dt_bias, "dt_bias");
      STD_TORCH_CHECK(dt_bias.numel() == sizes.HV * kda::kHeadDim, in.op, ": dt_bias must have HV * 128 elements");
      STD_TORCH_CHECK(dt_bias.is_fp32(), "dt_bias must be float32");
      check_alignment(dt_bias, kAlignment);
      params.dt_bias = static_cast<const float*>(contiguous(dt_bias, sizes.device));
    }
  }
  params.scale = static_cast<float>(options.scale);
  params.qk_l2norm = options.use_qk_l2norm;
  params.beta_sigmoid = options.use_beta_sigmoid;
  params.allow_neg_eigval = options.allow_neg_eigval;
}

// What flash_kda.dispatch has looked at before it calls `prefill` or `decode`.
void check_capability(const char* op, int32_t device) {
  STD_TORCH_CHECK(kda::is_hopper(device), op, ": the kernel runs on compute capability 9.0 only");
}

// ---- prefill

Sizes set_prefill_inputs(kda::PrefillParams& params, const Inputs& in, const Options& options) {
  const Sizes sizes = set_inputs(params, in, tma_rows);
  set_options(params, in, sizes, options);
  params.state.v_first = options.state_v_first;
  params.state.num_slots = INT64_MAX;  // of the smaller pool, where both are one
  params.batch = narrow(sizes.B, "B");
  params.heads = narrow(sizes.H, "H");
  narrow(2 * sizes.N * sizes.HV, "2 * N * HV");  // CTAs of the recurrence
  return sizes;
}

void set_prefill_out(kda::PrefillParams& params, const Sizes& sizes, const Arg& out) {
  check_shape(out, {sizes.B, sizes.T, sizes.HV, kda::kHeadDim});
  check_device(out, sizes.device);
  check_bf16(out);
  const kda::TensorView rows = tma_rows(out);
  params.out = out.data;
  params.out_stride_batch = rows.stride_batch;
  params.out_stride_token = rows.stride_token;
  params.out_stride_head = rows.stride_head;
}

// What the host knows of packed sequences. It decides how fast the call is, never what it computes or where.
template <class Index>
void set_lengths(kda::PrefillParams& params, const Index* cu_seqlens, int64_t N) {
  for (int64_t n = 0; n < N; ++n) {
    // Whatever stands there must not overflow.
    const int64_t begin = std::clamp<int64_t>(cu_seqlens[n], 0, params.tokens),
                  length = std::clamp<int64_t>(cu_seqlens[n + 1], begin, params.tokens) - begin;
    const int64_t chunks = (length + kda::kChunk - 1) / kda::kChunk;
    params.longest = std::max(params.longest, chunks);
    params.chunks += chunks;
  }
}
void set_lengths(kda::PrefillParams& params, const Sizes& sizes, const Tensor& cu_seqlens_cpu) {
  const Arg arg(cu_seqlens_cpu, "cu_seqlens_cpu");
  STD_TORCH_CHECK(params.cu_seqlens != nullptr, "prefill: cu_seqlens_cpu needs cu_seqlens");
  STD_TORCH_CHECK(arg.device_type == aoti_torch_device_type_cpu(), "cu_seqlens_cpu must be on the CPU");
  STD_TORCH_CHECK(arg.is_index() && arg.is_contiguous(), "cu_seqlens_cpu must be contiguous, int32 or int64");
  check_shape(arg, {sizes.N + 1});
  if (arg.is_int64())
    set_lengths(params, static_cast<const int64_t*>(arg.data), sizes.N);
  else
    set_lengths(params, static_cast<const int32_t*>(arg.data), sizes.N);
}

// States in `slots` are those of a pool; others are one a sequence.
kda::StateView prefill_states(const Arg& arg, const Sizes& sizes, bool in_slots) {
  const kda::StateView view = states(arg, sizes.device, 1, sizes.HV);
  STD_TORCH_CHECK(in_slots || arg.sizes[0] == sizes.N, "prefill: ", arg.name, " must hold N = ", sizes.N, " states");
  return view;
}

void launch(const kda::PrefillParams& params, const kda::Schedules& schedules, int32_t device) {
  const cudaError_t error = kda::launch_prefill(params, schedules, current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "prefill: ", cudaGetErrorString(error));
}

}  // namespace

int64_t prefill_workspace_size(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                               bool packed) {
  return kda::prefill_workspace_size(tokens_per_batch, narrow(batch, "B"), narrow(num_seqs, "N"),
                                     narrow(value_heads, "HV"), packed);
}

int64_t prefill_workspace_needed(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                                 bool packed, bool checkpoints, bool batch_invariant, int64_t sms) {
  return kda::prefill_workspace_needed(tokens_per_batch, narrow(batch, "B"), narrow(num_seqs, "N"),
                                       narrow(value_heads, "HV"), packed, checkpoints, batch_invariant,
                                       narrow(sms, "sms"));
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
  kda::PrefillParams params;
  const Sizes sizes = set_prefill_inputs(params, {"prefill", q, k, v, g, beta, A_log, dt_bias, cu_seqlens},
                                         {scale, lower_bound, use_gate_in_kernel, use_qk_l2norm_in_kernel,
                                          use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first});
  const int64_t N = sizes.N;
  const int32_t device = sizes.device;
  set_prefill_out(params, sizes, Arg(out, "out"));
  params.batch_invariant = batch_invariant;

  kda::StateParams& state = params.state;
  STD_TORCH_CHECK(min_state_index >= 0, "prefill: min_state_index must not be negative");
  if (ssm_state_indices) {
    state.slots = indices(Arg(*ssm_state_indices, "ssm_state_indices"), device, N, 1);
    state.min_slot = min_state_index;
  }
  STD_TORCH_CHECK(ssm_state_indices || !final_state_in_slots, "prefill: final_state_in_slots needs ssm_state_indices");
  state.final_in_slots = final_state_in_slots;
  auto place = [&](const Tensor& tensor, bool in_slots, const char* name) {
    const Arg arg(tensor, name);
    const kda::StateView view = prefill_states(arg, sizes, in_slots);
    if (in_slots) state.num_slots = std::min(state.num_slots, arg.sizes[0]);
    return view;
  };
  if (initial_state) state.initial = place(*initial_state, ssm_state_indices.has_value(), "initial_state");
  if (final_state) state.final = place(*final_state, final_state_in_slots, "final_state");
  if (has_initial_state) {
    const Arg arg(*has_initial_state, "has_initial_state");
    check_device(arg, device);
    check_shape(arg, {N});
    STD_TORCH_CHECK(arg.dtype == aoti_torch_dtype_bool(), "prefill: has_initial_state must be bool");
    state.has_initial = static_cast<const bool*>(arg.data);
    state.has_initial_stride = arg.strides[0];
  }

  if (checkpoint_state) {
    kda::CheckpointParams& checkpoints = params.checkpoints;
    const Arg pool(*checkpoint_state, "checkpoint_state");
    checkpoints.states = states(pool, device, 1, sizes.HV);
    checkpoints.num_slots = pool.sizes[0];
    STD_TORCH_CHECK(checkpoint_offsets, "prefill: checkpoint_state needs checkpoint_offsets");
    STD_TORCH_CHECK(checkpoint_multiple == 16 || checkpoint_multiple == kda::kChunk,
                    "prefill: checkpoint_multiple must be 16 or 64, got ", checkpoint_multiple);
    checkpoints.multiple = static_cast<int>(checkpoint_multiple);
    const Arg offsets(*checkpoint_offsets, "checkpoint_offsets");
    const int64_t rows = !checkpoint_indptr ? N : offsets.dim >= 1 ? offsets.sizes[0] : 0;
    const int64_t most_dims = checkpoint_indptr ? 1 : 2;
    auto entries = [&](const Arg& arg) {
      kda::IndexView view = indices(arg, device, rows, most_dims);
      if (checkpoint_indptr) view.stride_column = view.stride_row;  // one row
      return view;
    };
    checkpoints.offsets = entries(offsets);
    checkpoints.columns = checkpoint_indptr ? rows : offsets.dim == 2 ? offsets.sizes[1] : 1;
    if (checkpoint_indices) {
      const Arg slots(*checkpoint_indices, "checkpoint_indices");
      checkpoints.slots = entries(slots);
      STD_TORCH_CHECK(slots.dim == offsets.dim && slots.numel() == offsets.numel(),
                      "prefill: checkpoint_indices must have the shape of checkpoint_offsets");
      checkpoints.min_slot = min_state_index;
    }
    if (checkpoint_indptr) {
      const Arg indptr(*checkpoint_indptr, "checkpoint_indptr");
      checkpoints.indptr_is_int64 = indices(indptr, device, N + 1, 1).is_int64;
      checkpoints.indptr = contiguous(indptr, device);
    }
  }

  const Arg space(workspace, "workspace");
  contiguous(space, device);
  check_alignment(space, kWorkspaceAlignment);
  params.workspace = space.data;
  params.workspace_bytes = space.numel();

  if (N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const kda::CallShape shape = kda::call_shape(params);
  const kda::Schedules schedules = kda::choose_schedules(shape, kda::sm_count());
  const int64_t wanted = kda::needed_workspace(shape, schedules, kda::sm_count());
  STD_TORCH_CHECK(space.dtype == aoti_torch_dtype_uint8() && params.workspace_bytes >= wanted,
                  "prefill: workspace must be ", wanted, " bytes of uint8, got ", params.workspace_bytes);
  launch(params, schedules, device);
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>> prefill_new(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& cu_seqlens_cpu, const std::optional<Tensor>& out, std::optional<double> scale,
    std::optional<double> lower_bound, int64_t flags) {
  constexpr int64_t D = kda::kHeadDim;
  kda::PrefillParams params;
  const Sizes sizes = set_prefill_inputs(params, {"prefill", q, k, v, g, beta, A_log, dt_bias, cu_seqlens},
                                         {scale, lower_bound, flags});
  if (cu_seqlens_cpu) set_lengths(params, sizes, *cu_seqlens_cpu);
  const bool inplace = flags & kInplaceFinalState;
  STD_TORCH_CHECK(initial_state || !inplace, "prefill: inplace_final_state needs initial_state");
  if (initial_state) {
    const Arg arg(*initial_state, "initial_state");
    params.state.initial = prefill_states(arg, sizes, false);
    STD_TORCH_CHECK(!inplace || arg.is_contiguous(), "prefill: initial_state must be contiguous");
    if (inplace) params.state.final = params.state.initial;
  }
  STD_TORCH_CHECK(sizes.T > 0 && sizes.N > 0, "prefill: there are no tokens");
  if (out) set_prefill_out(params, sizes, Arg(*out, "out"));
  check_capability("prefill", sizes.device);

  const torch::stable::accelerator::DeviceGuard guard(sizes.device);
  std::optional<Tensor> new_out, final_state;
  if (!out) {
    new_out = empty({sizes.B, sizes.T, sizes.HV, D}, aoti_torch_dtype_bfloat16(), sizes.device);
    set_prefill_out(params, sizes, Arg(*new_out, "out"));
  }
  if ((flags & kOutputFinalState) && !inplace) {
    final_state = empty({sizes.N, sizes.HV, D, D}, aoti_torch_dtype_float32(), sizes.device);
    params.state.final = prefill_states(Arg(*final_state, "final_state"), sizes, false);
  }
  const kda::CallShape shape = kda::call_shape(params);
  const kda::Schedules schedules = kda::choose_schedules(shape, kda::sm_count());
  params.workspace_bytes = kda::needed_workspace(shape, schedules, kda::sm_count());
  // Given back to the allocator at the end, for what comes later in the stream.
  const Tensor workspace = empty({params.workspace_bytes}, aoti_torch_dtype_uint8(), sizes.device);
  params.workspace = workspace.data_ptr();
  launch(params, schedules, sizes.device);
  return {new_out, final_state};
}

// ---- decode

namespace {

// Where the states of a decode call lie, and which of its tensors it overwrites.
struct DecodeStates {
  const std::optional<Tensor>&initial_state, &ssm_state_indices, &num_accepted_tokens, &token_states;
  bool inplace_final_state;
  int64_t min_state_index;
};

// All but the results, `out` and `final_state`.
Sizes set_decode_inputs(kda::DecodeParams& params, const Inputs& in, const Options& options,
                        const DecodeStates& where) {
  const Sizes sizes = set_inputs(params, in, decode_rows);
  set_options(params, in, sizes, options);
  params.state_v_first = options.state_v_first;
  params.group = narrow(sizes.HV / sizes.H, "HV / H");
  narrow(4 * sizes.HV, "4 * HV");  // four CTAs a head in the first dimension of the grid

  const int64_t N = sizes.N;
  const bool inplace = where.inplace_final_state;
  STD_TORCH_CHECK(where.initial_state || !(inplace || where.ssm_state_indices),
                  "decode: inplace_final_state and ssm_state_indices need initial_state");
  STD_TORCH_CHECK(where.min_state_index >= 0, "decode: min_state_index must not be negative");
  params.min_slot = where.min_state_index;
  if (where.initial_state) {
    const Arg initial_state(*where.initial_state, "initial_state");
    params.initial_state = decode_states(initial_state, sizes.device, 1, sizes.HV);
    params.num_slots = initial_state.sizes[0];
    STD_TORCH_CHECK(where.ssm_state_indices || params.num_slots == N, "decode: initial_state must hold N = ", N,
                    " states");
    STD_TORCH_CHECK(!inplace || where.ssm_state_indices || initial_state.is_contiguous(),
                    "decode: initial_state must be contiguous");
  }
  if (inplace) {
    params.keep = kda::Keep::kLast;
    params.final_state = params.initial_state;
  }
  if (where.ssm_state_indices) {
    const Arg slots(*where.ssm_state_indices, "ssm_state_indices");
    params.slots = indices(slots, sizes.device, N, 2);
    const bool by_token = slots.dim == 2;
    params.slot_columns = by_token ? narrow(slots.sizes[1], "columns of ssm_state_indices") : 1;
    STD_TORCH_CHECK(params.slot_columns > 0 && (!by_token || in.cu_seqlens || sizes.T <= params.slot_columns),
                    "decode: ssm_state_indices must have a column for every token");
    if (inplace) params.keep = by_token ? kda::Keep::kEveryInSlot : kda::Keep::kLastInSlot;
  }
  if (where.num_accepted_tokens) {
    STD_TORCH_CHECK(where.ssm_state_indices, "decode: num_accepted_tokens needs ssm_state_indices");
    params.num_accepted = indices(Arg(*where.num_accepted_tokens, "num_accepted_tokens"), sizes.device, N, 1);
  }
  if (where.token_states) {
    const Arg token_states(*where.token_states, "token_states");
    params.token_states = decode_states(token_states, sizes.device, 2, sizes.HV);
    STD_TORCH_CHECK(token_states.sizes[0] == sizes.B && token_states.sizes[1] == sizes.T,
                    "decode: token_states must begin with [B, T]");
    params.token_states_stride_batch = token_states.strides[0];
  }
  return sizes;
}

void set_decode_out(kda::DecodeParams& params, const Sizes& sizes, const Arg& out) {
  check_shape(out, {sizes.B, sizes.T, sizes.HV, kda::kHeadDim});
  check_device(out, sizes.device);
  check_bf16(out);
  STD_TORCH_CHECK(out.strides[3] == 1, "decode: the last dimension of out must be contiguous");
  params.out = {out.data, out.strides[0], out.strides[1], out.strides[2]};
}

void set_decode_final_state(kda::DecodeParams& params, const Sizes& sizes, const Arg& final_state) {
  STD_TORCH_CHECK(params.keep == kda::Keep::kNothing, "decode: final_state must be absent with inplace_final_state");
  params.final_state = decode_states(final_state, sizes.device, 1, sizes.HV);
  STD_TORCH_CHECK(final_state.sizes[0] == sizes.N, "decode: final_state must hold N = ", sizes.N, " states");
  params.keep = kda::Keep::kLast;
}

// The device must be current.
void launch(const kda::DecodeParams& params, int32_t device) {
  const cudaError_t error = kda::launch_decode(params, current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "decode: ", cudaGetErrorString(error));
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
  kda::DecodeParams params;
  const Sizes sizes = set_decode_inputs(
      params, {"decode", q, k, v, g, beta, A_log, dt_bias, cu_seqlens},
      {scale, lower_bound, use_gate_in_kernel, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
       state_v_first},
      {initial_state, ssm_state_indices, num_accepted_tokens, token_states, inplace_final_state, min_state_index});
  set_decode_out(params, sizes, Arg(out, "out"));
  if (final_state) set_decode_final_state(params, sizes, Arg(*final_state, "final_state"));

  if (sizes.N == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(sizes.device);
  launch(params, sizes.device);
}

std::tuple<std::optional<Tensor>, std::optional<Tensor>> decode_new(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& ssm_state_indices, const std::optional<Tensor>& num_accepted_tokens,
    const std::optional<Tensor>& out, const std::optional<Tensor>& token_states, std::optional<double> scale,
    std::optional<double> lower_bound, int64_t flags, int64_t min_state_index) {
  constexpr int64_t D = kda::kHeadDim;
  kda::DecodeParams params;
  const bool inplace = flags & kInplaceFinalState;
  const Sizes sizes = set_decode_inputs(
      params, {"decode", q, k, v, g, beta, A_log, dt_bias, cu_seqlens}, {scale, lower_bound, flags},
      {initial_state, ssm_state_indices, num_accepted_tokens, token_states, inplace, min_state_index});
  if (out) set_decode_out(params, sizes, Arg(*out, "out"));
  check_capability("decode", sizes.device);

  const torch::stable::accelerator::DeviceGuard guard(sizes.device);
  std::optional<Tensor> new_out, final_state;
  if (!out) {
    new_out = empty({sizes.B, sizes.T, sizes.HV, D}, aoti_torch_dtype_bfloat16(), sizes.device);
    set_decode_out(params, sizes, Arg(*new_out, "out"));
  }
  if ((flags & kOutputFinalState) && !inplace) {
    final_state = empty({sizes.N, sizes.HV, D, D}, aoti_torch_dtype_float32(), sizes.device);
    set_decode_final_state(params, sizes, Arg(*final_state, "final_state"));
  }
  if (sizes.N > 0) launch(params, sizes.device);
  return {new_out, final_state};
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
      "prefill_new(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor(a!)? initial_state, Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, Tensor(b!)? out, float? scale, "
      "float? lower_bound, int flags) -> (Tensor?, Tensor?)");
  ops.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor(a!)? initial_state, Tensor? cu_seqlens, Tensor? ssm_state_indices, Tensor? num_accepted_tokens, "
      "Tensor(b!) out, Tensor(c!)? final_state, Tensor(d!)? token_states, float scale, float? lower_bound, "
      "bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, "
      "bool state_v_first, bool inplace_final_state, int min_state_index) -> ()");
  ops.def(
      "decode_new(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
      "Tensor(a!)? initial_state, Tensor? cu_seqlens, Tensor? ssm_state_indices, Tensor? num_accepted_tokens, "
      "Tensor(b!)? out, Tensor(c!)? token_states, float? scale, float? lower_bound, int flags, int min_state_index) "
      "-> (Tensor?, Tensor?)");
  ops.def("prefill_workspace_size(int tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed) -> int");
  ops.def(
      "prefill_workspace_needed(int tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed, "
      "bool checkpoints, bool batch_invariant, int sms) -> int");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("prefill", TORCH_BOX(&prefill));
  ops.impl("prefill_new", TORCH_BOX(&prefill_new));
  ops.impl("decode", TORCH_BOX(&decode));
  ops.impl("decode_new", TORCH_BOX(&decode_new));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("prefill_workspace_size", TORCH_BOX(&prefill_workspace_size));
  ops.impl("prefill_workspace_needed", TORCH_BOX(&prefill_workspace_needed));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
