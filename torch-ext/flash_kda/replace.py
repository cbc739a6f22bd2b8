"""Whole KDA layers of a loaded transformers model, replaced and restored without further ado."""

from __future__ import annotations

from types import MethodType

from torch import nn

from . import layers
from .layers.delta_attention import FAMILIES


def replace_layers(model: nn.Module) -> dict[str, str | None]:
    """Run every KDA layer of a model in this package, projections excepted.

    Only this model changes; its weights, classes and state dict stay what they are, copies of it keep the replacement, and
    training works. Needs neither the `kernels` library nor transformers' support of it.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained("moonshotai/Kimi-Linear-48B-A3B-Instruct", dtype="auto")
        print(flash_kda.replace_layers(model))
        ```

    Args:
        model: a Kimi Linear, GLM-5-Next or Bailing hybrid model of transformers, or a part of one.

    Returns:
        As :func:`replaced_layers`: what runs now, layer by layer; empty where the model has no KDA layer.

    Raises:
        ValueError: a layer with hooks of accelerate (a model that is offloaded or spread over devices): they would be
            bypassed. Nothing is replaced then.
    """
    found = {name: module for name, module in model.named_modules() if _layer_for(module) is not None}
    for name, module in found.items():
        if any(hasattr(part, "_hf_hook") for part in module.modules()):
            raise ValueError(
                f"model: expected a model without hooks of accelerate (offloading, device_map), got {name}"
            )
    for module in found.values():
        module.forward = MethodType(_layer_for(module).forward, module)
    return replaced_layers(model)


def restore_layers(model: nn.Module) -> dict[str, str | None]:
    """Undo :func:`replace_layers` or `kernelize` on the KDA layers of a model. Returns as :func:`replaced_layers`."""
    for module in model.modules():
        if _layer_for(module) is not None:
            vars(module).pop("forward", None)
    return replaced_layers(model)


def replaced_layers(model: nn.Module) -> dict[str, str | None]:
    """Which KDA layers of a model run whole in a kernel package now, however they were replaced.

    Returns:
        `{name of the layer in the model: "module.Class" that runs instead, or None where the original runs}`.
    """
    report = {}
    for name, module in model.named_modules():
        if _layer_for(module) is not None:
            runs = getattr(vars(module).get("forward"), "__func__", None)
            original = runs is None or runs is type(module).forward
            report[name] = None if original else f"{runs.__module__}.{runs.__qualname__.split('.')[0]}"
    return report


def _layer_for(module: nn.Module) -> type[nn.Module] | None:
    """The layer that replaces a module of transformers (or of a class derived from one of them)."""
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers."):
            return getattr(layers, cls.__name__)
    return None
