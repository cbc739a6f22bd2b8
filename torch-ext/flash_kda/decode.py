"""The CUDA decode: the torch op ``decode`` (sm_90a, bfloat16, K = V = 128) and what it wants prepared.

A decode step takes 3 us on the GPU, so its way through Python is short: :func:`attempt` looks at what only Python knows and
leaves every other check to the op, which refuses before it writes. What is refused takes the way of all other calls, through
``contract.py``, which says what is wrong, and ``dispatch.py``, which finds another path.
"""

from __future__ import annotations

import logging

import torch

from ._ops import add_op_namespace_prefix, ops
from .contract import STATE_FLOATS, Call, States, as_parameter
from .prefill import HEAD_DIM, batch_invariant, flags, goes_straight, new_results

logger = logging.getLogger("flash_kda")

TOKENS = 16  # a sequence, on average; with more the prefill kernel is faster
ALIGNMENT = 16  # bytes: the kernel moves states in pieces of this size
CHANNELS = 4  # that the kernel reads at a time of q, k, v and g

AVAILABLE = hasattr(ops, "decode")
if AVAILABLE:
    _decode_new = ops.decode_new.default

    @torch.library.register_fake(add_op_namespace_prefix("decode"))
    def _(*args) -> None:
        return None

    @torch.library.register_fake(add_op_namespace_prefix("decode_new"))
    def _(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, indices, accepted, out, token_states, *options):
        _scale, _lower_bound, flags, _min_state_index = options
        return new_results(v, out, cu_seqlens, flags)


def takes(call: Call) -> bool:
    """Whether the decode kernel rather than the prefill kernel serves a recurrent call.

    The lengths of packed sequences are on the device, so their average decides, unless no bit may depend on what shares
    the batch.
    """
    return call.batch_invariant or are_few(call.q, call.cu_seqlens)


def are_few(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    """Whether a sequence has few tokens on average. Tensors that nobody has looked at may be no tensors; then it is True."""
    try:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return q.shape[0] * q.shape[1] <= TOKENS * sequences
    except (AttributeError, IndexError):
        return True


def serves(states: torch.Tensor, lead: int) -> bool:
    """Whether the kernel reads and writes these states in place; ``lead`` dimensions before [HV, 128, 128] have free
    strides."""
    unit = ALIGNMENT // states.element_size()
    return states.data_ptr() % ALIGNMENT == 0 and all(
        size <= 1 or stride % unit == 0 for size, stride in zip(states.shape[:lead], states.stride())
    )


def attempt(
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
    ssm_state_indices,
    num_accepted_tokens,
    token_states,
    min_state_index,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Runs a call of :func:`flash_kda.fused_recurrent_kda` with few tokens that needs no preparation, or returns None and has written
    nothing."""
    try:
        if not goes_straight(q, k, v, g, beta, A_log, dt_bias, initial_state):
            return None
        if not (scale is None or type(scale) is float) or (cu_seqlens is not None and batch_invariant()):
            return None
        new_out, final_state = _decode_new(
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            initial_state,
            cu_seqlens,
            ssm_state_indices,
            num_accepted_tokens,
            out,
            token_states,
            scale,
            lower_bound,
            flags(
                use_qk_l2norm_in_kernel,
                use_gate_in_kernel,
                use_beta_sigmoid_in_kernel,
                allow_neg_eigval,
                state_v_first,
                output_final_state,
                inplace_final_state,
            ),
            min_state_index,
        )
    except Exception:  # whatever it was, the checked way meets it again and names it
        return None
    if logger.isEnabledFor(logging.INFO):
        logger.info("cuda decode: every condition of the kernel holds")
    return new_out if out is None else out, initial_state if inplace_final_state else final_state


def run(call: Call, out: torch.Tensor, final_state: torch.Tensor | None, states: States | None = None) -> None:
    """Writes ``out`` and what ``states`` and ``final_state`` (if not None) ask for, without synchronising.

    ``final_state`` may be ``call.initial_state``. q, k, v or g are copied where an address or a stride is no multiple of 4
    elements; states only where no ``states`` are given.
    """
    HV = call.v.shape[2]
    inplace = final_state is not None and final_state is call.initial_state
    initial_state = call.initial_state
    if states is not None:
        inplace = states.inplace_final_state
    elif initial_state is not None and not inplace:
        initial_state = initial_state.contiguous()
        initial_state = initial_state if serves(initial_state, 1) else initial_state.clone()
    q, k, v, g = (x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in call[:4])
    ops.decode(
        q,
        k,
        v,
        g,
        call.beta if call.beta.dtype in STATE_FLOATS else call.beta.float(),
        None if call.A_log is None else as_parameter(call.A_log, (HV,)),
        None if call.dt_bias is None else as_parameter(call.dt_bias, (HV, HEAD_DIM)),
        initial_state,
        None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
        None if states is None else states.ssm_state_indices,
        None if states is None else states.num_accepted_tokens,
        out,
        None if inplace else final_state,
        None if states is None else states.token_states,
        call.scale,
        call.lower_bound,
        call.use_gate_in_kernel,
        call.use_qk_l2norm_in_kernel,
        call.use_beta_sigmoid_in_kernel,
        call.allow_neg_eigval,
        call.state_v_first,
        inplace,
        0 if states is None else states.min_state_index,
    )


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % (CHANNELS * x.element_size()) == 0 and all(
        size <= 1 or stride % CHANNELS == 0 for size, stride in zip(x.shape[:3], x.stride())
    )
