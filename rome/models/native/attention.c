// Attention of a few tokens of one row to the pages of that row.
//
// Scores of a page are one vector: keys lie transposed, [H, 16]. Per token and head: the scores of
// all positions up to its own; their maximum (which has no order); exp, with sums a lane, added over
// the lanes at the end; values weighted and added, position by position. Which tokens share the walk
// over the pages changes none of that. A token never touches values behind its own position, not
// even with weight 0: what lies there need not be finite.

#include "native.h"

enum { QUERIES = 8, SPARE = 8 };  // queries a walk; pages of scores written for nothing

long attend_scratch(long pages, int padded) {
  return QUERIES * (PAGE * (pages + SPARE) + padded) + padded;
}

// Scores of `queries` queries on `pages` pages, which may repeat; scores[i] has room for them.
INLINE void score(int queries, int pages, int width, const float *const *k, const float *const *q,
                  float *const *scores) {
  v16 c[8][8];
#pragma GCC unroll 8
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
    for (int p = 0; p < pages; p++) c[i][p] = splat(0);
  for (int h = 0; h < width; h++) {
    v16 b[8];
#pragma GCC unroll 8
    for (int p = 0; p < pages; p++) b[p] = load16(k[p] + PAGE * h);
#pragma GCC unroll 8
    for (int i = 0; i < queries; i++) {
      v16 a = splat(q[i][h]);
#pragma GCC unroll 8
      for (int p = 0; p < pages; p++) c[i][p] = fma16(a, b[p], c[i][p]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
    for (int p = 0; p < pages; p++) store16(scores[i] + PAGE * p, c[i][p]);
}

// All scores of 1, 2, 4 or 8 queries on pages 0..pages-1 of a row.
static void score_row(const struct attention *a, int group, const int *table, int queries,
                      int pages, const float *const *q, float *const *scores) {
  int step = queries == 1 ? 8 : queries == 8 ? 2 : 4;
  long offset = (long)group * a->width * PAGE;
  for (int first = 0; first < pages; first += step) {
    const float *k[8];
    float *to[QUERIES];
    for (int p = 0; p < step; p++)
      k[p] = a->k + table[MIN(first + p, pages - 1)] * a->page_stride_k + offset;
    for (int i = 0; i < queries; i++) to[i] = scores[i] + PAGE * first;
    switch (queries) {
      case 1: score(1, 8, a->width, k, q, to); break;
      case 2: score(2, 4, a->width, k, q, to); break;
      case 4: score(4, 4, a->width, k, q, to); break;
      default: score(8, 2, a->width, k, q, to);
    }
  }
}

// exp(scale * (score - max)) of `count` scores, 0 in the rest of the last page; returns their sum.
static float softmax(float *scores, int count, float scale) {
  const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const v16 none = splat(-__builtin_inff());
  v16 most = none, total = splat(0);
  for (int i = 0; i < count; i += PAGE) {
    v16 s = where16(lane < count - i, load16(scores + i) * splat(scale), none);
    most = where16(s > most, s, most);
    store16(scores + i, s);
  }
  v16 top = splat(max16(most));
  for (int i = 0; i < count; i += PAGE) {
    v16 p = exp16(load16(scores + i) - top);
    total += p;
    store16(scores + i, p);
  }
  return sum16(total);
}

// sums[i][0..16*vectors) += weights[i][t] * v[t], t = 0..count-1 of one page.
INLINE void weigh(int queries, int vectors, const float *v, long ldv, int count,
                  const float *const *weights, float *const *sums) {
  v16 c[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) c[i][j] = load16(sums[i] + 16 * j);
  for (int t = 0; t < count; t++) {
    v16 b[4];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) b[j] = load16(v + t * ldv + 16 * j);
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) {
      v16 a = splat(weights[i][t]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) c[i][j] = fma16(a, b[j], c[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) store16(sums[i] + 16 * j, c[i][j]);
}

// The same over positions from..to-1 of the row, all of H.
static void weigh_row(const struct attention *a, int group, const int *table, int queries,
                      int from, int to, const float *const *weights, float *const *sums) {
  for (int t = from, next; t < to; t = next) {
    next = MIN(to, t / PAGE * PAGE + PAGE);
    const float *v = a->v + table[t / PAGE] * a->page_stride_v +
                     ((long)group * PAGE + t % PAGE) * a->padded;
    const float *w[4];
    for (int i = 0; i < queries; i++) w[i] = weights[i] + t;
    for (int at = 0; at < a->padded;) {
      int wide = a->padded - at >= 64;
      float *s[4];
      for (int i = 0; i < queries; i++) s[i] = sums[i] + at;
#define WEIGH(Q) \
  if (wide) weigh(Q, 4, v + at, a->padded, next - t, w, s); \
  else weigh(Q, 1, v + at, a->padded, next - t, w, s)
      switch (queries) {
        case 1: WEIGH(1); break;
        case 2: WEIGH(2); break;
        default: WEIGH(4);
      }
#undef WEIGH
      at += wide ? 64 : 16;
    }
  }
}

static int up_to_power(int n) { return n > 4 ? 8 : n > 2 ? 4 : n; }

// At most QUERIES queries of one row; counts[i]: how many positions query i attends to.
static void walk(const struct attention *a, int group, const int *table, int queries,
                 const float *const *q, float *const *out, const int *counts, float *scratch) {
  int most = 0;
  for (int i = 0; i < queries; i++) most = counts[i] > most ? counts[i] : most;
  int pages = (most + PAGE - 1) / PAGE;
  long room = PAGE * (pages + SPARE);
  float *scores[QUERIES], *sums[QUERIES], total[QUERIES];
  const float *query[QUERIES];
  for (int i = 0; i < QUERIES; i++) {  // places that are left repeat the first query, for nothing
    query[i] = q[i < queries ? i : 0];
    scores[i] = scratch + i * room;
    sums[i] = scratch + QUERIES * room + MIN(i, queries) * a->padded;
  }
  score_row(a, group, table, up_to_power(queries), pages, query, scores);
  for (int i = 0; i < queries; i++) {
    total[i] = softmax(scores[i], counts[i], a->scale);
    memset(sums[i], 0, a->padded * sizeof(float));
  }
  for (int first = 0; first < queries; first += 4) {
    int mine = MIN(4, queries - first), shared = counts[first];
    for (int i = first; i < first + mine; i++) shared = MIN(shared, counts[i]);
    weigh_row(a, group, table, up_to_power(mine), 0, shared, (const float *const *)scores + first,
              sums + first);
    for (int i = first; i < first + mine; i++)
      weigh_row(a, group, table, 1, shared, counts[i], (const float *const *)scores + i, sums + i);
  }
  for (int i = 0; i < queries; i++)
    for (int h = 0; h < a->width; h++) out[i][h] = sums[i][h] / total[i];
}

void attend(const struct attention *a, int group, const int *table, const float *const *q,
            float *const *out, const int *positions, int tokens, float *scratch) {
  int heads = a->heads / a->groups, queries = 0, counts[QUERIES];
  const float *query[QUERIES];
  float *to[QUERIES];
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < heads; h++) {
      query[queries] = q[t] + h * a->width;
      to[queries] = out[t] + h * a->width;
      counts[queries++] = positions[t] + 1;
      if (queries == QUERIES || (t == tokens - 1 && h == heads - 1)) {
        walk(a, group, table, queries, query, to, counts, scratch);
        queries = 0;
      }
    }
}
