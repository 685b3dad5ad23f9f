// The decoder, layer by layer, on the active tokens of a call.
//
// A layer: per token, the MLP's sum of the layer before and the norm; q, k, v; per token, norms of
// heads, rotation, keys and values into their pages; attention; the output projection; per token,
// the residual, norm and router; the experts' gate and up with their activation; down. Each is one
// phase of the team, as it needs all of the one before.

#include "native.h"

#include <stdlib.h>

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

static long round16(long n) { return ROUND_UP(n, 16); }

// --- products --------------------------------------------------------------------------------------

static void silu_mul(const float *sums, float *out, long columns) {
  for (int j = 0; j < 2; j++) {
    v16 gate = load16(sums + 16 * j), up = load16(sums + 32 + 16 * j);
    v16 y = gate / (splat(1) + exp16(-gate)) * up;
    float kept[16];
    store16(kept, y);
    long here = MIN(16, columns - 16 * j);
    if (here > 0) memcpy(out + 16 * j, kept, here * sizeof(float));
  }
}

static void product_item(const struct panels *p, long item, float *sums) {
  long chunks = (p->m + CHUNK_ROWS - 1) / CHUNK_ROWS, panel = item / chunks;
  int from = item % chunks * CHUNK_ROWS, m = MIN(CHUNK_ROWS, p->m - from);
  const float *x = p->rows ? p->x : p->x + from * p->ldx;
  panel_product(p->w + panel * p->k * PANEL, p->k, x, p->ldx, p->rows ? p->rows + from : NULL, m,
                sums);
  long each = p->gated ? PANEL / 2 : PANEL, at = panel * each, columns = MIN(each, p->columns - at);
  for (int r = 0; r < m; r++) {
    float *mine = sums + r * PANEL;
    float *out = p->out + (p->out_rows ? p->out_rows[from + r] : from + r) * p->ldo + at;
    if (p->bias)
      for (int j = 0; j < columns; j++) mine[j] += p->bias[at + j];
    if (p->gated)
      silu_mul(mine, out, columns);
    else
      memcpy(out, mine, columns * sizeof(float));
  }
}

static long product_items(const struct panels *p) {
  long each = p->gated ? PANEL / 2 : PANEL;
  return (p->columns + each - 1) / each * ((p->m + CHUNK_ROWS - 1) / CHUNK_ROWS);
}

static void products_work(void *arg, long item, int worker) {
  struct state *s = arg;
  int low = 0, high = s->products - 1;
  while (low < high) {  // the last entry that begins at or before the item
    int middle = (low + high + 1) / 2;
    if (s->items[middle] <= item)
      low = middle;
    else
      high = middle - 1;
  }
  product_item(s->product + low, item - s->items[low], s->sums + worker * CHUNK_ROWS * PANEL);
}

static void run_products(struct state *s) {
  long items = 0;
  for (int i = 0; i < s->products; i++) {
    s->items[i] = items;
    items += product_items(s->product + i);
  }
  team_run(s->team, products_work, s, items);
}

static void run_product(struct state *s, struct panels p) {
  s->product[0] = p;
  s->products = 1;
  run_products(s);
}

// --- per token -------------------------------------------------------------------------------------

// 1 / rms of x [padded], zeros behind `width`.
static float inverse_rms(const float *x, long padded, int width, float epsilon) {
  v16 total = splat(0);
  for (long i = 0; i < padded; i += 16) total = fma16(load16(x + i), load16(x + i), total);
  return 1.0f / __builtin_sqrtf(sum16(total) / (float)width + epsilon);
}

static void norm(const float *x, const float *scale, float *y, long padded, int width,
                 float epsilon) {
  v16 by = splat(inverse_rms(x, padded, width, epsilon));
  for (long i = 0; i < padded; i += 16) store16(y + i, load16(x + i) * by * load16(scale + i));
}

// x += the output of the MLP of the layer before.
static void add_mlp(struct state *s, int n) {
  const struct model *m = s->m;
  float *x = s->x + n * s->wide;
  int layer = s->layer - 1, chosen = m->layer[layer].router ? m->chosen : 0;
  for (long i = 0; i < s->wide; i += 16) {
    v16 y = splat(0);
    if (!chosen) y = load16(s->projected + n * s->wide + i);
    for (int k = 0; k < chosen; k++) {
      long copy = (long)n * chosen + k;
      y = fma16(splat(s->weight[copy]), load16(s->projected + copy * s->wide + i), y);
    }
    store16(x + i, load16(x + i) + y);
  }
}

static void begin_work(void *arg, long item, int worker) {
  (void)worker;
  struct state *s = arg;
  const struct model *m = s->m;
  for (int n = item * SOME; n < MIN(s->n, (item + 1) * SOME); n++) {
    float *x = s->x + n * s->wide, *y = s->normed + n * s->wide;
    if (s->layer)
      add_mlp(s, n);
    else
      memcpy(x, m->embedding + s->c->tokens[s->token[n]] * s->wide, s->wide * sizeof(float));
    int last = s->layer == m->layers;
    const float *scale = last ? m->norm : m->layer[s->layer].input_norm;
    norm(x, scale, y, s->wide, m->width, m->epsilon);
    if (last) memcpy(s->c->hidden + (long)s->token[n] * m->width, y, m->width * sizeof(float));
  }
}

// Norm and rotation of one head, in place.
static void turn(const struct model *m, float *x, const float *scale, const float *angles) {
  int width = m->head_width, half = width / 2;
  long padded = round16(width);
  float y[padded];
  memset(y, 0, sizeof y);
  memcpy(y, x, width * sizeof(float));
  if (scale) {
    float by = inverse_rms(y, padded, width, m->epsilon);
    for (int i = 0; i < width; i++) y[i] = y[i] * by * scale[i];
  }
  for (int i = 0; i < half; i++) {
    float cos = angles[i], sin = angles[half + i];
    x[i] = y[i] * cos - y[half + i] * sin;
    x[half + i] = y[half + i] * cos + y[i] * sin;
  }
}

static void keep_work(void *arg, long item, int worker) {
  (void)worker;
  struct state *s = arg;
  const struct model *m = s->m;
  const struct layer *layer = m->layer + s->layer;
  int width = m->head_width, groups = m->groups;
  long padded = round16(width);
  for (int n = item * SOME; n < MIN(s->n, (item + 1) * SOME); n++) {
    int position = s->position[n], at = position % PAGE;
    const float *angles = m->rope + (long)position * width;
    float *q = s->qkv + n * s->qkv_width, *k = q + s->q_width, *v = k + groups * width;
    for (int h = 0; h < m->heads; h++) turn(m, q + h * width, layer->q_norm, angles);
    for (int g = 0; g < groups; g++) turn(m, k + g * width, layer->k_norm, angles);
    long page = s->c->table[s->row[n] * s->c->columns + position / PAGE];
    float *to_k = s->c->k + (page * m->layers + s->layer) * groups * width * PAGE + at;
    float *to_v = s->c->v + ((page * m->layers + s->layer) * groups * PAGE + at) * padded;
    for (int i = 0; i < groups * width; i++) to_k[i * PAGE] = k[i];
    for (int g = 0; g < groups; g++)
      memcpy(to_v + g * PAGE * padded, v + g * width, width * sizeof(float));
  }
}

static void attend_work(void *arg, long item, int worker) {
  struct state *s = arg;
  const struct model *m = s->m;
  // The longest first: what comes last should be short.
  int block = s->blocks - 1 - item / m->groups, group = item % m->groups;
  int first = s->block[block], tokens = s->block[block + 1] - first;
  int each = m->heads / m->groups * m->head_width;
  long padded = round16(m->head_width), k = m->groups * m->head_width * PAGE,
       v = m->groups * padded * PAGE;
  struct attention a = {
      .k = s->c->k + s->layer * k,
      .v = s->c->v + s->layer * v,
      .page_stride_k = m->layers * k,
      .page_stride_v = m->layers * v,
      .heads = m->heads,
      .groups = m->groups,
      .width = m->head_width,
      .padded = (int)padded,
      .scale = 1.0f / __builtin_sqrtf((float)m->head_width)};
  const float *q[8];
  float *out[8];
  for (int t = 0; t < tokens; t++) {
    q[t] = s->qkv + (first + t) * s->qkv_width + group * each;
    out[t] = s->attended + (long)(first + t) * m->heads * m->head_width + group * each;
  }
  attend(&a, group, s->c->table + s->row[first] * s->c->columns, q, out, s->position + first,
         tokens, s->scratch + worker * s->scratch_each);
}

// Probabilities of the experts, the best `chosen` of them (of equals the lower), their weights.
static void choose(const struct model *m, float *probs, int *choice, float *weight) {
  long padded = round16(m->experts);
  for (long e = m->experts; e < padded; e++) probs[e] = -__builtin_inff();
  v16 most = load16(probs), total = splat(0);
  for (long e = 16; e < padded; e += 16) {
    v16 p = load16(probs + e);
    most = where16(p > most, p, most);
  }
  v16 top = splat(max16(most));
  for (long e = 0; e < padded; e += 16) {
    v16 p = exp16(load16(probs + e) - top);
    total += p;
    store16(probs + e, p);
  }
  v16 sum = splat(sum16(total));
  for (long e = 0; e < padded; e += 16) store16(probs + e, load16(probs + e) / sum);
  float kept = 0;
  for (int k = 0; k < m->chosen; k++) {
    int best = -1;
    for (int e = 0; e < m->experts; e++) {
      int taken = 0;
      for (int j = 0; j < k; j++) taken |= choice[j] == e;
      if (!taken && (best < 0 || probs[e] > probs[best])) best = e;
    }
    choice[k] = best;
    weight[k] = probs[best];
    kept += weight[k];
  }
  if (m->normalise)
    for (int k = 0; k < m->chosen; k++) weight[k] /= kept;
}

static void route_work(void *arg, long item, int worker) {
  (void)worker;
  struct state *s = arg;
  const struct model *m = s->m;
  const struct layer *layer = m->layer + s->layer;
  int from = item * SOME, to = MIN(s->n, from + SOME);
  for (int n = from; n < to; n++) {
    float *x = s->x + n * s->wide;
    for (long i = 0; i < s->wide; i += 16)
      store16(x + i, load16(x + i) + load16(s->projected + n * s->wide + i));
    norm(x, layer->post_norm, s->normed + n * s->wide, s->wide, m->width, m->epsilon);
  }
  if (!layer->router) return;
  long padded = round16(m->experts);
  float probs[SOME][padded];
  const float *x[SOME];
  for (int i = 0; i < SOME; i++) x[i] = s->normed + (from + i < to ? from + i : from) * s->wide;
  for (long e = 0; e < padded; e += 16) {  // four tokens at a time: one sum is a long chain
    const float *w = layer->router + e * m->width;
    v16 c[SOME] = {splat(0), splat(0), splat(0), splat(0)};
    for (int d = 0; d < m->width; d++) {
      v16 b = load16(w + 16 * d);
      for (int i = 0; i < SOME; i++) c[i] = fma16(splat(x[i][d]), b, c[i]);
    }
    for (int i = 0; i < SOME; i++) store16(probs[i] + e, c[i]);
  }
  for (int n = from; n < to; n++) {
    int *choice = s->choice + (long)n * m->chosen, position = s->position[n];
    choose(m, probs[n - from], choice, s->weight + (long)n * m->chosen);
    long page = s->c->table[s->row[n] * s->c->columns + position / PAGE];
    long at = (page * PAGE + position % PAGE) * m->sparse_layers + s->sparse_before;
    memcpy(s->c->choices + at * m->chosen, choice, m->chosen * sizeof(int));
  }
}

// --- the MLP ---------------------------------------------------------------------------------------

// Lists the tokens' copies by expert: copy n * K + k is of token n.
static void group_copies(struct state *s) {
  const struct model *m = s->m;
  int copies = s->n * m->chosen;
  memset(s->first, 0, (m->experts + 1) * sizeof(int));
  for (int i = 0; i < copies; i++) s->first[s->choice[i] + 1]++;
  for (int e = 0; e < m->experts; e++) s->first[e + 1] += s->first[e];
  for (int i = 0; i < copies; i++) {
    int at = s->first[s->choice[i]]++;
    s->copy[at] = i;
    s->copy_row[at] = i / m->chosen;
  }
  memmove(s->first + 1, s->first, m->experts * sizeof(int));
  s->first[0] = 0;
}

static void mlp(struct state *s) {
  const struct model *m = s->m;
  const struct layer *layer = m->layer + s->layer;
  int sparse = layer->router != NULL, inner = sparse ? m->expert_inner : m->dense_inner;
  long gate_up = ROUND_UP(inner, PANEL / 2) * 2L * m->width, down = ROUND_UP(m->width, PANEL) *
       (long)inner;
  if (sparse) group_copies(s);
  for (int step = 0; step < 2; step++) {
    s->products = 0;
    for (int e = 0; e < (sparse ? m->experts : 1); e++) {
      int at = sparse ? s->first[e] : 0, count = sparse ? s->first[e + 1] - at : s->n;
      if (!count) continue;
      const int *copies = sparse ? s->copy + at : NULL, *rows = sparse ? s->copy_row + at : NULL;
      s->product[s->products++] =
          step ? (struct panels){.w = layer->down + e * down, .x = s->hidden, .rows = copies,
                                 .out_rows = copies, .out = s->projected, .k = inner,
                                 .columns = s->wide, .ldx = s->inner, .ldo = s->wide, .m = count}
               : (struct panels){.w = layer->gate_up + e * gate_up, .x = s->normed, .rows = rows,
                                 .out_rows = copies, .out = s->hidden, .k = m->width,
                                 .columns = inner, .ldx = s->wide, .ldo = s->inner, .m = count,
                                 .gated = 1};
    }
    run_products(s);
  }
}

// --- a call ----------------------------------------------------------------------------------------

const char *check_call(const struct model *m, const struct call *c) {
  for (long n = 0; n < c->num_tokens; n++) {
    long position = c->positions[n], row = c->rows[n];
    if (position < 0) continue;
    if (c->tokens[n] < 0 || c->tokens[n] >= m->vocab) return "a token id is not in the vocabulary";
    if (row < 0 || row >= c->num_rows) return "a token's row is not in the page table";
    if (position >= m->max_length) return "a position is beyond the longest context that was packed";
    if (position / PAGE >= c->columns) return "a position is beyond the columns of the page table";
    for (long p = 0; p <= position / PAGE; p++) {
      long page = c->table[row * c->columns + p];
      if (page < 0 || page >= c->num_pages) return "a page that is needed is not in the pool";
    }
  }
  return NULL;
}

// Tokens that follow each other in one row walk its pages together, as many as share eight queries.
static void make_blocks(struct state *s) {
  int most = 8 / (s->m->heads / s->m->groups);
  s->blocks = 0;
  for (int n = 0; n < s->n; n++)
    if (!n || s->row[n] != s->row[n - 1] || n - s->block[s->blocks - 1] >= (most ? most : 1))
      s->block[s->blocks++] = n;
  s->block[s->blocks] = s->n;
}

static void run_layer(struct state *s) {
  const struct model *m = s->m;
  const struct layer *layer = m->layer + s->layer;
  long some = (s->n + SOME - 1) / SOME, heads = (long)m->heads * m->head_width;
  team_run(s->team, begin_work, s, some);
  run_product(s, (struct panels){.w = layer->qkv, .bias = layer->qkv_bias, .x = s->normed,
                                 .out = s->qkv, .k = m->width, .columns = s->qkv_width,
                                 .ldx = s->wide, .ldo = s->qkv_width, .m = s->n});
  team_run(s->team, keep_work, s, some);
  team_run(s->team, attend_work, s, (long)s->blocks * m->groups);
  run_product(s, (struct panels){.w = layer->o, .bias = layer->o_bias, .x = s->attended,
                                 .out = s->projected, .k = heads, .columns = s->wide,
                                 .ldx = heads, .ldo = s->wide, .m = s->n});
  team_run(s->team, route_work, s, some);
  mlp(s);
  s->sparse_before += layer->router != NULL;
}

// Lays the arrays of `s` out from `base`, or only measures if it is NULL; bytes.
static size_t lay_out(struct state *s, char *base, long n, int workers) {
  const struct model *m = s->m;
  long copies = n * (m->chosen ? m->chosen : 1);
  size_t used = 0;
#define ARRAY(field, count) \
  s->field = (void *)(base + used); used += ROUND_UP((size_t)(count) * sizeof *s->field, 64)
  ARRAY(token, n);
  ARRAY(position, n);
  ARRAY(row, n);
  ARRAY(block, n + 1);
  ARRAY(choice, copies);
  ARRAY(copy, copies);
  ARRAY(copy_row, copies);
  ARRAY(first, m->experts + 1);
  ARRAY(product, m->experts + 1);
  ARRAY(items, m->experts + 1);
  ARRAY(weight, copies);
  ARRAY(x, n * s->wide);
  ARRAY(normed, n * s->wide);
  ARRAY(qkv, n * s->qkv_width);
  ARRAY(attended, n * m->heads * m->head_width);
  ARRAY(projected, copies * s->wide);
  ARRAY(hidden, copies * s->inner);
  ARRAY(sums, (long)workers * CHUNK_ROWS * PANEL);
  ARRAY(scratch, workers * s->scratch_each);
#undef ARRAY
  return used;
}

int forward(const struct model *m, const struct call *c, struct team *team, int workers) {
  struct state s = {.m = m, .c = c, .team = team};
  long active = 0;
  for (long n = 0; n < c->num_tokens; n++) active += c->positions[n] >= 0;
  memset(c->hidden, 0, c->num_tokens * m->width * sizeof(float));
  if (!active) return 1;
  s.wide = round16(m->width);
  s.q_width = (long)m->heads * m->head_width;
  s.qkv_width = round16(s.q_width + 2L * m->groups * m->head_width);
  s.inner = round16(m->expert_inner > m->dense_inner ? m->expert_inner : m->dense_inner);
  s.scratch_each = round16(attend_scratch(c->columns, round16(m->head_width)));
  char *memory = arena_take(lay_out(&s, NULL, active, workers));
  if (!memory) return 0;
  lay_out(&s, memory, active, workers);
  for (long n = 0; n < c->num_tokens; n++)
    if (c->positions[n] >= 0) {
      s.token[s.n] = n;
      s.row[s.n] = c->rows[n];
      s.position[s.n++] = c->positions[n];
    }
  make_blocks(&s);
  for (; s.layer < m->layers; s.layer++) run_layer(&s);
  team_run(team, begin_work, &s, (s.n + SOME - 1) / SOME);  // the final norm
  arena_give(memory);
  return 1;
}

int head_logits(const float *head, int width, int vocab, const float *hidden,
                const uint8_t *active, long num, float *logits, struct team *team, int workers) {
  struct panels p = {.w = head, .x = hidden, .out = logits, .k = width, .columns = vocab,
                     .ldx = width, .ldo = vocab};
  struct state s = {.team = team, .product = &p, .products = 1};
  long first = 0;
  s.items = &first;
  size_t list = ROUND_UP(num * sizeof(int), 64);
  char *memory = arena_take(list + (size_t)workers * CHUNK_ROWS * PANEL * sizeof(float));
  if (!memory) return 0;
  int *rows = (int *)memory;
  s.sums = (float *)(memory + list);
  for (long n = 0; n < num; n++) {
    if (active[n])
      rows[p.m++] = n;
    else
      memset(logits + n * vocab, 0, vocab * sizeof(float));
  }
  p.rows = p.out_rows = rows;
  if (p.m) run_products(&s);
  arena_give(memory);
  return 1;
}
