/* What the ways of multiplying share. */
#ifndef LLUMNIX_LINEAR_H
#define LLUMNIX_LINEAR_H

#include "vector.h"

enum finish { WRITE = 0, ADD = 1, SILU_MUL = 2 };

struct linear_job {
    float *y;
    const float *x;
    const char *weights;
    const float *bias;
    size_t rows, in, out, panels;
    enum finish finish;
    int format, parts;
};

/* Defined in linear_bf16.c: products of bfloat16 weights laid out in pairs. Returns 1 when there is no memory. */
int llumnix_linear_bf16(const struct linear_job *job, enum product product, int threads);

#endif
