/* Runs the parts of one job on a few threads. Implemented in pool.c. */
#ifndef LLUMNIX_POOL_H
#define LLUMNIX_POOL_H

#define PARTS_MAX ((1 << 20) - 1)

/* `slot` is below the number of threads and different for parts that run at once. */
typedef void (*part_function)(const void *job, int part, int slot);

/* Returns when all parts 0 … parts - 1 (at most PARTS_MAX) have run, on the caller and on threads - 1 others. */
void llumnix_run_parts(part_function run, const void *job, int parts, int threads);

#endif
