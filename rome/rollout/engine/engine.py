"""Continuous batching: requests join and leave S fixed slots at any step.

A step of the engine admits waiting requests while there are slots and pages, computes a bounded
number of context tokens for the rows that lack some, and advances all others by a few sampled
tokens. Every device call has one of a few constant shapes, so nothing recompiles after the first
requests.

Keys and values are shared through `rome.rollout.engine.prefixes`: across the samples of a group,
the turns of an episode, and branches from any token. Rows that wait for a prefix which another row
is computing take it over when it is there. Pages for a request's longest possible reply are taken
when it is admitted, so that a request which runs can always end.

Choice: a request runs to its end under the weights it began with, while new ones start under newer
weights beside it, or is begun anew; no reply mixes versions.

The engine is not thread-safe and does nothing between calls of `step`. Left out: speculative
decoding, grammars, models on a mesh, keeping evicted pages in slower memory.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from rome import models
from rome.models import lora
from rome.rollout.engine import decode as decode_lib
from rome.rollout.engine.backend import Backend, Job
from rome.rollout.engine.choice import check_params, choose
from rome.rollout.engine.line import Line
from rome.rollout.engine.prefixes import PAGE, Prefixes
from rome.rollout.engine.request import MAX_STOP_TOKENS, Reply, Request, Update, check
from rome.rollout.engine.rows import Row, Waiting
from rome.rollout.engine.text import TextStream
from rome.text import Tokenizer

Decoding = tuple[dict[int, Row], decode_lib.Decoded]  # rows by slot, and what is computed for them


_merge = jax.jit(lora.merge_lora)


@dataclasses.dataclass
class Stats:
  """Counters since the engine was made, and where it stands.

  Attributes:
    sampled_tokens, prefilled_tokens: computed; a context's last token is in neither.
    cached_tokens: of contexts, taken over from the prefix tree.
    running, waiting: requests.
    pages_used, pages_total: pages that hold something, of how many.
    version: of the newest weights.
  """

  sampled_tokens: int = 0
  prefilled_tokens: int = 0
  cached_tokens: int = 0
  running: int = 0
  waiting: int = 0
  pages_used: int = 0
  pages_total: int = 0
  version: int = -1


class Engine:
  """Generates replies in `slots` rows at once.

  Args:
    config: the model's sizes.
    slots: requests that run at once.
    max_length: tokens that a context and its reply may have together.
    tokenizer: where requests ask for text or name stop strings.
    stop_tokens: ids that end a reply unless its request names its own.
    numerics: "fast", or "exact" (see `rome.rollout.engine.exact`).
    backend: "native" (CPUs), "xla" (any device), "auto" (native where it can serve); fast only.
    compute: how the model is computed; None is the backend's own choice.
    cache_tokens: memory for keys and values, in tokens; None is twice what the slots can need.
    steps: sampled tokens a device call.
    prefill_tokens: context tokens a step computes at most, at least a page.
    max_waiting: requests that may wait for a slot.
  Raises:
    ValueError: a setting cannot be served; the message names it.
  """

  def __init__(
    self,
    config: models.ModelConfig,
    *,
    slots: int,
    max_length: int,
    tokenizer: Tokenizer | None = None,
    stop_tokens: Sequence[int] = (),
    numerics: str = "fast",
    backend: str = "auto",
    compute: models.Compute | None = None,
    cache_tokens: int | None = None,
    steps: int = 8,
    prefill_tokens: int = 512,
    max_waiting: int = 4096,
  ):
    for name, value in (
      ("slots", slots),
      ("steps", steps),
      ("max_waiting", max_waiting),
    ):
      if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if prefill_tokens < PAGE:
      raise ValueError(f"prefill_tokens must be at least {PAGE}, got {prefill_tokens}")
    if max_length < 2:
      raise ValueError(f"max_length must be at least 2, got {max_length}")
    if len(stop_tokens) > MAX_STOP_TOKENS or not all(
      0 <= t < config.vocab_size for t in stop_tokens
    ):
      raise ValueError(
        f"stop_tokens must be at most {MAX_STOP_TOKENS} ids of a vocabulary of "
        f"{config.vocab_size}, got {list(stop_tokens)}"
      )
    self.config, self.slots, self.max_length = config, slots, max_length
    self._tokenizer, self._stop = tokenizer, tuple(stop_tokens)
    self._choice = (numerics, backend, compute)
    self._steps, self._prefill_tokens = steps, prefill_tokens
    self._width = math.ceil(max_length / PAGE)  # pages of the longest row
    tokens = 2 * slots * self._width * PAGE if cache_tokens is None else cache_tokens
    if tokens < max_length:
      raise ValueError(
        f"cache_tokens={tokens} cannot hold one request of max_length={max_length} tokens"
      )
    self._prefixes = Prefixes(1 + math.ceil(tokens / PAGE))
    self._backend: Backend | None = None
    self._stacked = False
    self._pages: Any = None
    self._weights: dict[int, tuple[Any, chex.PRNGKey]] = {}
    self._rows: list[Row | None] = [None] * slots
    can_serve = functools.partial(
      check, vocab=config.vocab_size, max_length=max_length, has_tokenizer=tokenizer is not None
    )
    self._line = Line(can_serve, max_waiting)
    self._settings = decode_lib.Settings.empty(slots)
    self._table = np.zeros((slots, self._width), np.int32)
    self._ended: list[Update] = []  # cancelled between two steps
    self._round = 0
    self._starved = (0, 0)  # who found too few pages, and `Prefixes.returned` then
    self._stats = Stats()
    self.version = -1

  # --- weights ---------------------------------------------------------------------------------

  def publish(
    self,
    params: chex.ArrayTree,
    version: int,
    key: chex.PRNGKey | None = None,
    interrupt: bool = False,
  ) -> None:
    """Takes new weights for the requests that start from now on.

    Args:
      params: as `models.init_params` or `models.load` give them; adapters are merged.
      version: their number, above all earlier ones.
      key: base of the randomness (`Request.key`), jax.random.key(0) at first; None keeps it.
      interrupt: requests that run are begun anew under the new weights, with the same randomness:
        what their updates carried before is void. Else they run to their end under their own.
    Raises:
      ValueError: the version is not above the last one, or the weights do not fit the model.
    """
    if lora.has_lora(params):
      params = _merge(params)
    check_params(self.config, params)
    if version <= self.version:
      raise ValueError(f"version {version} is not above the last one, {self.version}")
    if self._weights and models.is_stacked(params) != self._stacked:
      raise ValueError("stacked parameters cannot follow on unstacked ones, nor these on those")
    if self._backend is None:
      self._stacked = models.is_stacked(params)
      self._backend = self._choose(self._stacked)
      self._pages = self._backend.init_pages(self._prefixes.total)
    if key is None:
      key = self._weights[self.version][1] if self._weights else jax.random.key(0)
    if interrupt:
      running = [(row.id, slot, row) for slot, row in enumerate(self._rows) if row]
      for id, slot, row in sorted(running, reverse=True):
        self._free(slot)
        self._line.push_back(Waiting(id, row.request))
    self._weights[version] = self._backend.prepare(params), key
    self.version = version
    self._drop_old()

  def memory(self, params: chex.ArrayTree) -> tuple[int, int]:
    """Bytes that one version of weights and the pages take; nothing is allocated.

    Args:
      params: as for `publish`, or their shapes and types.
    """
    if lora.has_lora(params):
      params = jax.eval_shape(_merge, params)
    backend = self._choose(models.is_stacked(params))
    weights = jax.eval_shape(backend.prepare, params)
    pages = jax.eval_shape(lambda: backend.init_pages(self._prefixes.total))
    size = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in (weights, pages)]
    return size[0], size[1]

  def _choose(self, stacked: bool) -> Backend:
    length = self._width * PAGE
    return choose(self.config, *self._choice, stacked=stacked, steps=self._steps, max_length=length)

  def adopt(self, other: "Engine", device: jax.Device) -> None:
    """Begins with a copy, on `device`, of the newest weights of an engine with the same settings.

    What was published need not be there any more: trainers update parameters in place.
    """
    assert not self._weights and other._backend is not None
    self._backend, self._stacked, self.version = other._backend, other._stacked, other.version
    self._pages = self._backend.init_pages(self._prefixes.total)
    self._weights[self.version] = jax.device_put(other._weights[self.version], device)

  def _drop_old(self) -> None:
    """Forgets weights, and what they computed, that no request needs any more."""
    needed = {row.version for row in self._rows if row} | {self.version}
    for version in self._weights.keys() - needed:
      del self._weights[version]
      self._prefixes.drop(version)

  # --- requests --------------------------------------------------------------------------------

  def submit(self, request: Request) -> int:
    """Puts a request in line.

    Returns:
      Its id, which its updates carry.
    Raises:
      ValueError: it can never be served; the message says why.
      QueueFull: too many requests wait.
    """
    if not self._weights:
      raise ValueError("the engine has no weights yet: publish some")
    return self._line.submit(request)

  def cancel(self, id: int) -> None:
    """Ends a request, whose last update comes with the next step; one that has ended is left."""
    if update := self._line.cancel(id):
      self._ended.append(update)
      return
    for slot, row in enumerate(self._rows):
      if row and row.id == id:
        self._ended.append(row.update(len(row.logps), self._reply(slot, row, "cancelled")))
        self._free(slot)
        return

  def known(self, context: Sequence[int]) -> int:
    """How many tokens of a context the newest weights have computed already."""
    return self._prefixes.known(self.version, context)

  @property
  def busy(self) -> bool:
    """Whether a step would do something."""
    return bool(self._ended or len(self._line) or any(self._rows))

  @property
  def stats(self) -> Stats:
    """A snapshot of the counters."""
    now = Stats(**vars(self._stats))
    now.running, now.waiting = sum(map(bool, self._rows)), len(self._line)
    now.pages_total = self._prefixes.total - 1
    now.pages_used = now.pages_total - self._prefixes.free
    now.version = self.version
    return now

  # --- steps -----------------------------------------------------------------------------------

  def step(self) -> list[Update]:
    """One round of device calls.

    Returns:
      What it added to replies; each request's last update carries its `Reply`.
    Raises:
      FloatingPointError: the weights give log-probs that are not numbers.
    """
    return self.collect(self.dispatch())

  def dispatch(self) -> list[Decoding]:
    """The first half of a step: hands the device its work and does not wait for it.

    Returns:
      What `collect` takes; nothing else may be asked of the engine before that.
    """
    self._round += 1
    self._admit()
    self._prefill()
    versions = sorted({row.version for row in self._rows if row})
    return [decoding for version in versions if (decoding := self._decode(version))]

  def collect(self, decodings: Sequence[Decoding]) -> list[Update]:
    """The second half of a step: waits for the device; see `step`."""
    updates, self._ended = self._ended, []
    # All of them before any row ends: a program may still read the tables that this changes.
    outs = jax.device_get([out for _, out in decodings])
    for (ready, _), out in zip(decodings, outs, strict=True):
      updates += [self._take(slot, row, out) for slot, row in ready.items()]
    if len(self._weights) > 1:
      self._drop_old()
    return updates

  def _admit(self) -> None:
    for slot, taken in enumerate(self._rows):
      waiting = None if taken else self._line.peek()
      if waiting is None or (waiting.id, self._prefixes.returned) == self._starved:
        continue
      row = Row(waiting.id, waiting.request, self.version, self._prefixes)
      if not row.reserve():
        # Pages come back when rows end; those behind do not overtake.
        self._starved = waiting.id, self._prefixes.returned
        return
      row.turn = self._round
      self._line.pop()
      self._stats.cached_tokens += row.cached
      request = waiting.request
      stop = self._stop if request.stop_tokens is None else request.stop_tokens
      row.stop = frozenset(stop)
      if request.text or request.stop_strings:
        assert self._tokenizer is not None
        row.text = TextStream(self._tokenizer.decode, request.stop_strings)
      self._rows[slot] = row
      self._settings.write(slot, request, stop)

  def _prefill(self) -> None:
    """Computes context tokens; none that another row computes just now.

    Rows take turns, the one that waited longest first, so that a short context does not wait for
    all of a long one.
    """
    budget = self._prefill_tokens
    rows = sorted((row.turn, row.id, slot) for slot, row in enumerate(self._rows) if row)
    copies: list[tuple[int, int]] = []
    jobs: dict[int, list[Job]] = collections.defaultdict(list)
    begun: set[tuple] = set()
    for *_, slot in rows:
      row = self._rows[slot]
      assert row is not None
      before = row.cached
      if copy := row.catch_up():
        copies.append(copy)
      self._stats.cached_tokens += row.cached - before
      page = (row.node, row.next_page())
      count = row.part(self._prefill_tokens)
      if 0 < count <= budget and page not in begun:
        begun.add(page)
        budget -= count
        row.turn = self._round + 1
        new = row.tokens[row.done : row.done + count]
        in_page = row.tokens[row.page_start : row.done]
        jobs[row.version].append(Job(slot, row.done, new, in_page))
      if row.moved:
        self._table[slot, : len(row.pages)], row.moved = row.pages, False
    assert self._backend is not None or not rows
    if copies:
      self._copy(copies)
    for version, some in jobs.items():
      params, _ = self._weights[version]
      self._pages = self._backend.prefill(params, self._pages, some, self._table.copy())  # type: ignore[union-attr]
      for job in some:
        row = self._rows[job.row]
        assert row is not None
        row.advance(len(job.tokens))
        self._stats.prefilled_tokens += len(job.tokens)

  def _copy(self, copies: list[tuple[int, int]]) -> None:
    source = np.zeros(self.slots, np.int32)
    target = np.full(self.slots, self._prefixes.total, np.int32)  # beyond the last: dropped
    source[: len(copies)], target[: len(copies)] = np.array(copies, np.int32).T
    assert self._backend is not None
    self._pages = self._backend.copy(self._pages, source, target)

  def _decode(self, version: int) -> Decoding | None:
    ready = {
      slot: row
      for slot, row in enumerate(self._rows)
      if row and row.version == version and row.done >= row.target
    }
    if not ready:
      return None
    token, place, index, left = (np.zeros(self.slots, np.int32) for _ in range(4))
    tail = np.zeros((self.slots, PAGE), np.int32)
    for slot, row in ready.items():
      token[slot], place[slot] = row.tokens[-1], len(row.tokens) - 1
      index[slot], left[slot] = len(row.logps), row.left
      tail[slot] = decode_lib.tail(row.tokens, len(row.tokens) - 1)
    params, key = self._weights[version]
    assert self._backend is not None
    self._pages, out = decode_lib.decode(
      self._backend,
      self._steps,
      params,
      self._pages,
      self._table,
      self._settings,
      key,
      token,
      place,
      index,
      left,
      tail,
    )
    return ready, out

  def _take(self, slot: int, row: Row, out: decode_lib.Decoded) -> Update:
    """Hands a row what it sampled; ends it if that was the last."""
    count = int((out.tokens[slot] >= 0).sum())
    logps = out.logps[slot, :count].tolist()
    if not all(map(math.isfinite, logps)):
      raise FloatingPointError(
        f"weights of version {row.version} give log-probs that are not finite: {logps}"
      )
    top = []
    if row.request.top_logps:
      best = slice(0, row.request.top_logps)
      top = [
        list(zip(ids[best].tolist(), values[best].tolist(), strict=True))
        for ids, values in zip(out.top_ids[slot, :count], out.top_logps[slot, :count], strict=True)
      ]
    before = len(row.logps)
    finish = row.take(out.tokens[slot, :count].tolist(), logps, top)
    self._stats.sampled_tokens += len(row.logps) - before
    if not finish and out.left[slot] == 0:
      finish = "stop" if row.tokens[-1] in row.stop else "length"
    row.advance(len(row.tokens) - 1 - row.done, ended=bool(finish))
    reply = self._reply(slot, row, finish) if finish else None
    update = row.update(before, reply)
    if finish:
      self._free(slot)
    return update

  def _reply(self, slot: int, row: Row, finish: str) -> Reply:
    choices = None
    if row.request.router_choices:
      assert self._pages is not None
      # All pages of a row, so that the shape is always the same.
      padded = np.pad(row.pages, (0, self._width - len(row.pages)))
      pages = jax.device_get(self._pages.choices[padded])
      choices = pages.reshape(len(padded) * PAGE, *pages.shape[2:])[: row.done]
    if row.text:
      row.text.finish()
      if row.text.stopped and finish == "length":  # in the last, unfinished character
        finish = "stop"
    return Reply(
      id=row.id,
      tokens=row.tokens[len(row.request.context) :],
      logps=row.logps,
      version=row.version,
      finish=finish,
      cached=row.cached,
      top=row.top,
      choices=choices,
      text=row.text.text if row.text and row.request.text else "",
    )

  def _free(self, slot: int) -> None:
    row = self._rows[slot]
    assert row is not None
    row.close()
    self._rows[slot] = None
    self._table[slot] = 0
    self._settings.clear(slot)  # so that nobody pays for a filter that nobody uses
