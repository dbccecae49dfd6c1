// A GPU for a PyTorch that was built without CUDA: its memory is the host's, and its operators are the CPU's.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace emulated {

constexpr int kDevices = 2;

c10::Allocator& memory();
c10::DeviceIndex current_device();
void set_device(c10::DeviceIndex index);
// Of the device, for torch's functions; it is one of the CPU inside.
at::Generator& generator(c10::DeviceIndex index);
at::Generator& inside(const at::Generator& generator);

// What is said when the host waits for the device.
enum class SyncDebugMode { silent, warn, error };
void set_sync_debug_mode(SyncDebugMode mode);
void wait(const std::string& why);

// The same memory as a tensor of the other side.
at::Tensor on_host(const at::Tensor& tensor);
at::Tensor on_device(const at::Tensor& tensor, c10::Device device);
// A view of the same storage, unknown to autograd, which has its own idea of it.
at::Tensor view_of(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset);

template <class F>
void each_tensor(c10::IValue& value, const F& f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = f(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (at::Tensor tensor : value.toTensorList()) out.push_back(tensor.defined() ? f(tensor) : tensor);
    value = out;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
      out.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(f(*tensor)) : tensor);
    value = out;
  }
}

using Values = std::vector<std::pair<at::Tensor, at::Tensor>>;  // tensors, and copies of what they hold
Values values_of(const std::vector<at::Tensor>& tensors);

// A capture of calls: each happens at once, so that what it returns has a shape, but leaves no trace when the capture
// ends, as on a device, where it would not have happened.
struct Graph {
  struct Call {
    std::function<void()> again;
    Values written;  // as it was before
    std::vector<at::Tensor> made;
  };
  std::vector<Call> calls;

  void replay() const;
};

void begin_capture();
Graph end_capture();
bool capturing();
// Within, calls are parts of one that is recorded as a whole.
struct NotRecorded {
  NotRecorded();
  ~NotRecorded();
};
void record(Graph::Call call);

}  // namespace emulated
