"""Pure layers that `kernels.kernelize` puts in the place of transformers' functions and modules.

The names are those under which transformers' default mapping looks into `kernels-community/fla`, so changing to Flash
KDA is a change of repository and nothing else; whole modules are named after the class that they replace.
`flash_kda.kernel_mapping` builds the mapping.
"""

from .conv import causal_conv1d_fn, causal_conv1d_update
from .delta_attention import BailingHybridDeltaAttention, Glm5NextTextLinearAttention, KimiLinearDeltaAttention
from .kda import chunk_kimi_delta_attention, recurrent_kimi_delta_attention
from .norm import FusedRMSNormGated

__all__ = [
    "BailingHybridDeltaAttention",
    "FusedRMSNormGated",
    "Glm5NextTextLinearAttention",
    "KimiLinearDeltaAttention",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_kimi_delta_attention",
    "recurrent_kimi_delta_attention",
]
