"""Guard the page's server: Host, Origin, token, kinds and sizes of requests; security headers of every response.

A browser lets any page send requests to 127.0.0.1. So a request must name this server as its Host (a name that an
attacker's server resolves to 127.0.0.1 does not), and must come from a page of this server (Origin, Sec-Fetch-Site).
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

MAX_BODY = 1 << 20  # bytes
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",  # pictures of patients stay out of the browser's cache on disk
}


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware in front of the application.

    Args:
        host, port: where the server listens.
        token: what a browser must have shown once in the address; None: nothing (this machine alone can ask).
    """

    def __init__(self, app: Any, *, host: str, port: int, token: str | None) -> None:
        self.app, self.port, self.token = app, port, token
        self.cookie = f"lesionsam_{port}"  # cookies do not tell ports apart
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self.any_address = not is_loopback(host)
        if self.any_address:
            self.names.add(socket.gethostname().lower())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # `serve` switches lifespan and websockets off
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request, answer = Request(scope), self.app
        if (refusal := self._refusal(request)) is not None:
            answer = _problem(*refusal)
        elif self.token is not None and not _equal(request.cookies.get(self.cookie, ""), self.token):
            answer = self._admit(request, self.token)
        await answer(scope, receive, guarded)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        headers, method = request.headers, request.method
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 421, "this page answers under its own address only"
        if any(origin != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
            return 403, "requests from other pages are refused"
        if method not in ("GET", "HEAD", "PUT", "POST"):
            return 405, "expected GET, PUT or POST"
        navigates = (
            method == "GET" and request.scope["path"] == "/" and headers.getlist("sec-fetch-mode") == ["navigate"]
        )
        if any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")) and not navigates:
            return 403, "requests from other pages are refused"
        if method in ("PUT", "POST"):
            kinds = [kind.split(";")[0].strip().lower() for kind in headers.getlist("content-type")]
            if kinds != ["application/json"]:
                return 415, "expected application/json; nothing else is taken, files neither"
            lengths = headers.getlist("content-length")  # the server reads no more than it states
            if len(lengths) != 1 or not lengths[0].isdigit() or "transfer-encoding" in headers:
                return 411, "expected a request that states its length"
            if len(lengths[0]) > 12 or int(lengths[0]) > MAX_BODY:
                return 413, f"more than {MAX_BODY >> 20} MB sent; that is no set of boxes"
        return None

    def _is_ours(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if not port.isdigit():
            name, port = host, "80"
        name = name.lower().removeprefix("[").removesuffix("]")
        if port != str(self.port):
            return False
        if name in self.names or not self.any_address:
            return name in self.names
        try:
            ipaddress.ip_address(name)  # an address is no name that somebody else could point here
        except ValueError:
            return False
        return True

    def _admit(self, request: Request, token: str) -> Response:
        """Exchange the token in the address for a cookie, so that it does not stay in the address bar."""
        if request.scope["path"] != "/" or not _equal(request.query_params.get("token", ""), token):
            return _problem(401, "open the page with the address that `lesionsam annotate` printed; it ends in a token")
        response = RedirectResponse("/", 303)
        response.set_cookie(self.cookie, token, httponly=True, samesite="strict")
        return response


def _equal(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode(), token.encode())


def _problem(status: int, problem: str) -> Response:
    return JSONResponse({"problem": problem}, status)
