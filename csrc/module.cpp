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
#ifdef METAKERN_CUDA
  auto cuda = module.def_submodule("cuda");
  bind_cuda(cuda);
#endif
}
