// glu and its backward on the CPU: the ops around isa/glu.cpp.
#include "cpu/glu.h"

#include <string>
#include <tuple>

#include "cpu/sums.h"

namespace fastdit {
namespace {

constexpr int64_t kWork = 10;  // elements of the other ops that one of this is worth

// The stride between the rows of `t`, all axes but the last; −1 where it is not one number, or the
// rows are not dense.
int64_t stride_of_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.stride(last) != 1 && t.size(last) > 1) return -1;
  int64_t stride = t.size(last), next = -1;
  for (int64_t axis = last; axis-- > 0;) {
    if (t.size(axis) == 1) continue;
    if (next < 0) next = stride = t.stride(axis);
    if (t.stride(axis) != next) return -1;
    next *= t.size(axis);
  }
  return stride;
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation: got ", name);
  return Activation::gelu_tanh;
}

// `width` columns of `rows` from column `start`.
Strided columns(const Tensor& t, int64_t start, int64_t stride) {
  return {static_cast<char*>(t.data_ptr()) + start * t.element_size(), stride};
}

Modulation half(Modulation bias, int64_t start) {
  if (!bias) return {};
  const int64_t bytes = bias.type == Type::f32 ? 4 : 2;
  bias.data = static_cast<const char*>(bias.data) + start * bias.inner * bytes;
  return bias;
}

struct Call {
  Tensor x, up;  // with dense rows a uniform stride apart
  Glu a;
  int64_t rows = 0;
  int64_t gate_at = 0, up_at = 0;  // first columns in a packed x

  Call(const Tensor& from, const MaybeTensor& other, const MaybeTensor& bias,
       const std::string& activation, bool gate_first)
      : x(uniform(from)), up(other ? uniform(*other) : x) {
    a.type = type_of(x, "x");
    a.activation = activation_of(activation);
    const int64_t last = x.size(x.dim() - 1);
    a.width = other ? last : last / 2;
    if (other) {
      check_up(*other, from);
      STD_TORCH_CHECK(!bias && gate_first, "bias, gate_first: up is a tensor of its own");
    } else {
      STD_TORCH_CHECK(last % 2 == 0, "x: wrong shape");
      (gate_first ? up_at : gate_at) = a.width;
      const Modulation both = parameter_of(bias, last, "bias");
      a.gate_bias = half(both, gate_at), a.up_bias = half(both, up_at);
    }
    a.gate = columns(x, gate_at, stride_of_rows(x));
    a.up = columns(up, up_at, stride_of_rows(up));
    rows = last ? x.numel() / last : 0;
  }

  static Tensor uniform(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() >= 1, "x: wrong shape");
    return stride_of_rows(t) < 0 ? torch::stable::contiguous(t) : t;
  }

  static void check_up(const Tensor& up, const Tensor& x) {
    bool fits = up.dim() == x.dim() && up.scalar_type() == x.scalar_type() && up.is_cpu();
    for (int64_t axis = 0; fits && axis < x.dim(); ++axis) fits = up.size(axis) == x.size(axis);
    STD_TORCH_CHECK(fits, "up: must have x's shape and dtype");
  }

  // A new dense tensor of the result's shape.
  Tensor result() const {
    int64_t shape[64];
    for (int64_t axis = 0; axis < x.dim(); ++axis) shape[axis] = x.size(axis);
    shape[x.dim() - 1] = a.width;
    return empty(shape, x.dim(), x.scalar_type());
  }

  float* scratch() const { return scratch_floats(kGluScratch * scratch_row(a.width)); }
};

Tensor glu(const Tensor& x, const MaybeTensor& up, const MaybeTensor& bias, std::string activation,
           bool gate_first) {
  Call call(x, up, bias, activation, gate_first);
  Tensor out = call.result();
  call.a.out = out.data_ptr();
  parallel_items(call.rows, kWork * call.a.width, [&](int64_t begin, int64_t end) {
    glu_rows(call.a, begin, end, call.scratch());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> glu_backward(const Tensor& dout, const Tensor& x,
                                                const MaybeTensor& up, const MaybeTensor& bias,
                                                std::string activation, bool gate_first) {
  Call call(x, up, bias, activation, gate_first);
  const int64_t width = call.a.width;
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type() && dout.numel() == call.rows * width,
                  "dout: must have the result's shape and x's dtype");
  const Tensor dense = torch::stable::contiguous(dout);
  Tensor dx = dense_like(x), dup = gradient_of(up, x), dbias = gradient_of(bias, x);
  call.a.dout = dense.data_ptr();
  call.a.dgate = columns(dx, call.gate_at, up ? width : 2 * width);
  call.a.dup = up ? columns(dup, 0, width) : columns(dx, call.up_at, 2 * width);
  ChunkedSums sums(1, call.rows, width, bias ? 2 : 0);
  sums.run([&](int64_t begin, int64_t end, float* rows) {
    glu_backward_rows(call.a, begin, end, bias ? rows : nullptr, call.scratch());
  });
  for (int kind = 0; bias && width && kind < 2; ++kind) {
    const int64_t start = kind == 0 ? call.gate_at : call.up_at;
    store_floats(sums.total(0, kind), width, dbias.data_ptr(), start / width,
                 call.a.gate_bias.type);
  }
  return {dx, dup, dbias};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def(
      "glu(Tensor x, Tensor? up, Tensor? bias, str activation, bool gate_first) -> Tensor");
  m.def(
      "glu_backward(Tensor dout, Tensor x, Tensor? up, Tensor? bias, str activation, "
      "bool gate_first) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("glu", TORCH_BOX(&fastdit::glu));
  m.impl("glu_backward", TORCH_BOX(&fastdit::glu_backward));
}
