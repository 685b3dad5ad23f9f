/* The end of an episode: the verifier, and the reset that makes the sandbox as new. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Follows the verifier's process until it ends, time is up or the client is gone; returns flags. */
static uint32_t watch(struct session *s, pid_t pid, int out, int64_t deadline) {
  int pidfd = syscall(SYS_pidfd_open, pid, 0), done = pidfd < 0;
  uint32_t flags = 0;
  struct pollfd p[] = {{pidfd, POLLIN, 0}, {s->conn, POLLRDHUP, 0}, {out, POLLIN, 0}};
  while (!done) {
    poll(p, 3, left(deadline));
    if (p[2].revents & POLLIN) drain(&s->out, out);
    else if (p[2].revents) p[2].fd = -1;  /* it closed its output and runs on */
    if (!left(deadline)) flags |= TIMED_OUT;
    done = p[0].revents || p[1].revents || flags;
  }
  close_fd(&pidfd);
  return flags;
}

/* Makes the home of the tests, or removes it again. It is empty: in one that the agent has written, many a
 * program would read a start-up file. Returns 0 or an errno, on a full disk for one. */
#define TESTS_HOME ".rome-home"
static int tests_home(int make) {
  struct stat st;
  int root = open(root_path(), O_RDONLY | O_DIRECTORY | O_CLOEXEC), error = 0;
  if (root < 0 || fstat(root, &st)) error = errno;
  if (!error) error = remove_tree(root, TESTS_HOME);
  if (!error && make && mkdirat(root, TESTS_HOME, 0700)) error = errno;
  if (!error) futimens(root, (const struct timespec[2]){EPOCH[0], st.st_mtim});
  close_fd(&root);
  return error;
}

/* Ends every process of the agent, then runs the script as root with a clean environment; its output
 * goes through a pipe that no agent process can exist to read. Ends what it left behind, too. */
int do_verify(struct session *s, const char *text, size_t n, int timeout_ms) {
  int64_t start = now_ms();
  int out[2] = {-1, -1}, status = 0, error = lock_gate(start + 5000);
  uint32_t flags = 0;
  pid_t pid = -1;
  if (error) return fail(s->conn, error, "verify");
  int script = memfd_create("verify", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  error = kill_all(start + 5000);
  shell_end(s);
  output_clear(&s->out);
  /* Sealed: bash reads on in it after each command, which may be a program of the agent's. */
  if (!error && (script < 0 || null < 0 || write(script, text, n) != (ssize_t)n ||
                 fcntl(script, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) ||
                 pipe2(out, O_CLOEXEC))) error = errno;
  if (!error) {
    lseek(script, 0, SEEK_SET);
    if (tainted) error = list_pinned();
  }
  if (!error) {
    int fds[][2] = {{null, 0}, {out[1], 1}, {out[1], 2}, {script, TEXT_FD}};
    char *argv[] = {"bash", "--noprofile", "--norc", "/dev/fd/250", NULL};
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    char home[PATH_MAX + 8], path[128], *env[] = {home, path, "LC_ALL=C", "TZ=UTC", NULL};
    const char *at = !has_overlay() ? cfg.work : tests_home(1) ? "/dev/null" : "/" TESTS_HOME;
    snprintf(home, sizeof home, "HOME=%s", at);
    snprintf(path, sizeof path, "%s", ROOT_PATH);
    struct child c = {.as_root = 1, .pinned = tainted, .cwd = cfg.work, .env = env,
                      .fds = (const int (*)[2])fds, .n = 4};
    if ((pid = spawn(argv, &c)) < 0) error = errno;
    tainted = 1;  /* tests run what the agent wrote, as root */
    close_fd(&out[1]);
  }
  if (!error) {
    flags = watch(s, pid, out[0], now_ms() + timeout_ms);
    /* Reaped only after the others are dead, so that its pid names nobody else meanwhile. */
    kill(pid, flags ? SIGKILL : 0);
    kill_all(now_ms() + 2000);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    drain(&s->out, out[0]);
  }
  if (has_overlay()) tests_home(0);
  unlock_gate();
  close_fd(&script), close_fd(&null), close_fd(&out[0]), close_fd(&out[1]);
  if (error) return fail(s->conn, error, "verify");
  int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return reply_output(s->conn, &s->out, code, flags);
}

/* Opens a directory, through no link; with one uid only it may lack the permission: then it gets it. */
static int open_dir(int at, const char *name) {
  int flags = O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC, fd = openat(at, name, flags);
  if (fd < 0 && errno == EACCES && !fchmodat(at, name, 0700, 0)) fd = openat(at, name, flags);
  if (fd >= 0) fchmod(fd, 0700);
  return fd;
}

static int is_dots(const char *name) { return !strcmp(name, ".") || !strcmp(name, ".."); }

/* Moves what lies in the directory `name` up into `top`, and removes it where that is simpler. */
static void flatten(int top, const char *name) {
  static unsigned serial;
  struct dirent *e;
  int fd = open_dir(top, name);
  DIR *d = fd < 0 ? NULL : fdopendir(fd);
  while (d && (e = readdir(d))) {
    char up[64];
    if (is_dots(e->d_name) || !unlinkat(fd, e->d_name, 0)) continue;
    snprintf(up, sizeof up, ".rome-%u", serial++);
    renameat(fd, e->d_name, top, up);
  }
  if (d) closedir(d);
}

/* Empties a directory without recursion, so that no depth of nesting can exhaust us: what lies in a
 * subdirectory is first moved up. Returns 0 or an errno. */
static int empty(const char *path, int64_t deadline) {
  int top = open_dir(AT_FDCWD, path), again = 1;
  if (top < 0) return errno;
  while (again) {
    again = 0;
    DIR *d = fdopendir(dup(top));
    struct dirent *e;
    if (d) rewinddir(d);
    while (d && (e = readdir(d))) {
      if (is_dots(e->d_name) || !unlinkat(top, e->d_name, 0) ||
          !unlinkat(top, e->d_name, AT_REMOVEDIR)) continue;
      again = 1;
      flatten(top, e->d_name);
    }
    if (d) closedir(d);
    if (again && !left(deadline)) return close(top), ETIMEDOUT;
  }
  futimens(top, EPOCH);
  close(top);
  return 0;
}

/* SysV objects outlive processes. Without CAP_SYS_ADMIN only their creator may remove them: become it,
 * this thread alone. */
static void remove_ipc(void) {
  static const char *const kinds[] = {"shm", "sem", "msg"};
  if (separate() && !has_overlay()) syscall(SYS_setresuid, -1, cfg.uid, -1);
  for (int k = 0; k < 3; k++) {
    char path[32], line[512];
    int id;
    snprintf(path, sizeof path, "/proc/sysvipc/%s", kinds[k]);
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
      if (sscanf(line, "%*d %d", &id) == 1)
        k == 0 ? shmctl(id, IPC_RMID, NULL) : k == 1 ? semctl(id, 0, IPC_RMID) : msgctl(id, IPC_RMID, NULL);
    if (f) fclose(f);
  }
  if (separate() && !has_overlay()) syscall(SYS_setresuid, -1, 0, -1);
}

int prepare(int64_t deadline) {
  if (has_overlay()) return mount_root();
  if (cfg.keep) return 0;  /* the work directory may lie below a place to clean */
  int error = 0;
  for (int i = 0; i < cfg.cleans && !error; i++) error = empty(cfg.clean[i], deadline);
  for (int i = 0; i < cfg.cleans && !error; i++)
    if ((separate() && chown(cfg.clean[i], 0, 0)) || chmod(cfg.clean[i], 01777)) error = errno;
  if (!error) error = empty(cfg.work, deadline);
  if (!error && separate() && chown(cfg.work, cfg.uid, cfg.uid)) error = errno;
  if (!error && chmod(cfg.work, 0755)) error = errno;
  return error;
}

int do_reset(struct session *s, int timeout_ms) {
  int64_t deadline = now_ms() + timeout_ms;
  int error = lock_gate(deadline);
  if (error) return fail(s->conn, error, "reset");
  error = kill_all(deadline);
  if (getpid() == 1) remove_ipc();  /* elsewhere the objects may be somebody else's */
  if (!error) error = prepare(deadline);
  generation++;
  tainted = 0;
  output_forget();
  file_forget();
  unlock_gate();
  shell_end(s);
  output_clear(&s->out);
  if (error) return fail(s->conn, error, "reset");
  if (s->open) shell_start(s, "", 0, deadline);  /* it warms up while the pool holds the sandbox */
  return reply(s->conn, 0, NULL, 0);
}
