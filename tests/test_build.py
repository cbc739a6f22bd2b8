"""The build: build.toml, the variants that tools/build.py makes, the compiled library, the wheel, the flake."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernels._rust import Backend, Build, Digest, DigestValidationError, Metadata

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build as kernel_build
from conftest import compiler_too_new, too_new

try:
    NVCC = kernel_build.find_nvcc(None, "12.8")
    kernel_build.find_tools(kernel_build.Spec(ROOT), None)
    missing = ""
except kernel_build.BuildError as error:
    missing = str(error)
needs_nvcc = pytest.mark.skipif(bool(missing), reason=missing)


@pytest.fixture(scope="module")
def spec() -> kernel_build.Spec:
    return kernel_build.Spec(ROOT)


def run_build(*arguments: str, root: Path = ROOT, env: dict | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "tools" / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), check=False)


def built(variant: str, backend: str, output: Path, root: Path = ROOT) -> Path:
    result = run_build("--backend", backend, "--output", str(output), root=root)
    assert result.returncode == 0, result.stdout + result.stderr
    return output / variant


def read_metadata(variant: Path) -> dict:
    return json.loads((variant / "metadata.json").read_text())


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for section, count in [("Set up", 2), ("Tests", 1)]:
        commands = re.search(rf"^## {section}\n.*?^```bash\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[
            1
        ].splitlines()
        assert len(commands) == count
        assert [command for command in commands if command not in ci] == []


# --- build.toml -----------------------------------------------------------------------------------------------------


def test_build_toml_is_what_the_hub_expects(spec):
    config = Build.open(ROOT)
    assert set(config.general.backends) == {Backend.CUDA, Backend.CPU}
    general = spec.general
    assert (general["edition"], general["name"], general["version"], general["license"]) == (5, "flash-kda", 1, "MIT")
    assert general["hub"]["repo-id"] == "moonshot/flash-kda"
    assert spec.stable_abi == "2.11"
    assert spec.capabilities("cuda") == ["9.0a"]
    assert spec.minimum_cuda() == "12.8"
    assert spec.kernels("cpu") == {}  # Python only


def test_build_toml_lists_every_native_source_once(spec):
    listed = spec.native_sources("cuda")
    folders = [*(ROOT / "kda_cutlass").rglob("*"), *(ROOT / "torch-ext").glob("*")]
    present = {str(f.relative_to(ROOT)) for f in folders if f.suffix in {".cu", ".cuh", ".cpp", ".h", ".hpp"}}
    assert sorted(listed) == sorted(present)


def test_no_second_list_of_sources(spec):
    builders = [ROOT / "CMakeLists.txt", *(ROOT / "tools").glob("*.py"), ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    for builder in builders:
        text = builder.read_text()
        assert [path for path in spec.native_sources("cuda") if Path(path).name in text] == [], builder


# --- Python-only variants -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python_variants(tmp_path_factory) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("build")
    return {
        name: built(name, backend, output) for name, backend in [("torch-cpu", "cpu"), ("torch-cuda", "torch-cuda")]
    }


@pytest.mark.parametrize(("name", "backend"), [("torch-cpu", Backend.CPU), ("torch-cuda", Backend.CUDA)])
def test_python_variant(python_variants, spec, name, backend):
    variant = python_variants[name]
    read = check_variant(variant, spec)
    assert read.backend.backend_type == backend
    assert {str(f.relative_to(variant)) for f in variant.rglob("*.py")} == {*spec.python_files(), "_ops.py"}
    assert import_in_a_fresh_process(variant) == read.id


def import_in_a_fresh_process(variant: Path) -> str:
    """Name of the module that the loader makes of a variant.

    Not in this process: a second copy of the build that the other tests use would share its modules.
    """
    code = f"import kernels, pathlib; print(kernels.get_local_kernel(pathlib.Path({str(variant)!r})).__name__)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def check_variant(variant: Path, spec: kernel_build.Spec) -> Metadata:
    """What holds for every variant; returns the metadata as the loader reads it."""
    read = Metadata.read_from_file(variant / "metadata.json")
    assert (str(read.name), read.version, read.license, read.python_depends) == (spec.name, 1, "MIT", [])
    assert re.fullmatch(rf"_flash_kda_{str(read.backend.backend_type).lower()}_[0-9a-f]{{12}}", read.id)
    assert read.id in (variant / "_ops.py").read_text()
    assert read.provenance.kernel_builder.version.startswith("tools/build.py")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert head.returncode != 0 or read.provenance.kernel is not None
    read.digest.validate(Digest.hash_variant(read.digest.algorithm, variant))
    return read


def test_digest_catches_a_changed_file(python_variants, tmp_path):
    variant = tmp_path / "torch-cpu"
    shutil.copytree(python_variants["torch-cpu"], variant)
    with open(variant / "__init__.py", "a") as file:
        file.write("\n")
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    with pytest.raises(DigestValidationError):
        digest.validate(Digest.hash_variant(digest.algorithm, variant))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what a build reads, to change at will."""
    root = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("tools", "torch-ext", "kda_cutlass"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for file in ("build.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / file, root / file)
    return root


def test_id_follows_the_content(checkout, tmp_path):
    """The loader and torch key modules and operators by it: equal ids with unequal content would mix two builds."""

    def build_id() -> str:
        return read_metadata(built("torch-cpu", "cpu", tmp_path / "out", root=checkout))["id"]

    package = checkout / "torch-ext" / "flash_kda"
    ids = [build_id()]
    assert build_id() == ids[0]
    (package / "chunk.py").write_text((package / "chunk.py").read_text() + "# one more line\n")
    ids.append(build_id())
    (package / "chunk.py").rename(package / "chunks.py")
    ids.append(build_id())
    (checkout / "build.toml").write_text((checkout / "build.toml").read_text().replace('"MIT"', '"Apache-2.0"'))
    ids.append(build_id())
    ids.append(read_metadata(built("torch-cuda", "torch-cuda", tmp_path / "out", root=checkout))["id"])
    assert len(set(ids)) == len(ids)


def test_rebuild_leaves_nothing_behind(checkout, tmp_path):
    variant = built("torch-cpu", "cpu", tmp_path / "out", root=checkout)
    stray = checkout / "torch-ext" / "flash_kda" / "old" / "module.py"
    stray.parent.mkdir()
    stray.write_text("")
    built("torch-cpu", "cpu", tmp_path / "out", root=checkout)
    assert (variant / "old" / "module.py").is_file()
    shutil.rmtree(stray.parent)
    built("torch-cpu", "cpu", tmp_path / "out", root=checkout)
    assert not (variant / "old").exists()


# --- the CUDA variant -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_variant(spec) -> Path:
    """Built in place, so that what ./.ci/run or a developer has compiled is not compiled again."""
    return built(f"torch-stable-abi211-cu{NVCC.version.replace('.', '')}-x86_64-linux", "cuda", ROOT / "build")


@needs_nvcc
def test_cuda_variant(cuda_variant, spec):
    read = check_variant(cuda_variant, spec)
    assert (read.backend.backend_type, read.backend.archs) == (Backend.CUDA, ["9.0a"])
    assert (cuda_variant / f"{read.id}.abi3.so").is_file()
    assert f"from . import {read.id}" in (cuda_variant / "_ops.py").read_text()


@needs_nvcc
def test_cuda_library_loads_on_old_systems(cuda_variant):
    """glibc from 2.28, and the C++ library of its time; unless no library of this compiler does, which the build says."""
    (library,) = cuda_variant.glob("*.so")
    found = too_new(library)
    assert found == [] or compiler_too_new()
    assert ("it loads only on systems with" in run_build("--backend", "cuda").stdout) == bool(found)


@needs_nvcc
def test_cuda_library_loads_anywhere(cuda_variant):
    """Any Python from 3.9, torch from 2.11; no library of this machine's, no path of this machine's."""
    from kernel_abi_check import ObjectFile

    (library,) = cuda_variant.glob("*.so")
    assert ObjectFile(library).check_python_abi("3.9") == []
    dynamic = subprocess.check_output(["readelf", "-dW", library], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed[:3] == ["libtorch.so", "libtorch_cpu.so", "libc10.so"]
    system = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|libpthread|librt|ld-linux-x86-64)\.so\.\d+"
    assert [name for name in needed[3:] if not re.fullmatch(system, name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    content = library.read_bytes()
    assert [path for path in (str(ROOT), sys.prefix) if path.encode() in content] == []


LOAD_WITHOUT_CUDA = """
import importlib.util, json, os, sys, torch
sys.setdlopenflags(os.RTLD_LAZY)  # a CPU torch lacks the one function that finds the CUDA stream
path, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, path)
importlib.util.module_from_spec(spec)
ops = getattr(torch.ops, name)
sizes = [ops.prefill_workspace_size(T, B, N, HV, packed) for T, B, N, HV, packed in json.load(sys.stdin)]
print(json.dumps({"schema": str(ops.prefill.default._schema), "sizes": sizes}))
"""

# tokens a batch row, batch, sequences, value heads, packed
WORKSPACES = [
    (0, 1, 0, 1, True),
    (1, 1, 1, 1, False),
    (64, 3, 3, 4, False),
    (65, 3, 3, 4, False),
    (1000, 1, 7, 32, True),
    (8192, 1, 1, 96, False),
    (131072, 1, 1, 8, False),
    (65536, 1, 64, 32, True),
    (1 << 22, 4, 4, 128, False),
    (1 << 20, 1, 1000, 5000, True),
]


@needs_nvcc
def test_cuda_operators(cuda_variant, kernel):
    (library,) = cuda_variant.glob("*.so")
    name = read_metadata(cuda_variant)["id"]
    answer = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_CUDA, library, name],
        input=json.dumps(WORKSPACES),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    answer = json.loads(answer.stdout)
    assert answer["schema"] == (
        f"{name}::prefill(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, "
        "Tensor? initial_state, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!)? final_state, Tensor(c!) workspace, "
        "float scale, float? lower_bound, bool use_gate_in_kernel, bool use_qk_l2norm_in_kernel, "
        "bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, bool state_v_first, "
        "Tensor? ssm_state_indices=None, Tensor? has_initial_state=None, bool final_state_in_slots=False, "
        "int min_state_index=0, Tensor(d!)? checkpoint_state=None, Tensor? checkpoint_offsets=None, "
        "Tensor? checkpoint_indices=None, Tensor? checkpoint_indptr=None, int checkpoint_multiple=16, "
        "bool batch_invariant=False) -> ()"
    )
    wanted = [kernel.prefill.workspace_size(B, T, N, HV, packed) for T, B, N, HV, packed in WORKSPACES]
    assert answer["sizes"] == wanted


@needs_nvcc
def test_cuda_build_is_incremental(cuda_variant):
    result = run_build("--backend", "cuda")
    assert result.returncode == 0, result.stderr
    assert "Building" not in result.stdout


@needs_nvcc
def test_serialised_wgmma_fails_the_build(tmp_path):
    """The accumulator is touched while the asynchronous product runs: ptxas must serialise it, and notes that."""
    source, target = tmp_path / "bad.cu", tmp_path / "bad.o"
    source.write_text(
        r"""
__global__ void bad(float* out, unsigned long long a, unsigned long long b) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;\n");
  for (int i = 0; i < 2; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[i] *= out[i];
  }
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n");
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}
"""
    )
    command = [
        sys.executable,
        ROOT / "tools" / "nvcc.py",
        NVCC.path,
        "-gencode=arch=compute_90a,code=sm_90a",
        "-c",
        source,
        "-o",
        target,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "serialised wgmma" in result.stdout
    assert not target.exists()

    source.write_text(source.read_text().replace("d[i] *= out[i];", ""))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert target.exists()


# --- what is missing, and how to get it -----------------------------------------------------------------------------


def assert_says(result: subprocess.CompletedProcess, *texts: str) -> None:
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for text in ("[build] error:", "get it:", *texts):
        assert text in result.stderr


def fake_nvcc(folder: Path, release: str) -> str:
    program = folder / "nvcc"
    program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    program.chmod(0o755)
    return str(program)


def test_missing_nvcc():
    assert_says(
        run_build("--backend", "cuda", "--nvcc", "/nowhere/nvcc"), "nvcc was not found", "/nowhere/nvcc", "torch-cuda"
    )
    assert_says(run_build("--backend", "cuda", env={"CUDA_HOME": "/nowhere"}), "/nowhere/bin/nvcc")


def test_old_nvcc(tmp_path):
    nvcc = fake_nvcc(tmp_path, "12.4")
    assert_says(run_build("--backend", "cuda", "--nvcc", nvcc), "nvcc 12.4", "too old", "12.8")


def test_missing_cutlass(tmp_path):
    nvcc = fake_nvcc(tmp_path, "13.0")
    result = run_build("--backend", "cuda", "--nvcc", nvcc, "--cutlass", str(tmp_path))
    assert_says(result, "cutlass/version.h", "nvidia-cutlass")


def test_cutlass_of_another_major(tmp_path):
    header = tmp_path / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 3\n#define CUTLASS_MINOR 9\n#define CUTLASS_PATCH 2\n")
    result = run_build("--backend", "cuda", "--nvcc", fake_nvcc(tmp_path, "13.0"), "--cutlass", str(tmp_path))
    assert_says(result, "CUTLASS 3.9.2", "cutlass_4_4")


def test_old_torch(tmp_path):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("")
    (torch / "version.py").write_text("__version__ = '2.10.0+cpu'\ncuda = None\n")
    result = run_build("--backend", "cuda", "--nvcc", fake_nvcc(tmp_path, "13.0"), env={"PYTHONPATH": str(tmp_path)})
    assert_says(result, "torch 2.10.0+cpu", "too old", "torch>=2.11")


def test_missing_torch(monkeypatch):
    monkeypatch.setattr(kernel_build, "find_package", lambda name: None)
    with pytest.raises(kernel_build.BuildError, match="torch is not installed"):
        kernel_build.find_torch()


def test_bad_build_toml(checkout):
    (checkout / "build.toml").write_text((checkout / "build.toml").read_text().replace("edition = 5", "edition = 4"))
    result = run_build("--backend", "cpu", root=checkout)
    assert result.returncode == 1
    assert "build.toml is not valid" in result.stderr


def test_listed_source_that_is_missing(checkout, tmp_path):
    (checkout / "torch-ext" / "torch_binding.h").unlink()
    result = run_build("--backend", "cuda", "--nvcc", fake_nvcc(tmp_path, "13.0"), root=checkout)
    assert result.returncode == 1
    assert "torch-ext/torch_binding.h, which does not exist" in result.stderr


def test_backend_follows_torch(monkeypatch, capsys, spec, tmp_path):
    nvcc = fake_nvcc(tmp_path, "13.1")

    def chosen(cuda: str | None, backend: str = "auto") -> list[str]:
        monkeypatch.setattr(kernel_build, "find_torch", lambda: kernel_build.Torch(ROOT, "2.12.0", cuda))
        return [variant.directory for variant in kernel_build.choose_variants(spec, backend, nvcc)]

    native = "torch-stable-abi211-cu131-x86_64-linux"
    assert chosen(None) == ["torch-cpu"]
    assert chosen("13.1") == [native]
    assert chosen("13.1", "torch-cuda") == ["torch-cuda"]
    assert chosen(None, "all") == ["torch-cpu", "torch-cuda", native]

    nvcc = None
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert chosen("13.1") == ["torch-cuda"]
    assert "no native kernels, the PyTorch path only: nvcc was not found" in capsys.readouterr().out
    nvcc = "/nowhere/nvcc"  # one that was asked for
    with pytest.raises(kernel_build.BuildError, match="nvcc was not found"):
        chosen("13.1")


# --- the wheel ------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, *options: str) -> Path:
    """pip's own call of the backend; no index is asked."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    result = subprocess.run([*pip, *options, "-w", folder, ROOT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_installs_and_imports(tmp_path):
    wheel = make_wheel(tmp_path, "--config-settings", "backend=cpu")
    assert wheel.name == "flash_kda-1-py3-none-any.whl"
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True)
    code = "import flash_kda; print(flash_kda.__file__); flash_kda.chunk_kda; flash_kda.fwd"
    env = os.environ | {"PYTHONPATH": str(target)}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == str(target / "flash_kda" / "__init__.py")


@needs_nvcc
def test_cuda_wheel(tmp_path, cuda_variant):
    wheel = make_wheel(tmp_path, "--config-settings", "backend=cuda")
    assert wheel.name == "flash_kda-1-cp39-abi3-manylinux_2_28_x86_64.whl"
    package = {
        name.removeprefix("flash_kda/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("flash_kda/")
    }
    assert package == {
        str(f.relative_to(cuda_variant)) for f in cuda_variant.rglob("*") if f.is_file() and f.suffix != ".pyc"
    }


# --- the flake ------------------------------------------------------------------------------------------------------


def test_flake_lock_is_complete():
    lock = json.loads((ROOT / "flake.lock").read_text())
    nodes = lock["nodes"]
    assert lock["version"] == 7
    assert nodes[lock["root"]]["inputs"] == {"kernel-builder": "kernel-builder"}
    assert nodes["rust-overlay"]["inputs"]["nixpkgs"] == ["kernel-builder", "nixpkgs"]
    reached, waiting = set(), [lock["root"]]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += [i for i in nodes[name].get("inputs", {}).values() if isinstance(i, str) and i not in reached]
    assert reached == set(nodes)
    for name in reached - {lock["root"]}:
        locked = nodes[name]["locked"]
        assert re.fullmatch(r"[0-9a-f]{40}", locked["rev"]), name
        algorithm, _, digest = locked["narHash"].partition("-")
        assert (algorithm, len(base64.b64decode(digest))) == ("sha256", 32), name
        assert (locked["owner"], locked["repo"]) == (nodes[name]["original"]["owner"], nodes[name]["original"]["repo"])


def test_flake_asks_for_the_locked_builder():
    locked = json.loads((ROOT / "flake.lock").read_text())["nodes"]["kernel-builder"]["original"]
    assert f'kernel-builder.url = "github:{locked["owner"]}/{locked["repo"]}"' in (ROOT / "flake.nix").read_text()


@pytest.mark.skipif(shutil.which("nix-instantiate") is None, reason="no Nix (Debian: apt-get install nix-bin)")
def test_flake_parses():
    subprocess.run(["nix-instantiate", "--parse", ROOT / "flake.nix"], check=True, capture_output=True)
