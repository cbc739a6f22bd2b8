"""Make README's results section and the plot from the benchmark's record.

python benchmarks/report.py             # rewrite both
python benchmarks/report.py --check     # exit 1 if either is not what the record says
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import record as records
from console import number
from workloads import REGIMES, Row

BEGIN = "<!-- benchmark results: made by benchmarks/report.py from {name}; do not edit -->"
END = "<!-- end of benchmark results -->"
MORE_BEGIN = "<!-- more results: made by benchmarks/report.py from {names}; do not edit -->"
MORE_END = "<!-- end of more results -->"
BANDWIDTH = 4.3e9  # bytes a millisecond an H200 copies; the floor of the plot
DESCRIPTION = "record sha256 "


def shapes(rows: list[dict]) -> list[tuple[Row, dict[str, dict]]]:
    """Rows with the gate in the kernel, by shape in the record's order: `(shape, {regime: row})`."""
    found: dict[Row, dict[str, dict]] = {}
    for row in rows:
        if row["gate"] != "given":
            shape = Row(row["H"], tuple(row["seq_lens"]), value_heads=row["HV"])
            found.setdefault(shape, {})[row["regime"]] = row
    return list(found.items())


def markdown_table(headers: list[str], lines: list[list[str]]) -> str:
    rule = ["---" if i < 2 else "---:" for i in range(len(headers))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, rule, *lines])


def times(rows: list[dict]) -> str:
    lines = []
    for shape, found in shapes(rows):
        bounded = [found[r]["fla_ms"] for r in REGIMES if r in found and r != "kimi" and found[r]["fla_ms"] is not None]
        ratios = [x["fla_ms"] / x["eager_ms"] for x in found.values() if x["fla_ms"] is not None]
        lines.append(
            [str(shape.heads), shape.label]
            + [number(found.get(regime, {}).get("ms")) for regime in REGIMES]
            + [number(max(bounded, default=None)), number(found.get("kimi", {}).get("fla_ms"))]
            + [f"{min(ratios):.1f}–{max(ratios):.1f}×" if ratios else "–"]
        )
    return markdown_table(["H", "sequences", *REGIMES, "FLA", "FLA kimi", "faster"], lines)


def worst_errors(rows: list[dict]) -> str:
    lines = []
    gates = sorted({row["gate"] for row in rows}, key=records.GATES.index)
    for gate in gates:
        line = [gate]
        for key in ("err_o", "fla_err_o", "err_s", "fla_err_s"):
            values = [row[key] for row in rows if row["gate"] == gate and row[key] is not None]
            line.append(f"{max(values):.1e}" if values else "–")
        lines.append(line)
    return markdown_table(["gate", "output", "FLA", "state", "FLA"], lines)


def section(record: dict, name: str) -> str:
    """The text between README's markers, markers included."""
    meta, rows = record["meta"], record["rows"]
    tests = meta["tests"]
    counted = (
        f"; tests of that run: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        if tests
        else ""
    )
    largest = max(row["workspace_bytes"] for row in rows)
    longer = max([0, *(row["unknown_ms"] / row["ms"] - 1 for row in rows if row.get("unknown_ms"))])
    lengths = f" Several sequences come with `cu_seqlens_cpu`: without it ours takes up to {longer:.0%} longer."
    return f"""{BEGIN.format(name=name)}

{meta["gpu"]}, torch {meta["torch"]}, CUDA {meta["cuda"]}, FLA {meta["fla"]} on Triton {meta["triton"]}, {meta["date"][:10]}, sources `{meta["source_digest"][:12]}`{counted}.
Median milliseconds of `chunk_kda`, inputs bf16, fp32 final state written. *steep*, *slow* and *mixed* are the bounded gate with heads
that forget at once, that remember, and that do both; *kimi* is the unbounded softplus gate as Kimi Linear initialises it.
Ours is GPU time, FLA's is what a call in a loop takes, launches included; *faster* compares both in such a loop, over the regimes.
How each number is measured: [docs/benchmarks.md](docs/benchmarks.md).{lengths if longer else ""}

{times(rows)}

![Prefill time by shape, log scale](benchmarks/results/{Path(name).stem}.svg)

Largest relative error against fp64 in the same run, sequences up to 8192 tokens. Workspace at most {largest / 2**20:.0f} MiB a call.

{worst_errors(rows)}

{END}"""


def decode_times(record: dict) -> str:
    rows = [row for row in record["rows"] if row["arm"] != "none"]
    key = lambda row: (row["state"], row["layout"], "in place" if row["in_place"] else "new")  # noqa: E731
    batches = sorted({row["B"] for row in rows})
    lines = []
    for variant in dict.fromkeys(map(key, rows)):
        line = [" ".join(variant[:2]), variant[2]]
        for batch in batches:
            ms = {row["arm"]: row["ms"] for row in rows if key(row) == variant and row["B"] == batch}
            fla = f" ({1e3 * ms['fla']:.3g})" if ms.get("fla") is not None else ""
            line.append(f"{1e3 * ms['flash_kda']:.3g}{fla}")
        lines.append(line)
    return markdown_table(["state", "written", *(f"B = {batch}" for batch in batches)], lines)


def hard_errors(record: dict) -> str:
    columns = ("err_o", "fla_err_o", "err_s", "fla_err_s")
    lines = [
        [row["case"], str(row["T"])] + ["–" if row[c] is None else f"{row[c]:.1e}" for c in columns]
        for row in record["rows"]
    ]
    return markdown_table(["case", "tokens", "output", "FLA", "state", "FLA"], lines)


def more_section(folder: Path, gpu: str) -> str:
    """Decode times and the errors of the hard cases, from the records there are; empty without any."""
    parts, names = [], []
    for what, heading, table in (
        ("decode", "Decode: microseconds of one token in a CUDA graph, 32 heads, FLA in brackets.", decode_times),
        ("accuracy", "Relative errors where they are hard, against fp64.", hard_errors),
    ):
        path = folder / f"{gpu}-{what}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            names.append(path.name)
            sources = f"Sources `{record['meta']['source_digest'][:12]}`, {record['meta']['date'][:10]}."
            parts.append(f"{heading} {sources}\n\n{table(record)}")
    return "\n\n".join([MORE_BEGIN.format(names=", ".join(names)), *parts, MORE_END]) if parts else ""


def replaced(readme: str, text: str, begin: str = BEGIN, end_mark: str = END) -> str:
    """README with its section between two markers replaced by `text`, or `text` appended as a new section."""
    start, end = readme.find(begin.split("{", 1)[0]), readme.find(end_mark)
    if start < 0 or end < start:
        return f"{readme.rstrip()}\n\n## Results\n\n{text}\n"
    return readme[:start] + text + readme[end + len(end_mark) :]


def fingerprint(record_path: Path) -> str:
    return hashlib.sha256(record_path.read_bytes()).hexdigest()


def plot(record: dict, record_path: Path) -> Path:
    """One column a shape, log time: ours in every regime, FLA with either gate, and the memory floor."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = shapes(record["rows"])
    plt.rcParams.update({"svg.hashsalt": "flash-kda", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(figsize=(0.5 * len(found) + 2.5, 4.6), layout="constrained")
    x = range(len(found))

    def series(regimes, key):
        """The slowest of `regimes` a shape, so that one mark stands for the gate."""
        for _, by_regime in found:
            values = [by_regime[r][key] for r in regimes if r in by_regime and by_regime[r][key] is not None]
            yield max(values, default=float("nan"))

    floor = [shape.bytes / BANDWIDTH for shape, _ in found]
    axes.plot(x, floor, "_", color="0.35", markersize=14, label="bytes at 4.3 TB/s")
    axes.plot(x, list(series(REGIMES[:3], "fla_ms")), "s", color="0.7", markersize=7, label="FLA, bounded gate")
    axes.plot(x, list(series(["kimi"], "fla_ms")), "D", color="0.5", markersize=5, label="FLA, softplus gate")
    for regime, color, mark in zip(REGIMES, ("#d1495b", "#00798c", "#edae49", "#30638e"), "o^vP"):
        axes.plot(x, list(series([regime], "ms")), mark, color=color, markersize=5, label=f"flash-kda, {regime}")
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds (log)")
    labels = [f"{shape.heads}: {'mix' if len(shape.label) > 12 else shape.label}" for shape, _ in found]
    axes.set_xticks(x, labels, rotation=55, ha="right")
    axes.set_xlabel("heads: sequences")
    axes.grid(alpha=0.25)
    axes.set_title(f"KDA prefill on {record['meta']['gpu']}")
    figure.legend(ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    path = record_path.with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None, "Description": DESCRIPTION + fingerprint(record_path)})
    plt.close(figure)
    return path


def check(record_path: Path, readme: Path) -> list[str]:
    """What of README and plot does not follow from the record."""
    record = json.loads(record_path.read_text())
    found = []
    if not readme.is_file() or section(record, record_path.name) not in readme.read_text():
        found.append(f"{readme.name}: its results are not those of {record_path.name}")
    more = more_section(record_path.parent, record_path.stem.split("-")[0])
    if more and readme.is_file() and more not in readme.read_text():
        found.append(f"{readme.name}: its decode times or hard cases are not those of the records")
    svg = record_path.with_suffix(".svg")
    if not svg.is_file() or DESCRIPTION + fingerprint(record_path) not in svg.read_text():
        found.append(f"{svg.name}: not made from {record_path.name}")
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="default: the newest of benchmarks/results")
    parser.add_argument("--readme", type=Path, default=records.ROOT / "README.md")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    path = options.record or records.find()
    if path is None or not path.is_file():
        print("there is no record; make one on a GPU with: python benchmarks/prefill.py --tests")
        return 1
    if options.check:
        found = check(path, options.readme)
        print("\n".join(found) if found else f"{options.readme.name} and the plot follow from {path.name}")
        return 1 if found else 0
    record = json.loads(path.read_text())
    malformed = records.problems(record)
    if malformed:
        print("\n".join(malformed))
        return 1
    readme = options.readme.read_text() if options.readme.is_file() else "# Flash KDA\n"
    readme = replaced(readme, section(record, path.name))
    if more := more_section(path.parent, path.stem.split("-")[0]):
        readme = replaced(readme, more, MORE_BEGIN, MORE_END)
    options.readme.write_text(readme)
    print(f"wrote {options.readme} and {plot(record, path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
