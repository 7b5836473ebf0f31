"""The families of benchmarks/routers.py: how each is made small, and what its experts are given, seen at their own door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

LAYERS, EXPERTS, CHOSEN = 2, 8, 2
HIDDEN, HEADS, KV_HEADS, HEAD = 32, 4, 2, 8
ROWS, LENGTH = 2, 16

SMALL = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "num_experts_per_tok": CHOSEN,
}  # fmt: skip
LOCAL = {"num_local_experts": EXPERTS}
NUMBERED = {"num_experts": EXPERTS, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 0,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
          "num_key_value_heads": HEADS}  # fmt: skip

PLAIN_KV = LAYERS * 2 * KV_HEADS * HEAD
"""Numbers kept of each token: keys and values of every layer."""
ONE_LAYER_KV = 2 * KV_HEADS * HEAD
"""Where the other layer keeps a state instead."""
LATENT_KV = LAYERS * (16 + 8)
"""DeepSeek keeps the compressed latent vector and the rotary part of the key, as its paper says."""


class Family(NamedTuple):
    """How one is made, what it loses, and what it keeps of each token."""

    name: str
    make: Callable[[], Any]
    loss: Callable[[Any], Any]
    kv_elements: int | None
    """None where it does not generate."""


def of_transformers(
    name: str, stem: str, kv_elements: int | None = PLAIN_KV, config: str = "", **more: Any
) -> Family:
    """The class ``<stem>ForCausalLM`` with a small configuration."""

    def make() -> Any:
        import transformers

        given = {**SMALL, **more}
        made = getattr(transformers, config or f"{stem}Config")(**given)
        torch.manual_seed(0)
        model = getattr(transformers, f"{stem}ForCausalLM")(made)
        spread(model)
        return model.train()

    return Family(name, make, of_next_token, kv_elements)


def spread(model: nn.Module) -> None:
    """Weights that send tokens to many experts, which those of a fresh model need not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)


def of_next_token(model: Any) -> Any:
    """Loss of the next token, of random ones."""
    ids = torch.randint(3, 60, (ROWS, LENGTH))
    return model(input_ids=ids, labels=ids).loss


def of_squares(model: Any) -> Any:
    """Of models that take vectors."""
    return model(torch.randn(ROWS * LENGTH, HIDDEN)).pow(2).mean()


class Mixtures(nn.Module):
    """Layers of a router written as elsewhere and experts that are told which tokens are theirs."""

    def __init__(self, router: Callable[[], nn.Module], read: Callable[[Any], tuple[Any, Any]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture(router(), read) for _ in range(LAYERS))

    def forward(self, tokens: Any) -> Any:
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


class Mixture(nn.Module):
    """One layer."""

    def __init__(self, router: nn.Module, read: Callable[[Any], tuple[Any, Any]]) -> None:
        super().__init__()
        self.router = router
        self.experts = DenseExperts()
        self._read = read

    def forward(self, tokens: Any) -> Any:
        chosen, weights = self._read(self.router(tokens))
        return self.experts(tokens, chosen, weights)


class DenseExperts(nn.Module):
    """Experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, HIDDEN, HIDDEN))

    def forward(self, tokens: Any, chosen: Any, weights: Any) -> Any:
        shares = torch.zeros(len(tokens), EXPERTS).scatter(-1, chosen, weights)
        return torch.einsum("th,ehk,te->tk", tokens, self.weight, shares)


class TokenChoiceTopKRouter(nn.Module):
    """As torchtitan writes it: returns scores, indices and tokens per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.num_experts, self.top_k = EXPERTS, CHOSEN

    def forward(self, tokens: Any) -> Any:
        scores = torch.sigmoid(self.gate(tokens))
        weights, chosen = torch.topk(scores, self.top_k, dim=1)
        counts = torch.histc(chosen.view(-1).float(), bins=self.num_experts, min=0, max=self.num_experts)
        return weights, chosen, counts


def torchtitan_style() -> Any:
    """Its router, in layers of our own."""
    torch.manual_seed(0)
    model = Mixtures(TokenChoiceTopKRouter, lambda given: (given[1], given[0]))
    spread(model)
    return model


def megatron() -> Any:
    """Megatron-LM's own ``TopKRouter``, which returns probabilities and a map, in layers of our own."""
    from benchmarks.megatron_cpu import top_k_router

    torch.manual_seed(0)

    def read(given: Any) -> tuple[Any, Any]:
        probabilities, chosen = given
        indices = chosen.int().topk(CHOSEN, -1).indices
        return indices, probabilities.gather(-1, indices)

    model = Mixtures(lambda: top_k_router(HIDDEN, HEADS, EXPERTS, CHOSEN), read)
    spread(model)
    return model


FAMILIES: tuple[Family, ...] = (
    of_transformers("Mixtral", "Mixtral", **LOCAL),
    of_transformers("Qwen2-MoE", "Qwen2Moe", shared_expert_intermediate_size=24, **NUMBERED),
    of_transformers("Qwen3-MoE", "Qwen3Moe", head_dim=HEAD, **NUMBERED),
    of_transformers("DeepSeek-V2", "DeepseekV2", LATENT_KV, topk_method="group_limited_greedy",
                    **{**ROUTED, **LATENT}),
    of_transformers("DeepSeek-V3", "DeepseekV3", LATENT_KV, **{**ROUTED, **LATENT}),
    of_transformers("OLMoE", "Olmoe", num_experts=EXPERTS),
    of_transformers("GPT-OSS", "GptOss", head_dim=HEAD, sliding_window=64, **LOCAL),
    of_transformers("Granite-MoE", "GraniteMoe", **LOCAL),
    of_transformers("Phi-MoE", "Phimoe", **LOCAL),
    of_transformers("GLM-4-MoE", "Glm4Moe", head_dim=HEAD, **ROUTED),
    of_transformers("MiniMax", "MiniMax", ONE_LAYER_KV, layer_types=["full_attention", "linear_attention"],
                    head_dim=HEAD, block_size=16, **LOCAL),
    of_transformers("MiniMax-M2", "MiniMaxM2", head_dim=HEAD, **LOCAL),
    of_transformers("Ernie-4.5-MoE", "Ernie4_5_Moe", moe_k=CHOSEN, moe_num_experts=EXPERTS, moe_layer_start_index=0,
                    moe_num_shared_experts=1, moe_intermediate_size=24),
    of_transformers("HunYuan-MoE", "HunYuanMoEV1", num_experts=EXPERTS, moe_topk=CHOSEN, head_dim=HEAD),
    of_transformers("Dots", "Dots1", **ROUTED),
    of_transformers("Llama 4", "Llama4", config="Llama4TextConfig", intermediate_size_mlp=48, head_dim=HEAD,
                    attention_chunk_size=64, **LOCAL),
    of_transformers("Jamba", "Jamba", ONE_LAYER_KV, num_experts=EXPERTS, expert_layer_period=1, expert_layer_offset=0,
                    attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    of_transformers("Flex-OLMo", "FlexOlmo", num_experts=EXPERTS),
    Family("torchtitan's router", torchtitan_style, of_squares, None),
    Family("Megatron-LM's TopKRouter", megatron, of_squares, None),
)  # fmt: skip


@contextmanager
def given_to_experts(family: Family, model: Any) -> Iterator[list[list[Any]]]:
    """Tokens of each expert, of each layer and call, as the experts of the model are given them from now on."""
    doors = [module for module in model.modules() if _is_experts(module)]
    seen: list[list[Any]] = [[] for _ in doors]

    def note(calls: list[Any]) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            chosen = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
            if chosen is not None:
                calls.append(torch.bincount(chosen.flatten(), minlength=EXPERTS))
            else:  # Llama 4: all tokens for each expert, those of others as zeros
                calls.append((tensors[0].reshape(EXPERTS, -1, HIDDEN).abs().sum(-1) > 0).sum(-1))

        return hook

    handles = [
        door.register_forward_pre_hook(note(calls), with_kwargs=True)
        for door, calls in zip(doors, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(given: list[list[Any]]) -> list[list[float]]:
    """Tokens of each expert, of each layer, over all calls."""
    return [[float(number) for number in torch.stack(calls).sum(0)] if calls else [] for calls in given]


def _is_experts(module: Any) -> bool:
    return "Experts" in type(module).__name__ and any(each.dim() == 3 for each in module.parameters(recurse=False))
