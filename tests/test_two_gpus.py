"""One process, two GPUs: what is set up once for a device is set up on each, and a call runs where its tensors lie."""

import copy

import pytest
import torch
from cases import KERNEL, make
from test_kda import CUT, HALVED, SHARED, STREAMED, forgetful
from test_layer_kernels import whole_step_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

# A call of each schedule; test_schedule.py sees to four of them. The last one leaves the choice to the device.
PREFILLS = {
    "split": dict(H=2, T=130),
    "streamed": STREAMED[-1],
    "halved": HALVED[0],
    "fused": dict(H=132, T=130),
    "shared": SHARED[0],
    "cut": CUT[0],
    "packed": dict(H=32, lengths=[700, 3, 0, 1, 129, 70, 900]),
}


def on(value, device):
    """`value` with its tensors and modules on `device`."""
    if isinstance(value, dict):
        return {name: on(x, device) for name, x in value.items()}
    if isinstance(value, tuple):
        return tuple(on(x, device) for x in value)
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(device)
    return value.to(device, copy=True) if torch.is_tensor(value) else value


def on_each(call, case):
    """Results of `call` for `case` on the first GPU, then on the second, which is not the current one; on the host."""
    assert torch.cuda.current_device() == 0
    return [[x.cpu() for x in call(on(case, f"cuda:{index}"))] for index in (0, 1)]


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")


@pytest.mark.parametrize("name", PREFILLS)
@torch.no_grad()
def test_prefill(kernel, name):
    args = make(KERNEL, **PREFILLS[name])
    if name == "cut":
        args = forgetful(args, "softplus")
    first, second = on_each(lambda case: kernel.chunk_kda(**case), args)
    assert all(torch.equal(a, b) and a.isfinite().all() and a.any() for a, b in zip(first, second))


@torch.no_grad()
def test_decode(kernel):
    first, second = on_each(lambda case: kernel.fused_recurrent_kda(**case), make(KERNEL, B=3, T=2))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second))


@pytest.mark.parametrize("H, hidden", [(2, 192), (32, 192)], ids=["rows", "weights in shared memory"])
@torch.no_grad()
def test_whole_step(kernel, H, hidden):
    def call(case):
        y = kernel.step.whole_step(**case)
        return y, case["conv_state"], case["state"]

    first, second = on_each(call, whole_step_case(1, H, True, hidden))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second))


@torch.no_grad()
def test_layer_kernels(kernel):
    x = torch.randn(2, 37, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(384, 4, generator=torch.Generator().manual_seed(1)).bfloat16()

    def call(case):
        q, k, v = kernel.short_conv(case["x"].chunk(3, -1), case["weight"], None, "silu")
        return q, kernel.gated_rms_norm(k, v, case["weight"].flatten()[:128])

    first, second = on_each(call, {"x": x, "weight": weight})
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second))
