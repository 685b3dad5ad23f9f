"""The decoder's forward pass for generation on CPUs, in C.

`pack` lays weights out once a policy; `extend` appends tokens to a paged KV cache; `logits` reads
the head. They are XLA custom calls, for jitted programs and the loops in them. What the decoder
computes, they compute up to rounding; in exchange for it they run near the bandwidth of the memory,
and a token's bits depend on its own context alone, however rows and calls are put together.

Left out: gradients, bfloat16, meshes, and the router's statistics besides the choices. Training and
scoring stay with `rome.models.decoder`.
"""

from rome.models.native.build import NativeUnavailable
from rome.models.native.engine import extend, logits, unavailable
from rome.models.native.packing import Packed, pack
from rome.models.native.pages import PAGE, Pages, copy_pages, init_pages

__all__ = [
  "NativeUnavailable",
  "PAGE",
  "Packed",
  "Pages",
  "copy_pages",
  "extend",
  "init_pages",
  "logits",
  "pack",
  "unavailable",
]
