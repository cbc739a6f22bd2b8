"""What surrounds KDA in a layer, in plain PyTorch: every device and floating dtype, differentiable, traced whole.

Arithmetic is in float32 (float64 for float64 inputs) and the result is rounded once. Nothing here reads the contents of
a tensor on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """``y[t] = act(bias + sum_i weight[:, W - 1 - i] x[t - i])`` for each sequence and channel.

    Args: as :func:`flash_kda.short_conv`, with one input ``x`` ``[B, T, C]``. Returns ``[B, T, C]`` in its dtype.
    """
    T, W = x.shape[1], weight.shape[1]
    inputs = _wide(x)
    taps = weight.to(inputs.dtype).unbind(1)
    y = inputs * taps[-1]
    if bias is not None:
        y = y + bias.to(inputs.dtype)
    if cu_seqlens is None:
        past = inputs.new_zeros(x.shape[0], W - 1, x.shape[2])
        if initial_state is not None:
            past = initial_state[..., 1 - W :].mT.to(inputs.dtype)
        history = torch.cat((past, inputs), 1)
        for i in range(W - 1):
            y = y + history[:, i : i + T] * taps[i]
    else:
        sequence, start = _sequences(cu_seqlens, T)
        position = torch.arange(T, device=x.device) - start
        for back in range(1, W):
            earlier = F.pad(inputs, (0, 0, back, 0))[:, :T]
            before = _column(initial_state, sequence, position - back, inputs)
            y = y + torch.where((position >= back)[:, None], earlier, before) * taps[W - 1 - back]
    return (F.silu(y) if silu else y).to(x.dtype)


def conv_state(
    x: torch.Tensor, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """The last ``columns`` inputs of each sequence, ``[N, C, columns]``, the newest last; older ones come from the state."""
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], columns, x.shape[2]) if initial_state is None else initial_state.mT.to(x.dtype)
        return torch.cat((before, x[:, -columns:]), 1)[:, -columns:].mT
    T = x.shape[1]
    start, end = cu_seqlens[:-1].clamp(0, T), cu_seqlens[1:].clamp(0, T)
    position = torch.maximum(end, start)[:, None] - start[:, None] + torch.arange(-columns, 0, device=x.device)
    sequence = torch.arange(len(start), device=x.device)[:, None].expand_as(position)
    inside = x[0, (start[:, None] + position).clamp(0, T - 1)]
    return torch.where((position >= 0)[..., None], inside, _column(initial_state, sequence, position, x)).mT


def _sequences(cu_seqlens: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number and first token of the sequence that holds each of T tokens; tokens after the last sequence belong to it."""
    tokens = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens.contiguous(), tokens, right=True) - 1
    sequence = sequence.clamp(0, cu_seqlens.shape[0] - 2)
    return sequence, cu_seqlens[sequence]


def _column(
    state: torch.Tensor | None, sequence: torch.Tensor, position: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """The input at a negative ``position`` before the start of ``sequence``: ``[*position.shape, C]``, zero without a state."""
    if state is None:
        return like.new_zeros(())
    columns = state.shape[2]
    values = state.mT[sequence, (columns + position).clamp(0, columns - 1)].to(like.dtype)
    return torch.where((position >= -columns)[..., None], values, 0)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate)`` over the last dimension, in the dtype of x."""
    wide = _wide(x).contiguous()  # a sum rounds differently over other strides: no bit shall depend on the layout
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype) * torch.sigmoid(gate.to(wide.dtype))).to(x.dtype)
