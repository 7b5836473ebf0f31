// `lens.hooks.timeline.Timeline` and `Step` for Python; what they do is in timeline.hpp.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "around.hpp"

namespace lens {
namespace {

// --- methods ----------------------------------------------------------------------------------------------------

bool as_word(PyObject* value, long long& word) {
  if (value == Py_None) return true;
  word = PyLong_AsLongLong(value);
  return word != -1 || !PyErr_Occurred();
}

PyObject* method_enter(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  long long name = 0, micro_batch = kNull;
  if (count < 1 || count > 3) return PyErr_Format(PyExc_TypeError, "enter(name, micro_batch, found)");
  if (!as_word(arguments[0], name) || (count > 1 && !as_word(arguments[1], micro_batch))) return nullptr;
  return PyBool_FromLong(enter(self, name, micro_batch, count > 2 && arguments[2] == Py_True));
}

PyObject* method_found(Timeline* self, PyObject* name) {
  long long identity = 0;
  if (!as_word(name, identity)) return nullptr;
  return PyBool_FromLong(enter(self, identity, kNull, true));
}

PyObject* method_leave(Timeline* self, PyObject*) {
  leave(self);
  Py_RETURN_NONE;
}

PyObject* method_abandon(Timeline* self, PyObject*) {
  self->phase = 0;
  self->by_hand = false;
  if (!self->outer->empty()) go_on(self, now(), false);
  Py_RETURN_NONE;
}

// (number, tokens, micro_batches, seq_sq), where None stands for what is not said.
bool as_words(PyObject* const* arguments, Py_ssize_t count, long long* words) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "(number, tokens, micro_batches, seq_sq)"), false;
  for (int place = 0; place < 4; ++place) {
    words[place] = kNull;
    if (!as_word(arguments[place], words[place])) return false;
  }
  return true;
}

PyObject* method_begin_step(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  const long long t = now();
  long long words[4];
  if (!as_words(arguments, count, words)) return nullptr;
  begin_step(self, words[0], words + 1, t);
  Py_RETURN_NONE;
}

PyObject* method_end_alone(Timeline* self, PyObject*) { return PyBool_FromLong(end_alone(self)); }

PyObject* method_hear(Timeline* self, PyObject* capsule) {
  auto* told = static_cast<Told*>(PyCapsule_GetPointer(capsule, kTold));
  if (!told) return nullptr;
  self->told = told;
  Py_RETURN_NONE;
}

PyObject* method_end_step(Timeline* self, PyObject*) { return PyLong_FromLongLong(end_step(self)); }

PyObject* method_abandon_step(Timeline* self, PyObject*) {
  abandon_step(self);
  Py_RETURN_NONE;
}

PyObject* method_arrive(Timeline* self, PyObject*) {
  self->last_end = now();
  Py_RETURN_NONE;
}

PyObject* method_begin_found(Timeline* self, PyObject*) { return PyBool_FromLong(begin_found(self)); }

PyObject* method_begin_wait(Timeline* self, PyObject*) { return PyBool_FromLong(begin_wait(self)); }

PyObject* method_end_wait(Timeline* self, PyObject* arrived) {
  end_wait(self, arrived == Py_True);
  Py_RETURN_NONE;
}

// wait_for(fetch, source) -> fetch(source), with the wait for it recorded
PyObject* method_wait_for(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "wait_for(fetch, source)");
  const bool began = begin_wait(self);
  PyObject* batch = PyObject_Vectorcall(arguments[0], arguments + 1, 1, nullptr);
  if (!began) return batch;
  PyObject *kind, *error, *trace;
  PyErr_Fetch(&kind, &error, &trace);
  end_wait(self, batch != nullptr);
  PyErr_Restore(kind, error, trace);
  return batch;
}

PyObject* method_here(Timeline* self, PyObject*) { return PyBool_FromLong(self->here()); }

PyObject* method_all_spent(Timeline* self, PyObject*) { return PyLong_FromLongLong(self->all_spent()); }

PyObject* method_phase_id(Timeline* self, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(self->ids, name);
  if (found) return Py_NewRef(found);
  if (PyErr_Occurred()) return nullptr;
  PyObject* made = PyObject_CallMethod(self->recorder, "intern", "O", name);
  if (made && (PyDict_SetItem(self->ids, name, made) < 0 || PyDict_SetItem(self->names, made, name) < 0))
    Py_CLEAR(made);
  return made;
}

PyObject* method_phase_name(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  PyObject* identity = count && arguments[0] != Py_None ? Py_NewRef(arguments[0]) : PyLong_FromLongLong(self->phase);
  if (!identity) return nullptr;
  PyObject* found = PyDict_GetItemWithError(self->names, identity);
  if (!found && !PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, identity);
  Py_DECREF(identity);
  return Py_XNewRef(found);
}

// row(columns, names, values, step): record these values, if they are plain numbers under these very names. -> whether
PyObject* method_row(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  const long long t = now();
  if (count != 4 || !PyTuple_CheckExact(arguments[1]) || !PyDict_CheckExact(arguments[2]) || !self->here())
    Py_RETURN_FALSE;
  PyObject *names = arguments[1], *name, *value;
  long long columns = 0, step = self->step;
  if (!as_word(arguments[0], columns) || !as_word(arguments[3], step)) return PyErr_Clear(), Py_NewRef(Py_False);
  const Py_ssize_t wanted = PyTuple_GET_SIZE(names);
  if (!wanted || wanted > kMostNumbers || PyDict_GET_SIZE(arguments[2]) != wanted) Py_RETURN_FALSE;
  double numbers[kMostNumbers];
  Py_ssize_t at = 0, place = 0;
  for (; PyDict_Next(arguments[2], &at, &name, &value); ++place) {
    PyObject* known = PyTuple_GET_ITEM(names, place);
    const bool same = name == known || (PyUnicode_CheckExact(name) && PyUnicode_CheckExact(known) &&
                                        PyUnicode_Compare(name, known) == 0);
    if (!same) Py_RETURN_FALSE;
    if (PyFloat_CheckExact(value)) {
      numbers[place] = PyFloat_AS_DOUBLE(value);
    } else if (PyLong_CheckExact(value) || PyBool_Check(value)) {
      numbers[place] = PyLong_AsDouble(value);
      if (numbers[place] == -1 && PyErr_Occurred()) return PyErr_Clear(), Py_NewRef(Py_False);
    } else {
      Py_RETURN_FALSE;
    }
  }
  record_row(self, columns, t, step, numbers, wanted);
  self->spent += now() - t;
  Py_RETURN_TRUE;
}

// --- `with lens.step()` -------------------------------------------------------------------------------------------

struct Step {
  PyObject_HEAD
  Timeline* timeline;
  long long words[4];
};

extern PyTypeObject kStep;

PyObject* method_new_step(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  long long words[4];
  if (!self->here()) Py_RETURN_NONE;
  if (!as_words(arguments, count, words)) return nullptr;
  Step* made = PyObject_New(Step, &kStep);
  if (!made) return nullptr;
  made->timeline = reinterpret_cast<Timeline*>(Py_NewRef(reinterpret_cast<PyObject*>(self)));
  std::copy(words, words + 4, made->words);
  return reinterpret_cast<PyObject*>(made);
}

PyObject* method_steps_end_with(Timeline* self, PyObject* end) {
  Py_XSETREF(self->end, Py_NewRef(end));
  return PyObject_GetAttrString(reinterpret_cast<PyObject*>(self), "new_step");
}

PyObject* step_enter(Step* self, PyObject*) {
  begin_step(self->timeline, self->words[0], self->words + 1, now());
  Py_RETURN_NONE;
}

PyObject* step_exit(Step* self, PyObject* const* arguments, Py_ssize_t count) {
  Timeline* timeline = self->timeline;
  if (!timeline->on()) Py_RETURN_NONE;
  if (count && arguments[0] != Py_None) {
    abandon_step(timeline);
  } else if (!end_alone(timeline) && timeline->end) {
    return PyObject_CallNoArgs(timeline->end);
  }
  Py_RETURN_NONE;
}

void step_dealloc(Step* self) {
  Py_DECREF(self->timeline);
  PyObject_Free(self);
}

PyMethodDef kStepMethods[] = {
    {"__enter__", reinterpret_cast<PyCFunction>(step_enter), METH_NOARGS, nullptr},
    {"__exit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(step_exit)), METH_FASTCALL, nullptr},
    {},
};

PyTypeObject kStep = [] {
  PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  type.tp_name = "lens_timeline.Step";
  type.tp_basicsize = sizeof(Step);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  type.tp_doc = "See lens.hooks.timeline.Step.";
  type.tp_dealloc = reinterpret_cast<destructor>(step_dealloc);
  type.tp_methods = kStepMethods;
  return type;
}();

// --- the types ----------------------------------------------------------------------------------------------------

PyMethodDef kMethods[] = {
    {"abandon", reinterpret_cast<PyCFunction>(method_abandon), METH_NOARGS, nullptr},
    {"abandon_step", reinterpret_cast<PyCFunction>(method_abandon_step), METH_NOARGS, nullptr},
    {"all_spent", reinterpret_cast<PyCFunction>(method_all_spent), METH_NOARGS, nullptr},
    {"around", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_around)), METH_FASTCALL, nullptr},
    {"arrive", reinterpret_cast<PyCFunction>(method_arrive), METH_NOARGS, nullptr},
    {"begin_found", reinterpret_cast<PyCFunction>(method_begin_found), METH_NOARGS, nullptr},
    {"begin_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_begin_step)), METH_FASTCALL, nullptr},
    {"begin_wait", reinterpret_cast<PyCFunction>(method_begin_wait), METH_NOARGS, nullptr},
    {"end_alone", reinterpret_cast<PyCFunction>(method_end_alone), METH_NOARGS, nullptr},
    {"end_step", reinterpret_cast<PyCFunction>(method_end_step), METH_NOARGS, nullptr},
    {"end_wait", reinterpret_cast<PyCFunction>(method_end_wait), METH_O, nullptr},
    {"enter", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_enter)), METH_FASTCALL, nullptr},
    {"found", reinterpret_cast<PyCFunction>(method_found), METH_O, nullptr},
    {"hear", reinterpret_cast<PyCFunction>(method_hear), METH_O, nullptr},
    {"here", reinterpret_cast<PyCFunction>(method_here), METH_NOARGS, nullptr},
    {"leave", reinterpret_cast<PyCFunction>(method_leave), METH_NOARGS, nullptr},
    {"phase_id", reinterpret_cast<PyCFunction>(method_phase_id), METH_O, nullptr},
    {"row", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_row)), METH_FASTCALL, nullptr},
    {"new_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_new_step)), METH_FASTCALL, nullptr},
    {"steps_end_with", reinterpret_cast<PyCFunction>(method_steps_end_with), METH_O, nullptr},
    {"wait_for", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_wait_for)), METH_FASTCALL, nullptr},
    {"phase_name", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_phase_name)), METH_FASTCALL, nullptr},
    {},
};

PyMemberDef kMembers[] = {
    {"errands", T_BOOL, offsetof(Timeline, errands), 0, nullptr},
    {"gc_ns", T_LONGLONG, offsetof(Timeline, gc_ns), 0, nullptr},
    {"last_end", T_LONGLONG, offsetof(Timeline, last_end), READONLY, nullptr},
    {"last_step", T_LONGLONG, offsetof(Timeline, last_step), READONLY, nullptr},
    {"look_at", T_LONGLONG, offsetof(Timeline, look_at), 0, nullptr},
    {"next_number", T_LONGLONG, offsetof(Timeline, next_number), 0, nullptr},
    {"part", T_OBJECT, offsetof(Timeline, part), READONLY, nullptr},
    {"phase", T_LONGLONG, offsetof(Timeline, phase), READONLY, nullptr},
    {"spent", T_LONGLONG, offsetof(Timeline, spent), 0, nullptr},
    {"spent_on_collectives", T_LONGLONG, offsetof(Timeline, spent_on_collectives), 0, nullptr},
    {"spent_on_experts", T_LONGLONG, offsetof(Timeline, spent_on_experts), 0, nullptr},
    {"step", T_LONGLONG, offsetof(Timeline, step), READONLY, nullptr},
    {"step_t0", T_LONGLONG, offsetof(Timeline, step_t0), READONLY, nullptr},
    {"steps", T_LONGLONG, offsetof(Timeline, steps), READONLY, nullptr},
    {"steps_by_hand", T_BOOL, offsetof(Timeline, steps_by_hand), READONLY, nullptr},
    {"thread", T_ULONG, offsetof(Timeline, thread), READONLY, nullptr},
    {},
};

// Where instances keep an attribute that their class names in __slots__; -1, with an exception, when it does not.
Py_ssize_t slot_at(PyObject* object, const char* name) {
  PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), name);
  Py_ssize_t place = -1;
  if (found && Py_IS_TYPE(found, &PyMemberDescr_Type)) {
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found)->d_member;
    if (member->type == T_OBJECT_EX) place = member->offset;
  }
  Py_XDECREF(found);
  if (place < 0 && !PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "%s is not in the __slots__ of its class", name);
  return place;
}

bool word_of(PyObject* object, const char* name, long long& word) {
  PyObject* found = PyObject_GetAttrString(object, name);
  const bool good = found && as_word(found, word);
  Py_XDECREF(found);
  return good;
}

int init(Timeline* self, PyObject* arguments, PyObject*) {
  PyObject *recorder, *part;
  if (!PyArg_ParseTuple(arguments, "OO", &recorder, &part)) return -1;
  if (self->recorder) return PyErr_SetString(PyExc_TypeError, "made already"), -1;
  self->recorder = Py_NewRef(recorder);
  self->part = Py_NewRef(part);
  self->next_at = slot_at(recorder, "next");
  self->on_at = slot_at(part, "on");
  if (self->next_at < 0 || self->on_at < 0) return -1;
  long long first_word = 0, mask = 0;
  if (!word_of(recorder, "first_word", first_word) || !word_of(recorder, "mask", mask)) return -1;
  PyObject* words = PyObject_GetAttrString(recorder, "words");
  if (!words || PyObject_GetBuffer(words, &self->memory, PyBUF_WRITABLE) < 0) return Py_XDECREF(words), -1;
  Py_DECREF(words);
  if (self->memory.len < (first_word + (mask + 1) * 16) * 8)
    return PyErr_SetString(PyExc_ValueError, "the ring is shorter than it says"), -1;
  self->words = static_cast<int64_t*>(self->memory.buf);
  self->slots = self->words + first_word;
  self->mask = mask;
  self->thread = PyThread_get_thread_ident();
  self->step = self->last_step = self->micro_batch = kNull;
  self->errands = 1;
  for (long long& word : self->attributes) word = kNull;
  self->outer = new std::vector<Outer>();
  self->waited = new std::vector<std::pair<long long, long long>>();
  self->ids = PyDict_New();
  self->names = self->ids ? Py_BuildValue("{is}", 0, "") : nullptr;
  PyObject* name = self->names ? PyUnicode_FromString("data") : nullptr;
  PyObject* data = name ? method_phase_id(self, name) : nullptr;
  const bool good = data && as_word(data, self->data);
  Py_XDECREF(name);
  Py_XDECREF(data);
  return good ? 0 : -1;
}

int traverse(Timeline* self, visitproc visit, void* arg) {
  Py_VISIT(self->part);
  Py_VISIT(self->recorder);
  Py_VISIT(self->ids);
  Py_VISIT(self->names);
  Py_VISIT(self->end);
  return 0;
}

int clear(Timeline* self) {
  Py_CLEAR(self->ids);
  Py_CLEAR(self->names);
  Py_CLEAR(self->end);
  return 0;
}

void dealloc(Timeline* self) {
  PyObject_GC_UnTrack(self);
  clear(self);
  Py_CLEAR(self->part);
  Py_CLEAR(self->recorder);
  if (self->words) PyBuffer_Release(&self->memory);
  delete self->outer;
  delete self->waited;
  Py_TYPE(self)->tp_free(reinterpret_cast<PyObject*>(self));
}

PyTypeObject kTimeline = [] {
  PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  type.tp_name = "lens_timeline.Timeline";
  type.tp_basicsize = sizeof(Timeline);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;
  type.tp_doc = "See lens.hooks.timeline.Timeline.";
  type.tp_new = PyType_GenericNew;
  type.tp_init = reinterpret_cast<initproc>(init);
  type.tp_dealloc = reinterpret_cast<destructor>(dealloc);
  type.tp_traverse = reinterpret_cast<traverseproc>(traverse);
  type.tp_clear = reinterpret_cast<inquiry>(clear);
  type.tp_methods = kMethods;
  type.tp_members = kMembers;
  return type;
}();

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "lens_timeline", nullptr, -1};

}  // namespace
}  // namespace lens

PyMODINIT_FUNC PyInit_lens_timeline() {
  if (PyType_Ready(&lens::kTimeline) < 0 || PyType_Ready(&lens::kStep) < 0 ||
      PyType_Ready(&lens::kAround) < 0)
    return nullptr;
  PyObject* module = PyModule_Create(&lens::kModule);
  if (module && PyModule_AddObjectRef(module, "Timeline", reinterpret_cast<PyObject*>(&lens::kTimeline)) < 0)
    Py_CLEAR(module);
  return module;
}
