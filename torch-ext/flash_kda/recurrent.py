"""The public decode function, with FLA's interface."""

from __future__ import annotations

import torch

from .chunk import chunk_kda


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention for a few tokens a sequence: one decode step, or a short continuation.

    Names, order, defaults, shapes and meaning are those of ``fla.ops.kda.fused_recurrent_kda`` 0.6.0. Each is described
    at :func:`chunk_kda`, which computes the same function and serves this call too: a chunk of one token is one step
    of the recurrence.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of q, and the final state ``[N, HV, K, V]`` (or V-first) float32, or None.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`chunk_kda`.
    """
    return chunk_kda(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        A_log=A_log,
        dt_bias=dt_bias,
        transpose_state_layout=transpose_state_layout,
    )
