"""A small Hugging Face hub: real HTTP for the real client, with the answers that huggingface.co gives to trouble."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name: folders on disk, or an error code."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.trouble: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        """Every path that was asked for, in order."""
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append(path)
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name = "/".join(parts[:2])
        if name in self.trouble:
            status, code = self.trouble[name]
            return _send(handler, status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})
        folder = self.folders.get(name)
        if folder is None:
            return _send(handler, 401, {"error": "?"}, {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in {"main", "v1", SHA}:
            return _send(handler, 404, {"error": "?"}, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/"):
            return _send(handler, 200, _listing(name, folder, parts))
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return _send(handler, 404, {"error": "?"}, {"X-Error-Code": "EntryNotFound"})
        return _send_file(handler, file)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub on a port of its own."""
    ours = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            ours.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    ours.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield ours
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _listing(name: str, folder: Path, parts: list[str]) -> Any:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [
        {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _etag(f)} for f in files
    ]
    if len(parts) > 2 and parts[2] == "tree":
        return rows
    return {
        "id": name,
        "modelId": name,
        "sha": SHA,
        "private": False,
        "tags": [],
        "downloads": 0,
        "siblings": [{"rfilename": row["path"], "size": row["size"], "blobId": row["oid"]} for row in rows],
    }


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _send(handler: BaseHTTPRequestHandler, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
    body = json.dumps(document).encode()
    handler.send_response(status)
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _send_file(handler: BaseHTTPRequestHandler, file: Path) -> None:
    body = file.read_bytes()
    status, size, wanted = 200, len(body), handler.headers.get("Range")
    start, end = 0, size - 1
    if wanted:
        status = 206
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or end), end)
    handler.send_response(status)
    handler.send_header("ETag", f'"{_etag(file)}"')
    handler.send_header("X-Repo-Commit", SHA)
    handler.send_header("Accept-Ranges", "bytes")
    if wanted:
        handler.send_header("Content-Range", f"bytes {start}-{end}/{size}")
    handler.send_header("Content-Length", str(end - start + 1))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[start : end + 1])
