/* Few rows times many weight matrices: y[s, n] = sum_k x[s, k] * w[e(s), n, k], accumulated in float32.

   A product with so few rows is bound by reading w from memory, so w is read once, in place and in order, by all
   cores. Vectors are those of gcc and clang, which lower them to what the processor has. Built and called by native.py,
   which sees to it that n_in is a multiple of 32 and n_out of 4. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16
#define KEEP(v) __asm__("" : "+v"(v)) /* gcc would load an operand again for every product it is in */
#else
#define LANES 8
#define KEEP(v)
#endif
#define BLOCK 32   /* rows of w in one task */
#define AHEAD 1024 /* bytes fetched before they are used, where w is one stream */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef float f32;
typedef uint16_t bf16;
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* What one load takes, and what it adds to a sum. */
#define STEP_f32 LANES
typedef vec operand_f32;
INLINE operand_f32 load_f32(const f32 *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    KEEP(v);
    return v;
}
INLINE vec add_f32(vec sum, operand_f32 a, operand_f32 b) { return sum + a * b; }

#define STEP_bf16 (2 * LANES)
#ifdef __AVX512BF16__
typedef __m512bh operand_bf16;
INLINE operand_bf16 load_bf16(const bf16 *p) {
    operand_bf16 v;
    memcpy(&v, p, sizeof v);
    KEEP(v);
    return v;
}
INLINE vec add_bf16(vec sum, operand_bf16 a, operand_bf16 b) { return (vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
typedef struct {
    vec even, odd;
} operand_bf16;
INLINE operand_bf16 load_bf16(const bf16 *p) { /* a bfloat16 is the upper half of a float32 */
    bits pairs;
    memcpy(&pairs, p, sizeof pairs);
    operand_bf16 v = {(vec)(pairs << 16), (vec)(pairs & 0xffff0000u)};
    return v;
}
INLINE vec add_bf16(vec sum, operand_bf16 a, operand_bf16 b) { return sum + a.even * b.even + a.odd * b.odd; }
#endif

INLINE float total(vec v) { /* in a tree, so that additions need not wait for each other */
    float t[LANES];
    memcpy(t, &v, sizeof t);
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) t[i] += t[i + half];
    return t[0];
}

/* NR rows of w times MR rows of x. A function of its own for each size: its sums then stay in registers. A row of w
   is about a page, and the processor does not look ahead into the next. */
#define TILE(T, NR, MR)                                                                                               \
    static __attribute__((noinline)) void tile_##T##_##NR##_##MR(const T *w, const T *x, int64_t n_in, float *y,      \
                                                                 int64_t n_out) {                                     \
        vec sums[NR][MR] = {{{0}}};                                                                                   \
        int64_t ahead = NR == 1 ? AHEAD : NR * n_in * (int64_t)sizeof(T);                                             \
        for (int64_t k = 0; k < n_in; k += STEP_##T) {                                                                \
            operand_##T a[NR], b;                                                                                     \
            UNROLL for (int i = 0; i < NR; i++) {                                                                     \
                __builtin_prefetch((const char *)(w + i * n_in + k) + ahead, 0, 2);                                   \
                a[i] = load_##T(w + i * n_in + k);                                                                    \
            }                                                                                                         \
            UNROLL for (int j = 0; j < MR; j++) {                                                                     \
                b = load_##T(x + j * n_in + k);                                                                       \
                UNROLL for (int i = 0; i < NR; i++) sums[i][j] = add_##T(sums[i][j], a[i], b);                        \
            }                                                                                                         \
        }                                                                                                             \
        UNROLL for (int i = 0; i < NR; i++)                                                                           \
            UNROLL for (int j = 0; j < MR; j++) y[j * n_out + i] = total(sums[i][j]);                                 \
    }

#define TILE_AT(T, NR, MR) tile_##T##_##NR##_##MR(rows + n * n_in, x + j * n_in, n_in, y + j * n_out + n, n_out)

#define SKINNY(T)                                                                                                     \
    TILE(T, 1, 1)                                                                                                     \
    TILE(T, 1, 2)                                                                                                     \
    TILE(T, 4, 1)                                                                                                     \
    TILE(T, 4, 2)                                                                                                     \
    TILE(T, 4, 4)                                                                                                     \
    /* spans: n_spans triples (expert, first row, row behind the last). */                                            \
    void skinny_##T(const T *x, const T *w, const int64_t *spans, int64_t n_spans, int64_t n_in, int64_t n_out,       \
                    float *y) {                                                                                       \
        int64_t blocks = (n_out + BLOCK - 1) / BLOCK;                                                                 \
        _Pragma("omp parallel for schedule(dynamic, 4)") for (int64_t task = 0; task < n_spans * blocks; task++) {    \
            const int64_t *span = spans + 3 * (task / blocks);                                                        \
            int64_t start = task % blocks * BLOCK, end = start + BLOCK < n_out ? start + BLOCK : n_out;               \
            int64_t j = span[1], m = span[2] - span[1];                                                               \
            const T *rows = w + span[0] * n_out * n_in;                                                               \
            /* One or two rows of x: w as one stream, which is fetched best. More: each load of w serves four. */     \
            for (int64_t n = start; m == 1 && n < end; n++) TILE_AT(T, 1, 1);                                         \
            for (int64_t n = start; m == 2 && n < end; n++) TILE_AT(T, 1, 2);                                         \
            for (int64_t n = start; m > 2 && n < end; n += 4) {                                                       \
                for (j = span[1]; j + 4 <= span[2]; j += 4) TILE_AT(T, 4, 4);                                         \
                for (; j + 2 <= span[2]; j += 2) TILE_AT(T, 4, 2);                                                    \
                if (j < span[2]) TILE_AT(T, 4, 1);                                                                    \
            }                                                                                                         \
        }                                                                                                             \
    }

SKINNY(f32)
SKINNY(bf16)
