"""Who may ask: the API key on every route but /health, and what a browser's other tabs may not do.

Decisions, all on the raw ASGI scope (a Host header that poisons `request.url` changes nothing here):

- With a key, everything but `GET /health` needs it, the page and unknown paths included: as `Authorization: Bearer
  KEY`, or as HTTP Basic with the key for its password. Basic is for the page: the browser asks for it, keeps it out of
  the address bar, history and logs, and sends it along with the page's own requests.
- A browser's request that another site makes (its `Origin` is not the `Host` it came to) is refused, key or no key.
- Without a key, listening on this machine only, the `Host` must name this machine: a site whose name was rebound to
  127.0.0.1 must not read answers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from llmctl.serve.protocol import ApiError


def is_loopback(host: str) -> bool:
    """Whether `host` (as `--host` or a Host header names it, without a port) is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, `127.0.0.1.evil.example` too
        return host.lower() == "localhost"


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, *, api_key: str, host: str) -> None:
        self.app = app
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else b""
        self._local_only = not api_key and is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no route speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        problem = self._refusal(scope)
        if problem is None:
            return await self.app(scope, receive, send)
        headers = problem.headers()
        if problem.status == 401:
            page = scope["path"] == "/" and scope["method"] == "GET"
            headers["WWW-Authenticate"] = 'Basic realm="llmctl: the API key is the password"' if page else "Bearer"
        return await JSONResponse(problem.body(), problem.status, headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._key and not self._has_key(scope):
            return ApiError(401, "a valid API key is needed: `Authorization: Bearer KEY`", code="invalid_api_key")
        host, origin = _header(scope, b"host"), _header(scope, b"origin")
        if self._local_only and not is_loopback(_name(host)):
            message = f"the Host {host[:60]!r} is not this machine; start with --api-key to be asked under another name"
            return ApiError(403, message, code="host_not_allowed")
        if origin and _netloc(origin) != host.lower():
            return ApiError(403, f"requests from the site {origin[:60]!r} are refused", code="origin_not_allowed")
        return None

    def _has_key(self, scope: Scope) -> bool:
        """Compares digests: the time taken tells neither the key's bytes nor its length."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, given = values[0].partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._key)


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _name(host: str) -> str:
    """`localhost` of `localhost:8000`, `::1` of `[::1]:8000`."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    """`localhost:8000` of `http://localhost:8000`; "" of `null`, which is no site of ours."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
