// The operators of the extension, as torch calls them; shapes and layouts are checked here, and nowhere below.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

void prefill(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
             const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
             const std::optional<torch::stable::Tensor>& A_log, const std::optional<torch::stable::Tensor>& dt_bias,
             const std::optional<torch::stable::Tensor>& initial_state,
             const std::optional<torch::stable::Tensor>& cu_seqlens, torch::stable::Tensor& out,
             const std::optional<torch::stable::Tensor>& final_state, torch::stable::Tensor& workspace, double scale,
             std::optional<double> lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel,
             bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first,
             const std::optional<torch::stable::Tensor>& ssm_state_indices,
             const std::optional<torch::stable::Tensor>& has_initial_state, bool final_state_in_slots,
             int64_t min_state_index, const std::optional<torch::stable::Tensor>& checkpoint_state,
             const std::optional<torch::stable::Tensor>& checkpoint_offsets,
             const std::optional<torch::stable::Tensor>& checkpoint_indices,
             const std::optional<torch::stable::Tensor>& checkpoint_indptr, int64_t checkpoint_multiple,
             bool batch_invariant);

// The same for a call without pools and checkpoints, with a workspace and results of its own, as far as they are wanted: it
// returns `out`, absent where the caller brings one, and `final_state`. Refuses what it cannot serve before anything is
// written. `cu_seqlens_cpu`, the same on the host, chooses the schedule and no more.
std::tuple<std::optional<torch::stable::Tensor>, std::optional<torch::stable::Tensor>> prefill_new(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
    const std::optional<torch::stable::Tensor>& A_log, const std::optional<torch::stable::Tensor>& dt_bias,
    const std::optional<torch::stable::Tensor>& initial_state, const std::optional<torch::stable::Tensor>& cu_seqlens,
    const std::optional<torch::stable::Tensor>& cu_seqlens_cpu, const std::optional<torch::stable::Tensor>& out,
    std::optional<double> scale, std::optional<double> lower_bound, int64_t flags);

// Bytes of workspace that `prefill` asks for; flash_kda.prefill.workspace_size computes the same in Python.
int64_t prefill_workspace_size(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                               bool packed);
int64_t prefill_workspace_needed(int64_t tokens_per_batch, int64_t batch, int64_t num_seqs, int64_t value_heads,
                                 bool packed, bool checkpoints, bool batch_invariant, int64_t sms);

void decode(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
            const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
            const std::optional<torch::stable::Tensor>& A_log, const std::optional<torch::stable::Tensor>& dt_bias,
            const std::optional<torch::stable::Tensor>& initial_state,
            const std::optional<torch::stable::Tensor>& cu_seqlens,
            const std::optional<torch::stable::Tensor>& ssm_state_indices,
            const std::optional<torch::stable::Tensor>& num_accepted_tokens, torch::stable::Tensor& out,
            const std::optional<torch::stable::Tensor>& final_state,
            const std::optional<torch::stable::Tensor>& token_states, double scale, std::optional<double> lower_bound,
            bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel,
            bool allow_neg_eigval, bool state_v_first, bool inplace_final_state, int64_t min_state_index);

// The same with results of its own, as far as they are wanted: it returns `out`, absent where the caller brings one, and
// `final_state`. Refuses what `decode` refuses, before anything is written.
std::tuple<std::optional<torch::stable::Tensor>, std::optional<torch::stable::Tensor>> decode_new(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& g, const torch::stable::Tensor& beta,
    const std::optional<torch::stable::Tensor>& A_log, const std::optional<torch::stable::Tensor>& dt_bias,
    const std::optional<torch::stable::Tensor>& initial_state, const std::optional<torch::stable::Tensor>& cu_seqlens,
    const std::optional<torch::stable::Tensor>& ssm_state_indices,
    const std::optional<torch::stable::Tensor>& num_accepted_tokens, const std::optional<torch::stable::Tensor>& out,
    const std::optional<torch::stable::Tensor>& token_states, std::optional<double> scale,
    std::optional<double> lower_bound, int64_t flags, int64_t min_state_index);
