"""Kinds of process groups (dp, tp, pp, ep ...) that the training itself has named: device meshes, Megatron."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lens.hooks.guard import Part

Lists = dict[str, list[list[int]]]
_MEGATRON = {"dp": "data_parallel", "tp": "tensor_model_parallel", "pp": "pipeline_model_parallel",
             "ep": "expert_model_parallel", "cp": "context_parallel"}  # fmt: skip
_ORDER = "tp-cp-ep-dp-pp"
"""Megatron's own default; another order shows in the groups of this rank, which are compared."""


def kinds_found() -> Lists:
    """Groups by kind, in an order that is the same on every rank; empty where nothing has named them."""
    found: Lists = {}
    for mesh in _meshes():
        for kind, lists in kinds_of_mesh(mesh).items():
            found.setdefault(kind, lists)
    return {**found, **_of_megatron()}


def kinds_of_mesh(mesh: Any) -> Lists:
    """The groups along each named dimension of a device mesh."""
    names = mesh.mesh_dim_names
    if not names:
        return {}
    ranks = mesh.mesh
    return {
        name: ranks.movedim(place, -1).reshape(-1, ranks.shape[place]).tolist()
        for place, name in enumerate(names)
        if "/" not in name and ":" not in name
    }


def watch_meshes(part: Part, after_made: Callable[[], None]) -> None:
    """Call `after_made` when a device mesh was made."""
    module = sys.modules.get("torch.distributed.device_mesh")
    mesh_class = getattr(module, "DeviceMesh", None)
    if mesh_class is None:
        return
    original = mesh_class.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if part.on:
            after_made()

    __init__.__wrapped__ = original  # type: ignore[attr-defined]
    __init__.__doc__ = original.__doc__
    part.patch(mesh_class, "__init__", __init__)


def _meshes() -> Iterator[Any]:
    """The device meshes that there are, the first made first: whole ones before the slices taken from them."""
    module = sys.modules.get("torch.distributed.device_mesh")
    mesh_class = getattr(module, "DeviceMesh", None)
    if mesh_class is None:
        return
    # torch keeps no list of them. This is done when a group appears, never in a step.
    # By type: asking each object whether it is an instance would run code of its own.
    meshes = [found for found in gc.get_objects() if type(found) is mesh_class]
    yield from sorted(meshes, key=lambda mesh: -mesh.mesh.numel())


def _of_megatron() -> Lists:
    """The groups that Megatron's parallel state has made, where its order of ranks is the usual one."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return {}
    import torch.distributed as dist

    sizes = {kind: _megatron(state, f"get_{name}_world_size") for kind, name in _MEGATRON.items()}
    dense = {kind: size for kind, size in sizes.items() if kind != "ep"}
    try:
        generator = state.RankGenerator(ep=1, order=_ORDER, **dense)
        found: Lists = {kind: [list(ranks) for ranks in generator.get_ranks(kind)] for kind in dense}
    except (AttributeError, TypeError, ValueError, AssertionError, RuntimeError):
        return {}
    own = dist.get_rank()
    for kind, lists in list(found.items()):
        group = _megatron(state, f"get_{_MEGATRON[kind]}_group")
        mine = next((ranks for ranks in lists if own in ranks), None)
        if group is None or mine is None or sorted(dist.get_process_group_ranks(group)) != sorted(mine):
            del found[kind]
    return {kind: lists for kind, lists in found.items() if len(lists[0]) > 1}


def _megatron(state: Any, name: str) -> Any:
    try:
        return getattr(state, name)()
    except (AttributeError, AssertionError):
        return None
