"""What a model keeps of keys and values: bytes from the shapes of its cache, and how full one of a fixed size is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_PARTS = ("self_attention_cache", "cross_attention_cache")
"""Of an encoder with a decoder."""


def kv_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values of a cache, 0 for an empty one; None for a cache that does not show them.

    A layer with a sliding window counts what it keeps, a static one all that it has allocated. States of linear
    attention are neither keys nor values.

    Args:
        cache: one of transformers, also of an encoder with a decoder, or (key, value) tensors a layer.
    """
    parts = [getattr(cache, name, None) for name in _PARTS]
    if any(part is not None for part in parts):
        sizes = [kv_bytes(part) for part in parts if part is not None]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    layers = getattr(cache, "layers", None)
    if layers is not None:
        if any(hasattr(layer, "_quantized_keys") for layer in layers):
            return None
        return sum(map(_layer_bytes, layers))
    if isinstance(cache, (tuple, list)):
        return _bytes(tensor for layer in cache for tensor in layer)
    return None


class Room(NamedTuple):
    """How much of a cache whose size is fixed is in use, a layer or a pool of blocks each."""

    kept: list[Any]
    """Positions or blocks in use: a number, or a tensor of one number."""
    capacity: list[int]
    """Positions or blocks that there are."""
    weight: list[int]
    """What each counts for: the bytes that it takes when full."""

    def usage(self, kept: Sequence[float]) -> float:
        """Of the whole capacity, 0 to 1, where so much is in use: a sliding window that has run over is full."""
        used = (
            size * min(1.0, now / most) for now, most, size in zip(kept, self.capacity, self.weight, strict=True)
        )
        return sum(used) / sum(self.weight)


def room(cache: Any) -> Room | None:
    """How full a cache is; None where it grows as it is needed, or does not say how large it is.

    Args:
        cache: a static one of transformers, also of an encoder with a decoder, or its paged one.
    """
    free = getattr(cache, "compute_free_capacity", None)
    if callable(free):
        return Room([1.0 - float(free())], [1], [1])
    blocks, free = getattr(cache, "num_blocks", None), getattr(cache, "get_num_free_blocks", None)
    if isinstance(blocks, int) and blocks > 0 and callable(free):
        return Room([blocks - int(free())], [blocks], [1])
    parts = [part for name in _PARTS if (part := getattr(cache, name, None)) is not None] or [cache]
    layers = [layer for part in parts for layer in getattr(part, "layers", None) or () if _layer_bytes(layer)]
    told = (getattr(layer, "max_cache_len", None) for layer in layers)
    capacity = [most for most in told if isinstance(most, int) and most > 0]
    if not layers or len(capacity) < len(layers):
        return None
    return Room([layer.get_seq_length() for layer in layers], capacity, [*map(_layer_bytes, layers)])


def _layer_bytes(layer: Any) -> int:
    return _bytes(getattr(layer, name, None) for name in ("keys", "values"))


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
