"""The one door for reads: dashboard, CLI, Python API, diagnosis and HTTP ask `Query`; nobody else knows the schema.

Every method first waits until what has been acknowledged can be read, so a reader always sees its own writes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lens.records import word
from lens.slots import NULL
from lens.store.charts import Charts, heatmap_binary, heatmap_json, unit_of
from lens.store.communication import communication_of
from lens.store.errors import BadQueryError, StoreBehindError, StoreError, UnknownStepError
from lens.store.export.exporter import Export, Wanted, export_of
from lens.store.export.kept import KeptExports
from lens.store.export.rows import Steps
from lens.store.folder import DataFolder
from lens.store.grids import Window
from lens.store.history import Histories
from lens.store.judgements import DIAGNOSIS, LEDGER, Evaluate, Judgements
from lens.store.now import now_of
from lens.store.prices import Prices
from lens.store.projects import those_of
from lens.store.readback import read_tables
from lens.store.relations import FROM_STEPS, OWN_TIME, PHASE_DURATION, Selection, has_own_time
from lens.store.runs import Run
from lens.store.sql.answer import reply_of
from lens.store.sql.guest import Guest, SqlAnswer
from lens.tables import SCHEMA, Tables

_GIVEN_UP = "lens.collector.dropped"
_MOST_SPANS = 5000
_OF_COLLECTIVE = ("group", "seq", "bytes", "phase")
_OF_ASYNC = ("t_wait_ns", "t_done_ns")
"""When its rank began to wait for it (absent: never), and when the transfer was over, if known."""
_NOW_PATIENCE_S = 1.0


class Query:
    """Reads of one data folder. Methods block; they are thread-safe, and raise:

    UnknownRunError: no run of that id. BadQueryError: a question that cannot be answered. StoreBehindError:
    acknowledged records have not reached the database in time.
    """

    def __init__(self, folder: DataFolder, evaluate: Evaluate | None = None, prices: Prices | None = None) -> None:
        self._folder, self._prices = folder, prices or Prices()
        self._charts = Charts(folder.store, folder.registry)
        self._judgements = Judgements(folder, evaluate or Histories().evaluate)
        self._exports = KeptExports()
        self._guest = Guest(folder.store, folder.registry, folder.limits.sql)

    @classmethod
    def open_folder(cls, path: Path | str, dsn: str | None = None) -> Query:
        """Reads of a folder that no server owns, its tables in it or at `dsn`; what a crash left in its log is put into the database first.

        Raises:
            FolderOwnedError: a server owns it; its `url` answers instead.
            StoreError: there is no such folder, or it cannot be opened.
        """
        path = Path(path)
        if not path.is_dir():
            raise StoreError(f"there is no data folder {path}", "name one with --data, or start: lens demo")
        query = cls(DataFolder(path, dsn=dsn))
        try:
            query._folder.settle()
        except StoreError:
            query.close()
            raise
        return query

    def close(self) -> None:
        """Give the folder back (only for a `Query` of `open_folder`)."""
        self._folder.close()

    def runs(self, project: str | None = None) -> list[dict[str, Any]]:
        """Every run, newest first: run, name, world_size, started_ns, last_step, last_t_ns, age_s, ranks_reporting,
        state (live, stale, ended), simulated, tags. Of one project alone if that is named."""
        return [self._summary(run) for run in those_of(self._folder.registry.runs(), project)]

    def run(self, run: str) -> dict[str, Any]:
        """One run: its summary and ranks, groups, experts, config, data_versions, device_hour_price, metrics, drops.

        Of drops, lost_slots were overwritten in a ring before an agent read them, given_up left a full or damaged spool
        before the store had them (None: no agent has said), and rejected are records that the store could not take.
        """
        known = self._settled(run)
        progress = self._folder.registry.progress(known.number)
        return {
            **self._summary(known),
            "ranks": known.described.get("ranks") or [],
            **{key: known.described.get(key) or {} for key in ("groups", "experts", "config", "data_versions")},
            "device_hour_price": self._prices.of(known.described.get("ranks") or []),
            "metrics": self._metrics(known),
            "drops": {
                "lost_slots": progress.lost_slots,
                "given_up": self._given_up(run),
                "rejected": progress.rejected,
            },
        }

    def _given_up(self, run: str) -> int | None:
        # A counter of each agent. Anybody can send a sample of its name, also one that is no number.
        told = [found["value"] for found in self.latest(run, _GIVEN_UP) if isinstance(found["value"], float)]
        return round(sum(told)) if told else None

    def now(self, run: str) -> dict[str, Any]:
        """The run's summary and what each rank is doing; see `now.now_of`. A busy database is not waited for long:
        the answer then is as old as `age_s` and the ranks' own say."""
        known = self._folder.registry.run(run)
        with contextlib.suppress(StoreBehindError):
            self._folder.settle(_NOW_PATIENCE_S)
        found = now_of(self._folder.store, self._folder.registry, known)
        return {**self._summary(known), **found}

    def described(self, run: str) -> dict[str, Any]:
        """The run as its senders described it: what `lens.diagnosis` takes."""
        return self._folder.registry.run(run).described

    def series(
        self, run: str, selection: Selection, window: Window | None = None, axis: str | None = None
    ) -> dict[str, Any]:
        """Envelope (min, max, mean, count) of a metric; see `charts.Charts.series`."""
        return self._charts.series(self._settled(run), selection, window or Window(), axis)

    def heatmap(
        self,
        run: str,
        selection: Selection,
        window: Window | None = None,
        rows: str = "rank",
        pool: str = "max",
    ) -> dict[str, Any]:
        """Map of a metric, rows × steps, pooled; absent is None. See `charts.Charts.heatmap`."""
        return heatmap_json(*self._charts.heatmap(self._settled(run), selection, window or Window(), rows, pool))

    def heatmap_bytes(
        self,
        run: str,
        selection: Selection,
        window: Window | None = None,
        rows: str = "rank",
        pool: str = "max",
    ) -> bytes:
        """The same as bytes; see `charts.heatmap_binary`."""
        return heatmap_binary(*self._charts.heatmap(self._settled(run), selection, window or Window(), rows, pool))

    def latest(self, run: str, *metrics: str) -> list[dict[str, Any]]:
        """Newest value of every series of some metrics: metric, rank, host, device, labels, t_ns, step, value."""
        known = self._settled(run)
        registry = self._folder.registry
        series = {each.mid: each for metric in metrics for each in registry.series(known.number, metric)}
        if not series:
            return []
        found = self._folder.store.query(
            f"SELECT mid, rank, t_ns, step, value FROM lens.latest FINAL WHERE run = {known.number} "
            f"AND mid IN ({', '.join(map(str, series))}) ORDER BY rank, mid"
        )
        return [
            {
                "metric": series[row["mid"]].metric,
                "rank": None if row["rank"] < 0 else row["rank"],
                "host": series[row["mid"]].host,
                "device": series[row["mid"]].device,
                "labels": json.loads(series[row["mid"]].labels or "{}"),
                "t_ns": row["t_ns"],
                "step": None if row["step"] == NULL else row["step"],
                "value": word(row["value"]),
            }
            for row in found.to_pylist()
        ]

    def newest(self, numbers: Sequence[int], most: int) -> list[tuple[int, int, int, float]]:
        """Run number, mid, rank (-1 for none) and newest value of every series of some runs, at most so many.

        Does not wait for what was acknowledged just now.
        """
        if not numbers:
            return []
        found = self._folder.store.query(
            f"SELECT run, mid, rank, value FROM lens.latest FINAL WHERE run IN ({', '.join(map(str, numbers))}) "
            f"ORDER BY run, mid, rank LIMIT {most}"
        )
        columns = (found.column(name).to_pylist() for name in ("run", "mid", "rank", "value"))
        return list(zip(*columns, strict=True))

    def step(self, run: str, step: int) -> dict[str, Any]:
        """Every rank's spans of one step: {step, ranks: [{rank, t0_ns, t1_ns, spans: […]}]}.

        Raises:
            UnknownStepError: no rank has recorded that step.
        """
        known = self._settled(run)
        if not -(2**63) < step < 2**63:
            raise BadQueryError(f"step {step} is out of range", "give a step of the run")
        tables = read_tables(
            self._folder.store, known.number, [], f"step = {step}", ("steps", "spans", "collectives")
        )
        ranks = _lanes(tables)
        if not ranks:
            raise UnknownStepError(
                f"no rank has recorded step {step}", f"the newest step is {self.runs_last_step(known)}"
            )
        return {"step": step, "ranks": ranks}

    def sql(self, sql: str, run: str | None = None, limit: int = 10_000, project: str | None = None) -> SqlAnswer:
        """The first `limit` rows of a user's SELECT over `sql.views.VIEWS`, of all runs, of one, or of a project's;
        see `Guest.ask`."""
        self._folder.settle()
        return self._guest.ask(sql, run, limit, project)

    def sql_reply(self, sql: str, run: str | None = None, limit: int = 10_000) -> dict[str, Any]:
        """The same as a JSON object; see `sql.answer.reply_of`."""
        return reply_of(self.sql(sql, run, limit))

    def export(self, run: str, wanted: Wanted) -> Export:
        """The run as a file for other tools; see `export.exporter.export_of`."""
        state = self.state_of(run)
        known = self._settled(run)
        if wanted.format != "arrow":
            return export_of(self._folder.store, self._folder.registry, known, wanted)
        key = known.number, wanted
        found = self._exports.get(key, state)
        if found is None:
            made = export_of(self._folder.store, self._folder.registry, known, wanted)
            # A batch that came while this is read may be in it or not.
            found = self._exports.keeping(key, lambda: state if self.state_of(run) == state else None, made)
        return found

    def exported(self, run: str, format: str, table: str, first: int | None, last: int | None) -> Iterator[bytes]:
        """The parts of that file."""
        return self.export(run, Wanted(format, table, Steps(first, last))).parts

    def communication(self, run: str, first: int | None = None, last: int | None = None) -> dict[str, Any]:
        """Who sends to whom and who waits for whom in steps [first, last]; see `communication.communication_of`."""
        return communication_of(self._folder.store, self._settled(run), first, last)

    def runs_last_step(self, run: Run) -> int | None:
        """Newest step that any rank of a run has finished."""
        return self._folder.registry.progress(run.number).last_step

    def tables(self, run: str, upto_step: int | None = None) -> tuple[dict[str, Any], Tables]:
        """The run as described, and its records as columns.

        With `upto_step` = N: records of steps up to N, and those without a step whose time is not after the latest
        end of a step up to N; everything if N is the last step or one that is not finished.
        """
        known = self._settled(run)
        series = self._folder.registry.series(known.number)
        tables = read_tables(self._folder.store, known.number, series)
        if upto_step is not None:
            from lens.diagnosis.select import Timeline, through

            tables = through(tables, Timeline.of(tables), upto_step)
        return known.described, tables

    def diagnosis(self, run: str, upto_step: int | None = None) -> dict[str, Any]:
        """The verdict: status, hypotheses with their evidence, coverage."""
        return self._judgements.of(run, upto_step, DIAGNOSIS)[0]

    def ledger(self, run: str, upto_step: int | None = None) -> dict[str, Any]:
        """Where the time of the run went: {from_step, to_step, wall_s, parts}."""
        return self._judgements.of(run, upto_step, LEDGER)[0]

    def verdict(self, run: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Diagnosis and ledger of everything known now, from one reading of the records."""
        diagnosis, ledger = self._judgements.of(run, None, DIAGNOSIS, LEDGER)
        return diagnosis, ledger

    def alerts(self, run: str) -> list[dict[str, Any]]:
        """The findings of the run: cause, ranks, severity, onset_step, detected_step, resolved_step."""
        best: dict[Any, dict[str, Any]] = {}
        for hypothesis in self.diagnosis(run)["hypotheses"]:
            best.setdefault(hypothesis["finding"], hypothesis)
        return [
            {
                **{key: each.get(key) for key in ("cause", "ranks", "severity", "onset_step", "detected_step")},
                "resolved_step": each.get("end_step"),
            }
            for each in best.values()
        ]

    def state_of(self, run: str) -> tuple[int, int, int]:
        """Numbers that change when a run's records do; see `Registry.state_of`."""
        return self._folder.registry.state_of(run)

    def _settled(self, run: str) -> Run:
        known = self._folder.registry.run(run)
        self._folder.settle()
        return known

    def _summary(self, run: Run) -> dict[str, Any]:
        progress = self._folder.registry.progress(run.number)
        with self._folder.registry.lock:
            return {
                "run": run.id,
                "name": run.described.get("name"),
                "world_size": run.world_size,
                "started_ns": run.described.get("started_ns") or progress.first_t_ns or run.created_ns,
                "last_step": progress.last_step,
                "last_t_ns": progress.last_t_ns,
                "age_s": progress.age_s(),
                "ranks_reporting": progress.ranks_reporting(),
                "state": progress.state(),
                "simulated": _is_simulated(run.described),
                "tags": run.described.get("tags") or [],
            }

    def _metrics(self, run: Run) -> list[dict[str, Any]]:
        from lens import catalogue

        names = {series.metric for series in self._folder.registry.series(run.number)}
        if self.runs_last_step(run) is not None:
            names |= {*FROM_STEPS, PHASE_DURATION}
            if has_own_time(self._folder.store, self._folder.registry, run.number):
                names.add(OWN_TIME)
        result = []
        for name in sorted(names):
            known = catalogue.get(name)
            result.append(
                {
                    "metric": name,
                    "unit": unit_of(name),
                    "kind": known.kind if known else None,
                    "help": known.help if known else None,
                    "more_is_worse": known.more_is_worse if known else None,
                }
            )
        return result


def _is_simulated(described: dict[str, Any]) -> bool:
    return bool(described.get("simulated")) or any(
        bool(rank.get("simulated")) for rank in described.get("ranks") or ()
    )


def _lanes(tables: Tables) -> list[dict[str, Any]]:
    """The spans of one step, rank by rank, in order of time."""
    lanes: dict[int, dict[str, Any]] = {}

    def lane(rank: int) -> dict[str, Any]:
        found = lanes.get(rank)
        if found is None:
            shown = None if rank < 0 else rank
            found = lanes[rank] = {"rank": shown, "t0_ns": None, "t1_ns": None, "spans": []}
        return found

    for row in _dicts(tables, "steps"):
        lane(row["rank"]).update(t0_ns=row["t0_ns"], t1_ns=row["t1_ns"])
    for row in _dicts(tables, "spans"):
        lane(row["rank"])["spans"].append({key: row[key] for key in ("kind", "name", "t0_ns", "t1_ns")})
    for row in _dicts(tables, "collectives"):
        span = {"kind": "collective", "name": row["op"], "t0_ns": row["t0_ns"], "t1_ns": row["t1_ns"]}
        extra = {key: row[key] for key in _OF_COLLECTIVE if row[key] is not None}
        if row["is_async"] == 1:
            extra |= {"async": True} | {key: row[key] for key in _OF_ASYNC if row[key] is not None}
        lane(row["rank"])["spans"].append({**span, **extra})
    for found in lanes.values():
        found["spans"] = sorted(found["spans"], key=lambda span: span["t0_ns"])[:_MOST_SPANS]
    return [lanes[rank] for rank in sorted(lanes)]


def _dicts(tables: Tables, name: str) -> list[dict[str, Any]]:
    """Rows of a table with absent numbers as None and text as text."""
    columns: dict[str, list[Any]] = {}
    for column, kind in SCHEMA[name].items():
        values = tables.table(name)[column]
        if kind == "s":
            columns[column] = tables.texts(values)
        elif kind == "i8":
            columns[column] = [None if value == NULL else value for value in values.tolist()]
        else:
            columns[column] = values.tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
