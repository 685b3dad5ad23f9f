/* What an unprivileged process might try; prints a line for each attempt that succeeds. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#define TRY(call) do { if ((call) >= 0) puts(#call); } while (0)

int main(void) {
  char page[4096] = {0};
  struct clone_args args = {.flags = CLONE_NEWUSER, .exit_signal = SIGCHLD};
  struct rlimit more = {RLIM_INFINITY, RLIM_INFINITY};
  struct sockaddr_un rocklet = {.sun_family = AF_UNIX, .sun_path = "/run/rome/sock"};
  setvbuf(stdout, NULL, _IONBF, 0);
  TRY(socket(40, SOCK_STREAM, 0)); /* vsock */
  TRY(socket(38, SOCK_SEQPACKET, 0)); /* kernel crypto */
  TRY(socket(AF_PACKET, SOCK_RAW, 0));
  TRY(socket(AF_INET, SOCK_RAW, 1));
  TRY(connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&rocklet, sizeof rocklet));
  TRY(syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL));
  TRY(syscall(SYS_add_key, "user", "x", "y", 1, -4));
  TRY(syscall(SYS_io_uring_setup, 8, page));
  TRY(syscall(SYS_userfaultfd, 0));
  TRY(syscall(SYS_bpf, 0, page, sizeof page));
  TRY(syscall(SYS_perf_event_open, page, 0, -1, -1, 0));
  TRY(syscall(SYS_clone3, &args, sizeof args));
  TRY(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, NULL, NULL, NULL, NULL));
  TRY(unshare(CLONE_NEWUSER));
  TRY(unshare(CLONE_NEWNS));
  TRY(setns(open("/proc/1/ns/net", O_RDONLY), 0));
  TRY(mount("none", "/tmp", "tmpfs", 0, NULL));
  TRY(umount2("/work", MNT_DETACH));
  TRY(chroot("/work"));
  TRY(mknod("/tmp/disk", S_IFBLK | 0666, makedev(254, 0)));
  TRY(setuid(0));
  TRY(setgid(0));
  TRY(chown("/work", 0, 0));
  TRY(kill(1, SIGKILL));
  TRY(ptrace(PTRACE_ATTACH, 1, NULL, NULL));
  TRY(open("/proc/1/mem", O_RDWR));
  TRY(open("/proc/1/environ", O_RDONLY));
  TRY(open("/proc/1/fd/3", O_RDWR));
  TRY(open("/proc/1/root/etc", O_RDONLY));
  TRY(open("/proc/1/oom_score_adj", O_WRONLY));
  TRY(open("/run/rome/sock", O_RDONLY));
  TRY(open("/run/rocklet", O_WRONLY));
  TRY(open("/proc/sys/kernel/core_pattern", O_WRONLY));
  TRY(open("/proc/sysrq-trigger", O_WRONLY));
  TRY(open("/dev/mem", O_RDONLY));
  TRY(open("/dev/kmsg", O_RDWR));
  TRY(open("/dev/new", O_WRONLY | O_CREAT, 0600));
  TRY(open("/sys/fs/cgroup/pids/cgroup.procs", O_WRONLY));
  TRY(setrlimit(RLIMIT_NPROC, &more));
  TRY(setrlimit(RLIMIT_NOFILE, &more));
  TRY(setrlimit(RLIMIT_MSGQUEUE, &more));
  TRY(setpriority(PRIO_PROCESS, 0, -5));
  TRY(sethostname("x", 1));
  TRY(syscall(SYS_settimeofday, page, NULL));
  TRY(syscall(SYS_init_module, page, 1, ""));
  TRY(syscall(SYS_reboot, 0xfee1dead, 672274793, 0x89abcdef, NULL));
  puts("done");
}
