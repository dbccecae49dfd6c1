// The emulated GPU as Python sees it: what runtime.py needs for torch.cuda.
#include <torch/extension.h>

#include "host.h"

namespace emulated {
void install_attention();
void install_cudnn();
}  // namespace emulated

PYBIND11_MODULE(emulated_gpu, m) {
  using namespace emulated;
  c10::SetAllocator(c10::DeviceType::CUDA, &memory(), /*priority=*/100);
  install_attention();
  install_cudnn();
  m.attr("devices") = kDevices;
  m.def("current_device", [] { return static_cast<int>(current_device()); });
  m.def("set_device", [](int index) { set_device(index); });
  m.def("generator", [](int index) { return generator(index); });
  m.def("set_sync_debug_mode", [](int mode) { set_sync_debug_mode(static_cast<SyncDebugMode>(mode)); });
  m.def("wait", &wait);
  py::class_<Graph>(m, "Graph").def("replay", &Graph::replay, py::call_guard<py::gil_scoped_release>());
  m.def("begin_capture", &begin_capture);
  m.def("end_capture", &end_capture);
  m.def("capturing", &capturing);
  // A call that is not torch's, of which nothing is undone: its results are in memory that was made for them.
  m.def("launch", [](py::function call) {
    auto held = std::shared_ptr<py::function>(new py::function(call), [](py::function* function) {
      py::gil_scoped_acquire gil;
      delete function;
    });
    bool keep = capturing();
    {
      NotRecorded guard;
      (*held)();
    }
    if (!keep) return;
    auto again = [held] {
      py::gil_scoped_acquire gil;
      (*held)();
    };
    record({again, {}, {}});
  });
}
