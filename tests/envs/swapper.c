/* Swaps two names of the work directory, a directory and a symbolic link, as fast as it can: what stands
 * behind a path is never the same for long. For the race tests; ends after N seconds. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
  time_t end = time(NULL) + atoi(argv[3]);
  for (unsigned i = 0; argc == 4 && (i % 1024 || time(NULL) < end); i++) {
    renameat2(AT_FDCWD, argv[1], AT_FDCWD, argv[2], RENAME_EXCHANGE);
    if (i % 7 == 0) usleep(20);
  }
  return 0;
}
