"""Runs agents in environments against the engine and returns finished trajectories.

Environments act in threads while the engine generates for the others: a slow container delays its
own episode alone. Every episode has a fixed slot and a number that keys its randomness, so results
do not depend on who finishes first. An episode whose infrastructure failed is Invalid; it is
relaunched at once from the same initial state, so that the batch stays full, until failures pass a
cap.

Left out for now: redundant environments, groups, start states other than the initial one.
"""

import concurrent.futures as cf
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import chex
import numpy as np

from rome.agent import Agent
from rome.envs.sandbox import SandboxError
from rome.envs.task import Task, TaskError
from rome.rollout.engine import Engine, Reply
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
  """What one batch of episodes took; seconds and counts."""

  generate_seconds: float = 0.0
  env_wait_seconds: float = 0.0
  env_steps: int = 0
  sampled_tokens: int = 0
  invalid: tuple[Trajectory, ...] = ()


class _Slot:
  """The episodes of one engine slot, one after another; the first of the queue is running."""

  def __init__(self, queue: list[Episode]):
    self.queue = queue
    self.agent: Agent
    self.record: Recorder

  def close(self) -> None:
    if hasattr(self, "agent"):
      self.agent.env.close()


class EpisodeRunner:
  """Runs batches of episodes.

  Args:
    engine: the generation engine; all its slots are used.
    make_agent: an agent with its own environment for a task; called in a thread.
    max_reply: sampled tokens a reply.
    env_deadline: seconds after which a silent environment stops the run.
    invalid_cap: share of the batch that may fail for reasons of infrastructure.
  """

  def __init__(
    self,
    engine: Engine,
    make_agent: Callable[[Task], Agent],
    *,
    max_reply: int,
    env_deadline: float,
    invalid_cap: float,
  ):
    self.engine, self.make_agent = engine, make_agent
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
    self.engine.load(params, key)
    sampled_before = self.engine.sampled_tokens
    batch = _Batch(self, version, episodes)
    batch.play()
    batch.stats.sampled_tokens = self.engine.sampled_tokens - sampled_before
    batch.stats.invalid = tuple(batch.invalid)
    return sorted(batch.done, key=lambda t: t.id), batch.stats


class _Batch:
  """One call of `EpisodeRunner.run`: who is waiting for whom."""

  def __init__(self, runner: EpisodeRunner, version: int, episodes: Sequence[Episode]):
    self._runner, self._engine, self._version = runner, runner.engine, version
    self._most_invalid = runner.invalid_cap * len(episodes)
    n = self._engine.slots
    self._slots = [_Slot(list(episodes[s::n])) for s in range(n)]
    self._waiting: dict[cf.Future, tuple[int, float]] = {}  # slot and time of submission
    self.done: list[Trajectory] = []
    self.invalid: list[Trajectory] = []
    self.stats = RolloutStats()

  def play(self) -> None:
    """Alternates between taking what environments gave and generating, until all is done."""
    try:
      for s, slot in enumerate(self._slots):
        if slot.queue:
          self._launch(s)
      while self._waiting or self._engine.busy:
        started = time.monotonic()
        for future in self._ready(block=not self._engine.busy):
          self._continue(self._waiting.pop(future)[0], future)
        generating = time.monotonic()
        self.stats.env_wait_seconds += generating - started
        for reply in self._engine.step():
          self._act(reply)
        self.stats.generate_seconds += time.monotonic() - generating
    finally:
      cf.wait(self._waiting, timeout=self._runner.env_deadline)
      for slot in self._slots:
        slot.close()

  def _submit(self, s: int, work: Callable[..., Any], *args: Any) -> None:
    self._waiting[self._runner.threads.submit(work, *args)] = (s, time.monotonic())

  def _launch(self, s: int) -> None:
    self._slots[s].record = Recorder()
    self._submit(s, self._begin, self._slots[s])

  def _begin(self, slot: _Slot) -> list[int]:
    slot.close()
    slot.agent = self._runner.make_agent(slot.queue[0].task)
    return slot.agent.begin()

  def _act(self, reply: Reply) -> None:
    """Hands a finished reply to its environment."""
    slot = self._slots[reply.slot]
    slot.record.reply(reply.tokens, reply.logps)
    self.stats.env_steps += 1
    self._submit(reply.slot, slot.agent.act, reply.tokens)

  def _continue(self, s: int, future: cf.Future) -> None:
    """Takes what an environment gave: more context to generate from, or the end."""
    slot = self._slots[s]
    try:
      context = future.result()
    except SandboxError as e:
      self._finish(s, Invalid(str(e)), "sandbox_lost")
      return
    if context is None:
      self._finish(s, Valid(slot.agent.reward), slot.agent.end_reason)
      return
    if slot.record.calls == 0:
      self._engine.start(s, slot.queue[0].number)
    if len(context) + self._runner.max_reply > self._engine.room(s):
      self._overflow(s, len(context))
      return
    slot.record.context(context)
    self._engine.ask(s, context, self._runner.max_reply)

  def _overflow(self, s: int, tokens: int) -> None:
    """Ends an episode whose context is full; one that cannot even begin is the task's fault."""
    slot = self._slots[s]
    if not slot.record.calls:
      raise TaskError(
        f"the prompt of task {slot.queue[0].task.id} has {tokens} tokens, which with a reply of "
        f"{self._runner.max_reply} overflows the context of {self._engine.cache_length}; "
        "shorten its instruction or raise agent.context"
      )
    slot.agent.stop("context_full")
    self._finish(s, Valid(0.0), "context_full")

  def _finish(self, s: int, reward: Reward, reason: str) -> None:
    """Files a trajectory; the slot goes on with its next episode, or tries an invalid one again."""
    slot = self._slots[s]
    trajectory = slot.record.finish(slot.queue[0], slot.agent, reward, reason, self._version)
    if isinstance(reward, Invalid):
      self.invalid.append(trajectory)
      if len(self.invalid) > self._most_invalid:
        raise TooManyInvalid(
          f"{len(self.invalid)} episodes of a batch failed for reasons of infrastructure, more "
          f"than sandbox.invalid_cap={self._runner.invalid_cap:g} allows; the last: {reward.reason}"
        )
    else:
      self.done.append(trajectory)
      slot.queue.pop(0)
    if slot.queue:
      self._launch(s)

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
