"""The end-to-end benchmark runs anywhere: a small model on the CPU, as a user would start it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import model

    return model


def rows_of(model, arms):
    """Rows of a whole record, times made up."""
    wanted = model.shapes(model.LAYER_PREFILL, model.DECODE, "layer ") + model.shapes(model.PREFILL, model.DECODE)
    return [
        {"arm": arm, "what": what, "B": B, "T": T, "ms": 1.0, "ms_spread": 0.0, "extra_bytes": 1}
        for arm in arms
        for what, B, T in wanted
        if arm != "none" or what != "prefill" or T <= model.NONE_TOKENS
    ]


def test_a_run_that_is_cut_keeps_its_rows(model, tmp_path, monkeypatch):
    def cut(options):
        yield from rows_of(model, ("flash_kda",))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "all_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        model.main(["--preset", "small", "--device", "cpu", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "cpu-model.json").read_text())["rows"]) == 2


def test_check(model, tmp_path, capsys):
    import record as records

    meta = dict.fromkeys(records.META) | {"source_digest": records.source_digest(), "date": "today", "gpu": "cpu"}
    rows = rows_of(model, model.ARMS)

    def check(**changes):
        path = records.write({"meta": meta, "rows": rows} | changes, tmp_path, suffix="model")
        failed = model.main(["--check", str(path)])
        return failed, capsys.readouterr().out

    assert check()[0] == 0
    failed, said = check(rows=[row for row in rows if (row["arm"], row["T"]) != ("fla", 131072)])
    assert failed and said == "fla prefill B = 1, T = 131072 is missing\n"
    failed, said = check(rows=[row | {"ms": None} if row["T"] == 131072 else row for row in rows])
    assert failed and said == "flash_kda prefill B = 1, T = 131072 ran out of memory\n"
    failed, said = check(meta=meta | {"source_digest": "another"})
    assert failed and said == "the sources changed since today\n"
    assert model.main(["--check", str(tmp_path / "none.json")]) == 1


def test_arms_exchange_functions_and_modules(kernel, model):
    """On the way out a module is what it was; without kernels, transformers' code is that of a machine without FLA."""
    require_kernel_support()
    options = model.parse(["--preset", "small", "--device", "cpu"])
    with torch.no_grad():
        arms, layer = model.Arms(options.device), model.make_layer(options)
    with arms.run("flash_kda", layer):
        assert "forward" in vars(layer)
    for arm in ("none", "fla"):
        with arms.run(arm, layer):
            assert "forward" not in vars(layer)
            assert all(getattr(arms.code, name) is f for name, f in arms.functions[arm].items())
    assert not any(arms.functions["none"][name] is arms.functions["fla"][name] for name in arms.FUNCTIONS)
