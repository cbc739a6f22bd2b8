"""The public decode function, with FLA's interface."""

from __future__ import annotations

import warnings

import torch

from . import decode, dispatch, prefill
from .contract import check_call, check_outputs, check_states


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
    out: torch.Tensor | None = None,
    inplace_final_state: bool = False,
    ssm_state_indices: torch.Tensor | None = None,
    num_accepted_tokens: torch.Tensor | None = None,
    min_state_index: int = 0,
    token_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention for a few tokens a sequence: one decode step, or a short continuation.

    Names, order, defaults, shapes and meaning are those of ``fla.ops.kda.fused_recurrent_kda`` 0.6.0, and those of
    :func:`chunk_kda`, which computes the same function and describes each. Up to 16 tokens a sequence run in a kernel of
    their own (``dispatch.py``). The arguments that serving engines add are by name only:

    Args:
        out: ``[B, T, HV, V]`` in q's dtype, last dimension contiguous; written in place and returned. Rows that no
            sequence covers stay as they are. May be ``v``, which it then overwrites. Default: a new tensor.
        inplace_final_state: leave the final states in ``initial_state`` and return that, in its own dtype; it must be
            contiguous unless there are indices. Default False: ``initial_state`` is not modified.
        ssm_state_indices: int32 or int64, any strides; makes ``initial_state`` a pool of any number of slots, ``[slots,
            HV, K, V]`` (or V-first), dense but for the stride of the slots. ``[N]``: sequence n starts from slot
            ``ssm_state_indices[n]``, and with ``inplace_final_state`` ends there. ``[N, S]``, for speculative decoding:
            it starts from the slot in column ``num_accepted_tokens[n] - 1``, and with ``inplace_final_state`` the state
            after its token t goes to the slot in column t. An index below ``min_state_index`` or beyond the pool names
            no state. A sequence that starts from none is padding: its outputs are zero, the pool and ``token_states``
            are left alone, and a final state returned for it is zero. The slots of all other sequences must differ.
        num_accepted_tokens: ``[N]`` int32 or int64; taken as within 1 to S. Default: 1 for all.
        min_state_index: 0 (the default) where negative indices are padding, as in SGLang; 1 where slot 0 is too, as in
            vLLM.
        token_states: ``[B, T, HV, K, V]`` (or V-first), float32 or bfloat16, dense but for the first two strides: the
            state after each token is written there, which verifies a draft without committing it. Default None.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of q, and the final state: ``[N, HV, K, V]`` (or V-first) float32,
        ``initial_state`` with ``inplace_final_state``, or None.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`chunk_kda`, before anything is written.

    Differentiable as :func:`chunk_kda`, unless one of the arguments above is used.
    """
    if transpose_state_layout is not None:
        if state_v_first:
            raise ValueError(
                "transpose_state_layout: expected it absent beside state_v_first, whose deprecated name it is, got both"
            )
        warnings.warn("transpose_state_layout is deprecated, use state_v_first", DeprecationWarning, stacklevel=2)
        state_v_first = transpose_state_layout
    if decode.AVAILABLE and not torch.compiler.is_compiling():
        inputs = (
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            scale,
            initial_state,
            output_final_state,
            use_qk_l2norm_in_kernel,
            use_gate_in_kernel,
            use_beta_sigmoid_in_kernel,
            allow_neg_eigval,
            lower_bound,
            state_v_first,
            cu_seqlens,
            out,
            inplace_final_state,
        )
        serving = ssm_state_indices, num_accepted_tokens, token_states, min_state_index
        result = None
        if decode.are_few(q, cu_seqlens):
            result = decode.attempt(*inputs, *serving)
        elif serving == (None, None, None, 0):
            result = prefill.attempt(*inputs)
        if result is not None:
            return result
    call = check_call(
        q,
        k,
        v,
        g,
        beta,
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        scale=scale,
        lower_bound=lower_bound,
        use_gate_in_kernel=use_gate_in_kernel,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        recurrent=True,
        pool=ssm_state_indices is not None,
    )
    states = check_states(
        call, ssm_state_indices, num_accepted_tokens, token_states, inplace_final_state, min_state_index
    )
    pooled = ssm_state_indices is not None or token_states is not None
    if not pooled and not inplace_final_state and out is None:
        return dispatch.execute(call, output_final_state)
    if out is None:
        out = v.new_empty(v.shape)
    else:
        check_outputs(call, out, None)
    final_state = None
    if inplace_final_state:
        final_state = initial_state
    elif output_final_state:
        final_state = v.new_empty(call.state_shape, dtype=call.state_dtype)
    if pooled:
        dispatch.execute_pooled(call, states, out, None if inplace_final_state else final_state)
    else:
        dispatch.execute_into(call, out, final_state)
    return out, final_state
