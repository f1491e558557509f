/* Few rows times many weight matrices: y[s, n] = sum_k x[s, k] * w[e(s), n, k], accumulated in float32.

   A product with so few rows is bound by reading w from memory, so w is read once, in place and in order, by all
   cores. Vectors are those of gcc and clang, which lower them to what the processor has. Built and called by native.py,
   which sees to it that n_in is a multiple of 32 and n_out of 4. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define KEEP(v) __asm__("" : "+v"(v)) /* gcc would load an operand again for every product it is in */
#else
#define LANES 8
#define KEEP(v)
#endif
#define STEP (2 * LANES) /* inputs taken at once */
#define BLOCK 32         /* rows of w in one task */
#define AHEAD 1024       /* bytes of w that are fetched before they are used */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef float f32;
typedef uint16_t bf16;
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* STEP weights as two vectors. Of float32, the first half and the second. */
INLINE void load_f32(const f32 *p, vec v[2]) { memcpy(v, p, 2 * sizeof(vec)); }

/* Of bfloat16, which is the upper half of a float32, the even ones and the odd ones: a shift and a mask. x comes in
   that order, too. */
INLINE void load_bf16(const bf16 *p, vec v[2]) {
    bits b;
    memcpy(&b, p, sizeof b);
    v[0] = (vec)(b << 16);
    v[1] = (vec)(b & 0xffff0000u);
}

INLINE float sum(vec v) { /* in a tree, so that additions need not wait for each other */
    float t[LANES];
    memcpy(t, &v, sizeof t);
    UNROLL for (int half = LANES / 2; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) t[i] += t[i + half];
    return t[0];
}

/* NR rows of w times MR rows of x. A function of its own for each size: its sums then stay in registers. */
#define TILE(T, NR, MR)                                                                                               \
    static __attribute__((noinline)) void tile_##T##_##NR##_##MR(const T *w, const float *x, int64_t n_in, float *y,  \
                                                          int64_t n_out) {                                            \
        vec sums[NR][MR] = {{{0}}};                                                                                   \
        for (int64_t k = 0; k < n_in; k += STEP) {                                                                    \
            vec a[NR][2];                                                                                             \
            UNROLL for (int i = 0; i < NR; i++) {                                                                     \
                for (int line = 0; line < STEP * (int)sizeof(T); line += 64)                                          \
                    __builtin_prefetch((const char *)(w + i * n_in + k) + AHEAD + line);                              \
                load_##T(w + i * n_in + k, a[i]);                                                                     \
                KEEP(a[i][0]);                                                                                        \
                KEEP(a[i][1]);                                                                                        \
            }                                                                                                         \
            UNROLL for (int half = 0; half < 2; half++) {                                                             \
                UNROLL for (int j = 0; j < MR; j++) {                                                                 \
                    vec b;                                                                                            \
                    memcpy(&b, x + j * n_in + k + half * LANES, sizeof b);                                            \
                    KEEP(b);                                                                                          \
                    UNROLL for (int i = 0; i < NR; i++) sums[i][j] += a[i][half] * b;                                 \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        UNROLL for (int i = 0; i < NR; i++)                                                                           \
            UNROLL for (int j = 0; j < MR; j++) y[j * n_out + i] = sum(sums[i][j]);                                   \
    }

#define SKINNY(T)                                                                                                     \
    TILE(T, 1, 1)                                                                                                     \
    TILE(T, 1, 2)                                                                                                     \
    TILE(T, 4, 1)                                                                                                     \
    TILE(T, 4, 2)                                                                                                     \
    TILE(T, 4, 4)                                                                                                     \
    /* spans: n_spans triples (expert, first row, row behind the last). */                                            \
    void skinny_##T(const float *x, const T *w, const int64_t *spans, int64_t n_spans, int64_t n_in, int64_t n_out,   \
                    float *y) {                                                                                       \
        int64_t blocks = (n_out + BLOCK - 1) / BLOCK;                                                                 \
        _Pragma("omp parallel for schedule(dynamic, 4)") for (int64_t task = 0; task < n_spans * blocks; task++) {    \
            const int64_t *span = spans + 3 * (task / blocks);                                                        \
            int64_t start = task % blocks * BLOCK, end = start + BLOCK < n_out ? start + BLOCK : n_out;               \
            int64_t j = span[1], m = span[2] - span[1];                                                               \
            const T *rows = w + span[0] * n_out * n_in;                                                               \
            /* One or two rows of x: w as one stream, which the processor fetches best. More: w from registers. */    \
            for (int64_t n = start; m == 1 && n < end; n++)                                                           \
                tile_##T##_1_1(rows + n * n_in, x + j * n_in, n_in, y + j * n_out + n, n_out);                        \
            for (int64_t n = start; m == 2 && n < end; n++)                                                           \
                tile_##T##_1_2(rows + n * n_in, x + j * n_in, n_in, y + j * n_out + n, n_out);                        \
            for (int64_t n = start; m > 2 && n < end; n += 4) {                                                       \
                const T *four = rows + n * n_in;                                                                      \
                for (j = span[1]; j + 4 <= span[2]; j += 4)                                                           \
                    tile_##T##_4_4(four, x + j * n_in, n_in, y + j * n_out + n, n_out);                               \
                for (; j + 2 <= span[2]; j += 2)                                                                      \
                    tile_##T##_4_2(four, x + j * n_in, n_in, y + j * n_out + n, n_out);                               \
                if (j < span[2]) tile_##T##_4_1(four, x + j * n_in, n_in, y + j * n_out + n, n_out);                  \
            }                                                                                                         \
        }                                                                                                             \
    }

SKINNY(f32)
SKINNY(bf16)

int skinny_lanes(void) { return LANES; }
