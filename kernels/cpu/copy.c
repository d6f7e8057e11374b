/* Copies runs of KV blocks from one pool to another while an engine computes on the same cores: to another instance,
 * or to and from the memory for KV that is swapped out.
 *
 * Stores bypass the caches: the bytes are not read again before they have left them, a plain store would first fetch
 * the line it overwrites, and the engine keeps its own data in the cache. Four pages at a time keep more of the
 * memory's banks busy than one (measured: about twice the speed of memmove on one core of a server). A short copy,
 * whose bytes the next step reads at once, is a plain one.
 *
 * A copy may be told to take only a share of the time. It then rests between pieces, so that each step of the engine
 * loses a little instead of one losing much. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__AVX__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define PAGE 4096
#define PAGES 4
#define PIECE (1 << 20)
#define STREAM_FROM (512 << 10)

#if defined(__AVX512F__)
#define LINE 64
static inline void stream(char *to, const char *from) {
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512((const void *)from));
}
#elif defined(__AVX__)
#define LINE 32
static inline void stream(char *to, const char *from) {
    _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
}
#endif

#ifdef LINE
static void copy_past_caches(char *to, const char *from, size_t bytes) {
    size_t done = 0;
    for (; done + PAGES * PAGE <= bytes; done += PAGES * PAGE)
        for (size_t line = 0; line < PAGE; line += 64)
            for (size_t page = 0; page < PAGES; page++)
                for (size_t part = 0; part < 64; part += LINE) {
                    size_t at = done + page * PAGE + line + part;
                    stream(to + at, from + at);
                }
    for (; done + LINE <= bytes; done += LINE) stream(to + done, from + done);
    _mm_sfence();
    memcpy(to + done, from + done, bytes - done);
}
#endif

static void copy(char *to, const char *from, size_t bytes, int past_caches) {
#ifdef LINE
    if (past_caches && (uintptr_t)to % LINE == 0) {
        copy_past_caches(to, from, bytes);
        return;
    }
#endif
    memcpy(to, from, bytes);
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Each row of `copies` is where to, where from, and how many bytes. */
void llumnix_copy_bytes(char *to, const char *from, const int64_t *copies, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += copies[3 * i + 2];
    for (const int64_t *row = copies; row < copies + 3 * count; row += 3)
        copy(to + row[0], from + row[1], (size_t)row[2], total >= STREAM_FROM && row[2] >= PAGES * PAGE);
}

/* Copies `count` runs, each {source block, target block, blocks}. With a `share` below 1 copying takes that part of the
 * time. Returns the nanoseconds that were spent copying. */
int64_t llumnix_copy_runs(char *target, const char *source, const int64_t *runs, int64_t count, int64_t block_bytes,
                          double share) {
    int64_t total = 0, copied_ns = 0, due = 0;
    for (int64_t i = 0; i < count; i++) total += runs[3 * i + 2] * block_bytes;
    const int past_caches = total >= STREAM_FROM;
    int64_t begun = now_ns();
    for (int64_t i = 0; i < count; i++) {
        const char *from = source + runs[3 * i] * block_bytes;
        char *to = target + runs[3 * i + 1] * block_bytes;
        for (int64_t left = runs[3 * i + 2] * block_bytes, bytes; left > 0; left -= bytes) {
            bytes = left < PIECE - due ? left : PIECE - due;
            copy(to, from, (size_t)bytes, past_caches);
            to += bytes, from += bytes, due += bytes;
            if (due < PIECE && (left > bytes || i + 1 < count)) continue;
            due = 0;
            int64_t spent = now_ns() - begun;
            copied_ns += spent;
            if (share < 1) {
                int64_t rest = (int64_t)((double)spent * (1 / share - 1));
                struct timespec sleep = {.tv_sec = rest / 1000000000, .tv_nsec = rest % 1000000000};
                nanosleep(&sleep, NULL);
            }
            begun = now_ns();
        }
    }
    return copied_ns;
}
