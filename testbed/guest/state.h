/* What the guest keeps in RAM about itself, laid out so that a RAM image alone can be judged.
 *
 * Three kinds of 4 KiB pages, each self-describing, so that physical contiguity beyond one page never matters:
 *
 *   state   one per guest: the counters of `struct state`
 *   table   generation of every stamped page, GENERATIONS of them to a page
 *   stamp   the working set; every page says which page it is and how often it was rewritten
 *
 * An image may cut the guest between any two instructions. Every counter is one aligned 8-byte word with a
 * single writer, and words are updated in an order that keeps these true at every cut:
 *
 *   sent[j]      is raised before the datagram is handed to the kernel, received[j] after it was taken from it;
 *                `sent` is also the sequence number, so the receiver's highest[] never exceeds the sender's sent[].
 *   timeouts     is the kernel's count of TCP retransmission time-outs, a little late.
 *   stream.bytes of a sender is raised before write(), of a receiver after read().
 *   a stamp      is rewritten in the order: state.touching, head.generation, head.mix, tail.generation, tail.mix,
 *                table entry, state.touched. So only page `touching` may differ from its table entry, and then
 *                its four words are new up to some point and old from there on.
 *   a digest     is written into the mark that is not current, then `current` moves to it.
 *
 * testbed/state.py reads all this: change both together and raise STATE_VERSION.
 */
#ifndef STATE_H
#define STATE_H

#include <stdint.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, MAX_PEERS = 16, STATE_VERSION = 2, GENERATIONS = 504 };

#define STATE_MAGIC "QSNAP guest stat"
#define TABLE_MAGIC "QSNAP guest tabl"
#define STAMP_MAGIC "QSNAP guest page"

/* MATCHED of a sender: all of it, with its digest, was handed over; of a receiver: it was what was announced. */
enum phase {
    STREAM_NONE,
    STREAM_OPENING,
    STREAM_OPEN,
    STREAM_ENDING,
    STREAM_MATCHED,
    STREAM_MISMATCHED,
    STREAM_BROKEN
};

/* SHA-256 of the first `bytes` of a stream; both ends take one at the same positions. */
struct mark {
    uint64_t bytes;
    uint8_t digest[32];
};

struct stream {
    uint64_t peer;
    uint64_t phase;
    uint64_t bytes;
    uint64_t current;
    struct mark mark[2];
};

struct state {
    /* Constant from the start on; `check` covers what stands above it. */
    char magic[16];
    uint64_t version, nonce, id, peers, stamp_pages, check;

    uint64_t ready, ticks, uptime_ms, touched, touching, stamp_errors, send_errors;
    uint64_t stream_errors, streams_completed, streams_matched, worked, timeouts, reserved[4];

    /* Indexed by peer id - 1. skipped: numbers jumped over (lost or late), reordered: of those, what came after all,
     * duplicates: seen twice, stale: too old to tell, foreign: from another boot of that peer. */
    uint64_t sent[MAX_PEERS], received[MAX_PEERS], highest[MAX_PEERS], duplicates[MAX_PEERS];
    uint64_t reordered[MAX_PEERS], skipped[MAX_PEERS], stale[MAX_PEERS], foreign[MAX_PEERS];

    struct stream outgoing, incoming;
};

struct table_page {
    char magic[16];
    uint64_t nonce, index, reserved[4];
    uint64_t generation[GENERATIONS];
};

struct stamp_page {
    char magic[16];
    uint64_t nonce, index, generation, mix;
    uint64_t body[PAGE_WORDS - 8];
    uint64_t tail_generation, tail_mix;
};

_Static_assert(sizeof(struct state) <= PAGE_BYTES, "the state is one page");
_Static_assert(sizeof(struct table_page) == PAGE_BYTES, "a table page is one page");
_Static_assert(sizeof(struct stamp_page) == PAGE_BYTES, "a stamp is one page");

#endif
