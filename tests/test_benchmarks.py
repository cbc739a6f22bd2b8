"""The benchmarks' own machinery, on a CPU: gates, the fp64 reference, the record and what is made from it."""

import argparse
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import accuracy
import decode
import peers
import prefill
import record as records
import reference
import report
import timing
import workloads
from workloads import REGIMES, ROWS, Cell, Row, regime_gate

CPU = torch.device("cpu")


def recurrence(q, k, v, g, beta, scale, state):
    """One sequence, one head, token by token: [T, K], [T, V], [T] and [K, V], fp64."""
    out = []
    for t in range(len(q)):
        state = g[t].exp()[:, None] * state
        state = state + beta[t] * torch.outer(k[t], v[t] - state.T @ k[t])
        out.append(scale * (state.T @ q[t]))
    return torch.stack(out), state


# --- workloads


def test_table_has_every_row_and_target_once():
    assert len({row.id for row in ROWS}) == len(ROWS) == 20
    assert Row(96, workloads.MIX).tokens == 8192
    by_id = {row.id: row for row in ROWS}
    assert by_id["32x8192"].target("slow") == 0.30
    assert by_id["32x8192"].target("steep") == 0.20
    assert by_id["32x8192"].target("kimi") == pytest.approx(0.345)
    assert set(workloads.GIVEN_ROWS) <= set(by_id)


def test_floor_and_work_agree_with_the_design():
    row = Row(32, (8192,))
    assert row.bytes / 4.3e9 == pytest.approx(0.078, rel=0.02)  # ms at the copy rate of an H200
    assert row.flops == pytest.approx(47e9, rel=0.02)


@pytest.mark.parametrize(
    "regime, mean, low, high",
    [
        # Mean decay a token, and bounds no draw of this size leaves.
        ("steep", (-3.6, -2.6), -5.0, 0.0),
        ("slow", (-0.07, -0.03), -5.0, 0.0),
        ("mixed", (-3.6, -2.4), -5.0, 0.0),
        ("kimi", (-0.6, -0.05), -200.0, 0.0),
    ],
)
def test_gate_regimes(regime, mean, low, high):
    generator = torch.Generator().manual_seed(0)
    x, A_log, dt_bias = workloads.draw_gate(regime, (1, 512, 4, 128), 4, generator)
    g = workloads.log_decay(x.double(), A_log, dt_bias, workloads.LOWER_BOUND if regime != "kimi" else None)
    assert mean[0] < g.mean().item() < mean[1]
    assert low <= g.min().item() and g.max().item() <= high


def test_mixed_regime_keeps_eight_slow_channels():
    generator = torch.Generator().manual_seed(0)
    x, A_log, dt_bias = workloads.draw_gate("mixed", (1, 512, 4, 128), 4, generator)
    g = workloads.log_decay(x, A_log, dt_bias, workloads.LOWER_BOUND).mean((0, 1, 2))
    assert (g > -0.2).sum() == 8 and (g < -2).sum() == 120


def test_kimi_bias_is_the_inverse_softplus_of_its_range():
    generator = torch.Generator().manual_seed(0)
    _, A_log, dt_bias = workloads.draw_gate("kimi", (1, 1, 64, 128), 64, generator)
    step = torch.nn.functional.softplus(dt_bias)
    assert 0.99e-3 < step.min() and step.max() < 1.01e-1
    assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.1)
    assert 1.0 <= A_log.exp().min() and A_log.exp().max() <= 16.0


def test_unknown_regime_and_row_are_named():
    with pytest.raises(ValueError, match="regime.*'sleep'"):
        workloads.draw_gate("sleep", (1, 1, 1, 128), 1, torch.Generator())
    with pytest.raises(ValueError, match="99x1"):
        workloads.select_rows(["99x1"])


# --- fp64 reference


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seq_lens", [(75,), (33, 1, 64)], ids=str)
def test_reference_is_the_recurrence(regime, seq_lens):
    cell = Cell(Row(2, seq_lens, value_heads=4), regime_gate(regime), regime)
    inputs = workloads.make_inputs(cell, CPU)
    initial = torch.randn(len(seq_lens), 4, 128, 128, generator=torch.Generator().manual_seed(1))
    heads = [3, 0]
    o, state = reference.chunk_kda(**inputs, heads=heads, initial_state=initial)
    assert o.dtype == state.dtype == torch.float64

    q, k, v, beta = (inputs[name][0].double() for name in ("q", "k", "v", "beta"))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    g = workloads.log_decay(inputs["g"][0].double(), inputs["A_log"], inputs["dt_bias"], inputs.get("lower_bound"))
    start = 0
    for n, length in enumerate(seq_lens):
        tokens = slice(start, start + length)
        for i, h in enumerate(heads):
            want_o, want_state = recurrence(
                *(x[tokens, h // 2] for x in (q, k)),
                *(x[tokens, h] for x in (v, g, beta.sigmoid())),
                128**-0.5,
                initial[n, h].double(),
            )
            assert reference.relative_error(o[0, tokens, i], want_o) < 1e-12
            assert reference.relative_error(state[n, i], want_state) < 1e-12
        start += length


@pytest.mark.parametrize(
    "case", [case for case in accuracy.CASES if not case.name.startswith("long")], ids=lambda c: c.name
)
def test_hard_cases_reach_what_they_promise(case):
    """Inputs of benchmarks/accuracy.py are as extreme as they say, and their reference stays the recurrence."""
    row = Row(2, (150,))
    inputs = case.make(row, CPU)
    g = inputs["g"].double()
    if inputs.get("use_gate_in_kernel"):
        g = workloads.log_decay(g, inputs["A_log"], inputs["dt_bias"], inputs.get("lower_bound"))
    if case.name == "checkpoint":
        assert inputs["A_log"].max().exp().item() == pytest.approx(201, rel=1e-5)
        assert g.min() < -500
    if "resets" in case.name:
        assert g.min() == accuracy.RESET and 0.02 < (g == accuracy.RESET).double().mean() < 0.1
    if "equal-keys" in case.name:
        same = (inputs["k"][0, 1:] == inputs["k"][0, :-1]).all(-1).all(-1)
        runs = "".join("1" if x else "0" for x in same).split("0")
        assert max(map(len, runs)) == accuracy.EQUAL_RUN - 1
        assert inputs["beta"].unique().item() == float(case.name[-1])

    o, state = reference.chunk_kda(**inputs, heads=[0])
    q, k, v, beta = (inputs[name][0, :, 0].double() for name in ("q", "k", "v", "beta"))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    beta = beta.sigmoid() if inputs["use_beta_sigmoid_in_kernel"] else beta
    want_o, want_state = recurrence(q, k, v, g[0, :, 0], beta, 128**-0.5, v.new_zeros(128, 128))
    assert reference.relative_error(o[0, :, 0], want_o) < 1e-11
    assert reference.relative_error(state[0, 0], want_state) < 1e-11


def test_relative_error_and_heads():
    x = torch.ones(4, dtype=torch.float64)
    assert reference.relative_error(x * 1.5, x) == pytest.approx(0.5)
    assert math.isnan(reference.relative_error(torch.tensor([1.0, float("inf"), 1.0, 1.0]), x))
    assert reference.spread_heads(4, 16) == [0, 1, 2, 3]
    chosen = reference.spread_heads(96, 16)
    assert len(set(chosen)) == 16 and chosen[0] == 0 and chosen[-1] == 95


# --- the record


def make_record(digest: str) -> dict:
    """A whole record with invented numbers."""
    rows = []
    for i, cell in enumerate(workloads.cells()):
        values = {"ms": 0.1 + i / 100, "ms_spread": 0.01, "eager_ms": 0.2, "call_ms": 0.015, "fla_ms": 1.0 + i / 50}
        if max(cell.row.seq_lens) <= prefill.ERROR_TOKENS:
            values |= {"err_o": 2e-3, "err_s": 1e-3, "fla_err_o": 4e-3, "fla_err_s": 3e-3}
        else:
            values |= dict.fromkeys(("err_o", "err_s", "fla_err_o", "fla_err_s"))
        shape = {"H": cell.row.heads, "HV": cell.row.hv, "seq_lens": list(cell.row.seq_lens)}
        kind = {"gate": cell.gate, "regime": cell.regime, "g_dtype": cell.g_dtype}
        rows.append(shape | kind | values | {"workspace_bytes": 200 << 20})
    meta = {"gpu": "NVIDIA H200", "driver": "1", "cuda": "13.0", "torch": "2.11", "triton": "3.6", "fla": "0.6.0"}
    meta |= {"date": "2026-11-21T00:00:00+00:00", "source_digest": digest}
    return {"meta": meta | {"tests": {"passed": 3, "failed": 0, "skipped": 1}}, "rows": rows}


@pytest.fixture
def checkout(tmp_path):
    """A small source tree with a record that speaks of it."""
    for name, text in {
        "build.toml": "[general]",
        "kda_cutlass/a.cu": "a",
        "torch-ext/flash_kda/__init__.py": "b",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = records.write(make_record(records.source_digest(tmp_path)), tmp_path / "benchmarks" / "results")
    assert path.name == "h200-prefill.json"
    return tmp_path, path


def test_record_speaks_of_its_sources(checkout):
    root, path = checkout
    assert records.check(path, root) == []


def test_generated_files_do_not_change_the_digest(checkout):
    root, path = checkout
    for name in (
        "torch-ext/flash_kda/_ops.py",
        "torch-ext/flash_kda/__pycache__/a.pyc",
        "torch-ext/.DS_Store",
        "README.md",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("anything")
    assert records.check(path, root) == []


@pytest.mark.parametrize(
    "name", ["build.toml", "kda_cutlass/a.cu", "torch-ext/flash_kda/__init__.py", "kda_cutlass/new.cuh"]
)
def test_a_changed_source_makes_the_record_stale(checkout, name):
    root, path = checkout
    with (root / name).open("a") as file:
        file.write("changed")
    assert any("sources changed" in problem for problem in records.check(path, root))


def test_renaming_a_source_makes_the_record_stale(checkout):
    root, path = checkout
    (root / "kda_cutlass/a.cu").rename(root / "kda_cutlass/b.cu")
    assert any("sources changed" in problem for problem in records.check(path, root))


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda r: r["meta"].pop("driver"), "meta.driver"),
        (lambda r: r["rows"][0].pop("call_ms"), "call_ms missing"),
        (lambda r: r["rows"][0].update(gate="sigmoid"), "gate"),
        (lambda r: r["rows"][0].update(regime="fast"), "regime"),
        (lambda r: r["rows"][0].update(err_o=float("nan")), "err_o"),
        (lambda r: r["rows"][0].update(ms=None), "ms"),
        (lambda r: r["rows"][0].update(seq_lens=8192), "seq_lens"),
        (lambda r: r["rows"].clear(), "rows is empty"),
        (lambda r: r["rows"].pop(3), "measurements are missing"),
        (lambda r: r["meta"].update(tests=None), "did not include the tests"),
        (lambda r: r["meta"]["tests"].update(failed=2), "2 tests failed"),
    ],
)
def test_check_names_what_is_wrong(checkout, damage, complaint):
    root, path = checkout
    record = make_record(records.source_digest(root))
    damage(record)
    records.write(record, path.parent)
    assert any(complaint in problem for problem in records.check(path, root)), records.check(path, root)


def test_check_command_exits_with_one_and_says_why(checkout, capsys):
    _, path = checkout  # its digest is that of another tree
    assert prefill.main(["--check", str(path)]) == 1
    assert "sources changed" in capsys.readouterr().out
    assert prefill.main(["--check", str(path.with_name("none.json"))]) == 1
    assert "there is no record" in capsys.readouterr().out


def test_check_command_passes_on_a_true_record(tmp_path, capsys):
    path = records.write(make_record(records.source_digest()), tmp_path)
    assert prefill.main(["--check", str(path)]) == 0
    assert "speaks of the present sources" in capsys.readouterr().out


def test_junit_counts(tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/></testsuites>')
    assert prefill.test_counts(junit) == {"passed": 4, "failed": 2, "skipped": 3}


@pytest.mark.parametrize("gate, regime", [("lower_bound", "slow"), ("given", "steep"), ("softplus", "kimi")])
@pytest.mark.parametrize("seq_lens", [(96,), (40, 24)], ids=str)
def test_cudnn_is_an_arm_where_it_is_installed(monkeypatch, kernel, gate, regime, seq_lens):
    """With a stand-in for cuDNN's function that takes what its documentation says: packed tokens, fp32 gate and beta, V-first states."""

    def kimi_delta_attention(
        q, k, v, g, beta, cu_seqlens, safe_gate=False, gate_lower_bound=None, a_log=None, **options
    ):
        assert g.dtype == beta.dtype == torch.float32 and cu_seqlens.dtype == torch.int32
        dt_bias = options.pop("dt_bias", None)
        if safe_gate:
            assert dt_bias.shape == g.shape[1:]
            options |= {"use_gate_in_kernel": True, "A_log": a_log, "dt_bias": dt_bias, "lower_bound": gate_lower_bound}
        tensors = (x[None] for x in (q, k, v, g, beta))
        o, state = kernel.chunk_kda(*tensors, cu_seqlens=cu_seqlens, state_v_first=True, **options)
        return o[0], state

    modules = {
        name: types.ModuleType(name) for name in ("cudnn", "cudnn.linear_attention", "cudnn.linear_attention.ops")
    }
    modules["cudnn.linear_attention.ops"].kimi_delta_attention = kimi_delta_attention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: {"nvidia-cudnn-frontend": "1.32.0"}[name])
    cudnn, version = peers.load_cudnn()
    assert version == "1.32.0"
    options = argparse.Namespace(device=CPU, errors=True, repeats=1)
    row = prefill.run_cell(Cell(Row(2, seq_lens), gate, regime), kernel, None, options, cudnn)
    keys = ("cudnn_gpu_ms", "cudnn_ms", "cudnn_err_o", "cudnn_err_s")
    if gate == "softplus":
        assert all(row[key] is None for key in keys)
    else:
        assert row["cudnn_gpu_ms"] > 0 and row["cudnn_ms"] > 0
        assert 0 < row["cudnn_err_o"] < 5e-3 and 0 < row["cudnn_err_s"] < 5e-3
        assert "cuDNN slow" in prefill.times_table([row | {"regime": "slow", "gate": "lower_bound"}])
    assert not records.problems({"meta": dict.fromkeys(records.META), "rows": [row]})


def test_without_cudnn_there_is_no_arm(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert peers.load_cudnn() == (None, None)


def test_verdicts_find_the_bad_rows():
    row = {"H": 32, "HV": 32, "seq_lens": [8192], "gate": "lower_bound", "regime": "slow", "g_dtype": "bf16"}
    good = row | {"ms": 0.2, "eager_ms": 0.2, "fla_ms": 0.9, "fla_gpu_ms": 0.8, "cudnn_gpu_ms": 0.5, "reach_ms": 0.3}
    good |= {"unknown_ms": 0.21, "err_o": 2e-3, "fla_err_o": 4e-3, "err_s": 1e-3, "fla_err_s": 3e-3}
    assert all(line.split(": ")[1].startswith("0 of 1") for line in prefill.verdicts([good]))
    bad = good | {"ms": 1.0, "unknown_ms": 1.0, "eager_ms": 1.0, "err_o": 5e-3, "err_s": float("nan")}
    assert all(line.split(": ")[1].startswith("1 of 1") for line in prefill.verdicts([bad]))
    assert "H=32 [8192] lower_bound slow" in prefill.verdicts([bad])[0]
    alone = good | {"fla_ms": None, "fla_gpu_ms": None, "fla_err_o": None, "fla_err_s": None, "cudnn_gpu_ms": None}
    counts = [line.split(": ")[1] for line in prefill.verdicts([alone])]
    assert counts == ["0 of 0"] * 3 + ["0 of 1"] * 2 + ["0 of 0"] * 3  # what was compared, not what was measured
    assert prefill.verdicts([alone | {"err_o": float("nan")}])[5].startswith("output less exact than FLA: 1 of 1")


def test_verdicts_say_how_time_grows():
    lengths = {8192: 0.25, 32768: 0.9, 1 << 20: 28.0}
    row = {"H": 32, "HV": 32, "gate": "lower_bound", "regime": "slow", "g_dtype": "bf16", "reach_ms": None}
    row |= dict.fromkeys(("fla_ms", "fla_gpu_ms", "eager_ms", "err_o", "fla_err_o", "err_s", "fla_err_s"))
    rows = [row | {"seq_lens": [tokens], "ms": ms} for tokens, ms in lengths.items()]
    others = [
        rows[0] | {"H": 64, "HV": 64, "ms": 9.0},
        rows[0] | {"gate": "given", "ms": 9.0},
        rows[0] | {"regime": "kimi", "ms": 9.0},
        rows[0] | {"seq_lens": [8192] * 2, "ms": 9.0},
        rows[0] | {"seq_lens": [512], "ms": 9.0},
    ]
    expected = "us a token at H=32 slow: 8192 0.0305, 32768 0.0275, 1048576 0.0267; 1.14 apart"
    assert prefill.verdicts(rows + others)[7:] == [expected]
    assert not prefill.verdicts(rows[:2] + others)[7:]


@pytest.mark.parametrize(
    "row_bytes, sets, passes", [(1 << 22, 16, 1), (1 << 25, 8, 2), (1 << 28, 1, 8), (1 << 30, 1, 2), (1 << 32, 1, 1)]
)
def test_a_graph_is_longer_than_its_launch(row_bytes, sets, passes):
    assert timing.graph_passes(row_bytes, sets) == passes


# --- the report


def test_report_writes_and_checks_readme_and_plot(checkout, capsys):
    pytest.importorskip("matplotlib")
    root, path = checkout
    readme = root / "README.md"
    readme.write_text("# Title\n\nBefore.\n")
    arguments = ["--record", str(path), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\nBefore.\n")
    first = next(line for line in text.splitlines() if line.startswith("| 96 | 8192 "))
    assert first == "| 96 | 8192 | .100 | .110 | .120 | .130 | 1.04 | 1.06 | 5.0–5.3× |"
    assert "3 passed, 0 failed, 1 skipped" in text

    # Text around the section stays, the section itself is replaced and not repeated.
    readme.write_text(text + "\nAfter.\n")
    assert report.main(arguments) == 0
    assert readme.read_text() == text + "\nAfter.\n"

    # Another record, or a number typed by hand, shows.
    readme.write_text(text.replace("| .100 |", "| .050 |"))
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text(text)
    path.write_text(path.read_text().replace('"ms": 0.1,', '"ms": 0.3,'))
    capsys.readouterr()
    assert report.main([*arguments, "--check"]) == 1
    said = capsys.readouterr().out
    assert "README.md" in said and "h200-prefill.svg" in said


def test_this_readme_follows_from_this_record():
    path = records.find()
    if path is None:
        pytest.skip("no record yet")
    assert report.check(path, ROOT / "README.md") == []


# --- end to end, without a GPU


def run(*command, **env):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """This checkout's torch-cpu variant, built beside it."""
    pytest.importorskip("kernels")
    if torch.version.cuda:
        pytest.skip("torch-cpu variants are for torch without CUDA")
    root = tmp_path_factory.mktemp("kernel")
    done = run("tools/build.py", "--backend", "cpu", "--output", str(root / "build"))
    assert done.returncode == 0, done.stderr
    return {"LOCAL_KERNELS": f"moonshot/flash-kda={root}"}


def test_prefill_runs_on_a_cpu(built, tmp_path):
    done = run("benchmarks/prefill.py", "--device", "cpu", "--quick", "--out", str(tmp_path), **built)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cpu-prefill.json").read_text())
    assert records.problems(record) == []
    assert record["meta"]["source_digest"] == records.source_digest()
    assert len(record["rows"]) == len(workloads.CPU_ROWS) * len(REGIMES)
    assert all(0 < row["err_o"] < 5e-3 and 0 < row["err_s"] < 4e-3 for row in record["rows"])


def test_prefill_goes_on_where_it_was_cut_short(built, tmp_path):
    command = ["benchmarks/prefill.py", "--device", "cpu", "--quick", "--repeats", "1", "--out", str(tmp_path)]
    whole = tmp_path / "cpu-prefill.json"
    done = run(*command, **built)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]  # nothing is left of the parts
    first = json.loads(whole.read_text())
    kept = first["rows"][:1] + first["rows"][3:]
    part = records.write({**first, "rows": kept}, tmp_path / "part")
    done = run(*command, "--resume", str(part), **built)
    assert done.returncode == 0, done.stderr
    assert "measured 2/2" in done.stderr and "measured 1/2" in done.stderr
    second = json.loads(whole.read_text())
    assert [row for i, row in enumerate(second["rows"]) if i not in (1, 2)] == kept
    assert [prefill.label_of(row) for row in second["rows"]] == [prefill.label_of(row) for row in first["rows"]]
    assert second["meta"]["earlier_dates"] == [first["meta"]["date"]]
    records.write({"meta": {**first["meta"], "source_digest": "another"}, "rows": kept}, tmp_path / "part")
    done = run(*command, "--resume", str(part), **built)
    assert done.returncode == 1 and "source_digest was another" in done.stderr


def test_accuracy_runs_on_a_cpu(built):
    done = run("benchmarks/accuracy.py", "--device", "cpu", "--quick", **built)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(case.name in done.stdout for case in accuracy.CASES)


def test_kernels_cli_finds_and_runs_the_benchmark(built):
    pytest.importorskip("tabulate")
    root = Path(built["LOCAL_KERNELS"].split("=")[1])
    (root / "benchmarks").symlink_to(ROOT / "benchmarks")
    command = [str(Path(sys.executable).with_name("kernels")), "benchmark", ".", "--iterations", "1", "--warmup", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for workload in ("steep_2048", "slow_2048", "kimi_packed"):
        assert workload in done.stderr


# --- decode


def test_decode_benchmark_writes_a_record(tmp_path, capsys):
    """A small run on the CPU: an arm for every cell that can run there, each near fp64."""
    assert decode.main(["--device", "cpu", "--batches", "1", "3", "--repeats", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cpu-decode.json").read_text())
    assert {row["arm"] for row in record["rows"]} == {"none", "flash_kda"}
    assert len(record["rows"]) == 2 * len(decode.cells([1, 3], 2))
    for row in record["rows"]:
        assert row["ms"] > 0 and row["err_o"] < 3e-3 and row["err_s"] < (1e-6 if row["state"] == "fp32" else 3e-3)
    assert record["meta"]["source_digest"] == records.source_digest()
    assert "V-first" in capsys.readouterr().out
