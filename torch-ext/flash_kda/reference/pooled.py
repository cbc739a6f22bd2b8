"""A few tokens a sequence on states in a pool, in plain PyTorch: the serving arguments of ``fused_recurrent_kda``.

One batched step of the recurrence a token, over all sequences that have such a token.
"""

from __future__ import annotations

import torch

from .chunked import _activate, _compute_dtype, _token, sequence_spans


def pooled_forward(call, states, out: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """Writes the output of every sequence into ``out`` and its states to where ``states`` says.

    Args:
        call: a checked :class:`flash_kda.contract.Call`; ``initial_state`` is the pool where there are indices.
        states: a checked :class:`flash_kda.contract.States`.
        out: ``[B, T, HV, V]``; rows that no sequence covers are left alone.
        final_state: ``[N, ...]`` for the last states, or None.

    Computes in float32, or float64 for float64 inputs. Reads indices, accept counts and ``cu_seqlens`` on the host.
    """
    B, T = call.q.shape[:2]
    N, dtype = call.num_sequences, _compute_dtype(call)
    spans = [(b, 0, T) for b in range(B)] if call.cu_seqlens is None else [(0, *span) for span in sequence_spans(call)]
    slots = _slots(call, states)
    accepted = [1] * N if states.num_accepted_tokens is None else states.num_accepted_tokens.tolist()
    source = [row[min(max(a, 1), len(row)) - 1] for row, a in zip(slots, accepted)]
    live = [n for n in range(N) if source[n] is not None]
    lengths = [spans[n][2] for n in live]

    def read(indices):
        if call.initial_state is None:
            return call.q.new_zeros(len(indices), call.v.shape[2], call.q.shape[3], call.v.shape[3], dtype=dtype)
        S = call.initial_state[indices].to(dtype)
        return S.mT if call.state_v_first else S

    def write(target, index, S):
        target[index] = (S.mT if call.state_v_first else S).to(target.dtype)

    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        S = read([source[n] for n in live])
        if final_state is not None:
            final_state.zero_()
        for n in range(N):
            b, start, length = spans[n]
            if source[n] is None:
                out[b, start : start + length] = 0
        for t in range(max(lengths, default=0)):
            rows = [i for i, length in enumerate(lengths) if length > t]
            at = [spans[live[i]][0] for i in rows], [spans[live[i]][1] + t for i in rows]
            inputs = (x[at][:, None] for x in (call.q, call.k, call.v, call.g, call.beta))
            activated = _activate(*inputs, call.A_log, call.dt_bias, call, dtype)
            o, S_new = _token(*activated, S[rows])
            out[at] = o[:, 0].to(out.dtype)
            S[rows] = S_new
            if states.token_states is not None:
                write(states.token_states, at, S_new)
            if states.inplace_final_state and states.by_token:
                kept = [(i, slots[live[row]][t]) for i, row in enumerate(rows) if t < len(slots[live[row]])]
                kept = [(i, slot) for i, slot in kept if slot is not None]
                write(call.initial_state, [slot for _, slot in kept], S_new[[i for i, _ in kept]])
        if states.inplace_final_state and not states.by_token:
            ended = [(i, slots[live[i]][0]) for i, length in enumerate(lengths) if length > 0]
            ended = [(i, slot) for i, slot in ended if slot is not None]
            write(call.initial_state, [slot for _, slot in ended], S[[i for i, _ in ended]])
        if final_state is not None:
            write(final_state, live, S)


def _slots(call, states) -> list[list[int | None]]:
    """The slots of each sequence; None for an index that names no state."""
    if states.ssm_state_indices is None:
        return [[n] for n in range(call.num_sequences)]
    count = call.initial_state.shape[0]
    table = states.ssm_state_indices if states.by_token else states.ssm_state_indices[:, None]
    return [[i if states.min_state_index <= i < count else None for i in row] for row in table.tolist()]
