"""A metric as a record, and many of them in Prometheus' text format. `headway.server.metrics` says which there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from headway.server.client import EngineStats, ModelInfo
from headway.server.meter import Buckets, RequestMeter

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily | SummaryMetricFamily
Kind = Literal["counter", "gauge", "histogram", "summary"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is to report at one moment."""

    stats: EngineStats
    requests: RequestMeter
    info: ModelInfo
    name: str  # of the model, as clients call it
    num_open_calls: int


@dataclass(frozen=True, slots=True)
class Summary:
    count: int
    total: float


@dataclass(frozen=True, slots=True)
class Info:
    """The value 1, with what there is to say as labels."""

    labels: Mapping[str, str]


Value = float | Mapping[str, float] | Buckets | Summary | Info


@dataclass(frozen=True, slots=True)
class Metric:
    """One name.

    Attributes:
        name: as families are named: a counter's samples end in _total, a histogram's in _bucket, _count and _sum.
        read: its value; a mapping where a label tells several apart.
        label: the name of that label.
    """

    name: str
    kind: Kind
    help: str
    read: Callable[[Seen], Value]
    label: str = ""

    @property
    def sample(self) -> str:
        return self.name + ("_total" if self.kind == "counter" else "")

    def family(self, seen: Seen, common: Mapping[str, str]) -> Family:
        """With the labels in `common` on every sample."""
        names, values, found = list(common), list(common.values()), self.read(seen)
        if isinstance(found, Buckets):
            histogram = HistogramMetricFamily(self.name, self.help, labels=names)
            histogram.add_metric(values, _cumulative(found), found.total)
            return histogram
        if isinstance(found, Summary):
            summary = SummaryMetricFamily(self.name, self.help, labels=names)
            summary.add_metric(values, found.count, found.total)
            return summary
        if isinstance(found, Info):
            info = GaugeMetricFamily(self.name, self.help, labels=[*names, *found.labels])
            info.add_metric([*values, *found.labels.values()], 1)
            return info
        family_kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        if isinstance(found, Mapping):
            family = family_kind(self.name, self.help, labels=[*names, self.label])
            for label, value in found.items():
                family.add_metric([*values, label], value)
            return family
        family = family_kind(self.name, self.help, labels=names)
        family.add_metric(values, found)
        return family


def _cumulative(buckets: Buckets) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in buckets.bounds), "+Inf"]
    return list(zip(bounds, accumulate(buckets.counts), strict=True))


class _Families(Collector):
    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def exposition(groups: Iterable[tuple[Iterable[Metric], Mapping[str, str]]], seen: Seen) -> bytes:
    """Groups of metrics, each with labels that all its samples carry.

    From a registry of its own: other users of prometheus_client in this process do not show.
    """
    families = [metric.family(seen, common) for metrics, common in groups for metric in metrics]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry)
