/* Attention of new tokens over their request's paged KV.
 *
 * A task is one KV head and a tile of consecutive tokens of one request (a single token when decoding) with all query
 * heads that share the KV head. Scores of the whole context are kept, so there is no rescaling: each query's scores,
 * sum and weighted values come from one fixed order of operations over its context. Its result is therefore the same,
 * to the last bit, whether it is decoded or prefilled, in whatever chunk, batch or number of threads.
 * attention_amx.c computes the same for bfloat16 where the processor has AMX. */
#include "attention.h"
#include "pool.h"
#include <stdlib.h>

#define KEY_GROUP 4      /* keys scored together */
#define KEY_TILE 64      /* values mixed before moving on */
#define ROW_GROUP 3      /* queries handled together */
#define AHEAD 32         /* keys or values fetched ahead: a block's rows are too few for the hardware to foresee */
#define LINE_BYTES 64
#define SCORE_BYTES_MAX (256 << 10)
#define TILE_TOKENS_MAX 16

struct task {
    float *out;
    const float *query;
    const char *keys; /* this layer's keys of this KV head in block 0 */
    const int32_t *table;
    size_t block_bytes, value_offset, row_bytes;
    size_t query_stride, out_stride, head_dim;
    int block_shift, sharing, tokens, start;
    float scale;
};

INLINE const char *key_at(const struct task *task, int position) {
    return task->keys + (size_t)task->table[position >> task->block_shift] * task->block_bytes +
           (size_t)(position & ((1 << task->block_shift) - 1)) * task->row_bytes;
}

/* Where a row's head lies in the queries or in the results. */
INLINE size_t row_offset(const struct task *task, int row, size_t token_stride) {
    return (size_t)(row / task->sharing) * token_stride + (size_t)(row % task->sharing) * task->head_dim;
}

/* Dot products of `rows` queries (a constant) with KEY_GROUP keys. */
INLINE void score_group(float *scores, size_t stride, const float *const *queries, const char *const *keys,
                        size_t head_dim, const int rows, enum format format) {
    vec sums[ROW_GROUP][KEY_GROUP];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < KEY_GROUP; k++) sums[r][k] = (vec){};
    for (size_t d = 0; d < head_dim; d += LANES)
#pragma GCC unroll 4
        for (int k = 0; k < KEY_GROUP; k++) {
            vec key = load_as(keys[k] + d * item_bytes(format), format);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) sums[r][k] += key * load(queries[r] + d);
        }
    for (int r = 0; r < rows; r++) {
        vec4 four = sums_of(sums[r]);
        memcpy(scores + r * stride, &four, sizeof four);
    }
}

INLINE void fetch_row(const struct task *task, int position, size_t offset) {
    const char *row = key_at(task, position) + offset;
    for (size_t at = 0; at < task->row_bytes; at += LINE_BYTES) __builtin_prefetch(row + at);
}

INLINE void score(const struct task *task, float *scores, size_t stride, enum format format) {
    const int rows = task->tokens * task->sharing, context = task->start + task->tokens;
    const float *queries[rows];
    for (int row = 0; row < rows; row++) queries[row] = task->query + row_offset(task, row, task->query_stride);
    for (int position = 0; position < context; position += KEY_GROUP) {
        const char *keys[KEY_GROUP];
        for (int k = 0; k < KEY_GROUP; k++)
            keys[k] = key_at(task, position + k < context ? position + k : context - 1);
        for (int k = 0; k < KEY_GROUP && position + AHEAD + k < context; k++)
            fetch_row(task, position + AHEAD + k, 0);
        for (int row = 0; row < rows; row += ROW_GROUP) {
            float *to = scores + row * stride + position;
            if (rows - row >= 3) score_group(to, stride, queries + row, keys, task->head_dim, 3, format);
            else if (rows - row == 2) score_group(to, stride, queries + row, keys, task->head_dim, 2, format);
            else score_group(to, stride, queries + row, keys, task->head_dim, 1, format);
        }
    }
}

/* Scores to weights that are not yet divided by their sum, which is returned; zero from `context` to `padded`. */
INLINE float soften(float *scores, int context, int padded, float scale) {
    for (int i = context; i < padded; i++) scores[i] = scores[context - 1];
    vec best = load(scores);
    for (int i = LANES; i < padded; i += LANES) best = larger(best, load(scores + i));
    const float highest = max_of(best) * scale;
    for (int i = 0; i < padded; i += LANES) store(scores + i, exponential(load(scores + i) * scale - highest));
    for (int i = context; i < padded; i++) scores[i] = 0.0f;
    vec sum = {};
    for (int i = 0; i < padded; i += LANES) sum += load(scores + i);
    return sum_of(sum);
}

/* out += weights * values for `rows` rows and `vecs` * LANES of the head's dimensions from `d` on. */
INLINE void mix_group(float *const *outs, const float *weights, size_t stride, const char *const *values, size_t d,
                      int keys, const int rows, const int vecs, enum format format) {
    vec sums[ROW_GROUP][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) sums[r][v] = load(outs[r] + d + v * LANES);
    for (int k = 0; k < keys; k++) {
        const char *value = values[k] + d * item_bytes(format);
        vec weight[ROW_GROUP];
        for (int r = 0; r < rows; r++) weight[r] = splat(weights[r * stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            vec wide = load_as(value + v * LANES * item_bytes(format), format);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) sums[r][v] += weight[r] * wide;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) store(outs[r] + d + v * LANES, sums[r][v]);
}

INLINE void mix_rows(float *const *outs, const float *weights, size_t stride, const char *const *values,
                     size_t head_dim, int keys, const int rows, enum format format) {
    size_t d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES)
        mix_group(outs, weights, stride, values, d, keys, rows, 4, format);
    for (; d < head_dim; d += LANES) mix_group(outs, weights, stride, values, d, keys, rows, 1, format);
}

INLINE void mix(const struct task *task, float *const *outs, const float *weights, size_t stride, enum format format) {
    const int rows = task->tokens * task->sharing, context = task->start + task->tokens;
    for (int position = 0; position < context; position += KEY_TILE) {
        const char *values[KEY_TILE];
        int keys = context - position < KEY_TILE ? context - position : KEY_TILE;
        for (int k = 0; k < keys; k++) {
            values[k] = key_at(task, position + k) + task->value_offset;
            if (position + AHEAD + k < context) fetch_row(task, position + AHEAD + k, task->value_offset);
        }
        for (int row = 0; row < rows; row += ROW_GROUP) {
            const float *from = weights + row * stride + position;
            if (rows - row >= 3) mix_rows(outs + row, from, stride, values, task->head_dim, keys, 3, format);
            else if (rows - row == 2) mix_rows(outs + row, from, stride, values, task->head_dim, keys, 2, format);
            else mix_rows(outs + row, from, stride, values, task->head_dim, keys, 1, format);
        }
    }
}

INLINE void attend(const struct task *task, float *scores, enum format format) {
    const int rows = task->tokens * task->sharing, context = task->start + task->tokens;
    const int padded = (context + LANES - 1) / LANES * LANES;
    score(task, scores, padded, format);
    float sums[rows], *outs[rows];
    for (int row = 0; row < rows; row++) {
        outs[row] = task->out + row_offset(task, row, task->out_stride);
        sums[row] = soften(scores + (size_t)row * padded, task->start + row / task->sharing + 1, padded, task->scale);
        memset(outs[row], 0, task->head_dim * sizeof(float));
    }
    mix(task, outs, scores, padded, format);
    for (int row = 0; row < rows; row++)
        for (size_t d = 0; d < task->head_dim; d++) outs[row][d] /= sums[row];
}

struct tiled_job {
    const struct attention_job *attention;
    float *scores;
    int64_t tile, tiles, scores_size;
};

/* A part is one task; slots have scores of their own. */
static void run_part(const void *data, int part, int slot) {
    const struct tiled_job *tiled = data;
    const struct attention_job *job = tiled->attention;
    const int decoding = job->start < 0, sharing = (int)(job->heads / job->kv_heads);
    const size_t item = item_bytes((enum format)job->format);
    const size_t head_bytes = (size_t)(job->block_size * job->head_dim) * item;
    /* The last tiles of a chunk have the longest contexts: they go first. */
    const int64_t head = part % job->kv_heads, first = (tiled->tiles - 1 - part / job->kv_heads) * tiled->tile;
    const int64_t tokens = job->tokens - first < tiled->tile ? job->tokens - first : tiled->tile;
    const struct task task = {
        .out = job->out + (first * job->heads + head * sharing) * job->head_dim,
        .query = job->query + first * job->query_stride + head * sharing * job->head_dim,
        .keys = job->keys + head * head_bytes,
        .table = job->tables + (decoding ? first * job->tables_stride : 0),
        .block_bytes = (size_t)job->block_stride * item,
        .value_offset = job->kv_heads * head_bytes,
        .row_bytes = (size_t)job->head_dim * item,
        .query_stride = (size_t)job->query_stride,
        .out_stride = (size_t)(job->heads * job->head_dim),
        .head_dim = (size_t)job->head_dim,
        .block_shift = __builtin_ctzll((unsigned long long)job->block_size),
        .sharing = sharing,
        .tokens = (int)tokens,
        .start = (int)(decoding ? job->context_lens[first] - 1 : job->start + first),
        .scale = job->scale,
    };
    float *scores = tiled->scores + slot * tiled->scores_size;
    switch (job->format) {
    case BFLOAT16: attend(&task, scores, BFLOAT16); break;
    case FLOAT16: attend(&task, scores, FLOAT16); break;
    default: attend(&task, scores, FLOAT32); break;
    }
}

INLINE int suits_amx(const struct attention_job *job, enum product product) {
    return product == AMX_BF16 && job->format == BFLOAT16 && job->head_dim % 32 == 0 && job->block_size % 16 == 0;
}

/* See struct attention_job. Returns 0, or 1 when there is no memory for scores. */
int llumnix_attention(float *out, const float *query, const char *pool_layer, const int32_t *tables,
                      const int32_t *context_lens, int64_t tables_stride, int64_t tokens, int64_t start,
                      int64_t block_stride, int64_t kv_heads, int64_t block_size, int64_t head_dim, int64_t heads,
                      int64_t query_stride, float scale, int format, int product, int threads) {
    const struct attention_job job = {
        out,          query,    pool_layer, tables,   context_lens, tables_stride, tokens, start,
        block_stride, kv_heads, block_size, head_dim, heads,        query_stride,  scale,  format,
    };
    if (suits_amx(&job, (enum product)product)) return llumnix_attention_amx(&job, threads);
    int64_t context = start < 0 ? 1 : start + tokens;
    for (int64_t i = 0; start < 0 && i < tokens; i++) context = context_lens[i] > context ? context_lens[i] : context;
    const int64_t row = (context + LANES - 1) / LANES * LANES * (heads / kv_heads);
    int64_t tile = start < 0 ? 1 : SCORE_BYTES_MAX / (row * (int64_t)sizeof(float));
    tile = tile < 1 ? 1 : tile > TILE_TOKENS_MAX ? TILE_TOKENS_MAX : tile;
    const int64_t tiles = (tokens + tile - 1) / tile;
    float *scores = malloc((size_t)(row * tile * threads) * sizeof(float));
    if (scores == NULL || tiles * kv_heads > PARTS_MAX) {
        free(scores);
        return 1;
    }
    const struct tiled_job tiled = {&job, scores, tile, tiles, row * tile};
    llumnix_run_parts(run_part, &tiled, (int)(tiles * kv_heads), threads);
    free(scores);
    return 0;
}
