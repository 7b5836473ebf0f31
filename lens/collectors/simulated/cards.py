"""The simulated cards of one host: made from ``H200:2``, put beneath their maker's collector, fed by the ranks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens.collectors.amd import AmdCollector
from lens.collectors.infiniband import InfinibandCollector
from lens.collectors.nvidia import NvidiaCollector
from lens.collectors.protocol import Collector
from lens.collectors.simulated import fake_amdsmi, fake_nvml
from lens.collectors.simulated.device import Faults, SimDevice
from lens.collectors.simulated.fake_sysfs import WAIT_TICK_S
from lens.collectors.simulated.network import SimulatedNetwork
from lens.collectors.simulated.profiles import load_profiles, named_profile
from lens.collectors.simulated.workload import RankWorkload

_STATE_STEP = 0.01
_LIBRARIES: Mapping[str, Callable[[Sequence[SimDevice]], fake_nvml.FakeNvml | fake_amdsmi.FakeAmdSmi]] = {
    "nvidia": fake_nvml.install,
    "amd": fake_amdsmi.install,
}
_COLLECTORS: Mapping[str, Callable[[str, bool], Collector]] = {"nvidia": NvidiaCollector, "amd": AmdCollector}


class SimulationError(ValueError):
    """What to simulate cannot be simulated; the message says what can."""


class SimulatedCards:
    """Cards of one host, named ``host/gpu0`` and so on.

    Args:
        text: card and count, such as ``H200:2`` or ``MI400:2``.
        host: the host's name.
        folder: where fault files are read and state files are written.

    Raises:
        SimulationError: no such card, or a count that is not one.
    """

    def __init__(self, text: str, host: str, folder: Path) -> None:
        name, _, count = text.partition(":")
        profile = named_profile(name)
        if profile is None or profile.vendor not in _LIBRARIES:
            names = ", ".join(card.name for card in load_profiles().values() if card.vendor in _LIBRARIES)
            raise SimulationError(f"cannot simulate {name!r}; cards: {names}, such as LENS_SIMULATE=H200:2")
        if count and not 0 < int(count if count.isdigit() else 0) <= 64:
            raise SimulationError(f"{count!r} is not a number of cards; use LENS_SIMULATE={profile.name}:2")
        self._host = host
        self._folder = folder
        self._vendor = profile.vendor
        self.cards: dict[str, SimDevice] = {}
        for index in range(int(count or 1)):
            device = f"{host}/gpu{index}"
            identity = uuid.uuid5(uuid.NAMESPACE_URL, f"lens:{device}")
            self.cards[device] = SimDevice(profile, f"GPU-{identity}", index)
        self._published: dict[str, float] = {}
        self.library = _LIBRARIES[profile.vendor](list(self.cards.values()))
        self._network = SimulatedNetwork(self.cards, folder)

    def collector(self) -> Collector:
        """The real collector of the cards' maker."""
        return _COLLECTORS[self._vendor](self._host, True)

    def network_collector(self) -> InfinibandCollector:
        """The real collector of network ports, over the tree of the simulated ones."""
        return InfinibandCollector(self._host, self._network.root, simulated=True, wait_tick_s=WAIT_TICK_S)

    def workload(self, about: Mapping[str, Any], local_ranks: Iterable[int]) -> RankWorkload | None:
        """Where a rank's slots go; None when it runs on none of these cards."""
        card = self.cards.get(str(about.get("device")))
        return RankWorkload(card, about, frozenset(local_ranks)) if card else None

    def advance(self, now_ns: int, memory: Mapping[str, list[tuple[int, int]]]) -> None:
        """Let time go on; `memory` holds (pid, bytes) of the processes on each card."""
        for name, card in self.cards.items():
            self._read_faults(name, card)
            card.use_memory(memory.get(name, []))
            card.advance(now_ns)
            self._publish(name, card)
        self._network.advance(now_ns)

    def _file(self, name: str, kind: str) -> Path:
        return self._folder / f"{name.replace('/', '_')}.{kind}.json"

    def _read_faults(self, name: str, card: SimDevice) -> None:
        try:
            faults = Faults.from_file(json.loads(self._file(name, "fault").read_text()))
        except FileNotFoundError:
            faults = Faults()
        except (OSError, ValueError, TypeError):
            # Seen half written: what was known stays until the next look.
            return
        if faults.xid is not None and faults.xid != card.faults.xid:
            self.library.report_xid(card.index, faults.xid)
        card.faults = faults

    def _publish(self, name: str, card: SimDevice) -> None:
        """Tell the trainer how fast its card is: the story holds from card to step time.

        Said again while it is slow: a state that grows old is nobody's, and the trainer passes it over.
        """
        factor = round(card.speed_factor / _STATE_STEP) * _STATE_STEP
        if factor == self._published.get(name, 1.0) == 1.0:
            return
        target = self._file(name, "state")
        partial = target.with_suffix(".new")
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_text(json.dumps({"speed_factor": factor}))
            partial.replace(target)
        except OSError:
            return
        self._published[name] = factor
