"""Bad input: an error that names the argument, what was expected and what came, before anything is written."""

import math
import re

import pytest
import torch
from cases import KERNEL, PROFILES, lengths_to_cu, make, make_state

P = KERNEL if KERNEL in PROFILES else PROFILES[0]
B, T, H, HV = 2, 70, 2, 4
OTHER_DEVICE = "cpu" if P.device == "cuda" else "meta"
OTHER_DTYPE = torch.float16


def column_major(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


# name: (change to the arguments of a good call, error, start of the message)
BAD = {
    "q is a list": (lambda a: {"q": a["q"].tolist()}, TypeError, "q: expected a torch.Tensor, got list"),
    "beta is None": (lambda a: {"beta": None}, TypeError, "beta: expected a torch.Tensor, got NoneType"),
    "q rank": (lambda a: {"q": a["q"][0]}, ValueError, r"q: expected rank 4, got shape \[70, 2, "),
    "k rank": (lambda a: {"k": a["k"][None]}, ValueError, r"k: expected rank 4, got shape \[1, 2, 70, 2, "),
    "v rank": (lambda a: {"v": a["v"][0]}, ValueError, r"v: expected rank 4, got shape \[70, 4, "),
    "g rank": (lambda a: {"g": a["g"][..., 0]}, ValueError, r"g: expected rank 4, got shape \[2, 70, 4\]"),
    "beta rank": (
        lambda a: {"beta": a["beta"][..., None]},
        ValueError,
        r"beta: expected rank 3, got shape \[2, 70, 4, 1\]",
    ),
    "k tokens": (
        lambda a: {"k": a["k"][:, 1:]},
        ValueError,
        r"k: expected shape \[2, 70, 2, \d+\] .*, got \[2, 69, 2, ",
    ),
    "k head dim": (
        lambda a: {"k": a["k"][..., :8]},
        ValueError,
        r"k: expected shape \[2, 70, 2, \d+\] .*, got \[2, 70, 2, 8\]",
    ),
    "v tokens": (
        lambda a: {"v": a["v"][:, 1:]},
        ValueError,
        r"v: expected shape \[2, 70, 4, \d+\] .*, got \[2, 69, 4, ",
    ),
    "v batch": (lambda a: {"v": a["v"][:1]}, ValueError, r"v: expected shape \[2, 70, 4, \d+\] .*, got \[1, 70, 4, "),
    "g heads": (
        lambda a: {"g": a["g"][:, :, :2]},
        ValueError,
        r"g: expected shape \[2, 70, 4, \d+\] .*, got \[2, 70, 2, ",
    ),
    "g head dim": (
        lambda a: {"g": a["g"][..., :1]},
        ValueError,
        r"g: expected shape \[2, 70, 4, \d+\] .*, got \[2, 70, 4, 1\]",
    ),
    "beta heads": (
        lambda a: {"beta": a["beta"][..., :2]},
        ValueError,
        r"beta: expected shape \[2, 70, 4\] .*, got \[2, 70, 2\]",
    ),
    "HV not a multiple of H": (
        lambda a: {n: a[n][:, :, :3] for n in ("v", "g", "beta")},
        ValueError,
        "v: expected a number of heads HV that is a multiple of q's H = 2, got HV = 3",
    ),
    "q integer": (lambda a: {"q": a["q"].int()}, TypeError, "q: expected dtype .*bfloat16.*, got torch.int32"),
    "k dtype": (
        lambda a: {"k": a["k"].to(OTHER_DTYPE)},
        TypeError,
        "k: expected dtype .*, that of q, got torch.float16",
    ),
    "v dtype": (
        lambda a: {"v": a["v"].to(OTHER_DTYPE)},
        TypeError,
        "v: expected dtype .*, that of q, got torch.float16",
    ),
    "g integer": (lambda a: {"g": a["g"].long()}, TypeError, "g: expected dtype .*, got torch.int64"),
    "beta bool": (lambda a: {"beta": a["beta"] > 0}, TypeError, "beta: expected dtype .*, got torch.bool"),
    "k device": (
        lambda a: {"k": a["k"].to(OTHER_DEVICE)},
        ValueError,
        f"k: expected device .*, that of q, got {OTHER_DEVICE}",
    ),
    "beta device": (lambda a: {"beta": a["beta"].to(OTHER_DEVICE)}, ValueError, "beta: expected device"),
    "A_log device": (lambda a: {"A_log": a["A_log"].to(OTHER_DEVICE)}, ValueError, "A_log: expected device"),
    "dt_bias device": (lambda a: {"dt_bias": a["dt_bias"].to(OTHER_DEVICE)}, ValueError, "dt_bias: expected device"),
    "state device": (
        lambda a: {"initial_state": a["initial_state"].to(OTHER_DEVICE)},
        ValueError,
        "initial_state: expected device",
    ),
    **{
        f"{n} last dim": (
            lambda a, n=n: {n: column_major(a[n])},
            ValueError,
            rf"{n}: expected a contiguous last dimension \(stride 1\), got strides \[",
        )
        for n in ("q", "k", "v", "g")
    },
    "scale nan": (lambda a: {"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
    "scale text": (lambda a: {"scale": "1"}, TypeError, "scale: expected a number, got str"),
    "lower_bound zero": (
        lambda a: {"lower_bound": 0.0},
        ValueError,
        "lower_bound: expected a finite negative number, got 0.0",
    ),
    "lower_bound positive": (
        lambda a: {"lower_bound": 5},
        ValueError,
        "lower_bound: expected a finite negative number, got 5",
    ),
    "lower_bound inf": (
        lambda a: {"lower_bound": -math.inf},
        ValueError,
        "lower_bound: expected a finite negative number, got -inf",
    ),
    "lower_bound nan": (
        lambda a: {"lower_bound": math.nan},
        ValueError,
        "lower_bound: expected a finite negative number, got nan",
    ),
    "safe_gate alone": (lambda a: {"safe_gate": True}, ValueError, "lower_bound: expected .* safe_gate=True, got None"),
    "A_log missing": (lambda a: {"A_log": None}, ValueError, "A_log: expected HV elements, .*, got None"),
    "A_log size": (
        lambda a: {"A_log": a["A_log"][:2]},
        ValueError,
        r"A_log: expected 4 elements \(HV\), got shape \[2\]",
    ),
    "dt_bias size": (
        lambda a: {"dt_bias": a["dt_bias"][:4]},
        ValueError,
        r"dt_bias: expected \d+ elements \(HV \* K\), got shape \[4\]",
    ),
    "allow_neg_eigval alone": (
        lambda a: {"allow_neg_eigval": True, "use_beta_sigmoid_in_kernel": False},
        ValueError,
        "allow_neg_eigval: expected False, or use_beta_sigmoid_in_kernel=True",
    ),
    "state count": (
        lambda a: {"initial_state": a["initial_state"][:1]},
        ValueError,
        r"initial_state: expected shape \[2, 4, .*N = 2 sequences\), got \[1, 4, ",
    ),
    "state layout": (
        lambda a: {"initial_state": a["initial_state"][..., :-1]},
        ValueError,
        r"initial_state: expected shape \[2, 4, .*\(\[N, HV, .*N = 2 sequences\), got \[2, 4, ",
    ),
    "state dtype": (
        lambda a: {"initial_state": a["initial_state"].half()},
        TypeError,
        "initial_state: expected dtype torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "cu_seqlens with a batch": (
        lambda a: {"cu_seqlens": lengths_to_cu([70], P.device)},
        ValueError,
        r"q: expected batch size 1 with cu_seqlens .*, got batch size 2",
    ),
    "cu_seqlens dtype": (
        lambda a: {"cu_seqlens": torch.tensor([0.0, 70.0], device=P.device)},
        TypeError,
        "cu_seqlens: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    "cu_seqlens list": (lambda a: {"cu_seqlens": [0, 70]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
    "cu_seqlens rank": (
        lambda a: {"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32, device=P.device)},
        ValueError,
        r"cu_seqlens: expected shape \[N \+ 1\], got shape \[1, 2\]",
    ),
    "cu_seqlens empty": (
        lambda a: {"cu_seqlens": torch.zeros(0, dtype=torch.int32, device=P.device)},
        ValueError,
        r"cu_seqlens: expected shape \[N \+ 1\], got shape \[0\]",
    ),
    "cu_seqlens device": (
        lambda a: {"cu_seqlens": lengths_to_cu([70], P.device).to(OTHER_DEVICE)},
        ValueError,
        "cu_seqlens: expected device",
    ),
    "cu_seqlens_cpu alone": (
        lambda a: {"cu_seqlens_cpu": torch.tensor([0, 70])},
        ValueError,
        "cu_seqlens_cpu: expected cu_seqlens",
    ),
    "chunk_size": (lambda a: {"chunk_size": 128}, ValueError, "chunk_size: expected 32 or 64, got 128"),
    "unknown keyword": (lambda a: {"use_gate": True}, TypeError, ".*unexpected keyword argument 'use_gate'"),
    "context parallel": (lambda a: {"cp_context": object()}, NotImplementedError, "cp_context: "),
    "intermediate states": (
        lambda a: {"return_intermediate_states": True},
        NotImplementedError,
        "return_intermediate_states: ",
    ),
    "both state layout names": (
        lambda a: {"state_v_first": True, "transpose_state_layout": True},
        ValueError,
        "transpose_state_layout: ",
    ),
}
# Not arguments of the other two functions
ONLY_CHUNK = {"safe_gate alone", "cu_seqlens_cpu alone", "chunk_size", "context parallel", "intermediate states"}
NOT_FWD = ONLY_CHUNK | {"allow_neg_eigval alone", "both state layout names"}


def good_args(**options):
    args = make(P, B=B, T=T, H=H, HV=HV, **options)
    return {**args, "initial_state": make_state(P, args)}


@pytest.mark.parametrize("case", BAD)
def test_chunk_kda(kernel, case):
    change, error, message = BAD[case]
    args = good_args()
    kernel.chunk_kda(**args)
    with pytest.raises(error, match="^" + message):
        kernel.chunk_kda(**{**args, **change(args)})


@pytest.mark.parametrize("case", [c for c in BAD if c not in ONLY_CHUNK])
def test_fused_recurrent_kda(kernel, case):
    change, error, message = BAD[case]
    args = good_args()
    with pytest.raises(error, match="^" + message):
        kernel.fused_recurrent_kda(**{**args, **change(args)})


def fwd_call():
    args = good_args(state_v_first=True)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
    written = {"out": torch.full_like(args["v"], 7.0), "final_state": torch.full_like(args["initial_state"], 7.0)}
    return {n: args[n] for n in names} | {"scale": None, "lower_bound": None} | written


BAD_OUTPUTS = {
    "out missing": (lambda a: {"out": None}, TypeError, "out: expected a torch.Tensor, got NoneType"),
    "out shape": (
        lambda a: {"out": a["out"][:, 1:]},
        ValueError,
        r"out: expected shape \[2, 70, 4, \d+\] .*, got \[2, 69, ",
    ),
    "out dtype": (lambda a: {"out": a["out"].half()}, TypeError, "out: expected dtype .*, got torch.float16"),
    "out device": (lambda a: {"out": a["out"].to(OTHER_DEVICE)}, ValueError, "out: expected device"),
    "out last dim": (
        lambda a: {"out": column_major(a["out"])},
        ValueError,
        "out: expected a contiguous last dimension",
    ),
    "final_state count": (
        lambda a: {"final_state": a["final_state"][:1]},
        ValueError,
        r"final_state: expected shape \[2, 4, .*V-first.*, got \[1, 4, ",
    ),
    "final_state dtype": (lambda a: {"final_state": a["final_state"].half()}, TypeError, "final_state: expected dtype"),
    "final_state strides": (
        lambda a: {"final_state": column_major(a["final_state"])},
        ValueError,
        "final_state: expected a contiguous tensor",
    ),
}


@pytest.mark.parametrize("case", [*(c for c in BAD if c not in NOT_FWD), *BAD_OUTPUTS])
def test_fwd_writes_nothing(kernel, case):
    change, error, message = {**BAD, **BAD_OUTPUTS}[case]
    call = fwd_call()
    before = {n: call[n].clone() for n in ("initial_state", "out", "final_state")}
    with pytest.raises(error, match="^" + message):
        kernel.fwd(**{**call, **change(call)})
    assert all(torch.equal(call[n], x) for n, x in before.items())


def test_a_good_fwd_call_writes(kernel):
    """Or the test above could not fail."""
    call = fwd_call()
    kernel.fwd(**call)
    assert not (call["out"] == 7).any() and not (call["final_state"] == 7).all()


# --- what FLA accepts is accepted, with its meaning


def test_signatures_are_flas(kernel):
    """The names that `fla-core` 0.6.0 takes by position, in its order."""
    import inspect

    def positional(function):
        return [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert (
        positional(kernel.chunk_kda)
        == (
            "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
            "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states "
            "state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs"
        ).split()
    )
    assert (
        positional(kernel.fused_recurrent_kda)
        == (
            "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
            "use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens"
        ).split()
    )
    assert (
        positional(kernel.fwd)
        == ("q k v g beta scale out A_log dt_bias lower_bound initial_state final_state cu_seqlens").split()
    )


def test_options_without_effect(kernel):
    args = good_args()
    o, state = kernel.chunk_kda(**args)
    other_o, other_state = kernel.chunk_kda(
        **args, disable_recompute=True, use_graph=True, max_num_seqs=9, chunk_size=32
    )
    assert torch.equal(o, other_o) and torch.equal(state, other_state)


def test_gate_arguments_are_not_read_for_a_given_gate(kernel):
    args = good_args(gate="given")
    o, _ = kernel.chunk_kda(**args)
    other, _ = kernel.chunk_kda(**args, safe_gate=True, lower_bound=-5.0, A_log=torch.zeros(1), dt_bias=torch.zeros(1))
    assert torch.equal(o, other)


def test_lower_bound_decides_the_gate_whatever_safe_gate_says(kernel):
    args = good_args(gate="lower_bound")
    o, _ = kernel.chunk_kda(**args)
    other, _ = kernel.chunk_kda(**{**args, "safe_gate": False})
    assert torch.equal(o, other)
    softplus, _ = kernel.chunk_kda(**{**args, "safe_gate": False, "lower_bound": None})
    assert not torch.equal(o, softplus)


def test_graph_wants_the_sequence_count_it_was_promised(kernel):
    args = make(P, lengths=[3, 4])
    kernel.chunk_kda(**args, use_graph=True, max_num_seqs=2)
    with pytest.raises(ValueError, match="max_num_seqs: expected the 2 sequences of cu_seqlens, got 3"):
        kernel.chunk_kda(**args, use_graph=True, max_num_seqs=3)


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_deprecated_state_layout_name(kernel, name):
    args = make(P, T=20)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        _, state = getattr(kernel, name)(**args, transpose_state_layout=True)
    assert torch.equal(state.mT, getattr(kernel, name)(**args)[1])


def test_public_names(kernel):
    assert {"chunk_kda", "fused_recurrent_kda", "fwd", "layers", "kernel_mapping"} <= set(kernel.__all__)
    for name in kernel.__all__:
        assert getattr(kernel, name).__doc__


def test_every_argument_is_documented(kernel):
    import inspect

    parameters = inspect.signature(kernel.chunk_kda).parameters
    undocumented = [
        n for n in parameters if not re.search(rf"^        (\w+, )*{n}(, \w+)*:", kernel.chunk_kda.__doc__, re.M)
    ]
    assert not undocumented
