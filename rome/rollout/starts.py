"""Episodes that begin inside an expert trajectory (section 3.2.4.4, arXiv:2512.24873).

Start s puts the environment where it stood after the first s chunks of an expert, and the context
with it; the policy goes on from there. The first member that starts at a boundary replays the
expert's chunks in a sandbox of its own and compares every observation with the recorded one; a
prefix that diverges is refused. Then it takes a snapshot, which the others restore instead of
replaying: a fork at the boundary. Their contexts are the same tokens, so that the engine computes
the prefix once.

Where a snapshot cannot hold all of the state (a process runs, or the environment has no `resume`),
every member replays.
"""

import collections
import concurrent.futures as cf
import dataclasses
import threading
from typing import Any

import numpy as np

from rome.agent import Agent, NewRow
from rome.envs import SandboxError, Snapshot
from rome.trajectory import Trajectory, Turn

_WAIT = 300.0  # seconds for whoever replays; the reset's own deadline is what counts
_KEPT = 64  # boundaries whose snapshots stay


class Divergent(RuntimeError):
  """An expert's chunks, replayed, no longer give what they gave; or leave no room for a reply."""


@dataclasses.dataclass(frozen=True)
class Start:
  """Where an episode begins.

  Attributes:
    expert: a verified success of the same task, from the initial state on; one row.
    chunks: of its chunks, how many stand before the policy's first, below their number.
  """

  expert: Trajectory
  chunks: int

  @property
  def context(self) -> list[int]:
    """The tokens in front of the policy's first chunk."""
    end = int(np.argmax(self.expert.call_ids == self.chunks))
    return self.expert.tokens[:end].tolist()


@dataclasses.dataclass(frozen=True)
class _Boundary:
  snapshot: Snapshot
  turns: tuple[Turn, ...]


class Boundaries:
  """The states at chunk boundaries of experts. For any thread."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._known: collections.OrderedDict[tuple[str, int], cf.Future] = collections.OrderedDict()

  def begin(self, agent: Agent, start: Start) -> list[int]:
    """Begins an episode at `start`.

    Args:
      agent: fresh, of the expert's task.
      start: where.
    Returns:
      The context: token ids of the prompt and of all turns before the start.
    Raises:
      Divergent: the replayed prefix is not the recorded one.
      SandboxError: as `Agent.begin`.
    """
    key = start.expert.id, start.chunks
    with self._lock:
      known, mine = self._known.get(key), cf.Future[_Boundary | None]()
      if known is None:
        self._known[key] = mine
        if len(self._known) > _KEPT:
          self._known.popitem(last=False)
    if known is not None:
      boundary = known.result(_WAIT)
      return _replay(agent, start) if boundary is None else _resume(agent, start, boundary)
    boundary = None
    try:
      context = _replay(agent, start)
      boundary = _take(agent)
      return context
    except BaseException:  # Those who wait replay for themselves; who comes later tries anew.
      with self._lock:
        self._known.pop(key, None)
      raise
    finally:
      mine.set_result(boundary)


def _replay(agent: Agent, start: Start) -> list[int]:
  wanted, tokens = start.context, agent.begin()
  for k in range(start.chunks):
    if tokens != wanted[: len(tokens)]:
      break
    reply = start.expert.tokens[start.expert.call_ids == k].tolist()
    more = agent.act(reply)
    if more is None or isinstance(more, NewRow):
      break
    tokens = tokens + reply + more
  if tokens != wanted:
    raise Divergent(
      f"the first {start.chunks} chunks of expert {start.expert.id} no longer lead where they led"
    )
  return tokens


def _take(agent: Agent) -> _Boundary | None:
  """A snapshot of where the agent stands; None where it would not be all of the state."""
  env: Any = agent.env.unwrapped
  if getattr(env, "sandbox", None) is None or not hasattr(env, "resume"):
    return None
  try:
    snapshot = env.sandbox.snapshot()
  except SandboxError:  # Something runs. If the sandbox is lost, the next action says so.
    return None
  whole = not snapshot.lost and not snapshot.lost_sockets
  return _Boundary(snapshot, tuple(agent.turns)) if whole else None


def _resume(agent: Agent, start: Start, boundary: _Boundary) -> list[int]:
  agent.begin()
  env: Any = agent.env.unwrapped
  env.resume(boundary.snapshot, start.chunks)
  context = start.context
  agent.resume(context, boundary.turns)
  return context
