// Direct calls of adaln, gated_adaln, gated_residual and bias_gelu.
#include "cpu/adaln.h"
#include "cpu/bias_gelu.h"
#include "cpu/direct.h"
#include "cpu/gated_residual.h"

namespace fastdit::direct {
namespace {

// x (B, N, D), not empty and contiguous, whose result is to be like it.
bool read_stream(PyObject* object, Operand& x, Inputs& inputs) {
  if (!x.read(object) || x.t.ndim != 3 || !x.count() || !x.contiguous()) return false;
  inputs.add(x.t, true);
  return true;
}

bool read_modulation(PyObject* object, const Operand& x, Modulation& to, Inputs& inputs) {
  if (object == constants.none) return true;
  Operand m;
  if (!m.read(object)) return false;
  inputs.add(m.t);
  const int64_t* strides = m.t.strides;
  if (m.has_shape({x.size(0), x.size(2)}))
    to = {m.data(), m.type, strides[0], 0, strides[1]};
  else if (m.has_shape({x.size(0), x.size(1), x.size(2)}))
    to = {m.data(), m.type, strides[0], strides[1], strides[2]};
  else
    return false;
  return true;
}

bool read_parameter(PyObject* object, int64_t width, Modulation& to, Inputs& inputs) {
  if (object == constants.none) return true;
  Operand p;
  if (!p.read(object) || !p.has_shape({width})) return false;
  inputs.add(p.t);
  to = {p.data(), p.type, 0, 0, p.t.strides[0]};
  return true;
}

// shift, scale, weight, bias, eps, norm, plus_one
bool read_options(PyObject* const* o, const Operand& x, Adaln& a, Inputs& inputs) {
  const int64_t width = x.size(2);
  if (!read_modulation(o[0], x, a.shift, inputs) || !read_modulation(o[1], x, a.scale, inputs) ||
      !read_parameter(o[2], width, a.weight, inputs) ||
      !read_parameter(o[3], width, a.bias, inputs))
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
bool read_branch(PyObject* const* o, const Operand& x, Operand& y, Modulation& gate,
                 Inputs& inputs) {
  if (!y.read(o[0]) || !y.has_shape({x.size(0), x.size(1), x.size(2)}) ||
      (y.t.strides[2] != 1 && y.size(2) != 1))
    return false;
  inputs.add(y.t, y.type == x.type && y.contiguous());
  return o[1] != constants.none && read_modulation(o[1], x, gate, inputs);
}

// The tensors given for results, behind `expected` other arguments; None where there is no such.
PyObject* given(PyObject* const* o, long count, long expected) {
  return count > expected ? o[expected] : constants.none;
}

bool counts(long count, long expected) { return count == expected || count == expected + 1; }

}  // namespace

PyObject* adaln(PyObject*, PyObject* const* o, long count) {
  Operand x;
  Inputs inputs;
  Result out;
  Adaln a;
  if (!counts(count, 8) || !read_stream(o[0], x, inputs) || !read_options(o + 1, x, a, inputs) ||
      !out.read(given(o, count, 8), o[0], x, inputs) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  a.out = written(out) ? out.make(o[0], x) : nullptr;
  if (!a.out) return refuse();
  run_rows(a, x.size(0));
  return out.release();
}

PyObject* gated_adaln(PyObject*, PyObject* const* o, long count) {
  Operand x, y;
  Inputs inputs;
  Result h, out;
  Adaln a;
  if (!counts(count, 10) || !read_stream(o[0], x, inputs) ||
      !read_branch(o + 1, x, y, a.gate, inputs) || !read_options(o + 3, x, a, inputs))
    return refuse();
  PyObject* both = given(o, count, 10);
  if (!read_pair(both, o[0], x, inputs, h, out) || h.given() != out.given() || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  if (h.given() && (python.Py_IncRef(both), !written(both))) return refuse();
  a.y = y.rows();
  a.h = h.make(o[0], x), a.out = a.h ? out.make(o[0], x) : nullptr;
  if (!a.out) return refuse();
  run_rows(a, x.size(0));
  return pair(h.release(), out.release());
}

PyObject* gated_residual(PyObject*, PyObject* const* o, long count) {
  Operand x, y;
  Inputs inputs;
  Result out;
  GatedResidual a;
  if (!counts(count, 3) || !read_stream(o[0], x, inputs) ||
      !read_branch(o + 1, x, y, a.gate, inputs) ||
      !out.read(given(o, count, 3), o[0], x, inputs) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  a.out = written(out) ? out.make(o[0], x) : nullptr;
  if (!a.out) return refuse();
  a.x = x.rows(), a.y = y.rows(), a.tokens = x.size(1), a.width = x.size(2);
  unlocked(x.count(), [&] { gated_residual_all(a, x.size(0)); });
  return out.release();
}

PyObject* bias_gelu(PyObject*, PyObject* const* o, long count) {
  Operand x;
  Inputs inputs;
  Result out;
  BiasGelu a;
  if (!counts(count, 2) || !x.read(o[0]) || x.t.ndim < 1 || x.t.ndim > 8 || !x.count() ||
      !x.contiguous())
    return refuse();
  inputs.add(x.t, true);
  a.width = x.size(x.t.ndim - 1);
  if (o[1] == constants.none || !read_parameter(o[1], a.width, a.bias, inputs) ||
      !out.read(given(o, count, 2), o[0], x, inputs) || !unobserved())
    return refuse();
  if (PyObject* left = left_to_autograd()) return left;
  a.out = written(out) ? out.make(o[0], x) : nullptr;
  if (!a.out) return refuse();
  a.x = x.data(), a.type = x.type;
  unlocked(8 * x.count(), [&] { bias_gelu_all(a, x.count() / a.width); });
  return out.release();
}

}  // namespace fastdit::direct
