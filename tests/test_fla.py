"""FLA's door: `fla.ops.kda.chunk_kda` runs this package, by itself and after `flash_kda.fla.register()`.

Each scenario of fla_calls.py is a process. On a CPU, FLA's own Triton kernels cannot run, so a call that this package does
not take ends in Triton's error: that too says who was chosen. On a GPU the same calls give numbers for both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fla_calls import FITTING, REFUSED

CUDA = torch.cuda.is_available()
# .ci/run puts FLA there: in the tests' own environment, transformers would use it. 0.5.0 shares Triton with 0.6.0.
APART, OLDER = ROOT / ".fla", ROOT / ".fla-0.5"
HAS_FLA = APART.is_dir() or importlib.util.find_spec("fla") is not None
pytestmark = pytest.mark.skipif(
    not HAS_FLA, reason="no FLA: pip install --no-deps --target .fla fla-core triton einops"
)

TAKEN, KEPT = r"chunk_kda -> flash_?kda", r"chunk_kda -> flash_?kda rejected: "  # 0.5.0 says flashkda
# Of the output, which is rounded to bf16, and of the state; the kernel's operands are bf16 as well.
BOUNDS = (5e-3, 4e-3) if CUDA else (2e-3, 1e-6)


@pytest.fixture(scope="module")
def site(kernel, tmp_path_factory) -> Path:
    """A folder where `import flash_kda` finds the build under test, as an installed wheel would be found."""
    folder = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(kernel.__file__).parent, folder / "flash_kda", ignore=ignore)
    return folder


def run(*scenarios: str, site: Path | None = None, fla: tuple[Path, ...] = (APART,)) -> dict:
    paths = [str(path) for path in (site, *fla, os.environ.get("PYTHONPATH")) if path]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("fla_calls.py"), *scenarios],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=[(APART,), (OLDER, APART)], ids=["0.6", "0.5"])
def outcomes(request, site) -> dict:
    """The scenarios in the order of a process that registers late: importing FLA alone takes seconds."""
    if OLDER in request.param and not OLDER.is_dir():
        pytest.skip("no FLA 0.5: pip install --no-deps --target .fla-0.5 fla-core==0.5.0")
    return run("by_itself", "registered", "on_a_gpu", site=site, fla=request.param)


def assert_taken(name: str, outcome: dict) -> None:
    assert len(outcome["said"]) == 1 and re.search(f"{TAKEN}$", outcome["said"][0]), (name, outcome)
    assert outcome["error_o"] < BOUNDS[0] and outcome["error_s"] < BOUNDS[1], (name, outcome)


def assert_kept(name: str, outcome: dict, reason: str) -> None:
    assert len(outcome["said"]) == 1 and re.search(KEPT + reason, outcome["said"][0]), (name, outcome)
    assert ("error" in outcome) == (not CUDA), (name, outcome)


def test_by_itself_fla_hands_over_what_fits(outcomes):
    for name in FITTING:
        assert_taken(name, outcomes["by_itself"][name])
    for name in REFUSED:
        assert_kept(name, outcomes["by_itself"][name], "FlashKDA")


def test_registered_takes_what_the_built_in_backend_refuses(outcomes):
    registered = outcomes["registered"]
    for name in (*FITTING, *REFUSED):
        assert_taken(name, registered[name])
    assert_kept("h", registered["return_intermediate_states"], "flash_kda does not return intermediate states")
    assert_kept("kwargs", registered["unknown argument"], "flash_kda does not know head_first")
    assert registered["switched off"]["said"] == []  # FLA_FLASH_KDA=0


def test_set_backend_from_the_hub_package():
    assert_taken("softplus gate", run("set_by_hand")["set_by_hand"]["softplus gate"])


def test_on_a_gpu_only_what_the_kernel_serves(outcomes):
    answers = outcomes["on_a_gpu"]
    assert answers["kernel"][0] and answers["under no_grad"][0] and answers["positional"][0]
    for name, reason in {
        "a gradient is needed": "forward only",
        "heads of 64": "got 64 and 64",
        "float32": "bfloat16",
        "context parallelism": "flash_kda does not support context parallelism",
        "beta of 3 heads": "beta: expected shape [1, 70, 4]",
    }.items():
        taken, said = answers[name]
        assert not taken and reason in said, name


def test_importing_the_package_does_not_import_fla(site):
    code = "import sys, flash_kda; print('fla' in sys.modules, hasattr(flash_kda, 'nothing'))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(APART), os.environ.get("PYTHONPATH", "")])}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
