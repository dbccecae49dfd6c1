// CPU kernels: plain pointers and sizes, instantiated for float, double or bfloat16. No torch headers.
#pragma once
#include <cstdint>

// One copy of the function per vector width, chosen when the module is loaded, so that one binary serves every x86-64.
// The sanitizers cannot start before such a choice is made, so they build without it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define METAKERN_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define METAKERN_VECTORISED
#endif

namespace metakern::cpu {

// Elements below which waking the threads costs more than the work.
constexpr int64_t kParallel = 65536;

struct bfloat16 {
  uint16_t bits;
};

// weights_n = max(d_n, 0) / (D + [D == 0]), D = sum_k max(d_k, 0). `dots` has a stride, `weights` is contiguous.
template <typename T>
void clip_normalise(const T* dots, T* weights, int64_t n, int64_t stride);

// out_n = sum_k x_nk y_nk. Rows have a stride, their elements none.
template <typename T, typename Sum>
void row_dots(const T* x, const T* y, Sum* out, int64_t n, int64_t k, int64_t x_stride, int64_t y_stride);

// out_n = sum_t [index_nt != padding] V[index_nt] . B_nt over rows of `width` adjacent elements. Indices are
// contiguous. Returns the place of the first index outside [0, rows), or -1.
template <typename T, typename Sum>
int64_t embedding_dots(const int64_t* indices, const T* V, const T* B, Sum* out, int64_t n, int64_t t, int64_t width,
                       int64_t rows, int64_t v_stride, int64_t b_stride_n, int64_t b_stride_t, int64_t padding);

// scale_ni = sum_t B_nti x^_nti and shift_ni = sum_t B_nti, x^ the normalised row of X: centred by its mean or not,
// divided by sqrt(mean square + eps). Rows of `width` adjacent elements; scale and shift are contiguous, shift may be
// null.
template <typename T, typename Sum>
void affine_grads(const T* X, const T* B, Sum* scale, Sum* shift, int64_t n, int64_t t, int64_t width,
                  int64_t x_stride_n, int64_t x_stride_t, int64_t b_stride_n, int64_t b_stride_t, double eps,
                  bool centred);

// losses_r = logsumexp(z_r) - (1 - smoothing) z_ry - smoothing mean(z_r), zero where y is `ignored`; highs_r = max(z_r)
// and sums_r = sum_c exp(z_rc - highs_r). Rows have a stride, their elements none. Returns the first row whose target
// is no class, or -1.
template <typename T>
int64_t cross_entropy_rows(const T* logits, const int64_t* targets, float* losses, float* highs, float* sums,
                           int64_t rows, int64_t classes, int64_t stride, int64_t ignored, float smoothing);

// out_rc = grad_r (exp(z_rc - highs_r) / sums_r - (1 - smoothing) [c == y] - smoothing / classes), zero in rows whose y
// is `ignored`; `out` is contiguous. Returns the first row whose target is no class, or -1.
template <typename T>
int64_t cross_entropy_rows_backward(const T* logits, const int64_t* targets, const float* highs, const float* sums,
                                    const float* grad, T* out, int64_t rows, int64_t classes, int64_t stride,
                                    int64_t ignored, float smoothing);

}  // namespace metakern::cpu
