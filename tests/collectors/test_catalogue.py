from __future__ import annotations

import os

import pytest

from lens import catalogue
from lens.collectors import nvidia_sources
from lens.collectors.host import HostCollector
from lens.collectors.process import ProcessCollector, Target


def test_every_row_is_complete_and_names_are_valid() -> None:
    for metric in catalogue.METRICS.values():
        assert catalogue.is_valid_user_metric(metric.name), metric.name
        assert metric.unit
        assert metric.help
        assert metric.kind in ("gauge", "counter", "histogram", "vector")


def test_no_metric_stands_there_twice() -> None:
    rows = [row.split("|")[0] for text in catalogue._ROWS.values() for row in text.strip().splitlines()]
    assert len(rows) == len(set(rows)) == len(catalogue.METRICS)


def test_every_metric_that_a_collector_reads_is_in_the_catalogue() -> None:
    names = [row.metric for row in (*nvidia_sources.FIELDS, *nvidia_sources.GPM)]
    names += [name for call in nvidia_sources.CALLS for name in call.metrics]
    process = ProcessCollector(lambda: [Target(os.getpid(), 0)])
    for collector in (HostCollector(), process):
        for group in collector.groups():
            names += [reading.metric for _ in range(2) for reading in collector.read(group.name)]
    assert not {name for name in names if not catalogue.is_known(name)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hw.gpu.memory.usage", "lens_hw_gpu_memory_usage_bytes"),
        ("hw.gpu.utilization", "lens_hw_gpu_utilization_ratio"),
        ("hw.energy", "lens_hw_energy_joules_total"),
        ("gpu.throttle.thermal.time", "lens_gpu_throttle_thermal_time_seconds_total"),
        ("train.tokens", "lens_train_tokens_total"),
        ("lens.overhead.ratio", "lens_lens_overhead_ratio"),
    ],
)
def test_prometheus_names_carry_the_unit(name: str, expected: str) -> None:
    metric = catalogue.get(name)
    assert metric is not None
    assert catalogue.prometheus_name(metric) == expected


@pytest.mark.parametrize(("name", "valid"), [("my/metric-1", True), ("_x", True), ("1x", False), ("", False)])
def test_user_metrics_obey_the_rule(name: str, valid: bool) -> None:
    assert catalogue.is_valid_user_metric(name) is valid
    assert not catalogue.is_valid_user_metric("a" * 129)
    assert catalogue.get("no.such.metric") is None
