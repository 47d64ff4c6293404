"""Run `lesionsam label-studio`: load the model, guard the server, serve until interrupted."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse

from lesionsam.annotation.gate import is_loopback
from lesionsam.annotation.serve import listen
from lesionsam.errors import UserError
from lesionsam.inference.predictor import Predictor
from lesionsam.integrations.addresses import ImageSources
from lesionsam.integrations.label_studio import Backend, create_app
from lesionsam.utils.weights import find_weights, weights_sha256

USER, PASSWORD = "BASIC_AUTH_USER", "BASIC_AUTH_PASS"  # names, as Label Studio's own backends have them
MAX_BODY = 64 << 20  # bytes; a task may hold its image as a data URL


class Guard:
    """ASGI middleware: only this machine, or who knows the password; no browser; bounded requests.

    Args:
        login: (user, password) of HTTP basic authentication, or None. any_host: whether requests may name another host
            than this machine's loopback addresses.
    """

    def __init__(self, app: Any, *, login: tuple[str, str] | None, any_host: bool) -> None:
        self.app, self.login, self.any_host = app, login, any_host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # `serve` switches lifespan and websockets off
            return
        refusal = self._refusal(Request(scope))
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, problem = refusal
        headers = {"WWW-Authenticate": 'Basic realm="lesionsam"'} if status == 401 else None
        await JSONResponse({"error": problem}, status, headers)(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        headers = request.headers
        name = (request.url.hostname or "").lower()
        if not self.any_host and not is_loopback(name):  # a page whose name was pointed at 127.0.0.1
            return 421, "this server answers on this machine's own address only"
        if "origin" in headers:  # sent by browsers; Label Studio's server sends none
            return 403, "requests of web pages are refused"
        if self.login is not None and not hmac.compare_digest(_shown(request), ":".join(self.login).encode()):
            return 401, f"expected HTTP basic authentication, with {USER} and {PASSWORD} of this server"
        if request.method == "POST":
            length = headers.get("content-length", "")
            if not length.isdigit() or "transfer-encoding" in headers:
                return 411, "expected a request that states its length"
            if len(length) > 12 or int(length) > MAX_BODY:
                return 413, f"more than {MAX_BODY >> 20} MB sent"
        return None


def _shown(request: Request) -> bytes:
    """Return USER:PASSWORD of a request, empty where it shows none."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    try:
        return base64.b64decode(value, validate=True) if scheme.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return b""


def serve(
    model: Path,
    images: ImageSources,
    *,
    label: str = "lesion",
    threshold: float = 0.5,
    port: int = 9090,
    host: str = "127.0.0.1",
    device: torch.device | str = "cpu",
) -> None:
    """Serve Label Studio's calls until interrupted.

    Args:
        model: weights of a SAM. images: that may be read. label: see `Backend`. threshold: probability above which a
            pixel is lesion. host: address to listen on; others than loopback ask for a user and a password, from the
            environment or printed.
    Raises:
        UserError: weights, folders or a port that cannot be used.
    """
    for option, folder in (("--local-root", images.local_root), ("--upload-root", images.upload_root)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder")
    weights = find_weights(model)
    version = f"{weights.stem}-{weights_sha256(weights)[:12]}"
    backend = Backend(Predictor(weights, device, threshold=threshold), images, version, label)
    login = login_of(host)
    listener = listen(host, port)
    guard = Guard(create_app(backend), login=login, any_host=not is_loopback(host))
    config = uvicorn.Config(
        guard, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
    )
    number = listener.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{number}"
    print(f"{version}\nthe backend's address, for Label Studio's Settings, Model: {url}\nCtrl-C ends it", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print("closed")
    finally:
        listener.close()


def login_of(host: str) -> tuple[str, str] | None:
    """Return user and password from the environment; invented and printed for other hosts than loopback."""
    user, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    if user and password:
        return user, password
    if is_loopback(host):
        return None
    login = "lesionsam", secrets.token_urlsafe(18)
    print(
        f"warning: {host} lets other machines ask, without encryption. They need basic authentication: user "
        f"{login[0]}, password {login[1]}; {USER} and {PASSWORD} choose others.",
        file=sys.stderr,
    )
    return login
