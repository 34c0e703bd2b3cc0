/* One stream to the next peer, one from the previous: a ring. A stream is a row of records of RECORD_BYTES each.
 * HELLO announces the seed, DATA carries the sequence that follows from it, END the length and SHA-256 of all DATA.
 * There is no time limit and no reconnection: an established stream that breaks stays broken and is counted. */
#define _GNU_SOURCE /* accept4 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"
#include "sha256.h"

enum { RECORD_BYTES = 4096, DATA_BYTES = RECORD_BYTES - 8, DATA_WORDS = DATA_BYTES / 8, AT_ONCE = 4 };
enum kind { HELLO = 0x51534e48, DATA = 0x51534e44, END = 0x51534e45 };
static const uint64_t MARK_BYTES = 64 * DATA_BYTES;
static const uint64_t RETRY_NS = 200000000;

struct record {
    uint64_t kind;
    union {
        uint64_t word[DATA_WORDS];
        struct {
            uint64_t nonce, from;
        } hello;
        struct {
            uint64_t bytes;
            uint8_t digest[32];
        } end;
    };
};
_Static_assert(sizeof(struct record) == RECORD_BYTES, "a record has one size");

/* One end of a stream: its public half in RAM, the record under way and how much of it went through. */
struct end {
    struct stream *shown;
    struct sha256 sha;
    struct record record;
    size_t done;
    uint64_t seed;
    int fd;
};

static struct end out = {.fd = -1}, in = {.fd = -1};
static int listener = -1;
static long kbps; /* 0: as fast as it goes */
static bool finishing;
static double allowance_bytes;
static uint64_t opened_ns;

static void close_end(struct end *end) {
    if (end->fd >= 0) close(end->fd);
    end->fd = -1;
}

static void settle(struct end *end, enum phase phase) {
    publish(&end->shown->phase, phase);
    if (phase == STREAM_BROKEN) raise_by(&state->stream_errors, 1);
    close_end(end);
}

static bool settled(const struct end *end) { return end->shown->phase >= STREAM_MATCHED || !end->shown->peer; }

void tcp_open(bool wanted, long limit_kbps) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(TCP_PORT)};
    int yes = 1;
    out.shown = &state->outgoing, in.shown = &state->incoming;
    kbps = limit_kbps;
    if (!wanted || state->peers < 2) return;
    out.shown->peer = state->id % state->peers + 1;
    in.shown->peer = (state->id + state->peers - 2) % state->peers + 1;
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 4) < 0)
        say("\"warning\":\"tcp: %s\"", strerror(errno));
}

bool tcp_started(void) {
    return !out.shown->peer || (out.shown->phase >= STREAM_OPEN && in.shown->phase >= STREAM_OPEN);
}

static void hash_data(struct end *end, const struct record *record) {
    struct stream *shown = end->shown;
    sha256_update(&end->sha, record->word, DATA_BYTES);
    if (end->sha.bytes % MARK_BYTES) return;
    struct mark *next = &shown->mark[!shown->current];
    sha256_digest(&end->sha, next->digest);
    next->bytes = end->sha.bytes;
    publish(&shown->current, !shown->current);
}

static uint64_t expected_word(const struct end *end, uint64_t position, int k) {
    return mix64(end->seed ^ (position / 8 + (uint64_t)k));
}

/* ---- the sending end ---- */

static void try_connect(void) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(TCP_PORT)};
    if (out.fd >= 0 && now_ns() - opened_ns < RETRY_NS) return;
    close_end(&out);
    opened_ns = now_ns();
    out.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    to.sin_addr.s_addr = peer_address(0, (unsigned)out.shown->peer);
    publish(&out.shown->phase, STREAM_OPENING);
    if (connect(out.fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) close_end(&out);
}

static void start_sending(void) {
    out.record = (struct record){.kind = HELLO, .hello = {state->nonce, state->id}};
    out.seed = state->nonce;
    out.done = 0;
    sha256_start(&out.sha);
    publish(&out.shown->phase, STREAM_OPEN);
}

/* Whether the connection attempt has succeeded; a refused one is tried again. */
static void finish_connect(short events) {
    int error = 0;
    socklen_t size = sizeof error;
    if (!(events & (POLLOUT | POLLERR | POLLHUP))) return;
    getsockopt(out.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) close_end(&out);
    else start_sending();
}

static bool next_record(void) {
    uint64_t position = out.shown->bytes;
    if (finishing) {
        out.record = (struct record){.kind = END, .end.bytes = position};
        sha256_digest(&out.sha, out.record.end.digest);
        publish(&out.shown->phase, STREAM_ENDING);
    } else {
        if (kbps && allowance_bytes < DATA_BYTES) return false;
        allowance_bytes -= DATA_BYTES;
        out.record.kind = DATA;
        for (int k = 0; k < DATA_WORDS; k++) out.record.word[k] = expected_word(&out, position, k);
        publish(&out.shown->bytes, position + DATA_BYTES);
        hash_data(&out, &out.record);
    }
    out.done = 0;
    return true;
}

/* True when the whole record is with the kernel. */
static bool send_record(void) {
    ssize_t sent = send(out.fd, (char *)&out.record + out.done, RECORD_BYTES - out.done, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EINTR) settle(&out, STREAM_BROKEN);
    out.done += sent > 0 ? (size_t)sent : 0;
    return out.done == RECORD_BYTES;
}

static void keep_sending(void) {
    for (int n = 0; n < AT_ONCE && out.shown->phase == STREAM_OPEN; n++) {
        if (out.done < RECORD_BYTES && !send_record()) return;
        if (!next_record()) return;
    }
    if (out.shown->phase == STREAM_ENDING && send_record()) settle(&out, STREAM_MATCHED);
}

/* ---- the receiving end ---- */

static void accept_stream(void) {
    if (in.fd >= 0 || settled(&in)) return;
    in.fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    in.done = 0;
}

static void take_hello(void) {
    if (in.record.hello.from != in.shown->peer) {
        close_end(&in);
        return;
    }
    in.seed = in.record.hello.nonce;
    sha256_start(&in.sha);
    publish(&in.shown->phase, STREAM_OPEN);
}

static void take_end(void) {
    uint8_t digest[32];
    sha256_digest(&in.sha, digest);
    bool match = in.record.end.bytes == in.shown->bytes && !memcmp(digest, in.record.end.digest, sizeof digest);
    raise_by(&state->streams_completed, 1);
    raise_by(&state->streams_matched, match);
    settle(&in, match ? STREAM_MATCHED : STREAM_MISMATCHED);
}

/* A wrong word is noticed at once; its stream then ends as mismatched. */
static void take_data(void) {
    for (int k = 0; k < DATA_WORDS; k++) {
        if (in.record.word[k] == expected_word(&in, in.shown->bytes, k)) continue;
        say("\"stream_mismatch\":%lu", in.shown->bytes + 8 * (uint64_t)k);
        settle(&in, STREAM_MISMATCHED);
        return;
    }
    publish(&in.shown->bytes, in.shown->bytes + DATA_BYTES);
    hash_data(&in, &in.record);
}

static void take_record(void) {
    bool open = in.shown->phase == STREAM_OPEN;
    in.done = 0;
    if (!open && in.record.kind == HELLO) take_hello();
    else if (open && in.record.kind == DATA) take_data();
    else if (open && in.record.kind == END) take_end();
    else settle(&in, STREAM_BROKEN);
}

/* An attempt that ends before its HELLO is the sender trying again, not an error. */
static void lose_incoming(void) {
    if (in.shown->phase == STREAM_OPEN) settle(&in, STREAM_BROKEN);
    else close_end(&in);
}

static void keep_receiving(void) {
    for (int n = 0; n < AT_ONCE && in.fd >= 0; n++) {
        ssize_t got = recv(in.fd, (char *)&in.record + in.done, RECORD_BYTES - in.done, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0) lose_incoming();
        else if ((in.done += (size_t)got) == RECORD_BYTES) take_record();
    }
}

/* ---- what the main loop calls ---- */

void tcp_poll_fds(struct pollfd *fds) {
    bool waiting = out.shown->phase == STREAM_OPENING || out.done < RECORD_BYTES;
    fds[0] = (struct pollfd){.fd = in.fd < 0 && !settled(&in) ? listener : -1, .events = POLLIN};
    fds[1] = (struct pollfd){.fd = in.fd, .events = POLLIN};
    fds[2] = (struct pollfd){.fd = out.fd, .events = waiting || !kbps ? POLLOUT : 0};
}

void tcp_work(const struct pollfd *fds, uint64_t elapsed_ns) {
    if (listener < 0) return;
    double limit = 64 * RECORD_BYTES; /* like the stamps: no burst after a hold-up */
    allowance_bytes += (double)elapsed_ns * (double)kbps / 8e6;
    allowance_bytes = allowance_bytes < limit ? allowance_bytes : limit;
    if (fds[0].revents) accept_stream();
    if (fds[1].revents) keep_receiving();
    if (out.shown->phase == STREAM_OPENING && out.fd >= 0 && out.fd == fds[2].fd) finish_connect(fds[2].revents);
    if (out.shown->phase <= STREAM_OPENING) try_connect();
    else if (!settled(&out)) keep_sending();
}

/* Until the next record is to be sent, if it is time that it waits for. */
uint64_t tcp_rest_ns(void) {
    if (!kbps || out.shown->phase != STREAM_OPEN || out.done < RECORD_BYTES) return UINT64_MAX;
    return allowance_bytes < DATA_BYTES ? (uint64_t)((DATA_BYTES - allowance_bytes) * 8e6 / (double)kbps) : 0;
}

/* A counter of the kernel's; its file has a row of names, and one of numbers below. */
static uint64_t netstat(const char *name) {
    static char text[8192];
    char *rows[2], *rest = text, *keys, *values, *key, *value;
    int fd = open("/proc/net/netstat", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    text[length > 0 ? length : 0] = 0;
    for (int i = 0; i < 2; i++) rows[i] = strsep(&rest, "\n");
    for (keys = rows[0], values = rows[1]; (key = strsep(&keys, " ")) && (value = strsep(&values, " "));)
        if (!strcmp(key, name)) return strtoull(value, NULL, 10);
    return 0;
}

void tcp_count_timeouts(void) { publish(&state->timeouts, netstat("TCPTimeouts")); }

void tcp_finish(void) { finishing = true; }

bool tcp_finished(void) { return finishing && settled(&out) && settled(&in); }
