"""Operations of a model against a count by hand, and what is made of them: MFU, HFU, tokens a second."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lens
from lens.hooks import api, session
from lens.hooks import work as working
from lens.hooks.flops import UncountableError, count, work
from lens.hooks.peaks import dense_peak
from sample_runs.moe.model import ModelSize, MoeModel
from tests.hooks.ringside import Recorded

Watch = Callable[..., None]
Read = Callable[[], Recorded]
VOCABULARY, WIDTH, HIDDEN, EXPERTS, CHOSEN, LAYERS = 32, 16, 24, 4, 2, 2
BATCH, LENGTH = 3, 10
TOKENS = BATCH * LENGTH


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).mT
        return self.o_proj(scores.softmax(-1) @ self.v_proj(x))


class Mixture(nn.Module):
    """Sends each token to two of four experts, each computed on its own tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = CHOSEN
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(CHOSEN, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return out.reshape(x.shape)


class Block(nn.Module):
    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.feed = Mixture() if mixed else nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.feed(x)


class Transformer(nn.Module):
    def __init__(self, mixed: bool, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(mixed) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.recompute = recompute

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def by_hand(mixed: bool) -> tuple[int, int]:
    """Operations of one forward pass: of the blocks, and of the head."""
    attention = 4 * WIDTH * WIDTH + 2 * WIDTH * LENGTH
    feed = WIDTH * EXPERTS + CHOSEN * 2 * WIDTH * HIDDEN if mixed else 2 * WIDTH * HIDDEN
    return 2 * TOKENS * LAYERS * (attention + feed), 2 * TOKENS * WIDTH * VOCABULARY


@pytest.mark.parametrize("mixed", [False, True], ids=["dense", "mixture of experts"])
def test_a_transformer_is_counted_as_by_hand_and_as_torch_counts_what_it_runs(mixed: bool) -> None:
    model = Transformer(mixed)
    blocks, head = by_hand(mixed)
    counted = work(count(model), {(TOKENS, LENGTH): 1}, {})
    assert counted.model == 3 * (blocks + head)
    with FlopCounterMode(display=False) as seen:
        model(torch.randint(0, VOCABULARY, (BATCH, LENGTH))).sum().backward()
    assert seen.get_total_flops() == counted.model


def test_what_is_frozen_costs_no_gradient_of_its_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    model[1].requires_grad_(False)
    with FlopCounterMode(display=False) as seen:
        model(torch.ones(5, 4)).sum().backward()
    assert seen.get_total_flops() == work(count(model), {(5, 1): 1}, {}).model


def test_a_window_bounds_the_keys_of_a_query() -> None:
    free, bounded = SelfAttention(), SelfAttention()
    bounded.sliding_window = 4  # type: ignore[assignment]
    for length, keys in ((3, 3), (10, 4)):
        saved = (
            work(count(free), {(length, length): 1}, {}).model
            - work(count(bounded), {(length, length): 1}, {}).model
        )
        assert saved == 3 * 2 * 2 * WIDTH * length * (length - keys)


def _train(model: nn.Module, steps: int = 1) -> None:
    for _ in range(steps):
        with lens.step():
            model(torch.randint(0, VOCABULARY, (BATCH, LENGTH))).sum().backward()


def _told(found: Recorded) -> dict[str, Any]:
    (event,) = [event for event in found.events if event["kind"] == "train.flops"]
    return dict(event["attrs"])


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_recomputation_raises_hfu_and_not_mfu(
    native: bool, watch: Watch, recorded: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working.WorkDone, "_peak", lambda *_: 1e12)
    model = Transformer(mixed=True, recompute=True)
    watch(model, native=native)
    _train(model)
    found = recorded()
    blocks, head = by_hand(mixed=True)
    told = _told(found)
    assert (told["flops"], told["flops_hardware"]) == (3 * (blocks + head), 3 * (blocks + head) + blocks)
    ((step, mfu),), ((_, hfu),) = found.values("train.mfu"), found.values("train.hfu")
    seconds = (found.steps[0]["t1"] - found.steps[0]["t0"]) / 1e9
    assert (step, mfu) == (0, pytest.approx(3 * (blocks + head) / seconds / 1e12))
    assert hfu / mfu == pytest.approx(1 + blocks / (3 * (blocks + head)))
    assert found.values("train.tokens.rate") == [(0, pytest.approx(TOKENS / seconds))]
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_steps_between_two_measurements_meet_nothing(
    watch: Watch, recorded: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(mixed=False)
    plain = model.forward
    monkeypatch.setattr(session, "_COUNTERS_NS", 10**18)
    watch(model)
    _train(model, 2)  # the first second is over at once
    assert model.forward._original == plain
    assert all("forward" not in vars(module) for module in model.modules() if module is not model)
    _train(model)
    api._session.timeline.look_at = 0  # as if a second had passed
    _train(model, 3)
    assert [step for step, _ in recorded().values("train.flops.rate")] == [0, 1, 4]


def test_an_unknown_peak_leaves_mfu_out_and_says_so(watch: Watch, recorded: Read) -> None:
    model = Transformer(mixed=False)
    watch(model, card="NVIDIA H200")
    _train(model)
    found = recorded()
    assert found.values("train.mfu") == found.values("train.hfu") == []
    assert found.values("train.flops.rate")
    (event,) = [event for event in found.events if event["kind"] == "train.flops"]
    assert "train.mfu is absent: a processor has no dense peak" in event["text"]
    assert [value for _, value in found.values("lens.collector.supported")] == [0.0]


def test_peaks_are_those_of_the_profiles_by_number_format() -> None:
    assert dense_peak("NVIDIA H200", "bfloat16") == 989e12
    assert dense_peak("AMD Instinct MI300X OAM", "bfloat16") == 1307e12
    assert dense_peak("NVIDIA H200", "float32") is None
    assert dense_peak("NVIDIA GeForce RTX 4090", "bfloat16") is None


class Unrouted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4)])


def test_the_sample_model_is_counted_as_it_counts_itself() -> None:
    size = ModelSize()
    layout = SimpleNamespace(expert_parallel=2)
    model = MoeModel(size, SimpleNamespace(layout=layout, expert_position=0), 0)  # type: ignore[arg-type]
    routed = size.layers * size.tokens * size.top_k
    counted = work(count(model), {(size.tokens, size.sequence): 1}, {})
    assert counted.model == size.step_flops(routed)


REFUSED = {
    "a convolution": (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)), "convolution"),
    "experts without a router": (Unrouted(), "no router"),
    "nothing to multiply with": (nn.Sequential(nn.LayerNorm(4)), "no matrices"),
}


@pytest.mark.parametrize(("model", "because"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_counted_is_refused_with_the_reason(model: nn.Module, because: str) -> None:
    with pytest.raises(UncountableError, match=because):
        count(model)


def test_a_refused_model_trains_on_and_the_reason_is_recorded(watch: Watch, recorded: Read) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    watch(model)
    for _ in range(2):
        with lens.step():
            model(torch.ones(1, 3, 8, 8)).sum().backward()
    found = recorded()
    assert len(found.steps) == 2
    assert found.values("train.flops.rate") == []
    (event,) = [event for event in found.events if event["kind"] == "train.flops"]
    assert "convolution" in event["text"]


class Wrapped(nn.Module):
    """Takes what does not tell how many tokens it has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, rows: list[list[float]]) -> torch.Tensor:
        return self.inner(torch.tensor(rows))


@pytest.mark.parametrize("model", [Wrapped(), nn.Sequential(nn.Linear(4, 4))], ids=["untold tokens", "a detach"])
def test_no_module_keeps_a_stand_in_when_the_first_step_comes_to_nothing(
    model: nn.Module, watch: Watch, recorded: Read
) -> None:
    watch(model)
    with lens.step():
        model([[1.0] * 4] if isinstance(model, Wrapped) else torch.ones(1, 4)).sum().backward()
        if not isinstance(model, Wrapped):
            assert "forward" in vars(model[0])
            lens.detach()
    assert not any("forward" in vars(module) for module in model.modules() if module is not model)
    assert recorded().values("train.flops.rate") == []


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Qwen2Moe"])
def test_models_of_transformers_are_counted_as_torch_counts_what_they_run(family: str) -> None:
    import transformers

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    experts = {
        "Llama": {},
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "Qwen2Moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    }[family]
    config = getattr(transformers, f"{family}Config")(**sizes, **experts)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    counted = work(count(model), {(TOKENS, LENGTH): 1}, {})
    attention = 32 * 32 * 2 + 2 * 16 * 32 + 2 * 32 * LENGTH
    feed = {"Llama": 3 * 48 * 32, "Mixtral": 4 * 32 + 2 * 3 * 48 * 32}.get(
        family, 4 * 32 + 2 * 3 * 24 * 32 + 3 * 40 * 32 + 32
    )
    assert counted.model == 3 * 2 * TOKENS * (2 * (attention + feed) + 64 * 32)
    with FlopCounterMode(display=False) as seen:
        model(torch.randint(0, 64, (BATCH, LENGTH))).logits.sum().backward()
    # The rotary table is one small matrix product more.
    assert counted.model == pytest.approx(seen.get_total_flops(), rel=0.002)
