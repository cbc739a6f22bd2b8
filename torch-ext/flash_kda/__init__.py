"""Flash KDA: Kimi Delta Attention for Hopper GPUs, with a PyTorch path for everything else."""

from . import layers
from .chunk import chunk_kda, fwd
from .gated_norm import gated_rms_norm
from .mapping import kernel_mapping, replaced_functions
from .recurrent import fused_recurrent_kda
from .replace import replace_layers, replaced_layers, restore_layers
from .short_conv import short_conv

__all__ = [
    "chunk_kda",
    "fused_recurrent_kda",
    "fwd",
    "gated_rms_norm",
    "kernel_mapping",
    "layers",
    "replace_layers",
    "replaced_functions",
    "replaced_layers",
    "restore_layers",
    "short_conv",
]
