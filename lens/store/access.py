"""Who may ask what: tokens and their scopes, Host allow-list (against DNS rebinding), Origin check (against other
sites' pages).

A plain ASGI middleware, since it has to cover everything that is served: API, pages, files and websockets.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lens.store.audit import Refusals
from lens.store.errors import StoreError, UnknownRunError
from lens.store.projects import PROJECT, belongs, is_open, named_run
from lens.store.tokens import ADMIN, INGEST, OWNER, READ, Holder, Tokens

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
COOKIE = "lens_token"
HOLDER = "lens.holder"
"""Where a request's scope says whose token it came with."""
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Guard:
    """The rules of one server."""

    token: str
    hosts: frozenset[str] = _LOOPBACK_NAMES
    """Names it may be called by."""
    any_address: bool = False
    """Whether any IP address will do as a name: a page cannot be rebound to one."""
    tokens: Tokens | None = None
    """Tokens of others than the owner."""

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this server."""
        name = _host_name(header)
        return name in self.hosts or (self.any_address and _is_address(name))

    def holder(self, token: str) -> Holder | None:
        """Who has this token; None if it is none."""
        if hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            return OWNER
        try:
            return self.tokens.find(token) if self.tokens is not None else None
        except StoreError as error:
            logger.error("nobody but the owner is let in: %s", error)
            return None


def guard_of(token: str, address: str, names: Iterable[str] = (), tokens: Tokens | None = None) -> Guard:
    """The rules for a server that listens on this address and may be called by these names too."""
    hosts = _LOOPBACK_NAMES | {name.lower() for name in names}
    if is_loopback(address):
        return Guard(token, hosts, tokens=tokens)
    return Guard(token, hosts | {address.lower()}, any_address=True, tokens=tokens)


def scope_of(method: str, path: str) -> str:
    """What a token must be for to send this request; a websocket counts as GET."""
    for methods, paths, scope in _NEEDED:
        if method in methods and re.fullmatch(paths, path, re.S):
            return scope
    return ADMIN


_NEEDED = (
    ({"POST"}, r"/api/v1/runs|/api/v1/runs/[^/]+/records|/api/v1/write|/v1/metrics", INGEST),
    ({"POST"}, r"/api/v1/query", READ),
    (SAFE_METHODS, r".*", READ),
    ({"POST"}, r"(?!/api/|/v1/).*", READ),  # what pages ask their server
)
"""Methods, paths and what they need; what is not named here needs admin."""


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def token_of(folder: Path, given: str | None = None) -> str:
    """The server's token: the one given, the folder's, or a new one; kept in the folder, for its owner alone.

    Raises:
        StoreError: the token file cannot be read or written.
    """
    path = folder / "token"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = path.read_text().strip() if path.is_file() and not path.is_symlink() else ""
        token = given or known or secrets.token_urlsafe(32)
        if token != known:
            partial = folder / "token.new"
            partial.unlink(missing_ok=True)
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(token + "\n")
            partial.replace(path)
        path.chmod(0o600)
    except OSError as error:
        raise StoreError(f"the token file {path} cannot be kept: {error.strerror}", "check its folder") from error
    return token


class Access:
    """Lets a request through, or answers it with why not."""

    def __init__(self, app: ASGIApp, guard: Guard, refusals: Refusals | None = None) -> None:
        self._app, self._guard, self._refusals = app, guard, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request or websocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        if self._refusals is not None and refusal.status in (401, 403):
            who, address = scope.get(HOLDER, "nobody"), (scope.get("client") or ("",))[0]
            request = f"{scope.get('method', 'WS')} {scope['path']}"
            # Not on the event loop: a line is on disk when this returns.
            await anyio.to_thread.run_sync(
                self._refusals.note, who, address, refusal.status, request, refusal.error
            )
        await refusal.answer(scope, send)

    def _refusal(self, scope: Scope, headers: Headers) -> _Refusal | None:
        host = headers.get("host", "")
        if not self._guard.knows_host(host):
            return _Refusal(403, f"this server is not called {host[:100]!r}", "use the URL that lens serve printed")
        if scope["path"] in OPEN_PATHS:
            return None
        origin = headers.get("origin")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if changes and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return _Refusal(
                403, f"requests from pages of {origin[:100]!r} are not taken", "open lens in its own tab"
            )
        return self._login(scope) or self._unauthorized(scope, headers)

    def _login(self, scope: Scope) -> _Refusal | None:
        """Answer to ``/?token=…`` of a page: a cookie, and the same address without the token."""
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"].startswith("/api/"):
            return None
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        given = [value for key, value in query if key == "token"]
        if not given or self._guard.holder(given[0]) is None:
            return None
        rest = urlencode([(key, value) for key, value in query if key != "token"])
        # One leading slash: two would name another host.
        location = "/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else "")
        cookie = f"{_cookie_name(scope)}={given[0]}; Path=/; HttpOnly; SameSite=Strict"
        return _Refusal(303, "", "", (("location", location), ("set-cookie", cookie)))

    def _unauthorized(self, scope: Scope, headers: Headers) -> _Refusal | None:
        """Refuse who has no token, or one for other things; else note in the scope who it is."""
        authorization = headers.get("authorization", "")
        scheme, _, token = authorization.partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else [] if authorization else _cookies(scope, headers)
        holder = next(filter(None, map(self._guard.holder, given)), None)
        if holder is None:
            hint = (
                "open the URL that lens serve printed; programs send Authorization: Bearer TOKEN, "
                "the token is in the file token of the data folder"
            )
            said = "the token is wrong" if authorization else "a token is needed"
            return _Refusal(401, said, hint, (("www-authenticate", "Bearer"),))
        scope[HOLDER], scope[PROJECT] = holder.name, holder.project
        needed = scope_of(scope.get("method", "GET"), scope["path"])
        if not holder.may(needed):
            return _Refusal(
                403,
                f"the token of {holder.name} is not for this: {needed} is needed",
                "ask for one: lens store token",
            )
        return self._outside(scope, holder) if holder.project is not None else None

    def _outside(self, scope: Scope, holder: Holder) -> _Refusal | None:
        """Refuse a token of one project what is not of it; a run of another is as one that is not there."""
        if not is_open(scope["path"]):
            return _Refusal(
                403, f"the token of {holder.name} is for runs of {holder.project} alone", "ask for one for all runs"
            )
        name = named_run(scope["path"])
        if name is None:
            return None
        run = scope["app"].state.folder.registry.find(name)
        if run is not None and belongs(run, holder.project):
            return None
        unknown = UnknownRunError(name)
        return _Refusal(404, str(unknown), unknown.hint)


@dataclass(frozen=True)
class _Refusal:
    """An answer given instead of the application's."""

    status: int
    error: str
    hint: str
    headers: tuple[tuple[str, str], ...] = ()

    async def answer(self, scope: Scope, send: Send) -> None:
        body, content_type = self._body(scope)
        headers = [
            ("content-type", content_type),
            ("content-length", str(len(body))),
            ("cache-control", "no-store"),
            ("referrer-policy", "no-referrer"),
            *self.headers,
        ]
        encoded = [(key.encode(), value.encode("latin-1", "replace")) for key, value in headers]
        kind = "http.response"
        if scope["type"] == "websocket":
            if "websocket.http.response" not in scope.get("extensions", {}):
                await send({"type": "websocket.close", "code": 1008, "reason": self.error[:100]})
                return
            kind = "websocket.http.response"
        await send({"type": f"{kind}.start", "status": self.status, "headers": encoded})
        await send({"type": f"{kind}.body", "body": body})

    def _body(self, scope: Scope) -> tuple[bytes, str]:
        if self.status < 400:
            return b"", "text/plain"
        wants_page = scope["type"] == "http" and "text/html" in Headers(scope=scope).get("accept", "")
        if wants_page and not scope["path"].startswith("/api/"):
            page = (
                f"<!doctype html><title>lens</title><h1>lens: {_plain(self.error)}</h1><p>{_plain(self.hint)}</p>"
            )
            return page.encode(), "text/html; charset=utf-8"
        return json.dumps({"error": self.error, "hint": self.hint}).encode(), "application/json"


def _cookie_name(scope: Scope) -> str:
    """Browsers share cookies between all ports of a host: two servers there must not sign each other out."""
    server = scope.get("server")
    return f"{COOKIE}_{server[1]}" if server and server[1] else COOKIE


def _cookies(scope: Scope, headers: Headers) -> list[str]:
    try:
        jar = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return []
    return [jar[name].value for name in (_cookie_name(scope), COOKIE) if name in jar]


def _host_name(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
