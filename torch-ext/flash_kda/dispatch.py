"""What runs when a KDA function is called: :func:`select` decides, in one place, from the call alone.

| tensors | runs |
|---|---|
| CUDA, capability 9.0, bfloat16 (g may be float32), K = V = 128, no gradient needed, CUDA build | the prefill kernel |
| the same in a call of ``fused_recurrent_kda``, up to 16 tokens a sequence on average | the decode kernel |
| CUDA otherwise | the PyTorch path, with one warning per reason |
| any other device | the PyTorch path |

Environment, read at each call:

- ``FLASH_KDA_STRICT=1``: an error instead of the PyTorch path where the tensors are on a CUDA device.
- ``FLASH_KDA_VALIDATE=1``: checks the contents of ``cu_seqlens`` and ``checkpoint_offsets`` (synchronises).
- ``FLASH_KDA_BATCH_INVARIANT=1``: as ``batch_invariant=True`` of every call; ``fused_recurrent_kda`` then takes the decode
  kernel whatever the lengths.

The logger ``flash_kda`` says at INFO what ran.

Under ``torch.compile``, and wherever a gradient is needed, the call goes through the custom ops below, so that the
compiler sees one node of known shape and autograd one backward, which runs the PyTorch path again piece by piece.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings

import torch

from . import decode, prefill
from ._ops import add_op_namespace_prefix
from .contract import Call, PrefillStates, States, check_contents
from .reference import chunked_backward, chunked_forward, pooled_forward, pooled_prefill

logger = logging.getLogger("flash_kda")

CUDA_PREFILL = "cuda prefill"
CUDA_DECODE = "cuda decode"
PYTORCH = "pytorch"

_warned: set[str] = set()


def select(call: Call, needs_grad: bool) -> tuple[str, str]:
    """``(path, reason)``: which path the call takes, and why."""
    if call.q.device.type != "cuda":
        return PYTORCH, f"the tensors are on {call.q.device.type}"
    if not prefill.AVAILABLE:
        return PYTORCH, "this build of flash_kda has no CUDA kernels"
    if _capability(call.q.device) != (9, 0):
        major, minor = _capability(call.q.device)
        return PYTORCH, f"the kernel runs on compute capability 9.0 only, the device has {major}.{minor}"
    if needs_grad:
        return PYTORCH, "an input requires a gradient, the kernel is forward only"
    if call.q.dtype != torch.bfloat16:
        return PYTORCH, f"the kernel takes bfloat16 q, k and v, got {call.q.dtype}"
    if call.g.dtype not in (torch.bfloat16, torch.float32):
        return PYTORCH, f"the kernel takes a bfloat16 or float32 g, got {call.g.dtype}"
    K, V = call.q.shape[3], call.v.shape[3]
    if not K == V == prefill.HEAD_DIM:
        return PYTORCH, f"the kernel takes head dims K = V = {prefill.HEAD_DIM}, got {K} and {V}"
    path = CUDA_DECODE if call.recurrent and decode.takes(call) else CUDA_PREFILL
    return path, "every condition of the kernel holds"


def select_pooled(call: Call, states: States) -> tuple[str, str]:
    """``(path, reason)`` for a recurrent call with serving arguments; states by token only the decode kernel has."""
    path, reason = select(call, needs_grad=False)
    if path == PYTORCH or (path == CUDA_PREFILL and not states.by_token and states.token_states is None):
        return path, reason
    for name, x, lead in (("initial_state", call.initial_state, 1), ("token_states", states.token_states, 2)):
        if x is not None and not decode.serves(x, lead):
            return PYTORCH, f"the kernel takes {name} with an address and strides that are multiples of 16 bytes"
    return CUDA_DECODE, reason


def run(
    call: Call,
    out: torch.Tensor,
    final_state: torch.Tensor | None,
    needs_grad: bool = False,
    workspace: torch.Tensor | None = None,
    states: PrefillStates | None = None,
) -> None:
    """Writes ``out``, ``final_state`` (if not None) and what ``states`` asks for by the path that :func:`select` names."""
    if os.environ.get("FLASH_KDA_VALIDATE") == "1":
        check_contents(call, states)
    if os.environ.get("FLASH_KDA_BATCH_INVARIANT") == "1":
        call = call._replace(batch_invariant=True)
    path = _announce(call, *select(call, needs_grad))
    if path == CUDA_PREFILL:
        prefill.run(call, out, final_state, workspace, states)
    elif states is not None:
        pooled_prefill(call, states, out, final_state)
    else:
        (decode.run if path == CUDA_DECODE else chunked_forward)(call, out, final_state)


def run_pooled(call: Call, states: States, out: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """A recurrent call with serving arguments."""
    if os.environ.get("FLASH_KDA_VALIDATE") == "1":
        check_contents(call)
    if os.environ.get("FLASH_KDA_BATCH_INVARIANT") == "1":
        call = call._replace(batch_invariant=True)
    path = _announce(call, *select_pooled(call, states))
    if path == CUDA_DECODE:
        decode.run(call, out, final_state, states)
    elif path == CUDA_PREFILL:
        inplace = states.inplace_final_state
        slots = PrefillStates(states.ssm_state_indices, None, inplace, states.min_state_index)
        prefill.run(call, out, call.initial_state if inplace else final_state, states=slots)
    else:
        pooled_forward(call, states, out, final_state)


def _announce(call: Call, path: str, reason: str) -> str:
    if path == PYTORCH and call.q.device.type == "cuda":
        _fell_back(reason)
    logger.info("%s: %s", path, reason)
    return path


def execute(call: Call, output_final_state: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs a call into new tensors: ``(o, final_state or None)``."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in call[:8] if x is not None)
    if needs_grad or torch.compiler.is_compiling():
        o, final_state = _kda_op(*call, output_final_state, needs_grad)
        return o, final_state if output_final_state else None
    return _execute(call, output_final_state, needs_grad)


def execute_into(
    call: Call,
    out: torch.Tensor,
    final_state: torch.Tensor | None,
    workspace: torch.Tensor | None = None,
    states: PrefillStates | None = None,
) -> None:
    """Runs a call into the caller's tensors. Not differentiable."""
    with torch.no_grad():
        if torch.compiler.is_compiling():
            _kda_into_op(*call, out, final_state, workspace, *(states or PrefillStates()))
        else:
            run(call, out, final_state, workspace=workspace, states=states)


def execute_pooled(call: Call, states: States, out: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """Runs a call with serving arguments. Not differentiable."""
    with torch.no_grad():
        if torch.compiler.is_compiling():
            _kda_pooled_op(*call, *states, out, final_state)
        else:
            run_pooled(call, states, out, final_state)


def _execute(call: Call, output_final_state: bool, needs_grad: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    v = call.v
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_state = None
    if output_final_state:
        final_state = torch.empty(call.state_shape, dtype=call.state_dtype, device=v.device)
    run(call, out, final_state, needs_grad)
    return out, final_state


@functools.lru_cache(maxsize=None)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_not_native(device: torch.device, available: bool, unservable: str | None) -> str | None:
    """Why a CUDA call of one of the layer's small kernels takes the PyTorch path (having warned of it), or None.

    ``available``: whether this build has the kernel; ``unservable``: what in the arguments the kernel cannot serve.
    """
    if not available:
        reason = "this build of flash_kda has no CUDA kernels"
    elif _capability(device) != (9, 0):
        major, minor = _capability(device)
        reason = f"the kernel runs on compute capability 9.0 only, the device has {major}.{minor}"
    else:
        reason = unservable
    if reason is not None:
        _fell_back(reason)
    return reason


def _fell_back(reason: str) -> None:
    if os.environ.get("FLASH_KDA_STRICT") == "1":
        raise RuntimeError(f"FLASH_KDA_STRICT=1 and the CUDA kernel cannot run this call: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"flash_kda runs the slower PyTorch path: {reason}", RuntimeWarning, stacklevel=5)


_CALL_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_cpu, float scale, float? lower_bound, bool use_gate_in_kernel, "
    "bool use_qk_l2norm_in_kernel, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first, "
    "bool batch_invariant, bool recurrent"
)
_FIELDS = len(Call._fields)


@torch.library.custom_op(
    add_op_namespace_prefix("kda"),
    mutates_args=(),
    schema=f"({_CALL_SCHEMA}, bool output_final_state, bool needs_grad) -> (Tensor, Tensor)",
)
def _kda_op(*args):
    o, final_state = _execute(Call(*args[:_FIELDS]), *args[_FIELDS:])
    return o, o.new_empty(0) if final_state is None else final_state


@_kda_op.register_fake
def _(*args):
    call, output_final_state = Call(*args[:_FIELDS]), args[_FIELDS]
    state = call.v.new_empty(call.state_shape, dtype=call.state_dtype) if output_final_state else call.v.new_empty(0)
    return call.v.new_empty(call.v.shape), state


@torch.library.custom_op(
    add_op_namespace_prefix("kda_into"),
    mutates_args=("out", "final_state", "workspace", "checkpoint_state"),
    schema=f"({_CALL_SCHEMA}, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!)? workspace, "
    "Tensor? ssm_state_indices, Tensor? has_initial_state, bool final_state_in_slots, int min_state_index, "
    "Tensor(d!)? checkpoint_state, Tensor? checkpoint_offsets, Tensor? checkpoint_indices, Tensor? checkpoint_indptr, "
    "int checkpoint_multiple) -> ()",
)
def _kda_into_op(*args) -> None:
    out, final_state, workspace = args[_FIELDS : _FIELDS + 3]
    states = PrefillStates(*args[_FIELDS + 3 :])  # all given: torch 2.11 cannot leave out an argument that it may write
    states = states if any(isinstance(x, torch.Tensor) for x in states) else None
    run(Call(*args[:_FIELDS]), out, final_state, workspace=workspace, states=states)


@_kda_into_op.register_fake
def _(*args) -> None:
    return None


@torch.library.custom_op(
    add_op_namespace_prefix("kda_pooled"),
    mutates_args=("initial_state", "token_states", "out", "final_state"),
    schema=f"({_CALL_SCHEMA.replace('Tensor? initial_state', 'Tensor(a!)? initial_state')}, Tensor? ssm_state_indices, "
    "Tensor? num_accepted_tokens, Tensor(b!)? token_states, bool inplace_final_state, int min_state_index, Tensor(c!) out, "
    "Tensor(d!)? final_state) -> ()",
)
def _kda_pooled_op(*args) -> None:
    states = _FIELDS + len(States._fields)
    run_pooled(Call(*args[:_FIELDS]), States(*args[_FIELDS:states]), *args[states:])


@_kda_pooled_op.register_fake
def _(*args) -> None:
    return None


# Gradients of the eight tensors that can have one; an empty tensor stands for an absent input
@torch.library.custom_op(
    add_op_namespace_prefix("kda_backward"),
    mutates_args=(),
    schema=f"({_CALL_SCHEMA}, Tensor grad_out, Tensor? grad_final_state) -> Tensor[]",
)
def _kda_backward_op(*args):
    call = Call(*args[:_FIELDS])
    # A custom op's kernel runs with the autograd keys excluded; this one differentiates the pieces it runs again.
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded & torch._C._after_autograd_keyset):
        grads = chunked_backward(call, *args[_FIELDS:])
    return [call.q.new_empty(0) if x is None else x for x in grads]


@_kda_backward_op.register_fake
def _(*args):
    return [args[0].new_empty(0) if x is None else torch.empty_like(x) for x in args[:8]]


def _save_call(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:_FIELDS]
    ctx.has_state = inputs[_FIELDS]


def _backward(ctx, grad_out, grad_final_state):
    tensors = ctx.saved_tensors
    grads = _kda_backward_op(*tensors, *ctx.options, grad_out, grad_final_state if ctx.has_state else None)
    wanted = [None if x is None or not need else grad for x, need, grad in zip(tensors, ctx.needs_input_grad, grads)]
    return *wanted, *[None] * (_FIELDS + 2 - len(wanted))


_kda_op.register_autograd(_backward, setup_context=_save_call)
