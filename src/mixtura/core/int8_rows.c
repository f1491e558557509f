/* Rows of 4- or 8-bit codes times 8-bit activations: y[m, place[o]] = sum over groups g of
   scale[o, g] x_scale[m, g] (sum_s (code[o, g, s] - zero[o, g]) x[m, g, s]). What stands in brackets is an exact integer;
   scales come after it, group by group (MixLLM 2412.14590, sec. 4.2). No weight ever stands in float.

   Codes of 4 bits: byte b of a group holds code b below and code S/2 + b above. Codes of 8 bits: byte s is code s, an integer
   plus 128. The integers of x are stored in the order in which a step of 32 codes meets them: 16 of the first half of the
   group, 16 of the second, and so on; that order is the same for both widths. Rows of x come in tiles of 8 (one at a time
   where there are fewer than four), so that the sums of a tile end in one register.

   Products of neighbours are added in 16 bits: at most 2 x 15 x 127 for 4 bits, of which eight fit, and 2 x 128 x 127 for 8.
   Built and called by native.py, which sees to it that S is a multiple of 32 and at most 512. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#define TILE 8
#define STEP 32  /* codes */
#define ALONE 4  /* from so many rows of x on they go in tiles */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE float half(uint16_t bits) { /* positive float16 to float32, subnormals included */
    uint32_t wide = (uint32_t)bits << 13;
    float value;
    memcpy(&value, &wide, 4);
    return value * 0x1p112f; /* the exponents' biases differ by 112 */
}

typedef struct {
    const uint8_t *codes;
    const uint16_t *scale;
    const uint8_t *zero; /* of 4 bits; codes of 8 bits have none */
    const int32_t *place;
    int64_t n_groups, size, y_stride;
    const int8_t *x;      /* (tiles, n_groups, tile, size) */
    const float *x_scale; /* (tiles, n_groups, tile) */
    const int32_t *x_sum; /* (tiles, n_groups, tile): sums of the integers */
    int64_t n;
    float *y;             /* (n, y_stride) */
} job;

#ifdef __AVX2__
typedef __m256i ints;

INLINE ints codes_step(int width, const uint8_t *codes, int64_t size, int64_t t) {
    if (width == 4) { /* 16 bytes in both halves, the upper one shifted down by a code */
        __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(codes + t * 16)));
        v = _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        return _mm256_and_si256(v, _mm256_set1_epi8(15));
    }
    __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(codes + t * 16)));
    v = _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i *)(codes + size / 2 + t * 16)), 1);
    return _mm256_xor_si256(v, _mm256_set1_epi8((char)0x80));
}

/* Sums of one group for a tile of rows of x, eight partial sums each. */
INLINE void group_sums(int width, int tile, const uint8_t *codes, const int8_t *x, int64_t size, ints *sums) {
    const ints one = _mm256_set1_epi16(1);
    ints few[TILE];
    UNROLL for (int i = 0; i < tile; i++) sums[i] = few[i] = _mm256_setzero_si256();
    for (int64_t t = 0; t < size / STEP; t++) {
        ints w = codes_step(width, codes, size, t), big = _mm256_abs_epi8(w);
        UNROLL for (int i = 0; i < tile; i++) {
            ints v = _mm256_loadu_si256((const __m256i *)(x + i * size + t * STEP));
            if (width == 4) few[i] = _mm256_add_epi16(few[i], _mm256_maddubs_epi16(w, v));
            else sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(big, _mm256_sign_epi8(v, w)), one));
        }
        if (width == 4 && (t % 8 == 7 || t + 1 == size / STEP)) {
            UNROLL for (int i = 0; i < tile; i++) {
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(few[i], one));
                few[i] = _mm256_setzero_si256();
            }
        }
    }
}

/* Eight times eight partial sums to eight sums, in order. */
INLINE ints totals(const ints *s) {
    ints a = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    ints b = _mm256_hadd_epi32(_mm256_hadd_epi32(s[4], s[5]), _mm256_hadd_epi32(s[6], s[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

INLINE void tile_row(int width, const job *j, int64_t o, int64_t tile) {
    int64_t bytes = j->size * width / 8, G = j->n_groups, rows = j->n - tile * TILE < TILE ? j->n - tile * TILE : TILE;
    __m256 y = _mm256_setzero_ps();
    for (int64_t g = 0; g < G; g++) {
        ints sums[TILE];
        group_sums(width, TILE, j->codes + (o * G + g) * bytes, j->x + (tile * G + g) * TILE * j->size, j->size, sums);
        ints d = totals(sums);
        int64_t at = (tile * G + g) * TILE;
        if (width == 4)
            d = _mm256_sub_epi32(d, _mm256_mullo_epi32(_mm256_set1_epi32(j->zero[o * G + g]),
                                                       _mm256_loadu_si256((const __m256i *)(j->x_sum + at))));
        __m256 s = _mm256_mul_ps(_mm256_loadu_ps(j->x_scale + at), _mm256_set1_ps(half(j->scale[o * G + g])));
        y = _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(d), s));
    }
    float found[TILE];
    _mm256_storeu_ps(found, y);
    for (int64_t i = 0; i < rows; i++) j->y[(tile * TILE + i) * j->y_stride + j->place[o]] = found[i];
}

INLINE void single_row(int width, const job *j, int64_t o, int64_t m) {
    int64_t bytes = j->size * width / 8, G = j->n_groups;
    __m256 y = _mm256_setzero_ps();
    float shift = 0;
    for (int64_t g = 0; g < G; g++) {
        ints sum;
        group_sums(width, 1, j->codes + (o * G + g) * bytes, j->x + (m * G + g) * j->size, j->size, &sum);
        float s = half(j->scale[o * G + g]) * j->x_scale[m * G + g];
        y = _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(s)));
        if (width == 4) shift += s * (float)(j->zero[o * G + g] * j->x_sum[m * G + g]);
    }
    float t[8];
    _mm256_storeu_ps(t, y);
    UNROLL for (int part = 4; part > 0; part /= 2) UNROLL for (int i = 0; i < part; i++) t[i] += t[i + part];
    j->y[m * j->y_stride + j->place[o]] = t[0] - shift;
}
#else
INLINE int32_t dot(int width, const uint8_t *codes, const int8_t *x, int64_t size) {
    int32_t sum = 0;
    for (int64_t t = 0; t < size / STEP; t++)
        for (int64_t i = 0; i < STEP / 2; i++) {
            int64_t at = t * (STEP / 2) + i;
            int32_t low = width == 4 ? codes[at] & 15 : codes[at] - 128;
            int32_t high = width == 4 ? codes[at] >> 4 : codes[size / 2 + at] - 128;
            sum += low * x[t * STEP + i] + high * x[t * STEP + STEP / 2 + i];
        }
    return sum;
}

INLINE float any_row(int width, const job *j, int64_t o, int64_t tile, int64_t of, int64_t i) {
    int64_t bytes = j->size * width / 8, G = j->n_groups;
    float y = 0;
    for (int64_t g = 0; g < G; g++) {
        int64_t at = (tile * G + g) * of + i;
        int32_t d = dot(width, j->codes + (o * G + g) * bytes, j->x + at * j->size, j->size);
        if (width == 4) d -= j->zero[o * G + g] * j->x_sum[at];
        y += (float)d * (j->x_scale[at] * half(j->scale[o * G + g]));
    }
    return y;
}

INLINE void tile_row(int width, const job *j, int64_t o, int64_t tile) {
    for (int64_t i = 0; i < TILE && tile * TILE + i < j->n; i++)
        j->y[(tile * TILE + i) * j->y_stride + j->place[o]] = any_row(width, j, o, tile, TILE, i);
}

INLINE void single_row(int width, const job *j, int64_t o, int64_t m) {
    j->y[m * j->y_stride + j->place[o]] = any_row(width, j, o, m, 1, 0);
}
#endif

#define WIDTH(W)                                                                                                      \
    static __attribute__((noinline)) void rows_##W(const job *j, int64_t from, int64_t to) {                          \
        if (j->n < ALONE) {                                                                                           \
            for (int64_t o = from; o < to; o++)                                                                       \
                for (int64_t m = 0; m < j->n; m++) single_row(W, j, o, m);                                            \
        } else {                                                                                                      \
            for (int64_t tile = 0; tile * TILE < j->n; tile++)                                                        \
                for (int64_t o = from; o < to; o++) tile_row(W, j, o, tile);                                          \
        }                                                                                                             \
    }
WIDTH(4)
WIDTH(8)

int64_t int8_tile(int64_t n) { return n < ALONE ? 1 : TILE; }

/* Integers of x in [-127, 127], what they stand for, and their sums; x: (n, n_groups * size). A group that is not finite gets
   the scale NaN, and with it every output. The places of rows that fill the last tile are zero. */
void int8_round(const float *x, int64_t n, int64_t n_groups, int64_t size, int8_t *to, float *scale, int32_t *sums) {
    int64_t tile = int8_tile(n), padded = (n + tile - 1) / tile * tile;
    for (int64_t m = 0; m < padded; m++)
        for (int64_t g = 0; g < n_groups; g++) {
            int64_t at = ((m / tile) * n_groups + g) * tile + m % tile;
            int8_t *out = to + at * size;
            if (m >= n) {
                memset(out, 0, size);
                scale[at] = 0, sums[at] = 0;
                continue;
            }
            const float *in = x + (m * n_groups + g) * size;
            float largest = 0;
            int finite = 1;
            for (int64_t s = 0; s < size; s++) {
                float a = fabsf(in[s]);
                finite &= a <= 0x1.fffffep127f;
                largest = a > largest ? a : largest;
            }
            float up = largest > 0x1p-100f && finite ? 127.0f / largest : 0.0f;
            int32_t sum = 0;
            for (int64_t t = 0; t < size / STEP; t++)
                for (int64_t i = 0; i < STEP; i++) {
                    int64_t from = (i < STEP / 2 ? 0 : size / 2 - STEP / 2) + t * (STEP / 2) + i;
                    int32_t q = up ? (int32_t)rintf(in[from] * up) : 0;
                    out[t * STEP + i] = (int8_t)q;
                    sum += q;
                }
            scale[at] = finite ? (up ? largest / 127.0f : 0.0f) : NAN;
            sums[at] = sum;
        }
}

/* Adds nothing: each row is written once, at its place. */
void int8_rows(const uint8_t *codes, const uint16_t *scale, const uint8_t *zero, const int32_t *place, int64_t width,
               int64_t n_groups, int64_t n_out, int64_t size, const int8_t *x, const float *x_scale, const int32_t *x_sum,
               int64_t n, float *y, int64_t y_stride, int64_t parts) {
    job j = {codes, scale, zero, place, n_groups, size, y_stride, x, x_scale, x_sum, n, y};
    _Pragma("omp parallel for schedule(static, 1) num_threads((int)parts)") for (int64_t p = 0; p < parts; p++)
        (width == 4 ? rows_4 : rows_8)(&j, n_out * p / parts, n_out * (p + 1) / parts);
}
