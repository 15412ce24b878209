"""A stand-in for the Hugging Face Hub: serves local folders as repositories, on this machine only.

It speaks as much of the Hub's HTTP API as `huggingface_hub` needs to describe, list and download a repository.
Differences to the Hub: a file that changes changes the commit, and the old commit is gone; no file is on Xet storage; a
download always begins at the first byte (huggingface_hub resumes it behind whole chunks of 10 MiB only).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

LFS_SUFFIXES = (".arrow", ".bin", ".npy", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
REPOSITORY = r"(?P<owner>[^/]+)/(?P<name>[^/]+)"
ROUTES = {  # the method of Handler that answers -> the paths it answers for
    "describe": rf"/api/(?P<kind>dataset|model)s/{REPOSITORY}(/revision/(?P<revision>.+))?",
    "resolve": rf"/((?P<kind>dataset)s/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    "download": rf"/cdn/(?P<kind>dataset|model)s/{REPOSITORY}/(?P<sha>[0-9a-f]{{64}})/(?P<path>.+)",
}


class Request(NamedTuple):
    """A request as the log keeps it; `path` is decoded and without the query."""

    method: str
    path: str


@dataclass
class Fault:
    """What goes wrong with the next `times` requests (None: all) whose path fits `pattern` (`fnmatch`).

    Kinds: "status", `value` is answered instead; "delay", nothing comes for `value` seconds; "stall", so in the middle
    of a body; "cut", no more than `value` bytes of it come; "flip", the byte in its middle is inverted: its length
    fits, the checksum does not. A large file has two paths: ".../resolve/..." sends on, "/cdn/..." has the bytes.
    """

    kind: str
    pattern: str
    value: float = 0
    times: int | None = 1


class Faults(list[Fault]):
    """What goes wrong, in the order in which it was said."""

    def status(self, pattern: str, status: int, times: int | None = 1) -> None:
        self.append(Fault("status", pattern, status, times))

    def delay(self, pattern: str, seconds: float, times: int | None = 1) -> None:
        self.append(Fault("delay", pattern, seconds, times))

    def stall(self, pattern: str, seconds: float, times: int | None = 1) -> None:
        self.append(Fault("stall", pattern, seconds, times))

    def cut(self, pattern: str, after: int, times: int | None = 1) -> None:
        self.append(Fault("cut", pattern, after, times))

    def flip(self, pattern: str, times: int | None = 1) -> None:
        self.append(Fault("flip", pattern, 0, times))


Answer = tuple[int, bytes, dict[str, str]]  # status, body and headers


class Refusal(Exception):
    """A request that the Hub refuses, by status and X-Error-Code, from which the client chooses the exception."""


def sha_of(path: str, content: bytes) -> str:
    """By which the Hub knows a file: a large one by its SHA-256, a small one by git's SHA-1."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """A folder served as owner/name. With a `token` it is gated: its files want that token, and access `granted`."""

    folder: Path
    name: str
    kind: str = "dataset"
    token: str | None = None
    tags: Sequence[str] = ()
    granted: bool = True

    def files(self) -> dict[str, bytes]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}

    @property
    def commit(self) -> str:
        listed = "".join(f"{path}\0{sha_of(path, content)}\n" for path, content in self.files().items())
        return hashlib.sha1(listed.encode()).hexdigest()

    def check_access(self, given: str | None, to_files: bool) -> None:
        """Anyone may read what describes a gated repository; a token that is not known is refused even there."""
        if self.token is not None and given not in (None, self.token):
            raise Refusal(401, "")
        if to_files and self.token is not None and given is None:
            raise Refusal(401, "GatedRepo")
        if to_files and not self.granted:
            raise Refusal(403, "GatedRepo")


class Handler(BaseHTTPRequestHandler):
    """Answers one request, and closes the connection (HTTP/1.0)."""

    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass  # HubStandIn.requests is the log

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(Request(self.command, path))  # before it is answered: a client that has it may look at once
        if delay := hub.fault("delay", path):
            hub.stopping.wait(delay.value)
        try:
            if fault := hub.fault("status", path):
                raise Refusal(int(fault.value), "")
            status, body, headers = self.answer(path)
        except Refusal as refusal:
            status, code = refusal.args
            body, headers = b"", {"X-Error-Code": code, "X-Error-Message": f"refused: {status} {code}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD" or not body:
            return
        content, middle = bytearray(body), len(body) // 2
        if cut := hub.fault("cut", path):
            self.wfile.write(content[: int(cut.value)])
            return
        if hub.fault("flip", path):
            content[middle] ^= 0xFF
        self.wfile.write(content[:middle])
        if stall := hub.fault("stall", path):
            hub.stopping.wait(stall.value)
        self.wfile.write(content[middle:])

    do_HEAD = do_GET

    def answer(self, path: str) -> Answer:
        for name, route in ROUTES.items():
            if match := re.fullmatch(route, path):
                return self.answer_for(name, {key: value for key, value in match.groupdict().items() if value})
        raise Refusal(404, "")

    def answer_for(self, name: str, parts: dict[str, str]) -> Answer:
        key = (parts.get("kind", "model"), f"{parts['owner']}/{parts['name']}")
        if key not in self.server.hub.repositories:  # it might be a private one, and the Hub would not tell
            raise Refusal(401, "RepoNotFound")
        its = self.server.hub.repositories[key]
        if name != "download":  # the address of which is secret enough, as it is on the Hub
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            its.check_access(token, to_files=name == "resolve")
            if parts.get("revision", "main") not in ("main", its.commit, *its.tags):
                raise Refusal(404, "RevisionNotFound")
        files = its.files()
        if name == "describe":
            return self.describe(its, files)
        path = parts["path"]
        sha = sha_of(path, files[path]) if path in files else ""
        if parts.get("sha", sha) != sha or not sha:
            raise Refusal(404, "EntryNotFound")
        headers = {"ETag": f'"{sha}"', "X-Repo-Commit": its.commit}
        if name == "download" or not path.endswith(LFS_SUFFIXES):
            return (200, files[path], headers)
        place = f"{self.server.hub.endpoint}/cdn/{its.kind}s/{its.name}/{sha}/{quote(path)}"
        linked = {"X-Linked-ETag": f'"{sha}"', "X-Linked-Size": str(len(files[path]))}
        return (302, b"", {"Location": place, **linked, **headers})

    def describe(self, its: Repository, files: dict[str, bytes]) -> Answer:
        siblings = []
        for path, content in files.items():
            sha, size = sha_of(path, content), len(content)
            lfs = {"lfs": {"sha256": sha, "size": size, "pointerSize": 134}} if path.endswith(LFS_SUFFIXES) else {}
            siblings.append({"rfilename": path, "size": size, "blobId": sha, **lfs})
        always = {"private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        own = {"id": its.name, "sha": its.commit, "gated": its.token is not None, "siblings": siblings}
        return (200, json.dumps({**own, **always}).encode(), {"Content-Type": "application/json"})


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    hub: HubStandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no news
            super().handle_error(request, client_address)


@dataclass
class HubStandIn:
    """The Hub with one repository, or more after `add`. Serves inside `with`, or from `start` to `stop`, and again."""

    folder: Path
    name: str
    port: int = 0
    kind: str = "dataset"
    requests: list[Request] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.repository = self.add(self.folder, self.name, self.kind)

    def add(self, folder: Path, name: str, kind: str = "dataset") -> Repository:
        """Serve one more repository."""
        self.repositories[kind, name] = Repository(Path(folder), name, kind)
        return self.repositories[kind, name]

    def fails(self, kind: str, pattern: str, value: float = 0, times: int | None = 1) -> None:
        self.faults.append(Fault(kind, pattern, value, times))

    def fault(self, kind: str, path: str) -> Fault | None:
        """The fault for a request, if any: it counts as used."""
        for fault in list(self.faults):
            if fault.kind == kind and fault.times != 0 and fnmatchcase(path, fault.pattern):
                fault.times = None if fault.times is None else fault.times - 1
                return fault
        return None

    @property
    def commit(self) -> str:
        return self.repository.commit

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: str | Path) -> dict[str, str]:
        """The environment for a process that takes this stand-in for the Hub; `home` is its HF_HOME."""
        foreign = re.compile(r"HF_.*|HUGGING.*|TRANSFORMERS_OFFLINE|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return {**kept, **hub, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def start(self) -> HubStandIn:
        self.stopping.clear()
        self._server = Server(("127.0.0.1", self.port), Handler)
        self._server.hub, self.port = self, self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()  # wakes the answers that wait
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()
