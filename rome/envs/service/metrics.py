"""Prometheus metrics of the service, in a registry of its own.

Requests are labelled with the route's template, never with a path that a client made up, so the
number of series is bounded. What the manager counts is asked for at every scrape.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import prometheus_client
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE"}


class Metrics:
  """Counters of the service; `text` is what a scrape returns."""

  def __init__(self) -> None:
    self._registry = prometheus_client.CollectorRegistry()
    self._requests = prometheus_client.Counter(
      "rome_requests_total",
      "Requests by method, route and status.",
      ("method", "route", "status"),
      registry=self._registry,
    )
    self._seconds = prometheus_client.Histogram(
      "rome_request_seconds",
      "Seconds from a request's headers to the end of its answer.",
      ("method", "route"),
      registry=self._registry,
      buckets=_BUCKETS,
    )

  def request(self, method: str, route: str, status: int, seconds: float) -> None:
    """Counts one request that has ended; status 499 is a client that hung up."""
    method = method if method in _METHODS else "other"
    self._requests.labels(method, route, str(status)).inc()
    self._seconds.labels(method, route).observe(seconds)

  def watch(self, read: Callable[[], Mapping[str, float]]) -> None:
    """Adds gauges `rome_sandbox_NAME` that are read at every scrape."""
    self._registry.register(_Gauges(read))

  def text(self) -> bytes:
    """All metrics in the Prometheus text format. Calls what `watch` was given."""
    return prometheus_client.generate_latest(self._registry)


class _Gauges(Collector):
  def __init__(self, read: Callable[[], Mapping[str, float]]):
    self._read = read

  def describe(self) -> Iterator[GaugeMetricFamily]:
    return iter(())

  def collect(self) -> Iterator[GaugeMetricFamily]:
    for name, value in sorted(self._read().items()):
      plain = re.sub(r"[^a-z0-9_]", "_", name.lower())
      yield GaugeMetricFamily(f"rome_sandbox_{plain}", f"{name} of the sandbox manager", value)
