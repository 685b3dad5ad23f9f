/* The stream of a snapshot, as snapshot.c writes and restore.c reads it; numbers are little-endian.
 *
 * It is SNAPSHOT_MAGIC and then records: a letter, the length of a name (16 bits), the name, and
 *   D  struct meta, attributes            enters a directory, the root by the name ""; deletions first
 *   U                                     leaves it
 *   X                                     what the image has by that name is deleted
 *   F  struct meta, link, attributes,     a file: its size (64 bits) and the runs of bytes that are no
 *      size, runs                         holes, each offset and length (64 bits) and bytes; 0, 0 ends
 *   L  struct meta, link, length, target  a symbolic link (16 bits of length)
 *   P  struct meta, link                  a fifo
 *   H  link                               one more name of the file that had this link number
 *   E  number of records before it        the end (64 bits)
 * `link` (32 bits) numbers files with several names, 0 for the others. Attributes are a number of them
 * (16 bits), then each length (8 bits) and name, length (32 bits) and value. */
#ifndef SNAPSHOT_H
#define SNAPSHOT_H

#include <stdint.h>

#define SNAPSHOT_MAGIC "ROMESNP\1"

struct meta { uint32_t mode, uid, gid, nsec; int64_t sec; };

int is_kept_attribute(const char *name);

#endif
