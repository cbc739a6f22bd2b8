"""The gated norm after KDA: :func:`gated_rms_norm`, its contract, and what runs it."""

from __future__ import annotations

import math

import torch

from . import reference
from ._ops import add_op_namespace_prefix, ops
from .contract import FLOATS, _broken, _has_shape, _number, _shape, _tensor
from .dispatch import _capability, why_not_native

CHANNELS = (64, 128, 256)

AVAILABLE = hasattr(ops, "gated_rms_norm")
if AVAILABLE:
    _native = ops.gated_rms_norm.default

    @torch.library.register_fake(add_op_namespace_prefix("gated_rms_norm"))
    def _(*args) -> None:
        return None


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """RMS norm of each row, times a sigmoid gate: ``x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate)``.

    Statistics and products are in float32 (float64 for float64 inputs), rounded once. On a Hopper GPU in bfloat16, with
    rows of 64, 128 or 256 channels, one kernel.

    Args:
        x: ``[.., D]``, any floating dtype and strides.
        gate: the shape of x, any floating dtype, before the sigmoid.
        weight: ``[D]``, any floating dtype.
        eps: added to the mean of squares. Default 1e-5.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument that breaks the above, named with what was expected and what came.
        RuntimeError: ``FLASH_KDA_STRICT=1`` and CUDA tensors the kernel cannot serve.

    Differentiable (by the PyTorch path).

    Source: Kimi Linear (arXiv:2510.26692), the head-wise RMSNorm with a sigmoid output gate.
    """
    y = _attempt(x, gate, weight, eps)
    if y is not None:
        return y
    _tensor("x", x, FLOATS, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise _broken("x", "shape [.., D], D >= 1", f"shape {_shape(x)}")
    _tensor("gate", gate, FLOATS, x)
    _has_shape("gate", gate, x.shape, "that of x")
    _tensor("weight", weight, FLOATS, x)
    _has_shape("weight", weight, x.shape[-1:], "[D]")
    eps = _number("eps", eps)
    if eps < 0:
        raise _broken("eps", "a number of at least 0", eps)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad)
    if needs_grad or not x.is_cuda:
        return reference.gated_rms_norm(x, gate, weight, eps)
    return (_op if torch.compiler.is_compiling() else _execute)(x, gate, weight, eps)


def _attempt(x, gate, weight, eps) -> torch.Tensor | None:
    """Runs a call that needs no preparation, as the op sees, which refuses before it writes; or returns None."""
    try:
        if (
            not (AVAILABLE and x.is_cuda and type(eps) is float and 0 <= eps < math.inf)
            or gate.shape != x.shape
            or weight.shape != x.shape[-1:]
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or _capability(x.device) != (9, 0)
        ):
            return None
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _native(x, gate, weight, out, eps)
    except Exception:  # whatever it was, the checked way meets it again and names it
        return None
    return out


def _unservable(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel cannot serve a call on its device, or None."""
    if x.dtype != torch.bfloat16 or gate.dtype != torch.bfloat16:
        return f"the norm kernel takes bfloat16 x and gate, got {x.dtype} and {gate.dtype}"
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return f"the norm kernel takes bfloat16 or float32 weights, got {weight.dtype}"
    if x.shape[-1] not in CHANNELS:
        return f"the norm kernel takes rows of 64, 128 or 256 channels, got {x.shape[-1]}"
    return None


def _execute(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if why_not_native(x.device, AVAILABLE, _unservable(x, gate, weight)):
        return reference.gated_rms_norm(x, gate, weight, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _native(_dense(x), _dense(gate), weight.contiguous(), out, eps)
    return out


def _dense(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


# What torch.compile sees on a GPU.
@torch.library.custom_op(
    add_op_namespace_prefix("gated_rms_norm_op"),
    mutates_args=(),
    schema="(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor",
)
def _op(x, gate, weight, eps):
    return _execute(x, gate, weight, eps)


@_op.register_fake
def _(x, gate, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
