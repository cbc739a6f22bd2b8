"""Flash KDA: Kimi Delta Attention for Hopper GPUs, with a PyTorch path for everything else."""

from . import layers
from .chunk import chunk_kda, fwd
from .mapping import kernel_mapping, replaced_functions
from .recurrent import fused_recurrent_kda

__all__ = ["chunk_kda", "fused_recurrent_kda", "fwd", "kernel_mapping", "layers", "replaced_functions"]
