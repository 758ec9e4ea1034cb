// The part of Python's stable ABI that direct calls need, looked up in the running process: the
// library is built without Python's headers, runs under every Python, and loads without any.
#pragma once

#include <dlfcn.h>

struct PyObject;

namespace fastdit {

struct PythonMethod {  // PyMethodDef
  const char* name;
  PyObject* (*function)(PyObject* self, PyObject* const* arguments, long count);
  int flags;
  const char* documentation;
};
constexpr int kEqual = 2;  // Py_EQ
constexpr int kKeywords = 0x02, kNoArguments = 0x04, kOneArgument = 0x08, kFastCall = 0x80;  // METH_

struct Python {
  PyObject* (*PyCFunction_NewEx)(PythonMethod*, PyObject* self, PyObject* module);
  int (*PyCFunction_GetFlags)(PyObject*);
  PyObject* (*(*PyCFunction_GetFunction)(PyObject*))(PyObject* self, PyObject* argument);
  PyObject* (*PyCFunction_GetSelf)(PyObject*);
  void* (*PyCapsule_GetPointer)(PyObject*, const char* name);
  PyObject* (*PyObject_CallObject)(PyObject* callable, PyObject* arguments);
  PyObject* (*PyObject_CallFunctionObjArgs)(PyObject* callable, ...);
  PyObject* (*PyObject_CallMethodObjArgs)(PyObject* object, PyObject* name, ...);
  PyObject* (*PyObject_GetAttr)(PyObject* object, PyObject* name);
  PyObject* (*PyObject_Type)(PyObject*);
  int (*PyObject_RichCompareBool)(PyObject*, PyObject*, int operation);
  PyObject* (*PyTuple_New)(long count);
  int (*PyTuple_SetItem)(PyObject*, long, PyObject* stolen);
  PyObject* (*PyTuple_GetItem)(PyObject*, long);
  PyObject* (*PyTuple_Pack)(long count, ...);
  long (*PyTuple_Size)(PyObject*);
  PyObject* (*PyDict_GetItemWithError)(PyObject*, PyObject* key);
  long (*PySequence_Size)(PyObject*);
  PyObject* (*PySequence_GetItem)(PyObject*, long);
  PyObject* (*PyLong_FromLongLong)(long long);
  long long (*PyLong_AsLongLong)(PyObject*);
  double (*PyFloat_AsDouble)(PyObject*);
  PyObject* (*PyErr_Occurred)();
  void (*PyErr_Clear)();
  void (*Py_IncRef)(PyObject*);
  void (*Py_DecRef)(PyObject*);
  void* (*PyEval_SaveThread)();
  void (*PyEval_RestoreThread)(void*);

  // False where this process has no Python, or hides it.
  bool find() {
    return look_up(PyCFunction_NewEx, "PyCFunction_NewEx") &&
           look_up(PyCFunction_GetFlags, "PyCFunction_GetFlags") &&
           look_up(PyCFunction_GetFunction, "PyCFunction_GetFunction") &&
           look_up(PyCFunction_GetSelf, "PyCFunction_GetSelf") &&
           look_up(PyCapsule_GetPointer, "PyCapsule_GetPointer") &&
           look_up(PyObject_CallObject, "PyObject_CallObject") &&
           look_up(PyObject_CallFunctionObjArgs, "PyObject_CallFunctionObjArgs") &&
           look_up(PyObject_CallMethodObjArgs, "PyObject_CallMethodObjArgs") &&
           look_up(PyObject_GetAttr, "PyObject_GetAttr") &&
           look_up(PyObject_Type, "PyObject_Type") &&
           look_up(PyObject_RichCompareBool, "PyObject_RichCompareBool") &&
           look_up(PyTuple_New, "PyTuple_New") &&
           look_up(PyTuple_SetItem, "PyTuple_SetItem") &&
           look_up(PyTuple_GetItem, "PyTuple_GetItem") && look_up(PyTuple_Pack, "PyTuple_Pack") &&
           look_up(PyTuple_Size, "PyTuple_Size") &&
           look_up(PyDict_GetItemWithError, "PyDict_GetItemWithError") &&
           look_up(PySequence_Size, "PySequence_Size") &&
           look_up(PySequence_GetItem, "PySequence_GetItem") &&
           look_up(PyLong_FromLongLong, "PyLong_FromLongLong") &&
           look_up(PyLong_AsLongLong, "PyLong_AsLongLong") &&
           look_up(PyFloat_AsDouble, "PyFloat_AsDouble") &&
           look_up(PyErr_Occurred, "PyErr_Occurred") && look_up(PyErr_Clear, "PyErr_Clear") &&
           look_up(Py_IncRef, "Py_IncRef") && look_up(Py_DecRef, "Py_DecRef") &&
           look_up(PyEval_SaveThread, "PyEval_SaveThread") &&
           look_up(PyEval_RestoreThread, "PyEval_RestoreThread");
  }

 private:
  template <class Function>
  static bool look_up(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    return function != nullptr;
  }
};

}  // namespace fastdit
