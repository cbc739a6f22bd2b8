"""The short convolution and the gated norm by themselves: against fp64, in every mode, with bad input, and as layers."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, kda_module, relative_error, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

CUDA = torch.cuda.is_available()
# (device, dtype): the kernel takes bf16, everything else is the PyTorch path.
PATHS = [("cpu", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
PATHS += [("cuda", torch.float32), ("cuda", torch.bfloat16)] if CUDA else []
# fp32: some units in the last place. bf16: one rounding is 1.7e-3 (root mean square) and 2.1e-3 over few values; two are 2.4e-3.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 2.2e-3}

by_path = pytest.mark.parametrize("device, dtype", PATHS, ids=[f"{d}-{str(t)[6:]}" for d, t in PATHS])


@pytest.fixture(autouse=True)
def no_silent_fallback(monkeypatch, request):
    """On a GPU, bf16 must not take the PyTorch path unseen."""
    if "torch.bfloat16" in str(request.node.callspec.params if hasattr(request.node, "callspec") else ""):
        monkeypatch.setenv("FLASH_KDA_STRICT", "1")


def normal(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def conv_oracle(x, weight, bias, activation, state, bounds=None):
    """Token by token in fp64: the output and the last W inputs of each sequence. `bounds` on the host."""
    x, weight = x.double().cpu(), weight.double().cpu()
    B, T, C = x.shape
    W = weight.shape[1]
    sequences = [(b, 0, T) for b in range(B)] if bounds is None else [(0, s, e) for s, e in zip(bounds, bounds[1:])]
    y, states = torch.zeros_like(x), []
    for n, (b, start, end) in enumerate(sequences):
        window = x.new_zeros(C, W)
        if state is not None:
            window[:, W - state.shape[2] :] = state[n].double().cpu()
        for t in range(start, end):
            window = torch.cat((window[:, 1:], x[b, t, :, None]), 1)
            y[b, t] = (window * weight).sum(1)
            if bias is not None:
                y[b, t] += bias.double().cpu()
        states.append(window)
    return (F.silu(y) if activation else y), torch.stack(states)


def conv_case(
    device, dtype, *, B=2, T=37, C=64, W=4, parts=1, columns=None, bias=False, lengths=None, weight_dtype=None
):
    """Arguments of `short_conv`, and its x as one tensor."""
    if lengths is not None:
        B, T = 1, sum(lengths)
    x = normal(B, T, C * parts, device=device, dtype=dtype)
    args = dict(
        x=x if parts == 1 else x.chunk(3, dim=-1),  # views of a packed projection
        weight=normal(C * parts, W, seed=1, device=device, dtype=weight_dtype or dtype),
        bias=normal(C * parts, seed=2, device=device, dtype=weight_dtype or dtype) if bias else None,
        activation="silu",
    )
    if columns is not None:
        N = B if lengths is None else len(lengths)
        args["initial_state"] = normal(N, C * parts, columns, seed=3, device=device, dtype=dtype)
    if lengths is not None:
        args["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return args, x


def check_conv(kernel, args, x, dtype):
    bounds = None if args.get("cu_seqlens") is None else args["cu_seqlens"].tolist()
    state, weight = args.get("initial_state"), args["weight"]
    columns = weight.shape[1] if state is None else state.shape[2]
    expected, expected_state = conv_oracle(x, weight, args["bias"], args["activation"], state, bounds)
    final_state = torch.full(
        (len(expected_state), weight.shape[0], columns), float("nan"), device=x.device, dtype=dtype
    )
    y = kernel.short_conv(**args, final_state=final_state)
    y = y if isinstance(y, torch.Tensor) else torch.cat(y, -1)
    assert y.dtype == dtype
    assert relative_error(y.cpu(), expected) < TOLERANCE[dtype]
    assert torch.equal(final_state.double().cpu(), expected_state[..., -columns:])  # inputs, copied


@by_path
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("state", [None, "short", "whole"])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 9, 37, 300])
def test_conv_value(kernel, device, dtype, W, state, T):
    columns = {None: None, "short": W - 1, "whole": W}[state]
    check_conv(kernel, *conv_case(device, dtype, T=T, W=W, columns=columns, bias=T % 2 == 0), dtype)


@by_path
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("state", [None, 3, 4])
@pytest.mark.parametrize(
    "lengths", [[37], [1, 1, 1], [5, 0, 64, 1, 3, 8, 0], [0, 0, 2], [200, 31, 33]], ids=lambda x: "_".join(map(str, x))
)
def test_conv_packed(kernel, device, dtype, parts, state, lengths):
    check_conv(kernel, *conv_case(device, dtype, lengths=lengths, columns=state, parts=parts), dtype)


@by_path
@pytest.mark.parametrize("C", [8, 64, 1032])
@pytest.mark.parametrize("weights", ["own", "float32"])
def test_conv_of_q_k_v(kernel, device, dtype, C, weights):
    """Three inputs give what one gives that holds them all, from views of a packed projection and from separate ones; the
    kernel to the bit."""
    weight_dtype = torch.float32 if weights == "float32" else dtype
    args, x = conv_case(device, dtype, C=C, parts=3, columns=4, bias=True, weight_dtype=weight_dtype)
    check_conv(kernel, args, x, dtype)
    packed = kernel.short_conv(**args)
    separate = kernel.short_conv(**args | {"x": [part.contiguous() for part in args["x"]]})
    one = kernel.short_conv(**args | {"x": x}).chunk(3, dim=-1)
    for a, b, c in zip(packed, separate, one):
        assert a.is_contiguous()
        for other in (b, c):
            assert torch.equal(a, other) if device == "cuda" else relative_error(a, other) < TOLERANCE[dtype]


@by_path
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_conv_activation(kernel, device, dtype, activation):
    args, x = conv_case(device, dtype)
    check_conv(kernel, args | {"activation": activation}, x, dtype)


@by_path
@pytest.mark.parametrize("sizes", [[1] * 12, [7, 1, 2, 3, 1, 40, 1], [100, 1, 1]], ids=str)
@pytest.mark.parametrize("W", [2, 4])
def test_conv_in_pieces(kernel, device, dtype, sizes, W):
    """A sequence read in pieces, the state updated in place, gives the bits of the whole."""
    args, x = conv_case(device, dtype, T=sum(sizes), W=W, columns=W)
    state = args["initial_state"].clone()
    whole = kernel.short_conv(**args)
    address = state.data_ptr()
    pieces = [
        kernel.short_conv(**args | {"x": piece, "initial_state": state}, final_state=state)
        for piece in x.split(sizes, dim=1)
    ]
    assert torch.equal(torch.cat(pieces, 1), whole) and state.data_ptr() == address


@by_path
def test_conv_strides(kernel, device, dtype):
    """Rows of a wider tensor, batches out of order, and addresses that the kernel cannot read in vectors."""
    args, _ = conv_case(device, dtype)
    wide = normal(40, 2, 64 * 2 + 3, device=device, dtype=dtype).transpose(0, 1)
    for x in (wide[:, :, :64], wide[:, 1:, 64:128], wide[:, :, 3:67], wide[:1].expand(3, -1, -1)[..., :64]):
        assert torch.equal(kernel.short_conv(**args | {"x": x}), kernel.short_conv(**args | {"x": x.contiguous()}))


@by_path
def test_conv_of_nothing(kernel, device, dtype):
    args, _ = conv_case(device, dtype, T=0, columns=4)
    state = torch.empty_like(args["initial_state"])
    assert kernel.short_conv(**args, final_state=state).shape == (2, 0, 64)
    assert torch.equal(state, args["initial_state"])


@by_path
def test_conv_wrong_bounds_stay_inside(kernel, device, dtype):
    args, x = conv_case(device, dtype, lengths=[20, 17], columns=4)
    for bounds in ([-5, 20, 100], [30, 10, 37], [2**30, -(2**30), 5]):
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        state = args["initial_state"].clone()
        y = kernel.short_conv(**args | {"cu_seqlens": offsets}, final_state=state)
        assert y.isfinite().all() and state.isfinite().all()


def test_conv_gradients(kernel, device):
    args, _ = conv_case(device, torch.float64, lengths=[5, 2, 9], columns=4, bias=True, C=3)
    names = ("x", "weight", "bias", "initial_state")

    def run(*tensors, **options):
        return kernel.short_conv(**args | dict(zip(names, tensors)) | options)

    leaves = [args[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda *t: run(*t, cu_seqlens=None, initial_state=t[3][:1]), leaves)


BAD_CONV = {
    "x: expected a torch.Tensor": lambda a: a | {"x": (1, 2, 3)},
    "x: expected one tensor or three, got 2": lambda a: a | {"x": (a["x"], a["x"])},
    "x: expected shape \\[B, T, C\\]": lambda a: a | {"x": a["x"][0]},
    "x: expected dtype": lambda a: a | {"x": a["x"].int()},
    "x: expected shape .*that of the first": lambda a: a | {"x": (a["x"], a["x"][:, 1:], a["x"])},
    "x: expected a contiguous last dimension": lambda a: a | {"x": a["x"].transpose(1, 2).contiguous().transpose(1, 2)},
    "weight: expected shape \\[64, W\\]": lambda a: a | {"weight": a["weight"][:, None]},
    "weight: expected shape \\[64, W\\], W from 2 to 4": lambda a: a | {"weight": a["weight"].repeat(1, 2)},
    "weight: expected shape \\[192, W\\]": lambda a: a | {"x": (a["x"],) * 3},
    "bias: expected shape": lambda a: a | {"bias": a["bias"][1:]},
    "bias: expected shape .*got \\[1, 64\\]": lambda a: a | {"bias": a["bias"][None]},
    "bias: expected dtype": lambda a: a | {"bias": a["bias"].double()},
    "activation: expected None or 'silu', got 'gelu'": lambda a: a | {"activation": "gelu"},
    "initial_state: expected shape \\[2, 64, 3 or 4\\]": lambda a: a | {"initial_state": a["initial_state"][..., 2:]},
    "final_state: expected shape \\[2, 64, 3 or 4\\]": lambda a: a | {"final_state": a["initial_state"][:1]},
    "final_state: expected shape .*that of initial_state": lambda a: a | {"final_state": a["x"].new_zeros(2, 64, 3)},
    "final_state: expected a contiguous": lambda a: a | {"final_state": a["x"].new_zeros(2, 4, 64).mT},
    "cu_seqlens: expected dtype": lambda a: a | {"cu_seqlens": a["x"][0, 0]},
    "cu_seqlens: expected shape": lambda a: a | {"cu_seqlens": torch.zeros(1, dtype=torch.int32, device=a["x"].device)},
    "x: expected batch size 1": lambda a: a | {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device=a["x"].device)},
}


# Where no gradient is recorded, a call goes straight to the op.
by_grad = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])


@by_grad
@pytest.mark.parametrize("says", BAD_CONV)
def test_conv_bad_input(kernel, device, says, grad):
    args, _ = conv_case(device, torch.bfloat16, columns=4, bias=True)
    args["final_state"] = state = torch.zeros_like(args["initial_state"])
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, TypeError), match=says):
        kernel.short_conv(**BAD_CONV[says](args))
    assert not state.any()


# --- the norm ---------------------------------------------------------------------------------------------------------


def norm_oracle(x, gate, weight, eps):
    x, gate, weight = x.double(), gate.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * gate.sigmoid()


@by_path
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("rows", [(1,), (3, 5), (2, 37, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("weights", ["own", "float32"])
def test_norm_value(kernel, device, dtype, D, rows, weights):
    x, gate = (normal(*rows, D, seed=s, device=device, dtype=dtype) * 3 for s in (0, 1))
    weight = normal(D, seed=2, device=device, dtype=torch.float32 if weights == "float32" else dtype)
    y = kernel.gated_rms_norm(x, gate, weight, 1e-5)
    assert y.dtype == dtype and y.shape == x.shape
    if y.numel():
        assert relative_error(y, norm_oracle(x, gate, weight, 1e-5)) < TOLERANCE[dtype]


@by_path
def test_norm_extremes(kernel, device, dtype):
    """Rows of zeros, gates that close or open whole, and large values."""
    x = normal(6, 128, device=device, dtype=dtype)
    x[0] = 0
    x[1] *= 1e15
    gate = torch.linspace(-200, 200, 128, device=device, dtype=dtype).expand(6, 128)
    weight = torch.ones(128, device=device, dtype=dtype)
    y = kernel.gated_rms_norm(x, gate, weight, 1e-6)
    assert y.isfinite().all() and not y[0].any()
    assert relative_error(y, norm_oracle(x, gate, weight, 1e-6)) < TOLERANCE[dtype]


@by_path
def test_norm_strides(kernel, device, dtype):
    x, gate = (normal(2, 9, 4, 128, seed=s, device=device, dtype=dtype) for s in (0, 1))
    weight = normal(256, device=device, dtype=dtype)
    expected = kernel.gated_rms_norm(x.contiguous(), gate, weight[:128])
    assert torch.equal(kernel.gated_rms_norm(x.mT.contiguous().mT, gate, weight[:128]), expected)
    packed = torch.cat((x, gate), -1)
    assert torch.equal(kernel.gated_rms_norm(*packed.chunk(2, dim=-1), weight[:128]), expected)
    odd = torch.empty(x.numel() + 1, device=device, dtype=dtype)[1:].view_as(x).copy_(x)
    assert torch.equal(kernel.gated_rms_norm(odd, gate, weight[:128]), expected)


def test_norm_gradients(kernel, device):
    leaves = [normal(*s, seed=i, device=device).double().requires_grad_() for i, s in enumerate([(3, 5), (3, 5), (5,)])]
    assert torch.autograd.gradcheck(kernel.gated_rms_norm, leaves)


BAD_NORM = {
    "x: expected shape": lambda x, gate, weight: (x[0, 0], gate, weight),
    "x: expected dtype": lambda x, gate, weight: (x.int(), gate, weight),
    "gate: expected shape": lambda x, gate, weight: (x, gate[1:], weight),
    "weight: expected shape": lambda x, gate, weight: (x, gate, weight[1:]),
    "weight: expected shape .*got \\[1, 128\\]": lambda x, gate, weight: (x, gate, weight[None]),
    "weight: expected a torch.Tensor": lambda x, gate, weight: (x, gate, None),
    "eps: expected a finite number, got nan": lambda x, gate, weight: (x, gate, weight, float("nan")),
    "eps: expected a finite number, got inf": lambda x, gate, weight: (x, gate, weight, float("inf")),
    "eps: expected a number of at least 0": lambda x, gate, weight: (x, gate, weight, -1.0),
}


@by_grad
@pytest.mark.parametrize("says", BAD_NORM)
def test_norm_bad_input(kernel, device, says, grad):
    x, weight = normal(3, 128, device=device).bfloat16(), normal(128, device=device).bfloat16()
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, TypeError), match=says):
        kernel.gated_rms_norm(*BAD_NORM[says](x, x, weight))


# --- projections of a few rows ------------------------------------------------------------------------------------------


@torch.no_grad()
def projection(inputs, outputs, seed, device="cuda"):
    """A linear module whose weights are the same in every run."""
    bf16 = dict(device=device, dtype=torch.bfloat16)
    module = torch.nn.Linear(inputs, outputs, bias=False, **bf16)
    module.weight.copy_(normal(outputs, inputs, seed=seed, **bf16) * inputs**-0.5)
    return module


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 3), (8, 1), (3, 3), (2, 8), (17, 1), (32, 1)], ids=str)
@pytest.mark.parametrize(
    "K, sizes", [(2304, (4096, 128, 32)), (128, (264, 264)), (4096, (2304,)), (72, (40,) * 5 + (83,)), (6152, (16, 21))]
)
@torch.no_grad()
def test_few_rows(kernel, rows, K, sizes):
    """Several projections in one launch; a row of a batch has the same bits whatever shares it."""
    modules = tuple(projection(K, n, 100 + i) for i, n in enumerate(sizes))
    inputs = tuple(normal(*rows, K, seed=i, device="cuda").bfloat16() for i in range(len(sizes)))
    assert kernel.linears.are_few_rows(inputs[0])
    torch.cuda.synchronize()
    outputs = kernel.linears.linears(modules, inputs, True)
    for module, x, y in zip(modules, inputs, outputs):
        expected = x.double() @ module.weight.double().T
        assert y.is_contiguous() and y.dtype == x.dtype
        assert relative_error(y, expected) < 2.6e-3  # one rounding: up to 3.9e-3 in a value, less over many
        if rows[0] > 1:
            assert torch.equal(kernel.linears.linears((module,), (x[:2].contiguous(),), True)[0], y[:2])


@pytest.mark.gpu
@torch.no_grad()
def test_few_rows_leaves_other_modules_alone(kernel):
    """What is no plain projection is called as it is: hooks, biases, subclasses, other dtypes."""
    x = normal(1, 1, 64, device="cuda").bfloat16()
    hooked, plain = projection(64, 8, 1), projection(64, 8, 2)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    with_bias = torch.nn.Linear(64, 8, device="cuda", dtype=torch.bfloat16)
    adapted = type("Adapted", (torch.nn.Linear,), {"forward": lambda self, x: "adapted"})(64, 8)
    outputs = kernel.linears.linears((hooked, plain, with_bias, adapted), (x,) * 4, True)
    assert torch.equal(outputs[0], hooked(x)) and torch.equal(outputs[2], with_bias(x)) and outputs[3] == "adapted"
    assert not kernel.linears.are_few_rows(x.expand(33, 1, 64)) and not kernel.linears.are_few_rows(x.float())
    with torch.enable_grad():
        assert not kernel.linears.are_few_rows(x)


@pytest.mark.gpu
@pytest.mark.parametrize("B, T, H", [(1, 1, 4), (3, 9, 4), (1, 700, 4), (2, 1024, 96), (1, 8200, 32)], ids=str)
@torch.no_grad()
def test_outputs_over_values(kernel, B, T, H):
    """KDA may write its output over v, as the layers let it: the same bits, in decode and in every schedule of the
    prefill."""
    q, k, v, g = (normal(B, T, H, 128, seed=i, device="cuda", dtype=torch.bfloat16) for i in range(4))
    options = dict(
        A_log=torch.zeros(H, device="cuda"), use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, output_final_state=True,
    )  # fmt: skip
    beta = normal(B, T, H, seed=5, device="cuda", dtype=torch.bfloat16)
    expected = kernel.fused_recurrent_kda(q, k, v, g, beta, **options)
    for _ in range(3):
        values = v.clone()
        o, state = kernel.fused_recurrent_kda(q, k, values, g, beta, **options, out=values)
        assert o is values and torch.equal(o, expected[0]) and torch.equal(state, expected[1])


STEP_CASES = [(1, 4), (2, 32), (4, 32), (5, 96), (32, 32), (3, 1)]  # sequences, heads: clusters and whole heads


@pytest.mark.gpu
@pytest.mark.parametrize("N, H", STEP_CASES, ids=str)
@pytest.mark.parametrize("lower_bound", [None, -5.0], ids=["softplus", "bounded"])
@pytest.mark.parametrize("wide", [False, True], ids=["bf16 weights", "fp32 weights"])
@torch.no_grad()
def test_step(kernel, N, H, lower_bound, wide):
    """The fused step against the functions it stands for: it rounds where they round, and as seldom."""
    C, dtype = H * 128, torch.float32 if wide else torch.bfloat16
    q, k, v, f, gate = (normal(N, 1, C, seed=i, device="cuda", dtype=torch.bfloat16) for i in range(5))
    beta = normal(N, 1, H, seed=5, device="cuda", dtype=torch.bfloat16)
    weight, norm_weight = (normal(*s, seed=6, device="cuda", dtype=dtype) for s in ((3 * C, 4), (128,)))
    conv_state = normal(N, 3 * C, 4, seed=7, device="cuda", dtype=torch.bfloat16)
    state = normal(N, H, 128, 128, seed=8, device="cuda")
    A_log = None if lower_bound else normal(H, seed=9, device="cuda")
    dt_bias = normal(C, seed=10, device="cuda")
    kept = conv_state.clone(), state.clone()

    parts = kernel.short_conv((q, k, v), weight, None, "silu", initial_state=conv_state, final_state=conv_state)
    heads = (N, 1, H, 128)
    o, _ = kernel.fused_recurrent_kda(
        *(x.view(heads) for x in (*parts, f)), beta, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound,
        initial_state=state, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        inplace_final_state=True,
    )  # fmt: skip
    expected = kernel.gated_rms_norm(o, gate.view(heads), norm_weight, 1e-5)
    exact = kernel.reference.gated_rms_norm(o.double(), gate.view(heads).double(), norm_weight.double(), 1e-5)

    step = kernel.step
    assert step.serves((q, k, v, f, gate), beta, weight, None, "silu", kept[0], A_log, dt_bias, kept[1], norm_weight)
    outputs, finals = [], []
    for _ in range(2):  # the second time for determinism
        conv, final = (x.clone() for x in kept)
        y = step.step(q, k, v, f, beta, gate, weight, conv, A_log, dt_bias, lower_bound, final, norm_weight, 1e-5)
        assert torch.equal(conv, conv_state) and relative_error(final, state) < 1e-6
        finals.append(final)
        assert y.shape == q.shape and relative_error(y.view(heads), exact) <= 1.01 * relative_error(expected, exact)
        outputs.append(y)
    assert torch.equal(*outputs) and torch.equal(*finals)


@pytest.mark.gpu
@torch.no_grad()
def test_step_declines(kernel):
    """What the kernel does not do takes the functions one by one."""
    N, H, C = 2, 2, 256
    projected = [normal(N, 1, C, device="cuda", dtype=torch.bfloat16)] * 5
    arguments = dict(
        projected=projected,
        beta=normal(N, 1, H, device="cuda", dtype=torch.bfloat16),
        conv_weight=normal(3 * C, 4, device="cuda"),
        conv_bias=None,
        activation="silu",
        conv_state=normal(N, 3 * C, 4, device="cuda", dtype=torch.bfloat16),
        A_log=normal(H, device="cuda"),
        dt_bias=None,
        state=normal(N, H, 128, 128, device="cuda"),
        norm_weight=normal(128, device="cuda"),
    )
    serves = kernel.step.serves
    assert serves(**arguments)
    for name, other in {
        "projected": [x.float() for x in projected],
        "beta": arguments["beta"].float(),
        "conv_weight": normal(3 * C, 3, device="cuda"),
        "conv_bias": normal(3 * C, device="cuda"),
        "activation": None,
        "conv_state": arguments["conv_state"][:, :, 1:],
        "A_log": arguments["A_log"].bfloat16(),
        "state": arguments["state"].bfloat16(),
        "norm_weight": normal(64, device="cuda"),
    }.items():
        assert not serves(**arguments | {name: other}), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "position, change, says",
    [
        (0, lambda x: x[:, :, :130], "must be"),
        (1, lambda x: x[:1], "must have"),
        (3, lambda x: x.float(), "bfloat16"),
        (4, lambda x: x.cpu(), "CUDA device"),
        (6, lambda x: x[:, :3], "contiguous"),
        (7, lambda x: x.clone().transpose(1, 2), "contiguous"),
        (8, lambda x: x.bfloat16(), "float32"),
        (8, lambda x: None, "A_log"),
        (10, lambda x: x[:, :1], "contiguous|elements"),
        (11, lambda x: x[:64], "elements"),
    ],
)
@torch.no_grad()
def test_step_bad_input(kernel, position, change, says):
    """The operator refuses what it cannot read or write, and has written nothing."""
    N, H, C = 2, 2, 256
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    arguments = [normal(N, 1, C, **bf16) for _ in range(4)]
    arguments += [
        normal(N, 1, H, **bf16),
        normal(N, 1, C, **bf16),
        normal(3 * C, 4, **bf16),
        normal(N, 3 * C, 4, **bf16),
    ]
    arguments += [normal(H, device="cuda"), normal(C, device="cuda"), normal(N, H, 128, 128, device="cuda")]
    arguments += [normal(128, **bf16), normal(N, 1, C, **bf16)]
    arguments[position] = change(arguments[position])
    before = [None if x is None else x.clone() for x in arguments]
    with pytest.raises(RuntimeError, match=says):
        kernel.step.ops.layer_step(*arguments, 128**-0.5, None, 1e-5)
    assert all(x is None or torch.equal(x, y) for x, y in zip(arguments, before))


def whole_step_case(N, H, low_rank, hidden=192, device="cuda"):
    """A layer's modules and tensors for one token of each of N sequences, by the names of `whole_step`'s arguments."""
    C, bf16 = H * 128, dict(device=device, dtype=torch.bfloat16)
    linear = functools.partial(projection, device=device)

    def gate(seed):
        return (linear(hidden, 128, seed), linear(128, C, seed + 1)) if low_rank else (linear(hidden, C, seed),)

    conv = torch.nn.Conv1d(3 * C, 3 * C, 4, groups=3 * C, bias=False, padding=3, **bf16)
    return dict(
        x=normal(N, 1, hidden, seed=1, **bf16),
        qkv=tuple(linear(hidden, C, seed) for seed in (2, 3, 4)),
        decay=gate(5),
        gate=gate(7),
        beta=linear(hidden, H, 9),
        out=linear(C, hidden, 10),
        conv=conv,
        conv_state=normal(N, 3 * C, 4, seed=11, **bf16),
        A_log=normal(H, seed=12, device=device),
        dt_bias=normal(C, seed=13, device=device),
        lower_bound=None,
        state=normal(N, H, 128, 128, seed=14, device=device),
        norm_weight=normal(128, seed=15, **bf16),
        eps=1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "N, H, hidden, resident",
    [
        *[
            (*case, False)
            for case in [(1, 1, 192), (2, 3, 192), (9, 4, 192), (32, 5, 192), (1, 3, 2304), (1, 96, 1024)]
        ],
        # 2, 18, 7, 24 and 13 outputs a CTA of the last projection, some CTAs with fewer
        *[(*case, True) for case in [(1, 32, 192), (1, 32, 2312), (3, 8, 800), (4, 2, 3160), (1, 6, 1600)]],
    ],
    ids=str,
)
@pytest.mark.parametrize("low_rank", [False, True], ids=["one projection a gate", "two"])
@torch.no_grad()
def test_whole_step(kernel, N, H, hidden, resident, low_rank):
    """By one op a step has the bits that its kernels give one by one; where the last projection's weights wait in shared
    memory, the output but for the order of the sums."""
    case = whole_step_case(N, H, low_rank, hidden)
    kept = case["conv_state"].clone(), case["state"].clone()
    linears = kernel.linears.linears
    modules = (*case["qkv"], case["decay"][0], case["gate"][0], case["beta"])
    q, k, v, f, g, beta = linears(modules, (case["x"],) * 6, True)
    if low_rank:
        f, g = linears((case["decay"][1], case["gate"][1]), (f, g), True)
    o = kernel.step.step(
        q, k, v, f, beta, g, case["conv"].weight.squeeze(1), kept[0], case["A_log"], case["dt_bias"], None, kept[1],
        case["norm_weight"], 1e-5,
    )  # fmt: skip
    expected = linears((case["out"],), (o,), True)[0]
    y = kernel.step.whole_step(**case)
    assert relative_error(y, expected.double()) < 1e-3 if resident else torch.equal(y, expected)
    assert y.isfinite().all() and y.abs().max() > 0
    assert torch.equal(case["conv_state"], kept[0]) and torch.equal(case["state"], kept[1])


@pytest.mark.gpu
@torch.no_grad()
def test_whole_step_declines(kernel):
    """What the op does not serve is left to others, and nothing is written."""
    case = whole_step_case(2, 2, True)
    other = whole_step_case(3, 2, True)
    hooked = whole_step_case(2, 2, True)["out"]
    hooked.register_forward_hook(lambda *_: None)
    for name, value in {
        "x": other["x"],
        "qkv": (*case["qkv"][:2], torch.nn.Linear(192, 256, device="cuda", dtype=torch.bfloat16)),
        "decay": case["decay"][:1],
        "beta": case["out"],
        "out": hooked,
        "conv": torch.nn.Conv1d(768, 768, 3, groups=768, bias=False, device="cuda"),
        "conv_state": case["conv_state"].float(),
        "A_log": None,
        "state": case["state"].transpose(2, 3),
        "norm_weight": case["norm_weight"][:64],
    }.items():
        kept = case["conv_state"].clone(), case["state"].clone()
        assert kernel.step.whole_step(**case | {name: value}) is None, name
        assert torch.equal(case["conv_state"], kept[0]) and torch.equal(case["state"], kept[1]), name


@pytest.mark.parametrize("says, served_by_others", [("whole_step: out of memory", False), ("x must have a row", True)])
@torch.no_grad()
def test_whole_step_that_failed_is_not_taken_twice(kernel, monkeypatch, says, served_by_others):
    """Only what the op refuses before it launches anything is left to others: afterwards the states may have moved on."""

    def fail(*_):
        raise RuntimeError(says)

    monkeypatch.setattr(kernel.step, "_native_whole", fail, raising=False)
    case = whole_step_case(1, 1, True, device="cpu")
    if served_by_others:
        assert kernel.step.whole_step(**case) is None
    else:
        with pytest.raises(RuntimeError, match=says):
            kernel.step.whole_step(**case)


# --- torch.compile, CUDA graphs -----------------------------------------------------------------------------------------


@by_path
@torch.no_grad()
def test_one_graph(kernel, device, dtype):
    """Both calls and their neighbours in one graph for every length; the state is written through it."""
    torch._dynamo.reset()
    args, _ = conv_case(device, dtype, C=128, parts=3, columns=4)
    weight = normal(128, device=device, dtype=dtype)

    def step(x, state):
        q, k, v = kernel.short_conv(**args | {"x": (x * 2).chunk(3, -1), "initial_state": state}, final_state=state)
        return kernel.gated_rms_norm(q + k, v, weight)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for T in (5, 70, 33):
        x = normal(2, T, 384, device=device, dtype=dtype)
        torch._dynamo.mark_dynamic(x, 1)
        states = args["initial_state"].clone(), args["initial_state"].clone()
        assert relative_error(compiled(x, states[0]), step(x, states[1])) < 1e-6
        assert torch.equal(*states) and not torch.equal(states[0], args["initial_state"])
    assert counter.frame_count == 1


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graph(kernel, monkeypatch):
    """A captured step, replayed after its inputs and the packed bounds have changed, gives the bits of a call."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    args, x = conv_case("cuda", torch.bfloat16, lengths=[30, 7], columns=4, C=128)
    weight, state = normal(128, device="cuda").bfloat16(), args["initial_state"].clone()

    def step():
        y = kernel.short_conv(**args | {"initial_state": state}, final_state=state)
        return kernel.gated_rms_norm(y, x, weight)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for bounds in ([0, 30, 37], [0, 1, 37]):
        args["cu_seqlens"].copy_(torch.tensor(bounds))
        state.copy_(args["initial_state"])
        expected = step()
        final = state.clone()
        state.copy_(args["initial_state"])
        graph.replay()
        assert torch.equal(y, expected) and torch.equal(state, final)


# --- as layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal_conv1d_fn", "causal_conv1d_update", "FusedRMSNormGated"])
def test_nothing_but_forward_and_flags(kernel, name):
    layer = getattr(kernel.layers, name)
    own = {n for n, _ in inspect.getmembers(layer)} - {n for n, _ in inspect.getmembers(torch.nn.Module)}
    assert own == {"has_backward", "can_torch_compile"}
    assert layer.has_backward and layer.can_torch_compile and layer.__init__ is torch.nn.Module.__init__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["causal_conv1d_fn", "causal_conv1d_update", "FusedRMSNormGated"])
def test_fits_what_it_replaces(kernel, family, name):
    from kernels.layer.layer import _validate_layer

    module, layer = kda_module(tiny_model(family)), getattr(kernel.layers, name)
    replaced = type(module.o_norm if name == "FusedRMSNormGated" else module._kernel_funcs[name])
    _validate_layer(check_cls=replaced, cls=layer, repo=f"{kernel.__name__}:{name}")
    ours, theirs = inspect.signature(layer.forward).parameters, inspect.signature(replaced.forward).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_are_what_the_model_calls(kernel, device, family):
    """Each layer in the place of the module's own function, on what the module would hand over."""
    module = kda_module(tiny_model(family)).to(device)
    x = normal(2, 192 // 4, 96, device=device).transpose(1, 2)
    weight, state = module.conv1d.weight.squeeze(1), normal(2, 96, 4, seed=1, device=device)
    fn, update = (module._kernel_funcs[n] for n in ("causal_conv1d_fn", "causal_conv1d_update"))
    ours = kernel.layers.causal_conv1d_fn()(x, weight=weight, bias=None, activation="silu", input_ids=None)
    assert relative_error(ours, fn(x, weight=weight, activation="silu")) < 1e-6
    assert ours.stride(1) == 1, "what follows reads channels in vectors"
    states = state.clone(), state.clone()
    ours = kernel.layers.causal_conv1d_update()(x[..., :1], states[0], weight=weight, bias=None, activation="silu")
    theirs = update(x[..., :1], states[1], weight=weight, bias=None, activation="silu")
    assert relative_error(ours, theirs) < 1e-6 and torch.equal(*states) and not torch.equal(states[0], state)
    heads = normal(2, 5, 2, 16, seed=2, device=device)
    ours = kernel.layers.FusedRMSNormGated.forward(module.o_norm, heads, heads + 1)
    assert relative_error(ours, module.o_norm(heads, heads + 1)) < 1e-6


def test_conv_layer_takes_packed_batches_by_either_name(kernel, device):
    args, x = conv_case(device, torch.float32, lengths=[5, 9])
    call = kernel.layers.causal_conv1d_fn()
    expected = kernel.short_conv(**args).transpose(1, 2)
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        assert torch.equal(
            call(x.transpose(1, 2), args["weight"], None, "silu", **{name: args["cu_seqlens"]}), expected
        )
    with pytest.raises(ValueError, match="seq_idx.*cu_seq_lens_q"):
        call(x.transpose(1, 2), args["weight"], None, "silu", seq_idx=args["cu_seqlens"][None])


def test_norm_layer_leaves_other_activations_to_the_module(kernel):
    class Norm(torch.nn.Module):
        activation = "silu"

        def forward(self, hidden_states, gate=None):
            return "the module's own"

    assert kernel.layers.FusedRMSNormGated.forward(Norm(), torch.zeros(2), torch.zeros(2)) == "the module's own"
