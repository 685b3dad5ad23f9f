/* What the parts of rocklet share; main.c says what rocklet is. */
#ifndef ROCKLET_H
#define ROCKLET_H

#include <limits.h>
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/types.h>

enum { RUN = 1, LIST = 4, VERIFY, RESET, INFO };
enum { OPEN = 8, STATE, START, SEND, POLL, RESIZE, SNAPSHOT, RESTORE };
enum { FILE_OPEN = 20, FILE_READ, FILE_WRITE, FILE_FINISH, FILE_DROP, STAT, REMOVE };
enum { LISTEN = 30, WATCH };
enum { SYS_MOUNT_SETATTR = 442 };  /* newer than many a C library */
/* MISPLACED: not at the offset of the end. */
enum { TIMED_OUT = 1, TRUNCATED = 2, RUNNING = 4, MORE = 8, MISPLACED = 16 };
enum { MAX_NAME = 4096, MAX_TEXT = 16 << 20, MAX_STATE = 4 << 20 };
enum { MAX_SESSIONS = 64, MAX_CONNECTIONS = 160, MAX_TITLE = 64 };
/* Descriptors of a shell: the text of its command, where its state goes, what wakes it, and what it
 * reports on. */
enum { TEXT_FD = 250, STATE_FD = 251, WAKE_FD = 253, REPORT_FD = 254 };

struct request { uint32_t op, timeout_ms, mode, as_root, name_len, data_len; };
struct reply { int32_t error, exit_code; uint32_t flags, len; uint64_t total; };

struct config {
  uid_t uid, own;                    /* of the agent, of rocklet */
  const char *work, *bash, *boot;  /* bash: NULL if the image has none */
  const char *clean[8];              /* writable places beside the work directory */
  int cleans, listen;                /* listen: inherited socket, or -1 */
  long output, fsize, nproc, as, nofile;  /* bytes kept of an output; rlimits, 0 for none */
  int apply;                         /* no sandbox: a restore writes into the container's own root */
  int keep;                          /* the work directory is the user's own: nothing is emptied */
  int seal;                          /* the root is of the host's making, and stays as it is */
  int single;                        /* one user only: the agent is our user by another number */
  long disk;                         /* MiB of the writable root; 0: the host's root is used */
};
extern struct config cfg;

/* Output keeps its head and its tail; once longer than both, all of it goes to a file (spool). */
struct output {
  char *buf;
  size_t head, tail, len;
  uint64_t total, given;             /* given: of `total`, what polls have handed over */
  uid_t uid;                         /* who owns the file */
  int spool;
  char path[64];
};

/* sid: the session that its processes are in, by which they are found. */
struct shell { pid_t pid, sid; int pidfd, text, state, wake, report, out, ready; };

/* A terminal and the process that leads its session, from which every shell in it is forked. */
struct tty { pid_t holder; int master, slave, control; unsigned short rows, cols; unsigned orders; };

/* How a program is started: user, place, environment, and descriptors as pairs {from, to}. `home` is
 * made for the user if it is not NULL. */
struct child {
  uid_t uid;
  gid_t gid;
  int as_root;                       /* keeps the capabilities that root has inside */
  const char *cwd, *home;
  char *const *env;
  const int (*fds)[2];
  int n;
  int pinned;                        /* runs the image's programs, whatever became of them */
};

struct moment { unsigned long long tick; pid_t last_pid; };
enum phase { IDLE, BUSY, ENDED };    /* ENDED: the result waits to be polled */
struct command { enum phase phase; int64_t deadline; struct moment since; int code; uint32_t flags; };

/* A file that a connection has open: an upload, or a download (no temp, path, mode then). */
enum { OPEN_UPLOAD = 1, OPEN_DOWNLOAD };
struct file {
  int open, fd, dir, as_root;
  mode_t mode;
  uint64_t size;
  int64_t mtime;                   /* nanoseconds: to be set, or as it was found */
  unsigned generation;
  char temp[40], *path;
};
struct session {
  int conn, owner, open;
  char title[MAX_TITLE + 1];         /* its name, for people */
  uid_t uid;
  gid_t gid;
  char *home, **env;                 /* NULL: the user brings none; the block that spawn passes on */
  unsigned seq, generation;
  struct shell shell;
  struct tty tty;                    /* rows 0: none */
  struct output out;
  struct file file;
  struct command command;
  char start[PATH_MAX], cwd[PATH_MAX];
  char heard[4 * PATH_MAX + 64];     /* of a report; 4000 characters, in any locale */
  size_t heard_len;
};

/* process.c */
struct proc { pid_t pid, ppid, sid; char state; unsigned long long start; };
int64_t now_ms(void);
int left(int64_t deadline);
void pause_ms(int ms);
int separate(void);
char process_state(pid_t pid);
int count_processes(void);
int kill_all(int64_t deadline);
struct moment this_moment(void);
int halt_since(const struct shell *sh, struct moment since, struct proc **halted);
void kill_listed(const struct proc *listed, int n);
void kill_since(const struct shell *sh, struct moment since);
int lock_gate(int64_t deadline);
void unlock_gate(void);
pid_t spawn(char *const argv[], const struct child *c);
void confine_apply(void);
_Noreturn void become(char *const argv[], const struct child *c);

int lock_disk(int alone, int64_t deadline);
void unlock_disk(void);
struct frozen { struct proc *before; int n; };
int freeze_all(struct frozen *f, int64_t deadline);
void thaw_all(struct frozen *f);
void note_shell(pid_t pid);
void name_processes(FILE *to);

/* seccomp.c */
int install_filter(void);
int install_observer(int *listener);

/* net.c */
int do_listen(int conn, const char *data, size_t n);

/* watch.c */
int watching(void);
int watch_children(void);
int do_watch(int conn);

/* wire.c */
void output_init(struct output *o, size_t cap);
void output_note(struct output *o, const char *format, ...);
void output_clear(struct output *o);
void output_forget(void);
void drain(struct output *o, int fd);
struct iovec;
int send_all(int fd, struct iovec *v, int n);
int receive(int fd, void *to, size_t n);
int reply(int fd, int error, const void *data, size_t n);
int fail(int fd, int error, const char *what);
int refuse(int fd, int error, const char *why);
int reply_output(int fd, struct output *o, int exit_code, uint32_t flags);
int reply_progress(int fd, struct output *o, int exit_code, uint32_t flags);
void close_fd(int *fd);

/* shell.c */
extern unsigned generation;  /* counts resets; sessions of before forget what they knew */
int shell_start(struct session *s, const char *state, size_t n, int64_t deadline);
int shell_revive(struct session *s, int restore, int64_t deadline);
void shell_end(struct session *s);
void attend(struct session *s);
int run_is_refused(struct session *s);
int do_run(struct session *s, const char *text, size_t n, int timeout_ms);
int do_start(struct session *s, const char *text, size_t n, int timeout_ms);
int do_poll(struct session *s, int timeout_ms, int stop);
int do_state(struct session *s, int timeout_ms);

/* session.c */
void session_init(struct session *s);
void session_end(struct session *s);
extern const char ROOT_PATH[];
int list_sessions(char *text, size_t size);
int do_open(struct session *s, const char *name, const char *data, size_t n, int timeout_ms);

/* pty.c */
int tty_start(struct session *s, char *const argv[], const struct child *c);
void tty_end(struct tty *t);
int tty_alive(const struct tty *t);
pid_t tty_spawn(struct tty *t, const struct child *c);
void tty_ready(struct session *s);
void tty_settle(struct tty *t);
int do_send(struct session *s, const char *data, size_t n, int timeout_ms);
int do_resize(struct session *s, unsigned rows, unsigned cols);

/* files.c */
struct stat;
struct file_stat {                 /* as it is sent; mtime in nanoseconds */
  uint32_t mode, uid, gid, links;
  uint64_t size, blocks, device;
  int64_t mtime;
};
extern struct timespec EPOCH[2];
/* Opens the directory that holds `path`, which is cut up; *leaf is the last name. Missing directories
 * are made if `make`. Returns a descriptor or -1 with errno. */
int open_parent(char *path, char **leaf, int make, int as_root);
struct file_stat describe(const struct stat *st);
int do_make_dir(int conn, const struct request *q, char *name);
int do_stat(int conn, char *name);
int do_list(int conn, char *name, uint32_t most);
int do_remove(int conn, char *name, int timeout_ms);

/* transfer.c */
int do_file(struct session *s, const struct request *q, char *name, const char *data);
void file_leave(struct file *f);  /* its connection ended: an upload waits to be resumed */
void file_forget(void);           /* after a reset */

/* root.c */
extern const char *const HIDDEN[];
extern const char *const KERNEL_TREES[];
extern char root_error[200];
int has_overlay(void);
const char *root_path(void);
const char *upper_path(void);
int open_inside(const char *path);
void as_seen_inside(char *path);
int enter_root(void);
extern int tainted;
int list_pinned(void);
int pin_programs(void);
int root_begin(void);
int seal_devices(void);
int mount_root(void);

/* snapshot.c, restore.c */
int do_snapshot(int conn, int timeout_ms);
int do_restore(struct session *s, const struct request *q);
int remove_tree(int at, const char *name);

/* episode.c */
int prepare(int64_t deadline);
int do_verify(struct session *s, const char *text, size_t n, int timeout_ms);
int do_reset(struct session *s, int timeout_ms);

#endif
