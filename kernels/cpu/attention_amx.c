/* Attention of new tokens over bfloat16 KV in AMX tiles; see attention.c for what is computed.
 *
 * Queries and softmax weights are rounded to bfloat16, sums are in float. A task is one KV head and some tokens of one
 * request, whose query rows lie in tiles of 16. Keys are taken in stretches: a stretch's scores stand keys × rows, since
 * keys lie in the pool as a tile wants its left side, so that maxima and sums of 16 rows are taken lane by lane. Between
 * stretches sums are rescaled to the new maximum (online softmax, Milakov and Gimelshein 2018).
 *
 * Stretches begin at multiples of STRETCH from position 0, and one that lies beyond a row's context changes nothing of
 * the row. A row's result is therefore the same, to the last bit, whether it is decoded or prefilled, in whatever chunk,
 * batch or number of threads. */
#include "attention.h"
#include "pool.h"
#include <stdlib.h>

#ifdef __AMX_BF16__
#include "avx512.h"

#define STRETCH 256 /* keys */
#define PAIR_KEYS 32
#define ROWS_WANTED 96 /* rows of a task, if it has as many tokens */
#define AHEAD 4        /* key tiles fetched ahead */

struct task {
    float *out;
    const float *query;
    const char *keys; /* of this KV head in block 0 */
    const int32_t *table;
    size_t block_bytes, value_offset, row_bytes, query_stride, out_stride, head_dim;
    int block_shift, sharing, rows, start;
    float scale;
};

/* What a task works on, per thread. Row tiles of packed queries, sums and maxima, then one stretch. */
struct scratch {
    char *queries, *values, *weights;
    float *mixed, *scores, *highest, *sums;
};

INLINE const char *key_tile(const struct task *task, int position) {
    return task->keys + (size_t)task->table[position >> task->block_shift] * task->block_bytes +
           (size_t)(position & ((1 << task->block_shift) - 1)) * task->row_bytes;
}

/* The context of the last token that has a row among these. */
INLINE int context_of(const struct task *task, int row) {
    return task->start + (row < task->rows ? row : task->rows - 1) / task->sharing + 1;
}

/* Queries of one row tile, in pairs of dimensions by rows: [head_dim / 32][16][16 rows][2]. */
INLINE void pack_queries(const struct task *task, char *to, int first) {
    const int rows = task->rows - first < TILE_ROWS ? task->rows - first : TILE_ROWS;
    for (size_t d = 0; d < task->head_dim; d += 32, to += TILE_BYTES) {
        __m512i pairs[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) {
            pairs[r] = _mm512_setzero_si512();
            if (r >= rows) continue;
            const float *from = task->query + (size_t)((first + r) / task->sharing) * task->query_stride +
                                (size_t)((first + r) % task->sharing) * task->head_dim + d;
            pairs[r] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + PANEL), _mm512_loadu_ps(from));
        }
        transpose(pairs);
        for (int pair = 0; pair < TILE_ROWS; pair++) _mm512_store_si512(to + pair * 64, pairs[pair]);
    }
}

/* Values of up to a stretch's keys, in pairs of keys: [keys / 32][head_dim / 16][16][16 dimensions][2], zeros beyond the
 * context, for what lies there may be anything. */
INLINE void pack_values(const struct task *task, char *to, int position, int end) {
    for (; position < end; position += PAIR_KEYS, to += task->head_dim * PAIR_KEYS * 2)
        for (int pair = 0; pair < PAIR_KEYS / 2; pair++) {
            const int key = position + 2 * pair;
            const char *value = key < end ? key_tile(task, key) + task->value_offset : NULL;
            for (size_t d = 0; d < task->head_dim / PANEL; d++) {
                __m512i both = _mm512_setzero_si512();
                if (key < end) both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(value + d * 32)));
                if (key + 1 < end) {
                    const __m256i second = _mm256_loadu_si256((const void *)(value + task->row_bytes + d * 32));
                    both = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
                }
                _mm512_store_si512(to + d * TILE_BYTES + pair * 64, both);
            }
        }
}

INLINE void fetch_tile(const struct task *task, int position, int end, size_t offset) {
    if (position >= end) return;
    const char *from = key_tile(task, position) + offset;
    for (size_t at = 0; at < TILE_ROWS * task->row_bytes; at += 64) __builtin_prefetch(from + at);
}

/* Scores of a stretch's keys by 16 rows. With the first row tile, keys and values to come are fetched. */
INLINE void score(const struct task *task, float *scores, const char *queries, int position, int end, int first) {
    for (; position < end; position += TILE_ROWS, scores += TILE_ROWS * PANEL) {
        const char *keys = key_tile(task, position);
        if (first) {
            fetch_tile(task, position + AHEAD * TILE_ROWS, end, 0);
            fetch_tile(task, position, end, task->value_offset);
        }
        _tile_zero(0);
        for (size_t d = 0; d < task->head_dim; d += 32) {
            _tile_loadd(4, keys + d * 2, task->row_bytes);
            _tile_loadd(6, queries + d * 32, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, scores, 64);
    }
}

/* Which of 16 rows have a key in their context. */
INLINE __mmask16 sees(__m512i contexts, int key) { return _mm512_cmpgt_epi32_mask(contexts, _mm512_set1_epi32(key)); }

/* Scores to weights [keys / 32][16 rows][32 keys] in bfloat16; sums, maxima and what was mixed so far are brought to the
 * new maxima. */
INLINE void soften(const struct task *task, const struct scratch *scratch, int tile, int position, int end) {
    float *const highest = scratch->highest + tile * PANEL, *const sums = scratch->sums + tile * PANEL;
    int contexts_of[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) contexts_of[r] = context_of(task, tile * TILE_ROWS + r);
    const __m512i contexts = _mm512_loadu_si512(contexts_of);
    const int seen_by_all = contexts_of[0] < end ? contexts_of[0] : end;
    const __m512 before = _mm512_loadu_ps(highest), factor = _mm512_set1_ps(task->scale * LOG2_E);
    __m512 best = _mm512_set1_ps(-__builtin_inff());
    int key = position;
    for (; key < seen_by_all; key++)
        best = _mm512_max_ps(best, _mm512_loadu_ps(scratch->scores + (key - position) * PANEL));
    for (; key < end; key++)
        best = _mm512_mask_max_ps(best, sees(contexts, key), best,
                                  _mm512_loadu_ps(scratch->scores + (key - position) * PANEL));
    best = _mm512_max_ps(before, _mm512_mul_ps(best, factor));
    __m512 sum = _mm512_setzero_ps();
    char *to = scratch->weights;
    for (key = position; key < end; key += PAIR_KEYS, to += TILE_BYTES) {
        __m512i pairs[TILE_ROWS];
        for (int pair = 0; pair < PAIR_KEYS / 2; pair++) {
            __m512 weights[2];
            for (int i = 0; i < 2; i++) {
                const int at = key + 2 * pair + i;
                const float *from = scratch->scores + (at - position) * PANEL;
                const __mmask16 seen = at < seen_by_all ? 0xffff : at < end ? sees(contexts, at) : 0;
                const __m512 score = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(seen, from), factor, best);
                weights[i] = _mm512_maskz_mov_ps(seen, power_of_two(score));
                sum = _mm512_add_ps(sum, weights[i]);
            }
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weights[0]));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(weights[1]));
            pairs[pair] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        transpose(pairs);
        for (int r = 0; r < TILE_ROWS; r++) _mm512_store_si512(to + r * 64, pairs[r]);
    }
    const __m512 fade = power_of_two(_mm512_sub_ps(before, best));
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), fade, sum));
    _mm512_storeu_ps(highest, best);
    if (position == 0) return;
    float fades[TILE_ROWS], *mixed = scratch->mixed + (size_t)tile * TILE_ROWS * task->head_dim;
    _mm512_storeu_ps(fades, fade);
    for (size_t d = 0; d < task->head_dim / PANEL; d++)
        for (int r = 0; r < TILE_ROWS; r++, mixed += PANEL)
            _mm512_store_ps(mixed, _mm512_mul_ps(_mm512_load_ps(mixed), _mm512_set1_ps(fades[r])));
}

/* mixed += weights * values for two tiles of 16 dimensions. */
INLINE void mix(float *mixed, const char *weights, const char *values, size_t values_stride, int blocks) {
    _tile_loadd(0, mixed, 64);
    _tile_loadd(1, mixed + TILE_ROWS * PANEL, 64);
    for (; blocks > 0; blocks--, weights += TILE_BYTES, values += values_stride) {
        _tile_loadd(4, weights, 64);
        _tile_loadd(6, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, mixed, 64);
    _tile_stored(1, mixed + TILE_ROWS * PANEL, 64);
}

INLINE void attend(const struct task *task, const struct scratch *scratch) {
    const int tiles = (task->rows + TILE_ROWS - 1) / TILE_ROWS, context = context_of(task, task->rows - 1);
    const size_t tile_floats = TILE_ROWS * task->head_dim;
    for (int at = 0; at < AHEAD; at++) fetch_tile(task, at * TILE_ROWS, context, 0);
    memset(scratch->mixed, 0, (size_t)tiles * tile_floats * sizeof(float));
    for (int i = 0; i < tiles * PANEL; i++) {
        scratch->sums[i] = 0.0f;
        scratch->highest[i] = -1e30f;
    }
    for (int tile = 0; tile < tiles; tile++)
        pack_queries(task, scratch->queries + (size_t)tile * tile_floats * 2, tile * TILE_ROWS);
    for (int position = 0; position < context; position += STRETCH) {
        const int end = context - position < STRETCH ? context : position + STRETCH;
        int packed = 0;
        for (int tile = 0; tile < tiles; tile++) {
            const int last = context_of(task, tile * TILE_ROWS + TILE_ROWS - 1), here = last < end ? last : end;
            if (here <= position) continue;
            score(task, scratch->scores, scratch->queries + (size_t)tile * tile_floats * 2, position, here, !packed);
            if (!packed) pack_values(task, scratch->values, position, end);
            packed = 1;
            soften(task, scratch, tile, position, here);
            for (size_t d = 0; d < task->head_dim; d += 2 * PANEL)
                mix(scratch->mixed + (size_t)tile * tile_floats + d * TILE_ROWS, scratch->weights,
                    scratch->values + d / PANEL * TILE_BYTES, task->head_dim * PAIR_KEYS * 2,
                    (here - position + PAIR_KEYS - 1) / PAIR_KEYS);
        }
    }
    for (int row = 0; row < task->rows; row++) {
        float *to = task->out + (size_t)(row / task->sharing) * task->out_stride +
                    (size_t)(row % task->sharing) * task->head_dim;
        const float *from = scratch->mixed + (size_t)(row / TILE_ROWS) * tile_floats + row % TILE_ROWS * PANEL;
        for (size_t d = 0; d < task->head_dim; d += PANEL)
            _mm512_storeu_ps(to + d, _mm512_div_ps(_mm512_load_ps(from + d * TILE_ROWS), _mm512_set1_ps(scratch->sums[row])));
    }
}

struct amx_job {
    const struct attention_job *attention;
    char *memory; /* of every thread */
    size_t thread_bytes, row_tiles;
    int64_t tile_tokens, tiles;
};

INLINE struct scratch scratch_of(const struct amx_job *job, int slot) {
    char *at = job->memory + (size_t)slot * job->thread_bytes;
    const size_t head_dim = (size_t)job->attention->head_dim, rows = job->row_tiles * TILE_ROWS;
    struct scratch scratch;
    scratch.queries = at, at += rows * head_dim * 2;
    scratch.values = at, at += STRETCH * head_dim * 2;
    scratch.weights = at, at += STRETCH * TILE_ROWS * 2;
    scratch.scores = (float *)at, at += STRETCH * PANEL * sizeof(float);
    scratch.mixed = (float *)at, at += rows * head_dim * sizeof(float);
    scratch.highest = (float *)at, at += rows * sizeof(float);
    scratch.sums = (float *)at;
    return scratch;
}

/* A part is one task. */
static void run_part(const void *data, int part, int slot) {
    const struct amx_job *amx = data;
    const struct attention_job *job = amx->attention;
    const struct scratch scratch = scratch_of(amx, slot);
    const int decoding = job->start < 0, sharing = (int)(job->heads / job->kv_heads);
    const size_t head_bytes = (size_t)(job->block_size * job->head_dim) * 2;
    /* The last tokens of a chunk have the longest contexts: they go first. */
    const int64_t head = part % job->kv_heads, first = (amx->tiles - 1 - part / job->kv_heads) * amx->tile_tokens;
    const int64_t tokens = job->tokens - first < amx->tile_tokens ? job->tokens - first : amx->tile_tokens;
    const struct task task = {
        .out = job->out + (first * job->heads + head * sharing) * job->head_dim,
        .query = job->query + first * job->query_stride + head * sharing * job->head_dim,
        .keys = job->keys + (size_t)head * head_bytes,
        .table = job->tables + (decoding ? first * job->tables_stride : 0),
        .block_bytes = (size_t)job->block_stride * 2,
        .value_offset = (size_t)job->kv_heads * head_bytes,
        .row_bytes = (size_t)job->head_dim * 2,
        .query_stride = (size_t)job->query_stride,
        .out_stride = (size_t)(job->heads * job->head_dim),
        .head_dim = (size_t)job->head_dim,
        .block_shift = __builtin_ctzll((unsigned long long)job->block_size),
        .sharing = sharing,
        .rows = (int)tokens * sharing,
        .start = (int)(decoding ? job->context_lens[first] - 1 : job->start + first),
        .scale = job->scale,
    };
    configure_tiles();
    attend(&task, &scratch);
    _tile_release();
}

int llumnix_attention_amx(const struct attention_job *job, int threads) {
    const int64_t sharing = job->heads / job->kv_heads;
    const int64_t wanted = job->start < 0 || sharing > ROWS_WANTED ? 1 : ROWS_WANTED / sharing;
    const int64_t tile_tokens = wanted < job->tokens ? wanted : job->tokens;
    const size_t row_tiles = (size_t)(tile_tokens * sharing + TILE_ROWS - 1) / TILE_ROWS;
    const size_t per_row = (size_t)job->head_dim * 6 + 2 * sizeof(float);
    const size_t per_key = (size_t)job->head_dim * 2 + TILE_ROWS * 2 + PANEL * sizeof(float);
    struct amx_job amx = {
        .attention = job,
        .thread_bytes = row_tiles * TILE_ROWS * per_row + STRETCH * per_key,
        .row_tiles = row_tiles,
        .tile_tokens = tile_tokens,
        .tiles = (job->tokens + tile_tokens - 1) / tile_tokens,
    };
    if (amx.tiles * job->kv_heads > PARTS_MAX) return 1;
    amx.memory = aligned_alloc(64, amx.thread_bytes * (size_t)threads);
    if (amx.memory == NULL) return 1;
    llumnix_run_parts(run_part, &amx, (int)(amx.tiles * job->kv_heads), threads);
    free(amx.memory);
    return 0;
}

#else

int llumnix_attention_amx(const struct attention_job *job, int threads) {
    (void)job, (void)threads;
    return 1;
}

#endif
