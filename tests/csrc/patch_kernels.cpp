// The kernels of patch_embed and unpatchify on buffers of exactly their size, for the sanitizers,
// against plain loops in float64. Compiled for one instruction set: FASTDIT_ISA and its flags.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/isa/patch_embed.cpp"
#include "cpu/isa/patch_embed_backward.cpp"
#include "cpu/unpatchify_rows.h"

using namespace fastdit;
namespace isa = fastdit::FASTDIT_ISA;
using Floats = std::vector<float>;

uint32_t state = 1;
Floats random(int64_t count) {
  Floats values(count);
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = float(state >> 8) / float(1 << 23) - 1;
  }
  return values;
}

void expect(double got, double want, const char* what) {
  if (std::fabs(got - want) <= 2e-5 * (1 + std::fabs(want))) return;
  std::printf("%s: got %g, want %g\n", what, got, want);
  std::exit(1);
}

// x (samples, channels, rows·p, columns·q), weight (width, channels·p·q).
void patch_embed(int64_t samples, int64_t channels, int64_t p, int64_t q, int64_t rows,
                 int64_t columns, int64_t width) {
  Patches x;
  x.channels = channels, x.patch_rows = p, x.patch_columns = q;
  x.grid_rows = rows, x.grid_columns = columns;
  x.column = 1, x.row = columns * q, x.channel = rows * p * x.row, x.batch = channels * x.channel;
  const int64_t tokens = x.tokens(), size = x.size(), all = samples * tokens;
  Floats image = random(samples * x.batch), weight = random(width * size), bias = random(width);
  Floats pos = random(tokens * width), grads = random(all * width), out(all * width);
  x.data = image.data();
  const auto pixel = [&](int64_t token, int64_t k) {
    const int64_t n = token % tokens, i = k / q % p, j = k % q;
    return &image[token / tokens * x.batch + k / (p * q) * x.channel +
                  (n / columns * p + i) * x.row + n % columns * q + j];
  };

  PatchEmbed a;
  a.x = x, a.weight = weight.data(), a.bias = bias.data(), a.tokens = out.data();
  a.pos.data = pos.data(), a.pos.token = width, a.samples = samples, a.width = width;
  const int64_t padded = rounded_up(width, kWidth);
  Floats panels(padded * size), biases(padded), scratch(kTokens * size);
  a.panels = panels.data(), a.biases = biases.data();
  isa::pack_panels(a, 0, padded / kWidth);
  isa::embed_tokens(a, 0, all, scratch.data());
  for (int64_t t = 0; t < all; ++t)
    for (int64_t d = 0; d < width; ++d) {
      double want = double(bias[d]) + pos[t % tokens * width + d];
      for (int64_t k = 0; k < size; ++k) want += double(*pixel(t, k)) * weight[d * size + k];
      expect(out[t * width + d], want, "tokens");
    }

  Floats dx(image.size()), dweight(weight.size()), dbias(width), dpos(pos.size());
  Floats patches(all * rounded_up(size, kTokens)), weight_rows(width * rounded_up(size, kWidth));
  Floats image_memory(image_scratch(size));
  Floats parameter_memory(parameter_scratch(rounded_up(size, kTokens)));
  PatchEmbedBackward b;
  b.dtokens = {grads.data(), Type::f32, tokens * width, width};
  b.x = b.dx = x, b.dx.data = dx.data(), b.weight = weight.data();
  b.dweight = dweight.data(), b.dbias = dbias.data(), b.dpos = dpos.data();
  b.samples = samples, b.width = width;
  b.patches = patches.data(), b.weight_rows = weight_rows.data();
  isa::gather_patches(b, 0, all);
  isa::pack_weight_rows(b, 0, width);
  isa::embed_image_gradient(b, 0, all, image_memory.data());
  isa::embed_parameter_gradients(b, 0, padded / kWidth, parameter_memory.data());
  for (int64_t t = 0; t < all; ++t)
    for (int64_t k = 0; k < size; ++k) {
      double want = 0;
      for (int64_t d = 0; d < width; ++d) want += double(grads[t * width + d]) * weight[d * size + k];
      expect(dx[pixel(t, k) - image.data()], want, "dx");
    }
  for (int64_t d = 0; d < width; ++d) {
    double sum = 0;
    for (int64_t t = 0; t < all; ++t) sum += grads[t * width + d];
    expect(dbias[d], sum, "dbias");
    for (int64_t k = 0; k < size; ++k) {
      double want = 0;
      for (int64_t t = 0; t < all; ++t) want += double(grads[t * width + d]) * *pixel(t, k);
      expect(dweight[d * size + k], want, "dweight");
    }
    for (int64_t n = 0; n < tokens; ++n) {
      double want = 0;
      for (int64_t s = 0; s < samples; ++s) want += grads[(s * tokens + n) * width + d];
      expect(dpos[n * width + d], want, "dpos");
    }
  }
}

template <class T>
void unpatchify(int64_t samples, int64_t channels, int64_t p, int64_t q, int64_t rows,
                int64_t columns) {
  Layout l{samples, channels, rows, columns, p, q};
  l.token = l.token_width(), l.token_batch = l.tokens() * l.token;
  l.row = l.width(), l.plane = l.height() * l.width(), l.image_batch = channels * l.plane;
  std::vector<T> tokens(samples * l.token_batch), image(tokens.size()), back(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = T(i * 2654435761u);
  const int64_t items = samples * rows * l.chunks();
  move_rows<T, true>(l, tokens.data(), image.data(), 0, items);
  move_rows<T, false>(l, back.data(), image.data(), 0, items);
  for (int64_t i = 0; i < int64_t(tokens.size()); ++i) {
    const int64_t c = i % channels, j = i / channels % q, k = i / (channels * q) % p;
    const int64_t n = i / l.token % l.tokens(), s = i / l.token_batch;
    const int64_t row = n / columns * p + k, column = n % columns * q + j;
    expect(image[s * l.image_batch + c * l.plane + row * l.row + column], tokens[i], "image");
    expect(back[i], tokens[i], "rows");
  }
}

int main() {
  for (int64_t width : {1, 31, 33, 70, 300}) {
    patch_embed(2, 3, 2, 2, 3, 5, width);
    patch_embed(9, 1, 1, 1, 1, 1, width);
    patch_embed(1, 2, 1, 17, 1, 7, width);
    patch_embed(1, 5, 4, 2, 9, 4, width);
  }
  patch_embed(1, 8, 8, 8, 2, 2, 40);
  for (int64_t channels : {1, 2, 3, 4, 5, 8, 11, 16, 21})
    for (int64_t columns : {1, 3, 8, 13}) {
      unpatchify<uint8_t>(2, channels, 2, 3, 3, columns);
      unpatchify<uint16_t>(2, channels, 2, 3, 3, columns);
      unpatchify<uint32_t>(2, channels, 2, 3, 3, columns);
      unpatchify<uint64_t>(2, channels, 2, 3, 3, columns);
    }
  unpatchify<uint16_t>(1, 3, 1, 3, 1, 1000);
  std::puts("exact");
}
