"""The short causal convolution before KDA: :func:`short_conv`, its contract, and what runs it."""

from __future__ import annotations

import torch

from . import reference
from ._ops import add_op_namespace_prefix, ops
from .contract import FLOATS, _broken, _dense_rows, _has_shape, _shape, _tensor
from .dispatch import _capability, why_not_native

WIDTHS = (2, 3, 4)
ACTIVATIONS = (None, "silu", "swish")
VECTOR = 8  # bf16 channels that the kernel reads at a time

AVAILABLE = hasattr(ops, "short_conv")
if AVAILABLE:
    _native = ops.short_conv.default

    @torch.library.register_fake(add_op_namespace_prefix("short_conv"))
    def _(*args) -> None:
        return None


def short_conv(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution over the last few tokens of each sequence, with its activation, rounded once::

        y[t, c] = act(bias[c] + sum_i weight[c, W - 1 - i] * x[t - i, c])        i = 0 .. W - 1

    On a Hopper GPU in bfloat16, with channels in multiples of 8, one kernel reads each input once and writes each output
    once (a second, small one writes the states of sequences longer than a few tokens).

    Args:
        x: ``[B, T, C]`` as a projection leaves it, channels contiguous, any other strides; or three such tensors of one
            shape (q, k and v, or views of one packed projection), which are treated in one pass as if they were
            concatenated along C.
        weight: ``[C, W]``, any floating dtype, W from 2 to 4; C counts all three inputs.
        bias: ``[C]`` in the dtype of weight. Default: none.
        activation: ``"silu"`` (or its other name ``"swish"``) or None.
        initial_state: ``[N, C, W - 1]`` or ``[N, C, W]``, the inputs before the first token of each sequence, the newest
            in the last column; N sequences, which is B without ``cu_seqlens``. Default: zeros.
        final_state: a tensor of the shape of ``initial_state`` that the last inputs of each sequence are written into;
            contiguous; may be ``initial_state``. Default: not wanted.
        cu_seqlens: ``[N + 1]`` int32 or int64 on x's device, N >= 1: where packed sequences begin and end, B = 1. They do
            not see each other. Wrong contents lead nowhere out of bounds.

    Returns:
        A contiguous tensor of the shape and dtype of x, or a tuple of three.

    Raises:
        ValueError, TypeError: an argument that breaks the above, named with what was expected and what came, before
            anything is written.
        RuntimeError: ``FLASH_KDA_STRICT=1`` and CUDA tensors the kernel cannot serve.

    Differentiable with respect to x, weight, bias and initial_state (by the PyTorch path); what ``final_state`` receives
    is not.

    Source: Kimi Linear (arXiv:2510.26692), "ShortConv" of q, k and v.
    """
    parts = (x,) if isinstance(x, torch.Tensor) else tuple(x)
    y = _attempt(parts, weight, bias, activation, initial_state, final_state, cu_seqlens)
    if y is not None:
        return y[0] if len(parts) == 1 else y
    _check(parts, weight, bias, activation, initial_state, final_state, cu_seqlens)
    silu = activation is not None
    tensors = (*parts, weight, bias, initial_state)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    if needs_grad or not parts[0].is_cuda:
        y = _pytorch(parts, weight, bias, initial_state, cu_seqlens, final_state, silu)
    elif torch.compiler.is_compiling():
        k, v = parts[1:] or (None, None)
        y = _op(parts[0], k, v, weight, bias, initial_state, cu_seqlens, final_state, silu).unbind(0)
    else:
        y = _execute(parts, weight, bias, initial_state, cu_seqlens, final_state, silu).unbind(0)
    return y[0] if len(parts) == 1 else tuple(y)


def _attempt(
    parts, weight, bias, activation, initial_state, final_state, cu_seqlens
) -> tuple[torch.Tensor, ...] | None:
    """Runs a call that needs no preparation, as the op sees, which refuses before it writes; or returns None."""
    try:
        x = parts[0]
        if (
            not (AVAILABLE and x.is_cuda and activation in ACTIVATIONS and (bias is None or bias.dim() == 1))
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or _capability(x.device) != (9, 0)
        ):
            return None
        k, v = parts[1:] or (None, None)
        out = x.new_empty((len(parts), *x.shape))
        _native(x, k, v, weight, bias, initial_state, cu_seqlens, out, final_state, activation is not None)
    except Exception:  # whatever it was, the checked way meets it again and names it
        return None
    return out.unbind(0)


def _check(parts, weight, bias, activation, initial_state, final_state, cu_seqlens) -> None:
    if len(parts) not in (1, 3):
        raise _broken("x", "one tensor or three", f"{len(parts)}")
    x = parts[0]
    for part in parts:
        _tensor("x", part, FLOATS, x)
        if part.dim() != 3:
            raise _broken("x", "shape [B, T, C]", f"shape {_shape(part)}")
        if part is not x:
            _has_shape("x", part, x.shape, "that of the first of three")
            if part.dtype != x.dtype:
                raise _broken("x", f"dtype {x.dtype}, that of the first of three", part.dtype, TypeError)
        _dense_rows("x", part)
    B, T, C = x.shape
    C *= len(parts)
    _tensor("weight", weight, FLOATS, x)
    if weight.dim() != 2 or weight.shape[0] != C or weight.shape[1] not in WIDTHS:
        raise _broken("weight", f"shape [{C}, W], W from 2 to 4", f"shape {_shape(weight)}")
    if bias is not None:
        _tensor("bias", bias, (weight.dtype,), x)
        _has_shape("bias", bias, (C,), "[C]")
    if activation not in ACTIVATIONS:
        raise _broken("activation", "None or 'silu'", repr(activation))
    N = B
    if cu_seqlens is not None:
        _tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), x)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise _broken("cu_seqlens", "shape [N + 1], N >= 1", f"shape {_shape(cu_seqlens)}")
        if B != 1:
            raise _broken("x", "batch size 1 with cu_seqlens (pack the sequences along T)", f"batch size {B}")
        N = cu_seqlens.shape[0] - 1
    columns = (weight.shape[1] - 1, weight.shape[1])
    for name, state in (("initial_state", initial_state), ("final_state", final_state)):
        if state is None:
            continue
        _tensor(name, state, FLOATS, x)
        if state.dim() != 3 or state.shape[:2] != (N, C) or state.shape[2] not in columns:
            raise _broken(name, f"shape [{N}, {C}, {columns[0]} or {columns[1]}] ([N, C, W - 1 or W])", _shape(state))
    if final_state is not None:
        if not final_state.is_contiguous():
            raise _broken("final_state", "a contiguous tensor", f"strides {list(final_state.stride())}")
        if initial_state is not None:
            _has_shape("final_state", final_state, initial_state.shape, "that of initial_state")


def _unservable(x: torch.Tensor, initial_state: torch.Tensor | None, weight: torch.Tensor) -> str | None:
    """Why the kernel cannot serve a call on its device, or None."""
    if x.dtype != torch.bfloat16:
        return f"the convolution kernel takes bfloat16 inputs, got {x.dtype}"
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return f"the convolution kernel takes bfloat16 or float32 weights, got {weight.dtype}"
    if x.shape[2] % VECTOR:
        return f"the convolution kernel takes channels in multiples of {VECTOR}, got {x.shape[2]}"
    if initial_state is not None and initial_state.dtype != x.dtype:
        return f"the convolution kernel takes states in the dtype of its inputs, got {initial_state.dtype}"
    return None


def _execute(parts, weight, bias, initial_state, cu_seqlens, final_state, silu) -> torch.Tensor:
    """All outputs in one tensor, ``[parts, B, T, C]``."""
    x = parts[0]
    state = final_state if initial_state is None else initial_state
    if why_not_native(x.device, AVAILABLE, _unservable(x, state, weight)):
        with torch.no_grad():
            return torch.stack(_pytorch(parts, weight, bias, initial_state, cu_seqlens, final_state, silu))
    k, v = (_aligned(part) for part in parts[1:]) if len(parts) == 3 else (None, None)
    out = x.new_empty((len(parts), *x.shape))
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    _native(_aligned(x), k, v, weight.contiguous(), bias, initial_state, cu_seqlens, out, final_state, silu)
    return out


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or where its address or a stride is not a multiple of 16 bytes, a copy."""
    right = x.data_ptr() % 16 == 0 and all(n <= 1 or s % VECTOR == 0 for n, s in zip(x.shape[:2], x.stride()))
    return x if right else x.clone(memory_format=torch.contiguous_format)


def _pytorch(parts, weight, bias, initial_state, cu_seqlens, final_state, silu):
    C = parts[0].shape[2]
    outputs, states = [], []
    for i, x in enumerate(parts):
        span = slice(i * C, (i + 1) * C)
        state = None if initial_state is None else initial_state[:, span]
        b = None if bias is None else bias[span]
        outputs.append(reference.short_conv(x, weight[span], b, silu, state, cu_seqlens))
        if final_state is not None:
            with torch.no_grad():
                states.append(reference.conv_state(x, state, cu_seqlens, final_state.shape[2]))
    if final_state is not None:
        with torch.no_grad():
            final_state.copy_(torch.cat(states, 1))
    return outputs


# What torch.compile sees on a GPU: one node that writes the state.
@torch.library.custom_op(
    add_op_namespace_prefix("short_conv_op"),
    mutates_args=("final_state",),
    schema="(Tensor q, Tensor? k, Tensor? v, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor(a!)? final_state, bool silu) -> Tensor",
)
def _op(q, k, v, weight, bias, initial_state, cu_seqlens, final_state, silu):
    parts = (q,) if k is None else (q, k, v)
    return _execute(parts, weight, bias, initial_state, cu_seqlens, final_state, silu)


@_op.register_fake
def _(q, k, *args):
    return q.new_empty((1 if k is None else 3, *q.shape))
