// Direct calls of adaln, gated_adaln, gated_residual and bias_gelu.
#include "cpu/adaln.h"
#include "cpu/bias_gelu.h"
#include "cpu/direct.h"
#include "cpu/gated_residual.h"

namespace fastdit::direct {
namespace {

// x (B, N, D), not empty and contiguous, whose result is to be like it.
bool read_stream(PyObject* object, Operand& x) {
  return x.read(object) && x.t.ndim == 3 && x.count() && x.contiguous();
}

bool read_modulation(PyObject* object, const Operand& x, Modulation& to) {
  if (object == constants.none) return true;
  Operand m;
  if (!m.read(object)) return false;
  const int64_t* strides = m.t.strides;
  if (m.has_shape({x.size(0), x.size(2)}))
    to = {m.data(), m.type, strides[0], 0, strides[1]};
  else if (m.has_shape({x.size(0), x.size(1), x.size(2)}))
    to = {m.data(), m.type, strides[0], strides[1], strides[2]};
  else
    return false;
  return true;
}

bool read_parameter(PyObject* object, int64_t width, Modulation& to) {
  if (object == constants.none) return true;
  Operand p;
  if (!p.read(object) || !p.has_shape({width})) return false;
  to = {p.data(), p.type, 0, 0, p.t.strides[0]};
  return true;
}

// shift, scale, weight, bias, eps, norm, plus_one
bool read_options(PyObject* const* o, const Operand& x, Adaln& a) {
  const int64_t width = x.size(2);
  if (!read_modulation(o[0], x, a.shift) || !read_modulation(o[1], x, a.scale) ||
      !read_parameter(o[2], width, a.weight) || !read_parameter(o[3], width, a.bias))
    return false;
  a.rms = o[5] == constants.rms;
  if ((!a.rms && o[5] != constants.layer) || (o[6] != constants.yes && o[6] != constants.no))
    return false;
  if (a.bias && (a.rms || !a.weight)) return false;
  if ((a.weight && a.weight.type != x.type) || (a.bias && a.bias.type != x.type)) return false;
  const double eps = python.PyFloat_AsDouble(o[4]);
  if (!(eps >= 0) || python.PyErr_Occurred()) return false;
  a.eps = float(eps), a.plus = o[6] == constants.yes ? 1 : 0;
  a.x = x.rows(), a.tokens = x.size(1), a.width = width;
  return true;
}

void run_rows(const Adaln& a, int64_t batch) {
  unlocked(batch * a.tokens * a.width, [&] { adaln_all(a, batch); });
}

// y (B, N, D) with dense rows, and a gate.
bool read_branch(PyObject* const* o, const Operand& x, Operand& y, Modulation& gate) {
  return y.read(o[0]) && y.has_shape({x.size(0), x.size(1), x.size(2)}) &&
         (y.t.strides[2] == 1 || y.size(2) == 1) && o[1] != constants.none &&
         read_modulation(o[1], x, gate);
}

}  // namespace

PyObject* adaln(PyObject*, PyObject* const* o, long count) {
  Operand x;
  Adaln a;
  if (count != 8 || !read_stream(o[0], x) || !read_options(o + 1, x, a) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  PyObject* out = new_like(o[0], x, a.out);
  if (!out) return refuse();
  run_rows(a, x.size(0));
  return out;
}

PyObject* gated_adaln(PyObject*, PyObject* const* o, long count) {
  Operand x, y;
  Adaln a;
  if (count != 10 || !read_stream(o[0], x) || !read_branch(o + 1, x, y, a.gate) ||
      !read_options(o + 3, x, a) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  a.y = y.rows();
  PyObject *h = new_like(o[0], x, a.h), *out = h ? new_like(o[0], x, a.out) : nullptr;
  if (out) run_rows(a, x.size(0));
  PyObject* both = pair(h, out);
  return both ? both : refuse();
}

PyObject* gated_residual(PyObject*, PyObject* const* o, long count) {
  Operand x, y;
  GatedResidual a;
  if (count != 3 || !read_stream(o[0], x) || !read_branch(o + 1, x, y, a.gate) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  PyObject* out = new_like(o[0], x, a.out);
  if (!out) return refuse();
  a.x = x.rows(), a.y = y.rows(), a.tokens = x.size(1), a.width = x.size(2);
  unlocked(x.count(), [&] { gated_residual_all(a, x.size(0)); });
  return out;
}

PyObject* bias_gelu(PyObject*, PyObject* const* o, long count) {
  Operand x;
  BiasGelu a;
  if (count != 2 || !x.read(o[0]) || x.t.ndim < 1 || x.t.ndim > 8 || !x.count() || !x.contiguous())
    return refuse();
  a.width = x.size(x.t.ndim - 1);
  if (o[1] == constants.none || !read_parameter(o[1], a.width, a.bias) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  PyObject* out = new_like(o[0], x, a.out);
  if (!out) return refuse();
  a.x = x.data(), a.type = x.type;
  unlocked(8 * x.count(), [&] { bias_gelu_all(a, x.count() / a.width); });
  return out;
}

}  // namespace fastdit::direct
