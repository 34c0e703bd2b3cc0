/* Work for a vCPU that would stand idle, in units of about one touch of a page (stamps.c): progress is the sum of both.
 * It runs when nothing else in the guest wants to. */
#define _GNU_SOURCE /* SCHED_IDLE */
#include <pthread.h>
#include <sched.h>

#include "guest.h"

enum { STEPS = 128 };
static volatile uint64_t result; /* so that there is something to compute */

static void *work_forever(void *unused) {
    sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){0});
    for (;;) {
        uint64_t x = state->worked;
        for (int k = 0; k < STEPS; k++) x = mix64(x);
        result = x;
        raise_by(&state->worked, 1);
    }
    return unused;
}

void work_start(bool wanted) {
    pthread_t thread;
    if (wanted && pthread_create(&thread, NULL, work_forever, NULL)) say("\"warning\":\"no thread for the work\"");
}
