"""Compile the kernels against CUDA 12.8, the oldest that build.toml promises, with what PyPI has of it.

    pip install --no-deps --target .cuda12 nvidia-cuda-nvcc-cu12==12.8.93 \\
        nvidia-cuda-runtime-cu12==12.8.90 nvidia-cuda-cccl-cu12==12.8.90
    python tools/check_cuda.py

PyPI has no nvcc program of CUDA 12, but what an older toolkit may refuse: its headers and its assembler, ptxas. The nvcc
of this machine does the rest, with the version macros of the older one, so that headers choose what they would choose
there; its PTX then goes to the older ptxas. Not covered: the older compiler's own C++ front end and optimiser, which
kernel-builder's CUDA 12.8 variants are built with (.github/workflows/build.yml).

Prints registers and spills of each kernel; exits with 1 if anything does not compile or wgmma is serialised.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from build import ROOT, BuildError, Spec, find_cutlass, find_nvcc, output, version_tuple

PTX_ISA = {"12.8": "8.7", "12.9": "8.8"}  # that each toolkit's ptxas takes

# nvcc asks the host compiler to preprocess and tells it its own version; this is the program in between.
HOST_COMPILER = """#!/bin/bash
args=("${{@/_VER_MAJOR__={own_major}/_VER_MAJOR__={major}}}")
exec g++ "${{args[@]/_VER_MINOR__={own_minor}/_VER_MINOR__={minor}}}"
"""


def compile_kernel(kernel: dict, source: Path, toolkit: Path, release: str, nvcc, cutlass) -> str:
    """Compiles one source, host code and device code; returns what the older ptxas says."""
    home = nvcc.path.resolve().parent.parent
    if not (home / "nvvm").is_dir():  # a wrapper on PATH
        home = Path(f"/usr/local/cuda-{nvcc.version}")
    parts = [toolkit / "nvidia" / part for part in ("cuda_nvcc", "cuda_runtime", "cuda_cccl")]
    (own_major, own_minor), (major, minor) = version_tuple(nvcc.version), version_tuple(release)
    with tempfile.TemporaryDirectory() as scratch:
        host = Path(scratch) / "g++"
        host.write_text(HOST_COMPILER.format(own_major=own_major, own_minor=own_minor, major=major, minor=minor))
        host.chmod(0o755)
        # The launch stubs are nvcc's own writing, so their header is its own too.
        stubs = Path(scratch) / "stubs"
        (stubs / "crt").mkdir(parents=True)
        own = home / "include" / "crt" / "host_runtime.h"
        (stubs / "crt" / "host_runtime.h").write_text(f'#include "{own}"\n')
        # -noprof: without nvcc's own headers. Virtual code only: it writes PTX and calls no ptxas.
        command = [
            home / "bin" / "nvcc",
            "-noprof",
            "-ccbin",
            host,
            "-keep",
            "-keep-dir",
            scratch,
            "-Wno-deprecated-gpu-targets",
        ]
        for capability in kernel["cuda-capabilities"]:
            arch = "compute_" + capability.replace(".", "")
            command += ["-gencode", f"arch={arch},code={arch}"]
        command += [*kernel.get("cuda-flags", []), f"-I{stubs}", *(f"-I{part / 'include'}" for part in parts)]
        command += [f"-I{ROOT / path}" for path in kernel.get("include", [])] + ["-isystem", cutlass.include]
        env = os.environ | {
            "CICC_PATH": str(home / "nvvm" / "bin"),
            "NVVMIR_LIBRARY_DIR": str(home / "nvvm" / "libdevice"),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        }
        run([*command, "-c", source, "-o", Path(scratch) / "object.o"], env)
        said = ""
        for ptx in sorted(Path(scratch).glob("*.ptx")):
            ptx.write_text(
                re.sub(r"^\.version .*$", f".version {PTX_ISA[release]}", ptx.read_text(), flags=re.MULTILINE)
            )
            (target,) = re.findall(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
            said += run([parts[0] / "bin" / "ptxas", f"-arch={target}", "-v", ptx, "-o", Path(scratch) / "cubin"], env)
        return said


def run(command: list, env: dict) -> str:
    result = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(result.stdout + result.stderr)
    return result.stdout + result.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toolkit", type=Path, default=ROOT / ".cuda12", help="where pip put it (default: .cuda12)")
    args = parser.parse_args()
    try:
        spec = Spec(ROOT)
        ptxas = args.toolkit / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
        if not ptxas.is_file():
            raise BuildError(f"no ptxas at {ptxas}\n  get it: the pip command of --help")
        ptxas.chmod(0o755)
        release = re.search(r"release (\d+\.\d+)", output(str(ptxas), "--version"))[1]
        nvcc = find_nvcc(None, spec.minimum_cuda())
        cutlass = find_cutlass(None, spec.cutlass_depends())
        print(f"CUDA {release} headers and ptxas behind nvcc {nvcc.version}")
        for kernel in spec.kernels("cuda").values():
            for source in (path for path in kernel["src"] if path.endswith(".cu")):
                said = compile_kernel(kernel, ROOT / source, args.toolkit, release, nvcc, cutlass)
                for name, spills, registers in re.findall(
                    r"Function properties for (\w+)\n.*?, (\d+) bytes spill stores.*\n.*?Used (\d+) registers", said
                ):
                    print(f"  {source}: {name}: {registers} registers, {spills} bytes spilled")
                if "instructions are serialized" in said:
                    raise BuildError(f"{source}: ptxas {release} serialised wgmma:\n{said}")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
