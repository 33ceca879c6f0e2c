"""A hub on this machine: the part of huggingface.co's HTTP API that huggingface_hub asks for models with.

    GET /api/models/ORG/NAME[/revision/REV]        the commit and the names of the files
    GET /api/models/ORG/NAME/tree/COMMIT           the files with their sizes
    HEAD, GET /ORG/NAME/resolve/REV/FILE           a file; X-Repo-Commit, ETag, ranges

Files of more than `LFS` bytes are told as a hub tells of large ones: by their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS = 20_000


@dataclass
class Hub:
    """What it holds, and what it was asked for. `revisions`: branches and tags -> commit; `commits` -> folder."""

    repository: str
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)
    token: str = ""  # without it: 401, as for a private repository
    gated: bool = False
    broken: bool = False  # refuses every file (a 5xx is asked for again and again)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def publish(self, folder: Path, *revisions: str) -> str:
        """Makes a commit of a folder, which `main` and the revisions then name."""
        commit = hashlib.sha1("".join(sorted(etag(path) for path in files(folder))).encode()).hexdigest()
        self.commits[commit] = folder
        self.revisions |= dict.fromkeys(("main", *revisions), commit)
        return commit

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for."""
        return {line.split("/", 6)[-1] for line in self.asked if line.startswith("GET") and "/resolve/" in line}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def etag(path: Path) -> str:
    content = path.read_bytes()
    if len(content) > LFS:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it


def entry(name: str, path: Path) -> dict[str, object]:
    """A file in the listing of a tree."""
    found: dict[str, object] = {"type": "file", "path": name, "oid": etag(path)[:40], "size": path.stat().st_size}
    large = {"oid": etag(path), "size": path.stat().st_size, "pointerSize": 134}
    return found | ({"lfs": large} if len(etag(path)) > 40 else {})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        repository, api = self.hub.repository, path.startswith("/api/models/")
        rest = path.removeprefix("/api/models/" if api else "/")
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send(401, b"{}", {"X-Error-Message": "Invalid credentials"}, body=body)
        if not rest.startswith(repository):
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        what, _, more = rest.removeprefix(repository).strip("/").partition("/")
        revision, _, name = more.partition("/")
        commit = self.hub.revisions.get(revision or "main", revision)
        if commit not in self.hub.commits:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        folder = self.hub.commits[commit]
        if api:
            return self.send(200, json.dumps(self.listing(folder, commit, what)).encode(), {}, body=body)
        if self.hub.gated:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        if self.hub.broken:
            return self.send(400, b"{}", {}, body=body)
        file = folder / name
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body=body)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(file)}"', "Accept-Ranges": "bytes"}
        return self.send(200, file.read_bytes(), headers, body=body)

    def listing(self, folder: Path, commit: str, what: str) -> object:
        names = {path.relative_to(folder).as_posix(): path for path in files(folder)}
        if what == "tree":
            return [entry(name, path) for name, path in names.items()]
        siblings = [{"rfilename": name} for name in names]
        return {"id": self.hub.repository, "sha": commit, "siblings": siblings, "private": False, "tags": []}

    def send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        wanted = self.headers.get("Range", "")
        if status == 200 and wanted.startswith("bytes="):
            content = content[int(wanted.removeprefix("bytes=").split("-")[0]) :]
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, listening on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
