/* y = x W^T for bfloat16 weights on processors that multiply bfloat16: AVX-512's dot products, or AMX tiles.
 *
 * The activations are rounded to bfloat16, as on a GPU; sums are in float. Weights are packed in strips of 32 outputs,
 * [strip][in / 32][2 panels][16][16 outputs][2 inputs], zeros beyond the last input, so that one pass over a strip
 * streams through memory once; a gated strip is one panel of the gate and one of the up projection. Activations are
 * packed in tiles of 16 rows by 32 inputs. Every output adds up its inputs in the same order, whatever rows it is
 * computed with: a row's result does not depend, to the last bit, on the others or on the threads. The two ways of
 * multiplying differ in the last bits from each other; a machine uses one. */
#include "linear.h"
#include "pool.h"
#include <stdlib.h>

#ifdef __AVX512BF16__
#include "avx512.h"

#define STRIP (2 * PANEL)
#define CHUNK 32 /* inputs of one tile */
#define ALIGNMENT 64
#define ROW_BLOCK_BYTES (768 << 10) /* packed rows that stay in the second-level cache while all strips pass by */
#define AHEAD_BYTES 8192
#define PARTS_PER_THREAD 4
#define STRIPS_MIN 2      /* least strips of a part */
#define OWN_TILES_MIN 8   /* row tiles a thread must have to take rows of its own */

struct bf16_job {
    const struct linear_job *linear;
    char *packed; /* [row tile][chunk] of TILE_BYTES */
    enum product product;
    size_t chunks, strips, row_tiles;
    int parts, own_rows;
};

/* Products of up to two row tiles and the two panels of a strip. */
struct tile {
    float at[TILE_ROWS][PANEL];
};

/* One row tile of x to bfloat16, zeros beyond the last row and input. */
INLINE void pack_tile(const struct bf16_job *job, size_t tile) {
    const struct linear_job *linear = job->linear;
    for (size_t chunk = 0; chunk < job->chunks; chunk++) {
        char *to = job->packed + (tile * job->chunks + chunk) * TILE_BYTES;
        const size_t left = linear->in - chunk * CHUNK;
        const __mmask32 mask = left >= CHUNK ? 0xffffffffu : (1u << left) - 1;
        for (size_t r = 0; r < TILE_ROWS; r++, to += TILE_BYTES / TILE_ROWS) {
            const size_t row = tile * TILE_ROWS + r;
            if (row >= linear->rows) {
                memset(to, 0, TILE_BYTES / TILE_ROWS);
                continue;
            }
            const float *from = linear->x + row * linear->in + chunk * CHUNK;
            const __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, from);
            const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + 16);
            const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            memcpy(to, &both, sizeof both);
        }
    }
}

/* Weights that will be wanted: `lines` of every 32 from `from` on, in step with the chunks. */
struct ahead {
    const char *from;
    int lines;
};

/* While a strip is multiplied `passes` times, the next one is fetched bit by bit; in a single pass, what lies a little
 * ahead. */
INLINE struct ahead ahead_of(const char *strip, size_t chunks, size_t pass, size_t passes) {
    if (passes == 1) return (struct ahead){strip + AHEAD_BYTES, 2 * TILE_BYTES / 64};
    const size_t lines = (2 * TILE_BYTES / 64 + passes - 1) / passes;
    return (struct ahead){strip + chunks * 2 * TILE_BYTES + pass * lines * 64, (int)lines};
}

INLINE void fetch(struct ahead *ahead) {
    for (int line = 0; line < ahead->lines; line++) __builtin_prefetch(ahead->from + line * 64);
    ahead->from += 2 * TILE_BYTES;
}

#define ROWS_TOGETHER 8 /* two vectors of sums each, of 32 registers */

/* `rows` rows of a packed row tile, a constant, from row `first` on. */
INLINE void dot_rows(struct tile *tiles, const char *x, const char *strip, size_t chunks, int first, const int rows) {
    struct ahead ahead = ahead_of(strip, chunks, 0, 1);
    __m512 sums[2][ROWS_TOGETHER];
    for (int r = 0; r < rows; r++) sums[0][r] = sums[1][r] = _mm512_setzero_ps();
    for (size_t chunk = 0; chunk < chunks; chunk++, x += TILE_BYTES, strip += 2 * TILE_BYTES) {
        if (first == 0) fetch(&ahead);
#pragma GCC unroll 2
        for (int pair = 0; pair < CHUNK / 2; pair++) {
            const __m512bh low = (__m512bh)_mm512_loadu_si512(strip + pair * 64);
            const __m512bh high = (__m512bh)_mm512_loadu_si512(strip + TILE_BYTES + pair * 64);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, x + (first + r) * 64 + pair * 4, sizeof two);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
                sums[0][r] = _mm512_dpbf16_ps(sums[0][r], low, inputs);
                sums[1][r] = _mm512_dpbf16_ps(sums[1][r], high, inputs);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(tiles[0].at[first + r], sums[0][r]);
        _mm512_storeu_ps(tiles[1].at[first + r], sums[1][r]);
    }
}

static void multiply_dots(struct tile *tiles, const char *x, const char *strip, size_t chunks, int rows) {
    int first = 0;
    for (; rows - first >= 8; first += 8) dot_rows(tiles, x, strip, chunks, first, 8);
    for (; rows - first >= 3; first += 3) dot_rows(tiles, x, strip, chunks, first, 3);
    for (; rows - first >= 1; first += 1) dot_rows(tiles, x, strip, chunks, first, 1);
}

#ifdef __AMX_BF16__

/* Tile registers: 0 … 3 sums, 4 and 5 rows, 6 and 7 weights. */
static void multiply_one(struct tile *tiles, const char *x, const char *strip, size_t chunks, struct ahead ahead) {
    _tile_zero(0);
    _tile_zero(1);
    for (size_t chunk = 0; chunk < chunks; chunk++, x += TILE_BYTES, strip += 2 * TILE_BYTES) {
        fetch(&ahead);
        _tile_loadd(4, x, 64);
        _tile_loadd(6, strip, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, strip + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, &tiles[0], 64);
    _tile_stored(1, &tiles[1], 64);
}

static void multiply_two(struct tile *tiles, const char *x, const char *strip, size_t chunks, struct ahead ahead) {
    const size_t next = chunks * TILE_BYTES;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t chunk = 0; chunk < chunks; chunk++, x += TILE_BYTES, strip += 2 * TILE_BYTES) {
        fetch(&ahead);
        _tile_loadd(6, strip, 64);
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, strip + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + next, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, &tiles[0], 64);
    _tile_stored(1, &tiles[1], 64);
    _tile_stored(2, &tiles[2], 64);
    _tile_stored(3, &tiles[3], 64);
}

#endif

/* Sixteen outputs of one row. `up` is the up projection where `values` is the gate. */
INLINE void finish_row(const struct linear_job *job, __m512 values, __m512 up, size_t row, size_t column, __mmask16 mask) {
    float *to = job->y + row * job->out + column;
    if (job->bias) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, job->bias + column));
    if (job->finish == SILU_MUL) {
        const __m512 power = _mm512_mul_ps(values, _mm512_set1_ps(-LOG2_E));
        const __m512 below = power_of_two(_mm512_min_ps(power, _mm512_set1_ps(126.0f)));
        values = _mm512_mul_ps(_mm512_div_ps(values, _mm512_add_ps(below, _mm512_set1_ps(1.0f))), up);
    }
    if (job->finish == ADD) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, to));
    _mm512_mask_storeu_ps(to, mask, values);
}

/* Two panels of 16 outputs each, or one gated panel. */
INLINE void finish_strip(const struct linear_job *job, const struct tile *tiles, size_t row, size_t strip) {
    const size_t rows = job->rows - row < TILE_ROWS ? job->rows - row : TILE_ROWS;
    const int panels = job->finish == SILU_MUL ? 1 : 2;
    for (int panel = 0; panel < panels; panel++) {
        const size_t column = (strip * (size_t)panels + (size_t)panel) * PANEL;
        if (column >= job->out) return;
        const size_t left = job->out - column;
        const __mmask16 mask = left < PANEL ? (__mmask16)((1u << left) - 1) : 0xffff;
        for (size_t r = 0; r < rows; r++)
            finish_row(job, _mm512_load_ps(tiles[panel].at[r]), _mm512_load_ps(tiles[1].at[r]), row + r, column, mask);
    }
}

/* Outputs of one strip for the row tiles first … last. */
INLINE void run_strip(const struct bf16_job *job, size_t strip, size_t first, size_t last) {
    const struct linear_job *linear = job->linear;
    const char *weights = linear->weights + strip * job->chunks * 2 * TILE_BYTES;
    struct tile tiles[4] __attribute__((aligned(ALIGNMENT)));
    size_t at = first;
#ifdef __AMX_BF16__
    if (job->product == AMX_BF16) {
        const size_t passes = (last - first + 1) / 2;
        for (size_t pass = 0; at < last; pass++, at += 2) {
            const char *x = job->packed + at * job->chunks * TILE_BYTES;
            const struct ahead ahead = ahead_of(weights, job->chunks, pass, passes);
            if (at + 1 == last) {
                multiply_one(tiles, x, weights, job->chunks, ahead);
            } else {
                multiply_two(tiles, x, weights, job->chunks, ahead);
                finish_strip(linear, tiles + 2, (at + 1) * TILE_ROWS, strip);
            }
            finish_strip(linear, tiles, at * TILE_ROWS, strip);
        }
        return;
    }
#endif
    for (; at < last; at++) {
        const size_t left = linear->rows - at * TILE_ROWS;
        multiply_dots(tiles, job->packed + at * job->chunks * TILE_BYTES, weights, job->chunks,
                      left < TILE_ROWS ? (int)left : TILE_ROWS);
        finish_strip(linear, tiles, at * TILE_ROWS, strip);
    }
}

/* Row tiles first_row … last_row by strips first … last. */
INLINE void run_block(const struct bf16_job *job, size_t first, size_t last, size_t first_row, size_t last_row) {
    size_t block = ROW_BLOCK_BYTES / (job->chunks * TILE_BYTES) / 2 * 2;
    if (block < 2) block = 2;
#ifdef __AMX_BF16__
    if (job->product == AMX_BF16) configure_tiles();
#endif
    for (size_t row = first_row; row < last_row; row += block) {
        const size_t end = last_row - row < block ? last_row : row + block;
        for (size_t strip = first; strip < last; strip++) run_strip(job, strip, row, end);
    }
#ifdef __AMX_BF16__
    if (job->product == AMX_BF16) _tile_release();
#endif
}

/* With many rows a part is a stretch of them, which a thread then finds in its own cache, else a stretch of strips. */
static void run_part(const void *data, int part, int slot) {
    const struct bf16_job *job = data;
    const size_t all = job->own_rows ? job->row_tiles : job->strips;
    const size_t first = all * (size_t)part / (size_t)job->parts, last = all * (size_t)(part + 1) / (size_t)job->parts;
    (void)slot;
    if (job->own_rows) {
        for (size_t tile = first; tile < last; tile++) pack_tile(job, tile);
        run_block(job, 0, job->strips, first, last);
    } else {
        run_block(job, first, last, 0, job->row_tiles);
    }
}

int llumnix_linear_bf16(const struct linear_job *linear, enum product product, int threads) {
    const size_t width = linear->finish == SILU_MUL ? PANEL : STRIP, strips = (linear->out + width - 1) / width;
    const size_t chunks = (linear->in + CHUNK - 1) / CHUNK, row_tiles = (linear->rows + TILE_ROWS - 1) / TILE_ROWS;
    const size_t shares = threads > 1 ? (size_t)threads * PARTS_PER_THREAD : 1, most = strips / STRIPS_MIN;
    const int own_rows = threads > 1 && row_tiles >= (size_t)threads * OWN_TILES_MIN;
    char *packed = aligned_alloc(ALIGNMENT, row_tiles * chunks * TILE_BYTES);
    if (packed == NULL) return 1;
    const struct bf16_job job = {
        .linear = linear,
        .packed = packed,
        .product = product,
        .chunks = chunks,
        .strips = strips,
        .row_tiles = row_tiles,
        .own_rows = own_rows,
        .parts = own_rows ? threads : (int)(shares < most ? shares : most ? most : 1),
    };
    for (size_t tile = 0; !own_rows && tile < row_tiles; tile++) pack_tile(&job, tile);
    llumnix_run_parts(run_part, &job, job.parts, threads);
    free(packed);
    return 0;
}

#else

int llumnix_linear_bf16(const struct linear_job *linear, enum product product, int threads) {
    (void)linear, (void)product, (void)threads;
    return 1;
}

#endif
