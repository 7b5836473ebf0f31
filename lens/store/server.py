"""Runs the application: one process, one uvicorn worker, one data folder."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable

import uvicorn
from fastapi import FastAPI

from lens.settings import Settings
from lens.store.access import guard_of, is_loopback, token_of
from lens.store.app import create_app
from lens.store.errors import StoreError
from lens.store.folder import DataFolder, Limits
from lens.store.memory import given_back
from lens.store.tokens import Tokens

Ready = Callable[[str], None]
Mount = Callable[[FastAPI], None]
_ANY_ADDRESS = ("0.0.0.0", "::", "")


def serve(
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8321,
    *,
    ready: Ready | None = None,
    mount: Mount | None = None,
    public: bool = False,
    names: Iterable[str] = (),
    limits: Limits | None = None,
    otlp_grpc: int | None = None,
) -> int:
    """Serve a data folder until told to stop (Ctrl-C, SIGTERM); returns the exit status.

    Args:
        port: 0 takes a free one.
        ready: called with the URL, token included, once requests are answered.
        mount: attaches pages to the application.
        public: allow an address that other machines can reach.
        names: further names that clients may call the server by.
        otlp_grpc: a port to take OTLP metrics over gRPC at, on the same address.

    Raises:
        FolderOwnedError: another process has the folder; its URL is in the error.
        StoreError: the folder cannot be opened, or the address needs `public`.
        OSError: the address cannot be listened on.
        ImportError: gRPC is asked for and not installed.
    """
    if not public and not is_loopback(host):
        raise StoreError(
            f"{host or 'every address'} can be reached from other machines", "say --public if that is meant"
        )
    # Decoding in threads must not keep the event loop waiting for the interpreter: the default is 5 ms a thread.
    sys.setswitchinterval(0.0005)
    listener = _listen(host, port)
    try:
        folder = DataFolder(settings.data, limits, settings.clickhouse)
    except BaseException:
        listener.close()
        raise
    token = token_of(settings.data, settings.token)
    own_names = {*names, *((settings.host, socket.gethostname(), socket.getfqdn()) if public else ())}
    try:
        app = create_app(
            settings,
            store=folder,
            guard=guard_of(token, host, own_names, Tokens(settings.data)),
            otlp_grpc=None
            if otlp_grpc is None
            else f"{f'[{host}]' if ':' in host else host or '0.0.0.0'}:{otlp_grpc}",
        )
    except BaseException:
        listener.close()
        folder.close()
        raise
    if mount is not None:
        mount(app)
    bound = listener.getsockname()[1]
    url = f"http://{_shown_host(host, settings.host)}:{bound}"

    def started() -> None:
        folder.ownership.announce(url, settings.data / "token")
        if ready is not None:
            ready(f"{url}/?token={token}")

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws_max_size=1 << 16,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=1 << 16,
    )
    server = _Server(config, started)
    with _QuietEnd(), given_back():
        server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._say_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, then say so."""
        await super().startup(sockets)
        if self.started:
            self._say_started()


class _QuietEnd:
    """uvicorn raises the signal that ended it once more after its shutdown; everything is closed by then."""

    def __enter__(self) -> None:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: None)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        return kind is KeyboardInterrupt


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
        listener.set_inheritable(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _shown_host(host: str, own: str) -> str:
    if host in _ANY_ADDRESS:
        return own
    return f"[{host}]" if ":" in host else host
