"""Models whose KDA layers run whole in this package give the logits they gave before, whichever way they were installed."""

import contextlib
import copy
import importlib.util
import inspect
import re

import pytest
import torch
from test_transformers import FP32_TOLERANCE, WAYS, cached, has_cuda_kernel, prefill, require_device_list
from tiny_models import (
    FAMILIES,
    SEEDS,
    assert_layers_replaced,
    kda_module,
    kernelized,
    random_ids,
    relative_error,
    tiny_model,
)

by_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def step_by_step(model, ids):
    """Logits of a prompt of 5 tokens and of 40 read one by one."""
    out = model(ids[:, :5], use_cache=True)
    logits = [out.logits]
    for t in range(5, 45):
        out = model(ids[:, t, None], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def one_token_first(model, ids):
    """A prompt of a single token, then one more, two, and a longer piece."""
    cache, logits = None, []
    for piece in ids[:, :30].split([1, 1, 2, 26], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


MANY_WAYS = WAYS | {"step_by_step": step_by_step, "one_token_first": one_token_first}


@pytest.fixture
def replaced(kernel):
    """As a context: the KDA layers of a model run whole in this build, and at the end the originals again."""

    @contextlib.contextmanager
    def context(model):
        assert kernel.replace_layers(model) == kernel.replaced_layers(model)
        assert_layers_replaced(kernel, model)
        yield model
        assert not any(kernel.restore_layers(model).values())

    return context


@by_family
@pytest.mark.parametrize("way, softplus", [*((way, False) for way in MANY_WAYS), ("cached", True)])
def test_fp32_logits_are_the_original_ones(replaced, device, family, way, softplus):
    model, ids = tiny_model(family, softplus=softplus).to(device), random_ids(3, 130, device=device)
    expected = MANY_WAYS[way](model, ids)
    with replaced(model):
        assert relative_error(MANY_WAYS[way](model, ids), expected) < FP32_TOLERANCE
    assert torch.equal(MANY_WAYS[way](model, ids), expected), "the originals are back"


@by_family
@pytest.mark.parametrize("way", ["prefill", "cached", "left_padded"])
def test_bf16_logits_are_no_further_from_fp32_than_before(replaced, device, family, way):
    """Over several models (`SEEDS`). On a Hopper GPU these are the CUDA kernels; with FLA installed the original model runs
    FLA's there, and ours is strictly closer."""
    before = after = 0.0
    for seed in SEEDS:
        model = tiny_model(family, head_dim=128, seed=seed).to(device)
        ids = random_ids(3, 130, seed=seed, device=device)
        expected = MANY_WAYS[way](model, ids)
        model = model.to(torch.bfloat16)
        before += relative_error(MANY_WAYS[way](model, ids), expected) ** 2
        with replaced(model):
            after += relative_error(MANY_WAYS[way](model, ids), expected) ** 2
    runs_fla = device.type == "cuda" and importlib.util.find_spec("fla") is not None
    assert 0 < after**0.5 < (1.0 if runs_fla else 1.01) * before**0.5


@by_family
def test_a_wrong_layer_would_be_seen(kernel, replaced, device, family, monkeypatch):
    """Guards the comparisons above: 1 % on one tap of the convolution moves the logits by far more than the tolerance."""
    model, ids = tiny_model(family).to(device), random_ids(3, 130, device=device)
    expected = cached(model, ids)
    right, scale = kernel.short_conv, torch.tensor([1.0, 1.0, 1.01, 1.0], device=device)
    monkeypatch.setattr(
        kernel.layers.delta_attention, "short_conv", lambda x, weight, *a, **k: right(x, weight * scale, *a, **k)
    )
    with replaced(model):
        assert relative_error(cached(model, ids), expected) > 3 * FP32_TOLERANCE


@pytest.mark.parametrize("family, tokens", [("kimi_linear", 512), ("glm5_next", 64), ("bailing_hybrid", 64)])
def test_greedy_tokens_are_the_same(replaced, device, family, tokens):
    model, ids = tiny_model(family).to(device), random_ids(1, 24, device=device)
    generate = lambda: model.generate(ids, max_new_tokens=tokens, do_sample=False)  # noqa: E731
    expected = generate()
    with replaced(model):
        actual = generate()
    assert actual.shape == (1, 24 + tokens) and torch.equal(actual, expected)


@by_family
def test_beam_search_gives_the_same_tokens(replaced, device, family):
    """Beams reorder the cache, which then holds new tensors; beside left padding."""
    model, ids = tiny_model(family).to(device), random_ids(2, 20, device=device)
    mask = torch.ones_like(ids)
    ids[0, :7], mask[0, :7] = 0, 0
    generate = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=3)  # noqa: E731
    expected = generate()
    with replaced(model):
        assert torch.equal(generate(), expected)


# --- packed sequences -------------------------------------------------------------------------------------------------

LENGTHS = [64, 1, 2, 83]


def offsets(device):
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()


@pytest.fixture
def kda_layer(kernel, device):
    """`kda_layer(family)`: a KDA layer by itself, the same run by this build, and a cache for it."""

    def make(family, dtype=torch.float32, head_dim=16):
        from transformers import DynamicCache

        model = tiny_model(family, head_dim=head_dim).to(device, dtype)
        module = kda_module(model)
        layer = getattr(kernel.layers, type(module).__name__)
        text = model.config.get_text_config()
        return module, lambda *a, **k: layer.forward(module, *a, **k), lambda: DynamicCache(config=text)

    return make


def hidden(B, T, device, seed=1):
    return torch.randn(B, T, 64, generator=torch.Generator().manual_seed(seed)).to(device)


@by_family
@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(kda_layer, device, family, name):
    """The convolution included. What else a model passes changes nothing."""
    original, ours, _ = kda_layer(family)
    x = hidden(1, sum(LENGTHS), device)
    alone = torch.cat([original(piece) for piece in x.split(LENGTHS, dim=1)], 1)
    assert relative_error(original(x), alone) > 0.01
    others = dict(cu_seq_lens_k=offsets(device), max_length_q=83, position_embeddings=(x, x), input_ids=None)
    assert relative_error(ours(x, **{name: offsets(device)}, **others), alone) < FP32_TOLERANCE


@by_family
@torch.no_grad()
def test_packed_prompts_go_on_as_a_batch(kda_layer, device, family):
    """A cache filled by N packed prompts serves the N sequences one token at a time."""
    original, ours, new_cache = kda_layer(family)
    x, y = hidden(1, sum(LENGTHS), device), hidden(len(LENGTHS), 3, device, seed=2)
    cache = new_cache()
    ours(x, cache_params=cache, cu_seqlens=offsets(device))
    actual = torch.cat([ours(y[:, t, None], cache_params=cache) for t in range(3)], 1)
    for n, piece in enumerate(x.split(LENGTHS, dim=1)):
        alone = new_cache()
        original(piece, cache_params=alone)
        expected = torch.cat([original(y[n, None, t, None], cache_params=alone) for t in range(3)], 1)
        assert relative_error(actual[n, None], expected) < FP32_TOLERANCE


@torch.no_grad()
def test_packed_batch_of_a_whole_model(replaced, device):
    model = tiny_model("kimi_linear").to(device)
    ids = random_ids(1, sum(LENGTHS), device=device)
    alone = torch.cat([prefill(model, piece) for piece in ids.split(LENGTHS, dim=1)], 1)
    positions = torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None]
    packed = dict(position_ids=positions, use_cache=False, cu_seq_lens_q=offsets(device), cu_seq_lens_k=offsets(device))
    with replaced(model):
        assert relative_error(model(ids, **packed).logits, alone) < FP32_TOLERANCE


@by_family
def test_bad_input(kda_layer, device, family):
    _, ours, new_cache = kda_layer(family)
    x = hidden(2, 10, device)
    ids = torch.zeros(1, 10, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="seq_idx.*cu_seq_lens_q"):
        ours(x[:1], seq_idx=ids)
    with pytest.raises(ValueError, match="x: expected batch size 1 with cu_seqlens"):
        ours(x, cu_seqlens=torch.tensor([0, 10], dtype=torch.int32, device=device))
    with pytest.raises(TypeError, match="cu_seqlens: expected dtype"):
        ours(x[:1], cu_seqlens=torch.tensor([0.0, 10.0], device=device))
    cache = new_cache()
    with torch.no_grad():
        ours(x, cache_params=cache)
    states = [cache.layers[0].conv_states[0].clone(), cache.layers[0].recurrent_states[0].clone()]
    with torch.no_grad(), pytest.raises(ValueError, match="initial_state: expected shape \\[3, "):
        ours(hidden(3, 1, device), cache_params=cache)
    assert torch.equal(cache.layers[0].conv_states[0], states[0])
    assert torch.equal(cache.layers[0].recurrent_states[0], states[1])


# --- the cache --------------------------------------------------------------------------------------------------------


@by_family
@torch.no_grad()
def test_cache_holds_what_the_original_leaves_there(kda_layer, device, family):
    """Either may go on where the other stopped; a state has one address for good, and a reset cache is as good as new."""
    original, ours, new_cache = kda_layer(family)
    x = hidden(2, 60, device)
    reference, cache = new_cache(), new_cache()
    addresses = set()
    for round_ in range(2):
        for i, piece in enumerate(x.split([1, 40, 1, 1, 2, 15], dim=1)):
            expected = original(piece, cache_params=reference)
            actual = (original if i == 3 else ours)(piece, cache_params=cache)
            assert relative_error(actual, expected) < FP32_TOLERANCE, (round_, i)
            layer, theirs = cache.layers[0], reference.layers[0]
            assert relative_error(layer.conv_states[0], theirs.conv_states[0]) < 1e-6
            assert relative_error(layer.recurrent_states[0], theirs.recurrent_states[0]) < FP32_TOLERANCE
            assert layer.conv_states[0].shape == theirs.conv_states[0].shape
            assert layer.recurrent_states[0].dtype == torch.float32 and layer.has_previous_state[0]
            addresses.add((layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()))
        for c in (cache, reference):
            c.reset()
    assert len(addresses) == 1


@torch.no_grad()
def static_steps(model, prompt, tokens, step):
    """Logits of tokens decoded one by one after a prompt, with a static cache; `step(token, cache)` may be captured."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=64)
    model(prompt, past_key_values=cache, use_cache=True)
    return torch.cat([step(tokens[:, t, None], cache) for t in range(tokens.shape[1])], 1)


def test_static_cache(replaced, device):
    model, ids = tiny_model("kimi_linear").to(device), random_ids(2, 30, device=device)
    expected = prefill(model, ids)[:, 20:]
    eager = lambda token, cache: model(token, past_key_values=cache, use_cache=True).logits  # noqa: E731
    with replaced(model):
        assert relative_error(static_steps(model, ids[:, :20], ids[:, 20:], eager), expected) < FP32_TOLERANCE


@pytest.mark.gpu
def test_step_of_a_model_in_a_cuda_graph(replaced, monkeypatch):
    """With a static cache, a decode step of the whole model is captured once and replayed for every token."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    model = tiny_model("kimi_linear", head_dim=128).to("cuda", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    ids, captured = random_ids(2, 30, device="cuda"), {}
    eager = lambda token, cache: model(token, past_key_values=cache, use_cache=True).logits  # noqa: E731

    def replayed(token, cache):
        if len(captured) < 2:  # two eager steps load what is loaded once
            captured[len(captured)] = eager(token, cache)
            return captured[len(captured) - 1]
        if "graph" not in captured:
            captured["token"] = token.clone()
            captured["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured["graph"]):
                captured["logits"] = eager(captured["token"], cache)
        captured["token"].copy_(token)
        captured["graph"].replay()
        return captured["logits"].clone()

    with replaced(model):
        expected = static_steps(model, ids[:, :20], ids[:, 20:], eager)
        assert relative_error(static_steps(model, ids[:, :20], ids[:, 20:], replayed), expected) < 1e-2


@by_family
def test_training_gives_the_original_gradients(replaced, device, family):
    model, ids = tiny_model(family).to(device).train(), random_ids(2, 70, device=device)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with replaced(model):
        actual = gradients()
    assert actual.keys() == expected.keys() and any("forget_gate.A_log" in name for name in actual)
    norm = max(g.norm() for g in expected.values())
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error < 1e-3 * expected[name].norm() + 1e-6 * norm, f"{name}: {error / expected[name].norm():.1e}"


# --- torch.compile and CUDA graphs ------------------------------------------------------------------------------------


@torch.no_grad()
def test_model_compiles_into_one_graph(replaced, device):
    model, ids = tiny_model("kimi_linear").to(device), random_ids(2, 70, device=device)
    torch._dynamo.reset()
    with replaced(model):
        expected = prefill(model, ids)
        try:
            actual = prefill(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
        finally:
            torch._dynamo.reset()
    assert relative_error(actual, expected) < FP32_TOLERANCE


@by_family
@torch.no_grad()
def test_cached_step_compiles_into_one_graph(kda_layer, device, family):
    """A layer's prefill and steps with a cache, the state updated in place through the graph."""
    _, ours, new_cache = kda_layer(family)
    x = hidden(2, 24, device)
    caches = new_cache(), new_cache()
    for cache in caches:
        ours(x[:, :20], cache_params=cache)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ours(x, cache_params=caches[0]), fullgraph=True, backend="aot_eager")
    for t in range(20, 24):
        expected = ours(x[:, t, None], cache_params=caches[1])
        assert relative_error(compiled(x[:, t, None]), expected) < 1e-5
    layer, theirs = (cache.layers[0] for cache in caches)
    assert torch.equal(layer.conv_states[0], theirs.conv_states[0])
    assert relative_error(layer.recurrent_states[0], theirs.recurrent_states[0]) < 1e-5


@pytest.mark.gpu
@by_family
@torch.no_grad()
def test_step_in_a_cuda_graph(kernel, kda_layer, family, monkeypatch):
    """A captured one-token step of a layer, replayed, gives the bits of eager steps; between the projections it launches one
    kernel."""
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    _, ours, new_cache = kda_layer(family, dtype=torch.bfloat16, head_dim=128)
    x = hidden(2, 30, "cuda").bfloat16()
    caches = new_cache(), new_cache()
    for cache in caches:
        ours(x[:, :20], cache_params=cache)
        ours(x[:, 20, None], cache_params=cache)  # what a first call loads must not be in the graph
    token, graph = x[:, 21, None].clone(), torch.cuda.CUDAGraph()
    saved = [s[0].clone() for s in (caches[0].layers[0].conv_states, caches[0].layers[0].recurrent_states)]
    with torch.cuda.graph(graph):
        y = ours(token, cache_params=caches[0])
    for s, old in zip((caches[0].layers[0].conv_states, caches[0].layers[0].recurrent_states), saved):
        s[0].copy_(old)
    for t in range(21, 30):
        token.copy_(x[:, t, None])
        graph.replay()
        assert torch.equal(y, ours(x[:, t, None], cache_params=caches[1]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours(token, cache_params=caches[1])
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launched = [name for name in on_gpu if "kda::" in name and "linears" not in name]
    assert len(launched) == 1, launched
    assert len(on_gpu) - len(launched) <= 3, on_gpu  # the projections


# --- the three doors --------------------------------------------------------------------------------------------------


@by_family
def test_nothing_but_forward_and_flags(kernel, family):
    layer = getattr(kernel.layers, type(kda_module(tiny_model(family))).__name__)
    own = {n for n, _ in inspect.getmembers(layer)} - {n for n, _ in inspect.getmembers(torch.nn.Module)}
    assert own == {"has_backward", "can_torch_compile"}
    assert layer.has_backward and layer.can_torch_compile and layer.__init__ is torch.nn.Module.__init__


@by_family
def test_fits_what_it_replaces(kernel, family):
    from kernels.layer.layer import _validate_layer

    original = type(kda_module(tiny_model(family)))
    layer = getattr(kernel.layers, original.__name__)
    _validate_layer(check_cls=original, cls=layer, repo=original.__name__)
    ours, theirs = inspect.signature(layer.forward).parameters, inspect.signature(original.forward).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_helper_changes_this_model_alone(kernel, replaced, device):
    """No other model of the family, neither classes nor weights; a copy keeps the replacement, on its own weights."""
    model, other = tiny_model("kimi_linear").to(device), tiny_model("kimi_linear", seed=1).to(device)
    ids, names = random_ids(2, 40, device=device), list(model.state_dict())
    with replaced(model):
        assert not any(kernel.replaced_layers(other).values())
        assert list(model.state_dict()) == names
        twin = copy.deepcopy(model)
        assert_layers_replaced(kernel, twin)
        expected = prefill(model, ids)
        with torch.no_grad():
            kda_module(model).o_norm.weight.zero_()
        assert torch.equal(prefill(twin, ids), expected)
        assert kernel.replace_layers(twin) == kernel.replace_layers(twin), "twice is once"
    assert_layers_replaced(kernel, twin)


def test_helper_finds_nothing_to_replace(kernel):
    assert kernel.replace_layers(torch.nn.Linear(2, 2)) == {}


def test_helper_refuses_hooks(kernel):
    model = tiny_model("kimi_linear")
    kda_module(model).conv1d._hf_hook = object()
    with pytest.raises(ValueError, match="without hooks of accelerate.*layers.0.self_attn"):
        kernel.replace_layers(model)
    assert not any(kernel.replaced_layers(model).values())


@pytest.mark.parametrize(
    "family, mode",
    [(family, "INFERENCE") for family in FAMILIES]
    + [("kimi_linear", mode) for mode in ("TRAINING", "INFERENCE|TORCH_COMPILE", "TRAINING|TORCH_COMPILE")],
)
def test_kernelize(kernel, device, family, mode):
    kernels = pytest.importorskip("kernels")
    model, other, ids = tiny_model(family).to(device), tiny_model(family), random_ids(2, 130, device=device)
    expected = cached(model, ids)
    flags = kernels.Mode.INFERENCE & kernels.Mode.TRAINING
    for name in mode.split("|"):
        flags |= kernels.Mode[name]
    with kernelized(model, kernel.kernel_mapping(whole_layers=True), mode=flags):
        assert_layers_replaced(kernel, model)
        assert not any(kernel.replaced_layers(other).values())
        assert relative_error(cached(model, ids), expected) < FP32_TOLERANCE
    assert not any(kernel.replaced_layers(model).values())
    assert torch.equal(cached(model, ids), expected)


def test_mapping_of_names(kernel):
    mapping = kernel.kernel_mapping(names=["RMSNormGated", "BailingHybridDeltaAttention"], devices=["cpu"])
    layers = {name: by_device["cpu"].load() for name, by_device in mapping.items()}
    assert layers == {
        "RMSNormGated": kernel.layers.FusedRMSNormGated,
        "BailingHybridDeltaAttention": kernel.layers.BailingHybridDeltaAttention,
    }
    with pytest.raises(ValueError, match="names: expected None with whole_layers=True"):
        kernel.kernel_mapping(names=["chunk_kda"], whole_layers=True)


@by_family
def test_gated_norm_by_itself(kernel, device, family):
    model, ids = tiny_model(family).to(device), random_ids(2, 70, device=device)
    expected = prefill(model, ids)
    with kernelized(model, kernel.kernel_mapping(names=["RMSNormGated"])):
        runs = kda_module(model).o_norm.forward.__func__
        assert runs.__qualname__ == "FusedRMSNormGated.forward" and runs.__module__.startswith(kernel.__name__)
        assert relative_error(prefill(model, ids), expected) < 1e-5


@by_family
def test_kernel_config(kernel, family, tmp_path, monkeypatch):
    """By name in from_pretrained, through the layout class; train() and a plain load afterwards run as ever."""
    from transformers import KernelConfig
    from transformers.monkey_patching import clear_patch_mapping

    kernel_config = require_device_list()
    kernels = pytest.importorskip("kernels")
    monkeypatch.setattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])
    model, ids = tiny_model(family), random_ids(2, 70)
    model.save_pretrained(tmp_path)
    expected, name = prefill(model, ids), type(kda_module(model)).__name__
    where = {"revision": "main", "trust_remote_code": True}
    config = KernelConfig({name: (f"moonshot/flash-kda:{name}", where)})
    try:
        with kernels.use_kernel_mapping({}, inherit_mapping=False):
            loaded = type(model).from_pretrained(tmp_path, use_kernels=True, kernel_config=config)
            assert_layers_replaced(kernel, loaded)
            assert relative_error(prefill(loaded, ids), expected) < FP32_TOLERANCE
            loaded.train().eval()
            assert relative_error(prefill(loaded, ids), expected) < FP32_TOLERANCE
            assert not any(kernel.restore_layers(loaded).values())
            assert torch.equal(prefill(loaded, ids), expected)
            assert torch.equal(prefill(type(model).from_pretrained(tmp_path), ids), expected)
            assert list(loaded.state_dict()) == list(model.state_dict())
    finally:
        clear_patch_mapping()


def test_layouts_are_made_on_demand(kernel):
    module = kernel.layers.delta_attention
    layout = module.KimiLinearDeltaAttentionLayout
    assert layout is module.KimiLinearDeltaAttentionLayout and layout.__module__ == module.__name__
    with pytest.raises(AttributeError, match=re.escape("has no attribute 'OtherLayout'")):
        module.OtherLayout  # noqa: B018


@by_family
def test_what_runs_on_this_machine(kernel, kda_layer, device, family, monkeypatch, caplog):
    """With heads of 128 channels in bf16, a Hopper GPU runs nothing but kernels; elsewhere it is PyTorch."""
    import logging

    caplog.set_level(logging.INFO, "flash_kda")
    monkeypatch.setenv("FLASH_KDA_STRICT", "1")
    _, ours, _ = kda_layer(family, dtype=torch.bfloat16, head_dim=128)
    with torch.no_grad():
        assert ours(hidden(1, 70, device).bfloat16()).isfinite().all()
    said = {record.getMessage().split(":")[0] for record in caplog.records if record.name == "flash_kda"}
    assert said == {"cuda prefill" if has_cuda_kernel(kernel, device) else "pytorch"}
