"""Bytes of the keys and values that a model keeps, from the shapes of its cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def kv_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values of a cache, 0 for an empty one; None for a cache that does not show them.

    A layer with a sliding window counts what it keeps, a static one all that it has allocated. States of linear
    attention are neither keys nor values.

    Args:
        cache: one of transformers, also of an encoder with a decoder, or (key, value) tensors a layer.
    """
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    if any(part is not None for part in parts):
        sizes = [kv_bytes(part) for part in parts if part is not None]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    layers = getattr(cache, "layers", None)
    if layers is not None:
        if any(hasattr(layer, "_quantized_keys") for layer in layers):
            return None
        return _bytes(tensor for layer in layers for tensor in (_held(layer, "keys"), _held(layer, "values")))
    if isinstance(cache, (tuple, list)):
        return _bytes(tensor for layer in cache for tensor in layer)
    return None


def _held(layer: Any, name: str) -> Any:
    return getattr(layer, name, None)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
