"""The two KDA functions of transformers' `kimi_linear`, `glm5_next` and `bailing_hybrid`, as pure layers.

`kernels` accepts a layer only if it is an `nn.Module` with no constructor and no members but `forward`, `has_backward`
and `can_torch_compile`, so what the two share are functions of this module. Parameter names and order are those of the
functions replaced: the models pass some arguments by position and some by name.
"""

import torch
from torch import nn

from ..chunk import chunk_kda
from ..recurrent import fused_recurrent_kda


class chunk_kimi_delta_attention(nn.Module):
    """Replaces `chunk_kda`: prefill, training, and continuing a cached sequence by more than one token."""

    # Where autograd needs a gradient, chunk_kda takes the differentiable PyTorch path.
    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kimi Delta Attention over whole sequences.

        Args:
            query, key: `[B, T, H, K]`, any strides. The models hand over token-contiguous views of their convolution's
                output; the kernel reads channel-contiguous ones, so such a view costs one copy here.
            value: `[B, T, HV, V]`, as `query`; HV is a multiple of H.
            g: `[B, T, HV, K]`, log decay (not above 0), fp32 or the dtype of `query`.
            beta: `[B, T, HV]`, already through the sigmoid.
            chunk_size: ignored; the kernel has its own chunk and the result does not depend on it.
            initial_state: `[N, HV, K, V]` (K-first) or None for zeros. Never written to, so a live cache tensor is safe.
            output_final_state: return the state after the last token.
            use_qk_l2norm_in_kernel: L2-normalise `query` and `key` over K first.
            kwargs: the model's own keyword arguments. `cu_seqlens` or `cu_seq_lens_q`, `[N + 1]` int32 or int64,
                marks N sequences packed into a batch of 1; everything else is ignored.

        Returns:
            Output `[B, T, HV, V]` in the dtype of `query`, and the final state `[N, HV, K, V]` in fp32 (fp64 for fp64
            inputs) in memory of its own, or None. N is B unless sequences are packed.

        Raises:
            ValueError: as `chunk_kda` does; and for `seq_idx` without `cu_seq_lens_q`, which would let packed sequences
                run into each other.
        """
        return chunk_kda(
            _channel_contiguous(query),
            _channel_contiguous(key),
            _channel_contiguous(value),
            _channel_contiguous(g),
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=_packed_offsets(kwargs),
        )


class recurrent_kimi_delta_attention(nn.Module):
    """Replaces `fused_recurrent_kda`: one new token for a sequence that has a state."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        output_final_state: bool,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kimi Delta Attention token by token; arguments and results are those of `chunk_kimi_delta_attention`."""
        return fused_recurrent_kda(
            _channel_contiguous(query),
            _channel_contiguous(key),
            _channel_contiguous(value),
            _channel_contiguous(g),
            beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=_packed_offsets(kwargs),
        )


def _channel_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _packed_offsets(kwargs: dict) -> torch.Tensor | None:
    """Where packed sequences begin and end, under either name a model passes it by; transformers' own collator and
    FlashAttention use `cu_seq_lens_q`."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    if kwargs.get("seq_idx") is not None:
        raise ValueError(
            "seq_idx: expected cu_seq_lens_q beside it, got seq_idx alone. Ask the collator for both "
            "(return_flash_attn_kwargs=True), or packed sequences would run into each other."
        )
    return None
