"""`fused_recurrent_kda` for a few tokens and its serving arguments, against the float64 recurrence.

Each test runs on the PyTorch path, and on a Hopper GPU also on the decode kernel (profile `kernel`).
"""

import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from cases import BETAS, GATES, KERNEL, PROFILES, check, make, make_state, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# fp32 arithmetic throughout: only the output is rounded to bf16, which costs 1.7e-3
DECODE = [replace(p, tol_o=2.5e-3, tol_s=1e-5) if p.on_kernel else p for p in PROFILES]
BF16_STATE = 2.5e-3  # one rounding of the state to bf16
TENSORS = ("q", "k", "v", "g", "beta")


@pytest.fixture(params=DECODE, ids=lambda p: p.name)
def p(request, monkeypatch):
    if request.param.on_kernel:
        monkeypatch.setenv("FLASH_KDA_STRICT", "1")  # falling back would be an error
    return request.param


def decode_args(p, **options):
    args = make(p, **options)
    args.pop("safe_gate", None)  # not one of its arguments
    return args


# --- plain calls


@pytest.mark.parametrize("l2norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_modes(kernel, p, gate, beta, l2norm):
    args = decode_args(p, gate=gate, beta=beta, l2norm=l2norm, B=3, T=4, H=2, HV=4)
    check(kernel, p, {**args, "initial_state": make_state(p, args)}, kernel.fused_recurrent_kda)


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=["none", "fp32", "bf16"])
@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
@pytest.mark.parametrize("B, H, T", [(1, 1, 1), (1, 3, 16), (5, 2, 9), (70, 2, 1), (300, 2, 1)])
def test_shapes(kernel, p, B, H, T, v_first, state):
    """Batches that the kernel takes in slices of heads and in whole heads, groups of four tokens and their rests."""
    args = decode_args(p, B=B, T=T, H=H, HV=2 * H, state_v_first=v_first)
    if state is not None:
        args["initial_state"] = make_state(p, args, state)
    check(kernel, p, args, kernel.fused_recurrent_kda)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("lengths", [[1] * 9, [0, 3, 0, 16, 1, 0], [5], [40, 1, 1, 1]], ids=str)
def test_packed(kernel, p, lengths, dtype):
    args = decode_args(p, lengths=lengths)
    args["cu_seqlens"] = args["cu_seqlens"].to(dtype)
    check(kernel, p, {**args, "initial_state": make_state(p, args)}, kernel.fused_recurrent_kda)


@pytest.mark.parametrize("offset", [0, 1, 4], ids=str)
def test_views_of_a_packed_projection(kernel, p, offset):
    args = decode_args(p, B=3, T=2, H=3)
    wide = torch.zeros(3, 2, 3 * (2 * p.K + p.V) + 9, dtype=p.dtype, device=p.device)
    for name in ("q", "k", "v"):
        x = args[name]
        view = wide[..., offset : offset + x[0, 0].numel()].view(x.shape)
        args[name] = view.copy_(x)
        offset += x[0, 0].numel()
    args["beta"] = args["beta"][..., None].expand(-1, -1, -1, 2)[..., 0]
    check(kernel, p, {**args, "initial_state": make_state(p, args)}, kernel.fused_recurrent_kda)


@pytest.mark.parametrize("value", [0.0, -2661.0, -math.inf], ids=str)
def test_extreme_decays(kernel, p, value):
    args = decode_args(p, T=5, gate="given")
    args["g"][:, 2] = value
    check(kernel, p, {**args, "initial_state": make_state(p, args)}, kernel.fused_recurrent_kda)


def test_sixty_steps(kernel, p):
    """The state goes from call to call in fp32: rounding adds up slowly."""
    args = decode_args(p, B=2, T=60)
    expected_o, expected = kernel.reference.recurrent_kda(
        **{n: x for n, x in args.items() if n != "output_final_state"}
    )
    state = torch.zeros_like(make_state(p, args))
    for t in range(60):
        step = {n: args[n][:, t : t + 1] for n in TENSORS}
        o, state = kernel.fused_recurrent_kda(**{**args, **step}, initial_state=state)
        assert relative_error(o, expected_o[:, t : t + 1]) <= 1.5 * p.tol_o
    assert relative_error(state, expected) <= 2 * p.tol_s


def test_in_place_and_into_out(kernel, p):
    args = decode_args(p, B=3, T=2)
    state = make_state(p, args)
    o, final = kernel.fused_recurrent_kda(**args, initial_state=state)
    wide = torch.full((3, 2, 2, p.V + 6), 7.0, dtype=p.dtype, device=p.device)
    out, pool = wide[..., 3 : 3 + p.V], state.clone()
    same_o, same = kernel.fused_recurrent_kda(**args, initial_state=pool, inplace_final_state=True, out=out)
    assert same_o is out and same is pool
    assert torch.equal(out, o) and torch.equal(pool, final)
    assert (wide[..., :3] == 7).all() and (wide[..., 3 + p.V :] == 7).all()


def test_long_sequences_leave_the_same_in_place(kernel, p):
    p = replace(p, tol_o=KERNEL.tol_o, tol_s=KERNEL.tol_s) if p.on_kernel else p
    args = decode_args(p, T=100)
    state = make_state(p, args)
    expected_o, expected = kernel.reference.recurrent_kda(
        **{n: x for n, x in args.items() if n != "output_final_state"}, initial_state=state
    )
    o, final = kernel.fused_recurrent_kda(**args, initial_state=state, inplace_final_state=True)
    assert final is state
    assert relative_error(o, expected_o) <= p.tol_o and relative_error(state, expected) <= p.tol_s


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", [*TENSORS, "initial_state"])
def test_a_bad_sequence_stays_alone(kernel, p, name, value):
    args = decode_args(p, lengths=[2, 3, 1])
    args["initial_state"] = make_state(p, args)
    o, state = kernel.fused_recurrent_kda(**args)
    bad = args[name].clone()
    bad[1 if name == "initial_state" else (0, slice(2, 5))] = value
    bad_o, bad_state = kernel.fused_recurrent_kda(**{**args, name: bad})
    assert torch.equal(bad_o[:, :2], o[:, :2]) and torch.equal(bad_o[:, 5:], o[:, 5:])
    assert torch.equal(bad_state[[0, 2]], state[[0, 2]])
    assert not torch.equal(bad_o, o)


@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_depend_on_the_sequence_alone(kernel, p, v_first, state):
    """Every schedule of the kernel: one slice a CTA, whole heads, and for fp32 slices again."""
    if not p.on_kernel:
        pytest.skip("batched products of the PyTorch path round as the library likes")
    args = decode_args(p, B=300, T=1, H=2, state_v_first=v_first)
    args["initial_state"] = make_state(p, args, state)
    o, final = kernel.fused_recurrent_kda(**args)
    assert all(torch.equal(x, y) for x, y in zip(kernel.fused_recurrent_kda(**args), (o, final)))
    for first, count in ((7, 1), (100, 80)):
        rows = slice(first, first + count)
        part = {n: args[n][rows] for n in (*TENSORS, "initial_state")}
        o_part, final_part = kernel.fused_recurrent_kda(**{**args, **part})
        assert torch.equal(o_part, o[rows]) and torch.equal(final_part, final[rows])


# --- pools


def make_pool(p, args, slots, dtype=torch.float32, seed=5, gap=0):
    """``slots`` states with ``gap`` rows of guard values between them, and the whole buffer."""
    shape = (p.V, p.K) if args.get("state_v_first") else (p.K, p.V)
    HV = args["v"].shape[2]
    size = HV * p.K * p.V
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(slots, size + gap * 16, generator=generator).to(p.device, dtype)
    return buffer[:, :size].unflatten(1, (HV, *shape)), buffer


def expected_of_pool(kernel, args, pool, slots, accepted=None, min_state_index=0):
    """Outputs, pool, and states of every token (by row and token) in float64; ``slots`` is a list of rows."""
    B, T = args["q"].shape[:2]
    bounds = args.get("cu_seqlens")
    spans = [(b, 0, T) for b in range(B)]
    if bounds is not None:
        spans = [(0, a, b) for a, b in zip(bounds.tolist(), bounds.tolist()[1:])]
    o, after = torch.zeros_like(args["v"], dtype=torch.float64), pool.double()
    tokens = {}
    names = [n for n in args if n not in (*TENSORS, "output_final_state", "cu_seqlens")]
    options = {n: args[n] for n in names}
    by_token = isinstance(slots[0], list) if slots else False
    valid = lambda i: min_state_index <= i < pool.shape[0]  # noqa: E731
    for n, (b, first, last) in enumerate(spans):
        row = slots[n] if by_token else [slots[n]]
        start = row[min(max(accepted[n], 1), len(row)) - 1] if accepted else row[0]
        if not valid(start):
            continue
        state = pool[start : start + 1].double()
        for t in range(first, last):
            one = {name: args[name][b : b + 1, t : t + 1] for name in TENSORS}
            step, state = kernel.reference.recurrent_kda(**one, **options, initial_state=state)
            o[b, t] = step[0, 0]
            tokens[b, t] = state[0]
            if by_token and t - first < len(row) and valid(row[t - first]):
                after[row[t - first]] = state[0]
        if not by_token and last > first:
            after[row[0]] = state[0]
    return o, after, tokens


def close(p, actual, expected, tolerance):
    assert actual.isfinite().all()
    error = relative_error(actual, expected)
    assert error <= tolerance, error


@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("min_state_index", [0, 1], ids=["sglang", "vllm"])
def test_pool_in_place(kernel, p, min_state_index, index, dtype, v_first):
    """One token a sequence. Padding rows: their inputs are NaN, their outputs zero, and no slot but the live ones moves."""
    slots = [3, -1, 5, 0, 9, 1, 1 << 30, -(1 << 31)]
    live = [n for n, i in enumerate(slots) if min_state_index <= i < 7]
    args = decode_args(p, B=len(slots), T=1, H=2, HV=4, state_v_first=v_first)
    pool, buffer = make_pool(p, args, 7, dtype, gap=1)
    o_expected, expected, _ = expected_of_pool(kernel, args, pool, slots, min_state_index=min_state_index)
    before = buffer.clone()
    dead = [n for n in range(len(slots)) if n not in live]
    for name in TENSORS:
        args[name][dead] = math.nan
    for i in set(range(7)) - {slots[n] for n in live}:
        pool[i] = math.nan
    table = torch.zeros(len(slots), 3, dtype=index, device=p.device)
    table[:, 1] = torch.tensor(slots, device=p.device)
    o, same = kernel.fused_recurrent_kda(
        **args,
        initial_state=pool,
        inplace_final_state=True,
        ssm_state_indices=table[:, 1],
        min_state_index=min_state_index,
    )
    assert same is pool
    assert (o[dead] == 0).all()
    close(p, o[live], o_expected[live], p.tol_o)
    moved = [slots[n] for n in live]
    close(p, pool[moved], expected[moved], p.tol_s if dtype == torch.float32 else BF16_STATE)
    size = pool[0].numel()
    assert torch.equal(buffer[:, size:], before[:, size:])
    assert all(pool[i].isnan().all() for i in set(range(7)) - set(moved))


@pytest.mark.parametrize("min_state_index", [0, 1])
def test_pool_read_only(kernel, p, min_state_index):
    slots = [2, 0, -3, 4]
    args = decode_args(p, lengths=[2, 1, 3, 0], state_v_first=True)
    pool, _ = make_pool(p, args, 5)
    before = pool.clone()
    o_expected, after, _ = expected_of_pool(kernel, args, pool, slots, min_state_index=min_state_index)
    indices = torch.tensor(slots, device=p.device)
    o, final = kernel.fused_recurrent_kda(
        **args, initial_state=pool, ssm_state_indices=indices, min_state_index=min_state_index
    )
    assert torch.equal(pool, before) and final.shape == (4, 2, p.V, p.K)
    close(p, o, o_expected, p.tol_o)
    expected = torch.stack([after[i] if i >= min_state_index else torch.zeros_like(after[0]) for i in slots])
    close(p, final, expected, p.tol_s)
    assert torch.equal(final[3], pool[4])  # an empty sequence returns what it started from


def test_verify_without_committing(kernel, p):
    """The states of all draft tokens into a buffer; the pool stays."""
    slots = [4, 1, -1]
    args = decode_args(p, B=3, T=5)
    pool, _ = make_pool(p, args, 6)
    before = pool.clone()
    wide = torch.full((3, 7, *pool.shape[1:]), 7.0, device=p.device)
    token_states = wide[:, 1:6]
    o, final = kernel.fused_recurrent_kda(
        **{**args, "output_final_state": False},
        initial_state=pool,
        ssm_state_indices=torch.tensor(slots, device=p.device),
        token_states=token_states,
    )
    assert final is None and torch.equal(pool, before)
    o_expected, _, states = expected_of_pool(kernel, args, pool, slots)
    close(p, o, o_expected, p.tol_o)
    for (b, t), expected in states.items():
        close(p, token_states[b, t], expected, p.tol_s)
    assert (token_states[2] == 7).all() and (wide[:, 0] == 7).all() and (wide[:, 6] == 7).all()


def test_token_states_without_a_pool(kernel, p):
    args = decode_args(p, lengths=[3, 0, 2], state_v_first=True)
    token_states = torch.full((1, 5, 2, p.V, p.K), 7.0, dtype=torch.bfloat16, device=p.device)
    o, final = kernel.fused_recurrent_kda(**args, token_states=token_states)
    plain_o, plain = kernel.fused_recurrent_kda(**args)
    assert relative_error(o, plain_o) <= 1e-6 and relative_error(final, plain) <= 1e-6
    close(p, token_states[0, [2, 4]], final[[0, 2]].double(), BF16_STATE)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_pools(kernel, p, data):
    """Slots, accept counts, padding rows and lengths as they come, packed or not, kept by token or not."""
    N = data.draw(st.integers(1, 5), "N")
    columns = data.draw(st.integers(1, 6), "S")
    packed = data.draw(st.booleans(), "packed")
    by_token = data.draw(st.booleans(), "by token")
    in_place = data.draw(st.booleans(), "in place")
    min_state_index = data.draw(st.integers(0, 2), "min_state_index")
    lengths = [data.draw(st.integers(0, columns), "length") for _ in range(N)] if packed else None
    if packed and sum(lengths) == 0:
        lengths[0] = 1
    args = decode_args(
        p,
        B=1 if packed else N,
        T=data.draw(st.integers(1, columns), "T"),
        lengths=lengths,
        H=1,
        HV=2,
        gate=data.draw(st.sampled_from(sorted(GATES)), "gate"),
        state_v_first=data.draw(st.booleans(), "state_v_first"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    count = N * columns + 2 + min_state_index
    pool, buffer = make_pool(p, args, count, gap=data.draw(st.integers(0, 2), "gap"))
    order = data.draw(st.permutations(range(min_state_index, count)), "slots")
    wrong = st.sampled_from([-1, -7, min_state_index - 1, count, count + 3, 1 << 30])
    rows = [
        [data.draw(wrong) if data.draw(st.integers(0, 5)) == 0 else order[n * columns + c] for c in range(columns)]
        for n in range(N)
    ]
    accepted = None
    if data.draw(st.booleans(), "accept counts"):
        accepted = [data.draw(st.integers(-1, columns + 1), "accepted") for _ in range(N)]
    slots = rows if by_token else [row[0] for row in rows]
    o_expected, expected, _ = expected_of_pool(kernel, args, pool, slots, accepted, min_state_index)
    before = buffer.clone()
    integers = st.sampled_from([torch.int32, torch.int64])
    o, final = kernel.fused_recurrent_kda(
        **args,
        initial_state=pool,
        inplace_final_state=in_place,
        ssm_state_indices=torch.tensor(slots, dtype=data.draw(integers), device=p.device),
        num_accepted_tokens=None
        if accepted is None
        else torch.tensor(accepted, dtype=data.draw(integers), device=p.device),
        min_state_index=min_state_index,
    )
    zero = o_expected.flatten(2).norm(dim=-1) == 0
    assert (o[zero] == 0).all()
    close(p, o, o_expected, 2 * p.tol_o)
    size = pool[0].numel()
    assert torch.equal(buffer[:, size:], before[:, size:])
    if not in_place:
        assert torch.equal(buffer, before) and final.isfinite().all()
        return
    moved = [i for i in range(count) if not torch.equal(expected[i], before[i, :size].view(pool[i].shape).double())]
    still = [i for i in range(count) if i not in moved]
    assert torch.equal(buffer[still], before[still])
    if moved:
        close(p, pool[moved], expected[moved], 2 * p.tol_s)


def test_speculative_steps_in_a_row(kernel, p):
    """Draft three tokens, accept some, go on from the accepted one: the sequence is the one decoded token by token."""
    args = decode_args(p, B=2, T=12, state_v_first=True)
    _, _, states = expected_of_pool(kernel, args, torch.zeros_like(make_pool(p, args, 2)[0]), [0, 1])
    pool, _ = make_pool(p, args, 6)
    pool.zero_()
    table = torch.tensor([[0, 1, 2], [5, 4, 3]], dtype=torch.int32, device=p.device)
    accepted, at = [1, 1], [0, 0]
    for take in ([3, 1], [1, 2], [2, 2], [2, 3]):
        drafts = {n: torch.stack([args[n][b, at[b] : at[b] + 3] for b in range(2)]).clone() for n in TENSORS}
        for b in range(2):  # what is rejected later is another token
            drafts["k"][b, take[b] :] = drafts["k"][b, take[b] :].flip(-1)
        kernel.fused_recurrent_kda(
            **{**args, **drafts},
            initial_state=pool,
            inplace_final_state=True,
            ssm_state_indices=table,
            num_accepted_tokens=torch.tensor(accepted, dtype=torch.int32, device=p.device),
        )
        accepted = take
        at = [at[b] + take[b] for b in range(2)]
        for b in range(2):
            close(p, pool[table[b, accepted[b] - 1].item()], states[b, at[b] - 1], 2 * p.tol_s)


def test_wrong_cu_seqlens_stay_in_bounds(kernel, p):
    args = decode_args(p, T=20)
    pool, buffer = make_pool(p, args, 5, gap=1)
    guarded = torch.full((1, 60, 2, p.V), 7.0, dtype=p.dtype, device=p.device)
    for bounds in ([0, 9, 1 << 20], [-(1 << 20), 5, 20], [15, 3, 20], [1 << 30] * 3):
        kernel.fused_recurrent_kda(
            **{**args, "cu_seqlens": torch.tensor(bounds, device=p.device)},
            initial_state=pool,
            inplace_final_state=True,
            ssm_state_indices=torch.tensor([1, 3], device=p.device),
            out=guarded[:, 20:40],
        )
    assert (guarded[:, :20] == 7).all() and (guarded[:, 40:] == 7).all() and buffer.isfinite().all()


# --- bad input


def good_call(p):
    args = decode_args(p, B=2, T=3)
    pool, _ = make_pool(p, args, 7)
    table = torch.tensor([[0, 1, 2], [3, 4, 5]], device=p.device)
    return {
        **args,
        "initial_state": pool,
        "inplace_final_state": True,
        "ssm_state_indices": table,
        "num_accepted_tokens": torch.tensor([1, 2], device=p.device),
        "out": torch.full_like(args["v"], 7.0),
        "token_states": pool.new_full((2, 3, *pool.shape[1:]), 7.0),
    }


BAD = {
    "no pool": (lambda a: {"initial_state": None}, ValueError, "initial_state: expected the states that .*, got None"),
    "pool rank": (
        lambda a: {"initial_state": a["initial_state"][0]},
        ValueError,
        r"initial_state: expected 1 dimensions and then \[2, .*\].*, got shape",
    ),
    "pool heads": (lambda a: {"initial_state": a["initial_state"][:, :1]}, ValueError, "initial_state: expected 1 dim"),
    "pool inside": (
        lambda a: {"initial_state": a["initial_state"].transpose(0, 1).contiguous().transpose(0, 1)},
        ValueError,
        "initial_state: expected dense states, .*, got strides",
    ),
    "pool dtype": (lambda a: {"initial_state": a["initial_state"].half()}, TypeError, "initial_state: expected dtype"),
    "indices list": (lambda a: {"ssm_state_indices": [0, 1]}, TypeError, "ssm_state_indices: expected a torch.Tensor"),
    "indices dtype": (
        lambda a: {"ssm_state_indices": a["ssm_state_indices"].float()},
        TypeError,
        "ssm_state_indices: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    "indices rows": (
        lambda a: {"ssm_state_indices": a["ssm_state_indices"][:1]},
        ValueError,
        r"ssm_state_indices: expected shape \[N\] or \[N, S\], N = 2 sequences, got shape \[1, 3\]",
    ),
    "indices rank": (
        lambda a: {"ssm_state_indices": a["ssm_state_indices"][None]},
        ValueError,
        r"ssm_state_indices: expected shape \[N\] or",
    ),
    "indices columns": (
        lambda a: {"ssm_state_indices": a["ssm_state_indices"][:, :2]},
        ValueError,
        r"ssm_state_indices: expected a column for each of 3 tokens or more, got shape \[2, 2\]",
    ),
    "accept counts alone": (
        lambda a: {"ssm_state_indices": None, "initial_state": a["initial_state"][:2]},
        ValueError,
        "num_accepted_tokens: expected ssm_state_indices beside it",
    ),
    "accept counts rows": (
        lambda a: {"num_accepted_tokens": a["num_accepted_tokens"][:1]},
        ValueError,
        r"num_accepted_tokens: expected shape \[2\]",
    ),
    "accept counts dtype": (
        lambda a: {"num_accepted_tokens": a["num_accepted_tokens"].float()},
        TypeError,
        "num_accepted_tokens: expected dtype",
    ),
    "min_state_index text": (
        lambda a: {"min_state_index": "1"},
        TypeError,
        "min_state_index: expected an int, got str",
    ),
    "min_state_index negative": (lambda a: {"min_state_index": -1}, ValueError, "min_state_index: expected 0 or more"),
    "token_states tokens": (
        lambda a: {"token_states": a["token_states"][:, :2]},
        ValueError,
        r"token_states: expected shape \[B, T, ...\]",
    ),
    "token_states dtype": (lambda a: {"token_states": a["token_states"].half()}, TypeError, "token_states: expected"),
    "out shape": (lambda a: {"out": a["out"][:, :2]}, ValueError, "out: expected shape"),
    "out dtype": (lambda a: {"out": a["out"].half()}, TypeError, "out: expected dtype"),
    "in place without a state": (
        lambda a: dict.fromkeys(("ssm_state_indices", "num_accepted_tokens", "initial_state")),
        ValueError,
        "initial_state: expected the states that",
    ),
    "in place, strided": (
        lambda a: {
            "initial_state": a["initial_state"][::2][:2],
            **dict.fromkeys(("ssm_state_indices", "num_accepted_tokens", "token_states")),
        },
        ValueError,
        "initial_state: expected a contiguous tensor, since inplace_final_state=True, got strides",
    ),
    "lower_bound": (lambda a: {"lower_bound": 1.0}, ValueError, "lower_bound: expected a finite negative number"),
    "scale": (lambda a: {"scale": math.inf}, ValueError, "scale: expected a finite number"),
}


def test_bad_input_of_many_tokens(kernel, p):
    """More tokens than the decode kernel serves: what only serving asks for is looked at all the same."""
    args = make(p, T=70)
    args["initial_state"] = state = make_state(p, args)
    before = state.clone()
    for index, error in ((-1, ValueError), (1.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match="min_state_index: expected"):
            kernel.fused_recurrent_kda(**args, inplace_final_state=True, min_state_index=index)
    assert torch.equal(state, before)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(kernel, p, case):
    change, error, message = BAD[case]
    call = good_call(p)
    before = {n: call[n].clone() for n in ("initial_state", "out", "token_states")}
    with pytest.raises(error, match="^" + message):
        kernel.fused_recurrent_kda(**{**call, **change(call)})
    assert all(torch.equal(call[n], x) for n, x in before.items())


def test_the_good_call_writes(kernel, p):
    """Or the test above could not fail."""
    call = good_call(p)
    before = call["initial_state"].clone()
    kernel.fused_recurrent_kda(**call)
    assert not (call["out"] == 7).any() and not (call["token_states"] == 7).all()
    assert not torch.equal(call["initial_state"], before)


def test_every_argument_is_documented(kernel):
    import inspect

    own = set(inspect.signature(kernel.fused_recurrent_kda).parameters) - set(
        inspect.signature(kernel.chunk_kda).parameters
    )
    documented = re.findall(r"^        (\w+):", kernel.fused_recurrent_kda.__doc__, re.M)
    assert own == set(documented)


# --- dispatch, torch.compile


@pytest.mark.parametrize(
    "T, lengths, invariant, path",
    [
        (1, None, False, "CUDA_DECODE"),
        (16, None, False, "CUDA_DECODE"),
        (17, None, False, "CUDA_PREFILL"),
        (17, None, True, "CUDA_DECODE"),
        (33, [1, 32, 0], False, "CUDA_DECODE"),
        (33, [1, 32], False, "CUDA_PREFILL"),
    ],
)
def test_short_recurrent_calls_select_the_decode_kernel(kernel, monkeypatch, T, lengths, invariant, path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(kernel.dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel.prefill, "AVAILABLE", True)
    B = 2 if lengths is None else 1
    none = dict.fromkeys(("A_log", "dt_bias", "initial_state", "scale", "lower_bound"))
    off = ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_empty = lambda *shape: torch.empty(B, T, 2, *shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        cu_seqlens = None if lengths is None else torch.empty(len(lengths) + 1, dtype=torch.int32, device="cuda")
        for recurrent in (True, False):
            call = kernel.contract.check_call(
                *(make_empty(128) for _ in range(4)),
                make_empty(),
                **none,
                **dict.fromkeys(off, False),
                state_v_first=False,
                cu_seqlens=cu_seqlens,
                batch_invariant=invariant,
                recurrent=recurrent,
            )
            expected = getattr(kernel.dispatch, path if recurrent else "CUDA_PREFILL")
            assert kernel.dispatch.select(call, needs_grad=False)[0] == expected


def test_compiled_whole(kernel, p):
    """One graph, no break, and the pool is written in place; on both ways through the custom ops."""
    torch._dynamo.reset()
    args = decode_args(p, B=2, T=3)
    pool, _ = make_pool(p, args, 7)
    table = torch.tensor([[0, 1, -1], [3, 4, 5]], device=p.device)

    def step(pool, table):
        o, _ = kernel.fused_recurrent_kda(**args, initial_state=pool, inplace_final_state=True, ssm_state_indices=table)
        return o + 0, kernel.fused_recurrent_kda(**args)[1]

    mine, theirs = pool.clone(), pool.clone()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(mine, table)
    eager = step(theirs, table)
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager)) and torch.equal(mine, theirs)
    assert not torch.equal(mine, pool)


def test_opcheck(kernel, p):
    args = good_call(p)
    named = {n: args[n] for n in TENSORS} | {"A_log": args["A_log"], "dt_bias": args["dt_bias"]}
    flags = {n: args.get(n, False) for n in args if n.startswith("use_")}
    none = dict.fromkeys(("cu_seqlens", "scale", "lower_bound"))
    off = {"use_gate_in_kernel": True, "allow_neg_eigval": False, "state_v_first": False}
    call = kernel.contract.check_call(
        **named, **{**off, **flags}, **none, initial_state=args["initial_state"], recurrent=True, pool=True
    )
    states = kernel.contract.check_states(
        call, args["ssm_state_indices"], args["num_accepted_tokens"], args["token_states"], True, 0
    )
    torch.library.opcheck(kernel.dispatch._kda_pooled_op, (*call, *states, args["out"], None))


def test_gradients_take_the_differentiable_path(kernel, p):
    args = decode_args(p, T=3)
    args["v"].requires_grad_()
    if p.on_kernel:
        pytest.skip("strict: on a GPU the differentiable path is a fall back")
    o, _ = kernel.fused_recurrent_kda(**args)
    assert torch.autograd.grad(o.float().sum(), args["v"])[0].norm() > 0


# --- Hopper only


KERNEL_DECODE = replace(KERNEL, tol_o=2.5e-3, tol_s=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [True, False], ids=["at-once", "prepared"])
def test_the_log_says_that_the_decode_kernel_ran(kernel, caplog, prepared):
    """Also where arguments have to be prepared first."""
    args = decode_args(KERNEL, T=5)
    if not prepared:
        args["A_log"] = args["A_log"].bfloat16()
    with caplog.at_level(logging.INFO, logger="flash_kda"), torch.no_grad():
        kernel.fused_recurrent_kda(**args)
        kernel.fused_recurrent_kda(**decode_args(KERNEL, T=17))
    paths = [kernel.dispatch.CUDA_DECODE, kernel.dispatch.CUDA_PREFILL]
    assert [r.message.split(":")[0] for r in caplog.records] == paths


@pytest.mark.gpu
def test_graph_replay_reads_indices_anew(kernel):
    args = decode_args(KERNEL, B=3, T=1, state_v_first=True)
    pool, _ = make_pool(KERNEL, args, 6)
    table = torch.tensor([1, 2, 3], dtype=torch.int32, device="cuda")
    call = lambda pool: kernel.fused_recurrent_kda(  # noqa: E731
        **args, initial_state=pool, inplace_final_state=True, ssm_state_indices=table
    )[0]
    mine, theirs = pool.clone(), pool.clone()
    with torch.no_grad():
        call(pool.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = call(mine)
        for slots in ([1, 2, 3], [5, -1, 0], [-1, -1, -1], [3, 4, 99]):
            table.copy_(torch.tensor(slots))
            args["q"].mul_(-1)
            graph.replay()
            assert torch.equal(o, call(theirs)) and torch.equal(mine, theirs)


@pytest.mark.gpu
def test_no_synchronisation(kernel):
    call = good_call(KERNEL)
    kernel.fused_recurrent_kda(**call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.fused_recurrent_kda(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31(kernel):
    args = decode_args(KERNEL_DECODE, B=2, T=1)
    pitch = (1 << 30) + 128
    buffer = torch.empty(3 * pitch, dtype=torch.bfloat16, device="cuda")
    pool = buffer.as_strided((3, 2, 128, 128), (pitch, 128 * 128, 128, 1))
    small, _ = make_pool(KERNEL_DECODE, args, 3, torch.bfloat16)
    pool.copy_(small)
    table = torch.tensor([2, 0], device="cuda")
    options = dict(inplace_final_state=True, ssm_state_indices=table)
    o, _ = kernel.fused_recurrent_kda(**args, initial_state=pool, **options)
    expected, _ = kernel.fused_recurrent_kda(**args, initial_state=small, **options)
    assert torch.equal(o, expected) and torch.equal(pool, small)


@pytest.mark.gpu
def test_is_at_least_as_exact_as_fla(kernel):
    fla = pytest.importorskip("fla.ops.kda")
    args = decode_args(KERNEL_DECODE, B=8, T=3, H=4)
    args["initial_state"] = make_state(KERNEL_DECODE, args)
    expected = kernel.reference.recurrent_kda(**{n: x for n, x in args.items() if n != "output_final_state"})
    with torch.no_grad():
        ours, theirs = kernel.fused_recurrent_kda(**args), fla.fused_recurrent_kda(**args)
    for mine, peer, exact in zip(ours, theirs, expected):
        assert relative_error(mine, exact) <= 1.05 * relative_error(peer, exact) + 1e-7
