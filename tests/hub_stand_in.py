"""A stand-in for the Hugging Face Hub: serves local folders as repositories, on this machine only.

It speaks as much of the Hub's HTTP API as `huggingface_hub` and `datasets` need to describe, list and download a
repository, so that they run unchanged against it when HF_ENDPOINT is its address. In a test:

    with HubStandIn(folder, "owner/name") as hub:
        hub.faults.cut("*.parquet", after=1000)
        subprocess.run(command, env=hub.environment(home))
        assert [request.sent for request in hub.requests if "/cdn/" in request.path and request.sent] == [1000, size]

Differences to the Hub: a file that changes changes the commit, and the old commit is gone; no file is on Xet storage.
A resumed download asks for a range only behind whole chunks of huggingface_hub's `constants.DOWNLOAD_CHUNK_SIZE`
(10 MiB): a smaller file starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = (".arrow", ".bin", ".npy", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
BLOCK = 64 * 1024
SOME_DATE = "2024-01-01T00:00:00.000Z"
REPOSITORY = r"(?P<owner>[^/]+)/(?P<name>[^/]+)"
API = rf"/api/(?P<kind>dataset|model)s/{REPOSITORY}"
ROUTES = {  # the method of Handler that answers -> the paths it answers for (still percent-encoded)
    "describe": re.compile(rf"{API}(/revision/(?P<revision>[^/]+))?"),
    "resolve": re.compile(rf"/((?P<kind>dataset)s/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    "download": re.compile(rf"/cdn/(?P<kind>dataset|model)s/{REPOSITORY}/(?P<sha256>[0-9a-f]{{64}})/(?P<path>.+)"),
}


@dataclass
class Request:
    """A request as the log keeps it; `path` is decoded and without the query, `sent` counts bytes of the body."""

    method: str
    path: str
    status: int
    first: int  # the first byte asked for by a Range header, else 0
    sent: int = 0


@dataclass
class Answer:
    status: int
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    takes_ranges: bool = False


class Refusal(Exception):
    """A request that the Hub refuses; `code` is its X-Error-Code, from which the client chooses the exception."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.answer = as_json({"error": message}, status, {**named, "X-Error-Message": message, **(headers or {})})


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class StoredFile:
    path: str
    source: Path
    size: int
    sha256: str
    git_sha1: str

    @property
    def is_lfs(self) -> bool:
        return self.path.endswith(LFS_SUFFIXES)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_sha1

    def as_sibling(self) -> dict[str, Any]:
        """The file as the description of its repository shows it."""
        lfs = {"lfs": {"sha256": self.sha256, "size": self.size, "pointerSize": 134}} if self.is_lfs else {}
        return {"rfilename": self.path, "size": self.size, "blobId": self.git_sha1, **lfs}


@cache
def stored_file(path: str, source: Path, size: int, modified: int) -> StoredFile:
    """Hash a file; `modified` is there so that a changed file is hashed again."""
    sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with source.open("rb") as stream:
        while block := stream.read(BLOCK):
            sha256.update(block)
            git_sha1.update(block)
    return StoredFile(path, source, size, sha256.hexdigest(), git_sha1.hexdigest())


@dataclass
class Repository:
    """A folder served as owner/name. With a `token` it is gated: its files want that token, and access `granted`."""

    folder: Path
    name: str
    kind: str = "dataset"
    token: str | None = None
    tags: Sequence[str] = ()
    granted: bool = True

    def files(self) -> dict[str, StoredFile]:
        found = {}
        for source in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            path, status = source.relative_to(self.folder).as_posix(), source.stat()
            found[path] = stored_file(path, source, status.st_size, status.st_mtime_ns)
        return found

    def check_access(self, given: str | None, to_files: bool) -> None:
        """Anyone may read what describes a gated repository; a token that is not known is refused even there."""
        restricted = f"Access to {self.kind} {self.name} is restricted"
        if self.token is not None and given not in (None, self.token):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if to_files and self.token is not None and given is None:
            what = "You must have access to it and be authenticated to access it. Please log in."
            raise Refusal(401, "GatedRepo", f"{restricted}. {what}")
        if to_files and not self.granted:
            raise Refusal(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")


def commit_of(files: dict[str, StoredFile]) -> str:
    return hashlib.sha1("".join(f"{path}\0{file.sha256}\n" for path, file in files.items()).encode()).hexdigest()


@dataclass
class Fault:
    kind: str
    pattern: str
    times: int | None
    after: int = 0
    seconds: float = 0
    status: int = 0


class Faults:
    """What goes wrong, for the next `times` requests (None: for all) whose decoded path fits `pattern` (`fnmatch`).

    A large file has two paths: ".../resolve/..." sends the client on, and "/cdn/..." holds the bytes. A fault of a
    body is not used up by an answer that has no body, or too short a one.
    """

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def cut(self, pattern: str, after: int, times: int | None = 1) -> None:
        """Close the connection after this many bytes of a body."""
        self._faults.append(Fault("cut", pattern, times, after=after))

    def status(self, pattern: str, status: int, times: int | None = 1) -> None:
        """Answer with this status (429, 500, ...) instead."""
        self._faults.append(Fault("status", pattern, times, status=status))

    def delay(self, pattern: str, seconds: float, times: int | None = 1) -> None:
        """Wait before an answer, also before one without a body (HEAD); the request is in the log after that."""
        self._faults.append(Fault("delay", pattern, times, seconds=seconds))

    def stall(self, pattern: str, seconds: float, after: int = 0, times: int | None = 1) -> None:
        """Wait in the middle of a body, after this many bytes of it, and go on then."""
        self._faults.append(Fault("stall", pattern, times, after=after, seconds=seconds))

    def flip(self, pattern: str, times: int | None = 1) -> None:
        """Invert the byte in the middle of a file: the length fits, the checksum does not."""
        self._faults.append(Fault("flip", pattern, times))

    def clear(self) -> None:
        self._faults.clear()

    def take(self, kind: str, path: str, length: int = sys.maxsize) -> Fault | None:
        """The fault for this request, if any: it counts as used. `length` is that of the body."""
        with self._lock:
            for fault in list(self._faults):
                fits = fault.kind == kind and fnmatchcase(path, fault.pattern)
                if fits and fault.times != 0 and fault.after < length:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass  # HubStandIn.requests is the log

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.location, self.query = unquote(address.path), parse_qs(address.query)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        faults = self.server.hub.faults
        if delay := faults.take("delay", self.location):
            self.server.hub.stopping.wait(delay.seconds)
        if fault := faults.take("status", self.location):
            self.send(as_json({"error": f"Fault {fault.status}"}, fault.status))
            return
        try:
            self.send(self.answer(address.path))
        except Refusal as refusal:
            self.send(refusal.answer)

    do_HEAD = do_GET

    def answer(self, encoded_path: str) -> Answer:
        for name, route in ROUTES.items():
            if match := route.fullmatch(encoded_path):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return self.answer_for(name, parts)
        raise Refusal(404, "", "Sorry, we can't find the page you are looking for.")

    def answer_for(self, name: str, parts: dict[str, str]) -> Answer:
        key = (parts.get("kind", "model"), f"{parts['owner']}/{parts['name']}")
        self.repository = self.server.hub.repositories.get(key)
        if self.repository is None and self.token:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if self.repository is None:  # it might be a private one, and then the Hub would not tell
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        self.files = self.repository.files()
        self.commit = commit_of(self.files)
        if name == "download":  # the address is secret enough, as it is on the Hub
            return self.download(parts["path"], parts["sha256"])
        self.repository.check_access(self.token, to_files=name != "describe")
        revision = parts.get("revision", "main")
        if revision not in ("main", self.commit, *self.repository.tags):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return getattr(self, name)(parts.get("path", ""))

    def describe(self, _: str) -> Answer:
        full = "blobs" in self.query
        siblings = [file.as_sibling() if full else {"rfilename": file.path} for file in self.files.values()]
        name, gated = self.repository.name, "manual" if self.repository.token is not None else False
        always = {"private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        dates = {"lastModified": SOME_DATE, "createdAt": SOME_DATE}
        own = {"id": name, "author": name.split("/")[0], "sha": self.commit, "gated": gated, "siblings": siblings}
        return as_json({**own, **always, **dates})

    def resolve(self, path: str) -> Answer:
        file = self.files.get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": self.commit})
        if not file.is_lfs:
            return self.content(file)
        location = f"/cdn/{self.repository.kind}s/{self.repository.name}/{file.sha256}/{quote(path)}"
        headers = {"Location": self.server.hub.endpoint + location, **self.file_headers(file)}
        return Answer(302, f"Found. Redirecting to {location}".encode(), headers)

    def download(self, path: str, sha256: str) -> Answer:
        file = self.files.get(path)
        if file is None or file.sha256 != sha256:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        return self.content(file)

    def content(self, file: StoredFile) -> Answer:
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **self.file_headers(file)}
        return Answer(200, file.source, headers, takes_ranges=True)

    def file_headers(self, file: StoredFile) -> dict[str, str]:
        """On the redirect and behind it: a client that stays on the host reads them there only."""
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": self.commit}
        linked = {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        return {**headers, **linked} if file.is_lfs else headers

    def send(self, answer: Answer) -> None:
        size = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
        status, headers, first, last = answer.status, dict(answer.headers), 0, size
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span and answer.takes_ranges and self.command == "GET":
            first, last = read_span(*span.groups(), size)
            status = 206 if first < last else 416
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{size}" if first < last else f"bytes */{size}"
        request = Request(self.command, self.location, status, int(span[1] or 0) if span else 0)
        self.server.hub.requests.append(request)  # before it is answered: a client that has it all may look at once
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(max(last - first, 0))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(request, answer.body, first, last)

    def send_body(self, request: Request, body: bytes | Path, first: int, last: int) -> None:
        def fault(kind: str) -> Fault | None:
            return self.server.hub.faults.take(kind, self.location, length=last - first)

        flip, stall, cut = fault("flip"), fault("stall"), fault("cut")
        with body.open("rb") if isinstance(body, Path) else BytesIO(body) as stream:
            middle = stream.seek(0, os.SEEK_END) // 2 if flip else None
            end = first + cut.after if cut else last
            if stall:
                pause = min(first + stall.after, end)
                self.send_bytes(request, stream, first, pause, middle)
                self.server.hub.stopping.wait(stall.seconds)
                first = pause
            self.send_bytes(request, stream, first, end, middle)
        if cut:
            self.close_connection = True

    def send_bytes(self, request: Request, stream: Any, first: int, last: int, flipped: int | None) -> None:
        stream.seek(first)
        while first < last and (block := bytearray(stream.read(min(BLOCK, last - first)))):
            if flipped is not None and first <= flipped < first + len(block):
                block[flipped - first] ^= 0xFF
            request.sent += len(block)
            self.wfile.write(block)
            first += len(block)


def read_span(start: str, end: str, size: int) -> tuple[int, int]:
    """The first byte and the one behind the last of "bytes=start-end"; "bytes=-end" means the last `end` bytes."""
    if not start:
        return max(size - int(end or 0), 0), size
    return int(start), min(int(end) + 1, size) if end else size


class Server(ThreadingHTTPServer):
    """Keeps account of the open connections: to go away, the stand-in has to hang up on clients that keep them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, hub: HubStandIn) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no news
            super().handle_error(request, client_address)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)


class HubStandIn:
    """The Hub with one repository, or more after `add`. Serves inside `with`, or from `start` to `stop`.

    `requests` is the log and `faults` what goes wrong; both may be changed while it serves. A started stand-in that
    was stopped comes back at the same address.
    """

    def __init__(self, folder: str | Path, repository: str, *, port: int = 0, **options: Any) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.repository = self.add(folder, repository, **options)
        self.port = port
        self.requests: list[Request] = []
        self.faults = Faults()
        self.stopping = threading.Event()

    def add(self, folder: str | Path, repository: str, **options: Any) -> Repository:
        """Serve one more repository; the options are the fields of `Repository`: kind, token, tags, granted."""
        added = Repository(Path(folder), repository, **options)
        self.repositories[added.kind, added.name] = added
        return added

    @property
    def commit(self) -> str:
        return commit_of(self.repository.files())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment for a subprocess that takes this stand-in for the Hub; `home` is its HF_HOME."""
        foreign = re.compile(r"HF_.*|HUGGING.*|TRANSFORMERS_OFFLINE|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **hub, **switches, **({} if token is None else {"HF_TOKEN": token})}

    def start(self) -> HubStandIn:
        self.stopping.clear()
        self._server = Server(self.port, self)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()  # wakes the answers that wait
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.hang_up()

    def __enter__(self) -> HubStandIn:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
