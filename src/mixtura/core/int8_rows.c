/* Activations as 8-bit integers times rows of 4- or 8-bit codes: y[m, place[o]] = sum over groups g of
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

/* Integers of x in [-127, 127], what they stand for, and their sums; x: (n, n_groups * size). A group that is not finite gets
   the scale NaN, and with it every output. With `rest` (n, n_groups * size) also what the integers miss of x. */
static void round_rows(const float *x, int64_t n, int64_t n_groups, int64_t size, int64_t tile, int64_t first, int8_t *to,
                       float *scale, int32_t *sums, float *rest) {
    for (int64_t m = 0; m < n; m++)
        for (int64_t g = 0; g < n_groups; g++) {
            int64_t row = first + m, at = (row / tile * n_groups + g) * tile + row % tile;
            const float *in = x + (m * n_groups + g) * size;
            int8_t *out = to + at * size;
            float largest = 0;
            int finite = 1;
            for (int64_t s = 0; s < size; s++) {
                float a = fabsf(in[s]);
                finite &= a <= 0x1.fffffep127f;
                largest = a > largest ? a : largest;
            }
            float up = largest > 0x1p-100f && finite ? 127.0f / largest : 0.0f;
            scale[at] = finite ? (up ? largest / 127.0f : 0.0f) : NAN;
            int32_t sum = 0;
            for (int64_t h = 0; h < 2; h++) /* halves of the group */
                for (int64_t t = 0; t < size / STEP; t++)
                    for (int64_t i = 0; i < STEP / 2; i++) {
                        int64_t from = h * (size / 2) + t * (STEP / 2) + i;
                        int32_t q = (int32_t)rintf((up ? in[from] : 0.0f) * up);
                        out[t * STEP + h * (STEP / 2) + i] = (int8_t)q;
                        sum += q;
                        if (rest) rest[(m * n_groups + g) * size + from] = in[from] - (float)q * scale[at];
                    }
            sums[at] = sum;
        }
}

/* y: (n, low rows + high rows), x: (n, n_groups * size). place: column of each row, the low ones first. With `precise` x stands
   as two integers, the second for what the first misses. Every row is summed by one thread, so the result does not depend on
   their number. Returns 0, or 1 where memory is short. */
int int8_mixed(const float *x, int64_t n, int64_t n_groups, int64_t size, int64_t precise, const int32_t *place,
               const uint8_t *low_codes, const uint16_t *low_scale, const uint8_t *low_zero, int64_t low_rows,
               const uint8_t *high_codes, const uint16_t *high_scale, int64_t high_rows, float *y, int64_t threads) {
    if (n == 0) return 0;
    int64_t total = precise ? 2 * n : n, tile = total < ALONE ? 1 : TILE, padded = (total + tile - 1) / tile * tile;
    int64_t n_out = low_rows + high_rows, width = n_groups * size;
    size_t integers = (size_t)(padded * width), groups = (size_t)(padded * n_groups);
    size_t room = integers + groups * 8 + (precise ? sizeof(float) * (size_t)(n * width + 2 * n * n_out) : 0);
    char *memory = aligned_alloc(64, (room + 63) / 64 * 64);
    if (!memory) return 1;
    float *rest = precise ? (float *)memory : NULL, *both = precise ? rest + n * width : y;
    float *x_scale = precise ? both + 2 * n * n_out : (float *)memory;
    int32_t *x_sum = (int32_t *)(x_scale + groups);
    int8_t *to = (int8_t *)(x_sum + groups);
    if (padded > total) memset(x_scale, 0, groups * 8 + integers); /* rows that fill the last tile */
    round_rows(x, n, n_groups, size, tile, 0, to, x_scale, x_sum, rest);
    if (precise) round_rows(rest, n, n_groups, size, tile, n, to, x_scale, x_sum, NULL);
    _Pragma("omp parallel for schedule(static, 1) num_threads((int)threads)") for (int64_t p = 0; p < threads; p++) {
        job j = {low_codes, low_scale, low_zero, place, n_groups, size, n_out, to, x_scale, x_sum, total, both};
        rows_4(&j, low_rows * p / threads, low_rows * (p + 1) / threads);
        j.codes = high_codes, j.scale = high_scale, j.zero = NULL, j.place = place + low_rows;
        rows_8(&j, high_rows * p / threads, high_rows * (p + 1) / threads);
    }
    if (precise)
        for (int64_t i = 0; i < n * n_out; i++) y[i] = both[i] + both[n * n_out + i];
    free(memory);
    return 0;
}
