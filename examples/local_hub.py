#!/usr/bin/env python3
"""A Hub on this machine: serves a release to the `kernels` client, without the internet.

    python tools/release.py                               make dist/hub, what a release uploads
    python examples/local_hub.py                          serve it until Ctrl-C; says what to export
    python examples/local_hub.py -- COMMAND ...           run COMMAND against it, with an empty cache

For instance, what a new user types, from the build of this checkout:

    python examples/local_hub.py -- python -c "
    from kernels import get_kernel
    flash_kda = get_kernel('moonshot/flash-kda', version=1, trust_remote_code=True)
    print(flash_kda.environment_report())"

It speaks the part of the Hub's API that the `kernels` client uses for repositories of type `kernel` (and, for
`kernels benchmark`, `model`): refs, revision, tree, resolve with ETag, organization overview. A branch of the repository is a
folder of dist/hub; its commit is a digest of its contents.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "moonshot/flash-kda"
# What would lead the client elsewhere. The last two make kernels 0.17.2 send a header that its HTTP library refuses.
FOREIGN = (
    "LOCAL_KERNELS",
    "KERNELS_CACHE",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
)


@dataclass(frozen=True)
class Branch:
    commit: str  # 40 hexadecimal digits
    files: dict[str, bytes]


class LocalHub(http.server.ThreadingHTTPServer):
    """One repository, served from a folder with one folder a branch. Use it as a context manager.

    Args:
        folder: as tools/release.py makes it: `main/`, `v1/`, ...
        repo_id: the name to serve it under.
        trusted: whether the Hub lists the publisher as trusted.
    """

    daemon_threads = True

    def __init__(self, folder: Path, repo_id: str = REPO_ID, trusted: bool = False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo_id, self.trusted = repo_id, trusted
        self.branches = {branch.name: read_branch(branch) for branch in sorted(folder.iterdir()) if branch.is_dir()}
        self.requests: list[str] = []  # "METHOD /path" of each, in order

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()
        self.server_close()

    def find(self, revision: str) -> Branch | None:
        """A branch by its name or its commit."""
        named = self.branches.get(urllib.parse.unquote(revision).removeprefix("refs/heads/"))
        return named or next((b for b in self.branches.values() if b.commit == revision), None)

    def body(self, path: str, content: bytes) -> bytes:
        """What is sent of a file; tests override it to damage downloads."""
        return content


def read_branch(folder: Path) -> Branch:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    commit = hashlib.sha1()
    for path, content in files.items():
        commit.update(f"{path}\0{len(content)}\0".encode() + content)
    return Branch(commit.hexdigest(), files)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        url = urllib.parse.urlsplit(self.path)
        path, query = url.path, dict(urllib.parse.parse_qsl(url.query))  # a slash within a revision is quoted: %2F
        publisher, repo = self.server.repo_id.split("/")[0], re.escape(self.server.repo_id)
        if path == f"/api/organizations/{publisher}/overview":
            trust = {"trustedKernelPublisher": self.server.trusted}
            return self.send_json({"name": publisher, "fullname": publisher, "avatarUrl": ""} | trust)
        if re.fullmatch(rf"/api/(kernels|models)/{repo}/refs", path):
            return self.send_json({"branches": self.refs(), "tags": [], "converts": []})
        if found := re.fullmatch(rf"/api/(kernels|models)/{repo}/revision/([^/]+)", path):
            return self.send_revision(found[2])
        if found := re.fullmatch(rf"/api/(kernels|models)/{repo}/tree/([^/]+)(?:/(.*))?", path):
            return self.send_tree(
                found[2], urllib.parse.unquote(found[3] or ""), query.get("recursive") in ("true", "True", "1")
            )
        if found := re.fullmatch(rf"/(?:kernels/)?{repo}/resolve/([^/]+)/(.*)", path):
            return self.send_file(found[1], urllib.parse.unquote(found[2]))
        self.send_missing("RepoNotFound")

    do_HEAD = do_GET

    def refs(self) -> list[dict]:
        branches = self.server.branches.items()
        return [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": b.commit} for name, b in branches]

    def send_revision(self, revision: str):
        if (branch := self.server.find(revision)) is None:
            return self.send_missing("RevisionNotFound")
        facts = {"id": self.server.repo_id, "sha": branch.commit, "private": False, "gated": False, "disabled": False}
        self.send_json(facts | {"tags": [], "siblings": [{"rfilename": path} for path in branch.files]})

    def send_tree(self, revision: str, folder: str, recursive: bool):
        if (branch := self.server.find(revision)) is None:
            return self.send_missing("RevisionNotFound")
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, content in branch.files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                if recursive or depth == 1:
                    above = prefix + "/".join(parts[:depth])
                    entries[above] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": above}
            if recursive or len(parts) == 1:
                oid = hashlib.sha1(content).hexdigest()
                entries[path] = {"type": "file", "oid": oid, "size": len(content), "path": path}
        return self.send_json(list(entries.values())) if entries else self.send_missing("EntryNotFound")

    def send_file(self, revision: str, path: str):
        if (branch := self.server.find(revision)) is None:
            return self.send_missing("RevisionNotFound")
        if path not in branch.files:
            return self.send_missing("EntryNotFound")
        content = branch.files[path]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", branch.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            sent = self.server.body(path, content)
            self.wfile.write(sent)
            self.close_connection = len(sent) != len(content)

    def send_json(self, data):
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def send_missing(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def client_environment(hub: LocalHub, home: Path) -> dict[str, str]:
    """The environment of a process that knows this Hub and no other, with its cache in `home`."""
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return env | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dist" / "hub", help="what to serve (default: dist/hub)")
    parser.add_argument("--trusted", action="store_true", help="serve as a publisher that the Hub lists as trusted")
    parser.add_argument("command", nargs="*", help="run this, instead of serving until Ctrl-C")
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f"Nothing to serve at {args.folder}. Make it:\n    {sys.executable} {ROOT / 'tools' / 'release.py'}")
    with LocalHub(args.folder, trusted=args.trusted) as hub, tempfile.TemporaryDirectory() as home:
        if args.command:
            return subprocess.run(args.command, env=client_environment(hub, Path(home)), check=False).returncode
        print(f"export HF_ENDPOINT={hub.endpoint} HF_HOME={home}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
