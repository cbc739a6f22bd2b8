"""Prefill workloads for `kernels benchmark`: the kernels CLI finds this file by its name and runs every `benchmark_*`.

The Hub gets this file of the folder and no other, so it imports nothing else from here. It times wall clock with a
synchronisation a call and compares with the fp64 recurrence, so its "Ref" column is that reference's time, not a
peer's. The comparison with FLA is benchmarks/prefill.py.
"""

from itertools import accumulate

import torch
from kernels.benchmark import Benchmark

LIMIT = 1e-2  # relative error against fp64; bf16 operands cost about 4e-3


class Prefill(Benchmark):
    """`chunk_kda` on one long sequence and on a packed batch, with bounded and softplus gates as models have them.

    The regimes are those of the benchmark table (docs/benchmarks.md): heads that forget at once, and heads that remember.
    """

    seed = 0

    def prepare(self, lengths: tuple[int, ...], shift: float = 0.0, **gate) -> None:
        """Inputs in bf16, everything left to the kernel; a CPU runs the PyTorch path, on an eighth of the tokens and heads."""
        heads = 16
        if self.device == "cpu":
            heads, lengths = 2, tuple(max(1, n // 8) for n in lengths)
        T = sum(lengths)

        def normal(*shape):
            return torch.randn(1, T, *shape, device=self.device)

        self.inputs = {
            "q": normal(heads, 128).bfloat16(),
            "k": normal(heads, 128).bfloat16(),
            "v": normal(heads, 128).bfloat16(),
            "g": (normal(heads, 128) + shift).bfloat16(),
            "beta": normal(heads).bfloat16(),
            "A_log": torch.rand(heads, device=self.device),
            "dt_bias": torch.rand(heads * 128, device=self.device),
            "use_gate_in_kernel": True,
            "use_qk_l2norm_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            **gate,
        }
        if len(lengths) > 1:
            self.inputs["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], device=self.device)

    def run(self) -> None:
        with torch.no_grad():
            self.out, self.final_state = self.kernel.chunk_kda(**self.inputs, output_final_state=True)

    def expect(self) -> torch.Tensor:
        with torch.no_grad():
            o, state = self.kernel.reference.recurrent_kda(**self.inputs)
        # The CLI compares `out` with an absolute tolerance only; the bound that means something is relative.
        for name, got, want in (("output", self.out, o), ("final state", self.final_state, state)):
            error = ((got.double() - want).norm() / want.norm()).item()
            if not error < LIMIT:
                raise RuntimeError(f"{name}: relative error {error:.1e} against fp64")
        return o.to(self.out.dtype)

    def setup_steep_2048(self):
        self.prepare((2048,), lower_bound=-5.0)

    def benchmark_steep_2048(self):
        self.run()

    def verify_steep_2048(self):
        return self.expect()

    def setup_slow_2048(self):
        self.prepare((2048,), shift=-6.0, lower_bound=-5.0)

    def benchmark_slow_2048(self):
        self.run()

    def verify_slow_2048(self):
        return self.expect()

    def setup_kimi_packed(self):
        self.prepare((1024, 8, 512, 256), shift=-4.0)  # the softplus gate, unbounded

    def benchmark_kimi_packed(self):
        self.run()

    def verify_kimi_packed(self):
        return self.expect()
