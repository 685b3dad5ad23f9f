// What touches XLA: the threads of a call, and the entry points, which read its call frames.
//
// A call has its own thread, and helpers from the thread pool of XLA. It is a sequence of phases.
// A phase is a number of items, taken one by one through `ticket`: the phase's number, how many
// items it has, and how many are taken, in one word, so that a helper that comes late or sleeps
// cannot take an item of one phase for one of another. The caller never waits for a helper to
// start, only for items that one has taken: with no helper it does all itself. A helper that comes
// after the end finds the ticket closed; the team lives until the last is gone.

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "native.h"
#include "xla/ffi/api/c_api.h"

#define CLOSED UINT64_MAX
enum { ITEM_BITS = 20, SPINS = 4000, MAX_HELPERS = 255 };
#define MAX_ITEMS ((1L << ITEM_BITS) - 1)

struct team {
  _Atomic uint64_t ticket;  // phase << 40 | items << 20 | taken
  char pad[56];             // the caller waits on `done`, helpers on `ticket`
  _Atomic long done;
  _Atomic int members, joined;
  work_fn *work;
  void *arg;
  uint64_t phase;
  pthread_t caller;
};

INLINE void rest(int *spins) {
  if (++*spins > SPINS) {
    sched_yield();  // there may be more threads than processors
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Rounding to nearest, denormal numbers kept: XLA's threads differ in it, and so would bits.
static uint64_t plain_rounding(void) {
  uint64_t old = 0;
#if defined(__x86_64__)
  old = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x1f80);
#elif defined(__aarch64__)
  __asm__ volatile("mrs %0, fpcr\n\tmsr fpcr, xzr" : "=&r"(old));
#endif
  return old;
}

static void restore_rounding(uint64_t old) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr((uint32_t)old);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" ::"r"(old));
#endif
}

static void leave(struct team *team) {
  if (atomic_fetch_sub(&team->members, 1) == 1) free(team);
}

// Takes items of the present phase until there are none; whether there was one.
static int take_items(struct team *team, int worker) {
  int any = 0;
  uint64_t ticket = atomic_load_explicit(&team->ticket, memory_order_acquire);
  while (ticket != CLOSED) {
    long taken = ticket & MAX_ITEMS, items = ticket >> ITEM_BITS & MAX_ITEMS;
    if (taken >= items) break;
    if (!atomic_compare_exchange_weak_explicit(&team->ticket, &ticket, ticket + 1,
                                               memory_order_acquire, memory_order_acquire))
      continue;
    team->work(team->arg, taken, worker);
    atomic_fetch_add_explicit(&team->done, 1, memory_order_release);
    any = 1;
    ticket = atomic_load_explicit(&team->ticket, memory_order_acquire);
  }
  return any;
}

static void helper(void *data) {
  struct team *team = data;
  // A full pool may run a task in the thread that schedules it: that one has its own work.
  if (!pthread_equal(pthread_self(), team->caller)) {
    uint64_t old = plain_rounding();
    int worker = 1 + atomic_fetch_add(&team->joined, 1), spins = 0;
    while (atomic_load_explicit(&team->ticket, memory_order_acquire) != CLOSED) {
      if (take_items(team, worker)) spins = 0;
      rest(&spins);
    }
    restore_rounding(old);
  }
  leave(team);
}

void team_run(struct team *team, work_fn *work, void *arg, long items) {
  if (items == 1 || items > MAX_ITEMS) {
    for (long i = 0; i < items; i++) work(arg, i, 0);
    return;
  }
  team->work = work;
  team->arg = arg;
  atomic_store_explicit(&team->done, 0, memory_order_relaxed);
  uint64_t ticket = (team->phase++ & 0x7fffff) << 2 * ITEM_BITS | (uint64_t)items << ITEM_BITS;
  atomic_store_explicit(&team->ticket, ticket, memory_order_release);
  take_items(team, 0);
  for (int spins = 0; atomic_load_explicit(&team->done, memory_order_acquire) < items;)
    rest(&spins);
}

typedef void team_fn(void *arg, struct team *team, int workers);

static void drop_error(const XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
                                     .error = error};
  frame->api->XLA_FFI_Error_Destroy(&args);
}

static int pool_threads(const XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = frame->ctx,
      .num_threads = &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) drop_error(frame, error);
  return error ? 1 : (int)MIN(threads, MAX_HELPERS + 1);
}

// Calls body(arg, team, workers) with up to `most` workers, or with all that the pool has if 0.
static void with_team(const XLA_FFI_CallFrame *frame, int most, team_fn *body, void *arg) {
  int workers = pool_threads(frame);
  if (most > 0) workers = MIN(workers, most);
  struct team *team = calloc(1, sizeof *team);
  atomic_init(&team->members, workers);
  team->caller = pthread_self();
  for (int i = 1; i < workers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {
        .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
        .ctx = frame->ctx,
        .task = helper,
        .data = team};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {
      drop_error(frame, error);
      leave(team);
    }
  }
  uint64_t old = plain_rounding();
  body(arg, team, workers);
  restore_rounding(old);
  atomic_store_explicit(&team->ticket, CLOSED, memory_order_release);
  leave(team);
}

// --- entry points --------------------------------------------------------------------------------

#define EXPORT __attribute__((visibility("default")))

// In the order of rome.models.native.engine.
enum { TOKENS, ROWS, POSITIONS, TABLE, K, V, CHOICES, EMBEDDING, ROPE, NORM, LAYERS };

static XLA_FFI_Error *failure(const XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

// Whether this call only asks which version of the interface was compiled in; answers it.
static int asks_version(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

static const XLA_FFI_Buffer *operand(const XLA_FFI_CallFrame *frame, int i) {
  return frame->args.args[i];
}

static void *result(const XLA_FFI_CallFrame *frame, int i) {
  return ((XLA_FFI_Buffer *)frame->rets.rets[i])->data;
}

// The data of an attribute: of a scalar its value, of an array its values.
static const void *attribute(const XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t i = 0; i < frame->attrs.size; i++) {
    const XLA_FFI_ByteSpan *is = frame->attrs.names[i];
    if (is->len != strlen(name) || memcmp(is->ptr, name, is->len)) continue;
    const void *found = frame->attrs.attrs[i];
    return frame->attrs.types[i] == XLA_FFI_AttrType_ARRAY ? ((const XLA_FFI_Array *)found)->data
                                                           : ((const XLA_FFI_Scalar *)found)->value;
  }
  return NULL;
}

struct extending {
  struct model model;
  struct call call;
  int done;
};

static void extend_body(void *arg, struct team *team, int workers) {
  struct extending *e = arg;
  e->done = forward(&e->model, &e->call, team, workers);
}

EXPORT XLA_FFI_Error *rome_native_extend(XLA_FFI_CallFrame *frame) {
  if (asks_version(frame)) return NULL;
  const int64_t *sizes = attribute(frame, "sizes");
  const float *epsilon = attribute(frame, "epsilon");
  if (!sizes || !epsilon) return failure(frame, "rome_native_extend: an attribute is missing");
  int layers = (int)sizes[8];
  if (frame->args.size != LAYERS + LAYER_SLOTS * layers)
    return failure(frame, "rome_native_extend: the number of arguments is wrong");
  struct layer layer[layers];
  for (int i = 0; i < layers; i++)
    for (int j = 0; j < LAYER_SLOTS; j++) {
      const XLA_FFI_Buffer *slot = operand(frame, LAYERS + LAYER_SLOTS * i + j);
      ((const float **)&layer[i])[j] = slot->dims[0] ? slot->data : NULL;
    }
  struct extending e = {
      .model = {.width = sizes[0],
                .heads = sizes[1],
                .groups = sizes[2],
                .head_width = sizes[3],
                .experts = sizes[4],
                .chosen = sizes[5],
                .expert_inner = sizes[6],
                .dense_inner = sizes[7],
                .layers = layers,
                .vocab = sizes[9],
                .normalise = sizes[10],
                .epsilon = *epsilon,
                .embedding = operand(frame, EMBEDDING)->data,
                .rope = operand(frame, ROPE)->data,
                .max_length = operand(frame, ROPE)->dims[0],
                .norm = operand(frame, NORM)->data,
                .layer = layer},
      .call = {.tokens = operand(frame, TOKENS)->data,
               .rows = operand(frame, ROWS)->data,
               .positions = operand(frame, POSITIONS)->data,
               .table = operand(frame, TABLE)->data,
               .num_tokens = operand(frame, TOKENS)->dims[0],
               .num_rows = operand(frame, TABLE)->dims[0],
               .columns = operand(frame, TABLE)->dims[1],
               .num_pages = operand(frame, K)->dims[0],
               .hidden = result(frame, 0),
               .k = result(frame, 1),
               .v = result(frame, 2),
               .choices = result(frame, 3)}};
  for (int i = 0; i < layers; i++) e.model.sparse_layers += layer[i].router != NULL;
  if (e.call.k != operand(frame, K)->data || e.call.v != operand(frame, V)->data)
    return failure(frame, "rome_native_extend: the pages are not updated in place");
  const char *wrong = check_call(&e.model, &e.call);
  if (wrong) return failure(frame, wrong);
  with_team(frame, (int)sizes[11], extend_body, &e);
  return e.done ? NULL : failure(frame, "rome_native_extend: out of memory");
}

struct heading {
  const XLA_FFI_CallFrame *frame;
  int done;
};

static void head_body(void *arg, struct team *team, int workers) {
  struct heading *h = arg;
  const XLA_FFI_Buffer *hidden = operand(h->frame, 0), *out = h->frame->rets.rets[0];
  h->done = head_logits(operand(h->frame, 2)->data, (int)hidden->dims[1], (int)out->dims[1],
                        hidden->data, operand(h->frame, 1)->data, hidden->dims[0], out->data, team,
                        workers);
}

EXPORT XLA_FFI_Error *rome_native_logits(XLA_FFI_CallFrame *frame) {
  if (asks_version(frame)) return NULL;
  const int64_t *threads = attribute(frame, "threads");
  if (!threads || frame->args.size != 3)
    return failure(frame, "rome_native_logits: arguments are missing");
  struct heading h = {.frame = frame};
  with_team(frame, (int)*threads, head_body, &h);
  return h.done ? NULL : failure(frame, "rome_native_logits: out of memory");
}
