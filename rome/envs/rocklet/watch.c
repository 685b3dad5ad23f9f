/* The watcher: notes where the agent's processes try to go past the proxies.
 *
 * What stops them is the namespace, which has no route; the watcher only observes. It reads the address
 * from the caller's memory and lets the kernel decide, so what it noted may have been changed before the
 * kernel read it, by a thread meant to deceive: nothing may ever be allowed on its word. Only sockets of
 * refused families are answered here, as their kind is in the arguments, which nobody can change.
 *
 * Each thread of rocklet that starts processes puts itself under observation once; its children, and
 * theirs, inherit that. So no descriptor has to be passed between processes, and one listener serves a
 * session. The watcher's own thread is under no observation. A caller waits in the kernel for the watcher
 * and can be killed there at any time; if rocklet ended, observed calls would fail with ENOSYS. Where the
 * kernel has no listeners, everything works but nothing is noted, which INFO tells ("watching 0").
 *
 * Noted are IP addresses outside the loopback, IP sockets of type raw, and sockets of other families
 * than IP, unix and netlink; the same attempt again only counts up. The table is bounded. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { ATTEMPTS = 256, BATCH = 16 };
enum { BY_CONNECT = 1, BY_SEND, BY_SOCKET };

/* As sent to the host, little-endian. For BY_SOCKET, port is the protocol; type is the socket's. */
struct attempt {
  int64_t first, last;  /* nanoseconds since 1970 */
  uint32_t count;
  uint16_t call, family, port, type;
  uint8_t address[16], pad[4];
};

static struct attempt attempts[ATTEMPTS];
static uint64_t lost;  /* attempts for which there was no room */
static int used, poller = -1, listeners;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int watching(void) { return listeners > 0; }

static void note(struct attempt a) {
  struct timespec t;
  int i = 0;
  clock_gettime(CLOCK_REALTIME, &t);
  a.first = a.last = t.tv_sec * 1000000000LL + t.tv_nsec;
  a.count = 1;
  pthread_mutex_lock(&lock);
  while (i < used && (attempts[i].call != a.call || attempts[i].family != a.family ||
                      attempts[i].port != a.port || attempts[i].type != a.type ||
                      memcmp(attempts[i].address, a.address, sizeof a.address))) i++;
  if (i == ATTEMPTS) lost++;
  else if (i == used) attempts[used++] = a;
  else attempts[i].count += attempts[i].count < UINT32_MAX, attempts[i].last = a.last;
  pthread_mutex_unlock(&lock);
}

/* Notes an address unless it is of the loopback or of no network. `n` is what the caller says. */
static void note_address(int call, const void *bytes, size_t n) {
  static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
  struct attempt a = {.call = call};
  struct sockaddr_in in;
  struct sockaddr_in6 in6;
  memcpy(&in, bytes, sizeof in);
  /* UDP sends to an unspecified family as to IPv4; for connect it means to disconnect. */
  if (in.sin_family == AF_INET || (in.sin_family == AF_UNSPEC && call == BY_SEND)) {
    a.family = AF_INET;
    a.port = ntohs(in.sin_port);
    memcpy(a.address, &in.sin_addr, 4);
  } else if (in.sin_family == AF_INET6 && n >= sizeof in6 - sizeof in6.sin6_scope_id) {
    memcpy(&in6, bytes, sizeof in6);
    a.port = ntohs(in6.sin6_port);
    a.family = memcmp(&in6.sin6_addr, mapped, sizeof mapped) ? AF_INET6 : AF_INET;
    if (a.family == AF_INET) memcpy(a.address, in6.sin6_addr.s6_addr + 12, 4);
    else memcpy(a.address, &in6.sin6_addr, 16);
  } else {
    return;
  }
  /* The unspecified address leads to the loopback, too. 127.77 stands for names that are allowed, at
   * some ports: the host knows which (rome/envs/network/egress.py). */
  if (a.family == AF_INET && a.address[0] == 127 && a.address[1] != 77) return;
  if (a.family == AF_INET && !memcmp(a.address, "\0\0\0", 4)) return;
  if (a.family == AF_INET6 && !memcmp(a.address, &in6addr_any, 15) && a.address[15] < 2) return;
  note(a);
}

/* Reads exactly n bytes of another process. Returns 0, or -1 with errno. */
static int peek(pid_t pid, uint64_t from, void *to, size_t n) {
  struct iovec here = {to, n}, there = {(void *)(uintptr_t)from, n};
  ssize_t got = process_vm_readv(pid, &here, 1, &there, 1, 0);
  if (got >= 0 && (size_t)got < n) errno = EFAULT;
  return got == (ssize_t)n ? 0 : -1;
}

/* Whether the caller still waits: if not, its number may name another process, whose memory was read. */
static int waits(int listener, uint64_t id) {
  return !ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id);
}

static void look(int listener, const struct seccomp_notif *q, int call, uint64_t at, uint64_t size) {
  uint8_t bytes[sizeof(struct sockaddr_in6)] = {0};
  size_t n = size < sizeof bytes ? size : sizeof bytes;
  if (!at || size < sizeof(struct sockaddr_in)) return;
  int error = peek(q->pid, at, bytes, n) ? errno : 0;
  if (error == EFAULT || !waits(listener, q->id)) return;  /* the kernel cannot read it, either */
  if (error) note((struct attempt){.call = call});  /* it hides its memory: the place is unknown */
  else note_address(call, bytes, n);
}

static void look_messages(int listener, const struct seccomp_notif *q, int many) {
  struct mmsghdr m[BATCH] = {0};
  uint64_t at = q->data.args[1], rest = many ? (uint32_t)q->data.args[2] : 1;
  size_t each = many ? sizeof *m : sizeof m->msg_hdr;
  for (rest = rest < IOV_MAX ? rest : IOV_MAX; rest;) {
    size_t n = rest < BATCH ? rest : BATCH;
    if (peek(q->pid, at, m, n * each)) {
      if (errno != EFAULT && waits(listener, q->id)) note((struct attempt){.call = BY_SEND});
      if (errno != EFAULT || n == 1) return;
      for (n = 1; n < BATCH && !peek(q->pid, at, m, (n + 1) * each);) n++;  /* up to the bad page */
      if (peek(q->pid, at, m, n * each)) return;
      rest = n;
    }
    for (size_t i = 0; i < n; i++)
      look(listener, q, BY_SEND, (uintptr_t)m[i].msg_hdr.msg_name, m[i].msg_hdr.msg_namelen);
    rest -= n;
    at += n * each;
  }
}

/* Serves one notification, if there still is one. */
static void answer(int listener) {
  union { struct seccomp_notif q; char space[1024]; } in = {.space = {0}};  /* newer ones are larger */
  union { struct seccomp_notif_resp a; char space[1024]; } out = {.space = {0}};
  const __u64 *args = in.q.data.args;
  if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &in.q)) return;  /* killed meanwhile */
  out.a.id = in.q.id;
  out.a.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
  switch (in.q.data.nr) {
  case SYS_connect: look(listener, &in.q, BY_CONNECT, args[1], (uint32_t)args[2]); break;
  case SYS_sendto: look(listener, &in.q, BY_SEND, args[4], (uint32_t)args[5]); break;
  case SYS_sendmsg: look_messages(listener, &in.q, 0); break;
  case SYS_sendmmsg: look_messages(listener, &in.q, 1); break;
  case SYS_socket:
    note((struct attempt){.call = BY_SOCKET, .family = args[0], .type = args[1] & 15, .port = args[2]});
    out.a.flags = 0;
    out.a.error = args[0] == AF_INET || args[0] == AF_INET6 ? -EPERM : -EAFNOSUPPORT;
  }
  ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &out.a);
}

static void *watch(void *unused) {
  struct epoll_event events[BATCH];
  (void)unused;
  for (;;) {
    int n = epoll_wait(poller, events, BATCH, -1);
    for (int i = 0; i < n; i++) {
      int listener = events[i].data.fd;
      if (events[i].events & EPOLLIN) {
        answer(listener);
      } else {  /* nobody is left under this observation */
        __sync_sub_and_fetch(&listeners, 1);
        /* Closing alone would not do: while a child that is about to exec holds a copy, the listener
         * would be reported once more, by a number that is another descriptor's by then. */
        epoll_ctl(poller, EPOLL_CTL_DEL, listener, NULL);
        close(listener);
      }
    }
  }
  return NULL;
}

/* Puts the children that this thread will have under observation; the gate must be held. 0, or -1. */
int watch_children(void) {
  static __thread int done;
  static int able = -1;
  struct epoll_event e = {.events = EPOLLIN};
  pthread_t thread;
  int listener;
  if (done) return 0;
  if (able < 0) {
    poller = epoll_create1(EPOLL_CLOEXEC);
    able = poller >= 0 && !pthread_create(&thread, NULL, watch, NULL) && !pthread_detach(thread);
  }
  if (!able) return errno = EAGAIN, -1;
  if (install_observer(&listener)) return -1;
  done = 1;
  if (listener < 0) return 0;
  e.data.fd = listener;
  if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e)) return close(listener), -1;
  __sync_add_and_fetch(&listeners, 1);
  return 0;
}

/* Answers with what was noted since the last time, and forgets it. `flags`: whether there is a watcher;
 * `total`: how many attempts found no room. */
int do_watch(int conn) {
  struct attempt copy[ATTEMPTS];
  pthread_mutex_lock(&lock);
  struct reply r = {.flags = watching(), .len = used * sizeof *copy, .total = lost};
  memcpy(copy, attempts, r.len);
  used = lost = 0;
  pthread_mutex_unlock(&lock);
  struct iovec v[2] = {{&r, sizeof r}, {copy, r.len}};
  return send_all(conn, v, 2);
}
