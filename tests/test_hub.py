"""The Hub, end to end: the `kernels` client of PyPI, unpatched, against a server on this machine (examples/local_hub.py).

Each scenario is a process of its own, as a user's would be: the client reads its environment when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO_ID, ROOT

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]
import release
from build import Spec
from local_hub import LocalHub, client_environment, read_branch

VARIANT = "torch-cpu"
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="written for the variant of a CPU torch")

SHOW = """
import json, logging, os, sys, torch
from pathlib import Path
from kernels import get_kernel, get_locked_kernel, load_kernel

def facts(kernel):
    x = torch.ones(1, 3, 2, 8)
    o, _ = kernel.chunk_kda(x, x, x, -x, x[..., 0])
    return {"home": str(Path(kernel.__file__).parent), "altered": kernel.altered_files(), "sum": o.sum().item()}

def attempt(function, *args, **options):
    try:
        return facts(function("moonshot/flash-kda", *args, **options))
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a release of the present sources uploads."""
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("release")
    for backend in ("cpu", "torch-cuda"):
        command = [sys.executable, ROOT / "tools" / "build.py", "--backend", backend, "--output", build]
        subprocess.run(command, check=True, capture_output=True)
    release.assemble(Spec(ROOT), build, target)
    return target


def run(hub: LocalHub, home: Path, *command: str, **env: str) -> str:
    environment = client_environment(hub, home) | env
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # a venv need not be activated
    result = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def ask(hub: LocalHub, home: Path, *expressions: str, **env: str) -> list[dict]:
    """The values of the expressions, evaluated in one fresh process."""
    code = SHOW + f"print(json.dumps([{', '.join(expressions)}]))"
    return json.loads(run(hub, home, sys.executable, "-c", code, **env).splitlines()[-1])


def snapshot(hub: LocalHub, home: Path) -> Path:
    return home / "hub" / "kernels--moonshot--flash-kda" / "snapshots" / hub.branches["v1"].commit


# What the README says to run before going offline
DOWNLOAD = ("hf", "download", REPO_ID, "--repo-type", "kernel", "--revision", "v1")
TRUSTED = "attempt(get_kernel, version=1, trust_remote_code=True)"


def test_from_an_empty_cache(folder, tmp_path):
    """The trust check, the choice of the variant, and that nothing else is downloaded."""
    with LocalHub(folder) as hub:
        refused, listed, again = ask(
            hub,
            tmp_path,
            "attempt(get_kernel, version=1)",
            f"attempt(get_kernel, version=1, trust_remote_code=['{REPO_ID}'])",
            TRUSTED,
        )
        downloads = {r.split("/resolve/")[1].split("/", 1)[1] for r in hub.requests if "/resolve/" in r}
    assert refused["error"] == "ValueError" and "not from a trusted publisher" in refused["text"]
    assert listed == again and "error" not in listed
    assert listed["home"] == str(snapshot(hub, tmp_path) / "build" / VARIANT)
    assert listed["altered"] == []
    files = {f"build/{VARIANT}/{p.relative_to(folder / 'v1' / 'build' / VARIANT)}" for p in variant_files(folder)}
    assert downloads == files


def variant_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "v1" / "build" / VARIANT).rglob("*") if path.is_file()]


def test_a_publisher_that_the_hub_trusts_needs_no_opt_in(folder, tmp_path):
    """And what goes with trust: the lock file and loading by it, online and offline."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(f'[tool.kernels.dependencies]\n"{REPO_ID}" = 1\n')
    lockfile = project / "kernels.lock"
    with LocalHub(folder, trusted=True) as hub:
        run(hub, tmp_path, "kernels", "lock", str(project))
        assert REPO_ID in lockfile.read_text() and hub.branches["v1"].commit in lockfile.read_text()
        (online,) = ask(hub, tmp_path, f"attempt(get_locked_kernel, lockfile=Path({str(lockfile)!r}))")
        assert online["home"].startswith(str(snapshot(hub, tmp_path)))
        run(hub, tmp_path, *DOWNLOAD)
        # The branch moves on, the lock does not; load_kernel never goes online.
        shutil.copytree(folder / "v1", tmp_path / "next")
        (tmp_path / "next" / "build" / VARIANT / "new.py").write_text("")
        hub.branches |= {"before": hub.branches["v1"], "v1": read_branch(tmp_path / "next")}
        locked, loaded = ask(
            hub,
            tmp_path,
            f"attempt(get_locked_kernel, lockfile=Path({str(lockfile)!r}))",
            f"attempt(load_kernel, lockfile=Path({str(lockfile)!r}))",
        )
        assert locked == loaded == online


def test_offline(folder, tmp_path):
    """get_kernel leaves too little for an offline start; the README's command leaves enough."""
    with LocalHub(folder) as hub:
        (online,) = ask(hub, tmp_path, TRUSTED)
        (early,) = ask(hub, tmp_path, TRUSTED, HF_HUB_OFFLINE="1")
        run(hub, tmp_path, *DOWNLOAD)
        seen = len(hub.requests)
        (offline,) = ask(hub, tmp_path, TRUSTED, HF_HUB_OFFLINE="1")
        assert len(hub.requests) == seen
    assert "error" in early and offline == online


class Damaging(LocalHub):
    """Sends half of chunk.py while `left` lasts, under the length of the whole; `dies` takes the server down with it."""

    left, dies = 1, False

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.connections: list[socket.socket] = []

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def body(self, path: str, content: bytes) -> bytes:
        if not path.endswith("chunk.py") or self.left == 0:
            return content
        self.left -= 1
        if self.dies:
            self.socket.close()  # nobody gets in any more, and who is in is thrown out
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        return content[: len(content) // 2]


def test_a_truncated_download_is_never_loaded(folder, tmp_path):
    with Damaging(folder) as hub:
        hub.left = 1000
        (first,) = ask(hub, tmp_path, TRUSTED)
        (offline,) = ask(
            hub,
            tmp_path,
            f'attempt(get_kernel, revision="{hub.branches["v1"].commit}", trust_remote_code=True)',
            HF_HUB_OFFLINE="1",
        )
        hub.left = 0
        (repaired,) = ask(hub, tmp_path, TRUSTED)
    assert "error" in first and "sum" not in first
    assert "error" in offline and "sum" not in offline
    assert repaired["altered"] == []


def test_a_server_that_dies_leaves_nothing_half_loaded(folder, tmp_path):
    hub = Damaging(folder)
    hub.dies = True
    with hub:
        (first,) = ask(hub, tmp_path, TRUSTED)
    assert "error" in first and "sum" not in first
    assert not (snapshot(hub, tmp_path) / "build" / VARIANT / "chunk.py").exists()
    with LocalHub(folder) as hub:
        (repaired,) = ask(hub, tmp_path, TRUSTED)
    assert repaired["altered"] == []


def test_an_altered_file_loads_and_is_found(folder, tmp_path):
    """`kernels` does not hash what it downloads; our check does, on request and in the report."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "v1" / "build" / VARIANT / "chunk.py"
    file.write_text(file.read_text().replace("The public prefill", "The Public prefill", 1))
    with LocalHub(copy) as hub:
        loaded, report = ask(
            hub,
            tmp_path,
            TRUSTED,
            "get_kernel('moonshot/flash-kda', version=1, trust_remote_code=True).environment_report()",
        )
    assert loaded["altered"] == ["chunk.py: altered"] and "sum" in loaded
    assert "NOT as metadata.json lists them" in report and "chunk.py: altered" in report


def test_benchmark_from_the_served_repository(folder, tmp_path):
    pytest.importorskip("tabulate", reason="kernels benchmark needs it")
    with LocalHub(folder, trusted=True) as hub:
        command = ["kernels", "benchmark", f"{REPO_ID}@v1", "--iterations", "1", "--warmup", "0", "--json"]
        results = json.loads(run(hub, tmp_path, *command))["results"]
    assert {r["workload"] for r in results} == {f"Prefill.{w}" for w in ("steep_2048", "slow_2048", "kimi_packed")}
    assert all(r["verified"] for r in results)


def test_the_example_runs_a_command(folder, tmp_path):
    code = "import os; from kernels import has_kernel; print(has_kernel('moonshot/flash-kda', version=1, trust_remote_code=True))"
    command = [sys.executable, ROOT / "examples" / "local_hub.py", "--folder", folder, "--", sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"
    empty = subprocess.run([*command[:3], tmp_path / "nothing"], capture_output=True, text=True, check=False)
    assert empty.returncode == 1 and "tools/release.py" in empty.stderr
