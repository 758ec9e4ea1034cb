// The direct call of glu: gate and up in rows any stride apart, packed or two tensors.
#include "cpu/direct.h"
#include "cpu/glu.h"

namespace fastdit::direct {
namespace {

// By identity, as a program's own words have it; by their letters those that a file spelled.
bool read_activation(PyObject* name, Activation& to) {
  PyObject* const names[] = {constants.silu, constants.gelu, constants.gelu_tanh};
  for (int8_t i = 0; i < 3; ++i)
    if (name == names[i]) return to = Activation(i), true;
  for (int8_t i = 0; i < 3; ++i)
    if (python.PyObject_RichCompareBool(name, names[i], kEqual) == 1)
      return to = Activation(i), true;
  return false;
}

// (..., width), not empty, with dense rows one stride apart.
bool read_rows(PyObject* object, Operand& t, Strided& rows) {
  if (!t.read(object) || t.t.ndim < 1 || t.t.ndim > 8 || !t.count()) return false;
  rows = {t.data(), stride_of_rows(t.t.shape, t.t.strides, t.t.ndim)};
  return rows.stride >= 0;
}

// Gate and up side by side, and their bias or None.
bool read_packed(PyObject* bias, const Operand& x, Strided rows, bool gate_first, Glu& a,
                 Inputs& inputs) {
  const int64_t last = x.size(x.t.ndim - 1);
  if (last % 2) return false;
  a.width = last / 2;
  inputs.add(x.t);
  split(a, rows, gate_first, a.gate, a.up);
  if (bias == constants.none) return true;
  Operand b;
  if (!b.read(bias) || !b.has_shape({last})) return false;
  inputs.add(b.t);
  split_bias(a, {b.data(), b.type, 0, 0, b.t.strides[0]}, gate_first);
  return true;
}

// The gate's rows and another tensor's. Where both are dense a result may replace either.
bool read_apart(PyObject* other, const Operand& x, Strided gate, Glu& a, Inputs& inputs) {
  Operand up;
  if (!read_rows(other, up, a.up) || !up.same_as(x)) return false;
  inputs.add(x.t, x.contiguous());
  inputs.add(up.t, up.contiguous());
  a.gate = gate, a.width = x.size(x.t.ndim - 1);
  return true;
}

}  // namespace

// x, up, bias, activation, gate_first, out
PyObject* glu(PyObject*, PyObject* const* o, long count) {
  if (count != 5 && count != 6) return refuse();
  Operand x;
  Inputs inputs;
  Glu a;
  Strided rows;
  const bool packed = o[1] == constants.none, gate_first = o[4] == constants.yes;
  if (!read_activation(o[3], a.activation) || (!gate_first && o[4] != constants.no) ||
      !read_rows(o[0], x, rows))
    return refuse();
  a.type = x.type;
  if (!(packed ? read_packed(o[2], x, rows, gate_first, a, inputs)
               : o[2] == constants.none && gate_first && read_apart(o[1], x, rows, a, inputs)))
    return refuse();
  // What a dense result is like: x, or half as wide.
  int64_t shape[8];
  Operand like = x;
  std::memcpy(shape, x.t.shape, x.t.ndim * sizeof(int64_t));
  shape[x.t.ndim - 1] = a.width;
  like.t.shape = shape;
  PyObject* const same = !packed && x.contiguous() ? o[0] : nullptr;
  Result out;
  if (!out.read(count == 6 ? o[5] : constants.none, same, like, inputs) ||
      (!out.given() && !same && constants.empty_strided == constants.none) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  a.out = written(out) ? out.make(same, like) : nullptr;
  if (!a.out) return refuse();
  const int64_t total = like.count();
  unlocked(kGluWork * total, [&] { glu_all(a, total / a.width); });
  return out.release();
}

}  // namespace fastdit::direct
