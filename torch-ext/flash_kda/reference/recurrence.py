"""The oracle: KDA one token at a time, as the equations state it.

It shares no code with the chunked path, so that a mistake in one shows against the other. Run it in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kimi Delta Attention by its recurrence, for each sequence and head, with state ``S`` of shape ``[K, V]``::

        S <- Diag(exp(g_t)) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale * S^T q_t

    Arguments are those of :func:`flash_kda.chunk_kda`; nothing is checked. All arithmetic, the gate and the
    normalisation included, is done in ``dtype``.

    Returns:
        ``o`` ``[B, T, HV, V]`` and the final state ``[N, HV, K, V]`` (``[N, HV, V, K]`` when ``state_v_first``), both
        in ``dtype``. Rows of ``o`` that no sequence covers are zero.

    Source: Kimi Linear (arXiv:2510.26692), the recurrent form of KDA.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if use_gate_in_kernel:
        if dt_bias is not None:
            g = g + dt_bias.to(dtype).view(HV, K)
        rate = 1.0 if A_log is None else A_log.to(dtype).exp().view(HV, 1)
        g = -rate * F.softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(rate * g)
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta) * (2 if allow_neg_eigval else 1)
    q = q.repeat_interleave(HV // H, dim=2) * (K**-0.5 if scale is None else scale)
    k = k.repeat_interleave(HV // H, dim=2)

    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        bounds = cu_seqlens.tolist()
        sequences = [(0, start, end) for start, end in zip(bounds, bounds[1:])]

    o = torch.zeros_like(v)
    states = []
    for n, (b, start, end) in enumerate(sequences):
        S = v.new_zeros(HV, K, V)
        if initial_state is not None:
            S = initial_state[n].to(dtype).mT if state_v_first else initial_state[n].to(dtype)
        for t in range(start, end):
            S = g[b, t, :, :, None].exp() * S
            error = v[b, t] - torch.einsum("hkv,hk->hv", S, k[b, t])
            S = S + torch.einsum("h,hk,hv->hkv", beta[b, t], k[b, t], error)
            o[b, t] = torch.einsum("hkv,hk->hv", S, q[b, t])
        states.append(S.mT if state_v_first else S)
    shape = (V, K) if state_v_first else (K, V)
    return o, torch.stack(states) if states else v.new_zeros(0, HV, *shape)
