// What the files of the native forward pass share: vectors, a fixed exp, threads, the model.
//
// Promise: the bits of a token's output depend on the weights and on the tokens of its own context
// alone. Therefore every sum has one order, whatever block or thread computes it, and every fused
// multiply-add is written out (fma16) with contraction switched off: left to the compiler, two
// copies of one loop could round differently.

#ifndef ROME_NATIVE_H_
#define ROME_NATIVE_H_

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#define PAGE 16    // positions a page, and lanes of a vector
#define PANEL 64   // columns of a panel of weights
#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef float v16 __attribute__((vector_size(64), may_alias));
typedef int32_t i16 __attribute__((vector_size(64), may_alias));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));  // not aligned

INLINE v16 load16(const float *p) { return *(const v16u *)p; }
INLINE void store16(float *p, v16 x) { *(v16u *)p = x; }
INLINE v16 splat(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// a * b + c, rounded once where the machine can.
INLINE v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  union { v16 v; __m256 half[2]; } x = {a}, y = {b}, z = {c};
  for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.v;
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

INLINE v16 where16(i16 yes, v16 a, v16 b) { return (v16)((yes & (i16)a) | (~yes & (i16)b)); }

// Lanes of x, i and i ^ n exchanged.
#define EXCHANGE(x, n)                                                                            \
  __builtin_shuffle(x, (i16){0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n, 8 ^ n, 9 ^ n, \
                             10 ^ n, 11 ^ n, 12 ^ n, 13 ^ n, 14 ^ n, 15 ^ n})

// Sum of the lanes, in halves.
INLINE float sum16(v16 x) {
  x += EXCHANGE(x, 8);
  x += EXCHANGE(x, 4);
  x += EXCHANGE(x, 2);
  x += EXCHANGE(x, 1);
  return x[0];
}

INLINE v16 more16(v16 a, v16 b) { return where16(a > b, a, b); }

INLINE float max16(v16 x) {
  x = more16(x, EXCHANGE(x, 8));
  x = more16(x, EXCHANGE(x, 4));
  x = more16(x, EXCHANGE(x, 2));
  x = more16(x, EXCHANGE(x, 1));
  return x[0];
}

// exp to 2 ulp. Below -87.33, where it is no normal number, 0; above 88.37 the value there.
INLINE v16 exp16(v16 x) {
  const v16 low = splat(-87.33f), high = splat(88.37f), magic = splat(12582912.0f);
  i16 tiny = x < low;
  x = where16(tiny, low, x);
  x = where16(x > high, high, x);
  v16 shifted = fma16(x, splat(1.44269504088896341f), magic);  // rounds to an integer n
  v16 n = shifted - magic;
  v16 r = fma16(n, splat(-0.693359375f), x);
  r = fma16(n, splat(2.12194440e-4f), r);
  v16 p = splat(1.9875691500e-4f);
  p = fma16(p, r, splat(1.3981999507e-3f));
  p = fma16(p, r, splat(8.3334519073e-3f));
  p = fma16(p, r, splat(4.1665795894e-2f));
  p = fma16(p, r, splat(1.6666665459e-1f));
  p = fma16(p, r, splat(5.0000001201e-1f));
  v16 y = fma16(p, r * r, r) + splat(1.0f);
  i16 power = ((i16)shifted - 0x4B400000 + 127) << 23;
  return where16(tiny, splat(0.0f), y * (v16)power);
}

// --- xla.c: the caller and the helpers it may get ----------------------------------------------

struct team;
typedef void work_fn(void *arg, long item, int worker);

// Runs work(arg, 0..items-1, worker) on whoever is there; returns when all are done.
void team_run(struct team *team, work_fn *work, void *arg, long items);

// --- gemm.c: rows times panels ------------------------------------------------------------------

#define CHUNK_ROWS 96  // rows of one item of work

// sums[i][0..63] = sum over d of x[rows[i]][d] * panel[d][0..63], d ascending; rows NULL: 0..m-1.
// m <= CHUNK_ROWS.
void panel_product(const float *panel, long k, const float *x, long ldx, const int *rows, int m,
                   float *sums);

// --- attention.c --------------------------------------------------------------------------------

struct attention {
  const float *k, *v;      // pages of this layer: [H, 16] and [16, Hp] of each group
  long page_stride_k, page_stride_v;  // floats between pages
  int heads, groups, width, padded;   // N, G, H, Hp
  float scale;
};

#define MAX_QUERIES 64  // tokens times heads of a group that walk together

// Floats of scratch that `attend` needs.
long attend_scratch(int padded);

// Attention of one group's heads for `tokens` tokens of one row.
// q and out [tokens][stride]: the group's first head of each token; positions: theirs.
void attend(const struct attention *a, int group, const int *table, const float *const *q,
            float *const *out, const int *positions, int tokens, float *scratch);

// --- forward.c ----------------------------------------------------------------------------------

enum { LAYER_SLOTS = 11 };
struct layer {  // in the order of rome.models.native.packing; NULL where absent
  const float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *router,
      *gate_up, *down;
};

struct model {
  int width, heads, groups, head_width, experts, chosen, expert_inner, dense_inner, layers, vocab,
      sparse_layers, normalise, max_length;
  float epsilon;
  const float *embedding, *rope, *norm;
  const struct layer *layer;
};

struct call {  // one call of `extend`
  const int *tokens, *rows, *positions, *table;
  long num_tokens, num_rows, columns, num_pages;
  float *k, *v;
  int *choices;
  float *hidden;
};

// Returns NULL or what is wrong with the call.
const char *check_call(const struct model *model, const struct call *call);
// Runs the call; 0 if there is no memory.
int forward(const struct model *model, const struct call *call, struct team *team, int workers);
// logits[n] = hidden[n] @ head where active, else 0; returns 0 if there is no memory.
int head_logits(const float *head, int width, int vocab, const float *hidden,
                const uint8_t *active, long num, float *logits, struct team *team, int workers);

#endif  // ROME_NATIVE_H_
