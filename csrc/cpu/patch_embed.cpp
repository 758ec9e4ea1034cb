// patch_embed and its backward as ops on CPU tensors; isa/patch_embed*.cpp do the work.
#include "cpu/patch_embed.h"

#include <tuple>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdit {
namespace {

Tensor floats(int64_t count) { return empty({count}, ScalarType::Float); }
float* data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
int64_t blocks(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The patches of x that a weight (D, C, p, q) or (D, C, p) sees, after checking both shapes.
Patches patches_of(const Tensor& x, const Tensor& weight) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, "x: wrong shape");
  STD_TORCH_CHECK(weight.dim() == dim && weight.size(1) == x.size(1), "weight: wrong shape");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.is_cpu(),
                  "weight: wrong dtype or device");
  for (int64_t axis = 2; axis < dim; ++axis)
    STD_TORCH_CHECK(weight.size(axis) > 0 && x.size(axis) % weight.size(axis) == 0,
                    "x: its sizes are not divisible by those of weight");
  Patches p;
  p.data = x.data_ptr(), p.type = type_of(x, "x");
  p.batch = x.stride(0), p.channel = x.stride(1), p.column = x.stride(dim - 1);
  p.channels = x.size(1), p.patch_columns = weight.size(dim - 1);
  p.grid_columns = x.size(dim - 1) / p.patch_columns;
  if (dim == 4) {
    p.row = x.stride(2), p.patch_rows = weight.size(2);
    p.grid_rows = x.size(2) / p.patch_rows;
  }
  return p;
}

ScalarType wider(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// pos as rows (T, D), each dense.
Modulation pos_rows(const Tensor& pos, int64_t tokens, int64_t width) {
  if (pos.dim() == 3) {
    check_shape(pos, {1, tokens, width}, "pos");
  } else {
    check_shape(pos, {tokens, width}, "pos");
  }
  return {pos.data_ptr(), type_of(pos, "pos"), 0, pos.stride(pos.dim() - 2), 1};
}

// f(begin, end) over tokens, kTokens at a time; a token costs about D·K multiplications, of which
// 16 take as long as another op's element.
template <class F>
void parallel_tokens(int64_t tokens, int64_t width, int64_t size, const F& f) {
  const int64_t work = kTokens * width * (1 + size / 16);
  parallel_items(blocks(tokens, kTokens), work, [&](int64_t begin, int64_t end) {
    f(begin * kTokens, std::min(end * kTokens, tokens));
  });
}

Tensor patch_embed(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& pos) {
  PatchEmbed a;
  a.x = patches_of(x, weight);
  a.samples = x.size(0), a.width = weight.size(0);
  const int64_t size = a.x.size(), tokens = a.x.tokens();
  const Tensor kernel = dense(weight);
  a.weight = kernel.data_ptr();
  MaybeTensor offset, position;
  ScalarType type = x.scalar_type();
  if (bias) {
    check_shape(*bias, {a.width}, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == type && bias->is_cpu(), "bias: wrong dtype or device");
    offset = dense(*bias);
    a.bias = offset->data_ptr();
  }
  if (pos) {
    position = dense_rows(*pos);
    a.pos = pos_rows(*position, tokens, a.width);
    type = wider(type, pos->scalar_type());
  }
  Tensor out = empty({a.samples, tokens, a.width}, type);
  if (a.samples * tokens * a.width == 0) return out;
  a.tokens = out.data_ptr(), a.type = type_of(out, "tokens");
  const int64_t padded = rounded_up(a.width, kWidth);
  const Tensor panels = floats(padded * (size + 1));
  a.panels = data(panels), a.biases = a.panels + padded * size;
  parallel_items(padded / kWidth, kWidth * size,
                 [&](int64_t begin, int64_t end) { pack_panels(a, begin, end); });
  parallel_tokens(a.samples * tokens, a.width, size, [&](int64_t begin, int64_t end) {
    embed_tokens(a, begin, end, scratch_floats(kTokens * size));
  });
  return out;
}

// ---- backward ------------------------------------------------------------------------------------

void run_image_gradient(PatchEmbedBackward& a) {
  const int64_t size = a.dx.size(), stride = rounded_up(size, kWidth);
  const Tensor rows = floats(a.width * stride);
  a.weight_rows = data(rows);
  parallel_items(a.width, stride,
                 [&](int64_t begin, int64_t end) { pack_weight_rows(a, begin, end); });
  parallel_tokens(a.samples * a.dx.tokens(), a.width, size, [&](int64_t begin, int64_t end) {
    embed_image_gradient(a, begin, end, scratch_floats(image_scratch(size)));
  });
}

void run_parameter_gradients(PatchEmbedBackward a) {
  const int64_t tokens = a.samples * a.dx.tokens(), size = a.dx.size();
  const int64_t rows = a.dweight ? rounded_up(size, kTokens) : 0;
  const Tensor patches = floats(tokens * rows);
  a.patches = data(patches);
  if (a.dweight)
    parallel_items(tokens, rows, [&](int64_t begin, int64_t end) { gather_patches(a, begin, end); });
  if (!a.dpos && a.dtokens.batch == a.dx.tokens() * a.dtokens.token) {
    // Only dpos tells samples apart: one long sample has full blocks.
    a.dx.grid_rows = a.samples * a.dx.grid_rows;
    a.samples = 1;
  }
  const int64_t units = blocks(a.width, kWidth);
  parallel_items(units, kWidth * tokens * (1 + rows / 16), [&](int64_t begin, int64_t end) {
    embed_parameter_gradients(a, begin, end, scratch_floats(parameter_scratch(rows)));
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor zeros_like(const Tensor& t) {
  Tensor result = torch::stable::new_empty(t, t.sizes());
  torch::stable::zero_(result);
  return result;
}

Gradients patch_embed_backward(const Tensor& dtokens, const Tensor& x, const Tensor& weight,
                               const MaybeTensor& bias, const MaybeTensor& pos, bool want_x,
                               bool want_weight, bool want_bias, bool want_pos) {
  PatchEmbedBackward a;
  a.x = a.dx = patches_of(x, weight);
  a.samples = x.size(0), a.width = weight.size(0);
  check_shape(dtokens, {a.samples, a.x.tokens(), a.width}, "dtokens");
  if (want_bias) {
    STD_TORCH_CHECK(bias, "bias: its gradient is asked for, and it is absent");
    check_shape(*bias, {a.width}, "bias");
  }
  if (want_pos) {
    STD_TORCH_CHECK(pos, "pos: its gradient is asked for, and it is absent");
    pos_rows(*pos, a.x.tokens(), a.width);
  }
  const Tensor grads = dense_rows(dtokens), kernel = dense(weight);
  a.dtokens = rows_of(grads, "dtokens");
  a.weight = kernel.data_ptr();
  const bool none = a.samples * a.x.tokens() * a.width == 0;
  const auto result = [&](bool wanted, const MaybeTensor& like) {
    if (!wanted) return empty({0}, dtokens.scalar_type());
    Tensor gradient = dense_like(*like);
    if (none) torch::stable::zero_(gradient);
    return gradient;
  };
  Tensor dx = result(want_x, x), dweight = result(want_weight, weight);
  Tensor dbias = result(want_bias, bias), dpos = result(want_pos, pos);
  if (none) return {dx, dweight, dbias, dpos};
  if (want_x) {
    a.dx = patches_of(dx, weight);
    run_image_gradient(a);
  }
  if (want_weight) a.dweight = dweight.data_ptr(), a.weight_type = type_of(dweight, "weight");
  if (want_bias) a.dbias = dbias.data_ptr(), a.bias_type = type_of(dbias, "bias");
  if (want_pos) a.dpos = dpos.data_ptr(), a.pos_type = type_of(dpos, "pos");
  if (want_weight || want_bias || want_pos) run_parameter_gradients(a);
  return {dx, dweight, dbias, dpos};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? pos) -> Tensor");
  m.def(
      "patch_embed_backward(Tensor dtokens, Tensor x, Tensor weight, Tensor? bias, Tensor? pos, "
      "bool want_x, bool want_weight, bool want_bias, bool want_pos) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&fastdit::patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&fastdit::patch_embed_backward));
}
