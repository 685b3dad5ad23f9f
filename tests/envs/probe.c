/* Makes system calls that the filter is to refuse or to let through; prints "NAME ERRNO" for each. The
 * arguments are such that a call that gets through does no harm. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define TRY(name, call) do { errno = 0; long r_ = (long)(call); \
    printf("%s %d\n", name, r_ < 0 ? errno : 0); } while (0)
#define CALL(name, ...) TRY(#name, syscall(SYS_##name, ##__VA_ARGS__))

/* A child that clone made ends at once, so that no namespace outlives the probe. */
static long end_child(long pid) {
  if (pid == 0) _exit(0);
  if (pid > 0) waitpid(pid, NULL, 0);
  return pid;
}

static long try_clone(unsigned long flags) {
  return end_child(syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL));
}

int main(void) {
  char page[4096] = {0};
  struct clone_args args = {.exit_signal = SIGCHLD};
  struct rlimit64 { uint64_t now, most; } limit;
  struct iovec v = {page, 8}, w = {page + 64, 8};
  int pair[2];
  setvbuf(stdout, NULL, _IONBF, 0);
  TRY("clone3", end_child(syscall(SYS_clone3, &args, sizeof args)));
  TRY("clone_newns", try_clone(CLONE_NEWNS));
  TRY("clone_newcgroup", try_clone(CLONE_NEWCGROUP));
  TRY("clone_newuts", try_clone(CLONE_NEWUTS));
  TRY("clone_newipc", try_clone(CLONE_NEWIPC));
  TRY("clone_newuser", try_clone(CLONE_NEWUSER));
  TRY("clone_newpid", try_clone(CLONE_NEWPID));
  TRY("clone_newnet", try_clone(CLONE_NEWNET));
  TRY("clone", try_clone(0));
  CALL(unshare, 0);
  TRY("unshare_newuts", syscall(SYS_unshare, CLONE_NEWUTS));
  CALL(setns, -1, 0);
  CALL(chroot, "/");
  CALL(mount, "none", "/tmp", "tmpfs", MS_REMOUNT, "bad");
  CALL(umount2, "/nothing", 0);
  CALL(pivot_root, "/nothing", "/nothing");
  TRY("open_tree", syscall(428, -1, "", 0));
  TRY("move_mount", syscall(429, -1, "", -1, "", 0));
  TRY("fsopen", syscall(430, "tmpfs", 0));
  TRY("fsconfig", syscall(431, -1, 0, NULL, NULL, 0));
  TRY("fsmount", syscall(432, -1, 0, 0));
  TRY("fspick", syscall(433, -1, "/nothing", 0));
  TRY("mount_setattr", syscall(442, -1, "", 0, NULL, 0));
  CALL(bpf, 0, NULL, 0);
  CALL(perf_event_open, NULL, 0, -1, -1, 0);
  CALL(userfaultfd, 1);
  CALL(fanotify_init, 0, 0);
  TRY("io_uring_setup", syscall(425, 0, NULL));
  TRY("io_uring_enter", syscall(426, -1, 0, 0, 0, NULL));
  TRY("io_uring_register", syscall(427, -1, 0, NULL, 0));
  CALL(keyctl, -1);
  CALL(add_key, NULL, NULL, NULL, 0, 0);
  CALL(request_key, NULL, NULL, NULL, 0);
  CALL(kexec_load, 0, 0, NULL, 0xffff);
  CALL(kexec_file_load, -1, -1, 0, NULL, 0xffff);
  CALL(init_module, NULL, 0, NULL);
  CALL(finit_module, -1, NULL, 0);
  CALL(delete_module, NULL, 0);
  CALL(name_to_handle_at, -1, NULL, NULL, NULL, 0);
  CALL(open_by_handle_at, -1, NULL, 0);
  CALL(quotactl, -1, NULL, 0, NULL);
  CALL(swapon, NULL, 0);
  CALL(swapoff, NULL);
  CALL(reboot, 0, 0, 0, NULL);
  CALL(syslog, 10, NULL, 0);
  CALL(acct, "/nothing");
  CALL(settimeofday, NULL, NULL);
  CALL(clock_settime, -1, NULL);
  CALL(clock_adjtime, -1, NULL);
  CALL(adjtimex, NULL);
  CALL(sethostname, NULL, -1);
  CALL(vhangup);
#ifdef __x86_64__
  CALL(iopl, 0);
  CALL(ioperm, 0, 0, 0);
#endif
  TRY("prlimit64_read", syscall(SYS_prlimit64, 0, RLIMIT_CPU, NULL, &limit));
  TRY("prlimit64_own", syscall(SYS_prlimit64, 0, RLIMIT_CPU, &limit, NULL));
  TRY("prlimit64_other_read", syscall(SYS_prlimit64, getpid(), RLIMIT_CPU, NULL, &limit));
  TRY("prlimit64_other", syscall(SYS_prlimit64, getpid(), RLIMIT_CPU, &limit, NULL));
  TRY("personality", syscall(SYS_personality, 0xffffffff));
  TRY("personality_no_randomize", syscall(SYS_personality, 0x40000));
  TRY("personality_read_implies_exec", syscall(SYS_personality, 0x400000));
  TRY("tiocsti", syscall(SYS_ioctl, -1, TIOCSTI, page));
  TRY("tiocsti_wide", syscall(SYS_ioctl, -1, (1UL << 32) | TIOCSTI, page));
  TRY("tioclinux", syscall(SYS_ioctl, -1, TIOCLINUX, page));
  TRY("ioctl", ioctl(0, FIOCLEX));
  TRY("ptrace", ptrace(PTRACE_TRACEME, 0, NULL, NULL));
  TRY("process_vm_readv", process_vm_readv(getpid(), &v, 1, &w, 1, 0));
  TRY("socket_unix", socket(AF_UNIX, SOCK_STREAM, 0));
  TRY("socket_inet", socket(AF_INET, SOCK_DGRAM, 0));
  TRY("socket_inet6", socket(AF_INET6, SOCK_STREAM, 0));
  TRY("socket_netlink", socket(AF_NETLINK, SOCK_RAW, 0));
  TRY("socket_raw", socket(AF_INET, SOCK_RAW, 1));
  TRY("socket_packet", socket(AF_PACKET, SOCK_RAW, 0));
  TRY("socket_vsock", socket(40, SOCK_STREAM, 0));
  TRY("socket_alg", socket(38, SOCK_SEQPACKET, 0));
  TRY("socketpair_unix", socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
  TRY("socketpair_tipc", socketpair(30, SOCK_STREAM, 0, pair));
  puts("done 0");
}
