/* What the parts of the guest share. One thread runs the network and the console, one the stamps. */
#ifndef GUEST_H
#define GUEST_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "state.h"

extern struct state *state;

enum { UDP_PORT = 7001, TCP_PORT = 7002, MAX_NETWORKS = 4 };
enum { SHORTEST_REST_NS = 1000000, LONGEST_REST_NS = 100000000 }; /* of a thread that has nothing to do */

/* splitmix64's output function: turns any two neighbouring numbers into unrelated ones. */
static inline uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* One 8-byte store that the compiler neither splits nor moves before an earlier one. */
static inline void publish(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static inline void raise_by(uint64_t *word, uint64_t amount) { publish(word, *word + amount); }

/* boot.c: what a PID 1 does before anything else, and the kernel command line. */
void boot_system(void);
void boot_networks(void);
long option(const char *name, long fallback);
const char *option_text(const char *name, const char *fallback);
uint64_t random_nonce(void);
uint64_t now_ns(void);
void *locked_pages(size_t count);
uint32_t peer_address(unsigned network, unsigned id);
extern unsigned network_count;

/* stamps.c */
void stamps_allocate(size_t megabytes);
void stamps_start(long rate_mb);
void stamps_set_rate(long rate_mb);
void stamps_report(void);

/* work.c */
void work_start(bool wanted);

/* udp.c */
void udp_open(long rate);
void udp_set_on(bool on);
bool udp_started(void);
void udp_receive(void);
void udp_send_due(uint64_t elapsed_ns);
uint64_t udp_rest_ns(void);
extern int udp_fd;

/* tcp.c */
void tcp_open(bool on, long kbps);
bool tcp_started(void);
void tcp_poll_fds(struct pollfd *fds);
void tcp_work(const struct pollfd *fds, uint64_t elapsed_ns);
uint64_t tcp_rest_ns(void);
void tcp_finish(void);
bool tcp_finished(void);
void tcp_count_timeouts(void);
enum { TCP_FDS = 3 };

/* console.c */
void console_open(void);
void console_work(short events);
bool console_has_output(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
extern int console_fd;

#endif
