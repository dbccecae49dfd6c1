// CUDA kernels: plain pointers, sizes and a stream; each returns the error of its launch. No torch headers.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace metakern::cuda {

// Element type of a buffer, numbered as in metakern/ops/extension.py.
enum class Scalar : int { f16 = 0, bf16 = 1, f32 = 2, f64 = 3 };

// cudaSuccess if the current device runs these kernels; an error without machine code for it, or if the driver is older
// than the runtime. CUDA's last error is cleared.
cudaError_t usable();

// weights_n = max(d_n, 0) / (D + [D == 0]), D = sum_k max(d_k, 0). `dots` has a stride, `weights` is contiguous.
cudaError_t clip_normalise(Scalar dtype, const void* dots, void* weights, int64_t n, int64_t stride,
                           cudaStream_t stream);

// out_n = sum_k x_nk y_nk. Rows have a stride, their elements none; `workspace` holds n * row_dots_chunks(k) sums.
int64_t row_dots_chunks(int64_t k);
cudaError_t row_dots(Scalar dtype, const void* x, const void* y, void* workspace, void* out, int64_t n, int64_t k,
                     int64_t x_stride, int64_t y_stride, cudaStream_t stream);

// out_n = sum_t [index_nt != padding] V[index_nt] . B_nt over rows of `width` adjacent elements. Indices are
// contiguous; `workspace` holds n * embedding_dots_chunks(t) sums.
int64_t embedding_dots_chunks(int64_t t);
cudaError_t embedding_dots(Scalar dtype, const int64_t* indices, const void* V, const void* B, void* workspace,
                           void* out, int64_t n, int64_t t, int64_t width, int64_t rows, int64_t v_stride,
                           int64_t b_stride_n, int64_t b_stride_t, int64_t padding, cudaStream_t stream);

// scale_ni = sum_t B_nti x^_nti and shift_ni = sum_t B_nti, x^ the normalised row of X: centred by its mean or not,
// divided by sqrt(mean square + eps). Rows of at most 4096 adjacent elements; scale and shift are contiguous, shift may
// be null; `workspace` holds 2 * n * width * affine_grads_chunks(n, t) sums where there are several chunks.
int64_t affine_grads_chunks(int64_t n, int64_t t);
cudaError_t affine_grads(Scalar dtype, const void* X, const void* B, void* workspace, void* scale, void* shift,
                         int64_t n, int64_t t, int64_t width, int64_t x_stride_n, int64_t x_stride_t,
                         int64_t b_stride_n, int64_t b_stride_t, double eps, bool centred, cudaStream_t stream);

// losses_r = logsumexp(z_r) - (1 - smoothing) z_ry - smoothing mean(z_r), zero where y is `ignored`; highs_r = max(z_r)
// and sums_r = sum_c exp(z_rc - highs_r). Rows have a stride, their elements none.
cudaError_t cross_entropy_rows(Scalar dtype, const void* logits, const int64_t* targets, void* losses, void* highs,
                               void* sums, int64_t rows, int64_t classes, int64_t stride, int64_t ignored,
                               double smoothing, cudaStream_t stream);

// out_rc = grad_r (exp(z_rc - highs_r) / sums_r - (1 - smoothing) [c == y] - smoothing / classes), zero in rows whose y
// is `ignored`; `out` is contiguous.
cudaError_t cross_entropy_rows_backward(Scalar dtype, const void* logits, const int64_t* targets, const void* highs,
                                        const void* sums, const void* grad, void* out, int64_t rows, int64_t classes,
                                        int64_t stride, int64_t ignored, double smoothing, cudaStream_t stream);

}  // namespace metakern::cuda
