// The contract between the torch binding (host, checks everything) and the kernels of the layer around KDA: the short
// convolution, the gated norm and the projections of a few rows (device, check nothing).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kda_cutlass/prefill/params.h"  // kHeadDim

namespace kda {

constexpr int kConvParts = 3;       // q, k and v: as many inputs as one call takes
constexpr int kMaxConvWidth = 4;    // taps; at least 2
constexpr int kVectorChannels = 8;  // bf16 channels that a thread reads and writes at a time: 16 bytes

// One of the inputs, [B, T, C] bf16, channels contiguous, 16-byte aligned base and strides; strides in elements.
struct ConvInput {
  const void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_token = 0;
};

// y[t, c] = act(bias[c] + sum_i weight[c, W - 1 - i] x[t - i, c]), each sequence by itself.
struct ConvParams {
  ConvInput x[kConvParts];  // `parts` of them, of `channels` each, that follow one another in weight, bias and state
  int parts = 1;
  int channels = 0;  // C of one part, a multiple of 8
  int batch = 0;     // B (1 with cu_seqlens)
  int tokens = 0;    // T

  void* out = nullptr;  // [parts, B, T, C] bf16, contiguous

  const void* weight = nullptr;  // [parts * C, width]
  const void* bias = nullptr;    // [parts * C] or null, dtype of weight
  bool weight_is_fp32 = false;   // else bf16
  int width = 0;                 // W, 2 to 4
  bool silu = false;

  // The last inputs of a sequence, the newest in the last column: [N, parts * C, columns] bf16, contiguous.
  const void* initial_state = nullptr;  // null for zeros; may be final_state
  void* final_state = nullptr;          // null when not wanted
  int columns = 0;                      // W - 1 or W

  const void* cu_seqlens = nullptr;  // [N + 1] int32 or int64, or null: N = B sequences of T tokens
  bool cu_seqlens_is_int64 = false;
  int num_seqs = 0;  // N
};

cudaError_t launch_conv(const ConvParams& params, cudaStream_t stream);

// out = x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate), row by row.
struct GatedNormParams {
  const void* x = nullptr;       // [rows, channels] bf16, contiguous
  const void* gate = nullptr;    // likewise
  void* out = nullptr;           // likewise; may be x or gate
  const void* weight = nullptr;  // [channels]
  bool weight_is_fp32 = false;   // else bf16
  int64_t rows = 0;
  int channels = 0;  // 64, 128 or 256
  float eps = 0.f;
};

cudaError_t launch_gated_norm(const GatedNormParams& params, cudaStream_t stream);

// y = x W^T for a few rows of x and several weights, all of the same depth.
constexpr int kMaxLinears = 6;
constexpr int kMaxLinearRows = 32;

struct LinearJob {
  const void* x = nullptr;       // [rows, depth] bf16, contiguous
  const void* weight = nullptr;  // [outputs, depth] bf16, contiguous
  int outputs = 0;
  int first_output = 0;  // outputs of the jobs before
  int first_block = 0;   // filled in by launch_linears
};

struct LinearsParams {
  LinearJob jobs[kMaxLinears];
  int count = 0;
  int depth = 0;        // a multiple of 8
  int rows = 0;         // 1 to 32
  void* out = nullptr;  // bf16: [rows, outputs] of a job after that of another
};

// Takes `params` by value to lay out the grid.
cudaError_t launch_linears(LinearsParams params, cudaStream_t stream);

// Likewise one of them alone, the last of a row of kernels: its weights come while these run.
cudaError_t launch_last_linear(LinearsParams params, cudaStream_t stream);

// One token of each sequence from the projections to the output projection: convolution with SiLU, KDA with its gate,
// the sigmoid of beta and normalised q and k, gated norm. Heads of 128 channels.
constexpr int kStepTaps = 4;  // of the convolution, and columns of its state

struct StepParams {
  const void* qkv[kConvParts];  // [N, H * 128] bf16, contiguous; so are decay and gate
  const void* decay = nullptr;  // the input of the decay's gate
  const void* gate = nullptr;   // the norm's, before the sigmoid
  // Or both [N, 128], before these second projections, [H * 128, 128] bf16; only where step_takes_slices().
  const void* decay_weight = nullptr;
  const void* gate_weight = nullptr;
  const void* beta = nullptr;  // [N, H] bf16 logits
  void* out = nullptr;         // [N, H * 128] bf16

  const void* conv_weight = nullptr;  // [3 * H * 128, 4]
  bool conv_weight_is_fp32 = false;   // else bf16
  void* conv_state = nullptr;         // [N, 3 * H * 128, 4] bf16, updated
  const float* A_log = nullptr;       // [H], or null: 0
  const float* dt_bias = nullptr;     // [H, 128], or null: 0
  float* state = nullptr;             // [N, H, 128, 128] K-first, updated
  const void* norm_weight = nullptr;  // [128]
  bool norm_weight_is_fp32 = false;   // else bf16

  int heads = 0;      // H
  int sequences = 0;  // N
  bool softplus = false;
  float lower_bound = 0.f;  // of the decay's gate, unless softplus
  float scale = 1.f;
  float eps = 0.f;
};

// Few heads need a CTA for every slice of value channels to reach every SM. There the kernel does the gates' second
// projections too, but only behind launch_linears.
constexpr bool step_takes_slices(int heads, int64_t sequences) { return heads * sequences < 128; }

cudaError_t launch_step(const StepParams& params, cudaStream_t stream);

}  // namespace kda
