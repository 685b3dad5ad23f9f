"""What the engine asks of a model; `rome.rollout.engine.choice` picks who answers.

Keys and values lie in pages of PAGE tokens; a row's table names its pages in order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import chex
import numpy as np

from rome import models


@dataclasses.dataclass(frozen=True)
class Job:
  """Context tokens of one row to be computed: they lie at `start` and the places behind it.

  `before` are the tokens in front of `start` that share its page.
  """

  row: int
  start: int
  tokens: Sequence[int]
  before: Sequence[int] = ()


class Backend(Protocol):
  """One way to run a model. Hashable: traced functions close over it.

  Pages are a pytree with `choices` [P, PAGE, S, K], the experts that the router chose; the rest is
  the backend's own. `open`, `extend` and `close` are traced into the engine's decode program.
  """

  @property
  def name(self) -> str: ...

  @property
  def compiler_options(self) -> tuple[tuple[str, Any], ...]:
    """Of the decode program, as (name, value)."""

  @property
  def config(self) -> models.ModelConfig: ...

  def prepare(self, params: chex.ArrayTree) -> Any:
    """Parameters as the other methods take them."""

  def init_pages(self, count: int) -> Any:
    """Empty pages."""

  def copy(self, pages: Any, source: np.ndarray, target: np.ndarray) -> Any:
    """Copies pages onto others; targets beyond the last page are dropped."""

  def prefill(self, params: Any, pages: Any, jobs: Sequence[Job], table: np.ndarray) -> Any:
    """Computes keys and values of context tokens."""

  def open(self, pages: Any, table_SxM: Any, start_S: Any, tail_SxT: Any) -> Any:
    """What a decode carries. `start` is where each row goes on, `tail` its last page's tokens."""

  def extend(
    self, params: Any, carry: Any, token_S: Any, place_S: Any, active_S: Any
  ) -> tuple[Any, Any]:
    """Takes one token a row at its place: logits [S, V] of what follows, and the new carry."""

  def close(self, carry: Any) -> Any:
    """The pages with what was computed."""
