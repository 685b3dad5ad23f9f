/* A small system call filter for everything that runs in the sandbox. Podman brings a stricter one;
 * bubblewrap none. It closes what an unprivileged process could use to gain a richer view of the
 * kernel: new user namespaces above all, keyrings that outlive a reset, and rarely used interfaces
 * with a long record of holes. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#endif

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define LOAD_HIGH(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field) + 4)
#define RETURN(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define PASS BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define ALLOWED(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skip, 0)
#define UNLESS(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define REFUSE(nr, error) UNLESS(nr, 1), RETURN(error)

/* Returns 0, or -1 with errno. To be called with no_new_privs set. */
int install_filter(void) {
#ifdef ARCH
  static struct sock_filter code[] = {
    LOAD(arch), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0), RETURN(ENOSYS),
    LOAD(nr),
#ifdef __x86_64__
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1), RETURN(ENOSYS),  /* the x32 calls */
#endif
    REFUSE(SYS_unshare, EPERM), REFUSE(SYS_setns, EPERM), REFUSE(SYS_mount, EPERM),
    REFUSE(SYS_umount2, EPERM), REFUSE(SYS_pivot_root, EPERM), REFUSE(SYS_keyctl, EPERM),
    REFUSE(SYS_add_key, EPERM), REFUSE(SYS_request_key, EPERM), REFUSE(SYS_bpf, EPERM),
    REFUSE(SYS_perf_event_open, EPERM), REFUSE(SYS_userfaultfd, EPERM),
    REFUSE(SYS_open_by_handle_at, EPERM), REFUSE(SYS_kexec_load, EPERM),
    REFUSE(SYS_io_uring_setup, ENOSYS), REFUSE(SYS_fsopen, EPERM), REFUSE(SYS_move_mount, EPERM),
    REFUSE(SYS_fsconfig, EPERM), REFUSE(SYS_fsmount, EPERM), REFUSE(SYS_fspick, EPERM),
    REFUSE(SYS_open_tree, EPERM), REFUSE(SYS_MOUNT_SETATTR, EPERM), REFUSE(SYS_chroot, EPERM),
    UNLESS(SYS_prlimit64, 8),  /* new limits for others: rocklet may have the same user */
    LOAD(args[0]), ALLOWED(0, 5), LOAD(args[2]), UNLESS(0, 2), LOAD_HIGH(args[2]), ALLOWED(0, 1),
    RETURN(EPERM), PASS,
    REFUSE(SYS_clone3, ENOSYS),  /* its flags are out of sight: the C library falls back to clone */
    UNLESS(SYS_socket, 7),  /* vsock, for one, reaches past the network namespace */
    LOAD(args[0]), ALLOWED(AF_UNIX, 4), ALLOWED(AF_INET, 3), ALLOWED(AF_INET6, 2),
    ALLOWED(AF_NETLINK, 1), RETURN(EAFNOSUPPORT), PASS,
    UNLESS(SYS_clone, 3),
    LOAD(args[0]), BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_NEWUSER, 0, 1), RETURN(EPERM),
    PASS,
  };
  struct sock_fprog program = {sizeof code / sizeof *code, code};
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
#else
  return 0;
#endif
}
