/* Files. No symbolic link is ever followed, so the agent cannot lead root astray: paths are walked one
 * name at a time. A file is written under another name first, so nobody sees half of it, and a hard
 * link the agent made is replaced rather than written through. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* 2020-01-01: listings do not tell when an episode ran. */
const struct timespec EPOCH[2] = {{1577836800, 0}, {1577836800, 0}};

static int own(int fd, int as_root, mode_t mode) {
  if (separate() && fchown(fd, as_root ? 0 : cfg.uid, as_root ? 0 : cfg.uid)) return errno;
  return fchmod(fd, mode) ? errno : 0;
}

/* Opens the directory that holds `path`, one name at a time; *leaf is the last name. Missing
 * directories are made if `make`. Returns a descriptor or -1 with errno. */
static int open_parent(char *path, char **leaf, int make, int as_root) {
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
    int made = make && !mkdirat(dir, name, 0700);
    int sub = openat(dir, name, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    int error = sub < 0 ? errno : made ? own(sub, as_root, 0755) : 0;
    if (made && !error) futimens(dir, EPOCH);
    close(dir);
    if (error) {
      if (sub >= 0) close(sub);
      return errno = error, -1;
    }
    dir = sub;
  }
  return -1;
}

int do_write(int conn, const struct request *q, char *name) {
  char chunk[65536], *leaf, temp[64];
  int dir = open_parent(name, &leaf, 1, q->as_root), error = dir < 0 ? errno : 0, fd = -1;
  snprintf(temp, sizeof temp, ".rome-%u-%d", q->data_len, gettid());
  if (!error) {
    fd = openat(dir, temp, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) error = errno;
  }
  for (uint32_t got = 0; got < q->data_len;) {  /* the data is read to its end, error or not */
    size_t m = q->data_len - got < sizeof chunk ? q->data_len - got : sizeof chunk;
    if (receive(conn, chunk, m)) error = ECONNRESET;
    for (size_t done = 0; !error && done < m;) {
      ssize_t w = write(fd, chunk + done, m - done);
      if (w < 0) error = errno;
      else done += w;
    }
    if (error == ECONNRESET) break;
    got += m;
  }
  if (!error) error = own(fd, q->as_root, q->mode & 07777);
  if (!error) futimens(fd, EPOCH);
  if (!error && renameat(dir, temp, dir, leaf)) error = errno;
  if (error && fd >= 0) unlinkat(dir, temp, 0);
  if (dir >= 0) futimens(dir, EPOCH), close(dir);
  if (fd >= 0) close(fd);
  if (error == ECONNRESET) return -1;
  return error ? fail(conn, error, "write") : reply(conn, 0, NULL, 0);
}

int do_read(int conn, char *name, uint32_t max) {
  char chunk[65536], *leaf;
  struct stat st;
  int dir = open_parent(name, &leaf, 0, 0), error = dir < 0 ? errno : 0;
  int fd = dir < 0 ? -1 : openat(dir, leaf, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (!error && (fd < 0 || fstat(fd, &st))) error = errno;
  if (!error && !S_ISREG(st.st_mode)) error = S_ISDIR(st.st_mode) ? EISDIR : EINVAL;
  if (!error && st.st_size > max) error = EFBIG;
  int sent = 0;
  if (error) sent = fail(conn, error, "read");
  else {
    struct reply r = {.len = st.st_size, .total = st.st_size, .exit_code = st.st_mode & 07777};
    struct iovec v = {&r, sizeof r};
    sent = send_all(conn, &v, 1);
    for (off_t at = 0; !sent && at < st.st_size;) {  /* a file that shrinks meanwhile ends in zeros */
      size_t m = st.st_size - at < (off_t)sizeof chunk ? (size_t)(st.st_size - at) : sizeof chunk;
      ssize_t n = pread(fd, chunk, m, at);
      if (n <= 0) memset(chunk, 0, n = m);
      v = (struct iovec){chunk, n};
      sent = send_all(conn, &v, 1);
      at += n;
    }
  }
  if (fd >= 0) close(fd);
  if (dir >= 0) close(dir);
  return sent;
}

/* Lists a directory: "TYPE MODE NAME\0" each, TYPE one of f d l o. */
int do_list(int conn, char *name) {
  char *leaf, *text = NULL;
  size_t len = 0;
  int dir = open_parent(name, &leaf, 0, 0);
  int fd = dir < 0 ? -1 : openat(dir, leaf, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  DIR *d = fd < 0 ? NULL : fdopendir(fd);
  int error = errno;
  if (dir >= 0) close(dir);
  if (!d) return fail(conn, error, "list");
  FILE *f = open_memstream(&text, &len);
  struct dirent *e;
  struct stat st;
  while (f && len < MAX_TEXT && (e = readdir(d))) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    if (fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW)) continue;
    char type = S_ISREG(st.st_mode) ? 'f' : S_ISDIR(st.st_mode) ? 'd' : S_ISLNK(st.st_mode) ? 'l' : 'o';
    fprintf(f, "%c %o %s%c", type, st.st_mode & 07777, e->d_name, 0);
    fflush(f);
  }
  if (f) fclose(f);
  closedir(d);
  int sent = reply(conn, 0, text, len);
  free(text);
  return sent;
}
