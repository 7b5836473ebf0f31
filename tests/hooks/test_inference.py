"""Requests of models that generate: what is recorded equals a count by hand, and what is generated is the same."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import lens
from lens.hooks import inference, later, requests
from lens.hooks.kv_cache import kv_bytes
from lens.slots import ROW, SPAN, VECTOR
from tests.hooks.ringside import Recorded

Watch = Callable[..., None]
Read = Callable[[], Recorded]
MS = 1_000_000
PREFILL_MS, DECODE_MS = 7, 2
BATCH, PROMPT, NEW, LAYERS, HEADS, SIZE, EXPERTS, CHOSEN = 2, 9, 5, 2, 2, 8, 4, 2


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = CHOSEN
        self.gate = nn.Linear(HEADS * SIZE, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HEADS * SIZE, HEADS * SIZE) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(CHOSEN, -1)
        shares = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, chosen, weights)
        return sum(expert(x) * shares[..., number, None] for number, expert in enumerate(self.experts))


class Generator(nn.Module):
    """Generates greedily and keeps keys and values, as (key, value) tensors a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, HEADS * SIZE)
        self.layers = nn.ModuleList(Mixture() for _ in range(LAYERS))
        self.head = nn.Linear(HEADS * SIZE, 64, bias=False)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> dict[str, Any]:
        x = self.embedding(input_ids)
        past = past_key_values or [None] * LAYERS
        kept = []
        for layer, held in zip(self.layers, past, strict=True):
            x = x + layer(x)
            states = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            kept.append(tuple(states if held is None else torch.cat([part, states], 2) for part in held or (0, 0)))
        return {"logits": self.head(x[:, -1:]), "past_key_values": kept}

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        given, cache = input_ids, None
        for _ in range(max_new_tokens):
            output = self(given, past_key_values=cache)
            cache, given = output["past_key_values"], output["logits"].argmax(-1)
            input_ids = torch.cat([input_ids, given], 1)
        return input_ids


def of_transformers(window: int | None) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, sliding_window=window,
        eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time that the hook reads: it goes on in forward passes only."""
    time = [1000 * MS]
    monkeypatch.setattr(requests, "_clock", lambda: time[0])
    return time


def takes_time(head: nn.Module, now: list[int]) -> None:
    """Let a prefill take 7 ms and a decode 2 ms."""
    passes = [0]

    def go_on(*_: Any) -> None:
        now[0] += MS * (DECODE_MS if passes[0] % NEW else PREFILL_MS)
        passes[0] += 1

    head.register_forward_hook(go_on)


def routed(gates: list[nn.Module]) -> list[list[torch.Tensor]]:
    """What each gate chooses at each call from now on."""
    seen: list[list[torch.Tensor]] = [[] for _ in gates]
    for gate, calls in zip(gates, seen, strict=True):

        def note(_: Any, __: Any, output: Any, calls: list[torch.Tensor] = calls) -> None:
            chosen = output.topk(CHOSEN, -1).indices if isinstance(output, torch.Tensor) else output[-1]
            calls.append(torch.bincount(chosen.flatten(), minlength=EXPERTS))

        gate.register_forward_hook(note)
    return seen


def spans(found: Recorded, kind: str) -> list[dict[str, Any]]:
    return [span for span in found.of(SPAN) if span["kind"] == kind]


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "written by hand": (Generator, PROMPT + NEW - 1),
    "transformers": (lambda: of_transformers(None), PROMPT + NEW - 1),
    "transformers, sliding window": (lambda: of_transformers(6), 5),  # the newest key is not among those kept
}


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def generating(request: pytest.FixtureRequest, now: list[int]) -> tuple[Any, int]:
    """A model that generates, and how many keys it keeps of each sequence."""
    make, kept = request.param
    if make is not Generator and importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    torch.manual_seed(0)
    model = make()
    takes_time(model.head if make is Generator else model.lm_head, now)
    return model, kept


def test_a_generation_is_recorded_as_counted_by_hand_and_is_the_same(
    generating: tuple[Any, int],
    watch: Watch,
    recorded: Read,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, kept = generating
    ids = torch.randint(3, 64, (BATCH, PROMPT))
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    plain = model.generate(ids, max_new_tokens=NEW)
    before, attributes = capfd.readouterr().err, set(vars(model))
    watch(model)
    seen = routed(gates)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), plain)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), plain)
    found = recorded()
    assert set(vars(model)) == attributes
    assert capfd.readouterr().err in ("", before)
    assert found.steps == []
    for metric, value in {
        "infer.request.ttft": PREFILL_MS / 1e3,
        "infer.request.tpot": DECODE_MS / 1e3,
        "infer.request.duration": (PREFILL_MS + (NEW - 1) * DECODE_MS) / 1e3,
        "infer.kv_cache.bytes": LAYERS * 2 * BATCH * HEADS * SIZE * kept * 4,
        "infer.batch.size": BATCH,
        "infer.requests.running": 0,
    }.items():
        assert [number for _, number in found.values(metric)] == pytest.approx([value, value]), metric
    assert [number for _, number in found.values("infer.tokens.prompt")] == [BATCH * PROMPT, 2 * BATCH * PROMPT]
    assert [number for _, number in found.values("infer.tokens.generated")] == [BATCH * NEW, 2 * BATCH * NEW]
    request = spans(found, "request")[0]
    assert (request["attrs"]["prompt_tokens"], request["attrs"]["output_tokens"]) == (BATCH * PROMPT, NEW)
    stages = [
        (span["name"], span["t1"] - span["t0"], span["attrs"]["passes"]) for span in spans(found, "inference")
    ]
    assert stages[:2] == [("prefill", PREFILL_MS * MS, 1), ("decode", (NEW - 1) * DECODE_MS * MS, NEW - 1)]
    tokens = {
        (vector["labels"], vector["layer"]): list(vector["values"])
        for vector in found.of(VECTOR)
        if vector["metric"] == "infer.expert.tokens"
    }
    for layer, calls in enumerate(seen):
        assert tokens['{"kind":"prefill"}', layer] == calls[0].tolist()
        assert tokens['{"kind":"decode"}', layer] == sum(calls[1:NEW]).tolist()


def test_a_server_written_by_hand_tells_its_requests(watch: Watch, recorded: Read, now: list[int]) -> None:
    watch()
    with lens.request("mine", prompt_tokens=30, batch=1, queue_s=0.25) as outer:
        now[0] += 40 * MS
        outer.token()
        with lens.request("mine", prompt_tokens=4) as inner:
            now[0] += 5 * MS
            inner.token()
        now[0] += 15 * MS
        outer.token(2)
        outer.preempted()
        outer.cache([(torch.zeros(1, 2, 30, 8), torch.zeros(1, 2, 30, 8, dtype=torch.float16))])
    found = recorded()
    assert [value for _, value in found.values("infer.request.ttft")] == pytest.approx([0.005, 0.040])
    assert [value for _, value in found.values("infer.request.tpot")] == pytest.approx([0.010])
    assert [value for _, value in found.values("infer.request.queue_time")] == [0.25]
    assert [value for _, value in found.values("infer.requests.running")] == [1, 0]
    assert [value for _, value in found.values("infer.kv_cache.bytes")] == [2 * 30 * 8 * (4 + 2)]
    assert spans(found, "request")[1]["attrs"]["queue_ns"] == 250 * MS
    assert [span["attrs"].get("preemptions") for span in spans(found, "request")] == [None, 1]
    assert [value for _, value in found.values("infer.preemptions")][-1] == 1


def static_layer(kept: Any, most: int, size: int) -> SimpleNamespace:
    states = torch.zeros(1, HEADS, most, size)
    return SimpleNamespace(keys=states, values=states, max_cache_len=most, get_seq_length=lambda: kept)


CACHES: dict[str, tuple[Any, list[float]]] = {
    "static, of two sizes": (
        SimpleNamespace(layers=[static_layer(torch.tensor(6), 24, SIZE), static_layer(30, 8, SIZE)]),
        [(6 + 8) / (24 + 8)],
    ),
    "of blocks": (SimpleNamespace(num_blocks=40, get_num_free_blocks=lambda: 30), [0.25]),
    "of sectors": (SimpleNamespace(compute_free_capacity=lambda: 0.125), [0.875]),
    "as large as it must be": ([(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))], []),
    "static, not used yet": (
        SimpleNamespace(layers=[SimpleNamespace(keys=None, values=None, max_cache_len=9)]), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("cache", "usage"), CACHES.values(), ids=list(CACHES))
def test_how_full_a_cache_is_is_told_where_its_size_is_fixed(
    cache: Any, usage: list[float], watch: Watch, recorded: Read
) -> None:
    watch()
    with lens.request("mine") as request:
        request.cache(cache)
    assert [value for _, value in recorded().values("infer.kv_cache.usage")] == pytest.approx(usage)


def test_a_count_on_a_device_is_read_when_it_has_arrived(
    watch: Watch, recorded: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[tuple[list[float], Callable[[list[float]], None]]] = []
    monkeypatch.setattr(requests, "is_on_device", lambda value: isinstance(value, torch.Tensor))
    monkeypatch.setattr(
        later.Later, "read", lambda _, tensors, use: waiting.append(([float(t) for t in tensors], use))
    )
    watch()
    with lens.request("mine") as request:
        count = torch.tensor(6)
        request.cache(SimpleNamespace(layers=[static_layer(2, 8, SIZE), static_layer(count, 24, SIZE)]))
    assert recorded().values("infer.kv_cache.usage") == []
    count += 100  # the cache goes on
    ((numbers, use),) = waiting
    use(numbers)
    assert [value for _, value in recorded().values("infer.kv_cache.usage")] == [(2 + 6) / (8 + 24)]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_a_static_cache_of_transformers_is_as_full_as_it_was_filled(
    implementation: str, watch: Watch, recorded: Read
) -> None:
    from transformers import DynamicCache, StaticCache

    torch.manual_seed(0)
    model, ids = of_transformers(None), torch.randint(3, 64, (BATCH, PROMPT))
    fixed = implementation == "static"
    cache = StaticCache(config=model.config, max_cache_len=32) if fixed else DynamicCache(config=model.config)
    watch(model)
    model.generate(ids, max_new_tokens=NEW, past_key_values=cache)
    usage = [value for _, value in recorded().values("infer.kv_cache.usage")]
    assert usage == ([(PROMPT + NEW - 1) / 32] if fixed else [])


def test_a_request_that_fails_is_not_recorded_and_its_exception_is_its_own(watch: Watch, recorded: Read) -> None:
    model, error = Generator(), KeyError("mine")

    def fail(*_: Any) -> None:
        raise error

    watch(model)
    timed = vars(model)["forward"]
    handle = model.head.register_forward_hook(fail)
    with pytest.raises(KeyError) as caught:
        model.generate(torch.ones(1, 3, dtype=torch.long), 2)
    assert caught.value is error
    assert vars(model)["forward"] is timed
    handle.remove()
    with pytest.raises(KeyError), lens.request():
        raise error
    model.generate(torch.ones(1, 3, dtype=torch.long), 2)
    found = recorded()
    assert len(spans(found, "request")) == 1
    assert [value for _, value in found.values("infer.requests.running")] == [0]


def test_an_error_of_the_hook_costs_the_record_and_nothing_else(
    watch: Watch, recorded: Read, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> int:
        raise RuntimeError("unheard of")

    torch.manual_seed(0)
    model, ids = Generator(), torch.ones(1, 3, dtype=torch.long)
    plain = model.generate(ids, 3)
    monkeypatch.setattr(requests, "kv_bytes", broken)
    watch(model)
    assert torch.equal(model.generate(ids, 3), plain)
    assert torch.equal(model.generate(ids, 3), plain)
    assert "requests are no longer recorded, training goes on" in capfd.readouterr().err
    assert set(vars(model)) - {"forward"} == set(vars(Generator()))
    assert spans(recorded(), "request") == []


def test_generating_between_training_steps_leaves_their_records_as_they_were(watch: Watch, recorded: Read) -> None:
    model = Generator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model, optimizer)
    for _ in range(2):
        model.generate(torch.ones(1, 3, dtype=torch.long), 3)
        model(torch.ones(2, 4, dtype=torch.long))["logits"].sum().backward()
        optimizer.step()
    found = recorded()
    assert [step["step"] for step in found.steps] == [0, 1]
    assert {phase["name"] for phase in found.phases} == {"forward", "backward", "optimizer", "eval"}
    assert [sum(vector["values"]) for vector in found.vectors] == [2 * 4 * CHOSEN] * 4
    assert len(spans(found, "request")) == 2


def test_a_forward_that_is_wrapped_while_generating_is_left_to_whoever_wrapped_it(
    watch: Watch, recorded: Read
) -> None:
    model, ids = Generator(), torch.ones(1, 3, dtype=torch.long)
    watch(model)
    calls = []

    def wrap(*_: Any) -> None:
        handle.remove()
        inner = model.forward

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        model.forward = wrapper  # type: ignore[method-assign]

    handle = model.embedding.register_forward_hook(wrap)
    for _ in range(3):
        model.generate(ids, 3)
    assert len(calls) == 2 + 3 + 3
    assert len(spans(recorded(), "request")) == 3


class Event:
    """An event of a device that has passed once `ready` is set."""

    made: ClassVar[list[Event]] = []
    ready = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = 10.0 * len(self.made)
        self.made.append(self)

    def query(self) -> bool:
        return Event.ready

    def elapsed_time(self, later: Event) -> float:
        return later.at - self.at


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device whose allocator has this peak, bytes."""
    bytes_ = [1000]
    Event.made, Event.ready = [], False
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(inference, "_on_device", lambda _: True)
    monkeypatch.setattr(
        torch.cuda, "memory_stats_as_nested_dict", lambda: {"allocated_bytes": {"all": {"peak": bytes_[0]}}}
    )
    return bytes_


@pytest.mark.usefixtures("peak")
def test_on_a_device_moments_are_compared_once_they_have_passed(watch: Watch, recorded: Read) -> None:
    model = Generator()
    watch(model)
    model.generate(torch.ones(1, 3, dtype=torch.long), 3)
    assert len(Event.made) == 4
    Event.ready = True
    found = recorded()
    assert [value for _, value in found.values("infer.request.ttft")] == pytest.approx([0.010])
    assert [value for _, value in found.values("infer.request.tpot")] == pytest.approx([0.010])


def test_the_peak_of_a_stage_is_told_where_it_is_more_than_ever_before(
    watch: Watch, recorded: Read, peak: list[int]
) -> None:
    model, rises = Generator(), {0: 500, 4: 70}  # the prefill of the first request, a decode of the second
    passes = [0]

    def allocate(*_: Any) -> None:
        peak[0] += rises.get(passes[0], 0)
        passes[0] += 1

    model.head.register_forward_hook(allocate)
    watch(model)
    for _ in range(2):
        model.generate(torch.ones(1, 3, dtype=torch.long), 3)
    Event.ready = True
    rows = [row["values"] for row in recorded().of(ROW)]
    told = {key: value for row in rows for key, value in row.items() if key.startswith("infer.memory.peak")}
    assert sorted(told.values()) == [1500, 1570]
    assert [
        sum(key.startswith("infer.memory.peak") for key in row) for row in rows if "infer.batch.size" in row
    ] == [1, 1]


class Guesses:
    """Drafts so many tokens at each call."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = iter(counts)

    def get_candidates(self, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.cat([ids, ids.new_ones(1, next(self._counts))], 1), None


class Drafting(Generator):
    """Generates as transformers does with an assistant; what it accepts is decided beforehand."""

    DRAFTED, ACCEPTED = (3, 3, 2), (2, 0, 1)

    def _get_candidate_generator(self) -> Guesses:
        return Guesses(list(self.DRAFTED))

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor) -> torch.Tensor:
        generator, ids, checked = self._get_candidate_generator(), input_ids, 0
        for accepted in self.ACCEPTED:
            candidates, _ = generator.get_candidates(ids)
            self(candidates[:, checked:])
            checked = ids.shape[1] + accepted
            ids = candidates[:, :checked]
            ids = torch.cat([ids, ids.new_ones(1, 1)], 1)
        return ids


def test_drafted_and_accepted_tokens_are_counted(watch: Watch, recorded: Read, now: list[int]) -> None:
    model, ids = Drafting(), torch.ones(1, PROMPT, dtype=torch.long)
    passes = [0]

    def go_on(*_: Any) -> None:
        now[0] += MS * (DECODE_MS if passes[0] else PREFILL_MS)
        passes[0] += 1

    model.head.register_forward_hook(go_on)
    plain, attributes = model.generate(ids), set(vars(model))
    passes[0] = 0
    watch(model)
    assert torch.equal(model.generate(ids), plain)
    found = recorded()
    assert set(vars(model)) == attributes
    drafted, accepted = sum(model.DRAFTED), sum(model.ACCEPTED)
    assert [value for _, value in found.values("infer.speculative.accepted")] == [accepted / drafted]
    (request,) = spans(found, "request")
    told = {key: request["attrs"][key] for key in ("drafted", "accepted", "prompt_tokens", "output_tokens")}
    assert told == {
        "drafted": drafted,
        "accepted": accepted,
        "prompt_tokens": PROMPT,
        "output_tokens": accepted + 3,
    }
    stages = [
        (span["name"], span["attrs"]["passes"], span["attrs"]["tokens"]) for span in spans(found, "inference")
    ]
    # A pass checks what was drafted, and the token that the pass before has added.
    assert stages == [("prefill", 1, PROMPT + 3), ("decode", 2, (1 + 3) + (1 + 2))]
    assert [value for _, value in found.values("infer.request.ttft")] == pytest.approx([PREFILL_MS / 1e3])
    between = 2 * DECODE_MS / 1e3 / (accepted + 3 - 1)
    assert [value for _, value in found.values("infer.request.tpot")] == pytest.approx([between])


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("how", ["assistant", "look-up"])
def test_drafts_of_transformers_are_counted_as_it_counts_them(
    how: str, watch: Watch, recorded: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation import candidate_generator

    torch.manual_seed(0)
    model, ids = of_transformers(None), torch.randint(3, 64, (1, PROMPT)).repeat(1, 2)
    more: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
        more = {"assistant_model": assistant}
    kind = (
        candidate_generator.PromptLookupCandidateGenerator
        if how == "look-up"
        else candidate_generator.AssistedCandidateGenerator
    )
    drafted, accepted = [], []
    propose, learn = kind.get_candidates, kind.update_candidate_strategy

    def proposed(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        found = propose(self, given, *args, **kwargs)
        drafted.append(found[0].shape[1] - given.shape[1])
        return found

    def learned(self: Any, ids: Any, scores: Any, matches: Any) -> Any:
        accepted.append(int(matches))
        return learn(self, ids, scores, matches)

    monkeypatch.setattr(kind, "get_candidates", proposed)
    monkeypatch.setattr(kind, "update_candidate_strategy", learned)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, **more)
    drafted.clear()
    accepted.clear()
    watch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **more), plain)
    (request,) = spans(recorded(), "request")
    assert sum(drafted) > 0
    assert (request["attrs"]["drafted"], request["attrs"]["accepted"]) == (sum(drafted), sum(accepted))
    assert request["attrs"]["prompt_tokens"] == ids.shape[1]
    assert request["attrs"]["output_tokens"] == sum(accepted) + len(accepted)


def test_what_is_kept_is_read_from_any_cache() -> None:
    quantised = SimpleNamespace(layers=[SimpleNamespace(_quantized_keys=None, keys=None, values=None)])
    assert kv_bytes(()) == 0
    assert kv_bytes(quantised) is None
    assert kv_bytes(object()) is None
