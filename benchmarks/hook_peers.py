"""What others cost a training step: scalars logged through a tracker, and TraceML around the step. See hook_overhead.py.

Each runs in the environment where it is installed, with torch from lens's own behind it:

    VENV/bin/python benchmarks/hook_peers.py SITE trackio|wandb|tensorboard STEPS    # one JSON object
    VENV/bin/traceml run benchmarks/hook_peers.py --args SITE traceml STEPS OUT      # writes it to OUT
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LOGGED = (30, 100)
"""Scalars of one step."""
BLOCK, LIMIT_S = 10, 300.0
Log = Callable[[dict[str, float], int], Any]
"""Takes values and their step."""


@contextlib.contextmanager
def trackio(folder: Path) -> Iterator[Log]:
    """Into its own local database."""
    os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    tracker = importlib.import_module("trackio")
    with contextlib.redirect_stdout(io.StringIO()):
        tracker.init(project="hook-overhead", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    yield lambda values, step: tracker.log(values)
    with contextlib.redirect_stdout(io.StringIO()):
        tracker.finish()


@contextlib.contextmanager
def wandb(folder: Path) -> Iterator[Log]:
    """Offline, system statistics off."""
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    tracker = importlib.import_module("wandb")
    settings = tracker.Settings(x_disable_stats=True, x_disable_meta=True, console="off")
    run = tracker.init(project="bench", mode="offline", dir=str(folder), settings=settings)
    yield lambda values, step: run.log(values, step=step)
    run.finish()


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[Log]:
    """Its own writer of event files, a call a scalar."""
    writer = importlib.import_module("tensorboard.summary").Writer(str(folder))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    yield log
    writer.close()


TRACKERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Log]]] = {
    "trackio": trackio,
    "wandb": wandb,
    "tensorboard": tensorboard,
}


def log_times(log: Log, steps: int) -> dict[str, float]:
    """Mean, middle and worst of one call with so many values, one a step of real work, µs."""
    from benchmarks.cadence import TrainingStep, clock

    step = TrainingStep(0.020, 0)
    batches, found = step.batches(), {}
    with step.noted():
        for count in LOGGED:
            values = {f"metric{number}": number / 7 for number in range(count)}
            spent: list[int] = []
            for number in range(steps):
                step.run(batches, False)
                began = clock()
                log(values, number if count == LOGGED[0] else steps + number)
                spent.append(clock() - began)
            kept = [took / 1000 for took in spent[2:]]
            found[f"log{count}_mean_us"] = statistics.fmean(kept)
            found[f"log{count}_median_us"] = statistics.median(kept)
            found[f"log{count}_p99_us"] = sorted(kept)[int(len(kept) * 0.99)]
    return found


def traceml(steps: int) -> dict[str, float]:
    """What TraceML adds to a step, measured as lens is: at the edges, and as the ratio of whole steps.

    It cannot be taken out again: steps without it come first, and those at the end of them tell the noise.
    """
    import torch

    from benchmarks.cadence import TrainingStep, added, clock

    torch.set_num_threads(1)
    tracer: Any = importlib.import_module("traceml_ai")
    step = TrainingStep(0.020, 0)

    def once(batches: Iterator[torch.Tensor], traced: bool) -> tuple[int, dict[str, list[int]]]:
        began = clock()
        with tracer.trace_step(step.network) if traced else contextlib.nullcontext():
            entered = clock()
            _, spent = step.run(batches, False)
            done = clock()
        ended = clock()
        # Without it there is nothing to enter: what a context manager of Python costs is its own.
        spent["trace_step"] = [entered - began, ended - done] if traced else [0, 0]
        return ended - began, spent

    def run(number: int, traced: bool) -> list[tuple[int, dict[str, list[int]]]]:
        batches = step.batches()
        return [once(batches, traced) for _ in range(number)]

    with step.noted(), step.noted_last():
        run(BLOCK, False)
        without = run(steps, False)
        tracer.init(mode="auto")
        run(BLOCK, True)
        with_it = run(steps, True)
    names = list(with_it[0][1])
    at_edges = added([spent for _, spent in with_it], [spent for _, spent in without], names)
    lengths = [
        statistics.median(took for took, _ in part)
        for part in (without[: steps // 2], without[steps // 2 :], with_it)
    ]
    return {
        "added_us_traceml": at_edges.typical,
        "added_p90_us_traceml": at_edges.p90,
        "step_ratio_traceml": lengths[2] / statistics.fmean(lengths[:2]),
        "step_ratio_aa_traceml": lengths[1] / lengths[0],
    }


def measured(python: str | None, name: str, steps: int) -> dict[str, Any]:
    """A tracker in the environment of this Python; {"absent": why} where it cannot be measured."""
    if python is None:
        return {"absent": "no environment of peers was given (--peers)"}
    command = [str(Path(python).absolute()), str(Path(__file__).resolve()), _site(), name, str(steps)]
    return _said(command, None)


def traceml_measured(command: Path | None, steps: int) -> dict[str, Any]:
    """TraceML under its own launcher; {"absent": why} where it cannot be measured."""
    if command is None:
        return {"absent": "its command was not given (--traceml)"}
    with tempfile.TemporaryDirectory(prefix="traceml-") as folder:
        out = Path(folder) / "out.json"
        run = [
            str(command.absolute()), "run", str(Path(__file__).resolve()), "--nproc-per-node", "1", "--logs-dir", folder,
            "--run-name", "run", "--args", _site(), "traceml", str(steps), str(out),
        ]  # fmt: skip
        return _said(run, out)


def _site() -> str:
    import torch

    return str(Path(torch.__file__).resolve().parents[1])


def _said(command: list[str], out: Path | None) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LENS_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"absent": str(error)[:200]}
    said = done.stdout if out is None else out.read_text() if out.exists() else ""
    if done.returncode or not said:
        return {"absent": ((done.stderr or done.stdout).strip() or "it failed").splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


def main(site: str, name: str, steps: str, out: str = "") -> None:
    """Measure one peer."""
    # Behind all else: what the peer brought itself goes first.
    sys.path.append(site)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    package = "traceml_ai" if name == "traceml" else name
    if importlib.util.find_spec(package) is None:
        raise SystemExit("not installed")
    version = importlib.metadata.version("traceml-ai" if name == "traceml" else name)
    if name == "traceml":
        said = json.dumps(traceml(int(steps)) | {"version": version})
        Path(out).write_text(said)
        return
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, TRACKERS[name](Path(folder)) as log:
        found = log_times(log, int(steps))
    print(json.dumps(found | {"version": version}))


if __name__ == "__main__":
    main(*sys.argv[1:])
