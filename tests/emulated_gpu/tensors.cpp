// Tensors of the device: made, viewed, copied, and moved to other memory.
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/TensorUtils.h>
#include <ATen/native/SparseTensorUtils.h>
#include <ATen/ops/_coalesced_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_sparse_compressed_tensor_unsafe_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/ccol_indices_native.h>
#include <ATen/ops/col_indices_native.h>
#include <ATen/ops/crow_indices_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/row_indices_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/values_native.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>

#include "host.h"

namespace emulated {
namespace {

using c10::DispatchKey;
using Ints = c10::SymIntArrayRef;

// ---- the same memory on both sides

at::Tensor other_side(const at::Tensor& of, c10::Device device) {
  c10::Allocator* allocator = device.is_cuda() ? &memory() : c10::GetAllocator(c10::DeviceType::CPU);
  auto drop = [](void* held) { delete static_cast<c10::Storage*>(held); };
  c10::DataPtr data(of.storage().mutable_data(), new c10::Storage(of.storage()), drop, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), of.storage().nbytes(), std::move(data), allocator, true);
  c10::DispatchKeySet key(device.is_cuda() ? DispatchKey::CUDA : DispatchKey::CPU);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), key, of.dtype());
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(of.storage_offset());
  impl->set_sizes_and_strides(of.sizes(), of.strides());
  if (of.is_conj()) tensor._set_conj(true);
  if (of.is_neg()) tensor._set_neg(true);
  if (of.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return tensor;
}

at::Tensor crossed(const at::Tensor& of, c10::Device device) {
  auto options = of.options().device(device);
  if (of._is_zerotensor()) return at::zeros(of.sizes(), options);
  c10::OptionalDeviceGuard guard(device.is_cuda() ? std::optional(device) : std::nullopt);
  if (of.is_sparse()) {
    auto indices = crossed(of._indices(), device), values = crossed(of._values(), device);
    return at::_sparse_coo_tensor_unsafe(indices, values, of.sizes(), options, of.is_coalesced());
  }
  if (at::sparse_csr::is_sparse_compressed(of)) {
    bool rows = of.layout() == at::kSparseCsr || of.layout() == at::kSparseBsr;
    auto pointers = crossed(rows ? of.crow_indices() : of.ccol_indices(), device);
    auto places = crossed(rows ? of.col_indices() : of.row_indices(), device);
    return at::_sparse_compressed_tensor_unsafe(pointers, places, crossed(of.values(), device), of.sizes(), options);
  }
  return other_side(of, device);
}

// ---- tensors without a call

c10::DataPtr nothing(c10::Device device) { return {nullptr, device}; }

struct NoMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t) override { return nothing({c10::DeviceType::CUDA, current_device()}); }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void*) {};
  }
  void copy_data(void*, const void*, size_t) const override {}
};

at::Tensor empty(Ints sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &memory(), c10::DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(Ints sizes, Ints strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &memory(),
                                           c10::DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor zero_tensor(Ints sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                       std::optional<at::Device> device, std::optional<bool>) {
  static NoMemory no_memory;
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &no_memory,
                                   c10::DispatchKeySet({DispatchKey::CUDA, DispatchKey::ZeroTensor}),
                                   c10::dtype_or_default(dtype), std::nullopt);
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && !non_blocking) wait("a copy between the host and the device");
  Values before;
  if (capturing() && to.is_cuda()) before = values_of({to});
  on_host(to).copy_(on_host(from));
  if (capturing()) record({[to, from] { on_host(to).copy_(on_host(from)); }, std::move(before), {}});
  return to;
}

at::Tensor& copy_sparse(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  TORCH_CHECK(!capturing(), "a copy of sparse tensors cannot be captured");
  if (to.is_cuda() != from.is_cuda() && !non_blocking) wait("a copy between the host and the device");
  auto copy = [&](const at::Tensor& part) {
    auto here = on_host(part).clone();
    return to.is_cuda() ? on_device(here, to.device()) : here;
  };
  if (from.is_sparse()) {
    at::sparse::get_sparse_impl(to)->resize_(from.sparse_dim(), from.dense_dim(), from.sizes());
    at::sparse::alias_into_sparse(to, copy(from._indices()), copy(from._values()));
    at::sparse::get_sparse_impl(to)->set_coalesced(from.is_coalesced());
  } else {
    bool rows = from.layout() == at::kSparseCsr || from.layout() == at::kSparseBsr;
    at::sparse_csr::get_sparse_csr_impl(to)->set_member_tensors(copy(rows ? from.crow_indices() : from.ccol_indices()),
                                                                copy(rows ? from.col_indices() : from.row_indices()),
                                                                copy(from.values()), from.sizes());
  }
  return to;
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  wait("item()");
  return on_host(tensor).item();
}

// ---- views

at::Tensor as_strided(const at::Tensor& of, at::IntArrayRef sizes, at::IntArrayRef strides,
                      std::optional<int64_t> offset) {
  return view_of(of, sizes, strides, offset.value_or(of.storage_offset()));
}

at::Tensor view(const at::Tensor& of, Ints wanted) {
  auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(wanted), of.numel());
  auto strides = at::detail::computeStride(of.sizes(), of.strides(), sizes);
  TORCH_CHECK(strides, "view size is not compatible with input tensor's size and stride");
  return view_of(of, sizes, *strides, of.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& of, Ints sizes, Ints strides) {
  return view_of(of, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), of.storage_offset());
}

at::Tensor unfold(const at::Tensor& of, int64_t dim, int64_t size, int64_t step) {
  dim = at::maybe_wrap_dim(dim, of.dim(), /*wrap_scalar=*/true);
  auto sizes = of.sizes().vec(), strides = of.strides().vec();
  sizes.push_back(size);
  strides.push_back(strides[dim]);
  sizes[dim] = (sizes[dim] - size) / step + 1;
  strides[dim] *= step;
  return view_of(of, sizes, strides, of.storage_offset());
}

at::Tensor like_on_host(const at::Tensor& of, const at::Tensor& host) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(of.storage()), of.key_set(),
                                                       host.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(host.storage_offset());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  return view;
}

at::Tensor view_dtype(const at::Tensor& of, at::ScalarType dtype) { return like_on_host(of, on_host(of).view(dtype)); }
at::Tensor view_as_real(const at::Tensor& of) { return like_on_host(of, at::view_as_real(on_host(of))); }
at::Tensor view_as_complex(const at::Tensor& of) { return like_on_host(of, at::view_as_complex(on_host(of))); }

// ---- tensors that change their memory

const at::Tensor& resize_(const at::Tensor& tensor, Ints wanted, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(wanted);
  if (tensor.sizes() == sizes) return tensor;
  const auto& storage = tensor.storage();
  auto needed = at::detail::computeStorageNbytesContiguous(sizes, tensor.itemsize(), tensor.storage_offset());
  if (needed > storage.nbytes()) {
    c10::DeviceGuard guard(tensor.device());
    auto grown = memory().allocate(needed);
    if (storage.nbytes() > 0) std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(needed);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

at::Tensor& set_part(at::Tensor& tensor, c10::Storage storage, c10::SymInt offset, Ints sizes, Ints strides) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, c10::Storage storage) {
  c10::SymInt size = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_part(tensor, std::move(storage), 0, {size}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
  return set_part(tensor, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

at::Tensor& set_empty(at::Tensor& tensor) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, nothing(tensor.device()), &memory(), true);
  return set_part(tensor, std::move(none), 0, {c10::SymInt(0)}, {c10::SymInt(1)});
}

}  // namespace

at::Tensor on_host(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cuda() ? crossed(tensor, c10::kCPU) : tensor;
}

at::Tensor on_device(const at::Tensor& tensor, c10::Device device) {
  return tensor.defined() && tensor.is_cpu() ? crossed(tensor, device) : tensor;
}

at::Tensor view_of(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(tensor.storage()),
                                                       tensor.key_set(), tensor.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(offset);
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return view;
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_efficientzerotensor", zero_tensor);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("view.dtype", view_dtype);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("resize_", resize_);
  m.impl("set_", set_empty);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_part);
}

TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) {
  m.impl("_sparse_coo_tensor_with_dims", at::native::new_with_dims_sparse);
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", at::native::new_with_dims_and_tensor_sparse_symint);
  m.impl("_indices", at::native::_indices_sparse);
  m.impl("_values", at::native::_values_sparse);
  m.impl("_nnz", at::native::_nnz_sparse);
  m.impl("sparse_dim", at::native::sparse_dim_sparse);
  m.impl("dense_dim", at::native::dense_dim_sparse);
  m.impl("is_coalesced", at::native::is_coalesced_sparse);
  m.impl("copy_", copy_sparse);
  m.impl("_coalesced_", at::native::_coalesced_sparse_);
}

TORCH_LIBRARY_IMPL(aten, SparseCsrCUDA, m) {
  m.impl("copy_", copy_sparse);
  m.impl("crow_indices", at::native::crow_indices_sparse_csr);
  m.impl("col_indices", at::native::col_indices_sparse_csr);
  m.impl("ccol_indices", at::native::ccol_indices_sparse_csr);
  m.impl("row_indices", at::native::row_indices_sparse_csr);
  m.impl("values", at::native::values_sparse_csr);
  m.impl("_nnz", at::native::_nnz_sparse_csr);
  m.impl("sparse_dim", at::native::sparse_dim_sparse_csr);
  m.impl("dense_dim", at::native::dense_dim_sparse_csr);
}

}  // namespace emulated
