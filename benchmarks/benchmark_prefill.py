"""Prefill workloads for `kernels benchmark .`: the kernels CLI finds this file by its name and runs every `benchmark_*`.

It times wall clock with a synchronisation a call and compares with the fp64 reference, so its "Ref" column is that
reference's time, not a peer's. The comparison with FLA is benchmarks/prefill.py.
"""

import sys
from pathlib import Path

import torch
from kernels.benchmark import Benchmark

# The CLI executes this file by path, which leaves its folder off the module path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import reference
from workloads import Cell, Row, make_inputs, regime_gate


class Prefill(Benchmark):
    """`chunk_kda` on one long sequence and on a packed batch, bounded and softplus gates."""

    seed = 0

    def prepare(self, regime: str, seq_lens: tuple[int, ...]) -> None:
        """Inputs of the regime; a CPU runs the PyTorch path, on an eighth of the tokens and heads."""
        small = self.device == "cpu"
        row = Row(2 if small else 16, tuple(max(1, n // 8) for n in seq_lens) if small else seq_lens)
        self.inputs = make_inputs(Cell(row, regime_gate(regime), regime), torch.device(self.device))

    def run(self) -> None:
        with torch.no_grad():
            self.out, self.final_state = self.kernel.chunk_kda(**self.inputs)

    def expect(self) -> torch.Tensor:
        o, state = reference.chunk_kda(**self.inputs)
        # The CLI compares `out` with an absolute tolerance only; the bound that means something is relative.
        for name, got, want in (("output", self.out, o), ("final state", self.final_state, state)):
            error = reference.relative_error(got, want)
            if not error < 1e-2:
                raise RuntimeError(f"{name}: relative error {error:.1e} against fp64")
        return o.to(self.out.dtype)

    def setup_steep_2048(self):
        self.prepare("steep", (2048,))

    def benchmark_steep_2048(self):
        self.run()

    def verify_steep_2048(self):
        return self.expect()

    def setup_slow_2048(self):
        self.prepare("slow", (2048,))

    def benchmark_slow_2048(self):
        self.run()

    def verify_slow_2048(self):
        return self.expect()

    def setup_kimi_packed(self):
        self.prepare("kimi", (1024, 8, 512, 256))

    def benchmark_kimi_packed(self):
        self.run()

    def verify_kimi_packed(self):
        return self.expect()
