/* What the ways of computing attention share. */
#ifndef LLUMNIX_ATTENTION_H
#define LLUMNIX_ATTENTION_H

#include "vector.h"

/* Strides and sizes in elements. `keys` is this layer's keys in block 0; values follow at kv_heads heads' distance.
 * Requests with one token each if `start` is negative (context_lens then gives each context), else one request's
 * tokens from position `start`. */
struct attention_job {
    float *out;
    const float *query;
    const char *keys;
    const int32_t *tables, *context_lens;
    int64_t tables_stride, tokens, start, block_stride, kv_heads, block_size, head_dim, heads, query_stride;
    float scale;
    int format;
};

/* Defined in attention_amx.c: bfloat16 KV, head_dim a multiple of 32, block_size of 16. Returns 1 when there is no
 * memory. */
int llumnix_attention_amx(const struct attention_job *job, int threads);

#endif
