/* Sends SIGTERM to process 1 as if it came from outside, where no pid is known. Prints 0 or errno. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void) {
  siginfo_t info = {.si_signo = SIGTERM, .si_code = SI_QUEUE};
  printf("%d\n", syscall(SYS_rt_sigqueueinfo, 1, SIGTERM, &info) ? errno : 0);
}
