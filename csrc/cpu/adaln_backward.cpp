// The backward of adaln and gated_adaln on the CPU: the ops around isa/adaln_backward.cpp.
#include "cpu/adaln_backward.h"

#include <string>
#include <tuple>
#include <vector>

#include "cpu/sums.h"

namespace fastdit {
namespace {

struct Modulations {
  const MaybeTensor &shift, &scale, &weight, &bias;
};

// Everything that the two ops share. Where a gradient is per token the kernel writes it, else
// `finish` makes it of the samples' sums.
class Backward {
 public:
  Backward(const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& rstd,
           const Modulations& m, const std::string& norm, bool plus_one)
      : dout_(dense_rows(dout)), x_(dense_rows(x)), mean_(torch::stable::contiguous(mean)),
        rstd_(torch::stable::contiguous(rstd)), dx(dense_like(x)),
        dshift(gradient_of(m.shift, x)), dscale(gradient_of(m.scale, x)),
        dweight(gradient_of(m.weight, x)), dbias(gradient_of(m.bias, x)) {
    check_norm(x, m.weight, m.bias, norm, 0);
    const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2);
    check_rows(dout, "dout");
    check_shape(rstd, {batch, tokens}, "rstd");
    a.rms = norm == "rms";
    if (!a.rms) check_shape(mean, {batch, tokens}, "mean");
    STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float &&
                    mean.scalar_type() == ScalarType::Float, "mean, rstd: must be float32");
    a.dout = rows_of(dout_, "dout");
    a.x = rows_of(x_, "x");
    a.mean = static_cast<const float*>(mean_.data_ptr());
    a.rstd = static_cast<const float*>(rstd_.data_ptr());
    a.tokens = tokens, a.width = width;
    a.shift = modulation_of(m.shift, x, "shift");
    a.scale = modulation_of(m.scale, x, "scale");
    a.weight = parameter_of(m.weight, width, "weight");
    a.bias = parameter_of(m.bias, width, "bias");
    a.plus = plus_one ? 1 : 0;
    a.dx = dx.data_ptr();
    token_shift_ = m.shift && m.shift->dim() == 3, token_scale_ = m.scale && m.scale->dim() == 3;
    if (token_shift_) a.dshift = dshift.data_ptr();
    if (token_scale_) a.dscale = dscale.data_ptr();
  }

  void add_gate(const Tensor& dh, const Tensor& y, const Tensor& gate, Tensor& dy, Tensor& dgate) {
    check_rows(dh, "dh");
    check_shape(y, {x_.size(0), x_.size(1), x_.size(2)}, "y");
    dh_ = dense_rows(dh), y_ = dense_rows(y), dgate_ = dgate;
    a.dh = rows_of(*dh_, "dh");
    a.y = rows_of(*y_, "y");
    a.gate = modulation_of(gate, x_, "gate");
    a.dy = dy.data_ptr();
    token_gate_ = gate.dim() == 3;
    if (token_gate_) a.dgate = dgate.data_ptr();
  }

  void run() {
    const int64_t batch = x_.size(0);
    const bool scaled = token_scale_ && (a.weight || a.bias);
    const int64_t gate_at = scaled ? 4 : 2;
    ChunkedSums sums(batch, a.tokens, a.width, gate_at + (a.gate && !token_gate_));
    sums.run([&](int64_t begin, int64_t end, float* rows) {
      AdalnSums s{rows, rows + sums.stride()};
      if (scaled) s.scaled = rows + 2 * sums.stride(), s.scaled_unit = rows + 3 * sums.stride();
      if (a.gate && !token_gate_) s.gate = rows + gate_at * sums.stride();
      adaln_backward_rows(a, begin, end, s,
                          scratch_floats(kAdalnBackwardScratch * scratch_row(a.width)));
    });
    finish(sums, batch, scaled, gate_at);
  }

  AdalnBackward a;

 private:
  void check_rows(const Tensor& t, const char* name) const {
    check_shape(t, {x_.size(0), x_.size(1), x_.size(2)}, name);
    STD_TORCH_CHECK(t.scalar_type() == x_.scalar_type(), name, ": must have x's dtype");
  }

  // With u = Σ dout·unit and p = Σ dout of one sample and m = plus + scale:
  // dshift = p, dscale = u·weight + p·bias, dweight = Σ m·u, dbias = Σ m·p.
  void finish(const ChunkedSums& sums, int64_t batch, bool scaled, int64_t gate_at) {
    const int64_t width = a.width;
    std::vector<float> w(width, 1), c(width, 0), m(width), line(width), dw(width, 0), db(width, 0);
    if (a.weight) load_floats(a.weight, 0, width, w.data());
    if (a.bias) load_floats(a.bias, 0, width, c.data());
    for (int64_t b = 0; b < batch; ++b) {
      const float *p = sums.total(b, 0), *u = sums.total(b, 1);
      if (a.shift && !token_shift_) store_floats(p, width, dshift.data_ptr(), b, a.shift.type);
      if (a.scale && !token_scale_) {
        for (int64_t d = 0; d < width; ++d) line[d] = u[d] * w[d] + p[d] * c[d];
        store_floats(line.data(), width, dscale.data_ptr(), b, a.scale.type);
      }
      if (a.gate && !token_gate_)
        store_floats(sums.total(b, gate_at), width, dgate_->data_ptr(), b, a.gate.type);
      if (!a.weight && !a.bias) continue;
      std::fill(m.begin(), m.end(), 1.f);
      if (scaled) {
        p = sums.total(b, 2), u = sums.total(b, 3);
      } else if (a.scale) {
        load_floats(a.scale, b, width, m.data());
        for (float& value : m) value += a.plus;
      }
      for (int64_t d = 0; d < width; ++d) dw[d] += m[d] * u[d], db[d] += m[d] * p[d];
    }
    if (a.weight) store_floats(dw.data(), width, dweight.data_ptr(), 0, a.weight.type);
    if (a.bias) store_floats(db.data(), width, dbias.data_ptr(), 0, a.bias.type);
  }

  Tensor dout_, x_, mean_, rstd_;
  MaybeTensor dh_, y_, dgate_;
  bool token_shift_ = false, token_scale_ = false, token_gate_ = false;

 public:
  Tensor dx, dshift, dscale, dweight, dbias;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward(
    const Tensor& dout, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& weight,
    const MaybeTensor& bias, const std::string& norm, bool plus_one) {
  Backward backward(dout, x, mean, rstd, {shift, scale, weight, bias}, norm, plus_one);
  backward.run();
  return {backward.dx, backward.dshift, backward.dscale, backward.dweight, backward.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_adaln_backward(
    const Tensor& dh, const Tensor& dout, const Tensor& h, const Tensor& mean, const Tensor& rstd,
    const Tensor& y, const Tensor& gate, const MaybeTensor& shift, const MaybeTensor& scale,
    const MaybeTensor& weight, const MaybeTensor& bias, const std::string& norm, bool plus_one) {
  Backward backward(dout, h, mean, rstd, {shift, scale, weight, bias}, norm, plus_one);
  Tensor dy = dense_like(y), dgate = dense_like(gate);
  backward.add_gate(dh, y, gate, dy, dgate);
  backward.run();
  return {backward.dx,     dy,     dgate, backward.dshift, backward.dscale, backward.dweight,
          backward.dbias};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def(
      "adaln_backward(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor? shift, "
      "Tensor? scale, Tensor? weight, Tensor? bias, str norm, bool plus_one) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_adaln_backward(Tensor dh, Tensor dout, Tensor h, Tensor mean, Tensor rstd, Tensor y, "
      "Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, str norm, "
      "bool plus_one) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("adaln_backward", TORCH_BOX(&fastdit::adaln_backward));
  m.impl("gated_adaln_backward", TORCH_BOX(&fastdit::gated_adaln_backward));
}
