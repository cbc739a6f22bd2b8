"""Calls of each prefill schedule, over and over, for `test_shared_gpu.py`: exits with 1 where one gives other bits."""

import os
import sys
import time

import torch
from cases import KERNEL, make
from kernels import get_kernel
from test_shared_gpu import CALLS

os.environ["FLASH_KDA_STRICT"] = "1"  # falling back would check nothing

if __name__ == "__main__":
    kernel = get_kernel("moonshot/flash-kda", version=1)
    calls = [make(KERNEL, H=heads, T=tokens, gate="lower_bound") for heads, tokens in CALLS]
    with torch.no_grad():
        expected = [kernel.chunk_kda(**args) for args in calls]
        end = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < end:
            # All before any is looked at: the GPU is to have work whenever it is this process's turn.
            results = [[kernel.chunk_kda(**args) for args in calls] for _ in range(20)]
            for round in results:
                for size, result, first in zip(CALLS, round, expected):
                    if not all(torch.equal(x, y) for x, y in zip(result, first)):
                        sys.exit(f"other bits: {size}")
