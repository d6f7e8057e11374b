/* The small operations of a layer, and copies of whole KV blocks. Each is one pass over little memory. */
#include "pool.h"
#include "vector.h"

#define PART_FLOATS 16384 /* fewer are done sooner than another thread has begun */

static int parts_for(int64_t floats, int threads) {
    const int64_t parts = floats / PART_FLOATS;
    return parts <= 1 ? 1 : parts < threads ? (int)parts : threads;
}

INLINE void scale_row(float *out, const float *x, const void *weight, float factor, int64_t size, enum format format) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec scales = load_as((const char *)weight + (size_t)i * item_bytes(format), format);
        store(out + i, load(x + i) * factor * scales);
    }
    for (; i < size; i++) out[i] = x[i] * factor * load_one(weight, (size_t)i, format);
}

struct norm_job {
    float *out;
    const float *x;
    const void *weight;
    int64_t rows, heads, size, token_stride, head_stride;
    float eps;
    int format, parts;
};

static void norm_part(const void *data, int part, int slot) {
    const struct norm_job *job = data;
    const int64_t size = job->size, whole = size / LANES * LANES, end = job->rows * (part + 1) / job->parts;
    (void)slot;
    for (int64_t row = job->rows * part / job->parts; row < end; row++) {
        const float *from = job->x + row / job->heads * job->token_stride + row % job->heads * job->head_stride;
        float *out = job->out + row * size;
        vec sums = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            vec value = load(from + i);
            sums += value * value;
        }
        float sum = sum_of(sums);
        for (int64_t i = whole; i < size; i++) sum += from[i] * from[i];
        const float factor = 1.0f / __builtin_sqrtf(sum / (float)size + job->eps);
        switch (job->format) {
        case BFLOAT16: scale_row(out, from, job->weight, factor, size, BFLOAT16); break;
        case FLOAT16: scale_row(out, from, job->weight, factor, size, FLOAT16); break;
        default: scale_row(out, from, job->weight, factor, size, FLOAT32); break;
        }
    }
}

/* out[t][h] = x[t][h] * weight / rms(x[t][h]); strides of x in floats, out is contiguous. */
void llumnix_rms_norm(float *out, const float *x, const void *weight, int64_t tokens, int64_t heads, int64_t size,
                      int64_t token_stride, int64_t head_stride, float eps, int format, int threads) {
    const int parts = parts_for(tokens * heads * size, threads);
    const struct norm_job job = {
        out, x, weight, tokens * heads, heads, size, token_stride, head_stride, eps, format, parts,
    };
    llumnix_run_parts(norm_part, &job, parts, threads);
}

/* Rotate one head in place. */
INLINE void turn(float *restrict first, float *restrict second, const float *restrict cosine,
                 const float *restrict sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = first[i], b = second[i];
        first[i] = a * cosine[i] - b * sine[i];
        second[i] = b * cosine[i] + a * sine[i];
    }
}

struct rope_job {
    float *query, *key;
    const float *cosines, *sines;
    const int64_t *positions;
    int64_t tokens, heads, kv_heads, head_dim, query_stride, key_stride;
    int parts;
};

static void rope_part(const void *data, int part, int slot) {
    const struct rope_job *job = data;
    const int64_t half = job->head_dim / 2, end = job->tokens * (part + 1) / job->parts;
    (void)slot;
    for (int64_t t = job->tokens * part / job->parts; t < end; t++) {
        const float *cosine = job->cosines + job->positions[t] * half, *sine = job->sines + job->positions[t] * half;
        float *query = job->query + t * job->query_stride, *key = job->key + t * job->key_stride;
        for (int64_t h = 0; h < job->heads; h++, query += job->head_dim) turn(query, query + half, cosine, sine, half);
        for (int64_t h = 0; h < job->kv_heads; h++, key += job->head_dim) turn(key, key + half, cosine, sine, half);
    }
}

/* Rotate query[t][h] and key[t][h] in place by the angles of positions[t]. */
void llumnix_rope(float *query, float *key, const float *cosines, const float *sines, const int64_t *positions,
                  int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t query_stride,
                  int64_t key_stride, int threads) {
    const int parts = parts_for(tokens * (heads + kv_heads) * head_dim, threads);
    const struct rope_job job = {
        query, key, cosines, sines, positions, tokens, heads, kv_heads, head_dim, query_stride, key_stride, parts,
    };
    llumnix_run_parts(rope_part, &job, parts, threads);
}

struct write_job {
    char *keys, *values;
    const float *from_keys, *from_values;
    const int64_t *slots;
    int64_t tokens, key_stride, value_stride, block_stride, kv_heads, block_size, head_dim;
    int format, parts;
};

INLINE void narrow(char *to, const float *from, int64_t size, enum format format) {
    for (int64_t d = 0; d < size; d++) store_one(to, (size_t)d, from[d], format);
}

INLINE void write_token(const struct write_job *job, int64_t t, enum format format) {
    const int64_t block = job->slots[t] / job->block_size, offset = job->slots[t] % job->block_size;
    for (int64_t h = 0; h < job->kv_heads; h++) {
        const int64_t at = block * job->block_stride + (h * job->block_size + offset) * job->head_dim;
        const size_t bytes = (size_t)at * item_bytes(format);
        narrow(job->keys + bytes, job->from_keys + t * job->key_stride + h * job->head_dim, job->head_dim, format);
        narrow(job->values + bytes, job->from_values + t * job->value_stride + h * job->head_dim, job->head_dim, format);
    }
}

static void write_part(const void *data, int part, int slot) {
    const struct write_job *job = data;
    const int64_t end = job->tokens * (part + 1) / job->parts;
    (void)slot;
    for (int64_t t = job->tokens * part / job->parts; t < end; t++) switch (job->format) {
        case BFLOAT16: write_token(job, t, BFLOAT16); break;
        case FLOAT16: write_token(job, t, FLOAT16); break;
        default: write_token(job, t, FLOAT32); break;
        }
}

/* Keys and values of new tokens into their slots; `keys` and `values` are where this layer's begin in block 0. */
void llumnix_write_kv(char *keys, char *values, const float *from_keys, const float *from_values, const int64_t *slots,
                      int64_t tokens, int64_t key_stride, int64_t value_stride, int64_t block_stride, int64_t kv_heads,
                      int64_t block_size, int64_t head_dim, int format, int threads) {
    const int parts = parts_for(2 * tokens * kv_heads * head_dim, threads);
    const struct write_job job = {
        keys,         values,       from_keys, from_values, slots,    tokens, key_stride,
        value_stride, block_stride, kv_heads,  block_size,  head_dim, format, parts,
    };
    llumnix_run_parts(write_part, &job, parts, threads);
}

/* Consecutive ids are one copy. */
void llumnix_gather_blocks(char *staging, const char *pool, const int64_t *ids, int64_t count, int64_t block_bytes) {
    for (int64_t i = 0, run; i < count; i += run) {
        for (run = 1; i + run < count && ids[i + run] == ids[i] + run;) run++;
        memcpy(staging + i * block_bytes, pool + ids[i] * block_bytes, (size_t)(run * block_bytes));
    }
}

void llumnix_scatter_blocks(char *pool, const char *staging, const int64_t *ids, int64_t count, int64_t block_bytes) {
    for (int64_t i = 0, run; i < count; i += run) {
        for (run = 1; i + run < count && ids[i + run] == ids[i] + run;) run++;
        memcpy(pool + ids[i] * block_bytes, staging + i * block_bytes, (size_t)(run * block_bytes));
    }
}
