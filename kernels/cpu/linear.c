/* y = x W^T for weights that stay in their storage format and are widened in registers.
 *
 * Weights are packed in panels of 16 outputs, [panel][in][16], so that one pass over a panel streams through memory
 * once. Every output is one chain of multiply-adds over the inputs in order, whatever the number of rows and threads:
 * a row's result does not depend, to the last bit, on which rows it is computed with. */
#include "linear.h"
#include "pool.h"

#define ROWS_MAX 6
#define ROW_BLOCK_BYTES (192 << 10)
#define AHEAD_BYTES 2048
#define PARTS_PER_THREAD 4
#define PANELS_MIN 4 /* least panels of a part */

struct tile {
    float at[ROWS_MAX][PANEL];
};

/* Sixteen bfloat16 lie with output i and i + 8 in one 32-bit word: two cheap operations widen them all. */
INLINE void load_panel(const void *panel, size_t k, vec *low, vec *high, enum format format) {
    const char *from = (const char *)panel + k * PANEL * item_bytes(format);
    if (format == BFLOAT16) {
        uvec both;
        memcpy(&both, from, sizeof both);
        *low = (vec)(both << 16);
        *high = (vec)(both & 0xffff0000u);
    } else {
        *low = load_as(from, format);
        *high = load_as(from + LANES * item_bytes(format), format);
    }
}

/* `rows` rows of x times `panels` panels; both are constants wherever this is inlined. */
INLINE void multiply(struct tile *tiles, const float *x, size_t x_stride, const char *weights, size_t in,
                     const int rows, const int panels, enum format format) {
    const size_t panel_bytes = in * PANEL * item_bytes(format);
    vec low[4][ROWS_MAX], high[4][ROWS_MAX];
    for (int p = 0; p < panels; p++)
        for (int r = 0; r < rows; r++) low[p][r] = high[p][r] = (vec){};
    for (size_t k = 0; k < in; k++) {
        if (rows >= 4) __builtin_prefetch(weights + k * PANEL * item_bytes(format) + AHEAD_BYTES);
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            vec weight_low, weight_high;
            load_panel(weights + p * panel_bytes, k, &weight_low, &weight_high, format);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                low[p][r] += weight_low * x[r * x_stride + k];
                high[p][r] += weight_high * x[r * x_stride + k];
            }
        }
    }
    for (int p = 0; p < panels; p++)
        for (int r = 0; r < rows; r++) {
            store(&tiles[p].at[r][0], low[p][r]);
            store(&tiles[p].at[r][LANES], high[p][r]);
        }
}

/* One or two rows need several panels at once to keep the multiply-add units busy. */
INLINE int panels_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

INLINE void multiply_rows(struct tile *tiles, const float *x, size_t x_stride, const char *weights, size_t in, int rows,
                          int panels, enum format format) {
    switch (rows * 8 + panels) {
    case 1 * 8 + 4: multiply(tiles, x, x_stride, weights, in, 1, 4, format); break;
    case 1 * 8 + 2: multiply(tiles, x, x_stride, weights, in, 1, 2, format); break;
    case 1 * 8 + 1: multiply(tiles, x, x_stride, weights, in, 1, 1, format); break;
    case 2 * 8 + 2: multiply(tiles, x, x_stride, weights, in, 2, 2, format); break;
    case 2 * 8 + 1: multiply(tiles, x, x_stride, weights, in, 2, 1, format); break;
    case 3 * 8 + 1: multiply(tiles, x, x_stride, weights, in, 3, 1, format); break;
    case 4 * 8 + 1: multiply(tiles, x, x_stride, weights, in, 4, 1, format); break;
    case 5 * 8 + 1: multiply(tiles, x, x_stride, weights, in, 5, 1, format); break;
    default: multiply(tiles, x, x_stride, weights, in, 6, 1, format); break;
    }
}

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

/* Rows in even groups of at most ROWS_MAX; eight are 6 + 2, measured faster than 4 + 4. */
INLINE int rows_at(size_t left) {
    if (left == 8) return ROWS_MAX;
    size_t groups = (left + ROWS_MAX - 1) / ROWS_MAX;
    return (int)((left + groups - 1) / groups);
}

/* Outputs of panels first … last for the rows from `row` on. */
INLINE void run_panels(const struct linear_job *job, size_t first, size_t last, size_t row, size_t rows, enum format format) {
    const int parts = job->finish == SILU_MUL ? 2 : 1, stride = rows == 1 ? 4 : 2;
    const size_t panel_bytes = job->in * PANEL * item_bytes(format);
    struct tile tiles[4];
    for (size_t panel = first * parts; panel < last * parts; panel += stride) {
        int here = last * parts - panel < (size_t)stride ? (int)(last * parts - panel) : stride;
        int count;
        for (size_t done = 0; done < rows; done += count) {
            count = rows_at(rows - done);
            const float *x = job->x + (row + done) * job->in;
            int together;
            for (int p = 0; p < here; p += together) {
                together = panels_for(count);
                while (together > here - p) together /= 2;
                multiply_rows(tiles + p, x, job->in, job->weights + (panel + p) * panel_bytes, job->in, count,
                              together, format);
            }
            for (int p = 0; p < here; p += parts)
                finish_tile(job, tiles[p].at, tiles[p + parts - 1].at, row + done, count, (panel + p) / parts * PANEL);
        }
    }
}

INLINE void run_rows(const struct linear_job *job, size_t first, size_t last, enum format format) {
    /* Many rows are taken in blocks that stay in the second-level cache while all panels pass by. */
    size_t block = ROW_BLOCK_BYTES / (job->in * sizeof(float)) / ROWS_MAX * ROWS_MAX;
    if (block < ROWS_MAX) block = ROWS_MAX;
    for (size_t row = 0; row < job->rows; row += block) {
        size_t rows = job->rows - row < block ? job->rows - row : block;
        run_panels(job, first, last, row, rows, format);
    }
}

/* A part is a stretch of panels. */
static void run_part(const void *data, int part, int slot) {
    const struct linear_job *job = data;
    const size_t first = job->panels * part / job->parts, last = job->panels * (part + 1) / job->parts;
    (void)slot;
    switch (job->format) {
    case BFLOAT16: run_rows(job, first, last, BFLOAT16); break;
    case FLOAT16: run_rows(job, first, last, FLOAT16); break;
    default: run_rows(job, first, last, FLOAT32); break;
    }
}

/* Returns 0, or 1 when there is no memory. */
int llumnix_linear(float *y, const float *x, const char *weights, const float *bias, size_t rows, size_t in, size_t out,
                   int finish, int format, int product, int threads) {
    const size_t panels = (out + PANEL - 1) / PANEL;
    const size_t shares = threads > 1 ? (size_t)threads * PARTS_PER_THREAD : 1, most = panels / PANELS_MIN;
    const int parts = (int)(shares < most ? shares : most ? most : 1);
    const struct linear_job job = {y, x, weights, bias, rows, in, out, panels, (enum finish)finish, format, parts};
    if (product != WIDENED) return llumnix_linear_bf16(&job, (enum product)product, threads);
    llumnix_run_parts(run_part, &job, parts, threads);
    return 0;
}

INLINE void copy_row(float *to, const char *weights, size_t row, size_t in, enum format format) {
    size_t column = row % PANEL;
    if (format == BFLOAT16) column = column % LANES * 2 + column / LANES;
    const char *from = weights + row / PANEL * in * PANEL * item_bytes(format);
    for (size_t k = 0; k < in; k++) to[k] = load_one(from, k * PANEL + column, format);
}

/* The same from the layout of linear_bf16.c. */
INLINE void copy_strip_row(float *to, const char *weights, size_t row, size_t in) {
    const size_t strip = row / (2 * PANEL), chunks = (in + 2 * PANEL - 1) / (2 * PANEL);
    for (size_t k = 0; k < in; k++) {
        size_t tile = (strip * chunks + k / (2 * PANEL)) * 2 + row / PANEL % 2;
        size_t within = k % (2 * PANEL) / 2 * (2 * PANEL) + row % PANEL * 2 + k % 2;
        to[k] = load_one(weights, tile * 2 * PANEL * PANEL + within, BFLOAT16);
    }
}

/* Rows of a packed weight, widened: the embedding of a model that shares it with its output projection. */
void llumnix_packed_rows(float *to, const char *weights, const int64_t *ids, size_t count, size_t in, int format,
                         int product) {
    for (size_t i = 0; i < count; i++, to += in)
        if (product == WIDENED) copy_row(to, weights, (size_t)ids[i], in, (enum format)format);
        else copy_strip_row(to, weights, (size_t)ids[i], in);
}
