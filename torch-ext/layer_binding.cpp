// The layer's operators on the stable ABI: operators -> kda::ConvParams, kda::GatedNormParams, kda::LinearsParams,
// kda::StepParams.
//
// flash_kda.layer_contract has already told the user what is wrong with the arguments. The checks here are the last line:
// whatever passes them cannot make a kernel read or write outside a tensor. The contents of cu_seqlens are on the device;
// the kernels clamp them.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <optional>
#include <vector>

#include "kda_cutlass/layer/params.h"
#include "registration.h"

// The CPU wheel's header hides this function behind USE_CUDA; the CUDA torch that loads the library has it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlignment = 16;  // bytes of a vector access

void check_here(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                  " must be on the CUDA device of the first input");
}

void* aligned(const Tensor& tensor, const char* name) {
  void* const data = tensor.data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, name, " must start at a multiple of ",
                  kAlignment, " bytes");
  return data;
}

void* contiguous(const Tensor& tensor, const Tensor& x, int64_t elements, const char* name) {
  check_here(tensor, x, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements, " elements, got ", tensor.numel());
  return aligned(tensor, name);
}

void check_bf16(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16");
}

bool is_fp32(const Tensor& tensor, const char* name) {
  const bool fp32 = tensor.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(fp32 || tensor.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16 or float32");
  return fp32;
}

int narrow(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT_MAX, name, " = ", value, " is more than the kernels count");
  return static_cast<int>(value);
}

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A [B, T, C] input whose rows are read in 16-byte pieces.
kda::ConvInput conv_input(const Tensor& tensor, const Tensor& x, const char* name) {
  check_here(tensor, x, name);
  check_bf16(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must be [B, T, C]");
  for (int64_t dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) == x.size(dim), name, " must have the shape of the first input");
  }
  STD_TORCH_CHECK(tensor.stride(2) == 1, name, "'s channels must be contiguous");
  auto stride = [&](int64_t dim) {
    const int64_t value = tensor.size(dim) <= 1 ? 0 : tensor.stride(dim);
    STD_TORCH_CHECK(value % kda::kVectorChannels == 0, name, "'s strides must be multiples of ", kda::kVectorChannels);
    return value;
  };
  return {aligned(tensor, name), stride(0), stride(1)};
}

}  // namespace

void short_conv(const Tensor& q, const std::optional<Tensor>& k, const std::optional<Tensor>& v, const Tensor& weight,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& initial_state,
                const std::optional<Tensor>& cu_seqlens, Tensor& out, const std::optional<Tensor>& final_state,
                bool silu) {
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 3, "q must be a CUDA tensor [B, T, C]");
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "k and v come together");
  const int64_t B = q.size(0), T = q.size(1), C = q.size(2), parts = k ? 3 : 1;
  STD_TORCH_CHECK(C % kda::kVectorChannels == 0, "C must be a multiple of ", kda::kVectorChannels, ", got ", C);

  kda::ConvParams params;
  params.x[0] = conv_input(q, q, "q");
  if (k) {
    params.x[1] = conv_input(*k, q, "k");
    params.x[2] = conv_input(*v, q, "v");
  }
  params.parts = static_cast<int>(parts);
  params.batch = narrow(B, "B");
  params.tokens = narrow(T, "T");
  params.channels = narrow(parts * C, "C") / params.parts;

  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) >= 2 && weight.size(1) <= kda::kMaxConvWidth,
                  "weight must be [C, 2 to ", kda::kMaxConvWidth, "]");
  params.width = static_cast<int>(weight.size(1));
  params.weight_is_fp32 = is_fp32(weight, "weight");
  params.weight = contiguous(weight, q, parts * C * params.width, "weight");
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), "bias must have the dtype of weight");
    params.bias = contiguous(*bias, q, parts * C, "bias");
  }
  params.silu = silu;

  int64_t N = B;
  if (cu_seqlens) {
    STD_TORCH_CHECK(B == 1, "B must be 1 with cu_seqlens, got ", B);
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 2, "cu_seqlens must be [N + 1], N at least 1");
    const ScalarType dtype = cu_seqlens->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "cu_seqlens must be int32 or int64");
    check_here(*cu_seqlens, q, "cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->is_contiguous(), "cu_seqlens must be contiguous");
    params.cu_seqlens = cu_seqlens->data_ptr();
    params.cu_seqlens_is_int64 = dtype == ScalarType::Long;
    N = cu_seqlens->numel() - 1;
  }
  params.num_seqs = narrow(N, "N");

  params.columns = params.width;
  auto state = [&](const std::optional<Tensor>& tensor, const char* name) -> void* {
    if (!tensor) return nullptr;
    check_bf16(*tensor, name);
    STD_TORCH_CHECK(tensor->dim() == 3 && tensor->size(0) == N && tensor->size(1) == parts * C, name,
                    " must be [N, C, W - 1 or W]");
    const int columns = static_cast<int>(tensor->size(2));
    STD_TORCH_CHECK(columns == params.width || columns == params.width - 1, name, " must have W - 1 or W columns");
    params.columns = columns;
    return contiguous(*tensor, q, N * parts * C * columns, name);
  };
  params.initial_state = state(initial_state, "initial_state");
  const int columns = params.columns;
  params.final_state = state(final_state, "final_state");
  STD_TORCH_CHECK(!initial_state || !final_state || columns == params.columns,
                  "initial_state and final_state must have the same shape");

  check_bf16(out, "out");
  params.out = contiguous(out, q, parts * B * T * C, "out");
  // One block a 1024 channels and 8 tokens at most, and one a sequence: the grid must count them.
  narrow(parts * C / 8 * (B * ((T + 7) / 8) + N), "C * B * T");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaError_t error = kda::launch_conv(params, stream_of(q));
  STD_TORCH_CHECK(error == cudaSuccess, "short_conv: ", cudaGetErrorString(error));
}

void gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight, Tensor& out, double eps) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() >= 1, "x must be a CUDA tensor [.., D]");
  const int64_t D = x.size(x.dim() - 1), elements = x.numel();
  STD_TORCH_CHECK(D == 64 || D == 128 || D == 256, "D must be 64, 128 or 256, got ", D);

  kda::GatedNormParams params;
  check_bf16(x, "x");
  check_bf16(gate, "gate");
  check_bf16(out, "out");
  params.x = contiguous(x, x, elements, "x");
  params.gate = contiguous(gate, x, elements, "gate");
  params.out = contiguous(out, x, elements, "out");
  params.weight_is_fp32 = is_fp32(weight, "weight");
  params.weight = contiguous(weight, x, D, "weight");
  params.rows = elements / D;
  params.channels = static_cast<int>(D);
  params.eps = static_cast<float>(eps);
  narrow(params.rows, "rows");

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaError_t error = kda::launch_gated_norm(params, stream_of(x));
  STD_TORCH_CHECK(error == cudaSuccess, "gated_rms_norm: ", cudaGetErrorString(error));
}

void few_row_linears(std::vector<Tensor> x, std::vector<Tensor> weights, Tensor& out) {
  const int64_t count = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(count >= 1 && count <= kda::kMaxLinears && x.size() == weights.size(), "1 to ", kda::kMaxLinears,
                  " weights and as many inputs, got ", count, " and ", x.size());
  const Tensor& first = x[0];
  STD_TORCH_CHECK(first.is_cuda() && first.dim() >= 1, "inputs must be CUDA tensors [.., K]");
  const int64_t depth = first.size(first.dim() - 1);
  STD_TORCH_CHECK(depth > 0 && depth % kda::kVectorChannels == 0, "K must be a multiple of ", kda::kVectorChannels,
                  ", got ", depth);
  const int64_t rows = first.numel() / depth;
  STD_TORCH_CHECK(rows >= 1 && rows <= kda::kMaxLinearRows, "1 to ", kda::kMaxLinearRows, " rows, got ", rows);

  kda::LinearsParams params;
  int64_t outputs = 0;
  for (int64_t i = 0; i < count; ++i) {
    check_bf16(x[i], "an input");
    check_bf16(weights[i], "a weight");
    STD_TORCH_CHECK(weights[i].dim() == 2 && weights[i].size(0) > 0, "a weight must be [N, K], N > 0");
    const int64_t size = weights[i].size(0);
    params.jobs[i].x = contiguous(x[i], first, rows * depth, "an input");
    params.jobs[i].weight = contiguous(weights[i], first, size * depth, "a weight");
    params.jobs[i].outputs = narrow(size, "N");
    params.jobs[i].first_output = narrow(outputs, "N");
    outputs += size;
  }
  narrow(outputs, "N");
  params.count = static_cast<int>(count);
  params.depth = narrow(depth, "K");
  params.rows = static_cast<int>(rows);
  check_bf16(out, "out");
  params.out = contiguous(out, first, rows * outputs, "out");

  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const cudaError_t error = kda::launch_linears(params, stream_of(first));
  STD_TORCH_CHECK(error == cudaSuccess, "few_row_linears: ", cudaGetErrorString(error));
}

namespace {

// What a step does between the projections, but for its inputs and output: of N sequences and H heads, on the device of q.
kda::StepParams step_params(const Tensor& q, int64_t N, int64_t H, const Tensor& conv_weight, Tensor& conv_state,
                            const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias, Tensor& state,
                            const Tensor& norm_weight, double scale, std::optional<double> lower_bound, double eps) {
  constexpr int64_t D = kda::kHeadDim;
  const int64_t C = H * D;
  kda::StepParams params;
  check_bf16(conv_state, "conv_state");
  params.conv_state = contiguous(conv_state, q, N * kda::kConvParts * C * kda::kStepTaps, "conv_state");
  params.conv_weight_is_fp32 = is_fp32(conv_weight, "conv_weight");
  params.conv_weight = contiguous(conv_weight, q, kda::kConvParts * C * kda::kStepTaps, "conv_weight");
  params.norm_weight_is_fp32 = is_fp32(norm_weight, "norm_weight");
  params.norm_weight = contiguous(norm_weight, q, D, "norm_weight");
  auto fp32_tensor = [&](const Tensor& tensor, int64_t elements, const char* name) {
    STD_TORCH_CHECK(is_fp32(tensor, name), name, " must be float32");
    return static_cast<float*>(contiguous(tensor, q, elements, name));
  };
  params.state = fp32_tensor(state, N * C * D, "state");
  STD_TORCH_CHECK(A_log || lower_bound, "the softplus gate needs A_log");
  if (A_log) params.A_log = fp32_tensor(*A_log, H, "A_log");
  if (dt_bias) params.dt_bias = fp32_tensor(*dt_bias, C, "dt_bias");
  STD_TORCH_CHECK(N <= 65535, "N = ", N, " is more than the kernel counts");
  params.heads = narrow(4 * H * N, "4 * H * N") / static_cast<int>(4 * N);
  params.sequences = static_cast<int>(N);
  params.softplus = !lower_bound;
  params.lower_bound = static_cast<float>(lower_bound.value_or(0.0));
  params.scale = static_cast<float>(scale);
  params.eps = static_cast<float>(eps);
  return params;
}

}  // namespace

void layer_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, const Tensor& beta,
                const Tensor& gate, const Tensor& conv_weight, Tensor& conv_state, const std::optional<Tensor>& A_log,
                const std::optional<Tensor>& dt_bias, Tensor& state, const Tensor& norm_weight, Tensor& out,
                double scale, std::optional<double> lower_bound, double eps) {
  constexpr int64_t D = kda::kHeadDim;
  STD_TORCH_CHECK(q.is_cuda() && q.dim() >= 1, "q must be a CUDA tensor [.., H * 128]");
  const int64_t C = q.size(q.dim() - 1), H = C / D;
  STD_TORCH_CHECK(H > 0 && C % D == 0, "q must be [.., H * 128], got ", C, " channels");
  const int64_t N = q.numel() / C;

  kda::StepParams params =
      step_params(q, N, H, conv_weight, conv_state, A_log, dt_bias, state, norm_weight, scale, lower_bound, eps);
  auto bf16_tensor = [&](const Tensor& tensor, int64_t elements, const char* name) {
    check_bf16(tensor, name);
    return contiguous(tensor, q, elements, name);
  };
  params.qkv[0] = bf16_tensor(q, N * C, "q");
  params.qkv[1] = bf16_tensor(k, N * C, "k");
  params.qkv[2] = bf16_tensor(v, N * C, "v");
  params.decay = bf16_tensor(decay, N * C, "decay");
  params.gate = bf16_tensor(gate, N * C, "gate");
  params.out = bf16_tensor(out, N * C, "out");
  check_bf16(beta, "beta");
  check_here(beta, q, "beta");
  STD_TORCH_CHECK(beta.is_contiguous() && beta.numel() == N * H, "beta must be contiguous [N, H]");
  params.beta = beta.data_ptr();

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaError_t error = kda::launch_step(params, stream_of(q));
  STD_TORCH_CHECK(error == cudaSuccess, "layer_step: ", cudaGetErrorString(error));
}

// few_row_linears, layer_step and few_row_linears in one call: no more kernels, a third of the host's time.
Tensor whole_step(const Tensor& x, std::vector<Tensor> weights, const std::optional<Tensor>& decay_weight,
                  const std::optional<Tensor>& gate_weight, const Tensor& out_weight, const Tensor& conv_weight,
                  Tensor& conv_state, const std::optional<Tensor>& A_log, const std::optional<Tensor>& dt_bias,
                  Tensor& state, const Tensor& norm_weight, double scale, std::optional<double> lower_bound,
                  double eps) {
  constexpr int64_t D = kda::kHeadDim;
  constexpr int kInputs = 6;  // q, k, v, decay, gate and beta
  static_assert(kInputs <= kda::kMaxLinears);
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 3 && x.size(1) == 1, "x must be a CUDA tensor [N, 1, K]");
  const int64_t N = x.size(0), K = x.size(2);
  STD_TORCH_CHECK(N >= 1 && N <= kda::kMaxLinearRows, "1 to ", kda::kMaxLinearRows, " rows, got ", N);
  STD_TORCH_CHECK(K > 0 && K % kda::kVectorChannels == 0, "K must be a multiple of ", kda::kVectorChannels, ", got ",
                  K);
  STD_TORCH_CHECK(weights.size() == kInputs && weights[5].dim() == 2 && weights[5].size(0) > 0,
                  "weights must be those of q, k, v, decay, gate and beta");
  STD_TORCH_CHECK(decay_weight.has_value() == gate_weight.has_value(), "decay_weight and gate_weight come together");
  STD_TORCH_CHECK(out_weight.dim() == 2 && out_weight.size(0) > 0, "out_weight must be [outputs, H * 128]");
  const int64_t H = weights[5].size(0), C = H * D, outputs = out_weight.size(0);
  narrow(5 * C + outputs, "H * 128");

  auto bf16_tensor = [&](const Tensor& tensor, int64_t elements, const char* name) {
    check_bf16(tensor, name);
    return contiguous(tensor, x, elements, name);
  };
  kda::StepParams step =
      step_params(x, N, H, conv_weight, conv_state, A_log, dt_bias, state, norm_weight, scale, lower_bound, eps);
  const int64_t gate_outputs = decay_weight ? D : C;
  const int64_t sizes[kInputs] = {C, C, C, gate_outputs, gate_outputs, H};
  kda::LinearsParams inputs;
  inputs.count = kInputs;
  inputs.depth = narrow(K, "K");
  inputs.rows = static_cast<int>(N);
  int64_t before = 0;
  for (int i = 0; i < kInputs; ++i) {
    inputs.jobs[i] = {bf16_tensor(x, N * K, "x"), bf16_tensor(weights[i], sizes[i] * K, "a weight"),
                      static_cast<int>(sizes[i]), static_cast<int>(before)};
    before += sizes[i];
  }
  kda::LinearsParams gates;  // the second projections, where the step's kernel leaves them to one of their own
  const bool in_step = decay_weight && kda::step_takes_slices(step.heads, N);
  if (in_step) {
    step.decay_weight = bf16_tensor(*decay_weight, C * D, "decay_weight");
    step.gate_weight = bf16_tensor(*gate_weight, C * D, "gate_weight");
  } else if (decay_weight) {
    gates.count = 2;
    gates.depth = static_cast<int>(D);
    gates.rows = inputs.rows;
    gates.jobs[0] = {nullptr, bf16_tensor(*decay_weight, C * D, "decay_weight"), static_cast<int>(C), 0};
    gates.jobs[1] = {nullptr, bf16_tensor(*gate_weight, C * D, "gate_weight"), static_cast<int>(C),
                     static_cast<int>(C)};
  }
  kda::LinearsParams output;
  output.count = 1;
  output.depth = static_cast<int>(C);
  output.rows = inputs.rows;
  output.jobs[0] = {nullptr, bf16_tensor(out_weight, outputs * C, "out_weight"), static_cast<int>(outputs), 0};

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  // What one kernel hands to the next: outputs of the first projections, of the gates' second ones, and of the step. Parts
  // begin at multiples of 16 bytes: only beta, the last of its kernel, need not be a multiple of that.
  const int64_t projected = (N * before + 7) / 8 * 8, second = gates.count * N * C;
  const Tensor scratch = torch::stable::new_empty(x, {projected + second + N * C});
  const Tensor y = torch::stable::new_empty(x, {N, 1, outputs});
  uint16_t* const begin = static_cast<uint16_t*>(scratch.data_ptr());
  auto part = [&](int i) { return begin + N * inputs.jobs[i].first_output; };
  inputs.out = begin;
  for (int i = 0; i < kda::kConvParts; ++i) step.qkv[i] = part(i);
  step.decay = part(3), step.gate = part(4), step.beta = part(5);
  if (gates.count) {
    gates.jobs[0].x = step.decay, gates.jobs[1].x = step.gate;
    gates.out = begin + projected;
    step.decay = begin + projected, step.gate = begin + projected + N * C;
  }
  step.out = begin + projected + second;
  output.jobs[0].x = step.out;
  output.out = y.data_ptr();

  const cudaStream_t stream = stream_of(x);
  cudaError_t error = kda::launch_linears(inputs, stream);
  if (error == cudaSuccess && gates.count) error = kda::launch_linears(gates, stream);
  if (error == cudaSuccess) error = kda::launch_step(step, stream);
  if (error == cudaSuccess) error = kda::launch_last_linear(output, stream);
  STD_TORCH_CHECK(error == cudaSuccess, "whole_step: ", cudaGetErrorString(error));
  return y;
}

// The namespace is a macro: one more step expands it.
#define FRAGMENT(name, library) STABLE_TORCH_LIBRARY_FRAGMENT(name, library)

FRAGMENT(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "short_conv(Tensor q, Tensor? k, Tensor? v, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, bool silu) -> ()");
  ops.def("gated_rms_norm(Tensor x, Tensor gate, Tensor weight, Tensor(a!) out, float eps) -> ()");
  ops.def("few_row_linears(Tensor[] x, Tensor[] weights, Tensor(a!) out) -> ()");
  ops.def(
      "layer_step(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor gate, Tensor conv_weight, "
      "Tensor(a!) conv_state, Tensor? A_log, Tensor? dt_bias, Tensor(b!) state, Tensor norm_weight, Tensor(c!) out, "
      "float scale, float? lower_bound, float eps) -> ()");
  ops.def(
      "whole_step(Tensor x, Tensor[] weights, Tensor? decay_weight, Tensor? gate_weight, Tensor out_weight, "
      "Tensor conv_weight, Tensor(a!) conv_state, Tensor? A_log, Tensor? dt_bias, Tensor(b!) state, "
      "Tensor norm_weight, float scale, float? lower_bound, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("short_conv", TORCH_BOX(&short_conv));
  ops.impl("gated_rms_norm", TORCH_BOX(&gated_rms_norm));
  ops.impl("few_row_linears", TORCH_BOX(&few_row_linears));
  ops.impl("layer_step", TORCH_BOX(&layer_step));
  ops.impl("whole_step", TORCH_BOX(&whole_step));
}
