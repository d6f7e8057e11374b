/* A pool of worker threads that a caller does not have to wait for.
 *
 * Parts are claimed one by one, by the caller too, and a job is over when its parts are done, not when every worker
 * has shown up. On a machine whose cores are shared with other processes, as every instance of a cluster's are, a
 * worker that is not scheduled therefore delays nobody, where OpenMP's barrier would spin for it. A step has hundreds
 * of short jobs: a worker without work looks out for the next one for a moment before it goes to sleep.
 *
 * One atomic ticket holds the job's number, its threads, the next part and the number of parts, so that a part is
 * only ever claimed of the job it belongs to. A job's fields stay until its last claimed part is done. */
#include "pool.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define WORKERS_MAX 254
#define LOOKOUT_ROUNDS 1500
#define PATIENCE_ROUNDS 4000
#define PART_BITS 20
#define THREADS_SHIFT (2 * PART_BITS)
#define NUMBER_SHIFT (THREADS_SHIFT + 8)

static pthread_mutex_t caller_lock = PTHREAD_MUTEX_INITIALIZER, sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static _Atomic uint64_t ticket; /* job number, threads, next part, parts */
static atomic_int done, sleepers;
static part_function job_run;
static const void *job_data;
static int workers;

static inline int next_of(uint64_t value) { return (int)(value >> PART_BITS & PARTS_MAX); }
static inline int parts_of(uint64_t value) { return (int)(value & PARTS_MAX); }
static inline int threads_of(uint64_t value) { return (int)(value >> THREADS_SHIFT & 255); }

/* Whether the job has a part left that `slot` may run. */
static inline int open_to(uint64_t value, int slot) {
    return next_of(value) < parts_of(value) && slot < threads_of(value);
}

static inline void breathe(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Claim and run one part. 0: there is none left. */
static int work(int slot) {
    uint64_t seen = atomic_load(&ticket);
    while (open_to(seen, slot))
        if (atomic_compare_exchange_weak(&ticket, &seen, seen + (1u << PART_BITS))) {
            job_run(job_data, next_of(seen), slot);
            atomic_fetch_add(&done, 1);
            return 1;
        }
    return 0;
}

static void *worker(void *argument) {
    const int slot = (int)(intptr_t)argument;
    for (;;) {
        int rounds = 0;
        while (!open_to(atomic_load(&ticket), slot) && rounds++ < LOOKOUT_ROUNDS) breathe();
        if (!open_to(atomic_load(&ticket), slot)) {
            pthread_mutex_lock(&sleep_lock);
            atomic_fetch_add(&sleepers, 1);
            while (!open_to(atomic_load(&ticket), slot)) pthread_cond_wait(&wake, &sleep_lock);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&sleep_lock);
        }
        while (work(slot)) continue;
    }
    return NULL;
}

static void hire(int wanted) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (workers < wanted && workers < WORKERS_MAX) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)(workers + 1))) break;
        workers++;
    }
    pthread_attr_destroy(&attributes);
}

void llumnix_run_parts(part_function run, const void *job, int parts, int threads) {
    /* With one thread, or while another caller has the workers, everything is done here. */
    if (threads <= 1 || parts <= 1 || pthread_mutex_trylock(&caller_lock)) {
        for (int part = 0; part < parts; part++) run(job, part, 0);
        return;
    }
    threads = threads <= WORKERS_MAX ? threads : WORKERS_MAX + 1;
    hire(threads - 1);
    job_run = run;
    job_data = job;
    atomic_store(&done, 0);
    const uint64_t number = (atomic_load(&ticket) >> NUMBER_SHIFT) + 1;
    atomic_store(&ticket, number << NUMBER_SHIFT | (uint64_t)threads << THREADS_SHIFT | (uint64_t)parts);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    while (work(0)) continue;
    for (int rounds = 0; atomic_load(&done) < parts; rounds++)
        if (rounds < PATIENCE_ROUNDS) breathe();
        else sched_yield();
    pthread_mutex_unlock(&caller_lock);
}
