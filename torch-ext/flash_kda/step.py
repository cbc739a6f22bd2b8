"""One token a sequence: through everything between a layer's projections in one kernel, and through the layer in one op.

Not public: the layers call :func:`whole_step`, and :func:`step` where :func:`serves` says that they may.
"""

from __future__ import annotations

import torch
from torch import nn

from ._ops import ops
from .linears import is_plain
from .prefill import HEAD_DIM

TAPS = 4  # of the convolution, and columns of its state
ALIGNMENT = 16  # bytes

AVAILABLE = hasattr(ops, "layer_step")
if AVAILABLE:
    _native = ops.layer_step.default
    _native_whole = ops.whole_step.default


def serves(projected, beta, conv_weight, conv_bias, activation, conv_state, A_log, dt_bias, state, norm_weight) -> bool:
    """Whether :func:`step` may run; ``projected`` are q, k, v, decay and gate. Asked where ``linears.are_few_rows`` has said
    yes. Other calls take the functions one by one, which also say what is wrong with the arguments."""
    N, T, C = projected[0].shape
    bf16, either = (torch.bfloat16,), (torch.bfloat16, torch.float32)
    return (
        AVAILABLE
        and T == 1
        and conv_bias is None
        and activation in ("silu", "swish")
        and all(_is(x, (N, 1, C), bf16) for x in projected)
        and _is(beta, (N, 1, C // HEAD_DIM), bf16)
        and _is(conv_weight, (3 * C, TAPS), either)
        and _is(conv_state, (N, 3 * C, TAPS), bf16)
        and _is(state, (N, C // HEAD_DIM, HEAD_DIM, HEAD_DIM), (torch.float32,))
        and _is(norm_weight, (HEAD_DIM,), either)
        and all(x is None or _is(x, x.shape, (torch.float32,)) for x in (A_log, dt_bias))
    )


def _is(x: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    return x.dtype in dtypes and x.shape == shape and x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_state: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """``short_conv`` of q, k and v with SiLU, ``fused_recurrent_kda`` with its gate, the sigmoid of beta and normalised q and
    k, ``gated_rms_norm``: rounded to bfloat16 where these round, and nowhere else.

    Args:
        q, k, v, decay, gate: ``[N, 1, H * 128]`` bfloat16, contiguous: projections; ``decay`` and ``gate`` before theirs.
        beta: ``[N, 1, H]`` bfloat16 logits, contiguous.
        conv_weight, conv_state: ``[3 * H * 128, 4]`` and ``[N, 3 * H * 128, 4]``; the state is updated in place.
        A_log, dt_bias, lower_bound: of the decay's gate, as ``fused_recurrent_kda`` takes them.
        state: ``[N, H, 128, 128]`` float32, K-first; updated in place.
        norm_weight, eps: of the norm.

    Returns:
        ``[N, 1, H * 128]`` bfloat16, the output projection's input.
    """
    out = torch.empty_like(q)
    scale = HEAD_DIM**-0.5
    _native(
        q, k, v, decay, beta, gate, conv_weight, conv_state, A_log, dt_bias, state, norm_weight, out, scale, lower_bound, eps
    )  # fmt: skip
    return out


def whole_step(
    x: torch.Tensor,
    qkv: tuple[nn.Linear, nn.Linear, nn.Linear],
    decay: tuple[nn.Linear, ...],
    gate: tuple[nn.Linear, ...],
    beta: nn.Linear,
    out: nn.Linear,
    conv: nn.Conv1d,
    conv_state: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor | None:
    """One token a sequence through a whole layer, ``x`` ``[N, 1, hidden]`` with ``linears.are_few_rows(x)``: the kernels of
    ``linears`` and :func:`step` by one op, which takes the host a third of the time. None where they do not serve the
    arguments; nothing is written then.

    Args:
        qkv, decay, gate, beta, out: projections; ``decay`` and ``gate`` one each, or two in a row by way of 128 channels.
        conv, conv_state: ``[N, 3 * H * 128, 4]``; the state is updated in place, as ``state`` is.
        A_log, dt_bias, lower_bound, state, norm_weight, eps: as :func:`step` takes them.

    Returns:
        ``[N, 1, hidden]`` bfloat16.
    """
    low_rank = len(decay) == 2
    if conv.bias is not None or conv.weight.shape[2] != TAPS or len(gate) != len(decay):
        return None
    if not all(map(is_plain, (*qkv, *decay, *gate, beta, out))):
        return None
    try:
        return _native_whole(
            x,
            [module.weight for module in (*qkv, decay[0], gate[0], beta)],
            decay[1].weight if low_rank else None,
            gate[1].weight if low_rank else None,
            out.weight,
            conv.weight,
            conv_state,
            A_log,
            dt_bias,
            state,
            norm_weight,
            HEAD_DIM**-0.5,
            lower_bound,
            eps,
        )
    except RuntimeError as error:
        if "whole_step: " in str(error):  # a launch failed, behind others that may have updated the states
            raise
        return None  # the op has looked at every shape, dtype, stride and address
