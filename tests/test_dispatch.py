"""Which path a call takes, and what is said about it."""

import logging
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import KERNEL, PROFILES, make, make_state
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"q": (1, 70, 2, 128), "k": (1, 70, 2, 128), "v": (1, 70, 4, 128), "g": (1, 70, 4, 128), "beta": (1, 70, 4)}


@pytest.fixture
def hopper_call(kernel, monkeypatch):
    """Makes calls on tensors that say they are on a Hopper GPU, with a CUDA build; they can be judged but not run."""
    monkeypatch.setattr(kernel.dispatch, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel.prefill, "AVAILABLE", True)

    def build(device="cuda", dtype=torch.bfloat16, g_dtype=None, dim=128):
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = {
                n: torch.empty(
                    *(dim if s == 128 else s for s in shape),
                    dtype=g_dtype or dtype if n == "g" else dtype,
                    device=device,
                )
                for n, shape in SHAPES.items()
            }
        off = dict.fromkeys(("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel"), False)
        none = dict.fromkeys(("A_log", "dt_bias", "initial_state", "cu_seqlens", "scale", "lower_bound"))
        return kernel.contract.check_call(**tensors, **off, **none, allow_neg_eigval=False, state_v_first=False)

    return build


@pytest.mark.parametrize("g_dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_is_selected(kernel, hopper_call, g_dtype):
    assert kernel.dispatch.select(hopper_call(g_dtype=g_dtype), needs_grad=False)[0] == kernel.dispatch.CUDA_PREFILL


@pytest.mark.parametrize(
    "options, needs_grad, reason",
    [
        ({"device": "cpu"}, False, "the tensors are on cpu"),
        ({}, True, "an input requires a gradient"),
        ({"dtype": torch.float32}, False, "bfloat16 q, k and v, got torch.float32"),
        ({"dtype": torch.float16}, False, "bfloat16 q, k and v, got torch.float16"),
        ({"g_dtype": torch.float16}, False, "bfloat16 or float32 g, got torch.float16"),
        ({"dim": 64}, False, "head dims K = V = 128, got 64 and 64"),
    ],
    ids=str,
)
def test_the_pytorch_path_is_selected(kernel, hopper_call, options, needs_grad, reason):
    path, said = kernel.dispatch.select(hopper_call(**options), needs_grad)
    assert path == kernel.dispatch.PYTORCH and reason in said


def test_other_gpus_and_builds(kernel, hopper_call, monkeypatch):
    call = hopper_call()
    monkeypatch.setattr(kernel.dispatch, "_capability", lambda device: (10, 0))
    assert "the device has 10.0" in kernel.dispatch.select(call, False)[1]
    monkeypatch.setattr(kernel.prefill, "AVAILABLE", False)
    assert "no CUDA kernels" in kernel.dispatch.select(call, False)[1]


def test_one_warning_a_reason(kernel, hopper_call, monkeypatch):
    monkeypatch.setattr(kernel.dispatch, "_warned", set())
    monkeypatch.setattr(kernel.dispatch, "chunked_forward", lambda *args: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in ({"dim": 64}, {"dim": 64}, {"dtype": torch.float32}, {"dim": 64}):
            kernel.dispatch.run(hopper_call(**options), None, None)
    assert [str(w.message).split(": ")[1].split(",")[0] for w in caught] == [
        "the kernel takes head dims K = V = 128",
        "the kernel takes bfloat16 q",
    ]


def test_strict_makes_it_an_error(kernel, hopper_call, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    with pytest.raises(RuntimeError, match="FLASH_KDA_STRICT=1 .* head dims K = V = 128, got 64 and 64"):
        kernel.dispatch.run(hopper_call(dim=64), None, None)


def test_a_cpu_says_nothing_and_is_not_strict(kernel, monkeypatch):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in make(PROFILES[0], T=5).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.chunk_kda(**args)


def test_the_log_says_what_ran(kernel, caplog):
    args = make(PROFILES[0], T=5)
    with caplog.at_level(logging.INFO, logger="flash_kda"):
        kernel.chunk_kda(**args)
    assert [r.message.split(":")[0] for r in caplog.records] == [kernel.dispatch.PYTORCH]


@pytest.mark.gpu
def test_the_log_says_that_the_kernel_ran(kernel, caplog):
    with caplog.at_level(logging.INFO, logger="flash_kda"):
        kernel.chunk_kda(**make(KERNEL, T=5))
    assert [r.message.split(":")[0] for r in caplog.records] == [kernel.dispatch.CUDA_PREFILL]


@pytest.mark.gpu
def test_the_gpu_falls_back_with_a_warning(kernel, monkeypatch):
    args = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in make(PROFILES[0], T=5).items()}
    monkeypatch.setattr(kernel.dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match="the slower PyTorch path: the kernel takes bfloat16"):
        kernel.chunk_kda(**args)
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    with pytest.raises(RuntimeError, match="FLASH_KDA_STRICT"):
        kernel.chunk_kda(**args)


# --- the straight way


def test_the_environment_is_read_at_each_call(kernel, monkeypatch):
    """As `in os.environ` would, whatever way a variable came and went."""
    for name, is_set in (
        ("FLASH_KDA_VALIDATE", kernel.prefill.validates),
        ("FLASH_KDA_BATCH_INVARIANT", kernel.prefill.batch_invariant),
    ):
        monkeypatch.delenv(name, raising=False)
        assert not is_set()
        monkeypatch.setenv(name, "0")
        assert is_set()
        del os.environ[name]
        assert not is_set()
        os.environ[name] = "1"
        assert is_set()
        os.environ.pop(name)
        assert not is_set()


def test_flags_are_those_of_the_ops(kernel):
    """The bits of an op's `flags` have the same names and values in Python and C++."""
    source = (ROOT / "torch-ext" / "torch_binding.cpp").read_text()
    flags = dict(re.findall(r"k(\w+) = (\d+),", re.search(r"enum Flag .*?{(.*?)}", source, re.DOTALL)[1]))
    assert len(flags) == 7
    for name, bit in flags.items():
        ours = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert getattr(kernel.prefill, ours) == int(bit), ours
    assert sum(map(int, flags.values())) == 2 ** len(flags) - 1


@pytest.mark.gpu
def test_the_ops_refuse_before_they_write(kernel):
    """What the checked way would name or prepare."""
    args = make(KERNEL, T=2, H=1, HV=2, gate="lower_bound")
    tensors = [args[n] for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    state = torch.zeros(1, 2, 128, 128, device="cuda")
    gate, neg = kernel.prefill.USE_GATE_IN_KERNEL, kernel.prefill.ALLOW_NEG_EIGVAL

    def inplace(flags, state):
        return flags | (kernel.prefill.INPLACE_FINAL_STATE if state is not None else 0)

    def prefill(*tensors, scale=None, lower_bound=-5.0, flags=gate, state=None, cu=None, cpu=None):
        return kernel._ops.ops.prefill_new(*tensors, state, cu, cpu, None, scale, lower_bound, inplace(flags, state))

    def decode(*tensors, scale=None, lower_bound=-5.0, flags=gate, state=None, cu=None):
        return kernel._ops.ops.decode_new(
            *tensors, state, cu, None, None, None, None, scale, lower_bound, inplace(flags, state), 0
        )

    for op in (prefill, decode):
        op(*tensors)
        for wrong in (
            {"scale": float("nan")},
            {"lower_bound": 0.0},
            {"lower_bound": float("-inf")},
            {"flags": gate | neg},
            {"state": state[:0]},
            {"state": state.half()},
            {"cu": torch.zeros(2, device="cuda")},
        ):
            with pytest.raises(RuntimeError):
                op(*tensors, **{"state": state, **wrong})
            assert not state.any()
        for n, x in enumerate(tensors):
            with pytest.raises(RuntimeError):
                op(*tensors[:n], x.double(), *tensors[n + 1 :], state=state)
            assert not state.any()
    cu = torch.tensor([0, 2], device="cuda")
    for wrong in (cu, cu.cpu().double(), cu.cpu()[:1], torch.tensor([[0, 2]]), torch.tensor([0, 1, 1, 2])[::3]):
        with pytest.raises(RuntimeError, match="cu_seqlens_cpu"):
            prefill(*tensors, state=state, cu=cu, cpu=wrong)
        assert not state.any()
    with pytest.raises(RuntimeError, match="cu_seqlens_cpu"):
        prefill(*tensors, state=state, cpu=cu.cpu())
    with pytest.raises(RuntimeError, match="no tokens"):
        prefill(*(x[:, :0] for x in tensors[:5]), *tensors[5:])
    assert not state.any()


@pytest.mark.gpu
@torch.no_grad()
def test_many_tokens_go_straight(kernel, monkeypatch):
    """A recurrent call of many tokens, into the caller's tensors too, takes the prefill's op without the checked way, and has
    its bits."""
    args = make(KERNEL, B=2, T=70, H=2, HV=4)
    args["initial_state"] = make_state(KERNEL, args)
    args.pop("output_final_state", None)
    expected = kernel.chunk_kda(**args, output_final_state=True)
    monkeypatch.setattr(kernel.prefill, "run", None)
    for o, state in (
        kernel.fused_recurrent_kda(**args | {"output_final_state": True}),
        kernel.fused_recurrent_kda(**args | {"output_final_state": True, "out": torch.empty_like(args["v"])}),
        kernel.fused_recurrent_kda(**args | {"initial_state": args["initial_state"].clone()}, inplace_final_state=True),
    ):
        assert torch.equal(o, expected[0]) and torch.equal(state, expected[1])


# --- what the kernel is handed


def test_workspace_size(kernel):
    size, record, state = kernel.prefill.workspace_size, kernel.prefill.RECORD_BYTES, kernel.prefill.STATE_BYTES
    flag = kernel.prefill.FLAG_BYTES
    assert size(1, 0, 1, 1, False) == flag + 2 * state
    assert size(1, 64, 1, 1, False) == flag + 2 * state + record
    assert size(1, 65, 1, 1, False) == flag + 2 * state + 2 * record
    assert size(3, 65, 3, 2, False) == flag + 4 * state + 12 * record
    assert size(1, 65, 4, 2, True) == flag + 4 * state + 2 * 5 * record
    for value_heads in (1, 8, 96, 5000):
        sizes = [size(1, 1 << n, 1, value_heads, False) for n in range(24)]
        assert sizes == sorted(sizes)  # callers reserve for their largest batch
        assert max(sizes) <= max(kernel.prefill.WORKSPACE_LIMIT, flag + value_heads * (record + 2 * state))


@pytest.mark.gpu
def test_workspace_size_is_the_kernels(kernel):
    for packed in (False, True):
        for batch, tokens, sequences, heads in [
            (1, 0, 0, 1),
            (1, 8192, 1, 96),
            (1, 8192, 6, 32),
            (64, 1024, 64, 32),
            (1, 1 << 20, 3, 8),
            (1, 64, 1, 5000),
        ]:
            B, N = (1, sequences) if packed else (batch, batch)
            ours = kernel.prefill.workspace_size(B, tokens, N, heads, packed)
            assert ours == kernel._ops.ops.prefill_workspace_size(tokens, B, N, heads, packed)


def test_alignment(kernel):
    aligned = kernel.prefill._aligned
    x = torch.zeros(2, 70, 4, 128, dtype=torch.bfloat16)
    assert aligned(x) and aligned(x.transpose(1, 2)) and aligned(x[:, :, 1:]) and aligned(x.float())
    wide = torch.zeros(2, 70, 4, 132, dtype=torch.bfloat16)
    assert not aligned(wide[..., :128]) and aligned(wide.float()[..., :128])
    assert not aligned(torch.zeros(2, 70, 4, 136, dtype=torch.bfloat16)[..., 1:129])
    assert not aligned(x[:1].expand(2, -1, -1, -1))
    assert aligned(wide[:1, :1, :1, :128])
    assert not aligned(torch.empty_strided((2, 0, 1, 128), (0, 128, 128, 1), dtype=torch.bfloat16))
