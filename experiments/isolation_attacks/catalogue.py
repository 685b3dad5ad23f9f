"""All attacks, in the order in which they are played."""

from experiments.isolation_attacks import (
  exhaustion,
  hostcalls,
  judge,
  kernel,
  leftovers,
  network,
  policy,
  processes,
  sessions,
  verifier,
)
from experiments.isolation_attacks.attack import Attack

ATTACKS: tuple[Attack, ...] = (
  *kernel.ATTACKS,
  *processes.ATTACKS,
  *network.ATTACKS,
  *hostcalls.ATTACKS,
  *verifier.ATTACKS,
  *judge.ATTACKS,
  *sessions.ATTACKS,
  *policy.ATTACKS,
  *leftovers.ATTACKS,
  *exhaustion.ATTACKS,
)
