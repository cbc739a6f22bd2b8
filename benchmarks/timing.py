"""Time calls side by side: GPU time from CUDA graphs, eager time by events, and the host's time a call.

Every arm runs over several sets of inputs in turn, together larger than the L2 cache, and the arms' samples are
interleaved, so that clocks and neighbours on the card move all of them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

L2_MULTIPLE = 4  # input sets together exceed the L2 this many times
MAX_SETS = 16
GRAPH_BYTES = 2 << 30  # what the calls of a graph move, at least: half a millisecond, of which its launch is little
SAMPLE_MS = 4.0  # a sample repeats its work for about this long
HOST_CALLS = 20  # few enough that the launch queue never fills and blocks the host


def set_count(row_bytes: int, device: torch.device) -> int:
    """How many input sets make repeated runs miss the L2."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, -(-L2_MULTIPLE * l2 // row_bytes)))


def graph_passes(row_bytes: int, sets: int) -> int:
    """How often a graph goes over the input sets. One of a single call would measure its own launch, a microsecond, too."""
    return max(1, min(MAX_SETS // sets, -(-GRAPH_BYTES // (row_bytes * sets))))


@dataclass
class Arm:
    """One implementation under test: `call(**inputs)` over `sets` of inputs. Times are milliseconds a call."""

    name: str
    call: Callable
    sets: list[dict]
    graph: torch.cuda.CUDAGraph | None = None
    graph_calls: int = 0
    gpu_ms: list[float] = field(default_factory=list)
    eager_ms: list[float] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)

    def run_all(self) -> None:
        for inputs in self.sets:
            self.call(**inputs)

    def capture(self, passes: int) -> None:
        """So many passes over the sets as a CUDA graph; raises what the capture raises."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run_all()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(passes):
                self.run_all()
        self.graph, self.graph_calls = graph, passes * len(self.sets)


def event_ms(work: Callable[[], None], passes: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(passes):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / passes


def host_ms(arm: Arm, calls: int) -> float:
    """Milliseconds until a call returns, without waiting for the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(calls):
        arm.call(**arm.sets[i % len(arm.sets)])
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed * 1e3 / calls


def measure(arms: list[Arm], repeats: int) -> None:
    """Fill every arm's samples with `repeats` interleaved rounds. Calls must have been warmed up before."""
    plans = []
    for arm in arms:
        works = [(arm.graph.replay, arm.gpu_ms, arm.graph_calls)] if arm.graph else []
        for work, samples, calls in [*works, (arm.run_all, arm.eager_ms, len(arm.sets))]:
            once = event_ms(work, 1)
            plans.append((work, samples, max(1, round(SAMPLE_MS / once)), calls))
    # A garbage collection inside a sample is milliseconds of host time that no call caused.
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for work, samples, passes, calls in plans:
                samples.append(event_ms(work, passes) / calls)
            for arm in arms:
                slow = statistics.median(arm.eager_ms) > SAMPLE_MS
                arm.call_ms.append(host_ms(arm, HOST_CALLS // 4 if slow else HOST_CALLS))
    finally:
        gc.enable()


def measure_cpu(arms: list[Arm], repeats: int) -> None:
    """The same on a CPU, where a call returns when it is done: one wall-clock time serves all three."""
    for _ in range(repeats):
        for arm in arms:
            start = time.perf_counter()
            arm.run_all()
            elapsed = (time.perf_counter() - start) * 1e3 / len(arm.sets)
            for samples in (arm.gpu_ms, arm.eager_ms, arm.call_ms):
                samples.append(elapsed)


def spread(samples: list[float]) -> float:
    """Slowest minus fastest sample."""
    return max(samples) - min(samples)
