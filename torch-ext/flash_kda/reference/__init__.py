"""KDA in plain PyTorch: the chunked path that runs anywhere, what surrounds it in a layer, and the token recurrence that
judges every path."""

from .chunked import chunked_backward, chunked_forward
from .layer import conv_state, gated_rms_norm, short_conv
from .pooled import pooled_forward, pooled_prefill
from .recurrence import recurrent_kda

__all__ = [
    "chunked_backward",
    "chunked_forward",
    "conv_state",
    "gated_rms_norm",
    "pooled_forward",
    "pooled_prefill",
    "recurrent_kda",
    "short_conv",
]
