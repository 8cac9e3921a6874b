/* Makes the k-th system call that changes a folder fail, or kills the process there. Linux only.
 *
 * The calls are caught with a seccomp filter and its signal, not by replacing libc's functions:
 * safetensors renames by a system call of its own, which no replaced function would see. The filter
 * holds for the calling thread and for every thread and process it starts afterwards.
 *
 * A process arms itself with inject_arm(), or is started with this library in LD_PRELOAD and
 *   INJECT_PREFIX  the folder; a call counts if its path or the path of its descriptor lies there
 *   INJECT_LOG     a line a counted call: number, name, path (and the second path of a rename)
 *   INJECT_AT      k, from 1; 0 only counts
 *   INJECT_WHAT    KILL before the call, HALF_KILL after half of a write, ENOSPC, EIO
 *   INJECT_STICKY  1, with ENOSPC: a full disk. A write still writes half, then all that needs room fails
 *
 * Not caught: writes through mmap, io_uring, copy_file_range, pwritev2, openat2.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#define ARGUMENT(c, i) ((long)(c)->uc_mcontext.gregs[(const int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8}[i]])
#define RESULT(c) ((c)->uc_mcontext.gregs[REG_RAX])
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#define ARGUMENT(c, i) ((long)(c)->uc_mcontext.regs[i])
#define RESULT(c) ((c)->uc_mcontext.regs[0])
#else
#error "only x86-64 and aarch64"
#endif

/* None of the calls below has a sixth argument, so it can mark our own, which the filter lets pass. */
#define OURS 0x70686d6466617374L

enum kind { REMOVES, GROWS, WRITES, OPENS, SYNCS };

static const struct call {
    long number;
    const char *name;
    enum kind kind;
    int fd;           /* argument with a descriptor, or -1 */
    int dir[2];       /* arguments with the folders of the paths, -1: the working folder */
    int path[2];      /* arguments with the paths, or -1 */
    int flags;        /* of an open: the argument with its flags */
} CALLS[] = {
    {SYS_write, "write", WRITES, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_pwrite64, "pwrite", WRITES, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_writev, "writev", WRITES, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_pwritev, "pwritev", WRITES, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_sendfile, "sendfile", WRITES, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_fsync, "fsync", SYNCS, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_fdatasync, "fdatasync", SYNCS, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_ftruncate, "ftruncate", GROWS, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_fallocate, "fallocate", GROWS, 0, {-1, -1}, {-1, -1}, -1},
    {SYS_openat, "openat", OPENS, -1, {0, -1}, {1, -1}, 2},
    {SYS_mkdirat, "mkdirat", GROWS, -1, {0, -1}, {1, -1}, -1},
    {SYS_renameat2, "renameat2", SYNCS, -1, {0, 2}, {1, 3}, -1},
    {SYS_linkat, "linkat", GROWS, -1, {0, 2}, {1, 3}, -1},
    {SYS_symlinkat, "symlinkat", GROWS, -1, {1, -1}, {2, -1}, -1},
    {SYS_unlinkat, "unlinkat", REMOVES, -1, {0, -1}, {1, -1}, -1},
#ifdef SYS_renameat
    {SYS_renameat, "renameat", SYNCS, -1, {0, 2}, {1, 3}, -1},
#endif
#ifdef SYS_open /* the older forms, which newer architectures do without */
    {SYS_open, "open", OPENS, -1, {-1, -1}, {0, -1}, 1},
    {SYS_creat, "creat", GROWS, -1, {-1, -1}, {0, -1}, -1},
    {SYS_mkdir, "mkdir", GROWS, -1, {-1, -1}, {0, -1}, -1},
    {SYS_rename, "rename", SYNCS, -1, {-1, -1}, {0, 1}, -1},
    {SYS_link, "link", GROWS, -1, {-1, -1}, {0, 1}, -1},
    {SYS_symlink, "symlink", GROWS, -1, {-1, -1}, {1, -1}, -1},
    {SYS_unlink, "unlink", REMOVES, -1, {-1, -1}, {0, -1}, -1},
    {SYS_rmdir, "rmdir", REMOVES, -1, {-1, -1}, {0, -1}, -1},
#endif
};
#define COUNT ((int)(sizeof CALLS / sizeof *CALLS))

static char prefix[4096];
static int log_file = -1;
static long fault_at;
static int kills, halves, error, sticky;
static atomic_long counted;
static atomic_int full;

static long ours(long number, long a, long b, long c, long d, long e) {
    long result = syscall(number, a, b, c, d, e, OURS);
    return result < 0 ? -errno : result;
}

static void read_link(const char *link, char *out, size_t size) {
    ssize_t length = readlink(link, out, size - 1);
    out[length < 0 ? 0 : length] = 0;
}

static void of_descriptor(int fd, char *out, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    read_link(fd == AT_FDCWD ? "/proc/self/cwd" : link, out, size);
}

static void of_path(int dir, const char *path, char *out, size_t size) {
    if (path[0] == '/') {
        snprintf(out, size, "%s", path);
        return;
    }
    of_descriptor(dir, out, size);
    size_t length = strlen(out);
    snprintf(out + length, size - length, "/%s", path);
}

static int inside(const char *path) {
    size_t length = strlen(prefix);
    return !strncmp(path, prefix, length) && (path[length] == 0 || path[length] == '/');
}

static long half_of(const struct call *call, const long *a) {
    if (call->number == SYS_writev || call->number == SYS_pwritev) {
        struct iovec first = *(const struct iovec *)a[1];
        first.iov_len /= 2;
        return ours(call->number, a[0], (long)&first, 1, a[3], a[4]);
    }
    if (call->number == SYS_sendfile) return ours(call->number, a[0], a[1], a[2], a[3] / 2, a[4]);
    return ours(call->number, a[0], a[1], a[2] / 2, a[3], a[4]);
}

static long decide(const struct call *call, const long *a) {
    char paths[2][8192] = {"", ""};
    if (call->fd >= 0) of_descriptor(a[call->fd], paths[0], sizeof paths[0]);
    for (int i = 0; i < 2; i++)
        if (call->path[i] >= 0)
            of_path(call->dir[i] < 0 ? AT_FDCWD : (int)a[call->dir[i]], (const char *)a[call->path[i]], paths[i],
                    sizeof paths[i]);
    if (!inside(paths[0]) && !inside(paths[1])) return ours(call->number, a[0], a[1], a[2], a[3], a[4]);

    long number = atomic_fetch_add(&counted, 1) + 1;
    if (log_file >= 0) {
        char line[16600];
        int length = snprintf(line, sizeof line, "%ld\t%s\t%s%s%s\n", number, call->name, paths[0],
                              paths[1][0] ? "\t" : "", paths[1]);
        ours(SYS_write, log_file, (long)line, length, 0, 0);
    }
    int needs_room = call->kind == WRITES || call->kind == GROWS || call->kind == OPENS;
    if (atomic_load(&full) && needs_room) return -ENOSPC;
    if (number == fault_at) {
        if (halves && call->kind == WRITES) half_of(call, a);
        if (kills) {
            ours(SYS_kill, getpid(), SIGKILL, 0, 0, 0);
            for (;;) pause();
        }
        if (sticky) {
            atomic_store(&full, 1);
            long written = call->kind == WRITES ? half_of(call, a) : 0;
            if (written > 0) return written; /* as a disk does: what fits, and the error at the next call */
        }
        return -error;
    }
    return ours(call->number, a[0], a[1], a[2], a[3], a[4]);
}

static void on_call(int signal, siginfo_t *info, void *context) {
    (void)signal;
    ucontext_t *caller = context;
    int before = errno;
    long result = -ENOSYS;
    for (int i = 0; i < COUNT; i++)
        if (CALLS[i].number == info->si_syscall) {
            long a[5];
            for (int j = 0; j < 5; j++) a[j] = ARGUMENT(caller, j);
            result = decide(&CALLS[i], a);
            break;
        }
    RESULT(caller) = result;
    errno = before;
}

static int filter(void) {
    static struct sock_filter code[16 + 4 * sizeof CALLS / sizeof *CALLS];
    const unsigned low = offsetof(struct seccomp_data, args[5]), data = offsetof(struct seccomp_data, args[0]);
    int n = 0;
#define STATEMENT(c, k) code[n++] = (struct sock_filter)BPF_STMT(c, k)
#define BRANCH(c, k, yes, no) code[n++] = (struct sock_filter)BPF_JUMP(c, k, yes, no)
    STATEMENT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    BRANCH(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0);
    STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    STATEMENT(BPF_LD | BPF_W | BPF_ABS, low);
    BRANCH(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)OURS, 0, 3);
    STATEMENT(BPF_LD | BPF_W | BPF_ABS, low + 4);
    BRANCH(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(OURS >> 32), 0, 1);
    STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    STATEMENT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT; i++) {
        if (CALLS[i].kind == OPENS) { /* only where it makes or empties a file: a program that starts reads many */
            BRANCH(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)CALLS[i].number, 0, 4);
            STATEMENT(BPF_LD | BPF_W | BPF_ABS, data + 8 * CALLS[i].flags);
            BRANCH(BPF_JMP | BPF_JSET | BPF_K, O_CREAT | O_TRUNC, 0, 1);
            STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
            STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        } else {
            BRANCH(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)CALLS[i].number, 0, 1);
            STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
        }
    }
    STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}

/* 0, or an errno: EINVAL for an unknown fault, otherwise the kernel's reason for refusing the filter. */
int inject_arm(const char *folder, const char *log, long at, const char *what, int stays) {
    kills = !strcmp(what, "KILL") || !strcmp(what, "HALF_KILL");
    halves = !strcmp(what, "HALF_KILL");
    error = !strcmp(what, "ENOSPC") ? ENOSPC : !strcmp(what, "EIO") ? EIO : 0;
    if (!kills && !error) return EINVAL;
    snprintf(prefix, sizeof prefix, "%s", folder);
    fault_at = at;
    sticky = stays && error == ENOSPC;
    atomic_store(&counted, 0);
    atomic_store(&full, 0);
    if (log && *log && (log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) return errno;
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_RESTART};
    if (sigaction(SIGSYS, &action, NULL)) return errno;
    return filter();
}

__attribute__((constructor)) static void from_environment(void) {
    const char *folder = getenv("INJECT_PREFIX"), *at = getenv("INJECT_AT"), *what = getenv("INJECT_WHAT");
    const char *stays = getenv("INJECT_STICKY");
    if (!folder) return;
    int always = stays && *stays == '1';
    int refused = inject_arm(folder, getenv("INJECT_LOG"), at ? atol(at) : 0, what ? what : "KILL", always);
    if (refused) {
        fprintf(stderr, "inject: cannot be armed (%s)\n", strerror(refused));
        _exit(70);
    }
}
