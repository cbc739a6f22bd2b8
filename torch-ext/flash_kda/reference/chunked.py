"""KDA in chunks of up to 64 tokens, in plain PyTorch: every device, dtype, head dim and gate; forward and backward.

Inside a chunk every pair of tokens i > j is weighed by ``exp(G_i - G_j)``, where G is the cumulative log decay. That
weight is built from two factors that meet at an anchor *between* i and j, so both are at most 1 however strong the
gate: nothing overflows, and a factor that underflows to zero is the right answer. :func:`_pair_products` finds an
anchor for every pair by halving the chunk down to single tokens. The factors of one level are products of those of the
level below; no large cumulative sum is ever formed, so none loses digits.

Sequences are walked in pieces of a bounded working set and only the state passes from one piece to the next. The
backward pass walks them again from the last to the first, so it too keeps no intermediate that grows with T but one
state a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK = 64
# Elements of one [.., tokens, K] operand in the working set of a piece. About a dozen such operands live at a time: 4
# MiB each in float32 stay near the last-level cache of a small CPU (benchmarks/cpu_path.py).
PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class _Group:
    """Sequences of one length that are walked together: rows ``rows`` of a fixed batch, or spans of a packed one."""

    members: slice | list[int]  # their numbers among all sequences; a slice of the rows of a fixed batch
    starts: list[int] | None  # first token of each in a packed batch
    size: int
    length: int

    @property
    def numbers(self) -> Collection[int]:
        return range(self.members.start, self.members.stop) if isinstance(self.members, slice) else self.members

    def read(self, x: torch.Tensor, a: int, b: int) -> torch.Tensor:
        """Tokens [a, b) of every member: ``[n, b - a, ...]``. A view where one slice covers them."""
        if self.starts is None:
            return x[self.members, a:b]
        if len(self.starts) == 1:
            return x[:, self.starts[0] + a : self.starts[0] + b]
        return torch.stack([x[0, s + a : s + b] for s in self.starts])

    def write(self, x: torch.Tensor, a: int, b: int, value: torch.Tensor) -> None:
        if self.starts is None:
            x[self.members, a:b].copy_(value)
        else:
            for s, one in zip(self.starts, value):
                x[0, s + a : s + b].copy_(one)


def _groups(call, most: int) -> Iterator[_Group]:
    """Splits the batch into groups of equal length, each of at most ``most`` sequences."""
    if call.cu_seqlens is None:
        B, T = call.q.shape[:2]
        for b in range(0, B, most):
            size = min(most, B - b)
            yield _Group(slice(b, b + size), None, size, T)
        return
    by_length: dict[int, list[tuple[int, int]]] = {}
    for n, (start, length) in enumerate(sequence_spans(call)):
        by_length.setdefault(length, []).append((n, start))
    for length, spans in by_length.items():
        for i in range(0, len(spans), most):
            part = spans[i : i + most]
            yield _Group([n for n, _ in part], [s for _, s in part], len(part), length)


def sequence_spans(call) -> list[tuple[int, int]]:
    """(first token, length) of each packed sequence. Wrong bounds are clamped to [0, T] and to lengths of 0 or more."""
    bounds = (call.cu_seqlens if call.cu_seqlens_cpu is None else call.cu_seqlens_cpu).tolist()
    T = call.q.shape[1]
    spans = []
    for start, end in zip(bounds, bounds[1:]):
        start = min(max(start, 0), T)
        spans.append((start, min(max(end, start), T) - start))
    return spans


def _pieces(length: int, tokens: int, stops: Collection[int]) -> Iterator[tuple[int, int, int]]:
    """(first, last + 1, chunk size) of each piece of a sequence: up to each of ``stops``, and then to the end, whole chunks
    and what is left in one smaller chunk."""
    start = 0
    for stop in sorted({*stops, length}):
        whole = start + (stop - start) // CHUNK * CHUNK
        for a in range(start, whole, tokens):
            yield a, min(a + tokens, whole), CHUNK
        if whole < stop:
            yield whole, stop, 1 << (stop - whole - 1).bit_length()
        start = stop


def _plan(call, stops: Mapping[int, Collection[int]] = {}) -> Iterator[tuple[_Group, list[tuple[int, int, int]]]]:
    HV, K = call.g.shape[2:]
    chunk_elements = HV * CHUNK * max(K, call.v.shape[-1], 1)
    most = 1 if call.batch_invariant else max(1, PIECE_ELEMENTS // max(chunk_elements, 1))
    for group in _groups(call, most):
        chunks = max(1, PIECE_ELEMENTS // max(group.size * chunk_elements, 1))
        here = {stop for n in group.numbers for stop in stops.get(n, ())}
        yield group, list(_pieces(group.length, chunks * CHUNK, here))


def _pair_products(q, k, decay):
    """Decayed products of all pairs of a chunk, and the decays from its start and to its end.

    Args: ``q``, ``k`` and ``decay`` = exp(g), ``[N, C, K]``, C a power of two.

    Returns: ``Aqk[i, j] = sum_d q_i k_j exp(G_i - G_j)`` for j <= i and ``Akk`` likewise for j < i, ``[N, C, C]``, zero
    above; ``from_start[i] = exp(G_i)`` and ``to_end[j] = exp(G_last - G_j)``, ``[N, C, K]``.

    At half-size s, each block of 2s tokens joins its second half (rows) with its first half (columns). The anchor is
    the last token of the first half: rows carry the decay from there, columns the decay up to there.
    """
    N, C, K = q.shape
    Aqk = (q * k).sum(-1).view(-1, 1, 1)  # blocks on the diagonal, [N * C / s, s, s]
    Akk = torch.zeros_like(Aqk)
    from_start, to_end = decay, torch.ones_like(decay)
    s = 1
    while s < C:
        q_, k_, start_, end_ = (x.view(-1, 2, s, K) for x in (q, k, from_start, to_end))
        columns = (k_[:, 0] * end_[:, 0]).mT
        Aqk = _join(Aqk, (q_[:, 1] * start_[:, 1]) @ columns)
        Akk = _join(Akk, (k_[:, 1] * start_[:, 1]) @ columns)
        from_start = torch.stack((start_[:, 0], start_[:, 1] * start_[:, 0, -1:]), 1).view(N, C, K)
        to_end = torch.stack((end_[:, 0] * start_[:, 1, -1:], end_[:, 1]), 1).view(N, C, K)
        s *= 2
    return Aqk, Akk, from_start, to_end


def _join(A, below):
    """Lower triangular blocks ``[2 n, s, s]`` in pairs, with ``below`` ``[n, s, s]``: ``[n, 2 s, 2 s]``."""
    first, second = A.unflatten(0, (-1, 2)).unbind(1)
    return torch.cat((F.pad(first, (0, first.shape[-1])), torch.cat((below, second), -1)), -2)


def _activate(q, k, v, g, beta, A_log, dt_bias, call, dtype):
    """The five tensors in ``dtype``: q and k normalised and q scaled, g the decay exp(log decay), beta the step."""
    # contiguous, because sums and exponentials round differently over other strides: no bit shall depend on the layout
    q, k, v, g, beta = (x.to(dtype).contiguous() for x in (q, k, v, g, beta))
    if call.use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    if call.use_gate_in_kernel:
        HV, K = g.shape[2:]
        if dt_bias is not None:
            g = g + dt_bias.to(dtype).reshape(HV, K)
        rate = None if A_log is None else A_log.to(dtype).exp().reshape(HV, 1)
        if call.lower_bound is None:
            g = F.softplus(g) * -rate
        else:
            g = torch.sigmoid(g if rate is None else g * rate) * call.lower_bound
    if call.use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta) * (2 if call.allow_neg_eigval else 1)
    return q * call.scale, k, v, g.exp(), beta


def _token(q, k, v, decay, beta, S):
    """A chunk of one token is one step of the recurrence. S ``[n, HV, K, V]``, the others ``[n, 1, HV, ..]``."""
    groups = v.shape[2] // q.shape[2]
    q, k = (x[:, 0].repeat_interleave(groups, dim=1)[..., None, :] for x in (q, k))
    S = decay[:, 0, ..., None] * S
    V_new = beta[:, 0, :, None, None] * (v[:, 0, :, None] - k @ S)
    S = S + k.mT * V_new
    return (q @ S).transpose(1, 2), S


def _chunks(q, k, v, decay, beta, S, C):
    """Whole chunks of C tokens and a last one of any length: ``([n, L, HV, V] output, state after them)``."""
    n, L, H, K = q.shape
    HV, V = v.shape[2:]
    chunks = -(-L // C)

    def by_chunk(x, beyond=0):
        """[n, L, h, d] -> [n * HV * chunks, C, d]. Tokens past L have a zero key and no decay: they change no state."""
        x = x.transpose(1, 2)
        if chunks * C > L:
            x = F.pad(x, (0, 0, 0, chunks * C - L), value=beyond)
        if x.shape[1] != HV:
            x = x.repeat_interleave(HV // H, dim=1)
        return x.reshape(n * HV * chunks, C, -1).contiguous()

    q, k, v, decay, beta = by_chunk(q), by_chunk(k), by_chunk(v), by_chunk(decay, beyond=1), by_chunk(beta[..., None])
    Aqk, Akk, from_start, to_end = _pair_products(q, k, decay)
    # (I + diag(beta) Akk) X = beta [V | K e^G]. Substitution holds where powers of Akk blow up: equal keys, beta 2.
    U, W = torch.linalg.solve_triangular(
        beta * Akk, beta * torch.cat((v, k * from_start), -1), upper=False, unitriangular=True
    ).split((V, K), -1)

    Q, U, W, Aqk, Kend, decay_end = (
        x.unflatten(0, (n * HV, chunks)).unbind(1)
        for x in (q * from_start, U, W, Aqk, (k * to_end).mT, from_start[:, -1, :, None])
    )
    S = S.reshape(n * HV, K, V)
    outputs = []
    for c in range(chunks):
        V_new = torch.baddbmm(U[c], W[c], S, alpha=-1)
        outputs.append(torch.baddbmm(Q[c] @ S, Aqk[c], V_new))
        S = torch.baddbmm(decay_end[c] * S, Kend[c], V_new)
    o = torch.cat(outputs, 1)[:, :L].view(n, HV, L, V).transpose(1, 2)
    return o, S.view(n, HV, K, V)


def _piece(q, k, v, g, beta, A_log, dt_bias, S, call, C):
    """A piece of every sequence of a group: ``([n, L, HV, V] output, state after it)``. Differentiable by autograd.

    q, k ``[n, L, H, K]``; v, g, beta ``[n, L, HV, ..]``; S ``[n, HV, K, V]`` in the compute dtype; any L, chunks of C.
    Nothing in here works in place: below a custom op autograd would not see it.
    """
    activated = _activate(q, k, v, g, beta, A_log, dt_bias, call, S.dtype)
    return _token(*activated, S) if C == 1 else _chunks(*activated, S, C)


def _compute_dtype(call) -> torch.dtype:
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


def _initial_state(call, group: _Group) -> torch.Tensor:
    if call.initial_state is None:
        K, V = call.q.shape[-1], call.v.shape[-1]
        return call.q.new_zeros(group.size, call.v.shape[2], K, V, dtype=_compute_dtype(call))
    S = call.initial_state[group.members].to(_compute_dtype(call))
    return S.mT if call.state_v_first else S


def _read_piece(call, group: _Group, a: int, b: int) -> list[torch.Tensor]:
    return [group.read(x, a, b) for x in (call.q, call.k, call.v, call.g, call.beta)]


def chunked_forward(
    call,
    out: torch.Tensor,
    final_state: torch.Tensor | None,
    stops: Mapping[int, Collection[int]] = {},
    keep: Callable[[int, int, torch.Tensor], None] | None = None,
) -> None:
    """Writes the output of every sequence into ``out`` and its last state into ``final_state`` (if not None).

    Args:
        call: a checked :class:`flash_kda.contract.Call`.
        out: ``[B, T, HV, V]``, any floating dtype; rows that no sequence covers are left alone.
        final_state: ``[N, HV, K, V]`` (or V-first, as the call says), any floating dtype; may be
            ``call.initial_state``.
        stops: for each sequence by its number the offsets within it at which its state is handed out.
        keep: is called with sequence, offset and state ``[HV, K, V]`` in the compute dtype there, and at other offsets.

    Computes in float32, or float64 for float64 inputs. Reads the contents of ``cu_seqlens`` on the host.
    """
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        for group, pieces in _plan(call, stops):
            S = _initial_state(call, group)
            for a, b, C in pieces:
                o, S = _piece(*_read_piece(call, group, a, b), call.A_log, call.dt_bias, S, call, C)
                group.write(out, a, b, o)
                if keep is not None:
                    for n, state in zip(group.numbers, S):
                        keep(n, b, state)
            if final_state is not None:
                final_state[group.members] = (S.mT if call.state_v_first else S).to(final_state.dtype)


def chunked_backward(call, grad_out: torch.Tensor, grad_final_state: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Gradients of (q, k, v, g, beta, A_log, dt_bias, initial_state), each None where the call has None.

    Each piece is run again under autograd, from the last to the first, on the state that a forward walk found there.
    """
    inputs = (call.q, call.k, call.v, call.g, call.beta)
    params = (call.A_log, call.dt_bias)
    grads = [torch.zeros_like(x) for x in inputs]
    # summed over pieces in the compute dtype, cast once
    param_grads = [None if x is None else torch.zeros_like(x, dtype=_compute_dtype(call)) for x in params]
    state_grad = None if call.initial_state is None else torch.zeros_like(call.initial_state)
    with torch.autocast(call.q.device.type, enabled=False):
        for group, pieces in _plan(call):
            states = [_initial_state(call, group)]
            with torch.no_grad():
                for a, b, C in pieces[:-1]:
                    states.append(_piece(*_read_piece(call, group, a, b), *params, states[-1], call, C)[1])
            if grad_final_state is None:
                dS = torch.zeros_like(states[0])
            else:
                dS = grad_final_state[group.members].to(states[0].dtype)
                dS = dS.mT if call.state_v_first else dS
            for (a, b, C), S in zip(reversed(pieces), reversed(states)):
                leaves = [*_read_piece(call, group, a, b), *params, S]
                leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
                with torch.enable_grad():
                    o, S_next = _piece(*leaves, call, C)
                wrt = [x for x in leaves if x is not None]
                do = group.read(grad_out, a, b).to(o.dtype)
                found = iter(torch.autograd.grad((o, S_next), wrt, (do, dS), allow_unused=True, materialize_grads=True))
                piece_grads = [None if x is None else next(found) for x in leaves]
                for total, part in zip(grads, piece_grads):
                    group.write(total, a, b, part)
                for total, part in zip(param_grads, piece_grads[5:7]):
                    if total is not None:
                        total += part
                dS = piece_grads[7]
            if state_grad is not None:
                state_grad[group.members] = (dS.mT if call.state_v_first else dS).to(state_grad.dtype)
    param_grads = [None if x is None else grad.to(x.dtype) for x, grad in zip(params, param_grads)]
    return [*grads, *param_grads, state_grad]
