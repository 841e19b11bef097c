/* A disk that tells what was written to it, and that fails on demand; preloaded into the daemon (ld.so(8), LD_PRELOAD).
 *
 * VTPM_DISK_DIR: files under this directory are looked at. VTPM_DISK_LOG: what happened to them, in order, as records of
 * kind u8 | path length u16 | data length u32 | offset u64, then path and data. VTPM_DISK_FAULT: a file whose first byte
 * says what fails while it exists: E pwrite with EIO, N with ENOSPC, S every other one is cut short, F fsync with EIO.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FD 4096
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *paths[MAX_FD];
static int log_fd = -1;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static void tell(char kind, const char *path, uint64_t offset, const void *data, uint32_t size) {
    static ssize_t (*real_write)(int, const void *, size_t);
    if (!real_write) real_write = real("write");
    if (log_fd < 0) {
        int (*real_open)(const char *, int, ...) = real("open");
        log_fd = real_open(getenv("VTPM_DISK_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
    uint16_t length = strlen(path);
    char *record = malloc(15 + length + size);
    memcpy(record, &kind, 1);
    memcpy(record + 1, &length, 2);
    memcpy(record + 3, &size, 4);
    memcpy(record + 7, &offset, 8);
    memcpy(record + 15, path, length);
    if (size) memcpy(record + 15 + length, data, size);
    if (real_write(log_fd, record, 15 + length + size) != (ssize_t)(15 + length + size)) abort();
    free(record);
}

static char fault(void) {
    const char *path = getenv("VTPM_DISK_FAULT");
    if (!path) return 0;
    int (*real_open)(const char *, int, ...) = real("open");
    int fd = real_open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    char kind = 0;
    if (read(fd, &kind, 1) != 1) kind = 0;
    int (*real_close)(int) = real("close");
    real_close(fd);
    return kind;
}

static int watched(const char *path) {
    const char *dir = getenv("VTPM_DISK_DIR");
    return dir && path && strncmp(path, dir, strlen(dir)) == 0;
}

static int opened(int fd, const char *path, int flags) {
    if (fd < 0 || fd >= MAX_FD) return fd;
    pthread_mutex_lock(&lock);
    free(paths[fd]);
    paths[fd] = watched(path) ? strdup(path) : NULL;
    if (paths[fd] && (flags & O_TRUNC)) tell('T', path, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return fd;
}

/* The whole path of a name that is relative to a directory's descriptor, in `buffer`; the name itself if there is no way to tell. */
static const char *whole(int dir, const char *name, char *buffer, size_t size) {
    if (!name || name[0] == '/' || dir == AT_FDCWD) return name;
    char link[64], parent[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t length = readlink(link, parent, sizeof parent - 1);
    if (length <= 0) return name;
    parent[length] = 0;
    if ((size_t)snprintf(buffer, size, "%s/%s", parent, name) >= size) return name;
    return buffer;
}

#define MODE(flags) va_list list; va_start(list, flags); mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(list, mode_t) : 0; va_end(list)
int open(const char *path, int flags, ...) { MODE(flags); int (*f)(const char *, int, ...) = real("open"); return opened(f(path, flags, mode), path, flags); }
int open64(const char *path, int flags, ...) { MODE(flags); int (*f)(const char *, int, ...) = real("open64"); return opened(f(path, flags, mode), path, flags); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags); int (*f)(int, const char *, int, ...) = real("openat"); char full[8192]; return opened(f(dir, path, flags, mode), whole(dir, path, full, sizeof full), flags); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags); int (*f)(int, const char *, int, ...) = real("openat64"); char full[8192]; return opened(f(dir, path, flags, mode), whole(dir, path, full, sizeof full), flags); }

int close(int fd) {
    int (*f)(int) = real("close");
    if (fd >= 0 && fd < MAX_FD) {
        pthread_mutex_lock(&lock);
        free(paths[fd]);
        paths[fd] = NULL;
        pthread_mutex_unlock(&lock);
    }
    return f(fd);
}

static ssize_t put(int fd, const void *data, size_t size, off_t offset, ssize_t (*f)(int, const void *, size_t, off_t)) {
    if (fd < 0 || fd >= MAX_FD || !paths[fd]) return f(fd, data, size, offset);
    static int turn;
    switch (fault()) {
    case 'E': errno = EIO; return -1;
    case 'N': errno = ENOSPC; return -1;
    case 'S': if (size > 1 && ++turn % 2) size /= 2; break;
    }
    pthread_mutex_lock(&lock);
    ssize_t done = f(fd, data, size, offset);
    if (done > 0) tell('W', paths[fd], offset, data, done);
    pthread_mutex_unlock(&lock);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return put(fd, data, size, offset, real("pwrite")); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return put(fd, data, size, offset, real("pwrite64")); }
ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*f)(int, const void *, size_t) = real("write");
    if (fd < 0 || fd >= MAX_FD || !paths[fd]) return f(fd, data, size);
    pthread_mutex_lock(&lock);
    off_t offset = lseek(fd, 0, SEEK_CUR);
    ssize_t done = f(fd, data, size);
    if (done > 0) tell('W', paths[fd], offset, data, done);
    pthread_mutex_unlock(&lock);
    return done;
}

static int sync_with(int fd, int (*f)(int)) {
    if (fd < 0 || fd >= MAX_FD || !paths[fd]) return f(fd);
    int fails = fault() == 'F';
    pthread_mutex_lock(&lock);
    int result = fails ? -1 : f(fd);
    tell(result ? 'X' : 'S', paths[fd], 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    if (fails) errno = EIO;
    return result;
}
int fsync(int fd) { return sync_with(fd, real("fsync")); }
int fdatasync(int fd) { return sync_with(fd, real("fdatasync")); }

static int cut(int fd, off_t size, int (*f)(int, off_t)) {
    int result = f(fd, size);
    if (!result && fd >= 0 && fd < MAX_FD && paths[fd]) {
        pthread_mutex_lock(&lock);
        tell('C', paths[fd], size, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return result;
}
int ftruncate(int fd, off_t size) { return cut(fd, size, real("ftruncate")); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size, real("ftruncate64")); }

int rename(const char *from, const char *to) {
    int (*f)(const char *, const char *) = real("rename");
    int result = f(from, to);
    if (!result && watched(to)) {
        pthread_mutex_lock(&lock);
        tell('R', from, 0, to, strlen(to));
        pthread_mutex_unlock(&lock);
    }
    return result;
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    int (*f)(int, const char *, int, const char *) = real("renameat");
    char old[8192], new[8192];
    const char *source = whole(from_dir, from, old, sizeof old), *target = whole(to_dir, to, new, sizeof new);
    int result = f(from_dir, from, to_dir, to);
    if (!result && watched(target)) {
        pthread_mutex_lock(&lock);
        tell('R', source, 0, target, strlen(target));
        pthread_mutex_unlock(&lock);
    }
    return result;
}
int unlinkat(int dir, const char *path, int flags) {
    int (*f)(int, const char *, int) = real("unlinkat");
    char full[8192];
    const char *gone = whole(dir, path, full, sizeof full);
    int result = f(dir, path, flags);
    if (!result && !(flags & AT_REMOVEDIR) && watched(gone)) {
        pthread_mutex_lock(&lock);
        tell('U', gone, 0, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return result;
}
int unlink(const char *path) {
    int (*f)(const char *) = real("unlink");
    int result = f(path);
    if (!result && watched(path)) {
        pthread_mutex_lock(&lock);
        tell('U', path, 0, NULL, 0);
        pthread_mutex_unlock(&lock);
    }
    return result;
}
