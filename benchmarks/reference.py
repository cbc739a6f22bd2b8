"""KDA in fp64, fast enough on a GPU to check every benchmark row.

The chunk form with all decays taken as differences, exp(G_i − G_j) with i ≥ j: nothing can overflow, whatever the
gate, so this is the plain recurrence to fp64 rounding (tests/test_benchmarks.py compares the two).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from workloads import log_decay

CHUNK = 32  # tokens; the [chunk, chunk, 128] decays are this file's cost, and grow with it
SLAB_BYTES = 1 << 30  # of those decays at a time


def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    *,
    heads: list[int] | None = None,
    scale: float | None = None,
    initial_state=None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    A_log=None,
    dt_bias=None,
    output_final_state: bool = True,
    safe_gate: bool = False,
):
    """fp64 `chunk_kda` on a choice of value heads.

    Args:
        q, k: `[B, T, H, K]`; v: `[B, T, HV, V]`; g: `[B, T, HV, K]`; beta: `[B, T, HV]`, any float dtype.
        heads: value heads to evaluate, default all.
        initial_state: `[N, HV, K, V]` or None for zero.
        cu_seqlens: `[N + 1]` with B = 1, or None for B sequences of T tokens.
        cu_seqlens_cpu, safe_gate, output_final_state: accepted because the kernels' calls carry them; they change
            nothing here.
        Everything else as in `flash_kda.chunk_kda`.

    Returns:
        `o [B, T, len(heads), V]` and the final state `[N, len(heads), K, V]`, fp64.
    """
    group = v.shape[2] // q.shape[2]
    heads = list(range(v.shape[2])) if heads is None else list(heads)
    q, k = (x[:, :, [h // group for h in heads]].double() for x in (q, k))
    v, g, beta = (x[:, :, heads].double() for x in (v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)
    if use_gate_in_kernel:
        A_log = A_log[heads] if A_log is not None else None
        dt_bias = dt_bias.view(-1, k.shape[-1])[heads] if dt_bias is not None else None
        g = log_decay(g, A_log, dt_bias, lower_bound)
    scale = k.shape[-1] ** -0.5 if scale is None else scale

    # Sequences become a batch, padded at the end: k = v = beta = g = 0 leaves the state as it is.
    ends = cu_seqlens.tolist() if cu_seqlens is not None else None
    lengths = [b - a for a, b in pairwise(ends)] if ends else [q.shape[1]] * q.shape[0]
    padded = -(-max(lengths) // CHUNK) * CHUNK

    def batch(x):  # [B, T, H, ...] -> [N, H, chunks, CHUNK, ...]
        rows = [x[0, a:b] for a, b in pairwise(ends)] if ends else list(x)
        out = x.new_zeros(len(rows), padded, *x.shape[2:])
        for n, row in enumerate(rows):
            out[n, : len(row)] = row
        return out.transpose(1, 2).unflatten(2, (-1, CHUNK))

    o, state = _chunked(
        *map(batch, (q, k, v, g, beta)),
        scale,
        initial_state[:, heads].double() if initial_state is not None else None,
    )
    o = o.flatten(2, 3).transpose(1, 2)  # [N, padded, H, V]
    if ends:
        return torch.cat([o[n, :length] for n, length in enumerate(lengths)]).unsqueeze(0), state
    return o[:, : lengths[0]], state


def _chunked(q, k, v, g, beta, scale, state):
    """q, k, g `[N, H, n, C, K]`, v `[N, H, n, C, V]`, beta `[N, H, n, C]` -> o like v, state `[N, H, K, V]`."""
    N, H, n, C, K = k.shape
    G = g.cumsum(-2)
    Akk, Aqk = (torch.empty(N * H * n, C, C, dtype=k.dtype, device=k.device) for _ in range(2))
    flat_q, flat_k, flat_G = (x.flatten(0, 2) for x in (q, k, G))
    slab = max(1, SLAB_BYTES // (C * C * K * k.element_size()))
    for s in range(0, N * H * n, slab):
        part = slice(s, s + slab)
        kq = torch.stack((flat_k[part], flat_q[part]), -1)  # [b, i, K, 2]
        decay = (flat_G[part, :, None] - flat_G[part, None]).clamp_(max=0).exp_()  # [b, i, j, K]
        pairs = decay.mul_(flat_k[part, None]) @ kq
        Akk[part], Aqk[part] = pairs[..., 0].tril(-1), pairs[..., 1].tril(0)
    Akk, Aqk = (x.view(N, H, n, C, C) for x in (Akk, Aqk))

    # V' = T β (V − (K∘e^G) S) splits into a part that waits for the state and one that does not.
    rhs = torch.cat((k * G.exp(), v), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(beta[..., None] * Akk, rhs, upper=False, unitriangular=True)
    W, U = solved.split([K, v.shape[-1]], -1)
    q_in = q * G.exp() * scale
    k_out = (k * (G[..., -1:, :] - G).exp()).transpose(-1, -2)
    carry = G[..., -1, :].exp()[..., None]
    Aqk = Aqk * scale

    if state is None:
        state = k.new_zeros(N, H, K, v.shape[-1])
    o = torch.empty_like(v)
    for c in range(n):
        V_new = U[:, :, c] - W[:, :, c] @ state
        o[:, :, c] = q_in[:, :, c] @ state + Aqk[:, :, c] @ V_new
        state = carry[:, :, c] * state + k_out[:, :, c] @ V_new
    return o, state


def spread_heads(value_heads: int, count: int) -> list[int]:
    """At most `count` heads, first and last included, evenly spread."""
    if value_heads <= count:
        return list(range(value_heads))
    return [round(i * (value_heads - 1) / (count - 1)) for i in range(count)]


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """‖x − reference‖ / ‖reference‖ (Frobenius, fp64); NaN when x is not finite throughout."""
    x = x.double()
    if not torch.isfinite(x).all():
        return float("nan")
    return ((x - reference).norm() / reference.norm()).item()
