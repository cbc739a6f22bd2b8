"""`kernel_mapping`: which function or module of a model is replaced by which layer, on which device, in the form `kernels`
takes.

`kernels` is imported inside the functions only: the package itself needs nothing but torch.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from . import layers
from .layers.delta_attention import FAMILIES

# Function of a transformers model -> layer of `flash_kda.layers` that replaces it.
FUNCTIONS = {
    "chunk_kda": "chunk_kimi_delta_attention",
    "fused_recurrent_kda": "recurrent_kimi_delta_attention",
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
}
# Not among the functions by itself: models of other families have a module of this name, too.
NORMS = {"RMSNormGated": "FusedRMSNormGated"}
WHOLE_LAYERS = {name: name for name in FAMILIES}
NAMES = FUNCTIONS | NORMS | WHOLE_LAYERS


def kernel_mapping(
    repository: str | PathLike | None = None,
    *,
    version: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool | list[str] = False,
    devices: Sequence = ("cuda", "cpu"),
    names: Sequence[str] | None = None,
    whole_layers: bool = False,
) -> dict:
    """The mapping for `kernels.use_kernel_mapping`, `kernels.register_kernel_mapping` or transformers' `KernelConfig`.

    Example:
        ```python
        flash_kda = kernels.get_kernel("moonshot/flash-kda", version=1, trust_remote_code=True)
        with kernels.use_kernel_mapping(flash_kda.kernel_mapping(), inherit_mapping=False):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE)
        ```

    Args:
        repository: where the layers come from.
            None (default): this very build, the one the function belongs to, however it was loaded (from the Hub, a
            directory or a wheel). Nothing is loaded twice and no network is used.
            A `Path`: a local kernel repository, its `build` directory or one variant directory.
            A string `"owner/name"`: a repository of the Hub, loaded when a model is first kernelized. The environment
            variable `LOCAL_KERNELS` is honoured (`kernels.LayerRepository(version=...)` asks the Hub in spite of it).
        version: of a Hub repository; 1 if neither it nor `revision` is given.
        revision: branch, tag or commit of a Hub repository, instead of `version`.
        trust_remote_code: of a Hub repository, as in `kernels.get_kernel`: whether to load code of a publisher that
            the Hub does not list as trusted.
        devices: device types or `kernels.Device` objects. `"cuda"` means compute capability 9.0 alone, which has two
            reasons: other GPUs keep the kernels they have, and transformers, which registers its defaults for all
            GPUs anew on every `use_kernels=True`, `train()` and `eval()`, does not overwrite the narrower entry.
            `kernels.Device("cuda")` names every GPU and is overwritten so. Other types are taken as they are.
        names: what to replace, out of the functions `"chunk_kda"`, `"fused_recurrent_kda"`, `"causal_conv1d_fn"` and
            `"causal_conv1d_update"`, the module `"RMSNormGated"`, and the KDA modules named under `whole_layers`. None
            (default): the four functions.
        whole_layers: instead of the functions, the KDA modules themselves: `"KimiLinearDeltaAttention"`,
            `"Glm5NextTextLinearAttention"` and `"BailingHybridDeltaAttention"`. Default False.

    `kernels` must be told that the classes of whole layers may be replaced; this function does so
    (`kernels.replace_kernel_forward_from_hub`) for those that the installed transformers has.

    Returns:
        `{name: {device: repository object}}`. The layers serve every mode (inference, training, torch.compile).

    Raises:
        ValueError: an unknown name, a string that is no `owner/name`, both version and revision, or either of them
            without a Hub repository.
        ImportError: `kernels` is not installed.
    """
    from kernels import CUDAProperties, Device

    if whole_layers and names is not None:
        raise ValueError(f"names: expected None with whole_layers=True, got {names!r}")
    names = tuple((WHOLE_LAYERS if whole_layers else FUNCTIONS) if names is None else names)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"names: expected some of {', '.join(NAMES)}, got {name!r}")
    on_hub = isinstance(repository, str)
    if on_hub and (len(parts := repository.split("/")) != 2 or not all(parts)):
        raise ValueError(f"repository: expected 'owner/name' or a Path, got {repository!r}")
    if version is not None and revision is not None:
        raise ValueError(f"expected version or revision, got both: {version!r} and {revision!r}")
    if not on_hub and (version is not None or revision is not None):
        raise ValueError(f"version and revision: expected only with a Hub repository, got repository={repository!r}")

    for name in names:
        if name in WHOLE_LAYERS:
            _make_replaceable(name)
    if on_hub and revision is None:
        version = 1 if version is None else version
    if repository is not None and not on_hub:
        # `kernels` keys loaded modules by path as given: two spellings of one directory would load it twice.
        repository = Path(repository).resolve()
    hopper = Device("cuda", properties=CUDAProperties(90, 90))
    keys = [hopper if device == "cuda" else device for device in devices]
    return {
        name: dict.fromkeys(keys, LayerSource(NAMES[name], repository, version, revision, _freeze(trust_remote_code)))
        for name in names
    }


def _make_replaceable(name: str) -> None:
    """Tell `kernels` that transformers' class of this name may be replaced under its own name."""
    from kernels import replace_kernel_forward_from_hub

    try:
        source = importlib.import_module(f"transformers.models.{FAMILIES[name]}.modeling_{FAMILIES[name]}")
    except ImportError:  # no transformers, or one without the family
        return
    replace_kernel_forward_from_hub(getattr(source, name), name)


@dataclass(frozen=True)
class LayerSource:
    """One layer and where it is loaded from, in the form `kernels` calls a repository: `load()` gives the class.

    Not `kernels.LayerRepository`, because that one cannot name the build in use and does not honour `LOCAL_KERNELS`
    for a version. Frozen, because `kernels` keys its cache of layers by it.
    """

    layer_name: str
    repository: str | Path | None = None
    version: int | None = None
    revision: str | None = None
    trust_remote_code: bool | tuple[str, ...] = False

    def load(self) -> type:
        if self.repository is None:
            return getattr(layers, self.layer_name)
        import kernels

        if isinstance(self.repository, Path):
            kernel = kernels.get_local_kernel(self.repository)
        else:
            trust = self.trust_remote_code
            kernel = kernels.get_kernel(
                self.repository,
                version=self.version,
                revision=self.revision,
                trust_remote_code=list(trust) if isinstance(trust, tuple) else trust,
            )
        return getattr(kernel.layers, self.layer_name)

    def __str__(self) -> str:
        where = self.repository or f"the build at {Path(__file__).parent}"
        return f"`{where}`, layer `{self.layer_name}`"


def replaced_functions(model) -> dict[str, str | None]:
    """Which replaceable functions of a model run a kernel now.

    Args:
        model: an `nn.Module` of transformers, kernelized or not.

    Returns:
        `{function name: "module.Class" that runs instead, or None where the original runs}`; empty where the model has
        no replaceable function, as when the installed versions of transformers and kernels do not fit each other. The
        functions belong to the model family, not to the model: all models of the family in the process share them.
    """
    replaced = {}
    for module in model.modules():
        # What the model's code calls is the object in its source module. A deep copy of a model carries copies of these
        # objects, which kernelize changes in vain, so what the model itself carries says nothing.
        # The class may be derived from transformers' (KernelConfig's layouts are), so the code is not always in its module.
        code = {}
        for cls in type(module).__mro__:
            code = vars(sys.modules[cls.__module__]) | code
        called = {type(f).kernel_layer_name: f for f in code.values() if hasattr(type(f), "kernel_layer_name")}
        for name in getattr(module, "_kernel_funcs", {}):
            runs, original = called[name].forward.__func__, type(called[name]).forward
            replaced[name] = None if runs is original else f"{runs.__module__}.{runs.__qualname__.split('.')[0]}"
    return replaced


def _freeze(trust_remote_code: bool | list[str]) -> bool | tuple[str, ...]:
    return trust_remote_code if isinstance(trust_remote_code, bool) else tuple(trust_remote_code)
