/* Paths: finding, listing and removing what they name. No symbolic link is ever followed, so the agent
 * cannot lead root astray: paths are walked one name at a time. transfer.c moves contents. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN_DIR = O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC };

/* 2020-01-01: listings do not tell when an episode ran. */
struct timespec EPOCH[2] = {{1577836800, 0}, {1577836800, 0}};

/* Makes a directory as its owner-to-be. Made as root and handed over later, the agent could slip one
 * of root's directories under its name meanwhile. The capabilities that a change of the file system's
 * user takes away are taken back, so that parents of root's are no hindrance. */
static int make_dir(int dir, const char *name, mode_t mode, int as_root) {
  if (as_root || !separate()) return mkdirat(dir, name, mode);
  struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct c[2];
  syscall(SYS_setfsgid, cfg.uid), syscall(SYS_setfsuid, cfg.uid);
  if (!syscall(SYS_capget, &h, c)) {
    c[0].effective = c[0].permitted, c[1].effective = c[1].permitted;
    syscall(SYS_capset, &h, c);
  }
  int made = mkdirat(dir, name, mode), error = errno;
  syscall(SYS_setfsuid, 0), syscall(SYS_setfsgid, 0);
  return errno = error, made;
}

int open_parent(char *path, char **leaf, int make, int as_root) {
  int dir = open_inside(path[0] == '/' ? "/" : cfg.work);
  for (char *name = path, *next; dir >= 0; name = next) {
    while (*name == '/') name++;
    next = strchrnul(name, '/');
    if (next - name == 2 && !strncmp(name, "..", 2)) {
      close(dir);
      return errno = EINVAL, -1;
    }
    if (!*next) return *leaf = *name ? name : ".", dir;
    *next++ = 0;
    if (make && !make_dir(dir, name, 0755, as_root)) futimens(dir, EPOCH);
    int sub = openat(dir, name, OPEN_DIR), error = errno;
    close(dir);
    dir = sub, errno = error;
  }
  return -1;
}

int do_make_dir(int conn, const struct request *q, char *name) {
  char *leaf;
  struct stat st;
  int dir = open_parent(name, &leaf, 1, q->as_root), error = dir < 0 ? errno : 0;
  if (!error && !make_dir(dir, leaf, q->mode & 07777, q->as_root)) {
    futimens(dir, EPOCH);
    int made = openat(dir, leaf, OPEN_DIR);
    if (made >= 0) futimens(made, EPOCH), close(made);
  } else if (!error && errno != EEXIST) error = errno;
  else if (!error && fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW)) error = errno;
  else if (!error && !S_ISDIR(st.st_mode)) error = EEXIST;
  if (dir >= 0) close(dir);
  return error ? fail(conn, error, "make directory") : reply(conn, 0, NULL, 0);
}

struct file_stat describe(const struct stat *st) {
  int64_t s = st->st_mtim.tv_sec, most = INT64_MAX / 1000000000 - 1;
  s = s > most ? most : s < -most ? -most : s;
  return (struct file_stat){
    .mode = st->st_mode, .uid = st->st_uid, .gid = st->st_gid, .links = st->st_nlink,
    .size = st->st_size, .blocks = st->st_blocks, .device = st->st_dev,
    .mtime = s * 1000000000 + st->st_mtim.tv_nsec};
}

int do_stat(int conn, char *name) {
  char *leaf;
  struct stat st;
  int dir = open_parent(name, &leaf, 0, 0);
  int error = dir < 0 || fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) ? errno : 0;
  if (dir >= 0) close(dir);
  if (error) return fail(conn, error, "stat");
  struct file_stat found = describe(&st);
  return reply(conn, 0, &found, sizeof found);
}

/* Lists a directory of at most `most` entries (0: any number): "TYPE MODE NAME\0" each, TYPE one of
 * f d l o. The reply's total is the device it lies on. */
int do_list(int conn, char *name, uint32_t most) {
  char *leaf, *text = NULL;
  size_t len = 0;
  uint32_t count = 0;
  int dir = open_parent(name, &leaf, 0, 0), fd = dir < 0 ? -1 : openat(dir, leaf, OPEN_DIR);
  DIR *d = fd < 0 ? NULL : fdopendir(fd);
  int error = d ? 0 : errno;
  if (dir >= 0) close(dir);
  FILE *f = d ? open_memstream(&text, &len) : NULL;
  struct dirent *e;
  struct stat st;
  while (f && !error && (e = readdir(d))) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    if (fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW)) continue;
    char type = S_ISREG(st.st_mode) ? 'f' : S_ISDIR(st.st_mode) ? 'd' : S_ISLNK(st.st_mode) ? 'l' : 'o';
    fprintf(f, "%c %o %s%c", type, st.st_mode & 07777, e->d_name, 0);
    if (ftell(f) > MAX_TEXT || (++count > most && most)) error = E2BIG;
  }
  if (f) fclose(f);
  if (d && fstat(dirfd(d), &st)) error = errno;
  if (d) closedir(d);
  struct reply r = {.len = len, .total = st.st_dev};
  struct iovec v[2] = {{&r, sizeof r}, {text, len}};
  int sent = error ? fail(conn, error, "list") : send_all(conn, v, 2);
  free(text);
  return sent;
}

static int same(int fd, const struct stat *before) {
  struct stat st;
  return !fstat(fd, &st) && st.st_ino == before->st_ino && st.st_dev == before->st_dev;
}

/* Removes what the directory holds until it comes to a directory that is not empty, whose name goes to
 * `full`. Returns 1 then, 0 if nothing is left, -1 with errno. */
static int clear(int dir, char *full) {
  DIR *d = fdopendir(openat(dir, ".", OPEN_DIR));
  struct dirent *e;
  int found = d ? 0 : -1;
  while (!found && (e = readdir(d))) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    if (!unlinkat(dir, e->d_name, 0) || errno == ENOENT) continue;
    if (errno != EISDIR) found = -1;
    else if (!unlinkat(dir, e->d_name, AT_REMOVEDIR) || errno == ENOENT) continue;
    else if (errno != ENOTEMPTY) found = -1;
    else found = 1, strcpy(full, e->d_name);
  }
  int error = errno;
  if (d) closedir(d);
  return errno = error, found;
}

/* Empties a directory without recursion and with two descriptors, so that no depth can exhaust us. The
 * way back up is checked: a directory that the agent moves meanwhile ends it. Closes `dir`. */
static int clear_tree(int dir, int64_t deadline) {
  struct stat *above = NULL;
  size_t depth = 0, room = 0;
  int error = 0;
  for (;;) {
    char name[NAME_MAX + 1];
    int more = clear(dir, name), next = -1;
    if (more < 0) error = errno;
    else if (!left(deadline)) error = ETIMEDOUT;
    if (error || (!more && !depth)) break;
    if (more && depth == room) {
      struct stat *wider = realloc(above, (room = room * 2 + 64) * sizeof *above);
      if (!wider) { error = ENOMEM; break; }
      above = wider;
    }
    if (more && fstat(dir, above + depth++)) error = errno;
    if (!error && (next = openat(dir, more ? name : "..", OPEN_DIR)) < 0) error = errno;
    close(dir);
    dir = next;
    if (!error && !more && !same(dir, above + --depth)) error = ESTALE;
    if (error) break;
  }
  if (dir >= 0) close(dir);
  free(above);
  return error;
}

int do_remove(int conn, char *name, int timeout_ms) {
  char *leaf;
  int64_t deadline = now_ms() + timeout_ms;
  int dir = open_parent(name, &leaf, 0, 0), error = dir < 0 ? errno : 0;
  if (!error && unlinkat(dir, leaf, 0)) error = errno;
  while (error == EISDIR || error == ENOTEMPTY) {
    int sub = openat(dir, leaf, OPEN_DIR);
    error = sub < 0 ? errno : clear_tree(sub, deadline);
    if (!error && unlinkat(dir, leaf, AT_REMOVEDIR)) error = errno;  /* filled anew: again */
  }
  if (!error) futimens(dir, EPOCH);
  if (dir >= 0) close(dir);
  return error ? fail(conn, error, "remove") : reply(conn, 0, NULL, 0);
}
