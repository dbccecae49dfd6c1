// Every operator: checked as a device would, then run by the CPU on the same memory.
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <set>

#include "host.h"

namespace emulated {
namespace {

// ---- what a device would object to

// Indices may lie on the host.
bool may_mix(const std::string& name) {
  return name.rfind("aten::index.", 0) == 0 || name.find("index_put") != std::string::npos;
}

const std::set<std::string> kWaits{"aten::nonzero",
                                   "aten::masked_select",
                                   "aten::_unique2",
                                   "aten::unique_dim",
                                   "aten::unique_consecutive",
                                   "aten::equal",
                                   "aten::is_nonzero",
                                   "aten::bincount",
                                   "aten::_coalesce",
                                   "aten::_linalg_check_errors",
                                   "aten::repeat_interleave.Tensor"};

c10::Device device_of(const std::string& name, std::vector<c10::IValue>& given) {
  c10::Device device(c10::DeviceType::CPU);
  bool on_host = false, mask = false;
  for (auto& value : given) {
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device = value.toDevice();
      if (!device.has_index()) device = {c10::DeviceType::CUDA, current_device()};
    }
    each_tensor(value, [&](const at::Tensor& tensor) {
      if (tensor.is_cuda()) {
        TORCH_CHECK(!device.is_cuda() || tensor.device() == device || tensor.dim() == 0, name,
                    ": Expected all tensors to be on the same device, but found ", device, " and ", tensor.device());
        device = tensor.device();
      } else if (tensor.dim() > 0) {
        on_host = true;
      }
      mask |= value.isOptionalTensorList() && tensor.scalar_type() == at::kBool;
      return tensor;
    });
  }
  TORCH_CHECK(device.is_cuda() && (!on_host || may_mix(name)), name,
              ": Expected all tensors to be on the same device, but found at least two devices, ", device, " and cpu!");
  if (on_host || mask || kWaits.count(name)) wait(name);
  return device;
}

// ---- the call

std::string name_of(const c10::OperatorHandle& op) {
  const auto& name = op.schema().operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

struct Crossing {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // of the device, and its counterpart

  at::Tensor there(const at::Tensor& tensor) {
    if (!tensor.is_cuda()) return tensor;
    pairs.emplace_back(tensor, on_host(tensor));
    return pairs.back().second;
  }
  at::Tensor back(const at::Tensor& tensor, c10::Device device) const {
    for (const auto& [mine, counterpart] : pairs)
      if (counterpart.is_same(tensor)) return mine;
    auto result = on_device(tensor, device);
    if (tensor.layout() == at::kStrided)
      for (const auto& [mine, counterpart] : pairs)
        if (counterpart.layout() == at::kStrided && tensor.storage().is_alias_of(counterpart.storage()))
          result.unsafeGetTensorImpl()->set_storage_keep_dtype(mine.storage());
    return result;
  }
  // Outputs that the CPU gave another size, and with it other memory.
  void resize() const {
    for (const auto& [mine, counterpart] : pairs)
      if (mine.layout() == at::kStrided && !mine._is_zerotensor() &&
          (counterpart.sizes() != mine.sizes() || counterpart.const_data_ptr() != mine.const_data_ptr())) {
        mine.resize_(counterpart.sizes());
        on_host(mine).copy_(counterpart);
      }
  }
};

void with_generator_of(c10::Device device, const std::function<void()>& call) {
  auto torchs = at::detail::getDefaultCPUGenerator();
  auto& own = inside(generator(device.index()));
  auto before = torchs.get_state();
  torchs.set_state(own.get_state());
  try {
    call();
  } catch (...) {
    torchs.set_state(before);
    throw;
  }
  own.set_state(torchs.get_state());
  torchs.set_state(before);
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  size_t count = op.schema().arguments().size();
  std::vector<c10::IValue> given(stack->end() - count, stack->end());
  c10::Device device = device_of(name_of(op), given);
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  Crossing crossing;
  for (auto& value : given) {
    each_tensor(value, [&](const at::Tensor& tensor) { return crossing.there(tensor); });
    if (value.isDevice()) value = c10::Device(c10::DeviceType::CPU);
    if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
      value = inside(value.toGenerator());
      draws = false;
    }
  }
  if (draws)
    with_generator_of(device, [&] { op.callBoxed(&given); });
  else
    op.callBoxed(&given);
  crossing.resize();
  torch::jit::drop(*stack, count);
  for (auto& value : given) {
    each_tensor(value, [&](const at::Tensor& tensor) { return crossing.back(tensor, device); });
    stack->push_back(value);
  }
}

void record_call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  torch::jit::Stack given(stack->end() - arguments.size(), stack->end());
  std::vector<at::Tensor> read, written, returned, made;
  auto into = [](std::vector<at::Tensor>& all) {
    return [&all](const at::Tensor& tensor) {
      if (tensor.is_cuda()) all.push_back(tensor);
      return tensor;
    };
  };
  for (size_t k = 0; k < given.size(); ++k) {
    auto value = given[k];
    bool writes = arguments[k].alias_info() && arguments[k].alias_info()->isWrite();
    each_tensor(value, into(writes ? written : read));
  }
  auto before = values_of(written);
  {
    NotRecorded guard;
    run_on_host(op, stack);
  }
  torch::jit::Stack results(stack->end() - op.schema().returns().size(), stack->end());
  for (auto value : results) each_tensor(value, into(returned));
  if (written.empty())
    for (const auto& tensor : returned)
      if (std::none_of(read.begin(), read.end(), [&](const at::Tensor& other) {
            return other.has_storage() && tensor.has_storage() && other.storage().is_alias_of(tensor.storage());
          }))
        made.push_back(tensor);
  auto again = [op, given, returned] {
    auto operands = given;
    run_on_host(op, &operands);
    size_t place = 0;
    for (auto& value : operands)
      each_tensor(value, [&](const at::Tensor& tensor) {
        const auto& to = returned[place++];
        if (tensor.const_data_ptr() != to.const_data_ptr()) on_host(to).copy_(on_host(tensor));
        return tensor;
      });
  };
  record({again, std::move(before), std::move(made)});
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  capturing() ? record_call(op, stack) : run_on_host(op, stack);
}

void run_all(torch::Library& m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

void run_each(torch::Library& m, std::initializer_list<const char*> names) {
  for (const char* name : names) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { run_all(m); }
TORCH_LIBRARY_IMPL(_, SparseCUDA, m) { run_all(m); }
TORCH_LIBRARY_IMPL(_, SparseCsrCUDA, m) { run_all(m); }

// What torch would do for these comes before the fallback, and is not what a build with CUDA does.
TORCH_LIBRARY_IMPL(aten, CUDA, m) { run_each(m, {"convolution", "convolution_backward"}); }
TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) { run_each(m, {"addmm", "addmm.out", "mm", "mm.out"}); }
TORCH_LIBRARY_IMPL(aten, SparseCsrCUDA, m) { run_each(m, {"addmm", "addmm.out", "mm", "mm.out"}); }

}  // namespace emulated
