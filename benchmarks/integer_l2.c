/* L2 LayerNorm of int8 rows, written with the care of the L1 kernels, for comparison: same blocks, same output pass.
 *
 *     V = m sum x^2 - S^2;   1 / sqrt(V/m^2 + eps) = m^2 / (m sqrt(V + E))
 *
 * One pass takes S and sum x^2 together. The root is the processor's (double), or one of integers.
 */
#include "integer_norms.c"

#include <math.h>

/* floor(sqrt(value)), one bit a step, as processors without a root do it. */
static inline uint64_t root_of(uint64_t value) {
    uint64_t root = 0, bit = (uint64_t)1 << 62;
    while (bit > value) bit >>= 2;
    for (; bit; bit >>= 2) {
        uint64_t next = root + bit;
        root >>= 1;
        if (value >= next) {
            value -= next;
            root += bit;
        }
    }
    return root;
}

static inline void row_moments(const int8_t *x, int64_t size, int64_t *sum, int64_t *squares) {
    int64_t i = 0, total = 0, square = 0;
#if WIDTH == 64 && defined(__AVX512VNNI__)
    vec one = V(set1_epi8)(1), a = V_ZERO, b = V_ZERO, c = V_ZERO;
    for (; i + 64 <= size; i += 64) { /* |x|^2 by products of bytes: for values above -128 */
        vec v = V_LOAD(x + i), magnitude = V(abs_epi8)(v);
        a = _mm512_dpbusd_epi32(a, one, v);
        if (i & 64) b = _mm512_dpbusd_epi32(b, magnitude, magnitude);
        else c = _mm512_dpbusd_epi32(c, magnitude, magnitude);
    }
    total = _mm512_reduce_add_epi32(a);
    square = _mm512_reduce_add_epi32(V(add_epi32)(b, c));
#elif WIDTH > 1
    vec high = V(set1_epi8)((char)-128), a = V_ZERO, b = V_ZERO;
    for (; i + WIDTH <= size; i += WIDTH) {
        vec v = V_LOAD(x + i), low = V(srai_epi16)(V(slli_epi16)(v, 8), 8), up = V(srai_epi16)(v, 8);
        a = V(add_epi64)(a, V(sad_epu8)(V_XOR(v, high), V_ZERO));
        b = V(add_epi32)(b, V(add_epi32)(V(madd_epi16)(low, low), V(madd_epi16)(up, up)));
    }
    total = sum_of_quads(a) - 128 * i;
    int32_t part[WIDTH / 4];
    V_STORE(part, b);
    for (int k = 0; k < WIDTH / 4; k++) square += part[k];
#endif
    for (; i < size; i++) {
        total += x[i];
        square += x[i] * x[i];
    }
    *sum = total;
    *squares = square;
}

static inline __attribute__((always_inline)) int l2_rows(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                          const norm_form *form, int integer_root, int centred) {
    const norm_form f = *form;
    int64_t padded;
    int16_t *const gains = interleaved(gain, shift, f.size, &padded);
    if (!gains) return 1;
    const int64_t step = rows_per_block(f.size);
    int64_t sums[MOST_ROWS], squares[MOST_ROWS];
    row_form settled[MOST_ROWS];
    for (int64_t first = 0; first < rows; first += step) {
        const int64_t count = rows - first < step ? rows - first : step;
        const int8_t *in = x + first * f.size;
        int8_t *out = y + first * f.size;
        for (int64_t i = 0; i < count; i++) {
            row_moments(in + i * f.size, f.size, &sums[i], &squares[i]);
            if (!centred) sums[i] = 0;
        }
        for (int64_t i = 0; i < count; i++) {
            uint64_t variance = (uint64_t)(f.size * squares[i] - sums[i] * sums[i] + f.eps);
            int64_t root = integer_root ? (int64_t)root_of(variance << 16) << 8
                                        : (int64_t)(65536.0 * sqrt((double)variance));
            settled[i] = settle(sums[i], centre_of(sums[i], f.size), f.size * root, &f);
        }
        for (int64_t i = 0; i < count; i++) {
            if (first + step + i < rows) prefetch(in + (step + i) * f.size, f.size);
            write_row(in + i * f.size, out + i * f.size, &settled[i], gains, gains + padded, &f);
        }
    }
    free(gains);
    return 0;
}

int normfuse_l2_rows(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                     const norm_form *form) {
    return l2_rows(x, y, rows, gain, shift, form, 0, 1);
}

int normfuse_l2_rows_integer_root(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                                  const norm_form *form) {
    return l2_rows(x, y, rows, gain, shift, form, 1, 1);
}

int normfuse_l2_rms_rows(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                         const norm_form *form) {
    return l2_rows(x, y, rows, gain, shift, form, 0, 0);
}
