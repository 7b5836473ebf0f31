"""One Settings object: argument > LENS_* environment > lens.toml > default.

Standard library only: this is loaded inside training processes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message names it and says what is accepted."""


def _user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


@dataclass(frozen=True)
class Settings:
    """Everything that can be configured, with its unit.

    Each field is set by the keyword of the same name, by ``LENS_<FIELD>`` in the environment, or by the same
    key in ``lens.toml`` of the working directory, in this order.
    """

    server: str | None = None
    """Base URL of the lens server, such as ``http://127.0.0.1:8321``."""
    token: str | None = None
    """Bearer token of that server; without it the token file of the data folder is read."""
    run: str | None = None
    """Run id; without it rank 0 draws one."""
    name: str | None = None
    """A name for people, shown beside the run id."""
    host: str = ""
    """This host's name; four ranks on one machine can play two hosts."""
    device: str | None = None
    """This rank's device, such as ``host3/gpu1``."""
    data: Path = Path("lens-data")
    """The data folder of a server on this machine; also holds copied rings and spools."""
    clickhouse: str | None = None
    """A ClickHouse server that keeps this data folder's tables, ``http://host:8123``; without it the folder does."""
    rings: Path = Path()
    """Where the rings live: memory-backed, private to the user."""
    ring_mib: int = 8
    """Size of one ring, MiB."""
    agent: bool = True
    """Whether ``watch`` may start an agent when none runs."""
    agent_linger: float = 30.0
    """Seconds an agent waits for a new training process before it ends."""
    heartbeat_s: float = 1.0
    """Seconds between two heartbeats of a rank; half as many when one has stood still for three periods."""
    ship_s: float = 1.0
    """Seconds between two batches that an agent ships."""
    spool: Path = Path()
    """Where the agent spools batches until the server has them."""
    spool_mib: int = 1024
    """Bound of the spool, MiB; beyond it the oldest batch is dropped and counted."""
    max_overhead_pct: float = 1.0
    """Budget of the hook, per cent of step time; past it the hook backs off."""
    native: bool = True
    """Whether the hook may load, and the agent build, what is compiled for this torch (`lens doctor --build`)."""
    compiled_experts: bool = False
    """Whether tokens of experts are counted inside compiled modules too, by an addition in their graphs."""
    disabled: bool = False
    """Kill switch: every call of the hook does nothing."""
    alert_webhook: str | None = None
    """URL that the server posts a JSON object to when something begins to hold a run back, and when it is over."""
    device_hour_price: str | None = None
    """What an hour of a card costs, such as ``2.5 USD``, or ``H200 4.1, MI300X 3.2 USD`` by card model."""
    simulate: str | None = None
    """Cards that the agent simulates on its host, such as ``H200:2``; every sample of them says so."""

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Settings from arguments, environment, ``lens.toml`` and defaults.

        Raises:
            SettingsError: a value cannot be used or a keyword is unknown.
        """
        environ = os.environ if environ is None else environ
        known = {field.name: field for field in fields(cls)}
        unknown = set(overrides) - set(known)
        if unknown:
            raise SettingsError(f"unknown setting {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        from_file = read_toml(Path(environ.get("LENS_CONFIG", "lens.toml")))
        chosen: dict[str, Any] = {}
        for name, field in known.items():
            for source, value in (
                ("argument", overrides.get(name)),
                ("environment", environ.get("LENS_" + name.upper()) or None),
                ("lens.toml", from_file.get(name)),
            ):
                if value is not None:
                    chosen[name] = _convert(name, str(field.type), value, source)
                    break
        chosen.setdefault("host", "")
        chosen["host"] = chosen["host"] or socket.gethostname()
        data = chosen.setdefault("data", cls.data)
        if "rings" not in chosen:
            chosen["rings"] = default_rings()
        if "spool" not in chosen:
            chosen["spool"] = Path(data) / "spool" / chosen["host"]
        return cls(**chosen)

    def read_token(self) -> str | None:
        """The token given, or the one in the data folder's token file; None if neither is there."""
        if self.token:
            return self.token
        try:
            return (self.data / "token").read_text().strip() or None
        except OSError:
            return None


def default_rings() -> Path:
    """Shared memory where the system has it: a ring must never meet NFS or a slow disk."""
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() else Path(os.environ.get("TMPDIR", "/tmp"))
    return base / f"lens-{_user_id()}"


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says; nothing where there is none.

    Raises:
        SettingsError: it cannot be read.
    """
    if not path.is_file():
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def _convert(name: str, kind: str, value: Any, source: str) -> Any:
    try:
        if kind == "bool":
            if isinstance(value, bool):
                return value
            word = str(value).strip().lower()
            if word in _TRUE or word in _FALSE:
                return word in _TRUE
            raise ValueError("use 1 or 0")
        if kind == "int":
            return int(value)
        if kind == "float":
            return float(value)
        if kind == "Path":
            return Path(value).expanduser()
        return str(value)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name} = {value!r} (from {source}) cannot be used: {error}") from error
