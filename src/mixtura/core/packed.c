/* Few rows times a packed matrix: y[m, o] = sum over groups g of scale[g, o] (sum_s code[g, o, s] x[m, g, s] - zero[g, o]
   sum_s x[m, g, s]). Codes go from memory to registers and nowhere else.

   x is rounded to 16-bit integers, group by group, so that one instruction multiplies sixteen codes: the error is at most
   2^-16 of the largest |x| of the group, far below that of codes of a few bits. Sums are exact in 32 bits.

   The layout is that of packing.py over the flattened (g, o, s): a byte holds codes that lie a whole number of rows (g, o)
   apart, so a run of S bytes has codes of 8 / width rows, each to be multiplied with its own group of x.
   Built and called by native.py, which sees to it that S is a multiple of 16 and at most 512, and that rows fill whole bytes. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#define LANES 8       /* of sums; a step takes twice as many codes */
#define STEP 16
#define MOST_ROWS 8   /* outputs that one run of bytes has codes of */
#define MOST_GROUP 512 /* a lane sums 64 products of at most 448 and 32767: below 2^31 */

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef int16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int16_t few_shorts __attribute__((vector_size(16)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE shorts load_bytes(const uint8_t *p) {
    bytes v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, shorts);
}

INLINE shorts load(const int16_t *p) {
    shorts v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* sum + products of neighbours, added in pairs. */
INLINE ints add_products(ints sum, shorts a, shorts b) {
#ifdef __AVX2__
    return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    UNROLL for (int i = 0; i < LANES; i++) sum[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

/* Eight integers as floats, from the lower or the upper half. */
INLINE vec half_of(const shorts *v, int upper) {
    few_shorts few;
    memcpy(&few, (const char *)v + upper * sizeof few, sizeof few);
    return __builtin_convertvector(__builtin_convertvector(few, ints), vec);
}

INLINE float total(vec v) {
    float t[LANES];
    memcpy(t, &v, sizeof t);
    UNROLL for (int half = LANES / 2; half > 0; half /= 2) UNROLL for (int i = 0; i < half; i++) t[i] += t[i + half];
    return t[0];
}

INLINE float half(uint16_t bits) { /* positive float16 to float32, subnormals included, without a compiler's half type */
    uint32_t wide = (uint32_t)bits << 13;
    float value;
    memcpy(&value, &wide, 4);
    return value * 0x1p112f; /* the exponents' biases differ by 112 */
}

/* What one step of a run holds: one plane, or for 3 bits two halves of the plane of low bits and that of high bits. */
typedef struct {
    shorts low[2], high[2];
} loaded;

INLINE loaded load_step(int width, const uint8_t *plane, const uint8_t *second, const uint8_t *top) {
    loaded v = {{load_bytes(plane)}};
    if (width == 3) {
        v.low[1] = load_bytes(second);
        shorts high = load_bytes(top);
        v.high[0] = high << 2; /* the high bit of an even row comes to stand above its two low ones, */
        v.high[1] = high << 1; /* and that of an odd row */
    }
    return v;
}

/* Codes number f of a step, times 2^place(width, f): masked where they stand instead of shifted. */
INLINE shorts codes_at(int width, int f, const loaded *v) {
    if (width == 3) return (v->low[f % 2] & (int16_t)(3 << (f / 2 * 2))) | (v->high[f % 2] & (int16_t)(4 << (f / 2 * 2)));
    return v->low[0] & (int16_t)(((1 << width) - 1) << (width * f));
}
INLINE float unplaced(int width, int f) { return 1.0f / (float)(1 << (width == 3 ? f / 2 * 2 : width * f)); }

typedef struct {
    const uint8_t *codes;
    const uint16_t *scale;
    const uint8_t *zero;
    int64_t n_groups, n_out, size, n_runs;
    int64_t n;
    const int16_t *x;     /* (n, n_groups, size) */
    const float *x_scale; /* (n, n_groups): what an integer of x stands for */
    const vec *sums;      /* (n, n_groups): sums of the integers over a group, lane by lane */
    vec *y;               /* (n_out) when n == 1: totals of the lanes are taken at the end */
    float *y_rows;        /* (n, n_out) otherwise; where n == 0 the values of the matrix, (n_out, n_groups * size) */
} job;

/* The bytes of run r: what they add to the outputs that they have codes of, number out[f] of group[f]. */
INLINE void run_of(int width, int rows, const job *j, int64_t r, const int64_t *group, const int64_t *out) {
    int64_t size = j->size, n = j->n, n_out = j->n_out;
    const uint8_t *plane = j->codes + r * size, *second = plane + j->n_runs * size, *top = second + j->n_runs * size;
    float factor[MOST_ROWS], shift[MOST_ROWS];
    UNROLL for (int f = 0; f < rows; f++) {
        int64_t q = r + f * j->n_runs;
        /* One bit stands for -scale and +scale: (2 code - 1) scale. */
        factor[f] = width == 1 ? 2 * half(j->scale[q]) : half(j->scale[q]);
        shift[f] = width == 1 ? 0.5f : (float)j->zero[q];
    }
    if (n == 0) {
        for (int64_t s = 0; s < size; s += STEP) {
            loaded v = load_step(width, plane + s, second + s, top + s);
            UNROLL for (int f = 0; f < rows; f++) {
                shorts code = codes_at(width, f, &v);
                float *to = j->y_rows + (out[f] * j->n_groups + group[f]) * size + s;
                UNROLL for (int upper = 0; upper < 2; upper++) {
                    vec value = (half_of(&code, upper) * unplaced(width, f) - shift[f]) * factor[f];
                    memcpy(to + upper * LANES, &value, sizeof value);
                }
            }
        }
        return;
    }
    const int16_t *x_of[MOST_ROWS];
    UNROLL for (int f = 0; f < rows; f++) x_of[f] = j->x + group[f] * size;
    if (n == 1) {
        ints dots[MOST_ROWS] = {{0}};
        for (int64_t s = 0; s < size; s += STEP) {
            loaded v = load_step(width, plane + s, second + s, top + s);
            UNROLL for (int f = 0; f < rows; f++) dots[f] = add_products(dots[f], codes_at(width, f, &v), load(x_of[f] + s));
        }
        UNROLL for (int f = 0; f < rows; f++) j->y[out[f]] +=
            factor[f] * j->x_scale[group[f]] *
            (__builtin_convertvector(dots[f], vec) * unplaced(width, f) - shift[f] * j->sums[group[f]]);
        return;
    }
    int16_t codes_FS[MOST_ROWS][MOST_GROUP];
    for (int64_t s = 0; s < size; s += STEP) {
        loaded v = load_step(width, plane + s, second + s, top + s);
        UNROLL for (int f = 0; f < rows; f++) {
            shorts code = codes_at(width, f, &v);
            memcpy(codes_FS[f] + s, &code, sizeof code);
        }
    }
    UNROLL for (int f = 0; f < rows; f++) {
        int64_t n_in = j->n_groups * size, m = 0, g = group[f];
#define ADD(M, DOT)                                                                                                   \
    j->y_rows[(M) * n_out + out[f]] += factor[f] * j->x_scale[(M) * j->n_groups + g] *                                \
                                       total(__builtin_convertvector(DOT, vec) * unplaced(width, f) -                 \
                                             shift[f] * j->sums[(M) * j->n_groups + g])
        for (; m + 4 <= n; m += 4) { /* each load of codes serves four rows of x */
            ints dots[4] = {{0}};
            for (int64_t s = 0; s < size; s += STEP) {
                shorts code = load(codes_FS[f] + s);
                UNROLL for (int i = 0; i < 4; i++) dots[i] = add_products(dots[i], code, load(x_of[f] + (m + i) * n_in + s));
            }
            UNROLL for (int i = 0; i < 4; i++) ADD(m + i, dots[i]);
        }
        for (; m < n; m++) {
            ints dot = {0};
            for (int64_t s = 0; s < size; s += STEP) dot = add_products(dot, load(codes_FS[f] + s), load(x_of[f] + m * n_in + s));
            ADD(m, dot);
        }
    }
}

#define WIDTH(W, ROWS)                                                                                                \
    static __attribute__((noinline)) void runs_##W(const job *j, int64_t from, int64_t to) {                          \
        int64_t group[ROWS], out[ROWS];                                                                               \
        for (int f = 0; f < ROWS; f++) {                                                                              \
            group[f] = (from + f * j->n_runs) / j->n_out;                                                             \
            out[f] = (from + f * j->n_runs) % j->n_out;                                                               \
        }                                                                                                             \
        for (int64_t r = from; r < to; r++) {                                                                         \
            run_of(W, ROWS, j, r, group, out);                                                                        \
            for (int f = 0; f < ROWS; f++)                                                                            \
                if (++out[f] == j->n_out) out[f] = 0, group[f]++;                                                     \
        }                                                                                                             \
    }
WIDTH(1, 8)
WIDTH(2, 4)
WIDTH(3, 8)
WIDTH(4, 2)
WIDTH(8, 1)

/* Integers for one group of x, what they stand for, and their sums lane by lane. A group that is not finite makes its
   scale NaN, and with it every output. */
static void round_group(const float *x, int64_t size, int16_t *to, float *scale, vec *sums) {
    float largest = 0;
    int finite = 1;
    for (int64_t s = 0; s < size; s++) {
        float a = fabsf(x[s]);
        finite &= a <= 0x1.fffffep127f;
        largest = a > largest ? a : largest;
    }
    float up = largest > 0x1p-100f && finite ? 32767.0f / largest : 0.0f;
    *scale = finite ? (up ? largest / 32767.0f : 0.0f) : NAN;
    for (int64_t s = 0; s < size; s++) to[s] = (int16_t)rintf(up ? x[s] * up : 0.0f);
    shorts one = (shorts){0} + 1;
    ints sum = {0};
    for (int64_t s = 0; s < size; s += STEP) sum = add_products(sum, one, load(to + s));
    *sums = __builtin_convertvector(sum, vec);
}

static void (*runs_for(int64_t width))(const job *, int64_t, int64_t) {
    return width == 1 ? runs_1 : width == 2 ? runs_2 : width == 3 ? runs_3 : width == 4 ? runs_4 : runs_8;
}

static int64_t runs_in(int64_t width, int64_t n_groups, int64_t n_out) {
    return n_groups * n_out / (width == 3 ? 8 : 8 / width);
}

/* y: (n_out, n_groups * size). */
void packed_values(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero, int64_t width, int64_t n_groups,
                   int64_t n_out, int64_t size, float *y, int64_t parts) {
    int64_t n_runs = runs_in(width, n_groups, n_out);
    job j = {codes, scale, zero, n_groups, n_out, size, n_runs, 0, NULL, NULL, NULL, NULL, y};
    _Pragma("omp parallel for schedule(static, 1) num_threads((int)parts)") for (int64_t p = 0; p < parts; p++)
        runs_for(width)(&j, n_runs * p / parts, n_runs * (p + 1) / parts);
}

/* x: (n, n_groups * size), y: (n, n_out). Every part sums its own share of the runs, always the same one, so the result
   does not depend on which thread comes first. Returns 0, or 1 where memory is short. */
int packed_product(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero, int64_t width, int64_t n_groups,
                   int64_t n_out, int64_t size, const float *x, int64_t n, float *y, int64_t parts) {
    if (n == 0) return 0;
    int64_t n_runs = runs_in(width, n_groups, n_out), lanes = n == 1 ? LANES : 1;
    size_t part_bytes = (sizeof(float) * n * n_out * lanes + sizeof(vec) - 1) / sizeof(vec) * sizeof(vec);
    size_t sums_bytes = sizeof(vec) * n * n_groups, x_bytes = sizeof(int16_t) * n * n_groups * size;
    size_t scale_bytes = (sizeof(float) * n * n_groups + sizeof(vec) - 1) / sizeof(vec) * sizeof(vec);
    char *room = aligned_alloc(sizeof(vec), sums_bytes + x_bytes + scale_bytes + parts * part_bytes);
    if (!room) return 1;
    vec *sums = (vec *)room;
    int16_t *integers = (int16_t *)(room + sums_bytes);
    float *x_scale = (float *)(room + sums_bytes + x_bytes);
    char *outs = room + sums_bytes + x_bytes + scale_bytes;
    memset(outs, 0, parts * part_bytes);
    for (int64_t i = 0; i < n * n_groups; i++)
        round_group(x + i * size, size, integers + i * size, x_scale + i, sums + i);
    _Pragma("omp parallel for schedule(static, 1) num_threads((int)parts)") for (int64_t p = 0; p < parts; p++) {
        char *out = outs + p * part_bytes;
        job j = {codes, scale, zero, n_groups, n_out, size, n_runs, n, integers, x_scale, sums, (vec *)out, (float *)out};
        runs_for(width)(&j, n_runs * p / parts, n_runs * (p + 1) / parts);
    }
    for (int64_t i = 0; i < n * n_out; i++) {
        float sum = 0;
        for (int64_t p = 0; p < parts; p++) {
            char *out = outs + p * part_bytes;
            sum += n == 1 ? total(((vec *)out)[i]) : ((float *)out)[i];
        }
        y[i] = sum;
    }
    free(room);
    return 0;
}
