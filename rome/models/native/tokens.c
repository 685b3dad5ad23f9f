// The phases of a layer that go token by token: norms, rotation, the pages, the router.

#include "state.h"

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

void begin_work(void *arg, long item, int worker) {
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

void keep_work(void *arg, long item, int worker) {
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

void attend_work(void *arg, long item, int worker) {
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
  const float *q[MAX_QUERIES];
  float *out[MAX_QUERIES];
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
    most = more16(p, most);
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

void route_work(void *arg, long item, int worker) {
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
