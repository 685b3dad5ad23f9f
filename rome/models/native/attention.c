// Attention of a few tokens of one row to the pages of that row.
//
// A query walks the pages in steps of eight from position 0: scores, of which a page's are one
// vector, since keys lie transposed, [H, 16]; their maximum; exp, and its sums a lane; values
// weighted and added, position by position. Where a step raises the maximum, what was summed before
// is scaled down (the "online softmax", arXiv:1805.02867): a step of keys and values is read into
// the cache once for all queries. Steps begin at the same positions for every query, and a query's
// sums are its own, so its bits do not depend on who walks along. It never touches a value behind
// its own position, not even with weight 0: what lies there need not be finite.

#include "native.h"

enum {
  STEP = 8,                // pages of a step
  SPAN = STEP * PAGE,      // its positions
  BATCH = 8,               // queries that share the registers when scores are made
  SLICE = 4,               // and when values are added
  LIST = MAX_QUERIES + BATCH  // queries, and a batch of places that only fill up
};

struct query {
  const float *q;
  float *out;
  int count;  // positions it attends to
};

struct walk {
  const struct query *query;
  int queries;
  float *scores, *sums, *totals, *tops;  // [BATCH][SPAN], [LIST][Hp], [..][16], [..]
};

long attend_scratch(int padded) { return BATCH * SPAN + (long)LIST * (padded + 16 + 1); }

// Scores of `queries` queries on `pages` pages, which may repeat. With `fetch`, pages of values and
// the keys of the next step are prefetched meanwhile: pages lie anywhere, which hardware cannot
// foresee.
INLINE void score(int queries, int pages, int width, const float *const *k, const float *const *q,
                  float *scores, int fetch, const float *const *v, const float *const *next) {
  v16 c[BATCH][STEP];
#pragma GCC unroll 8
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
    for (int p = 0; p < pages; p++) c[i][p] = splat(0);
  for (int h = 0; h < width; h++) {
    v16 b[STEP];
#pragma GCC unroll 8
    for (int p = 0; p < pages; p++) {
      b[p] = load16(k[p] + PAGE * h);
      if (fetch) {
        __builtin_prefetch(v[p] + PAGE * h);
        __builtin_prefetch(next[p] + PAGE * h);
      }
    }
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
    for (int p = 0; p < pages; p++) store16(scores + i * SPAN + PAGE * p, c[i][p]);
}

static int up_to_power(int n) { return n > 4 ? 8 : n > 2 ? 4 : n; }

// Scores of a batch on a step's pages. k and v: its pages; next: keys of the step after it.
static void score_step(int queries, int pages, int width, const float *const *k,
                       const float *const *v, const float *const *next, const float *const *q,
                       float *scores, int fetch) {
  queries = up_to_power(queries);
  int some = queries == 1 ? 8 : queries == 8 ? 2 : 4;
  for (int p = 0; p < pages; p += some) {
    // Places behind the last page hold pages too: see `attend`.
#define SCORE(Q, P)                                                                        \
  if (fetch) score(Q, P, width, k + p, q, scores + PAGE * p, 1, v + p, next + p);          \
  else score(Q, P, width, k + p, q, scores + PAGE * p, 0, NULL, NULL)
    switch (queries) {
      case 1: SCORE(1, 8); break;
      case 2: SCORE(2, 4); break;
      case 4: SCORE(4, 4); break;
      default: SCORE(8, 2);
    }
#undef SCORE
  }
}

// Turns `count` scores into weights under the maximum so far, 0 in the rest of the last page, and
// brings what was summed before under the new maximum.
static void soften(float *scores, int count, float scale, float *top, float *total, float *sums,
                   int padded) {
  const i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const v16 none = splat(-__builtin_inff());
  v16 most = none, sum = load16(total);
  for (int i = 0; i < count; i += PAGE) {
    v16 s = where16(lane < count - i, load16(scores + i) * splat(scale), none);
    most = more16(s, most);
    store16(scores + i, s);
  }
  float new_top = max16(most);
  if (new_top > *top) {
    v16 by = exp16(splat(*top - new_top));
    sum *= by;
    for (int j = 0; j < padded; j += 16) store16(sums + j, load16(sums + j) * by);
    *top = new_top;
  }
  for (int i = 0; i < count; i += PAGE) {
    v16 p = exp16(load16(scores + i) - splat(*top));
    sum += p;
    store16(scores + i, p);
  }
  store16(total, sum);
}

// sums[i][0..16*vectors) += weights[i][t] * v[t], for positions t = from..to-1 of a step.
INLINE void weigh(int queries, int vectors, const float *const *v, long at, long ldv, int from,
                  int to, const float *weights, float *const *sums) {
  v16 c[SLICE][4];
#pragma GCC unroll 4
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) c[i][j] = load16(sums[i] + at + 16 * j);
  for (int t = from, end; t < to; t = end) {
    end = MIN(to, t / PAGE * PAGE + PAGE);
    const float *row = v[t / PAGE] + t % PAGE * ldv + at;
    for (int u = t; u < end; u++, row += ldv) {
      v16 b[4];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) b[j] = load16(row + 16 * j);
#pragma GCC unroll 4
      for (int i = 0; i < queries; i++) {
        v16 a = splat(weights[i * SPAN + u]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) c[i][j] = fma16(a, b[j], c[i][j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) store16(sums[i] + at + 16 * j, c[i][j]);
}

static void weigh_step(int queries, const float *const *v, int padded, int from, int to,
                       const float *weights, float *const *sums) {
  for (int at = 0; at < padded;) {
    int wide = padded - at >= 64;
#define WEIGH(Q)                                                           \
  if (wide) weigh(Q, 4, v, at, padded, from, to, weights, sums);           \
  else weigh(Q, 1, v, at, padded, from, to, weights, sums)
    switch (up_to_power(queries)) {
      case 1: WEIGH(1); break;
      case 2: WEIGH(2); break;
      default: WEIGH(4);
    }
#undef WEIGH
    at += wide ? 64 : 16;
  }
}

// One step of the queries first..first+BATCH-1, as far as there are such. start: its position.
static void batch_step(const struct attention *a, const struct walk *w, int first, int start,
                       int pages, const float *const *k, const float *const *v,
                       const float *const *next, int fetch) {
  int queries = MIN(BATCH, w->queries - first), here[BATCH], most = 0;
  const float *q[BATCH];
  float *sums[BATCH];
  for (int i = 0; i < BATCH; i++) {  // places that are left repeat the first query, for nothing
    const struct query *query = w->query + first + (i < queries ? i : 0);
    q[i] = query->q;
    here[i] = i < queries ? MIN(SPAN, query->count - start) : 0;
    most = here[i] > most ? here[i] : most;
    sums[i] = w->sums + (i < queries ? first + i : MAX_QUERIES + i) * (long)a->padded;
  }
  if (!most) return;
  score_step(queries, MIN(pages, (most + PAGE - 1) / PAGE), a->width, k, v, next, q, w->scores,
             fetch);
  for (int i = 0; i < queries; i++)
    if (here[i] > 0)
      soften(w->scores + i * SPAN, here[i], a->scale, w->tops + first + i,
             w->totals + (first + i) * 16, sums[i], a->padded);
  for (int from = 0; from < queries; from += SLICE) {
    int mine = MIN(SLICE, queries - from), shared = here[from];
    for (int i = from; i < from + mine; i++) shared = MIN(shared, here[i]);
    weigh_step(mine, v, a->padded, 0, shared, w->scores + from * SPAN, sums + from);
    for (int i = from; i < from + mine; i++)
      weigh_step(1, v, a->padded, shared > 0 ? shared : 0, here[i], w->scores + i * SPAN, sums + i);
  }
}

static void walk_pages(const struct attention *a, int group, const int *table,
                       const struct walk *w) {
  int most = 0;
  for (int i = 0; i < w->queries; i++) most = w->query[i].count > most ? w->query[i].count : most;
  int pages = (most + PAGE - 1) / PAGE;
  memset(w->sums, 0, (size_t)LIST * a->padded * sizeof(float));
  memset(w->totals, 0, (size_t)LIST * 16 * sizeof(float));
  for (int i = 0; i < LIST; i++) w->tops[i] = -__builtin_inff();
  for (int start = 0; start < pages; start += STEP) {
    const float *k[2 * STEP], *v[STEP];
    for (int p = 0; p < 2 * STEP; p++) {  // behind the last page it is repeated
      long page = table[MIN(start + p, pages - 1)];
      k[p] = a->k + page * a->page_stride_k + (long)group * a->width * PAGE;
      if (p < STEP) v[p] = a->v + page * a->page_stride_v + (long)group * PAGE * a->padded;
    }
    for (int first = 0; first < w->queries; first += BATCH)
      batch_step(a, w, first, start * PAGE, MIN(STEP, pages - start), k, v, k + STEP, first == 0);
  }
  for (int i = 0; i < w->queries; i++) {
    const float *sums = w->sums + (long)i * a->padded;
    float total = sum16(load16(w->totals + i * 16)), *out = w->query[i].out;
    for (int h = 0; h < a->width; h++) out[h] = sums[h] / total;
  }
}

void attend(const struct attention *a, int group, const int *table, const float *const *q,
            float *const *out, const int *positions, int tokens, float *scratch) {
  struct query query[MAX_QUERIES];
  struct walk w = {.query = query, .scores = scratch, .sums = scratch + BATCH * SPAN};
  w.totals = w.sums + (long)LIST * a->padded;
  w.tops = w.totals + LIST * 16;
  int heads = a->heads / a->groups;
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < heads; h++) {
      query[w.queries++] = (struct query){q[t] + h * a->width, out[t] + h * a->width,
                                          positions[t] + 1};
      if (w.queries == MAX_QUERIES || (t == tokens - 1 && h == heads - 1)) {
        walk_pages(a, group, table, &w);
        w.queries = 0;
      }
    }
}
