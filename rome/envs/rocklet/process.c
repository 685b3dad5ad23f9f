/* Processes of the sandbox: finding, ending and starting them. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Held wherever a process may be born, so that none is born behind the back of verify and reset. */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

int64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

int left(int64_t deadline) {
  int64_t d = deadline - now_ms();
  return d < 0 ? 0 : d > INT_MAX ? INT_MAX : (int)d;
}

void pause_ms(int ms) { poll(NULL, 0, ms); }

/* Whether the agent has a user of its own. */
int separate(void) { return cfg.own == 0 && cfg.uid != 0 && !cfg.single; }

/* Reads /proc/PID/stat into p. */
static int read_stat(const char *pid, struct proc *p) {
  char path[300], text[1024], *end;
  snprintf(path, sizeof path, "/proc/%s/stat", pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
  if (fd >= 0) close(fd);
  if (n <= 0) return -1;
  text[n] = 0;
  p->pid = atoi(pid);
  end = strrchr(text, ')');  /* the name before it may hold anything, even ')' */
  return end && sscanf(end + 2,
    "%c %d %*d %d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
    &p->state, &p->ppid, &p->sid, &p->start) == 4 ? 0 : -1;
}

/* One letter as `ps` shows it; 0 if there is no such process. */
char process_state(pid_t pid) {
  char name[16];
  struct proc p;
  snprintf(name, sizeof name, "%d", pid);
  return read_stat(name, &p) ? 0 : p.state;
}

/* Lists the processes in /proc, ascending by pid. Returns the count; the caller frees *list. */
static int scan(struct proc **list) {
  DIR *d = opendir("/proc");
  struct dirent *e;
  int n = 0, room = 0;
  *list = NULL;
  while (d && (e = readdir(d))) {
    if (e->d_name[0] < '1' || e->d_name[0] > '9') continue;
    if (n == room) {
      struct proc *more = realloc(*list, (room = room * 2 + 64) * sizeof **list);
      if (!more) break;
      *list = more;
    }
    if (!read_stat(e->d_name, *list + n)) n++;
  }
  if (d) closedir(d);
  return n;
}

static int by_pid(const void *a, const void *b) {
  return ((const struct proc *)a)->pid - ((const struct proc *)b)->pid;
}

static const struct proc *find(const struct proc *list, int n, pid_t pid) {
  struct proc key = {.pid = pid};
  return n ? bsearch(&key, list, n, sizeof *list, by_pid) : NULL;
}

static int descends(const struct proc *list, int n, const struct proc *p, pid_t from) {
  for (int depth = 0; p && depth < n; depth++) {
    if (p->ppid == from) return 1;
    p = find(list, n, p->ppid);
  }
  return 0;
}

/* Counts, and perhaps kills, the processes of the sandbox other than rocklet. */
static int sandbox_processes(int and_kill) {
  struct proc *list;
  int n = scan(&list), found = 0, init = getpid() == 1;
  for (int i = 0; i < n; i++) {
    if (list[i].pid == getpid() || list[i].state == 'Z') continue;
    if (!init && !descends(list, n, list + i, getpid())) continue;
    found++;
    if (and_kill) kill(list[i].pid, SIGKILL);
  }
  free(list);
  return found;
}

int count_processes(void) { return sandbox_processes(0); }

/* Ends every process of the sandbox. As pid 1, kill(-1) is atomic against forks; on a bare host only
 * descendants may be touched, so scans repeat until one finds none. 0 or ETIMEDOUT. */
int kill_all(int64_t deadline) {
  for (;;) {
    int init = getpid() == 1;
    if (init) kill(-1, SIGKILL);
    if (sandbox_processes(!init) == 0) return 0;
    if (!left(deadline)) return ETIMEDOUT;
    pause_ms(1);
  }
}

/* The moment a command starts: kernel clock ticks, and the last pid given out, which orders the
 * processes born within one tick (10 ms). */
struct moment this_moment(void) {
  struct moment m = {0};
  struct timespec t;
  char text[128];
  clock_gettime(CLOCK_BOOTTIME, &t);
  m.tick = t.tv_sec * 100ULL + t.tv_nsec / 10000000;
  int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
  ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
  if (fd >= 0) close(fd);
  if (got > 0) {
    text[got] = 0;
    char *space = strrchr(text, ' ');
    m.last_pid = space ? atoi(space) : 0;
  }
  return m;
}

/* Halts the processes of this shell's session or ancestry born after `since`. Returns their number;
 * the caller frees *halted. Halted first, they cannot escape by forking while the list is read. */
int halt_since(const struct shell *sh, struct moment since, struct proc **halted) {
  struct proc *list;
  int n = scan(&list), found = 0;
  *halted = n ? malloc(n * sizeof **halted) : NULL;
  for (int i = 0; i < n && *halted; i++) {
    struct proc *p = list + i;
    if (p->pid == sh->pid || p->pid == getpid() || p->state == 'Z' || p->start < since.tick) continue;
    if (p->start == since.tick && p->pid <= since.last_pid) continue;
    if (p->sid != sh->sid && !descends(list, n, p, sh->pid)) continue;
    kill(p->pid, SIGSTOP);
    (*halted)[found++] = *p;
  }
  free(list);
  return found;
}

/* Kills what halt_since found, orphaned meanwhile or not. */
void kill_listed(const struct proc *listed, int n) {
  struct proc *list;
  int m = n ? scan(&list) : 0;
  for (int i = 0; i < n; i++) {
    const struct proc *p = find(list, m, listed[i].pid);
    if (p && p->start == listed[i].start) kill(p->pid, SIGKILL);
  }
  if (n) free(list);
}

/* Kills what the shell started after `since`, until a scan finds nothing more. */
void kill_since(const struct shell *sh, struct moment since) {
  for (int i = 0, n = 1; i < 100 && n; i++) {
    struct proc *halted;
    n = halt_since(sh, since, &halted);
    kill_listed(halted, n);
    free(halted);
    if (n) pause_ms(1);
  }
}

/* The same deadline by the clock that locks go by. */
static struct timespec clock_time(int64_t deadline) {
  struct timespec t;
  int ms = left(deadline);
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_sec += ms / 1000;
  t.tv_nsec += ms % 1000 * 1000000L;
  if (t.tv_nsec >= 1000000000L) t.tv_sec++, t.tv_nsec -= 1000000000L;
  return t;
}

int lock_gate(int64_t deadline) {
  struct timespec t = clock_time(deadline);
  return pthread_mutex_timedlock(&gate, &t);
}

void unlock_gate(void) { pthread_mutex_unlock(&gate); }

/* Who is about to write on the disk, or to wake a process that may, holds this with others; a snapshot
 * and a restore hold it alone. Whoever holds the gate too takes the gate first. */
static pthread_rwlock_t disk = PTHREAD_RWLOCK_INITIALIZER;

int lock_disk(int alone, int64_t deadline) {
  struct timespec t = clock_time(deadline);
  return alone ? pthread_rwlock_timedwrlock(&disk, &t) : pthread_rwlock_timedrdlock(&disk, &t);
}

void unlock_disk(void) { pthread_rwlock_unlock(&disk); }

/* Halts every process of the sandbox and waits until none can change anything. Those halted before are
 * noted, to stay so. As pid 1 only. Returns 0 or ETIMEDOUT; thaw_all is due either way. */
int freeze_all(struct frozen *f, int64_t deadline) {
  f->n = scan(&f->before);
  for (;;) {
    struct proc *list;
    int running = 0;
    kill(-1, SIGSTOP);
    int n = scan(&list);
    for (int i = 0; i < n; i++) {
      int waits = list[i].state == 'D';  /* for a child after vfork: halted, if the child is */
      for (int k = 0; k < n && list[i].state == 'D'; k++)
        if (list[k].ppid == list[i].pid && strchr("Tt", list[k].state)) waits = 0;
      if (list[i].pid != getpid() && (waits || !strchr("TtZXD", list[i].state))) running++;
    }
    free(list);
    if (!running) return 0;
    if (!left(deadline)) return ETIMEDOUT;
    pause_ms(1);
  }
}

/* Lets them go on, the youngest first, so that no parent sees a child that is halted. */
void thaw_all(struct frozen *f) {
  struct proc *list;
  for (int i = scan(&list) - 1; i >= 0; i--) {
    const struct proc *p = find(f->before, f->n, list[i].pid);
    if (list[i].pid != getpid() && !(p && p->state == 'T' && p->start == list[i].start))
      kill(list[i].pid, SIGCONT);
  }
  free(list), free(f->before);
}

static pid_t shells[2 * MAX_SESSIONS];  /* the last that were started: not the agent's doing */

void note_shell(pid_t pid) {
  static unsigned started;
  if (pid > 0) shells[__sync_fetch_and_add(&started, 1) % (sizeof shells / sizeof *shells)] = pid;
}

/* Writes the names of the agent's processes, a NUL behind each. */
void name_processes(FILE *to) {
  struct proc *list;
  int n = scan(&list);
  for (int i = 0; i < n; i++) {
    char path[64], name[32];
    int ours = list[i].pid == getpid() || strchr("ZX", list[i].state) != NULL;
    for (unsigned k = 0; k < sizeof shells / sizeof *shells && list[i].ppid == getpid(); k++)
      ours |= shells[k] == list[i].pid;
    snprintf(path, sizeof path, "/proc/%d/comm", list[i].pid);
    int fd = ours ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, name, sizeof name);
    if (fd >= 0) close(fd);
    if (got > 0) fwrite(name, 1, got - 1, to), fputc(0, to);  /* without its newline */
  }
  free(list);
}

static void bound(int what, long value) {
  struct rlimit r = {value, value};
  setrlimit(what, &r);
}

/* What root keeps inside; the agent keeps nothing. */
static const int KEPT[] = {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_SETUID, CAP_SETGID, CAP_KILL};

static int is_kept(int cap) {
  for (unsigned i = 0; i < sizeof KEPT / sizeof *KEPT; i++)
    if (KEPT[i] == cap) return 1;
  return 0;
}

/* Gives up what rocklet needed capabilities for; no program that is started gets them back. */
static void drop_bounding(int as_root) {
  prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  for (int cap = 0; (has_overlay() || cfg.seal) && prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
    if (!(as_root && is_kept(cap)) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0)) _exit(126);
}

static void keep_capabilities(const int *kept, int n) {
  struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct left[2] = {{0}};
  for (int i = 0; i < n; i++) left[0].permitted |= 1u << kept[i];
  left[0].effective = left[0].permitted;
  if (syscall(SYS_capset, &h, left)) _exit(126);  /* the inheritable set survives setuid */
}

/* Rocklet's own end of privilege, where it only restores a snapshot; before it has threads. */
void confine_apply(void) {
  static const int needed[] = {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID};
  keep_capabilities(needed, sizeof needed / sizeof *needed);
  if (install_filter()) _exit(126);
}

/* In the child: become the user (or stay root), bounded, with no privilege. */
static void confine(uid_t uid, gid_t gid, int as_root) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  /* Whoever started rocklet may ignore signals (nohup, a job in the background); bash cannot undo that, and time-outs and
     Ctrl-C rest on it. The two that the C library keeps for itself, too: hence the call of the kernel, whose record of a
     signal is four words, all 0 for the default. */
  static const unsigned long standard[4];
  for (int s = 1; s <= 64; s++) syscall(SYS_rt_sigaction, s, standard, NULL, 8);
  int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (fd >= 0) {  /* when memory runs out, these processes go first and rocklet last */
    if (write(fd, "1000", 4) < 0) {}
    close(fd);
  }
  bound(RLIMIT_CORE, 0);
  bound(RLIMIT_MSGQUEUE, 0);  /* POSIX queues would survive a reset unseen */
  bound(RLIMIT_NOFILE, cfg.nofile);
  if (cfg.fsize) bound(RLIMIT_FSIZE, cfg.fsize);
  if (cfg.as) bound(RLIMIT_AS, cfg.as);
  if (cfg.nproc && !as_root) bound(RLIMIT_NPROC, cfg.nproc);
  umask(022);
  drop_bounding(as_root);
  if (separate() && !as_root &&
      (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setresgid, gid, gid, gid) ||
       syscall(SYS_setresuid, uid, uid, uid))) _exit(126);
  if (has_overlay() || cfg.seal || (separate() && !as_root))
    keep_capabilities(KEPT, as_root && separate() ? sizeof KEPT / sizeof *KEPT : 0);
  if (install_filter()) _exit(126);
}

/* In the child: the home of a user of its own. Where it cannot be made, or is not the user's, the user
 * has none, and starts in the work directory. Returns whether it is there. */
static int make_home(const struct child *c) {
  struct stat st;
  mkdir("/home", 0755);
  if (mkdir(c->home, 0700) && errno != EEXIST) return 0;
  int fd = open(c->home, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC), ok = fd >= 0 && !fstat(fd, &st);
  if (ok && st.st_uid != c->uid) ok = !st.st_uid && st.st_mode == (S_IFDIR | 0700) &&
                                      !fchown(fd, c->uid, c->gid);
  if (fd >= 0) close(fd);
  return ok;
}

/* In the child: becomes bash as described. Only system calls may happen here, as another thread of the
 * parent may have held any lock. */
void become(char *const argv[], const struct child *c) {
  const char *cwd = c->cwd;
  if ((c->pinned && pin_programs()) || enter_root()) _exit(126);
  for (int i = 0; i < c->n; i++)
    if (dup2(c->fds[i][0], c->fds[i][1]) < 0) _exit(126);
  if (c->home && !make_home(c) && !strcmp(cwd, c->home)) cwd = cfg.work;
  confine(c->uid, c->gid, c->as_root);
  if (chdir(cwd) && chdir(cfg.work) && chdir("/")) _exit(126);
  execve(cfg.bash, argv, c->env);
  _exit(127);
}

/* Starts bash; the gate must be held. Returns the pid or -1. */
pid_t spawn(char *const argv[], const struct child *c) {
  if (watch_children()) return -1;
  pid_t pid = fork();
  if (pid) return pid;
  setsid();
  become(argv, c);
}
