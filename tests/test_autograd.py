"""Gradients: against finite differences, and against autograd through the recurrence, in float64."""

import pytest
import torch
from cases import BETAS, GATES, PROFILES, Profile, make, make_state, relative_error

# Small head dims keep the recurrence fast; 70 tokens are a whole chunk and a short one.
P = Profile("pytorch", PROFILES[0].device, torch.float64, 6, 5, 0, 0)
TENSORS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def leaves(args):
    return {n: args[n].detach().clone().double().requires_grad_() for n in TENSORS if args.get(n) is not None}


def differentiable(B=1, state=True, **options):
    args = make(P, B=B, **options)
    if state:
        args["initial_state"] = make_state(P, args)
    return args


def gradients(function, args, inputs):
    o, state = function(**{**args, **inputs})
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (o, state)]
    return dict(
        zip(inputs, torch.autograd.grad((o * weights[0]).sum() + (state * weights[1]).sum(), list(inputs.values())))
    )


def compare(kernel, args, tol=1e-12):
    inputs = leaves(args)
    ours = gradients(kernel.chunk_kda, args, inputs)
    only_ours = ("output_final_state", "safe_gate", "batch_invariant")
    expected = gradients(kernel.reference.recurrent_kda, {n: x for n, x in args.items() if n not in only_ours}, inputs)
    for name, grad in ours.items():
        assert relative_error(grad, expected[name]) <= tol, name


@pytest.mark.parametrize("l2norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gate", GATES)
def test_gradients(kernel, gate, beta, l2norm):
    compare(kernel, differentiable(T=70, H=1, HV=2, gate=gate, beta=beta, l2norm=l2norm))


@pytest.mark.parametrize("lengths", [[70, 0, 3, 70], [1, 1, 64]], ids=str)
def test_gradients_packed(kernel, lengths):
    compare(kernel, differentiable(lengths=lengths, H=1, state_v_first=True))


def test_gradients_over_several_pieces(kernel, monkeypatch):
    monkeypatch.setattr(kernel.reference.chunked, "PIECE_ELEMENTS", 1)
    compare(kernel, differentiable(B=2, T=150, H=1))


def test_gradients_with_resets(kernel):
    """A decay that underflows has a zero derivative, not a NaN."""
    args = differentiable(T=70, H=1, gate="given")
    args["g"][0, ::7] = -2661.0
    compare(kernel, args)


def test_gradcheck(kernel):
    args = differentiable(T=3, H=1, gate="softplus")
    inputs = leaves(args)
    assert torch.autograd.gradcheck(
        lambda *xs: kernel.chunk_kda(**{**args, **dict(zip(inputs, xs))}), tuple(inputs.values()), atol=1e-6
    )


def test_only_what_is_asked_for(kernel):
    """Some inputs need a gradient and others not; the final state may be left out of the loss, or of the results."""
    args = differentiable(T=20)
    args |= {n: args[n].double() for n in TENSORS}
    full = gradients(kernel.chunk_kda, {**args, "output_final_state": True}, leaves(args))
    v = args["v"].clone().requires_grad_()
    o, state = kernel.chunk_kda(**{**args, "v": v})
    (grad,) = torch.autograd.grad(o.sum(), v, retain_graph=True)
    bare, none = kernel.chunk_kda(**{**args, "v": v, "output_final_state": False})
    (grad_bare,) = torch.autograd.grad(bare.sum(), v)
    assert none is None and torch.equal(grad, grad_bare) and grad.abs().sum() > 0
    (grad_state,) = torch.autograd.grad(state.sum(), v)
    assert grad_state.abs().sum() > 0 and not torch.equal(grad, grad_state)
    assert full["v"].shape == v.shape


def test_gradients_of_bf16_inputs_keep_their_dtype(kernel):
    p = Profile("pytorch", P.device, torch.bfloat16, 16, 16, 0, 0)
    args = make(p, T=70)
    args["initial_state"] = make_state(p, args)
    inputs = {n: args[n].clone().requires_grad_() for n in TENSORS}
    grads = gradients(kernel.chunk_kda, args, inputs)
    wide = {n: args[n].double().requires_grad_() for n in TENSORS}
    expected = gradients(kernel.chunk_kda, args, wide)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert relative_error(grad, expected[name]) < 1e-2, name


def test_a_bad_sequence_gets_the_bad_gradient_alone(kernel):
    args = differentiable(lengths=[20, 20, 20], H=1)
    good = gradients(kernel.chunk_kda, args, leaves(args))
    args["v"][:, 20:40] = float("nan")
    bad = gradients(kernel.chunk_kda, args, leaves(args))
    for name in ("q", "k", "v", "g", "beta"):
        assert torch.equal(bad[name][:, :20], good[name][:, :20]) and torch.equal(bad[name][:, 40:], good[name][:, 40:])


def test_memory_of_training_does_not_hold_intermediates(kernel):
    """Between forward and backward the graph keeps the inputs and nothing else."""
    args = differentiable(T=300, state=False, gate="given")
    inputs = leaves(args)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernel.chunk_kda(**{**args, **inputs})
    assert {x.data_ptr() for x in kept} <= {x.data_ptr() for x in inputs.values()}
