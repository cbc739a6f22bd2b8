"""Calls of `fla.ops.kda.chunk_kda` with flash_kda importable, for test_fla.py: python fla_calls.py SCENARIO ...

A process of its own, because FLA's registries, imports and transformers' view of FLA belong to the process. Prints JSON:
for each scenario and call, which backend took it and how far its result is from the fp64 recurrence.
"""

import functools
import inspect
import json
import logging
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
said: list[str] = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


def inputs(T=70, H=2, HV=None, D=128, gate="lower_bound", beta="logits", v_first=True, dtype=torch.bfloat16, N=None):
    generator = torch.Generator().manual_seed(0)
    HV = HV or H

    def normal(*shape):
        return torch.randn(1, T, *shape, generator=generator).to(DEVICE, dtype)

    args = {"q": normal(H, D), "k": normal(H, D), "v": normal(HV, D), "g": normal(HV, D), "beta": normal(HV)}
    args |= {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "state_v_first": v_first}
    if gate == "given":
        args["g"] = -args["g"].float().abs()
    else:
        args |= {"use_gate_in_kernel": True, "A_log": torch.zeros(HV).to(DEVICE)}
        args["dt_bias"] = torch.ones(HV * D).to(DEVICE)
        if gate == "lower_bound":
            args |= {"safe_gate": True, "lower_bound": -5.0}
    if beta == "logits":
        args["use_beta_sigmoid_in_kernel"] = True
    else:
        args["beta"] = args["beta"].sigmoid()
    if N:
        args["cu_seqlens"] = torch.tensor([0, *(T * (n + 1) // N for n in range(N))]).to(DEVICE)
    return args


FITTING = {"as FlashKDA wants it": {}, "packed": {"N": 3}}
REFUSED = {  # by FLA's own backend
    "softplus gate": {"gate": "softplus"},
    "precomputed gate": {"gate": "given"},
    "grouped values": {"HV": 4},
    "K-first state": {"v_first": False},
    "activated beta": {"beta": "step"},
}


def relative_error(x, expected):
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def call(flash_kda, chunk_kda, args, **more):
    """What became of one call."""
    said.clear()
    registry_logged().clear()  # FLA says each thing once
    known = inspect.signature(inspect.unwrap(chunk_kda)).parameters
    names = {} if "state_v_first" in known else {"state_v_first": "transpose_state_layout"}  # in FLA 0.5.0
    with torch.inference_mode():
        try:
            o, state = chunk_kda(**{names.get(n, n): x for n, x in args.items()}, **more)[:2]
        except Exception as error:  # FLA's Triton kernels, where there is no GPU
            return {"said": list(said), "error": type(error).__name__}
    silent = ("output_final_state", "safe_gate")
    expected = flash_kda.reference.recurrent_kda(**{n: x for n, x in args.items() if n not in silent})
    return {
        "said": list(said),
        "error_o": relative_error(o, expected[0]),
        "error_s": relative_error(state, expected[1]),
    }


def registry_logged():
    try:
        from fla.backends import _function_registries
        from fla.ops.kda import chunk_kda

        (logged,) = [r._logged for f, r in _function_registries.items() if f.__name__ == chunk_kda.__name__]
        return logged
    except ImportError:
        from fla.ops.kda.backends import kda_registry

        return kda_registry._logged


def by_itself():
    """FLA finds the importable package."""
    import flash_kda
    from fla.ops.kda import chunk_kda

    return {name: call(flash_kda, chunk_kda, inputs(**options)) for name, options in (FITTING | REFUSED).items()}


def registered():
    import flash_kda
    from fla.ops.kda import chunk_kda

    flash_kda.fla.register()
    results = {name: call(flash_kda, chunk_kda, inputs(**options)) for name, options in (FITTING | REFUSED).items()}
    results["return_intermediate_states"] = call(flash_kda, chunk_kda, inputs(), return_intermediate_states=True)
    results["unknown argument"] = call(flash_kda, chunk_kda, inputs(), head_first=False)
    os.environ["FLA_FLASH_KDA"] = "0"
    results["switched off"] = call(flash_kda, chunk_kda, inputs())
    del os.environ["FLA_FLASH_KDA"]
    return results


def set_by_hand():
    """The same switch, with the package as the Hub's loader hands it out; the tensors by position."""
    from fla.ops.kda import chunk_kda
    from kernels import get_kernel

    @functools.wraps(chunk_kda)
    def positional(q, k, v, g, beta, **options):
        return chunk_kda(q, k, v, g, beta, **options)

    flash_kda = get_kernel("moonshot/flash-kda", version=1)
    flash_kda.set_backend(flash_kda.KDACudaBackend())
    return {"softplus gate": call(flash_kda, positional, inputs(gate="softplus"))}


def on_a_gpu():
    """What the backend answers for CUDA tensors; they are fake, so no GPU is needed to ask."""
    import flash_kda

    flash_kda.dispatch._capability = lambda device: (9, 0)
    flash_kda.prefill.AVAILABLE = True
    backend = flash_kda.KDACudaBackend()

    def ask(args, training=False):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = {
                n: torch.empty_like(x, device="cuda") if isinstance(x, torch.Tensor) else x for n, x in args.items()
            }
        fake["A_log"].requires_grad_(training)
        return backend.verify("chunk_kda", **fake)

    args = inputs(gate="softplus", HV=4, v_first=False)
    with torch.no_grad():
        frozen = ask(args, training=True)
    return {
        "kernel": ask(args),
        "a gradient is needed": ask(args, training=True),
        "under no_grad": frozen,
        "heads of 64": ask(inputs(D=64)),
        "float32": ask(inputs(dtype=torch.float32)),
        "context parallelism": ask(args | {"cp_context": object()}),
        "beta of 3 heads": ask(args | {"beta": torch.zeros(1, 70, 3, dtype=torch.bfloat16)}),
        "positional": backend.verify("chunk_kda", *(args[n] for n in ("q", "k", "v", "g", "beta")), 1.0),
    }


def tune_nothing():
    """Tuning FLA's Triton kernels takes minutes, and which configuration runs makes no difference here."""
    from triton.runtime.autotuner import Autotuner

    init = Autotuner.__init__
    Autotuner.__init__ = lambda self, fn, arg_names, configs, *args, **kwargs: init(
        self, fn, arg_names, configs[:1], *args, **kwargs
    )


if __name__ == "__main__":
    if CUDA:
        tune_nothing()
    logging.getLogger("fla").setLevel(logging.INFO)
    logging.getLogger("fla").addHandler(Listener())
    print(json.dumps({scenario: globals()[scenario]() for scenario in sys.argv[1:]}))
