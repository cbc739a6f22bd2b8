"""The whole KDA module of transformers' `kimi_linear`, `glm5_next` and `bailing_hybrid`, one pure layer a family.

Each forward keeps the module's projections and runs everything between them in this package: convolution and SiLU of q, k
and v in one pass, KDA on the raw gate and the logits of beta, the gated norm. Arguments, result, cache and padding are those
of the original. What is different, on purpose: `cu_seqlens` or `cu_seq_lens_q` keeps packed sequences apart, in the
convolution too; and between the projections fewer values are rounded to the model's dtype.

`kernels` accepts a layer only if it is an `nn.Module` with no constructor and no members but `forward`, `has_backward` and
`can_torch_compile`, so what the families share are functions of this module.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import nn

from .. import dispatch
from ..contract import check_call, check_outputs
from ..gated_norm import gated_rms_norm
from ..short_conv import short_conv
from .kda import _packed_offsets

# Class of a transformers model -> the family that defines it. The layers below bear the names of the classes.
FAMILIES = {
    "KimiLinearDeltaAttention": "kimi_linear",
    "Glm5NextTextLinearAttention": "glm5_next",
    "BailingHybridDeltaAttention": "bailing_hybrid",
}


class KimiLinearDeltaAttention(nn.Module):
    """Replaces the module of the same name: softplus gate, gate projections of low rank."""

    # Where autograd needs a gradient, each function takes its differentiable PyTorch path.
    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: object | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """A layer of Kimi Delta Attention, projections included.

        Args:
            hidden_states: `[B, T, hidden]`.
            cache_params: transformers' cache. It is read and updated in place: the convolution's last inputs
                `[N, 3 * H * D, W]` and the fp32 state `[N, H, D, D]`.
            attention_mask: `[B, T]`, 0 or False at padding, whose hidden states count as zero; or None.
            kwargs: the model's own keyword arguments. `cu_seqlens` or `cu_seq_lens_q`, `[N + 1]` int32 or int64, marks N
                sequences packed into a batch of 1; everything else is ignored.

        Returns:
            `[B, T, hidden]`.

        Raises:
            ValueError: `seq_idx` without `cu_seq_lens_q`; a cache of another number of sequences.
        """
        x = _without_padding(hidden_states, attention_mask)
        gate = self.forget_gate
        o = _attend(self, x, lambda: gate.f_b_proj(gate.f_a_proj(x)), None, cache_params, kwargs)
        return _output(self, o, self.g_b_proj(self.g_a_proj(x)))


class Glm5NextTextLinearAttention(nn.Module):
    """Replaces the module of the same name: gate bounded from below or softplus, gate projections of low rank."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: object | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """A layer of Kimi Delta Attention; arguments and result are those of `KimiLinearDeltaAttention`."""
        x = _without_padding(hidden_states, attention_mask)
        gate = self.forget_gate
        lower_bound = gate.safe_gate_lower_bound
        o = _attend(self, x, lambda: gate.f_b_proj(gate.f_a_proj(x)), lower_bound, cache_params, kwargs)
        return _output(self, o, self.g_b_proj(self.g_a_proj(x)))


class BailingHybridDeltaAttention(nn.Module):
    """Replaces the module of the same name: gate bounded from below or softplus, gate projections of full rank."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: object | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """A layer of Kimi Delta Attention; arguments and result are those of `KimiLinearDeltaAttention`."""
        x = _without_padding(hidden_states, attention_mask)
        gate = self.forget_gate
        lower_bound = gate.lower_bound if gate.safe_gate else None
        o = _attend(self, x, lambda: gate.f_proj(x), lower_bound, cache_params, kwargs)
        return _output(self, o, self.g_proj(x))


def _without_padding(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return hidden_states
    return (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)


def _attend(module, x, raw_gate, lower_bound, cache, kwargs) -> torch.Tensor:
    """From the hidden states to the output of KDA `[B, T, H, D]`. `raw_gate` computes the input of the decay's gate: it is
    called when the projections of q, k and v are no longer needed, which is less memory at a time."""
    cu_seqlens = _packed_offsets(kwargs)
    conv_state, state = _states(cache, module.layer_idx)
    q, k, v = _convolve(module, x, conv_state, cache, cu_seqlens)
    heads = (*x.shape[:2], -1, module.head_dim)
    gate = module.forget_gate
    call = check_call(
        q.view(heads),
        k.view(heads),
        v.view(heads),
        raw_gate().view(heads),
        module.b_proj(x),
        A_log=gate.A_log,
        dt_bias=gate.dt_bias,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        scale=None,
        lower_bound=lower_bound,
        use_gate_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=False,
        state_v_first=False,
    )
    if state is not None and not torch.is_grad_enabled():
        o = torch.empty_like(call.v)
        check_outputs(call, o, state)
        dispatch.execute_into(call, o, state)  # the cache's tensor, in place
        return o
    o, final_state = dispatch.execute(call, output_final_state=cache is not None)
    if cache is not None:
        cache.update_recurrent_state(final_state, module.layer_idx)
    return o


def _states(cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The live tensors of a layer's cache, or None where it has seen nothing yet."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None, None
    layer = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


def _convolve(module, x, conv_state, cache, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v `[B, T, H * D]` after their projections and the convolution, and the cache's part of it."""
    qkv = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    weight = module.conv1d.weight.squeeze(1)
    final_state = conv_state
    if cache is not None and conv_state is None:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final_state = qkv[0].new_empty(sequences, *weight.shape)
    convolved = short_conv(
        qkv,
        weight,
        module.conv1d.bias,
        module.activation,
        initial_state=conv_state,
        final_state=final_state,
        cu_seqlens=cu_seqlens,
    )
    if cache is not None and conv_state is None:
        cache.update_conv_state(final_state, module.layer_idx)
    return convolved


def _output(module, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    norm = module.o_norm
    return module.o_proj(gated_rms_norm(o, gate.view(o.shape), norm.weight, norm.variance_epsilon).flatten(2))


# --- transformers' KernelConfig -------------------------------------------------------------------------------------------
# from_pretrained builds a class named `<layer>Layout`, found in the layer's module, in place of the original. Here that is
# the original itself under the other name, made when it is asked for: this package does not import transformers by itself,
# and wherever the kernel is not used the model runs the original's code.


@functools.cache
def _layout(name: str) -> type:
    family = FAMILIES[name]
    original = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    return type(f"{name}Layout", (original,), {"forward": original.forward, "__module__": __name__})


def __getattr__(name: str) -> type:
    original = name.removesuffix("Layout")
    if original != name and original in FAMILIES:
        return _layout(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
