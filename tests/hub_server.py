"""A small hub on this machine: repositories are folders, and every request is written down.

It speaks as much of the hub's protocol as huggingface_hub uses to list a repository and to fetch its files: the
revision, the tree, and files by HEAD, GET and ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


class Hub(ThreadingHTTPServer):
    """Serves `root/owner/name/...` at one commit, under the revisions main, v1 and the commit itself."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.root = root
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.breaks_off: str | None = None  # a file of which only the first half is sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def fetched(self) -> set[str]:
        """The files that were sent whole."""
        return self._sent(lambda part: part is None)

    @property
    def parts(self) -> set[str]:
        """The files of which a range was sent."""
        return self._sent(lambda part: part is not None)

    def _sent(self, counts: Callable[[str | None], bool]) -> set[str]:
        files = (
            re.search(r"/resolve/[^/]+/(.+)", path)
            for method, path, part in self.asked
            if method == "GET" and counts(part)
        )
        return {file[1] for file in files if file}


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.asked.append((self.command, path, self.headers["range"]))
        file = re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        name, revision = (file[1], file[2]) if file else (api[1], api[3] or "main") if api else ("", "")
        folder = self.server.root / name
        if not name or not folder.is_dir():
            self._send(404, b"", error="RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"", error="RevisionNotFound")
        elif file:
            self._file(folder / file[3])
        elif api and api[2] == "tree":
            self._send(200, json.dumps(_tree(folder)).encode())
        else:
            about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": one["path"]} for one in _tree(folder)]}
            self._send(200, json.dumps(about).encode())

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._send(404, b"", error="EntryNotFound")
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["range"] or "")
        if part is None:
            cut = len(content) // 2 if path.name == self.server.breaks_off else None
            return self._send(200, content, etag=etag, cut=cut)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        return self._send(206, content[first : last + 1], etag=etag, span=f"bytes {first}-{last}/{len(content)}")

    def _send(
        self, code: int, body: bytes, *, error: str = "", etag: str = "", span: str = "", cut: int | None = None
    ) -> None:
        self.send_response(code)
        own = {"X-Repo-Commit": COMMIT, "X-Error-Code": error, "ETag": etag, "Content-Range": span}
        for name, value in {**own, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _tree(folder: Path) -> list[dict]:
    return [
        {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": 40 * "0"}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """The hub, answering until the block's end."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
