"""Demonstrations: reference solutions played by a scripted policy in real sandboxes.

Their observations are what the commands really print. Their log-probs are NaN, because no policy
sampled them: they can be imitated and never reinforced.
"""

import concurrent.futures as cf
import math
from collections.abc import Sequence

import numpy as np

from rome.agent import NewRow
from rome.agent.world import World
from rome.envs.task import Task, TaskError
from rome.rollout.groups import Member
from rome.rollout.recorder import Episode, Recorder
from rome.rollout.workers import Workers
from rome.trajectory import Trajectory, Valid


def demonstrate(
  tasks: Sequence[Task],
  world: World | Workers,
  threads: int,
  max_rows: float = math.inf,
) -> list[Trajectory]:
  """Plays the reference solution of every task and records it, in the order of `tasks`.

  Raises:
    TaskError: a reference solution does not pass its tests, does not fit into the context, or takes
      more than `max_rows` rows.
  """
  with cf.ThreadPoolExecutor(threads, thread_name_prefix="demo") as pool:
    return list(pool.map(lambda task: _play(task, world, max_rows), tasks))


def _play(task: Task, world: World | Workers, max_rows: float) -> Trajectory:
  agent = world.agent(task)
  record = Recorder()
  try:
    context: list[int] | NewRow | None = agent.begin()
    for reply in world.demonstration(task.solution):
      if context is None:
        break
      record.context(context)
      record.reply(reply, [np.nan] * len(reply), version=0)
      context = agent.act(reply)
  finally:
    agent.env.close()
  if agent.reward <= 0:
    raise TaskError(
      f"the reference solution of task {task.id} does not pass its tests within "
      f"{agent.max_turns} turns; mend solution.sh or tests.sh, or raise agent.max_turns"
    )
  episode = Episode(id=f"{task.id}#demo", task=task, member=Member(0, 0))
  demo = record.finish(episode, agent, Valid(agent.reward), agent.end_reason)
  longest = max(row.tokens.stop - row.tokens.start for row in demo.rows)
  if longest > world.context:
    raise TaskError(
      f"the reference solution of task {task.id} takes {longest} tokens, more than "
      f"agent.context={world.context}; shorten it or raise agent.context"
    )
  if len(demo.rows) > max_rows:
    raise TaskError(
      f"the reference solution of task {task.id} takes {len(demo.rows)} rows, since its agent "
      f"rewrites the context, and a device call has {max_rows}; raise sft.micro_rows and "
      "rl.micro_rows"
    )
  return demo
