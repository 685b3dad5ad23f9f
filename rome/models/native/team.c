// The threads of a call: its own, and helpers from the thread pool of XLA.
//
// A call is a sequence of phases. A phase is a number of items, taken one by one through `ticket`:
// the phase's number, how many items it has, and how many are taken, in one word, so that a helper
// that comes late or sleeps cannot take an item of one phase for one of another. The caller never
// waits for a helper to start, only for items that one has taken: with no helper it does all itself.
// A helper that comes after the end finds the ticket closed; the team lives until the last is gone.

#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

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

void with_team(const XLA_FFI_CallFrame *frame, int most, team_fn *body, void *arg) {
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

// --- memory ---------------------------------------------------------------------------------------

enum { ARENAS = 4, HEADER = 64 };
static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;
static char *arenas[ARENAS];  // those that nobody uses; the first 8 bytes are the size

void *arena_take(size_t bytes) {
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

void arena_give(void *memory) {
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
