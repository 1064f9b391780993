/* Traps the system calls by which a process changes files below one folder. Each is counted and recorded; on request
   the process dies at one of them (SIGKILL), or gets the error that the disk is full.

   A seccomp filter turns those calls into the signal SIGSYS, whose handler makes them itself: nothing that runs in the
   process, compiled libraries included, can write past it. The filter lets calls through that come from crash_raw.
   Not seen are writes through shared memory maps. For Linux on x86-64. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#if !defined(__linux__) || !defined(__x86_64__)
#error "trap.c is for Linux on x86-64"
#endif

enum { CREATE = 1, WRITE, TRUNCATE, FSYNC, RENAME, LINK, UNLINK, MKDIR, NOTE };
enum { LONGEST = 4096 };

/* A record of the log; the two paths and the data follow it. */
struct record {
  uint32_t kind, path_bytes, other_bytes, data_bytes;
  uint64_t inode, offset;
};

struct call {
  int kind;
  char path[LONGEST], other[LONGEST]; /* the file, and where rename and link put it */
  uint64_t offset;                    /* of a write, or the length that a file is cut to */
  const char *data;
  size_t bytes;
  int descriptor; /* of an open file, or -1 */
};

static char root[LONGEST];
static int log_file, torn;
static long die_at, full_at, calls;
static volatile int busy;
static struct call now;

long crash_raw(long number, long a, long b, long c, long d, long e, long f);
extern const char crash_raw_end[];
__asm__(".text\n.globl crash_raw\n.type crash_raw, @function\ncrash_raw:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
        "mov 8(%rsp), %r9\nsyscall\n.globl crash_raw_end\ncrash_raw_end:\nret\n");

static int inside(const char *path) {
  size_t n = strlen(root);
  return strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int path_of(const char *link, char *out) {
  ssize_t n = readlink(link, out, LONGEST - 1);
  out[n < 0 ? 0 : n] = 0;
  return n > 0;
}

static int path_of_file(long descriptor, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%ld", descriptor);
  return path_of(link, out) && inside(out);
}

/* The absolute path that a call means; 0 where it is outside of the root. */
static int absolute(long folder, long argument, char *out) {
  const char *path = (const char *)argument;
  if (path == NULL || *path == 0) return 0;
  if (*path == '/') {
    snprintf(out, LONGEST, "%s", path);
    return inside(out);
  }
  char link[64];
  if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%ld", folder);
  if (!path_of(link, out)) return 0;
  size_t n = strlen(out);
  snprintf(out + n, LONGEST - n, "/%s", path);
  return inside(out);
}

static int there(const char *path, struct stat *found) {
  return crash_raw(SYS_newfstatat, AT_FDCWD, (long)path, (long)found, AT_SYMLINK_NOFOLLOW, 0, 0) == 0;
}

static int is_folder(int descriptor) {
  struct stat found;
  return fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode);
}

static int opens(long folder, long path, long flags) {
  struct stat found;
  if (!absolute(folder, path, now.path)) return 0;
  if (!there(now.path, &found)) now.kind = CREATE;
  else if ((flags & O_TRUNC) && found.st_size > 0) now.kind = TRUNCATE;
  return now.kind != 0;
}

static int writes(long descriptor, long data, long bytes, long offset) {
  struct stat found;
  if (!path_of_file(descriptor, now.path) || fstat(descriptor, &found) || !S_ISREG(found.st_mode)) return 0;
  if (offset < 0) offset = lseek(descriptor, 0, SEEK_CUR);
  if (fcntl(descriptor, F_GETFL) & O_APPEND) offset = found.st_size;
  now.kind = WRITE, now.descriptor = descriptor;
  now.data = (const char *)data, now.bytes = bytes, now.offset = offset;
  return bytes > 0;
}

/* What a call would change, in `now`; 0 where that is nothing below the root. */
static int describe(long number, long *a) {
  switch (number) {
  case SYS_open: return opens(AT_FDCWD, a[0], a[1]);
  case SYS_creat: return opens(AT_FDCWD, a[0], O_CREAT | O_TRUNC);
  case SYS_openat: return opens(a[0], a[1], a[2]);
  case SYS_write: return writes(a[0], a[1], a[2], -1);
  case SYS_pwrite64: return writes(a[0], a[1], a[2], a[3]);
  case SYS_ftruncate:
    now.kind = TRUNCATE, now.offset = a[1], now.descriptor = a[0];
    return path_of_file(a[0], now.path);
  case SYS_truncate:
    now.kind = TRUNCATE, now.offset = a[1];
    return absolute(AT_FDCWD, a[0], now.path);
  case SYS_fsync:
  case SYS_fdatasync:
    now.kind = FSYNC, now.descriptor = a[0];
    return path_of_file(a[0], now.path);
  case SYS_rename:
    now.kind = RENAME;
    return absolute(AT_FDCWD, a[0], now.path) & absolute(AT_FDCWD, a[1], now.other);
  case SYS_renameat:
  case SYS_renameat2:
    now.kind = RENAME;
    return absolute(a[0], a[1], now.path) & absolute(a[2], a[3], now.other);
  case SYS_link:
    now.kind = LINK;
    return absolute(AT_FDCWD, a[0], now.path) & absolute(AT_FDCWD, a[1], now.other);
  case SYS_linkat:
    now.kind = LINK;
    return absolute(a[0], a[1], now.path) & absolute(a[2], a[3], now.other);
  case SYS_unlink:
  case SYS_rmdir:
    now.kind = UNLINK;
    return absolute(AT_FDCWD, a[0], now.path);
  case SYS_unlinkat:
    now.kind = UNLINK;
    return absolute(a[0], a[1], now.path);
  case SYS_mkdir:
    now.kind = MKDIR;
    return absolute(AT_FDCWD, a[0], now.path);
  case SYS_mkdirat:
    now.kind = MKDIR;
    return absolute(a[0], a[1], now.path);
  }
  return 0;
}

static void log_bytes(const void *data, size_t bytes) {
  while (bytes > 0) {
    long done = crash_raw(SYS_write, log_file, (long)data, bytes, 0, 0, 0);
    if (done <= 0) return;
    data = (const char *)data + done, bytes -= done;
  }
}

static void record(size_t written) {
  struct stat found = {0};
  if (log_file < 0) return;
  if (now.kind != UNLINK && now.descriptor >= 0) fstat(now.descriptor, &found);
  else there(now.kind == RENAME || now.kind == LINK ? now.other : now.path, &found);
  struct record head = {now.kind, strlen(now.path), strlen(now.other), written, found.st_ino, now.offset};
  log_bytes(&head, sizeof head);
  log_bytes(now.path, head.path_bytes);
  log_bytes(now.other, head.other_bytes);
  log_bytes(now.data, written);
}

/* Does the call, unless this is where the process dies or the disk is full. Returns what the kernel would. */
static long carry_out(long number, long *a) {
  int writing = now.kind == WRITE, needs_room = writing || now.kind == CREATE || now.kind == MKDIR;
  int never_fails = now.kind == UNLINK || now.kind == TRUNCATE || (now.kind == FSYNC && is_folder(now.descriptor));
  long half = writing && now.bytes > 1 ? (long)now.bytes / 2 : 0;
  calls++;
  if (calls == die_at) {
    if (torn && half) crash_raw(number, a[0], a[1], half, a[3], a[4], a[5]);
    crash_raw(SYS_kill, getpid(), SIGKILL, 0, 0, 0, 0);
  }
  if (full_at > 0 && calls >= full_at && !never_fails) {
    if (calls == full_at && half) a[2] = half; /* the last bytes that there is room for */
    else if (needs_room || calls == full_at) return -ENOSPC;
  }
  if (now.kind == FSYNC) { /* recorded, not waited for: what is on the disk is up to the replay */
    record(0);
    return 0;
  }
  long result = crash_raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  if (result < 0 && result > -4096) return result;
  record(writing ? (size_t)result : 0);
  return result;
}

static long answer(long number, long *a) {
  if (number == SYS_writev) { /* a short write, of the first piece */
    const struct iovec *piece = (const struct iovec *)a[1];
    for (long left = a[2]; left > 1 && piece->iov_len == 0; left--) piece++;
    number = SYS_write, a[1] = (long)piece->iov_base, a[2] = piece->iov_len;
  }
  memset(&now, 0, offsetof(struct call, path) + 1);
  now.other[0] = 0, now.offset = 0, now.data = NULL, now.bytes = 0, now.descriptor = -1;
  if (describe(number, a)) return carry_out(number, a);
  return crash_raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void on_trap(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info;
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  long number = r[REG_RAX];
  long a[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
  int saved = errno;
  while (__sync_lock_test_and_set(&busy, 1)) crash_raw(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
  switch (number) {
  case SYS_fallocate: r[REG_RAX] = -EOPNOTSUPP; break;
  case SYS_sendfile: /* Python then reads and writes */
  case SYS_copy_file_range:
  case SYS_pwritev:
  case SYS_pwritev2: r[REG_RAX] = -ENOSYS; break;
  default: r[REG_RAX] = answer(number, a);
  }
  __sync_lock_release(&busy);
  errno = saved;
}

static int install(void) {
  static const int trapped[] = {
      SYS_write, SYS_writev, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_truncate, SYS_ftruncate, SYS_fallocate,
      SYS_fsync, SYS_fdatasync, SYS_rename, SYS_renameat, SYS_renameat2, SYS_link, SYS_linkat, SYS_unlink, SYS_rmdir,
      SYS_unlinkat, SYS_mkdir, SYS_mkdirat, SYS_creat, SYS_sendfile, SYS_copy_file_range};
  uint64_t end = (uint64_t)crash_raw_end;
  uint32_t low = offsetof(struct seccomp_data, instruction_pointer);
  struct sock_filter filter[128] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, low),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)end, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, low + 4),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(end >> 32), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
  };
  int n = 6;
  for (size_t i = 0; i < sizeof trapped / sizeof *trapped; i++) {
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, trapped[i], 0, 1);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
  }
  for (int i = 0; i < 2; i++) { /* opening to read is left alone */
    uint32_t flags = offsetof(struct seccomp_data, args) + 8 * (i + 1);
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, i ? SYS_openat : SYS_open, 0, 4);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, flags);
    filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_CREAT | O_TRUNC, 0, 1);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  }
  filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog program = {n, filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}

/* Traps from now on, in this process and for good. `log` is an open file for the records, or -1. The process dies at
   call `die`, half of whose bytes are written first if `half`; from call `full` on there is no room. Calls are counted
   from 1; 0 is never. Returns 0, or the errno of what the kernel refused. */
int crash_start(const char *folder, int log, long die, int half, long full) {
  struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
  snprintf(root, sizeof root, "%s", folder);
  log_file = log, die_at = die, torn = half, full_at = full, calls = 0;
  if (sigaction(SIGSYS, &action, NULL)) return errno;
  return install();
}

long crash_calls(void) { return calls; }

/* Records a line of text, about the call that follows. */
void crash_note(const char *text) {
  struct record head = {NOTE, strlen(text), 0, 0, 0, 0};
  if (log_file < 0) return;
  log_bytes(&head, sizeof head);
  log_bytes(text, head.path_bytes);
}
