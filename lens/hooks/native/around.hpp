// A function with a phase around it, for Python: see `lens.hooks.timeline.Timeline.around`.
//
// It is entered as the original would be, with no frame of Python and nothing packed or unpacked on the way.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "timeline.hpp"

namespace lens {
namespace {

struct Around {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject *timeline, *original, *dict;  // dict: what `functools.update_wrapper` says of the original
  long long phase;
};

PyObject* around_call(PyObject* object, PyObject* const* arguments, size_t count, PyObject* names) {
  auto* self = reinterpret_cast<Around*>(object);
  auto* timeline = reinterpret_cast<Timeline*>(self->timeline);
  const bool began = enter(timeline, self->phase, kNull, true);
  PyObject* result = PyObject_Vectorcall(self->original, arguments, count, names);
  if (began && result) leave(timeline);
  return result;
}

int around_traverse(Around* self, visitproc visit, void* arg) {
  Py_VISIT(self->timeline);
  Py_VISIT(self->original);
  Py_VISIT(self->dict);
  return 0;
}

void around_dealloc(Around* self) {
  PyObject_GC_UnTrack(self);
  Py_CLEAR(self->timeline);
  Py_CLEAR(self->original);
  Py_CLEAR(self->dict);
  PyObject_GC_Del(self);
}

// It is found where its original was, by the name that it has.
PyObject* around_reduce(Around* self, PyObject*) {
  return PyObject_GetAttrString(reinterpret_cast<PyObject*>(self), "__qualname__");
}

PyMethodDef kAroundMethods[] = {
    {"__reduce__", reinterpret_cast<PyCFunction>(around_reduce), METH_NOARGS, nullptr},
    {},
};

PyGetSetDef kAroundAttributes[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    {},
};

PyTypeObject kAround = [] {
  PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  type.tp_name = "lens_timeline.Around";
  type.tp_basicsize = sizeof(Around);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  type.tp_doc = "See lens.hooks.timeline.Timeline.around.";
  type.tp_dealloc = reinterpret_cast<destructor>(around_dealloc);
  type.tp_traverse = reinterpret_cast<traverseproc>(around_traverse);
  type.tp_vectorcall_offset = offsetof(Around, call);
  type.tp_call = PyVectorcall_Call;
  type.tp_dictoffset = offsetof(Around, dict);
  type.tp_methods = kAroundMethods;
  type.tp_getset = kAroundAttributes;
  return type;
}();

// around(original, phase)
PyObject* method_around(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "around(original, phase)");
  const long long phase = PyLong_AsLongLong(arguments[1]);
  if (phase == -1 && PyErr_Occurred()) return nullptr;
  Around* made = PyObject_GC_New(Around, &kAround);
  if (!made) return nullptr;
  made->call = around_call;
  made->timeline = Py_NewRef(reinterpret_cast<PyObject*>(self));
  made->original = Py_NewRef(arguments[0]);
  made->dict = nullptr;
  made->phase = phase;
  PyObject_GC_Track(made);
  return reinterpret_cast<PyObject*>(made);
}

}  // namespace
}  // namespace lens
