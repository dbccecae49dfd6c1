// Calls every CPU kernel on buffers of exactly the size it may touch, for AddressSanitizer and UBSan to watch.
#include <cstdio>
#include <vector>

#include "cpu/kernels.h"

using namespace metakern::cpu;

template <typename T>
std::vector<T> filled(int64_t size) {
  std::vector<T> values(size);
  for (int64_t k = 0; k < size; ++k) values[k] = static_cast<T>((k * 7919) % 13) - static_cast<T>(6);
  return values;
}

template <>
std::vector<bfloat16> filled(int64_t size) {
  return std::vector<bfloat16>(size, bfloat16{0x3f80});
}

template <typename T, typename Sum>
void rows(int64_t n, int64_t t, int64_t width) {
  std::vector<Sum> out(n);
  const auto x = filled<T>(n * t * width), y = filled<T>(n * t * width), table = filled<T>(3 * width);
  std::vector<int64_t> indices(n * t);
  for (int64_t k = 0; k < n * t; ++k) indices[k] = k % 3;
  row_dots(x.data(), y.data(), out.data(), n, t * width, t * width, t * width);
  embedding_dots(indices.data(), table.data(), y.data(), out.data(), n, t, width, 3, width, t * width, width, 1);
  std::vector<Sum> scale(n * width), shift(n * width);
  for (const bool centred : {false, true})
    affine_grads(x.data(), y.data(), scale.data(), centred ? shift.data() : nullptr, n, t, width, t * width, width,
                 t * width, width, 1e-5, centred);
}

// Rows two elements apart; every third is ignored, and the last target is no class.
template <typename T>
void losses(int64_t rows, int64_t classes) {
  const int64_t stride = classes + 2;
  const auto logits = filled<T>(rows > 0 ? (rows - 1) * stride + classes : 0);
  std::vector<float> out(rows), highs(rows), sums(rows);
  std::vector<T> grad(rows * classes);
  std::vector<int64_t> targets(rows);
  for (int64_t r = 0; r < rows; ++r) targets[r] = r % 3 == 1 ? -100 : r % classes;
  for (const float smoothing : {0.0f, 0.1f})
    for (const int64_t last : {int64_t{0}, classes, int64_t{-1}}) {
      if (rows > 0) targets[rows - 1] = last;
      cross_entropy_rows(logits.data(), targets.data(), out.data(), highs.data(), sums.data(), rows, classes, stride,
                         -100, smoothing);
      cross_entropy_rows_backward(logits.data(), targets.data(), highs.data(), sums.data(), out.data(), grad.data(),
                                  rows, classes, stride, -100, smoothing);
    }
}

template <typename T>
void weights(int64_t n) {
  const auto dots = filled<T>(n > 0 ? 2 * n - 1 : 0);
  std::vector<T> out(n);
  clip_normalise(dots.data(), out.data(), n, 2);
}

int main() {
  for (const int64_t n : {0, 1, 3})
    for (const int64_t t : {0, 1, 67})
      for (const int64_t width : {1, 7, 64, 300}) {
        rows<float, float>(n, t, width);
        rows<double, double>(n, t, width);
        rows<bfloat16, float>(n, t, width);
      }
  for (const int64_t rows : {0, 1, 4})
    for (const int64_t classes : {1, 10, 32, 1024, 2057}) {
      losses<float>(rows, classes);
      losses<bfloat16>(rows, classes);
    }
  for (const int64_t n : {0, 1, 15, 16, 33, 1000}) {
    weights<float>(n);
    weights<double>(n);
  }
  std::puts("clean");
}
