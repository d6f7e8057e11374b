/* What the products share: the job, and where a finished tile goes. */
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

/* Put `rows` rows of one panel where they belong. `up` is the up projection where `values` is the gate. */
INLINE void finish_tile(const struct linear_job *job, const float (*values)[PANEL], const float (*up)[PANEL], size_t row,
                        int rows, size_t column) {
    const size_t width = job->out - column < PANEL ? job->out - column : PANEL;
    for (int r = 0; r < rows; r++) {
        float done[PANEL];
        memcpy(done, values[r], sizeof done);
        if (job->bias) for (size_t c = 0; c < width; c++) done[c] += job->bias[column + c];
        if (job->finish == SILU_MUL)
            for (int c = 0; c < PANEL; c += LANES) {
                vec gate = load(done + c);
                store(done + c, gate / (1.0f + exponential(-gate)) * load(&up[r][c]));
            }
        float *to = job->y + (row + r) * job->out + column;
        if (job->finish == ADD) for (size_t c = 0; c < width; c++) to[c] += done[c];
        else memcpy(to, done, width * sizeof(float));
    }
}

/* Defined in linear_bf16.c: products of bfloat16 weights laid out in pairs. Returns 1 when there is no memory. */
int llumnix_linear_bf16(const struct linear_job *job, enum product product, int threads);

#endif
