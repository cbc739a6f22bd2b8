// The contract between the torch binding (host, checks everything but contents) and the decode kernel (device, clamps
// what lies in index tensors, checks nothing else).
#pragma once

#include "../prefill/params.h"  // Dtype, Gate, TensorView, StateView, IndexView, kHeadDim

namespace kda {

// What of a sequence's states goes to final_state.
enum class Keep : int {
  kNothing = 0,
  kLast = 1,         // the state after the last token, to state n for sequence n
  kLastInSlot = 2,   // the same, to the slot that column 0 names
  kEveryInSlot = 3,  // the state after token t, to the slot that column t names
};

struct DecodeParams {
  TensorView q, k, v, g;  // bf16, g bf16 or fp32; any strides, last dimension contiguous
  TensorView beta;        // bf16 or fp32, any strides
  Dtype g_dtype = Dtype::kBf16;
  Dtype beta_dtype = Dtype::kBf16;
  TensorView out;  // bf16, written

  const float* A_log = nullptr;    // [HV] or null
  const float* dt_bias = nullptr;  // [HV, 128] or null

  // Where a sequence starts. Without `slots` sequence n starts from state n. With it, from the state that its entry of
  // column 0 names, or of column num_accepted[n] - 1. An entry outside [min_slot, num_slots) makes the sequence
  // padding: its outputs are zero and its states are neither read nor written. All states start at multiples of 16
  // bytes.
  StateView initial_state;  // data null: zeros
  IndexView slots;          // [N, slot_columns], or data null
  IndexView num_accepted;   // [N], or data null: 1
  int64_t num_slots = 0;
  int64_t min_slot = 0;
  int slot_columns = 0;

  // What it leaves behind; final_state may alias initial_state.
  Keep keep = Keep::kNothing;
  StateView final_state;
  StateView token_states;  // the state after every token, [B, T] of them, or data null
  int64_t token_states_stride_batch = 0;
  bool state_v_first = false;  // all states are [V, K] instead of [K, V]

  const void* cu_seqlens = nullptr;  // [N + 1] int32 or int64, or null: N = B sequences of T tokens
  bool cu_seqlens_is_int64 = false;

  int tokens = 0;       // T
  int num_seqs = 0;     // N
  int value_heads = 0;  // HV, heads of v, g, beta and the state
  int group = 1;        // HV / H: value heads that share a head of q and k

  float scale = 1.f;
  float lower_bound = 0.f;
  Gate gate = Gate::kGiven;
  bool qk_l2norm = false;
  bool beta_sigmoid = false;      // beta holds logits
  bool allow_neg_eigval = false;  // 2 * sigmoid
};

// Launches the decode kernel on `stream`. Returns the CUDA error of the launch.
cudaError_t launch_decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace kda
