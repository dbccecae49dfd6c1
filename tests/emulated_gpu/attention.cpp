// Attention in one kernel, under the name that autograd has for it on a GPU. A kernel of the CPU, which the device runs
// like all others.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>

#include <array>
#include <cmath>
#include <tuple>

#include "host.h"

namespace emulated {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

bool there(const Maybe& tensor) { return tensor && tensor->defined(); }

int64_t fused_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe&, double, bool,
                        std::optional<double>, bool grouped) {
  bool fits = query.dim() == 4 && query.scalar_type() != at::kDouble && !grouped && query.size(-1) == value.size(-1);
  bool fused = fits && at::globalContext().userEnabledMemEfficientSDP();
  return static_cast<int64_t>(fused ? sdp::SDPBackend::efficient_attention : sdp::SDPBackend::math);
}

struct Attention {
  double scale, dropout;
  bool causal;
  Tensor mask;  // of dropout, divided by what it keeps

  Attention(const Tensor& query, std::optional<double> given, double p, bool is_causal)
      : scale(given.value_or(1 / std::sqrt(static_cast<double>(query.size(-1))))), dropout(p), causal(is_causal) {}

  Tensor scores(const Tensor& query, const Tensor& key, const Maybe& bias) const {
    auto found = at::matmul(query, key.transpose(-2, -1)) * scale;
    if (there(bias)) found = found + *bias;
    if (!causal) return found;
    auto later = at::ones(found.sizes().slice(found.dim() - 2), found.options().dtype(at::kBool)).triu(1);
    return found.masked_fill(later, -INFINITY);
  }
  void draw(const Tensor& like, int64_t seed) {
    if (dropout == 0) return;
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    mask = at::empty_like(like).bernoulli_(1 - dropout, generator).div_(1 - dropout);
  }
  Tensor dropped(const Tensor& tensor) const { return mask.defined() ? tensor * mask : tensor; }
};

Tensor wide(const Tensor& tensor) { return tensor.to(at::kFloat); }
Maybe maybe_wide(const Maybe& tensor) { return there(tensor) ? Maybe(wide(*tensor)) : std::nullopt; }

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const Maybe& bias, bool, double dropout, bool causal,
                                                     std::optional<double> scale) {
  Attention form(query, scale, dropout, causal);
  auto q = wide(query), k = wide(key), v = wide(value), scores = form.scores(q, k, maybe_wide(bias));
  auto seed = at::zeros({}, at::TensorOptions().dtype(at::kLong));
  if (dropout > 0) seed.random_(1 << 30);
  form.draw(scores, seed.item<int64_t>());
  auto out = at::matmul(form.dropped(scores.softmax(-1)), v).to(query.scalar_type());
  out = out.transpose(1, 2).contiguous().transpose(1, 2);  // the layout in which the kernel leaves it
  return {out, scores.logsumexp(-1), seed, at::zeros_like(seed)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& query,
                                                              const Tensor& key, const Tensor& value,
                                                              const Tensor& bias, const Tensor&, const Tensor&,
                                                              const Tensor& seed, const Tensor&, double dropout,
                                                              std::array<bool, 4> wanted, bool causal,
                                                              std::optional<double> scale) {
  Attention form(query, scale, dropout, causal);
  auto q = wide(query), k = wide(key), v = wide(value), grad = wide(grad_out);
  auto scores = form.scores(q, k, maybe_wide(bias));
  form.draw(scores, seed.item<int64_t>());
  auto p = scores.softmax(-1), dp = form.dropped(at::matmul(grad, v.transpose(-2, -1)));
  auto ds = p * (dp - (p * dp).sum(-1, /*keepdim=*/true));
  auto back = [](const Tensor& found, const Tensor& like) { return found.to(like.scalar_type()); };
  return {back(at::matmul(ds, k) * form.scale, query), back(at::matmul(ds.transpose(-2, -1), q) * form.scale, key),
          back(at::matmul(form.dropped(p).transpose(-2, -1), grad), value),
          wanted[3] && bias.defined() ? back(at::sum_to(ds, bias.sizes()), bias) : Tensor()};
}

}  // namespace

// Torch makes this choice by the device, and not through an operator.
void install_attention() { at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&fused_attention); }

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_scaled_dot_product_efficient_attention", attention);
  m.impl("_scaled_dot_product_efficient_attention_backward", attention_backward);
}

}  // namespace emulated
