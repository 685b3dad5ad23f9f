/* Terminals. Every shell of a session with a terminal is forked from one small process, the holder,
 * which leads the terminal's session and does nothing else: so a shell may end, by Ctrl-C or at a
 * deadline, and its successor and the background jobs keep the terminal. (With the leader ends the
 * terminal of all.) The holder forks with CLONE_PARENT, so the shells are this thread's children like
 * any other; it is a fork of rocklet, which the agent can neither trace nor signal.
 *
 * Echo and the translation of newlines are off at the start, so that output is exactly what commands
 * write; `stty echo onlcr` brings them. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MAX_FDS = 8 };

/* To the holder: fork a shell with these descriptors, or (n 0) give the terminal to the group `group`. */
struct order { unsigned number; pid_t group; int n, to[MAX_FDS]; char cwd[PATH_MAX]; };
struct answer { unsigned number; pid_t pid; };  /* a pid, 0, or a negative errno */

/* In the holder: forks a shell, in a process group of its own that has the terminal. */
static pid_t fork_shell(char *const argv[], const struct child *base, const struct order *o, const int *got) {
  int fds[MAX_FDS][2];
  struct child c = *base;
  pid_t pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
  if (pid) return pid < 0 ? -errno : pid;
  setpgid(0, 0);
  for (int i = 0; i < o->n; i++) fds[i][0] = got[i], fds[i][1] = o->to[i];
  tcsetpgrp(got[0], getpgrp());
  c.cwd = o->cwd, c.fds = (const int (*)[2])fds, c.n = o->n;
  become(argv, &c);
}

/* The holder's life: it takes orders until rocklet is gone. SIGTTOU, which a process that gives the
 * terminal away gets, stays blocked, as the shell unblocks all signals. */
static _Noreturn void hold(int control, int slave, char *const argv[], const struct child *c) {
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, NULL);
  if (dup2(control, 3) < 0 || dup2(slave, 4) < 0 || syscall(SYS_close_range, 5, ~0U, 0)) _exit(126);
  fcntl(3, F_SETFD, FD_CLOEXEC), fcntl(4, F_SETFD, FD_CLOEXEC);
  setsid();
  if (ioctl(4, TIOCSCTTY, 0)) _exit(126);
  for (;;) {
    static struct order o;
    union { struct cmsghdr header; char space[CMSG_SPACE(MAX_FDS * sizeof(int))]; } u;
    int got[MAX_FDS], n = 0;
    struct iovec v = {&o, sizeof o};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &u, .msg_controllen = sizeof u};
    if (recvmsg(3, &m, MSG_CMSG_CLOEXEC) != sizeof o) _exit(0);
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    if (h) n = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int), memcpy(got, CMSG_DATA(h), n * sizeof(int));
    struct answer answer = {.number = o.number};
    answer.pid = n ? n == o.n ? fork_shell(argv, c, &o, got) : -EBADF
                   : tcsetpgrp(4, o.group) ? -errno : 0;
    for (int i = 0; i < n; i++) close(got[i]);
    if (send(3, &answer, sizeof answer, MSG_NOSIGNAL) < 0) _exit(0);
  }
}

/* Gives an order and waits for its answer. Answers to orders that were given up are dropped, and with
 * them their shells: the holder may have been halted meanwhile, by root inside or for a snapshot. */
static pid_t ask(struct tty *t, struct order *o, const int (*fds)[2]) {
  union { struct cmsghdr header; char space[CMSG_SPACE(MAX_FDS * sizeof(int))]; } u;
  struct iovec v = {o, sizeof *o};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
  struct answer answer;
  ssize_t n;
  o->number = ++t->orders;
  if (o->n) {
    m.msg_control = &u, m.msg_controllen = CMSG_SPACE(o->n * sizeof(int));
    memset(&u, 0, sizeof u);
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(o->n * sizeof(int));
    for (int i = 0; i < o->n; i++) memcpy(CMSG_DATA(h) + i * sizeof(int), &fds[i][0], sizeof(int));
  }
  if (sendmsg(t->control, &m, MSG_NOSIGNAL) < 0) return -errno;
  while ((n = recv(t->control, &answer, sizeof answer, 0)) == sizeof answer) {
    if (answer.number == o->number) return answer.pid;
    if (answer.pid > 0 && !kill(answer.pid, SIGKILL)) waitpid(answer.pid, NULL, 0);
  }
  return n < 0 && errno == EAGAIN ? -ETIMEDOUT : -EPIPE;
}

pid_t tty_spawn(struct tty *t, const struct child *c) {
  struct order o = {.n = c->n};
  for (int i = 0; i < c->n; i++) o.to[i] = c->fds[i][1];
  strncpy(o.cwd, c->cwd, sizeof o.cwd - 1);
  pid_t pid = ask(t, &o, c->fds);
  return pid < 0 ? (errno = -pid, -1) : pid;
}

int tty_alive(const struct tty *t) { return t->holder > 0 && process_state(t->holder) > 0 &&
                                            process_state(t->holder) != 'Z'; }

void tty_end(struct tty *t) {
  if (t->holder > 0) {
    kill(t->holder, SIGKILL);
    while (waitpid(t->holder, NULL, 0) < 0 && errno == EINTR) {}
  }
  t->holder = 0;
  close_fd(&t->control), close_fd(&t->slave), close_fd(&t->master);
}

/* The terminal as a new session finds it; what was typed and not read is dropped. */
void tty_settle(struct tty *t) {
  struct termios mode;
  tcflow(t->slave, TCOON);
  tcflush(t->slave, TCIFLUSH);
  if (tcgetattr(t->slave, &mode)) return;
  mode.c_iflag = ICRNL | IXON | IUTF8;
  mode.c_oflag = OPOST;
  mode.c_cflag = CS8 | CREAD | HUPCL | B38400;
  mode.c_lflag = ISIG | ICANON | IEXTEN | ECHOE | ECHOK | ECHOCTL | ECHOKE;  /* no ECHO, no TOSTOP */
  tcsetattr(t->slave, TCSANOW, &mode);
}

/* Makes a terminal and its holder; the gate must be held. Returns 0 or an errno. */
int tty_start(struct session *s, char *const argv[], const struct child *c) {
  struct tty *t = &s->tty;
  struct winsize size = {.ws_row = t->rows, .ws_col = t->cols};
  struct timeval patience = {5, 0};
  int unlocked = 0, control[2] = {-1, -1};
  if (watch_children()) return errno;
  tty_end(t);
  t->master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
  if (t->master < 0 || ioctl(t->master, TIOCSPTLCK, &unlocked)) return errno;
  t->slave = ioctl(t->master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (t->slave < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control)) return errno;
  t->control = control[0];
  if (separate() && (fchown(t->slave, s->uid, s->gid) || fchmod(t->slave, 0600))) {}
  tty_settle(t);
  ioctl(t->slave, TIOCSWINSZ, &size);
  setsockopt(t->control, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  t->holder = fork();
  if (!t->holder) hold(control[1], t->slave, argv, c);
  int error = t->holder < 0 ? errno : 0;
  close(control[1]);
  return error;
}

/* Before a command: nothing typed earlier waits for it, and the shell has the terminal, whatever
 * program with job control died with it. */
void tty_ready(struct session *s) {
  struct tty *t = &s->tty;
  pid_t group = 0;
  tcflush(t->slave, TCIFLUSH);
  if (!ioctl(t->master, TIOCGPGRP, &group) && group != s->shell.pid)
    ask(t, &(struct order){.group = s->shell.pid}, NULL);
}

/* Types into the terminal, until all is taken, the command ends, or time is up. */
int do_send(struct session *s, const char *data, size_t n, int timeout_ms) {
  int64_t deadline = now_ms() + timeout_ms;
  size_t done = 0;
  if (!s->open) return refuse(s->conn, EBADF, "no session: open one first");
  if (!s->tty.rows)
    return refuse(s->conn, ENOTTY, "stdin is closed to commands: open the session with pty to send");
  for (attend(s); done < n && s->command.phase == BUSY && left(deadline); attend(s)) {
    struct pollfd p[] = {{s->tty.master, POLLOUT, 0}, {s->conn, POLLRDHUP, 0},
                         {s->shell.out, POLLIN, 0}, {s->shell.report, POLLIN, 0}};
    poll(p, 4, left(deadline));
    if (p[1].revents) return -1;
    ssize_t w = p[0].revents & POLLOUT ? write(s->tty.master, data + done, n - done) : 0;
    if (w > 0) done += w;
    else if (p[0].revents & POLLOUT) pause_ms(2);  /* room, but not yet for these */
  }
  if (done < n && s->command.phase != BUSY)
    return refuse(s->conn, ESRCH, "no command runs that could read this");
  if (done < n) return refuse(s->conn, EAGAIN, "the command does not read its input");
  return reply(s->conn, 0, NULL, 0);
}

int do_resize(struct session *s, unsigned rows, unsigned cols) {
  struct winsize size = {.ws_row = rows, .ws_col = cols};
  if (!s->tty.rows || !rows || !cols) return refuse(s->conn, ENOTTY, "the session has no terminal");
  s->tty.rows = rows, s->tty.cols = cols;
  if (s->tty.master >= 0 && ioctl(s->tty.master, TIOCSWINSZ, &size)) return fail(s->conn, errno, "resize");
  return reply(s->conn, 0, NULL, 0);
}
