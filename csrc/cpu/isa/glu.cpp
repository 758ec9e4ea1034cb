// glu and its backward: gate and up (and dout) in once, the result or both gradients out once.
#include "cpu/glu.h"

#include "cpu/isa/activations.h"
#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

constexpr int64_t kUnitsAhead = 512;  // as in bias_gelu.cpp

template <class X>
INLINE X* at(const Strided& rows, int64_t row) {
  return static_cast<X*>(rows.data) + row * rows.stride;
}

// A bias as floats; where it is absent −0, the number that changes none by its addition.
const float* bias_row(const Modulation& bias, int64_t width, float* buffer) {
  if (bias) return floats(bias, 0, 0, width, buffer);
  sweep<1>(width, [&](int64_t d, auto part, int) { store(buffer + d, all(-0.f), part); });
  return buffer;
}

struct Biases {
  const float *gate, *up;

  Biases(const Glu& a, float* scratch)
      : gate(bias_row(a.gate_bias, a.width, scratch)),
        up(bias_row(a.up_bias, a.width, scratch + scratch_row(a.width))) {}
};

template <class A, class X>
FLATTEN void forward(const Glu& a, int64_t begin, int64_t end, const Biases& bias) {
  for (int64_t row = begin; row < end; ++row) {
    const X *gate = at<X>(a.gate, row), *up = at<X>(a.up, row);
    X* out = static_cast<X*>(a.out) + row * a.width;
    sweep<1>(a.width, [&](int64_t d, auto part, int) {
      prefetch(gate + d, kUnitsAhead);
      prefetch(up + d, kUnitsAhead);
      const Vec z = load(gate + d, part) + load(bias.gate + d, part);
      const Vec value = load(up + d, part) + load(bias.up + d, part);
      store(out + d, A::value(z) * value, part);
    });
  }
}

template <class A, class X>
FLATTEN void backward(const Glu& a, int64_t begin, int64_t end, const Biases& bias, float* sums) {
  float* up_sums = sums + scratch_row(a.width);
  for (int64_t row = begin; row < end; ++row) {
    const X *gate = at<X>(a.gate, row), *up = at<X>(a.up, row);
    const X* dout = static_cast<const X*>(a.dout) + row * a.width;
    X *dgate = at<X>(a.dgate, row), *dup = at<X>(a.dup, row);
    sweep<1>(a.width, [&](int64_t d, auto part, int) {
      prefetch(gate + d, kUnitsAhead);
      prefetch(up + d, kUnitsAhead);
      prefetch(dout + d, kUnitsAhead);
      const Vec z = load(gate + d, part) + load(bias.gate + d, part), g = load(dout + d, part);
      const Vec value = load(up + d, part) + load(bias.up + d, part);
      const Activated act = A::both(z);
      const Vec to_gate = g * value * act.slope, to_up = g * act.value;
      store(dgate + d, to_gate, part);
      store(dup + d, to_up, part);
      if (sums) {
        store(sums + d, load(sums + d, part) + to_gate, part);
        store(up_sums + d, load(up_sums + d, part) + to_up, part);
      }
    });
  }
}

// f(A{}, X{}) with the activation A and the storage type X.
template <class F>
INLINE void with_both(const Glu& a, F f) {
  with_type(a.type, [&](auto x) {
    with_activation<sizeof(x) == 4>(a.activation, [&](auto act) { f(act, x); });
  });
}

}  // namespace

void glu_rows(const Glu& a, int64_t begin, int64_t end, float* scratch) {
  const Biases bias(a, scratch);
  with_both(a, [&](auto act, auto x) {
    forward<decltype(act), decltype(x)>(a, begin, end, bias);
  });
}

void glu_backward_rows(const Glu& a, int64_t begin, int64_t end, float* sums, float* scratch) {
  const Biases bias(a, scratch);
  with_both(a, [&](auto act, auto x) {
    backward<decltype(act), decltype(x)>(a, begin, end, bias, sums);
  });
}

}  // namespace fastdit::FASTDIT_ISA
