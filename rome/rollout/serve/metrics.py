"""Prometheus metrics of the server: of its requests, and of the engine as of its latest step.

Latencies are those of the replies, as the event loop sees them: from when a request was handed to
the engine to its first tokens, and between tokens; a step that brings several counts as so many
equal intervals.
"""

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from rome.envs.service import metrics
from rome.rollout.engine import Stats, Update
from rome.rollout.serve.loop import Ticket

CONTENT_TYPE = metrics.CONTENT_TYPE
_FIRST = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_BETWEEN = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class ServeMetrics(metrics.Metrics):
  """`rome_requests_total` and `rome_request_seconds` of the guard, and those of the replies."""

  def __init__(self, stats: Callable[[], Stats]):
    super().__init__()
    self._first = prometheus_client.Histogram(
      "rome_serve_time_to_first_token_seconds",
      "Seconds from a request's entry into the engine to its first tokens.",
      registry=self._registry,
      buckets=_FIRST,
    )
    self._between = prometheus_client.Histogram(
      "rome_serve_inter_token_seconds",
      "Seconds between two tokens of a reply.",
      registry=self._registry,
      buckets=_BETWEEN,
    )
    self._finished = prometheus_client.Counter(
      "rome_serve_replies_total",
      "Replies by why they ended.",
      ("finish",),
      registry=self._registry,
    )
    self._registry.register(_EngineStats(stats))

  def update(self, now: float, ticket: Ticket, index: int, update: Update) -> None:
    """Counts one update of a reply that came `now`, in seconds of `time.monotonic`."""
    if update.tokens:
      last = ticket.last[index]
      if last is None:
        self._first.observe(now - ticket.started)
      else:
        for _ in update.tokens:
          self._between.observe((now - last) / len(update.tokens))
      ticket.last[index] = now
    if update.reply is not None:
      self._finished.labels(update.reply.finish).inc()


class _EngineStats(Collector):
  def __init__(self, read: Callable[[], Stats]):
    self._read = read

  def describe(self) -> Iterator[Metric]:
    return iter(())

  def collect(self) -> Iterator[Metric]:
    stats = self._read()
    for name, text, value in (
      ("sampled_tokens", "Tokens sampled.", stats.sampled_tokens),
      ("prefilled_tokens", "Tokens of contexts that were computed.", stats.prefilled_tokens),
      ("cached_tokens", "Tokens of contexts that were known.", stats.cached_tokens),
    ):
      yield CounterMetricFamily(f"rome_serve_{name}", text, value)
    context = stats.prefilled_tokens + stats.cached_tokens
    for name, text, gauge in (
      ("running", "Requests in a slot.", stats.running),
      ("waiting", "Requests in line.", stats.waiting),
      (
        "cached_share",
        "Share of context tokens that were known.",
        stats.cached_tokens / (context or 1),
      ),
      ("pages_used", "Pages of the cache that hold something.", stats.pages_used),
      ("pages_total", "Pages of the cache.", stats.pages_total),
      ("version", "Version of the newest weights.", stats.version),
    ):
      yield GaugeMetricFamily(f"rome_serve_{name}", text, gauge)
