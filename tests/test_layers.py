"""The layers by themselves, called as the models call them, and the mapping that installs them."""

import inspect
import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, kda_module, relative_error, require_kernel_support, tiny_model

LAYERS = {"chunk_kda": "chunk_kimi_delta_attention", "fused_recurrent_kda": "recurrent_kimi_delta_attention"}
MAPPED = LAYERS | {"causal_conv1d_fn": "causal_conv1d_fn", "causal_conv1d_update": "causal_conv1d_update"}
WHOLE = ("KimiLinearDeltaAttention", "Glm5NextTextLinearAttention", "BailingHybridDeltaAttention")
HEADS, DIM = 2, 128
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-3}

by_layer = pytest.mark.parametrize("name", LAYERS.values())


def arguments(tokens, *, batch=1, dtype=torch.bfloat16, device="cpu", states=None, seed=0):
    """What a model hands over: q, k, v as views of one convolution output of shape [B, 3HD, T], so token-contiguous."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    mixed = normal(batch, 3 * HEADS * DIM, tokens).to(dtype)
    q, k, v = (x.view(batch, tokens, HEADS, DIM) for x in mixed.transpose(1, 2).chunk(3, dim=-1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        query=q,
        key=k,
        value=v,
        g=-torch.nn.functional.softplus(normal(batch, tokens, HEADS, DIM)).to(wide),
        beta=torch.sigmoid(normal(batch, tokens, HEADS).to(dtype)),
        initial_state=normal(batch if states is None else states, HEADS, DIM, DIM).to(wide),
    )


def call(kernel, name, args, **kwargs):
    kwargs = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, **kwargs}
    return getattr(kernel.layers, name)()(**args, **kwargs)


def oracle(kernel, args, **kwargs):
    q, k, v, g, beta = (args[n] for n in ("query", "key", "value", "g", "beta"))
    return kernel.reference.recurrent_kda(
        q, k, v, g, beta, initial_state=args["initial_state"], use_qk_l2norm_in_kernel=True, **kwargs
    )


def test_exported(kernel):
    assert sorted(kernel.layers.__all__) == sorted([*MAPPED.values(), *WHOLE, "FusedRMSNormGated"])


@by_layer
def test_nothing_but_forward_and_flags(kernel, name):
    layer = getattr(kernel.layers, name)
    own = {n for n, _ in inspect.getmembers(layer)} - {n for n, _ in inspect.getmembers(torch.nn.Module)}
    assert own == {"has_backward", "can_torch_compile"}
    assert layer.__init__ is torch.nn.Module.__init__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("function", LAYERS)
def test_fits_what_it_replaces(kernel, family, function):
    """`kernels`' own check against the function of the model; and the names too, which it does not look at although the
    models pass arguments by name."""
    module = kda_module(tiny_model(family))
    from kernels.layer.layer import _validate_layer

    replaced, layer = type(module._kernel_funcs[function]), getattr(kernel.layers, LAYERS[function])
    _validate_layer(check_cls=replaced, cls=layer, repo=f"{kernel.__name__}:{layer.__name__}")
    ours, theirs = inspect.signature(layer.forward).parameters, inspect.signature(replaced.forward).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@by_layer
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_value(kernel, device, name, dtype, tokens):
    args = arguments(tokens, batch=2, dtype=dtype, device=device)
    assert tokens == 1 or args["query"].stride(-1) == tokens
    o, state = call(kernel, name, args)
    expected_o, expected_state = oracle(kernel, args)
    assert o.dtype == dtype and state.dtype == args["initial_state"].dtype
    assert relative_error(o, expected_o) < TOLERANCE[dtype]
    assert relative_error(state, expected_state) < TOLERANCE[dtype]


@by_layer
def test_layout_does_not_change_a_bit(kernel, device, name):
    args = arguments(70, batch=2, device=device)
    contiguous = {n: x.contiguous() for n, x in args.items()}
    for a, b in zip(call(kernel, name, args), call(kernel, name, contiguous)):
        assert torch.equal(a, b)


@by_layer
def test_cache_tensor_is_neither_written_nor_returned(kernel, device, name):
    """The model hands over the state of its live cache, then copies the result into it."""
    args = arguments(3, batch=2, device=device)
    before = args["initial_state"].clone()
    _, state = call(kernel, name, args)
    assert torch.equal(args["initial_state"], before)
    assert state.untyped_storage().data_ptr() != args["initial_state"].untyped_storage().data_ptr()
    assert not torch.equal(state, before)


@by_layer
def test_without_states(kernel, device, name):
    args = arguments(70, device=device) | {"initial_state": None}
    zeros = args | {"initial_state": torch.zeros(1, HEADS, DIM, DIM, device=device)}
    o, state = call(kernel, name, args, output_final_state=False)
    assert state is None
    assert torch.equal(o, call(kernel, name, zeros)[0])


@by_layer
@pytest.mark.parametrize("keyword", ["cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed(kernel, device, name, keyword, dtype):
    args = arguments(150, device=device, states=4)
    offsets = torch.tensor([0, 64, 64, 65, 150], dtype=dtype, device=device)
    o, state = call(kernel, name, args, **{keyword: offsets, "cu_seq_lens_k": offsets, "max_length_q": 85})
    expected_o, expected_state = oracle(kernel, args, cu_seqlens=offsets)
    assert relative_error(o, expected_o) < TOLERANCE[torch.bfloat16]
    assert relative_error(state, expected_state) < TOLERANCE[torch.bfloat16]
    assert relative_error(call(kernel, name, args | {"initial_state": None})[0], expected_o) > 0.01


@by_layer
def test_seq_idx_alone_is_refused(kernel, device, name):
    args = arguments(8, device=device, states=2)
    ids = torch.tensor([[0] * 5 + [1] * 3], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="seq_idx.*cu_seq_lens_q"):
        call(kernel, name, args, seq_idx=ids)
    offsets = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    assert torch.equal(
        call(kernel, name, args, seq_idx=ids, cu_seq_lens_q=offsets)[0],
        call(kernel, name, args, cu_seqlens=offsets)[0],
    )


@by_layer
def test_other_arguments_of_the_models_change_nothing(kernel, device, name):
    args = arguments(70, device=device)
    expected = call(kernel, name, args)
    extra = dict(input_ids=None, output_router_logits=True, position_embeddings=(args["g"], args["g"]), cu_seqlens=None)
    if name == "chunk_kimi_delta_attention":
        extra["chunk_size"] = 16
    for a, b in zip(call(kernel, name, args, **extra), expected):
        assert torch.equal(a, b)


@by_layer
def test_has_backward(kernel, device, name):
    assert getattr(kernel.layers, name).has_backward
    args = arguments(70, dtype=torch.float64, device=device)
    leaves = {n: x.clone().requires_grad_() for n, x in args.items()}

    def gradients(run):
        o, state = run(leaves)
        return torch.autograd.grad(o.square().sum() + state.square().sum(), leaves.values())

    expected = gradients(lambda leaves: oracle(kernel, leaves))
    for leaf, a, b in zip(leaves, gradients(lambda leaves: call(kernel, name, leaves)), expected):
        assert relative_error(a, b) < 1e-9, leaf


@by_layer
@torch.no_grad()
def test_can_torch_compile(kernel, device, name):
    """One graph for every length, which is what the flag says."""
    assert getattr(kernel.layers, name).can_torch_compile
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda args: call(kernel, name, args), fullgraph=True, dynamic=True, backend=backend)
    for tokens in (1,) if name.startswith("recurrent") else (70, 133):
        args = arguments(tokens, batch=2, device=device)
        for a, b in zip(compiled(args), call(kernel, name, args)):
            assert torch.equal(a, b)
    assert len(graphs) == 1


# --- kernel_mapping ---------------------------------------------------------------------------------------------------


def sources(mapping):
    return list(itertools.chain.from_iterable(by_device.values() for by_device in mapping.values()))


def test_mapping_of_this_build(kernel):
    kernels = pytest.importorskip("kernels")
    mapping = kernel.kernel_mapping()
    hopper = kernels.Device("cuda", properties=kernels.CUDAProperties(90, 90))
    assert {name: set(by_device) for name, by_device in mapping.items()} == {name: {hopper, "cpu"} for name in MAPPED}
    for name, by_device in mapping.items():
        for source in by_device.values():
            assert source.load() is getattr(kernel.layers, MAPPED[name])


def test_mapping_of_a_directory(kernel):
    pytest.importorskip("kernels")
    build = Path(kernel.__file__).parent
    for source in sources(kernel.kernel_mapping(build)):
        assert source.load() is getattr(kernel.layers, source.layer_name)
    # Another spelling of the directory is the same source: `kernels` would import the build a second time.
    assert sources(kernel.kernel_mapping(build / ".." / build.name)) == sources(kernel.kernel_mapping(build))


def test_mapping_of_the_hub_honours_local_kernels(kernel, monkeypatch):
    """No network is needed, and version 1 is what is asked for if nothing is said."""
    pytest.importorskip("kernels")
    monkeypatch.setenv("LOCAL_KERNELS", f"moonshot/flash-kda={Path(kernel.__file__).parent}")
    for source in sources(kernel.kernel_mapping("moonshot/flash-kda")):
        assert source.version == 1
        assert source.load() is getattr(kernel.layers, source.layer_name)


def test_mapping_takes_devices_and_names(kernel):
    kernels = pytest.importorskip("kernels")
    every_gpu = kernels.Device("cuda")
    mapping = kernel.kernel_mapping(devices=[every_gpu, "xpu"], names=["chunk_kda"])
    assert {name: set(by_device) for name, by_device in mapping.items()} == {"chunk_kda": {every_gpu, "xpu"}}


@pytest.mark.parametrize(
    "arguments, keywords, says",
    [
        (("flash-kda",), {}, "repository: expected 'owner/name' or a Path, got 'flash-kda'"),
        (("/work/build",), {}, "repository: expected 'owner/name' or a Path, got '/work/build'"),
        (("a/b",), dict(version=1, revision="main"), "expected version or revision, got both"),
        ((), dict(version=1), "only with a Hub repository, got repository=None"),
        ((), dict(names=["chunk_gdn"]), "names: expected some of chunk_kda, fused_recurrent_kda, .*, got 'chunk_gdn'"),
    ],
)
def test_mapping_refuses(kernel, arguments, keywords, says):
    pytest.importorskip("kernels")
    with pytest.raises(ValueError, match=says):
        kernel.kernel_mapping(*arguments, **keywords)


def test_a_model_without_replaceable_functions_says_so(kernel):
    require_kernel_support()
    assert kernel.replaced_functions(torch.nn.Linear(2, 2)) == {}
