"""The kernel under test and the one it is compared with, loaded as their users load them."""

from __future__ import annotations

import importlib.metadata
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from workloads import Cell, make_inputs

REPO_ID = "moonshot/flash-kda"
ROOT = Path(__file__).resolve().parent.parent


def load_ours(device: torch.device):
    """The kernel module through the hub's front door, from this checkout's `build/` unless LOCAL_KERNELS names another."""
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    if device.type == "cuda":
        # A silent fall back to the PyTorch path would be timed as if it were the kernel.
        os.environ.setdefault("FLASH_KDA_STRICT", "1")
    from kernels import get_kernel

    return get_kernel(REPO_ID, version=1)


def load_fla():
    """FLA's own Triton `chunk_kda` and its version, or (None, None) where it is not installed."""
    # FLA hands calls to an importable flash_kda; the comparison is with FLA itself.
    os.environ["FLA_FLASH_KDA"] = "0"
    try:
        from fla.ops.kda import chunk_kda
    except ImportError:
        return None, None
    return chunk_kda, importlib.metadata.version("fla-core")


def load_cudnn():
    """cuDNN frontend's fused Hopper KDA behind `chunk_kda`'s arguments, as :func:`cudnn_inputs` gives them, and its
    version; or (None, None) where nvidia-cudnn-frontend is not installed."""
    try:
        from cudnn.linear_attention.ops import kimi_delta_attention
    except ImportError:
        return None, None

    def chunk_kda(q, k, v, g, beta, *, cu_seqlens, use_gate_in_kernel=False, lower_bound=None, **options):
        gate = {}
        if use_gate_in_kernel:
            bias = options["dt_bias"].reshape(v.shape[2], -1)
            gate = {"safe_gate": True, "gate_lower_bound": lower_bound, "a_log": options["A_log"], "dt_bias": bias}
        o, state = kimi_delta_attention(
            q[0],
            k[0],
            v[0],
            g[0],
            beta[0],
            cu_seqlens,
            output_final_state=options["output_final_state"],
            use_qk_l2norm_in_kernel=options["use_qk_l2norm_in_kernel"],
            use_beta_sigmoid_in_kernel=options["use_beta_sigmoid_in_kernel"],
            **gate,
        )
        return o[None], state.transpose(-1, -2)  # V-first

    return chunk_kda, importlib.metadata.version("nvidia-cudnn-frontend")


def cudnn_inputs(inputs: dict) -> dict:
    """`inputs` as cuDNN's kernel reads them, fp32 gate and beta: it would convert others in every call."""
    tokens, device = inputs["q"].shape[1], inputs["q"].device
    lengths = inputs.get("cu_seqlens", torch.tensor([0, tokens], device=device)).to(torch.int32)
    return inputs | {"g": inputs["g"].float(), "beta": inputs["beta"].float(), "cu_seqlens": lengths}


def fla_variants(cells: list[Cell]) -> list[Cell]:
    """One cell for each set of kernels FLA has: it keys them by head count, gate and packing, not by regime."""
    seen = {(c.row.heads, c.row.hv, c.row.packed, c.gate, c.bounded, c.g_dtype): c for c in cells}
    return sorted(seen.values(), key=lambda c: c.row.packed)


def fla_jobs(cells: list[Cell]) -> list[list[Cell]]:
    """Cells to compile for, grouped so that jobs share few kernels: by head count and by whether the gate is bounded."""
    jobs: dict[tuple, dict] = {}
    for c in cells:
        jobs.setdefault((c.row.heads, c.row.hv, c.bounded), {}).setdefault((c.row, c.gate, c.g_dtype), c)
    return [list(job.values()) for job in jobs.values()]


def _compile_fla(cells: list[Cell]) -> None:
    """Worker: fill Triton's disk cache with every configuration FLA may choose from. Times nothing."""
    import triton.testing

    # Timing configurations against other workers would mean nothing; running each once compiles it.
    def run_once(kernel, **_):
        kernel()
        torch.cuda.synchronize()
        return [0.0, 0.0, 0.0]

    triton.testing.do_bench = run_once
    os.environ["FLA_CACHE_RESULTS"] = "0"  # nor may what it returns be taken for a measurement later
    chunk_kda, _ = load_fla()
    with torch.no_grad():
        for cell in cells:
            chunk_kda(**make_inputs(cell, torch.device("cuda")))
    torch.cuda.synchronize()


def compile_fla(cells: list[Cell], advance) -> None:
    """Compile FLA's kernels for `cells` in parallel: one by one, as FLA does it, they take many minutes.

    `advance(text)` is called as each of `fla_jobs(cells)` finishes. A job that fails costs time later, nothing else.
    """
    jobs = fla_jobs(cells)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_compile_fla, job): job[0] for job in jobs}
        for future in as_completed(pending):
            cell, error = pending[future], future.exception()
            gate = "bounded" if cell.bounded else "unbounded"
            advance(f"H={cell.row.heads} {gate}" + (f": {error}" if error else ""))


def tune_fla(chunk_kda, cells: list[Cell], device: torch.device, advance) -> None:
    """Let FLA choose its configurations, alone on the card.

    It tunes a kernel on the first length it meets and keeps the choice, so that length is a typical one, 8192 tokens,
    rather than whatever row comes first.
    """
    import triton.testing

    # Triton's 125 ms a configuration add up to minutes; 30 ms still are dozens of runs of these kernels.
    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=5, rep=25)
    for cell in fla_variants(cells):
        lengths = (1024,) * 8 if cell.row.packed else (8192,)
        chunk_kda(**make_inputs(replace(cell, row=replace(cell.row, seq_lens=lengths)), device))
        torch.cuda.synchronize()
        advance(cell.label)
