/* The system call filter for everything that runs in the sandbox. It stands alone: where the backend
 * brings none (bubblewrap), or one that rocklet's own privileges opened (Podman's, by CAP_SYS_ADMIN).
 *
 * It closes what a process could use for a richer view of the kernel: new namespaces and mounts above
 * all, keyrings that outlive a reset, and rarely used interfaces with a long record of holes. What
 * the kernel itself refuses to a process without privileges is refused here once more, where a root
 * session could otherwise reach it. ptrace and process_vm_* stay: debuggers need them, and the kernel
 * lets them touch only the agent's own processes. Refusals say EPERM; ENOSYS where a C library then
 * uses an older call. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#endif

#ifdef ARCH
/* Both machines are little-endian: an argument's low half comes first. */
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define LOW(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[i]))
#define HIGH(i) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[i]) + 4)
#define RETURN(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define PASS BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define IF(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skip, 0)
#define UNLESS(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define UNLESS_BITS(value, skip) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, value, 0, skip)
#define UNLESS_LESS(value, skip) BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, value, skip, 0)
#define IF_LESS(value, skip) BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, value, 0, skip)
#define REFUSE(nr) UNLESS(nr, 1), RETURN(EPERM)
#define MISSING(nr) UNLESS(nr, 1), RETURN(ENOSYS)

/* By number where the headers may be older than the call; above 423 all machines agree. */
enum { OPEN_TREE = 428, MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT, FSPICK, CLONE3 = 435,
       MOUNT_SETATTR = 442, QUOTACTL_FD = 443, OPEN_TREE_ATTR = 467 };
enum { NEW_NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER |
                        CLONE_NEWPID | CLONE_NEWNET };
enum { WAIT_KILLABLE = 1 << 5 };  /* of seccomp(2), from Linux 5.19 on */
enum { LINUX32 = 8, UNAME26 = 0x20000, NO_RANDOMIZE = 0x40000 };
enum { LEAST_ADDRESS = 16 };  /* bytes of the shortest IP socket address, struct sockaddr_in */

static struct sock_filter refusing[] = {
  LOAD(arch), IF(ARCH, 1), RETURN(ENOSYS),
  LOAD(nr),
#ifdef __x86_64__
  IF_LESS(0x40000000, 1), RETURN(ENOSYS),  /* the x32 calls */
  REFUSE(SYS_iopl), REFUSE(SYS_ioperm),
#endif
  MISSING(CLONE3),  /* its flags are out of sight: the C library falls back to clone */
  MISSING(SYS_io_uring_setup), MISSING(SYS_io_uring_enter), MISSING(SYS_io_uring_register),
  REFUSE(SYS_unshare), REFUSE(SYS_setns), REFUSE(SYS_mount), REFUSE(SYS_umount2),
  REFUSE(SYS_pivot_root), REFUSE(SYS_chroot), REFUSE(OPEN_TREE), REFUSE(OPEN_TREE_ATTR),
  REFUSE(MOVE_MOUNT), REFUSE(FSOPEN), REFUSE(FSCONFIG), REFUSE(FSMOUNT), REFUSE(FSPICK),
  REFUSE(MOUNT_SETATTR), REFUSE(SYS_keyctl), REFUSE(SYS_add_key), REFUSE(SYS_request_key),
  REFUSE(SYS_bpf), REFUSE(SYS_perf_event_open), REFUSE(SYS_userfaultfd), REFUSE(SYS_fanotify_init),
  REFUSE(SYS_name_to_handle_at), REFUSE(SYS_open_by_handle_at),
  REFUSE(SYS_kexec_load), REFUSE(SYS_kexec_file_load), REFUSE(SYS_init_module),
  REFUSE(SYS_finit_module), REFUSE(SYS_delete_module), REFUSE(SYS_quotactl), REFUSE(QUOTACTL_FD),
  REFUSE(SYS_swapon), REFUSE(SYS_swapoff), REFUSE(SYS_reboot), REFUSE(SYS_syslog), REFUSE(SYS_acct),
  REFUSE(SYS_settimeofday), REFUSE(SYS_clock_settime), REFUSE(SYS_clock_adjtime),
  REFUSE(SYS_adjtimex), REFUSE(SYS_sethostname), REFUSE(SYS_setdomainname), REFUSE(SYS_vhangup),
  /* Each block below ends in an answer, as it overwrites the number it was entered for. */
  UNLESS(SYS_clone, 4), LOW(0), UNLESS_BITS(NEW_NAMESPACES, 1), RETURN(EPERM), PASS,
  UNLESS(SYS_socketpair, 4), LOW(0), IF(AF_UNIX, 1), RETURN(EAFNOSUPPORT), PASS,
  /* Typing for others; line disciplines, for which the kernel would load modules. */
  UNLESS(SYS_ioctl, 8), LOW(1), REFUSE(TIOCSTI), REFUSE(TIOCLINUX), REFUSE(TIOCSETD), PASS,
  UNLESS(SYS_prlimit64, 8),  /* another process's limits may be read, not set */
  LOW(0), IF(0, 5), LOW(2), UNLESS(0, 2), HIGH(2), IF(0, 1), RETURN(EPERM), PASS,
  UNLESS(SYS_personality, 9),  /* READ_IMPLIES_EXEC and the like weaken a process's own defences */
  LOW(0), IF(0xffffffff, 6), IF(0, 5), IF(LINUX32, 4), IF(UNAME26, 3), IF(UNAME26 | LINUX32, 2),
  IF(NO_RANDOMIZE, 1), RETURN(EPERM), PASS,
  PASS,
};

/* Addresses lie in memory, which a filter cannot read: the watcher does (watch.c). Its work is spared
 * where the arguments tell that no IP address is given. Vsock, for one, reaches past the network
 * namespace, so other families are refused; the watcher notes that and gives the answer. */
#define SOCKETS(family, raw)                                                                       \
  UNLESS(SYS_socket, 11), LOW(0), IF(AF_UNIX, 8), IF(AF_NETLINK, 7), IF(AF_INET, 2),               \
  IF(AF_INET6, 1), family, LOW(1), BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 15), UNLESS(SOCK_RAW, 1),   \
  raw, PASS
#define OBSERVE BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF)

static struct sock_filter observing[] = {
  LOAD(arch), IF(ARCH, 1), PASS,  /* foreign calls: the other filter's */
  LOAD(nr),
  UNLESS(SYS_connect, 4), LOW(2), UNLESS_LESS(LEAST_ADDRESS, 1), PASS, OBSERVE,
  UNLESS(SYS_sendto, 9), LOW(5), UNLESS_LESS(LEAST_ADDRESS, 1), PASS, LOW(4), UNLESS(0, 2), HIGH(4),
  IF(0, 1), OBSERVE, PASS,
  UNLESS(SYS_sendmsg, 1), OBSERVE, UNLESS(SYS_sendmmsg, 1), OBSERVE,
  SOCKETS(OBSERVE, OBSERVE), PASS,
};
static struct sock_filter blind[] = {
  LOAD(arch), IF(ARCH, 1), PASS,
  LOAD(nr),
  SOCKETS(RETURN(EAFNOSUPPORT), RETURN(EPERM)), PASS,
};
#endif

/* Confines the calling thread for good. Returns 0, or -1 with errno. To be called with no_new_privs
 * set, like the next. */
int install_filter(void) {
#ifdef ARCH
  struct sock_fprog program = {sizeof refusing / sizeof *refusing, refusing};
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
#else
  return 0;
#endif
}

/* Puts the calling thread, and all its later children, under observation. Returns 0, or -1 with errno;
 * *listener is the descriptor to watch, or -1 where the kernel has none: then sockets of other families
 * are refused all the same, and no attempt is seen. */
int install_observer(int *listener) {
  *listener = -1;
#ifdef ARCH
  struct sock_fprog program = {sizeof observing / sizeof *observing, observing};
  unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
  /* A signal cannot make an observed call start over (Go sends itself many), where the kernel can. */
  *listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | WAIT_KILLABLE, &program);
  if (*listener < 0) *listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
  if (*listener >= 0) return 0;
  program = (struct sock_fprog){sizeof blind / sizeof *blind, blind};
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
#else
  return 0;
#endif
}
