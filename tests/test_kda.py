"""`chunk_kda`, `fused_recurrent_kda` and `fwd` against the float64 recurrence, over the whole contract.

Each test runs on the PyTorch path, and on a Hopper GPU also on the CUDA kernel (profile `kernel`).
"""

import math

import pytest
import torch
from cases import (
    BETAS,
    GATES,
    KERNEL,
    PROFILES,
    Profile,
    check,
    lengths_to_cu,
    make,
    make_state,
    oracle,
    relative_error,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(params=PROFILES, ids=lambda p: p.name)
def p(request, monkeypatch):
    if request.param.on_kernel:
        monkeypatch.setenv("FLASH_KDA_STRICT", "1")  # falling back would be an error
    return request.param


@pytest.mark.parametrize("l2norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_modes(kernel, p, gate, beta, l2norm):
    args = make(p, gate=gate, beta=beta, l2norm=l2norm, H=2, HV=4)
    check(kernel, p, {**args, "initial_state": make_state(p, args)})


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("gate", ["softplus", "lower_bound"])
def test_lengths(kernel, p, T, gate):
    args = make(p, T=T, gate=gate, B=2)
    check(kernel, p, {**args, "initial_state": make_state(p, args)})


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=["none", "fp32", "bf16"])
@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
@pytest.mark.parametrize("packing", ["fixed", torch.int32, torch.int64], ids=["fixed", "int32", "int64"])
def test_states(kernel, p, packing, v_first, state):
    lengths = None if packing == "fixed" else [70, 3, 64]
    args = make(p, B=2 if lengths is None else 1, T=100, H=1, HV=2, lengths=lengths, state_v_first=v_first)
    if lengths is not None:
        args["cu_seqlens"] = args["cu_seqlens"].to(packing)
    if state is not None:
        args["initial_state"] = make_state(p, args, state)
    check(kernel, p, args)


@pytest.mark.parametrize("H, HV", [(1, 1), (3, 3), (6, 6), (1, 4), (3, 6), (2, 16)])
def test_heads(kernel, p, H, HV):
    check(kernel, p, make(p, H=H, HV=HV, T=90))


@pytest.mark.parametrize("gate", [*GATES, "strong"])
@pytest.mark.parametrize("lengths", [None, [130, 0, 64, 1, 77]], ids=["fixed", "packed"])
def test_many_heads(kernel, p, gate, lengths):
    """Enough heads to fill a card take another schedule of the kernel: right, and the bits that a few of them have alone."""
    H, HV = (32, 128) if p.on_kernel else (2, 8)
    like_a_few_heads_alone(kernel, p, gate, T=200, H=H, HV=HV, lengths=lengths)


def like_a_few_heads_alone(kernel, p, gate, **sizes):
    args = make(p, gate="softplus" if gate == "strong" else gate, **sizes)
    HV = args["v"].shape[2]
    if gate == "strong":  # clamped log decays
        args["A_log"] += 3
    args["initial_state"] = make_state(p, args)
    o, state = check(kernel, p, args)
    own = slice(0, max(4 * args["q"].shape[2] // HV, 1))  # of four value heads
    few = {"q": own, "k": own} | dict.fromkeys(("v", "g", "beta"), slice(0, 4))
    alone = {**args, **{name: args[name][:, :, heads] for name, heads in few.items()}}
    for name in ("A_log", "dt_bias"):
        if name in args:
            alone[name] = args[name].view(HV, -1)[:4].flatten()
    alone["initial_state"] = args["initial_state"][:, :4].contiguous()
    o_alone, state_alone = kernel.chunk_kda(**alone)
    if p.on_kernel:
        assert torch.equal(o_alone, o[:, :, :4]) and torch.equal(state_alone, state[:, :4])


# Sizes of calls that take the streamed schedule (test_schedule.py sees to that): few, long chains of one length, some of
# which have a walker to themselves; the last chunks are whole, partial, of one token.
STREAMED = [
    dict(B=1, T=1000, H=64, HV=64),
    dict(B=1, T=1025, H=13, HV=65),
    dict(B=2, T=1500, H=10, HV=40),
    dict(B=1, T=2048, H=32, HV=32),
    dict(B=1, T=1300, H=48, HV=48),  # groups of producers go from walker to walker
    dict(B=4, T=1300, H=11, HV=11),  # 44 walkers, which have different sequences and groups of their own
]
# The same with two CTAs a walker: fewer chains yet.
HALVED = [
    dict(B=1, T=1473, H=5, HV=20),
    dict(B=4, T=5000, H=3, HV=3),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gate, sizes",
    [
        *((gate, s) for gate in [*GATES, "strong"] for s in (STREAMED[1], HALVED[0])),
        *(("softplus", s) for s in STREAMED + HALVED if s not in (STREAMED[1], HALVED[0])),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_few_long_chains(kernel, monkeypatch, gate, sizes):
    """Another schedule of the kernel: right, and the bits that a few heads have alone."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    like_a_few_heads_alone(kernel, KERNEL, gate, **sizes)


# Sizes of calls whose chains are walked in segments (test_schedule.py sees to that): three, four and two, the last ones
# whole, short, and with a last chunk of one token.
SEGMENTS = [
    dict(B=1, T=3390, H=1, HV=1),
    dict(B=2, T=4481, H=1, HV=2),
    dict(B=1, T=8192, H=4, HV=8),
]


def remembering(args, gate):
    """The arguments with gates and beta that half of a state's channels outlive segments with."""
    g, beta = args["g"].clone(), args["beta"]
    g[..., ::2] = -1e-4 * g[..., ::2].abs() if gate.startswith("given") else g[..., ::2] - 9
    return {**args, "g": g, "beta": beta - 5 if args.get("use_beta_sigmoid_in_kernel") else beta / 100}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gate, sizes",
    [*((gate, SEGMENTS[0]) for gate in GATES), *(("softplus", s) for s in SEGMENTS[1:])],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
def test_chains_in_segments(kernel, monkeypatch, gate, sizes, v_first):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = remembering(make(KERNEL, gate=gate, state_v_first=v_first, **sizes), gate)
    args["initial_state"] = make_state(KERNEL, args, torch.bfloat16 if v_first else torch.float32)
    results = check(kernel, KERNEL, args)
    for x, again in zip(results, kernel.chunk_kda(**args)):
        assert torch.equal(x, again)
    from_zeros = kernel.chunk_kda(**args | {"initial_state": None})  # what the state was is still there
    assert relative_error(from_zeros[1], results[1]) > 0.01
    for x, whole in zip(results, kernel.chunk_kda(**args, batch_invariant=True)):
        assert 0 < relative_error(x, whole) <= 4e-3


@pytest.mark.gpu
def test_segments_of_a_sequence_shorter_than_the_host_knows(kernel, monkeypatch):
    """Down to none, and states in place."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = remembering(make(KERNEL, **SEGMENTS[0]), "softplus")
    args["initial_state"] = make_state(KERNEL, args)
    for length in (3390, 2400, 1153, 1152, 1, 0):
        cu_seqlens = lengths_to_cu([length], "cuda")
        o, state = kernel.chunk_kda(**args, cu_seqlens=cu_seqlens)
        alone = {**args, **{name: args[name][:, :length] for name in ("q", "k", "v", "g", "beta")}}
        expected_o, expected_state = kernel.chunk_kda(**alone, batch_invariant=True)
        assert relative_error(state, expected_state) <= 4e-3
        assert relative_error(o[:, :length], expected_o) <= 4e-3
        if length == 0:
            assert torch.equal(state, args["initial_state"])
        mine = {name: args[name] for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")}
        kept, out = args["initial_state"].clone(), torch.full_like(args["v"], 7)
        kernel.fwd(
            **mine,
            scale=None,
            out=out,
            lower_bound=None,
            initial_state=kept,
            final_state=kept,
            cu_seqlens=cu_seqlens,
            state_v_first=False,
            use_qk_l2norm_in_kernel=args["use_qk_l2norm_in_kernel"],
            use_beta_sigmoid_in_kernel=args.get("use_beta_sigmoid_in_kernel", False),
        )
        assert torch.equal(kept, state) and torch.equal(out[:, :length], o[:, :length])
        assert (out[:, length:] == 7).all()


# Sizes of calls some of whose chains two CTAs share (test_schedule.py sees to that): one chain more than an H200 has SMs,
# one or two rounds and a part of one, last chunks whole and partial.
SHARED = [
    dict(B=1, T=700, H=19, HV=133),
    dict(B=5, T=512, H=27, HV=27),
    dict(B=3, T=390, H=50, HV=100),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gate, sizes", [*((gate, SHARED[0]) for gate in [*GATES, "strong"]), *(("softplus", s) for s in SHARED[1:])]
)
def test_somewhat_more_chains_than_sms(kernel, monkeypatch, gate, sizes):
    """A chain that changes hands keeps its bits."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    like_a_few_heads_alone(kernel, KERNEL, gate, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("v_first", [False, True], ids=["K-first", "V-first"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_somewhat_more_chains_than_sms_packed(kernel, monkeypatch, state, v_first):
    """The device finds whether they have one length, in each replay of a graph anew."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    every = [[210] * 5, [200, 260, 170, 210, 210], [0, 1050, 0, 0, 0], [193, 256, 200, 201, 200], [0] * 5, [210] * 5]
    args = make(KERNEL, H=27, lengths=every[0], state_v_first=v_first)
    args["initial_state"] = make_state(KERNEL, args, state)
    cu = args["cu_seqlens"]
    kernel.chunk_kda(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, final = kernel.chunk_kda(**args)
    for lengths in every:
        cu.copy_(lengths_to_cu(lengths, "cuda"))
        o.fill_(math.nan), final.fill_(math.nan)
        graph.replay()
        for n, length in enumerate(lengths):
            own = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
            alone = {**args, **{name: args[name][:, own] for name in ("q", "k", "v", "g", "beta")}, "cu_seqlens": None}
            alone["initial_state"] = args["initial_state"][n : n + 1].contiguous()
            expected_o, expected_final = kernel.chunk_kda(**alone)
            assert torch.equal(o[:, own], expected_o) and torch.equal(final[n : n + 1], expected_final)


@pytest.mark.gpu
def test_a_long_sequence_packed(kernel, monkeypatch):
    """The host knows T; the device finds less."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = make(KERNEL, T=1000, H=64)
    for length in (1000, 930, 65, 1, 0):
        o, state = kernel.chunk_kda(**args, cu_seqlens=lengths_to_cu([length], "cuda"))
        alone = {**args, **{name: args[name][:, :length] for name in ("q", "k", "v", "g", "beta")}}
        expected_o, expected_state = kernel.chunk_kda(**alone)
        assert torch.equal(o[:, :length], expected_o) and torch.equal(state, expected_state)


# Sizes of calls whose chains are cut into pieces where the gates forget (test_schedule.py sees to that), before each form
# of the streamed schedule; the last pieces are whole, partial, short.
CUT = [
    dict(B=1, T=6144, H=8, HV=8),
    dict(B=2, T=8000, H=2, HV=6),
    dict(B=1, T=16384 - 63, H=4, HV=64),
]


def forgetful(args, gate):
    """The arguments with gates that forget everything within a few tokens."""
    g = args["g"]
    return {**args, "g": -(2 + g.abs()) if gate.startswith("given") else g.abs() + 3}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gate, sizes", [*((gate, CUT[1]) for gate in GATES), *(("softplus", s) for s in CUT if s is not CUT[1])]
)
def test_chains_are_cut_where_gates_forget(kernel, monkeypatch, gate, sizes):
    """Cut or whole, a chain gives the same results; that it was cut shows in how far a NaN gets."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = forgetful(make(KERNEL, gate=gate, **sizes), gate)
    args["initial_state"] = make_state(KERNEL, args)
    results = kernel.chunk_kda(**args)
    for cut, whole in zip(results, kernel.chunk_kda(**args, batch_invariant=True)):
        assert relative_error(cut, whole) <= 1e-6
    args["v"][:, 3] = math.nan
    for batch_invariant in (False, True):
        o, state = kernel.chunk_kda(**args, batch_invariant=batch_invariant)
        assert o[:, 4].isnan().all()
        assert o[:, -1].isnan().all() == state.isnan().all() == batch_invariant
    one = {**args, "g": args["g"].clone()}  # one channel that remembers is enough
    one["g"][..., 5] = 0 if gate.startswith("given") else -30
    assert kernel.chunk_kda(**one)[0][:, -1].isnan().all()


@pytest.mark.gpu
def test_a_cut_chain_shorter_than_the_host_knows(kernel, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = forgetful(make(KERNEL, **CUT[0]), "softplus")
    for length in (6144, 2000, 385, 384, 1, 0):
        o, state = kernel.chunk_kda(**args, cu_seqlens=lengths_to_cu([length], "cuda"))
        alone = {**args, **{name: args[name][:, :length] for name in ("q", "k", "v", "g", "beta")}}
        expected_o, expected_state = kernel.chunk_kda(**alone, batch_invariant=True)
        assert relative_error(state, expected_state) <= 1e-6
        if length:
            assert relative_error(o[:, :length], expected_o) <= 1e-6


HANDED_ON = 3520, 12  # tokens and heads whose first cut is 320 tokens behind the start (test_schedule.py sees to that)


@pytest.mark.gpu
def test_channels_that_hand_a_state_on(kernel, monkeypatch):
    """Two channels remember in turn, 16 tokens each, and a key of both hands half of the state from one to the other:
    every channel forgets within a chunk, the chain does not."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    T, H = HANDED_ON
    args = make(KERNEL, T=T, H=H, gate="given", beta="step")
    t = torch.arange(T, device="cuda")
    meet = t % 16 == 0
    g = torch.full((T, 128), -5.0, device="cuda")
    g[:, 0] = torch.where((t // 16 % 2 == 0) | meet, 0.0, -5.0)
    g[:, 1] = torch.where((t // 16 % 2 == 1) | meet, 0.0, -5.0)
    k = torch.zeros(T, 128, device="cuda")
    k[:, 5] = ~meet
    k[:, 0], k[:, 1] = meet, -1 * meet
    q = torch.zeros(T, 128, device="cuda")
    q[:, :2] = 1
    for name, x in (("g", g), ("k", k.bfloat16()), ("q", q.bfloat16())):
        args[name] = x[None, :, None].expand(1, T, H, 128).contiguous()
    args["beta"].fill_(1)
    args["v"][:, 64:] = 0
    o, state = kernel.chunk_kda(**args)
    assert o[:, 320:384].abs().max() > 1e-6  # behind the first cut: what 16 hand-overs leave, which a cut would lose
    for x, whole in zip((o, state), kernel.chunk_kda(**args, batch_invariant=True)):
        assert torch.equal(x, whole)


@pytest.mark.gpu
def test_few_long_chains_on_streams_and_in_graphs(kernel, monkeypatch):
    """CTAs of the streamed schedule wait for each other: beside other kernels too, and where a graph launches them."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = make(KERNEL, T=1000, H=64)
    expected = kernel.chunk_kda(**args)
    streams = [torch.cuda.Stream() for _ in range(4)]
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                busy @ busy
                results.append(kernel.chunk_kda(**args))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = kernel.chunk_kda(**args)
    for _ in range(3):
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        results.append([x.clone() for x in captured])
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lengths_choose_the_schedule(kernel, dtype):
    """One long sequence beside many short ones, where the shapes alone would choose wrongly."""
    args = make(KERNEL, H=4, lengths=[3000, *[17, 1, 0, 64] * 12])
    args["cu_seqlens"] = args["cu_seqlens"].to(dtype)
    args["initial_state"] = make_state(KERNEL, args)
    check(kernel, KERNEL, args)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256] * 12, [3000, 100, 0, 17], [1] * 40], ids=["equal", "one-long", "short"])
@pytest.mark.parametrize("H", [4, 32])
def test_lengths_on_the_host_choose_no_more_than_the_schedule(kernel, monkeypatch, H, lengths):
    """The same bits with them, without them, and with others that are not those of the device."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = make(KERNEL, H=H, lengths=lengths)
    args["initial_state"] = make_state(KERNEL, args)
    expected = kernel.chunk_kda(**args)
    cu = args["cu_seqlens"].cpu()
    long = torch.full_like(cu, int(cu[-1]))
    long[0] = 0
    for host in (cu, cu.int(), long, torch.zeros_like(cu), cu.flip(0), cu * 2**40):
        for x, y in zip(kernel.chunk_kda(**args, cu_seqlens_cpu=host), expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [64, 64],
        [1, 63, 65, 2, 128],
        [0, 5, 0, 0, 70, 0],
        [100, 100, 1, 1, 1, 100],
        [1] * 40,
        [17, 0, 16, 15, 65, 0, 129],
    ],
    ids=str,
)
def test_packed(kernel, p, lengths):
    args = make(p, lengths=lengths, H=2)
    check(kernel, p, {**args, "initial_state": make_state(p, args)})


@pytest.mark.parametrize("T", [0, 9], ids=["no-tokens", "tail-only"])
def test_all_sequences_empty(kernel, p, T):
    args = make(p, T=T)
    args["cu_seqlens"] = torch.zeros(4, dtype=torch.int32, device=p.device)
    state = make_state(p, args)
    _, final = kernel.chunk_kda(**args, initial_state=state)
    assert torch.equal(final, state)
    _, final = kernel.chunk_kda(**args)
    assert torch.equal(final, torch.zeros_like(state))


def test_no_sequences(kernel, p):
    args = make(p, T=4)
    args["cu_seqlens"] = torch.zeros(1, dtype=torch.int32, device=p.device)
    o, final = kernel.chunk_kda(**args)
    assert o.shape == args["v"].shape and final.shape == (0, 2, p.K, p.V)


def test_no_tokens(kernel, p):
    args = make(p, B=2, T=0)
    state = make_state(p, args)
    o, final = kernel.chunk_kda(**args, initial_state=state)
    assert o.shape == args["v"].shape and torch.equal(final, state)


def test_final_state_only_on_request(kernel, p):
    args = make(p, T=70)
    o, state = kernel.chunk_kda(**args)
    bare, none = kernel.chunk_kda(**{**args, "output_final_state": False})
    assert none is None and torch.equal(o, bare)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
def test_scale(kernel, p, scale):
    check(kernel, p, make(p, T=70, scale=scale))


def test_initial_state_is_left_alone(kernel, p):
    args = make(p, T=70)
    state = make_state(p, args)
    before = state.clone()
    kernel.chunk_kda(**args, initial_state=state)
    assert torch.equal(state, before)


def test_parameters_of_any_shape_and_dtype(kernel, p):
    """Checkpoints hold A_log as [1, 1, H, 1] or [H] and dt_bias flat or [H, K], some in bfloat16."""
    args = make(p, T=40)
    args["A_log"], args["dt_bias"] = args["A_log"].bfloat16().view(1, 1, 2, 1), args["dt_bias"].bfloat16().view(2, p.K)
    check(kernel, p, args)


# --- layouts


def packed_projection(p, args, offset=0):
    """q, k, v, g and beta as column views of one [B, T, columns] tensor, as a fused projection leaves them."""
    parts = {n: args[n].to(p.dtype).flatten(2) for n in ("q", "k", "v", "g")} | {"beta": args["beta"].to(p.dtype)}
    buffer = torch.zeros(
        *args["q"].shape[:2], offset + sum(x.shape[-1] for x in parts.values()) + 8, dtype=p.dtype, device=p.device
    )
    views, column = dict(args), offset
    for name, x in parts.items():
        view = buffer[..., column : column + x.shape[-1]]
        view.copy_(x)
        views[name] = view.view(args[name].shape)
        column += x.shape[-1]
    return views


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_parameters_anywhere_in_memory(kernel, p, function):
    """Parts of a larger buffer start at any multiple of 4 bytes; the kernels read 16 at a time."""
    args = make(p, T=5, H=3)
    expected = getattr(kernel, function)(**args)
    for name in ("A_log", "dt_bias"):
        buffer = torch.cat([args[name].new_zeros(1), args[name]])
        assert buffer[1:].data_ptr() % 16
        args[name] = buffer[1:]
    for actual, first in zip(getattr(kernel, function)(**args), expected):
        assert torch.equal(actual, first)


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("lengths", [None, [33, 64, 3]], ids=["fixed", "packed"])
def test_views_of_a_packed_projection(kernel, p, offset, lengths):
    args = make(p, B=1 if lengths else 2, T=100, H=3, gate="lower_bound", lengths=lengths)
    views = packed_projection(p, args, offset)
    assert not views["q"].is_contiguous()
    o, state = check(kernel, p, views)
    dense, dense_state = kernel.chunk_kda(
        **{n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in views.items()}
    )
    assert torch.equal(o, dense) and torch.equal(state, dense_state)


def test_head_major_layout(kernel, p):
    """[B, H, T, K] memory seen as [B, T, H, K]: the last dimension is contiguous, so it is taken as it is."""
    args = make(p, B=2, T=70, H=3)
    views = {n: args[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v", "g", "beta")}
    check(kernel, p, {**args, **views})


def test_broadcast_rows(kernel, p):
    args = make(p, B=3, T=70)
    args["q"] = args["q"][:1].expand(3, -1, -1, -1)
    args["beta"] = args["beta"][:, :1].expand(-1, 70, -1)
    check(kernel, p, args)


# --- gates and keys at the edge


def extreme(p, case, T=200):
    args = make(p, T=T, gate="given", l2norm=True)
    generator = torch.Generator().manual_seed(3)
    g = args["g"].cpu()
    if case == "A-200":
        g = -200 * torch.nn.functional.softplus(torch.randn(g.shape, generator=generator))
    elif case == "resets":
        g = torch.where(torch.rand(g.shape, generator=generator) < 0.05, -2661.0, 0.01 * g)
    elif case == "token-resets":
        g = torch.where(torch.rand(*g.shape[:3], 1, generator=generator) < 0.05, -2661.0, 0.01 * g)
    elif case == "zero":
        g = torch.zeros_like(g)
    elif case == "minus-infinity":
        g = torch.where(torch.rand(g.shape, generator=generator) < 0.05, -math.inf, 0.01 * g)
    elif case == "slow-then-steep":
        g = torch.where(torch.arange(T)[:, None, None] % 64 < 32, -1e-4, -30.0).expand(g.shape).contiguous()
    return {**args, "g": g.to(p.device)}


@pytest.mark.parametrize("case", ["A-200", "resets", "token-resets", "zero", "minus-infinity", "slow-then-steep"])
def test_extreme_given_gates(kernel, p, case):
    args = extreme(p, case)
    check(kernel, p, {**args, "initial_state": make_state(p, args)})


@pytest.mark.parametrize("gate", ["softplus", "lower_bound"])
@pytest.mark.parametrize("x", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_extreme_raw_gates(kernel, p, gate, x):
    args = make(p, T=90, gate=gate)
    args["g"] = args["g"] + x
    args["A_log"] = torch.full_like(args["A_log"], math.log(200))
    check(kernel, p, {**args, "initial_state": make_state(p, args)})


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_equal_keys(kernel, p, beta):
    """64 equal keys in a row, where powers of the chunk's system blow up and only substitution holds.

    Errors add up along the row of equal keys, and at beta = 2, where each token reflects the state and the inverse of
    the system is full of +-2, more so. The chunk form in fp64 with nothing but its operands rounded to bf16 gives, on
    these inputs, .0066 and .0062 (output, state) at beta = 1 and .0231 and .0234 at beta = 2: the kernel's bounds are
    1.3 to 1.7 times that.
    """
    args = make(p, T=192, gate="given", beta="step", l2norm=False)
    args["k"][:, 64:128] = args["k"][:, 64:65]
    args["g"] = args["g"] * 1e-3
    args["beta"][:, 64:128] = beta
    check(kernel, p, args, tol={1.0: 2, 2.0: 8}[beta] if p.on_kernel else {1.0: 1, 2.0: 20}[beta])


def test_large_values(kernel, p):
    args = make(p, T=100)
    check(kernel, p, {**args, "q": args["q"] * 1e3, "k": args["k"] * 1e3, "v": args["v"] * 1e3})


# --- isolation, determinism, invariance


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
@pytest.mark.parametrize("lengths", [[70, 70, 70], [5, 64, 33], [1, 1, 1]], ids=str)
def test_a_bad_sequence_stays_alone(kernel, p, lengths, name, value):
    args = make(p, lengths=lengths)
    args["initial_state"] = make_state(p, args)
    o, state = kernel.chunk_kda(**args)
    a, b = lengths[0], lengths[0] + lengths[1]
    bad = args[name].clone()
    bad[1 if name == "initial_state" else (0, slice(a, b))] = value
    bad_o, bad_state = kernel.chunk_kda(**{**args, name: bad})
    assert torch.equal(bad_o[:, :a], o[:, :a]) and torch.equal(bad_o[:, b:], o[:, b:])
    assert torch.equal(bad_state[[0, 2]], state[[0, 2]])
    if name != "q":
        assert not torch.equal(bad_state[1], state[1])


@pytest.mark.parametrize("T", [1, 70])
def test_a_bad_row_of_the_batch_stays_alone(kernel, p, T):
    args = make(p, B=3, T=T)
    o, state = kernel.chunk_kda(**args)
    bad = {n: args[n].clone() for n in ("q", "k", "v", "g", "beta")}
    for x in bad.values():
        x[1] = math.nan
    bad_o, bad_state = kernel.chunk_kda(**{**args, **bad})
    assert torch.equal(bad_o[[0, 2]], o[[0, 2]]) and torch.equal(bad_state[[0, 2]], state[[0, 2]])


def test_rows_past_the_last_sequence_do_no_harm(kernel, p):
    lengths = [50, 30]
    args = make(p, T=100)
    for n in ("q", "k", "v", "g", "beta"):
        args[n][:, 80:] = math.nan
    args["cu_seqlens"] = lengths_to_cu(lengths, p.device)
    check(kernel, p, args)


@pytest.mark.parametrize("lengths", [None, [100, 1, 64, 0, 35]], ids=["fixed", "packed"])
def test_two_runs_give_the_same_bits(kernel, p, lengths):
    args = make(p, T=200, H=3, lengths=lengths)
    first, second = kernel.chunk_kda(**args), kernel.chunk_kda(**args)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_batch_invariance(kernel, p, monkeypatch, how):
    """A sequence alone gives the bits it gives packed with others, or as a row of a fixed batch."""
    if how == "environment":
        monkeypatch.setenv("FLASH_KDA_BATCH_INVARIANT", "1")
    options = {"batch_invariant": True} if how == "argument" else {}
    lengths = [100, 7, 100, 64, 100]
    args = make(p, lengths=lengths, **options)
    args["initial_state"] = make_state(p, args)
    o, state = kernel.chunk_kda(**args)
    start = 0
    for n, length in enumerate(lengths):
        span = {name: args[name][:, start : start + length] for name in ("q", "k", "v", "g", "beta")}
        alone = {**args, **span, "cu_seqlens": None, "initial_state": args["initial_state"][n : n + 1]}
        o_alone, state_alone = kernel.chunk_kda(**alone)
        assert torch.equal(o_alone, o[:, start : start + length]) and torch.equal(state_alone[0], state[n])
        start += length
    rows = {
        name: torch.cat([args[name][:, a : a + 100] for a in (0, 107, 271)]) for name in ("q", "k", "v", "g", "beta")
    }
    o_rows, state_rows = kernel.chunk_kda(
        **{**args, **rows, "cu_seqlens": None, "initial_state": args["initial_state"][[0, 2, 4]]}
    )
    assert torch.equal(state_rows, state[[0, 2, 4]]) and torch.equal(o_rows[1], o[0, 107:207])


def test_batch_invariance_shares_no_product(kernel):
    """On the PyTorch path sequences of one length share batched products, unless their bits shall not depend on it."""
    for lengths in (None, [70, 70, 70]):
        args = make(PROFILES[0], B=1 if lengths else 3, T=70, lengths=lengths)
        sizes = []
        for batch_invariant in (False, True):
            tensors = {n: args.get(n) for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens")}
            none = dict.fromkeys(("initial_state", "scale", "lower_bound"))
            flags = {n: args.get(n, False) for n in args if n.startswith("use_")}
            call = kernel.contract.check_call(
                **tensors, **none, **flags, allow_neg_eigval=False, state_v_first=False, batch_invariant=batch_invariant
            )
            sizes.append([group.size for group, _ in kernel.reference.chunked._plan(call)])
        assert sizes == [[3], [1, 1, 1]]


def test_state_carries_a_sequence_on(kernel, p):
    """Two calls joined by the state are one call."""
    args = make(p, T=150, gate="given")
    o, state = oracle(kernel, args)
    head, tail = (
        {**args, **{n: args[n][:, s] for n in ("q", "k", "v", "g", "beta")}} for s in (slice(0, 77), slice(77, None))
    )
    o_head, middle = kernel.chunk_kda(**head)
    o_tail, final = kernel.chunk_kda(**tail, initial_state=middle)
    assert relative_error(torch.cat((o_head, o_tail), 1), o) <= p.tol_o
    assert relative_error(final, state) <= 1.5 * p.tol_s  # two calls round twice


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
def test_the_short_way_to_the_kernel_is_the_checked_one(kernel, monkeypatch, gate):
    """`prefill.attempt` takes a call as it comes, to the same bits; what it cannot take goes the checked way."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    attempt, taken = kernel.prefill.attempt, []

    def watched(*args, **kwargs):
        result = attempt(*args, **kwargs)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(kernel.prefill, "attempt", watched)
    args = make(KERNEL, T=130, H=1, HV=2, gate=gate)
    state = make_state(KERNEL, args)
    calls = [
        (True, args),
        (True, {**args, "initial_state": state, "scale": 0.5, "state_v_first": True}),
        (True, {**args, "cu_seqlens": lengths_to_cu([30, 0, 100], "cuda"), "output_final_state": False}),
        (
            True,
            {
                **args,
                "cu_seqlens": lengths_to_cu([30, 0, 100], "cuda"),
                "cu_seqlens_cpu": lengths_to_cu([30, 0, 100], "cpu"),
            },
        ),
        (False, {**args, "scale": 1}),
        (False, {**args, "beta": args["beta"].double()}),
        (False, {**args, **{n: args[n][:, :0] for n in ("q", "k", "v", "g", "beta")}}),
    ]
    for short, call in calls:
        o, final = kernel.chunk_kda(**call)
        assert taken.pop() == short and not taken
        with monkeypatch.context() as without:
            without.setattr(kernel.prefill, "attempt", lambda *_, **__: None)
            expected_o, expected = kernel.chunk_kda(**call)
        assert torch.equal(o, expected_o)
        assert final is None and expected is None or torch.equal(final, expected)


# --- fused_recurrent_kda


@pytest.mark.parametrize("T", [1, 2, 5, 70])
@pytest.mark.parametrize("gate", GATES)
def test_fused_recurrent(kernel, p, T, gate):
    args = make(p, B=3, T=T, H=1, HV=2, gate=gate)
    args.pop("safe_gate", None)  # not one of its arguments
    args["initial_state"] = make_state(p, args)
    check(kernel, p, args, kernel.fused_recurrent_kda)


def test_fused_recurrent_packed(kernel, p):
    args = make(p, lengths=[1, 0, 1, 4, 1])
    check(kernel, p, {**args, "initial_state": make_state(p, args)}, kernel.fused_recurrent_kda)


def test_decoding_continues_a_prefill(kernel, p):
    args = make(p, T=70)
    o, final = oracle(kernel, args)
    cut = lambda s: {**args, **{n: args[n][:, s] for n in ("q", "k", "v", "g", "beta")}}  # noqa: E731
    _, state = kernel.chunk_kda(**cut(slice(0, 66)))
    for t in range(66, 70):
        step, state = kernel.fused_recurrent_kda(**cut(slice(t, t + 1)), initial_state=state)
        assert relative_error(step, o[:, t : t + 1]) <= 1.5 * p.tol_o
    assert relative_error(state, final) <= 1.5 * p.tol_s


# --- fwd


def fwd_args(p, lower_bound=-5.0, **options):
    """Arguments of `fwd` by name, and those of `chunk_kda` that mean the same."""
    args = make(p, gate="softplus" if lower_bound is None else "lower_bound", state_v_first=True, **options)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens")
    call = {n: args[n] for n in names if n in args} | {"scale": p.K**-0.5, "lower_bound": lower_bound}
    return {**call, "out": torch.full_like(args["v"], 7.0)}, args


@pytest.mark.parametrize("lower_bound", [None, -5.0, -0.5])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fwd(kernel, p, lower_bound, state):
    call, args = fwd_args(p, lower_bound, B=2, T=100, H=2, HV=4)
    args["lower_bound"] = lower_bound
    args["initial_state"] = make_state(p, args, state)
    final = torch.full_like(args["initial_state"], 7.0)
    assert kernel.fwd(**call, initial_state=args["initial_state"], final_state=final) is None
    o, expected = oracle(kernel, args)
    assert relative_error(call["out"], o) <= p.tol_o
    assert relative_error(final, expected) <= max(p.tol_s, 4e-3 if state == torch.bfloat16 else 0)


def test_fwd_in_place(kernel, p):
    """The final state over the initial one, as engines with a state pool call it."""
    call, args = fwd_args(p, lengths=[70, 0, 1, 64])
    args["initial_state"] = make_state(p, args)
    o, expected = oracle(kernel, args)
    state = args["initial_state"].clone()
    kernel.fwd(**call, initial_state=state, final_state=state)
    assert relative_error(call["out"], o) <= p.tol_o and relative_error(state, expected) <= p.tol_s


def test_fwd_as_fla_calls_it(kernel, p):
    call, args = fwd_args(p, T=70)
    final = args["q"].new_empty(1, 2, p.V, p.K, dtype=torch.float32)
    kernel.fwd(
        *(call[n] for n in ("q", "k", "v", "g", "beta", "scale", "out")),
        A_log=call["A_log"],
        dt_bias=call["dt_bias"].view(2, -1),
        lower_bound=call["lower_bound"],
        initial_state=None,
        final_state=final,
        cu_seqlens=None,
    )
    o, state = kernel.chunk_kda(**args)
    assert torch.equal(call["out"], o) and torch.equal(final, state)


def test_fwd_without_final_state_and_scale(kernel, p):
    call, args = fwd_args(p, T=70)
    kernel.fwd(**{**call, "scale": None})
    assert torch.equal(call["out"], kernel.chunk_kda(**args)[0])


def test_fwd_leaves_other_rows_alone(kernel, p):
    call, args = fwd_args(p, T=100)
    call["cu_seqlens"] = args["cu_seqlens"] = lengths_to_cu([20, 0, 45], p.device)
    kernel.fwd(**call)
    assert (call["out"][:, 65:] == 7).all()
    assert relative_error(call["out"][:, :65], oracle(kernel, args)[0][:, :65]) <= p.tol_o


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "misaligned"])
def test_fwd_into_a_view(kernel, p, offset):
    """`out` as columns of a wider buffer: only they are written."""
    call, args = fwd_args(p, T=100)
    wide = call["out"].new_full((1, 100, 2, p.V + 16), 7.0)
    call["out"] = wide[..., offset : offset + p.V]
    kernel.fwd(**call)
    assert relative_error(call["out"], oracle(kernel, args)[0]) <= p.tol_o
    assert (wide[..., :offset] == 7).all() and (wide[..., offset + p.V :] == 7).all()


# --- cu_seqlens whose contents are wrong


@pytest.mark.parametrize(
    "bounds",
    [[0, 50, 1 << 20], [-(1 << 20), 50, 100], [0, 80, 30, 100], [90, 80, 10, -5], [1 << 30] * 4, [100, 0, 100]],
    ids=str,
)
def test_wrong_cu_seqlens_stay_in_bounds(kernel, p, bounds):
    """No access out of bounds, which on the CPU would raise and on the GPU write into the guard rows around `out`."""
    call, _ = fwd_args(p, T=100)
    guarded = call["out"].new_full((1, 300, 2, p.V), 7.0)
    call["out"] = guarded[:, 100:200]
    call["cu_seqlens"] = torch.tensor(bounds, device=p.device)
    states = torch.full((len(bounds) + 1, 2, p.V, p.K), 7.0, device=p.device)
    kernel.fwd(**call, final_state=states[1:-1])
    if p.device == "cuda":
        torch.cuda.synchronize()
    assert (guarded[:, :100] == 7).all() and (guarded[:, 200:] == 7).all()
    assert (states[0] == 7).all() and (states[-1] == 7).all() and states.isfinite().all()


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([1, 50, 100], "cu_seqlens: expected 0 as its first element, got 1"),
        ([0, 60, 50], "cu_seqlens: expected nondecreasing elements, got 60 before 50 at sequence 1"),
        ([0, 50, 101], "cu_seqlens: expected no element past T = 100, got 101"),
    ],
)
def test_validation_on_request(kernel, p, monkeypatch, bounds, message):
    args = make(p, T=100)
    args["cu_seqlens"] = torch.tensor(bounds, device=p.device)
    kernel.chunk_kda(**args)
    monkeypatch.setenv("FLASH_KDA_VALIDATE", "1")
    with pytest.raises(ValueError, match=message):
        kernel.chunk_kda(**args)


# --- random calls


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_calls(kernel, p, data):
    H = data.draw(st.integers(1, 3), "H")
    lengths = data.draw(st.none() | st.lists(st.integers(0, 70), min_size=1, max_size=5), "lengths")
    if lengths is not None and sum(lengths) == 0:
        lengths = [1]
    options = dict(
        B=1 if lengths else data.draw(st.integers(1, 3), "B"),
        T=data.draw(st.integers(1, 90), "T"),
        H=H,
        HV=H * data.draw(st.integers(1, 3), "ratio"),
        lengths=lengths,
        gate=data.draw(st.sampled_from(sorted(GATES)), "gate"),
        beta=data.draw(st.sampled_from(sorted(BETAS)), "beta"),
        l2norm=data.draw(st.booleans(), "l2norm"),
        state_v_first=data.draw(st.booleans(), "state_v_first"),
        batch_invariant=data.draw(st.booleans(), "batch_invariant"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    if not p.on_kernel:
        K, V = data.draw(st.integers(1, 33), "K"), data.draw(st.integers(1, 33), "V")
        p = Profile(p.name, p.device, p.dtype, K, V, p.tol_o, p.tol_s)
    args = make(p, **options)
    if data.draw(st.booleans(), "initial_state"):
        args["initial_state"] = make_state(p, args)
    check(kernel, p, args, tol=1.5)  # sums of a few terms only do not average roundings out


# --- the PyTorch path alone


PYTORCH = PROFILES[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K, V", [(128, 128), (64, 64), (7, 33), (256, 1), (1, 5)])
def test_pytorch_path_dtypes_and_head_dims(kernel, dtype, K, V):
    # the output is rounded to the dtype of q, the state is float32 or float64
    tol_o = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    p = Profile("pytorch", PYTORCH.device, dtype, K, V, tol_o, 1e-14 if dtype == torch.float64 else 2e-6)
    args = make(p, T=100, H=1, HV=2, gate="given")
    if dtype == torch.float64:
        args["g"] = args["g"].double()
    if PYTORCH.device == "cuda" and dtype == torch.bfloat16 and (K, V) == (128, 128):
        pytest.skip("the kernel takes this one")
    check(kernel, p, args)


@pytest.mark.parametrize("lengths", [None, [700, 64, 64, 1, 0, 130]], ids=["fixed", "packed"])
def test_pytorch_path_does_not_depend_on_its_pieces(kernel, monkeypatch, lengths):
    args = make(PYTORCH, T=700, B=1 if lengths else 2, lengths=lengths)
    check(kernel, PYTORCH, args)
    monkeypatch.setattr(kernel.reference.chunked, "PIECE_ELEMENTS", 1)
    check(kernel, PYTORCH, args)


def test_pytorch_path_under_autocast(kernel):
    """Autocast does not reach into the call, as it does not reach into a kernel."""
    args = make(PYTORCH, T=70)
    o, state = kernel.chunk_kda(**args)
    with torch.autocast(PYTORCH.device, dtype=torch.bfloat16):
        cast_o, cast_state = kernel.chunk_kda(**args)
    assert torch.equal(o, cast_o) and torch.equal(state, cast_state)


def test_host_copy_of_cu_seqlens(kernel):
    args = make(PYTORCH, lengths=[5, 70])
    check(kernel, PYTORCH, args)
    o, _ = kernel.chunk_kda(**args)
    with_copy, _ = kernel.chunk_kda(**args, cu_seqlens_cpu=args["cu_seqlens"].cpu())
    assert torch.equal(o, with_copy)


# --- Hopper only


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[180_000 - 200, 200], None], ids=["packed", "fixed"])
def test_offsets_beyond_two_to_the_31(kernel, lengths):
    """T * H * 128 = 2.2e9: the last tokens of a long batch give what they give alone."""
    T, H = 180_000, 96
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)  # noqa: E731
    shape = (1, T, H, 128) if lengths else (900, 200, H, 128)
    args = {n: draw(*shape) for n in "qkvg"} | {"beta": draw(*shape[:3])}
    assert args["q"].numel() > 2**31
    options = dict(
        A_log=torch.zeros(H, device="cuda"),
        use_gate_in_kernel=True,
        lower_bound=-5.0,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        output_final_state=True,
    )
    with torch.no_grad():
        cu_seqlens = lengths_to_cu(lengths, "cuda") if lengths else None
        o, state = kernel.chunk_kda(**args, **options, cu_seqlens=cu_seqlens)
        last = {n: x[-1:, -200:] for n, x in args.items()}
        o_last, state_last = kernel.chunk_kda(**last, **options)
    assert torch.equal(o[-1:, -200:], o_last) and torch.equal(state[-1:], state_last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_graph_replay_reads_cu_seqlens_anew(kernel, monkeypatch, dtype):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = make(KERNEL, lengths=[100, 28, 64, 8])
    args["cu_seqlens"] = args["cu_seqlens"].to(dtype)
    args["initial_state"] = make_state(KERNEL, args)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        kernel.chunk_kda(**args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o, state = kernel.chunk_kda(**args)
    for lengths in ([100, 28, 64, 8], [200, 0, 0, 0], [0, 1, 150, 49], [50, 50, 50, 50]):
        args["cu_seqlens"].copy_(lengths_to_cu(lengths, "cuda", dtype))
        args["q"].mul_(-1)  # and the tensors it was captured on
        graph.replay()
        eager_o, eager_state = kernel.chunk_kda(**args)
        assert torch.equal(o, eager_o) and torch.equal(state, eager_state)
        check(kernel, KERNEL, args)


@pytest.mark.gpu
def test_no_synchronisation(kernel):
    args = make(KERNEL, lengths=[100, 28])
    kernel.chunk_kda(**args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.chunk_kda(**args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["softplus", "lower_bound", "given"])
@pytest.mark.parametrize("lengths", [[1024], [300, 0, 17, 707]], ids=str)
def test_a_thousand_tokens(kernel, gate, lengths, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = make(KERNEL, lengths=lengths, H=4, gate=gate)
    check(kernel, KERNEL, {**args, "initial_state": make_state(KERNEL, args)})


# Tokens: where bits are to depend on nothing else, those of one head go in three slabs, those of eight are streamed
# (test_schedule.py sees to that).
SLABS = 8000


@pytest.mark.gpu
def test_slabs_of_the_workspace(kernel, monkeypatch):
    """One head, whose records go through the workspace in slabs, has the bits that it has among eight."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = make(KERNEL, T=SLABS, H=8, batch_invariant=True)
    args["initial_state"] = make_state(KERNEL, args)
    o, state = kernel.chunk_kda(**args)
    alone = {**args, **{name: args[name][:, :, :1] for name in ("q", "k", "v", "g", "beta")}}
    alone |= {"A_log": args["A_log"][:1], "dt_bias": args["dt_bias"].flatten()[:128]}
    alone["initial_state"] = args["initial_state"][:, :1].contiguous()
    o_alone, state_alone = kernel.chunk_kda(**alone)
    assert torch.equal(o[:, :, :1], o_alone) and torch.equal(state[:, :1], state_alone)


@pytest.mark.gpu
def test_one_long_sequence_of_many_heads(kernel, monkeypatch):
    """Beside short ones, where all that the host knows is their sum: each has the bits that it has alone."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    lengths = [4000, 3, 0, 500]
    args = make(KERNEL, lengths=lengths, H=60)
    o, state = kernel.chunk_kda(**args)
    start = 0
    for n, length in enumerate(lengths):
        span = {name: args[name][:, start : start + length] for name in ("q", "k", "v", "g", "beta")}
        if length:
            o_alone, state_alone = kernel.chunk_kda(**{**args, **span, "cu_seqlens": None})
            assert torch.equal(o[:, start : start + length], o_alone) and torch.equal(state[n], state_alone[0])
        start += length


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["softplus", "lower_bound"])
def test_agrees_with_fla(kernel, gate):
    fla = pytest.importorskip("fla.ops.kda")
    args = make(KERNEL, T=300, H=4, gate=gate)
    args["initial_state"] = make_state(KERNEL, args)
    with torch.no_grad():
        ours, theirs = kernel.chunk_kda(**args), fla.chunk_kda(**args)
    for x, y in zip(ours, theirs):
        assert x.dtype == y.dtype and relative_error(x, y) < 1e-2
