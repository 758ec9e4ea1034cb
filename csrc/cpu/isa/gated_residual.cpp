// gated_residual and its backward: each tensor moved once.
#include "cpu/gated_residual.h"

#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

// y is read as X where it is stored so, else as the floats that `branch` got.
template <class X, class Y>
FLATTEN void forward(const GatedResidual& a, int64_t begin, int64_t end, float* scratch) {
  float* branch = scratch + scratch_row(a.width);
  const float* gate = nullptr;
  int64_t b = begin / a.tokens, n = begin % a.tokens;
  for (int64_t row = begin; row < end; ++row) {
    if (!gate || n == 0 || a.gate.token) gate = floats(a.gate, b, n, a.width, scratch);
    const X* x = row_of<X>(a.x, b, n);
    const Y* y = row_of<Y>(a.y, b, n);
    if constexpr (__is_same(Y, float)) y = floats(modulation(a.y), b, n, a.width, branch);
    X* out = static_cast<X*>(a.out) + row * a.width;
    sweep(a.width, [&](int64_t d, auto part, int) {
      const Vec v = muladd(load(gate + d, part), load(y + d, part), load(x + d, part));
      store(out + d, v, part);
    });
    if (++n == a.tokens) n = 0, ++b;
  }
}

template <class Y>
FLATTEN void backward(const GatedResidual& a, int64_t begin, int64_t end, float* sums,
                      float* scratch) {
  float *incoming = scratch + scratch_row(a.width), *product = incoming + scratch_row(a.width);
  const int64_t b = begin / a.tokens;
  const float* gate = nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row - b * a.tokens;
    if (!gate || a.gate.token) gate = floats(a.gate, b, n, a.width, scratch);
    const float* dout = floats(modulation(a.x), b, n, a.width, incoming);
    const Y* y = row_of<Y>(a.y, b, n);
    Y* dy = static_cast<Y*>(a.out) + row * a.width;
    float* dgate = a.dgate ? product : sums;
    sweep(a.width, [&](int64_t d, auto part, int) {
      const Vec g = load(dout + d, part);
      store(dy + d, load(gate + d, part) * g, part);
      const Vec before = a.dgate ? Vec{} : load(dgate + d, part);
      store(dgate + d, muladd(g, load(y + d, part), before), part);
    });
    if (a.dgate) store_row(product, a.width, a.dgate, row, a.gate.type);
  }
}

}  // namespace

void gated_residual_rows(const GatedResidual& a, int64_t begin, int64_t end, float* scratch) {
  with_type(a.x.type, [&](auto x) {
    using X = decltype(x);
    if (a.y.type == a.x.type) return forward<X, X>(a, begin, end, scratch);
    forward<X, float>(a, begin, end, scratch);
  });
}

void gated_residual_backward_rows(const GatedResidual& a, int64_t begin, int64_t end, float* sums,
                                  float* scratch) {
  with_type(a.y.type, [&](auto y) { backward<decltype(y)>(a, begin, end, sums, scratch); });
}

}  // namespace fastdit::FASTDIT_ISA
