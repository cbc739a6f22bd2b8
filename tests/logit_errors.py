"""How much further from the fp32 model the kernels take a bf16 model's logits: `python tests/logit_errors.py [models]`.

One model scatters by several per cent, so the tests pool a few and allow 3 %; this pools as many as asked and says how sure
it is. Without FLA on the path: transformers then runs its own fp32 recurrence, the strictest comparison.
"""

import math
import os
import statistics
import sys
from pathlib import Path

import torch
from kernels import get_kernel
from test_transformers import cached, prefill
from tiny_models import kernelized, random_ids, tiny_model


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def main() -> None:
    os.environ.setdefault("LOCAL_KERNELS", f"moonshot/flash-kda={Path(__file__).parents[1]}")
    kernel = get_kernel("moonshot/flash-kda", version=1)
    models, device = int(sys.argv[1]) if sys.argv[1:] else 16, "cuda" if torch.cuda.is_available() else "cpu"
    for family in ("kimi_linear", "glm5_next", "bailing_hybrid"):
        for way in (prefill, cached):
            before, functions, layers = [], [], []
            for seed in range(models):
                model = tiny_model(family, head_dim=128, seed=seed).to(device)
                ids = random_ids(3, 130, seed=seed, device=device)
                expected = way(model, ids)
                model = model.to(torch.bfloat16)
                before.append(error(way(model, ids), expected))
                with kernelized(model, kernel.kernel_mapping()):
                    functions.append(error(way(model, ids), expected))
                kernel.replace_layers(model)
                layers.append(error(way(model, ids), expected))
                kernel.restore_layers(model)
            print(f"{family} {way.__name__}: {statistics.mean(before):.4f} before", end="")
            for name, after in (("functions", functions), ("layers", layers)):
                ratio = math.sqrt(sum(x * x for x in after) / sum(x * x for x in before))
                spread = statistics.stdev(math.log(x / y) for x, y in zip(after, before)) / math.sqrt(models)
                print(f"; {name} {ratio:.3f} +- {spread:.3f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
