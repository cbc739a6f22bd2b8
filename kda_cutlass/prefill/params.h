// The contract between the torch binding (host, checks everything) and the prefill kernels (device, check nothing).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "schedule.h"

namespace kda {

enum class Dtype : int { kBf16 = 0, kFp32 = 1 };
enum class Gate : int {
  kGiven = 0,       // g is the log decay (natural log, <= 0)
  kSoftplus = 1,    // g = -exp(A_log) * softplus(x + dt_bias)
  kLowerBound = 2,  // g = lower_bound * sigmoid(exp(A_log) * (x + dt_bias))
};

// A [B, T, heads, 128] tensor (or [B, T, heads]) whose last dimension is contiguous; strides in elements.
struct TensorView {
  const void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_token = 0;
  int64_t stride_head = 0;
};

// States of [HV, 128, 128], dense inside, one every `stride` elements.
struct StateView {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::kFp32;
};

// A one- or two-dimensional tensor of int32 or int64 with free strides.
struct IndexView {
  const void* data = nullptr;
  int64_t stride_row = 0;
  int64_t stride_column = 0;
  bool is_int64 = false;
};

// Where the sequences of a prefill start and end. Without `slots` sequence n has state n. With it, the state that entry
// n names; an entry outside [min_slot, num_slots) makes the sequence padding: its outputs are zero and no slot of its
// is read or written.
struct StateParams {
  StateView initial;     // data null: zeros; may alias final
  StateView final;       // data null: not wanted
  bool v_first = false;  // [V, K] instead of [K, V]
  IndexView slots;       // [N], or data null
  int64_t min_slot = 0;
  int64_t num_slots = 0;
  bool final_in_slots = false;        // else sequence n ends in state n; that of a padding sequence is zero
  const bool* has_initial = nullptr;  // [N]: false starts from zero; null: all have one
  int64_t has_initial_stride = 0;
};

// States inside sequences, at multiples of 16 or 64 tokens. Entry (n, i) of [N, columns] asks for the state of sequence
// n after `offsets` tokens in slot `slots`; with `indptr` sequence n has the entries indptr[n] up to, without, indptr[n
// + 1] of one row. An offset that is not positive, past the sequence's end or no multiple of `multiple`, and a slot
// outside [min_slot, num_slots), ask for nothing.
struct CheckpointParams {
  StateView states;  // data null: no checkpoints
  int64_t min_slot = 0;
  int64_t num_slots = 0;
  IndexView offsets;
  IndexView slots;  // shaped as offsets; data null: an entry's slot is its number
  int64_t columns = 0;
  const void* indptr = nullptr;  // [N + 1], or null
  bool indptr_is_int64 = false;
  int multiple = 16;  // or 64, which spares the launches for what lies between
};

struct PrefillParams {
  TensorView q, k, v, g;  // bf16, 16-byte aligned base and strides; g bf16 or fp32
  TensorView beta;        // bf16 or fp32, any strides
  Dtype g_dtype = Dtype::kBf16;
  Dtype beta_dtype = Dtype::kBf16;

  void* out = nullptr;  // bf16 [B, T, HV, 128], strides as below, 16-byte aligned
  int64_t out_stride_batch = 0;
  int64_t out_stride_token = 0;
  int64_t out_stride_head = 0;

  const float* A_log = nullptr;    // [HV] or null
  const float* dt_bias = nullptr;  // [HV, 128] or null

  StateParams state;
  CheckpointParams checkpoints;

  const void* cu_seqlens = nullptr;  // [N + 1] int32 or int64, or null: N = B sequences of T tokens
  bool cu_seqlens_is_int64 = false;

  int batch = 0;        // B (1 with cu_seqlens)
  int64_t tokens = 0;   // T
  int num_seqs = 0;     // N
  int heads = 0;        // H, heads of q and k
  int value_heads = 0;  // HV, heads of v, g, beta and the state; a multiple of H

  float scale = 1.f;
  float lower_bound = 0.f;
  Gate gate = Gate::kGiven;
  bool qk_l2norm = false;
  bool beta_sigmoid = false;        // beta holds logits
  bool allow_neg_eigval = false;    // 2 * sigmoid
  bool batch_invariant = false;     // a sequence's bits depend on nothing beside it
  int64_t longest = 0, chunks = 0;  // as in CallShape

  void* workspace = nullptr;  // 256-byte aligned
  int64_t workspace_bytes = 0;
};

// Bytes of workspace that a call needs, at most 208 MiB (or one chunk of every head, where that is more); with more it
// may run in fewer launches. Mirrored by flash_kda.prefill.workspace_size, which tests compare against this.
int64_t prefill_workspace_size(int64_t tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed);

// The same for the schedules that a call may take on a device of `sms` SMs; 0: the current one.
int64_t prefill_workspace_needed(int64_t tokens_per_batch, int batch, int num_seqs, int value_heads, bool packed,
                                 bool checkpoints, bool batch_invariant, int sms);

inline CallShape call_shape(const PrefillParams& p) {
  return {p.tokens,
          p.batch,
          p.num_seqs,
          p.value_heads,
          p.cu_seqlens != nullptr,
          p.checkpoints.states.data != nullptr,
          p.batch_invariant,
          p.longest,
          p.chunks};
}

// Launches the prefill on `stream`, by the schedules of its shape. Returns the first CUDA error of the launches.
cudaError_t launch_prefill(const PrefillParams& params, const Schedules& schedules, cudaStream_t stream);

}  // namespace kda
