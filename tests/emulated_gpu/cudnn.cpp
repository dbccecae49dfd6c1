// What cuDNN computes on a GPU, normalisation and recurrent layers, and torch's cells in one kernel, under the names
// that autograd has for them there. These are kernels of the CPU, which the device runs like all others.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/native/RNN.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <tuple>

#include "host.h"

namespace emulated {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

bool there(const Maybe& tensor) { return tensor && tensor->defined(); }

// ---- batch normalisation

std::tuple<Tensor, Tensor, Tensor, Tensor> cudnn_batch_norm(const Tensor& input, const Tensor& weight,
                                                            const Maybe& bias, const Maybe& mean, const Maybe& variance,
                                                            bool training, double momentum, double epsilon) {
  auto found = at::native_batch_norm(input, weight, bias, mean, variance, training, momentum, epsilon);
  auto reserved = at::empty({0}, at::TensorOptions().dtype(at::kByte));
  return std::tuple_cat(found, std::make_tuple(reserved));
}

std::tuple<Tensor, Tensor, Tensor> cudnn_batch_norm_backward(const Tensor& input, const Tensor& grad,
                                                             const Tensor& weight, const Maybe& mean,
                                                             const Maybe& variance, const Maybe& saved_mean,
                                                             const Maybe& saved_inverse, double epsilon,
                                                             const Tensor&) {
  return at::native_batch_norm_backward(grad, input, weight, mean, variance, saved_mean, saved_inverse, /*train=*/true,
                                        epsilon, {true, true, true});
}

// ---- cells

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& from_input, const Tensor& from_hidden, const Tensor& cx,
                                             const Maybe& input_bias, const Maybe& hidden_bias) {
  auto gates = from_input + from_hidden;
  if (there(input_bias)) gates = gates + *input_bias + *hidden_bias;
  auto parts = gates.chunk(4, 1);
  auto i = parts[0].sigmoid(), f = parts[1].sigmoid(), g = parts[2].tanh(), o = parts[3].sigmoid();
  auto cy = f * cx + i * g;
  return {o * cy.tanh(), cy, at::cat({i, f, g, o}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const Maybe& grad_hy, const Maybe& grad_cy, const Tensor& cx,
                                                      const Tensor& cy, const Tensor& workspace, bool has_bias) {
  auto parts = workspace.chunk(4, 1);
  auto i = parts[0], f = parts[1], g = parts[2], o = parts[3], t = cy.tanh();
  auto gh = there(grad_hy) ? *grad_hy : at::zeros_like(t);
  auto gc = (there(grad_cy) ? *grad_cy : at::zeros_like(t)) + gh * o * (1 - t * t);
  auto gates = at::cat({gc * g * i * (1 - i), gc * cx * f * (1 - f), gc * i * (1 - g * g), gh * t * o * (1 - o)}, 1);
  return {gates, gc * f, has_bias ? gates.sum(0) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& from_input, const Tensor& from_hidden, const Tensor& hx,
                                    const Maybe& input_bias, const Maybe& hidden_bias) {
  auto input = from_input, hidden = from_hidden;
  if (there(input_bias)) {
    input = input + *input_bias;
    hidden = hidden + *hidden_bias;
  }
  auto from = input.chunk(3, 1), to = hidden.chunk(3, 1);
  auto r = (from[0] + to[0]).sigmoid(), z = (from[1] + to[1]).sigmoid(), n = (from[2] + r * to[2]).tanh();
  return {n + z * (hx - n), at::cat({r, z, n, hx, to[2].contiguous()}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_hy, const Tensor& workspace,
                                                                     bool has_bias) {
  auto parts = workspace.chunk(5, 1);
  auto grad = grad_hy, r = parts[0], z = parts[1], n = parts[2], hx = parts[3], product = parts[4];
  auto gn = grad * (1 - z) * (1 - n * n), gz = grad * (hx - n) * z * (1 - z), gr = gn * product * r * (1 - r);
  auto input = at::cat({gr, gz, gn}, 1), hidden = at::cat({gr, gz, gn * r}, 1);
  return {input, hidden, grad * z, has_bias ? input.sum(0) : Tensor(), has_bias ? hidden.sum(0) : Tensor()};
}

// ---- recurrent layers

struct Layers {
  int64_t mode, per_layer, count;
  bool batch_first, bidirectional;
  double dropout;
  int64_t seed;                 // of masks that are drawn without torch's generator
  at::IntArrayRef batch_sizes;  // of a packed sequence
};

// Torch's generator is as before at the end.
struct Seeded {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  Tensor before = generator.get_state();
  explicit Seeded(int64_t seed) { generator.set_current_seed(seed); }
  ~Seeded() { generator.set_state(before); }
};

std::tuple<Tensor, Tensor, Tensor> run_layers(const Layers& layers, const Tensor& input, const std::vector<Tensor>& w,
                                              const Tensor& hx, const Maybe& cx) {
  bool biases = layers.per_layer == 4;
  auto apply = [&](auto layer, const auto& hidden) {
    if (!layers.batch_sizes.empty())
      return layer(input, at::tensor(layers.batch_sizes), hidden, w, biases, layers.count, layers.dropout, true,
                   layers.bidirectional);
    return layer(input, hidden, w, biases, layers.count, layers.dropout, true, layers.bidirectional,
                 layers.batch_first);
  };
  auto without_cell = [](const std::tuple<Tensor, Tensor>& y) { return std::tuple_cat(y, std::make_tuple(Tensor())); };
  Seeded masks(layers.seed);
  switch (layers.mode) {
    case 0: return without_cell(apply([](auto&&... a) { return at::rnn_relu(a...); }, hx));
    case 1: return without_cell(apply([](auto&&... a) { return at::rnn_tanh(a...); }, hx));
    case 2: return apply([](auto&&... a) { return at::lstm(a...); }, std::vector<Tensor>{hx, *cx});
    default: return without_cell(apply([](auto&&... a) { return at::gru(a...); }, hx));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cudnn_rnn(const Tensor& input, at::TensorList weight,
                                                             int64_t per_layer, const Maybe&, const Tensor& hx,
                                                             const Maybe& cx, int64_t mode, c10::SymInt, c10::SymInt,
                                                             int64_t count, bool batch_first, double dropout,
                                                             bool train, bool bidirectional,
                                                             c10::SymIntArrayRef batch_sizes, const Maybe&) {
  static int64_t seed = 0;
  Layers layers{mode,          per_layer,           count,  batch_first,
                bidirectional, train ? dropout : 0, ++seed, C10_AS_INTARRAYREF_SLOW(batch_sizes)};
  auto [y, hy, cy] = run_layers(layers, input, weight.vec(), hx, cx);
  auto none = at::empty({0}, y.options());
  return {y, hy, cy.defined() ? cy : none, at::full({1}, seed, y.options().dtype(at::kLong)), none};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> cudnn_rnn_backward(
    const Tensor& input, at::TensorList weight, int64_t per_layer, const Tensor&, const Tensor& hx, const Maybe& cx,
    const Tensor&, const Maybe& grad_y, const Maybe& grad_hy, const Maybe& grad_cy, int64_t mode, c10::SymInt,
    c10::SymInt, int64_t count, bool batch_first, double dropout, bool train, bool bidirectional,
    c10::SymIntArrayRef batch_sizes, const Maybe&, const Tensor& reserved, std::array<bool, 4>) {
  // as if nothing was differentiated yet: below autograd, torch keeps its keys away
  c10::impl::ForceDispatchKeyGuard guard{c10::default_included_set, c10::default_excluded_set};
  at::AutoGradMode with_gradients(true);
  auto leaf = [](const Tensor& tensor) { return tensor.detach().clone().requires_grad_(); };
  Layers layers{mode,
                per_layer,
                count,
                batch_first,
                bidirectional,
                train ? dropout : 0,
                reserved.item<int64_t>(),
                C10_AS_INTARRAYREF_SLOW(batch_sizes)};
  std::vector<Tensor> leaves{leaf(input), leaf(hx), there(cx) ? leaf(*cx) : Tensor()}, weights;
  for (const auto& w : weight) weights.push_back(leaf(w));
  auto [y, hy, cy] = run_layers(layers, leaves[0], weights, leaves[1], leaves[2]);
  std::vector<Tensor> outputs, grads, wanted(leaves.begin(), leaves.begin() + (leaves[2].defined() ? 3 : 2));
  wanted.insert(wanted.end(), weights.begin(), weights.end());
  auto add = [&](const Tensor& output, const Maybe& grad) {
    if (!output.defined() || !there(grad)) return;
    outputs.push_back(output);
    grads.push_back(*grad);
  };
  add(y, grad_y);
  add(hy, grad_hy);
  add(cy, grad_cy);
  auto found = torch::autograd::grad(outputs, wanted, grads, /*retain_graph=*/false, /*create_graph=*/false,
                                     /*allow_unused=*/true);
  for (size_t k = 0; k < found.size(); ++k) found[k] = found[k].defined() ? found[k] : at::zeros_like(wanted[k]);
  size_t states = leaves[2].defined() ? 3 : 2;
  return {found[0], found[1], states == 3 ? found[2] : Tensor(), {found.begin() + states, found.end()}};
}

// How torch's layers call these.
struct Stacked {
  bool biases, train, bidirectional, batch_first;
  int64_t count;
  double dropout;
  Tensor batch_sizes;
};

template <int64_t mode>
std::tuple<Tensor, Tensor, Tensor> by_cudnn(const Tensor& input, const Tensor& hx, const Maybe& cx,
                                            at::TensorList weights, const Stacked& how) {
  std::vector<int64_t> sizes;
  if (how.batch_sizes.defined())
    sizes.assign(how.batch_sizes.data_ptr<int64_t>(), how.batch_sizes.data_ptr<int64_t>() + how.batch_sizes.numel());
  int64_t hidden = weights[1].size(1), per_layer = how.biases ? 4 : 2;
  auto [y, hy, cy, reserved, buffer] =
      at::_cudnn_rnn(input, weights, per_layer, {}, hx, cx, mode, hidden, 0, how.count, how.batch_first, how.dropout,
                     how.train, how.bidirectional, sizes, {});
  return {y, hy, cy};
}

template <int64_t mode>
void layers(Tensor& y, Tensor& hy, const Tensor& input, const Tensor& hx, at::TensorList weights, bool biases,
            int64_t count, double dropout, bool train, bool bidirectional, bool batch_first) {
  Stacked how{biases, train, bidirectional, batch_first, count, dropout, {}};
  std::tie(y, hy, std::ignore) = by_cudnn<mode>(input, hx, {}, weights, how);
}

template <int64_t mode>
void packed_layers(Tensor& y, Tensor& hy, const Tensor& input, const Tensor& batch_sizes, const Tensor& hx,
                   at::TensorList weights, bool biases, int64_t count, double dropout, bool train, bool bidirectional) {
  Stacked how{biases, train, bidirectional, false, count, dropout, batch_sizes};
  std::tie(y, hy, std::ignore) = by_cudnn<mode>(input, hx, {}, weights, how);
}

void lstm_layers(Tensor& y, Tensor& hy, Tensor& cy, const Tensor& input, at::TensorList hx, at::TensorList weights,
                 bool biases, int64_t count, double dropout, bool train, bool bidirectional, bool batch_first) {
  Stacked how{biases, train, bidirectional, batch_first, count, dropout, {}};
  std::tie(y, hy, cy) = by_cudnn<2>(input, hx[0], hx[1], weights, how);
}

void packed_lstm_layers(Tensor& y, Tensor& hy, Tensor& cy, const Tensor& input, const Tensor& batch_sizes,
                        at::TensorList hx, at::TensorList weights, bool biases, int64_t count, double dropout,
                        bool train, bool bidirectional) {
  Stacked how{biases, train, bidirectional, false, count, dropout, batch_sizes};
  std::tie(y, hy, cy) = by_cudnn<2>(input, hx[0], hx[1], weights, how);
}

// All weights in one piece of memory, of which each is a part from then on.
Tensor flatten_weights(at::TensorList weights, int64_t, c10::SymInt, int64_t, c10::SymInt, c10::SymInt, int64_t, bool,
                       bool) {
  int64_t size = 0;
  for (const auto& w : weights) size += w.numel();
  auto whole = at::empty({size}, weights[0].options());
  int64_t offset = 0;
  for (Tensor w : weights) {
    auto part = view_of(whole, w.sizes(), w.contiguous().strides(), offset);
    part.copy_(w);
    offset += w.numel();
    w.set_(part.storage(), part.storage_offset(), part.sizes(), part.strides());
  }
  return whole;
}

}  // namespace

// Torch calls these by the device, and not through an operator.
void install_cudnn() {
  using namespace at::native;
  rnn_relu_cudnn_stub.set_cuda_dispatch_ptr(&layers<0>);
  rnn_tanh_cudnn_stub.set_cuda_dispatch_ptr(&layers<1>);
  lstm_cudnn_stub.set_cuda_dispatch_ptr(&lstm_layers);
  gru_cudnn_stub.set_cuda_dispatch_ptr(&layers<3>);
  rnn_relu_packed_cudnn_stub.set_cuda_dispatch_ptr(&packed_layers<0>);
  rnn_tanh_packed_cudnn_stub.set_cuda_dispatch_ptr(&packed_layers<1>);
  lstm_packed_cudnn_stub.set_cuda_dispatch_ptr(&packed_lstm_layers);
  gru_packed_cudnn_stub.set_cuda_dispatch_ptr(&packed_layers<3>);
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("cudnn_batch_norm", cudnn_batch_norm);
  m.impl("cudnn_batch_norm_backward", cudnn_batch_norm_backward);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  m.impl("_cudnn_rnn", cudnn_rnn);
  m.impl("_cudnn_rnn_backward", cudnn_rnn_backward);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) { m.impl("_cudnn_rnn_flatten_weight", flatten_weights); }

}  // namespace emulated
