"""What the prefill benchmark runs: shapes, gate regimes and inputs.

Shapes are the prefill table every KDA kernel is compared on; regimes say how fast the heads forget, which decides
which kernel is fast. Both are used by every program in this folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

HEAD_DIM = 128
CHUNK = 64
LOWER_BOUND = -5.0
MIX = (1300, 547, 2048, 963, 271, 3063)

REGIMES = ("steep", "slow", "mixed", "kimi")
SLOW_CHANNELS = range(0, HEAD_DIM, 16)  # the 8 of 128 channels that remember in `mixed`
PEER_TOKENS = 1 << 18  # rows of more are measured without peers: what FLA keeps would not fit, by our count
KIMI_ALLOWANCE = 1.15  # the softplus gate may take 15 % longer than the bounded one


@dataclass(frozen=True)
class Row:
    """One shape: `heads` heads of q, k and `value_heads` of v, g, beta, over sequences of `seq_lens` tokens.

    One sequence runs as a batch of one; several run packed behind `cu_seqlens`, as a serving engine sends them, and with
    the lengths on the host too, where the engine has made them.
    `reach` and `reach_steep` are the targets in milliseconds on an H200: in every regime, and in the steep one.
    """

    heads: int
    seq_lens: tuple[int, ...]
    reach: float | None = None
    reach_steep: float | None = None
    value_heads: int | None = None

    @property
    def hv(self) -> int:
        return self.value_heads or self.heads

    @property
    def tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def packed(self) -> bool:
        return len(self.seq_lens) > 1

    @property
    def has_peers(self) -> bool:
        return self.tokens <= PEER_TOKENS

    @property
    def label(self) -> str:
        return sequences_label(self.seq_lens)

    @property
    def id(self) -> str:
        """`32x8192`, `64x8x1024`, `96xmix`: what `--rows` selects by."""
        name = "mix" if self.seq_lens == MIX else self.label.replace(" × ", "x").replace(",", "+")
        return f"{self.heads}x{name}"

    @property
    def bytes(self) -> int:
        """Compulsory traffic: q, k, v, g in, o out, all bf16, beta, and the fp32 final state."""
        per_token = 2 * (2 * self.heads * HEAD_DIM + 3 * self.hv * HEAD_DIM + self.hv)
        return self.tokens * per_token + len(self.seq_lens) * self.hv * HEAD_DIM * HEAD_DIM * 4

    @property
    def flops(self) -> int:
        """Tensor-core work of the chunk form at 64 tokens a chunk (partial chunks count in full)."""
        chunks = sum(-(-length // CHUNK) for length in self.seq_lens)
        within = 4 * 2 * CHUNK * CHUNK * HEAD_DIM  # Akk, Aqk, T·(...), Aqk·V'
        state = 3 * 2 * CHUNK * HEAD_DIM * HEAD_DIM  # K·S, Q·S, Kᵀ·V'
        inverse = 2 * 2 * CHUNK**3  # two products a level of the triangular inverse, about
        return chunks * self.hv * (within + state + inverse)

    def target(self, regime: str) -> float | None:
        """Milliseconds this row should take in `regime`, or None where no target was set."""
        if regime == "steep":
            return self.reach_steep
        if self.reach is None:
            return None
        return self.reach * (KIMI_ALLOWANCE if regime == "kimi" else 1.0)


def sequences_label(seq_lens) -> str:
    """`8192`, `8 × 1024` or `1300,547,...`."""
    if len(seq_lens) > 1 and len(set(seq_lens)) == 1:
        return f"{len(seq_lens)} × {seq_lens[0]}"
    return ",".join(map(str, seq_lens))


ROWS = (
    Row(96, (8192,), 0.70, 0.70),
    Row(96, MIX, 0.68, 0.68),
    Row(96, (1024,) * 8, 0.58, 0.58),
    Row(64, (8192,), 0.50, 0.40),
    Row(64, MIX, 0.48, 0.48),
    Row(64, (1024,) * 8, 0.39, 0.39),
    Row(64, (16384,), 0.95, 0.80),
    Row(64, (8192,) * 2, 0.85, 0.85),
    Row(32, (512,), 0.045, 0.025),
    Row(32, (2048,), 0.10, 0.065),
    Row(32, (8192,), 0.30, 0.20),
    Row(32, (32768,), 1.0, 0.80),
    Row(32, (131072,), 4.0, 3.2),
    Row(32, (1024,) * 8, 0.21, 0.21),
    Row(32, (256,) * 32, 0.22, 0.22),
    Row(32, (1024,) * 64, 1.6, 1.6),
    Row(12, (8192,), 0.20, 0.085),
    Row(8, (8192,), 0.18, 0.06),
    Row(8, (65536,), 0.70, 0.40),
    Row(32, (1 << 20,)),
)
# Rows of the precomputed-gate cells: FLA compiles its kernels anew for every head count, so three shapes stand for all.
GIVEN_ROWS = ("96x8192", "64x8x1024", "32x8192")
# Small enough for the PyTorch path on a CPU; used by `--device cpu`.
CPU_ROWS = (Row(2, (192,)), Row(2, (64, 1, 100)))


@dataclass(frozen=True)
class Cell:
    """One measurement: a shape under one gate mode and regime.

    `gate` is `lower_bound` or `softplus` (activated in the kernel from a raw bf16 `g`) or `given` (the log decay
    itself, stored as `g_dtype`, drawn as the regime's own gate would give it).
    """

    row: Row
    gate: str
    regime: str
    g_dtype: str = "bf16"

    @property
    def bounded(self) -> bool:
        return self.regime != "kimi"

    @property
    def label(self) -> str:
        gate = f"given {self.g_dtype}" if self.gate == "given" else self.gate
        return f"H={self.row.heads} [{self.row.label}] {gate} {self.regime}"


def regime_gate(regime: str) -> str:
    """The gate mode that computes `regime` in the kernel."""
    return "softplus" if regime == "kimi" else "lower_bound"


def cells(rows=ROWS, regimes=REGIMES, given: str = "subset") -> list[Cell]:
    """Every measurement of a run. `given`: `none`, `subset` (rows GIVEN_ROWS) or `all`."""
    chosen = [Cell(row, regime_gate(regime), regime) for row in rows for regime in regimes]
    if given != "none":
        chosen += [
            Cell(row, "given", regime, g_dtype)
            for row in rows
            if (given == "all" and row.has_peers) or row.id in GIVEN_ROWS or row in CPU_ROWS
            for g_dtype in ("bf16", "fp32")
            for regime in regimes
        ]
    return chosen


def draw_gate(regime: str, shape, heads: int, generator: torch.Generator):
    """Raw gate and gate parameters of a regime.

    Args:
        regime: one of REGIMES.
        shape: `[B, T, heads, 128]`.
        generator: its device is where the tensors live.

    Returns:
        `x` fp32 of `shape`, `A_log` fp32 `[heads]`, `dt_bias` fp32 `[heads * 128]`.
    """
    device = generator.device

    def uniform(size, low, high):
        return torch.empty(size, device=device).uniform_(low, high, generator=generator)

    x = torch.randn(shape, device=device, generator=generator)
    if regime == "slow":
        return x.sub_(5.0), torch.zeros(heads, device=device), torch.zeros(heads * HEAD_DIM, device=device)
    if regime == "kimi":
        step = uniform(heads * HEAD_DIM, math.log(1e-3), math.log(1e-1)).exp()
        inverse_softplus = step + torch.log(-torch.expm1(-step))
        return x, uniform(heads, 1.0, 16.0).log(), inverse_softplus
    if regime not in ("steep", "mixed"):
        raise ValueError(f"regime: expected one of {REGIMES}, got {regime!r}")
    if regime == "mixed":
        x[..., list(SLOW_CHANNELS)] -= 6.0
    return x, uniform(heads, 0.0, 1.0), uniform(heads * HEAD_DIM, 0.0, 1.0)


def log_decay(x: torch.Tensor, A_log, dt_bias, lower_bound: float | None) -> torch.Tensor:
    """Log decay (≤ 0) in x's dtype from the raw gate `x [B, T, HV, 128]`; `lower_bound` None means softplus."""
    heads = x.shape[-2]
    if dt_bias is not None:
        x = x + dt_bias.view(heads, -1).to(x.dtype)
    rate = A_log.to(x.dtype).exp().view(heads, 1) if A_log is not None else 1.0
    if lower_bound is None:
        # Softplus without torch's switch to the identity at 20, which is visible in fp64.
        return -rate * torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))
    return lower_bound * torch.sigmoid(rate * x)


def cu_seqlens(seq_lens, device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int64, device=device)


def make_inputs(cell: Cell, device, seed: int = 0) -> dict:
    """Keyword arguments of one `chunk_kda` call, ours or FLA's.

    q, k, v and beta logits are N(0, 1) in bf16; q/k normalisation, the beta sigmoid and (unless `given`) the gate
    are left to the kernel, and the fp32 final state is asked for.
    """
    row = cell.row
    generator = torch.Generator(device).manual_seed(seed)
    batch_tokens = (1, row.tokens)

    def normal(*shape):
        return torch.randn(*batch_tokens, *shape, device=device, generator=generator).bfloat16()

    inputs = {
        "q": normal(row.heads, HEAD_DIM),
        "k": normal(row.heads, HEAD_DIM),
        "v": normal(row.hv, HEAD_DIM),
        "beta": normal(row.hv),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        # FLA's faster path for gates known to be bounded; ours needs no such promise.
        "safe_gate": cell.bounded,
    }
    if row.packed:
        inputs |= {"cu_seqlens": cu_seqlens(row.seq_lens, device), "cu_seqlens_cpu": cu_seqlens(row.seq_lens, "cpu")}
    x, A_log, dt_bias = draw_gate(cell.regime, (*batch_tokens, row.hv, HEAD_DIM), row.hv, generator)
    bound = LOWER_BOUND if cell.bounded else None
    if cell.gate == "given":
        inputs["g"] = log_decay(x, A_log, dt_bias, bound).to(
            torch.float32 if cell.g_dtype == "fp32" else torch.bfloat16
        )
    else:
        inputs |= {"g": x.bfloat16(), "use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
        if bound is not None:
            inputs["lower_bound"] = bound
    return inputs


def select_rows(patterns: list[str] | None, rows=ROWS) -> tuple[Row, ...]:
    """Rows whose id is one of `patterns`, or all without patterns; an id that names no row raises ValueError."""
    if not patterns:
        return tuple(rows)
    known = {row.id: row for row in rows}
    unknown = [name for name in patterns if name not in known]
    if unknown:
        raise ValueError(f"--rows: expected ids among {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(known[name] for name in patterns)
