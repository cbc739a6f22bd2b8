"""Pure layers that `kernels.kernelize` puts in the place of transformers' functions.

The names are those under which transformers' default mapping looks into `kernels-community/fla`, so changing to Flash
KDA is a change of repository and nothing else. `flash_kda.kernel_mapping` builds the mapping.
"""

from .kda import chunk_kimi_delta_attention, recurrent_kimi_delta_attention

__all__ = ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"]
