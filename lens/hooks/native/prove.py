"""Use a library that was just compiled as training would, in a process that may crash, before any training loads it.

python -m lens.hooks.native.prove NAME PATH
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lens.hooks.guard import Part
from lens.hooks.native.libraries import LIBRARIES
from lens.recorder import Recorder
from lens.ring_reader import RingReader
from lens.settings import Settings
from lens.slots import COLLECTIVE, iter_records


def prove_observer(observer: Any) -> None:
    """A blocking, an asynchronous and a functional collective of a world of one: bytes, order and what is undone."""
    import torch
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as functional

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    before = vars(dist.Work)["wait"]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load({}, rings=Path(folder) / "rings", ring_mib=1, host="proof")
        main = Recorder.create(settings, {}).path
        observer.install(str(main.parent), str(main))
        dist.Work.wait = observer.observed_wait(dist.Work, before)
        observer.tell_group(dist.group.WORLD.group_name, "world/0", (0,))
        ones = torch.ones(4)
        dist.all_reduce(ones)
        dist.all_reduce(torch.ones(5), async_op=True).wait()
        functional.wait_tensor(functional.all_reduce(torch.ones(6), "sum", dist.group.WORLD))
        dist.Work.wait = before
        observer.remove(True)
        dist.all_reduce(ones)
        (ring,) = main.parent.glob("native-*.ring")
        part = RingReader(ring).poll()
        records = [record for record in iter_records(part) if record["type"] == COLLECTIVE] if part else []
    dist.destroy_process_group()
    seen = [(record["name"], record["group"], record["bytes"], record["async"]) for record in records]
    expected = [("all_reduce", "world/0", size, waited) for size, waited in ((16, False), (20, True), (24, True))]
    if seen != expected or ones.tolist() != [1.0] * 4:
        raise SystemExit(f"recorded {seen}, not {expected}")


def prove_timeline(timeline: Any) -> None:
    """A step with a phase inside another: what the ring holds."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder.create(Settings.load({}, rings=Path(folder) / "rings", ring_mib=1, host="proof"), {})
        line = timeline.Timeline(recorder, Part("proof"))
        line.begin_step(7, 100, None, None)
        line.enter(line.phase_id("forward"), 1)
        line.enter(line.phase_id("h2d"))
        line.leave()
        line.leave()
        line.end_step()
        part = RingReader(recorder.path).poll()
        records = list(iter_records(part)) if part else []
        recorder.close()
    seen = [
        (record.get("name"), record["step"], record["micro_batch" if "name" in record else "tokens"])
        for record in records
    ]
    expected = [("forward", 7, 1), ("h2d", 7, None), ("forward", 7, 1), (None, 7, 100)]
    if seen != expected:
        raise SystemExit(f"recorded {seen}, not {expected}")


PROOFS: dict[str, Callable[[Any], None]] = {"observer": prove_observer, "timeline": prove_timeline}


def main(name: str, path: str) -> None:
    """Load the library and use it; ends with an error where it does not do what it should."""
    spec = importlib.util.spec_from_file_location(f"lens_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    # torch first: the library finds torch's symbols in what is loaded.
    importlib.import_module("torch") if LIBRARIES[name].torch else None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    PROOFS[name](module)


if __name__ == "__main__":
    main(*sys.argv[1:])
