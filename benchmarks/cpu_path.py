#!/usr/bin/env python
"""The PyTorch path beside transformers' own fallback for `chunk_kda`, on this machine's CPU.

    python benchmarks/cpu_path.py                  # T = 4096, H = 8, D = 128, fp32
    python benchmarks/cpu_path.py --check          # exits with 1 below 5 times the speed or above a fifth of the memory

Time: both in one process, in turns, the best of each. Memory: each in a process of its own, by how much its resident
set grew at its peak over what it was before the call (Linux only).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from console import number, progress, table
from peers import load_ours

SPEED, MEMORY = 5.0, 0.2  # what --check asks for
IMPLEMENTATIONS = ("flash_kda", "transformers")


def load(name: str):
    if name == "flash_kda":
        return load_ours(torch.device("cpu")).chunk_kda
    from transformers.models.kimi_linear import modeling_kimi_linear

    return modeling_kimi_linear.chunk_kimi_delta_attention


def make_inputs(args, tokens: int) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(1, tokens, args.heads, *shape, generator=generator)

    decay = -torch.nn.functional.softplus(normal(args.dim))
    qkv = (normal(args.dim) for _ in range(3))
    return dict(
        zip("qkv", qkv), g=decay, beta=normal().sigmoid(), output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def call(function, inputs: dict):
    options = dict(inputs)
    q, k, v = (options.pop(name) for name in "qkv")  # transformers has other names for them
    with torch.no_grad():
        return function(q, k, v, **options)


def measure_time(args) -> dict:
    functions = {name: load(name) for name in IMPLEMENTATIONS}
    inputs = make_inputs(args, args.tokens)
    results = {name: call(function, inputs) for name, function in functions.items()}
    seconds = {name: [] for name in functions}
    for _ in range(args.repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            call(function, inputs)
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (results[name] for name in IMPLEMENTATIONS)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs))
    return {"seconds": {name: min(s) for name, s in seconds.items()}, "difference": difference}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure_memory(args, name: str) -> int:
    function = load(name)
    call(function, make_inputs(args, 64))  # libraries and thread pools come into memory once, at the first call
    inputs = make_inputs(args, args.tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call(function, inputs)
    return resident("VmHWM") - before


def in_process(argv: list[str], *what: str):
    """The measurement ``what`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, __file__, *argv, "--measure", *what], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, *names = args.measure
        print(json.dumps(measure_time(args) if what == "time" else measure_memory(args, *names)))
        return 0

    argv = [f"--{name}={getattr(args, name)}" for name in ("tokens", "heads", "dim", "repeats")]
    with progress(1 + len(IMPLEMENTATIONS), "measured") as advance:
        timing = in_process(argv, "time")
        advance("time")
        peak = {}
        for name in IMPLEMENTATIONS:
            peak[name] = in_process(argv, "memory", name)
            advance(f"memory of {name}")

    seconds, (ours, theirs) = timing["seconds"], IMPLEMENTATIONS
    speed, memory = seconds[theirs] / seconds[ours], peak[ours] / peak[theirs]
    threads = torch.get_num_threads()
    print(f"T={args.tokens} H={args.heads} D={args.dim} fp32, {threads} threads, torch {torch.__version__}")
    rows = [[name, "", number(seconds[name]), f"{peak[name] / 1e6:.0f}"] for name in IMPLEMENTATIONS]
    print(table(["", "", "seconds", "extra MB"], rows))
    print(f"{speed:.1f} times the speed, {memory:.3f} of the memory, results differ by {timing['difference']:.1e}")
    if args.json:
        args.json.write_text(json.dumps({**timing, "peak_bytes": peak, "speed": speed, "memory": memory}, indent=2))
    return int(args.check and (speed < SPEED or memory > MEMORY))


if __name__ == "__main__":
    sys.exit(main())
