"""A small Hugging Face Hub on the loopback interface: list, resolve, create and commit, as huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        models: OWNER/NAME -> file name -> content. gated: names whose access is not granted. cut: names whose first
            answer for weights breaks off in the middle. asked: (method, path) of every request.
    """

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append((self.command, path))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            name, revision = match[1], match[2] or "main"
            if name not in self.hub.models:
                return self._answer(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", COMMIT):
                return self._answer(404, X_Error_Code="RevisionNotFound")
            files = [{"rfilename": file} for file in self.hub.models[name]]
            return self._json({"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            held = self.hub.models.get(match[1], {})
            return self._json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
                    for file, content in held.items()
                ]
            )
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name, file = match[1], match[2]
            if name in self.hub.gated:
                return self._answer(403, X_Error_Code="GatedRepo")
            if name not in self.hub.models:
                return self._answer(404, X_Error_Code="RepoNotFound")
            if file not in self.hub.models[name]:
                return self._answer(404, X_Error_Code="EntryNotFound")
            return self._file(name, self.hub.models[name][file])
        self._answer(404)

    do_HEAD = do_GET

    def _file(self, name: str, content: bytes) -> None:
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        if self.command == "GET" and name in self.hub.cut and len(content) > 4096:
            self.hub.cut.discard(name)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        extra = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._answer(206 if start else 200, content[start:], ETag=tag, Accept_Ranges="bytes", **extra)

    def do_POST(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization"):
            return self._answer(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.models.setdefault(name, {})
            return self._json({"url": f"{self.hub.address}/{name}", "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.hub.models[match[1]][value["path"]] = base64.b64decode(value["content"])
            return self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.address}/{match[1]}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        self._answer(404)


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty Hub until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
