/* Norms of int8 rows in integers: the fast path of what normfuse.quantization.integer_arithmetic defines bit for bit.
 * Compiled for one processor: 64 bytes a step with AVX-512BW, and its VNNI where it has that; 32 with AVX2; else plain C.
 *
 * Rows go in blocks that stay in the first-level cache: sums of all of a block, then deviations, then outputs, so that
 * the few scalar steps of a row overlap with those of the next; while outputs are written, the next block is fetched.
 * With c the integer next to the mean and e = S - m c,
 * the deviation is linear between integers, so two sums of absolute differences of bytes (SAD) give it exactly:
 *
 *     sum |m x - S| = m A(c) + |e| (A(c + sgn e) - A(c)),   A(k) = sum |x - k|
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define FRACTION_OF_SIZE 30 /* the fraction bits of 1/m */
#define BLOCK_BYTES 8192
#define MOST_ROWS 32

#if defined(__AVX512BW__)
#define WIDTH 64
typedef __m512i vec;
#define V(name) _mm512_##name
#define V_LOAD(p) _mm512_loadu_si512((const void *)(p))
#define V_STORE(p, v) _mm512_storeu_si512((void *)(p), v)
#define V_ZERO _mm512_setzero_si512()
#define V_DOWN(v, count) _mm512_srav_epi16(v, _mm512_set1_epi16((short)(count)))
#define V_XOR(a, b) _mm512_xor_si512(a, b)
static inline int64_t sum_of_quads(vec v) { return _mm512_reduce_add_epi64(v); }
#elif defined(__AVX2__)
#define WIDTH 32
typedef __m256i vec;
#define V(name) _mm256_##name
#define V_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define V_STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define V_ZERO _mm256_setzero_si256()
#define V_DOWN(v, count) _mm256_sra_epi16(v, _mm_cvtsi32_si128((int)(count)))
#define V_XOR(a, b) _mm256_xor_si256(a, b)
static inline int64_t sum_of_quads(vec v) {
    int64_t part[4];
    V_STORE(part, v);
    return part[0] + part[1] + part[2] + part[3];
}
#else
#define WIDTH 1
#endif

/* What a layer of fixed size settles once; filled by the caller, in this order. */
typedef struct {
    int64_t size;        /* m */
    int64_t factor;      /* K: f in 16 fraction bits */
    int64_t eps;         /* E: eps m^2 in 16 fraction bits of an input step */
    int64_t normal;      /* N: m^2 shifted left to 31 bits */
    int64_t normal_bits; /* by how much */
    int64_t inverse;     /* 1/m in FRACTION_OF_SIZE bits, rounded */
    int64_t fraction;    /* h, fraction bits of a normalized value */
    int64_t output;      /* o, fraction bits of an output */
    int64_t limit;       /* largest magnitude of an output */
} norm_form;

/* What a row settles: w = x << 8, or clip(x - centre, -clip, clip) << shift;  z = mulhrs(w, scale) - offset. */
typedef struct {
    int32_t wide, centre, clip, shift, scale, offset;
} row_form;

static inline int bit_length(uint64_t value) { return value ? 64 - __builtin_clzll(value) : 0; }

static inline int clamp_int(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

/* Return floor((2 S + m) / (2 m)). A quotient of integers this small rounds to the right side of every integer. */
static inline int32_t centre_of(int64_t sum, int64_t size) {
    double quotient = (double)(2 * sum + size) / (double)(2 * size);
    int32_t truncated = (int32_t)quotient;
    return truncated - (quotient < (double)truncated);
}

static inline row_form settle(int64_t sum, int32_t centre, int64_t denominator, const norm_form *f) {
    row_form row;
    uint64_t den = denominator > 0 ? (uint64_t)denominator : 1;
    int z = bit_length(den) - 31;
    uint64_t den31 = z >= 0 ? den >> z : den << -z;
    /* exact: below 2^21 with a remainder of at least 2^-31, which 53 bits resolve */
    int64_t r = (int64_t)((double)(f->normal << 20) / (double)den31);
    int least = bit_length((uint64_t)r) - 15; /* shift that leaves 15 bits */
    int common = (int)f->normal_bits + z - (int)f->fraction - 11;
    row.wide = 8 + common >= least;
    row.shift = row.wide ? 8 : clamp_int(least - common, 9, 14);
    int right = row.shift + common;
    row.scale = 32767;
    if (right >= least) {
        right = right > 62 ? 62 : right;
        row.scale = clamp_int((int)((r + ((int64_t)1 << (right - 1))) >> right), 0, 32767);
    }
    row.clip = (1 << (15 - row.shift)) - 1;
    row.centre = centre;
    if (row.wide) {
        row.offset = (int32_t)((sum * f->inverse * row.scale + ((int64_t)1 << 36)) >> 37);
    } else {
        int back = clamp_int(34 + (int)f->normal_bits + z - (int)f->fraction, 1, 62);
        row.offset = (int32_t)(((sum - f->size * centre) * f->inverse * r + ((int64_t)1 << (back - 1))) >> back);
    }
    return row;
}

static inline int32_t clip16(int32_t v) { return v > 32767 ? 32767 : v < -32768 ? -32768 : v; }

static inline int8_t output_of(int32_t x, const row_form *row, int32_t gain, int32_t shift, const norm_form *f) {
    int32_t w = row->wide ? x * 256 : clamp_int(x - row->centre, -row->clip, row->clip) * (1 << row->shift);
    int32_t z = clip16(((w * row->scale + 16384) >> 15) - row->offset);
    int32_t y = clip16(((z * gain + 16384) >> 15) + shift) >> f->output;
    return (int8_t)clamp_int(y, -(int)f->limit, (int)f->limit);
}

#if WIDTH > 1
/* Unpacking a zero below each byte gives x << 8 in 16 bits, its pairs of halves interleaved as packing wants them.
 * Packing saturates, so that an upper limit of 127 needs no further step. */
static inline __attribute__((always_inline)) vec outputs_of(vec x, const row_form *row, const int16_t *gain,
                                                            const int16_t *shift, const norm_form *f, int wide,
                                                            int full) {
    vec half[2] = {V(unpacklo_epi8)(V_ZERO, x), V(unpackhi_epi8)(V_ZERO, x)};
    const vec scale = V(set1_epi16)((short)row->scale), offset = V(set1_epi16)((short)row->offset);
    const vec centre = V(set1_epi16)((short)row->centre), clip = V(set1_epi16)((short)row->clip);
    const vec negative = V(set1_epi16)((short)-row->clip);
    const __m128i up = _mm_cvtsi32_si128(row->shift);
    for (int i = 0; i < 2; i++) {
        vec w = half[i];
        if (!wide) {
            w = V(sub_epi16)(V(srai_epi16)(w, 8), centre);
            w = V(sll_epi16)(V(max_epi16)(V(min_epi16)(w, clip), negative), up);
        }
        vec z = V(subs_epi16)(V(mulhrs_epi16)(w, scale), offset);
        vec y = V(mulhrs_epi16)(z, V_LOAD(gain + i * (WIDTH / 2)));
        half[i] = V_DOWN(V(adds_epi16)(y, V_LOAD(shift + i * (WIDTH / 2))), f->output);
    }
    vec y = V(max_epi8)(V(packs_epi16)(half[0], half[1]), V(set1_epi8)((char)-f->limit));
    return full ? y : V(min_epi8)(y, V(set1_epi8)((char)f->limit));
}

static inline __attribute__((always_inline)) void write_vectors(const int8_t *x, int8_t *y, const row_form *row,
                                                                const int16_t *gain, const int16_t *shift,
                                                                const norm_form *f, int wide, int full) {
    const row_form fixed = *row;
    int64_t i = 0;
    for (; i + WIDTH <= f->size; i += WIDTH)
        V_STORE(y + i, outputs_of(V_LOAD(x + i), &fixed, gain + i, shift + i, f, wide, full));
    if (i < f->size) {
        int8_t in[WIDTH] = {0}, out[WIDTH];
        memcpy(in, x + i, (size_t)(f->size - i));
        V_STORE(out, outputs_of(V_LOAD(in), &fixed, gain + i, shift + i, f, wide, full));
        memcpy(y + i, out, (size_t)(f->size - i));
    }
}
#endif

/* gain, shift: of interleaved(). Each case by itself, so that its loop holds nothing of the others. */
static inline void write_row(const int8_t *x, int8_t *y, const row_form *row, const int16_t *gain,
                             const int16_t *shift, const norm_form *f) {
#if WIDTH > 1
    const int full = f->limit == 127;
    if (row->wide && full) write_vectors(x, y, row, gain, shift, f, 1, 1);
    else if (row->wide) write_vectors(x, y, row, gain, shift, f, 1, 0);
    else if (full) write_vectors(x, y, row, gain, shift, f, 0, 1);
    else write_vectors(x, y, row, gain, shift, f, 0, 0);
#else
    for (int64_t i = 0; i < f->size; i++) y[i] = output_of(x[i], row, gain[i], shift[i], f);
#endif
}

#if WIDTH == 64 && defined(__AVX512VNNI__)
#define BYTES_ADD(sums, v) _mm512_dpbusd_epi32(sums, V(set1_epi8)(1), v) /* signed bytes, four to a sum */
#define BYTES_ADD_UNSIGNED(sums, v) _mm512_dpbusd_epi32(sums, v, V(set1_epi8)(1))
#define ADD_SUMS(a, b) V(add_epi32)(a, b)
#define SUM_OF(sums) ((int64_t)_mm512_reduce_add_epi32(sums))
#define SIGNED_BIAS 0
#elif WIDTH > 1
#define BYTES_ADD(sums, v) V(add_epi64)(sums, V(sad_epu8)(V_XOR(v, V(set1_epi8)((char)-128)), V_ZERO))
#define BYTES_ADD_UNSIGNED(sums, v) V(add_epi64)(sums, V(sad_epu8)(v, V_ZERO))
#define ADD_SUMS(a, b) V(add_epi64)(a, b)
#define SUM_OF(sums) sum_of_quads(sums)
#define SIGNED_BIAS 128
#endif

static inline int64_t row_sum(const int8_t *x, int64_t size) {
    int64_t i = 0, total = 0;
#if WIDTH > 1
    vec sums[4] = {V_ZERO, V_ZERO, V_ZERO, V_ZERO}; /* one alone would wait for itself */
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
        for (int k = 0; k < 4; k++) sums[k] = BYTES_ADD(sums[k], V_LOAD(x + i + k * WIDTH));
    for (; i + WIDTH <= size; i += WIDTH) sums[0] = BYTES_ADD(sums[0], V_LOAD(x + i));
    total = SUM_OF(ADD_SUMS(ADD_SUMS(sums[0], sums[1]), ADD_SUMS(sums[2], sums[3]))) - SIGNED_BIAS * i;
#endif
    for (; i < size; i++) total += x[i];
    return total;
}

static inline int64_t row_magnitude(const int8_t *x, int64_t size) {
    int64_t i = 0, total = 0;
#if WIDTH > 1
    vec sums[4] = {V_ZERO, V_ZERO, V_ZERO, V_ZERO};
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
        for (int k = 0; k < 4; k++) sums[k] = BYTES_ADD_UNSIGNED(sums[k], V(abs_epi8)(V_LOAD(x + i + k * WIDTH)));
    for (; i + WIDTH <= size; i += WIDTH) sums[0] = BYTES_ADD_UNSIGNED(sums[0], V(abs_epi8)(V_LOAD(x + i)));
    total = SUM_OF(ADD_SUMS(ADD_SUMS(sums[0], sums[1]), ADD_SUMS(sums[2], sums[3])));
#endif
    for (; i < size; i++) total += x[i] < 0 ? -x[i] : x[i];
    return total;
}

/* Return sum |m x - S|. */
static inline int64_t row_deviation(const int8_t *x, int64_t size, int64_t sum, int32_t centre) {
    int64_t rest = sum - size * centre;
    int32_t next = centre + (rest > 0) - (rest < 0);
    int64_t i = 0, at_centre = 0, at_next = 0;
#if WIDTH > 1
    vec high = V(set1_epi8)((char)-128), a = V_ZERO, b = V_ZERO;
    vec c = V(set1_epi8)((char)(centre + 128)), n = V(set1_epi8)((char)(next + 128));
    for (; i + WIDTH <= size; i += WIDTH) {
        vec v = V_XOR(V_LOAD(x + i), high);
        a = V(add_epi64)(a, V(sad_epu8)(v, c));
        b = V(add_epi64)(b, V(sad_epu8)(v, n));
    }
    const uint64_t both = (uint64_t)sum_of_quads(V(add_epi64)(a, V(slli_epi64)(b, 32))); /* each below 2^32 */
    at_centre = (int64_t)(both & 0xffffffff);
    at_next = (int64_t)(both >> 32);
#endif
    for (; i < size; i++) {
        at_centre += x[i] < centre ? centre - x[i] : x[i] - centre;
        at_next += x[i] < next ? next - x[i] : x[i] - next;
    }
    return size * at_centre + (rest < 0 ? -rest : rest) * (at_next - at_centre);
}

/* Return gain and, after it, shift in the order of outputs_of(), each padded to whole vectors; NULL without memory. */
static int16_t *interleaved(const int16_t *gain, const int16_t *shift, int64_t size, int64_t *padded) {
    const int64_t width = WIDTH > 1 ? WIDTH : 16;
    *padded = (size + width - 1) / width * width;
    int16_t *made = calloc((size_t)*padded, 2 * sizeof(int16_t));
    for (int64_t i = 0; made && i < size; i += 8) { /* eight at a time stay together */
        int64_t within = i % width, group = within / 16, half = within / 8 % 2;
        int64_t at = WIDTH > 1 ? i - within + half * (width / 2) + group * 8 : i;
        size_t bytes = (size_t)(size - i < 8 ? size - i : 8) * sizeof(int16_t);
        memcpy(made + at, gain + i, bytes);
        memcpy(made + *padded + at, shift + i, bytes);
    }
    return made;
}

static inline int64_t rows_per_block(int64_t size) {
    int64_t rows = BLOCK_BYTES / (size ? size : 1);
    return rows < 1 ? 1 : rows > MOST_ROWS ? MOST_ROWS : rows;
}

/* Fetch the lines of a block that the next pass reads. */
static inline void prefetch(const int8_t *x, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(x + i);
}

static inline int token_rows(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                             const norm_form *form, int centred) {
    const norm_form f = *form;
    int64_t padded;
    int16_t *const gains = interleaved(gain, shift, f.size, &padded);
    if (!gains) return 1;
    const int64_t step = rows_per_block(f.size);
    int64_t sums[MOST_ROWS] = {0}, deviations[MOST_ROWS];
    int32_t centres[MOST_ROWS] = {0};
    row_form settled[MOST_ROWS];
    for (int64_t first = 0; first < rows; first += step) {
        const int64_t count = rows - first < step ? rows - first : step;
        const int8_t *in = x + first * f.size;
        int8_t *out = y + first * f.size;
        if (centred) {
            for (int64_t i = 0; i < count; i++) sums[i] = row_sum(in + i * f.size, f.size);
            for (int64_t i = 0; i < count; i++) centres[i] = centre_of(sums[i], f.size);
            for (int64_t i = 0; i < count; i++)
                deviations[i] = row_deviation(in + i * f.size, f.size, sums[i], centres[i]);
        } else {
            for (int64_t i = 0; i < count; i++) deviations[i] = f.size * row_magnitude(in + i * f.size, f.size);
        }
        for (int64_t i = 0; i < count; i++)
            settled[i] = settle(sums[i], centres[i], f.factor * deviations[i] + f.eps, &f);
        for (int64_t i = 0; i < count; i++) {
            if (first + step + i < rows) prefetch(in + (step + i) * f.size, f.size);
            write_row(in + i * f.size, out + i * f.size, &settled[i], gains, gains + padded, &f);
        }
    }
    free(gains);
    return 0;
}

/* L1 LayerNorm. Return 0, or 1 without memory. */
int normfuse_l1_rows(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                     const norm_form *form) {
    return token_rows(x, y, rows, gain, shift, form, 1);
}

/* L1 RMSNorm: S = 0, and the deviation is m sum |x|. */
int normfuse_l1_rms_rows(const int8_t *x, int8_t *y, int64_t rows, const int16_t *gain, const int16_t *shift,
                         const norm_form *form) {
    return token_rows(x, y, rows, gain, shift, form, 0);
}

/* y = clip((x multiplier + addend) >> down), each channel a run of `inner` values, in int32. */
void normfuse_affine_runs(const int8_t *x, int8_t *y, int64_t runs, int64_t inner, int64_t channels,
                          const int32_t *multiplier, const int32_t *addend, const int32_t *down, int32_t limit) {
    for (int64_t r = 0; r < runs; r++) {
        const int32_t m = multiplier[r % channels], a = addend[r % channels], d = down[r % channels];
        const int8_t *in = x + r * inner;
        int8_t *out = y + r * inner;
        for (int64_t i = 0; i < inner; i++) out[i] = (int8_t)clamp_int((in[i] * m + a) >> d, -limit, limit);
    }
}

/* The same with the channels last. */
void normfuse_affine_last(const int8_t *x, int8_t *y, int64_t rows, int64_t channels, const int32_t *multiplier,
                          const int32_t *addend, const int32_t *down, int32_t limit) {
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *in = x + r * channels;
        int8_t *out = y + r * channels;
        for (int64_t i = 0; i < channels; i++)
            out[i] = (int8_t)clamp_int((in[i] * multiplier[i] + addend[i]) >> down[i], -limit, limit);
    }
}
