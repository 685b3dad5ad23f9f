/* Restores a snapshot (snapshot.h) on a fresh root, or on a container's own root for a commit.
 *
 * The stream may have lain in a file that somebody changed, so nothing in it is believed: a name is one
 * name, numbers are within bounds, the end is where it says. What does not fit stops the restore with
 * the number and name of the record, and the root is emptied again. Names are never joined to paths:
 * directories are entered and left, so no depth and no symbolic link leads astray. */
#define _GNU_SOURCE
#include "rocklet.h"
#include "snapshot.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* Where files with several names are kept until all of them are there. */
#define LINKS ".rome-links"

struct attribute { struct attribute *next; uint32_t size; char name[256], value[]; };
struct level { struct meta meta; struct attribute *attributes; };
struct in {
  int conn, dir;             /* the directory that is being filled */
  uint64_t left, records;    /* bytes of the stream not yet asked for */
  uint64_t room_left;        /* bytes that files may have, in a commit */
  size_t at, have;           /* of buf */
  struct level *levels;
  int depth, room, links, ended;
  char kind, name[NAME_MAX + 1], buf[65536];
};

enum { BAD = EBADMSG };

/* --- reading: each returns 0 or an errno --------------------------------------------------------- */

static int take(struct in *in, void *to, size_t n) {
  for (char *out = to; n;) {
    if (in->at == in->have) {
      size_t m = in->left < sizeof in->buf ? in->left : sizeof in->buf;
      if (!m) return BAD;
      if (receive(in->conn, in->buf, m)) return ECONNRESET;
      in->at = 0, in->have = m, in->left -= m;
    }
    size_t m = in->have - in->at < n ? in->have - in->at : n;
    memcpy(out, in->buf + in->at, m);
    in->at += m, out += m, n -= m;
  }
  return 0;
}

static int take_meta(struct in *in, struct meta *m) {
  int error = take(in, m, sizeof *m);
  return error ? error : (m->mode & ~07777u) || m->nsec > 999999999 ? BAD : 0;
}

static int take_attributes(struct in *in, struct attribute **list) {
  uint16_t count;
  int error = take(in, &count, sizeof count);
  for (*list = NULL; count && !error; count--) {
    char name[256] = {0};
    uint8_t n;
    uint32_t size;
    if ((error = take(in, &n, 1)) || (error = take(in, name, n)) ||
        (error = take(in, &size, sizeof size))) break;
    if (strlen(name) != n || !is_kept_attribute(name) || size > 65536) return BAD;
    struct attribute *a = malloc(sizeof *a + size);
    if (!a) return ENOMEM;
    *a = (struct attribute){.next = *list, .size = size};
    memcpy(a->name, name, sizeof name);
    *list = a;
    error = take(in, a->value, size);
  }
  return error;
}

static void free_attributes(struct attribute *a) {
  for (struct attribute *next; a; a = next) next = a->next, free(a);
}

static int is_dots(const char *name) { return !strcmp(name, ".") || !strcmp(name, ".."); }

static int is_in(const char *name, const char *const *list) {
  for (; *list; list++)
    if (!strcmp(name, *list)) return 1;
  return 0;
}

static int take_record(struct in *in) {
  uint16_t n;
  int error = take(in, &in->kind, 1);
  in->records++;
  if (error || (error = take(in, &n, sizeof n))) return error;
  if (n > NAME_MAX) return BAD;
  memset(in->name, 0, sizeof in->name);
  if ((error = take(in, in->name, n))) return error;
  int named = in->kind != 'U' && in->kind != 'E' && (in->kind != 'D' || in->depth);
  if (strlen(in->name) != n || strchr(in->name, '/') || is_dots(in->name) || (n > 0) != named)
    return BAD;
  if (!in->depth && in->kind != (in->records == 1 ? 'D' : 'E')) return BAD;
  if (in->depth && in->kind == 'E') return BAD;
  return in->depth == 1 && (is_in(in->name, KERNEL_TREES) || !strcmp(in->name, LINKS)) ? BAD : 0;
}

/* --- writing ------------------------------------------------------------------------------------- */

static int swap_fd(int *fd, int with) {
  if (with < 0) return errno;
  close(*fd);
  *fd = with;
  return 0;
}

/* Removes what has this name, at whatever depth things lie in it, without recursion. 0 or an errno. */
int remove_tree(int at, const char *name) {
  int depth = 0, dir, error = 0;
  if (!unlinkat(at, name, 0) || errno == ENOENT) return 0;
  if (errno != EISDIR) return errno;
  if ((dir = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0) return errno;
  while (!error && depth >= 0) {
    int down = -1;
    DIR *d = fdopendir(openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!d) error = errno;
    for (struct dirent *e; d && !error && down < 0 && (e = readdir(d));) {
      if (is_dots(e->d_name) || !unlinkat(dir, e->d_name, 0)) continue;
      if (errno != EISDIR) error = errno;
      else if (unlinkat(dir, e->d_name, AT_REMOVEDIR)) {
        if (errno != ENOTEMPTY) error = errno;
        else if ((down = openat(dir, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0)
          error = errno;
      }
    }
    if (d) closedir(d);
    if (error) break;
    if (down >= 0) error = swap_fd(&dir, down), depth++;
    else if (depth-- > 0) error = swap_fd(&dir, openat(dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  }
  close(dir);
  return error ? error : unlinkat(at, name, AT_REMOVEDIR) ? errno : 0;
}

static int set_attributes(int fd, const struct attribute *wanted) {
  char list[65536];
  ssize_t n = flistxattr(fd, list, sizeof list);
  for (char *at = list; at < list + n; at += strlen(at) + 1)  /* of the image's directory */
    if (is_kept_attribute(at) && fremovexattr(fd, at)) return errno;
  for (; wanted; wanted = wanted->next)
    if (fsetxattr(fd, wanted->name, wanted->value, wanted->size, 0)) return errno;
  return 0;
}

/* Owner first: it takes set-user-id bits away. The time last: everything else changes it. */
static int set_meta(int fd, const struct meta *m, const struct attribute *attributes) {
  const struct timespec times[2] = {EPOCH[0], {m->sec, m->nsec}};
  int error = fchown(fd, m->uid, m->gid) ? errno : set_attributes(fd, attributes);
  return error ? error : fchmod(fd, m->mode) || futimens(fd, times) ? errno : 0;
}

static int set_meta_at(int dir, const char *name, const struct meta *m, int with_mode) {
  const struct timespec times[2] = {EPOCH[0], {m->sec, m->nsec}};
  return fchownat(dir, name, m->uid, m->gid, AT_SYMLINK_NOFOLLOW) ||
         (with_mode && fchmodat(dir, name, m->mode, 0)) ||
         utimensat(dir, name, times, AT_SYMLINK_NOFOLLOW) ? errno : 0;
}

/* The directory of links is made at the first need. */
static int keep_link(struct in *in, uint32_t link) {
  char name[16];
  if (!link) return 0;
  if (in->links < 0) {
    int root = open(root_path(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0) return errno;
    if (!mkdirat(root, LINKS, 0700)) in->links = openat(root, LINKS, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int error = errno;
    close(root);
    if (in->links < 0) return error;
  }
  snprintf(name, sizeof name, "%u", link);
  return linkat(in->dir, in->name, in->links, name, 0) ? errno : 0;
}

static int restore_link(struct in *in) {
  uint32_t link;
  char name[16];
  int error = take(in, &link, sizeof link);
  if (error || (error = remove_tree(in->dir, in->name))) return error;
  snprintf(name, sizeof name, "%u", link);
  if (in->links < 0) return BAD;
  if (linkat(in->links, name, in->dir, in->name, 0)) return errno == ENOENT ? BAD : errno;
  return 0;
}

static int restore_data(struct in *in, int fd) {
  char chunk[65536];
  uint64_t size, run[2], end = 0;
  int error = take(in, &size, sizeof size);
  if (error || size > INT64_MAX) return error ? error : BAD;
  /* An image has no holes: a few bytes of sparse files would fill the host's disk. */
  if (cfg.apply && (size > in->room_left || !(in->room_left -= size))) return EFBIG;
  while (!(error = take(in, run, sizeof run)) && run[1]) {
    if (run[0] < end || run[0] > size || run[1] > size - run[0]) return BAD;
    for (end = run[0] + run[1]; run[0] < end;) {
      size_t n = end - run[0] < sizeof chunk ? end - run[0] : sizeof chunk;
      if ((error = take(in, chunk, n))) return error;
      ssize_t wrote = pwrite(fd, chunk, n, run[0]);
      if (wrote != (ssize_t)n) return wrote < 0 ? errno : ENOSPC;
      run[0] += n;
    }
  }
  if (!error && (run[0] || (size != end && ftruncate(fd, size)))) error = run[0] ? BAD : errno;
  return error;
}

static int restore_file(struct in *in) {
  struct meta m;
  struct attribute *attributes = NULL;
  uint32_t link;
  int error, fd = -1;
  if ((error = take_meta(in, &m)) || (error = take(in, &link, sizeof link))) return error;
  error = take_attributes(in, &attributes);
  if (!error) error = remove_tree(in->dir, in->name);
  if (!error) {
    fd = openat(in->dir, in->name, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
    error = fd < 0 ? errno : restore_data(in, fd);
  }
  if (!error) error = set_meta(fd, &m, attributes);
  close_fd(&fd);
  free_attributes(attributes);
  return error ? error : keep_link(in, link);
}

static int restore_special(struct in *in) {
  struct meta m;
  uint32_t link;
  uint16_t n = 0;
  char target[PATH_MAX] = {0};
  int error, symbolic = in->kind == 'L';
  if ((error = take_meta(in, &m)) || (error = take(in, &link, sizeof link))) return error;
  if (symbolic && (error = take(in, &n, sizeof n))) return error;
  if (n >= sizeof target) return BAD;
  if ((error = take(in, target, n))) return error;
  if (strlen(target) != n || symbolic != !!n) return BAD;
  if ((error = remove_tree(in->dir, in->name))) return error;
  if (symbolic ? symlinkat(target, in->dir, in->name) : mkfifoat(in->dir, in->name, 0600)) return errno;
  error = set_meta_at(in->dir, in->name, &m, !symbolic);
  return error ? error : keep_link(in, link);
}

static int restore_enter(struct in *in) {
  const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  int error;
  if (in->depth == in->room) {
    struct level *more = realloc(in->levels, (in->room = 2 * in->room + 16) * sizeof *more);
    if (!more) return ENOMEM;
    in->levels = more;
  }
  struct level *l = &in->levels[in->depth++];
  *l = (struct level){0};
  if ((error = take_meta(in, &l->meta)) || (error = take_attributes(in, &l->attributes))) return error;
  if (in->depth == 1) return (in->dir = open(root_path(), flags)) < 0 ? errno : 0;
  int sub = openat(in->dir, in->name, flags);
  if (sub < 0 && (errno == ENOTDIR || errno == ELOOP || errno == ENOENT)) {
    if ((error = remove_tree(in->dir, in->name))) return error;
    if (mkdirat(in->dir, in->name, 0700)) return errno;
    sub = openat(in->dir, in->name, flags);
  }
  return swap_fd(&in->dir, sub);
}

static int restore_leave(struct in *in) {
  struct level *l = &in->levels[in->depth - 1];
  if (in->depth == 1 && in->links >= 0) {
    close_fd(&in->links);
    int error = remove_tree(in->dir, LINKS);
    if (error) return error;
  }
  int error = set_meta(in->dir, &l->meta, l->attributes);
  if (error) return error;
  free_attributes(l->attributes);
  if (!--in->depth) return 0;
  return swap_fd(&in->dir, openat(in->dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

static int restore_end(struct in *in) {
  uint64_t records;
  int error = take(in, &records, sizeof records);
  if (error) return error;
  in->ended = 1;
  return records != in->records - 1 || in->left || in->at != in->have ? BAD : 0;
}

static int restore_all(struct in *in) {
  char magic[8];
  int error = take(in, magic, sizeof magic);
  if (!error && memcmp(magic, SNAPSHOT_MAGIC, sizeof magic)) error = BAD;
  while (!error && !in->ended) {
    if ((error = take_record(in))) break;
    switch (in->kind) {
      case 'D': error = restore_enter(in); break;
      case 'U': error = restore_leave(in); break;
      case 'X': error = remove_tree(in->dir, in->name); break;
      case 'F': error = restore_file(in); break;
      case 'L': case 'P': error = restore_special(in); break;
      case 'H': error = restore_link(in); break;
      case 'E': error = restore_end(in); break;
      default: error = BAD;
    }
  }
  while (in->depth) free_attributes(in->levels[--in->depth].attributes);
  free(in->levels);
  close_fd(&in->dir), close_fd(&in->links);
  return error;
}

/* Reads what is left of the stream, so that the connection stays in step. */
static int skip_rest(struct in *in) {
  while (in->left) {
    size_t m = in->left < sizeof in->buf ? in->left : sizeof in->buf;
    if (receive(in->conn, in->buf, m)) return -1;
    in->left -= m;
  }
  return 0;
}

/* The stream is the request's data; its length has mode as the upper half. The sandbox loses its
 * processes and all it had; sessions start anew, as after a reset. */
int do_restore(struct session *s, const struct request *q) {
  int64_t deadline = now_ms() + q->timeout_ms;
  struct in *in = calloc(1, sizeof *in);
  char what[NAME_MAX + 100] = "restore";
  if (!in) return -1;
  *in = (struct in){.conn = s->conn, .dir = -1, .links = -1, .room_left = cfg.fsize,
                    .left = (uint64_t)q->mode << 32 | q->data_len};
  int error = !has_overlay() && !cfg.apply ? EOPNOTSUPP : lock_gate(deadline), gate = !error;
  if (!error && cfg.bash) error = kill_all(deadline);
  int disk = !error && !(error = lock_disk(1, deadline));
  if (!error && has_overlay()) error = mount_root();
  if (!error && (error = restore_all(in))) {
    for (char *c = in->name; *c; c++) *c = *c < 32 || *c > 126 ? '?' : *c;
    snprintf(what, sizeof what, "restore: record %llu%s%s", (unsigned long long)in->records,
             *in->name ? ", " : "", in->name);
    if (has_overlay()) mount_root();
  }
  if (disk) unlock_disk();
  if (gate) {
    generation++;
    tainted = 1;
    output_forget();
    file_forget();
    unlock_gate();
  }
  shell_end(s);
  output_clear(&s->out);
  int broken = error == ECONNRESET || skip_rest(in);
  free(in);
  if (broken) return -1;
  if (error) return fail(s->conn, error, what);
  if (s->open) shell_start(s, "", 0, deadline);
  return reply(s->conn, 0, NULL, 0);
}
