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
  o->len = o->total = 0;
  o->spool = NOT_YET;
}

void output_forget(void) { spools = 0; }  /* after a reset the files are numbered anew */

static void spool_open(struct output *o) {
  int dir = open_inside(cfg.clean[0]);
  o->spool = -1;
  for (int i = 0; i < 100 && o->spool < 0; i++) {  /* the agent may have taken a name: skip it */
    snprintf(o->path, sizeof o->path, "output-%u.txt", __sync_add_and_fetch(&spools, 1));
    o->spool = openat(dir, o->path, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644);
  }
  if (dir >= 0) close(dir);
  if (o->spool >= 0 && separate() && fchown(o->spool, cfg.uid, cfg.uid)) {}
  if (o->spool < 0) o->spool = NO_PLACE;
}

static void spool_add(struct output *o, const char *data, size_t n) {
  if (o->spool < 0) return;
  if ((!cfg.fsize || o->total + n <= (uint64_t)cfg.fsize) && write(o->spool, data, n) == (ssize_t)n)
    return;
  close(o->spool);
  o->spool = CUT_SHORT;
}

static void output_add(struct output *o, const char *data, size_t n) {
  size_t cap = o->head + o->tail, room = o->head + 2 * o->tail;
  if (o->total <= cap && o->total + n > cap) {
    spool_open(o);
    spool_add(o, o->buf, o->len);
  }
  if (o->total + n > cap) spool_add(o, data, n);
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

/* Reads what the pipe holds, at most 1 MiB a call so that a babbling writer cannot hold us. */
void drain(struct output *o, int fd) {
  char chunk[65536];
  for (int i = 0; i < 16; i++) {
    ssize_t n = read(fd, chunk, sizeof chunk);
    if (n > 0) output_add(o, chunk, n);
    if (n < 4096) return;
  }
}

int send_all(int fd, struct iovec *v, int n) {
  while (n) {
    struct msghdr m = {.msg_iov = v, .msg_iovlen = n};
    ssize_t sent = sendmsg(fd, &m, MSG_NOSIGNAL);
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

/* Sends the output and clears it. Of a long one, a line between head and tail tells what is missing. */
int reply_output(int fd, struct output *o, int exit_code, uint32_t flags) {
  char gap[400];
  size_t cap = o->head + o->tail;
  struct reply r = {.exit_code = exit_code, .flags = flags, .total = o->total};
  struct iovec v[4] = {{&r, sizeof r}, {o->buf, o->len}};
  int n = 2;
  if (o->total > cap) {
    unsigned long long missing = o->total - cap;
    r.flags |= TRUNCATED;
    int m = o->spool == NO_PLACE
      ? snprintf(gap, sizeof gap, "\n[... %llu bytes left out ...]\n", missing)
      : snprintf(gap, sizeof gap, "\n[... %llu bytes left out; %s is in %s/%s ...]\n", missing,
                 o->spool == CUT_SHORT ? "the beginning" : "all of it", cfg.clean[0], o->path);
    v[1] = (struct iovec){o->buf, o->head};
    v[2] = (struct iovec){gap, m < (int)sizeof gap ? m : (int)sizeof gap - 1};
    v[3] = (struct iovec){o->buf + o->len - o->tail, o->tail};
    n = 4;
  }
  for (int i = 1; i < n; i++) r.len += v[i].iov_len;
  int sent = send_all(fd, v, n);
  output_clear(o);
  return sent;
}
