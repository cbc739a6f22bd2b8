"""The main job: transformers models whose KDA functions were replaced give the logits they gave before.

Every comparison first asserts which functions run. The tests that fit any device run on the fixture `device`; heads of
128 channels in bf16 are what the CUDA kernel takes, everything else is the PyTorch path.
"""

import copy
import functools
import importlib.util
import json
import logging
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    FAMILIES,
    FUNCTIONS,
    SEEDS,
    assert_original,
    assert_replaced,
    kda_module,
    kernelized,
    random_ids,
    relative_error,
    require_kernel_support,
    tiny_model,
)

FP32_TOLERANCE = 1e-4


def has_cuda_kernel(kernel, device) -> bool:
    """Whether bf16 calls with heads of 128 channels are to run the CUDA kernel."""
    on_hopper = torch.device(device).type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return on_hopper and kernel.prefill.AVAILABLE


def paths_taken(caplog) -> set[str]:
    return {record.getMessage().split(":")[0] for record in caplog.records if record.name == "flash_kda"}


by_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def prefill(model, ids):
    return model(ids, use_cache=False).logits


@torch.no_grad()
def cached(model, ids):
    """Logits of a prompt read in pieces of every kind: prefill, single tokens, a continuation by several."""
    pieces, cache, logits = (37, 1, 1, 1, 9, 65, 1), None, []
    for piece in ids.split([*pieces, ids.shape[1] - sum(pieces)], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def padded(model, ids, side):
    """Logits at the real tokens of a batch padded on one side, and of two tokens decoded after it."""
    prompt = ids[:, :90].clone()
    mask = torch.ones_like(prompt)
    for row, pads in enumerate((0, 33, 70)):
        where = slice(0, pads) if side == "left" else slice(90 - pads, 90)
        prompt[row, where], mask[row, where] = 0, 0
    out = model(prompt, attention_mask=mask, use_cache=True)
    logits, cache = [out.logits[mask.bool()]], out.past_key_values
    for step in range(2):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        out = model(ids[:, 90 + step, None], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, 0])
    return torch.cat(logits)


WAYS = {
    "prefill": prefill,
    "cached": cached,
    "left_padded": lambda model, ids: padded(model, ids, "left"),
    "right_padded": lambda model, ids: padded(model, ids, "right"),
}


@by_family
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softplus", [False, True], ids=["family_gate", "softplus"])
def test_fp32_logits_are_the_original_ones(kernel, device, family, way, softplus):
    model, ids = tiny_model(family, softplus=softplus).to(device), random_ids(3, 130, device=device)
    expected = WAYS[way](model, ids)
    with kernelized(model, kernel.kernel_mapping()):
        assert_replaced(kernel, model)
        actual = WAYS[way](model, ids)
    assert_original(kernel, model)
    assert relative_error(actual, expected) < FP32_TOLERANCE


@by_family
@pytest.mark.parametrize("way", WAYS)
def test_bf16_logits_are_no_further_from_fp32_than_before(kernel, device, family, way, caplog):
    """The error of both is that of bf16 projections. Over several models (`SEEDS`). On a Hopper GPU this is
    the CUDA kernel; with FLA installed the original model runs FLA's there, and ours is strictly closer. Without it the
    original runs its own fp32 recurrence, whose only error is that of its bf16 inputs, and a kernel with bf16 operands
    adds 1 % to the model's error."""
    caplog.set_level(logging.INFO, "flash_kda")
    before = after = 0.0
    for seed in SEEDS:
        model = tiny_model(family, head_dim=128, seed=seed).to(device)
        ids = random_ids(3, 130, seed=seed, device=device)
        expected = WAYS[way](model, ids)
        model = model.to(torch.bfloat16)
        before += relative_error(WAYS[way](model, ids), expected) ** 2
        with kernelized(model, kernel.kernel_mapping()):
            assert_replaced(kernel, model)
            after += relative_error(WAYS[way](model, ids), expected) ** 2
    runs_fla = device.type == "cuda" and importlib.util.find_spec("fla") is not None
    assert after**0.5 < (1.0 if runs_fla else 1.03) * before**0.5
    cuda = {"cuda prefill"} if way == "prefill" else {"cuda prefill", "cuda decode"}
    assert paths_taken(caplog) == (cuda if has_cuda_kernel(kernel, device) else {"pytorch"})


@by_family
def test_a_wrong_kernel_would_be_seen(kernel, device, family, monkeypatch):
    """Guards the comparisons above: 1 % more decay moves the logits by far more than the tolerance."""
    model, ids = tiny_model(family).to(device), random_ids(3, 130, device=device)
    expected = cached(model, ids)
    module = kernel.layers.kda
    for name in ("chunk_kda", "fused_recurrent_kda"):
        right = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda q, k, v, g, beta, *, right=right, **kwargs: right(q, k, v, 1.01 * g, beta, **kwargs)
        )
    with kernelized(model, kernel.kernel_mapping()):
        assert relative_error(cached(model, ids), expected) > 3 * FP32_TOLERANCE


@by_family
def test_generate_gives_the_same_tokens(kernel, device, family):
    model, ids = tiny_model(family).to(device), random_ids(2, 40, device=device)
    mask = torch.ones_like(ids)
    ids[0, :15], mask[0, :15] = 0, 0
    generate = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)  # noqa: E731
    expected = generate()
    with kernelized(model, kernel.kernel_mapping()):
        assert_replaced(kernel, model)
        actual = generate()
    assert actual.shape == (2, 80)
    assert torch.equal(actual, expected)


@by_family
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(kernel, device, family):
    model = tiny_model(family).to(device)
    module = kda_module(model)
    x = torch.randn(1, 150, 64, generator=torch.Generator().manual_seed(1)).to(device)
    offsets = torch.tensor([0, 64, 65, 150], dtype=torch.int32, device=device)
    alone = torch.cat([module(piece) for piece in x.split([64, 1, 85], dim=1)], 1)
    packed = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=85, max_length_k=85)
    assert relative_error(module(x, **packed), alone) > 0.01, "the original is expected to ignore cu_seq_lens_q"
    with kernelized(model, kernel.kernel_mapping()):
        assert_replaced(kernel, model)
        assert relative_error(module(x, **packed), alone) < FP32_TOLERANCE


@torch.no_grad()
def test_packed_batch_of_a_whole_model(kernel, device):
    model = tiny_model("kimi_linear").to(device)
    ids, lengths = random_ids(1, 150, device=device), [64, 1, 85]
    alone = torch.cat([prefill(model, piece) for piece in ids.split(lengths, dim=1)], 1)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    offsets = torch.tensor([0, 64, 65, 150], dtype=torch.int32, device=device)
    with kernelized(model, kernel.kernel_mapping()):
        assert_replaced(kernel, model)
        packed = model(
            ids, position_ids=positions, use_cache=False, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets
        ).logits
    assert relative_error(packed, alone) < FP32_TOLERANCE


@by_family
def test_training_gives_the_original_gradients(kernel, device, family):
    import kernels

    model, ids = tiny_model(family).to(device).train(), random_ids(2, 70, device=device)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with kernelized(model, kernel.kernel_mapping(), mode=kernels.Mode.TRAINING):
        assert_replaced(kernel, model)
        actual = gradients()
    assert actual.keys() == expected.keys() and any("forget_gate.A_log" in name for name in actual)
    norm = max(g.norm() for g in expected.values())
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error < 1e-3 * expected[name].norm() + 1e-6 * norm, f"{name}: {error / expected[name].norm():.1e}"


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "INFERENCE|TORCH_COMPILE", "TRAINING|TORCH_COMPILE"])
def test_every_mode_is_served(kernel, device, mode):
    import kernels

    model = tiny_model("kimi_linear").to(device)
    flags = functools.reduce(operator.or_, (kernels.Mode[name] for name in mode.split("|")))
    with kernelized(model, kernel.kernel_mapping(), mode=flags):
        assert_replaced(kernel, model)


@torch.no_grad()
def test_compiled_in_one_graph(kernel, device):
    import kernels

    model, ids = tiny_model("kimi_linear").to(device), random_ids(2, 70, device=device)
    torch._dynamo.reset()
    with kernelized(model, kernel.kernel_mapping(), mode=kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE):
        assert_replaced(kernel, model)
        expected = prefill(model, ids)
        actual = prefill(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    assert relative_error(actual, expected) < FP32_TOLERANCE


@torch.no_grad()
def test_removing_the_kernels_restores_the_bits(kernel, device):
    model, ids = tiny_model("kimi_linear").to(device), random_ids(2, 70, device=device)
    expected = prefill(model, ids)
    with kernelized(model, kernel.kernel_mapping()):
        assert not torch.equal(prefill(model, ids), expected)
    assert torch.equal(prefill(model, ids), expected)


def test_functions_are_shared_by_the_family_and_by_no_other(kernel):
    """What docs promise about the reach of kernelize on functions: all models of a family in the process, now or later."""
    one, other = tiny_model("kimi_linear"), tiny_model("glm5_next")
    with kernelized(one, kernel.kernel_mapping()):
        assert_replaced(kernel, tiny_model("kimi_linear"))
        assert_original(kernel, other)


def test_kernelizing_a_deep_copy_is_in_vain_and_seen(kernel):
    """A deep copy carries copies of the functions, which its code does not call. `replaced_functions` must not be fooled."""
    import kernels

    model = copy.deepcopy(tiny_model("kimi_linear"))
    with kernels.use_kernel_mapping(kernel.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE)
    assert_original(kernel, model)


# --- transformers' own doors: use_kernels=True and KernelConfig -------------------------------------------------------


@pytest.fixture
def own_mapping():
    """A mapping registered in this test ends with it."""
    kernels = pytest.importorskip("kernels")
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        yield kernels


@pytest.fixture
def simulated_hopper(monkeypatch, own_mapping):
    """transformers and kernels believe that a model on the CPU is on a Hopper GPU; of transformers' default mapping only
    the two KDA functions are left, because a default that is chosen is looked for on the Hub."""
    transformers = require_kernel_support()
    from kernels.layer import repos
    from transformers.integrations import hub_kernels

    if not hasattr(hub_kernels, "get_device_type"):
        pytest.skip(f"transformers {transformers.__version__} takes the device from the model and cannot be deceived")
    monkeypatch.setattr(repos, "_find_capability", lambda: 90)
    monkeypatch.setattr(hub_kernels, "get_device_type", lambda device: "cuda")
    defaults = hub_kernels.get_kernel_mapping_transformers()
    defaults = {name: defaults[name] for name in FUNCTIONS}
    monkeypatch.setattr(hub_kernels, "get_kernel_mapping_transformers", lambda: defaults)
    return repos


def chosen(name):
    """The repository that kernelize would take for a function on the present CUDA device."""
    from kernels import Mode
    from kernels.layer.globals import _KERNEL_MAPPING
    from kernels.layer.repos import _select_repository

    return _select_repository(_KERNEL_MAPPING.get()[name]["cuda"].repos, mode=Mode.INFERENCE)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mapping_survives_the_defaults_of_transformers(kernel, simulated_hopper, own_mapping, monkeypatch, name):
    from transformers.integrations.hub_kernels import register_kernel_mapping_transformers

    mine, default = kernel.kernel_mapping(), own_mapping.LayerRepository
    own_mapping.register_kernel_mapping(mine)
    register_kernel_mapping_transformers()
    assert isinstance(chosen(name), kernel.mapping.LayerSource)
    monkeypatch.setattr(simulated_hopper, "_find_capability", lambda: 80)
    assert isinstance(chosen(name), default), "GPUs that are no Hopper keep transformers' choice"

    # The reason for the narrow entry: a plain one is lost.
    own_mapping.register_kernel_mapping(kernel.kernel_mapping(devices=[own_mapping.Device("cuda")]))
    assert isinstance(chosen(name), kernel.mapping.LayerSource)
    register_kernel_mapping_transformers()
    assert isinstance(chosen(name), default)


def test_use_kernels_keeps_the_mapping_through_train_and_eval(kernel, simulated_hopper, own_mapping):
    model = tiny_model("kimi_linear")
    own_mapping.register_kernel_mapping(kernel.kernel_mapping())
    try:
        model.set_use_kernels(True)
        assert_replaced(kernel, model)
        model.train()
        assert_replaced(kernel, model)
        model.eval()
        assert_replaced(kernel, model)
    finally:
        with kernelized(model, {}):
            pass
    assert_original(kernel, model)


@pytest.fixture
def saved_model(tmp_path):
    model = tiny_model("kimi_linear")
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 70)
    return tmp_path, ids, prefill(model, ids)


def check_loaded(kernel, model, ids, expected):
    try:
        assert_replaced(kernel, model)
        assert relative_error(prefill(model, ids), expected) < FP32_TOLERANCE
    finally:
        with kernelized(model, {}):
            pass


def test_from_pretrained_with_a_registered_mapping(kernel, simulated_hopper, own_mapping, saved_model):
    from transformers import AutoModelForCausalLM

    path, ids, expected = saved_model
    own_mapping.register_kernel_mapping(kernel.kernel_mapping())
    check_loaded(kernel, AutoModelForCausalLM.from_pretrained(path, use_kernels=True), ids, expected)


def test_kernel_config_with_our_mapping(kernel, own_mapping, saved_model):
    from transformers import AutoModelForCausalLM, KernelConfig

    path, ids, expected = saved_model
    model = AutoModelForCausalLM.from_pretrained(path)
    model.kernel_config = KernelConfig(kernel.kernel_mapping(), inherit_mapping=False)
    model.set_use_kernels(True)
    check_loaded(kernel, model, ids, expected)


def require_device_list():
    """transformers offers KernelConfig to no CPU; its list of devices is patched to test the door here."""
    transformers = require_kernel_support()
    from transformers.utils import kernel_config

    if not hasattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES"):
        pytest.skip(f"transformers {transformers.__version__} has its list of devices inside functions")
    return kernel_config


def test_kernel_config_by_name(kernel, own_mapping, saved_model, monkeypatch):
    """`repository:layer` strings, as on the Hub."""
    from transformers import AutoModelForCausalLM, KernelConfig

    kernel_config = require_device_list()
    monkeypatch.setattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])
    path, ids, expected = saved_model
    where = {"revision": "main", "trust_remote_code": True}  # version=1 would ask the Hub in spite of LOCAL_KERNELS
    config = KernelConfig(
        {
            "chunk_kda": ("moonshot/flash-kda:chunk_kimi_delta_attention", where),
            "fused_recurrent_kda": ("moonshot/flash-kda:recurrent_kimi_delta_attention", where),
            "causal_conv1d_fn": ("moonshot/flash-kda:causal_conv1d_fn", where),
            "causal_conv1d_update": ("moonshot/flash-kda:causal_conv1d_update", where),
        }
    )
    model = AutoModelForCausalLM.from_pretrained(path, use_kernels=True, kernel_config=config)
    check_loaded(kernel, model, ids, expected)


# --- the example ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_example(kernel, device, tmp_path, dtype):
    require_kernel_support()
    pytest.importorskip("rich")
    root, report = Path(__file__).parents[1], tmp_path / "report.json"
    command = [
        sys.executable,
        root / "examples/generate.py",
        "--kernel",
        Path(kernel.__file__).parent,
        "--device",
        device,
    ]
    options = ["--dtype", dtype, "--prompt-tokens", "80", "--new-tokens", "6", "--batch", "2", "--json", report]
    done = subprocess.run([*map(str, [*command, *options])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "chunk_kimi_delta_attention" in done.stdout and "tokens per second" in done.stdout
    figures = json.loads(report.read_text())
    assert set(figures["replaced"]) == set(FUNCTIONS)
    cuda = dtype == "bfloat16" and has_cuda_kernel(kernel, device)
    paths = {said.split(":")[0] for said in figures["paths"]}
    if cuda:
        assert "cuda prefill" in paths and paths <= {"cuda prefill", "cuda decode"}
    else:
        assert paths == {"pytorch"}
    tolerance = FP32_TOLERANCE if dtype == "float32" else 0.05
    assert 0 < figures["logit_difference"] < tolerance * figures["largest_logit"]
    if dtype == "float32":
        assert figures["same_tokens"] == 6
    else:
        error = figures["error_to_float32"]
        assert error["with"] < 1.1 * error["without"]
    assert all(figures[what][arm] > 0 for what in ("prefill", "decode") for arm in ("with", "without"))


def test_generate_example_says_how_to_build(tmp_path):
    require_kernel_support()
    pytest.importorskip("rich")
    example = Path(__file__).parents[1] / "examples/generate.py"
    done = subprocess.run(
        [sys.executable, str(example), "--kernel", str(tmp_path / "build")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "tools/build.py" in done.stderr


def test_readme_runs(kernel, tmp_path, monkeypatch):
    """The Python blocks of the README's "In a transformers model", in order, on a tiny checkpoint instead of the 48B
    model. The one door that transformers keeps shut on a CPU is opened, and asked by a revision, which does not need
    the Hub."""
    require_device_list()
    tiny_model("kimi_linear").save_pretrained(tmp_path)
    section = (
        (Path(__file__).parents[1] / "README.md")
        .read_text()
        .split("### In a transformers model")[1]
        .split("\n### With FLA")[0]
    )
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 7  # whole layers four times, functions three times
    state = """print("state", sum(map(bool, flash_kda.replaced_layers(model).values())),
        sum(map(bool, flash_kda.replaced_functions(model).values())))"""
    program = "\n".join(
        [
            "import transformers.utils.kernel_config as door",
            "door.KERNELS_SUPPORTED_DEVICE_TYPES.append('cpu')",
            "from kernels import get_kernel",
            "flash_kda = get_kernel('moonshot/flash-kda', version=1, trust_remote_code=True)",
            *[block + state for block in blocks],
        ]
    )
    program = program.replace("moonshotai/Kimi-Linear-48B-A3B-Instruct", str(tmp_path)).replace(
        '"version": 1', '"revision": "main"'
    )
    environment = os.environ | {"LOCAL_KERNELS": f"moonshot/flash-kda={Path(kernel.__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("state")]
    # Layers and functions: the helper, its undoing, kernelize and its undoing, KernelConfig; then the functions alone.
    assert said == [f"state {n}" for n in ("3 0", "0 0", "0 0", "3 0", "0 4", "0 0", "0 4")]
