"""Processes that take turns on a GPU do not change each other's results: what a context switch saves and restores has to
be all there is."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("shared_gpu_calls.py")
# Heads and tokens. Streamed in segments, by walkers of two CTAs and of one, split, fused: test_schedule.py sees to that.
CALLS = [(2, 3390), (20, 1400), (64, 1000), (2, 300), (150, 200)]


@pytest.mark.gpu
def test_processes_take_turns():
    command = [sys.executable, str(SCRIPT), "6"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)[-4000:]
