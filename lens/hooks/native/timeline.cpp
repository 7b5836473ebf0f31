// Steps and phases of the thread that trains: `lens.hooks.timeline.Timeline`, word for word, in C.
//
// What is recorded, and when, is said there; a test lets both go through the same training and compares their rings.
// In the midst of a step the Python of it is met with cold caches and costs microseconds a moment; this, a fraction.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <time.h>

#include <climits>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

constexpr long long kNull = LLONG_MIN;
constexpr int64_t kStepKind = 1, kPhaseKind = 2;
constexpr int kPhaseWord = 24, kStepWord = 32;

inline long long now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Another process reads along: the compiler must neither move nor split a store.
inline void put(int64_t* word, int64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

struct Outer {
  long long name, micro_batch;
  bool by_hand;
};

struct Timeline {
  PyObject_HEAD
  PyObject* part;
  PyObject* recorder;
  PyObject* ids;    // name -> string id
  PyObject* names;  // string id -> name
  Py_buffer memory;
  int64_t* words;
  int64_t* slots;
  int64_t mask;
  Py_ssize_t next_at;  // where a recorder keeps `next`, and a part `on`: slots of their classes
  Py_ssize_t on_at;
  long long step, step_t0, phase, spent, spent_on_collectives, spent_on_experts, gc_ns, last_end, last_step, steps;
  unsigned long thread;
  char steps_by_hand;
  bool by_hand;
  long long data, next_number, gc_before, spent_before, phase_t0, micro_batch, waiting_since;
  long long attributes[3];
  std::vector<Outer>* outer;
  std::vector<std::pair<long long, long long>>* waited;

  bool on() const { return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(part) + on_at) == Py_True; }
  bool here() const { return PyThread_get_thread_ident() == thread && on(); }
  long long all_spent() const { return spent + spent_on_collectives + spent_on_experts; }
};

// The next slot, begun; null when the recorder is no longer what it was. `finish` makes it whole.
int64_t* begin_slot(Timeline* self, int64_t kind) {
  if (!self->on()) return nullptr;
  PyObject* next = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(self->recorder) + self->next_at);
  const int64_t sequence = next ? PyLong_AsLongLong(next) : -1;
  if (sequence <= 0) return nullptr;
  int64_t* slot = self->slots + ((sequence - 1) & self->mask) * 16;
  put(slot, sequence);
  slot[1] = kind;
  return slot;
}

void finish(Timeline* self, int64_t* slot) {
  PyObject* next = PyLong_FromLongLong(slot[0] + 1);
  if (!next) return PyErr_Clear();
  auto** place = reinterpret_cast<PyObject**>(reinterpret_cast<char*>(self->recorder) + self->next_at);
  Py_SETREF(*place, next);
  put(slot + 15, slot[0]);
}

void record_phase(Timeline* self, long long name, long long t0, long long t1, long long step, long long micro_batch) {
  int64_t* slot = begin_slot(self, kPhaseKind);
  if (!slot) return;
  slot[2] = t0;
  slot[3] = t1;
  slot[4] = step;
  slot[5] = name;
  slot[6] = micro_batch;
  finish(self, slot);
  put(self->words + kPhaseWord, 0);
}

void note_phase(Timeline* self, long long name, long long t0, long long step) {
  int64_t* word = self->words + kPhaseWord;
  word[1] = name;
  word[2] = step;
  put(word, t0);
}

void forget_phases(Timeline* self) {
  self->outer->clear();
  self->phase = 0;
  self->by_hand = false;
}

void close_phases(Timeline* self, long long t) {
  record_phase(self, self->phase, self->phase_t0, t, self->step, self->micro_batch);
  forget_phases(self);
}

void open_step(Timeline* self, long long number, long long began) {
  if (self->phase) close_phases(self, began);
  self->spent_before = self->all_spent();
  self->step = number;
  self->next_number = number + 1;
  self->gc_before = self->gc_ns;
  self->step_t0 = began;
  for (long long& word : self->attributes) word = kNull;
  for (auto [since, arrived] : *self->waited) record_phase(self, self->data, since, arrived, number, kNull);
  self->waited->clear();
  int64_t* word = self->words + kStepWord;
  word[1] = number;
  word[2] = 0;
  put(word, began);
}

bool enter(Timeline* self, long long name, long long micro_batch, bool found) {
  if (found) {
    if (!self->here() || self->by_hand || self->phase == name || self->waiting_since) return false;
    if (self->step == kNull && !self->steps_by_hand) {
      const long long began = self->last_end           ? self->last_end
                              : self->waited->empty() ? now()
                                                      : self->waited->front().first;
      open_step(self, self->next_number, began);
    }
  }
  const long long t = now();
  if (self->phase) {
    record_phase(self, self->phase, self->phase_t0, t, self->step, self->micro_batch);
    self->outer->push_back({self->phase, self->micro_batch, self->by_hand});
  } else if (self->step == kNull) {
    self->waited->clear();  // what was fetched belongs to this, not to the step that will follow
  }
  self->phase = name;
  self->phase_t0 = t;
  self->micro_batch = micro_batch;
  self->by_hand = !found;
  note_phase(self, name, t, self->step);
  self->spent += now() - t;
  return true;
}

void go_on(Timeline* self, long long t, bool noted) {
  const Outer outer = self->outer->back();
  self->outer->pop_back();
  self->phase = outer.name;
  self->micro_batch = outer.micro_batch;
  self->by_hand = outer.by_hand;
  self->phase_t0 = t;
  if (noted) note_phase(self, self->phase, t, self->step);
}

void leave(Timeline* self) {
  if (!self->phase) return;  // the step ended first and closed it
  const long long t = now();
  record_phase(self, self->phase, self->phase_t0, t, self->step, self->micro_batch);
  if (self->outer->empty()) {
    self->phase = 0;
    self->by_hand = false;
  } else {
    go_on(self, t, true);
  }
  self->spent += now() - t;
}

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

PyObject* method_begin_step(Timeline* self, PyObject* const* arguments, Py_ssize_t count) {
  const long long t = now();
  long long number = self->next_number, attributes[] = {kNull, kNull, kNull};
  if (count != 4) return PyErr_Format(PyExc_TypeError, "begin_step(number, tokens, micro_batches, seq_sq)");
  if (!as_word(arguments[0], number)) return nullptr;
  for (int place = 0; place < 3; ++place)
    if (!as_word(arguments[1 + place], attributes[place])) return nullptr;
  self->steps_by_hand = 1;
  open_step(self, number, self->waited->empty() ? t : self->waited->front().first);
  for (int place = 0; place < 3; ++place) self->attributes[place] = attributes[place];
  self->spent += now() - t;
  Py_RETURN_NONE;
}

PyObject* method_end_step(Timeline* self, PyObject*) {
  const long long t = now();
  if (self->phase) close_phases(self, t);
  int64_t* slot = begin_slot(self, kStepKind);
  if (slot) {
    slot[2] = self->step_t0;
    slot[3] = t;
    slot[4] = self->step;
    slot[5] = 0;
    for (int place = 0; place < 3; ++place) slot[6 + place] = self->attributes[place];
    slot[9] = kNull;
    slot[10] = self->gc_ns - self->gc_before;
    slot[11] = kNull;
    slot[12] = self->all_spent() - self->spent_before + now() - t;
    finish(self, slot);
  }
  int64_t* word = self->words + kStepWord;
  word[1] = self->step;
  word[2] = t;
  put(word, 0);
  ++self->steps;
  self->last_step = self->step;
  self->step = kNull;
  self->last_end = t;
  return PyLong_FromLongLong(t);
}

PyObject* method_abandon_step(Timeline* self, PyObject*) {
  forget_phases(self);
  self->step = kNull;
  Py_RETURN_NONE;
}

PyObject* method_arrive(Timeline* self, PyObject*) {
  self->last_end = now();
  Py_RETURN_NONE;
}

PyObject* method_begin_wait(Timeline* self, PyObject*) {
  if (!self->here() || self->waiting_since || self->phase == self->data) Py_RETURN_FALSE;
  if (self->step != kNull) return PyBool_FromLong(enter(self, self->data, kNull, false));
  self->waiting_since = now();
  note_phase(self, self->data, self->waiting_since, self->next_number);
  Py_RETURN_TRUE;
}

PyObject* method_end_wait(Timeline* self, PyObject* arrived) {
  if (!self->waiting_since) {
    leave(self);
    Py_RETURN_NONE;
  }
  if (arrived == Py_True) self->waited->emplace_back(self->waiting_since, now());
  self->waiting_since = 0;
  put(self->words + kPhaseWord, 0);
  Py_RETURN_NONE;
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

PyMethodDef kMethods[] = {
    {"abandon", reinterpret_cast<PyCFunction>(method_abandon), METH_NOARGS, nullptr},
    {"abandon_step", reinterpret_cast<PyCFunction>(method_abandon_step), METH_NOARGS, nullptr},
    {"all_spent", reinterpret_cast<PyCFunction>(method_all_spent), METH_NOARGS, nullptr},
    {"arrive", reinterpret_cast<PyCFunction>(method_arrive), METH_NOARGS, nullptr},
    {"begin_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_begin_step)), METH_FASTCALL, nullptr},
    {"begin_wait", reinterpret_cast<PyCFunction>(method_begin_wait), METH_NOARGS, nullptr},
    {"end_step", reinterpret_cast<PyCFunction>(method_end_step), METH_NOARGS, nullptr},
    {"end_wait", reinterpret_cast<PyCFunction>(method_end_wait), METH_O, nullptr},
    {"enter", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_enter)), METH_FASTCALL, nullptr},
    {"here", reinterpret_cast<PyCFunction>(method_here), METH_NOARGS, nullptr},
    {"leave", reinterpret_cast<PyCFunction>(method_leave), METH_NOARGS, nullptr},
    {"phase_id", reinterpret_cast<PyCFunction>(method_phase_id), METH_O, nullptr},
    {"phase_name", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method_phase_name)), METH_FASTCALL, nullptr},
    {},
};

PyMemberDef kMembers[] = {
    {"gc_ns", T_LONGLONG, offsetof(Timeline, gc_ns), 0, nullptr},
    {"last_end", T_LONGLONG, offsetof(Timeline, last_end), READONLY, nullptr},
    {"last_step", T_LONGLONG, offsetof(Timeline, last_step), READONLY, nullptr},
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
  return 0;
}

int clear(Timeline* self) {
  Py_CLEAR(self->ids);
  Py_CLEAR(self->names);
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

PyMODINIT_FUNC PyInit_lens_timeline() {
  if (PyType_Ready(&kTimeline) < 0) return nullptr;
  PyObject* module = PyModule_Create(&kModule);
  if (module && PyModule_AddObjectRef(module, "Timeline", reinterpret_cast<PyObject*>(&kTimeline)) < 0)
    Py_CLEAR(module);
  return module;
}
