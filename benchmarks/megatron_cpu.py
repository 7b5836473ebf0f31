"""Megatron-LM's core on a machine without a card: what of it runs there."""

from __future__ import annotations

import os
from typing import Any


def alone() -> None:
    """A world of one rank, and Megatron's parallel state of it; what asks for the card in use is told the processor."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: "cpu"  # the router moves its weight there
    if not moe_utils.HAVE_TE:
        moe_utils.te_general_gemm = None  # it is asked for by name where Transformer Engine is absent
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def top_k_router(hidden: int, heads: int, experts: int, chosen: int) -> Any:
    """One router of Megatron's own."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    alone()
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=heads, num_moe_experts=experts, moe_router_topk=chosen,
        moe_router_load_balancing_type="none", use_cpu_initialization=True, add_bias_linear=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp"])
    return TopKRouter(config, groups)
