"""States in a pool, in plain PyTorch: the serving arguments of ``fused_recurrent_kda`` and of ``fwd``.

A few tokens a sequence are one batched step of the recurrence a token, over all sequences that have such a token; a
prefill is the chunked path on states that are gathered before it and scattered behind it.
"""

from __future__ import annotations

import torch

from .chunked import _activate, _compute_dtype, _token, chunked_forward, sequence_spans


def pooled_forward(call, states, out: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """Writes the output of every sequence into ``out`` and its states to where ``states`` says.

    Args:
        call: a checked :class:`flash_kda.contract.Call`; ``initial_state`` is the pool where there are indices.
        states: a checked :class:`flash_kda.contract.States`.
        out: ``[B, T, HV, V]``; rows that no sequence covers are left alone.
        final_state: ``[N, ...]`` for the last states, or None.

    Computes in float32, or float64 for float64 inputs. Reads indices, accept counts and ``cu_seqlens`` on the host.
    """
    N, dtype = call.num_sequences, _compute_dtype(call)
    spans = _spans(call)
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


def pooled_prefill(call, states, out: torch.Tensor, final_state: torch.Tensor | None) -> None:
    """Writes the output of every sequence into ``out``, its last state and its checkpoints to where ``states`` says.

    Args:
        call: a checked :class:`flash_kda.contract.Call`; ``initial_state`` is the pool where there are indices.
        states: a checked :class:`flash_kda.contract.PrefillStates`.
        out: ``[B, T, HV, V]``; rows that no sequence covers are left alone.
        final_state: the pool for the last states with ``states.final_state_in_slots``, else ``[N, ...]``, or None.

    Computes as :func:`chunked_forward`. Reads indices, masks, offsets and ``cu_seqlens`` on the host.
    """
    N, spans = call.num_sequences, _spans(call)
    slots: list[int | None] = list(range(N))
    if states.ssm_state_indices is not None:
        pools = [call.initial_state, final_state if states.final_state_in_slots else None]
        count = min(x.shape[0] for x in pools if x is not None)
        slots = [i if states.min_state_index <= i < count else None for i in states.ssm_state_indices.tolist()]
    live = [n for n in range(N) if slots[n] is not None]

    initial = None
    if call.initial_state is not None:
        initial = call.initial_state.new_zeros(call.state_shape)
        started = [True] * N if states.has_initial_state is None else states.has_initial_state.tolist()
        from_pool = [n for n in live if started[n]]
        initial[from_pool] = call.initial_state[[slots[n] for n in from_pool]]
    final = None if final_state is None else final_state.new_zeros(call.state_shape)

    wanted = _checkpoints(states, {n: spans[n][2] for n in live})

    def keep(n: int, offset: int, S: torch.Tensor) -> None:
        for slot in wanted.get(n, {}).get(offset, ()):
            states.checkpoint_state[slot] = (S.mT if call.state_v_first else S).to(states.checkpoint_state.dtype)

    chunked_forward(call._replace(initial_state=initial), out, final, wanted, keep)
    for n in set(range(N)) - set(live):
        b, start, length = spans[n]
        out[b, start : start + length] = 0
        if final is not None:
            final[n] = 0
    if states.final_state_in_slots:
        final_state[[slots[n] for n in live]] = final[live]
    elif final is not None:
        final_state.copy_(final)


def _checkpoints(states, lengths: dict[int, int]) -> dict[int, dict[int, list[int]]]:
    """The slots that want the state of a sequence after so many tokens, for the sequences of these lengths."""
    if states.checkpoint_state is None:
        return {}
    offsets, indices = states.checkpoint_offsets, states.checkpoint_indices
    if states.checkpoint_indptr is not None:
        bounds = [min(max(i, 0), offsets.shape[0]) for i in states.checkpoint_indptr.tolist()]
        rows = {n: range(bounds[n], bounds[n + 1]) for n in lengths}
    else:
        columns = offsets.numel() // max(offsets.shape[0], 1)
        rows = {n: range(n * columns, (n + 1) * columns) for n in lengths}
    offsets = offsets.flatten().tolist()
    least = 0 if indices is None else states.min_state_index
    slots = range(len(offsets)) if indices is None else indices.flatten().tolist()
    wanted: dict[int, dict[int, list[int]]] = {}
    for n, entries in rows.items():
        for i in entries:
            if 0 < offsets[i] <= lengths[n] and offsets[i] % states.checkpoint_multiple == 0:
                if least <= slots[i] < states.checkpoint_state.shape[0]:
                    wanted.setdefault(n, {}).setdefault(offsets[i], []).append(slots[i])
    return wanted


def _spans(call) -> list[tuple[int, int, int]]:
    """(row, first token, length) of each sequence."""
    B, T = call.q.shape[:2]
    return [(b, 0, T) for b in range(B)] if call.cu_seqlens is None else [(0, *span) for span in sequence_spans(call)]


def _slots(call, states) -> list[list[int | None]]:
    """The slots of each sequence; None for an index that names no state."""
    if states.ssm_state_indices is None:
        return [[n] for n in range(call.num_sequences)]
    count = call.initial_state.shape[0]
    table = states.ssm_state_indices if states.by_token else states.ssm_state_indices[:, None]
    return [[i if states.min_state_index <= i < count else None for i in row] for row in table.tolist()]
