// Rows times panels of 64 columns: the product that all projections are made of.
//
// A panel is [K, 64], contiguous: a pass over it is one stream. Up to six rows share a pass: 6 x 4
// vectors of sums, 4 of weights and the broadcast values fill the 32 registers of AVX-512. More
// rows take the panel in chunks that stay in the first cache, while what follows is prefetched:
// memory and arithmetic overlap. A sum always runs over k upwards, one fused multiply-add a step,
// so its bits do not depend on the block or the chunks that it was computed in: a float32 that is
// stored and loaded again is the same.

#include "native.h"

enum {
  BLOCK = 6,    // rows that share a pass
  DEPTH = 64,   // k of a chunk: 16 KiB of weights
  AHEAD = 2048  // bytes by which prefetching leads where there is one block
};

// One block of `rows` rows over `steps` values of k. Prefetches `lines` cache lines a step.
INLINE void block(int rows, int lines, const float *w, const float *const *x, long steps,
                  const char *ahead, float *sums, int fresh) {
  v16 c[BLOCK][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) c[r][j] = fresh ? splat(0) : load16(sums + r * PANEL + 16 * j);
  for (long d = 0; d < steps; d++) {
#pragma GCC unroll 4
    for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + 64 * i);
    ahead += 64 * lines;
    v16 b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) b[j] = load16(w + 16 * j);
    w += PANEL;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      v16 a = splat(x[r][d]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) c[r][j] = fma16(a, b[j], c[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) store16(sums + r * PANEL + 16 * j, c[r][j]);
}

#define CASE(ROWS, LINES) \
  case ROWS: block(ROWS, LINES, w, x, steps, ahead, sums, fresh); break;
#define KERNEL(LINES)                                                                        \
  static void block_##LINES(int rows, const float *w, const float *const *x, long steps,     \
                            const char *ahead, float *sums, int fresh) {                     \
    switch (rows) {                                                                          \
      CASE(1, LINES) CASE(2, LINES) CASE(3, LINES) CASE(4, LINES) CASE(5, LINES) CASE(6, LINES) \
    }                                                                                        \
  }
KERNEL(0)
KERNEL(1)
KERNEL(2)
KERNEL(4)

void panel_product(const float *panel, long k, const float *x, long ldx, const int *rows, int m,
                   float *sums) {
  const float *row[CHUNK_ROWS];
  for (int i = 0; i < m; i++) row[i] = x + (rows ? rows[i] : i) * ldx;
  if (m <= BLOCK) {
    block_4(m, panel, row, k, (const char *)panel + AHEAD, sums, 1);
    return;
  }
  int blocks = (m + BLOCK - 1) / BLOCK, lines = blocks < 4 ? 2 : 1;
  for (long from = 0; from < k; from += DEPTH) {
    long steps = MIN(DEPTH, k - from);
    const float *w = panel + from * PANEL;
    const char *ahead = (const char *)(w + steps * PANEL);
    for (int b = 0, i = 0; b < blocks; b++) {
      // Rows are spread evenly, and the prefetching over the first blocks.
      int size = (m - i) / (blocks - b);
      const float *const *at = row + i;
      float *mine = sums + i * PANEL;
      if (from)
        for (int r = 0; r < size; r++) row[i + r] += DEPTH;
      if (b * lines >= 4)
        block_0(size, w, at, steps, ahead, mine, !from);
      else if (lines == 2)
        block_2(size, w, at, steps, ahead + b * steps * 128, mine, !from);
      else
        block_1(size, w, at, steps, ahead + b * steps * 64, mine, !from);
      i += size;
    }
  }
}
