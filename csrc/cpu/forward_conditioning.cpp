// All that x has no part in: every layer's modulations of a timestep and a label.
//
//   c = Linear(SiLU(Linear([cos | sin](t·frequencies)))) + table[y],   rows = Linear(SiLU(c))
//
// With a sampler's batch the last product reads each weight for a handful of rows: its time is that
// of reading the parameters once, where they lie, and no packed copy of them is kept.
#include <cmath>

#include "cpu/forward_modulation.h"

namespace fastdit {
namespace {

// (B, 2F): [cos | sin] of t·frequencies.
void sinusoids(const Tensor& t, const Tensor& frequencies, float* to) {
  const int64_t rows = t.size(0), count = frequencies.size(0);
  const float* times = floats_of(t, {rows}, "t");
  const float* each = floats_of(frequencies, {count}, "frequencies");
  shared(rows, 100.0 * rows * count, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < count; ++i) {
        const float angle = times[row] * each[i];
        to[row * 2 * count + i] = std::cos(angle);
        to[row * 2 * count + count + i] = std::sin(angle);
      }
  });
}

// out (rows, ·) = [SiLU](a·Wᵀ + bias)
void linear(const float* a, int64_t rows, int64_t depth, const Tensor& weight, const Tensor& bias,
            bool silu, float* out, int64_t out_stride) {
  const int64_t columns = weight.dim() ? weight.size(0) : 0;
  const float* w = floats_of(weight, {columns, depth}, "weight");
  multiply({a, w, floats_of(bias, {columns}, "bias"), out, out_stride, rows, depth, silu}, columns);
}

}  // namespace

Conditioner::Conditioner(const Tensor& t, const Tensor& y, const Tensor& frequencies,
                         const std::vector<Tensor>& embedder)
    : rows_(t.numel()), width_(0) {
  STD_TORCH_CHECK(embedder.size() == 5, "embedder: wrong length");
  const int64_t inputs = 2 * frequencies.numel();
  width_ = embedder[0].size(0);
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long && y.is_cpu() && y.is_contiguous(),
                  "y: must be a contiguous int64 CPU tensor");
  check_shape(y, {rows_}, "y");
  const Tensor& labels = embedder[4];
  const float* table = floats_of(labels, {labels.size(0), width_}, "table");
  scratch_ = empty({rows_, inputs + 2 * width_}, ScalarType::Float);
  float* angles = static_cast<float*>(scratch_.data_ptr());
  float* hidden = angles + rows_ * inputs;
  c_ = hidden + rows_ * width_;
  sinusoids(t, frequencies, angles);
  linear(angles, rows_, inputs, embedder[0], embedder[1], true, hidden, width_);
  linear(hidden, rows_, width_, embedder[2], embedder[3], false, c_, width_);
  const int64_t* label = static_cast<const int64_t*>(y.data_ptr());
  for (int64_t row = 0; row < rows_; ++row) {
    STD_TORCH_CHECK(label[row] >= 0 && label[row] < labels.size(0), "y: got ", label[row],
                    ", allowed is 0 to ", labels.size(0) - 1);
    for (int64_t i = 0; i < width_; ++i) c_[row * width_ + i] += table[label[row] * width_ + i];
  }
  silu_floats(c_, rows_ * width_);
}

namespace {

// `weights` and `biases`: the modulation Linears, any number of them one below the other in a tensor.
Tensor forward_conditioning(const Tensor& t, const Tensor& y, const Tensor& frequencies,
                            std::vector<Tensor> embedder, std::vector<Tensor> weights,
                            std::vector<Tensor> biases) {
  STD_TORCH_CHECK(weights.size() == biases.size(), "weights: wrong number");
  const Conditioner made(t, y, frequencies, embedder);
  int64_t columns = 0;
  for (const Tensor& weight : weights) columns += weight.size(0);
  Tensor out = empty({made.rows(), columns}, ScalarType::Float);
  float* to = static_cast<float*>(out.data_ptr());
  for (size_t i = 0; i < weights.size(); to += weights[i++].size(0))
    linear(made.c(), made.rows(), made.width(), weights[i], biases[i], false, to, columns);
  return out;
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def(
      "forward_conditioning(Tensor t, Tensor y, Tensor frequencies, Tensor[] embedder, "
      "Tensor[] weights, Tensor[] biases) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("forward_conditioning", TORCH_BOX(&fastdit::forward_conditioning));
}
