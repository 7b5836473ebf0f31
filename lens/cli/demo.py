"""A real mixture-of-experts training on this machine, seen live: trainer, agents, server and page at once.

Four ranks (expert parallel 2 × data parallel 2) play a host with two simulated NVIDIA cards and one with two AMD
cards; everything that is simulated says so. Ctrl-C ends every process. Faults are real effects, from a step on:

    lens demo --fault slow_compute@40:2     rank 2 computes slower, and its card clocks down as much
    lens demo --fault slow_loader@40:1      rank 1's data arrives late
    lens demo --fault nan@40:3              rank 3's loss is not a number, once
    lens demo --fault hot_expert@40:1       the experts of rank 1 and its replica get most of the tokens (dropless)
    lens demo --fault gc@40:2               rank 2's garbage collector works long and often
    lens demo --fault checkpoint@40:0       rank 0's checkpoints go to a slow disk; without :0 all ranks' do
    lens demo --fault leak@40:3             rank 3 keeps a part of each step's data in host memory
    lens demo --fault thermal@40:1          rank 1's card is too hot and clocks down; the rank computes as slowly
    lens demo --fault collapse@40           all routers send each token to the same experts
    lens demo --fault stop@40:2             rank 2's process is stopped for 3 s
    lens demo --fault quota@40:1            rank 1's control group halves its processor time (needs root)
    lens demo --fault hog@40:3              four other busy processes run on rank 3's core
    lens demo --fault worker_death@40:0     a worker of rank 0's loader is killed; killed@40:0 kills rank 0
    lens demo --fault skip@40:2             rank 2 leaves out one collective; shape@40:2 calls it with fewer numbers
    lens demo --fault stuck@40:1            rank 1 never comes out of its own code
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lens.cli.diagnose import describe
from lens.cli.errors import DONE, FAILED, INTERRUPTED, UNREACHABLE, UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, settings_of
from lens.cli.processes import start, stop, wait_until
from lens.cli.reader import ServerReader
from lens.cli.run import new_run_id
from lens.reading.connection import owner_of
from lens.ring_files import private_directory
from lens.settings import Settings, default_rings

HELP = "a real MoE training on this machine, live in a minute"
HOSTS = 2
RANKS_PER_HOST = 2
CARDS = "H200,MI400"
SERVER_PATIENCE_S = 60.0
DRAIN_PATIENCE_S = 60.0
VERDICT_PATIENCE_S = 60.0
SHIP_S = 0.25
LINGER_S = 3600.0
"""The demo ends its agents itself: ranks on a cold, busy machine load torch for longer than an agent would wait."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""A polite kill and a closed terminal end everything too, like Ctrl-C, which a shell's background job would ignore."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--fault",
        metavar="NAME@STEP:RANK",
        action="append",
        default=[],
        help="a real fault, several if given again; NAME@STEP:RANKxFACTOR sets how strong",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument(
        "--cards", default=CARDS, help="the simulated cards of the two hosts (default: %(default)s)"
    )
    parser.add_argument("--dropless", action="store_true", help="no capacity limit: no token is dropped")
    add_data(parser)
    parser.add_argument("--port", type=int, default=8321, help="port of the page, 0 takes a free one")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    parser.add_argument("--exit", action="store_true", help="stop everything when the training ends")


@dataclass
class _Demo:
    """The processes of one demo and the folders they may touch."""

    settings: Settings
    run: str
    rings: Path
    port: int
    quiet: bool
    server: subprocess.Popen[Any] | None = None
    trainer: subprocess.Popen[Any] | None = None
    agents: list[subprocess.Popen[Any]] | None = None
    url: str = ""

    @property
    def logs(self) -> Path:
        return self.settings.data / "logs" / self.run

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def environment(self, host: str | None = None) -> dict[str, str]:
        shared = {
            "LENS_RUN": self.run,
            "LENS_NAME": "demo",
            "LENS_DATA": str(self.settings.data),
            "LENS_RINGS": str(self.rings),
            "LENS_SHIP_S": str(SHIP_S),
            "LENS_AGENT": "0",
            # Toy steps on two cores, with the time that others take counted in: a real training keeps the default.
            "LENS_MAX_OVERHEAD_PCT": "20",
            "LENS_SERVER": self.url,
        }
        return shared | ({"LENS_HOST": host} if host else {})

    def start_server(self) -> None:
        data = self.settings.data
        data.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lens", "serve", "--data", str(data), "--port", str(self.port)]
        self.server = start(command, {}, self.logs / "server.log")
        if not wait_until(lambda: owner_of(data) is not None, SERVER_PATIENCE_S, self.server):
            raise CommandError(
                f"the server did not come up: {_last_line(self.logs / 'server.log')}",
                f"see {self.logs / 'server.log'}; another port: --port 0",
                UNREACHABLE,
            )
        self.url = str((owner_of(data) or {})["url"])

    def start_agents(self, cards: list[str]) -> None:
        self.agents = [
            start(
                [sys.executable, "-m", "lens", "agent", "--simulate", f"{card}:{RANKS_PER_HOST}"],
                {**self.environment(f"host{number}"), "LENS_AGENT_LINGER": str(LINGER_S)},
                self.logs / f"agent-host{number}.log",
            )
            for number, card in enumerate(cards)
        ]

    def start_trainer(self, arguments: argparse.Namespace) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(HOSTS * RANKS_PER_HOST),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            "-m", "sample_runs.moe", "--steps", str(arguments.steps), "--seed", str(arguments.seed),
            "--hosts", str(HOSTS), "--card", arguments.cards, "--out", str(self.settings.data / "demo" / self.run),
        ]  # fmt: skip
        for fault in arguments.fault:
            command += ["--fault", fault]
        if arguments.dropless:
            command.append("--dropless")
        # What torch leaves lying when it is stopped (sockets of DataLoader workers) goes with the rings.
        scratch = private_directory(self.rings) / "tmp"
        scratch.mkdir()
        environment = {
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch), **self.environment(),
        }  # fmt: skip
        self.trainer = start(
            command, environment, None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._relay, args=(self.trainer,), daemon=True).start()

    def _relay(self, trainer: subprocess.Popen[Any]) -> None:
        """The trainer's lines: all to a log, rank 0's progress to the terminal."""
        assert trainer.stdout is not None
        with (self.logs / "trainer.log").open("w") as log:
            for line in trainer.stdout:
                log.write(line)
                log.flush()
                if line.startswith("step"):
                    self.say(line.rstrip())

    def drained(self) -> bool:
        """Whether the agents have shipped and put away everything the ranks recorded."""
        return not any(path.parent.parent.name.startswith("host") for path in self.rings.rglob("about.json")
                       if '"role": "trainer"' in path.read_text())  # fmt: skip

    def has_recorded(self) -> bool:
        """Whether the rings of some rank have been put away."""
        return (self.settings.data / "rings" / self.run).exists()

    def stop(self) -> None:
        """End trainer, agents and server in this order, so that what was recorded arrives."""
        if self.trainer is not None:
            stop(self.trainer)
            with contextlib.suppress(OSError):
                wait_until(self.drained, DRAIN_PATIENCE_S)
        for agent in self.agents or []:
            with contextlib.suppress(ProcessLookupError):
                agent.send_signal(signal.SIGTERM)
        for agent in self.agents or []:
            stop(agent)
        if self.server is not None:
            stop(self.server, first=signal.SIGINT)
        shutil.rmtree(self.rings, ignore_errors=True)
        # The parent is shared with other runs of this user: it goes only when nobody else uses it.
        with contextlib.suppress(OSError):
            self.rings.parent.rmdir()


def run(arguments: argparse.Namespace) -> int:
    """Run the demo to its end."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise missing_extra(error, "all") from error
    settings = settings_of(arguments)
    owner = owner_of(settings.data)
    if owner:
        raise CommandError(
            f"a server already owns {settings.data}: {owner['url']}",
            "stop it, or name another folder with --data",
            UNREACHABLE,
        )
    if len(arguments.cards.split(",")) != HOSTS:
        raise CommandError(
            f"--cards {arguments.cards} does not name one card for each of {HOSTS} hosts",
            "--cards H200,MI400",
            UNUSABLE,
        )
    data = settings.data.resolve()
    rings = private_directory(default_rings()) / f"demo-{os.getpid()}"
    demo = _Demo(Settings.load(data=data), new_run_id(), rings, arguments.port, arguments.json)
    for number in ENDING:
        signal.signal(number, _interrupt)
    try:
        return _run(demo, arguments)
    except KeyboardInterrupt:
        # With its terminal gone there is nobody to tell.
        with contextlib.suppress(OSError):
            demo.say("\nstopping: trainer, agents, server")
        return INTERRUPTED
    finally:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        demo.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(demo: _Demo, arguments: argparse.Namespace) -> int:
    _build(demo)
    demo.say("starting the server …")
    demo.start_server()
    token = Settings.load(data=demo.settings.data).read_token()
    page = f"{demo.url}/run/{demo.run}"
    demo.start_agents(arguments.cards.split(","))
    demo.start_trainer(arguments)
    ready = f"{demo.url}/?token={token}"
    demo.say(f"page:  {ready}\nrun:   {demo.run}\nlogs:  {demo.logs}\nCtrl-C ends everything.\n")
    if not arguments.no_browser:
        webbrowser.open(ready)
    assert demo.trainer is not None
    code = demo.trainer.wait()
    reader = ServerReader(demo.url, token)
    wait_until(demo.drained, DRAIN_PATIENCE_S)
    if demo.has_recorded():
        # On a busy machine the last records take a while to arrive: a verdict before would call the end a silence.
        wait_until(lambda: _ended(reader, demo.run), DRAIN_PATIENCE_S)
    if code and demo.run not in [entry["run"] for entry in reader.runs()]:
        log = demo.logs / "trainer.log"
        raise CommandError(f"the training ended with exit code {code} before its first record", f"see {log}")
    reply = _verdict(reader, demo.run)
    if arguments.json:
        result = {"run": demo.run, "url": page, "trainer_exit_code": code, "diagnosis": reply}
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        print(f"\nthe training ended with exit code {code}\n\n{describe(reply)}", flush=True)
        if code:
            print(f"\nits last words are in {demo.logs / 'trainer.log'}", flush=True)
    if not arguments.exit:
        demo.say(f"\nthe page stays: {ready}\nCtrl-C ends everything.")
        while demo.server is not None and demo.server.poll() is None:
            time.sleep(0.5)
    return DONE if code == 0 else FAILED


def _ended(reader: ServerReader, run: str) -> bool:
    """Whether the server knows of the end of every rank."""
    try:
        return bool(reader.run(run)["state"] == "ended")
    except CommandError:
        return False


def _build(demo: _Demo) -> None:
    """Compile first what the hook can use: beside the training it would slow the very ranks that are shown."""
    from lens.hooks import native
    from lens.hooks.native.build import compiler

    if demo.settings.native and compiler() and not native.complete():
        demo.say("compiling what records in the training, once for this torch (about a minute) …")
        subprocess.run(
            [sys.executable, "-m", "lens.hooks.native.build"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def _verdict(reader: ServerReader, run: str) -> dict[str, Any]:
    """The verdict; a server that is still busy storing what came last is asked again."""
    end = time.monotonic() + VERDICT_PATIENCE_S
    while True:
        try:
            return reader.diagnosis(run)
        except CommandError as error:
            if error.code != UNREACHABLE or time.monotonic() > end:
                raise
            time.sleep(1)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it wrote nothing"
