"""OTLP metrics over gRPC: the same bytes as over HTTP, by the one method of the protocol's MetricsService.

grpcio does the wire; messages stay bytes here, and are read as those of ``POST /v1/metrics`` are. The token comes as
the call's metadata ``authorization: Bearer TOKEN``, as over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lens.store.access import Guard
from lens.store.audit import Refusals
from lens.store.bridges import otlp
from lens.store.bridges.samples import Gathered
from lens.store.errors import StoreError
from lens.store.ingest import WORKERS
from lens.store.tokens import INGEST

SERVICE, METHOD = "opentelemetry.proto.collector.metrics.v1.MetricsService", "Export"
_CODES = {400: "INVALID_ARGUMENT", 413: "RESOURCE_EXHAUSTED", 429: "UNAVAILABLE", 503: "UNAVAILABLE"}
"""gRPC's word for what the answer would be over HTTP; senders try UNAVAILABLE again."""
_Store = Callable[[bytes, Callable[[bytes, Any], Gathered], "str | None"], Gathered]


class MetricsService:
    """A gRPC server on its own port, beside the HTTP one.

    Args:
        address: ``host:port``; port 0 takes a free one.
        most_bytes: largest message.
        most_calls: calls at the same time; further ones are told to come again.

    Raises:
        ImportError: grpcio is not installed.
        OSError: the address cannot be listened on.
    """

    def __init__(self, address: str, guard: Guard, most_bytes: int, most_calls: int, refusals: Refusals) -> None:
        import grpc

        self._grpc, self._guard, self._refusals = grpc, guard, refusals
        self._server = grpc.server(
            ThreadPoolExecutor(WORKERS, "lens-grpc"),
            maximum_concurrent_rpcs=most_calls,
            # Without SO_REUSEPORT a second server on the port is refused, and does not take half of the calls.
            options=[("grpc.max_receive_message_length", most_bytes), ("grpc.so_reuseport", 0)],
        )
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self._store: _Store | None = None
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"{address} cannot be listened on for gRPC: {error}") from error
        if not self.port:
            raise OSError(f"{address} cannot be listened on for gRPC")

    def start(self, store: _Store, status_of: Callable[[StoreError], int]) -> None:
        """Answer from now on: `store` keeps what a reader finds in a body, for a token of a project or of all."""
        self._store, self._status_of = store, status_of
        self._server.start()

    def stop(self, grace_s: float = 3.0) -> None:
        """Take no more calls; returns when those under way are answered."""
        self._server.stop(grace_s).wait()

    def _export(self, body: bytes, context: Any) -> bytes:
        project = self._check(context)
        assert self._store is not None
        try:
            gathered = self._store(body, lambda content, _: otlp.gather(content, otlp.PROTOBUF, None), project)
        except StoreError as error:
            code = getattr(self._grpc.StatusCode, _CODES.get(self._status_of(error), "INTERNAL"))
            context.abort(code, f"{error}{f' ({error.hint})' if error.hint else ''}")
        return otlp.reply(gathered, otlp.PROTOBUF)

    def _check(self, context: Any) -> str | None:
        """End the call of somebody who may not send; the project that the others may send to."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = str(given).partition(" ")
        holder = self._guard.holder(token.strip()) if scheme.lower() == "bearer" else None
        if holder is not None and holder.may(INGEST):
            return holder.project
        who, why, code, status = (
            ("nobody", "a token is needed: authorization: Bearer TOKEN", "UNAUTHENTICATED", 401)
            if holder is None
            else (
                holder.name,
                f"the token of {holder.name} is not for this: ingest is needed",
                "PERMISSION_DENIED",
                403,
            )
        )
        # A peer is ipv4:ADDRESS:PORT, and the port is another with each connection.
        self._refusals.note(who, str(context.peer()).rpartition(":")[0], status, f"gRPC {METHOD}", why)
        context.abort(getattr(self._grpc.StatusCode, code), why)
        raise AssertionError("abort raises")
