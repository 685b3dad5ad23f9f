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
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

unsigned generation;

/* What a shell runs. It costs no fork a command: the text comes in a memory file, the report goes out
 * through a pipe that is closed for commands. The report stands in the loop's condition, so that
 * `continue` and `break` in a command, which end it, reach it too. `set -x` would trace these lines:
 * their stderr goes nowhere. A shell whose descriptors a command spoilt exits. On exit the state is appended to the memory file, and the next shell restores it. */
static const char DRIVER[] =
  "shopt -s expand_aliases; mapfile -d '' -u 250 __rome; eval \"${__rome[0]}\" >/dev/null 2>&1; "
  "unset __rome; __rome=(0); "
  "trap '{ builtin printf \"rome-state %s %s\\n\" \"${__rome[0]}\" \"$?\"; builtin declare -p; "
  "builtin declare -f; builtin alias -p; builtin printf \"cd -- %q\\n\" \"$PWD\"; "
  "builtin shopt -p; builtin set +o; } >&250 2>/dev/null' EXIT; "
  "while :; do while { builtin printf '%s %s %.4000s\\0' \"${__rome[0]}\" \"$?\" \"$PWD\" >&254 && "
  "builtin mapfile -t -n 1 -u 253 __rome && builtin mapfile -d '' -u 250 -O 1 __rome || "
  "builtin exit; } 2>/dev/null; do builtin eval \"${__rome[1]}\" 253<&- 254>&-; done; done";

enum outcome { REPORTED, DIED, EXPIRED, GONE };

static void shell_close(struct shell *sh) {
  close_fd(&sh->pidfd), close_fd(&sh->text), close_fd(&sh->wake);
  close_fd(&sh->report), close_fd(&sh->out);
  sh->pid = 0;
}

/* Reaps a shell, which is killed if it should still live; returns its exit status as bash counts. */
static int shell_reap(struct shell *sh) {
  int status = 0;
  kill(sh->pid, SIGKILL);
  while (waitpid(sh->pid, &status, 0) < 0 && errno == EINTR) {}
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

void shell_end(struct session *s) {
  if (s->shell.pid) shell_reap(&s->shell);
  shell_close(&s->shell);
}

/* Makes the descriptors of a shell and those of its child (pairs for spawn; six of them). */
static int shell_open(struct shell *sh, int (*fds)[2]) {
  int wake[2] = {-1, -1}, report[2] = {-1, -1}, out[2] = {-1, -1}, error = 0;
  int null = open("/dev/null", O_RDWR | O_CLOEXEC), text = memfd_create("command", MFD_CLOEXEC);
  if (null < 0 || text < 0 || pipe2(wake, O_CLOEXEC) || pipe2(report, O_CLOEXEC) ||
      pipe2(out, O_CLOEXEC)) error = errno;
  *sh = (struct shell){.pidfd = -1, .text = text, .wake = wake[1], .report = report[0], .out = out[0]};
  int pairs[6][2] = {{null, 0}, {out[1], 1}, {out[1], 2}, {text, TEXT_FD}, {wake[0], WAKE_FD},
                     {report[1], REPORT_FD}};
  memcpy(fds, pairs, sizeof pairs);
  if (error) return error;
  fcntl(sh->wake, F_SETFL, O_NONBLOCK), fcntl(sh->report, F_SETFL, O_NONBLOCK);
  fcntl(sh->out, F_SETFL, O_NONBLOCK), fcntl(text, F_SETFL, O_APPEND);
  if (separate() && fchown(out[1], cfg.uid, cfg.uid)) {}  /* or `> /dev/stdout` is refused */
  return 0;
}

/* Starts a shell that restores `state`. Returns 0 or an errno. */
int shell_start(struct session *s, const char *state, size_t n, int64_t deadline) {
  struct shell *sh = &s->shell;
  char *argv[] = {"bash", "--noprofile", "--norc", "-c", (char *)DRIVER, "bash", NULL};
  int fds[6][2], error = shell_open(sh, fds);
  if (!error && n && write(sh->text, state, n) != (ssize_t)n) error = errno;
  if (!error) lseek(sh->text, 0, SEEK_SET);
  if (!error && !(error = lock_gate(deadline))) {
    if (s->generation != generation) {  /* a reset has been: nothing of before is kept */
      s->generation = generation;
      snprintf(s->cwd, sizeof s->cwd, "%s", cfg.work);
      if (n && ftruncate(sh->text, 0)) {}
    }
    while ((sh->pid = spawn(argv, s->cwd, 0, (const int (*)[2])fds, 6)) < 0 && errno == EAGAIN &&
           left(deadline)) pause_ms(5);
    error = sh->pid < 0 ? errno : 0;
    unlock_gate();
  }
  if (!error && (sh->pidfd = syscall(SYS_pidfd_open, sh->pid, 0)) < 0) error = errno;
  close_fd(&fds[0][0]), close_fd(&fds[1][0]), close_fd(&fds[4][0]), close_fd(&fds[5][0]);
  if (error) {
    if (sh->pid > 0) shell_reap(sh);
    shell_close(sh);
  }
  return error;
}

/* Takes the report "SEQ CODE CWD\0" of command `seq` from the pipe; stale ones are dropped. */
static int take_report(struct session *s, char *buf, size_t size, size_t *len, unsigned seq, int *code) {
  ssize_t n = read(s->shell.report, buf + *len, size - 1 - *len);
  if (n > 0) *len += n;
  for (char *end; (end = memchr(buf, 0, *len));) {
    char *rest;
    unsigned long got = strtoul(buf, &rest, 10);
    long status = strtol(rest, &rest, 10);
    int hit = rest > buf && *rest == ' ' && got == seq;
    if (hit) {
      *code = (int)status & 255;
      if (rest[1] == '/') snprintf(s->cwd, sizeof s->cwd, "%s", rest + 1);
    }
    *len -= end + 1 - buf;
    memmove(buf, end + 1, *len);
    if (hit) return 1;
  }
  if (*len == size - 1) *len = 0;  /* garbage: the session's own commands wrote it */
  return 0;
}

/* Follows command `seq` until it is reported, the shell dies, time is up or the client is gone. */
static enum outcome follow(struct session *s, unsigned seq, int64_t deadline, int *code) {
  char buf[4 * PATH_MAX + 64];  /* 4000 characters, in any locale */
  size_t len = 0;
  for (;;) {
    struct pollfd p[] = {{s->shell.report, POLLIN, 0}, {s->shell.pidfd, POLLIN, 0},
                         {s->conn, POLLRDHUP, 0}, {s->shell.out, POLLIN, 0}};
    poll(p, 4, left(deadline));
    if (p[3].revents & POLLIN) drain(&s->out, s->shell.out);
    if (p[0].revents & POLLIN && take_report(s, buf, sizeof buf, &len, seq, code)) {
      drain(&s->out, s->shell.out);
      return REPORTED;
    }
    if (p[1].revents) return DIED;
    if (p[2].revents) return GONE;
    if (!left(deadline)) return EXPIRED;
  }
}

/* Follows until the shell resists a signal: it has slept for 100 ms. A shell that is runnable has still to
 * act on the signal, however long a busy machine makes it wait. */
static enum outcome follow_awake(struct session *s, int ms, int *code) {
  enum outcome how = EXPIRED;
  int64_t end = now_ms() + ms;
  for (int slept = 0; how == EXPIRED && slept < 5 && left(end);) {
    how = follow(s, s->seq, now_ms() + 20, code);
    slept = process_state(s->shell.pid) == 'S' ? slept + 1 : 0;
  }
  return how;
}

/* Stops a command at its deadline. All it started is halted first, so that nothing escapes and the
 * shell's list cannot run on when its child dies; it is killed only once the shell is gone or resists.
 * A hang-up makes bash run its exit trap, which saves the state, without waiting for children; a shell
 * that resists gets stronger signals. */
static enum outcome interrupt(struct session *s, struct moment since, int *code) {
  static const struct { int sig, ms; } ladder[] =
    {{SIGHUP, 1000}, {SIGINT, 500}, {SIGTERM, 500}, {SIGKILL, 2000}};
  enum outcome how = EXPIRED;
  pid_t pid = s->shell.pid;
  for (int i = 0; i < 4 && how == EXPIRED; i++) {
    struct proc *halted;
    char link[64];
    kill(pid, SIGSTOP);
    int n = halt_since(pid, since, &halted);
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
    if (how == EXPIRED) how = follow(s, s->seq, now_ms() + ladder[i].ms, code);
  }
  kill_since(pid, since);
  return how;
}

/* Replaces a dead shell, if `restore` by one with its state, where the exit trap saved it. Returns the
 * exit code. A shell that died between commands was spoilt by one: its state is not trusted. */
int shell_revive(struct session *s, int restore, int64_t deadline) {
  struct shell old = s->shell;
  char head[64], *state = NULL, *start = NULL;
  int n = snprintf(head, sizeof head, "rome-state %u ", s->seq), code = shell_reap(&old);
  off_t size = lseek(old.text, 0, SEEK_END) - (off_t)old.text_len;
  drain(&s->out, old.out);
  if (restore && size > n && size < MAX_STATE && (state = malloc(size + 1))) {
    size = pread(old.text, state, size, old.text_len);
    state[size > 0 ? size : 0] = 0;
    if (!strncmp(state, head, n) && (start = strchr(state, '\n'))) code = atoi(state + n) & 255;
  }
  shell_close(&old);
  s->shell.pid = 0;
  if (!start && s->generation == generation)
    output_note(&s->out, "[the shell ended; a new one runs in %.200s, without the old one's variables]\n",
                s->cwd);
  shell_start(s, start ? start + 1 : "", start ? size - (start + 1 - state) : 0, deadline);
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
    if (!s->shell.pid && (error = shell_start(s, "", 0, now_ms() + 500))) continue;
    if (!s->shell.ready) {
      enum outcome how = follow(s, 0, deadline, &code);
      if (how == GONE || how == EXPIRED) return how == GONE ? EPIPE : ETIMEDOUT;
      s->shell.ready = how == REPORTED;
    }
    struct pollfd p = {s->shell.pidfd, POLLIN, 0};
    if (s->shell.ready && !poll(&p, 1, 0)) return 0;
    if (s->shell.ready) shell_revive(s, 0, deadline);
    else shell_end(s);
  }
  return error ? error : EIO;
}

int do_run(struct session *s, const char *text, size_t n, int timeout_ms) {
  int code = 0;
  uint32_t flags = 0;
  char wake[16];
  if (!n) text = ":", n = 1;  /* `set -u` would trip over nothing */
  int error = shell_ready(s, now_ms() + 5000);
  if (error) return fail(s->conn, error, "bash does not start");
  if (ftruncate(s->shell.text, 0) || write(s->shell.text, text, n) != (ssize_t)n)
    return fail(s->conn, errno, "command text");
  lseek(s->shell.text, 0, SEEK_SET);
  s->shell.text_len = n;
  struct moment since = this_moment();
  if (!++s->seq) s->seq = 1;
  if (write(s->shell.wake, wake, snprintf(wake, sizeof wake, "%u\n", s->seq)) < 0) {}
  enum outcome how = follow(s, s->seq, now_ms() + timeout_ms, &code);
  if (how == EXPIRED) {
    flags |= TIMED_OUT;
    how = interrupt(s, since, &code);
  }
  if (how == GONE) return -1;
  if (how != REPORTED) code = shell_revive(s, 1, now_ms() + 2000);
  return reply_output(s->conn, &s->out, code, flags);
}
