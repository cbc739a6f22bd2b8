"""The door for vLLM: its FlashKDA extension's functions, served by this package. Nothing here imports vLLM."""

from __future__ import annotations

import functools
import sys
import types

import torch

from . import chunk
from .chunk import get_workspace_size

# The extension vLLM imports before it calls `torch.ops._flashkda_C`
EXTENSION = "vllm._flashkda_C"
NAMESPACE = "_flashkda_C"


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_state: torch.Tensor | None = None,
    checkpoint_offsets: torch.Tensor | None = None,
    checkpoint_indptr: torch.Tensor | None = None,
) -> None:
    """:func:`flash_kda.fwd` in the argument order of vLLM's fork of FlashKDA, which has the workspace after ``out``.

    Args:
        checkpoint_state: ``[N, HV, V, K]``; ``[N, C, HV, V, K]`` beside ``checkpoint_offsets`` ``[N, C]``; ``[M, HV, V,
            K]`` with ``checkpoint_indptr``: one state an entry.
        All others: as :func:`flash_kda.fwd`.

    Raises:
        ValueError, TypeError: as :func:`flash_kda.fwd`.
    """
    if checkpoint_state is not None and checkpoint_state.dim() == 5:
        checkpoint_state = checkpoint_state.view(-1, *checkpoint_state.shape[2:])
    chunk.fwd(
        q,
        k,
        v,
        g,
        beta,
        scale,
        out,
        A_log,
        dt_bias,
        lower_bound,
        initial_state,
        final_state,
        cu_seqlens,
        workspace=workspace,
        checkpoint_state=checkpoint_state,
        checkpoint_offsets=checkpoint_offsets,
        checkpoint_indptr=checkpoint_indptr,
    )


@functools.cache
def register() -> None:
    """Puts this package in the place of vLLM's FlashKDA extension, in this process.

    vLLM imports ``vllm._flashkda_C`` at its first prefill and calls ``torch.ops._flashkda_C.fwd`` and
    ``get_workspace_size``. After this call both are ours, and the import finds an empty module. Call it in every worker
    before the first prefill, for instance from a ``vllm.general_plugins`` entry point. Calling it again does nothing.

    Raises:
        RuntimeError: vLLM's extension is loaded already; operators cannot be taken back.
    """
    if EXTENSION in sys.modules or hasattr(getattr(torch.ops, NAMESPACE), "fwd"):
        raise RuntimeError(f"{EXTENSION}: expected it not to be loaded yet; register before the first prefill")
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor(b!) workspace, "
        "Tensor? A_log, Tensor? dt_bias, float? lower_bound, Tensor? initial_state=None, Tensor(c!)? final_state=None, "
        "Tensor? cu_seqlens=None, Tensor(d!)? checkpoint_state=None, Tensor? checkpoint_offsets=None, "
        "Tensor? checkpoint_indptr=None) -> ()"
    )
    library.define("get_workspace_size(int tokens, int heads, int num_sequences=1) -> int")
    library.impl("fwd", fwd, "CUDA")
    library.impl("fwd", fwd, "CPU")
    library.impl("fwd", lambda *args, **kwargs: None, "Meta")
    library.impl("get_workspace_size", get_workspace_size, "CompositeExplicitAutograd")
    sys.modules[EXTENSION] = types.ModuleType(EXTENSION)
    _kept.append(library)


_kept: list[torch.library.Library] = []  # a library's operators go when it does
