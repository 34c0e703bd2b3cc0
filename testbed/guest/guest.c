/* A guest that can tell whether it was captured and restored as it was. It boots from its initramfs as PID 1, takes
 * its orders from the kernel command line and the serial console, and keeps its whole story in RAM (state.h).
 *
 * Kernel command line, with defaults:
 *   qsnap.id=1           this guest, 1..peers; the last octet of its addresses
 *   qsnap.peers=1        guests in all, at most 16
 *   qsnap.net=10.0.0     first three octets of eth0; a list (10.0.0,10.0.1) gives eth1 and so on, at most 4
 *   qsnap.dirty_mb=64    working set in MiB
 *   qsnap.rate_mb=20     MB of pages touched per second, 0 for none
 *   qsnap.udp=200        datagrams per second to every peer, over all networks in turn; 0 for none
 *   qsnap.tcp=1          a stream to the next peer, on the first network; 0 for none
 *   qsnap.tcp_kbps=8000  its speed in kbit/s; 0 for as fast as it goes
 *   qsnap.work=0         1 to keep the vCPU busy with work that is counted (state.worked)
 *
 * Console commands, each with ` #tag` behind it if the answer shall bring a tag back:
 *   status     @{"status":{all counters},"tag":...}; a tick is a turn of the loop
 *   finish     ends the outgoing stream, waits for the incoming one to end: @{"finished":{all counters},"tag":...}
 *   rate N, udp on, udp off, quiet (kernel messages), poweroff     @{"ok":true,"tag":...}
 * Unasked: {"ready":true}, {"warning":...}, {"stamp_errors":...}, {"stream_mismatch":...}, {"fatal":...}, with "id".
 */
#define _GNU_SOURCE /* ppoll */
#include <string.h>
#include <time.h>

#include "guest.h"

struct state *state;

static uint64_t header_check(void) {
    uint64_t words[8], check = 0;
    memcpy(words, state, sizeof words);
    for (int i = 0; i < 7; i++) check = mix64(check ^ words[i]);
    return check;
}

static unsigned number_of_peers(void) {
    long peers = option("peers", 1);
    return peers < 1 ? 1 : peers > MAX_PEERS ? MAX_PEERS : (unsigned)peers;
}

/* The magic goes in last: an image taken earlier has no state rather than half of one. */
static void state_create(void) {
    state = locked_pages(1);
    state->version = STATE_VERSION;
    state->nonce = random_nonce();
    state->id = (uint64_t)option("id", 1);
    state->peers = number_of_peers();
    stamps_allocate((size_t)option("dirty_mb", 64));
    char magic[] = STATE_MAGIC;
    memcpy(state->magic, magic, sizeof state->magic);
    publish(&state->check, header_check());
}

static void announce_ready(void) {
    if (state->ready || !udp_started() || !tcp_started()) return;
    publish(&state->ready, 1);
    say("\"ready\":true");
}

static void tick(uint64_t now) {
    static uint64_t counted_ns;
    raise_by(&state->ticks, 1);
    publish(&state->uptime_ms, now / 1000000);
    announce_ready();
    stamps_report();
    if (now - counted_ns >= LONGEST_REST_NS) tcp_count_timeouts(), counted_ns = now;
}

/* Emulated, each turn of the loop takes long, and many guests share few processors: there is one when there is something
 * to do, and no more than one per millisecond for what is to be sent. */
static struct timespec rest(void) {
    uint64_t udp_ns = udp_rest_ns(), tcp_ns = tcp_rest_ns(), rest_ns = udp_ns < tcp_ns ? udp_ns : tcp_ns;
    if (rest_ns < SHORTEST_REST_NS) rest_ns = SHORTEST_REST_NS;
    if (rest_ns > LONGEST_REST_NS) rest_ns = LONGEST_REST_NS;
    return (struct timespec){.tv_nsec = (long)rest_ns};
}

static void loop(void) {
    for (uint64_t then = now_ns();;) {
        struct pollfd fds[2 + TCP_FDS] = {{console_fd, POLLIN, 0}, {udp_fd, POLLIN, 0}};
        if (console_has_output()) fds[0].events |= POLLOUT;
        tcp_poll_fds(fds + 2);
        struct timespec at_most = rest();
        ppoll(fds, 2 + TCP_FDS, &at_most, NULL);
        uint64_t now = now_ns();
        tick(now);
        if (fds[1].revents) udp_receive();
        udp_send_due(now - then);
        tcp_work(fds + 2, now - then);
        console_work(fds[0].revents);
        then = now;
    }
}

int main(void) {
    boot_system();
    state_create();
    boot_networks();
    udp_open(option("udp", 200));
    tcp_open(option("tcp", 1) != 0, option("tcp_kbps", 8000));
    stamps_start(option("rate_mb", 20));
    work_start(option("work", 0) != 0);
    loop();
}
