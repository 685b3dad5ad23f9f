/* Contents of files, in parts, through a handle that a connection keeps: one at a time.
 *
 * An upload goes to a hidden temporary of root's, under a random name that the host gives, and gets its
 * owner, mode, time and name only at the end: nobody sees half a file, and a hard link the agent made is
 * replaced rather than written through. The agent may own the directory, so the name is trusted only
 * while it names the very file that is open. An upload whose connection breaks is kept for PATIENCE, so
 * that the host can go on with it from another connection; then it is dropped.
 *
 * A download reads from one open file, which must stay as long as it was: whatever shrinks, grows or is
 * written to meanwhile is an error, never filled up. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { UPLOAD = 1, RESUME = 2, WHOLE = 4, DIRECTORY = 8 };  /* flags of FILE_OPEN */
enum { PATIENCE = 60000, MAX_PARKED = 4, MAX_PART = 4 << 20 };

/* Stands before the bytes in the data of every request here.
 *   FILE_OPEN of an upload: mtime, token; with WHOLE the bytes of the file follow.
 *   FILE_OPEN of a download: offset is the largest size wanted, length the bytes wanted at once.
 *   FILE_READ: offset, length. FILE_WRITE: offset, then the bytes. FILE_FINISH: offset is the size. */
struct file_args { uint32_t flags, length; uint64_t offset; int64_t mtime; char token[32]; };

/* Uploads without a connection; the thread of the one that broke waits with each. */
struct parked { struct file *file; struct parked *next; };
static struct parked *parked;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static int answer(int conn, uint32_t flags, uint64_t total) {
  struct reply r = {.flags = flags, .total = total};
  struct iovec v = {&r, sizeof r};
  return send_all(conn, &v, 1);
}

static int names(int dir, const char *name, int fd) {
  struct stat a, b;
  return !fstat(fd, &a) && !fstatat(dir, name, &b, AT_SYMLINK_NOFOLLOW) && a.st_ino == b.st_ino &&
         a.st_dev == b.st_dev;
}

static void close_file(struct file *f) {
  if (f->open == OPEN_UPLOAD && names(f->dir, f->temp, f->fd)) {
    unlinkat(f->dir, f->temp, 0);
    futimens(f->dir, EPOCH);
  }
  if (f->open) close_fd(&f->fd), close_fd(&f->dir), free(f->path);
  *f = (struct file){0};
}

static int open_upload(struct file *f, const struct request *q, char *name, const struct file_args *a,
                       const char *token) {
  char *leaf;
  struct stat st;
  *f = (struct file){.open = OPEN_UPLOAD, .fd = -1, .path = strdup(name), .as_root = q->as_root,
                     .mode = q->mode & 07777, .mtime = a->mtime, .generation = generation};
  snprintf(f->temp, sizeof f->temp, ".rome-%s", token);
  if ((f->dir = open_parent(name, &leaf, 1, q->as_root)) < 0) return errno;
  if (!f->path) return ENOMEM;
  if (!fstatat(f->dir, leaf, &st, AT_SYMLINK_NOFOLLOW) && S_ISDIR(st.st_mode)) return EISDIR;
  f->fd = openat(f->dir, f->temp, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
  return f->fd < 0 ? errno : 0;
}

/* Adds bytes at the end, all or none. */
static int add(struct file *f, const char *data, size_t n) {
  for (size_t done = 0; done < n;) {
    ssize_t w = pwrite(f->fd, data + done, n - done, f->size + done);
    if (w <= 0) {
      int error = w ? errno : ENOSPC;
      return ftruncate(f->fd, f->size) ? errno : error;
    }
    done += w;
  }
  f->size += n;
  return 0;
}

/* Gives an upload its owner, mode, time and name. The way to its directory is walked once more: where
 * it leads elsewhere by now, nothing is put in place. */
static int finish_upload(struct file *f, uint64_t size) {
  struct timespec when[2] = {{f->mtime / 1000000000, f->mtime % 1000000000}};
  char path[MAX_NAME + 1], *leaf;
  uid_t owner = f->as_root ? 0 : cfg.uid;
  if (size != f->size) return ERANGE;
  if (when[0].tv_nsec < 0) when[0].tv_sec--, when[0].tv_nsec += 1000000000;
  when[1] = when[0];
  if (cfg.keep) memcpy(when, EPOCH, sizeof when);
  snprintf(path, sizeof path, "%s", f->path);
  int dir = open_parent(path, &leaf, 0, 0), error = dir < 0 ? errno : 0;
  if (!error && (!names(dir, ".", f->dir) || !names(dir, f->temp, f->fd))) error = ESTALE;
  if (!error && separate() && fchown(f->fd, owner, owner)) error = errno;
  if (!error && (fchmod(f->fd, f->mode) || futimens(f->fd, when))) error = errno;
  if (!error && renameat(dir, f->temp, dir, leaf)) error = errno;
  if (!error && !names(dir, leaf, f->fd)) error = ESTALE;
  if (dir >= 0) futimens(dir, EPOCH), close(dir);
  return error;
}

/* Takes up an upload that a broken connection left; the thread that served it may still be about to. */
static int resume_upload(struct file *f, const char *token) {
  struct timespec t;
  int found = 0, late = 0;
  clock_gettime(CLOCK_MONOTONIC, &t);
  t.tv_sec += 2;
  pthread_mutex_lock(&lock);
  while (!found && !late) {
    for (struct parked *p = parked; p && !found; p = p->next)
      if (p->file && !strcmp(p->file->temp + 6, token)) {
        *f = *p->file;
        p->file = NULL;
        found = 1;
      }
    if (found) pthread_cond_broadcast(&changed);
    else late = pthread_cond_clockwait(&changed, &lock, CLOCK_MONOTONIC, &t);
  }
  pthread_mutex_unlock(&lock);
  return found ? 0 : ENOENT;
}

void file_leave(struct file *f) {
  struct parked me = {f, NULL}, **at;
  struct timespec t;
  int late = f->open != OPEN_UPLOAD, waiting = 0;
  clock_gettime(CLOCK_MONOTONIC, &t);
  t.tv_sec += PATIENCE / 1000;
  pthread_mutex_lock(&lock);
  for (at = &parked; *at; at = &(*at)->next) waiting++;
  late |= waiting >= MAX_PARKED;
  if (!late) *at = &me, pthread_cond_broadcast(&changed);
  while (!late && me.file && f->generation == generation)
    late = pthread_cond_clockwait(&changed, &lock, CLOCK_MONOTONIC, &t);
  for (at = &parked; *at && *at != &me; at = &(*at)->next) {}
  if (*at) *at = me.next;
  pthread_mutex_unlock(&lock);
  if (me.file) close_file(f);
}

void file_forget(void) {
  pthread_mutex_lock(&lock);
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
}

static int do_upload(struct session *s, const struct request *q, char *name,
                     const struct file_args *a, const char *data, size_t n) {
  struct file *f = &s->file;
  char token[sizeof a->token + 1] = {0};
  int error;
  memcpy(token, a->token, sizeof a->token);
  if (strspn(token, "0123456789abcdef") != sizeof a->token) return -1;
  if (a->flags & RESUME) error = resume_upload(f, token);
  else error = open_upload(f, q, name, a, token);
  if (!error && a->flags & WHOLE && !(error = add(f, data, n))) error = finish_upload(f, n);
  uint64_t size = f->size;
  if (error || a->flags & WHOLE) close_file(f);
  return error ? fail(s->conn, error, "write") : answer(s->conn, 0, size);
}

/* Nothing lies behind the end either: some files of the kernel's say they are empty. */
static int unchanged(const struct file *f) {
  struct stat st;
  char more;
  return !fstat(f->fd, &st) && (uint64_t)st.st_size == f->size && describe(&st).mtime == f->mtime &&
         pread(f->fd, &more, 1, f->size) <= 0;
}

/* Reads `n` bytes at `at`; where the end is reached, the file must be as it was. Returns an errno. */
static int fetch(const struct file *f, char *to, size_t n, uint64_t at) {
  for (size_t got = 0; got < n;) {
    ssize_t r = pread(f->fd, to + got, n - got, at + got);
    if (r <= 0) return r ? errno : ESTALE;
    got += r;
  }
  return at + n < f->size || unchanged(f) ? 0 : ESTALE;
}

static int open_download(struct file *f, char *name, uint64_t most, struct stat *st) {
  char *leaf;
  *f = (struct file){.open = OPEN_DOWNLOAD, .fd = -1, .generation = generation};
  if ((f->dir = open_parent(name, &leaf, 0, 0)) < 0) return errno;
  /* Not to wait for a fifo's writer, nor for the end of a lease that the agent holds. */
  f->fd = openat(f->dir, leaf, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (f->fd < 0 || fstat(f->fd, st)) return errno;
  if (!S_ISREG(st->st_mode)) return S_ISDIR(st->st_mode) ? EISDIR : EINVAL;
  /* Where the kernel lets users link what they may not read, the name may be another's secret. */
  if (separate() && st->st_nlink > 1 && st->st_uid != cfg.uid && !(st->st_mode & S_IROTH)) return EPERM;
  f->size = st->st_size, f->mtime = describe(st).mtime;
  return f->size > most ? EFBIG : 0;
}

/* Answers with `head`, then bytes of the file. */
static int send_part(struct session *s, const void *head, size_t head_len, const struct file_args *a,
                     uint64_t at) {
  struct file *f = &s->file;
  size_t n = a->length < MAX_PART ? a->length : MAX_PART;
  if (at > f->size) return fail(s->conn, ERANGE, "read beyond the end");
  if (n > f->size - at) n = f->size - at;
  char *part = malloc(n + 1);
  int error = part ? fetch(f, part, n, at) : ENOMEM, sent;
  struct reply r = {.len = head_len + n, .total = f->size};
  struct iovec v[3] = {{&r, sizeof r}, {(void *)head, head_len}, {part, n}};
  if (error) close_file(f);
  sent = error ? fail(s->conn, error, "read") : send_all(s->conn, v, 3);
  free(part);
  return sent;
}

static int do_download(struct session *s, char *name, const struct file_args *a) {
  struct stat st;
  int error = open_download(&s->file, name, a->offset, &st);
  if (error) {
    close_file(&s->file);
    return fail(s->conn, error, "read");
  }
  struct file_stat found = describe(&st);
  return send_part(s, &found, sizeof found, a, 0);
}

int do_file(struct session *s, const struct request *q, char *name, const char *data) {
  struct file_args a;
  struct file *f = &s->file;
  size_t n = q->data_len - sizeof a;
  int error = 0;
  if (q->data_len < sizeof a) return -1;
  memcpy(&a, data, sizeof a);
  data += sizeof a;
  if (q->op == FILE_OPEN) {
    close_file(f);
    if (a.flags & DIRECTORY) return do_make_dir(s->conn, q, name);
    return a.flags & UPLOAD ? do_upload(s, q, name, &a, data, n) : do_download(s, name, &a);
  }
  if (f->open && f->generation != generation) close_file(f);  /* a reset took the file away */
  if (q->op == FILE_DROP) {
    close_file(f);
    return answer(s->conn, 0, 0);
  }
  if (f->open != (q->op == FILE_READ ? OPEN_DOWNLOAD : OPEN_UPLOAD))
    return fail(s->conn, EBADF, "no such file is open on this connection");
  if (q->op == FILE_READ) return send_part(s, NULL, 0, &a, a.offset);
  if (q->op == FILE_WRITE && a.offset != f->size) return answer(s->conn, MISPLACED, f->size);
  if (q->op == FILE_WRITE) error = add(f, data, n);
  uint64_t size = f->size;
  if (q->op == FILE_FINISH) error = finish_upload(f, a.offset), close_file(f);
  return error ? fail(s->conn, error, "write") : answer(s->conn, 0, size);
}
