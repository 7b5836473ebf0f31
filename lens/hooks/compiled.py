"""Tokens of experts inside compiled modules, where somebody asks for it (LENS_COMPILED_EXPERTS=1): counted by the graph.

One addition into a tensor becomes part of what is compiled: no graph break, no look from outside, and no number is read
before the step is over. It is put in place before anything was compiled, or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lens.hooks.guard import StandIn
from lens.hooks.routers import Router


class CompiledRouter(StandIn):
    """Stands in for the ``forward`` of a router inside a compiled module."""

    def __init__(self, router: Router, device: Any) -> None:
        import torch

        super().__init__(router.module, "forward")
        self.layer = router.layer
        self._experts = router.experts or 0
        self._top_k = router.top_k
        self.counts = torch.zeros(self._experts, dtype=torch.int64, device=device)
        self._training: Callable[[], bool] = torch.is_grad_enabled
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._original(*args, **kwargs)
        # Traced once with gradients and once without: an evaluation has a graph of its own, without the addition.
        if self._compiling() and self._training():
            chosen = _chosen(output, self._experts, self._top_k)
            if chosen is not None:
                chosen = chosen.reshape(-1)
                self.counts.scatter_add_(0, chosen, chosen.new_ones(chosen.shape))
        return output


def _chosen(output: Any, experts: int, top_k: int | None) -> Any:
    """The indices of the chosen experts, as int64; None where they cannot be known. Traced, so written plainly."""
    import torch

    several = output if isinstance(output, (tuple, list)) else (output,)
    for tensor in several:
        if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int64, torch.int32) and tensor.dim() > 1:
            return tensor.detach().long()
    for tensor in several:
        if top_k and isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == experts:
            return tensor.detach().topk(top_k, -1).indices
    return None


def nothing_compiled() -> bool:
    """Whether torch.compile has made no graph in this process yet."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return not counters or not counters["stats"]["unique_graphs"]
