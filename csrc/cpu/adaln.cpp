// adaln and gated_adaln on the CPU: the ops around the kernels of isa/adaln.cpp.
#include "cpu/adaln.h"

#include <string>
#include <tuple>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdit {
void adaln_all(const Adaln& a, int64_t batch) {
  parallel_items(batch * a.tokens, a.width, [&](int64_t begin, int64_t end) {
    adaln_rows(a, begin, end, scratch_floats(kAdalnScratch * scratch_row(a.width)));
  });
}

namespace {

// What both forwards share: everything but y, gate and h. `x` must have dense rows.
struct Forward {
  Adaln a;
  Tensor out, mean, rstd;

  Forward(const Tensor& x, const MaybeTensor& shift, const MaybeTensor& scale,
          const MaybeTensor& weight, const MaybeTensor& bias, double eps, const std::string& norm,
          bool plus_one)
      : out(empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type())),
        mean(norm == "rms" ? empty({0}, ScalarType::Float)
                           : empty({x.size(0), x.size(1)}, ScalarType::Float)),
        rstd(empty({x.size(0), x.size(1)}, ScalarType::Float)) {
    a.x = rows_of(x, "x");
    a.rms = norm == "rms";
    a.out = out.data_ptr();
    if (!a.rms) a.mean = static_cast<float*>(mean.data_ptr());
    a.rstd = static_cast<float*>(rstd.data_ptr());
    a.tokens = x.size(1), a.width = x.size(2);
    a.shift = modulation_of(shift, x, "shift");
    a.scale = modulation_of(scale, x, "scale");
    a.weight = parameter_of(weight, a.width, "weight");
    a.bias = parameter_of(bias, a.width, "bias");
    a.eps = float(eps);
    a.plus = plus_one ? 1 : 0;
  }
};

std::tuple<Tensor, Tensor, Tensor> adaln(const Tensor& x, const MaybeTensor& shift,
                                         const MaybeTensor& scale, const MaybeTensor& weight,
                                         const MaybeTensor& bias, double eps,
                                         const std::string& norm, bool plus_one) {
  check_norm(x, weight, bias, norm, eps);
  const Tensor dense = dense_rows(x);
  Forward f(dense, shift, scale, weight, bias, eps, norm, plus_one);
  adaln_all(f.a, x.size(0));
  return {f.out, f.mean, f.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_adaln(
    const Tensor& x, const Tensor& y, const Tensor& gate, const MaybeTensor& shift,
    const MaybeTensor& scale, const MaybeTensor& weight, const MaybeTensor& bias, double eps,
    const std::string& norm, bool plus_one) {
  check_norm(x, weight, bias, norm, eps);
  check_shape(y, {x.size(0), x.size(1), x.size(2)}, "y");
  const Tensor dense = dense_rows(x), branch = dense_rows(y);
  Forward f(dense, shift, scale, weight, bias, eps, norm, plus_one);
  Tensor h = empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  f.a.y = rows_of(branch, "y");
  f.a.gate = modulation_of(gate, x, "gate");
  f.a.h = h.data_ptr();
  adaln_all(f.a, x.size(0));
  return {h, f.out, f.mean, f.rstd};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def(
      "adaln(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, "
      "str norm, bool plus_one) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_adaln(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, "
      "Tensor? bias, float eps, str norm, bool plus_one) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("adaln", TORCH_BOX(&fastdit::adaln));
  m.impl("gated_adaln", TORCH_BOX(&fastdit::gated_adaln));
}
