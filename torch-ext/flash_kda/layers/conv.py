"""The two short-convolution functions of transformers' models, as pure layers.

The models hand over `[B, C, T]` views of projections whose channels are contiguous; that is what `short_conv` reads, and what
comes back is such a view again, so the KDA functions behind it need no copy either.
"""

import torch
from torch import nn

from ..short_conv import short_conv
from .kda import _channel_contiguous, _packed_offsets


class causal_conv1d_fn(nn.Module):
    """Replaces `causal_conv1d_fn`: whole sequences."""

    # Where autograd needs a gradient, short_conv takes the differentiable PyTorch path.
    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Depthwise causal convolution with its activation, computed in fp32 and rounded once.

        Args:
            hidden_states: `[B, C, T]`; read in place where its channels are contiguous, copied otherwise.
            weight: `[C, W]`, W from 2 to 4. bias: `[C]` or None.
            activation: `"silu"`, `"swish"` or None.
            kwargs: the model's own keyword arguments. `cu_seqlens` or `cu_seq_lens_q`, `[N + 1]` int32 or int64, marks N
                sequences packed into a batch of 1, which do not see each other; everything else is ignored.

        Returns:
            `[B, C, T]` in the dtype of `hidden_states`, channels contiguous.

        Raises:
            ValueError: as `short_conv` does; and for `seq_idx` without `cu_seq_lens_q`.
        """
        x = _channel_contiguous(hidden_states.transpose(1, 2))
        return short_conv(x, weight, bias, activation, cu_seqlens=_packed_offsets(kwargs)).transpose(1, 2)


class causal_conv1d_update(nn.Module):
    """Replaces `causal_conv1d_update`: new tokens of sequences that have a state."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """As `causal_conv1d_fn`, from the inputs before that `conv_state` `[B, C, W]` (or `[B, C, W - 1]`) holds, the
        newest last; it is updated in place."""
        x = _channel_contiguous(hidden_states.transpose(1, 2))
        return short_conv(x, weight, bias, activation, initial_state=conv_state, final_state=conv_state).transpose(1, 2)
