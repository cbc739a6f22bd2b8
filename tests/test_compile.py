"""`torch.compile` without graph breaks or recompilation, and the registrations of the custom ops."""

import pytest
import torch
from cases import KERNEL, PROFILES, lengths_to_cu, make, make_state, oracle, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(params=PROFILES, ids=lambda p: p.name)
def p(request):
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def compiled(function, backend):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_batch_of_dynamic_length(kernel, p, backend):
    function, counter = compiled(lambda **args: kernel.chunk_kda(**args), backend)
    for T in (130, 97, 1000):
        args = make(p, B=2, T=T)
        args["initial_state"] = make_state(p, args)
        for name in ("q", "k", "v", "g", "beta"):
            torch._dynamo.mark_dynamic(args[name], 1)
        o, state = function(**args)
        eager_o, eager_state = kernel.chunk_kda(**args)
        assert torch.equal(o, eager_o) and torch.equal(state, eager_state)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_packed_batch_of_dynamic_length_and_count(kernel, p, backend):
    function, counter = compiled(lambda **args: kernel.chunk_kda(**args), backend)
    for lengths in ([70, 3, 64], [1, 100], [20] * 7):
        args = make(p, lengths=lengths)
        for name in ("q", "k", "v", "g", "beta"):
            torch._dynamo.mark_dynamic(args[name], 1)
        torch._dynamo.mark_dynamic(args["cu_seqlens"], 0)
        o, state = function(**args)
        eager_o, eager_state = kernel.chunk_kda(**args)
        assert torch.equal(o, eager_o) and torch.equal(state, eager_state)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_inside_a_larger_graph(kernel, p, backend):
    """The call is one node among others, its inputs and outputs are intermediates of the graph."""

    def block(x, weight, args):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, p.K)).unbind(2)
        o, _ = kernel.chunk_kda(**{**args, "q": q, "k": k, "v": v[..., : p.V], "output_final_state": False})
        return o.flatten(2).relu()

    args = make(p, T=70)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(p.device, p.dtype) for s in ((1, 70, 32), (32, 3 * 2 * p.K)))
    function, counter = compiled(block, backend)
    assert relative_error(function(x, weight, args), block(x, weight, args)) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_fwd_in_place(kernel, p, backend):
    args = make(p, lengths=[70, 30], gate="lower_bound", state_v_first=True)
    args["initial_state"] = make_state(p, args)
    o, expected = oracle(kernel, args)

    def step(out, state):
        call = {n: args[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens")}
        kernel.fwd(**call, scale=None, out=out, lower_bound=-5.0, initial_state=state, final_state=state)
        return out + 0

    function, _ = compiled(step, backend)
    out, state = torch.zeros_like(args["v"]), args["initial_state"].clone()
    copy = function(out, state)
    assert torch.equal(copy, out)
    assert relative_error(out, o) <= p.tol_o and relative_error(state, expected) <= p.tol_s


def test_training(kernel, p):
    """Forward and backward are compiled whole; on the GPU the PyTorch path runs, as it does in eager mode."""
    args = make(p, T=70)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")

    def loss(*tensors):
        o, state = kernel.chunk_kda(**{**args, **dict(zip(names, tensors))})
        return o.float().square().sum() + state.square().sum()

    function, counter = compiled(loss, "aot_eager")
    inputs = [args[n].clone().requires_grad_() for n in names]
    ours, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (function, loss))
    assert all(torch.equal(x, y) for x, y in zip(ours, expected))
    assert counter.frame_count == 1


def test_bad_input_still_raises(kernel, p):
    args = make(p, T=70)
    function, _ = compiled(lambda **args: kernel.chunk_kda(**args), "eager")
    with pytest.raises(Exception, match="beta: expected shape"):
        function(**{**args, "beta": args["beta"][:, 1:]})


# --- registrations


def op_arguments(kernel, args):
    options = {n: args.get(n) for n in ("A_log", "dt_bias", "initial_state", "cu_seqlens", "scale", "lower_bound")}
    flags = (
        "use_gate_in_kernel",
        "use_qk_l2norm_in_kernel",
        "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval",
        "state_v_first",
    )
    options |= {n: args.get(n, False) for n in flags}
    return kernel.contract.check_call(*(args[n] for n in ("q", "k", "v", "g", "beta")), **options)


@pytest.mark.parametrize("lengths", [None, [40, 0, 30]], ids=["fixed", "packed"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(kernel, p, lengths, grad):
    args = make(p, T=70, lengths=lengths)
    args["initial_state"] = make_state(p, args)
    if grad:
        for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"):
            args[n].requires_grad_()
    torch.library.opcheck(kernel.dispatch._kda_op, (*op_arguments(kernel, args), True, grad))


def test_opcheck_in_place(kernel, p):
    args = make(p, lengths=[40, 30])
    out, state = torch.zeros_like(args["v"]), make_state(p, args)
    torch.library.opcheck(
        kernel.dispatch._kda_into_op, (*op_arguments(kernel, args), out, state, None, *kernel.contract.PrefillStates())
    )


def test_opcheck_backward(kernel, p):
    args = make(p, T=70)
    args["initial_state"] = make_state(p, args)
    torch.library.opcheck(
        kernel.dispatch._kda_backward_op, (*op_arguments(kernel, args), args["v"].clone(), make_state(p, args, seed=2))
    )


@pytest.mark.gpu
def test_opcheck_prefill(kernel):
    args = make(KERNEL, lengths=[100, 28])
    call = op_arguments(kernel, args)
    cu_seqlens = lengths_to_cu([100, 28], "cuda")
    workspace = torch.empty(kernel.prefill.workspace_size(1, 128, 2, 2, True), dtype=torch.uint8, device="cuda")
    out, state = torch.empty_like(args["v"]), make_state(KERNEL, args)
    dt_bias = args["dt_bias"].view(2, 128)
    tensors = (*call[:5], args["A_log"], dt_bias, None, cu_seqlens, out, state, workspace)
    torch.library.opcheck(kernel._ops.ops.prefill.default, (*tensors, call.scale, None, True, True, True, False, False))
