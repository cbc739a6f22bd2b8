"""The door for code that calls ``fla.ops.kda.chunk_kda``: our own backend in FLA's dispatch.

FLA 0.5 and newer already hands calls to an importable ``flash_kda``, but only those that fit FlashKDA: bounded gate computed
in the kernel, as many value heads as heads, V-first state, logits of beta. :func:`register` puts a backend in its place
that takes every call this package serves. Nothing here imports FLA before it is asked to.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Lets ``fla.ops.kda.chunk_kda`` use this package for every call it serves; FLA keeps the rest.

    What FLA keeps: calls that need a gradient on a GPU, and whatever else would take the PyTorch path there
    (``dispatch.py``), context parallelism, ``return_intermediate_states``. CPU tensors, which FLA's Triton kernels do not
    take, run the PyTorch path. ``FLA_FLASH_KDA=0``, read at each call, switches the backend off, as it does FLA's own;
    ``FLA_DISABLE_BACKEND_DISPATCH=1`` before FLA is imported switches off all of them, and then this does nothing.

    FLA logs at INFO, logger ``fla``, which backend took a call, and why another did not.

    Raises:
        ImportError: FLA (``fla-core`` 0.5 or newer) is not installed.
    """
    set_backend(__getattr__("KDACudaBackend")())


def set_backend(backend: Any) -> None:
    """As :func:`register`, with a backend of your own making: ``set_backend(KDACudaBackend())`` is ``register()``.

    Args:
        backend: a :class:`KDACudaBackend` or an instance of a subclass, without arguments to its constructor. It
            replaces the backend of the same ``backend_type``.
    """
    from fla.ops.kda import chunk_kda

    try:
        from fla.backends import register as register_in_fla
    except ImportError:  # FLA 0.5
        from fla.ops.kda.backends import kda_registry

        kda_registry.register(backend)
    else:
        register_in_fla(chunk_kda)(type(backend))


def __getattr__(name: str) -> Any:
    """``KDACudaBackend`` derives from FLA's class, so it exists once it is asked for."""
    if name != "KDACudaBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .fla_backend import KDACudaBackend

    return KDACudaBackend
