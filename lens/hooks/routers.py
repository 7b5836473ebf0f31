"""Routers of mixture-of-experts layers, found by how models are written, and what their outputs mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

CLASS_WORDS = ("router", "topkgate", "moegate")
LEAF_NAMES = frozenset(("router", "gate", "wg"))
PARENT_WORDS = ("moe", "sparse", "expert")
EXPERTS_NAMES = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "num_moe_experts", "experts")
TOP_K_NAMES = (
    "top_k",
    "topk",
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_router_topk",
    "k",
)
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


class Router(NamedTuple):
    """One router of a model."""

    layer: int
    module: Any
    experts: int | None
    """How many it chooses from, as far as the model says so."""
    top_k: int | None
    """How many it chooses for each token, as far as the model says so."""


def find_routers(model: Any, compiled_too: bool = False) -> list[Router]:
    """The routers of a model, in its order; those inside compiled modules are left alone, unless asked for."""
    modules = dict(model.named_modules())
    compiled = [] if compiled_too else [name for name, module in modules.items() if is_compiled(module)]
    found: list[str] = []
    for name, module in modules.items():
        if not name or any(_is_inside(name, other) for other in (*found, *compiled)):
            continue
        parent = modules.get(name.rpartition(".")[0])
        if _is_router(name, module, parent):
            found.append(name)
    numbers = _layers(found)
    return [
        _router(layer, modules[name], modules[name.rpartition(".")[0]])
        for layer, name in zip(numbers, found, strict=True)
    ]


def classify(output: Any, experts: int | None, top_k: int | None) -> tuple[str, Any, int] | None:
    """What to count of a router's output: (kind, tensor, number of experts); None if it cannot be known.

    Kinds: ``map`` (.., E) marks the chosen experts, ``indices`` (.., k) names them, ``counts`` (E,) are tokens per
    expert, ``logits`` (.., E) still have to be chosen from.
    """
    tensors = [tensor for tensor in _plain_tensors(output) if tensor.dim() > 0]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    whole = [tensor for tensor in tensors if not tensor.is_floating_point()]
    total = experts or max((tensor.shape[-1] for tensor in floats if tensor.dim() > 1), default=0)
    if total < 2:
        return None
    for tensor in whole:
        wide = tensor.dim() > 1 and tensor.shape[-1] == total
        if wide and (tensor.dtype.is_signed is False or top_k != total):
            return "map", tensor, total
    for tensor in whole:
        if tensor.dim() > 1 and tensor.shape[-1] == (top_k or tensor.shape[-1]) and tensor.shape[-1] < total:
            return "indices", tensor, total
    for tensor in whole:
        if tensor.dim() == 1 and tensor.shape[0] == total:
            return "counts", tensor, total
    for tensor in floats:
        if tensor.dim() > 1 and tensor.shape[-1] == total and top_k:
            return "logits", tensor, total
    return None


def _plain_tensors(output: Any) -> Iterator[Any]:
    import torch

    for value in output if isinstance(output, (tuple, list)) else (output,):
        # A tensor that is distributed, traced or wrapped would answer with work of its own.
        if type(value) is torch.Tensor and value.device.type != "meta":
            yield value


def _is_router(name: str, module: Any, parent: Any) -> bool:
    own = type(module).__name__.lower()
    if any(word in own for word in CLASS_WORDS):
        return True
    if name.rpartition(".")[2] not in LEAF_NAMES or parent is None:
        return False
    children = [child.lower() for child, _ in parent.named_children()]
    around = type(parent).__name__.lower()
    return any("expert" in child for child in children) or any(word in around for word in PARENT_WORDS)


def is_compiled(module: Any) -> bool:
    """Whether torch.compile was asked to compile this module."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def _is_inside(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(f"{other}.")


def _layers(names: list[str]) -> list[int]:
    """The layer of each router: the number in its path where that tells them apart, else its place in the model."""
    numbers = [match and int(match.group(1)) for match in map(_NUMBER.search, names)]
    known = [number for number in numbers if number is not None]
    return known if len(set(known)) == len(names) else list(range(len(names)))


def _router(layer: int, module: Any, parent: Any) -> Router:
    weight = getattr(module, "weight", None)
    rows = weight.shape[0] if weight is not None and weight.dim() == 2 else None
    experts = _number(EXPERTS_NAMES, module) or rows or _number(EXPERTS_NAMES, parent)
    return Router(layer, module, experts, _number(TOP_K_NAMES, module) or _number(TOP_K_NAMES, parent))


def _number(names: tuple[str, ...], module: Any) -> int | None:
    """A whole number of this name that a module keeps, or a configuration that it keeps."""
    import torch

    held = (
        thing for thing in vars(module).values() if not isinstance(thing, (torch.nn.Module, torch.Tensor, type))
    )
    for owner in (module, *held):
        own = getattr(owner, "__dict__", None)
        for name in names if isinstance(own, dict) else ():
            value = own.get(name) if isinstance(own, dict) else None
            if type(value) is int and value > 0:
                return value
    return None
