"""Kinds of process groups (dp, tp, pp, ep ...) that the training itself has named: device meshes, Megatron."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lens.hooks.guard import Part

Lists = dict[str, list[list[int]]]


class _Kind(NamedTuple):
    """Where Megatron's parallel state has the group of this rank, and what generates the ranks of all of them."""

    getter: str
    dimensions: str
    of_experts: bool = False
    more: Mapping[str, bool] = MappingProxyType({})


_MEGATRON = {
    # Gradients are reduced over context parallel ranks too; without these the group has the same ranks.
    "dp": _Kind("get_data_parallel_group", "dp-cp", more=MappingProxyType({"with_context_parallel": True})),
    "tp": _Kind("get_tensor_model_parallel_group", "tp"),
    "pp": _Kind("get_pipeline_model_parallel_group", "pp"),
    "cp": _Kind("get_context_parallel_group", "cp"),
    "ep": _Kind("get_expert_model_parallel_group", "ep", True),
    "edp": _Kind("get_expert_data_parallel_group", "dp", True),
}
_SIZES = {
    False: {"tp": "tensor_model_parallel", "dp": "data_parallel", "pp": "pipeline_model_parallel",
            "cp": "context_parallel"},
    True: {"tp": "expert_tensor_parallel", "dp": "expert_data_parallel", "pp": "pipeline_model_parallel",
           "ep": "expert_model_parallel"},
}  # fmt: skip
"""Of the ranks as dense layers see them, and as experts do."""
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


def kind_of(group: Any) -> str | None:
    """What Megatron's parallel state calls this very group: it makes several of the same ranks."""
    state = _parallel_state()
    if state is None:
        return None
    return next((kind for kind, entry in _MEGATRON.items() if _megatron(state, entry) is group), None)


def kinds_by_identity() -> frozenset[str]:
    """Kinds that belong to one group alone, whatever others have its ranks."""
    return frozenset(_of_megatron())


def _of_megatron() -> Lists:
    """The groups that Megatron's parallel state has made, where its order of ranks is the usual one."""
    state = _parallel_state()
    if state is None:
        return {}
    import torch.distributed as dist

    own = dist.get_rank()
    found: Lists = {}
    for kind, entry in _MEGATRON.items():
        group, lists = _megatron(state, entry), _ranks(state, entry)
        mine = next((ranks for ranks in lists if own in ranks), None)
        if group is None or mine is None or sorted(dist.get_process_group_ranks(group)) != sorted(mine):
            continue
        if len(mine) > 1:
            found[kind] = lists
    return found


def _parallel_state() -> Any:
    state = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def _ranks(state: Any, entry: _Kind) -> list[list[int]]:
    try:
        sizes = {
            kind: getattr(state, f"get_{name}_world_size")() for kind, name in _SIZES[entry.of_experts].items()
        }
        generator = state.RankGenerator(**{"ep": 1, "cp": 1, **sizes}, order=_ORDER)
        return [list(ranks) for ranks in generator.get_ranks(entry.dimensions)]
    except (AttributeError, TypeError, ValueError, AssertionError, RuntimeError):
        return []  # of another release


def _megatron(state: Any, entry: _Kind) -> Any:
    try:
        return getattr(state, entry.getter)(**entry.more)
    except (AttributeError, TypeError, AssertionError):
        return None
