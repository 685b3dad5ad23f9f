"""Traffic of programs written by hand, and of one that the compiler wrote."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from rome.models import sharding
from rome.train.hlo import Program, Traffic

# A loop of 5 rounds, each an all-gather; known to the text or only in the condition.
LOOP = """HloModule m, num_partitions=8

%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %g = f32[64]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %s = f32[16]{0} slice(%g), slice={[0:16]}
  ROOT %t = (s32[], f32[16]{0}) tuple(%i, %s)
}

%condition (q: (s32[], f32[16])) -> pred[] {
  %q = (s32[], f32[16]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[16]{0}) tuple(%zero, %a)
  %w = (s32[], f32[16]{0}) while(%start), condition=%condition, body=%body TRIPS
  ROOT %r = f32[16]{0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize("trips", ["", ', backend_config={"known_trip_count":{"n":"5"}}'])
def test_a_loop_counts_as_often_as_it_runs(trips):
  program = Program(LOOP.replace(" TRIPS", trips), 8)
  # 64 floats come out, of which this device had 16.
  assert program.collectives() == {"all-gather": Traffic(5, 5 * 256, 5 * 192)}
  # Each round: gather reads 64 bytes and writes 256; the slice reads and writes 64.
  assert program.memory_bytes() == 5 * (64 + 256 + 128)


def _entry(*lines: str) -> Program:
  body = "\n".join(f"  {line}" for line in lines)
  return Program(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8] parameter(0)\n{body}\n}}", 4)


@pytest.mark.parametrize(
  ("line", "kind", "expected"),
  [
    # Everybody sends all but its share, twice.
    (
      "f32[8] all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add",
      "all-reduce",
      (32, 32),
    ),
    ("f32[8] all-reduce(%a), replica_groups={}, to_apply=%add", "all-reduce", (32, 48)),
    (
      "f32[2] reduce-scatter(%a), replica_groups=mesh['x'=4,'y'=2] {'x'}, to_apply=%add",
      "reduce-scatter",
      (32, 24),
    ),
    (
      "(f32[8], f32[32]) all-gather-start(%a), replica_groups=[1,4]<=[4]",
      "all-gather",
      (128, 96),
    ),
    (
      "(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}",
      "collective-permute",
      (32, 32),
    ),
    ("(bf16[8], bf16[8]) all-to-all(%a, %a), replica_groups={{0,1}}", "all-to-all", (32, 16)),
  ],
)
def test_what_a_collective_sends(line, kind, expected):
  assert _entry(f"%c = {line}").collectives() == {kind: Traffic(1, *expected)}


def test_vector_memory_and_free_operations_do_not_count():
  program = _entry(
    "%b = f32[8]{0:T(128)S(1)} negate(%a)",  # reads 32
    "%c = f32[2,4] bitcast(%a)",
    "%d = (f32[8]{0:S(1)}, f32[8], u32[]{:S(2)}) copy-start(%a)",  # 32 of main memory
    "%e = f32[8]{0:S(1)} copy-done(%d)",
  )
  assert program.memory_bytes() == 64


def test_a_fusion_reads_the_slices_it_takes_and_writes_the_ones_it_puts():
  program = Program(
    """%fused (p: f32[100,8], q: f32[100,8], i: s32[]) -> f32[100,8] {
  %p = f32[100,8] parameter(0)
  %q = f32[100,8] parameter(1)
  %i = s32[] parameter(2)
  %s = f32[1,8] dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %u = f32[100,8] dynamic-update-slice(%q, %s, %i, %i)
}

ENTRY %main (a: f32[100,8], b: f32[100,8], n: s32[]) -> f32[100,8] {
  %a = f32[100,8] parameter(0)
  %b = f32[100,8] parameter(1)
  %n = s32[] parameter(2)
  ROOT %f = f32[100,8] fusion(%a, %b, %n), kind=kLoop, calls=%fused
}
""",
    1,
  )
  assert program.memory_bytes() == 32 + 4 + 32


@pytest.mark.devices8
def test_a_compiled_scan_of_gathers():
  mesh = sharding.make_mesh(fsdp=8)

  def gathered(x):
    def step(total, _):
      return total + jax.lax.all_gather(total[:2], "fsdp", tiled=True), None

    return jax.lax.scan(step, x, length=7)[0]

  spec = PartitionSpec()
  run = jax.shard_map(gathered, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  text = jax.jit(run).lower(jnp.zeros(16)).compile().as_text()
  assert Program(text, 8).collectives() == {"all-gather": Traffic(7, 7 * 64, 7 * 56)}
