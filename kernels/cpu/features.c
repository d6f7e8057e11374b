/* Which ways of multiplying bfloat16 this build and this machine have. */
#include "vector.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#endif

/* The best of them. Linux grants AMX to a process that asks; it may refuse, as where a signal stack is too small. */
int llumnix_best_product(void) {
#ifdef __AMX_BF16__
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) return AMX_BF16;
#endif
#ifdef __AVX512BF16__
    return AVX512_BF16;
#else
    return WIDENED;
#endif
}
