"""Who may speak to the page's server: Host, Origin, token, kinds and sizes of requests; headers of every answer.

A browser lets any page send requests to 127.0.0.1. So a request must name this server as its Host (a name that an
attacker's server resolves to 127.0.0.1 does not), and must come from a page of this server (Origin, Sec-Fetch-Site).
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

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
    """Whether only this machine can reach a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware in front of the application.

    Args:
        app: what answers. host, port: where the server listens.
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
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message["headers"] if name.decode() not in HEADERS]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(guarded, *refusal)
            return
        if self.token is not None and not self._has_cookie(headers):
            await self._admit(scope, guarded)
            return
        if scope["method"] in ("PUT", "POST"):
            body = await _body(receive)
            if body is None:
                await _answer(guarded, 413, f"more than {MAX_BODY >> 20} MB sent; that is no set of boxes")
                return
            receive = _replay(body)
        await self.app(scope, receive, guarded)

    def _refusal(self, scope: Any, headers: dict[str, list[str]]) -> tuple[int, str] | None:
        hosts = headers.get("host", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 421, "this page answers under its own address only"
        if any(origin != f"http://{hosts[0]}" for origin in headers.get("origin", [])):
            return 403, "requests from other pages are refused"
        method, path = scope["method"], scope["path"]
        if method not in ("GET", "HEAD", "PUT", "POST"):
            return 405, "expected GET, PUT or POST"
        navigates = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == ["navigate"]
        if any(site not in ("same-origin", "none") for site in headers.get("sec-fetch-site", [])) and not navigates:
            return 403, "requests from other pages are refused"
        if method in ("PUT", "POST"):
            if [kind.split(";")[0].strip().lower() for kind in headers.get("content-type", [])] != ["application/json"]:
                return 415, "expected application/json; nothing else is taken, files neither"
            lengths = headers.get("content-length", [])
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
        if name in self.names:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name)  # an address is no name that somebody else could point here
        except ValueError:
            return False
        return True

    def _has_cookie(self, headers: dict[str, list[str]]) -> bool:
        try:
            cookies = SimpleCookie("; ".join(headers.get("cookie", [])))
        except CookieError:
            return False
        shown = cookies[self.cookie].value if self.cookie in cookies else ""
        return hmac.compare_digest(shown.encode(), (self.token or "").encode())

    async def _admit(self, scope: Any, send: Any) -> None:
        """Trade the token in the address for a cookie, so that it does not stay in the address."""
        shown = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] != "/" or not hmac.compare_digest(shown.encode(), (self.token or "").encode()):
            await _answer(
                send, 401, "open the page with the address that `lesionsam annotate` printed; it ends in a token"
            )
            return
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        await send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")],
            }
        )
        await send({"type": "http.response.body", "body": b""})


async def _body(receive: Any) -> bytes | None:
    """The whole body, or None where it is larger than allowed."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes) -> Any:
    sent = False

    async def receive() -> Any:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _answer(send: Any, status: int, problem: str) -> None:
    body = json.dumps({"problem": problem}).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})
