/* Eight floats at a time, in GCC's vector extensions: one source for AVX2, AVX-512, NEON and plain C.
 *
 * Storage formats are converted to float when loaded; all arithmetic is in float. Functions that take a `format`
 * are always inlined with a constant, so that each caller is compiled once per format. */
#ifndef LLUMNIX_VECTOR_H
#define LLUMNIX_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define PANEL 16 /* outputs of a product that are computed together */

enum format { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* How bfloat16 is multiplied; mirrored in kernels.py. */
enum product { WIDENED = 0, AVX512_BF16 = 1, AMX_BF16 = 2 };

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
typedef uint32_t uvec __attribute__((vector_size(32)));
typedef uint16_t half_vec __attribute__((vector_size(16)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec4 __attribute__((vector_size(16)));

/* Lanes i … l of a and b together. GCC before 12 has only its own builtin, clang only the other. */
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (ivec4){i, j, k, l})
#endif

INLINE size_t item_bytes(enum format format) { return format == FLOAT32 ? 4 : 2; }

INLINE vec load(const float *from) {
    vec value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, vec value) { memcpy(to, &value, sizeof value); }

INLINE vec splat(float value) { return (vec){} + value; }

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* IEEE half to float, subnormals, infinities and NaN included. */
INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float magnitude = rest < 0x400 ? (float)rest * 0x1p-24f : bits_to_float((rest << 13) + (112u << 23));
    return bits_to_float(sign | float_to_bits(magnitude));
}

/* Float to IEEE half, rounded to nearest even. */
INLINE uint16_t float_to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) {
        /* Adding half's smallest step, scaled so that float's own rounding cuts at the right bit. */
        uint32_t shifted = float_to_bits(bits_to_float(rest) + 0.5f);
        return (uint16_t)(sign | (shifted - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1) - (112u << 23);
    return (uint16_t)(sign | rest >> 13);
}

INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Eight values at `from`, which need not be aligned. */
INLINE vec load_as(const void *from, enum format format) {
    if (format == FLOAT32) return load(from);
    half_vec raw;
    memcpy(&raw, from, sizeof raw);
#if defined(__AVX2__) /* what GCC makes of __builtin_convertvector takes four instructions */
    if (format == BFLOAT16) return (vec)((uvec)_mm256_cvtepu16_epi32((__m128i)raw) << 16);
#else
    if (format == BFLOAT16) return (vec)(__builtin_convertvector(raw, uvec) << 16);
#endif
#if defined(__F16C__)
    return (vec)_mm256_cvtph_ps((__m128i)raw);
#else
    vec value;
    for (int i = 0; i < LANES; i++) value[i] = half_to_float(raw[i]);
    return value;
#endif
}

INLINE float load_one(const void *from, size_t index, enum format format) {
    if (format == FLOAT32) return ((const float *)from)[index];
    uint16_t raw = ((const uint16_t *)from)[index];
    return format == BFLOAT16 ? bits_to_float((uint32_t)raw << 16) : half_to_float(raw);
}

INLINE void store_one(void *to, size_t index, float value, enum format format) {
    if (format == FLOAT32) ((float *)to)[index] = value;
    else ((uint16_t *)to)[index] = format == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

/* Always in the same order, so that a sum does not depend on where it is computed. */
INLINE float sum_of(vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

/* The sums of the lanes of four vectors, likewise. */
INLINE vec4 sums_of(const vec *v) {
    vec4 half[4];
    for (int k = 0; k < 4; k++) {
        vec4 parts[2];
        memcpy(parts, &v[k], sizeof parts);
        half[k] = parts[0] + parts[1];
    }
    vec4 first = PICK(half[0], half[1], 0, 4, 1, 5) + PICK(half[0], half[1], 2, 6, 3, 7);
    vec4 second = PICK(half[2], half[3], 0, 4, 1, 5) + PICK(half[2], half[3], 2, 6, 3, 7);
    return PICK(first, second, 0, 1, 4, 5) + PICK(first, second, 2, 3, 6, 7);
}

INLINE float max_of(vec v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

/* e^x to about one unit in the last place; below -87 it gives e^-87, above 88 e^88. Polynomial from Cephes' expf. */
INLINE vec exponential(vec x) {
    x = larger(x, splat(-87.0f));
    x = -larger(-x, splat(-88.0f));
    const vec rounder = splat(12582912.0f);
    vec whole = (x * 1.44269504088896341f + rounder) - rounder;
    vec rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    vec sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.0f;
    return sum * (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
}

#endif
