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
import weakref

import torch
from torch import nn

from ..chunk import chunk_kda
from ..gated_norm import gated_rms_norm
from ..linears import are_few_rows, linears
from ..recurrent import fused_recurrent_kda
from ..short_conv import short_conv
from ..step import serves, step, whole_step
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
        decay, output = (gate.f_a_proj, gate.f_b_proj), (self.g_a_proj, self.g_b_proj)
        return _forward(self, x, decay, None, output, cache_params, kwargs)


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
        decay, output = (gate.f_a_proj, gate.f_b_proj), (self.g_a_proj, self.g_b_proj)
        return _forward(self, x, decay, gate.safe_gate_lower_bound, output, cache_params, kwargs)


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
        return _forward(self, x, (gate.f_proj,), lower_bound, (self.g_proj,), cache_params, kwargs)


def _without_padding(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return hidden_states
    return (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)


def _forward(module, x, decay, lower_bound, output, cache, kwargs) -> torch.Tensor:
    """A layer, from hidden states without padding. `decay` and `output` are the projections to the input of the decay's gate
    and to the output gate, one module or two in a row; `lower_bound` is the decay's, None for softplus."""
    cu_seqlens = _packed_offsets(kwargs)
    conv_state, state = _states(cache, module.layer_idx)
    qkv_modules = (module.q_proj, module.k_proj, module.v_proj)
    few = are_few_rows(x)
    if few and x.shape[1] == 1:
        y = _whole_step(module, x, qkv_modules, decay, output, lower_bound, conv_state, state, cu_seqlens)
        if y is not None:
            return y
    if few:  # a decode step: what reads x in one launch
        *qkv, f, g, beta = linears((*qkv_modules, decay[0], output[0], module.b_proj), (x,) * 6, few)
        if len(decay) == 2:
            f, g = linears((decay[1], output[1]), (f, g), few)
        o = _step(module, qkv, f, beta, g, lower_bound, conv_state, state, cu_seqlens)
        if o is not None:
            return linears((module.o_proj,), (o,), few)[0]
    else:  # each when it is needed, so that less memory is held at a time
        qkv = [project(x) for project in qkv_modules]
    q, k, v = _convolve(module, qkv, conv_state, cache, cu_seqlens)
    del qkv
    if not few:
        f, beta = _chain(decay, x), module.b_proj(x)
    o = _attend(module, q, k, v, f, beta, lower_bound, state, cache, cu_seqlens)
    del q, k, v, f
    if not few:
        g = _chain(output, x)
    norm = module.o_norm
    o = gated_rms_norm(o, g.view(o.shape), norm.weight, norm.variance_epsilon).flatten(2)
    return linears((module.o_proj,), (o,), few)[0]


def _whole_step(module, x, qkv, decay, output, lower_bound, conv_state, state, cu_seqlens) -> torch.Tensor | None:
    """One token a sequence by one op, projections included; None where that cannot be."""
    if state is None or cu_seqlens is not None or module.activation not in ("silu", "swish"):
        return None
    gate, norm = module.forget_gate, module.o_norm
    A_log, dt_bias = _wide(gate.A_log), _wide(gate.dt_bias)
    parts = module.b_proj, module.o_proj, module.conv1d, conv_state, A_log, dt_bias, lower_bound, state
    return whole_step(x, qkv, decay, output, *parts, norm.weight, norm.variance_epsilon)


def _step(module, qkv, f, beta, g, lower_bound, conv_state, state, cu_seqlens) -> torch.Tensor | None:
    """What lies between the projections of one token a sequence, in one kernel; None where that cannot be."""
    if state is None or cu_seqlens is not None:
        return None
    conv, norm = module.conv1d, module.o_norm
    weight = conv.weight.squeeze(1)
    A_log, dt_bias = _wide(module.forget_gate.A_log), _wide(module.forget_gate.dt_bias)
    if not serves(
        (*qkv, f, g), beta, weight, conv.bias, module.activation, conv_state, A_log, dt_bias, state, norm.weight
    ):
        return None
    eps = norm.variance_epsilon
    return step(*qkv, f, beta, g, weight, conv_state, A_log, dt_bias, lower_bound, state, norm.weight, eps)


def _chain(modules, x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x


def _attend(module, q, k, v, f, beta, lower_bound, state, cache, cu_seqlens) -> torch.Tensor:
    """KDA on `[B, T, H * D]` q, k, v and gate input and `[B, T, H]` logits of beta: `[B, T, H, D]`; and the cache's part."""
    heads = (*q.shape[:2], -1, module.head_dim)
    q, k, v, f = (x.view(heads) for x in (q, k, v, f))
    options = dict(
        A_log=_wide(module.forget_gate.A_log),
        dt_bias=_wide(module.forget_gate.dt_bias),
        lower_bound=lower_bound,
        use_gate_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        initial_state=state,
        cu_seqlens=cu_seqlens,
    )
    inference = not torch.is_grad_enabled()
    if inference and v.is_cuda and not torch.compiler.is_compiling():
        options["out"] = v  # whose values are read before outputs take their place: 67 MB of 8192 tokens of 48B
    if inference and state is not None:  # a few tokens or many, the cache's tensor is updated in place
        return fused_recurrent_kda(q, k, v, f, beta, **options, inplace_final_state=True)[0]
    attend = fused_recurrent_kda if "out" in options else chunk_kda
    o, final_state = attend(q, k, v, f, beta, **options, output_final_state=cache is not None)
    if cache is not None:
        cache.update_recurrent_state(final_state, module.layer_idx)
    return o


# The kernels read a gate's parameters in float32; Kimi Linear keeps them in bfloat16. Two casts a step are more kernels than
# the step itself has, so they are kept: id of a parameter -> (that parameter, its version and address, the copy).
_WIDE: dict[int, tuple[weakref.ref, tuple[int, int], torch.Tensor]] = {}


def _wide(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.dtype != torch.bfloat16 or not parameter.is_cuda or torch.is_grad_enabled():
        return parameter
    if torch.compiler.is_compiling() or parameter.is_inference():  # the latter has no version
        return parameter
    name, key = id(parameter), (parameter._version, parameter.data_ptr())
    known = _WIDE.get(name)
    if known is None or known[0]() is not parameter or known[1] != key:
        if torch.cuda.is_current_stream_capturing():  # a copy made in a graph is there after a replay only
            return parameter
        copy = parameter.detach().flatten().float()
        _WIDE[name] = known = weakref.ref(parameter, lambda _: _WIDE.pop(name, None)), key, copy
    return known[2]


def _states(cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The live tensors of a layer's cache, or None where it has seen nothing yet."""
    if cache is None or not cache.has_previous_state(layer_idx):
        return None, None
    layer = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


def _convolve(module, qkv, conv_state, cache, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three projections `[B, T, H * D]` after their convolution; and the cache's part."""
    weight = module.conv1d.weight.squeeze(1)
    final_state = conv_state
    if cache is not None and conv_state is None:
        sequences = qkv[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
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
