"""Numbers that frameworks log, by the names that the catalogue has for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Names = Mapping[str, str]

COMMON: Names = {
    "loss": "train.loss",
    "grad_norm": "train.grad_norm",
    "learning_rate": "train.lr",
    "lr": "train.lr",
    "epoch": "train.epoch",
    "eval_loss": "eval.loss",
    "val_loss": "eval.loss",
}
TRANSFORMERS: Names = {**COMMON, "num_input_tokens_seen": "train.tokens.seen", "num_tokens": "train.tokens.seen"}
"""TRL's trainers count ``num_tokens`` themselves."""
LOGGED_BY_HAND: Names = {**COMMON, "train_loss": "train.loss", "train/loss": "train.loss", "val/loss": "eval.loss"}
"""Where the person chooses the names (Lightning, accelerate): those that are usual."""

_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_./-]")


def translated(logged: Mapping[Any, Any], names: Names) -> dict[str, Any]:
    """The numbers among what was logged, by name; what the catalogue does not know keeps its own.

    Numbers are Python's, and tensors and numpy scalars of one element, which are not read here.
    """
    return {
        names.get(key) or _spelled(key): value
        for key, value in logged.items()
        if isinstance(key, str) and key and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, int, float)):
        return True
    size = getattr(value, "numel", None) or getattr(value, "size", None)
    try:
        return (size() if callable(size) else size) == 1
    except Exception:  # a size that needs arguments, or is one of another kind
        return False


def _spelled(key: str) -> str:
    """As metric names are spelled: see `lens.hooks.values`."""
    plain = _FORBIDDEN.sub("_", key)[:127]
    return plain if plain[0].isalpha() or plain[0] == "_" else f"_{plain}"
