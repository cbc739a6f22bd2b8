"""Decode benchmark: one token a sequence by `fused_recurrent_kda` of this kernel, by FLA's and in PyTorch, with errors.

    python benchmarks/decode.py                     # the whole record; under a minute on an H200
    python benchmarks/decode.py --batches 1 64 --no-write
    python benchmarks/decode.py --device cpu

What the columns mean: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import record as records
import reference
import torch
from console import number, progress, say, table
from peers import load_fla, load_ours
from prefill import environment, round_significant
from timing import Arm, event_ms, graph_passes, measure, measure_cpu, set_count, spread
from workloads import HEAD_DIM, LOWER_BOUND

HEADS = 32
BATCHES = (1, 8, 32, 64, 256)
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_SEQUENCES = 8  # of a batch that are checked against fp64
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Cell:
    """One batch size, state dtype and layout. `in_place` writes the state over the one read; otherwise a new fp32 state
    is returned, as FLA's public function does."""

    batch: int
    heads: int
    state: str
    in_place: bool
    v_first: bool

    @property
    def state_bytes(self) -> int:
        """Read and written once."""
        return 2 * self.batch * self.heads * HEAD_DIM**2 * STATES[self.state].itemsize

    @property
    def label(self) -> str:
        where = "in place" if self.in_place else "new state"
        return f"B={self.batch} {self.state} {'V' if self.v_first else 'K'}-first {where}"


def cells(batches, heads) -> list[Cell]:
    kinds = [("fp32", False), ("fp32", True), ("bf16", True)]
    return [Cell(b, heads, state, place, v) for v in (False, True) for state, place in kinds for b in batches]


def make_inputs(cell: Cell, device, seed: int = 0) -> dict:
    """Keyword arguments of one call: raw bf16 inputs from N(0, 1), everything else left to the kernel."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, device=device, generator=generator)
    B, H, D = cell.batch, cell.heads, HEAD_DIM
    inputs = {name: normal(B, 1, H, D).bfloat16() for name in ("q", "k", "v", "g")}
    return inputs | {
        "beta": normal(B, 1, H).bfloat16(),
        "A_log": torch.empty(H, device=device).uniform_(0.0, 1.0, generator=generator),
        "dt_bias": torch.empty(H * D, device=device).uniform_(0.0, 1.0, generator=generator),
        "initial_state": normal(B, H, D, D).to(STATES[cell.state]),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "lower_bound": LOWER_BOUND,
        "state_v_first": cell.v_first,
    }


def pytorch_call(ours, in_place, **inputs):
    """The PyTorch path, which is what runs where there is no kernel."""
    call = ours.contract.check_call(**inputs, scale=None, cu_seqlens=None, allow_neg_eigval=False)
    out = torch.empty_like(call.v)
    final = call.initial_state if in_place else call.v.new_empty(call.state_shape, dtype=torch.float32)
    ours.reference.chunked_forward(call, out, final)
    return out, final


def arm_calls(cell: Cell, ours, fla) -> dict:
    keep = {"inplace_final_state": True} if cell.in_place else {"output_final_state": True}
    calls = {"none": partial(pytorch_call, ours, cell.in_place)}
    if fla:
        public, forward = fla
        calls["fla"] = partial(forward if cell.in_place else public, **keep)
    return calls | {"flash_kda": partial(ours.fused_recurrent_kda, **keep)}


def errors(call, cell: Cell, device, ours) -> tuple[float, float]:
    """Relative errors of output and state after one call; NaN if anything is not finite."""
    inputs = make_inputs(cell, device)
    few = {
        n: x[:ERROR_SEQUENCES] if n in ("q", "k", "v", "g", "beta", "initial_state") else x for n, x in inputs.items()
    }
    expected = ours.reference.recurrent_kda(**few)
    o, state = call(**inputs)
    if not (torch.isfinite(o).all() and torch.isfinite(state).all()):
        return float("nan"), float("nan")
    return tuple(reference.relative_error(x[:ERROR_SEQUENCES], y) for x, y in zip((o, state), expected))


def copy_tbps(device, rounds: int = 5) -> float:
    """Bytes read and written by torch's copy of a large buffer, in TB/s; median."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_() for _ in range(2))
    event_ms(lambda: target.copy_(source), 4)
    times = [event_ms(lambda: target.copy_(source), 4) for _ in range(rounds)]
    return 2 * COPY_BYTES / statistics.median(times) / 1e9


def run_cell(cell: Cell, ours, fla, options, copy: float | None) -> list[dict]:
    device = options.device
    calls = arm_calls(cell, ours, fla)
    found = {name: errors(call, cell, device, ours) for name, call in calls.items()}
    count = set_count(cell.state_bytes, device)
    # in place every arm changes its states, so each has its own
    arms = [Arm(name, call, [make_inputs(cell, device, seed) for seed in range(count)]) for name, call in calls.items()]
    for arm in arms:
        arm.run_all()
        if device.type == "cuda":
            arm.capture(graph_passes(cell.state_bytes, count))
    (measure if device.type == "cuda" else measure_cpu)(arms, options.repeats)
    rows = []
    for arm in arms:
        ms = statistics.median(arm.gpu_ms)
        tbps = cell.state_bytes / ms / 1e9
        rows.append(
            {
                "arm": arm.name,
                "B": cell.batch,
                "H": cell.heads,
                "state": cell.state,
                "layout": "V-first" if cell.v_first else "K-first",
                "in_place": cell.in_place,
                "ms": ms,
                "ms_spread": spread(arm.gpu_ms),
                "eager_ms": statistics.median(arm.eager_ms),
                "call_ms": statistics.median(arm.call_ms),
                "tbps": tbps,
                "of_copy": tbps / copy if copy else None,
                "err_o": found[arm.name][0],
                "err_s": found[arm.name][1],
            }
        )
    return [{key: round_significant(value) for key, value in row.items()} for row in rows]


def summary(rows: list[dict]) -> str:
    """One line a cell, in microseconds."""
    lines = {}
    for row in rows:
        key = (row["state"], row["layout"], "in place" if row["in_place"] else "new", str(row["B"]))
        lines.setdefault(key, {})[row["arm"]] = row
    us = lambda row, key: number(None if row is None else row[key] * 1e3)  # noqa: E731
    return table(
        [
            "state",
            "layout",
            "kept",
            "B",
            "GPU",
            "FLA",
            "none",
            "of copy",
            "call",
            "eager",
            "FLA eager",
            "err o",
            "err s",
        ],
        [
            [
                *key,
                us(arms["flash_kda"], "ms"),
                us(arms.get("fla"), "ms"),
                us(arms["none"], "ms"),
                number(arms["flash_kda"]["of_copy"]),
                us(arms["flash_kda"], "call_ms"),
                us(arms["flash_kda"], "eager_ms"),
                us(arms.get("fla"), "eager_ms"),
                f"{arms['flash_kda']['err_o']:.1e}",
                f"{arms['flash_kda']['err_s']:.1e}",
            ]
            for key, arms in lines.items()
        ],
    )


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device, help="cuda (default) or cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--heads", type=int, help=f"default {HEADS}, 2 on a CPU")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved samples a row (default 7)")
    parser.add_argument("--no-fla", dest="fla", action="store_false", help="leave FLA out")
    parser.add_argument("--out", type=Path, help="folder of the record (default benchmarks/results)")
    parser.add_argument("--no-write", dest="write", action="store_false", help="print only; implied by other shapes")
    options = parser.parse_args(argv)
    on_gpu = options.device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu runs the PyTorch path on small shapes")
    options.heads = options.heads or (HEADS if on_gpu else 2)
    whole = on_gpu and tuple(options.batches) == BATCHES and options.heads == HEADS
    options.write = options.write and (whole or options.out is not None)
    return options


def main(argv=None) -> int:
    options = parse(argv)
    ours = load_ours(options.device)
    fla, version = None, None
    if options.fla and options.device.type == "cuda":
        version = load_fla()[1]
        if version:
            from fla.ops.kda.fused_recurrent import fused_recurrent_kda, fused_recurrent_kda_fwd

            fla = fused_recurrent_kda, fused_recurrent_kda_fwd
        else:
            say("FLA is not here (pip install fla-core==0.6.0, on a GPU): its rows are missing")
    meta = environment(options.device, version)
    copy = copy_tbps(options.device) if options.device.type == "cuda" else None
    plan, rows = cells(options.batches, options.heads), []
    with torch.no_grad(), progress(len(plan), "measured") as advance:
        for cell in plan:
            rows += run_cell(cell, ours, fla, options, copy)
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            advance(f"{cell.label}: {number(rows[-1]['ms'] * 1e3)} us")
    copies = [copy, copy_tbps(options.device)] if copy else []
    meta |= {"tests": None, "repeats": options.repeats, "copy_tbps": [round_significant(x) for x in copies]}
    if options.write:
        say(f"wrote {records.write({'meta': meta, 'rows': rows}, options.out or records.RESULTS, 'decode')}")
    print(f"\n{meta['gpu']}, torch {meta['torch']}, FLA {version}, copy {meta['copy_tbps']} TB/s; microseconds\n")
    print(summary(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
