// Memory, devices, streams and random numbers, as torch asks for them.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "host.h"

namespace emulated {
namespace {

constexpr auto kCUDA = c10::DeviceType::CUDA;

thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId streams[kDevices] = {};
SyncDebugMode mode = SyncDebugMode::silent;

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    c10::Device here(kCUDA, current);
    if (n == 0) return {nullptr, here};
    void* data = c10::GetAllocator(c10::DeviceType::CPU)->raw_allocate(n);
    return {data, data, raw_deleter(), here};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* data) { c10::GetAllocator(c10::DeviceType::CPU)->raw_deallocate(data); };
  }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCUDA; }
  c10::Device getDevice() const override { return {kCUDA, current}; }
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before = getDevice();
    setDevice(to);
    return before;
  }
  void setDevice(c10::Device to) const override { set_device(to.index()); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  // Work is done when it is asked for, so streams have nothing to wait for.
  c10::Stream getStream(c10::Device device) const override { return stream(device, streams[index(device)]); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static c10::StreamId last = 0;
    return stream(device, ++last);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    c10::Stream before = getStream(to.device());
    streams[to.device_index()] = to.id();
    return before;
  }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    static char done;
    *event = &done;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}

 private:
  static c10::DeviceIndex index(c10::Device device) { return device.has_index() ? device.index() : current; }
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kCUDA, index(device)), id);
  }
};

struct Generator final : c10::GeneratorImpl {
  at::Generator inner;

  explicit Generator(c10::DeviceIndex index)
      : GeneratorImpl({kCUDA, index}, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::make_generator<at::CPUGeneratorImpl>()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "the emulated generator has no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "the emulated generator has no offset"); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    auto* same = const_cast<c10::TensorImpl*>(&state);
    inner.set_state(at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(same)));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.get_state().getIntrusivePtr(); }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->inner = inner.clone();
    return copy;
  }
};

}  // namespace

// Torch asks these whether it was built with CUDA, and with cuDNN; it looks them up by the name of the class.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
  double batchnormMinEpsilonCuDNN() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_device(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    c10::DeviceIndex before = current;
    set_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory(); }
};

c10::Allocator& memory() {
  static Memory all;
  return all;
}

c10::DeviceIndex current_device() { return current; }

void set_device(c10::DeviceIndex index) {
  TORCH_CHECK(index < kDevices, "invalid device ordinal");
  if (index >= 0) current = index;
}

at::Generator& generator(c10::DeviceIndex index) {
  static at::Generator all[kDevices] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return all[index < 0 ? current : index];
}

at::Generator& inside(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

void set_sync_debug_mode(SyncDebugMode wanted) { mode = wanted; }

void wait(const std::string& why) {
  TORCH_CHECK(mode != SyncDebugMode::error, "called a synchronizing CUDA operation: ", why);
  if (mode == SyncDebugMode::warn) TORCH_WARN("called a synchronizing CUDA operation: ", why);
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace emulated

namespace at {
using emulated::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
