"""The calls that serving engines make, as their sources make them: layouts, dtypes, orders of arguments, padding.

The engines' code is not here; each test builds the tensors as the engine's layer builds them. Heads: 3, 6, 12 and 22 a
rank are what Kimi-K3 and GLM-5 have under tensor parallelism; none but 12 gives beta rows of 16 bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from cases import PROFILES, Profile, lengths_to_cu, oracle, relative_error
from conftest import ROOT

# Prefill with decodes of one token among it, an empty sequence between, and one that ends a chunk
LENGTHS = [70, 1, 0, 64, 1, 1, 33]
HEADS = [3, 6, 12, 22]
# A CPU takes the PyTorch path in float32 on smaller heads; a Hopper GPU the kernel.
P = PROFILES[-1]
by_heads = pytest.mark.parametrize("H", HEADS)


@dataclass
class Step:
    """One engine step: what the layer has in hand before it calls KDA. `rows` of the buffers may be longer than the tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    initial_state: torch.Tensor
    cu_seqlens: torch.Tensor
    tokens: int

    def expected(self, kernel, lower_bound=-5.0, **options):
        gate = {"A_log": self.A_log, "dt_bias": self.dt_bias, "lower_bound": lower_bound, "use_gate_in_kernel": True}
        on = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "state_v_first": True}
        named = {n: getattr(self, n) for n in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")}
        return oracle(kernel, named | gate | on | options)


def make_step(
    p: Profile,
    H: int,
    *,
    lengths=LENGTHS,
    padding: int = 0,
    offsets=torch.int32,
    state_dtype=torch.float32,
    beta_dtype: torch.dtype | None = None,
) -> Step:
    """q, k, v as the three parts of one convolution's output, beta as a column slice of the fused input projection, and
    garbage (NaN) in the `padding` rows behind the last token."""
    generator = torch.Generator().manual_seed(H)
    tokens, D = sum(lengths), p.K
    rows = tokens + padding

    def normal(*shape, dtype=p.dtype):
        return torch.randn(*shape, generator=generator).to(p.device, dtype)

    def view(x):
        return x.view(1, rows, H, D)

    mixed = normal(rows, 3 * H * D)
    projection = normal(rows, 4 * H * D + 13 + H, dtype=beta_dtype or p.dtype)
    g = normal(rows, H * D)
    for buffer in (mixed, projection, g):
        buffer[tokens:] = float("nan")
    q, k, v = (view(x) for x in mixed.split(H * D, dim=-1))
    assert rows < 2 or (not q.is_contiguous() and q.stride(1) == 3 * H * D)
    return Step(
        q,
        k,
        v,
        view(g),
        projection[:, -H:].unsqueeze(0),
        torch.rand(1, 1, H, 1, generator=generator).to(p.device),
        torch.randn(H * D, generator=generator).to(p.device),
        normal(len(lengths), H, D, D, dtype=state_dtype),
        lengths_to_cu(lengths, p.device, offsets),
        tokens,
    )


def call_in_fork_order(kernel, step: Step, lower_bound=-5.0, fwd=None):
    """As vLLM's `_flashkda_prefill`: 14 positional arguments, buffers of its workspace manager."""
    size = kernel.get_workspace_size(step.q.shape[1], step.q.shape[2], len(step.cu_seqlens) - 1)
    out = torch.full_like(step.v, 7.0).contiguous()
    final_state = torch.empty_like(step.initial_state)
    workspace = torch.empty(size, dtype=torch.uint8, device=step.q.device)
    (fwd or kernel.vllm.fwd)(
        step.q,
        step.k,
        step.v,
        step.g,
        step.beta,
        step.q.shape[-1] ** -0.5,
        out,
        workspace,
        step.A_log,
        step.dt_bias.view(-1, step.q.shape[-1]),
        lower_bound,
        step.initial_state,
        final_state,
        step.cu_seqlens,
    )
    return out, final_state


def assert_close(p: Profile, step: Step, got, expected) -> None:
    (o, state), (expected_o, expected_state) = got, expected
    bf16_state = 3e-3 if state.dtype == torch.bfloat16 else 0  # of rounding the state that is handed back
    assert relative_error(o[:, : step.tokens], expected_o[:, : step.tokens]) <= p.tol_o
    assert relative_error(state, expected_state) <= p.tol_s + bf16_state


@by_heads
@pytest.mark.parametrize("lower_bound", [-5.0, None], ids=["bounded", "softplus"])
def test_the_order_of_the_fork(kernel, H, lower_bound):
    step = make_step(P, H)
    assert_close(P, step, call_in_fork_order(kernel, step, lower_bound), step.expected(kernel, lower_bound))


@by_heads
def test_the_order_of_flashkda(kernel, H):
    """As SGLang and FLA call it: the same bits as in the fork's order."""
    step = make_step(P, H, offsets=torch.int64)
    out, final_state = torch.empty_like(step.v).contiguous(), torch.empty_like(step.initial_state)
    scale = step.q.shape[-1] ** -0.5
    inputs = (step.q, step.k, step.v, step.g, step.beta)
    state = {"initial_state": step.initial_state, "final_state": final_state, "cu_seqlens": step.cu_seqlens}
    kernel.fwd(*inputs, scale, out, A_log=step.A_log, dt_bias=step.dt_bias, lower_bound=-5.0, **state)
    for mine, theirs in zip((out, final_state), call_in_fork_order(kernel, step)):
        assert torch.equal(mine, theirs)


@by_heads
def test_strides_change_no_bit(kernel, H):
    step = make_step(P, H)
    dense = Step(**{n: x.contiguous() if isinstance(x, torch.Tensor) else x for n, x in vars(step).items()})
    for mine, theirs in zip(call_in_fork_order(kernel, step), call_in_fork_order(kernel, dense)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_a_buffer_longer_than_its_sequences(kernel, offsets):
    """CUDA-graph padding: token buckets with garbage behind the last token, empty sequences that repeat the end."""
    padded = make_step(P, 6, lengths=[*LENGTHS, 0, 0, 0], padding=86, offsets=offsets)
    o, state = call_in_fork_order(kernel, padded)
    assert_close(P, padded, (o, state), padded.expected(kernel))
    assert (o[:, padded.tokens :] == 7).all()  # rows of no sequence stay as they are
    assert torch.equal(state[-3:], padded.initial_state[-3:])  # an empty sequence hands its state through


def test_a_step_without_a_token(kernel):
    step = make_step(P, 3, lengths=[0, 0], padding=4)
    o, state = call_in_fork_order(kernel, step)
    assert (o == 7).all() and torch.equal(state, step.initial_state)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dtypes(kernel, state_dtype):
    step = make_step(P, 6, state_dtype=state_dtype)
    assert_close(P, step, call_in_fork_order(kernel, step), step.expected(kernel))


def test_the_state_in_place(kernel):
    """`final_state` may be `initial_state`."""
    step = make_step(P, 6)
    expected = step.expected(kernel)
    out = torch.empty_like(step.v).contiguous()
    inputs = (step.q, step.k, step.v, step.g, step.beta)
    state = step.initial_state
    kernel.fwd(*inputs, None, out, step.A_log, step.dt_bias, -5.0, state, state, step.cu_seqlens)
    assert_close(P, step, (out, state), expected)


def test_gate_and_beta_that_are_activated_already(kernel):
    """As the Triton path of Bailing and of the older Kimi Linear layer has them: fp32, decay and step."""
    step = make_step(P, 6, beta_dtype=torch.float32)
    expected = step.expected(kernel)
    shifted = step.g.float() + step.dt_bias.view(6, -1)
    step.g = -5.0 * torch.sigmoid(step.A_log.view(6, 1).exp() * shifted)
    step.beta = step.beta.sigmoid()
    out, final_state = torch.empty_like(step.v).contiguous(), torch.empty_like(step.initial_state)
    inputs = (step.q, step.k, step.v, step.g, step.beta)
    states = (step.initial_state, final_state, step.cu_seqlens)
    activated = {"use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": False}
    kernel.fwd(*inputs, None, out, None, None, None, *states, **activated)
    assert_close(P, step, (out, final_state), expected)


def test_gathering_from_a_pool_and_scattering_back(kernel):
    """Slots of a page pitch, V-first, states of new sequences zero: what engines do around the call today."""
    step = make_step(P, 6, lengths=[70, 1, 33])
    H, D = 6, P.K
    page = H * D * D + 48  # elements from slot to slot, more than a state
    slots = torch.randn(5, page, device=P.device)
    pool = slots[:, : H * D * D].unflatten(1, (H, D, D))
    indices = torch.tensor([4, 1, 2], dtype=torch.int32, device=P.device)
    has_state = torch.tensor([False, True, True], device=P.device)
    step.initial_state = pool[indices.long()] * has_state.view(-1, 1, 1, 1)
    before = slots.clone()
    _, final_state = call_in_fork_order(kernel, step)
    pool[indices.long()] = final_state
    assert relative_error(pool[indices.long()], step.expected(kernel)[1]) <= P.tol_s
    assert torch.equal(slots[[0, 3]], before[[0, 3]]) and torch.equal(slots[:, H * D * D :], before[:, H * D * D :])


# --- the workspace


def test_workspace_size_never_falls(kernel):
    """Engines reserve once, for the largest batch."""
    size = kernel.get_workspace_size
    for H in HEADS:
        for T in (0, 1, 63, 64, 65, 8192, 1 << 20):
            assert size(T, H) <= size(T + 1, H) <= size(T + 1, H, 2)
    assert size(8192, 6) == size(8192, 6, 1)


def test_a_workspace_that_does_not_do(kernel):
    step = make_step(P, 3)
    good = kernel.get_workspace_size(step.q.shape[1], 3, len(LENGTHS))
    out = torch.full_like(step.v, 7.0).contiguous()
    inputs = (step.q, step.k, step.v, step.g, step.beta)
    bytes_of = {"dtype": torch.uint8, "device": P.device}
    for workspace, error, text in (
        (torch.empty(good - 1, **bytes_of), ValueError, rf"workspace: expected shape \[{good}\] or longer"),
        (torch.empty(2 * good, **bytes_of)[::2], ValueError, "workspace: expected shape"),
        (torch.empty(good, device=P.device), TypeError, "workspace: expected dtype torch.uint8"),
        (good, TypeError, "workspace: expected a torch.Tensor, got int"),
    ):
        with pytest.raises(error, match=text):
            states = (step.initial_state, None, step.cu_seqlens)
            kernel.fwd(*inputs, None, out, step.A_log, step.dt_bias, -5.0, *states, workspace=workspace)
    assert (out == 7).all()


@pytest.mark.gpu
def test_the_workspace_is_the_only_scratch(kernel):
    """Nothing is allocated beside it, and it may start at any byte."""
    step = make_step(P, 12)
    size = kernel.get_workspace_size(step.q.shape[1], 12, len(LENGTHS))
    arena = torch.empty(size + 1, dtype=torch.uint8, device="cuda")
    out, final_state = torch.empty_like(step.v).contiguous(), torch.empty_like(step.initial_state)
    inputs = (step.q, step.k, step.v, step.g, step.beta)
    states = (step.initial_state, final_state, step.cu_seqlens)

    def run():
        kernel.fwd(*inputs, None, out, step.A_log, step.dt_bias, -5.0, *states, workspace=arena[1:])

    run()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    assert torch.cuda.max_memory_allocated() - held < 1 << 16  # parameters of a few hundred bytes at most
    assert_close(P, step, (out, final_state), step.expected(kernel))


@pytest.mark.gpu
def test_a_captured_step_replays_other_batches(kernel):
    """One graph for a bucket of tokens and sequences; every replay brings its own lengths."""
    first = make_step(P, 6, lengths=[70, 1, 0, 64, 0], padding=121)
    second = make_step(P, 6, lengths=[3, 128, 1, 1, 60], padding=63)
    size = kernel.get_workspace_size(first.q.shape[1], 6, 5)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    buffers = Step(**{n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in vars(first).items()})
    out, final_state = torch.empty_like(first.v).contiguous(), torch.empty_like(first.initial_state)

    def run():
        s = buffers
        inputs = (s.q, s.k, s.v, s.g, s.beta)
        states = (s.initial_state, final_state, s.cu_seqlens)
        kernel.fwd(*inputs, None, out, s.A_log, s.dt_bias, -5.0, *states, workspace=workspace)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in (second, first):
        for name, x in vars(step).items():
            if isinstance(x, torch.Tensor):
                getattr(buffers, name).copy_(x)
        graph.replay()
        assert_close(P, step, (out, final_state), step.expected(kernel))


# --- vLLM's extension

VLLM = """
import sys, torch
sys.path.insert(0, {tests!r})
from kernels import get_kernel
from test_serving import P, assert_close, call_in_fork_order, make_step

kernel = get_kernel("moonshot/flash-kda", version=1)
kernel.vllm.register()
kernel.vllm.register()
import vllm._flashkda_C  # as vLLM's layer does, before each call
step = make_step(P, 6)
ops = torch.ops._flashkda_C
assert ops.get_workspace_size(200, 6, 7) == kernel.get_workspace_size(200, 6, 7)
assert_close(P, step, call_in_fork_order(kernel, step, fwd=ops.fwd), step.expected(kernel))
step = make_step(P, 6, lengths=[5])
torch.compile(call_in_fork_order, backend="aot_eager", fullgraph=True)(kernel, step, fwd=ops.fwd)
print("ours")
"""

LATE = """
import torch
from kernels import get_kernel
library = torch.library.Library("_flashkda_C", "DEF")
library.define("fwd(Tensor x) -> ()")
get_kernel("moonshot/flash-kda", version=1).vllm.register()
"""


def run_with_vllm(tmp_path, code: str) -> subprocess.CompletedProcess:
    """In a process of its own, with a package that has vLLM's name and an extension that must not be loaded."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "_flashkda_C.py").write_text("raise ImportError('vLLM would run its own kernel')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    code = code.replace("{tests!r}", repr(str(ROOT / "tests")))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_vllm_calls_ours(tmp_path):
    result = run_with_vllm(tmp_path, VLLM)
    assert result.stdout.strip() == "ours", result.stderr[-3000:]


def test_vllm_registered_too_late(tmp_path):
    result = run_with_vllm(tmp_path, LATE)
    assert result.returncode != 0
    assert "RuntimeError: vllm._flashkda_C: expected it not to be loaded yet" in result.stderr
