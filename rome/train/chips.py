"""TPU chips and slices of them: what a plan is compared with, and devices to compile for.

Sources: the pages "TPU v5p", "TPU v5e" and "TPU v6e" of the Cloud TPU documentation, read in
2026: "Peak compute per chip (bf16)", "HBM capacity" and "HBM bandwidth per chip", and half of the
"Bidirectional inter-chip interconnect (ICI) bandwidth per chip", which is what a chip can send.
The HBM that a program can have is what libtpu 0.0.42 names when it refuses one.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip; jax sees it as one device.

  Attributes:
    flops: bfloat16 FLOP/s.
    hbm_bytes: memory that a program can have.
    hbm_rate: bytes/s between memory and the cores.
    ici_rate: bytes/s that the chip can send to its neighbours, all links together.
    axes: dimensions of a slice.
  """

  flops: float
  hbm_bytes: float
  hbm_rate: float
  ici_rate: float
  axes: int


CHIPS = {
  "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9, 2),
  "v5p": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9, 3),
  "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 400e9, 2),
}
_NEEDS_LIBTPU = (
  'compiling for a TPU needs libtpu (no TPU): pip install "rome[tpu]" or pip install "jax[tpu]"'
)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to plan for.

  Attributes:
    name: as the user gave it.
    count: devices.
    chip: None for CPU devices.
  """

  name: str
  count: int
  chip: Chip | None


def parse_topology(name: str) -> Topology:
  """Reads `v5p:4x4x4` or `cpu:8`; loads neither jax's backends nor libtpu.

  Raises:
    ValueError: the name is malformed, the chip unknown, or the slice has the wrong dimensions.
  """
  chip_name, _, shape = name.partition(":")
  if chip_name == "cpu":
    if not re.fullmatch(r"[1-9]\d{0,3}", shape):
      raise ValueError(f"topology {name!r}: write cpu:8 for eight virtual CPU devices")
    return Topology(name, int(shape), None)
  if chip_name not in CHIPS:
    raise ValueError(
      f"topology {name!r}: no chip {chip_name!r}; known are {', '.join(CHIPS)} and cpu"
    )
  chip = CHIPS[chip_name]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != chip.axes - 1:
    example = "x".join("4" * chip.axes)
    raise ValueError(
      f"topology {name!r}: a {chip_name} slice has {chip.axes} dimensions, as {chip_name}:{example}"
    )
  return Topology(name, math.prod(map(int, shape.split("x"))), chip)


def require_libtpu(topology: Topology) -> None:
  """Raises ValueError, with the line to install it, where libtpu is needed and missing."""
  if topology.chip and not (
    os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")
  ):
    raise ValueError(f"topology {topology.name!r}: {_NEEDS_LIBTPU}")


def isolate(topology: Topology) -> None:
  """Sets up the process for `devices`. Call it before jax makes its first device.

  libtpu must ask nobody what machine it runs on: neither Google's metadata server nor an
  accelerator, of which there is none. Nothing of it needs a network.
  """
  if topology.chip:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Its lock keeps programs from sharing a TPU; here is none, and plans may run side by side.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  else:
    # Devices that exist already stay as they are; `devices` counts them.
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", topology.count)
  jax.config.update("jax_platforms", "cpu")


def devices(topology: Topology) -> list[jax.Device]:
  """The devices of a topology: of CPUs real ones, of TPUs ones that can only be compiled for.

  Raises:
    ValueError: libtpu does not know the slice, or jax has fewer CPU devices.
  """
  if not topology.chip:
    found = jax.devices("cpu")
    if len(found) < topology.count:
      have = f"jax already runs with {len(found)} CPU devices"
      raise ValueError(f"topology {topology.name!r}: {have}")
    return found[: topology.count]
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(topology.name, "tpu").devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology {topology.name!r}: {error}") from error
