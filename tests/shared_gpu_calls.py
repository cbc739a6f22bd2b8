"""Calls of each prefill schedule, over and over, for `test_shared_gpu.py`: exits with 1 where one gives other bits."""

import os
import sys
import time

import torch
from kernels import get_kernel

os.environ["FLASH_KDA_STRICT"] = "1"  # falling back would check nothing
kernel = get_kernel("moonshot/flash-kda", version=1)


def inputs(H, T):
    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    return dict(
        **{name: normal(1, T, H, 128).bfloat16() for name in "qkvg"},
        beta=normal(1, T, H).bfloat16(),
        A_log=normal(H),
        dt_bias=normal(H * 128),
        lower_bound=-5.0,
        output_final_state=True,
        use_gate_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    # Streamed in segments, by walkers of two CTAs and of one, split, fused (test_schedule.py sees to that).
    calls = [inputs(H, T) for H, T in ((2, 3390), (20, 1400), (64, 1000), (2, 300), (150, 200))]
    with torch.no_grad():
        expected = [kernel.chunk_kda(**args) for args in calls]
        end = time.monotonic() + float(sys.argv[1])
        while time.monotonic() < end:
            # All before any is looked at: the GPU is to have work whenever it is this process's turn.
            results = [[kernel.chunk_kda(**args) for args in calls] for _ in range(20)]
            for round in results:
                for args, result, first in zip(calls, round, expected):
                    if not all(torch.equal(x, y) for x, y in zip(result, first)):
                        sys.exit(f"other bits: {tuple(args['q'].shape)}")
