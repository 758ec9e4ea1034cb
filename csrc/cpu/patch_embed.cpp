// patch_embed on the CPU: the op around isa/patch_embed.cpp.
#include "cpu/patch_embed.h"

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdit {
namespace {

ScalarType wider(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

// x (B, C, H, W) or (B, C, L), weight (D, C, p, q) or (D, C, p), both contiguous.
PatchEmbed shapes_of(const Tensor& x, const Tensor& weight) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK((dims == 3 || dims == 4) && weight.dim() == dims, "x, weight: wrong shape");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: must have x's dtype");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight: wrong shape");
  for (int64_t axis = 2; axis < dims; ++axis)
    STD_TORCH_CHECK(weight.size(axis) > 0 && x.size(axis) % weight.size(axis) == 0,
                    "x: its sizes must be divisible by weight's");
  PatchEmbed a;
  a.type = type_of(x, "x");
  a.width = weight.size(0), a.channels = x.size(1);
  a.q = weight.size(dims - 1), a.columns = x.size(dims - 1) / a.q;
  a.p = dims == 4 ? weight.size(2) : 1, a.rows = dims == 4 ? x.size(2) / a.p : 1;
  return a;
}

// pos (T, D) or (1, T, D), any strides.
Modulation positions_of(const MaybeTensor& pos, const PatchEmbed& a) {
  if (!pos) return {};
  const bool batched = pos->dim() == 3;
  if (batched)
    check_shape(*pos, {1, a.tokens(), a.width}, "pos");
  else
    check_shape(*pos, {a.tokens(), a.width}, "pos");
  return {pos->data_ptr(), type_of(*pos, "pos"), 0, pos->stride(batched), pos->stride(batched + 1)};
}

Tensor patch_embed(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                   const MaybeTensor& pos) {
  const Tensor image = torch::stable::contiguous(x), taps = torch::stable::contiguous(weight);
  PatchEmbed a = shapes_of(image, taps);
  a.image = image.data_ptr();
  a.pos = positions_of(pos, a);
  if (bias)
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias: must have x's dtype");
  const ScalarType type = pos ? wider(x.scalar_type(), pos->scalar_type()) : x.scalar_type();
  Tensor out = empty({x.size(0), a.tokens(), a.width}, type);
  a.out = out.data_ptr();
  a.out_type = type_of(out, "out");
  const Tensor packed = empty({(a.taps() + 1) * a.stride()}, ScalarType::Float);
  pack_weight(a, taps.data_ptr(), parameter_of(bias, a.width, "bias"),
              static_cast<float*>(packed.data_ptr()));
  a.weight = static_cast<const float*>(packed.data_ptr());
  const int64_t count = x.size(0) * a.tokens(), blocks = (count + kBlock - 1) / kBlock;
  parallel_items(blocks, kBlock * a.width * (1 + a.taps() / 8), [&](int64_t begin, int64_t end) {
    patch_embed_blocks(a, begin, end, count, scratch_floats(a.scratch()));
  });
  return out;
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? pos) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&fastdit::patch_embed));
}
