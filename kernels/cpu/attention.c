/* Attention of new tokens over their request's paged KV.
 *
 * A task is one KV head and a tile of consecutive tokens of one request (a single token when decoding) with all query
 * heads that share the KV head. Scores of the whole context are kept, so there is no rescaling: each query's scores,
 * sum and weighted values come from one fixed order of operations over its context. Its result is therefore the same,
 * to the last bit, whether it is decoded or prefilled, in whatever chunk, batch or number of threads. */
#include "vector.h"
#include <stdlib.h>

#define KEY_GROUP 4      /* keys scored together */
#define KEY_TILE 64      /* values widened together */
#define ROW_GROUP 3      /* queries handled together */
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

INLINE const float *query_of(const struct task *task, int row) {
    return task->query + (size_t)(row / task->sharing) * task->query_stride +
           (size_t)(row % task->sharing) * task->head_dim;
}

INLINE void widen(float *to, const char *from, size_t head_dim, enum format format) {
    for (size_t d = 0; d < head_dim; d += LANES) store(to + d, load_as(from + d * item_bytes(format), format));
}

/* Dot products of `rows` queries (a constant) with KEY_GROUP widened keys. */
INLINE void score_group(float *scores, size_t stride, const float *const *queries, const float *keys, size_t head_dim,
                        const int rows) {
    vec sums[ROW_GROUP][KEY_GROUP];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < KEY_GROUP; k++) sums[r][k] = (vec){};
    for (size_t d = 0; d < head_dim; d += LANES)
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++) {
            vec query = load(queries[r] + d);
#pragma GCC unroll 4
            for (int k = 0; k < KEY_GROUP; k++) sums[r][k] += query * load(keys + k * head_dim + d);
        }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < KEY_GROUP; k++) scores[r * stride + k] = sum_of(sums[r][k]);
}

INLINE void score(const struct task *task, float *scores, size_t stride, float *widened, enum format format) {
    const int rows = task->tokens * task->sharing, context = task->start + task->tokens;
    for (int position = 0; position < context; position += KEY_GROUP) {
        for (int k = 0; k < KEY_GROUP; k++) {
            int at = position + k < context ? position + k : context - 1;
            widen(widened + k * task->head_dim, key_at(task, at), task->head_dim, format);
        }
        for (int row = 0; row < rows; row += ROW_GROUP) {
            const float *queries[ROW_GROUP];
            int count = rows - row < ROW_GROUP ? rows - row : ROW_GROUP;
            for (int r = 0; r < count; r++) queries[r] = query_of(task, row + r);
            float *to = scores + row * stride + position;
            if (count == 3) score_group(to, stride, queries, widened, task->head_dim, 3);
            else if (count == 2) score_group(to, stride, queries, widened, task->head_dim, 2);
            else score_group(to, stride, queries, widened, task->head_dim, 1);
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

/* out += weights * values over `keys` widened values, for `rows` rows and `vecs` * LANES of the head's dimensions. */
INLINE void mix_group(float *const *outs, const float *weights, size_t stride, const float *values, size_t head_dim,
                      int keys, const int rows, const int vecs) {
    vec sums[ROW_GROUP][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) sums[r][v] = load(outs[r] + v * LANES);
    for (int k = 0; k < keys; k++)
#pragma GCC unroll 3
        for (int r = 0; r < rows; r++) {
            vec weight = splat(weights[r * stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sums[r][v] += weight * load(values + k * head_dim + v * LANES);
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) store(outs[r] + v * LANES, sums[r][v]);
}

INLINE void mix_rows(float **outs, const float *weights, size_t stride, const float *values, size_t head_dim, int keys,
                     const int rows) {
    size_t d = 0;
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) {
        mix_group(outs, weights, stride, values + d, head_dim, keys, rows, 4);
        for (int r = 0; r < rows; r++) outs[r] += 4 * LANES;
    }
    for (; d < head_dim; d += LANES) {
        mix_group(outs, weights, stride, values + d, head_dim, keys, rows, 1);
        for (int r = 0; r < rows; r++) outs[r] += LANES;
    }
}

INLINE float *out_of(const struct task *task, int row) {
    return task->out + (size_t)(row / task->sharing) * task->out_stride +
           (size_t)(row % task->sharing) * task->head_dim;
}

INLINE void mix(const struct task *task, const float *weights, size_t stride, float *widened, enum format format) {
    const int rows = task->tokens * task->sharing, context = task->start + task->tokens;
    for (int position = 0; position < context; position += KEY_TILE) {
        int keys = context - position < KEY_TILE ? context - position : KEY_TILE;
        for (int k = 0; k < keys; k++)
            widen(widened + k * task->head_dim, key_at(task, position + k) + task->value_offset, task->head_dim, format);
        for (int row = 0; row < rows; row += ROW_GROUP) {
            float *outs[ROW_GROUP];
            int count = rows - row < ROW_GROUP ? rows - row : ROW_GROUP;
            for (int r = 0; r < count; r++) outs[r] = out_of(task, row + r);
            const float *from = weights + row * stride + position;
            if (count == 3) mix_rows(outs, from, stride, widened, task->head_dim, keys, 3);
            else if (count == 2) mix_rows(outs, from, stride, widened, task->head_dim, keys, 2);
            else mix_rows(outs, from, stride, widened, task->head_dim, keys, 1);
        }
    }
}

INLINE void attend_as(const struct task *task, float *scratch, enum format format) {
    const int rows = task->tokens * task->sharing, context = task->start + task->tokens;
    const int padded = (context + LANES - 1) / LANES * LANES;
    float *widened = scratch, *scores = scratch + KEY_TILE * task->head_dim;
    score(task, scores, padded, widened, format);
    float sums[rows];
    for (int row = 0; row < rows; row++) {
        sums[row] = soften(scores + (size_t)row * padded, task->start + row / task->sharing + 1, padded, task->scale);
        memset(out_of(task, row), 0, task->head_dim * sizeof(float));
    }
    mix(task, scores, padded, widened, format);
    for (int row = 0; row < rows; row++) {
        float *out = out_of(task, row);
        for (size_t d = 0; d < task->head_dim; d++) out[d] /= sums[row];
    }
}

static void attend(const struct task *task, float *scratch, int format) {
    switch (format) {
    case BFLOAT16: attend_as(task, scratch, BFLOAT16); break;
    case FLOAT16: attend_as(task, scratch, FLOAT16); break;
    default: attend_as(task, scratch, FLOAT32); break;
    }
}

struct shape {
    int64_t blocks_stride, kv_heads, block_size, head_dim, heads, query_stride; /* strides in items */
};

/* Requests with one token each if `start` is negative (context_lens then gives each context), else one request's
 * tokens from position `start`. Returns 0, or 1 when there is no memory for scores. */
int llumnix_attention(float *out, const float *query, const char *pool_layer, const struct shape *shape,
                      const int32_t *tables, int64_t tables_stride, const int32_t *context_lens, int64_t tokens,
                      int64_t start, float scale, int format, int threads) {
    const int decoding = start < 0;
    const size_t item = item_bytes((enum format)format);
    const size_t head_bytes = (size_t)shape->block_size * shape->head_dim * item;
    const int sharing = (int)(shape->heads / shape->kv_heads);
    int64_t context_max = decoding ? 1 : start + tokens;
    if (decoding)
        for (int64_t i = 0; i < tokens; i++) context_max = context_lens[i] > context_max ? context_lens[i] : context_max;
    const size_t padded = (size_t)(context_max + LANES - 1) / LANES * LANES + LANES;
    int64_t tile = decoding ? 1 : (int64_t)(SCORE_BYTES_MAX / (padded * sharing * sizeof(float)));
    tile = tile < 1 ? 1 : tile > TILE_TOKENS_MAX ? TILE_TOKENS_MAX : tile;
    const int64_t tiles = (tokens + tile - 1) / tile, tasks = tiles * shape->kv_heads;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *scratch = malloc((KEY_TILE * (size_t)shape->head_dim + padded * sharing * tile) * sizeof(float));
        failed = scratch == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            if (failed) continue;
            /* The last tiles of a chunk have the longest contexts: they go first. */
            int64_t at = tiles - 1 - i / shape->kv_heads, head = i % shape->kv_heads, first = at * tile;
            int64_t count = tokens - first < tile ? tokens - first : tile;
            const struct task task = {
                .out = out + (first * shape->heads + head * sharing) * shape->head_dim,
                .query = query + first * shape->query_stride + head * sharing * shape->head_dim,
                .keys = pool_layer + head * head_bytes,
                .table = tables + (decoding ? first * tables_stride : 0),
                .block_bytes = (size_t)shape->blocks_stride * item,
                .value_offset = shape->kv_heads * head_bytes,
                .row_bytes = (size_t)shape->head_dim * item,
                .query_stride = (size_t)shape->query_stride,
                .out_stride = (size_t)(shape->heads * shape->head_dim),
                .head_dim = (size_t)shape->head_dim,
                .block_shift = __builtin_ctzll((unsigned long long)shape->block_size),
                .sharing = sharing,
                .tokens = (int)count,
                .start = (int)(decoding ? context_lens[first] - 1 : start + first),
                .scale = scale,
            };
            attend(&task, scratch, format);
        }
        free(scratch);
    }
    return failed;
}
