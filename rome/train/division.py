"""Which devices of a process generate, which train, and which do both in turn.

The trainer has the first devices (`rome.train.placement`), engines have the last `engine.devices`
ones. Where the two overlap, devices are multiplexed as in section 2.2 of arXiv:2512.24873. While
nothing generates during an update (`rl.max_staleness` 0) they simply hold both: the engine's
weights and pages stay there. Where rollout goes on, they are lent: the engines there are let go of
before an update is computed and made anew with its weights (`rome.rollout.stream`).

Choice: one engine on the first device, the default, is never lent; it shares that device with the
trainer, as it did before there were several. Left out: devices that turn by load; a fixed subset is
what `docs/results/multiplexing.md` compares.
"""

import jax
from jax.sharding import Mesh

from rome.train.config import ConfigError, EngineConfig, RunConfig


def engine_devices(config: EngineConfig) -> tuple[jax.Device, ...]:
  """The devices of this process that generate, in order.

  Raises:
    ConfigError: there are fewer, or they cannot share the slots evenly.
  """
  have = jax.local_devices()
  count = len(have) if config.devices == -1 else config.devices
  if count > len(have):
    raise ConfigError(
      f"config.engine.devices must be at most the {len(have)} of this process, or -1 for all of "
      f"them, got {count}"
    )
  if config.slots % count:
    raise ConfigError(
      f"config.engine.slots must be a multiple of the {count} devices of engine.devices=-1, which "
      f"share them, got {config.slots}"
    )
  return tuple(have[-count:]) if count > 1 else (have[0],)


def lent(config: RunConfig, mesh: Mesh | None) -> tuple[jax.Device, ...]:
  """Devices that generate between updates and train during them, in order.

  Args:
    config: the run's settings.
    mesh: of the trainer; None for the first device.
  Raises:
    ConfigError: nothing would generate during an update; or see `engine_devices`.
  """
  engines = engine_devices(config.engine)
  if not config.rl.max_staleness or len(engines) == 1:
    return ()
  trainers = set(mesh.devices.flat) if mesh else {jax.local_devices()[0]}
  both = tuple(device for device in engines if device in trainers)
  if len(both) == len(engines):
    raise ConfigError(
      f"config.engine.devices={config.engine.devices}: training takes all {len(both)} of them "
      f"during updates, and rl.max_staleness={config.rl.max_staleness} needs one that goes on "
      "generating; make config.mesh smaller than the devices of this process, or set "
      "engine.devices=1 or rl.max_staleness=0"
    )
  return both
