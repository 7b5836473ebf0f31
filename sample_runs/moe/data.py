"""The data: windows of bytes cut from the sources of Python's standard library, which every machine has."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CORPUS_BYTES = 4 * 1024 * 1024
HELD_OUT = 1 / 20
_MIX, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def read_corpus(limit: int = CORPUS_BYTES) -> Tensor:
    """The first `limit` bytes of the standard library's modules, in order of their names: uint8 [bytes]."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def split_corpus(corpus: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes held out for evaluation."""
    cut = int(len(corpus) * (1 - HELD_OUT))
    return corpus[:cut], corpus[cut:]


class Windows(Dataset[Tensor]):
    """Windows of `length` bytes; the n-th is at a place drawn from seed, rank and n: uint8 [length]."""

    def __init__(
        self,
        corpus: Tensor,
        *,
        length: int,
        count: int,
        seed: int,
        rank: int,
        slow_from: int | None = None,
        slow_seconds: Tensor | None = None,
    ) -> None:
        self.corpus = corpus
        self.length = length
        self.count = count
        self.key = seed * 1_000_003 + rank * 7_919
        # Known by the sample's number, so that workers which prefetch are slow for exactly these samples.
        self.slow_from = count if slow_from is None else slow_from
        # Seconds a sample, in shared memory: the trainer learns them while the workers run.
        self.slow_seconds = slow_seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if self.slow_seconds is not None and index >= self.slow_from:
            time.sleep(self.slow_seconds.item())
        place = _scatter(self.key + index) % (len(self.corpus) - self.length)
        return self.corpus[place : place + self.length]


def loader(windows: Windows, batch: int, workers: int) -> DataLoader[Tensor]:
    """Batches in order: uint8 [batch, length]."""
    return DataLoader(windows, batch_size=batch, num_workers=workers, prefetch_factor=2 if workers else None)


def _scatter(number: int) -> int:
    """A number spread evenly over 64 bits (splitmix64)."""
    mixed = (number + 1) * _MIX & _MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return mixed ^ mixed >> 31
