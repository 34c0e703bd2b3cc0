/* Numbered datagrams to every peer. What a peer could not have sent yet shows an orphan; what comes twice, another
 * timeline. Loss is counted, not judged: a network may lose. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "guest.h"

enum { WINDOW = 8192, WINDOW_WORDS = WINDOW / 64, AT_ONCE = 32 };

struct datagram {
    char magic[8];
    uint64_t nonce, sequence, from, to;
};

/* Which of the last WINDOW sequence numbers of a peer were seen: bit `sequence % WINDOW`. */
struct seen {
    uint64_t nonce, bits[WINDOW_WORDS];
};

int udp_fd = -1;
static struct seen seen[MAX_PEERS];
static double due;
static long datagrams_per_second;
static bool on;

void udp_open(long rate) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(UDP_PORT)};
    int bytes = 4 << 20; /* more than waits for the address of an absent peer, or that would hold up the others */
    udp_fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(udp_fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
    setsockopt(udp_fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
    if (bind(udp_fd, (struct sockaddr *)&address, sizeof address) < 0) say("\"warning\":\"udp: %s\"", strerror(errno));
    datagrams_per_second = rate;
    on = rate > 0;
}

void udp_set_on(bool wanted) { on = wanted && datagrams_per_second > 0; }

bool udp_started(void) {
    for (unsigned j = 0; datagrams_per_second > 0 && j < state->peers; j++)
        if (j + 1 != state->id && !state->received[j]) return false;
    return true;
}

static void send_one(unsigned j) {
    struct datagram out = {"qsnapudp", state->nonce, state->sent[j] + 1, state->id, j + 1};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(UDP_PORT)};
    to.sin_addr.s_addr = peer_address((unsigned)(out.sequence % network_count), j + 1);
    publish(&state->sent[j], out.sequence);
    if (sendto(udp_fd, &out, sizeof out, 0, (struct sockaddr *)&to, sizeof to) < 0) raise_by(&state->send_errors, 1);
}

void udp_send_due(uint64_t elapsed_ns) {
    if (!on) return;
    due += (double)elapsed_ns * (double)datagrams_per_second / 1e9;
    due = due < AT_ONCE ? due : AT_ONCE;
    for (; due >= 1; due--)
        for (unsigned j = 0; j < state->peers; j++)
            if (j + 1 != state->id) send_one(j);
}

/* Until the next datagram is to be sent. */
uint64_t udp_rest_ns(void) {
    return on ? (uint64_t)((1 - due) * 1e9 / (double)datagrams_per_second) : UINT64_MAX;
}

static void forget_between(struct seen *peer, uint64_t from, uint64_t to) {
    if (to - from >= WINDOW) memset(peer->bits, 0, sizeof peer->bits);
    else
        for (uint64_t s = from + 1; s <= to; s++) peer->bits[s % WINDOW / 64] &= ~(1ull << s % 64);
}

static void count_newest(unsigned j, uint64_t sequence) {
    forget_between(&seen[j], state->highest[j], sequence);
    raise_by(&state->skipped[j], sequence - state->highest[j] - 1);
    publish(&state->highest[j], sequence);
}

static void count(unsigned j, uint64_t sequence) {
    uint64_t *word = &seen[j].bits[sequence % WINDOW / 64], bit = 1ull << sequence % 64;
    if (sequence > state->highest[j]) {
        count_newest(j, sequence);
    } else if (sequence + WINDOW <= state->highest[j]) {
        raise_by(&state->stale[j], 1);
        return;
    } else if (*word & bit) {
        raise_by(&state->duplicates[j], 1);
        return;
    } else {
        raise_by(&state->reordered[j], 1);
    }
    *word |= bit;
    raise_by(&state->received[j], 1);
}

static void take(const struct datagram *in) {
    unsigned j = (unsigned)in->from - 1;
    if (memcmp(in->magic, "qsnapudp", 8) || in->from < 1 || in->from > state->peers || in->to != state->id) return;
    if (!seen[j].nonce) seen[j].nonce = in->nonce;
    if (seen[j].nonce == in->nonce) count(j, in->sequence);
    else raise_by(&state->foreign[j], 1); /* another boot of that peer */
}

void udp_receive(void) {
    struct datagram in;
    for (int n = 0; n < 8 * AT_ONCE && recv(udp_fd, &in, sizeof in, 0) == sizeof in; n++) take(&in);
}
