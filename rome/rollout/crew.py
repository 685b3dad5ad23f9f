"""Episodes under way: who is waiting for whom.

A `Crew` alternates between taking what environments gave and generating. What is to be played, and
what becomes of it, its owner says: one batch (`rome.rollout.batch`) or a stream without end
(`rome.rollout.stream`).
"""

import abc
import concurrent.futures as cf
import dataclasses
import heapq
import math
import time
from collections.abc import Callable
from typing import Any

from rome import models
from rome.agent import Agent, NewRow
from rome.envs.pool import PoolClosed
from rome.envs.sandbox import SandboxError
from rome.envs.task import Task, TaskError
from rome.rollout.engine import AnyEngine, Reply, Request, Update
from rome.rollout.groups import Groups, Member
from rome.rollout.lanes import Environments, Lane, Silent
from rome.rollout.recorder import Episode
from rome.rollout.starts import Boundaries, Divergent, Start
from rome.rollout.timeline import ENGINE, LANES, NO_TIMELINE, Timeline
from rome.trajectory import Invalid, Reward, Trajectory, Valid

_SAMPLE_BITS = 16  # of a request's second key, above those of the chunk
MAX_MEMBERS = 1 << _SAMPLE_BITS
Starts = Callable[[Member], Start | None]


class TooManyInvalid(RuntimeError):
  """More episodes of a batch failed for reasons of infrastructure than the cap allows."""


@dataclasses.dataclass
class RolloutStats:
  """What one batch took; seconds and counts.

  Attributes:
    generate_seconds, env_wait_seconds: of the controlling thread.
    env_steps: actions.
    sampled_tokens: of all episodes, those that were dropped too.
    prefilled_tokens, cached_tokens: context tokens that were computed, and that were known from
      earlier turns or other episodes.
    instances: task instances taken.
    finished, succeeded: episodes with a valid reward, those of replaced groups too.
    filtered: groups replaced because their members all earned the same.
    dropped: groups replaced because they were too old for the update (`rome.rollout.stream`).
    redundant: members that had begun when their group was full without them.
    divergent: members that could not start inside an expert and began at the initial state.
    retries: resets that failed and were tried again.
    silent: calls that environments did not answer in time.
    invalid: episodes that failed for reasons of infrastructure.
  """

  generate_seconds: float = 0.0
  env_wait_seconds: float = 0.0
  env_steps: int = 0
  sampled_tokens: int = 0
  prefilled_tokens: int = 0
  cached_tokens: int = 0
  instances: int = 0
  finished: int = 0
  succeeded: int = 0
  filtered: int = 0
  dropped: int = 0
  redundant: int = 0
  divergent: int = 0
  retries: int = 0
  silent: int = 0
  invalid: tuple[Trajectory, ...] = ()

  @property
  def seconds(self) -> float:
    """Of the controlling thread, together."""
    return self.generate_seconds + self.env_wait_seconds


@dataclasses.dataclass(frozen=True)
class Setting:
  """What all batches of a runner share; see `EpisodeRunner`."""

  engine: AnyEngine
  make_agent: Callable[[Task], Agent]
  sampling: models.Sampling
  max_reply: int
  invalid_cap: float
  environments: Environments
  timeline: Timeline = NO_TIMELINE
  boundaries: Boundaries = dataclasses.field(default_factory=Boundaries)
  max_rows: float = math.inf


class Crew(abc.ABC):
  """Plays the members of `groups` in as many lanes as the engine has slots.

  Args:
    setting: see there.
    tasks: the task of an instance, by its number.
    groups: what is played.
    most_invalid: episodes that may fail for reasons of infrastructure.
    starts: where a member begins, None for the initial state.
  Attributes:
    stats: what it took so far.
    versions: version numbers of weights, by those of the engine.
  """

  def __init__(
    self,
    setting: Setting,
    tasks: Callable[[int], Task],
    groups: Groups,
    most_invalid: float,
    starts: Starts,
  ):
    self._setting, self._engine, self._environments = setting, setting.engine, setting.environments
    self._tasks, self._groups, self._most_invalid = tasks, groups, most_invalid
    self._starts = starts
    self._lanes: dict[Member, Lane] = {}
    self._asked: dict[int, Lane] = {}  # by the engine's id
    self._wake: dict[Lane, float] = {}  # when a failed reset is tried again
    self._timeline = setting.timeline
    self._free = list(range(self._engine.slots))  # numbers of lanes on the timeline
    self._numbers: dict[Lane, int] = {}
    self._since: dict[Lane, float] = {}  # when a lane's environment last answered
    self._before = self._engine.stats
    self._invalid: list[Trajectory] = []
    self.versions: dict[int, int] = {}
    self.stats = RolloutStats()

  def turn(self) -> None:
    """Starts what can start, waits where the engine has nothing to do, generates a little."""
    started, asked = time.monotonic(), bool(self._asked)
    self._start()
    for lane, answer in self._environments.ready(0.0 if self._asked else self._pause()):
      if self._lanes.get(lane.episode.member) is lane:  # else cancelled by one before it
        self._take(lane, answer)
    generating = time.monotonic()
    self.stats.env_wait_seconds += generating - started
    if not asked:
      self._timeline.span(ENGINE, "waiting", started, generating)
    for update in self._step():
      if update.reply and update.reply.id in self._asked:
        self._act(update.reply)
    self.stats.generate_seconds += time.monotonic() - generating

  def leave(self) -> None:
    """Lets go of whatever still runs."""
    for lane in self._lanes.values():
      self._leave(lane, grace=0.0)
    self._lanes.clear()

  @abc.abstractmethod
  def finished(self, member: Member, trajectory: Trajectory) -> None:
    """Takes a trajectory with a valid reward, after its group heard of it."""

  def _step(self) -> list[Update]:
    """A step of the engine, and its place on the timeline where it had something to do."""
    if not self._engine.busy:
      return self._engine.step()
    started = self._timeline.clock()
    updates, now = self._engine.step(), self._engine.stats
    self._timeline.span(ENGINE, "step", started, self._timeline.clock())
    self._timeline.count("rows", running=now.running, waiting=now.waiting)
    return updates

  def _call(self, lane: Lane, kind: str, work: Callable[..., Any], *args: Any) -> None:
    """Runs `work(*args)` for a lane, on its track of the timeline."""
    self._environments.call(lane, kind, self._timed, lane, self._numbers[lane], kind, work, *args)

  def _timed(self, lane: Lane, number: int, kind: str, work: Callable[..., Any], *args: Any) -> Any:
    started = self._timeline.clock()
    try:
      result = work(*args)
      if kind == "step" and result is None:
        kind = "tests"  # of the last action, which ran within it
      return result
    finally:
      if not lane.left:  # else the track is another's by now
        self._since[lane] = ended = self._timeline.clock()
        self._timeline.span(LANES + number, kind, started, ended, lane.episode.id)

  def count(self) -> RolloutStats:
    """What was played since the last count, groups apart."""
    stats, after = self.stats, self._engine.stats
    for name in ("sampled_tokens", "prefilled_tokens", "cached_tokens"):
      setattr(stats, name, getattr(after, name) - getattr(self._before, name))
    stats.invalid = tuple(self._invalid)
    self.stats, self._before, self._invalid = RolloutStats(), after, []
    return stats

  def _start(self) -> None:
    """Fills free lanes; tries resets again whose time has come."""
    while len(self._lanes) < self._engine.slots and (member := self._groups.take()):
      lane = self._lanes[member] = Lane(self._episode(member), self._starts(member))
      self._numbers[lane] = heapq.heappop(self._free)
      self._call(lane, "reset", self._begin, lane)
    for lane in [lane for lane, at in self._wake.items() if at <= time.monotonic()]:
      del self._wake[lane]
      self._call(lane, "reset", self._begin, lane)

  def _pause(self) -> float:
    """Seconds that the engine has nothing to do for."""
    longest = 3600.0  # An answer or a deadline ends the wait long before.
    return max(min((at - time.monotonic() for at in self._wake.values()), default=longest), 0.0)

  def _episode(self, member: Member) -> Episode:
    task = self._tasks(member.instance)
    sample = f".{member.sample}" if self._groups.grouping.members > 1 else ""
    return Episode(f"{task.id}#{member.instance}{sample}", task, member)

  def _begin(self, lane: Lane) -> list[int]:
    lane.close()  # of a reset that failed
    lane.agent = self._setting.make_agent(lane.episode.task)
    if lane.start is None:
      return lane.agent.begin()
    return self._setting.boundaries.begin(lane.agent, lane.start)

  def _act(self, reply: Reply) -> None:
    """Hands a finished reply to its environment."""
    lane = self._asked.pop(reply.id)
    lane.request = None
    lane.record.reply(reply.tokens, reply.logps, self.versions[reply.version])
    self.stats.env_steps += 1
    assert lane.agent is not None
    track = LANES + self._numbers[lane]
    self._timeline.span(track, "waiting", self._since[lane], self._timeline.clock())
    self._call(lane, "step", lane.agent.act, reply.tokens)

  def _take(self, lane: Lane, answer: cf.Future | Silent) -> None:
    """Takes what an environment gave: more context to generate from, or the end."""
    if isinstance(answer, Silent):
      self.stats.silent += 1
      self._finish(lane, Invalid(answer.reason), "environment_silent")
      return
    try:
      context = answer.result()
    except PoolClosed:
      raise  # No environment begins from now on.
    except Divergent:
      self._begin_anew(lane)
      return
    except (SandboxError, TimeoutError) as error:
      self._fail(lane, error)
      return
    self._go_on(lane, context)

  def _go_on(self, lane: Lane, context: Any) -> None:
    """Goes on with an episode: asks for a reply to its context, or files it."""
    assert lane.agent is not None
    if context is None:
      self._finish(lane, Valid(lane.agent.reward), lane.agent.end_reason)
      return
    record, longest = lane.record, self._setting.max_reply
    new = isinstance(context, NewRow)
    row = list(context.ids) if new else [*record.row, *context]
    if (
      len(row) + longest > self._engine.max_length
      or len(record.row_starts) + new > self._setting.max_rows
    ):
      self._overflow(lane, len(row))
      return
    record.context(context)
    if not record.calls and lane.start is not None:
      record.start = lane.start.chunks
    request = Request(
      context=tuple(row),
      max_tokens=longest,
      sampling=self._setting.sampling,
      key=request_key(lane.episode.member, record.calls),
    )
    lane.request = self._engine.submit(request)
    self._asked[lane.request] = lane

  def _fail(self, lane: Lane, error: Exception) -> None:
    """A call raised: a failed reset waits for its next try, everything else is invalid."""
    if not lane.record.calls:
      lane.resets += 1
      if lane.resets < self._environments.patience.tries:
        self.stats.retries += 1
        delay = self._environments.patience.delay(lane.episode.member, lane.resets)
        self._wake[lane] = time.monotonic() + delay
        return
    self._finish(lane, Invalid(str(error)), "sandbox_lost")

  def _begin_anew(self, lane: Lane) -> None:
    """An episode that cannot begin inside its expert begins at the initial state."""
    self.stats.divergent += 1
    lane.start = None
    self._call(lane, "reset", self._begin, lane)

  def _overflow(self, lane: Lane, tokens: int) -> None:
    """Ends an episode whose context is full; one that cannot even begin is the task's fault."""
    if not lane.record.calls and lane.start is not None:
      self._begin_anew(lane)
      return
    if not lane.record.calls:
      raise TaskError(
        f"the prompt of task {lane.episode.task.id} has {tokens} tokens, which with a reply of "
        f"{self._setting.max_reply} overflows the context of {self._engine.max_length}; "
        "shorten its instruction or raise agent.context"
      )
    assert lane.agent is not None
    lane.agent.stop("context_full")
    self._finish(lane, Valid(0.0), "context_full")

  def _finish(self, lane: Lane, reward: Reward, reason: str) -> None:
    """Files a trajectory; an invalid one is played again, one too many is cancelled."""
    member = lane.episode.member
    trajectory = lane.record.finish(lane.episode, lane.agent, reward, reason)
    del self._lanes[member]
    self._leave(lane)
    if isinstance(reward, Invalid):
      self._invalid.append(trajectory)
      if len(self._invalid) > self._most_invalid:
        cap = self._setting.invalid_cap
        raise TooManyInvalid(
          f"{len(self._invalid)} episodes of a batch failed for reasons of infrastructure, more "
          f"than sandbox.invalid_cap={cap:g} allows; the last: {reward.reason}"
        )
      self._groups.lose(member)
      return
    self.stats.finished += 1
    self.stats.succeeded += trajectory.success
    for vain in self._groups.finish(member, reward.value):
      self.stats.redundant += 1
      self._leave(self._lanes.pop(vain))
    self.finished(member, trajectory)

  def _leave(self, lane: Lane, grace: float | None = None) -> None:
    """Lets go of whatever an attempt holds."""
    self._wake.pop(lane, None)
    if lane.request is not None:
      self._engine.cancel(lane.request)
      del self._asked[lane.request]
    self._environments.let_go(lane, grace)
    self._since.pop(lane, None)
    heapq.heappush(self._free, self._numbers.pop(lane))


def request_key(member: Member, chunk: int) -> tuple[int, int]:
  """What keys the randomness of a reply; of sample 0 it is (instance, chunk)."""
  return member.instance, member.sample << _SAMPLE_BITS | chunk
