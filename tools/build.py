"""Build the kernel package described by build.toml into build/<variant>/, as the `kernels` loader expects it.

    python tools/build.py                        the variant for the torch of this interpreter
    python tools/build.py --backend cpu          torch-cpu: Python only
    python tools/build.py --backend torch-cuda   torch-cuda: Python only, for CUDA torches without a native variant
    python tools/build.py --backend cuda         torch-stable-abi211-cu130-x86_64-linux: with nvcc, GPU or not
    python tools/build.py --backend all          every one of them

Sources, flags, capabilities and versions are read from build.toml and stand nowhere else. Only the standard library
is needed here; CMake and ninja compile, in .build/<variant>/, and recompile only what changed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TOOL_VERSION = "1"
PYTHON_ABI = (3, 9)  # the limited API the extension is built against, and so the oldest Python that loads it
CUTLASS_PACKAGE = "nvidia-cutlass==4.2.0.0"  # the headers on PyPI
GLIBC = (2, 28)  # the oldest C library that loads it: manylinux_2_28
LIBSTDCXX = (3, 4, 24)  # the C++ library of that time


class BuildError(Exception):
    """Something the build needs is missing or too old; the message says what, and how to get it."""


def say(text: str) -> None:
    print(f"[build] {text}", flush=True)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def version_tuple(text: str) -> tuple[int, ...]:
    """The dotted number a version starts with: (2, 13, 0) for "2.13.0+cpu"."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", text).group().split("."))


# --- build.toml -----------------------------------------------------------------------------------------------------


class Spec:
    """build.toml (edition 5), the parts a build needs."""

    def __init__(self, root: Path):
        self.root = root
        path = root / "build.toml"
        if not path.is_file():
            raise BuildError(f"no build.toml in {root}")
        try:
            self.toml = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise BuildError(f"{path}: {error}") from None
        validate_with_kernels(root)
        self.general = self.toml["general"]
        self.name: str = self.general["name"]
        self.python_name = self.name.replace("-", "_")
        self.torch = self.toml["torch"]
        self.stable_abi: str = self.torch["stable-abi"]["cuda"]
        self.package = root / "torch-ext" / self.python_name

    def kernels(self, backend: str) -> dict[str, dict]:
        """The [kernel.*] sections of a backend; a backend without any is built as a Python-only variant."""
        return {name: k for name, k in self.toml.get("kernel", {}).items() if k["backend"] == backend}

    def native_sources(self, backend: str) -> list[str]:
        """Every file that build.toml lists for the backend, headers included, in its order."""
        return self.torch["src"] + [path for k in self.kernels(backend).values() for path in k["src"]]

    def capabilities(self, backend: str) -> list[str]:
        return sorted({c for k in self.kernels(backend).values() for c in k.get("cuda-capabilities", [])})

    def minimum_cuda(self) -> str:
        wanted = [self.general.get("cuda", {}).get("minver")]
        wanted += [k.get("cuda-minver") for k in self.kernels("cuda").values()]
        return max(filter(None, wanted), key=version_tuple, default="0")

    def cutlass_depends(self) -> list[str]:
        return sorted({d for k in self.kernels("cuda").values() for d in k["depends"] if d.startswith("cutlass_")})

    def python_files(self) -> dict[str, bytes]:
        """The Python package, by path inside it; _ops.py is generated, a stray one is not a source."""
        files = {str(f.relative_to(self.package)): f.read_bytes() for f in sorted(self.package.rglob("*.py"))}
        files.pop("_ops.py", None)
        return files


def validate_with_kernels(root: Path) -> None:
    """kernel-builder's own parser, where the `kernels` package is installed."""
    try:
        from kernels._rust import Build
    except ImportError:
        return
    try:
        Build.open(root)
    except ValueError as error:
        raise BuildError(f"build.toml is not valid: {error}") from None


# --- what the machine has -------------------------------------------------------------------------------------------


def find_package(name: str) -> Path | None:
    """Folder of an installed Python package; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    # pip's isolated build environment hides the packages of the interpreter it builds for; -I shows them again.
    probe = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s else '')"
    answer = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=False)
    return Path(answer.stdout.strip()).parent if answer.stdout.strip() else None


@dataclasses.dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    root = find_package("torch")
    if root is None:
        raise BuildError(
            f"torch is not installed for {sys.executable}\n"
            "  get it: pip install torch   (any build of 2.11 or newer; a CPU build is enough to compile)\n"
            "  in an isolated build (uv, python -m build): add --no-build-isolation"
        )
    facts = runpy.run_path(str(root / "version.py"))  # importing torch would take seconds
    # The real path: compilers name headers by it, and what they name is cut by it (-ffile-prefix-map).
    return Torch(root.resolve(), str(facts["__version__"]), facts["cuda"])


def find_program(name: str, how: str) -> Path:
    """A program beside this interpreter (a venv need not be activated) or on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise BuildError(f"{name} was not found\n  get it: {how}")
    return Path(found)


@dataclasses.dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str  # "13.0"


def find_nvcc(given: str | None, minimum: str) -> Nvcc:
    how = (
        f"  get it: the CUDA toolkit {minimum} or newer (https://developer.nvidia.com/cuda-downloads);\n"
        "  then put nvcc on PATH, set CUDA_HOME, or pass --nvcc PATH\n"
        "  without it: torch-cuda, the Python-only variant"
    )
    if given is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if home:
            given = str(Path(home) / "bin" / "nvcc")
        else:
            given = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = output(given, "--version")
    except (OSError, subprocess.CalledProcessError):
        raise BuildError(f"nvcc was not found (looked at {given})\n{how}") from None
    version = re.search(r"release (\d+\.\d+)", text)
    if version is None:
        raise BuildError(f"{given} --version does not name a release; is it nvcc?\n{how}")
    if version_tuple(version[1]) < version_tuple(minimum):
        raise BuildError(f"nvcc {version[1]} at {given} is too old: CUDA {minimum} or newer is needed\n{how}")
    return Nvcc(Path(given), version[1])


@dataclasses.dataclass(frozen=True)
class Cutlass:
    include: Path
    version: str


def find_cutlass(given: str | None, depends: list[str]) -> Cutlass | None:
    """CUTLASS headers for the `cutlass_X_Y` that build.toml depends on; any release of the same major will do."""
    if not depends:
        return None
    how = f"  get it: pip install --no-deps {CUTLASS_PACKAGE}, or pass --cutlass DIR (a CUTLASS checkout)"
    given = given or os.environ.get("CUTLASS_DIR")
    if given:
        roots = [Path(given), Path(given) / "include"]
    else:
        package = find_package("cutlass_library")
        if package is None:
            raise BuildError(f"the CUTLASS headers were not found\n{how}")
        roots = [package / "source" / "include"]
    for include in roots:
        header = include / "cutlass" / "version.h"
        if header.is_file():
            break
    else:
        raise BuildError(f"no cutlass/version.h under {given or roots[0]}\n{how}")
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
    version = f"{numbers['MAJOR']}.{numbers['MINOR']}.{numbers['PATCH']}"
    for name in depends:
        if name.split("_")[1] != numbers["MAJOR"]:
            raise BuildError(f"CUTLASS {version} at {include} does not fit {name} of build.toml\n{how}")
    return Cutlass(include, version)


def git_status(root: Path) -> dict | None:
    """Commit of the sources and whether tracked files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(root)]
    try:
        if Path(output(*git, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changes = output(*git, "status", "--porcelain", "--untracked-files=no")
        return {"commit": output(*git, "rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None


# --- variants -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    directory: str  # the name the loader matches
    backend: str  # "cpu" or "cuda"
    nvcc: Nvcc | None = None  # None: Python only


def native_directory(stable_abi: str, nvcc: Nvcc) -> str:
    cuda = "cu" + nvcc.version.replace(".", "")
    return f"torch-stable-abi{stable_abi.replace('.', '')}-{cuda}-{platform.machine()}-{platform.system().lower()}"


def choose_variants(spec: Spec, backend: str, nvcc: str | None) -> list[Variant]:
    """The variants that --backend asks for."""
    if backend == "auto":
        backend = "cuda" if find_torch().cuda else "cpu"
        if backend == "cuda" and nvcc is None:  # PyPI's torch has CUDA on every Linux machine
            try:
                find_nvcc(None, spec.minimum_cuda())
            except BuildError as error:
                say(f"no native kernels, the PyTorch path only: {error}")
                backend = "torch-cuda"
    python_only = {"cpu": Variant("torch-cpu", "cpu"), "torch-cuda": Variant("torch-cuda", "cuda")}
    if backend in python_only:
        return [python_only[backend]]
    found = find_nvcc(nvcc, spec.minimum_cuda())
    native = Variant(native_directory(spec.stable_abi, found), "cuda", found)
    return [*python_only.values(), native] if backend == "all" else [native]


def unique_id(spec: Spec, variant: Variant, package: dict[str, bytes], options: str) -> str:
    """Name of the build: it changes with anything that goes into it.

    The loader keys sys.modules by it and torch keys the operators by it, so two builds of different content must
    never share one, and both may live in one process.
    """
    content = hashlib.sha256(f"{variant.directory} {options}".encode())
    paths = ["build.toml"]
    if variant.nvcc:
        paths += ["CMakeLists.txt", "tools/build.py", *spec.native_sources(variant.backend)]
    for path in paths:
        if not (spec.root / path).is_file():
            raise BuildError(f"build.toml lists {path}, which does not exist")
    for path, data in [*((path, (spec.root / path).read_bytes()) for path in paths), *package.items()]:
        content.update(f"\n{path} {len(data)}\n".encode() + data)
    return f"_{spec.python_name}_{variant.backend}_{content.hexdigest()[:12]}"


OPS_PY = '''"""The operators of this build. Generated by tools/build.py."""

import torch
{load}
ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """"prefill" -> "{id}::prefill"."""
    return f"{id}::{{op_name}}"
'''

REGISTRATION_H = """// Macros of the torch binding. Generated by tools/build.py.
#pragma once

#include <Python.h>

#include <torch/csrc/stable/library.h>

// The namespace is itself a macro, TORCH_EXTENSION_NAME: one more level expands it.
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, KEY, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, KEY, MODULE)

// An empty Python module, so that `import` loads the library and its static initialisers register the operators.
#define REGISTER_EXTENSION(NAME) REGISTER_EXTENSION_NAMED(NAME)
#define REGISTER_EXTENSION_NAMED(NAME)                                              \\
  PyMODINIT_FUNC PyInit_##NAME() {                                                  \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, #NAME, nullptr, 0, nullptr, \\
                                 nullptr, nullptr, nullptr, nullptr};               \\
    return PyModule_Create(&module);                                                \\
  }
"""


def write_if_changed(path: Path, content: bytes) -> None:
    """Leaves the time of an unchanged file alone, since ninja rebuilds by it; replaces a changed one as a whole.

    A process that has the old library loaded keeps it.
    """
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".new")
        scratch.write_bytes(content)
        scratch.replace(path)


def metadata(spec: Spec, variant: Variant, build_id: str, files: dict[str, bytes]) -> dict:
    """metadata.json: what the loader reads before it imports anything."""
    backend: dict = {"type": variant.backend}
    if variant.nvcc:
        backend["archs"] = spec.capabilities(variant.backend)
    data = {
        "id": build_id,
        "name": spec.name,
        "version": spec.general["version"],
        "license": spec.general["license"],
        "python-depends": spec.general.get("python-depends", []),
        "backend": backend,
        "digest": {
            "algorithm": "sha256",
            "files": {
                name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()
            },
        },
        "provenance": {"kernel-builder": {"version": f"tools/build.py {TOOL_VERSION}"}},
    }
    status = git_status(spec.root)
    if status:
        data["provenance"]["kernel"] = status
    return data


def stage(
    spec: Spec, variant: Variant, build_id: str, package: dict[str, bytes], library: Path | None, target: Path
) -> None:
    """Make `target` hold exactly the package: Python files, _ops.py, the library and metadata.json."""
    load = f"\nfrom . import {build_id}  # noqa: F401  (importing it registers the operators)\n" if library else ""
    files = package | {"_ops.py": OPS_PY.format(id=build_id, load=load).encode()}
    if library:
        files[f"{build_id}.abi3.so"] = library.read_bytes()
    description = metadata(spec, variant, build_id, dict(sorted(files.items())))
    files["metadata.json"] = (json.dumps(description, indent=2) + "\n").encode()
    for name, content in files.items():
        write_if_changed(target / name, content)
    for path in sorted(target.rglob("*"), reverse=True):  # children before their folder
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(target)) not in files:
            path.unlink()


# --- compiling ------------------------------------------------------------------------------------------------------


def older_glibc_symbols() -> str:
    """objcopy's map from functions that this machine's glibc moved since GLIBC to the version they had before.

    glibc 2.34 merged libpthread, libdl and librt into libc under a new version, so linking the static CUDA runtime here
    would bind the library to glibc 2.34. The old versions of the symbols are still there; the map asks for them.
    """
    libc = output("g++", "-print-file-name=libc.so.6")
    symbols = output("nm", "-D", "--with-symbol-versions", libc)
    default: dict[str, tuple] = {}
    usable: dict[str, list] = {}
    for name, mark, version in re.findall(r" (\w+)(@@?)GLIBC_([\d.]+)$", symbols, re.MULTILINE):
        if mark == "@@":
            default[name] = version_tuple(version)
        if version_tuple(version) <= GLIBC:
            usable.setdefault(name, []).append(version)
    moved = sorted(name for name, version in default.items() if version > GLIBC and name in usable)
    return "".join(f"{name} {name}@GLIBC_{max(usable[name], key=version_tuple)}\n" for name in moved)


def newer_needs(library: Path) -> list[str]:
    """What a library asks of the C and C++ libraries beyond manylinux_2_28; empty but for compilers of newer systems."""
    asked = re.findall(r" U .*@(GLIBC|GLIBCXX)_([\d.]+)$", output("nm", "-D", library), re.MULTILINE)
    oldest = {"GLIBC": GLIBC, "GLIBCXX": LIBSTDCXX}
    newest = {}
    for name, version in asked:
        newest[name] = max(newest.get(name, oldest[name]), version_tuple(version))
    return [f"{name} {'.'.join(map(str, newest[name]))}" for name in oldest if newest.get(name, ()) > oldest[name]]


def cmake_list(items) -> str:
    return ";".join(str(item) for item in items)


def cmake_config(spec: Spec, variant: Variant, build_id: str, tools: Tools, debug: bool) -> str:
    """The initial cache CMakeLists.txt reads: build.toml's lists and what was found on this machine."""
    major, minor = version_tuple(spec.stable_abi)[:2]
    settings = {
        "KERNEL_ID": build_id,
        "EXTENSION_NAME": spec.python_name,
        "TORCH_ROOT": tools.torch.root,
        # torch/headeronly/version.h: one byte each of major and minor at the top of 64 bits
        "TORCH_TARGET_VERSION": f"0x{(major << 56) | (minor << 48):016x}",
        "PYTHON_INCLUDE": sysconfig.get_path("include"),
        "PYTHON_LIMITED_API": f"0x{PYTHON_ABI[0]:02x}{PYTHON_ABI[1]:02x}0000",
        "PYTHON_EXECUTABLE": sys.executable,
        "CUTLASS_INCLUDE": tools.cutlass.include if tools.cutlass else "",
        "BINDING_SRC": cmake_list(spec.torch["src"]),
        "BINDING_INCLUDE": cmake_list(spec.torch.get("include", [])),
        "BINDING_CXX_FLAGS": cmake_list(spec.torch.get("cxx-flags", [])),
        "KERNELS": cmake_list(spec.kernels(variant.backend)),
        "DEBUG_FLAGS": "-lineinfo" if debug else "",
        "CMAKE_CUDA_COMPILER": variant.nvcc.path,
        "CMAKE_BUILD_TYPE": "",  # optimisation is build.toml's word: its flags are the whole list
    }
    for name, kernel in spec.kernels(variant.backend).items():
        settings |= {
            f"{name}_SRC": cmake_list(kernel["src"]),
            f"{name}_INCLUDE": cmake_list(kernel.get("include", [])),
            f"{name}_CUDA_FLAGS": cmake_list(kernel.get("cuda-flags", [])),
            f"{name}_ARCHS": cmake_list(c.replace(".", "") + "-real" for c in kernel["cuda-capabilities"]),
        }
    return "".join(f'set({key} [[{value}]] CACHE INTERNAL "")\n' for key, value in settings.items())


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a native build needs besides nvcc."""

    torch: Torch
    cutlass: Cutlass | None
    cmake: Path
    ninja: Path


def find_tools(spec: Spec, cutlass: str | None) -> Tools:
    torch = find_torch()
    if version_tuple(torch.version)[:2] < version_tuple(spec.stable_abi)[:2]:
        raise BuildError(
            f"torch {torch.version} at {torch.root} is too old: its headers must know the stable ABI of "
            f"{spec.stable_abi}\n  get it: pip install 'torch>={spec.stable_abi}' (a CPU build is enough to compile)"
        )
    headers = find_cutlass(cutlass, spec.cutlass_depends())
    cmake = find_program("cmake", "pip install cmake")
    ninja = find_program("ninja", "pip install ninja")
    find_program("g++", "apt-get install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(f"Python.h is missing for {sys.executable}\n  get it: apt-get install python3-dev")
    return Tools(torch, headers, cmake, ninja)


def compile_library(spec: Spec, variant: Variant, build_id: str, tools: Tools, args: argparse.Namespace) -> Path:
    """Run CMake and ninja; returns the shared library in the work folder."""
    work = spec.root / ".build" / (variant.directory + ("-debug" if args.debug else ""))
    write_if_changed(work / "include" / "registration.h", REGISTRATION_H.encode())
    moved = older_glibc_symbols()
    write_if_changed(work / "glibc.map", moved.encode())
    # The same for our own objects: a header of torch 2.15 calls dlsym.
    asked = (line.replace(" ", ",") for line in moved.splitlines())
    write_if_changed(work / "glibc.h", "".join(f'__asm__(".symver {line}");\n' for line in asked).encode())
    config = work / "config.cmake"
    write_if_changed(config, cmake_config(spec, variant, build_id, tools, args.debug).encode())
    env = os.environ | {"NINJA_STATUS": "[%f/%t %es] "}
    if args.verbose:
        env["KERNEL_BUILD_VERBOSE"] = "1"  # read by tools/nvcc.py

    def run(*command, quiet: bool = False) -> None:
        """A quiet command speaks only when it fails."""
        result = subprocess.run([str(c) for c in command], env=env, capture_output=quiet, text=True, check=False)
        if result.returncode != 0:
            if quiet:
                print(result.stdout + result.stderr, file=sys.stderr)
            raise BuildError("the compilation failed, see above\n  the whole command lines: --verbose")

    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    run(tools.cmake, "-S", ROOT, "-B", work, *generator, "-C", config, quiet=not args.verbose)
    run(tools.cmake, "--build", work, "--parallel", args.jobs, *(["--verbose"] if args.verbose else []))
    return work / f"{spec.python_name}.abi3.so"


@contextlib.contextmanager
def exclusive(folder: Path):
    """One build at a time in a checkout; a second one waits."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(spec: Spec, variant: Variant, args: argparse.Namespace) -> Path:
    """Build one variant and return its folder."""
    with exclusive(spec.root / ".build"):
        return build_alone(spec, variant, args)


def build_alone(spec: Spec, variant: Variant, args: argparse.Namespace) -> Path:
    start = time.monotonic()
    package = spec.python_files()
    library, options = None, ""
    if variant.nvcc:
        tools = find_tools(spec, args.cutlass)
        options = f"nvcc {variant.nvcc.version}, headers of torch {tools.torch.version}"
        options += f", CUTLASS {tools.cutlass.version}" if tools.cutlass else ""
        options += ", line information" if args.debug else ""
        say(options)
    build_id = unique_id(spec, variant, package, options)
    if variant.nvcc:
        library = compile_library(spec, variant, build_id, tools, args)
    target = args.output / variant.directory
    stage(spec, variant, build_id, package, library, target)
    shown = target.relative_to(spec.root) if target.is_relative_to(spec.root) else target
    say(f"{shown}: {build_id}, {time.monotonic() - start:.1f} s")
    if library and (needs := newer_needs(library)):
        say(
            f"note: it loads only on systems with {' and '.join(needs)}, as this compiler makes it; no release takes it"
        )
    return target


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend",
        choices=["auto", "cpu", "cuda", "torch-cuda", "all"],
        default="auto",
        help="auto (default): cuda where torch has CUDA and nvcc is here, torch-cuda without nvcc, else cpu",
    )
    parser.add_argument("--nvcc", help="path of nvcc (default: CUDA_HOME, PATH, /usr/local/cuda)")
    parser.add_argument(
        "--cutlass", help="CUTLASS checkout or include folder (default: CUTLASS_DIR, nvidia-cutlass of PyPI)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="where variants go (default: build/)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilations at a time (default: all cores)"
    )
    parser.add_argument("--debug", action="store_true", help="line information for profilers and compute-sanitizer")
    parser.add_argument("--verbose", action="store_true", help="show command lines and ptxas's registers and spills")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        spec = Spec(ROOT)
        for variant in choose_variants(spec, args.backend, args.nvcc):
            build(spec, variant, args)
    except BuildError as error:
        print(f"[build] error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
