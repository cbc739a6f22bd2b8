"""The end-to-end benchmark runs anywhere: a small model on the CPU, as a user would start it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import require_kernel_support

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "model.py"
ROW = {"arm", "model", "what", "B", "T", "ms", "ms_spread", "extra_bytes"}


def run(*arguments):
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_small_model(kernel, tmp_path):
    require_kernel_support()
    done = run(
        *("--preset", "small", "--device", "cpu", "--tokens", 16, "--layer-tokens", 16, "--batches", 1, 2),
        *("--repeats", 1, "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cpu-model.json").read_text())
    assert record["meta"]["gpu"] == "cpu" and record["meta"]["source_digest"]
    found = {(row["arm"], row["what"], row["B"], row["T"]): row for row in record["rows"]}
    shapes = [("layer prefill", 1, 16), ("layer decode", 1, 1), ("layer decode", 2, 1)]
    shapes += [("prefill", 1, 16), ("decode", 1, 1), ("decode", 2, 1)]
    assert set(found) == {(arm, *shape) for arm in ("none", "flash_kda") for shape in shapes}
    for row in found.values():
        assert set(row) >= ROW and row["ms"] > 0
        assert row["what"] in ("prefill", "decode") or 0 < row["projections_ms"]
    again = run("--report", tmp_path / "cpu-model.json")
    assert again.returncode == 0 and "flash_kda ms" in again.stdout and "beside projections" in again.stdout


def test_the_large_model_needs_a_gpu():
    done = run("--device", "cpu")
    assert done.returncode != 0 and "--preset small runs anywhere" in done.stderr


@pytest.mark.parametrize(
    "name, part",
    [
        ("void kda::conv_kernel<4, 4, false>", "conv"),
        ("void kda::gated_norm_kernel<128>", "norm"),
        ("void kda::prepare_kernel<(kda::Gate)1>", "kda"),
        ("void kda::linears_kernel<1>", "projections"),
        ("nvjet_hsh_128x256_64x4", "projections"),
        ("void at::native::elementwise_kernel", "other"),
    ],
)
def test_kernels_are_told_apart(name, part, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import model

    assert model.part_of(name) == part
