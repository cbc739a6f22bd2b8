"""What is installed and what would run: the text to paste into an issue, and the check of the package's own files."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from . import dispatch
from .contract import check_call

HOME = Path(__file__).absolute().parent  # not resolved: in the Hub's cache each file is a link to its content
# Written beside the package after its digest was taken: by Python, and by whoever signs the metadata.
_NOT_DIGESTED = {"metadata.json", "metadata.json.sigstore"}
_PACKAGES = ("kernels", "transformers", "huggingface-hub", "fla-core", "triton")
_VARIABLES = ("FLASH_KDA_", "FLA_", "LOCAL_KERNELS", "KERNELS_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_")


def altered_files(home: str | os.PathLike | None = None) -> list[str]:
    """Compares the files of a build with the SHA-256 digests that its ``metadata.json`` lists.

    `kernels` does not hash what it downloads, so a file that was damaged on the way, or changed in a cache, loads like
    any other. This finds it. It is no protection against someone who rewrites ``metadata.json`` as well: that is what
    the signature beside it is for (``kernels verify-signature``).

    Args:
        home: folder of the build, which need not be importable. Default: the build this function belongs to.

    Returns:
        One line a file that is altered, missing or not listed, sorted by path; empty if everything is as built.

    Raises:
        FileNotFoundError: no ``metadata.json``, as in a source checkout.
        ValueError: ``metadata.json`` has no SHA-256 digest.
    """
    home = HOME if home is None else Path(home)
    digest = json.loads((home / "metadata.json").read_text()).get("digest") or {}
    if digest.get("algorithm") != "sha256":
        raise ValueError(f"metadata.json: expected a sha256 digest, got {digest.get('algorithm')}")
    listed = digest["files"]
    present = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name not in _NOT_DIGESTED
    }
    wrong = [f"{name}: missing" for name in listed.keys() - present]
    wrong += [f"{name}: not listed" for name in present - listed.keys()]
    for name in present & listed.keys():
        if base64.b64encode(hashlib.sha256((home / name).read_bytes()).digest()).decode() != listed[name]:
            wrong.append(f"{name}: altered")
    return sorted(wrong)


def environment_report() -> str:
    """Facts to paste into an issue: the build and whether its files are intact, torch, the GPUs, the packages that meet
    it, the environment variables it reads, and which path a few typical calls would take on each device, and why.

    ``python -m flash_kda`` prints it. Reads nothing from the network; on a GPU it allocates a few bytes and runs nothing.
    """
    lines = [*_build(), *_machine(), *_packages(), *_environment()]
    for device in [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]:
        lines += [(f"on {device}" if i == 0 else "", text) for i, text in enumerate(_calls(device))]
    return "\n".join(f"{name:<13} {text}".rstrip() for name, text in lines)


def _build() -> list[tuple[str, str]]:
    lines = [("location", str(HOME))]
    try:
        metadata = json.loads((HOME / "metadata.json").read_text())
        wrong = altered_files()
    except FileNotFoundError:
        return [("flash_kda", "not built: no metadata.json"), *lines]
    except ValueError as error:
        wrong = [str(error)]
    backend = metadata["backend"]
    made_for = " ".join([backend["type"], *backend.get("archs", [])])
    commit = metadata.get("provenance", {}).get("kernel")
    source = f", commit {commit['commit'][:12]}{' and changes' if commit['dirty'] else ''}" if commit else ""
    intact = "as metadata.json lists them" if not wrong else "NOT as metadata.json lists them"
    return [
        ("flash_kda", f"version {metadata['version']}, {metadata['id']} ({made_for}){source}"),
        *lines,
        ("files", intact),
        *(("", line) for line in wrong),
    ]


def _machine() -> list[tuple[str, str]]:
    libc = " ".join(platform.libc_ver())
    lines = [
        ("system", f"{platform.platform(terse=True)} {platform.machine()}, {libc}, Python {platform.python_version()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}"),
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpu = f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} SMs"
        lines.append((f"cuda:{i}", f"{gpu}, {p.total_memory / 2**30:.0f} GiB"))
    return lines


def _packages() -> list[tuple[str, str]]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return [("packages", ", ".join(found))]


def _environment() -> list[tuple[str, str]]:
    return [("environment", f"{n}={v}") for n, v in sorted(os.environ.items()) if n.startswith(_VARIABLES)]


def _calls(device: str) -> list[str]:
    """The path of each typical call, by the function that decides for the real ones."""
    typical = [
        ("inference, bfloat16, heads of 128", {}, False),
        ("the same where a gradient is needed", {}, True),
        ("inference, float32", {"dtype": torch.float32}, False),
        ("inference, bfloat16, heads of 64", {"dim": 64}, False),
    ]
    said = [(what, *dispatch.select(_call(device, **options), needs_grad)) for what, options, needs_grad in typical]
    if len({(path, reason) for _, path, reason in said}) == 1:
        said = [("every call", *said[0][1:])]
    return [f"{what}: {path} ({reason})" for what, path, reason in said]


def _call(device: str, dtype: torch.dtype = torch.bfloat16, dim: int = 128):
    x = torch.empty(1, 1, 1, dim, dtype=dtype, device=device)
    off = dict.fromkeys(
        ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"), False
    )
    absent = dict.fromkeys(("A_log", "dt_bias", "initial_state", "cu_seqlens", "scale", "lower_bound"))
    return check_call(x, x, x, x, x[..., 0], **off, **absent, state_v_first=False)
