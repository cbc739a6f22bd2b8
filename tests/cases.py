"""Inputs, options and the comparison with the oracle that the tests of the KDA functions share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Options of each gate mode. "given" gates are log decays; the others raw values that the kernel activates.
GATES = {
    "given": {},
    "given-bf16": {},
    "softplus": {"use_gate_in_kernel": True},
    "lower_bound": {"use_gate_in_kernel": True, "lower_bound": -5.0, "safe_gate": True},
    "lower_bound-no-A": {"use_gate_in_kernel": True, "lower_bound": -2.0},
}
BETAS = {
    "step": {},
    "logits": {"use_beta_sigmoid_in_kernel": True},
    "logits-neg": {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True},
}


@dataclass(frozen=True)
class Profile:
    """A path under test: where it runs, what it takes, and how far it may be from float64 (relative, Frobenius)."""

    name: str
    device: str
    dtype: torch.dtype
    K: int
    V: int
    tol_o: float
    tol_s: float

    @property
    def on_kernel(self) -> bool:
        return self.name == "kernel"


# bf16: the errors of the peers are 4e-3 (output, itself rounded to bf16) and 3e-3 (state). fp32: a few units in the
# last place.
KERNEL = Profile("kernel", "cuda", torch.bfloat16, 128, 128, 5e-3, 4e-3)
PROFILES = [Profile("pytorch", "cuda" if torch.cuda.is_available() else "cpu", torch.float32, 24, 16, 2e-6, 2e-6)]
if torch.cuda.is_available():
    PROFILES.append(KERNEL)


def lengths_to_cu(lengths, device, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def make(
    p: Profile,
    *,
    B=1,
    T=130,
    H=2,
    HV=None,
    gate="softplus",
    beta="logits",
    l2norm=True,
    lengths=None,
    seed=0,
    **options,
):
    """Keyword arguments of `chunk_kda`. ``lengths`` packs sequences (T is their sum); without the norm, keys come
    normalised."""
    generator = torch.Generator().manual_seed(seed)
    HV = HV or H
    if lengths is not None:
        T = sum(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = normal(B, T, H, p.K), normal(B, T, H, p.K), normal(B, T, HV, p.V)
    if not l2norm:  # the step of the delta rule is stable only where |k|^2 beta < 2
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g, b = normal(B, T, HV, p.K), normal(B, T, HV)
    args = {"q": q, "k": k, "v": v, "g": g, "beta": b}
    wide = {"A_log": torch.empty(HV).uniform_(0, 2, generator=generator), "dt_bias": normal(HV * p.K)}
    if gate.startswith("given"):
        args["g"] = -torch.nn.functional.softplus(g) * torch.rand(HV, 1, generator=generator)
        wide["g"] = args.pop("g")
        del wide["A_log"], wide["dt_bias"]
        if gate == "given-bf16":
            wide["g"] = wide["g"].bfloat16()
    if gate.endswith("no-A"):
        del wide["A_log"]
    if beta == "step":
        args["beta"] = b.sigmoid()
    args = {name: x.to(p.device, p.dtype) for name, x in args.items()} | {
        name: x.to(p.device) for name, x in wide.items()
    }
    if lengths is not None:
        args["cu_seqlens"] = lengths_to_cu(lengths, p.device)
    return {
        **args,
        "use_qk_l2norm_in_kernel": l2norm,
        "output_final_state": True,
        **GATES[gate],
        **BETAS[beta],
        **options,
    }


def make_state(p: Profile, args, dtype=torch.float32, seed=1, scale=1.0) -> torch.Tensor:
    N = args["q"].shape[0] if args.get("cu_seqlens") is None else len(args["cu_seqlens"]) - 1
    shape = (p.V, p.K) if args.get("state_v_first") else (p.K, p.V)
    state = torch.randn(N, args["v"].shape[2], *shape, generator=torch.Generator().manual_seed(seed)) * scale
    return state.to(p.device, dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def oracle(kernel, args):
    """``(o, final_state)`` in float64 from the same inputs."""
    only_ours = ("output_final_state", "safe_gate", "batch_invariant")
    with torch.no_grad():
        return kernel.reference.recurrent_kda(**{n: x for n, x in args.items() if n not in only_ours})


def check(kernel, p: Profile, args, function=None, tol=1.0):
    """Runs `chunk_kda` (or ``function``) and compares both results with the oracle, within ``tol`` times the profile's
    bounds."""
    with torch.no_grad():
        o, state = (function or kernel.chunk_kda)(**args)
    expected_o, expected_state = oracle(kernel, args)
    assert o.dtype == args["q"].dtype and o.shape == args["v"].shape
    assert state.dtype == (torch.float64 if args["q"].dtype == torch.float64 else torch.float32)
    tokens = o.shape[1] if args.get("cu_seqlens") is None else int(args["cu_seqlens"][-1])
    covered, expected_o = o[:, :tokens], expected_o[:, :tokens]
    assert covered.isfinite().all() and state.isfinite().all()
    errors = relative_error(covered, expected_o), relative_error(state, expected_state)
    assert errors[0] <= tol * p.tol_o and errors[1] <= tol * p.tol_s, errors
    return o, state
