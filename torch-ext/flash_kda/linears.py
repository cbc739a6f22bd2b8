"""Projections of a few rows, several in one launch: what a decode step of a layer spends its time on.

Not public: the layers call :func:`linears` in the place of their modules' projections.
"""

from __future__ import annotations

import torch
from torch import nn

from ._ops import ops
from .dispatch import _capability

MOST_ROWS = 32  # of the kernel; more rows are the matrix libraries' business

AVAILABLE = hasattr(ops, "few_row_linears")
if AVAILABLE:
    _native = ops.few_row_linears.default


def are_few_rows(x: torch.Tensor) -> bool:
    """Whether :func:`linears` may run the kernel on hidden states ``[B, T, K]``. A layer asks once."""
    return (
        AVAILABLE
        and x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.dtype == torch.bfloat16
        and 0 < x.shape[0] * x.shape[1] <= MOST_ROWS
        and _capability(x.device) == (9, 0)
    )


def linears(modules: tuple[nn.Linear, ...], inputs: tuple[torch.Tensor, ...], few_rows: bool) -> list[torch.Tensor]:
    """``module(input)`` of each pair, every one contiguous.

    With ``few_rows``, in one kernel where all are plain bfloat16 projections of one depth: each weight is read once,
    products are summed in float32 and rounded once. Modules of another kind (quantised, adapted, hooked, with a bias) are
    called as ever.
    """
    if few_rows and all(map(is_plain, modules)) and len({x.shape[-1] for x in inputs}) == 1:
        B, T, depth = inputs[0].shape
        sizes = [module.weight.shape[0] for module in modules]
        # Parts begin at multiples of 16 bytes, for whoever reads them next.
        if depth % 8 == 0 and all(size % 8 == 0 for size in sizes[:-1]):
            out = inputs[0].new_empty(B * T * sum(sizes))
            _native([x.contiguous() for x in inputs], [module.weight for module in modules], out)
            return [part.view(B, T, -1) for part in out.split([B * T * size for size in sizes])]
    return [module(x) for module, x in zip(modules, inputs)]


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is nothing but a product with its bfloat16 weight."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.dtype == torch.bfloat16
        and module.weight.is_contiguous()
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    )
