"""State pools and checkpoints of the prefill (`fwd`, and `fused_recurrent_kda` where many tokens come) against the float64
recurrence.

Each test runs on the PyTorch path, and on a Hopper GPU also on the kernels (profile `kernel`).
"""

import logging
import math
import re

import pytest
import torch
from cases import GATES, KERNEL, PROFILES, make, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BF16_STATE = 2.5e-3  # one rounding of the state to bf16
TENSORS = ("q", "k", "v", "g", "beta")
FLAGS = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel")


@pytest.fixture(params=PROFILES, ids=lambda p: p.name)
def p(request, monkeypatch):
    if request.param.on_kernel:
        monkeypatch.setenv("FLASH_KDA_STRICT", "1")  # falling back would be an error
    return request.param


def fwd_args(p, **options):
    """Arguments of `fwd` by name, `out` among them, whose rows are 7 until they are written."""
    args = make(p, **{"state_v_first": True, **options})
    for name in ("safe_gate", "output_final_state"):
        args.pop(name, None)
    for name in FLAGS:
        args.setdefault(name, False)
    for name in ("A_log", "dt_bias", "lower_bound"):
        args.setdefault(name, None)
    return {**args, "scale": None, "out": torch.full_like(args["v"], 7.0)}


def make_pool(p, args, slots, dtype=torch.float32, gap=0, seed=5):
    """``slots`` states with ``gap`` guard elements behind each, and the whole buffer."""
    shape = (p.V, p.K) if args["state_v_first"] else (p.K, p.V)
    HV = args["v"].shape[2]
    size = HV * p.K * p.V
    buffer = torch.randn(slots, size + gap, generator=torch.Generator().manual_seed(seed)).to(p.device, dtype)
    return buffer[:, :size].unflatten(1, (HV, *shape)), buffer


def spans_of(args):
    B, T = args["q"].shape[:2]
    if args.get("cu_seqlens") is None:
        return [(b, 0, T) for b in range(B)]
    bounds = args["cu_seqlens"].tolist()
    return [(0, a, b) for a, b in zip(bounds, bounds[1:])]


def walk(kernel, args, n, state, positions):
    """Output of sequence n from ``state`` on, and the state after each of ``positions`` tokens, in float64."""
    b, first, last = spans_of(args)[n]
    only = {m: args[m] for m in (*FLAGS, "A_log", "dt_bias", "lower_bound", "state_v_first")}
    outputs, states, at = [], {}, first
    state = state.double()[None]
    for position in sorted({*positions, last - first}):
        piece = {name: args[name][b : b + 1, at : first + position] for name in TENSORS}
        o, state = kernel.reference.recurrent_kda(**piece, **only, initial_state=state)
        outputs.append(o[0])
        states[position], at = state[0], first + position
    return torch.cat(outputs), states


def assert_close(actual, expected, tolerance):
    assert actual.isfinite().all()
    if expected.numel():
        error = relative_error(actual, expected)
        assert error <= tolerance, error


def state_tolerance(p, dtype, offset=0):
    """With the offset of a checkpoint: between chunks the kernels round it twice."""
    roundings = 2 if offset % 64 else 1
    return p.tol_s + (roundings * BF16_STATE if dtype == torch.bfloat16 else 0)


# --- pools


@pytest.mark.parametrize("v_first", [True, False], ids=["V-first", "K-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("min_state_index", [0, 1], ids=["sglang", "vllm"])
@pytest.mark.parametrize("H", [2, 70], ids=["split", "fused"])  # heads enough for the fused kernel in the second
def test_pool_in_place(kernel, p, H, min_state_index, index, dtype, v_first):
    """Prefills, decodes of one token, new sequences, padding rows whose inputs and slots are NaN, guards between slots."""
    slots = [3, -1, 5, 0, 6, 1, 1 << 30, 2]
    fresh = [5]  # has no initial state: its slot holds NaN
    if H == 70 and p.K != 128:
        pytest.skip("the kernels' matter")
    args = fwd_args(p, lengths=[70, 33, 1, 130, 0, 64, 5, 65], H=H, state_v_first=v_first)
    live = [n for n, i in enumerate(slots) if min_state_index <= i < 7]
    pool, buffer = make_pool(p, args, 7, dtype, gap=24)
    clean = {name: args[name].clone() for name in TENSORS}
    before = buffer.clone()
    for n in set(range(len(slots))) - set(live):
        _, first, last = spans_of(args)[n]
        for name in TENSORS:
            args[name][:, first:last] = math.nan
    for i in {*range(7)} - {slots[n] for n in live} | {slots[n] for n in fresh}:
        pool[i] = math.nan
    table = torch.zeros(len(slots), 3, dtype=index, device=p.device)
    table[:, 1] = torch.tensor(slots, device=p.device)
    mask = torch.tensor([n not in fresh for n in range(len(slots))], device=p.device)
    wide = torch.zeros(len(slots), 2, dtype=torch.bool, device=p.device)
    wide[:, 0] = mask
    kernel.fwd(
        **args,
        initial_state=pool,
        final_state=pool,
        ssm_state_indices=table[:, 1],
        has_initial_state=wide[:, 0],
        min_state_index=min_state_index,
    )
    size = pool[0].numel()
    was = before[:, :size].view(pool.shape)
    for n, (b, first, last) in enumerate(spans_of(args)):
        if n not in live:
            assert (args["out"][b, first:last] == 0).all()
            continue
        start = torch.zeros_like(was[0]) if n in fresh else was[slots[n]]
        if H > 2 and n not in (0, 5, 7):
            continue  # the oracle is slow
        o, states = walk(kernel, {**args, **clean}, n, start, [])
        assert_close(args["out"][b, first:last], o, p.tol_o)
        assert_close(pool[slots[n]], states[last - first], state_tolerance(p, dtype))
    assert torch.equal(pool[6], was[6])  # an empty sequence leaves its state
    assert torch.equal(buffer[:, size:], before[:, size:])
    assert all(pool[i].isnan().all() for i in set(range(7)) - {slots[n] for n in live})


@pytest.mark.parametrize("H, T", [(2, 70), (21, 1300), (2, 4097)], ids=["split", "streamed", "segments"])
def test_pool_with_a_batch(kernel, p, H, T):
    """Without cu_seqlens; from one pool to another of a different size and dtype, whose smaller one bounds the slots."""
    slots = [2, 4, 1, -2]
    args = fwd_args(p, B=4, T=T, H=H)
    source, _ = make_pool(p, args, 6)
    target, buffer = make_pool(p, args, 4, torch.bfloat16, gap=7)
    before, was = buffer.clone(), source.clone()
    kernel.fwd(**args, initial_state=source, final_state=target, ssm_state_indices=torch.tensor(slots, device=p.device))
    assert torch.equal(source, was) and (args["out"][[1, 3]] == 0).all()
    for n in (0, 2):
        o, states = walk(kernel, args, n, source[slots[n]], [])
        assert_close(args["out"][n], o, p.tol_o)
        assert_close(target[slots[n]], states[T], state_tolerance(p, torch.bfloat16))
    assert torch.equal(buffer[[0, 3]], before[[0, 3]])
    assert torch.equal(buffer[:, target[0].numel() :], before[:, target[0].numel() :])


@pytest.mark.parametrize("given_states", ["initial", "final"])
def test_one_pool_alone(kernel, p, given_states):
    args = fwd_args(p, lengths=[40, 0, 65])
    pool, _ = make_pool(p, args, 4)
    before = pool.clone()
    named = {f"{given_states}_state": pool}
    kernel.fwd(**args, **named, ssm_state_indices=torch.tensor([3, 1, 0], device=p.device))
    start = pool if given_states == "initial" else torch.zeros_like(pool)
    for n, slot in ((0, 3), (2, 0)):
        _, first, last = spans_of(args)[n]
        o, states = walk(kernel, args, n, start[slot], [])
        assert_close(args["out"][0, first:last], o, p.tol_o)
        if given_states == "final":
            assert_close(pool[slot], states[last - first], p.tol_s)
    if given_states == "initial":
        assert torch.equal(pool, before)
    else:
        assert (pool[1] == 0).all() and torch.equal(pool[2], before[2])


def test_states_that_are_not_there(kernel, p):
    """`has_initial_state` without a pool: the same bits as zeros."""
    args = fwd_args(p, lengths=[70, 5, 3])
    state, _ = make_pool(p, args, 3)
    mask = torch.tensor([True, False, True], device=p.device)
    zeroed = state * mask.view(-1, 1, 1, 1)
    state[1] = math.nan
    final, expected = torch.empty_like(state), torch.empty_like(state)
    kernel.fwd(**args, initial_state=state, final_state=final, has_initial_state=mask)
    theirs = {**args, "out": torch.empty_like(args["out"])}
    kernel.fwd(**theirs, initial_state=zeroed, final_state=expected)
    assert torch.equal(args["out"], theirs["out"]) and torch.equal(final, expected)


def test_no_token_at_all(kernel, p):
    """A step of empty sequences, and a buffer without rows."""
    for lengths, padding in ([0, 0, 0], 3), ([0, 0, 0], 0):
        args = fwd_args(p, T=padding, lengths=None)
        args["cu_seqlens"] = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=p.device)
        pool, _ = make_pool(p, args, 4)
        before = pool.clone()
        kernel.fwd(
            **args,
            initial_state=pool,
            final_state=pool,
            ssm_state_indices=torch.tensor([2, -1, 0], device=p.device),
            has_initial_state=torch.tensor([True, True, False], device=p.device),
            checkpoint_state=pool,
            checkpoint_offsets=torch.tensor([64, 64, 0], device=p.device),
        )
        assert torch.equal(pool[1:], before[1:]) and (pool[0] == 0).all() and (args["out"] == 7).all()


def test_a_pool_is_the_same_as_its_gathered_states(kernel, p):
    """Bit by bit, in both schedules of the kernel."""
    for H in (2, 70) if p.on_kernel else (2,):
        args = fwd_args(p, lengths=[70, 1, 0, 64, 33], H=H)
        pool, _ = make_pool(p, args, 8, gap=3)
        indices = torch.tensor([7, 0, 3, 2, 5], device=p.device)
        dense = {**args, "out": torch.full_like(args["out"], 7.0)}
        state = pool[indices].contiguous()
        kernel.fwd(**dense, initial_state=state, final_state=state)
        kernel.fwd(**args, initial_state=pool, final_state=pool, ssm_state_indices=indices)
        assert torch.equal(args["out"], dense["out"]) and torch.equal(pool[indices], state)


@pytest.mark.parametrize("in_place", [True, False])
def test_long_recurrent_calls_take_the_pool_too(kernel, p, in_place):
    """`fused_recurrent_kda` with more tokens than the decode kernel is for, on the pool of the decode."""
    slots = [2, -1, 0, 5]
    args = fwd_args(p, lengths=[100, 20, 0, 65], state_v_first=False)
    pool, _ = make_pool(p, args, 6)
    before = pool.clone()
    call = {n: x for n, x in args.items() if n != "scale"}
    o, final = kernel.fused_recurrent_kda(
        **call,
        initial_state=pool,
        output_final_state=True,
        inplace_final_state=in_place,
        ssm_state_indices=torch.tensor(slots, dtype=torch.int32, device=p.device),
    )
    assert o is args["out"] and (o[0, 100:120] == 0).all()
    for n in (0, 3):
        b, first, last = spans_of(args)[n]
        expected, states = walk(kernel, args, n, before[slots[n]], [])
        assert_close(o[b, first:last], expected, p.tol_o)
        assert_close((pool[slots] if in_place else final)[n], states[last - first], p.tol_s)
    if in_place:
        assert final is pool and torch.equal(pool[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    else:
        assert torch.equal(pool, before) and (final[1] == 0).all() and torch.equal(final[2], pool[0])


# --- checkpoints


@pytest.mark.parametrize("v_first", [True, False], ids=["V-first", "K-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("H", [2, 70], ids=["two-a-head", "one-a-head"])  # CTAs of the recurrence
def test_checkpoints_into_the_pool(kernel, p, H, dtype, v_first):
    """As vLLM's and SGLang's prefix caches want them: into slots of the pool itself, some entries empty."""
    if H == 70 and p.K != 128:
        pytest.skip("the kernels' matter")
    lengths = [200, 64, 1, 130, 192]
    args = fwd_args(p, lengths=lengths, H=H, state_v_first=v_first)
    pool, buffer = make_pool(p, args, 20, dtype, gap=8)
    before = buffer.clone()
    slots = [1, 2, 3, -1, 5]
    offsets = [[192, 64, 0], [64, 128, -1], [64, 0, 0], [64, 128, 0], [128, 50, 192]]
    targets = [[11, 12, 13], [14, 15, 16], [17, 17, 17], [18, 19, 19], [6, 7, 40]]
    kernel.fwd(
        **args,
        initial_state=pool,
        final_state=pool,
        ssm_state_indices=torch.tensor(slots, dtype=torch.int32, device=p.device),
        min_state_index=1,
        checkpoint_state=pool,
        checkpoint_offsets=torch.tensor(offsets, dtype=torch.int32, device=p.device),
        checkpoint_indices=torch.tensor(targets, device=p.device),
    )
    size = pool[0].numel()
    was = before[:, :size].view(pool.shape)
    expected = {11: (0, 192), 12: (0, 64), 14: (1, 64), 6: (4, 128)}
    for n in (0, 1, 4):
        wanted = {position: slot for slot, (m, position) in expected.items() if m == n}
        o, states = walk(kernel, args, n, was[slots[n]], list(wanted))
        b, first, last = spans_of(args)[n]
        assert_close(args["out"][b, first:last], o, p.tol_o)
        for position, slot in (wanted | {lengths[n]: slots[n]}).items():
            assert_close(pool[slot], states[position], state_tolerance(p, dtype))
    assert torch.equal(pool[14], pool[2])  # where a sequence ends, its checkpoint is its final state
    still = [i for i in range(20) if i not in {*expected, 1, 2, 3, 5}]
    assert torch.equal(buffer[still], before[still]) and torch.equal(buffer[:, size:], before[:, size:])


@pytest.mark.parametrize("length", [64 * 70, 64 * 70 + 30])
def test_every_chunk_of_a_long_sequence(kernel, p, length):
    """By `checkpoint_indptr`, in any order, twice the same, through slabs of the workspace: the bits of a run that is
    cut there."""
    args = fwd_args(p, lengths=[3, length, 10])
    count = length // 64
    offsets = [64] + [64 * (i + 1) for i in reversed(range(count))] + [128] + [64]
    states = torch.full((len(offsets), 2, p.V, p.K), 7.0, device=p.device)
    final = torch.empty(3, 2, p.V, p.K, device=p.device)
    kernel.fwd(
        **args,
        final_state=final,
        checkpoint_state=states,
        checkpoint_offsets=torch.tensor(offsets, device=p.device),
        checkpoint_indptr=torch.tensor([0, 1, len(offsets) - 1, 99], dtype=torch.int32, device=p.device),
    )
    assert (states[[0, -1]] == 7).all()  # sequences that are too short
    ours = states[1 : count + 1].flip(0)
    assert torch.equal(states[count + 1], ours[1])
    if length % 64 == 0:
        assert torch.equal(ours[-1], final[1])
    for cut in (1, 35, count):
        piece = {n: args[n][:, 3 : 3 + 64 * cut] for n in (*TENSORS, "out")}
        end = torch.empty(1, 2, p.V, p.K, device=p.device)
        kernel.fwd(**{**args, **piece, "cu_seqlens": None}, final_state=end)
        if p.on_kernel:
            assert torch.equal(ours[cut - 1], end[0])
        else:
            assert relative_error(ours[cut - 1], end[0]) <= p.tol_s
    assert all(not torch.equal(a, b) for a, b in zip(ours, ours[1:]))


@pytest.mark.parametrize("v_first", [True, False], ids=["V-first", "K-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "fixed"])
@pytest.mark.parametrize("H", [2, 70], ids=["two-a-head", "one-a-head"])
def test_checkpoints_between_chunks(kernel, p, H, packed, dtype, v_first):
    """At multiples of 16 tokens beside those of 64, in the first chunk and at the end, one of them twice; padding, a slot
    of nobody, a sequence that starts from zero."""
    if H == 70 and p.K != 128:
        pytest.skip("the kernels' matter")
    lengths = [208, 48, 15, 130] if packed else [112] * 4
    args = fwd_args(p, lengths=lengths, H=H, state_v_first=v_first) if packed else None
    args = args or fwd_args(p, B=4, T=112, H=H, state_v_first=v_first)
    pool, buffer = make_pool(p, args, 20, dtype, gap=8)
    pool[3] = math.nan  # where the last one would start
    before = buffer.clone()
    slots = [1, 2, -1, 3]
    offsets = [[208, 80, 64, 80], [48, 16, 24, 32], [16, 48, 64, 0], [16, 128, -16, 112]]
    targets = [[5, 6, 7, 8], [9, 10, 11, 20], [12, 13, 14, 15], [16, 17, 18, 19]]
    kernel.fwd(
        **args,
        initial_state=pool,
        final_state=pool,
        ssm_state_indices=torch.tensor(slots, device=p.device),
        has_initial_state=torch.tensor([True, True, True, False], device=p.device),
        checkpoint_state=pool,
        checkpoint_offsets=torch.tensor(offsets, dtype=torch.int32, device=p.device),
        checkpoint_indices=torch.tensor(targets, dtype=torch.int32, device=p.device),
    )
    size = pool[0].numel()
    was = before[:, :size].view(pool.shape)
    written = set()
    for n in (0, 1, 3):
        b, first, last = spans_of(args)[n]
        asked = zip(offsets[n], targets[n])
        wanted = {i: x for x, i in asked if 0 < x <= last - first and x % 16 == 0 and i < 20}
        start = torch.zeros_like(was[0]) if n == 3 else was[slots[n]]
        o, states = walk(kernel, args, n, start, wanted.values())
        assert_close(args["out"][b, first:last], o, p.tol_o)
        for i, x in wanted.items():
            assert_close(pool[i], states[x], state_tolerance(p, dtype, x))
        assert_close(pool[slots[n]], states[last - first], state_tolerance(p, dtype))
        written |= {*wanted, slots[n]}
    assert len(written) == (12 if packed else 10)
    if packed:
        assert torch.equal(pool[6], pool[8])
    still = [i for i in range(20) if i not in written]
    assert torch.equal(buffer[still], before[still]) and torch.equal(buffer[:, size:], before[:, size:])


def test_every_sixteenth_token(kernel, p):
    """More of them than the workspace holds records, by `checkpoint_indptr`, which passes over the first and the last entry: the
    bits of a run that is cut there."""
    length = 64 * 40 + 30
    args = fwd_args(p, lengths=[5, length, 17])
    count = length // 16
    offsets = [16, *(16 * (i + 1) for i in reversed(range(count))), 16, 16]
    states = torch.full((len(offsets), 2, p.V, p.K), 7.0, device=p.device)
    initial, _ = make_pool(p, args, 3)
    kernel.fwd(
        **args,
        initial_state=initial,
        checkpoint_state=states,
        checkpoint_offsets=torch.tensor(offsets, device=p.device),
        checkpoint_indptr=torch.tensor([1, 1, count + 1, count + 2], dtype=torch.int32, device=p.device),
    )
    assert (states[[0, -1]] == 7).all()
    ours = states[1 : count + 1].flip(0)
    for n, cut, state in [(1, 16 * i, ours[i - 1]) for i in (1, 3, 4, 6, 81, count)] + [(2, 16, states[-2])]:
        first = spans_of(args)[n][1]
        piece = {name: args[name][:, first : first + cut] for name in (*TENSORS, "out")}
        end = torch.empty(1, 2, p.V, p.K, device=p.device)
        kernel.fwd(**{**args, **piece, "cu_seqlens": None}, initial_state=initial[n : n + 1], final_state=end)
        if p.on_kernel:
            assert torch.equal(state, end[0])
        else:
            assert relative_error(state, end[0]) <= p.tol_s
    assert all(not torch.equal(a, b) for a, b in zip(ours, ours[1:]))


def test_who_wants_whole_chunks_only_says_so(kernel, p):
    """`checkpoint_multiple=64`: nothing at other offsets, the same bits at these."""
    args = fwd_args(p, lengths=[150, 70])
    offsets = torch.tensor([[64, 80, 128], [48, 64, 16]], device=p.device)
    states = [torch.full((6, 2, p.V, p.K), 7.0, device=p.device) for _ in range(2)]
    for kept, multiple in zip(states, (16, 64)):
        kernel.fwd(**args, checkpoint_state=kept, checkpoint_offsets=offsets, checkpoint_multiple=multiple)
    assert not any((x == 7).all() for x in states[0]) and all((states[1][i] == 7).all() for i in (1, 3, 5))
    for i in (0, 2, 4):
        if p.on_kernel:
            assert torch.equal(states[0][i], states[1][i])
        else:
            assert relative_error(states[0][i], states[1][i]) <= p.tol_s


def test_checkpoints_change_no_bit(kernel, p):
    args = fwd_args(p, lengths=[200, 70], H=3)
    state, _ = make_pool(p, args, 2)
    finals = [torch.empty_like(state) for _ in range(2)]
    outs = [torch.empty_like(args["out"]) for _ in range(2)]
    kept = torch.empty_like(state)
    options = {"checkpoint_state": kept, "checkpoint_offsets": torch.tensor([144, 64], device=p.device)}
    for final, out, checkpoints in zip(finals, outs, ({}, options)):
        kernel.fwd(**{**args, "out": out}, initial_state=state, final_state=final, **checkpoints)
    if p.on_kernel:
        assert torch.equal(*outs) and torch.equal(*finals)
    else:  # pieces of other lengths round as the library likes
        assert relative_error(*outs) <= p.tol_o and relative_error(*finals) <= p.tol_s


@pytest.mark.parametrize("form", ["[N]", "[N, C]", "indptr"])
def test_checkpoints_of_vllm(kernel, p, form):
    args = fwd_args(p, lengths=[128, 70], gate="lower_bound")
    shape = (2, p.V, p.K)
    named = {
        "[N]": (torch.empty(2, *shape, device=p.device), [48, 64], None),
        "[N, C]": (torch.empty(2, 2, *shape, device=p.device), [[48, 128], [64, 0]], None),
        "indptr": (torch.empty(3, *shape, device=p.device), [48, 128, 64], [0, 2, 3]),
    }
    states, offsets, indptr = named[form]
    tensors = [torch.tensor(x, dtype=torch.int32, device=p.device) if x else None for x in (offsets, indptr)]
    inputs = [args[n] for n in TENSORS]
    gate = (args["A_log"], args["dt_bias"], args["lower_bound"])
    tail = (None, None, args["cu_seqlens"], states, *tensors)
    kernel.vllm.fwd(*inputs, args["q"].shape[-1] ** -0.5, args["out"], None, *gate, *tail)
    flat = states.reshape(-1, *shape)
    found = {"[N]": {(0, 48): 0, (1, 64): 1}, "[N, C]": {(0, 48): 0, (0, 128): 1, (1, 64): 2}}
    found["indptr"] = found["[N, C]"]
    for (n, position), i in found[form].items():
        expected = walk(kernel, args, n, torch.zeros_like(flat[0]), [position])[1][position]
        assert_close(flat[i], expected, p.tol_s)


# --- both, as they come


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_steps(kernel, p, data):
    """Slots, padding rows, masks, checkpoints, lengths, a buffer longer than its end, heads that engines have."""
    N = data.draw(st.integers(1, 5), "N")
    packed = data.draw(st.booleans(), "packed")
    min_state_index = data.draw(st.integers(0, 2), "min_state_index")
    lengths = [data.draw(st.sampled_from([0, 1, 5, 63, 64, 65, 128, 140, 192]), "length") for _ in range(N)]
    H = data.draw(st.sampled_from([1, 3, 6, 12, 22]), "H")
    gate = data.draw(st.sampled_from(sorted(GATES)), "gate")
    v_first = data.draw(st.booleans(), "v_first")
    options = dict(H=H, gate=gate, state_v_first=v_first, seed=data.draw(st.integers(0, 1000), "seed"))
    if packed:
        tail = data.draw(st.sampled_from([0, 3, 70]), "rows behind the end")
        args = fwd_args(p, T=sum(lengths) + tail, **options)
        integers = data.draw(st.sampled_from([torch.int32, torch.int64]), "cu_seqlens")
        args["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(p.device, integers)
        for name in TENSORS:
            args[name][:, sum(lengths) :] = math.nan
    else:
        args = fwd_args(p, B=N, T=lengths[0], **options)
        lengths = [lengths[0]] * N
    C = data.draw(st.integers(0, 3), "checkpoints")
    count = N * (1 + C) + 2 + min_state_index
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "state")
    pool, buffer = make_pool(p, args, count, dtype, gap=data.draw(st.integers(0, 2), "gap"))
    order = iter(data.draw(st.permutations(range(min_state_index, count)), "order"))
    wrong = st.sampled_from([-1, -7, min_state_index - 1, count, 1 << 30])
    pick = lambda: data.draw(wrong) if data.draw(st.integers(0, 5)) == 0 else next(order)  # noqa: E731
    slots = [pick() for _ in range(N)]
    targets = [[pick() for _ in range(C)] for _ in range(N)]
    positions = st.sampled_from([-64, -16, -1, 0, 10, 16, 48, 64, 80, 100, 112, 128, 144, 176, 192, 256])
    multiple = data.draw(st.sampled_from([16, 16, 64]), "checkpoint_multiple")
    offsets = [[data.draw(positions, "offset") for _ in range(C)] for _ in range(N)]
    mask = [data.draw(st.booleans(), "has state") for _ in range(N)] if data.draw(st.booleans(), "mask") else None
    valid = lambda i: min_state_index <= i < count  # noqa: E731
    before, was = buffer.clone(), pool.double()
    expected, zero, between = {}, [], set()
    o_expected = torch.full_like(args["out"], 7.0, dtype=torch.float64)
    for n, (b, first, last) in enumerate(spans_of(args)):
        if not valid(slots[n]):
            o_expected[b, first:last] = 0
            zero.append((b, first, last))
            continue
        start = was[slots[n]] if mask is None or mask[n] else torch.zeros_like(was[0])
        wanted = [
            (x, i) for x, i in zip(offsets[n], targets[n]) if 0 < x <= lengths[n] and x % multiple == 0 and valid(i)
        ]
        between |= {i for x, i in wanted if x % 64}
        o_expected[b, first:last], states = walk(kernel, args, n, start, [x for x, _ in wanted])
        expected |= {i: states[x] for x, i in wanted} | {slots[n]: states[lengths[n]]}
    checkpoints = {}
    if C:
        checkpoints = {
            "checkpoint_state": pool,
            "checkpoint_multiple": multiple,
            "checkpoint_offsets": torch.tensor(offsets, device=p.device),
            "checkpoint_indices": torch.tensor(targets, device=p.device),
        }
        if data.draw(st.booleans(), "indptr"):
            checkpoints = checkpoints | {name: checkpoints[name].flatten() for name in list(checkpoints)[2:]}
            checkpoints["checkpoint_indptr"] = torch.arange(0, N * C + 1, C, device=p.device)
    kernel.fwd(
        **args,
        initial_state=pool,
        final_state=pool,
        ssm_state_indices=torch.tensor(slots, device=p.device),
        has_initial_state=None if mask is None else torch.tensor(mask, device=p.device),
        min_state_index=min_state_index,
        **checkpoints,
    )
    assert_close(args["out"], o_expected, 2 * p.tol_o)
    assert all((args["out"][b, first:last] == 0).all() for b, first, last in zero)
    assert not packed or (args["out"][:, sum(lengths) :] == 7).all()
    for slot, state in expected.items():
        assert_close(pool[slot], state, p.tol_s + state_tolerance(p, dtype, 16 if slot in between else 0))
    still = [i for i in range(count) if i not in expected]
    assert torch.equal(buffer[still], before[still])
    assert torch.equal(buffer[:, pool[0].numel() :], before[:, pool[0].numel() :])


def test_what_indices_hold_leads_nowhere(kernel, p):
    """Guard slots around the pools stay, whatever the index tensors and cu_seqlens hold."""
    args = fwd_args(p, T=140)
    pool, _ = make_pool(p, args, 9)
    pool[:] = 7.0
    inner = pool[3:6]
    guarded = torch.full((1, 420, *args["out"].shape[2:]), 7.0, dtype=p.dtype, device=p.device)
    big = (1 << 62) + 1
    for bounds in ([0, 70, 140], [0, 9, 1 << 20], [-(1 << 20), 5, 140], [150, 3, 20]):
        for entries in ([0, 1], [3, -1], [big, -big], [1 << 31, -(1 << 31)]):
            for indptr in ([0, 1, 2], [-5, 99, big], [2, 0, -big], [big, big, 0]):
                tensor = lambda x: torch.tensor(x, device=p.device)  # noqa: E731
                kernel.fwd(
                    **{**args, "out": guarded[:, 140:280], "cu_seqlens": tensor(bounds)},
                    initial_state=inner,
                    final_state=inner,
                    ssm_state_indices=tensor(entries),
                    checkpoint_state=inner,
                    checkpoint_offsets=tensor([48, big - 1]),
                    checkpoint_indices=tensor(entries[::-1]),
                    checkpoint_indptr=tensor(indptr),
                )
    assert (guarded[:, :140] == 7).all() and (guarded[:, 280:] == 7).all()
    assert (pool[:3] == 7).all() and (pool[6:] == 7).all() and not (inner == 7).all()


# --- bad input


def good_call(p):
    args = fwd_args(p, lengths=[70, 130])
    pool, _ = make_pool(p, args, 7)
    return {
        **args,
        "initial_state": pool,
        "final_state": pool,
        "ssm_state_indices": torch.tensor([3, 4], device=p.device),
        "has_initial_state": torch.tensor([True, False], device=p.device),
        "min_state_index": 1,
        "checkpoint_state": pool.new_full((4, *pool.shape[1:]), 7.0),
        "checkpoint_offsets": torch.tensor([[64, 0], [64, 128]], device=p.device),
        "checkpoint_indices": torch.tensor([[1, 0], [2, 3]], device=p.device),
    }


BAD = {
    "no pool": (
        lambda a: dict.fromkeys(("initial_state", "final_state", "has_initial_state")),
        ValueError,
        "initial_state: expected the pool that ssm_state_indices speaks of, .*, got None",
    ),
    "pool rank": (
        lambda a: {"initial_state": a["initial_state"][0]},
        ValueError,
        "initial_state: expected 1 dimensions",
    ),
    "pool heads": (lambda a: {"initial_state": a["initial_state"][:, :1]}, ValueError, "initial_state: expected 1 dim"),
    "final heads": (lambda a: {"final_state": a["final_state"][:, :1]}, ValueError, "final_state: expected 1 dim"),
    "pool inside": (
        lambda a: {"final_state": a["final_state"].transpose(0, 1).contiguous().transpose(0, 1)},
        ValueError,
        "final_state: expected dense states, .*, got strides",
    ),
    "pool dtype": (lambda a: {"final_state": a["final_state"].half()}, TypeError, "final_state: expected dtype"),
    "no pool but so many": (
        lambda a: {"ssm_state_indices": None},
        ValueError,
        r"initial_state: expected shape \[2, .*N = 2 sequences\), got \[7, ",
    ),
    "indices list": (lambda a: {"ssm_state_indices": [3, 4]}, TypeError, "ssm_state_indices: expected a torch.Tensor"),
    "indices dtype": (
        lambda a: {"ssm_state_indices": a["ssm_state_indices"].float()},
        TypeError,
        "ssm_state_indices: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    "indices shape": (
        lambda a: {"ssm_state_indices": a["ssm_state_indices"][:, None]},
        ValueError,
        r"ssm_state_indices: expected shape \[2\] \(\[N\]\), got \[2, 1\]",
    ),
    "mask dtype": (
        lambda a: {"has_initial_state": a["has_initial_state"].int()},
        TypeError,
        "has_initial_state: expected dtype torch.bool, got torch.int32",
    ),
    "mask shape": (
        lambda a: {"has_initial_state": a["has_initial_state"][:1]},
        ValueError,
        r"has_initial_state: expected shape \[2\]",
    ),
    "mask alone": (
        lambda a: {"initial_state": None},
        ValueError,
        "initial_state: expected the states that has_initial_state speaks of, got None",
    ),
    "min_state_index": (lambda a: {"min_state_index": -1}, ValueError, "min_state_index: expected 0 or more"),
    "min_state_index text": (
        lambda a: {"min_state_index": "1"},
        TypeError,
        "min_state_index: expected an int, got str",
    ),
    "offsets alone": (
        lambda a: {"checkpoint_state": None},
        ValueError,
        "checkpoint_state: expected the states that checkpoint_offsets speaks of, got None",
    ),
    "no offsets": (
        lambda a: {"checkpoint_offsets": None},
        ValueError,
        "checkpoint_offsets: expected the positions of the states in checkpoint_state, got None",
    ),
    "offsets rows": (
        lambda a: {"checkpoint_offsets": a["checkpoint_offsets"][:1]},
        ValueError,
        r"checkpoint_offsets: expected shape \[N\] or \[N, C\], N = 2 sequences, got shape \[1, 2\]",
    ),
    "offsets dtype": (
        lambda a: {"checkpoint_offsets": a["checkpoint_offsets"].double()},
        TypeError,
        "checkpoint_offsets: expected dtype",
    ),
    "offsets rank with indptr": (
        lambda a: {"checkpoint_indptr": torch.arange(3, device=a["q"].device)},
        ValueError,
        r"checkpoint_offsets: expected shape \[M\] with checkpoint_indptr, got shape \[2, 2\]",
    ),
    "indptr shape": (
        lambda a: {"checkpoint_indptr": torch.arange(2, device=a["q"].device)},
        ValueError,
        r"checkpoint_indptr: expected shape \[3\] \(\[N \+ 1\]\), got \[2\]",
    ),
    "checkpoint slots": (
        lambda a: {"checkpoint_indices": a["checkpoint_indices"][:, :1]},
        ValueError,
        r"checkpoint_indices: expected shape \[2, 2\] \(that of checkpoint_offsets\), got \[2, 1\]",
    ),
    "checkpoint multiple": (
        lambda a: {"checkpoint_multiple": 32},
        ValueError,
        "checkpoint_multiple: expected 16 or 64, got 32",
    ),
    "checkpoint dtype": (
        lambda a: {"checkpoint_state": a["checkpoint_state"].half()},
        TypeError,
        "checkpoint_state: expected dtype",
    ),
    "checkpoint layout": (
        lambda a: {"checkpoint_state": a["checkpoint_state"][..., :-1]},
        ValueError,
        "checkpoint_state: expected 1 dimensions and then",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(kernel, p, case):
    change, error, message = BAD[case]
    call = good_call(p)
    before = {n: call[n].clone() for n in ("initial_state", "out", "checkpoint_state")}
    with pytest.raises(error, match="^" + message):
        kernel.fwd(**{**call, **change(call)})
    assert all(torch.equal(call[n], x) for n, x in before.items())


def test_the_good_call_writes(kernel, p):
    """Or the test above could not fail."""
    call = good_call(p)
    before = call["initial_state"].clone()
    kernel.fwd(**call)
    assert not (call["out"] == 7).any() and not torch.equal(call["initial_state"], before)
    assert (call["checkpoint_state"][0] == 7).all() and not (call["checkpoint_state"][1:] == 7).any()


def test_offsets_are_validated_on_request(kernel, p, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_VALIDATE", "1")
    call = good_call(p)
    kernel.fwd(**call)
    for multiple, offset in ((64, 48), (16, 50)):
        call["checkpoint_offsets"][0, 0] = offset
        with pytest.raises(ValueError, match=f"checkpoint_offsets: expected multiples of {multiple} .*, got {offset}"):
            kernel.fwd(**call, checkpoint_multiple=multiple)


def test_every_argument_is_documented(kernel):
    import inspect

    documented = re.findall(r"^        ([\w, ]+):", kernel.fwd.__doc__, re.M)
    documented = {name for names in documented for name in names.split(", ")} | {"k", "v", "g", "beta", "dt_bias"}
    assert set(inspect.signature(kernel.fwd).parameters) <= documented


# --- torch.compile


def test_compiled_whole(kernel, p):
    """One graph, and the pool, named three times, is written in place."""
    torch._dynamo.reset()
    call = good_call(p)
    pool = call["initial_state"]

    def step(pool, out, indices):
        names = ("initial_state", "final_state", "checkpoint_state")
        kernel.fwd(**{**call, **dict.fromkeys(names, pool), "out": out, "ssm_state_indices": indices})
        return out + 0

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, step):
        mine, out = pool.clone(), torch.zeros_like(call["out"])
        copy = function(mine, out, torch.tensor([5, 6], device=p.device))
        assert torch.equal(copy, out)
        results.append((mine, out))
    assert all(torch.equal(x, y) for x, y in zip(*results)) and not torch.equal(results[0][0], pool)


def test_opcheck(kernel, p):
    a = good_call(p)
    options = ("A_log", "dt_bias", "initial_state", "cu_seqlens", "scale", "lower_bound", *FLAGS, "state_v_first")
    call = kernel.contract.check_call(
        *(a[n] for n in TENSORS), **{n: a[n] for n in options}, allow_neg_eigval=False, pool=True
    )
    names = ("ssm_state_indices", "has_initial_state", "min_state_index", "checkpoint_state", "checkpoint_offsets")
    states = kernel.contract.check_prefill_states(
        call, a["final_state"], *(a[n] for n in names), a["checkpoint_indices"], None, 16
    )
    final = a["final_state"].clone()  # opcheck wants no aliases
    torch.library.opcheck(kernel.dispatch._kda_into_op, (*call, a["out"], final, None, *states))


# --- Hopper only


@pytest.mark.gpu
def test_the_log_says_that_the_prefill_kernel_ran(kernel, caplog):
    call = good_call(KERNEL)
    with caplog.at_level(logging.INFO, logger="flash_kda"):
        kernel.fwd(**call)
    assert [r.message.split(":")[0] for r in caplog.records] == [kernel.dispatch.CUDA_PREFILL]


@pytest.mark.gpu
def test_no_synchronisation(kernel):
    call = good_call(KERNEL)
    kernel.fwd(**call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.fwd(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_replays_other_slots(kernel):
    """Lengths, slots, masks and checkpoints are read anew by every replay."""
    call = good_call(KERNEL)
    tensors = ("ssm_state_indices", "has_initial_state", "checkpoint_offsets", "checkpoint_indices", "cu_seqlens")
    mine, theirs = call["initial_state"].clone(), call["initial_state"].clone()
    steps = [
        ([5, -1], [True, True], [[16, 0], [128, 64]], [[1, 2], [3, 2]], [0, 64, 200]),
        ([1, 2], [False, True], [[0, 0], [0, 0]], [[1, 2], [3, 2]], [0, 0, 200]),
        ([2, 6], [True, True], [[128, 176], [0, 0]], [[1, 2], [3, 2]], [0, 180, 190]),
    ]
    run = lambda pool, **more: kernel.fwd(**{**call, **more, "initial_state": pool, "final_state": pool})  # noqa: E731
    run(mine.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(mine)
    for step in steps:
        for name, x in zip(tensors, step):
            call[name].copy_(torch.tensor(x))
        call["out"].zero_()
        call["checkpoint_state"].zero_()
        graph.replay()
        other = {n: torch.zeros_like(call[n]) for n in ("out", "checkpoint_state")}
        run(theirs, **other)
        assert torch.equal(mine, theirs) and all(torch.equal(call[n], x) for n, x in other.items())
        assert not (mine == call["initial_state"]).all()


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31(kernel):
    args = fwd_args(KERNEL, lengths=[70, 64])
    pitch = (1 << 30) + 128
    pool = torch.empty(3 * pitch, dtype=torch.bfloat16, device="cuda").as_strided(
        (3, 2, 128, 128), (pitch, 128 * 128, 128, 1)
    )
    small, _ = make_pool(KERNEL, args, 3, torch.bfloat16)
    pool.copy_(small)
    options = dict(
        ssm_state_indices=torch.tensor([2, 0], device="cuda"), checkpoint_offsets=torch.tensor([64, 0], device="cuda")
    )
    outs = []
    for states in (pool, small):
        args["out"] = torch.zeros_like(args["out"])
        indices = torch.tensor([1, 1], device="cuda")
        kernel.fwd(
            **args,
            initial_state=states,
            final_state=states,
            checkpoint_state=states,
            checkpoint_indices=indices,
            **options,
        )
        outs.append(args["out"])
    assert torch.equal(*outs) and torch.equal(pool, small)
