"""The environment report, and the check of the package's own files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def copy(kernel, tmp_path) -> Path:
    """A copy of the loaded build, as a package that `import flash_kda` finds."""
    home = tmp_path / "flash_kda"
    shutil.copytree(Path(kernel.__file__).parent, home, ignore=shutil.ignore_patterns("__pycache__"))
    return home


def run_module(home: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(home.parent)}
    return subprocess.run([sys.executable, "-m", "flash_kda"], capture_output=True, text=True, env=env, check=False)


def test_a_build_is_intact(kernel, copy):
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "chunk.cpython-311.pyc").write_bytes(b"")
    (copy / "metadata.json.sigstore").write_text("{}")
    assert kernel.altered_files() == kernel.altered_files(copy) == []


def test_one_changed_bit_is_found(kernel, copy):
    """Same length, same name: what a cache or a bad download leaves, and what `kernels` loads without a word."""
    content = bytearray((copy / "chunk.py").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "chunk.py").write_bytes(content)
    assert kernel.altered_files(copy) == ["chunk.py: altered"]


def test_missing_and_added_files_are_found(kernel, copy):
    (copy / "layers" / "kda.py").unlink()
    (copy / "layers" / "more.py").write_text("")
    (copy / "_ops.py").write_text("")
    assert kernel.altered_files(copy) == ["_ops.py: altered", "layers/kda.py: missing", "layers/more.py: not listed"]


def test_without_a_digest_nothing_is_vouched_for(kernel, copy):
    metadata = json.loads((copy / "metadata.json").read_text())
    del metadata["digest"]
    (copy / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="metadata.json: expected a sha256 digest, got None"):
        kernel.altered_files(copy)
    (copy / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError):
        kernel.altered_files(copy)


def test_the_report_says_what_there_is(kernel, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_VALIDATE", "1")
    report = kernel.environment_report()
    home = Path(kernel.__file__).parent
    metadata = json.loads((home / "metadata.json").read_text())
    for fact in (
        f"version {metadata['version']}, {metadata['id']} ({metadata['backend']['type']}",
        str(home.absolute()),
        "files         as metadata.json lists them",
        torch.__version__,
        "FLASH_KDA_VALIDATE=1",
        "on cpu        every call: pytorch (the tensors are on cpu)",
    ):
        assert fact in report, fact
    for name in ("kernels", "transformers"):
        assert f"{name} {__import__(name).__version__}" in report


@pytest.mark.gpu
def test_the_report_says_what_a_gpu_would_run(kernel):
    report = kernel.environment_report()
    assert torch.cuda.get_device_name(0) in report
    assert (
        "on cuda:0     inference, bfloat16, heads of 128: cuda prefill (every condition of the kernel holds)" in report
    )
    assert "the same where a gradient is needed: pytorch (an input requires a gradient" in report
    assert "heads of 64: pytorch (the kernel takes head dims K = V = 128" in report


def test_the_report_asks_the_function_that_decides(kernel, monkeypatch):
    monkeypatch.setattr(kernel.dispatch, "select", lambda call, needs_grad: (f"{call.q.dtype}", f"{needs_grad}"))
    report = kernel.environment_report()
    assert "inference, bfloat16, heads of 128: torch.bfloat16 (False)" in report
    assert "the same where a gradient is needed: torch.bfloat16 (True)" in report
    assert "inference, float32: torch.float32 (False)" in report


def test_python_m_prints_it_and_fails_on_altered_files(copy):
    result = run_module(copy)
    assert result.returncode == 0, result.stderr
    assert f"location      {copy}" in result.stdout and "files         as metadata.json" in result.stdout
    (copy / "layers" / "__init__.py").write_text((copy / "layers" / "__init__.py").read_text() + "\n")
    result = run_module(copy)
    assert result.returncode == 1
    assert "files         NOT as metadata.json lists them\n              layers/__init__.py: altered" in result.stdout


def test_the_report_of_a_checkout_says_that_it_is_not_built(copy):
    (copy / "metadata.json").unlink()
    shown = subprocess.run(
        [sys.executable, "-c", "import flash_kda; print(flash_kda.environment_report())"],
        env=os.environ | {"PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("flash_kda     not built: no metadata.json")
