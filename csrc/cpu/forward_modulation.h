// Where the modulations of a layer come from: rows that were given, or c = SiLU(MLP(t) + table[y]) of
// this call, whose products with each layer's weights run beside the layer before (isa/gemm.h). They
// read half as many weights as the layer itself, for one row of a sample instead of all its tokens:
// alone their time would be memory's, beside the others it is hardly any.
#pragma once

#include "cpu/forward_shared.h"

namespace fastdit {

struct ModulationWeights {
  const float* c = nullptr;  // (B, hidden); null where rows were given
  std::vector<const float*> weights, biases;  // of each block and the last layer

  // The product of a layer's for the samples [begin, end), into their modulations.
  Dots dots(const Dit& d, int64_t layer, int64_t begin, int64_t end, float* modulations) const {
    Dots p;
    p.a = c + begin * d.hidden, p.w = weights[layer], p.bias = biases[layer];
    p.rows = end - begin, p.depth = d.hidden;
    p.out = modulations + 6 * layer * padded(d.hidden);
    p.out_stride = (6 * d.depth + 2) * padded(d.hidden);
    p.group = d.hidden, p.group_stride = padded(d.hidden);
    return p;
  }
  static int64_t columns(const Dit& d, int64_t layer) { return (layer < d.depth ? 6 : 2) * d.hidden; }
};

// A product with few rows by all threads, 32 columns at a time.
inline void multiply(const Dots& d, int64_t columns) {
  shared((columns + 31) / 32, double(d.rows) * columns * d.depth, [&](int64_t begin, int64_t end) {
    dots_columns(d, 32 * begin, std::min(columns, 32 * end));
  });
}

// c of timesteps and labels, in scratch memory of (rows, inputs + 2·width) floats.
class Conditioner {
 public:
  // `embedder`: the timestep MLP's two weights and biases, and the table of labels.
  Conditioner(const Tensor& t, const Tensor& y, const Tensor& frequencies,
              const std::vector<Tensor>& embedder);
  const float* c() const { return c_; }
  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }

 private:
  int64_t rows_, width_;
  Tensor scratch_;
  float* c_;
};

}  // namespace fastdit
