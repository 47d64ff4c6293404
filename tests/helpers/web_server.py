"""A real HTTP server on this machine that serves files well or badly, as a test asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What is served and how.

    Attributes:
        files: path -> bytes. etag: validator sent with every file; "" sends none. ranges: honour Range.
        drop_after: bytes sent of each answer's body before the line is cut; None = all.
        drops: how many answers are cut so before the rest go well. status_after_drop: what a path answers once it was
        cut; 0 = goes on as before. statuses: path -> status sent instead. content_range: sent for the right one.
        redirects: path -> address. headers: sent with every file. length: send Content-Length.
        stall_at: byte of the file at which one answer stops: `stalled` is set, and when it is cleared the line is cut.
        asked: (method, path, Range or "") of each request, in order. sent: body bytes of all answers.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"v1"'
    ranges: bool = True
    drop_after: int | None = None
    drops: int = 10**9
    status_after_drop: int = 0
    content_range: str = ""
    statuses: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    length: bool = True
    slice_bytes: int = 1 << 16
    delay: float = 0.0
    stall_at: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""


def _handler(site: Site, wait: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            wanted = self.headers.get("Range", "")
            site.asked.append((self.command, self.path, wanted))
            if self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.end_headers()
                return
            if self.path in site.statuses or self.path not in site.files:
                self.send_error(site.statuses.get(self.path, 404))
                return
            data, start, status = site.files[self.path], 0, 200
            end = len(data)
            if site.ranges and wanted and self.headers.get("If-Range", site.etag) == site.etag:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end, status = int(first), min(int(last) + 1 if last else end, end), 206
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", site.content_range or f"bytes {start}-{end - 1}/{len(data)}")
            if site.length:
                self.send_header("Content-Length", str(end - start))
            if site.etag:
                self.send_header("ETag", site.etag)
            for name, value in site.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self._send(data[start:end], start)

        def _send(self, data: bytes, start: int) -> None:
            cut = site.drop_after is not None and site.drops > 0 and len(data) > site.drop_after
            if cut:
                site.drops -= 1
                data = data[: site.drop_after]
                if site.status_after_drop:
                    site.statuses[self.path] = site.status_after_drop
            try:
                if site.stall_at is not None and start <= site.stall_at:
                    data, site.stall_at = data[: site.stall_at - start], None
                    self.wfile.write(data)
                    site.sent += len(data)
                    site.stalled.set()
                    while site.stalled.is_set():
                        wait.wait(0.01)
                    data = b""
                for i in range(0, len(data), site.slice_bytes):
                    self.wfile.write(data[i : i + site.slice_bytes])
                    site.sent += len(data[i : i + site.slice_bytes])
                    if site.delay:
                        wait.wait(site.delay)
            except OSError:  # the client was killed
                pass
            self.close_connection = True

    return Handler


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """Serve on a free port of 127.0.0.1; `site.url` is its address."""
    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site, stop))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
