"""Every link, command and code block of README, CARD and docs is executed or checked.

Python blocks run as they stand, the blocks of a file one after the other, in a process that knows a Hub on this machine and no
other (examples/local_hub.py). An HTML comment before a block says where it runs instead: `run with: wheel` (`flash_kda`
importable), `run with: fla` (FLA as well), `check only: why` (compiled, not run). Commands are taken apart: programs, files and
options must exist; those of the Hub's clients are run.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPO_ID, ROOT
from packaging.requirements import Requirement

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]
import release
from build import Spec, tomllib
from local_hub import LocalHub, client_environment

FILES = [
    "README.md",
    "CARD.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
# Read by a person on 2026-11-21; there is no network here to ask.
URLS = {"https://arxiv.org/abs/2510.26692"}
FLA = ROOT / ".fla"


@dataclass(frozen=True)
class Block:
    file: str
    line: int
    language: str
    note: str  # of the comment before it, or ""
    text: str


@functools.cache
def text_of(file: str) -> str:
    return release.render_card(Spec(ROOT)) if file == "CARD.md" else (ROOT / file).read_text()


@functools.cache
def blocks_of(file: str) -> list[Block]:
    blocks = []
    fence = re.compile(r"(?:^ *<!-- ([^\n]*) -->\n)?^( *)```(\w*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
    for found in fence.finditer(text_of(file)):
        note, indent, language, text = found.groups(default="")
        line = text_of(file)[: found.start(4)].count("\n") + 1
        blocks.append(Block(file, line, language, note, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)))
    return blocks


def prose_of(file: str) -> str:
    """Without the code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text_of(file), flags=re.MULTILINE | re.DOTALL)


def anchors(file: Path) -> set[str]:
    """Of headings, as GitHub and the Hub make them."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", FILES)
def test_links(file):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(file)):
        if target.startswith("http"):
            if target not in URLS:
                wrong.append(f"{target}: not in URLS")
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / file).parent / path if path else ROOT / file
        if file == "CARD.md":
            wrong.append(f"{target}: the card stands alone on the Hub")
        elif not linked.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(linked):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


@pytest.mark.parametrize("file", FILES)
def test_files_that_the_text_names_exist(file):
    folders = r"(?:tools|tests|examples|benchmarks|docs|torch-ext|kda_cutlass|\.github|\.ci)"
    named = re.findall(rf"`({folders}/[\w./-]+)`", prose_of(file))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("file", FILES)
def test_every_block_has_a_language_that_is_checked(file):
    assert {block.language for block in blocks_of(file)} <= {"python", "bash", "toml", "text"}
    for block in blocks_of(file):
        assert re.fullmatch(r"(run with: (wheel|fla)|check only: .+)?", block.note), block
        if block.language == "toml":
            tomllib.loads(block.text)


# --- Python

PRELUDE = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
import transformers
import transformers.utils.kernel_config
from tiny_models import tiny_model

# No 48B here: the name of a checkpoint stands for a tiny one of the same family. And transformers offers KernelConfig
# on GPUs only, so a CPU is declared one.
if not torch.cuda.is_available():
    transformers.utils.kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")
tiny_model("kimi_linear", head_dim=128).save_pretrained("checkpoint")
load = transformers.AutoModelForCausalLM.from_pretrained
def from_pretrained(name, **options):
    assert name == "moonshotai/Kimi-Linear-48B-A3B-Instruct"
    return load("checkpoint", **options)
transformers.AutoModelForCausalLM.from_pretrained = from_pretrained
"""

RUN = """
import json, sys
names = {{}}
for where, text in json.loads(sys.stdin.read()):
    exec(compile(text, where, "exec"), names)
{epilogue}
"""

# What must be true after the last block of a file
EPILOGUES = {
    "README.md": """
assert names["o"].shape == (4, 1, 8, 128) and names["state"].dtype == names["torch"].float32
assert names["flash_kda"].replaced_functions(names["model"])["chunk_kda"].endswith("chunk_kimi_delta_attention")
""",
    "CARD.md": """
assert names["final_state"].shape == (1, 8, 128, 128)
assert names["flash_kda"].replaced_functions(names["model"])["chunk_kda"].endswith("chunk_kimi_delta_attention")
""",
    "docs/serving.md": """
assert names["out"].isfinite().all() and names["state"][[0, 1, 3]].any() and not names["state"][2].any()
""",
}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> Path:
    build, target = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("release")
    if torch.version.cuda is None:
        command = [sys.executable, ROOT / "tools" / "build.py", "--backend", "cpu", "--output", build]
        subprocess.run(command, check=True, capture_output=True)
    else:
        shutil.copytree(ROOT / "build", build, dirs_exist_ok=True)
    release.assemble(Spec(ROOT), build, target)
    return target


def run_blocks(blocks: list[Block], env: dict[str, str], cwd: Path, prelude: str = "", epilogue: str = "") -> None:
    sources = json.dumps([(f"{block.file}:{block.line}", block.text) for block in blocks])
    command = [sys.executable, "-W", "ignore", "-c", prelude + RUN.format(epilogue=epilogue)]
    result = subprocess.run(command, input=sources, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def python_blocks(file: str, note: str) -> list[Block]:
    return [block for block in blocks_of(file) if block.language == "python" and block.note.startswith(note)]


@pytest.mark.parametrize("file", [file for file in FILES if any(not b.note for b in python_blocks(file, ""))])
def test_python_blocks(file, hub_folder, tmp_path):
    blocks = [block for block in python_blocks(file, "") if not block.note]
    models = any("from_pretrained" in block.text for block in blocks)
    if models and torch.version.cuda:
        pytest.skip("on a CUDA torch, use_kernels=True asks the real Hub for transformers' other kernels")
    prelude = PRELUDE.format(tests=str(ROOT / "tests")) if models else ""
    with LocalHub(hub_folder) as hub:
        env = client_environment(hub, tmp_path)
        run_blocks(blocks, env, tmp_path, prelude, EPILOGUES.get(file, ""))


@pytest.mark.parametrize("note", ["run with: wheel", "run with: fla"])
def test_python_blocks_with_the_wheel(kernel, tmp_path, note):
    blocks = [block for file in FILES for block in python_blocks(file, note)]
    assert blocks
    if note.endswith("fla") and not FLA.is_dir():
        pytest.skip("no FLA in .fla")
    shutil.copytree(Path(kernel.__file__).parent, tmp_path / "flash_kda", ignore=shutil.ignore_patterns("__pycache__"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(FLA)])}
    run_blocks(blocks, env, tmp_path)


def test_python_blocks_that_only_compile():
    for file in FILES:
        for block in python_blocks(file, "check only"):
            compile(block.text, f"{file}:{block.line}", "exec")


# --- commands


def commands_of(file: str) -> list[list[str]]:
    """Of all bash blocks, split at && and line ends, comments and assignments before a command left out."""
    commands = []
    for block in blocks_of(file):
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                commands.append(words[:end])
                words = words[end + 1 :]
    return commands


@functools.cache
def help_of(*command: str) -> str:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, env=env).stdout


def assert_options(words: list[str], *command: str) -> None:
    for word in words:
        if word.startswith("--") and word != "--":
            assert re.search(rf"{word.split('=')[0]}\b", help_of(*command)), f"{' '.join(command)} has no {word}"


INSTALLED_BY_READERS = {"kernels", "torch", "fla-core", "pre-commit", "."}


def check_pip(words: list[str]) -> None:
    """Packages have names that we know, and the versions that .ci/run and requirements-dev.txt pin."""
    assert words[0] == "install"
    known = text_of(".ci/run") + text_of("requirements-dev.txt")
    values = iter(words[1:])
    for word in values:
        if word in ("-r", "--target"):
            value = next(values)
            assert word == "--target" or (ROOT / value).is_file()
        elif re.search("[<>]", word):  # a range, which the pinned version must be in
            requirement = Requirement(word)
            pin = re.search(rf"^{requirement.name}==(\S+)", known, re.MULTILINE)
            assert pin and requirement.specifier.contains(pin[1]), word
        elif not word.startswith("-"):
            assert word in INSTALLED_BY_READERS or re.search(rf"(^|\s){re.escape(word)}(==|\s|$)", known), word


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        script = ROOT / words[0]
        assert script.is_file(), words
        own = words[: words.index("--")] if "--" in words else words
        assert_options(own, sys.executable, str(script))
        if "--" in words:
            check_command(words[words.index("--") + 1 :])
        return
    module, *rest = words[1:]
    if module == "pytest":
        assert [w for w in rest if not w.startswith("-") and not (ROOT / w).is_file()] == []
    elif module == "jupyter":
        assert_options(rest, sys.executable, "-m", "jupyter", rest[0])
        assert (ROOT / rest[-1]).is_file()
    else:
        assert module in ("venv", "flash_kda", "sglang.launch_server"), module


def check_command(words: list[str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        check_python(words[1:])
    elif program == "pip":
        check_pip(words[1:])
    elif program == "kernels":
        assert_options(words[2:], "kernels", words[1])
    elif program == "hf":
        assert_options(words[2:], "hf", words[1])
    elif program == "ruff":
        assert_options(words[2:], sys.executable, "-m", "ruff", words[1])
    elif program == "export":
        assert re.fullmatch(r"LOCAL_KERNELS=moonshot/flash-kda=\$PWD/build", words[1])
    else:
        assert words == ["pre-commit", "install"], words


@pytest.mark.parametrize("file", [file for file in FILES if commands_of(file)])
def test_commands(file):
    for words in commands_of(file):
        check_command(words)


def test_inline_commands():
    """Those in running text, where they begin with a program that we know how to check."""
    checked = 0
    for file in FILES:
        for command in re.findall(r"`((?:python3?|pip|kernels|hf|\.venv/bin/\w+) [^`]+)`", prose_of(file)):
            words = shlex.split(command, comments=True)
            if words[0] == "pip" and words[1:2] == ["install"] and "kernels[benchmark]" in words:
                continue  # an extra, whose package is there
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                check_command(words[:end])
                words = words[end + 1 :]
            checked += 1
    assert checked > 5


def test_commands_of_the_hubs_clients_run(hub_folder, tmp_path):
    """`kernels` and `hf` as the docs call them, but for those of a project or a GPU."""
    wanted = [w for file in FILES for w in commands_of(file) if w[0] in ("kernels", "hf")]
    assert ["hf", "download", REPO_ID, "--repo-type", "kernel", "--revision", "v1"] in wanted
    with LocalHub(hub_folder) as hub:
        env = client_environment(hub, tmp_path)
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        for words in wanted:
            result = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
            assert result.returncode == 0, (words, result.stderr[-2000:])


# --- that the checks find something


@pytest.mark.parametrize(
    "words",
    [
        ["python", "tools/nothing.py"],
        ["python", "tools/build.py", "--nothing"],
        ["python", "-m", "nothing"],
        ["python", "-m", "pytest", "tests/test_nothing.py"],
        ["python", "examples/local_hub.py", "--", "kernels", "info", "--nothing"],
        ["pip", "install", "flash-nothing"],
        ["pip", "install", "-r", "nothing.txt"],
        ["pip", "install", "fla-core==0.1"],
        ["pip", "install", "transformers>=5.23"],
        ["kernels", "info", "--nothing"],
        ["rm", "-rf", "/"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_found(words):
    with pytest.raises(AssertionError):
        check_command(words)
