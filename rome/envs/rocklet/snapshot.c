/* Snapshots: everything that the sandbox changed in its root, as one canonical stream of bytes.
 *
 * All other processes are halted meanwhile, so the picture is of one moment. The upper layer is walked
 * in the order of names, each directory being entered and left, so that no path grows with the depth.
 * What the image has and the sandbox shows no more is recorded as deleted; that needs no knowledge of
 * how an overlay marks it. A restore (restore.c) replays the stream on a fresh root.
 *
 * Kept: names of any bytes, owners, modes, times of modification, user attributes and access lists,
 * hard links, holes, symbolic links, fifos. Left out: sockets (counted), /dev/shm, processes (named). */
#define _GNU_SOURCE
#include "rocklet.h"
#include "snapshot.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

/* --- writing ----------------------------------------------------------------------------------- */

struct out { int conn, broken; size_t n; uint64_t total, limit, records; char buf[65536]; };

static void flush(struct out *o) {
  struct reply r = {.flags = MORE, .len = o->n};
  struct iovec v[2] = {{&r, sizeof r}, {o->buf, o->n}};
  if (!o->broken && o->n && send_all(o->conn, v, 2)) o->broken = EPIPE;
  o->n = 0;
}

static void put(struct out *o, const void *data, size_t n) {
  const char *from = data;
  if ((o->total += n) > o->limit) o->broken = EFBIG;
  while (n && !o->broken) {
    size_t m = n < sizeof o->buf - o->n ? n : sizeof o->buf - o->n;
    memcpy(o->buf + o->n, from, m);
    o->n += m, from += m, n -= m;
    if (o->n == sizeof o->buf) flush(o);
  }
}

static void put16(struct out *o, uint16_t value) { put(o, &value, sizeof value); }
static void put32(struct out *o, uint32_t value) { put(o, &value, sizeof value); }
static void put64(struct out *o, uint64_t value) { put(o, &value, sizeof value); }

static void put_record(struct out *o, char kind, const char *name) {
  size_t n = strlen(name);
  o->records++;
  put(o, &kind, 1), put16(o, n), put(o, name, n);
}

static void put_meta(struct out *o, const struct stat *st) {
  struct meta m = {st->st_mode & 07777, st->st_uid, st->st_gid, st->st_mtim.tv_nsec, st->st_mtim.tv_sec};
  put(o, &m, sizeof m);
}

/* --- names and attributes ---------------------------------------------------------------------- */

struct names { char **v; int n; };

static int by_bytes(const void *a, const void *b) { return strcmp(*(char **)a, *(char **)b); }

static void free_names(struct names *l) {
  for (int i = 0; i < l->n; i++) free(l->v[i]);
  free(l->v);
  *l = (struct names){0};
}

static int add_name(struct names *l, const char *name) {
  if (!(l->n & (l->n - 1))) {  /* at every power of two */
    char **more = realloc(l->v, (l->n ? 2 * l->n : 1) * sizeof *more);
    if (!more) return ENOMEM;
    l->v = more;
  }
  return (l->v[l->n] = strdup(name)) ? l->n++, 0 : ENOMEM;
}

/* Lists a directory in the order of bytes. Returns 0 or an errno. */
static int list_names(int at, struct names *l) {
  int fd = openat(at, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), error = 0;
  DIR *d = fd < 0 ? NULL : fdopendir(fd);
  *l = (struct names){0};
  if (!d) return errno;
  for (struct dirent *e; !error && (errno = 0, e = readdir(d));)
    if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) error = add_name(l, e->d_name);
  if (!error) error = errno;
  closedir(d);
  if (error) free_names(l);
  else if (l->n) qsort(l->v, l->n, sizeof *l->v, by_bytes);
  return error;
}

int is_kept_attribute(const char *name) {
  if (!strncmp(name, "user.overlay.", 13)) return 0;  /* in an image they would mean something */
  return !strncmp(name, "user.", 5) || !strcmp(name, "system.posix_acl_access") ||
         !strcmp(name, "system.posix_acl_default");
}

/* Writes the attributes of what is `name` in the merged directory: there the overlay hides its own. */
static int put_attributes(struct out *o, int fd_upper, int merged, const char *name) {
  char list[65536], value[65536];
  struct names l = {0};
  int error = 0, fd;
  if (flistxattr(fd_upper, NULL, 0) <= 0) return put16(o, 0), 0;
  if ((fd = openat(merged, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)) < 0) return errno;
  ssize_t n = flistxattr(fd, list, sizeof list);
  if (n < 0) error = errno;
  for (char *at = list; !error && at < list + n; at += strlen(at) + 1)
    if (is_kept_attribute(at)) error = add_name(&l, at);
  if (!error && l.n) qsort(l.v, l.n, sizeof *l.v, by_bytes);
  if (!error) put16(o, l.n);
  for (int i = 0; i < l.n && !error; i++) {
    ssize_t got = fgetxattr(fd, l.v[i], value, sizeof value);
    char len = strlen(l.v[i]);
    if (got < 0) error = errno;
    else put(o, &len, 1), put(o, l.v[i], strlen(l.v[i])), put32(o, got), put(o, value, got);
  }
  free_names(&l);
  close(fd);
  return error;
}

/* --- the walk ---------------------------------------------------------------------------------- */

struct level { struct names names; int i, is_run; };
struct linked { ino_t inode; uint32_t id; };
struct walk {
  struct out *o;
  int upper, lower, merged;  /* the same directory in the three views */
  int missing;               /* how many levels below the deepest one that the lower layer has */
  struct level *levels;
  int depth, room, sockets;
  void *links;               /* of struct linked, a tree by inode */
  uint32_t last_link;
  char at[NAME_MAX + 1];     /* the name last looked at, for messages */
};

static int by_inode(const void *a, const void *b) {
  ino_t x = ((const struct linked *)a)->inode, y = ((const struct linked *)b)->inode;
  return x < y ? -1 : x > y;
}

/* The number of a file with several names, negative at the first of them; 0 for one with one name. */
static int link_number(struct walk *w, const struct stat *st) {
  if (st->st_nlink < 2) return 0;
  struct linked *fresh = malloc(sizeof *fresh), **found = NULL;
  if (fresh) {
    *fresh = (struct linked){st->st_ino, w->last_link + 1};
    found = tsearch(fresh, &w->links, by_inode);
  }
  if (!found) w->o->broken = ENOMEM;
  else if (*found == fresh) return -(int)++w->last_link;
  free(fresh);
  return found ? (*found)->id : 0;
}

static int put_data(struct out *o, int fd, off_t size) {
  char chunk[65536];
  off_t from = 0, to;
  put64(o, size);
  for (; !o->broken && from < size; from = to) {
    if ((from = lseek(fd, from, SEEK_DATA)) < 0) {
      if (errno != ENXIO) return errno;
      break;  /* a hole to the end */
    }
    if ((to = lseek(fd, from, SEEK_HOLE)) < 0) return errno;
    put64(o, from), put64(o, to - from);
    for (off_t at = from; at < to && !o->broken;) {
      ssize_t n = pread(fd, chunk, to - at < (off_t)sizeof chunk ? to - at : (off_t)sizeof chunk, at);
      if (n <= 0) return n ? errno : EIO;
      put(o, chunk, n);
      at += n;
    }
  }
  put64(o, 0), put64(o, 0);
  return 0;
}

static int put_file(struct walk *w, const char *name, const struct stat *st, uint32_t link) {
  int fd = openat(w->upper, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return errno;
  put_record(w->o, 'F', name), put_meta(w->o, st), put32(w->o, link);
  int error = put_attributes(w->o, fd, w->merged, name);
  if (!error) error = put_data(w->o, fd, st->st_size);
  close(fd);
  return error;
}

static int put_symlink(struct walk *w, const char *name, const struct stat *st, uint32_t link) {
  char target[PATH_MAX];
  ssize_t n = readlinkat(w->upper, name, target, sizeof target);
  if (n < 0) return errno;
  put_record(w->o, 'L', name), put_meta(w->o, st), put32(w->o, link);
  put16(w->o, n), put(w->o, target, n);
  return 0;
}

static int put_other(struct walk *w, const char *name, const struct stat *st) {
  if (S_ISCHR(st->st_mode)) return 0;  /* how the overlay marks what is deleted */
  if (!S_ISREG(st->st_mode) && !S_ISLNK(st->st_mode) && !S_ISFIFO(st->st_mode))
    return w->sockets++, 0;
  int number = link_number(w, st);
  if (number > 0) return put_record(w->o, 'H', name), put32(w->o, number), 0;
  if (S_ISREG(st->st_mode)) return put_file(w, name, st, -number);
  if (S_ISLNK(st->st_mode)) return put_symlink(w, name, st, -number);
  put_record(w->o, 'P', name), put_meta(w->o, st), put32(w->o, -number);
  return 0;
}

static int is_in(const char *name, const char *const *list) {
  for (; *list; list++)
    if (!strcmp(name, *list)) return 1;
  return 0;
}

/* Records what the lower layer has here and the merged view has not. */
static int put_deletions(struct walk *w, int is_run) {
  struct names lower, merged;
  int error = w->missing ? -1 : list_names(w->lower, &lower);
  if (error) return error < 0 ? 0 : error;
  if ((error = list_names(w->merged, &merged))) return free_names(&lower), error;
  for (int i = 0, j = 0; i < lower.n; i++) {
    int order = 1;
    while (j < merged.n && (order = strcmp(merged.v[j], lower.v[i])) < 0) j++;
    if ((j == merged.n || order) && !(is_run && is_in(lower.v[i], HIDDEN)))
      put_record(w->o, 'X', lower.v[i]);
  }
  free_names(&lower), free_names(&merged);
  return 0;
}

static int swap_fd(int *fd, int with) {
  if (with < 0) return errno;
  close(*fd);
  *fd = with;
  return 0;
}

/* Enters a directory: its record, what was deleted in it, and its names to go through. */
static int enter(struct walk *w, const char *name, int is_run) {
  const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  struct stat st;
  int error = 0, hidden = w->depth && w->levels[w->depth - 1].is_run && is_in(name, HIDDEN);
  if (w->depth) {
    if ((error = swap_fd(&w->upper, openat(w->upper, name, flags))) ||
        (error = swap_fd(&w->merged, openat(w->merged, name, flags)))) return error;
    if (w->missing || hidden || swap_fd(&w->lower, openat(w->lower, name, flags))) w->missing++;
  }
  if (w->depth == w->room) {
    struct level *more = realloc(w->levels, (w->room = 2 * w->room + 16) * sizeof *more);
    if (!more) return ENOMEM;
    w->levels = more;
  }
  struct level *l = &w->levels[w->depth++];
  *l = (struct level){.is_run = is_run};
  if (fstat(w->upper, &st)) return errno;
  put_record(w->o, 'D', name), put_meta(w->o, &st);
  if ((error = put_attributes(w->o, w->upper, w->merged, "."))) return error;
  if ((error = put_deletions(w, is_run))) return error;
  return list_names(w->upper, &l->names);
}

static int leave(struct walk *w) {
  int error = 0;
  put_record(w->o, 'U', "");
  free_names(&w->levels[--w->depth].names);
  if (!w->depth) return 0;
  if ((error = swap_fd(&w->upper, openat(w->upper, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC))) ||
      (error = swap_fd(&w->merged, openat(w->merged, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC))))
    return error;
  if (w->missing) return w->missing--, 0;
  return swap_fd(&w->lower, openat(w->lower, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

static int walk(struct walk *w) {
  int error = enter(w, "", 0);
  while (!error && !w->o->broken && w->depth) {
    struct level *l = &w->levels[w->depth - 1];
    struct stat st;
    if (l->i == l->names.n) {
      error = leave(w);
      continue;
    }
    const char *name = l->names.v[l->i++];
    snprintf(w->at, sizeof w->at, "%s", name);
    if (w->depth == 1 && is_in(name, KERNEL_TREES)) continue;
    if (fstatat(w->upper, name, &st, AT_SYMLINK_NOFOLLOW)) error = errno;
    else if (S_ISDIR(st.st_mode)) error = enter(w, name, w->depth == 1 && !strcmp(name, "run"));
    else error = put_other(w, name, &st);
  }
  while (w->depth) free_names(&w->levels[--w->depth].names);
  tdestroy(w->links, free);
  free(w->levels);
  return error ? error : w->o->broken;
}

/* Streams the snapshot in frames that have the flag MORE; the last frame has not, and says how many
 * sockets were left out and which processes ran, each with a NUL behind it. */
int do_snapshot(int conn, int timeout_ms) {
  int64_t deadline = now_ms() + timeout_ms;
  struct out *o = malloc(sizeof *o);
  struct walk w = {.o = o, .upper = -1, .lower = -1, .merged = -1};
  struct frozen frozen = {0};
  char *lost = NULL, what[NAME_MAX + 64];
  size_t lost_n = 0;
  int error = !has_overlay() ? EOPNOTSUPP : !o ? ENOMEM : lock_gate(deadline);
  if (error) return free(o), fail(conn, error, "snapshot");
  if ((error = lock_disk(1, deadline))) unlock_gate();
  if (error) return free(o), fail(conn, error, "snapshot");
  error = freeze_all(&frozen, deadline);
  *o = (struct out){.conn = conn, .limit = 2 * ((uint64_t)cfg.disk << 20) + (64 << 20)};
  if (!error) {
    w.upper = open(upper_path(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    w.lower = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    w.merged = open(root_path(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    put(o, SNAPSHOT_MAGIC, 8);
    error = w.upper < 0 || w.lower < 0 || w.merged < 0 ? errno : walk(&w);
  }
  if (!error) {
    uint64_t records = o->records;
    put_record(o, 'E', ""), put64(o, records), flush(o);
    error = o->broken;
  }
  FILE *f = open_memstream(&lost, &lost_n);
  if (f) fprintf(f, "%d%c", w.sockets, 0), name_processes(f), fclose(f);
  thaw_all(&frozen);
  unlock_disk();
  unlock_gate();
  close_fd(&w.upper), close_fd(&w.lower), close_fd(&w.merged);
  snprintf(what, sizeof what, "snapshot%s%s", *w.at ? ": " : "", w.at);
  int sent = o->broken == EPIPE ? -1 : error ? fail(conn, error, what) : reply(conn, 0, lost, lost_n);
  free(o), free(lost);
  return sent;
}
