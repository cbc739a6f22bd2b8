"""KDA in plain PyTorch: the chunked path that runs anywhere, and the token recurrence that judges every path."""

from .chunked import chunked_backward, chunked_forward
from .pooled import pooled_forward
from .recurrence import recurrent_kda

__all__ = ["chunked_backward", "chunked_forward", "pooled_forward", "recurrent_kda"]
