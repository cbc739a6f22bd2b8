"""Flash KDA: Kimi Delta Attention for Hopper GPUs, with a PyTorch path for everything else."""

from . import fla, layers, vllm
from .chunk import chunk_kda, fwd, get_workspace_size
from .fla import set_backend
from .gated_norm import gated_rms_norm
from .mapping import kernel_mapping, replaced_functions
from .recurrent import fused_recurrent_kda
from .replace import replace_layers, replaced_layers, restore_layers
from .report import altered_files, environment_report
from .short_conv import short_conv

__all__ = [
    "altered_files",
    "chunk_kda",
    "environment_report",
    "fla",
    "fused_recurrent_kda",
    "fwd",
    "gated_rms_norm",
    "get_workspace_size",
    "kernel_mapping",
    "layers",
    "replace_layers",
    "replaced_functions",
    "replaced_layers",
    "restore_layers",
    "set_backend",
    "short_conv",
    "vllm",
]


def __getattr__(name: str):
    """`KDACudaBackend` imports FLA, so it is looked up when it is asked for."""
    if name == "KDACudaBackend":
        return fla.KDACudaBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
