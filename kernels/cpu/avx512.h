/* Sixteen floats at a time, and AMX tiles: every tile is 16 rows of 64 bytes. For files compiled with AVX-512. */
#ifndef LLUMNIX_AVX512_H
#define LLUMNIX_AVX512_H

#include "vector.h"
#include <immintrin.h>

#define TILE_ROWS 16
#define TILE_BYTES 1024

#ifdef __AMX_BF16__

/* A thread does this before it uses tiles, and _tile_release() when it is done: torch configures its own. */
INLINE void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = TILE_ROWS;
    }
    _tile_loadconfig(&config);
}

#endif

/* Sixteen rows of sixteen 32-bit words to its transpose. */
INLINE void transpose(__m512i *rows) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}

#define LOG2_E 1.44269504088896341f

/* 2^x for x < 128: the Taylor series of its fraction, to 3e-6. Below -126 it gives 2^-126. */
INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_fmadd_ps(rest, _mm512_set1_ps(1.33335581e-3f), _mm512_set1_ps(9.61812911e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.55041087e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40226507e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93147181e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* The same for x <= 0 to 1.1e-4, enough for what becomes bfloat16: of the cubics that are 1 at 0 the one of the least
 * greatest relative error, found by reweighted least squares. */
INLINE __m512 power_of_two_roughly(__m512 x) {
    const __m512 rounder = _mm512_set1_ps(12582912.0f);
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 shifted = _mm512_add_ps(x, rounder), rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, rounder));
    __m512 sum = _mm512_fmadd_ps(rest, _mm512_set1_ps(5.500874e-2f), _mm512_set1_ps(2.4221113e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9328297e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return (__m512)_mm512_add_epi32((__m512i)sum, _mm512_slli_epi32((__m512i)shifted, 23));
}

#endif
