// The direct call of unpatchify, for the dtypes of a model's tokens.
#include "cpu/direct.h"
#include "cpu/unpatchify_rows.h"

namespace fastdit::direct {

// tokens, patch, grid, channels
PyObject* unpatchify(PyObject*, PyObject* const* o, long count) {
  Operand tokens;
  int64_t patch[2], grid[2], channels;
  if (count != 4 || !tokens.read(o[0]) || tokens.t.ndim != 3 || !tokens.count() ||
      (tokens.t.strides[2] != 1 && tokens.size(2) != 1))
    return refuse();
  int64_t axes = 1;  // an int is the length of a signal
  if (!read_int(o[2], grid[0])) axes = python.PySequence_Size(o[2]);
  if (!read_sizes(o[2], axes, grid) || !read_sizes(o[1], axes, patch) || !read_int(o[3], channels))
    return refuse();
  const bool image = axes == 2;
  for (int64_t i = 0; i < axes; ++i)
    if (patch[i] < 1 || patch[i] > tokens.size(2) || grid[i] < 1 || grid[i] > tokens.size(1))
      return refuse();
  Layout l{tokens.size(0), channels,
           image ? grid[0] : 1, grid[axes - 1],
           image ? patch[0] : 1, patch[axes - 1]};
  if (channels < 1 || channels > tokens.size(2) ||
      !tokens.has_shape({l.samples, l.tokens(), l.token_width()}) || gradient_wanted ||
      !unobserved())
    return refuse();
  l.token_batch = tokens.t.strides[0], l.token = tokens.t.strides[1];
  l.row = l.width(), l.plane = l.height() * l.width(), l.image_batch = channels * l.plane;
  const int64_t shape[4] = {l.samples, channels, image ? l.height() : l.width(), l.width()};
  void* data = nullptr;
  PyObject* out = new_tensor(tokens, shape, int32_t(2 + axes), data);
  if (!out) return refuse();
  unlocked(tokens.count(),
           [&] { unpatchify_all(l, tokens.data(), data, tokens.type == Type::f32 ? 4 : 2); });
  return out;
}

}  // namespace fastdit::direct
