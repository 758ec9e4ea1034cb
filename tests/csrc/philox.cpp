// Philox against published vectors and PyTorch's engine; the functions of scalar.h and philox.h
// against double precision, at every sixteenth float of their domains or closer.
#include <ATen/core/PhiloxRNGEngine.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdio>

#include "philox.h"

using namespace fastdit;

int failures = 0;

void check(bool good, const char* what, double value = 0) {
  if (!good) std::printf("wrong: %s %.9g\n", what, value), ++failures;
}

bool equal(Words a, Words b) {
  return a.w0 == b.w0 && a.w1 == b.w1 && a.w2 == b.w2 && a.w3 == b.w3;
}

void known_answers() {  // Random123's kat_vectors
  const uint32_t all = 0xFFFFFFFFu;
  check(equal(philox4x32_10({0, 0, 0, 0}, 0, 0),
              {0x6627E8D5u, 0xE169C58Du, 0xBC57AC4Cu, 0x9B00DBD8u}), "zeros");
  check(equal(philox4x32_10({all, all, all, all}, all, all),
              {0x408F276Du, 0x41C83B0Eu, 0xA20BC7C6u, 0x6D5451FDu}), "ones");
  check(equal(philox4x32_10({0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u}, 0xA4093822u,
                            0x299F31D0u),
              {0xD16CFE09u, 0x94FDCCEBu, 0x5001E420u, 0x24126EA1u}), "pi");
}

void torch_engine() {
  uint64_t state = 1;
  const auto draw = [&] { return state = state * 6364136223846793005u + 1442695040888963407u; };
  for (int i = 0; i < 1000; ++i) {
    const uint64_t seed = draw() ^ draw() >> 32, subsequence = draw(), group = draw() >> 40;
    at::philox_engine engine(seed, subsequence, group);
    const Words words = philox4x32_10({uint32_t(group), 0, uint32_t(subsequence),
                                       uint32_t(subsequence >> 32)}, uint32_t(seed),
                                      uint32_t(seed >> 32));
    for (const uint32_t word : {words.w0, words.w1, words.w2, words.w3}) {
      check(engine() == word, "at::philox_engine");
    }
  }
}

void functions() {
  double log_error = 0, exp_error = 0, turn_error = 0;
  for (uint32_t bits = as_bits(0x1p-33f); bits <= as_bits(1.0f); bits += 13) {
    const double truth = std::log(double(as_float(bits)));
    log_error = std::fmax(log_error, std::abs((log_unit(as_float(bits)) - truth) / truth));
  }
  check(log_unit(1.0f) == 0, "log 1");
  for (float x = -87; x < 88.7f; x += 0x1p-17f) {
    const double truth = std::exp(double(x));
    exp_error = std::fmax(exp_error, std::abs(exp_any(x) - truth) / truth);
  }
  for (int i = -(1 << 22); i <= 1 << 22; ++i) {
    const float r = float(i) * 0x1p-23f;
    float cosine, sine;
    cos_sin_quarter(r, cosine, sine);
    turn_error = std::fmax(turn_error, std::abs(cosine - std::cos(r * M_PI_2)));
    turn_error = std::fmax(turn_error, std::abs(sine - std::sin(r * M_PI_2)));
  }
  check(exp_any(100) == INFINITY && exp_any(INFINITY) == INFINITY, "exp overflows");
  check(exp_any(-110) == 0 && exp_any(-INFINITY) == 0, "exp underflows");
  check(std::isnan(exp_any(NAN)), "exp NaN");
  check(std::abs(exp_any(-100) / std::exp(-100.0) - 1) < 0.02, "exp subnormal", exp_any(-100));
  std::printf("relative error of log %.2g, exp %.2g; error of cos and sin %.2g\n", log_error,
              exp_error, turn_error);
  check(log_error < 1.5e-7 && exp_error < 2e-7 && turn_error < 1e-7, "polynomials");
}

void normal_numbers() {
  double error = 0, sum = 0, squares = 0;
  const int count = 1 << 20;
  const auto compare = [&](uint32_t radius, uint32_t angle) {
    const float u = float((double(radius) + 0.5) * 0x1p-32);
    check(uniform(radius) == u, "uniform", u);
    float z0, z1;
    box_muller(radius, angle, z0, z1);
    const double length = std::sqrt(-2 * std::log(double(u)));
    const double theta = double(angle) * 0x1p-31 * M_PI;
    error = std::fmax(error, std::abs(z0 - length * std::cos(theta)));
    error = std::fmax(error, std::abs(z1 - length * std::sin(theta)));
    sum += z0 + z1;
    squares += double(z0) * z0 + double(z1) * z1;
  };
  for (int i = 0; i < count; ++i) {
    const Words words = philox4x32_10({uint32_t(i), 1, 2, 3}, 4, 5);
    compare(words.w0, words.w1);
    compare(words.w2, words.w3);
  }
  check(std::abs(sum / (4.0 * count)) < 3e-3, "mean", sum / (4.0 * count));
  check(std::abs(squares / (4.0 * count) - 1) < 4e-3, "variance", squares / (4.0 * count));
  for (const uint32_t radius :
       {0u, 1u, 2u, 127u, 0x7FFFFFFFu, 0xFFFFFF00u, 0xFFFFFFFEu, 0xFFFFFFFFu}) {
    for (uint32_t angle = 0; angle < 0xFFFF0000u; angle += 0xFFFFu) compare(radius, angle);
    compare(radius, 0xFFFFFFFFu);
  }
  std::printf("error of a normal %.2g\n", error);
  check(error < 2e-6, "normals", error);
}

void conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const half h = {uint16_t(bits)};
    const float truth = c10::Half(uint16_t(bits), c10::Half::from_bits());
    check(as_bits(to_float(h)) == as_bits(truth) || std::isnan(truth), "half to float", bits);
    check(!std::isnan(truth) || std::isnan(to_float(h)), "half NaN", bits);
  }
  const auto compare = [](uint32_t bits) {
    const float value = as_float(bits);
    half h;
    bfloat16 b;
    from_float(value, h);
    from_float(value, b);
    if (std::isnan(value)) {
      check(std::isnan(to_float(h)) && std::isnan(to_float(b)), "NaN", bits);
    } else {
      check(h.bits == c10::Half(value).x, "float to half", value);
      check(b.bits == c10::BFloat16(value).x, "float to bfloat16", value);
    }
  };
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 257) compare(uint32_t(bits));
  for (uint32_t bits = 0; bits < 65536; ++bits) {  // around every half, and halfway
    const uint32_t centre = as_bits(c10::Half(uint16_t(bits), c10::Half::from_bits()));
    for (uint32_t near = 0; near < 3; ++near) {
      compare(centre + near - 1);
      compare(centre + 0x1000u + near - 1);
    }
  }
}

int main() {
  known_answers();
  torch_engine();
  functions();
  normal_numbers();
  conversions();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
