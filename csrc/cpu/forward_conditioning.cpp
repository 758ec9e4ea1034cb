// All that x has no part in: every layer's modulations of a timestep and a label.
//
//   c = Linear(SiLU(Linear([cos | sin](t·frequencies)))) + table[y],   rows = Linear(SiLU(c))
//
// With a sampler's batch the last product reads each weight for a handful of rows: its time is that
// of reading the parameters once, where they lie, and no packed copy of them is kept.
#include <cmath>

#include "cpu/forward_shared.h"

namespace fastdit {
namespace {

// Columns of one product with few rows, 32 at a time: the weights of those stay in cache.
void dots(const Dots& d, int64_t columns) {
  shared((columns + 31) / 32, double(d.rows) * columns * d.depth, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) dots_columns(d, 32 * begin, std::min(columns, 32 * (begin + 1)));
  });
}

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
  const Dots d{a, w, floats_of(bias, {columns}, "bias"), out, out_stride, rows, depth, silu};
  dots(d, columns);
}

// `embedder`: the timestep MLP's two weights and biases, and the table of labels. `weights` and
// `biases`: the modulation Linears, any number of them one below the other in a tensor.
Tensor forward_conditioning(const Tensor& t, const Tensor& y, const Tensor& frequencies,
                            std::vector<Tensor> embedder, std::vector<Tensor> weights,
                            std::vector<Tensor> biases) {
  STD_TORCH_CHECK(embedder.size() == 5 && weights.size() == biases.size(), "weights: wrong number");
  const int64_t rows = t.numel(), width = embedder[0].size(0), inputs = 2 * frequencies.numel();
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long && y.is_cpu() && y.is_contiguous(),
                  "y: must be a contiguous int64 CPU tensor");
  check_shape(y, {rows}, "y");
  const Tensor& labels = embedder[4];
  const float* table = floats_of(labels, {labels.size(0), width}, "table");
  int64_t columns = 0;
  for (const Tensor& weight : weights) columns += weight.size(0);
  Tensor out = empty({rows, columns}, ScalarType::Float);
  Tensor scratch = empty({rows, inputs + 2 * width}, ScalarType::Float);
  float* angles = static_cast<float*>(scratch.data_ptr());
  float *hidden = angles + rows * inputs, *c = hidden + rows * width;
  sinusoids(t, frequencies, angles);
  linear(angles, rows, inputs, embedder[0], embedder[1], true, hidden, width);
  linear(hidden, rows, width, embedder[2], embedder[3], false, c, width);
  const int64_t* label = static_cast<const int64_t*>(y.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(label[row] >= 0 && label[row] < labels.size(0), "y: got ", label[row],
                    ", allowed is 0 to ", labels.size(0) - 1);
    for (int64_t i = 0; i < width; ++i) c[row * width + i] += table[label[row] * width + i];
  }
  silu_floats(c, rows * width);
  float* to = static_cast<float*>(out.data_ptr());
  for (size_t i = 0; i < weights.size(); to += weights[i++].size(0))
    linear(c, rows, width, weights[i], biases[i], false, to, columns);
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
