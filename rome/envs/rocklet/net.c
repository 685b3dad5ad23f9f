/* The network as the host serves it. Rocklet makes listening sockets on the sandbox's loopback and hands
 * them to the host; a socket keeps the network namespace it was made in, so the host accepts connections
 * there while the sandbox has no route to anywhere. */
#define _GNU_SOURCE
#include "rocklet.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { TCP, UDP };

/* Sends an empty answer that carries a descriptor. */
static int reply_fd(int conn, int fd) {
  union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control = {.space = {0}};
  struct reply r = {0};
  struct iovec v = {&r, sizeof r};
  struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &control,
                     .msg_controllen = sizeof control};
  control.header.cmsg_level = SOL_SOCKET, control.header.cmsg_type = SCM_RIGHTS;
  control.header.cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
  return sendmsg(conn, &m, MSG_NOSIGNAL) == sizeof r ? 0 : -1;
}

/* The data: kind, port (each two bytes, little-endian), and the IPv4 address, of the loopback. A UDP
 * socket must never share its port: an agent's own socket would get a part of the questions. */
int do_listen(int conn, const char *data, size_t n) {
  struct { uint16_t kind, port; uint8_t address[4]; } q;
  int one = 1, error = 0;
  if (n != sizeof q) return fail(conn, EINVAL, "listen");
  memcpy(&q, data, n);
  if (q.address[0] != 127 || q.kind > UDP) return fail(conn, EINVAL, "listen");
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(q.port)};
  memcpy(&to.sin_addr, q.address, 4);
  int fd = socket(AF_INET, (q.kind == TCP ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0);
  if (fd < 0 || (q.kind == TCP && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one)) ||
      bind(fd, (void *)&to, sizeof to) || (q.kind == TCP && listen(fd, 256))) error = errno;
  int sent = error ? fail(conn, error, "listen") : reply_fd(conn, fd);
  close_fd(&fd);
  return sent;
}
