"""Plays task instances by a foreign agent: what `EpisodeRunner` does for the agent of the house.

Groups, redundancy, filtering, back-off, deadlines of environments and the cap on failures are those
of `rome.rollout.crew`; what differs is who makes the calls. They come over HTTP, and the thread
that runs the engine takes them between two steps.

Left out: streams (`rl.max_staleness`), starts inside experts (`resampling`), episodes on other
hosts (`workers`), rewards of the user's (`reward`); `RunConfig` refuses them.
"""

import concurrent.futures as cf
import contextlib
import dataclasses
from typing import Any

from rome.rollout.batch import Batch
from rome.rollout.engine import QueueFull, Reply, Update
from rome.rollout.episodes import EpisodeRunner
from rome.rollout.lanes import Lane
from rome.rollout.native.sessions import (
  ENDPOINT_FAILED,
  Ask,
  EpisodeEnded,
  Session,
  Sessions,
)
from rome.rollout.stream import Stream
from rome.trajectory import Invalid, Valid


class NativeBatch(Batch):
  """One call of `NativeRunner.run`.

  Args:
    sessions: where the calls of the agents come from.
    *args: as for `Batch`.
  """

  def __init__(self, sessions: Sessions, *args: Any):
    super().__init__(*args)
    self._sessions = sessions
    self._of_lane: dict[Lane, Session] = {}
    self._open: dict[int, Ask] = {}  # by the engine's id

  def _begin(self, lane: Lane) -> Any:
    lane.close()  # of a reset that failed
    self._drop(lane)
    session = self._of_lane[lane] = self._sessions.open(lane.episode.member)
    if lane.left:  # meanwhile
      self._drop(lane)
    lane.record = session.record
    agent: Any = self._setting.make_agent(lane.episode.task)
    lane.agent = agent
    agent.begin(session)
    return False

  def _go_on(self, lane: Lane, ended: Any) -> None:
    """After `begin` and `watch`, which say whether the agent has ended, and `score`: None."""
    agent: Any = lane.agent
    if ended is None:
      if failure := self._of_lane[lane].failure:
        self._finish(lane, Invalid(failure), ENDPOINT_FAILED)
      else:
        self._finish(lane, Valid(agent.reward), agent.end_reason)
    else:
      self._call(lane, "step", agent.score if ended else agent.watch)

  def _leave(self, lane: Lane, grace: float | None = None) -> None:
    super()._leave(lane, grace)
    self._drop(lane)

  def _drop(self, lane: Lane) -> None:
    """Revokes a lane's key, and ends what nobody will read."""
    session = self._of_lane.pop(lane, None)
    if session is not None:
      session.drop()  # its requests leave the engine in the next step

  def _pause(self) -> float:
    return 0.0 if self._open else super()._pause()

  def _step(self) -> list[Update]:
    """Hands the engine what was asked, and its replies to who asked."""
    self._exchange()
    updates = super()._step()
    for update in updates:
      if update.reply is not None and update.id in self._open:
        version = self.versions[update.reply.version]
        _settle(self._open.pop(update.id), dataclasses.replace(update.reply, version=version))
        self.stats.env_steps += 1
    return updates

  def _exchange(self) -> None:
    """Takes from the engine what nobody waits for any more, and gives it what was asked."""
    for id, ask in [(id, ask) for id, ask in self._open.items() if ask.session.dropped]:
      del self._open[id]
      self._engine.cancel(id)
      _settle(ask, EpisodeEnded("the episode has ended"))
    for ask in self._sessions.take():
      self._submit(ask)

  def _submit(self, ask: Ask) -> None:
    if ask.session.dropped:
      _settle(ask, EpisodeEnded("the episode has ended"))
      return
    try:
      self._open[self._engine.submit(ask.request)] = ask
    except QueueFull:  # its agent waits, as a call without a reply would end the record there
      self._sessions.put(ask)

  def leave(self) -> None:
    super().leave()
    self._exchange()  # tells who still waits, without the engine, which may be what failed


def _settle(ask: Ask, outcome: Reply | Exception) -> None:
  with contextlib.suppress(cf.InvalidStateError):  # the proxy was closed
    if isinstance(outcome, Exception):
      ask.done.set_exception(outcome)
    else:
      ask.done.set_result(outcome)


class NativeRunner(EpisodeRunner):
  """Runs batches of episodes of a foreign agent.

  Args:
    sessions: those of the proxy; its `terms` are the run's.
    *args, **settings: as for `EpisodeRunner`; `make_agent` makes a `NativeAgent`.
  """

  def __init__(self, sessions: Sessions, *args: Any, **settings: Any):
    super().__init__(*args, **settings)
    self._sessions = sessions
    sessions.ring, sessions.max_rows = self._environments.ring, self._setting.max_rows

  def _batch(self, *episodes: Any) -> NativeBatch:
    return NativeBatch(self._sessions, self._setting, *episodes)

  def stream(self, *_: Any, **__: Any) -> Stream:
    """Raises: batches of foreign agents are not played ahead."""
    raise NotImplementedError("config.rl.max_staleness must be 0 with agent.mode='native'")
