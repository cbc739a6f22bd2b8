"""Flash KDA: Kimi Delta Attention for Hopper GPUs, with a PyTorch path for everything else."""

from . import fla, layers, vllm
from .chunk import chunk_kda, fwd, get_workspace_size
from .fla import set_backend
from .mapping import kernel_mapping, replaced_functions
from .recurrent import fused_recurrent_kda
from .report import altered_files, environment_report

__all__ = [
    "altered_files",
    "chunk_kda",
    "environment_report",
    "fla",
    "fused_recurrent_kda",
    "fwd",
    "get_workspace_size",
    "kernel_mapping",
    "layers",
    "replaced_functions",
    "set_backend",
    "vllm",
]


def __getattr__(name: str):
    """`KDACudaBackend` imports FLA, so it is looked up when it is asked for."""
    if name == "KDACudaBackend":
        return fla.KDACudaBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
