"""One engine a device, behind the interface of one: devices join and leave while requests run.

`shrink` takes devices away, for training, say: their engines, keys, values and weights are let go
of, and their unfinished requests begin anew on the rest. `expand` gives them back. What a reply
says follows from weights, context and key, so a request that moves ends as it would have ended
where it was (bit for bit where the backend's bits depend on the context alone, see docs/design.md).

Requests wait here and not at a device: one is placed only where a slot is free, so whatever waits
finds its way to devices that come back. It goes where it would end first if rows shared a device's
speed evenly: where (context tokens that the device does not know + tokens that may be sampled) *
(rows there, its own included) is least. So a turn follows the prefix of its episode unless that
device is much fuller than another.

Source: train-rollout multiplexing of ROLL (arXiv:2512.24873). Left out: handing over keys, values
and sampled tokens with a request that moves; moving requests that run where nothing shrinks; one
model over several devices.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax

from rome import models
from rome.rollout.engine.engine import Engine, Stats
from rome.rollout.engine.line import Line
from rome.rollout.engine.request import Request, Update, check
from rome.rollout.engine.rows import Waiting

_COUNTERS = ("sampled_tokens", "prefilled_tokens", "cached_tokens")
_STANDINGS = ("running", "waiting", "pages_used", "pages_total")


class EnginePool:
  """Generates replies on several devices; used as `Engine`, and as little thread-safe.

  Args:
    config: the model's sizes.
    devices: all that may ever serve; at first all of them do.
    slots: requests that run at once on each device.
    max_length: tokens that a context and its reply may have together.
    max_waiting: requests that may wait for a slot, of all devices together.
    settings: others of each `Engine`.
  Attributes:
    devices: all of them, in order.
    slots: of all devices together, whether they serve or not.
    version: of the newest weights.
  Raises:
    ValueError: a setting cannot be served; the message names it.
  """

  def __init__(
    self,
    config: models.ModelConfig,
    devices: Sequence[jax.Device],
    *,
    slots: int,
    max_length: int,
    max_waiting: int = 4096,
    **settings: Any,
  ):
    if not devices or len(set(devices)) < len(devices):
      raise ValueError(f"devices must be one or more different ones, got {list(devices)}")
    if max_waiting < 1:
      raise ValueError(f"max_waiting must be at least 1, got {max_waiting}")
    self.config, self.devices, self.max_length = config, tuple(devices), max_length
    self.slots, self._slots = slots * len(devices), slots
    self._settings = {"slots": slots, "max_length": max_length} | settings
    self._engines = {device: Engine(config, **self._settings) for device in devices}
    self._placed: dict[jax.Device, dict[int, Waiting]] = {device: {} for device in devices}
    can_serve = functools.partial(
      check,
      vocab=config.vocab_size,
      max_length=max_length,
      has_tokenizer=settings.get("tokenizer") is not None,
    )
    self._line = Line(can_serve, max_waiting)
    self._ended: list[Update] = []  # between two steps
    self._past = Stats()  # of engines that are gone
    self.version = -1

  # --- devices ---------------------------------------------------------------------------------

  @property
  def serving(self) -> tuple[jax.Device, ...]:
    """The devices that generate now, in order."""
    return tuple(device for device in self.devices if device in self._engines)

  def shrink(self, devices: Sequence[jax.Device]) -> None:
    """Stops generating on some devices and lets go of all memory there.

    Their unfinished requests begin anew on the others, under the newest weights and with the same
    ids and randomness: what their updates carried before is void.

    Raises:
      ValueError: one of them does not serve, or none would be left; nothing was changed then.
    """
    self._check(devices, self._engines, "does not serve")
    if len(devices) == len(self._engines):
      raise ValueError(f"shrink would leave no device to generate on: keep one of {self.serving}")
    moved: list[Waiting] = []
    for device in devices:
      engine = self._engines.pop(device)
      self._ended += self._named(device, engine.collect([]))  # what was cancelled
      moved += self._placed[device].values()
      self._placed[device] = {}
      self._past = _sum(_COUNTERS, [self._past, engine.stats])
    for waiting in sorted(moved, key=lambda waiting: waiting.id, reverse=True):
      self._line.push_back(waiting)

  def expand(self, devices: Sequence[jax.Device]) -> None:
    """Generates on some devices again, with the newest weights.

    Raises:
      ValueError: one of them is not the pool's, or serves already; nothing was changed then.
    """
    self._check(devices, set(self.devices) - self._engines.keys(), "serves already")
    source = next(iter(self._engines.values()))
    for device in devices:
      engine = Engine(self.config, **self._settings)
      if self.version >= 0:
        with jax.default_device(device):
          engine.adopt(source, device)
      self._engines[device] = engine

  def _check(self, devices: Sequence[jax.Device], fit: Any, unfit: str) -> None:
    for device in devices:
      if device not in self.devices:
        raise ValueError(f"{device} is none of the pool's devices: {self.devices}")
      if device not in fit:
        raise ValueError(f"{device} {unfit}; devices that serve: {self.serving}")
    if len(set(devices)) < len(devices):
      raise ValueError(f"a device is named twice: {list(devices)}")

  # --- weights ---------------------------------------------------------------------------------

  def publish(
    self,
    params: chex.ArrayTree,
    version: int,
    key: chex.PRNGKey | None = None,
    interrupt: bool = False,
  ) -> None:
    """Gives new weights to all devices that serve; arguments and errors as of `Engine.publish`."""
    for device, engine in self._engines.items():
      with jax.default_device(device):
        there, its_key = jax.device_put((params, key), device)
        engine.publish(there, version, its_key, interrupt)
    self.version = version

  def memory(self, params: chex.ArrayTree) -> tuple[int, int]:
    """Bytes on each device that serves; argument and result as of `Engine.memory`."""
    return next(iter(self._engines.values())).memory(params)

  # --- requests --------------------------------------------------------------------------------

  def submit(self, request: Request) -> int:
    """Puts a request in line; arguments, result and errors as of `Engine.submit`."""
    if self.version < 0:
      raise ValueError("the engines have no weights yet: publish some")
    return self._line.submit(request)

  def cancel(self, id: int) -> None:
    """Ends a request, whose last update comes with the next step; one that has ended is left."""
    if update := self._line.cancel(id):
      self._ended.append(update)
      return
    for device, engine in self._engines.items():
      for inner, placed in self._placed[device].items():
        if placed.id == id:
          engine.cancel(inner)
          return

  @property
  def busy(self) -> bool:
    """Whether a step would do something."""
    return bool(self._ended or len(self._line) or any(e.busy for e in self._engines.values()))

  @property
  def stats(self) -> Stats:
    """Sums over the devices that serve; counters also of engines that are gone."""
    parts = [engine.stats for engine in self._engines.values()]
    now = _sum([*_COUNTERS, *_STANDINGS], [self._past, *parts])
    now.waiting += len(self._line)
    now.version = self.version
    return now

  # --- steps -----------------------------------------------------------------------------------

  def step(self) -> list[Update]:
    """One round of device calls on every device that has work, all of them at once.

    Returns, raises: as `Engine.step`.
    """
    updates, self._ended = self._ended, []
    self._place()
    running = {}
    for device, engine in self._engines.items():
      if engine.busy:
        with jax.default_device(device):
          running[device] = engine.dispatch()
    for device, decodings in running.items():
      with jax.default_device(device):
        updates += self._named(device, self._engines[device].collect(decodings))
    return updates

  def _place(self) -> None:
    """Gives waiting requests to devices with a free slot."""
    while (waiting := self._line.peek()) is not None:
      free = [device for device in self.serving if len(self._placed[device]) < self._slots]
      if not free:
        return
      costs = {device: self._cost(device, waiting.request) for device in free}
      device = min(free, key=costs.__getitem__)
      self._line.pop()
      self._placed[device][self._engines[device].submit(waiting.request)] = waiting

  def _cost(self, device: jax.Device, request: Request) -> int:
    """What a request would take on a device, see above."""
    unknown = len(request.context) - self._engines[device].known(request.context)
    return (unknown + request.max_tokens) * (len(self._placed[device]) + 1)

  def _named(self, device: jax.Device, updates: Sequence[Update]) -> list[Update]:
    """A device's updates under the ids of the pool; forgets requests that have ended."""
    named = []
    for update in updates:
      placed = self._placed[device][update.id]
      reply = update.reply
      if reply:
        del self._placed[device][update.id]
        reply = dataclasses.replace(reply, id=placed.id)
      named.append(dataclasses.replace(update, id=placed.id, reply=reply))
    return named


def _sum(names: Sequence[str], parts: Sequence[Stats]) -> Stats:
  return Stats(**{name: sum(getattr(part, name) for part in parts) for name in names})
