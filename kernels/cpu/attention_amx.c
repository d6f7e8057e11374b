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

/* What brings the bfloat16 of two keys by 16 rows together, row by row. */
static const uint16_t INTERLEAVED[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

struct task {
    float *out;
    const float *query;
    const char *keys; /* of this KV head in block 0 */
    const int32_t *table;
    size_t block_bytes, value_offset, row_bytes, query_stride, out_stride, head_dim;
    int block_shift, sharing, rows, start, context;
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

INLINE void fetch_tile(const struct task *task, int position, size_t offset) {
    if (position >= task->context) return;
    const char *from = key_tile(task, position) + offset;
    for (size_t at = 0; at < TILE_ROWS * task->row_bytes; at += 64) __builtin_prefetch(from + at);
}

/* Scores of 16 keys by 16 rows. The first two tiles of queries stay in registers 6 and 7. */
INLINE void score_tile(float *scores, const char *keys, size_t row_bytes, const char *queries, size_t head_dim) {
    _tile_zero(0);
    _tile_loadd(4, keys, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (head_dim > 32) {
        _tile_loadd(5, keys + 64, row_bytes);
        _tile_dpbf16ps(0, 5, 7);
    }
    for (size_t d = 64; d < head_dim; d += 32) {
        _tile_loadd(4, keys + d * 2, row_bytes);
        _tile_loadd(5, queries + d * 32, 64);
        _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, scores, 64);
}

/* Scores of a stretch's keys by 16 rows. With the first row tile, keys and values to come are fetched. */
INLINE void score(const struct task *task, float *scores, const char *queries, int position, int end, int first) {
    _tile_loadd(6, queries, 64);
    if (task->head_dim > 32) _tile_loadd(7, queries + TILE_BYTES, 64);
    for (; position < end; position += TILE_ROWS, scores += TILE_ROWS * PANEL) {
        if (first) {
            fetch_tile(task, position + AHEAD * TILE_ROWS, 0);
            fetch_tile(task, position, task->value_offset);
        }
        score_tile(scores, key_tile(task, position), task->row_bytes, queries, task->head_dim);
    }
}

/* Which of 16 rows have a key in their context. */
INLINE __mmask16 sees(__m512i contexts, int key) { return _mm512_cmpgt_epi32_mask(contexts, _mm512_set1_epi32(key)); }

/* Weights of 32 keys by 16 rows, [16 rows][32 keys] in bfloat16; adds them up in `sum`. `masked` is a constant: 0 where
 * every row sees all keys. */
INLINE void soften_block(char *to, const float *scores, __m512 factor, __m512 best, __m512 *sum, __m512i contexts, int key,
                         int end, const int masked) {
    const __m512i interleave = _mm512_loadu_si512(INTERLEAVED);
    __m512i pairs[TILE_ROWS];
    for (int pair = 0; pair < PAIR_KEYS / 2; pair++) {
        __m512 weights[2];
        for (int i = 0; i < 2; i++, scores += PANEL) {
            const int at = key + 2 * pair + i;
            if (masked) {
                const __mmask16 seen = at < end ? sees(contexts, at) : 0;
                const __m512 score = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(seen, scores), factor, best);
                weights[i] = _mm512_maskz_mov_ps(seen, power_of_two_roughly(score));
            } else {
                weights[i] = power_of_two_roughly(_mm512_fmsub_ps(_mm512_loadu_ps(scores), factor, best));
            }
            *sum = _mm512_add_ps(*sum, weights[i]);
        }
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]);
        pairs[pair] = _mm512_permutexvar_epi16(interleave, both);
    }
    transpose(pairs);
    for (int r = 0; r < TILE_ROWS; r++) _mm512_store_si512(to + r * 64, pairs[r]);
}

/* Scores to weights [keys / 32][16 rows][32 keys]; sums, maxima and what was mixed so far are brought to the new
 * maxima. */
INLINE void soften(const struct task *task, const struct scratch *scratch, int tile, int position, int end) {
    float *const highest = scratch->highest + tile * PANEL, *const sums = scratch->sums + tile * PANEL;
    int contexts_of[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) contexts_of[r] = context_of(task, tile * TILE_ROWS + r);
    const __m512i contexts = _mm512_loadu_si512(contexts_of);
    const int seen_by_all = contexts_of[0] < end ? contexts_of[0] : end;
    const __m512 before = _mm512_loadu_ps(highest), factor = _mm512_set1_ps(task->scale * LOG2_E);
    __m512 best = _mm512_set1_ps(-__builtin_inff());
    const float *scores = scratch->scores;
    int key = position;
    for (; key < seen_by_all; key++, scores += PANEL) best = _mm512_max_ps(best, _mm512_loadu_ps(scores));
    for (; key < end; key++, scores += PANEL)
        best = _mm512_mask_max_ps(best, sees(contexts, key), best, _mm512_loadu_ps(scores));
    best = _mm512_max_ps(before, _mm512_mul_ps(best, factor));
    __m512 sum = _mm512_setzero_ps();
    char *to = scratch->weights;
    scores = scratch->scores;
    for (key = position; key < end; key += PAIR_KEYS, to += TILE_BYTES, scores += PAIR_KEYS * PANEL)
        if (key + PAIR_KEYS <= seen_by_all) soften_block(to, scores, factor, best, &sum, contexts, key, end, 0);
        else soften_block(to, scores, factor, best, &sum, contexts, key, end, 1);
    const __m512 fade = power_of_two(_mm512_sub_ps(before, best));
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), fade, sum));
    _mm512_storeu_ps(highest, best);
    /* Maxima rarely rise after the first stretches. */
    if (position == 0 || _mm512_cmpneq_ps_mask(fade, _mm512_set1_ps(1.0f)) == 0) return;
    float fades[TILE_ROWS], *mixed = scratch->mixed + (size_t)tile * TILE_ROWS * task->head_dim;
    _mm512_storeu_ps(fades, fade);
    for (size_t d = 0; d < task->head_dim / PANEL; d++)
        for (int r = 0; r < TILE_ROWS; r++, mixed += PANEL)
            _mm512_store_ps(mixed, _mm512_mul_ps(_mm512_load_ps(mixed), _mm512_set1_ps(fades[r])));
}

/* mixed += weights * values for four tiles of 16 dimensions, or two. */
INLINE void mix(float *mixed, const char *weights, const char *values, size_t values_stride, int blocks, const int four) {
    _tile_loadd(0, mixed, 64);
    _tile_loadd(1, mixed + TILE_ROWS * PANEL, 64);
    if (four) {
        _tile_loadd(2, mixed + 2 * TILE_ROWS * PANEL, 64);
        _tile_loadd(3, mixed + 3 * TILE_ROWS * PANEL, 64);
    }
    for (; blocks > 0; blocks--, weights += TILE_BYTES, values += values_stride) {
        _tile_loadd(4, weights, 64);
        _tile_loadd(5, values, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, values + TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 6);
        if (four) {
            _tile_loadd(7, values + 2 * TILE_BYTES, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, values + 3 * TILE_BYTES, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, mixed, 64);
    _tile_stored(1, mixed + TILE_ROWS * PANEL, 64);
    if (four) {
        _tile_stored(2, mixed + 2 * TILE_ROWS * PANEL, 64);
        _tile_stored(3, mixed + 3 * TILE_ROWS * PANEL, 64);
    }
}

/* One stretch's share of a row tile, for all dimensions. */
INLINE void mix_all(const struct task *task, const struct scratch *scratch, int tile, int keys) {
    const size_t stride = task->head_dim * PAIR_KEYS * 2;
    const int blocks = (keys + PAIR_KEYS - 1) / PAIR_KEYS;
    float *mixed = scratch->mixed + (size_t)tile * TILE_ROWS * task->head_dim;
    const char *values = scratch->values;
    size_t d = 0;
    for (; d + 64 <= task->head_dim; d += 64, mixed += 64 * TILE_ROWS, values += 4 * TILE_BYTES)
        mix(mixed, scratch->weights, values, stride, blocks, 1);
    if (d < task->head_dim) mix(mixed, scratch->weights, values, stride, blocks, 0);
}

INLINE void attend(const struct task *task, const struct scratch *scratch) {
    const int tiles = (task->rows + TILE_ROWS - 1) / TILE_ROWS, context = task->context;
    const size_t tile_floats = TILE_ROWS * task->head_dim;
    for (int at = 0; at < AHEAD; at++) fetch_tile(task, at * TILE_ROWS, 0);
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
            mix_all(task, scratch, tile, here - position);
        }
    }
    for (int row = 0; row < task->rows; row++) {
        float *to = task->out + (size_t)(row / task->sharing) * task->out_stride +
                    (size_t)(row % task->sharing) * task->head_dim;
        const float *from = scratch->mixed + (size_t)(row / TILE_ROWS) * tile_floats + row % TILE_ROWS * PANEL;
        const __m512 share = _mm512_set1_ps(1.0f / scratch->sums[row]);
        for (size_t d = 0; d < task->head_dim; d += PANEL)
            _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_load_ps(from + d * TILE_ROWS), share));
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
    const int start = (int)(decoding ? job->context_lens[first] - 1 : job->start + first);
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
        .start = start,
        .context = start + (int)tokens,
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
