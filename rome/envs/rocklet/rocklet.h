/* What the parts of rocklet share; main.c says what rocklet is. */
#ifndef ROCKLET_H
#define ROCKLET_H

#include <limits.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/types.h>

enum { RUN = 1, LIST = 4, VERIFY, RESET, INFO };
enum { FILE_OPEN = 20, FILE_READ, FILE_WRITE, FILE_FINISH, FILE_DROP, STAT, REMOVE };
enum { TIMED_OUT = 1, TRUNCATED = 2, MISPLACED = 8 };  /* MISPLACED: not at the offset of the end */
enum { MAX_NAME = 4096, MAX_TEXT = 16 << 20, MAX_STATE = 4 << 20, MAX_SESSIONS = 24 };
/* Descriptors of a shell: the text of its command, what wakes it, and what it reports on. */
enum { TEXT_FD = 250, WAKE_FD = 253, REPORT_FD = 254 };

struct request { uint32_t op, timeout_ms, mode, as_root, name_len, data_len; };
struct reply { int32_t error, exit_code; uint32_t flags, len; uint64_t total; };

struct config {
  uid_t uid, own;                    /* of the agent, of rocklet */
  const char *work, *bash, *boot;  /* bash: NULL if the image has none */
  const char *clean[8];              /* writable places beside the work directory */
  int cleans, listen;                /* listen: inherited socket, or -1 */
  long output, fsize, nproc, as, nofile;  /* bytes kept of an output; rlimits, 0 for none */
};
extern struct config cfg;

/* Output keeps its head and its tail; once longer than both, all of it goes to a file (spool). */
struct output { char *buf; size_t head, tail, len; uint64_t total; int spool; char path[64]; };
struct shell { pid_t pid; int pidfd, text, wake, report, out, ready; size_t text_len; };
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
  int conn, owner;
  unsigned seq, generation;
  struct shell shell;
  struct output out;
  struct file file;
  char cwd[PATH_MAX];
};

/* process.c */
struct proc { pid_t pid, ppid, sid; char state; unsigned long long start; };
struct moment { unsigned long long tick; pid_t last_pid; };
int64_t now_ms(void);
int left(int64_t deadline);
void pause_ms(int ms);
int separate(void);
char process_state(pid_t pid);
int count_processes(void);
int kill_all(int64_t deadline);
struct moment this_moment(void);
int halt_since(pid_t shell, struct moment since, struct proc **halted);
void kill_listed(const struct proc *listed, int n);
void kill_since(pid_t shell, struct moment since);
int lock_gate(int64_t deadline);
void unlock_gate(void);
pid_t spawn(char *const argv[], const char *cwd, int as_root, const int (*fds)[2], int n);

/* seccomp.c */
int install_filter(void);

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
int reply_output(int fd, struct output *o, int exit_code, uint32_t flags);
void close_fd(int *fd);

/* shell.c */
extern unsigned generation;  /* counts resets; sessions of before forget what they knew */
int shell_start(struct session *s, const char *state, size_t n, int64_t deadline);
int shell_revive(struct session *s, int restore, int64_t deadline);
void shell_end(struct session *s);
int do_run(struct session *s, const char *text, size_t n, int timeout_ms);

/* files.c */
struct stat;
struct file_stat {                 /* as it is sent; mtime in nanoseconds */
  uint32_t mode, uid, gid, links;
  uint64_t size, blocks, device;
  int64_t mtime;
};
extern const struct timespec EPOCH[2];
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

/* episode.c */
int prepare(int64_t deadline);
int do_verify(struct session *s, const char *text, size_t n, int timeout_ms);
int do_reset(struct session *s, int timeout_ms);

#endif
