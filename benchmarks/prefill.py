"""Prefill benchmark: `chunk_kda` of this kernel beside FLA's, at every shape, gate mode and regime, with errors.

    python benchmarks/prefill.py --tests            # the whole record; about 6 minutes on an H200
    python benchmarks/prefill.py --tests --resume benchmarks/results/h200-prefill-part.json   # one that was cut short
    python benchmarks/prefill.py --rows 32x8192 8x8192 --regimes slow --no-write
    python benchmarks/prefill.py --check            # does the record speak of these sources?
    python benchmarks/prefill.py --device cpu --quick

What the columns mean, and how each is measured: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

import record as records
import reference
import torch
from console import number, progress, say, table
from peers import compile_fla, cudnn_inputs, fla_jobs, fla_variants, load_cudnn, load_fla, load_ours, tune_fla
from timing import Arm, graph_passes, measure, measure_cpu, set_count, spread
from workloads import CPU_ROWS, PEER_TOKENS, REGIMES, ROWS, Cell, Row, cells, make_inputs, select_rows

ERROR_TOKENS = 8192  # longest sequence that is checked against fp64
ERROR_HEADS = 16  # heads of it, evenly spread: errors are norms over millions of elements either way
GROWTH_HEADS, GROWTH_TOKENS = 32, 8192  # of the rows whose time a token is compared, and tokens at least
QUICK_ROWS = ("32x512", "32x2048", "32x8192", "32x8x1024")


def errors(call, inputs: dict, expected, heads: list[int]) -> tuple[float, float]:
    """Relative errors of output and final state; NaN if anything in them, other heads included, is not finite."""
    o, state = call(**inputs)
    if not (torch.isfinite(o).all() and torch.isfinite(state).all()):
        return float("nan"), float("nan")
    return (
        reference.relative_error(o[:, :, heads], expected[0]),
        reference.relative_error(state[:, heads], expected[1]),
    )


def peer_error(value: float | None) -> float | None:
    """A peer that is not finite has no error to compare with; ours that is not finite fails the record."""
    return None if value is None or math.isnan(value) else value


def run_cell(cell: Cell, ours, fla, options, cudnn=None) -> dict:
    """Measure one cell and return its row of the record. `fla` and `cudnn` may be None."""
    row, device = cell.row, options.device
    if not row.has_peers:
        fla = cudnn = None
    sets = [make_inputs(cell, device, seed) for seed in range(set_count(row.bytes, device))]
    if row.packed:
        # A model's layers share one cu_seqlens, and FLA keeps what it derives from the last few it saw.
        sets = [inputs | {name: sets[0][name] for name in ("cu_seqlens", "cu_seqlens_cpu")} for inputs in sets]
    arms = [Arm("ours", ours.chunk_kda, sets)] + ([Arm("fla", fla, sets)] if fla else [])
    if row.packed and device.type == "cuda":
        arms.append(Arm("unknown", ours.chunk_kda, [inputs | {"cu_seqlens_cpu": None} for inputs in sets]))
    if cudnn and cell.gate != "softplus":  # which it has not
        arms.append(Arm("cudnn", cudnn, [cudnn_inputs(inputs) for inputs in sets]))

    result = {
        "H": row.heads,
        "HV": row.hv,
        "seq_lens": list(row.seq_lens),
        "gate": cell.gate,
        "regime": cell.regime,
        "g_dtype": cell.g_dtype,
    }
    found = {arm.name: (None, None) for arm in arms}
    if max(row.seq_lens) <= ERROR_TOKENS and options.errors:
        heads = reference.spread_heads(row.hv, ERROR_HEADS)
        expected = reference.chunk_kda(**sets[0], heads=heads)
        found = {arm.name: errors(arm.call, arm.sets[0], expected, heads) for arm in arms}
        del expected

    for arm in arms:
        arm.run_all()
        if device.type == "cuda":
            try:
                arm.capture(graph_passes(row.bytes, len(sets)))
            except Exception as error:
                # FLA may read lengths on the host, which no graph takes; its eager time stands alone then.
                if arm.call is ours.chunk_kda:
                    raise
                say(f"  {cell.label}: {arm.name} was not captured in a graph: {str(error).splitlines()[0]}")
                torch.cuda.synchronize()
    (measure if device.type == "cuda" else measure_cpu)(arms, options.repeats)

    mine = arms[0]
    result["ms"] = statistics.median(mine.gpu_ms)
    result["ms_spread"] = spread(mine.gpu_ms)
    result["eager_ms"] = statistics.median(mine.eager_ms)
    result["call_ms"] = statistics.median(mine.call_ms)
    unknown = next((arm for arm in arms if arm.name == "unknown"), None)
    result["unknown_ms"] = statistics.median(unknown.gpu_ms) if unknown else None
    for key in ("fla_ms", "fla_ms_spread", "fla_gpu_ms", "fla_call_ms"):
        result[key] = None
    if fla:
        peer = arms[1]
        result["fla_ms"] = statistics.median(peer.eager_ms)
        result["fla_ms_spread"] = spread(peer.eager_ms)
        result["fla_gpu_ms"] = statistics.median(peer.gpu_ms) if peer.gpu_ms else None
        result["fla_call_ms"] = statistics.median(peer.call_ms)
    if cudnn:
        peer = next((arm for arm in arms if arm.name == "cudnn"), None)
        result["cudnn_ms"] = statistics.median(peer.eager_ms) if peer else None
        result["cudnn_gpu_ms"] = statistics.median(peer.gpu_ms) if peer and peer.gpu_ms else None
        result["cudnn_err_o"], result["cudnn_err_s"] = map(peer_error, found.get("cudnn", (None, None)))
    result["err_o"], result["err_s"] = found["ours"]
    result["fla_err_o"], result["fla_err_s"] = map(peer_error, found.get("fla", (None, None)))
    result["workspace_bytes"] = workspace_bytes(ours, row, device)
    result["tbps"] = row.bytes / result["ms"] / 1e9
    result["tflops"] = row.flops / result["ms"] / 1e9
    result["reach_ms"] = row.target(cell.regime) if cell.gate != "given" else None
    return {key: round_significant(value) for key, value in result.items()}


def round_significant(value):
    """Five digits: more than the spread of any measurement here."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def workspace_bytes(ours, row: Row, device: torch.device) -> int:
    """What the CUDA prefill allocates beside its outputs; the PyTorch path has no workspace of its own."""
    if device.type != "cuda":
        return 0
    sequences = len(row.seq_lens)
    return ours.prefill.needed_workspace(1, row.tokens, sequences, row.hv, row.packed, False, False, device)


def environment(device: torch.device, fla_version: str | None) -> dict:
    cuda = device.type == "cuda"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    driver = None
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "fla": fla_version,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source_digest": records.source_digest(),
    }


def test_counts(junit: Path) -> dict:
    """Tests passed, failed (errors included) and skipped in a junit file."""
    suites = xml.etree.ElementTree.parse(junit).getroot().iter("testsuite")
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def run_tests() -> dict:
    """Run the suite in a process of its own and count."""
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", f"--junitxml={junit}", "tests"]
        # Tests choose for themselves when to be strict about the CUDA path.
        env = {key: value for key, value in os.environ.items() if key != "FLASH_KDA_STRICT"}
        subprocess.run(command, cwd=records.ROOT, env=env, stdout=sys.stderr, check=False)  # counted from junit
        if not junit.is_file():
            raise SystemExit("pytest wrote no result; see its output above")
        return test_counts(junit)


def label_of(row: dict) -> str:
    """The label of the cell that a row of the record is of."""
    shape = Row(row["H"], tuple(row["seq_lens"]), value_heads=row["HV"])
    return Cell(shape, row["gate"], row["regime"], row["g_dtype"]).label


def times_table(rows: list[dict]) -> str:
    """One line a shape: ours in each regime, FLA with either gate, the host's time a call, and where a target was missed."""
    shapes: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["gate"] != "given":
            shapes.setdefault((row["H"], tuple(row["seq_lens"])), {})[row["regime"]] = row
    lines = []
    cudnn = ("steep", "slow") if any(row.get("cudnn_gpu_ms") for row in rows) else ()
    for (heads, seq_lens), found in shapes.items():
        row = Row(heads, seq_lens)
        bounded = next((found[r] for r in REGIMES if r in found and r != "kimi"), {})
        late = [r for r, x in found.items() if x.get("reach_ms") and x["ms"] > x["reach_ms"]]
        lines.append(
            [str(heads), row.label]
            + [number(found.get(regime, {}).get("ms")) for regime in REGIMES]
            + [number(bounded.get("fla_ms")), number(found.get("kimi", {}).get("fla_ms"))]
            + [number(found.get(regime, {}).get("cudnn_gpu_ms")) for regime in cudnn]
            + [number(max(x["call_ms"] for x in found.values())), " ".join(late) or "none"]
        )
    return table(
        ["H", "sequences", *REGIMES, "FLA", "FLA kimi", *(f"cuDNN {r}" for r in cudnn), "call", "over reach in"], lines
    )


def given_table(rows: list[dict]) -> str:
    lines = [
        [
            str(r["H"]),
            Row(r["H"], tuple(r["seq_lens"])).label,
            r["g_dtype"],
            r["regime"],
            number(r["ms"]),
            number(r["fla_ms"]),
        ]
        for r in rows
        if r["gate"] == "given"
    ]
    return table(["H", "sequences", "g", "regime", "ms", "FLA"], lines) if lines else ""


def errors_table(rows: list[dict]) -> str:
    """Largest error by gate mode and regime, ours beside FLA's."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["err_o"] is not None:
            gate = f"given {row['g_dtype']}" if row["gate"] == "given" else row["gate"]
            groups.setdefault((gate, row["regime"]), []).append(row)

    def worst(group, key):
        values = [row[key] for row in group if row[key] is not None]
        if not values:
            return "–"
        return f"{max(values, key=lambda x: (math.isnan(x), x)):.2e}"

    keys = ("err_o", "fla_err_o", "err_s", "fla_err_s")
    lines = [[*group, *(worst(members, key) for key in keys)] for group, members in groups.items()]
    return table(["gate", "regime", "o", "o FLA", "state", "state FLA"], lines) if lines else ""


def verdicts(rows: list[dict]) -> list[str]:
    """What the issue asks of every row, and where it does not hold."""

    def collect(title, key, limit):
        """Of the rows that have both; one that is not finite is over any limit."""
        compared = [r for r in rows if r.get(key) is not None and (r.get(limit) is not None or math.isnan(r[key]))]
        bad = [label_of(r) for r in compared if r.get(limit) is None or not r[key] <= r[limit]]
        more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
        return f"{title}: {len(bad)} of {len(compared)}" + (f" ({'; '.join(bad[:6])}{more})" if bad else "")

    found = [
        collect("slower than FLA", "ms", "fla_ms"),
        collect("slower than FLA in a CUDA graph", "ms", "fla_gpu_ms"),
        collect("eager slower than FLA", "eager_ms", "fla_ms"),
        collect("over reach", "ms", "reach_ms"),
        collect("over reach where the host does not know the lengths", "unknown_ms", "reach_ms"),
        collect("output less exact than FLA", "err_o", "fla_err_o"),
        collect("state less exact than FLA", "err_s", "fla_err_s"),
    ]
    if any("cudnn_gpu_ms" in row for row in rows):
        found.append(collect("slower than cuDNN", "ms", "cudnn_gpu_ms"))
    return found + [line for line in (growth(rows, regime) for regime in REGIMES) if line]


def growth(rows: list[dict], regime: str) -> str | None:
    """Whether the time of one sequence grows with its tokens alone, where rows longer than any peer takes are there."""
    long = [
        (r["seq_lens"][0], r["ms"] * 1e3 / r["seq_lens"][0])
        for r in rows
        if r["H"] == GROWTH_HEADS and r["regime"] == regime and r["gate"] != "given" and len(r["seq_lens"]) == 1
    ]
    long = sorted((tokens, us) for tokens, us in long if tokens >= GROWTH_TOKENS)
    if not long or long[-1][0] <= PEER_TOKENS:
        return None
    times = [us for _, us in long]
    each = ", ".join(f"{tokens} {us:.4f}" for tokens, us in long)
    return f"us a token at H={GROWTH_HEADS} {regime}: {each}; {max(times) / min(times):.2f} apart"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device, help="cuda (default) or cpu")
    parser.add_argument("--rows", nargs="+", metavar="ID", help=f"row ids: {' '.join(row.id for row in ROWS)}")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument(
        "--given", choices=("none", "subset", "all"), default="subset", help="rows with a precomputed gate"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"rows {' '.join(QUICK_ROWS)}, no precomputed gates, few repeats"
    )
    parser.add_argument("--repeats", type=int, default=9, help="interleaved samples a row (default 9)")
    parser.add_argument("--no-fla", dest="fla", action="store_false", help="leave FLA out")
    parser.add_argument("--no-cudnn", dest="cudnn", action="store_false", help="leave cuDNN out where it is installed")
    parser.add_argument("--no-errors", dest="errors", action="store_false", help="leave the fp64 reference out")
    parser.add_argument(
        "--tests",
        nargs="?",
        const="run",
        metavar="JUNIT",
        help="record test counts: run pytest first, or read a junit file",
    )
    parser.add_argument("--out", type=Path, help="folder of the record (default benchmarks/results)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="JSON",
        help="take the rows of this record of a run that was cut short, measure the others",
    )
    parser.add_argument(
        "--no-write", dest="write", action="store_false", help="print only; implied by a part of the rows"
    )
    parser.add_argument(
        "--check",
        nargs="?",
        const=True,
        type=Path,
        metavar="JSON",
        help="say whether the record speaks of these sources; exit 1 if not",
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.given, options.repeats = "none", min(options.repeats, 3)
        options.rows = options.rows or (None if options.device.type == "cpu" else list(QUICK_ROWS))
    if options.device.type == "cuda" and options.check is None and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu runs the PyTorch path on small shapes")
    try:
        options.rows = CPU_ROWS if options.device.type == "cpu" and not options.rows else select_rows(options.rows)
    except ValueError as error:
        parser.error(str(error))
    # A part of the table must not replace the whole one, but may be written elsewhere.
    whole = options.rows == ROWS and tuple(options.regimes) == REGIMES
    options.write = options.write and (whole or options.out is not None)
    return options


def check(path: Path | None) -> int:
    found = records.check(path)
    if found:
        print(f"{path or records.RESULTS}: does not speak of the present sources")
        print("\n".join(f"- {problem}" for problem in found))
        return 1
    print(f"{path}: speaks of the present sources")
    return 0


def main(argv=None) -> int:
    options = parse(argv)
    if options.check is not None:
        return check(records.find() if options.check is True else options.check)

    started = time.monotonic()
    tests = None
    if options.tests:
        tests = run_tests() if options.tests == "run" else test_counts(Path(options.tests))
        say(f"tests: {tests}")
    ours = load_ours(options.device)
    fla, fla_version = load_fla() if options.fla and options.device.type == "cuda" else (None, None)
    if options.fla and fla is None:
        say("FLA is not here (pip install fla-core==0.6.0, on a GPU): its columns stay empty")
    cudnn, cudnn_version = load_cudnn() if options.cudnn and options.device.type == "cuda" else (None, None)
    plan = cells(options.rows, tuple(options.regimes), options.given)
    meta = environment(options.device, fla_version)

    if cudnn:
        try:  # it compiles at the first call, with a toolkit that may not be there
            cudnn(**cudnn_inputs(make_inputs(Cell(Row(1, (64,)), "lower_bound", "slow"), options.device)))
            meta["cudnn_frontend"] = cudnn_version
        except Exception as error:
            say(f"cuDNN is left out: {str(error).splitlines()[0]}")
            cudnn = None
    meta |= {"tests": tests, "repeats": options.repeats, "error_heads": ERROR_HEADS}
    done = {}
    if options.resume is not None:
        try:
            rows, meta["earlier_dates"] = records.rows_so_far(options.resume, meta)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--resume: {error}") from None
        done = {label_of(row): row for row in rows}
        say(f"{len(done)} rows are there already")
    left = [cell for cell in plan if cell.label not in done]
    beside = [cell for cell in left if cell.row.has_peers]
    out = options.out or records.RESULTS

    def record() -> dict:
        return {"meta": meta, "rows": [done[cell.label] for cell in plan if cell.label in done]}

    part = None
    with torch.no_grad():
        if fla and beside:
            with progress(len(fla_jobs(beside)), "FLA compiled") as advance:
                compile_fla(beside, advance)
            with progress(len(fla_variants(beside)), "FLA tuned") as advance:
                tune_fla(fla, beside, options.device, advance)
        with progress(len(left), "measured") as advance:
            for cell in left:
                row = done[cell.label] = run_cell(cell, ours, fla, options, cudnn)
                if options.write:
                    part = records.write(record(), out, "prefill-part")
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()  # a graph's memory pool is not reused by the next graph
                advance(f"{cell.label}: {number(row['ms'])} ms, FLA {number(row['fla_ms'])}")

    whole = record()
    rows, malformed = whole["rows"], records.problems(whole)
    if options.write:
        path = records.write(whole, out)
        if part is not None:
            part.unlink()
        say(f"wrote {path}")
    print(
        f"\n{meta['gpu']}, torch {meta['torch']}, FLA {fla_version}, {time.monotonic() - started:.0f} s; milliseconds\n"
    )
    print("\n\n".join(filter(None, (times_table(rows), given_table(rows), errors_table(rows)))) + "\n")
    print("\n".join(verdicts(rows) + malformed))
    return 1 if malformed else 0


if __name__ == "__main__":
    raise SystemExit(main())
