/* The small operations of a layer, and copies of whole KV blocks. Each is one pass over little memory. */
#include "vector.h"

INLINE void scale_row(float *out, const float *x, const void *weight, float factor, int64_t size, enum format format) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec scales = load_as((const char *)weight + (size_t)i * item_bytes(format), format);
        store(out + i, load(x + i) * factor * scales);
    }
    for (; i < size; i++) out[i] = x[i] * factor * load_one(weight, (size_t)i, format);
}

/* out[t][h] = x[t][h] * weight / rms(x[t][h]); strides of x in floats, out is contiguous. */
void llumnix_rms_norm(float *out, const float *x, const void *weight, int64_t tokens, int64_t heads, int64_t size,
                      int64_t token_stride, int64_t head_stride, float eps, int format) {
    for (int64_t row = 0; row < tokens * heads; row++, out += size) {
        const float *from = x + row / heads * token_stride + row % heads * head_stride;
        const int64_t whole = size / LANES * LANES;
        vec sums = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            vec value = load(from + i);
            sums += value * value;
        }
        float sum = sum_of(sums);
        for (int64_t i = whole; i < size; i++) sum += from[i] * from[i];
        const float factor = 1.0f / __builtin_sqrtf(sum / (float)size + eps);
        switch (format) {
        case BFLOAT16: scale_row(out, from, weight, factor, size, BFLOAT16); break;
        case FLOAT16: scale_row(out, from, weight, factor, size, FLOAT16); break;
        default: scale_row(out, from, weight, factor, size, FLOAT32); break;
        }
    }
}

/* Rotate x[t][h] in place by the angles of positions[t]. */
void llumnix_rope(float *x, const float *cosines, const float *sines, const int64_t *positions, int64_t tokens,
                  int64_t heads, int64_t head_dim, int64_t token_stride) {
    const int64_t half = head_dim / 2;
    for (int64_t t = 0; t < tokens; t++) {
        const float *cosine = cosines + positions[t] * half, *sine = sines + positions[t] * half;
        for (int64_t h = 0; h < heads; h++) {
            float *first = x + t * token_stride + h * head_dim, *second = first + half;
            for (int64_t i = 0; i < half; i++) {
                float a = first[i], b = second[i];
                first[i] = a * cosine[i] - b * sine[i];
                second[i] = b * cosine[i] + a * sine[i];
            }
        }
    }
}

INLINE void write_rows(char *layer, const float *from, const int64_t *slots, int64_t tokens, int64_t token_stride,
                       int64_t block_stride, int64_t kv_heads, int64_t block_size, int64_t head_dim,
                       enum format format) {
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t at = block * block_stride + (h * block_size + offset) * head_dim;
            char *to = layer + (size_t)at * item_bytes(format);
            const float *row = from + t * token_stride + h * head_dim;
            for (int64_t d = 0; d < head_dim; d++) store_one(to, (size_t)d, row[d], format);
        }
    }
}

/* Keys (or values) of new tokens into their slots; `layer` is where this layer's keys (values) of block 0 begin. */
void llumnix_write_kv(char *layer, const float *from, const int64_t *slots, int64_t tokens, int64_t token_stride,
                      int64_t block_stride, int64_t kv_heads, int64_t block_size, int64_t head_dim, int format) {
    switch (format) {
    case BFLOAT16:
        write_rows(layer, from, slots, tokens, token_stride, block_stride, kv_heads, block_size, head_dim, BFLOAT16);
        break;
    case FLOAT16:
        write_rows(layer, from, slots, tokens, token_stride, block_stride, kv_heads, block_size, head_dim, FLOAT16);
        break;
    default:
        write_rows(layer, from, slots, tokens, token_stride, block_stride, kv_heads, block_size, head_dim, FLOAT32);
    }
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

/* Each row of `copies` is where to, where from, and how many bytes. */
void llumnix_copy_bytes(char *to, const char *from, const int64_t *copies, int64_t count) {
    for (const int64_t *row = copies; row < copies + 3 * count; row += 3) memcpy(to + row[0], from + row[1], (size_t)row[2]);
}
