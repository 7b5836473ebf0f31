"""Floating point operations of a model, counted from the shapes of its modules.

A weight of n elements costs a token 2n operations in the forward pass, 2n for the gradient of the weight and 2n for
that of its input, as far as these are wanted; of experts, only those that a token is sent to count. Attention costs a
token 2 (query width + value width) operations for each key, twice that backward, causal or not: the convention of
Chowdhery et al. 2022 (PaLM), appendix B. Norms, activations, embeddings and what lies outside matrices count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lens.hooks.routers import find_routers

_PROJECTIONS = ("o_proj", "wo", "out_proj", "c_proj", "dense", "proj", "to_out")
"""Names of the layer that attention ends with: it takes what is as wide as the values."""
_LAST = ("attention_out", "attn_out", "attention_output", "attn_output", "attn_proj", "attention_proj")
"""Names of that layer where it stands in a block, without a module around the attention."""
_QUERIES = ("q_proj", "query", "wq", "to_q")
"""Names of the layer that makes queries, for an attention that ends without one of its own."""
_NO_MATRIX = ("embed", "pos", "bias", "token")
"""Parts of the names of parameters with two dimensions that nothing is multiplied with."""


class UncountableError(Exception):
    """The operations of this model are not known, and the message says why."""


class Weights(NamedTuple):
    """The matrices of one module."""

    module: Any
    total: int
    """Elements."""
    met: float
    """Elements that one token meets: of experts, those of the chosen ones."""
    trained: bool
    """Whether their gradient is computed."""
    carries: bool
    """Whether the gradient of their input is: something before them is trained."""


class Attention(NamedTuple):
    """One attention."""

    module: Any
    width: int
    """Of queries and of values together, all heads."""
    window: int | None
    """Keys that a query sees at most."""
    carries: bool


class Model(NamedTuple):
    """What of a model costs operations."""

    weights: list[Weights]
    attentions: list[Attention]

    @property
    def parameters(self) -> tuple[int, float]:
        """Elements of its matrices: of all, and of those that one token meets."""
        return sum(part.total for part in self.weights), sum(part.met for part in self.weights)


class Calls(NamedTuple):
    """How often a module ran for each call of the model: in the forward pass, and once more in the backward pass."""

    forward: float = 1.0
    again: float = 0.0


class Work(NamedTuple):
    """Floating point operations."""

    model: float
    """Of the model itself, forward and backward."""
    again: float
    """Of what was computed once more, to save memory."""


def work(model: Model, batches: Mapping[tuple[int, int], int], calls: Mapping[int, Calls]) -> Work:
    """Operations of one step.

    Args:
        batches: (tokens, length of a sequence) -> calls of the model with so many.
        calls: identity of a module -> how often it ran; one that is missing ran once a call.
    """
    tokens = sum(count * number for (count, _), number in batches.items())
    own = again = 0.0
    for part in model.weights:
        once = 2.0 * part.met * tokens
        ran = calls.get(id(part.module), Calls())
        own += once * ran.forward * (1 + part.trained + part.carries)
        again += once * ran.again
    for attention in model.attentions:
        window = attention.window or math.inf
        once = 2.0 * attention.width * sum(n * min(keys, window) * times for (n, keys), times in batches.items())
        ran = calls.get(id(attention.module), Calls())
        own += once * ran.forward * (3 if attention.carries else 1)
        again += once * ran.again
    return Work(own, again)


def count(model: Any) -> Model:
    """What of this model costs operations.

    Raises:
        UncountableError: it has something whose cost its shape does not tell.
    """
    shares = _shares_of_experts(model)
    weights: list[Weights] = []
    attentions: list[Attention] = []
    learned = False  # whether something before is trained: modules stand in the order in which they run
    called: list[str] = []
    read: list[str] = []
    for name, module in model.named_modules():
        own = [parameter for parameter in vars(module)["_parameters"].values() if parameter is not None]
        width = None
        if _is_attention(name, module):
            called.append(name)
            width = _attention_width(name, module)
        if width is not None:
            read.append(name)
            carries = learned or any(parameter.requires_grad for parameter in module.parameters())
            attentions.append(Attention(module, width, _window(module), carries))
        matrices = list(_matrices(name, module, shares))
        if matrices:
            total = sum(map(_elements, matrices))
            trained = any(matrix.requires_grad for matrix in matrices)
            weights.append(Weights(module, total, total * shares.get(id(module), 1.0), trained, learned))
        learned = learned or any(parameter.requires_grad for parameter in own)
    for name in called:
        if not any(_belong_together(name, one) for one in read):
            raise UncountableError(f"the attention {name} is written in a way that is not known")
    if not weights:
        raise UncountableError("the model has no matrices")
    return Model(weights, attentions)


def _belong_together(name: str, other: str) -> bool:
    """Whether one of two modules lies inside the other, or both are layers of the same."""
    nested = f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")
    return nested or name.rpartition(".")[0] == other.rpartition(".")[0]


def _matrices(name: str, module: Any, shares: Mapping[int, float]) -> Iterator[Any]:
    """The parameters of a module that a token is multiplied with."""
    kind = type(module).__name__
    if "embedding" in kind.lower():
        return
    held = {
        key: one for key, one in vars(module)["_parameters"].items() if one is not None and len(_shape(one)) > 1
    }
    kernel = getattr(module, "kernel_size", None)
    if held and isinstance(kernel, tuple) and len(kernel) > 1:
        raise UncountableError(f"a convolution ({name}) costs more or less with the size of what it is given")
    deepest = max((len(_shape(parameter)) for parameter in held.values()), default=0)
    for key, parameter in held.items():
        if kind == "FlatParameter" or type(parameter).__name__ == "FlatParameter":
            raise UncountableError("FSDP1 keeps parameters flat: what is multiplied with what is not to be seen")
        if not parameter.dtype.is_floating_point:
            raise UncountableError(f"{name}.{key} is kept as {parameter.dtype}: quantised weights are not counted")
        # The experts of a layer in one parameter: what has a dimension less is their biases.
        if id(module) in shares and deepest > 2 and len(_shape(parameter)) < deepest:
            continue
        if not any(word in key.lower() for word in _NO_MATRIX):
            yield parameter


def _shares_of_experts(model: Any) -> dict[int, float]:
    """Identity of each module inside experts -> share of its elements that one token meets.

    A share is experts chosen by experts held: of experts spread over ranks each rank works, on average, for its own
    tokens as if it held all of them.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    shares: dict[int, float] = {}
    for router in find_routers(model, compiled_too=True):
        name = names[id(router.module)]
        held = _experts_near(name, modules)
        if not held:
            raise UncountableError(f"no experts were found beside the router {name}")
        if router.top_k is None:
            raise UncountableError(f"the router {name} does not say how many experts a token is sent to")
        for experts in held:
            share = router.top_k / _number_of(experts, names[id(experts)])
            shares |= {id(module): share for module in experts.modules() if module is not router.module}
    lost = [
        name
        for name, module in modules.items()
        if name.rpartition(".")[2] == "experts"
        and id(module) not in shares
        and any(True for _ in module.parameters())
    ]
    if lost:
        raise UncountableError(f"no router was found for {lost[0]}")
    return shares


def _experts_near(router: str, modules: Mapping[str, Any]) -> list[Any]:
    """Experts beside a router or beside the module around it; those that every token meets are not among them."""
    around = router
    for _ in range(2):
        around = around.rpartition(".")[0]
        found = [
            child
            for key, child in modules[around].named_children()
            if "expert" in key.lower() and "shared" not in key.lower() and _holds_experts(child)
        ]
        if found or not around:
            return found
    return []


def _holds_experts(module: Any) -> bool:
    """Whether a module is more than a norm before the experts or a gate behind them."""
    return any(True for _ in module.children()) or any(len(_shape(one)) > 2 for one in module.parameters())


def _number_of(experts: Any, name: str) -> int:
    """How many experts a module holds: its children, or the first dimension of its parameters."""
    import torch

    for module in experts.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            return len(module)
    sizes = {_shape(parameter)[0] for parameter in experts.parameters() if len(_shape(parameter)) > 2}
    if len(sizes) != 1:
        raise UncountableError(f"how many experts {name} holds is not to be seen from its parameters")
    return int(sizes.pop())


def _is_attention(name: str, module: Any) -> bool:
    """Whether a module is called one; what is called a linear one grows with the tokens and not with their pairs."""
    leaf = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    if not ("attention" in leaf or "attn" in leaf) or "linear_attn" in leaf:
        return False
    return any(len(_shape(parameter)) > 1 for parameter in module.parameters())


def _attention_width(name: str, module: Any) -> int | None:
    """Width of queries and values together, of an attention that has its projections, or of the last of them.

    The last speaks for an attention that is no module of its own: ``attention_out`` of a block, beside ``attention_in``.
    """
    weight = vars(module)["_parameters"].get("weight")
    if weight is not None and len(_shape(weight)) == 2:
        return 2 * _shape(weight)[1] if name.endswith(_LAST) else None
    embed = getattr(module, "embed_dim", None)
    if type(module).__name__ == "MultiheadAttention" and isinstance(embed, int):
        return 2 * embed
    children = dict(module.named_children())
    widths = [_shape(children[key].weight)[1] for key in _PROJECTIONS if hasattr(children.get(key), "weight")]
    widths += [_shape(children[key].weight)[0] for key in _QUERIES if hasattr(children.get(key), "weight")]
    if not widths:
        return None  # what is around an attention, or inside it
    values = widths[0]
    heads = _own_number(module, "num_heads", "num_attention_heads", "n_heads", "n_head")
    size = _own_number(module, "qk_head_dim", "head_dim")
    return int(values + (heads * size if heads and size else values))


def _own_number(module: Any, *names: str) -> int | None:
    config = vars(module).get("config")
    for name in names:
        for owner in (module, config):
            found = getattr(owner, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None


def _window(module: Any) -> int | None:
    """Keys that an attention sees at most, where the module says so."""
    found = getattr(module, "sliding_window", None)
    return found if isinstance(found, int) and found > 0 else None


def _shape(parameter: Any) -> tuple[int, ...]:
    """The whole shape of a parameter, also of one that is spread over ranks between its uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elements(parameter: Any) -> int:
    """Elements that this rank multiplies with: of a tensor-parallel one its own part."""
    mesh, whole = getattr(parameter, "device_mesh", None), math.prod(_shape(parameter))
    dims = getattr(mesh, "mesh_dim_names", None) or ()
    for dim, placement in zip(dims, getattr(parameter, "placements", ()), strict=False):
        if dim == "tp" and placement.is_shard() and mesh is not None:
            whole //= mesh[dim].size()
    return whole
