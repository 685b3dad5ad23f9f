// What the phases of one call share: see forward.c.

#ifndef ROME_NATIVE_STATE_H_
#define ROME_NATIVE_STATE_H_

#include "native.h"

enum { SOME = 4 };  // tokens of an item of the phases a token

struct panels {  // a product for the team: out = act(x[rows] @ w + bias)
  const float *w, *bias, *x;
  const int *rows, *out_rows;  // NULL: 0, 1, 2...
  float *out;
  long k, columns, ldx, ldo;   // columns that are written
  int m, gated;                // gated: panels hold 32 gates and their 32 ups
};

struct state {
  const struct model *m;
  const struct call *c;
  struct team *team;
  int n, layer, sparse_before, blocks;  // n: active tokens
  long wide, qkv_width, q_width, inner, scratch_each;  // padded widths
  int *token, *position, *row, *choice, *copy_row, *copy, *first, *block;
  float *x, *normed, *qkv, *attended, *projected, *weight, *hidden, *sums, *scratch;
  struct panels *product;  // of one phase, an entry an expert
  long *items;             // where an entry's items begin
  int products;
};

static inline long round16(long n) { return ROUND_UP(n, 16); }

// Work of the phases a token, `item` being SOME tokens, or a block of them and a group: tokens.c.
work_fn begin_work, keep_work, attend_work, route_work;

#endif  // ROME_NATIVE_STATE_H_
