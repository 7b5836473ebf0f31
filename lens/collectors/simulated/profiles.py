"""Card profiles: one TOML file a card, in ``profiles/``; dense peaks, and how sure each number is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class CardProfile:
    """One card model."""

    name: str
    vendor: str
    model: str
    memory_bytes: int
    memory_bandwidth: float
    """By/s."""
    flops: Mapping[str, float]
    """Dense FLOP/s by number format."""
    board_w: float
    idle_w: float
    idle_mhz: float
    max_mhz: float
    memory_mhz: float
    links: int
    link_bandwidth: float
    """By/s of one link in one direction."""
    pcie_generation: int
    pcie_width: int
    slowdown_celsius: float
    confidence: Mapping[str, str]
    """measured, published, claimed or assumed, by section (``flops``) or number (``flops.fp8``)."""
    aliases: tuple[str, ...] = ()
    """Other names of it, such as that of its series."""

    def peaks(self) -> dict[str, float]:
        """Dense peaks: FLOP/s by number format, and ``memory`` in bytes/s."""
        return {**self.flops, "memory": self.memory_bandwidth}

    def confidence_of(self, number: str) -> str | None:
        """How sure a number such as ``flops.fp8`` is; None where the profile does not say."""
        return self.confidence.get(number, self.confidence.get(number.partition(".")[0]))


@functools.cache
def load_profiles() -> Mapping[str, CardProfile]:
    """Every profile by card name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.toml"))}


def named_profile(name: str) -> CardProfile | None:
    """The profile of this name or alias, in any case."""
    return _by_name().get(name.upper())


def find_profile(model: str) -> CardProfile | None:
    """The profile of a card by the model name its driver gives; None when no profile names it.

    The longest name that occurs wins: "NVIDIA GH200 480GB" is a GH200, not an H200.
    """
    fits = [name for name in _by_name() if name in model.upper()]
    return _by_name()[max(fits, key=len)] if fits else None


@functools.cache
def _by_name() -> Mapping[str, CardProfile]:
    """Profiles by each of their names, in capitals."""
    return {name.upper(): card for card in load_profiles().values() for name in (card.name, *card.aliases)}


def _read(path: Path) -> CardProfile:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with path.open("rb") as file:
        card: dict[str, Any] = tomllib.load(file)
    return CardProfile(
        name=card["name"],
        vendor=card["vendor"],
        model=card["model"],
        memory_bytes=card["memory"]["bytes"],
        memory_bandwidth=card["memory"]["bandwidth"],
        flops=card["flops"],
        board_w=card["power"]["board_w"],
        idle_w=card["power"]["idle_w"],
        idle_mhz=card["clock"]["idle"],
        max_mhz=card["clock"]["max"],
        memory_mhz=card["clock"]["memory"],
        links=card["link"]["count"],
        link_bandwidth=card["link"]["bandwidth"],
        pcie_generation=card["pcie"]["generation"],
        pcie_width=card["pcie"]["width"],
        slowdown_celsius=card["heat"]["slowdown"],
        confidence=card["confidence"],
        aliases=tuple(card.get("aliases", ())),
    )
