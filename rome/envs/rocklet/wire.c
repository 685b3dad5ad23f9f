/* Frames on a connection, and the output of commands on its way there. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOT_YET = -1, NO_PLACE = -2, CUT_SHORT = -3 };  /* a spool that is no descriptor */
static unsigned spools;                                /* numbers the files */

void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

void output_init(struct output *o, size_t cap) {
  *o = (struct output){.head = cap / 2, .tail = cap - cap / 2, .spool = NOT_YET};
  o->buf = malloc(o->head + 2 * o->tail);
}

void output_clear(struct output *o) {
  if (o->spool >= 0) close(o->spool);
  o->len = o->total = o->given = 0;
  o->spool = NOT_YET;
}

void output_forget(void) { spools = 0; }  /* after a reset the files are numbered anew */

static void spool_open(struct output *o) {
  int dir = open_inside(cfg.clean[0]);
  o->spool = -1;
  for (int i = 0; i < 100 && o->spool < 0; i++) {  /* the agent may have taken a name: skip it */
    snprintf(o->path, sizeof o->path, "output-%u.txt", __sync_add_and_fetch(&spools, 1));
    o->spool = openat(dir, o->path, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
  }
  if (dir >= 0) close(dir);
  if (o->spool >= 0 && separate() && fchown(o->spool, o->uid, o->uid)) {}
  if (o->spool < 0) o->spool = NO_PLACE;
}

static void spool_add(struct output *o, const char *data, size_t n) {
  if (o->spool < 0) return;
  if ((!cfg.fsize || o->total + n <= (uint64_t)cfg.fsize) && write(o->spool, data, n) == (ssize_t)n)
    return;
  close(o->spool);
  o->spool = CUT_SHORT;
}

static void spool(struct output *o, const char *data, size_t n, size_t cap) {
  int locked = !lock_disk(0, now_ms() + 60000);
  if (o->total <= cap) {
    spool_open(o);
    spool_add(o, o->buf, o->len);
  }
  spool_add(o, data, n);
  if (locked) unlock_disk();
}

static void output_add(struct output *o, const char *data, size_t n) {
  size_t cap = o->head + o->tail, room = o->head + 2 * o->tail;
  if (o->total + n > cap) spool(o, data, n, cap);
  o->total += n;
  while (n) {
    size_t m = n < room - o->len ? n : room - o->len;
    memcpy(o->buf + o->len, data, m);
    o->len += m, data += m, n -= m;
    if (o->len == room) {
      memmove(o->buf + o->head, o->buf + o->head + o->tail, o->tail);
      o->len = o->head + o->tail;
    }
  }
}

void output_note(struct output *o, const char *format, ...) {
  char text[PATH_MAX + 200];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  output_add(o, text, n < (int)sizeof text ? n : (int)sizeof text - 1);
}

/* Reads what the pipe or terminal holds, at most 1 MiB a call so that a babbling writer cannot hold us.
 * Only a read that finds nothing tells that a terminal is empty. */
void drain(struct output *o, int fd) {
  char chunk[65536];
  for (size_t got = 0; got < 1 << 20;) {
    ssize_t n = read(fd, chunk, sizeof chunk);
    if (n <= 0) return;
    output_add(o, chunk, n);
    got += n;
  }
}

int send_all(int fd, struct iovec *v, int n) {
  while (n) {
    ssize_t sent = writev(fd, v, n);  /* not sendmsg, which the watcher looks at */
    if (sent < 0) return -1;
    while (n && (size_t)sent >= v->iov_len) sent -= v->iov_len, v++, n--;
    if (n) v->iov_base = (char *)v->iov_base + sent, v->iov_len -= sent;
  }
  return 0;
}

int receive(int fd, void *to, size_t n) {
  for (size_t got = 0; got < n;) {
    ssize_t r = recv(fd, (char *)to + got, n - got, 0);
    if (r <= 0) return -1;
    got += r;
  }
  return 0;
}

int reply(int fd, int error, const void *data, size_t n) {
  struct reply r = {.error = error, .len = n, .total = n};
  struct iovec v[2] = {{&r, sizeof r}, {(void *)data, n}};
  return send_all(fd, v, 2);
}

int fail(int fd, int error, const char *what) {
  char text[300];
  int n = snprintf(text, sizeof text, "%s: %s", what, strerror(error));
  return reply(fd, error ? error : EIO, text, n);
}

/* An error whose text is not that of errno. */
int refuse(int fd, int error, const char *why) { return reply(fd, error, why, strlen(why)); }

/* The line in place of what is left out. */
static int describe_gap(const struct output *o, uint64_t missing, char *text, size_t size) {
  unsigned long long n = missing;
  int m = o->spool == NO_PLACE
    ? snprintf(text, size, "\n[... %llu bytes left out ...]\n", n)
    : snprintf(text, size, "\n[... %llu bytes left out; %s is in %s/%s ...]\n", n,
               o->spool == CUT_SHORT ? "the beginning" : "all of it", cfg.clean[0], o->path);
  return m < (int)size ? m : (int)size - 1;
}

/* Points v at the output, at most three pieces: of a long one, a line between head and tail tells what
 * is missing. Returns the number of pieces. */
static int whole_output(struct output *o, struct iovec *v, char *gap, size_t size) {
  size_t cap = o->head + o->tail;
  v[0] = (struct iovec){o->buf, o->len};
  if (o->total <= cap) return 1;
  v[0].iov_len = o->head;
  v[1] = (struct iovec){gap, describe_gap(o, o->total - cap, gap, size)};
  v[2] = (struct iovec){o->buf + o->len - o->tail, o->tail};
  return 3;
}

/* The same for what no poll has handed over yet. */
static int new_output(struct output *o, struct iovec *v, char *gap, size_t size) {
  uint64_t kept = o->total - (o->len > o->head ? o->len - o->head : 0);  /* where the tail begins */
  size_t first = o->len < o->head ? o->len : o->head;
  int n = 0;
  if (o->given < first) {
    v[n++] = (struct iovec){o->buf + o->given, first - o->given};
    o->given = first;
  }
  if (o->given < kept && o->total > o->len) {
    v[n++] = (struct iovec){gap, describe_gap(o, kept - o->given, gap, size)};
    o->given = kept;
  }
  if (o->given < o->total && o->len > o->head)
    v[n++] = (struct iovec){o->buf + o->len - (o->total - o->given), o->total - o->given};
  o->given = o->total;
  return n;
}

static int send_pieces(int fd, struct reply *r, struct iovec *v, int n) {
  for (int i = 1; i < n; i++) r->len += v[i].iov_len;
  return send_all(fd, v, n);
}

/* Sends the output and clears it. */
int reply_output(int fd, struct output *o, int exit_code, uint32_t flags) {
  char gap[400];
  if (o->total > o->head + o->tail) flags |= TRUNCATED;
  struct reply r = {.exit_code = exit_code, .flags = flags, .total = o->total};
  struct iovec v[4] = {{&r, sizeof r}};
  int sent = send_pieces(fd, &r, v, 1 + whole_output(o, v + 1, gap, sizeof gap));
  output_clear(o);
  return sent;
}

/* Sends the length of what is new, what is new, and, unless flags say RUNNING, all of the output, which
 * is then cleared. */
int reply_progress(int fd, struct output *o, int exit_code, uint32_t flags) {
  char gaps[2][400];
  uint32_t fresh = 0;
  if (o->total > o->head + o->tail) flags |= TRUNCATED;
  struct reply r = {.exit_code = exit_code, .flags = flags, .total = o->total};
  struct iovec v[8] = {{&r, sizeof r}, {&fresh, sizeof fresh}};
  int n = 2 + new_output(o, v + 2, gaps[0], sizeof gaps[0]);
  for (int i = 2; i < n; i++) fresh += v[i].iov_len;
  if (!(flags & RUNNING)) n += whole_output(o, v + n, gaps[1], sizeof gaps[1]);
  int sent = send_pieces(fd, &r, v, n);
  if (!(flags & RUNNING)) output_clear(o);
  return sent;
}
