// glu and its backward on the CPU: the ops around isa/glu.cpp.
#include "cpu/glu.h"

#include <string>
#include <tuple>

#include "cpu/sums.h"

namespace fastdit {
namespace {

// `data` from element `start`.
template <class P>
P from(P data, Type type, int64_t start) {
  return P(uintptr_t(data) + start * (type == Type::f32 ? 4 : 2));
}

float* scratch_of(const Glu& a) { return scratch_floats(kGluScratch * scratch_row(a.width)); }

}  // namespace

int64_t stride_of_rows(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  const int64_t last = dims - 1;
  if (strides[last] != 1 && sizes[last] > 1) return -1;
  int64_t stride = sizes[last], next = -1;
  for (int64_t axis = last; axis-- > 0;) {
    if (sizes[axis] == 1) continue;
    if (next < 0) next = stride = strides[axis];
    if (strides[axis] != next) return -1;
    next *= sizes[axis];
  }
  return stride;
}

void split(const Glu& a, Strided rows, bool gate_first, Strided& gate, Strided& up) {
  gate = up = rows;
  Strided& second = gate_first ? up : gate;
  second.data = from(rows.data, a.type, a.width);
}

void split_bias(Glu& a, Modulation bias, bool gate_first) {
  a.gate_bias = a.up_bias = bias;
  Modulation& second = gate_first ? a.up_bias : a.gate_bias;
  if (bias) second.data = from(bias.data, bias.type, a.width * bias.inner);
}

void glu_all(const Glu& a, int64_t rows) {
  parallel_items(rows, kGluWork * a.width, [&](int64_t begin, int64_t end) {
    glu_rows(a, begin, end, scratch_of(a));
  });
}

namespace {

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation: got ", name);
  return Activation::gelu_tanh;
}

int64_t stride_of(const Tensor& t) {
  return stride_of_rows(t.sizes().data(), t.strides().data(), t.dim());
}

struct Call {
  Tensor x, up;  // with dense rows a uniform stride apart
  Glu a;
  int64_t rows = 0;

  Call(const Tensor& from, const MaybeTensor& other, const MaybeTensor& bias,
       const std::string& activation, bool gate_first)
      : x(uniform(from)), up(other ? uniform(*other) : x) {
    a.type = type_of(x, "x");
    a.activation = activation_of(activation);
    const int64_t last = x.size(x.dim() - 1);
    a.width = other ? last : last / 2;
    const Strided first{x.data_ptr(), stride_of(x)};
    if (other) {
      check_up(*other, from);
      STD_TORCH_CHECK(!bias && gate_first, "bias, gate_first: up is a tensor of its own");
      a.gate = first, a.up = {up.data_ptr(), stride_of(up)};
    } else {
      STD_TORCH_CHECK(last % 2 == 0, "x: wrong shape");
      split(a, first, gate_first, a.gate, a.up);
      split_bias(a, parameter_of(bias, last, "bias"), gate_first);
    }
    rows = last ? x.numel() / last : 0;
  }

  static Tensor uniform(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() >= 1, "x: wrong shape");
    return stride_of(t) < 0 ? torch::stable::contiguous(t) : t;
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
};

Tensor glu(const Tensor& x, const MaybeTensor& up, const MaybeTensor& bias, std::string activation,
           bool gate_first) {
  Call call(x, up, bias, activation, gate_first);
  Tensor out = call.result();
  call.a.out = out.data_ptr();
  glu_all(call.a, call.rows);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> glu_backward(const Tensor& dout, const Tensor& x,
                                                const MaybeTensor& up, const MaybeTensor& bias,
                                                std::string activation, bool gate_first) {
  Call call(x, up, bias, activation, gate_first);
  Glu& a = call.a;
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type() && dout.numel() == call.rows * a.width,
                  "dout: must have the result's shape and x's dtype");
  const Tensor dense = torch::stable::contiguous(dout);
  Tensor dx = dense_like(x), dup = gradient_of(up, x), dbias = gradient_of(bias, x);
  a.dout = dense.data_ptr();
  if (up)
    a.dgate = {dx.data_ptr(), a.width}, a.dup = {dup.data_ptr(), a.width};
  else
    split(a, {dx.data_ptr(), 2 * a.width}, gate_first, a.dgate, a.dup);
  ChunkedSums sums(1, call.rows, a.width, bias ? 2 : 0);
  sums.run([&](int64_t begin, int64_t end, float* rows) {
    glu_backward_rows(a, begin, end, bias ? rows : nullptr, scratch_of(a));
  });
  for (int kind = 0; bias && a.width && kind < 2; ++kind)
    store_floats(sums.total(0, kind), a.width, dbias.data_ptr(), (kind == 0) != gate_first,
                 a.gate_bias.type);
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
