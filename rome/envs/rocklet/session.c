/* Sessions: whom a shell runs as, where, in which environment. A connection becomes one by OPEN; one
 * that only moves files never has a shell. Opened again, it gets a fresh shell. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct session *table[MAX_SESSIONS];
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

/* What OPEN brings before directory, environment ("NAME=VALUE\0" each) and state. */
struct opening { uint32_t uid, gid, rows, cols, cwd_len, env_len; };
#define AGENT UINT32_MAX

void session_init(struct session *s) {
  s->shell = (struct shell){.pidfd = -1, .text = -1, .state = -1, .wake = -1, .report = -1, .out = -1};
  s->tty = (struct tty){.master = -1, .slave = -1, .control = -1};
  s->generation = generation;
}

/* Enters a session in the table, or takes it out. Returns 0, or -1 if the table is full. */
static int list_session(struct session *s, int present) {
  const struct session *old = present ? NULL : s;
  int done = 0;
  pthread_mutex_lock(&table_lock);
  for (int i = 0; i < MAX_SESSIONS && !done; i++)
    if (table[i] == old) table[i] = present ? s : NULL, done = 1;
  pthread_mutex_unlock(&table_lock);
  return done ? 0 : -1;
}

/* Writes "sessions N", and for each "session NAME" with 1 where a command runs. Returns their number. */
int list_sessions(char *text, size_t size) {
  size_t len = 0;
  int n = 0;
  *text = 0;
  pthread_mutex_lock(&table_lock);
  for (int i = 0; i < MAX_SESSIONS; i++) {
    if (!table[i]) continue;
    n++;
    len += snprintf(text + len, size - len, "session %s %d\n", table[i]->title,
                    table[i]->command.phase == BUSY);
  }
  pthread_mutex_unlock(&table_lock);
  return n;
}

/* With its session end the processes it started. */
void session_end(struct session *s) {
  if (s->open) list_session(s, 0);
  if (s->shell.pid) {
    kill(s->shell.pid, SIGSTOP);
    kill_since(&s->shell, (struct moment){0});
    shell_end(s);
  }
  tty_end(&s->tty);
  free(s->home), free(s->env);
  s->open = 0, s->home = NULL, s->env = NULL;
}

const char ROOT_PATH[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

static int names_same(const char *a, const char *b) {
  size_t n = strcspn(a, "=");
  return n == strcspn(b, "=") && !strncmp(a, b, n);
}

/* Makes the environment: what OPEN brought, and what belongs to the user where it brought nothing else.
 * One block, pointers first. */
static char **make_environment(const struct session *s, const char *own, size_t own_len) {
  char home[PATH_MAX + 8], user[32], logname[32], number[16];
  snprintf(number, sizeof number, "%u", s->uid);
  const char *name = s->home ? number : s->uid || !separate() ? "agent" : "root";
  snprintf(home, sizeof home, "HOME=%s", s->home ? s->home : s->uid || !separate() ? cfg.work : "/root");
  snprintf(user, sizeof user, "USER=%s", name), snprintf(logname, sizeof logname, "LOGNAME=%s", name);
  const char *base[] = {home, user, logname, "SHELL=/bin/bash", s->tty.rows ? "TERM=xterm-256color" : "TERM=dumb",
    "LC_ALL=C", "TZ=UTC", separate() && !s->uid ? ROOT_PATH : "PATH=/usr/local/bin:/usr/bin:/bin"};
  size_t n = 0, bases = sizeof base / sizeof *base, size = own_len;
  for (size_t i = 0; i < own_len; i++) n += !own[i];
  for (size_t i = 0; i < bases; i++) size += strlen(base[i]) + 1;
  char **env = malloc((n + bases + 1) * sizeof *env + size), *text = (char *)(env + n + bases + 1);
  if (!env) return NULL;
  memcpy(text, own, own_len);
  char *end = text + own_len;
  n = 0;
  for (char *p = text; p < end; p += strlen(p) + 1) env[n++] = p;
  size_t owns = n;
  for (size_t i = 0; i < bases; i++) {
    size_t k = 0;
    while (k < owns && !names_same(env[k], base[i])) k++;
    if (k == owns) env[n++] = strcpy(end, base[i]), end += strlen(end) + 1;
  }
  env[n] = NULL;
  return env;
}

/* Whether the user may be had here; says why not. */
static const char *user_is_refused(uint32_t uid, uint32_t gid) {
  if (uid == AGENT) return NULL;
  if (!separate() && uid != cfg.uid) return "this sandbox has one user only: user must be 'agent'";
  if ((uid && uid < 1000) || uid > 65533 || gid > 65533 || (uid && gid < 1000))
    return "a user is 0 or from 1000 to 65533, and so is its group";
  return NULL;
}

int do_open(struct session *s, const char *name, const char *data, size_t n, int timeout_ms) {
  struct opening o;
  if (n < sizeof o) return -1;
  memcpy(&o, data, sizeof o);
  const char *cwd = data + sizeof o, *why = user_is_refused(o.uid, o.gid);
  if (o.cwd_len >= PATH_MAX || o.env_len > n || sizeof o + o.cwd_len + o.env_len > n ||
      (o.env_len && cwd[o.cwd_len + o.env_len - 1]) || o.rows > 65535 || o.cols > 65535) return -1;
  if (!cfg.bash) return refuse(s->conn, ENOENT, "the image has no bash");
  if (why) return refuse(s->conn, EINVAL, why);
  session_end(s);
  output_clear(&s->out);
  s->command = (struct command){0};
  s->uid = o.uid == AGENT ? cfg.uid : o.uid;
  s->gid = o.uid == AGENT ? cfg.uid : o.gid;
  s->out.uid = s->uid;
  if (!s->uid) tainted = 1;
  s->tty.rows = o.rows, s->tty.cols = o.cols;
  snprintf(s->title, sizeof s->title, "%s", name);
  if (s->uid && s->uid != cfg.uid && asprintf(&s->home, "/home/%u", s->uid) < 0) s->home = NULL;
  if (o.cwd_len) snprintf(s->start, sizeof s->start, "%.*s", (int)o.cwd_len, cwd);
  else snprintf(s->start, sizeof s->start, "%s", s->home ? s->home : cfg.work);
  strcpy(s->cwd, s->start);
  if (!(s->env = make_environment(s, cwd + o.cwd_len, o.env_len))) return fail(s->conn, ENOMEM, "open");
  s->generation = generation;
  s->open = 1;
  if (list_session(s, 1)) {
    s->open = 0;
    return refuse(s->conn, EUSERS, "64 sessions are open, which is the most: close one");
  }
  size_t at = sizeof o + o.cwd_len + o.env_len;
  int error = shell_start(s, data + at, n - at, now_ms() + timeout_ms);
  if (!error) return reply(s->conn, 0, NULL, 0);
  session_end(s);
  return fail(s->conn, error, s->tty.rows ? "bash does not start in a terminal" : "bash does not start");
}
