"""Assemble in dist/hub exactly what a release uploads to the Hub, and check it. Uploads nothing.

    python tools/release.py                                   the variants in build/
    python tools/release.py --build DIR --require NAME ...    those that kernel-builder made; these must be among them

The Hub repository has two branches, as kernel-builder's upload fills them: `main` with the card as README.md, and
`v<version>` with build/<variant>/ and benchmarks/benchmark*.py. They become the folders dist/hub/main and
dist/hub/v1; examples/local_hub.py serves them. Exits with 1 and names every problem found.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
from build import GLIBC, PYTHON_ABI, ROOT, Spec
from kernel_abi_check import ObjectFile
from kernels._rust import Digest, DigestValidationError, Metadata
from kernels.variants import ArchVariant, parse_variant

SIZE_LIMIT = 50 << 20  # bytes of a variant
# What a library may need: torch's own and the C and C++ runtimes that every Linux of GLIBC or newer has.
LIBRARIES = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|c10|c10_cuda|stdc\+\+|gcc_s|c|m|dl|pthread|rt|gomp)\.so(\.\d+)?|ld-linux-\S+"
)
# Folders of the machine that built it. The Nix store is one: a library must not look for anything there.
BUILD_PATHS = re.compile(rb"/(?:nix/store|home|root|work|build|opt|usr/local|tmp)/[\w.+-]+")


def render_card(spec: Spec) -> str:
    """CARD.md as kernel-builder fills it in."""
    exported = re.search(r"__all__\s*=\s*\[([^\]]*)\]", (spec.package / "__init__.py").read_text())[1]
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return template.from_string((spec.root / "CARD.md").read_text()).render(
        repo_id=spec.general["hub"]["repo-id"],
        functions=re.findall(r"[\"']([^\"']+)[\"']", exported),
        license=spec.general["license"],
    )


def assemble(spec: Spec, build: Path, target: Path) -> Path:
    """Makes `target` hold what the upload would send; returns the folder of the version's branch."""
    shutil.rmtree(target, ignore_errors=True)
    branch = target / f"v{spec.general['version']}"
    bytecode = shutil.ignore_patterns("__pycache__", "*.pyc")  # of whoever imported the build; the loader skips it
    for variant in sorted(path for path in build.iterdir() if (path / "metadata.json").is_file()):
        shutil.copytree(variant, branch / "build" / variant.name, ignore=bytecode)
    (branch / "benchmarks").mkdir(parents=True)
    for script in sorted((spec.root / "benchmarks").glob("benchmark*.py")):
        shutil.copy(script, branch / "benchmarks")
    (target / "main").mkdir()
    (target / "main" / "README.md").write_text(render_card(spec))
    return branch


def check_variant(variant: Path, spec: Spec, allow_dirty: bool) -> list[str]:
    """What is wrong with one variant, in words."""
    wrong = []
    try:
        shape = parse_variant(variant.name)
    except ValueError as error:
        return [f"the loader does not know its name: {error}"]
    metadata = Metadata.read_from_file(variant / "metadata.json")
    raw = json.loads((variant / "metadata.json").read_text())
    if (str(metadata.name), metadata.version) != (spec.name, spec.general["version"]):
        wrong.append(f"metadata.json is of {metadata.name} {metadata.version}")
    if raw["license"] != spec.general["license"]:
        wrong.append(f"license {raw['license']}, build.toml says {spec.general['license']}")
    native = isinstance(shape, ArchVariant)  # the others are Python only
    backend = shape.arch.backend.name if native else shape.arch.backend_name
    if raw["backend"]["type"] != backend:
        wrong.append(f"backend {raw['backend']['type']} in a variant for {backend}")
    if native and raw["backend"].get("archs") != spec.capabilities(backend):
        wrong.append(f"archs {raw['backend'].get('archs')}, build.toml says {spec.capabilities(backend)}")
    if raw.get("python-depends"):
        wrong.append(f"depends on {raw['python-depends']}")
    source = raw.get("provenance", {}).get("kernel")
    if not allow_dirty and (source is None or source.get("dirty")):
        wrong.append("built from sources that no commit names (--allow-dirty lets it pass)")
    if metadata.digest is None:
        wrong.append("metadata.json has no digest")
    else:
        try:
            metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
        except DigestValidationError as error:
            wrong.append(f"files do not match metadata.json: {error}")
    files = [path for path in variant.rglob("*") if not path.is_dir()]
    wrong += [f"{path.relative_to(variant)} is a link" for path in files if path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    if size > SIZE_LIMIT:
        wrong.append(f"{size / 2**20:.1f} MiB, more than {SIZE_LIMIT >> 20}")
    for path in files:
        if found := BUILD_PATHS.search(path.read_bytes()):
            wrong.append(f"{path.relative_to(variant)} names a path of the build machine: {found[0].decode()}")
    libraries = [path for path in files if ".so" in path.suffixes]
    expected = [f"{metadata.id}.abi3.so"] if native else []
    if [path.name for path in libraries] != expected:
        wrong.append(f"libraries {[path.name for path in libraries]}, expected {expected}")
    if metadata.id not in (variant / "_ops.py").read_text():
        wrong.append(f"_ops.py does not name {metadata.id}")
    for library in libraries:
        wrong += check_library(library)
    return wrong


def check_library(library: Path) -> list[str]:
    """A library that any Python, C library and torch of the promised versions loads, wherever they are installed."""
    wrong = []
    python, glibc = ".".join(map(str, PYTHON_ABI)), f"manylinux_{'_'.join(map(str, GLIBC))}"
    try:
        file = ObjectFile(library)
        checks = {f"abi3 of {python}": file.check_python_abi(python), glibc: file.check_manylinux(glibc)}
    except ValueError as error:
        return [f"{library.name} is not a library: {error}"]
    wrong += [f"{library.name} breaks {what}: {violations}" for what, violations in checks.items() if violations]
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    foreign = [name for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic) if not LIBRARIES.fullmatch(name)]
    if foreign:
        wrong.append(f"{library.name} needs {', '.join(foreign)}")
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        wrong.append(f"{library.name} has a library path of its own")
    return wrong


def check(target: Path, spec: Spec, require: list[str] = (), allow_dirty: bool = False) -> list[str]:
    """Everything that is wrong with what `assemble` made, one line a problem."""
    branch = target / f"v{spec.general['version']}"
    variants = sorted((branch / "build").iterdir()) if (branch / "build").is_dir() else []
    names = [variant.name for variant in variants]
    wrong = [f"{name}: missing" for name in require if name not in names]
    if not variants:
        wrong.append(f"no variant in {branch / 'build'}")
    ids: dict[str, str] = {}
    for variant in variants:
        wrong += [f"{variant.name}: {problem}" for problem in check_variant(variant, spec, allow_dirty)]
        build_id = json.loads((variant / "metadata.json").read_text())["id"]
        if build_id in ids:
            wrong.append(f"{variant.name}: has the id of {ids[build_id]}, {build_id}")
        ids[build_id] = variant.name
    card = (target / "main" / "README.md").read_text()
    wrong += [f"README.md (the card) does not name {name}" for name in names if not card_names(card, name)]
    scripts = sorted((branch / "benchmarks").glob("benchmark*.py"))
    if not scripts:
        wrong.append("no benchmarks/benchmark*.py")
    for script in scripts:
        # Only these files are uploaded, so they cannot import anything else of benchmarks/.
        siblings = {path.stem for path in (spec.root / "benchmarks").glob("*.py")} - {path.stem for path in scripts}
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", script.read_text(), re.MULTILINE))
        wrong += [f"{script.name} imports {name}, which is not uploaded" for name in sorted(imported & siblings)]
    return wrong


def card_names(card: str, variant: str) -> bool:
    """Whether a row of the card's table is about the variant; `cu*` and `*-linux` there stand for any."""
    rows = re.findall(r"^\| `(torch[^`]*)`", card, re.MULTILINE)
    return any(re.fullmatch(re.escape(row).replace(r"\*", "[^-]+"), variant) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder of the variants (default: build/)")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "hub", help="default: dist/hub")
    parser.add_argument("--require", nargs="*", default=[], metavar="NAME", help="variants that must be there")
    parser.add_argument("--allow-dirty", action="store_true", help="let variants of uncommitted sources pass")
    args = parser.parse_args()
    spec = Spec(ROOT)
    branch = assemble(spec, args.build, args.output)
    for variant in sorted((branch / "build").iterdir()):
        files = [path for path in variant.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 2**20
        print(f"{branch.name}/build/{variant.name}: {len(files)} files, {size:.2f} MiB")
    print(f"{branch.name}/benchmarks: {', '.join(path.name for path in sorted((branch / 'benchmarks').iterdir()))}")
    problems = check(args.output, spec, args.require, args.allow_dirty)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(problems)} problems" if problems else f"{spec.general['hub']['repo-id']}: ready to upload")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
