/* The persistent shell of a session: one bash that evals command after command. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

unsigned generation;

/* The bytes that make another shell like this one, when it evals them; traps last, as that for DEBUG
 * would see the rest. Restoring what is read-only in every bash fails, which nobody sees. */
#define DUMP "builtin declare -p; builtin declare -f; builtin alias -p; " \
  "builtin printf \"cd -- %q\\n\" \"$PWD\"; builtin umask -p; builtin shopt -p; builtin set +o; " \
  "builtin trap -p; "

/* What a shell runs. It costs no fork a command: the text comes in a memory file, which it opens anew
 * each time so that nobody who has inherited the descriptor can move its place in it, and the report
 * goes out through a socket that is closed for commands. The report stands in the loop's condition, so
 * that `continue` and `break` in a command, which end it, reach it too; it begins with a NUL, which ends
 * whatever a command wrote before. `set -x` would trace these lines: their stderr goes nowhere. A
 * shell whose descriptors or variables a command spoilt exits at its end, with its status; so does one
 * where `builtin` is a function that does nothing (then the text is not read), since only POSIX mode
 * finds `exit` before functions. On exit the state goes to another memory file, and the next shell
 * restores it. */
static const char DRIVER[] =
  "trap '{ builtin printf \"rome-state %s\\n\" \"${__rome[0]}\"; " DUMP "} >&251 2>/dev/null' EXIT; "
  "mapfile -d '' __rome </proc/self/fd/250; shopt -s expand_aliases; "
  "eval \"${__rome[0]}\" >/dev/null 2>&1; unset __rome; __rome=(0); "
  "while :; do while { __rome_code=$?; "
  "[[ ${__rome[0]} == +([0-9]) && ${__rome@a} == a && -r /proc/self/fd/250 && -p /proc/self/fd/253 ]] && "
  "builtin printf '\\0%s %s %.4000s\\0' \"${__rome[0]}\" \"$__rome_code\" \"$PWD\" >&254 && "
  "__rome=(\"${__rome[0]}\") && builtin mapfile -t -n 1 -u 253 __rome && "
  "builtin mapfile -d '' -O 1 __rome </proc/self/fd/250 && [[ ${__rome[1]+x} ]] || "
  "{ POSIXLY_CORRECT=; exit \"$__rome_code\"; }; } 2>/dev/null; "
  "do builtin eval \"${__rome[1]}\" 253<&- 254>&-; done; done";

/* The text of STATE. */
static const char TELL[] = "{ " DUMP "} >&251 2>/dev/null";

enum outcome { REPORTED, DIED, EXPIRED, GONE, NEWS };

static void shell_close(struct shell *sh) {
  close_fd(&sh->pidfd), close_fd(&sh->text), close_fd(&sh->state), close_fd(&sh->wake);
  close_fd(&sh->report), close_fd(&sh->out);
  sh->pid = 0;
}

/* Reaps a shell, which is killed if it should still live; returns its status as waitpid tells it. */
static int shell_reap(struct shell *sh) {
  int status = 0;
  kill(sh->pid, SIGKILL);
  while (waitpid(sh->pid, &status, 0) < 0 && errno == EINTR) {}
  return status;
}

static int exit_code(int status) {
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

void shell_end(struct session *s) {
  if (s->shell.pid) shell_reap(&s->shell);
  shell_close(&s->shell);
}

enum { FDS = 7 };

/* Makes the descriptors of a shell and those of its child (pairs for spawn). The child can read the
 * text of its commands but not write it, and the kernel puts the sender's pid on all it reports. */
static int shell_open(struct session *s, int (*fds)[2]) {
  struct shell *sh = &s->shell;
  int wake[2] = {-1, -1}, report[2] = {-1, -1}, out[2] = {-1, -1}, in = -1, view = -1, on = 1, error = 0;
  int text = memfd_create("command", MFD_CLOEXEC), state = memfd_create("state", MFD_CLOEXEC);
  char path[32];
  snprintf(path, sizeof path, "/proc/self/fd/%d", text);
  if (text < 0 || state < 0 || fchmod(text, 0444) || (view = open(path, O_RDONLY | O_CLOEXEC)) < 0 ||
      pipe2(wake, O_CLOEXEC) || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, report) ||
      setsockopt(report[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on)) error = errno;
  if (!error && s->tty.rows) {
    out[0] = fcntl(s->tty.master, F_DUPFD_CLOEXEC, 3), in = fcntl(s->tty.slave, F_DUPFD_CLOEXEC, 3);
    if (out[0] < 0 || in < 0 || (out[1] = fcntl(in, F_DUPFD_CLOEXEC, 3)) < 0) error = errno;
  } else if (!error && ((in = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0 || pipe2(out, O_CLOEXEC))) {
    error = errno;
  }
  *sh = (struct shell){.pidfd = -1, .text = text, .state = state, .wake = wake[1], .report = report[0],
                       .out = out[0]};
  int pairs[FDS][2] = {{in, 0}, {out[1], 1}, {out[1], 2}, {view, TEXT_FD}, {state, STATE_FD},
                       {wake[0], WAKE_FD}, {report[1], REPORT_FD}};
  memcpy(fds, pairs, sizeof pairs);
  if (error) return error;
  fcntl(sh->wake, F_SETFL, O_NONBLOCK), fcntl(sh->out, F_SETFL, O_NONBLOCK);
  fcntl(state, F_SETFL, O_APPEND);
  /* Or `> /dev/stdout` is refused; what is no longer the agent's, only a terminal's holder has. */
  if (separate() && !s->tty.rows && fchown(out[1], s->uid, s->gid)) {}
  return 0;
}

static pid_t shell_spawn(struct session *s, int (*fds)[2]) {
  static char *argv[] = {"bash", "--noprofile", "--norc", "-c", (char *)DRIVER, "bash", NULL};
  struct child c = {s->uid, s->gid, separate() && !s->uid, s->cwd, s->home, s->env,
                    (const int (*)[2])fds, FDS, 0};
  pid_t pid = s->tty.rows ? tty_spawn(&s->tty, &c) : spawn(argv, &c);
  note_shell(pid), note_shell(s->tty.holder);
  s->shell.sid = s->tty.rows ? s->tty.holder : pid;
  return pid;
}

/* The terminal must be there before the shell's descriptors are made. */
static int terminal_ready(struct session *s) {
  static char *argv[] = {"bash", "--noprofile", "--norc", "-c", (char *)DRIVER, "bash", NULL};
  struct child c = {s->uid, s->gid, separate() && !s->uid, NULL, s->home, s->env, NULL, 0, 0};
  if (!s->tty.rows || tty_alive(&s->tty)) return 0;
  int error = tty_start(s, argv, &c);
  if (error) tty_end(&s->tty);
  return error;
}

/* Starts a shell that restores `state`. Returns 0 or an errno. */
int shell_start(struct session *s, const char *state, size_t n, int64_t deadline) {
  struct shell *sh = &s->shell;
  int fds[FDS][2], error = lock_gate(deadline);
  if (error) return error;
  for (int i = 0; i < FDS; i++) fds[i][0] = -1;
  if (!(error = terminal_ready(s))) error = shell_open(s, fds);
  if (s->generation != generation) {  /* a reset has been: nothing of before is kept */
    s->generation = generation;
    strcpy(s->cwd, s->start);
    output_clear(&s->out);
    n = 0;
  }
  if (!error && n && pwrite(sh->text, state, n, 0) != (ssize_t)n) error = errno;
  if (!error) {
    while ((sh->pid = shell_spawn(s, fds)) < 0 && errno == EAGAIN && left(deadline)) pause_ms(5);
    error = sh->pid < 0 ? errno : 0;
  }
  unlock_gate();
  if (!error && (sh->pidfd = syscall(SYS_pidfd_open, sh->pid, 0)) < 0) error = errno;
  for (int i = 0; i < FDS; i++)
    if (i != 2 && i != 4) close_fd(&fds[i][0]);  /* 2 is 1 again, and 4 is ours, too */
  s->heard_len = 0;
  if (error) {
    if (sh->pid > 0) shell_reap(sh);
    shell_close(sh);
  }
  return error;
}

/* Takes reports "\0SEQ CODE CWD\0" from the socket until that of command `seq` is found; others are
 * stale. What does not come from the shell itself, but from a process that got hold of the socket, is
 * dropped. */
static int take_report(struct session *s, unsigned seq, int *code) {
  for (;;) {
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(struct ucred))]; } u;
    struct iovec v = {s->heard + s->heard_len, sizeof s->heard - 1 - s->heard_len};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &u, .msg_controllen = sizeof u};
    struct ucred from = {0};
    ssize_t n = recvmsg(s->shell.report, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n <= 0) return 0;  /* at its end, which has no sender, the shell is gone */
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    if (h && h->cmsg_type == SCM_CREDENTIALS) memcpy(&from, CMSG_DATA(h), sizeof from);
    if (from.pid != s->shell.pid) continue;
    s->heard_len += n;
    for (char *end; (end = memchr(s->heard, 0, s->heard_len));) {
      char *rest;
      unsigned long got = strtoul(s->heard, &rest, 10);
      int hit = rest > s->heard && got == seq;
      long status = strtol(rest, &rest, 10);
      if ((hit = hit && *rest == ' ')) {
        *code = (int)status & 255;
        if (rest[1] == '/') snprintf(s->cwd, sizeof s->cwd, "%s", rest + 1);
      }
      s->heard_len -= end + 1 - s->heard;
      memmove(s->heard, end + 1, s->heard_len);
      if (hit) return 1;
    }
    if (s->heard_len == sizeof s->heard - 1) s->heard_len = 0;  /* garbage of the command's own */
  }
}

/* Drops what lies in the socket before a command: as its shell waits, none of it is a report on it. */
static void forget_reports(struct session *s) {
  char byte;
  for (int i = 0; i < 4096 && recv(s->shell.report, &byte, 1, MSG_DONTWAIT) >= 0; i++) {}
  s->heard_len = 0;
}

/* Follows command `seq` until it is reported, the shell dies, time is up or the client is gone; if
 * `news`, also until there is new output. */
static enum outcome follow(struct session *s, unsigned seq, int64_t deadline, int *code, int news) {
  for (int deaf = 0;;) {  /* deaf: everyone closed the output, which poll would report for ever */
    struct pollfd p[] = {{s->shell.report, POLLIN, 0}, {s->shell.pidfd, POLLIN, 0},
                         {s->conn, POLLRDHUP, 0}, {deaf ? -1 : s->shell.out, POLLIN, 0}};
    poll(p, 4, news && s->out.total > s->out.given ? 0 : left(deadline));
    if (p[3].revents & POLLIN) drain(&s->out, s->shell.out);
    else if (p[3].revents) deaf = 1;
    if (p[0].revents & POLLIN && take_report(s, seq, code)) {
      drain(&s->out, s->shell.out);
      return REPORTED;
    }
    if (p[1].revents) return DIED;
    if (p[2].revents) return GONE;
    if (news && s->out.total > s->out.given) return NEWS;
    if (!left(deadline)) return EXPIRED;
  }
}

/* Follows until the shell resists a signal: it has slept for 100 ms. A shell that is runnable has still to
 * act on the signal, however long a busy machine makes it wait. */
static enum outcome follow_awake(struct session *s, int ms, int *code) {
  enum outcome how = EXPIRED;
  int64_t end = now_ms() + ms;
  for (int slept = 0; how == EXPIRED && slept < 5 && left(end);) {
    how = follow(s, s->seq, now_ms() + 20, code, 0);
    slept = process_state(s->shell.pid) == 'S' ? slept + 1 : 0;
  }
  return how;
}

/* Stops a command at its deadline. All it started is halted first, so that nothing escapes and the
 * shell's list cannot run on when its child dies; it is killed only once the shell is gone or resists.
 * A hang-up makes bash run its exit trap, which saves the state, without waiting for children; a shell
 * that resists gets stronger signals. */
static enum outcome interrupt(struct session *s, int *code) {
  static const struct { int sig, ms; } ladder[] =
    {{SIGHUP, 1000}, {SIGINT, 500}, {SIGTERM, 500}, {SIGKILL, 2000}};
  enum outcome how = EXPIRED;
  struct moment since = s->command.since;
  pid_t pid = s->shell.pid;
  for (int i = 0; i < 4 && how == EXPIRED; i++) {
    struct proc *halted;
    char link[64];
    kill(pid, SIGSTOP);
    int n = halt_since(&s->shell, since, &halted);
    if (ladder[i].sig == SIGKILL) {  /* no trap will run: at least the directory is kept */
      snprintf(link, sizeof link, "/proc/%d/cwd", pid);
      ssize_t got = readlink(link, s->cwd, sizeof s->cwd - 1);
      if (got > 0) s->cwd[got] = 0, as_seen_inside(s->cwd);
    }
    kill(pid, ladder[i].sig);
    kill(pid, SIGCONT);
    how = follow_awake(s, ladder[i].ms, code);
    kill_listed(halted, n);
    free(halted);
    if (how == EXPIRED) how = follow(s, s->seq, now_ms() + ladder[i].ms, code, 0);
  }
  kill_since(&s->shell, since);
  if (s->tty.rows) tty_settle(&s->tty);
  return how;
}

/* Reads what the shell's exit trap, or STATE, left in the memory file. Returns NULL if there is nothing
 * that begins as it must; the caller frees it. */
static char *read_state(const struct shell *sh, const char *head, size_t *n) {
  size_t skip = strlen(head);
  off_t size = lseek(sh->state, 0, SEEK_END);
  char *state = size > (off_t)skip && size <= MAX_STATE ? malloc(size + 1) : NULL;
  if (!state) return NULL;
  ssize_t got = pread(sh->state, state, size, 0);
  if (got <= (ssize_t)skip || memcmp(state, head, skip)) return free(state), NULL;
  *n = got - skip;
  memmove(state, state + skip, *n);
  return state;
}

/* Tells that variables are gone. After a reset that goes without saying. */
static void note_loss(struct session *s) {
  if (s->generation == generation)
    output_note(&s->out, "[the shell ended; a new one runs in %.200s, without the old one's variables]\n",
                s->cwd);
}

/* Replaces a dead shell by one with its state, where the exit trap saved it. Returns the exit code. One
 * that died between commands, unless by a signal, was spoilt by one: its state is not trusted. */
int shell_revive(struct session *s, int restore, int64_t deadline) {
  struct shell old = s->shell;
  char head[64], *state = NULL;
  size_t n = 0;
  int status = shell_reap(&old);
  snprintf(head, sizeof head, "rome-state %u\n", s->seq);
  drain(&s->out, old.out);
  if (restore || WIFSIGNALED(status)) state = read_state(&old, head, &n);
  shell_close(&old);
  s->shell = (struct shell){.pidfd = -1, .text = -1, .state = -1, .wake = -1, .report = -1, .out = -1};
  if (!state) note_loss(s);
  shell_start(s, state ? state : "", n, deadline);
  free(state);
  return exit_code(status);
}

/* Makes sure that a shell waits for its next command. Where none can start, a fork bomb may have taken
 * every process: then all are ended, which the output says. But while tests run or a snapshot is taken,
 * nothing may end: then it only waits. Returns 0 or an errno, EBUSY where that took too long. */
static int shell_ready(struct session *s, int64_t deadline) {
  int code, error = 0;
  for (int attempt = 0; attempt < 4; attempt++) {
    if (attempt == 2) {
      if (lock_gate(deadline)) return EBUSY;
      output_note(&s->out, "[no new process could start: all processes were ended]\n");
      kill_all(deadline);
      unlock_gate();
    }
    if (!s->shell.pid && (error = shell_start(s, "", 0, now_ms() + 500))) {
      if (error == ETIMEDOUT && !left(deadline)) return EBUSY;
      if (error == ETIMEDOUT) attempt--;
      continue;
    }
    if (!s->shell.ready) {
      enum outcome how = follow(s, 0, deadline, &code, 0);
      if (how == GONE || how == EXPIRED) return how == GONE ? EPIPE : ETIMEDOUT;
      s->shell.ready = how == REPORTED;
    }
    struct pollfd p = {s->shell.pidfd, POLLIN, 0};
    if (s->shell.ready && !poll(&p, 1, 0)) return 0;
    if (s->shell.ready) shell_revive(s, 0, deadline);
    else shell_end(s), note_loss(s);
  }
  return error ? error : EIO;
}

/* Gives a command to the shell. Returns 0 or an errno, with a word on what failed. */
static int begin(struct session *s, const char *text, size_t n, int timeout_ms, const char **what) {
  char wake[16];
  if (!n) text = ":", n = 1;  /* `set -u` would trip over nothing */
  *what = "bash does not start";
  int error = shell_ready(s, now_ms() + 5000);
  if (error) return error;
  *what = "command text";
  if (ftruncate(s->shell.text, 0) || ftruncate(s->shell.state, 0) ||
      pwrite(s->shell.text, text, n, 0) != (ssize_t)n) return errno;
  forget_reports(s);
  if (s->tty.rows) tty_ready(s);
  s->command = (struct command){.phase = BUSY, .deadline = now_ms() + timeout_ms, .since = this_moment()};
  if (!++s->seq) s->seq = 1;
  if (write(s->shell.wake, wake, snprintf(wake, sizeof wake, "%u\n", s->seq)) < 0) {}
  return 0;
}

/* Ends a command, however it came to its end; stops it if it has not. */
static enum outcome settle(struct session *s, enum outcome how) {
  if (how == EXPIRED) {
    s->command.flags |= TIMED_OUT;
    int locked = !lock_disk(0, now_ms() + 60000);  /* nobody is woken during a snapshot */
    how = interrupt(s, &s->command.code);
    if (locked) unlock_disk();
  }
  if (how == GONE) return GONE;
  if (how != REPORTED) s->command.code = shell_revive(s, 1, now_ms() + 2000);
  s->command.phase = ENDED;
  return how;
}

/* Sees to a session whose client asks for nothing: to the end of its command, or of its shell. */
void attend(struct session *s) {
  if (s->command.phase == BUSY) {
    enum outcome how = follow(s, s->seq, 0, &s->command.code, 0);
    if (how != EXPIRED || !left(s->command.deadline)) settle(s, how);
  } else if (s->shell.pid) {
    struct pollfd p = {s->shell.pidfd, POLLIN, 0};
    if (poll(&p, 1, 0) > 0) shell_revive(s, 0, now_ms() + 2000);
  }
}

/* Whether the session can take no command now; then the client has been told why. */
int run_is_refused(struct session *s) {
  const char *why = !s->open ? "no session: open one first"
                    : s->command.phase == BUSY ? "a command runs already: poll it to its end, or stop it"
                    : s->command.phase == ENDED ? "the last command's result has not been polled" : NULL;
  if (why) refuse(s->conn, EBUSY, why);
  return why != NULL;
}

int do_run(struct session *s, const char *text, size_t n, int timeout_ms) {
  const char *what;
  if (run_is_refused(s)) return 0;
  int error = begin(s, text, n, timeout_ms, &what);
  if (error) return fail(s->conn, error, what);
  if (settle(s, follow(s, s->seq, s->command.deadline, &s->command.code, 0)) == GONE) return -1;
  s->command.phase = IDLE;
  return reply_output(s->conn, &s->out, s->command.code, s->command.flags);
}

int do_start(struct session *s, const char *text, size_t n, int timeout_ms) {
  const char *what;
  if (run_is_refused(s)) return 0;
  int error = begin(s, text, n, timeout_ms, &what);
  return error ? fail(s->conn, error, what) : reply(s->conn, 0, NULL, 0);
}

/* Answers once there is new output, the command has ended, or time is up; if `stop`, the command is
 * stopped as at its deadline. */
int do_poll(struct session *s, int timeout_ms, int stop) {
  if (s->command.phase == IDLE) return refuse(s->conn, ESRCH, "no command runs: start one first");
  if (s->command.phase == BUSY) {
    int64_t until = now_ms() + timeout_ms;
    if (stop || until > s->command.deadline) until = stop ? 0 : s->command.deadline;
    enum outcome how = follow(s, s->seq, until, &s->command.code, !stop);
    if (how == EXPIRED && !stop && left(s->command.deadline)) how = NEWS;  /* there is none */
    if (how != NEWS && settle(s, how) == GONE) return -1;
  }
  if (s->command.phase == BUSY) return reply_progress(s->conn, &s->out, 0, RUNNING);
  s->command.phase = IDLE;
  return reply_progress(s->conn, &s->out, s->command.code, s->command.flags);
}

int do_state(struct session *s, int timeout_ms) {
  const char *what;
  size_t n = 0;
  if (run_is_refused(s)) return 0;
  int error = begin(s, TELL, sizeof TELL - 1, timeout_ms, &what);
  if (error) return fail(s->conn, error, what);
  enum outcome how = settle(s, follow(s, s->seq, s->command.deadline, &s->command.code, 0));
  if (how == GONE) return -1;
  s->command.phase = IDLE;
  if (how != REPORTED || s->command.flags) return refuse(s->conn, EIO, "the shell did not tell its state");
  if (lseek(s->shell.state, 0, SEEK_END) > MAX_STATE)
    return refuse(s->conn, EFBIG, "the state is longer than 4 MiB: unset variables");
  char *state = read_state(&s->shell, "", &n);
  int sent = reply(s->conn, 0, state, n);
  free(state);
  return sent;
}
