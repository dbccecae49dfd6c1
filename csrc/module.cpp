// The Python module metakern._C. Pointers, sizes, strides and streams arrive as integers; the callers in metakern/ops
// have checked shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#ifdef METAKERN_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void bind_cpu(py::module_& cpu, const std::string& suffix) {
  using namespace metakern::cpu;
  cpu.def(("clip_normalise_" + suffix).c_str(), [](uintptr_t dots, uintptr_t weights, int64_t n, int64_t stride) {
    clip_normalise(pointer<const T>(dots), pointer<T>(weights), n, stride);
  });
}

template <typename T, typename Sum>
void bind_row_dots(py::module_& cpu, const char* name) {
  cpu.def(name, [](uintptr_t x, uintptr_t y, uintptr_t out, int64_t n, int64_t k, int64_t x_stride, int64_t y_stride) {
    metakern::cpu::row_dots(pointer<const T>(x), pointer<const T>(y), pointer<Sum>(out), n, k, x_stride, y_stride);
  });
}

template <typename T, typename Sum>
void bind_embedding_dots(py::module_& cpu, const char* name) {
  cpu.def(name, [](uintptr_t indices, uintptr_t V, uintptr_t B, uintptr_t out, int64_t n, int64_t t, int64_t width,
                   int64_t rows, int64_t v_stride, int64_t b_stride_n, int64_t b_stride_t, int64_t padding) {
    return metakern::cpu::embedding_dots(pointer<const int64_t>(indices), pointer<const T>(V), pointer<const T>(B),
                                         pointer<Sum>(out), n, t, width, rows, v_stride, b_stride_n, b_stride_t,
                                         padding);
  });
}

template <typename T, typename Sum>
void bind_affine_grads(py::module_& cpu, const char* name) {
  cpu.def(name, [](uintptr_t X, uintptr_t B, uintptr_t scale, uintptr_t shift, int64_t n, int64_t t, int64_t width,
                   int64_t x_stride_n, int64_t x_stride_t, int64_t b_stride_n, int64_t b_stride_t, double eps,
                   bool centred) {
    metakern::cpu::affine_grads(pointer<const T>(X), pointer<const T>(B), pointer<Sum>(scale), pointer<Sum>(shift), n,
                                t, width, x_stride_n, x_stride_t, b_stride_n, b_stride_t, eps, centred);
  });
}

template <typename T>
void bind_cross_entropy_rows(py::module_& cpu, const std::string& suffix) {
  cpu.def(("cross_entropy_rows_" + suffix).c_str(),
          [](uintptr_t logits, uintptr_t targets, uintptr_t losses, uintptr_t highs, uintptr_t sums, int64_t rows,
             int64_t classes, int64_t stride, int64_t ignored, float smoothing) {
            return metakern::cpu::cross_entropy_rows(pointer<const T>(logits), pointer<const int64_t>(targets),
                                                     pointer<float>(losses), pointer<float>(highs),
                                                     pointer<float>(sums), rows, classes, stride, ignored, smoothing);
          });
  cpu.def(("cross_entropy_rows_backward_" + suffix).c_str(),
          [](uintptr_t logits, uintptr_t targets, uintptr_t highs, uintptr_t sums, uintptr_t grad, uintptr_t out,
             int64_t rows, int64_t classes, int64_t stride, int64_t ignored, float smoothing) {
            return metakern::cpu::cross_entropy_rows_backward(pointer<const T>(logits), pointer<const int64_t>(targets),
                                                              pointer<const float>(highs), pointer<const float>(sums),
                                                              pointer<const float>(grad), pointer<T>(out), rows,
                                                              classes, stride, ignored, smoothing);
          });
}

#ifdef METAKERN_CUDA
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

void bind_cuda(py::module_& cuda) {
  using namespace metakern::cuda;
  cuda.def("clip_normalise",
           [](int dtype, uintptr_t dots, uintptr_t weights, int64_t n, int64_t stride, uintptr_t stream) {
             check(clip_normalise(static_cast<Scalar>(dtype), pointer<const void>(dots), pointer<void>(weights), n,
                                  stride, pointer<CUstream_st>(stream)));
           });
  cuda.def("row_dots_chunks", &row_dots_chunks);
  cuda.def("row_dots", [](int dtype, uintptr_t x, uintptr_t y, uintptr_t workspace, uintptr_t out, int64_t n, int64_t k,
                          int64_t x_stride, int64_t y_stride, uintptr_t stream) {
    check(row_dots(static_cast<Scalar>(dtype), pointer<const void>(x), pointer<const void>(y), pointer<void>(workspace),
                   pointer<void>(out), n, k, x_stride, y_stride, pointer<CUstream_st>(stream)));
  });
  cuda.def("embedding_dots_chunks", &embedding_dots_chunks);
  cuda.def("embedding_dots", [](int dtype, uintptr_t indices, uintptr_t V, uintptr_t B, uintptr_t workspace,
                                uintptr_t out, int64_t n, int64_t t, int64_t width, int64_t rows, int64_t v_stride,
                                int64_t b_stride_n, int64_t b_stride_t, int64_t padding, uintptr_t stream) {
    check(embedding_dots(static_cast<Scalar>(dtype), pointer<const int64_t>(indices), pointer<const void>(V),
                         pointer<const void>(B), pointer<void>(workspace), pointer<void>(out), n, t, width, rows,
                         v_stride, b_stride_n, b_stride_t, padding, pointer<CUstream_st>(stream)));
  });
  cuda.def("affine_grads_chunks", &affine_grads_chunks);
  cuda.def(
      "affine_grads", [](int dtype, uintptr_t X, uintptr_t B, uintptr_t workspace, uintptr_t scale, uintptr_t shift,
                         int64_t n, int64_t t, int64_t width, int64_t x_stride_n, int64_t x_stride_t,
                         int64_t b_stride_n, int64_t b_stride_t, double eps, bool centred, uintptr_t stream) {
        check(affine_grads(static_cast<Scalar>(dtype), pointer<const void>(X), pointer<const void>(B),
                           pointer<void>(workspace), pointer<void>(scale), pointer<void>(shift), n, t, width,
                           x_stride_n, x_stride_t, b_stride_n, b_stride_t, eps, centred, pointer<CUstream_st>(stream)));
      });
  cuda.def("cross_entropy_rows", [](int dtype, uintptr_t logits, uintptr_t targets, uintptr_t losses, uintptr_t highs,
                                    uintptr_t sums, int64_t rows, int64_t classes, int64_t stride, int64_t ignored,
                                    double smoothing, uintptr_t stream) {
    check(cross_entropy_rows(static_cast<Scalar>(dtype), pointer<const void>(logits), pointer<const int64_t>(targets),
                             pointer<void>(losses), pointer<void>(highs), pointer<void>(sums), rows, classes, stride,
                             ignored, smoothing, pointer<CUstream_st>(stream)));
  });
  cuda.def(
      "cross_entropy_rows_backward",
      [](int dtype, uintptr_t logits, uintptr_t targets, uintptr_t highs, uintptr_t sums, uintptr_t grad, uintptr_t out,
         int64_t rows, int64_t classes, int64_t stride, int64_t ignored, double smoothing, uintptr_t stream) {
        check(cross_entropy_rows_backward(static_cast<Scalar>(dtype), pointer<const void>(logits),
                                          pointer<const int64_t>(targets), pointer<const void>(highs),
                                          pointer<const void>(sums), pointer<const void>(grad), pointer<void>(out),
                                          rows, classes, stride, ignored, smoothing, pointer<CUstream_st>(stream)));
      });
  cuda.def("unusable", [] {
    const cudaError_t error = usable();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  });
  cuda.def("runtime_version", [] {
    int version = 0;
    check(cudaRuntimeGetVersion(&version));
    return version;
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  auto cpu = module.def_submodule("cpu");
  bind_cpu<float>(cpu, "f32");
  bind_cpu<double>(cpu, "f64");
  bind_row_dots<float, float>(cpu, "row_dots_f32");
  bind_row_dots<double, double>(cpu, "row_dots_f64");
  bind_row_dots<metakern::cpu::bfloat16, float>(cpu, "row_dots_bf16");
  bind_embedding_dots<float, float>(cpu, "embedding_dots_f32");
  bind_embedding_dots<double, double>(cpu, "embedding_dots_f64");
  bind_embedding_dots<metakern::cpu::bfloat16, float>(cpu, "embedding_dots_bf16");
  bind_affine_grads<float, float>(cpu, "affine_grads_f32");
  bind_affine_grads<double, double>(cpu, "affine_grads_f64");
  bind_affine_grads<metakern::cpu::bfloat16, float>(cpu, "affine_grads_bf16");
  bind_cross_entropy_rows<float>(cpu, "f32");
  bind_cross_entropy_rows<metakern::cpu::bfloat16>(cpu, "bf16");
#ifdef METAKERN_CUDA
  auto cuda = module.def_submodule("cuda");
  bind_cuda(cuda);
#endif
}
