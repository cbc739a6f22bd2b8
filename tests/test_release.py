"""What a release uploads: the dry run of tools/release.py, CUDA 12.8, the workflows, and the small files around."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import KERNELS_CI, REPO_ID, ROOT, compiler_too_new, too_new
from kernels.variants import parse_variant, resolve_variant

sys.path.insert(0, str(ROOT / "tools"))
import build as kernel_build
import check_cuda
import release

SPEC = kernel_build.Spec(ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The Python-only variants of the present sources, and the CUDA one where it has been built, unless this machine's
    compiler can't build one for a release."""
    folder = tmp_path_factory.mktemp("build")
    for backend in ("cpu", "torch-cuda"):
        command = [sys.executable, ROOT / "tools" / "build.py", "--backend", backend, "--output", folder]
        subprocess.run(command, check=True, capture_output=True)
    for native in (ROOT / "build").glob("torch-stable-abi*"):
        if not (any(map(too_new, native.glob("*.so"))) and compiler_too_new()):
            shutil.copytree(native, folder / native.name)
    return folder


@pytest.fixture
def hub(built, tmp_path) -> Path:
    """A release assembled from them, to damage at will."""
    release.assemble(SPEC, built, tmp_path / "hub")
    return tmp_path / "hub"


def problems(hub: Path, *require: str) -> list[str]:
    return release.check(hub, SPEC, require, allow_dirty=True)


def rewrite_metadata(variant: Path, **changes) -> None:
    data = json.loads((variant / "metadata.json").read_text())
    (variant / "metadata.json").write_text(json.dumps(data | changes))


def test_a_release_has_no_problems(hub, built):
    assert problems(hub, "torch-cpu", "torch-cuda") == []
    assert {p.name for p in hub.iterdir()} == {"main", "v1"}
    assert {p.name for p in (hub / "v1" / "build").iterdir()} == {p.name for p in built.iterdir()}
    assert [p.name for p in (hub / "v1" / "benchmarks").iterdir()] == ["benchmark_prefill.py"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_for_newer_systems_is_refused(tmp_path):
    source, library = tmp_path / "threads.c", tmp_path / "threads.so"
    source.write_text("int pthread_create(); int start() { return pthread_create(); }")  # moved in glibc 2.34
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    assert any("breaks manylinux_2_28" in problem for problem in release.check_library(library))
    assert kernel_build.newer_needs(library) == ["GLIBC 2.34"]


def test_the_card_is_filled_in(hub, kernel):
    card = (hub / "main" / "README.md").read_text()
    assert f'get_kernel("{REPO_ID}", version=1' in card
    assert "{{" not in card and "{%" not in card
    (listed,) = re.findall(r"^Exported: (.*)\.$", card, re.MULTILINE)
    assert re.findall(r"`(\w+)`", listed) == kernel.__all__


CHANGES = {
    "altered file": (lambda v: (v / "chunk.py").write_text("# shorter"), "files do not match metadata.json"),
    "extra file": (lambda v: (v / "notes.txt").write_text(""), "files do not match metadata.json"),
    "no digest": (lambda v: rewrite_metadata(v, digest=None), "no digest"),
    "other version": (lambda v: rewrite_metadata(v, version=2), "metadata.json is of flash-kda 2"),
    "other licence": (lambda v: rewrite_metadata(v, license="GPL-3.0"), "license GPL-3.0, build.toml says MIT"),
    "other backend": (lambda v: rewrite_metadata(v, backend={"type": "cuda"}), "backend cuda in a variant for cpu"),
    "needs a package": (lambda v: rewrite_metadata(v, **{"python-depends": ["einops"]}), "depends on ['einops']"),
    "path of this machine": (
        lambda v: (v / "chunk.py").write_text("x = '/home/someone/flash-kda'"),
        "chunk.py names a path of the build machine: /home/someone",
    ),
    "Nix store": (lambda v: (v / "chunk.py").write_text("#!/nix/store/abc-python"), "/nix/store/abc-python"),
    "a library": (lambda v: (v / "x.abi3.so").write_bytes(b""), "libraries ['x.abi3.so'], expected []"),
    "a link": (lambda v: (v / "chunk2.py").symlink_to("chunk.py"), "chunk2.py is a link"),
    "operators of another build": (lambda v: (v / "_ops.py").write_text(""), "_ops.py does not name _flash_kda_cpu_"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_variant_is_found(hub, name):
    change, said = CHANGES[name]
    variant = hub / "v1" / "build" / "torch-cpu"
    change(variant)
    found = problems(hub)
    assert any(said in problem for problem in found), found
    assert all(problem.startswith("torch-cpu: ") for problem in found)


def test_what_else_is_found(hub, monkeypatch):
    folder = hub / "v1" / "build"
    built_id = json.loads((folder / "torch-cpu" / "metadata.json").read_text())["id"]
    rewrite_metadata(folder / "torch-cuda", id=built_id)
    assert f"torch-cuda: has the id of torch-cpu, {built_id}" in problems(hub)
    shutil.rmtree(folder / "torch-cuda")
    assert problems(hub, "torch-cuda") == ["torch-cuda: missing"]
    shutil.copytree(folder / "torch-cpu", folder / "pytorch-cpu")
    assert any(problem.startswith("pytorch-cpu: the loader does not know its name") for problem in problems(hub))
    shutil.rmtree(folder / "pytorch-cpu")
    script = hub / "v1" / "benchmarks" / "benchmark_prefill.py"
    script.write_text("from workloads import Row\n")
    assert problems(hub) == ["benchmark_prefill.py imports workloads, which is not uploaded"]
    script.unlink()
    card = hub / "main" / "README.md"
    card.write_text(card.read_text().replace("`torch-cpu`", "`torch-tpu`"))
    assert problems(hub) == ["README.md (the card) does not name torch-cpu", "no benchmarks/benchmark*.py"]
    monkeypatch.setattr(release, "SIZE_LIMIT", 1000)
    assert any(re.match(r"torch-cpu: 0\.\d MiB, more than 0", problem) for problem in problems(hub))
    shutil.rmtree(folder)
    assert problems(hub)[0] == f"no variant in {folder}"


def test_uncommitted_sources_are_refused(hub):
    variant = hub / "v1" / "build" / "torch-cpu"
    rewrite_metadata(
        variant, provenance={"kernel-builder": {"version": "1"}, "kernel": {"commit": "0" * 40, "dirty": True}}
    )
    assert "built from sources that no commit names (--allow-dirty lets it pass)" in release.check_variant(
        variant, SPEC, allow_dirty=False
    )
    assert release.check_variant(variant, SPEC, allow_dirty=True) == []


def test_a_library_of_this_machine_is_refused():
    """torch's Python library: linked to its neighbours by a path of its own, and not for the limited API."""
    (library,) = Path(torch.__file__).parent.glob("lib/libtorch_python.so")
    wrong = release.check_library(library)
    assert any("breaks abi3" in problem for problem in wrong)
    assert f"{library.name} has a library path of its own" in wrong
    assert any(problem.startswith(f"{library.name} needs ") for problem in wrong)


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.34"), reason="of this system nothing is newer")
def test_a_library_for_a_newer_system_is_refused(tmp_path):
    """glibc has had pthread_create under another version since 2.34; linked here without care, it asks for that one."""
    source, library = tmp_path / "thread.cpp", tmp_path / "thread.abi3.so"
    source.write_text("#include <pthread.h>\nvoid run(void* (*f)(void*)) { pthread_t t; pthread_create(&t, 0, f, 0); }")
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    (wrong,) = release.check_library(library)
    assert "breaks manylinux_2_28" in wrong


def test_a_library_for_other_gpus_is_refused(hub):
    folder = hub / "v1" / "build"
    variant = shutil.copytree(folder / "torch-cuda", folder / "torch-stable-abi211-cu128-aarch64-linux")
    rewrite_metadata(variant, backend={"type": "cuda", "archs": ["8.0"]})
    assert "archs ['8.0'], build.toml says ['9.0a']" in release.check_variant(variant, SPEC, allow_dirty=True)


def test_the_program(built, tmp_path):
    command = [sys.executable, ROOT / "tools" / "release.py", "--build", built, "--output", tmp_path / "hub"]
    result = subprocess.run([*command, "--allow-dirty"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{REPO_ID}: ready to upload" in result.stdout
    result = subprocess.run([*command, "--allow-dirty", "--require", "x"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "error: x: missing" in result.stderr


# --- CUDA 12.8

OLD_CUDA = ROOT / ".cuda12"
old_cuda = pytest.mark.skipif(
    not OLD_CUDA.is_dir() or shutil.which("nvcc") is None,
    reason="no CUDA 12.8 in .cuda12, or no nvcc (tools/check_cuda.py)",
)


@old_cuda
def test_the_kernels_compile_with_cuda_12_8():
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_cuda.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("CUDA 12.8 headers and ptxas")
    assert len(re.findall(r"\d+ registers, \d+ bytes spilled", result.stdout)) >= 5


@old_cuda
def test_what_cuda_12_8_lacks_is_found(tmp_path):
    def compile(text: str) -> str:
        (tmp_path / "kernel.cu").write_text(text)
        kernel = SPEC.kernels("cuda")["prefill"]
        nvcc, cutlass = kernel_build.find_nvcc(None, "12.8"), kernel_build.find_cutlass(None, ["cutlass_4_4"])
        return check_cuda.compile_kernel(kernel, tmp_path / "kernel.cu", OLD_CUDA, "12.8", nvcc, cutlass)

    said = compile("static_assert(CUDART_VERSION == 12080 && __CUDACC_VER_MAJOR__ == 12);\n__global__ void empty() {}")
    assert "Used" in said
    newer = (
        "int host() { cudaDeviceProp p; return cudaGetDeviceProperties(&p, 0) + cudaLogsRegisterCallback(0, 0, 0); }"
    )
    with pytest.raises(kernel_build.BuildError, match="cudaLogsRegisterCallback"):
        compile(newer)
    with pytest.raises(kernel_build.BuildError, match="ptxas"):
        compile('__global__ void newer() { asm volatile("an.instruction.of.tomorrow;"); }')


# --- .github and the files beside it


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


@pytest.mark.parametrize("name", ["build.yml", "test.yml"])
def test_workflow(name):
    """No runner is here to run them: what they name exists, what they use is pinned, what they wait for is a job."""
    text, jobs = (ROOT / ".github" / "workflows" / name).read_text(), workflow(name)["jobs"]
    for job in jobs.values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= jobs.keys()
        assert job["timeout-minutes"] <= 360
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            if "uses" in step:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step["uses"]), step
    for path in re.findall(r"(?:tools/\w+\.py|requirements-dev\.txt|\.ci/run)", text):
        assert (ROOT / path).is_file(), path
    assert workflow(name)["permissions"] == {"contents": "read"}


def test_only_a_tag_uploads_and_only_what_was_checked():
    jobs = workflow("build.yml")["jobs"]
    uploads = [name for name, job in jobs.items() if "HF_TOKEN" in json.dumps(job)]
    assert uploads == ["upload"]
    assert jobs["upload"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert set(jobs["upload"]["needs"]) == {"check", "gpu"} and jobs["gpu"]["needs"] == "check"


def promised_variants() -> set[str]:
    (check,) = [s["run"] for s in workflow("build.yml")["jobs"]["check"]["steps"] if s.get("name") == "Check"]
    return set(check.split("--require ")[1].split())


def test_the_workflow_requires_every_promised_variant():
    required = promised_variants()
    native = {f"torch-stable-abi211-cu{c}-{a}-linux" for c in (128, 129, 130) for a in ("x86_64", "aarch64")}
    assert required == {"torch-cpu", "torch-cuda"} | native
    assert all(release.card_names(release.render_card(SPEC), name) for name in required)


@pytest.mark.parametrize(
    "version, cuda, machine, chosen",
    [
        ("2.11.0", "12.8", "x86_64", "torch-stable-abi211-cu128-x86_64-linux"),
        ("2.13.0", "12.9", "x86_64", "torch-stable-abi211-cu129-x86_64-linux"),
        ("2.15.0", "13.2", "x86_64", "torch-stable-abi211-cu130-x86_64-linux"),  # the newest up to torch's own
        ("2.11.0", "13.0", "aarch64", "torch-stable-abi211-cu130-aarch64-linux"),
        ("2.10.0", "13.0", "x86_64", "torch-cuda"),
        ("2.11.0", "12.6", "x86_64", "torch-cuda"),
        ("2.11.0", None, "x86_64", "torch-cpu"),
    ],
)
def test_the_loader_chooses_among_the_promised_variants(monkeypatch, version, cuda, machine, chosen):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert resolve_variant([parse_variant(name) for name in promised_variants()])[0].variant_str == chosen


def test_the_released_build_is_tested_with_something():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "kernels_ci", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert set(re.findall(r"^tests/(\w+)\.py::", listed, re.MULTILINE)) == KERNELS_CI


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_template(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        return
    assert {"name", "description", "body"} <= form.keys()
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert any(field["validations"]["required"] for field in form["body"])


def test_pre_commit_has_the_versions_of_the_requirements():
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))
    hooks = [
        h for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for h in repo["hooks"]
    ]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "clang-format"}
    for hook in hooks:
        ((name, version),) = (package.split("==") for package in hook["additional_dependencies"])
        assert version == pinned[name]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["license"], citation["version"]) == (SPEC.general["license"], str(SPEC.general["version"]))
    assert f"Version {SPEC.general['version']}" in (ROOT / "CHANGELOG.md").read_text()
