// unpatchify and its backward as ops on CPU tensors; unpatchify_rows.h does the work.
#include "cpu/unpatchify_rows.h"

#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdit {
namespace {

using Sizes = std::vector<int64_t>;

template <bool to_image>
void move_all(const Layout& l, void* tokens, void* image, int64_t bytes) {
  const int64_t items = l.samples * l.grid_rows * l.chunks();
  const int64_t width = std::min(kPixels, l.width()) * l.patch_rows * l.channels;
  parallel_items(items, width, [&](int64_t begin, int64_t end) {
    const auto run = [&](auto number) {
      using T = decltype(number);
      move_rows<T, to_image>(l, static_cast<T*>(tokens), static_cast<T*>(image), begin, end);
    };
    switch (bytes) {
      case 1: return run(uint8_t{});
      case 2: return run(uint16_t{});
      case 4: return run(uint32_t{});
      default: return run(uint64_t{});
    }
  });
}

}  // namespace

void unpatchify_all(const Layout& l, void* tokens, void* image, int64_t bytes) {
  move_all<true>(l, tokens, image, bytes);
}

namespace {

// ---- the ops -------------------------------------------------------------------------------------

int64_t bytes_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": is not on the CPU");
  const int64_t bytes = t.element_size();
  STD_TORCH_CHECK(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, name, ": got numbers of ",
                  bytes, " bytes, allowed are 1, 2, 4 and 8");
  return bytes;
}

Layout layout_of(int64_t samples, const Sizes& patch, const Sizes& grid, int64_t channels) {
  STD_TORCH_CHECK(grid.size() == 1 || grid.size() == 2, "grid: allowed are one or two positive ints");
  STD_TORCH_CHECK(patch.size() == grid.size(), "patch: allowed is one for each axis of grid");
  for (size_t axis = 0; axis < grid.size(); ++axis)
    STD_TORCH_CHECK(patch[axis] > 0 && grid[axis] > 0, "patch, grid: allowed are positive ints");
  STD_TORCH_CHECK(channels > 0, "channels: got ", channels, ", allowed is a positive int");
  const bool image = grid.size() == 2;
  return {samples, channels, image ? grid[0] : 1, grid.back(), image ? patch[0] : 1, patch.back()};
}

Tensor unpatchify(const Tensor& tokens, const Sizes& patch, const Sizes& grid, int64_t channels) {
  STD_TORCH_CHECK(tokens.dim() == 3, "tokens: wrong shape");
  Layout l = layout_of(tokens.size(0), patch, grid, channels);
  check_shape(tokens, {l.samples, l.tokens(), l.token_width()}, "tokens");
  const int64_t bytes = bytes_of(tokens, "tokens");
  const Tensor rows = dense_rows(tokens);
  const ScalarType type = tokens.scalar_type();
  Tensor image = grid.size() == 2 ? empty({l.samples, channels, l.height(), l.width()}, type)
                                  : empty({l.samples, channels, l.width()}, type);
  l.token_batch = rows.stride(0), l.token = rows.stride(1);
  l.row = l.width(), l.plane = l.height() * l.width(), l.image_batch = channels * l.plane;
  unpatchify_all(l, rows.data_ptr(), image.data_ptr(), bytes);
  return image;
}

Tensor unpatchify_backward(const Tensor& dimage, const Sizes& patch, const Sizes& grid,
                           int64_t channels) {
  STD_TORCH_CHECK(dimage.dim() == int64_t(2 + grid.size()), "dimage: wrong shape");
  Layout l = layout_of(dimage.size(0), patch, grid, channels);
  if (grid.size() == 2) {
    check_shape(dimage, {l.samples, channels, l.height(), l.width()}, "dimage");
  } else {
    check_shape(dimage, {l.samples, channels, l.width()}, "dimage");
  }
  const int64_t bytes = bytes_of(dimage, "dimage");
  const Tensor image = dense_rows(dimage);
  Tensor tokens = empty({l.samples, l.tokens(), l.token_width()}, dimage.scalar_type());
  l.token = l.token_width(), l.token_batch = l.tokens() * l.token;
  l.image_batch = image.stride(0), l.plane = image.stride(1), l.row = image.stride(2);
  move_all<false>(l, tokens.data_ptr(), image.data_ptr(), bytes);
  return tokens;
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("unpatchify(Tensor tokens, int[] patch, int[] grid, int channels) -> Tensor");
  m.def("unpatchify_backward(Tensor dimage, int[] patch, int[] grid, int channels) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("unpatchify", TORCH_BOX(&fastdit::unpatchify));
  m.impl("unpatchify_backward", TORCH_BOX(&fastdit::unpatchify_backward));
}
