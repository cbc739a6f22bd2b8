"""The gated norm of transformers' KDA models, as a pure layer."""

import torch
from torch import nn

from ..gated_norm import gated_rms_norm


class FusedRMSNormGated(nn.Module):
    """Replaces `RMSNormGated` where its gate is a sigmoid."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """`rms_norm(hidden_states) * weight * sigmoid(gate)`, in fp32 and rounded once.

        Args:
            hidden_states, gate: `[.., D]`, one shape. The module has `weight` `[D]` and `variance_epsilon`.

        Returns:
            The shape and dtype of `hidden_states`. A module with another activation, or a call without a gate, is served
            by the module's own code.
        """
        if gate is None or getattr(self, "activation", None) != "sigmoid":
            return type(self).forward(self, hidden_states, gate)
        return gated_rms_norm(hidden_states, gate, self.weight, self.variance_epsilon)
