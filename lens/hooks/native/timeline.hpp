// Steps and phases of the thread that trains: `lens.hooks.timeline.Timeline`, word for word, in C.
//
// What is recorded, and when, is said there; a test lets both go through the same training and compares their rings.
// In the midst of a step the Python of it is met with cold caches and costs microseconds a moment; this, a fraction.
#pragma once

#include <Python.h>
#include <time.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "told.hpp"

namespace lens {

constexpr long long kNull = LLONG_MIN;
constexpr int64_t kStepKind = 1, kPhaseKind = 2, kRowKind = 5;
constexpr int kPhaseWord = 24, kStepWord = 32, kDetachWord = 512;
constexpr Py_ssize_t kFirstPayload = 8, kNextPayload = 14, kMostNumbers = 256;

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
  PyObject* end;    // called where the end of a step is not for us alone
  Py_buffer memory;
  int64_t* words;
  int64_t* slots;
  int64_t mask;
  Py_ssize_t next_at;  // where a recorder keeps `next`, and a part `on`: slots of their classes
  Py_ssize_t on_at;
  long long step, step_t0, phase, spent, spent_on_collectives, spent_on_experts, gc_ns, last_end, last_step, steps;
  unsigned long thread;
  char steps_by_hand, errands;
  long long look_at;
  Told* told;  // by the compiled observer, if that is there too
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

void finish(Timeline* self, int64_t* slot, int64_t more = 0) {
  PyObject* next = PyLong_FromLongLong(slot[0] + 1 + more);
  if (!next) return PyErr_Clear();
  auto** place = reinterpret_cast<PyObject**>(reinterpret_cast<char*>(self->recorder) + self->next_at);
  Py_SETREF(*place, next);
  put(slot + 15, slot[0]);
}

// A row of numbers; it goes on in further slots where it is long. See `Recorder.row`.
void record_row(Timeline* self, int64_t columns, long long t, long long step, const double* values, Py_ssize_t count) {
  const int64_t more = count <= kFirstPayload ? 0 : (count - kFirstPayload + kNextPayload - 1) / kNextPayload;
  int64_t* slot = begin_slot(self, kRowKind | more << 8);
  if (!slot) return;
  slot[2] = t;
  slot[3] = kNull;
  slot[4] = step;
  slot[5] = columns;
  slot[6] = count;
  memcpy(slot + 7, values, 8 * std::min(count, kFirstPayload));
  int64_t sequence = slot[0];
  for (Py_ssize_t place = kFirstPayload; place < count; place += kNextPayload) {
    int64_t* next = self->slots + (sequence++ & self->mask) * 16;
    put(next, sequence);
    memcpy(next + 1, values + place, 8 * std::min(count - place, kNextPayload));
    put(next + 15, -sequence);
  }
  finish(self, slot, more);
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

void abandon_step(Timeline* self) {
  forget_phases(self);
  self->step = kNull;
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

bool begin_found(Timeline* self) {
  if (!self->here() || self->waiting_since) return false;
  if (self->step == kNull && !self->steps_by_hand) {
    const long long began = self->last_end           ? self->last_end
                            : self->waited->empty() ? now()
                                                    : self->waited->front().first;
    open_step(self, self->next_number, began);
  }
  return true;
}

bool enter(Timeline* self, long long name, long long micro_batch, bool found) {
  if (found && (self->by_hand || self->phase == name || !begin_found(self))) return false;
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

bool begin_wait(Timeline* self) {
  if (!self->here() || self->waiting_since || self->phase == self->data) return false;
  if (self->step != kNull) return enter(self, self->data, kNull, false);
  self->waiting_since = now();
  note_phase(self, self->data, self->waiting_since, self->next_number);
  return true;
}

void end_wait(Timeline* self, bool arrived) {
  if (!self->waiting_since) return leave(self);
  if (arrived) self->waited->emplace_back(self->waiting_since, now());
  self->waiting_since = 0;
  put(self->words + kPhaseWord, 0);
}

void begin_step(Timeline* self, long long number, const long long* attributes, long long t) {
  self->steps_by_hand = 1;
  open_step(self, number == kNull ? self->next_number : number, self->waited->empty() ? t : self->waited->front().first);
  std::copy(attributes, attributes + 3, self->attributes);
  self->spent += now() - t;
}

long long end_step(Timeline* self) {
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
  return t;
}

// Ends the step, unless there is something else to do at its end.
bool end_alone(Timeline* self) {
  if (self->errands || self->words[kDetachWord] || now() >= self->look_at) return false;
  if (Told* told = self->told) {
    if (told->strangers) return false;
    if (told->waiting) told->sweep();
    self->spent_on_collectives += told->spent.exchange(0);
  }
  end_step(self);
  return true;
}

}  // namespace lens
