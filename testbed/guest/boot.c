/* The guest is its own PID 1: nothing else runs in it, so nothing else disturbs what is measured. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#ifndef GRND_INSECURE
#define GRND_INSECURE 4 /* since Linux 5.6: never waits for the entropy pool, which fills slowly in a guest */
#endif

static char command_line[4096];
static uint32_t networks[MAX_NETWORKS]; /* host byte order, last octet 0 */
unsigned network_count;

static void read_command_line(void) {
    int fd = open("/proc/cmdline", O_RDONLY);
    ssize_t length = fd < 0 ? 0 : read(fd, command_line, sizeof command_line - 1);
    command_line[length > 0 ? length : 0] = 0;
    if (fd >= 0) close(fd);
}

static void write_setting(const char *path, const char *value) {
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, value, strlen(value)) < 0) say("\"warning\":\"%s: %s\"", path, strerror(errno));
    if (fd >= 0) close(fd);
}

static void load_module(const char *name) {
    char path[300];
    snprintf(path, sizeof path, "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
        say("\"warning\":\"%s: %s\"", path, strerror(errno));
    if (fd >= 0) close(fd);
}

/* The names are numbered in the order of their dependencies. */
static void load_modules(void) {
    struct dirent **entries;
    int count = scandir("/modules", &entries, NULL, alphasort);
    for (int i = 0; i < count; i++)
        if (entries[i]->d_name[0] != '.') load_module(entries[i]->d_name);
}

/* Kernel messages would cut answers in two; compaction would leave stale copies of our pages behind. */
void boot_system(void) {
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    read_command_line();
    console_open();
    write_setting("/proc/sys/kernel/printk", "1");
    write_setting("/proc/sys/vm/compact_unevictable_allowed", "0");
    load_modules();
}

static struct sockaddr_in *address_in(struct ifreq *request, uint32_t address) {
    struct sockaddr_in *in = (struct sockaddr_in *)&request->ifr_addr;
    memset(in, 0, sizeof *in);
    in->sin_family = AF_INET;
    in->sin_addr.s_addr = htonl(address);
    return in;
}

static bool device_exists(int fd, struct ifreq *request) {
    uint64_t deadline = now_ns() + 5000000000u; /* a driver may still be probing */
    while (ioctl(fd, SIOCGIFFLAGS, request) < 0) {
        if (now_ns() > deadline) return false;
        usleep(10000);
    }
    return true;
}

static void configure(int fd, const char *device, uint32_t address) {
    struct ifreq request = {0};
    strncpy(request.ifr_name, device, IFNAMSIZ - 1);
    if (!device_exists(fd, &request)) {
        say("\"warning\":\"no network device %s\"", device);
        return;
    }
    address_in(&request, address);
    bool done = ioctl(fd, SIOCSIFADDR, &request) == 0;
    address_in(&request, 0xffffff00);
    done = done && ioctl(fd, SIOCSIFNETMASK, &request) == 0;
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    done = done && ioctl(fd, SIOCSIFFLAGS, &request) == 0;
    if (!done) say("\"warning\":\"%s: %s\"", device, strerror(errno));
}

/* qsnap.net=10.0.0,10.0.1 gives eth0 10.0.0.<id>/24 and eth1 10.0.1.<id>/24. */
void boot_networks(void) {
    char list[256], device[16];
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    configure(fd, "lo", INADDR_LOOPBACK);
    snprintf(list, sizeof list, "%s", option_text("net", "10.0.0"));
    for (char *rest = list, *item; (item = strsep(&rest, ",")) && network_count < MAX_NETWORKS; network_count++) {
        unsigned a = 0, b = 0, c = 0;
        if (sscanf(item, "%u.%u.%u", &a, &b, &c) != 3) say("\"warning\":\"qsnap.net: not three octets\"");
        networks[network_count] = a << 24 | b << 16 | c << 8;
        snprintf(device, sizeof device, "eth%u", network_count);
        configure(fd, device, networks[network_count] | (uint32_t)state->id);
    }
    close(fd);
}

uint32_t peer_address(unsigned network, unsigned id) { return htonl(networks[network] | id); }

/* The text behind `qsnap.<name>=` up to the next blank; valid until the next call. */
const char *option_text(const char *name, const char *fallback) {
    static char value[256];
    char key[64];
    int length = snprintf(key, sizeof key, "qsnap.%s=", name);
    for (const char *at = command_line; (at = strstr(at, key)); at += length) {
        if (at != command_line && at[-1] != ' ') continue;
        snprintf(value, sizeof value, "%.*s", (int)strcspn(at + length, " \n"), at + length);
        return value;
    }
    return fallback;
}

long option(const char *name, long fallback) {
    const char *text = option_text(name, NULL);
    return text ? strtol(text, NULL, 10) : fallback;
}

uint64_t random_nonce(void) {
    uint64_t random = 0;
    syscall(SYS_getrandom, &random, sizeof random, GRND_INSECURE);
    uint64_t nonce = mix64(random ^ now_ns() ^ (uint64_t)option("id", 1) << 56);
    return nonce ? nonce : 1;
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Small pages that stay where they are: a huge page or a moved page would leave an old copy in the image. */
void *locked_pages(size_t count) {
    size_t bytes = count * PAGE_BYTES;
    void *pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || madvise(pages, bytes, MADV_NOHUGEPAGE) < 0 || mlock(pages, bytes) < 0) {
        say("\"fatal\":\"cannot lock %zu pages: %s\"", count, strerror(errno));
        for (;;) console_work(POLLIN), usleep(10000);
    }
    return pages;
}
