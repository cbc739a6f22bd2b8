"""Flash KDA: Kimi Delta Attention for Hopper GPUs, with a PyTorch path for everything else."""

from . import layers
from .chunk import chunk_kda, fwd
from .mapping import kernel_mapping, replaced_functions
from .recurrent import fused_recurrent_kda
from .report import altered_files, environment_report

__all__ = [
    "altered_files",
    "chunk_kda",
    "environment_report",
    "fused_recurrent_kda",
    "fwd",
    "kernel_mapping",
    "layers",
    "replaced_functions",
]
