/* Rocklet: the small server inside a sandbox, its first process where there is a pid namespace.
 *
 * It accepts connections on a unix socket that the host made and handed over, and serves each in a
 * thread: file transfer, the verifier, the reset between episodes, and, once it is opened as a session,
 * one persistent bash (session.c, shell.c), with or without a terminal (pty.c). The framing is fixed-size little-endian headers (struct request, struct reply) followed
 * by bytes; rome/envs/rocklet/client.py is the other end.
 *
 * Reasons for the shape:
 *  - Threads, not processes: a thread of pid 1 cannot be killed from inside, and kill(-1) from
 *    pid 1 ends every other process at once, without a fork that a fork bomb could starve.
 *  - The first connection is the owner's. When it closes, for whatever reason, the sandbox ends:
 *    nothing outlives the process that made it.
 *  - A command costs no fork: bash evals its text from a memory file and reports on a socket where
 *    the kernel names the sender, so nothing but the shell itself can tell the end of a command.
 *  - Every wait has a deadline.
 *
 * Of the network it only makes sockets, for the host to serve, and notes what the agent tries (net.c,
 * watch.c).
 */
#define _GNU_SOURCE
#include "rocklet.h"

#include <fcntl.h>
#include <linux/keyctl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static int connections;
struct config cfg = {.uid = 1000, .work = "/work", .output = 16384, .nofile = 1024, .listen = -1};

static int do_info(int conn) {
  char text[512 + MAX_SESSIONS * (MAX_TITLE + 16)], names[MAX_SESSIONS * (MAX_TITLE + 16)];
  struct statvfs disk = {0};
  int work = open_inside(cfg.work), sessions = list_sessions(names, sizeof names);
  if (work >= 0) fstatvfs(work, &disk), close(work);
  int n = snprintf(text, sizeof text, "processes %d\nsessions %d\ndisk_bytes %llu\nbash %d\n"
                   "watching %d\n%s",
                   count_processes(), sessions,
                   (unsigned long long)(disk.f_blocks - disk.f_bfree) * disk.f_frsize, cfg.bash != NULL,
                   watching(), names);
  return reply(conn, 0, text, n);
}

/* One request; -1 ends the connection. Anything malformed does. */
static int serve_one(struct session *s) {
  struct request q;
  char name[MAX_NAME + 1], *text = NULL;
  int r = -1;
  if (receive(s->conn, &q, sizeof q) || q.name_len > MAX_NAME) return -1;
  if (receive(s->conn, name, q.name_len)) return -1;
  name[q.name_len] = 0;
  if (strlen(name) != q.name_len) return -1;
  if (cfg.apply && q.op != RESTORE && q.op != INFO) return -1;
  if (q.op == RESTORE) return do_restore(s, &q);
  if (q.data_len > MAX_TEXT || q.timeout_ms > 86400000u) return -1;
  if (!(text = malloc(q.data_len + 1)) || receive(s->conn, text, q.data_len)) goto end;
  if (q.op == RUN) r = do_run(s, text, q.data_len, q.timeout_ms);
  if (q.op == LIST) r = do_list(s->conn, name, q.mode);
  if (q.op == STAT) r = do_stat(s->conn, name);
  if (q.op == REMOVE || (q.op >= FILE_OPEN && q.op <= FILE_DROP)) {
    int locked = !lock_disk(0, now_ms() + 60000);  /* not during a snapshot */
    r = q.op == REMOVE ? do_remove(s->conn, name, q.timeout_ms) : do_file(s, &q, name, text);
    if (locked) unlock_disk();
  }
  if (q.op == VERIFY) r = do_verify(s, text, q.data_len, q.timeout_ms);
  if (q.op == RESET) r = do_reset(s, q.timeout_ms);
  if (q.op == INFO) r = do_info(s->conn);
  if (q.op == SNAPSHOT) r = do_snapshot(s->conn, q.timeout_ms);
  if (q.op == OPEN) r = do_open(s, name, text, q.data_len, q.timeout_ms);
  if (q.op == STATE) r = do_state(s, q.timeout_ms);
  if (q.op == START) r = do_start(s, text, q.data_len, q.timeout_ms);
  if (q.op == SEND) r = do_send(s, text, q.data_len, q.timeout_ms);
  if (q.op == POLL) r = do_poll(s, q.timeout_ms, q.mode);
  if (q.op == RESIZE) r = do_resize(s, q.mode >> 16, q.mode & 0xffff);
  if (q.op == LISTEN) r = do_listen(s->conn, text, q.data_len);
  if (q.op == WATCH) r = do_watch(s->conn);
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
  struct timeval stall = {60, 0};  /* a client that stops in the middle of a frame */
  setsockopt(s->conn, SOL_SOCKET, SO_SNDTIMEO, &stall, sizeof stall);
  setsockopt(s->conn, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof stall);
  for (int deaf = 0;;) {  /* deaf: everyone closed the output, which poll would report for ever */
    struct pollfd p[] = {{s->conn, POLLIN | POLLRDHUP, 0}, {s->shell.pidfd, POLLIN, 0},
                         {s->shell.out, POLLIN, 0}, {s->shell.report, POLLIN, 0}};
    int busy = s->command.phase == BUSY;
    if (!s->shell.pid) p[1].fd = p[2].fd = -1;
    if (deaf) p[2].fd = -1;
    if (!busy) p[3].fd = -1;
    if (poll(p, 4, busy ? left(s->command.deadline) : -1) < 0) continue;
    if (p[2].revents & POLLIN) drain(&s->out, s->shell.out);  /* background jobs write on */
    else if (p[2].revents) deaf = 1;
    if (p[0].revents || p[1].revents) deaf = 0;
    if (p[0].revents) {
      if (serve_one(s)) break;
    } else if (busy || p[1].revents) {
      attend(s);
    }
  }
  if (s->owner) finish();
  session_end(s);
  close(s->conn);
  free(s->out.buf);
  file_leave(&s->file);
  free(s);
  __sync_sub_and_fetch(&connections, 1);
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
  /* Only the user that started us may speak: never the agent, even if it reached the socket. Who is
   * outside our pid namespace, where we have one of our own, has no number in it. */
  if (!s || connections >= MAX_CONNECTIONS || getsockopt(conn, SOL_SOCKET, SO_PEERCRED, &peer, &n) ||
      (getpid() == 1 ? peer.pid : peer.uid != cfg.own)) goto refuse;
  s->conn = conn;
  session_init(s);
  output_init(&s->out, cfg.output);
  s->owner = first;
  if (!s->out.buf) goto refuse;
  __sync_add_and_fetch(&connections, 1);
  if (!pthread_create(&thread, NULL, serve, s)) {
    pthread_detach(thread);
    first = 0;
    return;
  }
  __sync_sub_and_fetch(&connections, 1);
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
    if (!strcmp(argv[i], "boot")) cfg.boot = value;
    else if (!strcmp(argv[i], "listen")) cfg.listen = number;
    else if (!strcmp(argv[i], "uid")) cfg.uid = number;
    else if (!strcmp(argv[i], "single")) cfg.single = number;
    else if (!strcmp(argv[i], "seal")) cfg.seal = number;
    else if (!strcmp(argv[i], "keep")) cfg.keep = number;
    else if (!strcmp(argv[i], "work")) cfg.work = value;
    else if (!strcmp(argv[i], "clean") && cfg.cleans < 8) cfg.clean[cfg.cleans++] = value;
    else if (!strcmp(argv[i], "output")) cfg.output = number;
    else if (!strcmp(argv[i], "fsize")) cfg.fsize = number;
    else if (!strcmp(argv[i], "nproc")) cfg.nproc = number;
    else if (!strcmp(argv[i], "as")) cfg.as = number;
    else if (!strcmp(argv[i], "nofile")) cfg.nofile = number;
    else if (!strcmp(argv[i], "apply")) cfg.apply = number;
    else if (!strcmp(argv[i], "disk")) cfg.disk = number;
    else exit(2);
  }
  cfg.own = geteuid();
  if (cfg.keep) EPOCH[0].tv_nsec = EPOCH[1].tv_nsec = UTIME_NOW;  /* builds go by the times of files */
  for (int i = 0; i < 3 && !cfg.bash; i++)
    if (!cfg.apply && !access(shells[i], X_OK)) cfg.bash = shells[i];
  if ((!cfg.boot && cfg.listen < 0) || !cfg.cleans || cfg.output < 2) exit(2);
}

/* Receives the listening socket from the host through `boot`, where it cannot be inherited. So the
 * directory that is mounted for it can be read-only: not even root inside can fill the host's disk.
 * *boot stays open for the host to read why the start failed, should it. */
static int fetch_listener(int *boot) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
  char byte;
  struct iovec v = {&byte, 1};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &control,
                     .msg_controllen = sizeof control};
  int fd = *boot = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), listener = -1;
  snprintf(address.sun_path, sizeof address.sun_path, "%s", cfg.boot);
  if (!connect(fd, (void *)&address, sizeof address) && recvmsg(fd, &m, MSG_CMSG_CLOEXEC) == 1 &&
      CMSG_FIRSTHDR(&m) && CMSG_FIRSTHDR(&m)->cmsg_type == SCM_RIGHTS)
    memcpy(&listener, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof listener);
  return listener;
}

/* Ends rocklet where the sandbox's root cannot be made; both ways of starting one hear why. */
static void give_up(int boot) {
  if (boot >= 0 && write(boot, root_error, strlen(root_error)) < 0) {}
  fprintf(stderr, "%s\n", root_error);
  exit(3);
}

/* Takes the numbers that descriptors have in a shell, so that none of ours ever has one: spawn would
 * overwrite one of those it has still to move. */
static void reserve_descriptors(void) {
  int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (int fd = TEXT_FD; fd <= REPORT_FD; fd++)
    if (fd != cfg.listen) dup3(null, fd, O_CLOEXEC);
  close_fd(&null);
}

int main(int argc, char **argv) {
  sigset_t mask;
  struct signalfd_siginfo info;
  int64_t patience = now_ms() + 30000;
  configure(argc, argv);
  for (int fd = 3; fd < 256; fd++) fcntl(fd, F_SETFD, FD_CLOEXEC);  /* whatever we inherited */
  reserve_descriptors();
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);  /* with one uid only, ptrace must not reach us either */
  prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
  syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);  /* not the keyring of who started us */
  sigemptyset(&mask), sigaddset(&mask, SIGCHLD), sigaddset(&mask, SIGTERM);
  sigprocmask(SIG_BLOCK, &mask, NULL);
  signal(SIGPIPE, SIG_IGN);
  umask(0);  /* modes of files are as the host says; commands have their own */
  int signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
  int boot = -1, listener = cfg.listen >= 0 ? cfg.listen : fetch_listener(&boot);
  if (listener < 0) exit(4);
  if ((has_overlay() || cfg.apply) && root_begin()) give_up(boot);
  if (cfg.seal && seal_devices()) give_up(boot);
  if (cfg.apply) confine_apply();
  if (!cfg.apply && prepare(patience)) give_up(boot);
  close_fd(&boot);
  for (;;) {
    struct pollfd p[] = {{listener, POLLIN, 0}, {signals, POLLIN, 0}};
    poll(p, 2, connections ? -1 : left(patience));
    while (read(signals, &info, sizeof info) == sizeof info)
      /* From inside the end of the sandbox cannot be asked for: kill() shows a pid, and what else
       * brings one of the sender's choice (sigqueue) has another code. */
      if (info.ssi_signo == SIGTERM && (getpid() != 1 || (info.ssi_code == SI_USER && !info.ssi_pid)))
        finish();
    /* Orphans come to this thread; the other threads' own children are theirs to reap. */
    while (waitpid(-1, NULL, WNOHANG | __WNOTHREAD) > 0) {}
    if (p[0].revents) accept_one(listener);
    if (!connections && !left(patience)) finish();  /* the owner never came */
  }
}
