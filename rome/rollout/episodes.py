"""Runs agents in environments against the engine and returns finished trajectories.

Environments act in threads while the engine generates for the others: a slow container delays its
own episode alone. Every episode has a number that keys its randomness, and what the engine says
follows from context and key, so results do not depend on who finishes first. An episode whose
infrastructure failed is Invalid; it is relaunched at once from the same initial state, so that the
batch stays full, until failures pass a cap.

Left out for now: redundant environments, groups, start states other than the initial one.
"""

import collections
import concurrent.futures as cf
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import chex
import numpy as np

from rome import models
from rome.agent import Agent
from rome.envs.sandbox import SandboxError
from rome.envs.task import Task, TaskError
from rome.rollout.engine import Engine, Reply, Request
from rome.trajectory import Invalid, Reward, Trajectory, Valid


@dataclasses.dataclass(frozen=True)
class Episode:
  """One episode to run: its trajectory's id, its task, and the number that keys its randomness."""

  id: str
  task: Task
  number: int


class TooManyInvalid(RuntimeError):
  """More episodes of a batch failed for reasons of infrastructure than the cap allows."""


class Recorder:
  """Token ids of one episode with their provenance, appended as they happen."""

  def __init__(self) -> None:
    self.tokens: list[int] = []
    self.call_ids: list[int] = []
    self.logps: list[float] = []
    self.calls = 0

  def context(self, ids: Sequence[int]) -> None:
    """Tokens that no policy sampled."""
    self.tokens += ids
    self.call_ids += [-1] * len(ids)
    self.logps += [0.0] * len(ids)

  def reply(self, ids: Sequence[int], logps: Sequence[float]) -> None:
    """The tokens of one LLM call."""
    self.tokens += ids
    self.call_ids += [self.calls] * len(ids)
    self.logps += logps
    self.calls += 1

  def finish(
    self, episode: Episode, agent: Agent, reward: Valid | Invalid, reason: str, version: int
  ) -> Trajectory:
    return Trajectory(
      id=episode.id,
      task_id=episode.task.id,
      family=episode.task.family,
      instruction=agent.instruction,
      tokens=np.array(self.tokens, np.int32),
      call_ids=np.array(self.call_ids, np.int32),
      logps=np.array(self.logps, np.float32),
      versions=np.full(self.calls, version, np.int32),
      chunk_rewards=np.zeros(self.calls, np.float32),
      reward=reward,
      end_reason=reason,
      turns=tuple(agent.turns),
    )


@dataclasses.dataclass
class RolloutStats:
  """What one batch of episodes took; seconds and counts.

  Of context tokens, `prefilled_tokens` were computed and `cached_tokens` known from earlier turns
  or other episodes.
  """

  generate_seconds: float = 0.0
  env_wait_seconds: float = 0.0
  env_steps: int = 0
  sampled_tokens: int = 0
  prefilled_tokens: int = 0
  cached_tokens: int = 0
  invalid: tuple[Trajectory, ...] = ()


class _Lane:
  """One of the episodes that run at once."""

  def __init__(self) -> None:
    self.episode: Episode
    self.agent: Agent
    self.record: Recorder

  def close(self) -> None:
    if hasattr(self, "agent"):
      self.agent.env.close()


class EpisodeRunner:
  """Runs batches of episodes.

  Args:
    engine: the generation engine; as many episodes run at once as it has slots.
    make_agent: an agent with its own environment for a task; called in a thread.
    sampling: the distribution that replies are drawn from.
    max_reply: sampled tokens a reply.
    env_deadline: seconds after which a silent environment stops the run.
    invalid_cap: share of the batch that may fail for reasons of infrastructure.
  """

  def __init__(
    self,
    engine: Engine,
    make_agent: Callable[[Task], Agent],
    sampling: models.Sampling,
    *,
    max_reply: int,
    env_deadline: float,
    invalid_cap: float,
  ):
    self.engine, self.make_agent, self.sampling = engine, make_agent, sampling
    self.max_reply, self.env_deadline, self.invalid_cap = max_reply, env_deadline, invalid_cap
    self.threads = cf.ThreadPoolExecutor(engine.slots, thread_name_prefix="env")

  def close(self) -> None:
    self.threads.shutdown(wait=True, cancel_futures=True)

  def run(
    self, params: chex.ArrayTree, key: chex.PRNGKey, version: int, episodes: Sequence[Episode]
  ) -> tuple[list[Trajectory], RolloutStats]:
    """Plays every episode once.

    Args:
      params: weights to sample under.
      key: base key; the key of a token is fold_in(key, (episode number, chunk, token)).
      version: version number of `params`.
      episodes: what to play.
    Returns:
      The trajectories, all with a valid reward, sorted by id; and what they took.
    Raises:
      TooManyInvalid: more than the cap failed.
      TimeoutError: an environment did not answer within its deadline.
      TaskError: a task's prompt leaves no room for a reply.
    """
    # The engine numbers what it is given; the same weights may come twice, with another key.
    self.engine.publish(params, self.engine.version + 1, key)
    before = self.engine.stats
    batch = _Batch(self, version, episodes)
    batch.play()
    after = self.engine.stats
    for name in ("sampled_tokens", "prefilled_tokens", "cached_tokens"):
      setattr(batch.stats, name, getattr(after, name) - getattr(before, name))
    batch.stats.invalid = tuple(batch.invalid)
    return sorted(batch.done, key=lambda t: t.id), batch.stats


class _Batch:
  """One call of `EpisodeRunner.run`: who is waiting for whom."""

  def __init__(self, runner: EpisodeRunner, version: int, episodes: Sequence[Episode]):
    self._runner, self._engine, self._version = runner, runner.engine, version
    self._most_invalid = runner.invalid_cap * len(episodes)
    self._queue = collections.deque(episodes)
    self._lanes = [_Lane() for _ in range(min(self._engine.slots, len(episodes)))]
    self._waiting: dict[cf.Future, tuple[_Lane, float]] = {}  # and the time of submission
    self._asked: dict[int, _Lane] = {}  # by the engine's id
    self.done: list[Trajectory] = []
    self.invalid: list[Trajectory] = []
    self.stats = RolloutStats()

  def play(self) -> None:
    """Alternates between taking what environments gave and generating, until all is done."""
    try:
      for lane in self._lanes:
        self._launch(lane)
      while self._waiting or self._asked:
        started = time.monotonic()
        for future in self._ready(block=not self._asked):
          self._continue(self._waiting.pop(future)[0], future)
        generating = time.monotonic()
        self.stats.env_wait_seconds += generating - started
        for update in self._engine.step():
          if update.reply:
            self._act(update.reply)
        self.stats.generate_seconds += time.monotonic() - generating
    finally:
      for id in self._asked:
        self._engine.cancel(id)
      cf.wait(self._waiting, timeout=self._runner.env_deadline)
      for lane in self._lanes:
        lane.close()

  def _submit(self, lane: _Lane, work: Callable[..., Any], *args: Any) -> None:
    self._waiting[self._runner.threads.submit(work, *args)] = (lane, time.monotonic())

  def _launch(self, lane: _Lane) -> None:
    if self._queue:
      lane.episode, lane.record = self._queue.popleft(), Recorder()
      self._submit(lane, self._begin, lane)

  def _begin(self, lane: _Lane) -> list[int]:
    lane.close()
    lane.agent = self._runner.make_agent(lane.episode.task)
    return lane.agent.begin()

  def _act(self, reply: Reply) -> None:
    """Hands a finished reply to its environment."""
    lane = self._asked.pop(reply.id)
    lane.record.reply(reply.tokens, reply.logps)
    self.stats.env_steps += 1
    self._submit(lane, lane.agent.act, reply.tokens)

  def _continue(self, lane: _Lane, future: cf.Future) -> None:
    """Takes what an environment gave: more context to generate from, or the end."""
    try:
      context = future.result()
    except SandboxError as e:
      self._finish(lane, Invalid(str(e)), "sandbox_lost")
      return
    if context is None:
      self._finish(lane, Valid(lane.agent.reward), lane.agent.end_reason)
      return
    record, longest = lane.record, self._runner.max_reply
    if len(record.tokens) + len(context) + longest > self._engine.max_length:
      self._overflow(lane, len(context))
      return
    record.context(context)
    request = Request(
      context=tuple(record.tokens),
      max_tokens=longest,
      sampling=self._runner.sampling,
      key=(lane.episode.number, record.calls),
    )
    self._asked[self._engine.submit(request)] = lane

  def _overflow(self, lane: _Lane, tokens: int) -> None:
    """Ends an episode whose context is full; one that cannot even begin is the task's fault."""
    if not lane.record.calls:
      raise TaskError(
        f"the prompt of task {lane.episode.task.id} has {tokens} tokens, which with a reply of "
        f"{self._runner.max_reply} overflows the context of {self._engine.max_length}; "
        "shorten its instruction or raise agent.context"
      )
    lane.agent.stop("context_full")
    self._finish(lane, Valid(0.0), "context_full")

  def _finish(self, lane: _Lane, reward: Reward, reason: str) -> None:
    """Files a trajectory; the lane goes on with another episode, or tries an invalid one again."""
    trajectory = lane.record.finish(lane.episode, lane.agent, reward, reason, self._version)
    if isinstance(reward, Invalid):
      self.invalid.append(trajectory)
      if len(self.invalid) > self._most_invalid:
        raise TooManyInvalid(
          f"{len(self.invalid)} episodes of a batch failed for reasons of infrastructure, more "
          f"than sandbox.invalid_cap={self._runner.invalid_cap:g} allows; the last: {reward.reason}"
        )
      self._queue.appendleft(lane.episode)
    else:
      self.done.append(trajectory)
    self._launch(lane)

  def _ready(self, block: bool) -> set[cf.Future]:
    """Futures that are done; with `block`, waits for at least one of them."""
    done, silent = cf.wait(self._waiting, timeout=0)
    # An answer that lay here while the engine was busy (compiling, say) was not late.
    oldest = min((self._waiting[future][1] for future in silent), default=time.monotonic())
    left = self._runner.env_deadline - (time.monotonic() - oldest)
    if left <= 0:
      raise TimeoutError(f"an environment did not answer within {self._runner.env_deadline:g} s")
    if block and not done:
      done, _ = cf.wait(self._waiting, timeout=left, return_when=cf.FIRST_COMPLETED)
    return done
