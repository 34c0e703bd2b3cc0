/* The working set: pages that know what they should hold, verified at every touch. Order of writes: state.h. */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define STEP 0x9e3779b97f4a7c15u /* between neighbouring words of a body */

static struct stamp_page *stamps;
static struct table_page *table;
static long pages_per_second;
static uint64_t first_bad_page, reported_errors;

static uint64_t *generation_of(uint64_t index) {
    return &table[index / GENERATIONS].generation[index % GENERATIONS];
}

static uint64_t stamp_mix(uint64_t index, uint64_t generation) {
    return mix64(state->nonce ^ mix64(index << 40 ^ generation));
}

static void stamp_first(uint64_t index) {
    struct stamp_page *page = &stamps[index];
    uint64_t seed = mix64(state->nonce + index);
    for (int k = 0; k < PAGE_WORDS - 8; k++) page->body[k] = seed + k * STEP;
    page->nonce = state->nonce;
    page->index = index;
    page->mix = page->tail_mix = stamp_mix(index, 0);
    memcpy(page->magic, STAMP_MAGIC, sizeof page->magic);
}

void stamps_allocate(size_t megabytes) {
    size_t pages = megabytes * (1 << 20) / PAGE_BYTES, tables = (pages + GENERATIONS - 1) / GENERATIONS;
    state->stamp_pages = pages;
    if (!pages) return;
    table = locked_pages(tables);
    stamps = locked_pages(pages);
    for (size_t i = 0; i < tables; i++) {
        memcpy(table[i].magic, TABLE_MAGIC, sizeof table[i].magic);
        table[i].nonce = state->nonce;
        table[i].index = i;
    }
    for (size_t i = 0; i < pages; i++) stamp_first(i);
}

/* Reading all 4 KiB at every touch would cost too much: one word of the body, another each time. */
static bool stamp_is_good(const struct stamp_page *page, uint64_t index, uint64_t generation) {
    uint64_t mix = stamp_mix(index, generation), k = generation % (PAGE_WORDS - 8);
    return page->nonce == state->nonce && page->index == index && page->generation == generation &&
           page->mix == mix && page->tail_generation == generation && page->tail_mix == mix &&
           page->body[k] == mix64(state->nonce + index) + k * STEP && !memcmp(page->magic, STAMP_MAGIC, 16);
}

static void touch(uint64_t index) {
    struct stamp_page *page = &stamps[index];
    uint64_t *generation = generation_of(index), next = *generation + 1, mix = stamp_mix(index, next);
    if (!stamp_is_good(page, index, *generation)) {
        first_bad_page = state->stamp_errors ? first_bad_page : index;
        raise_by(&state->stamp_errors, 1);
        stamp_first(index);
    }
    publish(&state->touching, index);
    publish(&page->generation, next);
    publish(&page->mix, mix);
    publish(&page->tail_generation, next);
    publish(&page->tail_mix, mix);
    publish(generation, next);
    raise_by(&state->touched, 1);
}

/* Until there are some pages to touch: emulated, it takes long to wake for each. */
static void rest(double per_ns) {
    double rest_ns = per_ns > 0 ? 16 / per_ns : LONGEST_REST_NS;
    if (per_ns > 0 && rest_ns > 10 * SHORTEST_REST_NS) rest_ns = 10 * SHORTEST_REST_NS;
    if (rest_ns < SHORTEST_REST_NS) rest_ns = SHORTEST_REST_NS;
    nanosleep(&(struct timespec){.tv_nsec = (long)rest_ns}, NULL);
}

/* Debt is forgotten beyond 20 ms: a guest that was held up does not catch up in one burst. */
static void *touch_forever(void *unused) {
    uint64_t index = 0, then = now_ns();
    double due = 0;
    for (;;) {
        uint64_t now = now_ns();
        double per_ns = (double)__atomic_load_n(&pages_per_second, __ATOMIC_RELAXED) / 1e9;
        due += (double)(now - then) * per_ns;
        due = due < 20e6 * per_ns ? due : 20e6 * per_ns;
        then = now;
        for (int n = 0; n < 256 && due >= 1; n++, due--) {
            touch(index);
            index = index + 1 < state->stamp_pages ? index + 1 : 0;
        }
        if (due < 1) rest(per_ns);
    }
    return unused;
}

/* Behind the network in priority, so that one vCPU still answers frames at once while pages are written. */
static void *stamps_thread(void *argument) {
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 5);
    return touch_forever(argument);
}

void stamps_set_rate(long rate_mb) {
    long pages = state->stamp_pages ? rate_mb * 1000000 / PAGE_BYTES : 0;
    __atomic_store_n(&pages_per_second, pages, __ATOMIC_RELAXED);
}

void stamps_start(long rate_mb) {
    pthread_t thread;
    stamps_set_rate(rate_mb);
    if (state->stamp_pages && pthread_create(&thread, NULL, stamps_thread, NULL))
        say("\"warning\":\"no thread for the working set\"");
}

/* Called by the thread that owns the console. */
void stamps_report(void) {
    uint64_t errors = __atomic_load_n(&state->stamp_errors, __ATOMIC_ACQUIRE);
    if (errors == reported_errors) return;
    reported_errors = errors;
    say("\"stamp_errors\":%lu,\"first_bad_page\":%lu", errors, first_bad_page);
}
