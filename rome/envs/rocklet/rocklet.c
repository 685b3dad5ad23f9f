/* rocklet: the small server inside a sandbox, its first process where there is a pid namespace.
 *
 * It listens on a unix socket that the host bind-mounts from a directory only root may enter, and
 * serves each connection in a thread: one persistent bash a connection, file transfer, the
 * verifier, and the reset between episodes. The framing is fixed-size little-endian headers
 * (struct request, struct reply) followed by bytes; rome/envs/rocklet/client.py is the other end.
 *
 * Reasons for the shape:
 *  - Threads, not processes: a thread of pid 1 cannot be killed from inside, and kill(-1) from
 *    pid 1 ends every other process at once, without a fork that a fork bomb could starve.
 *  - The first connection is the owner's. When it closes, for whatever reason, the sandbox ends:
 *    nothing outlives the process that made it.
 *  - A command costs no fork: bash evals its text from a memory file and reports through a pipe
 *    that commands never see, so no output can forge the end of a command.
 *  - Every wait has a deadline.
 *
 * Left out: terminals (a command's stdin is /dev/null) and any use of the network.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RUN = 1, WRITE, READ, LIST, VERIFY, RESET, INFO };
enum { TIMED_OUT = 1, TRUNCATED = 2 };
enum { MAX_NAME = 4096, MAX_TEXT = 16 << 20, MAX_STATE = 4 << 20, MAX_SESSIONS = 16 };
/* Descriptors of the shell: the text of a command, the pipe that wakes it, the pipe it reports on. */
enum { TEXT_FD = 250, WAKE_FD = 253, REPORT_FD = 254 };

struct request { uint32_t op, timeout_ms, mode, as_root, name_len, data_len; };
struct reply { int32_t error, exit_code; uint32_t flags, len; uint64_t total; };

static struct {
  uid_t uid, own;
  const char *work, *bash, *socket, *clean[8];
  int cleans;
  long output, fsize, nproc, as, nofile;
  int listen;
} cfg = {.uid = 1000, .work = "/work", .output = 16384, .nofile = 1024, .listen = -1};

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;  /* held wherever a process may be born */
static unsigned generation;                               /* counts resets: old sessions forget */
static unsigned spools;                                   /* numbers the files of long outputs */
static int sessions;

/* What a shell runs. The report stands in the loop's condition, so that `continue` and `break` in a
 * command reach it too. `set -x` would trace these lines: their stderr goes nowhere. On exit the
 * state is appended to the memory file, from which the next shell restores it. */
static const char DRIVER[] =
  "shopt -s expand_aliases; mapfile -d '' -u 250 __rome; eval \"${__rome[0]}\" >/dev/null 2>&1; "
  "unset __rome; __rome=(0); "
  "trap '{ builtin printf \"rome-state %s %s\\n\" \"${__rome[0]}\" \"$?\"; builtin declare -p; "
  "builtin declare -f; builtin alias -p; builtin printf \"cd -- %q\\n\" \"$PWD\"; "
  "builtin shopt -p; builtin set +o; } >&250 2>/dev/null' EXIT; "
  "while :; do while { builtin printf '%s %s %s\\0' \"${__rome[0]}\" \"$?\" \"$PWD\" >&254 && "
  "builtin mapfile -t -n 1 -u 253 __rome && builtin mapfile -d '' -u 250 -O 1 __rome; } 2>/dev/null; "
  "do builtin eval \"${__rome[1]}\" 253<&- 254>&-; done; done";

struct output { char *buf; size_t head, tail, len; uint64_t total; int spool; char path[64]; };
struct shell { pid_t pid; int pidfd, text, wake, report, out, ready; size_t text_len; };
struct session {
  int conn; unsigned seq, generation; struct shell sh; struct output out; char cwd[PATH_MAX];
};
enum outcome { REPORTED, DIED, EXPIRED, GONE };

static int64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}
static void pause_ms(int ms) { poll(NULL, 0, ms); }
static int left(int64_t deadline) {
  int64_t d = deadline - now_ms();
  return d < 0 ? 0 : d > INT_MAX ? INT_MAX : (int)d;
}
static int separate(void) { return cfg.own == 0 && cfg.uid != 0; }  /* agent has its own uid */

/* ---- processes ------------------------------------------------------------------------------ */

struct proc { pid_t pid, ppid, sid; char state; unsigned long long start; };

/* Lists /proc, ascending by pid. Returns the count; the caller frees *list. */
static int scan(struct proc **list) {
  DIR *d = opendir("/proc");
  struct dirent *e;
  int n = 0, room = 0;
  *list = NULL;
  while (d && (e = readdir(d))) {
    char path[300], text[1024], *end;
    if (e->d_name[0] < '1' || e->d_name[0] > '9') continue;
    snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (got <= 0) continue;
    text[got] = 0;
    if (!(end = strrchr(text, ')'))) continue;  /* the name may hold anything, even ')' */
    if (n == room) {
      struct proc *more = realloc(*list, (room = room * 2 + 64) * sizeof **list);
      if (!more) break;
      *list = more;
    }
    struct proc *p = *list + n;
    p->pid = atoi(e->d_name);
    if (sscanf(end + 2, "%c %d %*d %d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
               &p->state, &p->ppid, &p->sid, &p->start) == 4) n++;
  }
  if (d) closedir(d);
  return n;
}

static int by_pid(const void *a, const void *b) {
  return ((const struct proc *)a)->pid - ((const struct proc *)b)->pid;
}
static int descends(const struct proc *list, int n, const struct proc *p, pid_t from) {
  for (int depth = 0; p && depth < n; depth++) {
    struct proc key = {.pid = p->ppid};
    if (p->ppid == from) return 1;
    p = bsearch(&key, list, n, sizeof *list, by_pid);
  }
  return 0;
}

/* Processes of the sandbox other than rocklet itself. */
static int count_processes(int do_kill) {
  struct proc *list;
  int n = scan(&list), found = 0, init = getpid() == 1;
  for (int i = 0; i < n; i++) {
    if (list[i].pid == getpid() || list[i].state == 'Z') continue;
    if (!init && !descends(list, n, list + i, getpid())) continue;
    found++;
    if (do_kill) kill(list[i].pid, SIGKILL);
  }
  free(list);
  return found;
}

/* Ends every process of the sandbox. As pid 1, kill(-1) is atomic against forks; on a bare host only
 * descendants may be touched, so scans repeat until one finds none. 0 or ETIMEDOUT. */
static int kill_all(int64_t deadline) {
  for (;;) {
    if (getpid() == 1) kill(-1, SIGKILL);
    if (count_processes(getpid() != 1) == 0) return 0;
    if (!left(deadline)) return ETIMEDOUT;
    pause_ms(1);
  }
}

/* The moment a command starts: kernel clock ticks, and the last pid given out, which orders the
 * processes born within one tick (10 ms). */
struct moment { unsigned long long tick; pid_t last_pid; };
static struct moment this_moment(void) {
  static __thread int fd = -1;
  struct moment m = {0};
  struct timespec t;
  char text[128];
  clock_gettime(CLOCK_BOOTTIME, &t);
  m.tick = t.tv_sec * 100ULL + t.tv_nsec / 10000000;
  if (fd < 0) fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
  ssize_t got = pread(fd, text, sizeof text - 1, 0);
  if (got > 0) {
    text[got] = 0;
    char *space = strrchr(text, ' ');
    m.last_pid = space ? atoi(space) : 0;
  }
  return m;
}

/* Signals the processes of this shell's session or ancestry born after `since`; returns how many. */
static int signal_since(pid_t shell, struct moment since, int sig) {
  struct proc *list;
  int n = scan(&list), found = 0;
  for (int i = 0; i < n; i++) {
    struct proc *p = list + i;
    if (p->pid == shell || p->pid == getpid() || p->state == 'Z' || p->start < since.tick) continue;
    if (p->start == since.tick && p->pid <= since.last_pid) continue;
    if (p->sid != shell && !descends(list, n, p, shell)) continue;
    found++;
    kill(p->pid, sig);
  }
  free(list);
  return found;
}

static void limit(int what, long value) {
  struct rlimit r = {value, value};
  setrlimit(what, &r);
}

/* In the child: become the agent (or stay root for the verifier), bounded, with no privilege. */
static void confine(int as_root) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (fd >= 0) {  /* when memory runs out, the agent's processes go first, rocklet last */
    if (write(fd, "1000", 4) < 0) {}
    close(fd);
  }
  limit(RLIMIT_CORE, 0);
  limit(RLIMIT_MSGQUEUE, 0);  /* POSIX queues would survive a reset unseen */
  limit(RLIMIT_NOFILE, cfg.nofile);
  if (cfg.fsize) limit(RLIMIT_FSIZE, cfg.fsize);
  if (cfg.as) limit(RLIMIT_AS, cfg.as);
  if (cfg.nproc && !as_root) limit(RLIMIT_NPROC, cfg.nproc);
  umask(022);
  if (separate() && !as_root) {
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setresgid, cfg.uid, cfg.uid, cfg.uid) ||
        syscall(SYS_setresuid, cfg.uid, cfg.uid, cfg.uid)) _exit(126);
    struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none_at_all[2] = {{0}};
    syscall(SYS_capset, &h, none_at_all);  /* the inheritable set survives setuid */
  }
}

static char **environment(int as_root) {
  static char home[PATH_MAX + 8], *agent[] = {home, "USER=agent", "LOGNAME=agent", "SHELL=/bin/bash",
    "TERM=dumb", "LC_ALL=C", "TZ=UTC", "PATH=/usr/local/bin:/usr/bin:/bin", NULL};
  static char *root[] = {home, "LC_ALL=C", "TZ=UTC",
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
  snprintf(home, sizeof home, "HOME=%s", cfg.work);
  return as_root ? root : agent;
}

/* Starts bash with the given descriptors as 0.. (pairs from -> to). Called with the gate held, so
 * that none is born behind the verifier's back. Returns its pid or -1. */
static pid_t spawn(char *const argv[], const char *cwd, int as_root, const int (*fds)[2], int n) {
  char **env = environment(as_root);
  pid_t pid = fork();
  if (pid) return pid;
  setsid();
  for (int i = 0; i < n; i++)
    if (dup2(fds[i][0], fds[i][1]) < 0) _exit(126);
  confine(as_root);
  if (chdir(cwd) && chdir(cfg.work) && chdir("/")) _exit(126);
  execve(cfg.bash, argv, env);
  _exit(127);
}

static int lock_gate(int64_t deadline) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  int ms = left(deadline);
  t.tv_sec += ms / 1000;
  t.tv_nsec += ms % 1000 * 1000000L;
  if (t.tv_nsec >= 1000000000L) t.tv_sec++, t.tv_nsec -= 1000000000L;
  return pthread_mutex_timedlock(&gate, &t);
}

static void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

/* ---- output: the head and the tail are kept; past the cap everything goes to a file ----------- */

static void spool(struct output *o, const char *data, size_t n) {
  if (o->spool == -1) {
    o->spool = -2;  /* -2: could not be kept */
    int dir = open(cfg.clean[0], O_DIRECTORY | O_PATH | O_CLOEXEC);
    for (int i = 0; i < 100 && o->spool < 0; i++) {
      snprintf(o->path, sizeof o->path, "output-%u.txt", __sync_add_and_fetch(&spools, 1));
      o->spool = openat(dir, o->path, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644);
      if (o->spool < 0) o->spool = -2;
    }
    if (dir >= 0) close(dir);
    if (o->spool >= 0 && separate() && fchown(o->spool, cfg.uid, cfg.uid)) {}
  }
  if (o->spool < 0) return;
  if ((cfg.fsize && o->total + n > (uint64_t)cfg.fsize) || write(o->spool, data, n) != (ssize_t)n) {
    close(o->spool);
    o->spool = -3;  /* -3: cut short, the place is full */
  }
}

static void output_add(struct output *o, const char *data, size_t n) {
  size_t cap = o->head + o->tail, room = o->head + 2 * o->tail;
  if (o->total <= cap && o->total + n > cap) {
    uint64_t total = o->total;
    o->total = 0;
    spool(o, o->buf, o->len);
    o->total = total;
  }
  if (o->total + n > cap) spool(o, data, n);
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

static void output_note(struct output *o, const char *format, ...) {
  char text[PATH_MAX + 200];
  va_list args;
  va_start(args, format);
  int n = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  output_add(o, text, n < (int)sizeof text ? n : (int)sizeof text - 1);
}

static void output_clear(struct output *o) {
  if (o->spool >= 0) close(o->spool);
  o->len = o->total = 0;
  o->spool = -1;
}

/* Reads what the pipe holds, at most 1 MiB a call so that a babbling writer cannot hold us. */
static void drain(struct output *o, int fd) {
  char chunk[65536];
  for (int i = 0; i < 16; i++) {
    ssize_t n = read(fd, chunk, sizeof chunk);
    if (n <= 0) return;
    output_add(o, chunk, n);
    if (n < 4096) return;
  }
}

/* ---- wire -------------------------------------------------------------------------------------- */

static int send_all(int fd, struct iovec *v, int n) {
  while (n) {
    struct msghdr m = {.msg_iov = v, .msg_iovlen = n};
    ssize_t sent = sendmsg(fd, &m, MSG_NOSIGNAL);
    if (sent < 0) return -1;
    while (n && (size_t)sent >= v->iov_len) sent -= v->iov_len, v++, n--;
    if (n) v->iov_base = (char *)v->iov_base + sent, v->iov_len -= sent;
  }
  return 0;
}
static int receive(int fd, void *to, size_t n) {
  for (size_t got = 0; got < n;) {
    ssize_t r = recv(fd, (char *)to + got, n - got, 0);
    if (r <= 0) return -1;
    got += r;
  }
  return 0;
}
static int reply(int fd, int error, const void *data, size_t n, uint64_t total) {
  struct reply r = {.error = error, .len = n, .total = total};
  struct iovec v[2] = {{&r, sizeof r}, {(void *)data, n}};
  return send_all(fd, v, n ? 2 : 1);
}
static int fail(int fd, int error, const char *what) {
  char text[300];
  int n = snprintf(text, sizeof text, "%s: %s", what, strerror(error));
  return reply(fd, error ? error : EIO, text, n, 0);
}

static int reply_output(int fd, struct output *o, int exit_code, uint32_t flags) {
  char gap[300];
  size_t cap = o->head + o->tail;
  struct iovec v[4] = {{0}, {o->buf, o->len}};
  int n = 2;
  if (o->total > cap) {
    flags |= TRUNCATED;
    const char *kept = o->spool >= 0 ? "all of it is in" : o->spool == -3 ? "its beginning is in" : "";
    int m = snprintf(gap, sizeof gap, "\n[... %llu bytes left out%s%s%s%s%s ...]\n",
                     (unsigned long long)(o->total - cap), *kept ? "; " : "", kept, *kept ? " " : "",
                     *kept ? cfg.clean[0] : "", *kept ? "/" : "");
    if (*kept)  /* the name goes before the closing " ...]\n" */
      m = m - 6 + snprintf(gap + m - 6, sizeof gap - m, "%s ...]\n", o->path);
    v[1] = (struct iovec){o->buf, o->head};
    v[2] = (struct iovec){gap, m};
    v[3] = (struct iovec){o->buf + o->len - o->tail, o->tail};
    n = 4;
  }
  struct reply r = {.exit_code = exit_code, .flags = flags, .total = o->total};
  for (int i = 1; i < n; i++) r.len += v[i].iov_len;
  v[0] = (struct iovec){&r, sizeof r};
  int sent = send_all(fd, v, n);
  output_clear(o);
  return sent;
}

/* ---- the persistent shell ---------------------------------------------------------------------- */

static void shell_close(struct shell *sh) {
  close_fd(&sh->pidfd), close_fd(&sh->text), close_fd(&sh->wake);
  close_fd(&sh->report), close_fd(&sh->out);
  sh->pid = 0;
}

/* Reaps a shell that is dead or about to be; returns its exit status as bash counts it. */
static int shell_reap(struct shell *sh) {
  int status = 0;
  kill(sh->pid, SIGKILL);
  while (waitpid(sh->pid, &status, 0) < 0 && errno == EINTR) {}
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int shell_start(struct session *s, const char *state, size_t n, int64_t deadline) {
  struct shell *sh = &s->sh;
  int wake[2] = {-1, -1}, report[2] = {-1, -1}, out[2] = {-1, -1}, error = 0;
  int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  *sh = (struct shell){.pidfd = -1, .wake = -1, .report = -1, .out = -1};
  sh->text = memfd_create("command", MFD_CLOEXEC);
  if (null < 0 || sh->text < 0 || pipe2(wake, O_CLOEXEC) || pipe2(report, O_CLOEXEC) ||
      pipe2(out, O_CLOEXEC)) error = errno;
  sh->wake = wake[1], sh->report = report[0], sh->out = out[0];
  if (!error) {
    fcntl(sh->wake, F_SETFL, O_NONBLOCK), fcntl(sh->report, F_SETFL, O_NONBLOCK);
    fcntl(sh->out, F_SETFL, O_NONBLOCK), fcntl(sh->text, F_SETFL, O_APPEND);
    if (separate() && fchown(out[1], cfg.uid, cfg.uid)) {}  /* or `> /dev/stdout` is refused */
    if (n && write(sh->text, state, n) < 0) {}
    lseek(sh->text, 0, SEEK_SET);
    int fds[][2] = {{null, 0}, {out[1], 1}, {out[1], 2}, {sh->text, TEXT_FD},
                    {wake[0], WAKE_FD}, {report[1], REPORT_FD}};
    char *argv[] = {"bash", "--noprofile", "--norc", "-c", (char *)DRIVER, "bash", NULL};
    error = lock_gate(deadline);
    if (!error) {
      if (s->generation != generation)  /* a reset has been: nothing of before is kept */
        s->generation = generation, snprintf(s->cwd, sizeof s->cwd, "%s", cfg.work);
      while ((sh->pid = spawn(argv, s->cwd, 0, fds, 6)) < 0 && errno == EAGAIN && left(deadline))
        pause_ms(5);
      error = sh->pid < 0 ? errno : 0;
      pthread_mutex_unlock(&gate);
    }
    if (!error && (sh->pidfd = syscall(SYS_pidfd_open, sh->pid, 0)) < 0) error = errno;
  }
  close_fd(&null), close_fd(&wake[0]), close_fd(&report[1]), close_fd(&out[1]);
  if (error) {
    if (sh->pid > 0) shell_reap(sh);
    shell_close(sh);
  }
  return error;
}

/* Takes the report "SEQ CODE CWD\0" of command `seq` from the pipe; older ones are dropped. */
static int take_report(struct session *s, char *buf, size_t size, size_t *len, unsigned seq, int *code) {
  ssize_t n = read(s->sh.report, buf + *len, size - 1 - *len);
  if (n > 0) *len += n;
  for (char *end; (end = memchr(buf, 0, *len));) {
    char *cwd;
    unsigned long got = strtoul(buf, &cwd, 10);
    long status = strtol(cwd, &cwd, 10);
    int hit = cwd > buf && *cwd == ' ' && got == seq;
    if (hit) {
      *code = (int)status & 255;
      if (cwd[1] == '/') snprintf(s->cwd, sizeof s->cwd, "%s", cwd + 1);
    }
    *len -= end + 1 - buf;
    memmove(buf, end + 1, *len);
    if (hit) return 1;
  }
  if (*len == size - 1) *len = 0;  /* garbage: only the shell's own commands could write it */
  return 0;
}

/* Follows command `seq` until it is reported, the shell dies, time is up or the client is gone. */
static enum outcome follow(struct session *s, unsigned seq, int64_t deadline, int *code) {
  char buf[PATH_MAX + 64];
  size_t len = 0;
  for (;;) {
    struct pollfd p[] = {{s->sh.report, POLLIN, 0}, {s->sh.pidfd, POLLIN, 0},
                         {s->conn, POLLRDHUP, 0}, {s->sh.out, POLLIN, 0}};
    poll(p, 4, left(deadline));
    if (p[3].revents & POLLIN) drain(&s->out, s->sh.out);
    if (p[0].revents & POLLIN && take_report(s, buf, sizeof buf, &len, seq, code)) {
      drain(&s->out, s->sh.out);
      return REPORTED;
    }
    if (p[1].revents) return DIED;
    if (p[2].revents) return GONE;
    if (!left(deadline)) return EXPIRED;
  }
}

/* Stops a command at its deadline. The shell is halted first, so that its list cannot run on when its
 * child is killed; hang-up makes bash run its exit trap, which saves the state, without waiting. */
static enum outcome interrupt(struct session *s, struct moment since, int *code) {
  static const struct { int sig, ms; } ladder[] =
    {{SIGHUP, 1000}, {SIGINT, 500}, {SIGTERM, 500}, {SIGKILL, 2000}};
  enum outcome how = EXPIRED;
  pid_t pid = s->sh.pid;
  char link[64];
  for (int i = 0; i < 4 && how == EXPIRED; i++) {
    kill(pid, SIGSTOP);
    signal_since(pid, since, SIGSTOP);
    if (ladder[i].sig == SIGKILL) {
      snprintf(link, sizeof link, "/proc/%d/cwd", pid);
      ssize_t n = readlink(link, s->cwd, sizeof s->cwd - 1);
      if (n > 0) s->cwd[n] = 0;
    }
    kill(pid, ladder[i].sig);
    kill(pid, SIGCONT);
    how = follow(s, s->seq, now_ms() + (i ? ladder[i].ms : 50), code);
    if (how == EXPIRED) {  /* perhaps it waits for children: end them, then give it time */
      signal_since(pid, since, SIGKILL);
      how = follow(s, s->seq, now_ms() + ladder[i].ms, code);
    }
  }
  for (int i = 0; i < 50 && signal_since(pid, since, SIGKILL); i++) pause_ms(1);
  return how;
}

/* Replaces a dead shell by one with its state, if the exit trap saved it. Returns its exit code. */
static int revive(struct session *s, int64_t deadline) {
  char head[64], *state = NULL, *end = NULL;
  drain(&s->out, s->sh.out);
  int code = shell_reap(&s->sh), saved;
  off_t size = lseek(s->sh.text, 0, SEEK_END) - (off_t)s->sh.text_len;
  int n = snprintf(head, sizeof head, "rome-state %u ", s->seq);
  if (size > n && size < MAX_STATE && (state = malloc(size + 1))) {
    size = pread(s->sh.text, state, size, s->sh.text_len);
    state[size > 0 ? size : 0] = 0;
    if (!strncmp(state, head, n)) {
      code = atoi(state + n) & 255;
      end = strchr(state, '\n');
    }
  }
  saved = end != NULL;
  shell_close(&s->sh);
  if (!saved && s->generation == generation)
    output_note(&s->out, "[the shell ended; a new one runs in %s, without the old one's variables]\n",
                s->cwd);
  shell_start(s, saved ? end + 1 : "", saved ? size - (end + 1 - state) : 0, deadline);
  free(state);
  return code;
}

/* Makes sure that a shell waits for its next command. Where none can start, a fork bomb may have taken
 * every process: then all are ended, which the output says. Returns 0 or an errno. */
static int shell_ready(struct session *s, int64_t deadline) {
  int code, error = 0;
  for (int attempt = 0; attempt < 4; attempt++) {
    if (attempt == 2) {
      output_note(&s->out, "[no new process could start: all processes were ended]\n");
      kill_all(deadline);
    }
    if (!s->sh.pid && (error = shell_start(s, "", 0, now_ms() + 500))) continue;
    if (!s->sh.ready) {
      enum outcome how = follow(s, 0, deadline, &code);
      if (how == GONE || how == EXPIRED) return how == GONE ? EPIPE : ETIMEDOUT;
      s->sh.ready = how == REPORTED;
    }
    struct pollfd p = {s->sh.pidfd, POLLIN, 0};
    if (s->sh.ready && !poll(&p, 1, 0)) return 0;
    shell_reap(&s->sh), shell_close(&s->sh);
  }
  return error ? error : EIO;
}

static int do_run(struct session *s, char *text, size_t n, int timeout_ms) {
  int code = 0;
  uint32_t flags = 0;
  int64_t deadline = now_ms() + timeout_ms;
  int error = cfg.bash ? shell_ready(s, now_ms() + 5000) : ENOENT;
  if (error) return fail(s->conn, error, cfg.bash ? "bash does not start" : "no bash in the image");
  if (ftruncate(s->sh.text, 0) || write(s->sh.text, text, n) != (ssize_t)n)
    return fail(s->conn, errno, "command text");
  lseek(s->sh.text, 0, SEEK_SET);
  s->sh.text_len = n;
  struct moment since = this_moment();
  char wake[16];
  if (!++s->seq) s->seq = 1;
  if (write(s->sh.wake, wake, snprintf(wake, sizeof wake, "%u\n", s->seq)) < 0) {}
  enum outcome how = follow(s, s->seq, deadline, &code);
  if (how == EXPIRED) {
    flags |= TIMED_OUT;
    how = interrupt(s, since, &code);
  }
  if (how == GONE) return -1;
  if (how != REPORTED) code = revive(s, now_ms() + 2000);
  return reply_output(s->conn, &s->out, code, flags);
}

/* ---- files: no symbolic link of the agent's is ever followed --------------------------------- */

static const struct timespec EPOCH[2] = {{1577836800, 0}, {1577836800, 0}};  /* 2020-01-01, for ls */

static int own(int fd, int as_root, mode_t mode) {
  if (separate() && fchown(fd, as_root ? 0 : cfg.uid, as_root ? 0 : cfg.uid)) return errno;
  return fchmod(fd, mode) ? errno : 0;
}

/* Opens the directory that holds `path`, one name at a time; *leaf is the last name. Missing
 * directories are made if `make`. Returns a descriptor or -1 with errno. */
static int open_parent(char *path, char **leaf, int make, int as_root) {
  int dir = open(path[0] == '/' ? "/" : cfg.work, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
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

static int do_write(int conn, struct request *q, char *name) {
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
  return error ? fail(conn, error, "write") : reply(conn, 0, NULL, 0, 0);
}

static int do_read(int conn, char *name, uint32_t max) {
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
static int do_list(int conn, char *name) {
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
  int sent = reply(conn, 0, text, len, len);
  free(text);
  return sent;
}

/* ---- verify and reset --------------------------------------------------------------------------- */

/* Ends every process of the agent, then runs the script as root with a clean environment; its output
 * goes through a pipe that no agent process can exist to read. Ends what it left behind, too. */
static int do_verify(struct session *s, char *text, size_t n, int timeout_ms) {
  int64_t start = now_ms(), deadline = start + timeout_ms;
  int out[2], status = 0, done = 0, error = lock_gate(start + 5000);
  uint32_t flags = 0;
  pid_t pid = -1;
  if (error) return fail(s->conn, error, "verify");
  output_clear(&s->out);
  int memory = memfd_create("verify", MFD_CLOEXEC), null = open("/dev/null", O_RDWR | O_CLOEXEC);
  error = kill_all(start + 5000);
  if (!error && (memory < 0 || null < 0 || write(memory, text, n) != (ssize_t)n ||
                 pipe2(out, O_CLOEXEC))) error = errno;
  if (!error) {
    int fds[][2] = {{null, 0}, {out[1], 1}, {out[1], 2}, {memory, TEXT_FD}};
    char *argv[] = {"bash", "--noprofile", "--norc", "/dev/fd/250", NULL};
    lseek(memory, 0, SEEK_SET);
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    if ((pid = spawn(argv, cfg.work, 1, fds, 4)) < 0) error = errno;
    close(out[1]);
    int pidfd = pid < 0 ? -1 : syscall(SYS_pidfd_open, pid, 0);
    while (pid > 0 && !done) {
      struct pollfd p[] = {{pidfd, POLLIN, 0}, {out[0], POLLIN, 0}, {s->conn, POLLRDHUP, 0}};
      poll(p, p[1].revents & POLLHUP ? 1 : 3, left(deadline));
      if (p[1].revents & POLLIN) drain(&s->out, out[0]);
      else if (p[1].revents & POLLHUP) pause_ms(1);  /* it closed its output and runs on */
      if (!left(deadline)) flags |= TIMED_OUT;
      done = p[0].revents || p[2].revents || flags;
    }
    if (pid > 0 && flags) kill(pid, SIGKILL);
    if (pid > 0) {
      kill_all(now_ms() + 2000);
      while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
      drain(&s->out, out[0]);
    }
    close_fd(&pidfd), close(out[0]);
  }
  pthread_mutex_unlock(&gate);
  close_fd(&memory), close_fd(&null);
  if (error) return fail(s->conn, error, "verify");
  int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  return reply_output(s->conn, &s->out, code, flags);
}

/* Empties a directory without recursion, so that no depth of nesting can exhaust us: what lies in a
 * subdirectory is first moved up. Returns 0 or an errno. */
static int empty(const char *path, int64_t deadline) {
  static unsigned serial;
  int top = open(path, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC), again = 1;
  if (top < 0) return errno;
  while (again) {
    again = 0;
    DIR *d = fdopendir(dup(top));
    struct dirent *e, *f;
    if (d) rewinddir(d);
    while (d && (e = readdir(d))) {
      if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
      if (!unlinkat(top, e->d_name, 0) || !unlinkat(top, e->d_name, AT_REMOVEDIR)) continue;
      again = 1;
      int fd = openat(top, e->d_name, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
      if (fd < 0) continue;
      fchmod(fd, 0700);  /* without DAC_OVERRIDE (one uid only) this is what opens it */
      DIR *sub = fdopendir(fd);
      while (sub && (f = readdir(sub))) {
        char name[64];
        if (!strcmp(f->d_name, ".") || !strcmp(f->d_name, "..")) continue;
        if (!unlinkat(fd, f->d_name, 0)) continue;
        snprintf(name, sizeof name, ".rome-%u", serial++);
        renameat(fd, f->d_name, top, name);
      }
      if (sub) closedir(sub);
      else close(fd);
    }
    if (d) closedir(d);
    if (again && !left(deadline)) return close(top), ETIMEDOUT;
  }
  futimens(top, EPOCH);
  close(top);
  return 0;
}

/* SysV objects outlive processes. Only their creator may remove them: become it, this thread alone. */
static void remove_ipc(void) {
  static const char *const kinds[] = {"shm", "sem", "msg"};
  if (separate()) syscall(SYS_setresuid, -1, cfg.uid, -1);
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
  if (separate()) syscall(SYS_setresuid, -1, 0, -1);
}

static int prepare(int64_t deadline) {
  int error = 0;
  for (int i = 0; i < cfg.cleans && !error; i++) error = empty(cfg.clean[i], deadline);
  for (int i = 0; i < cfg.cleans && separate(); i++)
    if (chown(cfg.clean[i], 0, 0) || chmod(cfg.clean[i], 01777)) return errno;
  if (!error) error = empty(cfg.work, deadline);
  if (!error && separate() && (chown(cfg.work, cfg.uid, cfg.uid) || chmod(cfg.work, 0755))) error = errno;
  return error;
}

static int do_reset(struct session *s, int timeout_ms) {
  int64_t deadline = now_ms() + timeout_ms;
  int error = lock_gate(deadline);
  if (error) return fail(s->conn, error, "reset");
  error = kill_all(deadline);
  if (getpid() == 1) remove_ipc();  /* elsewhere the objects may be somebody else's */
  if (!error) error = prepare(deadline);
  generation++;
  spools = 0;
  pthread_mutex_unlock(&gate);
  if (s->sh.pid) shell_reap(&s->sh), shell_close(&s->sh);
  output_clear(&s->out);
  if (error) return fail(s->conn, error, "reset");
  if (cfg.bash) shell_start(s, "", 0, deadline);  /* it warms up while the pool holds the sandbox */
  return reply(s->conn, 0, NULL, 0, 0);
}

static int do_info(int conn) {
  char text[400];
  struct statvfs work = {0}, tmp = {0};
  statvfs(cfg.work, &work), statvfs(cfg.clean[0], &tmp);
  int n = snprintf(text, sizeof text, "processes %d\nsessions %d\nwork_bytes %llu\ntmp_bytes %llu\nbash %d\n",
                   count_processes(0), sessions,
                   (unsigned long long)(work.f_blocks - work.f_bfree) * work.f_frsize,
                   (unsigned long long)(tmp.f_blocks - tmp.f_bfree) * tmp.f_frsize, cfg.bash != NULL);
  return reply(conn, 0, text, n, n);
}

/* ---- serving ------------------------------------------------------------------------------------ */

/* One request; -1 ends the connection. Anything malformed does. */
static int serve_one(struct session *s) {
  struct request q;
  char name[MAX_NAME + 1], *text = NULL;
  int r = -1;
  if (receive(s->conn, &q, sizeof q) || q.name_len > MAX_NAME) return -1;
  if (receive(s->conn, name, q.name_len)) return -1;
  name[q.name_len] = 0;
  if (q.op == WRITE) return do_write(s->conn, &q, name);
  if (q.data_len > MAX_TEXT || q.timeout_ms > 86400000u) return -1;
  if (!(text = malloc(q.data_len + 1)) || receive(s->conn, text, q.data_len)) goto end;
  if (q.op == RUN) r = do_run(s, text, q.data_len, q.timeout_ms);
  if (q.op == READ) r = do_read(s->conn, name, q.mode);
  if (q.op == LIST) r = do_list(s->conn, name);
  if (q.op == VERIFY) r = do_verify(s, text, q.data_len, q.timeout_ms);
  if (q.op == RESET) r = do_reset(s, q.timeout_ms);
  if (q.op == INFO) r = do_info(s->conn);
end:
  free(text);
  return r;
}

static void finish(void) {
  kill_all(now_ms() + 2000);
  _exit(0);
}

static void *serve(void *argument) {
  struct session *s = argument;
  int owner = s->seq;
  struct timeval stall = {60, 0};  /* a client that stops in the middle of a frame */
  s->seq = 0;
  setsockopt(s->conn, SOL_SOCKET, SO_SNDTIMEO, &stall, sizeof stall);
  setsockopt(s->conn, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof stall);
  if (cfg.bash) shell_start(s, "", 0, now_ms() + 2000);
  for (;;) {
    struct pollfd p[] = {{s->conn, POLLIN | POLLRDHUP, 0}, {s->sh.pidfd, POLLIN, 0},
                         {s->sh.out, POLLIN, 0}};
    if (!s->sh.pid) p[1].fd = p[2].fd = -1;
    if (poll(p, 3, -1) < 0) continue;
    if (p[2].revents & POLLIN) drain(&s->out, s->sh.out);  /* background jobs write on */
    if (p[0].revents) {
      if (serve_one(s)) break;
    } else if (p[1].revents) {
      shell_reap(&s->sh), shell_close(&s->sh);
    }
  }
  if (owner) finish();
  pid_t pid = s->sh.pid;
  struct moment always = {0};
  if (pid) {
    kill(pid, SIGKILL);
    for (int i = 0; i < 50 && signal_since(pid, always, SIGKILL); i++) pause_ms(1);
    shell_reap(&s->sh), shell_close(&s->sh);
  }
  close(s->conn);
  free(s->out.buf);
  free(s);
  __sync_sub_and_fetch(&sessions, 1);
  return NULL;
}

static void accept_one(int listener) {
  static int first = 1;
  struct ucred peer;
  socklen_t n = sizeof peer;
  pthread_t thread;
  int conn = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
  if (conn < 0) return;
  struct session *s = calloc(1, sizeof *s);
  /* Only the user that started us may speak: never the agent, even if it reached the socket. */
  if (!s || sessions >= MAX_SESSIONS || getsockopt(conn, SOL_SOCKET, SO_PEERCRED, &peer, &n) ||
      peer.uid != cfg.own) goto refuse;
  s->conn = conn;
  s->sh = (struct shell){.pidfd = -1, .text = -1, .wake = -1, .report = -1, .out = -1};
  s->out = (struct output){.head = cfg.output / 2, .tail = cfg.output - cfg.output / 2, .spool = -1};
  s->seq = first;
  s->generation = generation;
  snprintf(s->cwd, sizeof s->cwd, "%s", cfg.work);
  if (!(s->out.buf = malloc(s->out.head + 2 * s->out.tail))) goto refuse;
  __sync_add_and_fetch(&sessions, 1);
  if (!pthread_create(&thread, NULL, serve, s)) {
    pthread_detach(thread);
    first = 0;
    return;
  }
  __sync_sub_and_fetch(&sessions, 1);
  free(s->out.buf);
refuse:
  free(s);
  close(conn);
}

static void configure(int argc, char **argv) {
  static const char *const shells[] = {"/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"};
  for (int i = 1; i < argc; i++) {
    char *value = strchr(argv[i], '=');
    if (!value) exit(2);
    *value++ = 0;
    long number = atol(value);
    if (!strcmp(argv[i], "socket")) cfg.socket = value;
    else if (!strcmp(argv[i], "listen")) cfg.listen = number;
    else if (!strcmp(argv[i], "uid")) cfg.uid = number;
    else if (!strcmp(argv[i], "work")) cfg.work = value;
    else if (!strcmp(argv[i], "clean") && cfg.cleans < 8) cfg.clean[cfg.cleans++] = value;
    else if (!strcmp(argv[i], "output")) cfg.output = number;
    else if (!strcmp(argv[i], "fsize")) cfg.fsize = number;
    else if (!strcmp(argv[i], "nproc")) cfg.nproc = number;
    else if (!strcmp(argv[i], "as")) cfg.as = number;
    else if (!strcmp(argv[i], "nofile")) cfg.nofile = number;
    else exit(2);
  }
  cfg.own = geteuid();
  for (int i = 0; i < 3 && !cfg.bash; i++)
    if (!access(shells[i], X_OK)) cfg.bash = shells[i];
  if ((!cfg.socket && cfg.listen < 0) || !cfg.cleans || cfg.output < 2) exit(2);
}

int main(int argc, char **argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  sigset_t mask;
  struct signalfd_siginfo info;
  int64_t patience = now_ms() + 30000;
  configure(argc, argv);
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);  /* with one uid only, ptrace must not reach us either */
  prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
  sigemptyset(&mask), sigaddset(&mask, SIGCHLD), sigaddset(&mask, SIGTERM);
  sigprocmask(SIG_BLOCK, &mask, NULL);
  signal(SIGPIPE, SIG_IGN);
  int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
  if (prepare(patience)) exit(3);
  int listener = cfg.listen;
  if (listener >= 0) fcntl(listener, F_SETFD, FD_CLOEXEC);
  else {
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (strlen(cfg.socket) >= sizeof address.sun_path) exit(2);
    strcpy(address.sun_path, cfg.socket);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, MAX_SESSIONS)) exit(4);
  }
  for (;;) {
    struct pollfd p[] = {{listener, POLLIN, 0}, {signals, POLLIN, 0}};
    poll(p, 2, sessions ? -1 : left(patience));
    while (read(signals, &info, sizeof info) == sizeof info)
      if (info.ssi_signo == SIGTERM) finish();
    /* Orphans come to this thread; the other threads' own children are theirs to reap. */
    while (waitpid(-1, NULL, WNOHANG | __WNOTHREAD) > 0) {}
    if (p[0].revents) accept_one(listener);
    if (!sessions && !left(patience)) finish();  /* the owner never came */
  }
}
