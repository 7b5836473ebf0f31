"""OTLP metrics to samples, from protobuf or JSON.

A gauge or a cumulative sum is one sample a point. A histogram gives NAME.count, NAME.sum, NAME.min, NAME.max and, with
label ``le``, the cumulative NAME.bucket; a summary its quantiles. Delta sums are refused: they cannot be told from
values. A point that says it has no value is left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from lens.records import number
from lens.store.bridges import protobuf
from lens.store.bridges.samples import Gathered, named_run
from lens.store.errors import UndecodableError

JSON, PROTOBUF = "application/json", "application/x-protobuf"
_POINT = {2: ("startTimeUnixNano", "fixed64"), 3: ("timeUnixNano", "fixed64")}
_MESSAGES: dict[str, protobuf.Fields] = {
    "ExportMetricsServiceRequest": {1: ("resourceMetrics", "ResourceMetrics*")},
    "ResourceMetrics": {1: ("resource", "Resource"), 2: ("scopeMetrics", "ScopeMetrics*")},
    "Resource": {1: ("attributes", "KeyValue*")},
    "ScopeMetrics": {2: ("metrics", "Metric*")},
    "Metric": {
        1: ("name", "string"), 5: ("gauge", "Numbers"), 7: ("sum", "Sum"), 9: ("histogram", "Histogram"),
        10: ("exponentialHistogram", "ExponentialHistogram"), 11: ("summary", "Summary"),
    },
    "Numbers": {1: ("dataPoints", "NumberPoint*")},
    "Sum": {1: ("dataPoints", "NumberPoint*"), 2: ("aggregationTemporality", "int"), 3: ("isMonotonic", "bool")},
    "Histogram": {1: ("dataPoints", "HistogramPoint*"), 2: ("aggregationTemporality", "int")},
    "ExponentialHistogram": {1: ("dataPoints", "ExponentialPoint*"), 2: ("aggregationTemporality", "int")},
    "Summary": {1: ("dataPoints", "SummaryPoint*")},
    "NumberPoint": {
        **_POINT, 7: ("attributes", "KeyValue*"), 4: ("asDouble", "double"), 6: ("asInt", "sfixed64"), 8: ("flags", "uint"),
    },
    "HistogramPoint": {
        **_POINT, 9: ("attributes", "KeyValue*"), 4: ("count", "fixed64"), 5: ("sum", "double"),
        6: ("bucketCounts", "fixed64*"), 7: ("explicitBounds", "double*"), 10: ("flags", "uint"), 11: ("min", "double"),
        12: ("max", "double"),
    },
    "ExponentialPoint": {
        **_POINT, 1: ("attributes", "KeyValue*"), 4: ("count", "fixed64"), 5: ("sum", "double"), 10: ("flags", "uint"),
        12: ("min", "double"), 13: ("max", "double"),
    },
    "SummaryPoint": {
        **_POINT, 7: ("attributes", "KeyValue*"), 4: ("count", "fixed64"), 5: ("sum", "double"),
        6: ("quantileValues", "Quantile*"), 8: ("flags", "uint"),
    },
    "Quantile": {1: ("quantile", "double"), 2: ("value", "double")},
    "KeyValue": {1: ("key", "string"), 2: ("value", "AnyValue")},
    "AnyValue": {
        1: ("stringValue", "string"), 2: ("boolValue", "bool"), 3: ("intValue", "int"), 4: ("doubleValue", "double"),
        5: ("arrayValue", "ArrayValue"), 6: ("kvlistValue", "KeyValueList"), 7: ("bytesValue", "bytes"),
    },
    "ArrayValue": {1: ("values", "AnyValue*")},
    "KeyValueList": {1: ("values", "KeyValue*")},
}  # fmt: skip
_CUMULATIVE = (2, "AGGREGATION_TEMPORALITY_CUMULATIVE", "2")
_NO_VALUE = 1
_ABOUT_THE_SENDER = "telemetry.sdk."
"""Attributes of every point that say nothing of what was measured."""
_HINT = "send cumulative sums: OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=cumulative"
_Values = Iterator[tuple[str, Any, dict[str, str]]]
"""Suffix of the name, value, further attributes."""


def gather(body: bytes, content_type: str, run: str | None) -> Gathered:
    """The samples of an export request; `run` is where those go that name none.

    Raises:
        UndecodableError: the body is no export request.
    """
    request = _request(body, content_type)
    gathered = Gathered()
    for resource in _objects(request, "resourceMetrics"):
        shared = _attributes(_object(resource, "resource"))
        into = named_run(shared, run, (shared.pop("service.name", None),))
        for scope in _objects(resource, "scopeMetrics"):
            for metric in _objects(scope, "metrics"):
                _metric(metric, shared, into, gathered)
    return gathered


def reply(gathered: Gathered, content_type: str) -> bytes:
    """The export response, in the form that was asked in."""
    if content_type == JSON:
        said = {"rejectedDataPoints": str(gathered.refused), "errorMessage": gathered.reason}
        return msgspec.json.encode({"partialSuccess": said} if gathered.refused else {})
    if not gathered.refused:
        return b""
    text = gathered.reason.encode()
    inner = b"\x08" + _encoded(gathered.refused) + b"\x12" + _encoded(len(text)) + text
    return b"\x0a" + _encoded(len(inner)) + inner


def _request(body: bytes, content_type: str) -> dict[str, Any]:
    if content_type == PROTOBUF:
        return protobuf.read(body, "ExportMetricsServiceRequest", _MESSAGES)
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableError(f"the body is not JSON: {error}", "send OTLP/JSON or protobuf") from error
    if not isinstance(found, dict):
        raise UndecodableError("the body is no export request", 'send {"resourceMetrics": […]}')
    return found


def _metric(metric: dict[str, Any], shared: dict[str, str], run: str, gathered: Gathered) -> None:
    name = metric.get("name")
    if not isinstance(name, str) or not name:
        gathered.refuse("a metric without a name")
        return
    for kind, values_of in _KINDS.items():
        if kind not in metric:
            continue
        data = _object(metric, kind)
        points = _objects(data, "dataPoints")
        if kind not in ("gauge", "summary") and data.get("aggregationTemporality") not in _CUMULATIVE:
            gathered.refuse(f"{name[:80]}: delta temporality is not taken; {_HINT}", len(points))
            continue
        for point in points:
            try:
                _point(name, point, values_of, shared, run, gathered)
            except (ValueError, TypeError, OverflowError) as error:
                gathered.refuse(f"{name[:80]}: {error}"[:200])


def _point(
    name: str,
    point: dict[str, Any],
    values_of: Callable[[dict[str, Any]], _Values],
    shared: dict[str, str],
    run: str,
    gathered: Gathered,
) -> None:
    if int(point.get("flags") or 0) & _NO_VALUE:
        return
    t_ns = int(point.get("timeUnixNano") or 0)
    if not 0 < t_ns < 2**63:
        raise ValueError("timeUnixNano: missing")
    own = {**shared, **_attributes(point)}
    into = named_run(own, run, ())
    for suffix, value, more in [(s, number(v), m) for s, v, m in values_of(point)]:
        gathered.add(into, name + suffix, t_ns, value, {**own, **more})


def _number(point: dict[str, Any]) -> _Values:
    value = point.get("asDouble")
    if value is None:
        # JSON spells 64-bit whole numbers as text.
        value = int(point["asInt"]) if point.get("asInt") is not None else None
    if value is None:
        raise ValueError("neither asDouble nor asInt")
    yield "", value, {}


def _totals(point: dict[str, Any]) -> _Values:
    for key in ("count", "sum", "min", "max"):
        if point.get(key) is not None:
            yield f".{key}", int(point[key]) if key == "count" else point[key], {}


def _histogram(point: dict[str, Any]) -> _Values:
    yield from _totals(point)
    counts = [int(each) for each in point.get("bucketCounts") or ()]
    bounds = [format(number(each), "g") for each in point.get("explicitBounds") or ()]
    if counts and len(counts) != len(bounds) + 1:
        raise ValueError("bucketCounts and explicitBounds do not fit")
    for total, bound in zip(itertools.accumulate(counts), [*bounds, "+Inf"], strict=False):
        yield ".bucket", total, {"le": bound}


def _summary(point: dict[str, Any]) -> _Values:
    yield from _totals(point)
    for each in _objects(point, "quantileValues"):
        yield "", each.get("value", 0.0), {"quantile": format(number(each.get("quantile", 0.0)), "g")}


_KINDS: dict[str, Callable[[dict[str, Any]], _Values]] = {
    "gauge": _number, "sum": _number, "histogram": _histogram, "exponentialHistogram": _totals, "summary": _summary,
}  # fmt: skip


def _attributes(holder: dict[str, Any]) -> dict[str, str]:
    found = {}
    for each in _objects(holder, "attributes"):
        if isinstance(each.get("key"), str) and not each["key"].startswith(_ABOUT_THE_SENDER):
            text = _text(each.get("value"))
            if text is not None:
                found[each["key"]] = text
    return found


def _text(value: Any) -> str | None:
    """An AnyValue as a label."""
    if not isinstance(value, dict) or not value:
        return None
    kind, inner = next(iter(value.items()))
    if kind == "stringValue":
        return str(inner)
    if kind in ("boolValue", "intValue", "doubleValue"):
        return str(inner).lower() if isinstance(inner, bool) else str(inner)
    if kind == "bytesValue" and isinstance(inner, bytes):
        return inner.hex()
    return json.dumps(inner, default=str)


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    found = holder.get(key)
    return found if isinstance(found, dict) else {}


def _objects(holder: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = holder.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _encoded(value: int) -> bytes:
    """A varint."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
