// The activations of gated units and their derivatives: z·P(z) and P(z) + z·P'(z), where P is a
// symmetric distribution function, P(z) = 1 − P(−z). Each takes one exponential:
//
//   SiLU       e = e^−|z|       P(−|z|) = e/(1 + e)    P' = P(z)·P(−z)
//   tanh GELU  e = e^−t(|z|)    P(−|z|) = e/(1 + e)    P' = t'·P(z)·P(−z),  t as in gelu.h
//   GELU       e = e^(−z²/2)    P(−|z|) = e·Q(|z|)     P' = e/√(2π)
//
// The tail P(−|z|) is never 1 less something near 1, so that nothing cancels; 1 − P(−|z|) rounds to
// half of what 1/(1 + e) does. Where e is no normal number it is 0: there z·P(z) is below 10⁻³⁶.
#pragma once

#include "cpu/glu.h"
#include "cpu/isa/gelu.h"

namespace fastdit::FASTDIT_ISA {

// e^−x for 0 ≤ x ≤ 87.3, to an ulp or two of 1, as gelu.h has it.
INLINE Vec falling(Vec x) {
  const Vec high = all(0x1.715476p+0f / kUnit), low = all(0x1.4ae0cp-26f / kUnit);  // log₂e
  const Vec shifted = muladd(x, high, all(kShifter)), n = shifted - all(kShifter);
  return power(shifted, submul(submul(n, x, high), x, low)).value();
}

// `e` where |z| is up to `limit`, else 0; NaN stays.
INLINE Vec up_to(float limit, Vec z, Vec e) { return magnitude(z) > limit ? Vec{} : e; }

struct Activated {
  Vec value, slope;
};

// From the tail P(−|z|), and its derivative's magnitude.
INLINE Vec distribution(Vec z, Vec tail) { return z < 0 ? tail : 1 - tail; }
INLINE Activated activated(Vec z, Vec tail, Vec density) {
  const Vec p = distribution(z, tail);
  return {z * p, muladd(z, density, p)};
}

struct Silu {
  static INLINE Vec tail(Vec z) {
    const Vec e = up_to(87, z, falling(min(magnitude(z), all(87))));
    return quotient(e, e + 1);
  }
  static INLINE Vec value(Vec z) { return z * distribution(z, tail(z)); }
  static INLINE Activated both(Vec z) {
    const Vec t = tail(z);
    return activated(z, t, t * (1 - t));
  }
};

// `exact`: t to twice float's precision, as results in float32 need it.
template <bool exact>
struct GeluTanh {
  static INLINE Vec tail(Vec z, Vec a) {
    const Vec e = up_to(kLimit, z, exponential<exact>(a).value());
    return quotient(e, e + 1);
  }
  static INLINE Vec clamped(Vec z) { return min(magnitude(z), all(kLimit)); }
  static INLINE Vec value(Vec z) { return z * distribution(z, tail(z, clamped(z))); }
  static INLINE Activated both(Vec z) {
    const Vec a = clamped(z), t = tail(z, a);
    const Vec slope = muladd(a * a, all(0.21406444f), all(1.5957691f));
    return activated(z, t, t * (1 - t) * slope);
  }
};

// Q(a) = ½·erfc(a/√2)·e^(a²/2) is u·polynomial(u), u = 1/(1 + 11/32·a), minimax of the relative
// error, 2.3e-8, for a up to 14.
struct Gelu {
  static constexpr float kEnd = 13.19f;  // e is 2^−125.5
  static INLINE Vec clamped(Vec z) { return min(magnitude(z), all(kEnd)); }
  static INLINE Vec bell(Vec z, Vec a) { return up_to(kEnd, z, falling(a * a * 0.5f)); }
  static INLINE Vec ratio(Vec a) {
    const Vec u = quotient(all(1), muladd(a, all(0.34375f), all(1)));
    Vec m = muladd(all(-0.02780931f), u, all(0.14384907f));
    m = muladd(m, u, all(-0.2717139f));
    m = muladd(m, u, all(0.1909209f));
    m = muladd(m, u, all(-0.039307133f));
    m = muladd(m, u, all(0.11265798f));
    m = muladd(m, u, all(0.11674045f));
    m = muladd(m, u, all(0.13754228f));
    return muladd(m, u, all(0.13711967f)) * u;
  }
  static INLINE Vec value(Vec z) {
    const Vec a = clamped(z);
    return z * distribution(z, bell(z, a) * ratio(a));
  }
  static INLINE Activated both(Vec z) {
    const Vec a = clamped(z), e = bell(z, a);
    return activated(z, e * ratio(a), e * 0.3989423f);
  }
};

// f(A{}) with the activation A that `activation` names.
template <bool exact, class F>
INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::silu: return f(Silu{});
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh<exact>{});
  }
}

}  // namespace fastdit::FASTDIT_ISA
