"""Prometheus metrics of one API process; a registry per application, so that none outlives it."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from api.admission import Admission

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ratchet_http_requests_total",
            "Requests by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "ratchet_http_request_seconds",
            "Seconds until a reply was complete.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.gateway_requests = Counter(
            "ratchet_gateway_requests_total",
            "Completions by assistant, version that answered and status; version is empty when none did.",
            ["assistant", "version", "status"],
            registry=self.registry,
        )
        self.gateway_first_byte_seconds = Histogram(
            "ratchet_gateway_first_byte_seconds",
            "Seconds until the engine's reply began.",
            ["assistant"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.gateway_seconds = Histogram(
            "ratchet_gateway_seconds",
            "Seconds until a completion was whole.",
            ["assistant"],
            buckets=_SECONDS,
            registry=self.registry,
        )

        self.traffic_requests = Counter(
            "ratchet_traffic_requests_total",
            "Requests of assistants with a canary or shadow; outcome is ok, error or dropped.",
            ["assistant", "role", "version", "outcome"],
            registry=self.registry,
        )
        self.traffic_first_byte_seconds = Histogram(
            "ratchet_traffic_first_byte_seconds",
            "Seconds until the engine's reply began, of requests that succeeded.",
            ["assistant", "role", "version"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.canary_rollbacks = Counter(
            "ratchet_canary_rollbacks_total",
            "Canaries that the gateway stopped, by what was worse.",
            ["assistant", "rule"],
            registry=self.registry,
        )

    def watch_admission(self, admission: Admission) -> None:
        under_way = Gauge(
            "ratchet_gateway_requests_under_way", "Completions that hold a place.", registry=self.registry
        )
        under_way.set_function(lambda: admission.under_way)
        waiting = Gauge(
            "ratchet_gateway_requests_waiting", "Completions that wait for a place.", registry=self.registry
        )
        waiting.set_function(lambda: admission.waiting)

    def watch_serving(self, serving: Callable[[], list[tuple[str, str, int]]]) -> None:
        """`serving` lists (assistant, alias, version number) as they answer at the time of a scrape."""
        self.registry.register(_ServingVersions(serving))


class _ServingVersions(Collector):
    def __init__(self, serving: Callable[[], list[tuple[str, str, int]]]) -> None:
        self._serving = serving

    def describe(self) -> list[GaugeMetricFamily]:
        return [self._family()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = self._family()
        for assistant, alias, number in self._serving():
            family.add_metric([assistant, alias, f"v{number}"], 1.0)
        yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            "ratchet_serving_version_info",
            "1 for the version that answers for an alias.",
            labels=["assistant", "alias", "version"],
        )
