"""One small call of each mode of the kernels, for compute-sanitizer: `test_sanitizer.py` runs it."""

import functools
import os

import torch
from kernels import get_kernel

os.environ["FLASH_KDA_STRICT"] = "1"  # falling back would check nothing
kernel = get_kernel("moonshot/flash-kda", version=1)


def decode(B, T, *, v_first, state, gate="lower_bound", pool=True, cu_seqlens=None):
    """A call of the decode kernel with three value heads a head, on a pool with padding rows or on states of its own."""
    H, HV = 1, 3
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    normal = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    args = dict(
        q=normal(B, T, H, 128).bfloat16(),
        k=normal(B, T, H, 128).bfloat16(),
        v=normal(B, T, HV, 128).bfloat16(),
        g=-normal(B, T, HV, 128).abs(),
        beta=normal(B, T, HV).bfloat16(),
        A_log=normal(HV),
        dt_bias=normal(HV * 128),
        use_gate_in_kernel=gate != "given",
        lower_bound=-5.0 if gate == "lower_bound" else None,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        state_v_first=v_first,
        cu_seqlens=cu_seqlens,
    )
    if not pool:
        return kernel.fused_recurrent_kda(
            **args, initial_state=normal(N, HV, 128, 128).to(state), output_final_state=True
        )
    slots = torch.arange(N * T, device="cuda", dtype=torch.int32).view(N, T)
    slots[-1] = torch.tensor([-1, 1 << 30], device="cuda")[slots[-1] % 2]
    return kernel.fused_recurrent_kda(
        **args,
        initial_state=normal(N * T, HV, 128, 128).to(state),
        inplace_final_state=True,
        ssm_state_indices=slots,
        num_accepted_tokens=torch.full((N,), 99, device="cuda"),
        token_states=torch.empty(B, T, HV, 128, 128, device="cuda"),
    )


def call(H, HV, *, B=1, T=200, N=1, gate="lower_bound", g=torch.bfloat16, beta=torch.bfloat16, state=torch.float32,
         raw=True, neg=False, v_first=False, cu_seqlens=None, forgetful=False, invariant=False):  # fmt: skip
    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    beta_values = normal(B, T, HV)
    args = dict(
        q=normal(B, T, H, 128).bfloat16(),
        k=(normal(B, T, H, 128) * (1 if raw else 128**-0.5)).bfloat16(),
        v=normal(B, T, HV, 128).bfloat16(),
        g=(-normal(B, T, HV, 128).abs() if gate == "given" else normal(B, T, HV, 128)).to(g),
        beta=(beta_values if raw else beta_values.sigmoid()).to(beta),
        initial_state=normal(N, HV, 128, 128).to(state),
        output_final_state=True,
        use_gate_in_kernel=gate != "given",
        use_qk_l2norm_in_kernel=raw,
        use_beta_sigmoid_in_kernel=raw,
        allow_neg_eigval=neg,
        state_v_first=v_first,
        cu_seqlens=cu_seqlens,
        batch_invariant=invariant,
    )
    if forgetful:
        args["g"] += -3 if gate == "given" else 5
    if gate != "given":
        args |= dict(A_log=normal(HV), dt_bias=normal(HV * 128))
    if gate == "lower_bound":
        args |= dict(lower_bound=-5.0)
    with torch.no_grad():
        for result in kernel.chunk_kda(**args):
            assert torch.isfinite(result).all()


def pooled_prefill(H, T, N, *, state, v_first, checkpoints=False):
    """A prefill on a pool with padding rows and new sequences, that leaves states in it on its way if asked."""
    normal = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    bounds = torch.linspace(0, T, N + 1, device="cuda").int()
    pool = torch.randn(2 * N + 2, H, 128, 128, device="cuda").to(state)
    slots = torch.arange(N, device="cuda") - 1  # the first is padding
    options = {}
    if checkpoints:
        offsets = torch.tensor([64, 48, 128, 1 << 40] * N, device="cuda").view(N, 4)
        options = dict(checkpoint_state=pool, checkpoint_offsets=offsets)
        options["checkpoint_indices"] = torch.arange(N, 5 * N, device="cuda").view(N, 4)
    kernel.fwd(
        *(normal(1, T, H, 128) for _ in range(4)), normal(1, T, H), None, normal(1, T, H, 128),
        torch.zeros(H, device="cuda"), None, -5.0, pool, pool, bounds,
        ssm_state_indices=slots, has_initial_state=slots % 2 == 0, state_v_first=v_first, **options,
    )  # fmt: skip
    assert pool.isfinite().all()


def layer_calls():
    """The kernels around KDA: states in place, packed and whole runs, inputs that are views, tails of every kind."""

    def normal(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    with torch.no_grad():
        for width, columns in ((2, 1), (3, 3), (4, 4)):
            state, weight, bias = normal(4, 3 * 72, columns), normal(3 * 72, width), normal(3 * 72)
            offsets = torch.tensor([0, 0, 1, 30, 43], device="cuda")
            packed = kernel.short_conv(
                normal(1, 45, 3 * 72).chunk(3, -1), weight, bias, "silu",
                initial_state=state, final_state=state, cu_seqlens=offsets,
            )  # fmt: skip
            assert all(y.isfinite().all() for y in packed) and state.isfinite().all()
            for T in (1, 5, 77):
                y = kernel.short_conv(normal(4, T, 3 * 72), weight.float(), initial_state=state, final_state=state)
                assert y.isfinite().all() and state.isfinite().all()
        for channels in (64, 128, 256):
            assert (
                kernel.gated_rms_norm(normal(3, 7, channels), normal(3, 7, channels), normal(channels)).isfinite().all()
            )
        for depth, rows in ((72, 1), (128, 11), (2304, 32)):
            modules = [torch.nn.Linear(depth, n, bias=False, device="cuda", dtype=torch.bfloat16) for n in (16, 40, 3)]
            for y in kernel.linears.linears(modules, (normal(rows, 1, depth),) * 3, True):
                assert y.isfinite().all()
        for N, H in ((2, 3), (9, 16)):  # a cluster a head, a CTA a head
            C = 128 * H
            conv_state, state = normal(N, 3 * C, 4), torch.randn(N, H, 128, 128, device="cuda")
            gate = (torch.randn(H, device="cuda"), torch.randn(C, device="cuda"), None)
            y = kernel.step.step(
                *normal(4, N, 1, C), normal(N, 1, H), normal(N, 1, C), normal(3 * C, 4), conv_state, *gate, state,
                normal(128), 1e-5,
            )  # fmt: skip
            assert y.isfinite().all() and state.isfinite().all() and conv_state.isfinite().all()
            linear = functools.partial(torch.nn.Linear, bias=False, device="cuda", dtype=torch.bfloat16)
            gates = [(linear(72, 128), linear(128, C)) for _ in range(2)]
            conv = torch.nn.Conv1d(3 * C, 3 * C, 4, groups=3 * C, bias=False, device="cuda", dtype=torch.bfloat16)
            y = kernel.step.whole_step(
                normal(N, 1, 72), [linear(72, C) for _ in range(3)], *gates, linear(72, H), linear(C, 72), conv,
                conv_state, *gate, state, normal(128), 1e-5,
            )  # fmt: skip
            assert y.isfinite().all() and state.isfinite().all() and conv_state.isfinite().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    packed = torch.tensor([0, 0, 1, 70, 200], device="cuda")
    call(3, 6, N=4, neg=True, cu_seqlens=packed.int())  # GVA, empty and one-token sequences, two CTAs a head
    call(2, 2, N=4, gate="softplus", v_first=True, cu_seqlens=packed)
    call(25, 100, T=130, gate="softplus")  # enough heads for the fused kernel
    call(40, 40, T=200, N=4, g=torch.float32, gate="given", state=torch.bfloat16, cu_seqlens=packed)
    call(1, 1, gate="given", raw=False, beta=torch.float32, state=torch.bfloat16)
    call(1, 3, B=2, N=2, T=65, gate="given", g=torch.float32)
    call(70, 70, T=130)  # one CTA a head
    call(1, 1, T=64 * 66, invariant=True)  # two slabs beside each other
    call(1, 1, T=3390, gate="softplus")  # streamed, in three segments
    call(1, 2, B=2, N=2, T=3390, state=torch.bfloat16, v_first=True)
    call(64, 64, T=820)  # streamed, two chains a walker
    call(48, 48, T=1100)  # streamed, groups of producers go from walker to walker
    call(20, 20, T=1400)  # streamed, two CTAs a walker
    call(70, 70, B=2, N=2, T=200)  # chains shared by two CTAs
    lengths = torch.tensor([600, *[1] * 7], device="cuda")  # too unequal for the fused kernel
    call(32, 32, T=607, N=8, cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int())
    for gate, g in (("lower_bound", torch.bfloat16), ("given", torch.float32)):  # cut into pieces, or not
        for forgetful in (True, False):
            call(1, 1, T=5100, gate=gate, g=g, forgetful=forgetful)
    for state, v_first in ((torch.float32, True), (torch.bfloat16, False)):
        pooled_prefill(50, 600, 4, state=state, v_first=v_first)  # the fused kernel
        pooled_prefill(2, 600, 4, state=state, v_first=v_first)
        for H in (2, 70):
            pooled_prefill(H, 600, 4, state=state, v_first=v_first, checkpoints=True)
    layer_calls()
    with torch.no_grad():
        for v_first in (False, True):
            for state in (torch.float32, torch.bfloat16):
                decode(3, 6, v_first=v_first, state=state)  # a slice a CTA, two groups of tokens
                decode(60, 1, v_first=v_first, state=state, gate="softplus")  # a head a CTA
                decode(1, 9, v_first=v_first, state=state, gate="given", pool=False, cu_seqlens=packed[:4].clamp(max=9))
    torch.cuda.synchronize()
