/* The root of the sandbox: an overlay whose upper layer lies in one tmpfs, so that everything that is
 * ever written, work directory and system files alike, has one hard limit and is gone with one unmount.
 *
 * Rocklet itself stays outside. Its children are confined to the overlay with chroot, which none of
 * them may call again. The lower layer is the image, without what is mounted over it. `userxattr` lets
 * a user namespace mount it; directories of the image are then copied rather than redirected when
 * renamed, so the upper layer holds whole names. /dev/shm is a tmpfs of its own.
 *
 * Left out: anything of this where the machine allows no mounts; there (the process backend) the
 * sandbox's root is the host's, and a reset empties directories (episode.c). */
#define _GNU_SOURCE
#include "rocklet.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PLACE "/run/rome"
#define UPPER PLACE "/upper"
#define ROOT PLACE "/root"

/* Mount points of the host's making, which the image shows as empty: they are no part of it. */
const char *const HIDDEN[] = {"rocklet", "rome", ".containerenv", NULL};  /* in /run */

/* What is mounted over the root is no part of it either. */
const char *const KERNEL_TREES[] = {"dev", "proc", "sys", NULL};

char root_error[200];  /* why the root could not be made */

int has_overlay(void) { return cfg.disk > 0; }

const char *root_path(void) { return has_overlay() ? ROOT : "/"; }

/* Turns a path as rocklet sees it, a link in /proc for one, into the one that its children see. */
void as_seen_inside(char *path) {
  size_t n = strlen(ROOT);
  if (!has_overlay() || strncmp(path, ROOT, n) || (path[n] && path[n] != '/')) return;
  memmove(path, path + n, strlen(path + n) + 1);
  if (!*path) strcpy(path, "/");
}

const char *upper_path(void) { return UPPER; }

static int not_made(const char *what) {
  int error = errno;
  snprintf(root_error, sizeof root_error,
           "its writable root cannot be made (%s: %s): it needs Linux 5.13 or later with overlayfs and "
           "tmpfs in user namespaces", what, strerror(error));
  return error ? error : EIO;
}

/* Opens a directory of the sandbox by its absolute path, through no symbolic link. */
int open_inside(const char *path) {
  int dir = open(root_path(), O_DIRECTORY | O_RDONLY | O_CLOEXEC);
  if (!has_overlay() && dir >= 0) {  /* a path of the host's, which may hold links */
    close(dir);
    return open(path, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
  }
  while (dir >= 0) {
    char name[NAME_MAX + 1];
    while (*path == '/') path++;
    size_t n = strcspn(path, "/");
    if (!n) return dir;
    if (n > NAME_MAX || (n == 2 && !strncmp(path, "..", 2))) return close(dir), errno = EINVAL, -1;
    memcpy(name, path, n), name[n] = 0, path += n;
    int sub = openat(dir, name, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC), error = errno;
    close(dir);
    dir = sub, errno = error;
  }
  return -1;
}

/* Makes sure that a directory is there, and gives it owner, mode and a time that tells nothing. */
static int settle(int root, const char *name, uid_t owner, mode_t mode) {
  mkdirat(root, name, mode);
  int fd = openat(root, name, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC), error = 0;
  if (fd < 0 || (separate() && fchown(fd, owner, owner)) || fchmod(fd, mode) || futimens(fd, EPOCH))
    error = errno;
  if (fd >= 0) close(fd);
  return error ? (errno = error, -1) : 0;
}

static int bind_tree(int root, const char *name, unsigned long how) {
  char from[64], to[64];
  snprintf(from, sizeof from, "/%s", name), snprintf(to, sizeof to, ROOT "/%s", name);
  mkdirat(root, name, 0755);
  return mount(from, to, NULL, MS_BIND | how, NULL);
}

/* /dev is there to be used, not written to: its devices may be the machine's own files, and their
 * owner's number root's inside (bubblewrap as root), who could change their modes. /proc/1 cannot be
 * told to die first. */
static int mount_kernel_trees(int root) {
  const unsigned long again = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID;
  struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY}, writable = {.attr_clr = MOUNT_ATTR_RDONLY};
  char size[64];
  utimensat(AT_FDCWD, "/dev", EPOCH, 0);
  if (bind_tree(root, "dev", MS_REC)) return not_made("/dev");
  if (mount(NULL, ROOT "/dev", NULL, again | MS_NOEXEC, NULL) &&
      mount(NULL, ROOT "/dev", NULL, again, NULL)) return not_made("/dev");
  if (syscall(SYS_MOUNT_SETATTR, AT_FDCWD, ROOT "/dev", AT_RECURSIVE, &attr, sizeof attr) ||
      (syscall(SYS_MOUNT_SETATTR, AT_FDCWD, ROOT "/dev/pts", 0, &writable, sizeof writable) &&
       errno != EINVAL && errno != ENOENT)) return not_made("/dev");  /* no terminals: no such mount */
  snprintf(size, sizeof size, "size=%ldm,nr_inodes=%ld,mode=1777", cfg.disk, cfg.disk * 256 + 4096);
  if (mount("shm", ROOT "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, size)) return not_made("/dev/shm");
  utimensat(AT_FDCWD, ROOT "/dev/shm", EPOCH, 0);
  if (bind_tree(root, "proc", MS_REC)) return not_made("/proc");
  if (mount("/proc/1", ROOT "/proc/1", NULL, MS_BIND, NULL) ||
      mount(NULL, ROOT "/proc/1", NULL, again | MS_NODEV | MS_NOEXEC, NULL)) return not_made("/proc/1");
  if (bind_tree(root, "sys", MS_REC)) return not_made("/sys");
  /* With all below it: Podman mounts a writable tmpfs for the old control groups there. */
  if (syscall(SYS_MOUNT_SETATTR, AT_FDCWD, ROOT "/sys", AT_RECURSIVE, &attr, sizeof attr))
    return not_made("/sys");
  return 0;
}

static int put(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC), n = strlen(text);
  int done = fd < 0 ? -1 : write(fd, text, n);
  if (fd >= 0) close(fd);
  return done == n ? 0 : -1;
}

/* In a new process, where one user only can be mapped and rocklet, being root, is that user: a user
 * namespace in which the same user is the agent. Returns 0 or -1. */
static int become_agent(void) {
  char uids[32], gids[32];
  snprintf(uids, sizeof uids, "%d 0 1", cfg.uid), snprintf(gids, sizeof gids, "%d 0 1", cfg.uid);
  return unshare(CLONE_NEWUSER) || put("/proc/self/setgroups", "deny") ||
         put("/proc/self/uid_map", uids) || put("/proc/self/gid_map", gids) ? -1 : 0;
}

/* --- the image's own programs, for the verifier ------------------------------------------------- */

/* Whether root inside, or files from elsewhere, may have changed programs since the last reset. */
int tainted;

static int image_lacks(const char *name) {
  struct stat st;
  char path[64];
  snprintf(path, sizeof path, "/%s", name);
  return lstat(path, &st) && errno == ENOENT;
}

/* Lays what the image has under `name` over what the agent has there. A name that is another kind of
 * thing than in the image, or not in the image at all, is moved aside. */
static int pin(int at, const char *name, const char *image) {
  static unsigned serial;
  char aside[64], theirs[PATH_MAX] = "", ours[PATH_MAX] = "", to[64];
  struct stat want, have;
  snprintf(aside, sizeof aside, ".rome-aside-%d-%u", getpid(), serial++);
  int lacks = lstat(image, &want), there = !fstatat(at, name, &have, AT_SYMLINK_NOFOLLOW);
  int link = !lacks && S_ISLNK(want.st_mode);
  if (link && (readlink(image, ours, sizeof ours - 1) < 0 ||
               (there && readlinkat(at, name, theirs, sizeof theirs - 1) < 0))) theirs[0] = 0;
  int same = there && !lacks && (want.st_mode & S_IFMT) == (have.st_mode & S_IFMT) && !strcmp(ours, theirs);
  if (there && !same && renameat(at, name, at, aside)) return -1;
  if (lacks) return 0;
  if (link) return same ? 0 : symlinkat(ours, at, name);
  if (!same && (S_ISDIR(want.st_mode) ? mkdirat(at, name, 0755) : mknodat(at, name, S_IFREG | 0644, 0)))
    return -1;
  int fd = openat(at, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
  snprintf(to, sizeof to, "/proc/self/fd/%d", fd);
  int bad = fd < 0 || mount(image, to, NULL, MS_BIND | MS_REC, NULL);
  if (fd >= 0) close(fd);
  return bad ? -1 : 0;
}

/* Of /etc, what makes programs run other code: links to them, modules and settings of interpreters and
 * libraries. What of it the image lacks must be missing. */
static const char *const ETC[] = {"ld.so.preload", "ld.so.cache", "gitconfig"};
static const char *const ETC_LIKE[] = {"alternatives", "perl", "python", "java", "ssl", "ld.so."};
enum { MOST_ETC = 64 };
static char etc_names[MOST_ETC][NAME_MAX + 1];
static int etc_count;

/* Before the process is made, which may not read directories: what to pin there. 0 or an errno. */
int list_pinned(void) {
  DIR *d = opendir("/etc");
  etc_count = 0;
  for (unsigned i = 0; i < sizeof ETC / sizeof *ETC; i++) strcpy(etc_names[etc_count++], ETC[i]);
  for (struct dirent *e; d && (e = readdir(d));)
    for (unsigned i = 0; i < sizeof ETC_LIKE / sizeof *ETC_LIKE; i++) {
      if (strncmp(e->d_name, ETC_LIKE[i], strlen(ETC_LIKE[i]))) continue;
      if (etc_count == MOST_ETC) return closedir(d), E2BIG;
      strcpy(etc_names[etc_count++], e->d_name);
      break;
    }
  if (d) closedir(d);
  return 0;
}

/* In a new process, before it enters the root: in a mount namespace of its own the image's programs
 * and libraries lie over those that root inside may have replaced, so that a verdict comes from the
 * image's bash, tools and loader. Everything else is as the agent left it. Returns 0 or -1. */
int pin_programs(void) {
  static const char *const dirs[] = {"bin", "sbin", "usr", "lib", "lib32", "lib64", "libx32"};
  char image[NAME_MAX + 8];
  if (!has_overlay()) return 0;
  if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return -1;
  int root = open(ROOT, O_DIRECTORY | O_RDONLY | O_CLOEXEC), bad = root < 0;
  for (unsigned i = 0; i < sizeof dirs / sizeof *dirs && !bad; i++) {
    snprintf(image, sizeof image, "/%s", dirs[i]);
    bad = pin(root, dirs[i], image);
  }
  int etc = bad ? -1 : openat(root, "etc", O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (!bad && etc < 0 && !image_lacks("etc")) {  /* gone, or a link: the loader reads what is there */
    bad = pin(root, "etc", "/etc");
  }
  for (int i = 0; i < etc_count && !bad && etc >= 0; i++) {
    snprintf(image, sizeof image, "/etc/%s", etc_names[i]);
    bad = pin(etc, etc_names[i], image);
  }
  if (etc >= 0) close(etc);
  if (root >= 0) close(root);
  return bad ? -1 : 0;
}

/* Confines a new process to the sandbox's root. Returns 0 or -1. */
int enter_root(void) {
  if (!has_overlay()) return 0;
  if (cfg.single && become_agent()) return -1;  /* first: who is confined may make no namespace */
  return chroot(ROOT) || chdir("/") ? -1 : 0;
}

/* SysV objects are no process's memory: the kernel could only kill everything else, and us, for them.
 * So they are bounded, as far as the kernel lets the owner of an IPC namespace do it (Linux 6.9): shared
 * segments together like the disk, queues to half a MiB, semaphores to some MiB. Returns 0 or an errno. */
static int bound_ipc(void) {
  const unsigned long open = MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_NOEXEC;
  char pages[32];
  if (mount(NULL, "/proc/sys", NULL, open, NULL)) return 0;  /* not a mount of its own: never writable */
  snprintf(pages, sizeof pages, "%ld", (cfg.disk << 20) / sysconf(_SC_PAGESIZE));
  put("/proc/sys/kernel/shmall", pages);
  put("/proc/sys/kernel/msgmni", "32");
  put("/proc/sys/kernel/sem", "250 32000 32 128");
  return mount(NULL, "/proc/sys", NULL, open | MS_RDONLY, NULL) ? not_made("/proc/sys") : 0;
}

/* Once, before the first mount_root: what the host mounted for the start goes, and before a restore
 * into the container's own root, everything that Podman mounted over its files. Returns 0 or an errno. */
int root_begin(void) {
  static const char *const files[] = {"/run/rocklet", "/run/.containerenv", "/etc/resolv.conf",
                                      "/etc/hosts", "/etc/hostname", NULL};
  mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
  umount2(PLACE, MNT_DETACH);
  for (int i = 0; cfg.apply && files[i]; i++) umount2(files[i], MNT_DETACH);
  return has_overlay() ? bound_ipc() : 0;
}

/* Where the root is not ours to make: devices may be the machine's own files, and the agent their owner,
 * who could change their modes. Returns 0 or an errno. */
int seal_devices(void) {
  struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
  static const char *const names[] = {"null", "zero", "full", "random", "urandom", "tty", NULL};
  for (int i = 0; names[i]; i++) {
    char path[32];
    snprintf(path, sizeof path, "/dev/%s", names[i]);
    if (syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, 0, &attr, sizeof attr)) return not_made(path);
  }
  return 0;
}

/* Mounts the sandbox's root anew; what was in an old one is gone. Returns 0 or an errno. */
int mount_root(void) {
  static int mounted;
  char options[200];
  if (mounted && umount2(PLACE, MNT_DETACH)) return not_made("unmounting " PLACE);
  mounted = 0;
  snprintf(options, sizeof options, "size=%ldm,nr_inodes=%ld,mode=0700", cfg.disk,
           cfg.disk * 256 + 4096);  /* an inode for every page, and some for what is empty */
  if (mount("rome", PLACE, "tmpfs", MS_NOSUID | MS_NODEV, options)) return not_made("tmpfs on " PLACE);
  mounted = 1;
  if (mkdir(UPPER, 0755) || mkdir(PLACE "/scratch", 0700) || mkdir(ROOT, 0755)) return not_made(PLACE);
  if (mount("rome", ROOT, "overlay", MS_NOSUID | MS_NODEV,
            "lowerdir=/,upperdir=" UPPER ",workdir=" PLACE "/scratch,userxattr"))
    return not_made("overlay");
  int root = open(ROOT, O_DIRECTORY | O_RDONLY | O_CLOEXEC), error = 0;
  if (root < 0) return not_made(ROOT);
  for (int i = 0; HIDDEN[i]; i++) {
    char path[64];
    snprintf(path, sizeof path, "run/%s", HIDDEN[i]);
    if (unlinkat(root, path, 0) && errno == EISDIR) unlinkat(root, path, AT_REMOVEDIR);
  }
  if (!error) error = mount_kernel_trees(root);
  if (!error && settle(root, "run", 0, 0755)) error = not_made("/run");
  if (!error && cfg.keep && bind_tree(root, cfg.work + 1, MS_REC)) error = not_made(cfg.work);
  if (!error && !cfg.keep && settle(root, cfg.work + 1, cfg.uid, 0755)) error = not_made(cfg.work);
  if (!error && settle(root, "tmp", 0, 01777)) error = not_made("/tmp");
  if (!error && settle(root, ".", 0, 0755)) error = not_made("/");
  close(root);
  return error;
}
