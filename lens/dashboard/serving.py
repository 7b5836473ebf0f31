"""How pages and their files go out: a strict content security policy, honest caching, compressed once."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC_PREFIXES = ("/_dash-component-suites/", "/assets/")
COMPRESSIBLE = ("javascript", "text/css", "text/html", "json")
KEPT_FILES = 64
"""Compressed files kept in memory (about 10 kB to 250 kB each)."""


def content_security_policy(script_hashes: Sequence[str]) -> str:
    """Everything from this origin only; inline scripts by hash, inline styles because Mantine writes them."""
    rules = {
        "default-src": "'self'",
        "script-src": " ".join(("'self'", *script_hashes)),
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "object-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


class PageHeaders:
    """ASGI middleware: security headers on pages; script and style files gzipped once and then kept."""

    def __init__(self, app: ASGIApp, script_hashes: Sequence[str]) -> None:
        self._app = app
        self._policy = content_security_policy(script_hashes)
        self._kept: dict[tuple[str, str], bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is not a page or a file of one; add headers to the rest."""
        if scope["type"] != "http" or scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        static = scope["path"].startswith(STATIC_PREFIXES)
        accepts_gzip = "gzip" in Headers(scope=scope).get("accept-encoding", "")
        answer = _Answer(send)
        await self._app(scope, receive, answer.take)
        start, body = answer.start, bytes(answer.body)
        if start is None:
            return
        headers = MutableHeaders(scope=start)
        if headers.get("content-type", "").startswith("text/html"):
            headers["Content-Security-Policy"] = self._policy
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            headers["Cache-Control"] = "no-store"
        elif scope["path"].startswith("/assets/"):
            headers["Cache-Control"] = "no-cache"  # ask each time: the answer is a 304 unless lens was upgraded
        if accepts_gzip and start["status"] == 200 and scope["method"] == "GET" and _compressible(headers):
            body = await self._gzipped(scope["path"] + headers.get("etag", ""), body, keep=static)
            headers["Content-Encoding"] = "gzip"
            headers["Content-Length"] = str(len(body))
        if static:
            headers.append("Vary", "Accept-Encoding")
        await send(start)
        await send({"type": "http.response.body", "body": body})

    async def _gzipped(self, name: str, body: bytes, keep: bool) -> bytes:
        if not keep:
            return gzip.compress(body, 5)
        key = (name, str(len(body)))
        packed = self._kept.get(key)
        if packed is None:
            packed = await asyncio.to_thread(gzip.compress, body, 9)
            if len(self._kept) < KEPT_FILES:
                self._kept[key] = packed
        return packed


class _Answer:
    """Collects a response, since its headers depend on its whole body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.start: Message | None = None
        self.body = bytearray()

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
        else:
            await self._send(message)


def _compressible(headers: MutableHeaders) -> bool:
    kind = headers.get("content-type", "")
    return "content-encoding" not in headers and any(word in kind for word in COMPRESSIBLE)
