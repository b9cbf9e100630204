"""Hosts on this machine for tests of stores behind a URL: a web server of one folder, and an FTP host that refuses."""

from __future__ import annotations

import functools
import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRET = "s3cr3t-Word"
"""Password in the URL of `refusing_ftp`."""


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's own handler knows no ranges. A connection ends with its request: a stopped server answers nobody."""

    ranges = True
    authorization: str | None = None
    asked: list[str]

    def log_message(self, *_: object) -> None:
        self.asked.append(f"{self.command} {self.path}")

    def _allowed(self) -> bool:
        if self.authorization in (None, self.headers.get("Authorization")):
            return True
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_HEAD(self) -> None:
        if self._allowed():
            super().do_HEAD()

    def do_GET(self) -> None:
        if not self._allowed():
            return
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range", "")
        if not (self.ranges and wanted.startswith("bytes=") and path.is_file()):
            super().do_GET()
            return
        content = path.read_bytes()
        first, last = wanted.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        part = content[start:stop]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


class _Server(http.server.ThreadingHTTPServer):
    # The usual backlog of 5 drops connections of parallel readers, which the kernel then retries after seconds.
    request_queue_size = 128
    daemon_threads = True


@contextmanager
def served(folder: Path, ranges: bool = True, authorization: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """URL of a folder while the block runs, and a list to which every request is added.

    Args:
        folder: Served, with everything below it.
        ranges: Whether parts of files are sent.
        authorization: Header without which nothing is sent.
    """
    asked: list[str] = []
    handler = type("Handler", (_Ranges,), {"ranges": ranges, "asked": asked, "authorization": authorization})
    server = _Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def refusing_ftp(greeting: bytes, reply: bytes) -> Iterator[str]:
    """A host that greets and gives one answer to whatever it is told."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                connection.sendall(greeting)
                if reply:
                    for _ in lines:
                        connection.sendall(reply)
                        break

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"ftp://me:{SECRET}@127.0.0.1:{server.getsockname()[1]}/caches"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
