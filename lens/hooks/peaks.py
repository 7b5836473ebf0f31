"""The dense peak of a card: from the profiles that the card collectors read too, one file a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens.settings import read_toml

_PROFILES = Path(__file__).resolve().parents[1] / "collectors" / "simulated" / "profiles"
_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
"""torch's name of a number format -> the profile's."""


def dense_peak(card: str, dtype: str) -> float | None:
    """FLOP/s of a card, by the name that its driver gives, in a number format such as ``bfloat16``; None if unknown.

    The longest name that occurs wins, as in the collectors: "NVIDIA GH200 480GB" is a GH200, not an H200.
    """
    found: tuple[int, Any] = (0, None)
    for path in _PROFILES.glob("*.toml"):
        profile = read_toml(path)
        for name in (profile["name"], *profile.get("aliases", ())):
            if name.upper() in card.upper() and len(name) > found[0]:
                found = len(name), profile["flops"].get(_FORMATS.get(dtype, dtype))
    return found[1] and float(found[1])
