"""The PEP 517 backend of pyproject.toml: `pip install .` installs the package that tools/build.py builds.

The variant follows the torch of the installing interpreter: native where torch has CUDA and nvcc is at hand, Python only
otherwise. `--config-settings backend=cuda` (or cpu, torch-cuda) asks for one.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import platform
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import build as kernel_build
from build import GLIBC, PYTHON_ABI, ROOT, BuildError, Spec, Variant, tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def choose(spec: Spec, settings: dict | None) -> Variant:
    return kernel_build.choose_variants(spec, (settings or {}).get("backend", "auto"), None)[0]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    spec = Spec(ROOT)
    if not choose(spec, config_settings).nvcc:
        return []
    wanted = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    try:
        kernel_build.find_cutlass(None, spec.cutlass_depends())
    except BuildError:
        wanted.append(kernel_build.CUTLASS_PACKAGE)
    return wanted


def distribution(spec: Spec) -> str:
    return f"{spec.python_name}-{spec.general['version']}"


def core_metadata(spec: Spec) -> str:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {PROJECT['name']}",
        f"Version: {spec.general['version']}",
        f"Summary: {PROJECT['description']}",
        f"License-Expression: {PROJECT['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {PROJECT['requires-python']}",
        *(f"Requires-Dist: {name}" for name in PROJECT["dependencies"]),
        "Description-Content-Type: text/markdown",
    ]
    return "\n".join(lines) + "\n\n" + (ROOT / PROJECT["readme"]).read_text()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    spec = Spec(ROOT)
    variant = choose(spec, config_settings)
    tag = "py3-none-any"
    if variant.nvcc:
        python, glibc = ("".join(map(str, PYTHON_ABI)), "_".join(map(str, GLIBC)))
        tag = f"cp{python}-abi3-manylinux_{glibc}_{platform.machine()}"
    with tempfile.TemporaryDirectory() as scratch:
        package = kernel_build.build(spec, variant, kernel_build.parse_args(["--output", scratch]))
        files = {
            f"{spec.python_name}/{path.relative_to(package)}": path.read_bytes()
            for path in sorted(package.rglob("*"))
            if path.is_file()
        }
    info = f"{distribution(spec)}.dist-info"
    pure = "false" if variant.nvcc else "true"
    files |= {
        f"{info}/METADATA": core_metadata(spec).encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: flash-kda\nRoot-Is-Purelib: {pure}\nTag: {tag}\n".encode(),
        f"{info}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(content)])
    rows.writerow([f"{info}/RECORD", "", ""])
    files[f"{info}/RECORD"] = record.getvalue().encode()

    wheel = f"{distribution(spec)}-{tag}.whl"
    with zipfile.ZipFile(Path(wheel_directory) / wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def build_sdist(sdist_directory, config_settings=None) -> str:
    """The tracked files of the checkout."""
    spec = Spec(ROOT)
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    name = f"{distribution(spec)}.tar.gz"
    with tarfile.open(Path(sdist_directory) / name, "w:gz") as archive:
        for path in filter(None, listing.stdout.split("\0")):
            archive.add(ROOT / path, f"{distribution(spec)}/{path}")
        content = core_metadata(spec).encode()
        info = tarfile.TarInfo(f"{distribution(spec)}/PKG-INFO")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return name
