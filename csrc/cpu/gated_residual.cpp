// gated_residual and its backward on the CPU: the ops around isa/gated_residual.cpp.
#include "cpu/gated_residual.h"

#include <tuple>

#include "cpu/sums.h"

namespace fastdit {
namespace {

float* scratch_of(const GatedResidual& a) {
  return scratch_floats(kResidualScratch * scratch_row(a.width));
}

}  // namespace

void gated_residual_all(const GatedResidual& a, int64_t batch) {
  parallel_items(batch * a.tokens, a.width, [&](int64_t begin, int64_t end) {
    gated_residual_rows(a, begin, end, scratch_of(a));
  });
}

namespace {

// The rows of `x` and `y` with a dense last axis, and the kernel's arguments for them.
struct Call {
  Tensor x, y;
  GatedResidual a;

  Call(const Tensor& from, const Tensor& branch, const Tensor& gate, const Tensor& out)
      : x(dense_rows(from)), y(dense_rows(branch)) {
    STD_TORCH_CHECK(x.dim() == 3, "x: wrong shape");
    check_shape(y, {x.size(0), x.size(1), x.size(2)}, "y");
    a.x = rows_of(x, "x");
    a.y = rows_of(y, "y");
    a.gate = modulation_of(gate, x, "gate");
    a.out = out.data_ptr();
    a.tokens = x.size(1), a.width = x.size(2);
  }
};

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
  Tensor out = dense_like(x);
  const Call call(x, y, gate, out);
  gated_residual_all(call.a, x.size(0));
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& dout, const Tensor& y,
                                                   const Tensor& gate) {
  Tensor dy = dense_like(y), dgate = dense_like(gate);
  Call call(dout, y, gate, dy);
  const bool per_token = gate.dim() == 3;
  if (per_token) call.a.dgate = dgate.data_ptr();
  const int64_t batch = y.size(0), width = call.a.width;
  ChunkedSums sums(batch, call.a.tokens, width, per_token ? 0 : 1);
  sums.run([&](int64_t begin, int64_t end, float* rows) {
    gated_residual_backward_rows(call.a, begin, end, rows, scratch_of(call.a));
  });
  for (int64_t b = 0; b < batch && !per_token; ++b)
    store_floats(sums.total(b, 0), width, dgate.data_ptr(), b, call.a.gate.type);
  return {dy, dgate};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def("gated_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&fastdit::gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&fastdit::gated_residual_backward));
}
