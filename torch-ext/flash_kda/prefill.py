"""The CUDA prefill: the torch op ``prefill`` (sm_90a, bfloat16, K = V = 128) and what it wants prepared.

Builds without CUDA have no such op; ``AVAILABLE`` says so and :func:`run` is never called.
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from ._ops import add_op_namespace_prefix, ops
from .contract import STATE_FLOATS, Call, PrefillStates, as_parameter

logger = logging.getLogger("flash_kda")

HEAD_DIM = 128
CHUNK = 64
# What the prologue hands to the recurrence for one chunk and value head (kda_cutlass/prefill/params.h)
RECORD_BYTES = 66304
STATE_BYTES = HEAD_DIM * HEAD_DIM * 4
# Longer calls run in slabs that take turns in this much; a slab hands the states of its heads to the next.
WORKSPACE_LIMIT = 208 << 20
FLAG_BYTES = 4096  # kFlagBytes in schedule.h
ALIGNMENT = 16  # bytes: TMA reads rows at such addresses and strides
WORKSPACE_ALIGNMENT = 256  # bytes

# Bits of the `flags` of the ops that allocate their results, named as the arguments (torch_binding.cpp)
USE_QK_L2NORM_IN_KERNEL = 1
USE_GATE_IN_KERNEL = 2
USE_BETA_SIGMOID_IN_KERNEL = 4
ALLOW_NEG_EIGVAL = 8
STATE_V_FIRST = 16
OUTPUT_FINAL_STATE = 32
INPLACE_FINAL_STATE = 64


AVAILABLE = hasattr(ops, "prefill")
if AVAILABLE:
    _prefill_new = ops.prefill_new.default

    @torch.library.register_fake(add_op_namespace_prefix("prefill"))
    def _(*args, **kwargs) -> None:
        return None

    @torch.library.register_fake(add_op_namespace_prefix("prefill_new"))
    def _(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, cu_seqlens_cpu, out, scale, lower_bound, flags):
        return new_results(v, out, cu_seqlens, flags)


def flags(
    use_qk_l2norm_in_kernel,
    use_gate_in_kernel,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
    state_v_first,
    output_final_state,
    inplace_final_state,
) -> int:
    return (
        (USE_QK_L2NORM_IN_KERNEL if use_qk_l2norm_in_kernel else 0)
        | (USE_GATE_IN_KERNEL if use_gate_in_kernel else 0)
        | (USE_BETA_SIGMOID_IN_KERNEL if use_beta_sigmoid_in_kernel else 0)
        | (ALLOW_NEG_EIGVAL if allow_neg_eigval else 0)
        | (STATE_V_FIRST if state_v_first else 0)
        | (OUTPUT_FINAL_STATE if output_final_state else 0)
        | (INPLACE_FINAL_STATE if inplace_final_state else 0)
    )


def new_results(v, out, cu_seqlens, flags: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What such an op returns: the output, unless the caller brings one, and the final state, where it is asked for."""
    new_out = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else None
    if not flags & OUTPUT_FINAL_STATE or flags & INPLACE_FINAL_STATE:
        return new_out, None
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return new_out, v.new_empty((N, v.shape[2], HEAD_DIM, HEAD_DIM), dtype=torch.float32)


def workspace_size(batch: int, tokens: int, num_sequences: int, value_heads: int, packed: bool) -> int:
    """Bytes of workspace for a call of these sizes: at most 208 MiB, or one chunk of every head where that is more."""
    slots = tokens // CHUNK + num_sequences if packed else batch * -(-tokens // CHUNK)
    slot_bytes = value_heads * RECORD_BYTES
    fixed = FLAG_BYTES + 2 * value_heads * STATE_BYTES
    return min(slots, max(1, (WORKSPACE_LIMIT - fixed) // slot_bytes)) * slot_bytes + fixed


@functools.lru_cache(maxsize=1 << 12)
def needed_workspace(
    batch: int,
    tokens: int,
    num_sequences: int,
    value_heads: int,
    packed: bool,
    checkpoints: bool,
    batch_invariant: bool,
    device: torch.device,
) -> int:
    """Bytes that the schedules of such a call on ``device`` take, never more than :func:`workspace_size`."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return ops.prefill_workspace_needed(
        tokens, batch, num_sequences, value_heads, packed, checkpoints, batch_invariant, sms
    )


def _environment() -> tuple:
    """What holds the names of the environment's variables, and what a name is called there.

    Asking ``os.environ`` for a name that it lacks raises and catches two errors, which takes 1.2 us; the dict in which it
    keeps what Python has set does not.
    """
    try:
        return os.environ._data, os.environ.encodekey
    except AttributeError:
        return os.environ, str


_variables, _called = _environment()
_VALIDATE = _called("FLASH_KDA_VALIDATE")
_BATCH_INVARIANT = _called("FLASH_KDA_BATCH_INVARIANT")


def validates() -> bool:
    """Whether ``FLASH_KDA_VALIDATE`` is set, to anything."""
    return _VALIDATE in _variables


def batch_invariant() -> bool:
    """Whether ``FLASH_KDA_BATCH_INVARIANT`` is set, to anything."""
    return _BATCH_INVARIANT in _variables


def goes_straight(*tensors) -> bool:
    """Whether a call with these tensors (or None), of which q is the first, may go straight to an op, as far as only
    Python knows."""
    if tensors[0].dtype is not torch.bfloat16 or not tensors[0].is_cuda or validates():
        return False
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return False
    return True


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
    out=None,
    inplace_final_state=False,
    cu_seqlens_cpu=None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Runs a call of :func:`flash_kda.chunk_kda`, or of ``fused_recurrent_kda`` with many tokens, that needs no preparation;
    or returns None and has written nothing.

    The op checks all that contract.py and dispatch.py do, and allocates the results; here stands what it cannot see. That
    takes a fraction of the time of the checked way.
    """
    try:
        if not goes_straight(q, k, v, g, beta, A_log, dt_bias, initial_state) or batch_invariant():
            return None
        if not (scale is None or type(scale) is float) or not (lower_bound is None or type(lower_bound) is float):
            return None
        new_out, final_state = _prefill_new(
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            initial_state,
            cu_seqlens,
            cu_seqlens_cpu,
            out,
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
        )
    except Exception:  # whatever it was, the checked way meets it again and names it
        return None
    if logger.isEnabledFor(logging.INFO):
        logger.info("cuda prefill: every condition of the kernel holds")
    return new_out if out is None else out, initial_state if inplace_final_state else final_state


def run(
    call: Call,
    out: torch.Tensor,
    final_state: torch.Tensor | None,
    workspace: torch.Tensor | None = None,
    states: PrefillStates | None = None,
) -> None:
    """Writes ``out``, ``final_state`` (if not None), which may be ``call.initial_state``, and what ``states`` asks for,
    without synchronising.

    ``workspace`` is the caller's (``flash_kda.get_workspace_size``), or None to allocate one. q, k, v, g or ``out`` are copied only where their address or a stride is not a multiple of 16 bytes.
    """
    B, T, H, K = call.q.shape
    HV = call.v.shape[2]
    if call.num_sequences == 0:
        return
    q, k, v, g = (x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in call[:4])
    target = out if _aligned(out) else out.clone(memory_format=torch.contiguous_format)
    beta = call.beta if call.beta.dtype in STATE_FLOATS else call.beta.float()
    A_log = None if call.A_log is None else as_parameter(call.A_log, (HV,))
    dt_bias = None if call.dt_bias is None else as_parameter(call.dt_bias, (HV, K))
    initial_state = call.initial_state
    if initial_state is not None and (states is None or states.ssm_state_indices is None):
        initial_state = initial_state.contiguous()
    if states is not None and states.checkpoint_indptr is not None:
        states = states._replace(checkpoint_indptr=states.checkpoint_indptr.contiguous())
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    if workspace is None:
        checkpoints = states is not None and states.checkpoint_state is not None
        packed = cu_seqlens is not None
        invariant = call.batch_invariant
        size = needed_workspace(B, T, call.num_sequences, HV, packed, checkpoints, invariant, q.device)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    else:
        workspace = workspace[-workspace.data_ptr() % WORKSPACE_ALIGNMENT :]
    ops.prefill(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        target,
        final_state,
        workspace,
        call.scale,
        call.lower_bound,
        call.use_gate_in_kernel,
        call.use_qk_l2norm_in_kernel,
        call.use_beta_sigmoid_in_kernel,
        call.allow_neg_eigval,
        call.state_v_first,
        *(states or ()),
        batch_invariant=call.batch_invariant,
    )
    if target is not out:
        out.copy_(target)


def _aligned(x: torch.Tensor) -> bool:
    if x.is_contiguous() and x.numel() > 0:  # rows of HEAD_DIM elements; without any, strides may be anything
        return x.data_ptr() % ALIGNMENT == 0
    unit = ALIGNMENT // x.element_size()
    for size, stride in zip(x.shape[:3], x.stride()):
        # Nothing steps along a dimension of size 1. A stride of 0 repeats rows, which TMA does not take.
        if size > 1 and (stride <= 0 or stride % unit):
            return False
    return x.data_ptr() % ALIGNMENT == 0
