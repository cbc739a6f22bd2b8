"""The benchmark's record: its format, where it lies, and whether it speaks of the present sources."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from workloads import REGIMES, ROWS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("build.toml", "kda_cutlass", "torch-ext")
GENERATED = {"_ops.py", "registration.h", "metadata.json"}  # written by the build; they follow from the sources

META = ("gpu", "driver", "cuda", "torch", "triton", "fla", "date", "source_digest", "tests")
ROW = (
    "H", "HV", "seq_lens", "gate", "regime", "ms", "ms_spread", "eager_ms", "call_ms", "fla_ms",
    "err_o", "err_s", "fla_err_o", "fla_err_s", "workspace_bytes",
)  # fmt: skip
GATES = ("lower_bound", "softplus", "given")
OPTIONAL = ("fla_ms", "err_o", "err_s", "fla_err_o", "fla_err_s")  # null: FLA absent, or too long for fp64


def source_files(root: Path = ROOT) -> list[Path]:
    """The files the digest covers, in order: sources only, nothing that a build or an interpreter leaves behind."""
    files = []
    for name in SOURCES:
        path = root / name
        files += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [
        path
        for path in files
        if path.name not in GENERATED
        and path.suffix not in (".pyc", ".so")
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
    ]


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 over paths and contents of the sources, hex."""
    digest = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def gpu_slug(name: str) -> str:
    """`NVIDIA H200` -> `h200`."""
    return "-".join(name.lower().removeprefix("nvidia ").split())


def write(record: dict, directory: Path, suffix: str = "prefill") -> Path:
    """Write `<directory>/<gpu>-<suffix>.json`, one row a line so that diffs read as tables do. Nobody sees half of it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{gpu_slug(record['meta']['gpu'])}-{suffix}.json"
    rows = ",\n".join("  " + json.dumps(_finite(row)) for row in record["rows"])
    meta = json.dumps(_finite(record["meta"]), indent=2).replace("\n", "\n ")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(f'{{\n "meta": {meta},\n "rows": [\n{rows}\n ]\n}}\n')
    return unfinished.replace(path)


def _finite(x):
    """JSON has no NaN; a result that is not finite is written as the string it prints as, and fails validation."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


def find(directory: Path = RESULTS) -> Path | None:
    """The record in `directory`: the newest by its own date."""
    records = sorted(directory.glob("*-prefill.json"), key=lambda path: json.loads(path.read_text())["meta"]["date"])
    return records[-1] if records else None


def problems(record: dict) -> list[str]:
    """What is wrong with the format, in plain sentences; empty when the record is well formed."""
    found = [f"meta.{key} is missing" for key in META if key not in record.get("meta", {})]
    for i, row in enumerate(record.get("rows", [])):
        where = f"rows[{i}]"
        missing = [key for key in ROW if key not in row]
        if missing:
            found.append(f"{where}: {', '.join(missing)} missing")
            continue
        if row["gate"] not in GATES:
            found.append(f"{where}.gate: expected one of {GATES}, got {row['gate']!r}")
        if row["regime"] not in REGIMES:
            found.append(f"{where}.regime: expected one of {REGIMES}, got {row['regime']!r}")
        if not (isinstance(row["seq_lens"], list) and row["seq_lens"]):
            found.append(f"{where}.seq_lens: expected a list of lengths, got {row['seq_lens']!r}")
        for key in ("ms", "ms_spread", "eager_ms", "call_ms", "workspace_bytes", *OPTIONAL):
            value = row[key]
            if value is None and key in OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or not math.isfinite(value):
                found.append(f"{where}.{key}: expected a finite number, got {value!r}")
    if not record.get("rows"):
        found.append("rows is empty")
    return found


def rows_so_far(path: Path, meta: dict) -> tuple[list[dict], list[str]]:
    """Rows and dates of a run that was cut short, for one that goes on with it on the same sources and the same machine.

    Raises ValueError where `path` is no such record or `meta`, of the present run, differs in more than the date.
    """
    record = json.loads(path.read_text())
    found = problems(record)
    if found:
        raise ValueError(f"{path}: {found[0]}")
    for key in META:
        if key not in ("date", "tests") and record["meta"][key] != meta[key]:
            raise ValueError(f"{path}: {key} was {record['meta'][key]}, is {meta[key]}")
    return record["rows"], [*record["meta"].get("earlier_dates", []), record["meta"]["date"]]


def missing_cells(record: dict) -> list[str]:
    """Rows of the prefill table, in every regime, that the record does not have."""
    have = {(r["H"], tuple(r["seq_lens"]), r["regime"]) for r in record["rows"] if r["gate"] != "given"}
    return [
        f"H={row.heads} [{row.label}] {regime}"
        for row in ROWS
        for regime in REGIMES
        if (row.heads, row.seq_lens, regime) not in have
    ]


def check(path: Path | None, root: Path = ROOT) -> list[str]:
    """Why the record at `path` does not speak of the sources under `root`; empty when it does."""
    if path is None or not path.is_file():
        return ["there is no record; make one on a GPU with: python benchmarks/prefill.py --tests"]
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        return [f"not JSON: {error}"]
    found = problems(record)
    if found:
        return found
    meta = record["meta"]
    if meta["source_digest"] != source_digest(root):
        found.append(
            f"the sources changed since {meta['date']}: recorded digest {meta['source_digest'][:12]}, "
            f"present {source_digest(root)[:12]}"
        )
    missing = missing_cells(record)
    if missing:
        found.append(f"{len(missing)} measurements are missing, the first: {missing[0]}")
    tests = meta["tests"]
    if not tests:
        found.append("the run did not include the tests")
    elif tests["failed"]:
        found.append(f"{tests['failed']} tests failed in that run")
    return found
