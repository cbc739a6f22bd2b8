"""The public prefill functions: :func:`chunk_kda` (FLA's interface), :func:`fwd` and its workspace (FlashKDA's)."""

from __future__ import annotations

import warnings

import torch

from . import dispatch, prefill
from .contract import check_call, check_outputs, check_prefill_states


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    chunk_size: int = 64,
    batch_invariant: bool = False,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention over whole sequences.

    For each sequence and value head, with state ``S`` ``[K, V]`` and log decay ``g_t`` ``[K]``::

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T          o_t = scale * S_t^T q_t

    Names, defaults, shapes and meaning are those of ``fla.ops.kda.chunk_kda`` 0.6.0. ``dispatch.py`` tells which path
    runs.

    Args:
        q, k: ``[B, T, H, K]``, bfloat16, float16, float32 or float64. The last dimension must be contiguous, other
            strides are free; so for ``v`` and ``g``. (The CUDA kernel reads views of a packed projection in place where
            addresses and strides are multiples of 16 bytes, and copies the tensor otherwise.)
        v: ``[B, T, HV, V]``, dtype of q. HV is a multiple of H: head h of q and k serves value heads h*HV/H to
            (h+1)*HV/H - 1.
        g: ``[B, T, HV, K]``, any floating dtype. The log decay (natural logarithm, <= 0, unbounded), or with
            ``use_gate_in_kernel`` the raw gate x.
        beta: ``[B, T, HV]``, any floating dtype and strides. The step, or with ``use_beta_sigmoid_in_kernel`` its
            logits.
        scale: factor on the output. Default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]`` (``[N, HV, V, K]`` with ``state_v_first``), float32 or bfloat16 (or float64
            beside float64 inputs); N sequences, which is B without ``cu_seqlens``. Default: zeros. Not modified.
        output_final_state: whether to return the state after the last token of each sequence. Default False.
        use_qk_l2norm_in_kernel: divide each row of q and k by ``sqrt(sum(x^2) + 1e-6)``. Default False.
        use_gate_in_kernel: compute the log decay from ``g``, ``A_log`` and ``dt_bias``: without ``lower_bound`` it is
            ``-exp(A_log) * softplus(g + dt_bias)``, with it ``lower_bound * sigmoid(exp(A_log) * (g + dt_bias))``,
            whatever ``safe_gate`` says. Default False.
        use_beta_sigmoid_in_kernel: use ``sigmoid(beta)``. Default False.
        allow_neg_eigval: use ``2 * sigmoid(beta)``; needs ``use_beta_sigmoid_in_kernel``. Default False.
        safe_gate: with ``use_gate_in_kernel`` it requires ``lower_bound``. Otherwise without effect: every path here is
            safe for every gate. Default False.
        lower_bound: finite and negative (FLA's [-5, 0) is not required). Only read with ``use_gate_in_kernel``. Default
            None.
        disable_recompute: without effect; the backward pass always recomputes. Default False.
        return_intermediate_states: not supported, must be False.
        state_v_first: states are ``[V, K]`` instead of ``[K, V]``. Default False.
        cu_seqlens: ``[N + 1]`` int32 or int64 on q's device: sequence n is tokens ``cu_seqlens[n]`` up to, without,
            ``cu_seqlens[n + 1]`` of the packed batch, B = 1. Sequences may be empty; rows of ``o`` past the last are
            left uninitialised. The CUDA kernel never brings the contents to the host. Wrong ones lead nowhere out of
            bounds, and ``FLASH_KDA_VALIDATE=1`` makes them an error.
        cu_seqlens_cpu: the same on the host, contiguous; lets the CUDA path choose its schedule by the lengths (10 us less
            for 32 heads) and spares the PyTorch path a synchronisation when q is on another device.
        cp_context: context parallelism, not supported, must be None.
        use_graph: without effect: each call can be captured in a CUDA graph and replayed after ``cu_seqlens`` has
            changed.
        max_num_seqs: with ``use_graph`` and ``cu_seqlens``, must equal N if given.
        A_log: HV elements in any shape, any floating dtype. Required by the softplus gate; None means a factor of 1 in
            the lower-bound gate. Only read with ``use_gate_in_kernel``.
        dt_bias: HV * K elements in any shape, any floating dtype. Default: zeros. Only read with
            ``use_gate_in_kernel``.
        chunk_size: 32 or 64, without effect on the result but for rounding; 64 is always used.
        batch_invariant: the bits of a sequence's result depend on that sequence alone, not on what shares the batch.
            The PyTorch path then walks sequences one by one. The CUDA kernel does not cut a few long sequences where
            all their gates forget, which else leaves out less than 2^-64 of a state; its other schedules give the same
            bits in any batch. Default False.
        transpose_state_layout: FLA's deprecated name of ``state_v_first``.

    Returns:
        ``o`` ``[B, T, HV, V]`` in the dtype of q, and the final state, ``[N, HV, K, V]`` (or V-first) float32 (float64
        for float64 inputs), or None without ``output_final_state``. An empty sequence returns its initial state.

    Raises:
        ValueError, TypeError: an argument that breaks the above, named with what was expected and what came.
        NotImplementedError: ``cp_context`` or ``return_intermediate_states``.
        RuntimeError: ``FLASH_KDA_STRICT=1`` and CUDA tensors the kernel cannot serve.

    Differentiable once with respect to q, k, v, g, beta, A_log, dt_bias and initial_state.

    Source: Kimi Linear (arXiv:2510.26692), chunkwise form of KDA.
    """
    if transpose_state_layout is not None:
        if state_v_first:
            raise ValueError(
                "transpose_state_layout: expected it absent beside state_v_first, whose deprecated name it is, got both"
            )
        warnings.warn("transpose_state_layout is deprecated, use state_v_first", DeprecationWarning, stacklevel=2)
        state_v_first = transpose_state_layout
    if cp_context is not None:
        raise NotImplementedError("cp_context: context parallelism is not supported, expected None")
    if return_intermediate_states:
        raise NotImplementedError("return_intermediate_states: not supported, expected False")
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size: expected 32 or 64, got {chunk_size}")
    plain = not (use_graph or batch_invariant or (safe_gate and lower_bound is None))
    if prefill.AVAILABLE and plain and not torch.compiler.is_compiling():
        result = prefill.attempt(
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
            cu_seqlens_cpu=cu_seqlens_cpu,
        )
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
        cu_seqlens_cpu=cu_seqlens_cpu,
        scale=scale,
        lower_bound=lower_bound,
        use_gate_in_kernel=use_gate_in_kernel,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        safe_gate=safe_gate,
        batch_invariant=batch_invariant,
    )
    if use_graph and cu_seqlens is not None and max_num_seqs is not None and max_num_seqs != call.num_sequences:
        raise ValueError(f"max_num_seqs: expected the {call.num_sequences} sequences of cu_seqlens, got {max_num_seqs}")
    return dispatch.execute(call, output_final_state)


def get_workspace_size(tokens: int, heads: int, num_sequences: int = 1) -> int:
    """Bytes of workspace that :func:`fwd` wants at most, wherever it starts.

    Never falls when ``tokens`` or ``num_sequences`` grows, so what suits the largest batch suits every other. At most
    208 MiB, or one chunk of every head where that is more. Name and arguments are FlashKDA's.

    Args:
        tokens: B * T; with ``cu_seqlens``, the length of the packed buffer.
        heads: HV, value heads.
        num_sequences: N.
    """
    return prefill.workspace_size(1, tokens, num_sequences, heads, True) + prefill.WORKSPACE_ALIGNMENT - 1


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    out: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    workspace: torch.Tensor | None = None,
    use_gate_in_kernel: bool = True,
    use_qk_l2norm_in_kernel: bool = True,
    use_beta_sigmoid_in_kernel: bool = True,
    state_v_first: bool = True,
    ssm_state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    min_state_index: int = 0,
    checkpoint_state: torch.Tensor | None = None,
    checkpoint_offsets: torch.Tensor | None = None,
    checkpoint_indices: torch.Tensor | None = None,
    checkpoint_indptr: torch.Tensor | None = None,
    checkpoint_multiple: int = 16,
) -> None:
    """KDA prefill into the caller's tensors, with the interface of FlashKDA: FLA and SGLang call this name.

    As :func:`chunk_kda` with V-first states; ``lower_bound=None`` selects the softplus gate, which FlashKDA does not have.
    :func:`flash_kda.vllm.fwd` has the argument order of vLLM's fork. The arguments behind ``use_beta_sigmoid_in_kernel``
    are what else serving engines ask for: state pools, and the states inside a sequence that prefix caches keep. Nothing is
    gathered, scattered or brought to the host for them.

    Args:
        q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; g: raw gate ``[B, T, HV, K]``; beta: logits ``[B, T, HV]``.
        scale: factor on the output; None means ``K ** -0.5``.
        out: ``[B, T, HV, V]`` in q's dtype, last dimension contiguous; written in place. Rows that no sequence covers
            stay as they are.
        A_log: HV elements, or None with ``lower_bound``; dt_bias: HV * K elements, or None.
        lower_bound: finite and negative, or None.
        initial_state: ``[N, HV, V, K]`` float32 or bfloat16, or None for zeros.
        final_state: ``[N, HV, V, K]`` float32 or bfloat16, contiguous, written in place in its own dtype; may be
            ``initial_state``.
        cu_seqlens: ``[N + 1]`` int32 or int64 on q's device; B = 1 with it.
        workspace: uint8 of :func:`get_workspace_size` bytes, 1-D, contiguous; its contents are lost. Default: allocated.
        use_gate_in_kernel: False takes ``g`` as the log decay itself; then ``A_log``, ``dt_bias`` and ``lower_bound``
            are not read. Default True.
        use_qk_l2norm_in_kernel: False takes q and k as they are. Default True.
        use_beta_sigmoid_in_kernel: False takes ``beta`` as the step itself. Default True.
        state_v_first: False for states ``[K, V]``. Default True.
        ssm_state_indices: ``[N]`` int32 or int64, any stride; makes ``initial_state`` and ``final_state`` pools of any
            number of slots, ``[slots, HV, V, K]``, dense but for the stride of the slots, usually one and the same
            tensor. Sequence n starts and ends in slot ``ssm_state_indices[n]``. An index below ``min_state_index`` or
            beyond a pool makes the sequence padding: its outputs are zero, and no slot is read or written for it. The
            slots of all other sequences must differ. Default: sequence n has state n.
        has_initial_state: ``[N]`` bool, any stride: where False the sequence starts from zero, whatever its state holds.
            Default: all True.
        min_state_index: 0 (the default) where negative indices are padding, as in SGLang; 1 where slot 0 is too, as in
            vLLM.
        checkpoint_state: ``[slots, HV, V, K]`` float32 or bfloat16, dense but for the stride of the slots: receives
            states inside sequences; may be the pool, in slots that no sequence here has. Default None.
        checkpoint_offsets: ``[N]`` or ``[N, C]`` int32 or int64, any strides: the state of sequence n after so many
            of its tokens is wanted, a multiple of ``checkpoint_multiple`` up to its length. 0, negative and too large ones
            ask for nothing; so do other numbers, which ``FLASH_KDA_VALIDATE=1`` makes an error. With
            ``checkpoint_indptr`` ``[M]``.
        checkpoint_indices: shaped as ``checkpoint_offsets``, int32 or int64: the slot of each; one below
            ``min_state_index`` or beyond the slots asks for nothing. The others must differ, from one another and from the
            slots in which sequences start or end. Default: entry i, counted through rows, goes to slot i.
        checkpoint_indptr: ``[N + 1]`` int32 or int64: sequence n has the entries ``checkpoint_indptr[n]`` up to,
            without, ``checkpoint_indptr[n + 1]``, as many as it likes. Default None.
        checkpoint_multiple: 16 (the default) or 64, which spares the kernels the way from whole chunks of 64 tokens to
            what lies between them.

    Raises:
        ValueError, TypeError: as :func:`chunk_kda`, before anything is written.

    Not differentiable: runs under ``torch.no_grad``.
    """
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
        allow_neg_eigval=False,
        state_v_first=state_v_first,
        pool=ssm_state_indices is not None,
    )
    states = check_prefill_states(
        call,
        final_state,
        ssm_state_indices,
        has_initial_state,
        min_state_index,
        checkpoint_state,
        checkpoint_offsets,
        checkpoint_indices,
        checkpoint_indptr,
        checkpoint_multiple,
    )
    size = 0 if workspace is None else get_workspace_size(q.shape[0] * q.shape[1], v.shape[2], call.num_sequences)
    check_outputs(call, out, final_state, workspace, size, pool=ssm_state_indices is not None)
    dispatch.execute_into(call, out, final_state, workspace, states)
