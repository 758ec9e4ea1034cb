// Direct calls: from Python's objects to a kernel, without PyTorch's dispatcher.
//
// At 2×16×192 the arithmetic of adaln takes a microsecond, the dispatcher's way to it (boxing
// eight arguments and three results) five. A direct call reads the tensors through DLPack's exchange
// table, 50 ns each, and asks PyTorch for the result alone. It runs only where nobody could tell the
// difference: plain CPU tensors of the dtypes and shapes that the op allows, nothing to
// differentiate, no mode, transform, trace or profiler that wants to see the op. Otherwise it
// returns, having done nothing, NotImplemented where only autograd has to see the call, whose
// arguments are in order, and None elsewhere: the ordinary call follows.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <initializer_list>

#include "cpu/parallel.h"
#include "cpu/types.h"
#include "dlpack.h"
#include "python.h"

namespace fastdit::direct {

extern Python python;
extern const dlpack::ExchangeApi* exchange;

// What Python hands over once, in this order; fastdit/native_kernels/direct.py.
struct Constants {
  PyObject *none, *left_to_autograd, *yes, *no, *layer, *rms, *silu, *gelu, *gelu_tanh;
  PyObject *float32, *bfloat16, *float16;  // dtypes
  PyObject *tensor, *parameter, *integer;  // types: of plain tensors, and int
  PyObject *empty_like, *empty_strided;    // the second is private, faster, or None
  PyObject* is_neg;                        // bound to some tensor
  PyObject* requires_grad;                 // an attribute's name
  PyObject* increment_version;             // of an iterable of tensors
  PyObject* queries;  // ((function, its result where nothing watches), ...)
  PyObject* globals;  // ((a module's dictionary, a name, its value where nothing watches), ...)
};
extern Constants constants;

// ---- what is asked of Python -----------------------------------------------------------------------

// A function without arguments. Most are C functions: their address saves half the time of a call.
struct Query {
  PyObject* (*function)(PyObject* self, PyObject* unused) = nullptr;
  PyObject* (*with_keywords)(PyObject* self, PyObject* const*, long, PyObject* names) = nullptr;
  PyObject *self = nullptr, *callable = nullptr, *wanted = nullptr;
};

// Whether a tensor that was read since the last answer is differentiated. (Of this thread: asking
// PyTorch lets others have the interpreter.)
extern constinit thread_local bool gradient_wanted;

inline PyObject* refuse() {
  gradient_wanted = false;
  python.PyErr_Clear();
  python.Py_IncRef(constants.none);
  return constants.none;
}

// `result` is a new reference or null, and is dropped.
inline bool is(PyObject* result, PyObject* wanted) {
  if (result) python.Py_DecRef(result);
  return result == wanted;
}

// Whether no mode, transform, trace or profiler is on.
bool unobserved();
// The answer instead of a result where a gradient is wanted, else null.
inline PyObject* left_to_autograd() {
  if (!gradient_wanted) return nullptr;
  gradient_wanted = false;
  python.Py_IncRef(constants.left_to_autograd);
  return constants.left_to_autograd;
}
// Whether a tensor is plain and on the CPU; notes whether it is differentiated.
bool plain(PyObject* object, dlpack::Tensor& t);

// A plain CPU tensor of one of the kernels' dtypes.
struct Operand {
  dlpack::Tensor t;
  Type type = Type::f32;

  bool read(PyObject* object) {
    if (!plain(object, t)) return false;
    if (t.code == dlpack::kFloat && t.bits == 32)
      type = Type::f32;
    else if (t.code == dlpack::kFloat && t.bits == 16)
      type = Type::f16;
    else if (t.code == dlpack::kBfloat && t.bits == 16)
      type = Type::bf16;
    else
      return false;
    return true;
  }
  bool has_shape(std::initializer_list<int64_t> shape) const {
    return t.ndim == int32_t(shape.size()) &&
           !std::memcmp(t.shape, shape.begin(), shape.size() * sizeof(int64_t));
  }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  int64_t size(int32_t axis) const { return t.shape[axis]; }
  bool contiguous() const {
    int64_t stride = 1;
    for (int32_t axis = t.ndim; axis-- > 0; stride *= t.shape[axis])
      if (t.shape[axis] != 1 && t.strides[axis] != stride) return false;
    return true;
  }
  int64_t count() const {
    int64_t count = 1;
    for (int32_t axis = 0; axis < t.ndim; ++axis) count *= t.shape[axis];
    return count;
  }
  bool same_as(const Operand& other) const {
    return type == other.type && t.ndim == other.t.ndim &&
           !std::memcmp(t.shape, other.t.shape, t.ndim * sizeof(int64_t));
  }
  int64_t bytes() const { return count() * t.bits / 8; }
  Rows rows() const { return {data(), type, t.strides[0], t.strides[1]}; }
};

// The tensors that a call reads, as the bytes from their first element to their last.
class Inputs {
 public:
  // A result may be the whole of this tensor where `replaceable`: what a kernel reads, element by
  // element, before it writes there.
  void add(const dlpack::Tensor& t, bool replaceable = false);
  // Whether a dense result lies in none of them, or is a replaceable one.
  bool allow(const Operand& result) const;

 private:
  struct Span {
    const char *begin, *end;
    bool replaceable;
  };
  Span spans_[8];
  int count_ = 0;
};

// A Python int of 64 bits, or false.
bool read_int(PyObject* object, int64_t& to);
// One int, repeated, or a sequence of as many; at most two. False for anything else.
bool read_sizes(PyObject* object, int64_t count, int64_t (&to)[2]);

// ---- results ----------------------------------------------------------------------------------------

// A new dense tensor of the operand's dtype, and its address; null where PyTorch refuses.
PyObject* new_tensor(const Operand& like, const int64_t* shape, int32_t dims, void*& data);
// One like `x`, which the operand describes and which is dense.
PyObject* new_like(PyObject* x, const Operand& operand, void*& data);

// One result of a call: the tensor that was given for it, or a new one like x.
class Result {
 public:
  // `object`, dense, like `x` and apart from the inputs; None asks for a new tensor.
  bool read(PyObject* object, PyObject* x, const Operand& operand, const Inputs& inputs);
  bool given() const { return object_ != nullptr; }
  bool apart_from(const Result& other) const;
  // Once nothing can refuse any more: the address, null where PyTorch refuses a new tensor.
  void* make(PyObject* x, const Operand& operand);
  // The tensor, a new reference, for the caller.
  PyObject* release();
  ~Result();

  PyObject* object() const { return object_; }

 private:
  PyObject *object_ = nullptr, *made_ = nullptr;
  Operand operand_;
};

// Tells autograd of tensors that are about to be written to, a tuple of them which it takes over:
// a backward that saved one will raise. False where PyTorch refuses.
bool written(PyObject* tensors);
// The same of one result, if it was given.
inline bool written(const Result& result) {
  return !result.given() || written(python.PyTuple_Pack(1, result.object()));
}
// Of two results, the tuple that was given for both or None; no two of its tensors overlap.
bool read_pair(PyObject* object, PyObject* x, const Operand& operand, const Inputs& inputs,
               Result& first, Result& second);

// (first, second), which it takes over, or null where either is.
inline PyObject* pair(PyObject* first, PyObject* second) {
  PyObject* both = first && second ? python.PyTuple_Pack(2, first, second) : nullptr;
  for (PyObject* one : {first, second})
    if (one) python.Py_DecRef(one);
  return both;
}

// f() without the interpreter's lock, where it takes long enough for another thread to care.
template <class F>
void unlocked(int64_t elements, const F& f) {
  if (elements <= kGrain) return f();
  void* state = python.PyEval_SaveThread();
  f();
  python.PyEval_RestoreThread(state);
}

// The direct calls, by the op's name: `arguments` are those of its schema; where results may be
// given, then these, as the public function's `out`, or None.
PyObject* adaln(PyObject*, PyObject* const* arguments, long count);
PyObject* gated_adaln(PyObject*, PyObject* const* arguments, long count);
PyObject* gated_residual(PyObject*, PyObject* const* arguments, long count);
PyObject* bias_gelu(PyObject*, PyObject* const* arguments, long count);
PyObject* glu(PyObject*, PyObject* const* arguments, long count);
PyObject* unpatchify(PyObject*, PyObject* const* arguments, long count);
PyObject* diffusion_step(PyObject*, PyObject* const* arguments, long count);

}  // namespace fastdit::direct
