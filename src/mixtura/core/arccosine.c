/* Dense layers with a ReLU, as the covariance of two inputs goes through them. A layer takes c to c' = weight c + bias, and its
   ReLU, with the correlation r = c' / (a b) held to [-1, 1], to

       a b (sqrt(1 - r^2) + r (pi / 2 + arcsin r)) / (2 pi),

   where a and b are the standard deviations of the two inputs before the ReLU. A row stays in the first-level cache through all
   layers, and there is nothing in a step but arithmetic that the compiler turns into vector instructions.

   Built and called by native.py. */

#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define PI 3.14159265358979323846
#define BY_TWO_PI 0.15915494309189533577

/* r (pi / 2 + arcsin r) + sqrt(1 - r^2) = pi max(r, 0) + z^(3/2) h(z) with z = 1 - |r|, where h is smooth on [0, 1]: its nearest
   singular point is z = 2. The polynomial interpolates it at 18 Chebyshev nodes, to 1e-17 of its value. One root, no quotient. */
INLINE double dual(double c, double scale, double inverse)
{
    double r = c * inverse;
    r = r > 1.0 ? 1.0 : r;
    r = r < -1.0 ? -1.0 : r;
    double z = 1.0 - fabs(r), w = z * z;
    double even = 9.42809041582063356e-01 + w * (7.57614408386195464e-03 + w * (4.88256075393192783e-04 + w * (
                  5.10942545148346727e-05 + w * (5.83672864724229018e-06 + w * (-6.11286061738224154e-06 + w * (
                  -1.79489152436826625e-05 + w * (-1.34781210293057574e-05 + w * (
                  -2.07641508550871668e-06))))))));
    double odd = 4.71404520791057768e-02 + w * (1.75373706836867010e-03 + w * (1.52114199372216396e-04 + w * (
                 1.83491268408970555e-05 + w * (5.46578806810183682e-06 + w * (1.35345338816749084e-05 + w * (
                 1.85191488354136423e-05 + w * (6.76505315467904507e-06 + w * (
                 3.06589867858277351e-07))))))));
    return scale * (PI * (r > 0.0 ? r : 0.0) + z * sqrt(z) * (even + z * odd));
}

/* cross (n, m, p) in place. Standard deviations and their inverses, layer by layer: left (layers, n, p), right (layers, m, p). */
void relu_layers(double *restrict cross, const double *restrict left, const double *restrict left_inverse,
                 const double *restrict right, const double *restrict right_inverse, double weight, double bias,
                 int64_t layers, int64_t n, int64_t m, int64_t p)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t l = 0; l < layers; l++) {
            const double *a = left + (l * n + i) * p, *ia = left_inverse + (l * n + i) * p;
            const double *b = right + l * m * p, *ib = right_inverse + l * m * p;
            double *row = cross + i * m * p;
            if (p == 1) {
                const double scale = a[0] * BY_TWO_PI, inverse = ia[0];
                for (int64_t j = 0; j < m; j++)
                    row[j] = dual(weight * row[j] + bias, scale * b[j], inverse * ib[j]);
            } else
                for (int64_t j = 0; j < m; j++)
                    for (int64_t k = 0; k < p; k++)
                        row[j * p + k] = dual(weight * row[j * p + k] + bias, a[k] * BY_TWO_PI * b[j * p + k],
                                              ia[k] * ib[j * p + k]);
        }
}
