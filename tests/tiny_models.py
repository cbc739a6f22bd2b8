"""Tiny transformers models with Kimi Delta Attention, one a family, and how their outputs are compared.

Built so that a comparison of logits tells something: weights are drawn large enough for every layer to matter, and
nothing in them is discontinuous (every expert is chosen, every token attended to), so that two correct runs in one
precision differ by rounding and not by a flipped choice.
"""

import contextlib
import logging

import pytest
import torch

FAMILIES = ("kimi_linear", "glm5_next", "bailing_hybrid")
FUNCTIONS = ("chunk_kda", "fused_recurrent_kda", "causal_conv1d_fn", "causal_conv1d_update")
VOCAB = 128
# Models that a comparison of bf16 errors takes together: two independent roundings of one lie up to 5 % apart by chance. On a
# CPU, where both sides compute KDA in fp32 and the kernels' side rounds less, two will do.
SEEDS = range(3 if torch.cuda.is_available() else 2)

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    kv_lora_rank=16,
    v_head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,  # a random model must not stop early
)


def require_kernel_support():
    """transformers with its kernel support in working order, or a skip that says what is wrong."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    pytest.importorskip("kernels", minversion="0.16")
    if not transformers.utils.is_kernels_available():
        import kernels

        pytest.skip(
            f"transformers {transformers.__version__} switches kernels off: it does not take kernels {kernels.__version__}"
        )
    return transformers


def tiny_model(family: str, *, head_dim: int = 16, softplus: bool = False, seed: int = 0) -> torch.nn.Module:
    """A causal language model of the family in fp32, eval mode, on the CPU: three KDA layers and one of attention.

    `head_dim` 128 is what the CUDA kernel takes. `softplus` asks for the unbounded gate where the family has a choice.
    """
    transformers = require_kernel_support()
    if not hasattr(transformers.models, family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    layer_types = ["linear_attention"] * 3 + ["full_attention"]
    torch.manual_seed(seed)
    if family == "kimi_linear":
        model = transformers.KimiLinearForCausalLM(
            transformers.KimiLinearConfig(
                **COMMON,
                num_local_experts=4,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                linear_head_dim=head_dim,
                linear_num_heads=2,
                layer_types=layer_types,
            )
        )
    elif family == "bailing_hybrid":
        model = transformers.BailingHybridForCausalLM(
            transformers.BailingHybridConfig(
                **COMMON,
                num_local_experts=4,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                head_dim=head_dim,
                layer_group_size=4,
                num_mtp_layers=0,
                kda_safe_gate=not softplus,
            )
        )
    else:
        text = dict(
            **COMMON,
            n_routed_experts=4,
            q_lora_rank=16,
            qk_nope_head_dim=16,
            linear_head_dim=head_dim,
            linear_num_heads=2,
            linear_lower_bound=None if softplus else -5.0,
            index_topk=4096,
            index_head_dim=16,
            index_n_heads=2,
            index_kpool=16,
            hc_mult=2,
        )
        vision = dict(
            depth=1,
            hidden_size=32,
            num_heads=2,
            intermediate_size=32,
            out_hidden_size=64,
            projection_intermediate_size=32,
            image_size=28,
        )
        model = transformers.Glm5NextForConditionalGeneration(
            transformers.Glm5NextConfig(
                text_config=text,
                vision_config=vision,
                image_token_id=120,
                video_token_id=121,
                image_start_token_id=122,
                image_end_token_id=123,
                video_start_token_id=124,
                video_end_token_id=125,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.shape[-1] > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def kda_module(model) -> torch.nn.Module:
    """The first KDA layer of a model."""
    return next(m for m in model.modules() if hasattr(m, "_kernel_funcs"))


def random_ids(batch: int, length: int, *, seed: int = 0, device="cpu") -> torch.Tensor:
    """Token ids without the special ones (below 3, and from 120 on)."""
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected values, in fp64."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, f"{actual.shape} instead of {expected.shape}"
    return ((actual - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def kernelized(model, mapping: dict, *, mode=None):
    """Kernelize the model with nothing but `mapping`, and put the originals back at the end: the functions replaced
    belong to the process, so a test that left them in place would change the next one's meaning."""
    import kernels

    logging.getLogger("kernels").setLevel(logging.ERROR)  # one warning a module that has no entry in the mapping
    try:
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=mode or kernels.Mode.INFERENCE)
        yield model
    finally:
        with kernels.use_kernel_mapping({}, inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE)


def assert_replaced(kernel, model):
    """The four functions of a KDA layer, and no other, run layers of this very build."""
    replaced = {name: where for name, where in kernel.replaced_functions(model).items() if where}
    assert replaced == {
        "chunk_kda": f"{kernel.__name__}.layers.kda.chunk_kimi_delta_attention",
        "fused_recurrent_kda": f"{kernel.__name__}.layers.kda.recurrent_kimi_delta_attention",
        "causal_conv1d_fn": f"{kernel.__name__}.layers.conv.causal_conv1d_fn",
        "causal_conv1d_update": f"{kernel.__name__}.layers.conv.causal_conv1d_update",
    }


def assert_layers_replaced(kernel, model):
    """Every KDA layer runs whole in this very build."""
    replaced = kernel.replaced_layers(model)
    assert len(replaced) == 3
    for name, where in replaced.items():
        layer = type(model.get_submodule(name)).__name__.removesuffix("Layout")
        assert where == f"{kernel.__name__}.layers.delta_attention.{layer}"


def assert_original(kernel, model):
    replaced = kernel.replaced_functions(model)
    assert set(FUNCTIONS) <= set(replaced), f"the model has no replaceable KDA functions: {replaced}"
    assert not any(replaced.values()), f"kernels left in place: {replaced}"
