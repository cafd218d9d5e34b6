"""A HuggingFace Hub on loopback: the part of its HTTP interface that huggingface_hub needs to list and download."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """What is on the server, and what was asked of it.

    Attributes:
      repositories: "OWNER/NAME" -> folder whose files it has.
      revisions: Names of the one commit.
      gated: Repositories that answer 403.
      forbidden: Repositories that answer 401, as to a token that is not valid.
      failing: Whether every answer is 503.
      downloaded: Paths of files that were sent, in order.
      endpoint: The server's address.
    """

    repositories: dict[str, pathlib.Path]
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    failing: bool = False
    downloaded: list[str] = dataclasses.field(default_factory=list)
    endpoint: str = ""


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves a hub on a free port of 127.0.0.1 while the context lasts."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if self.hub.failing:
            return self._send(503, b"busy", {}, with_body)
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], with_body)
        if len(parts) < 5 or parts[2] != "resolve":
            return self._send(404, b"", {}, with_body)
        return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)

    def _refused(self, repository: str, revision: str, with_body: bool) -> bool:
        code = None
        if repository not in self.hub.repositories:
            code = (401, "RepoNotFound")
        elif repository in self.hub.forbidden:
            code = (401, "InvalidCredentials")
        elif repository in self.hub.gated:
            code = (403, "GatedRepo")
        elif revision not in self.hub.revisions:
            code = (404, "RevisionNotFound")
        if code is not None:
            self._send(code[0], b"{}", {"X-Error-Code": code[1], "X-Error-Message": code[1]}, with_body)
        return code is not None

    def _api(self, repository: str, rest: list[str], with_body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        if self._refused(repository, revision, with_body):
            return
        folder = self.hub.repositories[repository]
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        answer: object = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        if rest[:1] == ["tree"]:
            answer = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": _oid(folder / name)}
                for name in names
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, with_body)

    def _file(self, repository: str, revision: str, name: str, with_body: bool) -> None:
        if self._refused(repository, revision, with_body):
            return None
        path = self.hub.repositories[repository] / name
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        if with_body:
            self.hub.downloaded.append(name)
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/octet-stream"}
        return self._send(200, path.read_bytes(), headers, with_body)

    def _send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _oid(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
