"""The backend that :func:`flash_kda.fla.register` puts into FLA's dispatch. Imports FLA; nothing imports it before."""

from __future__ import annotations

import importlib.util
import inspect

import torch
from fla.ops.kda import chunk_kda as fla_chunk_kda

from . import dispatch
from .chunk import chunk_kda
from .contract import check_call

try:
    from fla.backends import BaseBackend
except ImportError:  # FLA 0.5
    from fla.ops.backends import BaseBackend

# FLA moved an argument between releases, so positional ones are read by the signature of the FLA at hand.
_FLA_SIGNATURE = inspect.signature(inspect.unwrap(fla_chunk_kda))
_OPTIONS = {name: parameter.default for name, parameter in inspect.signature(chunk_kda).parameters.items()}
_CHECKED = (inspect.signature(check_call).parameters.keys() & _OPTIONS.keys()) - {"state_v_first"}


class KDACudaBackend(BaseBackend):
    """Serves ``fla.ops.kda.chunk_kda`` where :func:`flash_kda.chunk_kda` has a kernel, or FLA has none."""

    # The name of FLA's own adapter, whose place this takes; it was another before FLA 0.5.2.
    backend_type = "flashkda" if importlib.util.find_spec("fla.ops.kda.backends.flashkda") else "flash_kda"
    env_var = "FLA_FLASH_KDA"
    priority = 3

    def chunk_kda_verifier(self, *args, **kwargs) -> tuple[bool, str | None]:
        """``(whether to take the call, why not)``; FLA takes an exception for a no and its message for the reason."""
        arguments = _by_name(args, kwargs)
        if unknown := arguments.keys() - _OPTIONS.keys():
            return False, f"flash_kda does not know {', '.join(sorted(unknown))}"
        if arguments.get("cp_context") is not None:
            return False, "flash_kda does not support context parallelism"
        if arguments.get("return_intermediate_states"):
            return False, "flash_kda does not return intermediate states"
        v_first = arguments.get("state_v_first") or arguments.get("transpose_state_layout")
        options = {name: arguments.get(name, _OPTIONS[name]) for name in _CHECKED}
        call = check_call(**options, state_v_first=bool(v_first))
        tensors = [x for x in call if isinstance(x, torch.Tensor)]
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        path, reason = dispatch.select(call, needs_grad)
        return path != dispatch.PYTORCH or call.q.device.type == "cpu", reason

    def chunk_kda(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        return chunk_kda(**_by_name(args, kwargs))


def _by_name(args: tuple, kwargs: dict) -> dict:
    if not args:  # as FLA's layers call; binding would take longer than all the rest of the hand-over
        return kwargs
    arguments = dict(_FLA_SIGNATURE.bind(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})
