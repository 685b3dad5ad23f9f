/* Attacks that need system calls, one a subcommand: payload NAME [ARGUMENT...].
 *
 * A line "GOT ..." claims a success that must not be; claims count against the sandbox, silence does
 * not count for it (the witness looks from outside). Every other line says how an attempt was refused.
 * All loops are bounded, so that the same program is safe where it does succeed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/keyctl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <dirent.h>
#include <grp.h>
#include <limits.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static char page[4096];

/* A call that must fail; stays alive a while if it does not, so that the host can see what it has. */
static void never(const char *what, long result) {
  if (result < 0) printf("%s: %s\n", what, strerror(errno));
  else printf("GOT %s\n", what);
}
#define NEVER(...) do { errno = 0; never(#__VA_ARGS__, (long)(__VA_ARGS__)); } while (0)

static void said(const char *what, long n) {
  printf("%s: %ld, then %s\n", what, n, errno ? strerror(errno) : "the bound of the attack");
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static int put(const char *path, const char *text) {
  int fd = open(path, O_WRONLY);
  if (fd < 0) return -1;
  int n = write(fd, text, strlen(text));
  close(fd);
  return n;
}

/* --- exhaustion ------------------------------------------------------------------------------ */

static void forks(int argc, char **argv) {  /* COUNT: detached children that stay */
  long want = argc > 0 ? atol(argv[0]) : 100000, n = 0;
  while (n < want) {
    pid_t pid = fork();
    if (pid < 0) break;
    if (!pid) { setsid(); signal(SIGHUP, SIG_IGN); for (;;) pause(); }
    n++, errno = 0;
  }
  said("processes", n);
  fflush(stdout);
  sleep(1);
}

static void grow(int argc, char **argv) {  /* children that each fork again, for a second */
  (void)argc, (void)argv;
  double end = now() + 1;
  while (now() < end) if (fork() == 0) setsid();
}

static void *idle(void *unused) { for (;;) pause(); return unused; }

static void threads(int argc, char **argv) {
  (void)argc, (void)argv;
  pthread_attr_t small;
  pthread_t t;
  long n = 0;
  pthread_attr_init(&small), pthread_attr_setstacksize(&small, 16384);
  while (n < 100000 && !(errno = pthread_create(&t, &small, idle, NULL))) n++;
  said("threads", n);
}

static void zombies(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  for (; n < 20000; n++) {
    pid_t pid = fork();
    if (pid < 0) break;
    if (!pid) _exit(0);
    errno = 0;
  }
  said("zombies", n);
  fflush(stdout);
  sleep(1);
}

static void heap(int argc, char **argv) {  /* MIB: touches memory for ever, or so much of it */
  long want = argc > 0 ? atol(argv[0]) : 1 << 20, n = 0;
  for (; n < want; n++) {
    char *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) break;
    memset(p, 1, 1 << 20);
    errno = 0;
  }
  said("MiB", n);
  fflush(stdout);
  if (argc > 0) sleep(1);
}

static void tables(int argc, char **argv) {  /* one byte every 2 MiB: a page table for each */
  (void)argc, (void)argv;
  long n = 0;
  for (; n < 200000; n++) {
    char *p = mmap((void *)(0x10000000000 + (n << 21)), 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (p == MAP_FAILED) break;
    *p = 1, errno = 0;
  }
  said("page tables", n);
}

static void memfds(int argc, char **argv) {
  (void)argc, (void)argv;
  static char mib[1 << 20];
  long n = 0;
  int fd = -1;
  memset(mib, 1, sizeof mib);
  for (; n < 1 << 20; n++) {
    if (n % 8 == 0 && (fd = memfd_create("x", 0)) < 0) break;
    if (write(fd, mib, sizeof mib) < 0) break;
    errno = 0;
  }
  said("MiB of memfd", n);
}

static void pipes(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  for (; n < 100000; n++) {
    int p[2];
    if (pipe2(p, O_NONBLOCK) < 0) break;
    fcntl(p[1], F_SETPIPE_SZ, 1 << 20);
    while (write(p[1], page, sizeof page) > 0) {}
    errno = 0;
  }
  said("full pipes", n);
}

static void pairs(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  for (; n < 100000; n++) {
    int p[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, p) < 0) break;
    while (write(p[1], page, sizeof page) > 0) {}
    errno = 0;
  }
  said("full socket pairs", n);
}

/* Sends sockets through themselves: descriptors in flight are no longer any process's. */
static void flight(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  for (; n < 100000; n++) {
    int p[2];
    if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, p) < 0) break;
    union { struct cmsghdr h; char space[CMSG_SPACE(2 * sizeof(int))]; } c = {0};
    struct iovec v = {page, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c};
    c.h = (struct cmsghdr){CMSG_LEN(sizeof p), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(&c.h), p, sizeof p);
    int sent = sendmsg(p[0], &m, 0);
    close(p[0]), close(p[1]);
    if (sent < 0) break;
    errno = 0;
  }
  said("descriptors in flight", n);
}

static void fds(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  while (n < 10000000 && open("/dev/null", O_RDONLY) >= 0) n++, errno = 0;
  said("descriptors", n);
}

static void inodes(int argc, char **argv) {  /* DIR: empty files */
  long n = 0;
  char name[64];
  if (chdir(argc > 0 ? argv[0] : ".")) return;
  for (; n < 2000000; n++) {
    snprintf(name, sizeof name, "i%ld", n);
    int fd = open(name, O_CREAT | O_WRONLY, 0600);
    if (fd < 0) break;
    close(fd), errno = 0;
  }
  said("files", n);
}

static void deep(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  char name[256];
  memset(name, 'd', 255), name[255] = 0;
  while (n < 30000 && !mkdir(name, 0755) && !chdir(name)) n++, errno = 0;
  said("levels", n);
}

static void flood(int argc, char **argv) {  /* BYTE: the same byte for ever */
  memset(page, argc > 0 ? atoi(argv[0]) : 'a', sizeof page);
  while (write(1, page, sizeof page) > 0) {}
}

static void instances(int argc, char **argv) {  /* things that are counted for a whole user or host */
  (void)argc, (void)argv;
  struct sigevent e = {.sigev_notify = SIGEV_NONE};
  struct rlimit r = {1024, 1024};
  long n[8] = {0};
  timer_t t;
  mqd_t q;
  char name[32];
  while (n[0] < 50000 && inotify_init() >= 0) n[0]++;
  said("inotify instances", n[0]);
  closefrom(3);
  while (n[1] < 50000 && posix_openpt(O_RDWR | O_NOCTTY) >= 0) n[1]++;
  said("terminals", n[1]);
  closefrom(3);
  while (n[2] < 20000 && !timer_create(CLOCK_MONOTONIC, &e, &t)) n[2]++;
  said("timers", n[2]);
  snprintf(name, sizeof name, "/q%d", getpid());
  for (; n[3] < 1000; n[3]++) {
    snprintf(name, sizeof name, "/q%ld", n[3]);
    if ((q = mq_open(name, O_CREAT | O_RDWR, 0600, NULL)) < 0) break;
    mq_close(q);
  }
  said("message queues", n[3]);
  while (n[4] < 50000 && epoll_create1(0) >= 0) n[4]++;
  said("epolls", n[4]);
  closefrom(3);
  while (n[5] < 100000 && syscall(SYS_add_key, "user", "x", page, 2048, -4) >= 0) n[5]++;
  said("keys", n[5]);
  while (n[6] < 50000 && socket(AF_NETLINK, SOCK_RAW, 0) >= 0) n[6]++;
  said("netlink sockets", n[6]);
  closefrom(3);
  setrlimit(RLIMIT_NOFILE, &r);
  int fd = open("lock", O_CREAT | O_RDWR, 0600);
  for (; n[7] < 5000; n[7]++) {
    struct flock l = {.l_type = F_WRLCK, .l_start = 2 * n[7], .l_len = 1};
    if (fcntl(fd, F_SETLK, &l)) break;
  }
  said("locks", n[7]);
}

static void locked(int argc, char **argv) {
  (void)argc, (void)argv;
  long n = 0;
  for (; n < 65536; n++) {
    void *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mlock(p, 1 << 20)) break;
    errno = 0;
  }
  said("MiB locked", n);
}

static void sysv(int argc, char **argv) {  /* objects that outlive processes */
  (void)argc, (void)argv;
  long n = 0, m = 0, k = 0;
  struct { long type; char text[1024]; } note = {1, "left"};
  for (; n < 4096; n++) {
    int id = shmget(0x4000 + n, 1 << 20, IPC_CREAT | 0666);
    char *p = id < 0 ? (void *)-1 : shmat(id, NULL, 0);
    if (p == (void *)-1) break;
    memset(p, 1, 1 << 20), shmdt(p), errno = 0;
  }
  said("shared memory segments", n);
  for (; m < 4096; m++) {
    int id = msgget(0x4000 + m, IPC_CREAT | 0666);
    if (id < 0) break;
    while (!msgsnd(id, &note, sizeof note.text, IPC_NOWAIT)) {}
    errno = 0;
  }
  said("message queues", m);
  while (k < 4096 && semget(0x4000 + k, 1, IPC_CREAT | 0666) >= 0) k++, errno = 0;
  said("semaphores", k);
  fflush(stdout);
}

/* --- processes ------------------------------------------------------------------------------- */

static void signals(int argc, char **argv) {  /* every signal to pid 1, and to whom it can see */
  (void)argc, (void)argv;
  for (int s = 1; s <= 64; s++) if (kill(1, s)) errno = 0;
  for (long i = 0; i < 100000; i++) {
    union sigval v = {0};
    if (sigqueue(1, SIGRTMIN + 1, v)) break;
  }
  for (int s = 1; s <= 64; s++) syscall(SYS_tgkill, 1, 1, s);
  int fd = syscall(SYS_pidfd_open, 1, 0);
  for (int s = 1; fd >= 0 && s <= 64; s++) syscall(424, fd, s, NULL, 0);
  puts("sent every signal to pid 1");
}

static void killall(int argc, char **argv) {
  (void)argc, (void)argv;
  puts("kill(-1)"), fflush(stdout);
  kill(-1, SIGKILL);
  said("kill(-1)", 0);
}

static void meddle(int argc, char **argv) {  /* ptrace and its relatives, on pid 1 */
  (void)argc, (void)argv;
  struct iovec mine = {page, 8}, its = {(void *)0x400000, 8};
  NEVER(ptrace(PTRACE_ATTACH, 1, NULL, NULL));
  NEVER(ptrace(PTRACE_SEIZE, 1, NULL, NULL));
  NEVER(syscall(SYS_process_vm_readv, 1, &mine, 1, &its, 1, 0));
  NEVER(syscall(SYS_process_vm_writev, 1, &mine, 1, &its, 1, 0));
  NEVER(open("/proc/1/mem", O_RDWR));
  NEVER(open("/proc/1/environ", O_RDONLY) < 0 ? -1 : read(open("/proc/1/environ", O_RDONLY), page, 1));
  NEVER(open("/proc/1/syscall", O_RDONLY) < 0 ? -1 : read(open("/proc/1/syscall", O_RDONLY), page, 1));
  NEVER(open("/proc/1/root/etc", O_RDONLY));
  NEVER(open("/proc/1/cwd/etc", O_RDONLY));
  NEVER(open("/proc/1/map_files", O_RDONLY) < 0 ? -1 : readlink("/proc/1/exe", page, 10));
  int fd = syscall(SYS_pidfd_open, 1, 0);
  for (int i = 0; i < 16; i++) NEVER(syscall(438, fd, i, 0));  /* pidfd_getfd */
  NEVER(syscall(SYS_kcmp, 1, 1, 0, 0, 0));
  NEVER(syscall(440, fd, &its, 1, 4, 0));  /* process_madvise */
}

static void bounds(int argc, char **argv) {  /* the settings of pid 1, and one's own beyond */
  (void)argc, (void)argv;
  struct rlimit less = {8, 8}, more = {RLIM_INFINITY, RLIM_INFINITY}, old;
  struct sched_param rt = {.sched_priority = 50};
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(0, &one);
  NEVER(prlimit(1, RLIMIT_NOFILE, &less, &old));
  NEVER(prlimit(1, RLIMIT_CPU, &less, &old));
  NEVER(setrlimit(RLIMIT_NOFILE, &more));
  NEVER(setrlimit(RLIMIT_MSGQUEUE, &more));
  NEVER(setrlimit(RLIMIT_FSIZE, &more));
  NEVER(setpriority(PRIO_PROCESS, 1, 19));
  NEVER(setpriority(PRIO_PROCESS, 0, -20));
  NEVER(sched_setscheduler(1, SCHED_FIFO, &rt));
  NEVER(sched_setscheduler(0, SCHED_FIFO, &rt));
  NEVER(sched_setaffinity(1, sizeof one, &one));
  NEVER(syscall(SYS_ioprio_set, 1, 1, 3 << 13));
  NEVER(put("/proc/1/oom_score_adj", "1000"));
  NEVER(put("/proc/self/oom_score_adj", "-1000"));
  NEVER(put("/proc/1/uid_map", "0 0 1"));
  NEVER(put("/proc/1/timerslack_ns", "1000000000"));
  NEVER(put("/proc/1/coredump_filter", "0x7f"));
  NEVER(put("/proc/1/clear_refs", "1"));
}

/* --- kernel ---------------------------------------------------------------------------------- */

static void mounts(int argc, char **argv) {
  (void)argc, (void)argv;
  mkdir("/tmp/m", 0755);
  NEVER(mount("none", "/tmp/m", "tmpfs", 0, NULL));
  NEVER(mount("none", "/tmp/m", "proc", 0, NULL));
  NEVER(mount("none", "/tmp/m", "sysfs", 0, NULL));
  NEVER(mount("none", "/tmp/m", "cgroup", 0, "memory"));
  NEVER(mount("none", "/tmp/m", "cgroup2", 0, NULL));
  NEVER(mount("none", "/tmp/m", "devpts", 0, NULL));
  NEVER(mount("none", "/tmp/m", "mqueue", 0, NULL));
  NEVER(mount("none", "/tmp/m", "overlay", 0, "lowerdir=/,upperdir=/tmp,workdir=/tmp/m"));
  NEVER(mount("/dev/vda", "/tmp/m", "ext4", 0, NULL));
  NEVER(mount("/", "/tmp/m", NULL, MS_BIND | MS_REC, NULL));
  NEVER(mount("none", "/", NULL, MS_REMOUNT, NULL));
  NEVER(mount("none", "/proc/sys", NULL, MS_REMOUNT | MS_BIND, NULL));
  NEVER(mount("none", "/sys", NULL, MS_REMOUNT, NULL));
  NEVER(mount("none", "/", NULL, MS_SHARED | MS_REC, NULL));
  NEVER(mount("/tmp", "/tmp/m", NULL, MS_MOVE, NULL));
  NEVER(umount2("/proc/sys", MNT_DETACH));
  NEVER(umount2("/proc", MNT_DETACH));
  NEVER(umount2("/work", MNT_DETACH));
  NEVER(syscall(SYS_pivot_root, "/tmp", "/tmp/m"));
  NEVER(syscall(430, "tmpfs", 0));                          /* fsopen */
  NEVER(syscall(433, AT_FDCWD, "/tmp", 0));                 /* fspick */
  NEVER(syscall(428, AT_FDCWD, "/", 1));                    /* open_tree, cloned */
  NEVER(syscall(429, AT_FDCWD, "/tmp", AT_FDCWD, "/tmp/m", 0));  /* move_mount */
  struct { uint64_t set, clr, prop, fd; } attr = {.clr = 1};
  NEVER(syscall(442, AT_FDCWD, "/", 0x8000, &attr, sizeof attr));  /* mount_setattr */
}

static void devices(int argc, char **argv) {  /* NONCE LOOP_MINOR: the host's kernel log, its disks */
  char name[64];
  int fd;
  for (int c = 0; c < 3; c++) {
    const char *dir = c == 0 ? "." : c == 1 ? "/tmp" : "/dev/shm";
    snprintf(name, sizeof name, "%s/kmsg", dir);
    never("mknod kmsg", mknod(name, S_IFCHR | 0666, makedev(1, 11)));
    never("write kmsg", argc > 0 ? put(name, argv[0]) : -1);
    snprintf(name, sizeof name, "%s/mem", dir);
    never("mknod mem", mknod(name, S_IFCHR | 0666, makedev(1, 1)));
    never("open mem", open(name, O_RDONLY));
    snprintf(name, sizeof name, "%s/disk", dir);
    never("mknod disk", mknod(name, S_IFBLK | 0666, makedev(7, argc > 1 ? atoi(argv[1]) : 0)));
    never("open disk", open(name, O_RDONLY));
  }
  DIR *d = opendir("/dev");
  struct dirent *e;
  struct stat st;
  while (d && (e = readdir(d)))
    if (!fstatat(dirfd(d), e->d_name, &st, 0) && S_ISBLK(st.st_mode) &&
        (fd = openat(dirfd(d), e->d_name, O_RDONLY)) >= 0) printf("GOT block device %s\n", e->d_name);
  NEVER(put("/dev/kmsg", argc > 0 ? argv[0] : "x"));
  NEVER(open("/dev/mem", O_RDONLY));
  NEVER(open("/dev/loop-control", O_RDWR));
  NEVER(open("/dev/fuse", O_RDWR));
  NEVER(open("/dev/kvm", O_RDWR));
  NEVER(open("/dev/net/tun", O_RDWR));
}

static void held(void) { fflush(stdout); if (fork() == 0) { setsid(); sleep(20); _exit(0); } }

static void users(int argc, char **argv) {  /* new user namespaces, and the namespaces of others */
  (void)argc, (void)argv;
  static const char *const kinds[] = {"user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"};
  struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
  char name[64];
  long pid;
  NEVER(unshare(CLONE_NEWUSER));
  for (int i = 0; i < 8; i++) {
    int flags[] = {CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUTS,
                   CLONE_NEWCGROUP, 0x80};
    snprintf(name, sizeof name, "unshare %s", kinds[i]);
    errno = 0, never(name, unshare(flags[i]));
    snprintf(name, sizeof name, "/proc/1/ns/%s", kinds[i]);
    int fd = open(name, O_RDONLY);
    never(name, fd < 0 ? -1 : setns(fd, flags[i]));
  }
  int fd = syscall(SYS_pidfd_open, 1, 0);
  NEVER(setns(fd, CLONE_NEWNS | CLONE_NEWUSER));
  pid = syscall(435, &args, sizeof args);
  if (!pid) sleep(20), _exit(0);
  never("clone3 NEWUSER", pid);
  pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, NULL, NULL, NULL, NULL);
  if (!pid) sleep(20), _exit(0);
  never("clone NEWUSER", pid);
}

static void rare(int argc, char **argv) {  /* interfaces with a long record of holes */
  (void)argc, (void)argv;
  struct { uint32_t type, insns; uint64_t code, license; } prog = {1, 2, 0, 0};
  uint64_t code[2] = {0xb7, 0x95};
  uint32_t map[12] = {2, 4, 4, 1};
  prog.code = (uint64_t)code, prog.license = (uint64_t) "GPL";
  memset(page, 0, sizeof page);
  NEVER(syscall(SYS_bpf, 5, &prog, 48));
  NEVER(syscall(SYS_bpf, 0, map, sizeof map));
  NEVER(syscall(425, 8, page));  /* io_uring_setup */
  NEVER(syscall(SYS_userfaultfd, 0));
  NEVER(syscall(SYS_userfaultfd, 1));
  ((uint32_t *)page)[1] = 112;
  NEVER(syscall(SYS_perf_event_open, page, 0, -1, -1, 0));
  NEVER(syscall(SYS_fanotify_init, 0, O_RDONLY));
  NEVER(syscall(SYS_add_key, "user", "x", "y", 1, -4));
  NEVER(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL));
  NEVER(syscall(SYS_keyctl, KEYCTL_SEARCH, -4, "user", "rome-canary", 0));
  NEVER(syscall(SYS_request_key, "user", "rome-canary", NULL, -4));
  NEVER(syscall(SYS_init_module, page, 64, ""));
  NEVER(syscall(SYS_finit_module, open("/bin/bash", O_RDONLY), "", 0));
  NEVER(syscall(SYS_delete_module, "none", 0));
  NEVER(syscall(SYS_kexec_load, 0, 0, NULL, 0));
  NEVER(syscall(SYS_iopl, 3));
  NEVER(syscall(SYS_ioperm, 0x80, 1, 1));
  NEVER(syscall(SYS_swapon, "/tmp/none", 0));
  NEVER(syscall(SYS_acct, "/tmp/none"));
  NEVER(syscall(SYS_quotactl, 0x80000700, "/dev/vda", 0, page));
  NEVER(syscall(SYS_reboot, 0xfee1dead, 672274793, 0, NULL));  /* only switches Ctrl-Alt-Del off */
  NEVER(syscall(SYS_vhangup));
  NEVER(syscall(SYS_syslog, 3, page, 100));
  NEVER(syscall(SYS_lookup_dcookie, 0, page, 1));
  NEVER(syscall(SYS_move_pages, 1, 1, page, NULL, page, 0));
  NEVER(syscall(SYS_migrate_pages, 1, 64, page, page));
}

static void clocks(int argc, char **argv) {  /* two seconds ahead: seen, and harmless */
  (void)argc, (void)argv;
  struct timespec t;
  struct timeval v;
  struct timex x = {.modes = ADJ_TICK, .tick = 10001};
  clock_gettime(CLOCK_REALTIME, &t), t.tv_sec += 2;
  v.tv_sec = t.tv_sec, v.tv_usec = 0;
  NEVER(clock_settime(CLOCK_REALTIME, &t));
  NEVER(syscall(SYS_settimeofday, &v, NULL));
  NEVER(syscall(SYS_adjtimex, &x));
  NEVER(sethostname("rome-canary", 11));
  NEVER(setdomainname("rome-canary", 11));
}

static void by_handle(int argc, char **argv) {  /* HEX PATH...: opens the host's file by its handle */
  struct { struct file_handle h; unsigned char f[128]; } h;
  if (argc < 2) return;
  size_t n = strlen(argv[0]) / 2;
  for (size_t i = 0; i < n && i < sizeof h; i++)
    sscanf(argv[0] + 2 * i, "%2hhx", (unsigned char *)&h + i);
  for (int i = 1; i < argc; i++) {
    int at = open(argv[i], O_RDONLY), fd = open_by_handle_at(at, &h.h, O_RDONLY);
    never(argv[i], fd);
    ssize_t got = fd < 0 ? 0 : read(fd, page, sizeof page - 1);
    if (got > 0) page[got] = 0, puts(page);
  }
}

static void look_up(const char *how) {  /* climbs from the current directory, then tells what is there */
  struct stat top, root;
  for (int i = 0; i < 200; i++) if (chdir("..")) break;
  if (stat(".", &top) || stat("/", &root)) return;
  printf("%s: %s\n", how, top.st_ino == root.st_ino && top.st_dev == root.st_dev ? "the same root"
         : !access("run/rocklet", F_OK) || !access("etc/shadow", R_OK) ? "GOT another root"
         : "the same root, seen from below");
}

static void breakout(int argc, char **argv) {
  (void)argc, (void)argv;
  int root = open("/", O_RDONLY);
  mkdir("/tmp/jail", 0755);
  if (!chroot("/tmp/jail")) {
    puts("GOT chroot");
    if (!fchdir(root)) look_up("fchdir");
  } else printf("chroot: %s\n", strerror(errno));
  if (!chdir("/proc/self/root")) look_up("/proc/self/root");
  if (!chdir("/proc/self/cwd")) look_up("/proc/self/cwd");
  if (!chdir("/proc/1/root")) look_up("/proc/1/root"), puts("GOT the root of pid 1");
  else printf("/proc/1/root: %s\n", strerror(errno));
  if (!chdir("/proc/1/cwd")) puts("GOT the directory of pid 1");
  for (int fd = 3; fd < 1024; fd++) {
    if (fd != root && !fchdir(fd)) printf("GOT directory on descriptor %d\n", fd);
  }
}

static void overwrite(int argc, char **argv) {  /* the binary of the server, by every way to it */
  (void)argc, (void)argv;
  static const char *const names[] = {"/run/rocklet", "/proc/1/exe", "/proc/1/root/run/rocklet",
                                      "/proc/1/task/1/exe"};
  for (int i = 0; i < 4; i++) {
    errno = 0, never(names[i], open(names[i], O_WRONLY));
    errno = 0, never(names[i], open(names[i], O_RDWR | O_TRUNC));
    errno = 0, never("chmod", chmod(names[i], 0777));
    errno = 0, never("rename", rename("/tmp", names[i]));
    int fd = open(names[i], O_PATH);
    char by[64];
    snprintf(by, sizeof by, "/proc/self/fd/%d", fd);
    if (fd >= 0) errno = 0, never(by, open(by, O_WRONLY));
  }
}

static void privilege(int argc, char **argv) {  /* as the agent: every way to more */
  (void)argc, (void)argv;
  struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct all[2] = {{-1, -1, -1}, {-1, -1, -1}};
  struct vfs { uint32_t magic, permitted, inheritable, p2, i2; } cap = {0x02000001, -1, 0, -1, 0};
  NEVER(syscall(SYS_capset, &h, all));
  for (int c = 0; c < 41; c++) if (!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, c, 0, 0) &&
                                   c != 0 && c != 1 && c != 3 && c != 5 && c != 6 && c != 7) puts("GOT ambient");
  NEVER(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0));
  NEVER(prctl(PR_SET_SECCOMP, 0, 0, 0, 0));
  NEVER(prctl(PR_SET_MM, 1, 0, 0, 0));
  NEVER(prctl(PR_SET_SECUREBITS, 0, 0, 0, 0));
  if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1) puts("GOT privileges by exec");
  if (geteuid()) {
    NEVER(setuid(0));
    NEVER(setgid(0));
    NEVER(setresuid(0, 0, 0));
    NEVER(setgroups(0, NULL));
    NEVER(chown("/work", 0, 0));
    NEVER(setxattr("/proc/self/exe", "security.capability", &cap, sizeof cap, 0));
  }
  held();
}

static void terminal(int argc, char **argv) {
  (void)argc, (void)argv;
  char c = '\n';
  int null = open("/dev/null", O_RDWR), tty = open("/dev/tty", O_RDWR), disc = 0;
  for (int fd = 0; fd < 256; fd++)
    if (ioctl(fd, TIOCSTI, &c) == 0) printf("GOT TIOCSTI on %d\n", fd);
  NEVER(tty < 0 ? -1 : ioctl(tty, TIOCSTI, &c));
  NEVER(ioctl(null, TIOCSETD, &disc));
  NEVER(open("/dev/console", O_RDWR) < 0 ? -1 : ioctl(open("/dev/console", O_RDWR), TIOCCONS));
}

/* Every terminal there is: taken, typed at, given another line discipline. */
static void steal(int argc, char **argv) {
  (void)argc, (void)argv;
  char name[32], c = 'x', *words[] = {"printf forged\n"};
  int disc = 3, fd;  /* N_PPP, to be loaded as a module */
  for (int i = 0; i < 64; i++) {
    struct stat st;
    snprintf(name, sizeof name, "/dev/pts/%d", i);
    if (stat(name, &st)) continue;
    if ((fd = open(name, O_RDWR | O_NOCTTY | O_NONBLOCK)) < 0) { printf("%s: %s\n", name, strerror(errno)); continue; }
    if (getuid() && st.st_uid != getuid()) printf("GOT the terminal %s of another user\n", name);
    NEVER(ioctl(fd, TIOCSTI, &c));
    for (const char *w = words[0]; *w; w++) if (!ioctl(fd, TIOCSTI, w)) puts("GOT TIOCSTI");
    NEVER(ioctl(fd, TIOCSETD, &disc));
    NEVER(ioctl(fd, TIOCCONS));
    if (!fork()) {
      setsid();
      if (tcgetsid(fd) > 0) NEVER(ioctl(fd, TIOCSCTTY, 1));
      _exit(0);
    }
    wait(NULL);
    close(fd);
  }
  if ((fd = open("/dev/tty", O_RDWR)) >= 0) {
    struct { uint16_t a, b; uint32_t c[64]; } big = {0};
    NEVER(ioctl(fd, TIOCSTI, &c));
    NEVER(ioctl(fd, TIOCSETD, &disc));
    NEVER(syscall(SYS_ioctl, fd, TIOCSTI | 0xdeadbeef00000000ul, &c));  /* only 32 bits count */
    NEVER(ioctl(fd, TIOCLINUX, &big));
  }
}

/* --- network --------------------------------------------------------------------------------- */

static void sockets(int argc, char **argv) {
  (void)argc, (void)argv;
  static const struct { const char *name; int family, type, protocol; } kinds[] = {
    {"vsock", 40, SOCK_STREAM, 0}, {"packet", 17, SOCK_RAW, 0}, {"raw icmp", AF_INET, SOCK_RAW, 1},
    {"raw 6", 10, SOCK_RAW, 58}, {"alg", 38, SOCK_SEQPACKET, 0}, {"bluetooth", 31, SOCK_RAW, 1},
    {"can", 29, SOCK_RAW, 1}, {"tipc", 30, SOCK_RDM, 0}, {"rds", 21, SOCK_SEQPACKET, 0},
    {"xdp", 44, SOCK_RAW, 0}, {"qipcrtr", 42, SOCK_DGRAM, 0}, {"kcm", 41, SOCK_DGRAM, 0},
    {"smc", 43, SOCK_STREAM, 0}, {"key", 15, SOCK_RAW, 2}, {"nfc", 39, SOCK_SEQPACKET, 0}};
  for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
    errno = 0, never(kinds[i].name, socket(kinds[i].family, kinds[i].type, kinds[i].protocol));
}

static void route(int argc, char **argv) {  /* asks the kernel for a device, an address, a route */
  (void)argc, (void)argv;
  int kinds[] = {RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_SETLINK, RTM_NEWNSID};
  for (int i = 0; i < 5; i++) {
    struct { struct nlmsghdr h; struct ifinfomsg m; char space[64]; } q = {
      {sizeof q, kinds[i], NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, i, 0}, {.ifi_index = 1}, {0}};
    struct { struct nlmsghdr h; struct nlmsgerr e; char space[512]; } a = {0};
    int fd = socket(AF_NETLINK, SOCK_RAW, 0);
    if (fd < 0) { printf("netlink: %s\n", strerror(errno)); continue; }
    send(fd, &q, sizeof q, 0);
    struct pollfd p = {fd, POLLIN, 0};
    if (poll(&p, 1, 200) > 0 && recv(fd, &a, sizeof a, 0) > 0 && a.h.nlmsg_type == NLMSG_ERROR)
      printf("%s%d: %s\n", a.e.error ? "rtnetlink " : "GOT rtnetlink ", kinds[i], strerror(-a.e.error));
    close(fd);
  }
}

static void reach(int argc, char **argv) {  /* PORT ABSTRACT PATH: the host's services, and rocklet's */
  struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(argc > 0 ? atoi(argv[0]) : 1),
                           .sin_addr.s_addr = htonl(0x7f000001)};
  struct sockaddr_un un = {.sun_family = AF_UNIX};
  NEVER(connect(socket(AF_INET, SOCK_STREAM, 0), (void *)&in, sizeof in));
  sendto(socket(AF_INET, SOCK_DGRAM, 0), "x", 1, 0, (void *)&in, sizeof in);
  for (int i = 1; i < argc; i++) {
    int at = i == 1;
    memset(un.sun_path, 0, sizeof un.sun_path);
    snprintf(un.sun_path + at, sizeof un.sun_path - at, "%s", argv[i]);
    socklen_t n = offsetof(struct sockaddr_un, sun_path) + at + strlen(argv[i]);
    errno = 0, never(argv[i], connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&un, n));
  }
}

static void talk(int argc, char **argv) {  /* PORT [ADDRESS]: sends stdin, prints the answer */
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(argc > 0 ? atoi(argv[0]) : 0)};
  struct timeval patience = {1, 500000};
  char text[65536];
  int fd = socket(AF_INET, SOCK_STREAM, 0), n;
  inet_pton(AF_INET, argc > 1 ? argv[1] : "127.0.0.1", &to.sin_addr);
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  if (connect(fd, (void *)&to, sizeof to)) { printf("%s\n", strerror(errno)); return; }
  while ((n = read(0, text, sizeof text)) > 0) if (send(fd, text, n, MSG_NOSIGNAL) < 0) break;
  while ((n = recv(fd, text, sizeof text, 0)) > 0) if (write(1, text, n) < 0) break;
}

static void ask(int argc, char **argv) {  /* NAME...: DNS questions of every kind to 127.0.0.1 */
  for (int i = 0; i < argc; i++)
    for (int kind = 1; kind < 256; kind += kind < 30 ? 1 : 225) {
      unsigned char q[512] = {0x12, kind, 1, 0, 0, 1}, a[512];
      int at = 12, fd = socket(AF_INET, SOCK_DGRAM, 0), n;
      struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(53)};
      struct timeval patience = {0, 300000};
      to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      for (char *label = argv[i]; *label;) {
        size_t size = strcspn(label, ".");
        if (size > 63 || at + size > 400) break;
        q[at++] = size, memcpy(q + at, label, size), at += size, label += size + (label[size] == '.');
      }
      q[at++] = 0, q[at++] = 0, q[at++] = kind, q[at++] = 0, q[at++] = 1;
      setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      sendto(fd, q, at, 0, (void *)&to, sizeof to);
      n = recv(fd, a, sizeof a, 0);
      if (n > 7 && ((a[3] & 15) != 3 || a[7])) printf("GOT an answer of %d for kind %d of %s\n", a[3] & 15, kind, argv[i]);
      else if (kind == 1) printf("%s: %s\n", argv[i], n > 0 ? "no such name" : strerror(errno));
      close(fd);
    }
}

static void occupy(int argc, char **argv) {  /* PORT...: takes the place of a listener */
  int one = 1;
  for (int i = 0; i < argc; i++)
    for (int type = SOCK_STREAM; type <= SOCK_DGRAM; type++) {
      struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[i]))};
      at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      int fd = socket(AF_INET, type, 0);
      if (type == SOCK_DGRAM && atoi(argv[i]) != 53) continue;
      setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
      setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
      never(argv[i], bind(fd, (void *)&at, sizeof at) || (type == SOCK_STREAM && listen(fd, 1)) ? -1 : 0);
    }
}

static void knock(int argc, char **argv) {  /* every unix socket there is: asks it for INFO */
  (void)argc, (void)argv;
  static const char *const fixed[] = {"/run/rome/sock", "/run/rome/boot", "/run/podman/podman.sock",
    "/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock",
    "/run/systemd/private", "/run/dbus/system_bus_socket"};
  uint32_t info[6] = {7, 1000, 0, 0, 0, 0};
  char line[512], path[256];
  FILE *f = fopen("/proc/net/unix", "r");
  for (int i = -8; f && (i < 0 || fgets(line, sizeof line, f)); i++) {
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    if (i < 0) snprintf(path, sizeof path, "%s", fixed[i + 8]);
    else if (sscanf(line, "%*s %*s %*s %*s %*s %*s %*s %255s", path) != 1) continue;
    int at = path[0] == '@', fd = socket(AF_UNIX, SOCK_STREAM, 0);
    snprintf(un.sun_path + at, sizeof un.sun_path - at, "%s", path + at);
    if (connect(fd, (void *)&un, offsetof(struct sockaddr_un, sun_path) + strlen(path))) {
      printf("%s: %s\n", path, strerror(errno));
    } else {
      struct pollfd p = {fd, POLLIN, 0};
      if (send(fd, info, sizeof info, MSG_NOSIGNAL) > 0 && poll(&p, 1, 300) > 0 && recv(fd, line, 24, 0) > 0)
        printf("GOT an answer from %s\n", path);
      else printf("%s: it hung up\n", path);
    }
    close(fd);
  }
}

/* --- forging --------------------------------------------------------------------------------- */

static void forge(int argc, char **argv) {  /* writes reports and replies to every descriptor of everyone */
  (void)argc, (void)argv;
  struct { int32_t error, exit_code; uint32_t flags, len; uint64_t total; char data[8]; } r = {
    0, 0, 0, 7, 7, "forged\n"};
  char name[64], text[256];
  DIR *d = opendir("/proc");
  struct dirent *e;
  long n = 0;
  while (d && (e = readdir(d))) {
    if (e->d_name[0] < '1' || e->d_name[0] > '9' || atoi(e->d_name) == getpid()) continue;
    for (int fd = 3; fd < 512; fd++) {
      snprintf(name, sizeof name, "/proc/%.20s/fd/%d", e->d_name, fd);
      int to = open(name, O_WRONLY | O_NONBLOCK);
      if (to < 0) continue;
      for (int seq = 0; seq < 40; seq++)
        n += write(to, text, snprintf(text, sizeof text, "%d 0 /forged", seq) + 1) > 0;
      n += write(to, &r, sizeof r) > 0;
      close(to);
    }
  }
  for (int fd = 3; fd < 1024; fd++) n += write(fd, &r, sizeof r) > 0;
  printf("forged reports went to %ld places\n", n);
}

/* --- races ----------------------------------------------------------------------------------- */

static void flip(int argc, char **argv) {  /* NAME TARGET: by turns a directory or file, and a link */
  double end = now() + 3;
  char other[256];
  if (argc < 2) return;
  snprintf(other, sizeof other, "%s.other", argv[0]);
  unlink(other);
  if (symlink(argv[1], other)) return;
  while (now() < end) syscall(SYS_renameat2, AT_FDCWD, argv[0], AT_FDCWD, other, RENAME_EXCHANGE);
}

static const struct { const char *name; void (*run)(int, char **); } all[] = {
  {"forks", forks}, {"grow", grow}, {"threads", threads}, {"zombies", zombies}, {"heap", heap},
  {"tables", tables}, {"memfds", memfds}, {"pipes", pipes}, {"pairs", pairs}, {"flight", flight},
  {"fds", fds}, {"inodes", inodes}, {"deep", deep}, {"flood", flood}, {"instances", instances},
  {"locked", locked}, {"sysv", sysv}, {"signals", signals}, {"killall", killall},
  {"meddle", meddle}, {"bounds", bounds}, {"mounts", mounts}, {"devices", devices},
  {"users", users}, {"rare", rare}, {"clocks", clocks}, {"handle", by_handle},
  {"breakout", breakout}, {"overwrite", overwrite}, {"privilege", privilege},
  {"terminal", terminal}, {"sockets", sockets}, {"route", route}, {"reach", reach},
  {"knock", knock}, {"talk", talk}, {"ask", ask}, {"occupy", occupy}, {"steal", steal},
  {"forge", forge}, {"flip", flip}};

int main(int argc, char **argv) {
  const char *own = strrchr(argv[0], '/');
  if (strcmp(own ? own + 1 : argv[0], "payload")) return puts("0\nforged"), 0;  /* in another's place */
  for (unsigned i = 0; argc > 1 && i < sizeof all / sizeof *all; i++)
    if (!strcmp(argv[1], all[i].name)) {
      setvbuf(stdout, NULL, _IOLBF, 0);
      all[i].run(argc - 2, argv + 2);
      return 0;
    }
  return 2;
}
