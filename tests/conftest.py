"""Every test uses the package as its users do: built into build/<variant>/ and loaded through `kernels.get_kernel`."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "moonshot/flash-kda"
# What a released build is tested with on a GPU runner: `pytest -m kernels_ci`, the Hub's own name for such tests
KERNELS_CI = {
    "test_decode",
    "test_dispatch",
    "test_kda",
    "test_layer_kernels",
    "test_prefill_states",
    "test_report",
    "test_serving",
}


def too_new(library: Path) -> list:
    """What a library asks for that manylinux_2_28 does not have."""
    from kernel_abi_check import ObjectFile

    return ObjectFile(library).check_manylinux("manylinux_2_28")


# Of the C++ library, what asks most of the C library where it is linked statically.
PROBE = """
#include <random>
#include <stdexcept>
#include <string>
extern "C" unsigned probe(const char* text) {
  try {
    throw std::runtime_error(std::string(text));
  } catch (std::exception const& error) {
    return std::random_device(error.what())();
  }
}
"""


@functools.cache
def compiler_too_new() -> bool:
    """Whether any C++ library that this machine's compiler links is too new for manylinux_2_28."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(PROBE)
        subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
        return bool(too_new(library))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU and the CUDA build")
    config.addinivalue_line("markers", "kernels_ci: part of the test of a released build")
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    # The Python-only variant builds in under a second, so it is always that of the present sources. The CUDA variant is
    # compiled beforehand: the machine that tests it need not have nvcc. Workers of pytest-xdist find the controller's
    # build.
    if torch.version.cuda is None and not hasattr(config, "workerinput"):
        subprocess.run(
            [sys.executable, ROOT / "tools" / "build.py", "--backend", "cpu"], check=True, stdout=subprocess.DEVNULL
        )
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # workers share the cores: thread pools of each would wait for one another


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in KERNELS_CI:
            item.add_marker("kernels_ci")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def environment_as_found():
    """Programs of benchmarks/ that run in a test's process set variables, which later tests would hand to theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def kernel():
    """The package, as the loader hands it out."""
    from kernels import get_kernel

    return get_kernel(REPO_ID, version=1)


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
