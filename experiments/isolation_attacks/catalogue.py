"""All attacks, in the order in which they are played."""

from experiments.isolation_attacks import (
  exhaustion,
  hostcalls,
  kernel,
  leftovers,
  network,
  processes,
  verifier,
)
from experiments.isolation_attacks.attack import Attack

ATTACKS: tuple[Attack, ...] = (
  *kernel.ATTACKS,
  *processes.ATTACKS,
  *network.ATTACKS,
  *hostcalls.ATTACKS,
  *verifier.ATTACKS,
  *leftovers.ATTACKS,
  *exhaustion.ATTACKS,
)
