// The decoder, layer by layer, on the active tokens of a call.
//
// A layer: per token, the MLP's sum of the layer before and the norm; q, k, v; per token, norms of
// heads, rotation, keys and values into their pages; attention; the output projection; per token,
// the residual, norm and router; the experts' gate and up with their activation; down. Each is one
// phase of the team, as it needs all of the one before.

#include <pthread.h>
#include <stdlib.h>

#include "state.h"

// --- products ------------------------------------------------------------------------------------

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

// --- the MLP -------------------------------------------------------------------------------------

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

// --- memory --------------------------------------------------------------------------------------

enum { ARENAS = 4, HEADER = 64 };
static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;
static char *arenas[ARENAS];  // those that nobody uses; the first 8 bytes are the size

static void *arena_take(size_t bytes) {
  char *found = NULL;
  pthread_mutex_lock(&arena_lock);
  for (int i = 0; i < ARENAS && !found; i++)
    if (arenas[i] && *(size_t *)arenas[i] >= bytes) {
      found = arenas[i];
      arenas[i] = NULL;
    }
  pthread_mutex_unlock(&arena_lock);
  if (!found) {
    found = aligned_alloc(HEADER, HEADER + ROUND_UP(bytes, HEADER));
    if (!found) return NULL;
    *(size_t *)found = bytes;
  }
  return found + HEADER;
}

static void arena_give(void *memory) {
  char *mine = (char *)memory - HEADER;
  pthread_mutex_lock(&arena_lock);
  for (int i = 0; i < ARENAS && mine; i++) {  // the smaller one goes
    if (arenas[i] && *(size_t *)arenas[i] >= *(size_t *)mine) continue;
    char *other = arenas[i];
    arenas[i] = mine;
    mine = other;
  }
  pthread_mutex_unlock(&arena_lock);
  free(mine);
}

// --- a call --------------------------------------------------------------------------------------

const char *check_call(const struct model *m, const struct call *c) {
  for (long n = 0; n < c->num_tokens; n++) {
    long position = c->positions[n], row = c->rows[n];
    if (position < 0) continue;
    if (c->tokens[n] < 0 || c->tokens[n] >= m->vocab) return "a token id is not in the vocabulary";
    if (row < 0 || row >= c->num_rows) return "a token's row is not in the page table";
    if (position >= m->max_length) return "a position is beyond the longest context packed for";
    if (position / PAGE >= c->columns) return "a position is beyond the columns of the page table";
    for (long p = 0; p <= position / PAGE; p++) {
      long page = c->table[row * c->columns + p];
      if (page < 0 || page >= c->num_pages) return "a page that is needed is not in the pool";
    }
  }
  return NULL;
}

// Tokens that follow each other in one row walk its pages together, as many as make MAX_QUERIES.
static void make_blocks(struct state *s) {
  int most = MAX_QUERIES / (s->m->heads / s->m->groups);
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
  s.scratch_each = round16(attend_scratch(round16(m->head_width)));
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
