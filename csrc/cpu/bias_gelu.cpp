// bias_gelu and its backward on the CPU: the ops around isa/bias_gelu.cpp.
#include "cpu/bias_gelu.h"

#include <tuple>

#include "cpu/sums.h"

namespace fastdit {

// GELU's exponential makes an element worth eight of the other ops'.
constexpr int64_t kWork = 8;

void bias_gelu_all(const BiasGelu& a, int64_t rows) {
  parallel_items(rows, kWork * a.width, [&](int64_t begin, int64_t end) {
    bias_gelu_rows(a, begin, end, scratch_floats(scratch_row(a.width)));
  });
}

namespace {

struct Call {
  Tensor x;  // contiguous
  BiasGelu a;
  int64_t rows = 0;

  Call(const Tensor& from, const Tensor& bias, const Tensor& out)
      : x(torch::stable::contiguous(from)) {
    STD_TORCH_CHECK(x.dim() >= 1, "x: wrong shape");
    a.width = x.size(x.dim() - 1);
    a.x = x.data_ptr();
    a.out = out.data_ptr();
    a.type = type_of(x, "x");
    a.bias = parameter_of(bias, a.width, "bias");
    rows = a.width ? x.numel() / a.width : 0;
  }
};

Tensor bias_gelu(const Tensor& x, const Tensor& bias) {
  Tensor out = dense_like(x);
  Call call(x, bias, out);
  bias_gelu_all(call.a, call.rows);
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& dout, const Tensor& x,
                                              const Tensor& bias) {
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type() && dout.numel() == x.numel(),
                  "dout: must have x's shape and dtype");
  Tensor dx = dense_like(x), dbias = dense_like(bias);
  const Tensor dense = torch::stable::contiguous(dout);
  Call call(x, bias, dx);
  call.a.dout = dense.data_ptr();
  ChunkedSums sums(1, call.rows, call.a.width, 1);
  sums.run([&](int64_t begin, int64_t end, float* rows) {
    bias_gelu_backward_rows(call.a, begin, end, rows, scratch_floats(scratch_row(call.a.width)));
  });
  store_floats(sums.total(0, 0), call.a.width, dbias.data_ptr(), 0, call.a.bias.type);
  return {dx, dbias};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor dout, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&fastdit::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&fastdit::bias_gelu_backward));
}
