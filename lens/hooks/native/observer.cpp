// Sees every collective of every caller: DDP's reducer, functional collectives, DTensor, FSDP2, torch.distributed.
//
// They all call operators of c10d through torch's dispatcher. Their kernels are wrapped in kernels of C++, which need
// no GIL, and are taken out again. `Work.wait` and `wait_tensor` are wrapped to see when somebody waits. What a
// collective computes, and the objects it returns, are untouched.
#include <Python.h>
#include <pthread.h>
#include <pybind11/detail/common.h>

#include "observed.hpp"

namespace lens {
namespace {

// --- wrapping and unwrapping ------------------------------------------------------------------------------------

struct Wrapped {
  c10::OperatorName name;
  c10::DispatchKey key;
  c10::KernelFunction replacement;  // keeps the kernel object alive for threads that are in it, whatever is undone
  std::shared_ptr<const c10::KernelFunction>* original;
};

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

using Tensors = at::TensorList;
using Lists = const std::vector<std::vector<at::Tensor>>&;
using Members = const c10::intrusive_ptr<c10d::ProcessGroup>&;
using Reduction = const c10::intrusive_ptr<c10d::ReduceOp>&;
template <typename Results>
using With = std::tuple<Results, WorkPtr>;
using Several = std::vector<at::Tensor>;

using Make = std::optional<Wrapped> (*)(const c10::OperatorHandle&, c10::DispatchKey, const Operator&, size_t);

// Nothing where the operator's arguments are others than these.
template <typename Signature, int Input, int Output, int Splits = -1>
std::optional<Wrapped> typed(const c10::OperatorHandle& op, c10::DispatchKey key, const Operator& spec, size_t place) {
  using Kernel = Typed<Signature, Input, Output, Splits>;
  try {
    op.typed<Signature>();
  } catch (const c10::Error&) {
    return std::nullopt;
  }
  auto kernel = std::make_unique<Kernel>(spec, place, op, key);
  if (!kernel->fits()) return std::nullopt;
  auto* original = &kernel->kernel;
  auto replacement = c10::KernelFunction::makeFromUnboxedFunctor<false, Kernel>(std::move(kernel));
  return Wrapped{op.operator_name(), key, std::move(replacement), original};
}

// The types of what is called in every step, with the places of input and output, as `ProcessGroup` calls them.
constexpr std::pair<const char*, Make> kTyped[] = {
    {"allreduce_", typed<With<Several>(Tensors, Members, Reduction, const std::optional<at::Tensor>&, bool, int64_t), 0, 0>},
    {"broadcast_", typed<With<Several>(Tensors, Members, int64_t, int64_t, bool, int64_t), 0, 0>},
    {"reduce_", typed<WorkPtr(Tensors, Members, Reduction, int64_t, int64_t, bool, int64_t), 0, 0>},
    {"allgather_", typed<With<std::vector<Several>>(Lists, Tensors, Members, bool, int64_t), 1, 0>},
    {"_allgather_base_", typed<With<at::Tensor>(at::Tensor&, at::Tensor&, Members, bool, int64_t), 1, 0>},
    {"reduce_scatter_", typed<With<Several>(const Tensors&, Lists, Members, Reduction, bool, int64_t), 1, 0>},
    {"_reduce_scatter_base_", typed<With<at::Tensor>(at::Tensor&, at::Tensor&, Members, Reduction, bool, int64_t), 1, 0>},
    {"alltoall_", typed<With<Several>(const Tensors&, const Tensors&, Members, bool, int64_t), 1, 0>},
    {"alltoall_base_", typed<WorkPtr(at::Tensor&, at::Tensor&, Members, std::vector<int64_t>, std::vector<int64_t>, bool, int64_t), 1, 0, 4>},
    {"barrier", typed<WorkPtr(at::Tensor, Members, const std::vector<int64_t>&, bool, int64_t), -1, -1>},
};

template <typename Kernel, typename... Arguments>
Wrapped boxed(const c10::OperatorName& name, c10::DispatchKey key, Arguments&&... arguments) {
  auto kernel = std::make_unique<Kernel>(std::forward<Arguments>(arguments)...);
  auto* original = &kernel->kernel;
  return {name, key, c10::KernelFunction::makeFromBoxedFunctor(std::move(kernel)), original};
}

Wrapped wrapped(const c10::OperatorHandle& op, c10::DispatchKey key, const Operator& spec, size_t place) {
  for (auto [name, make] : kTyped) {
    if (std::strcmp(name, spec.name)) continue;
    if (auto made = make(op, key, spec, place)) return std::move(*made);
  }
  return boxed<Boxed>(op.operator_name(), key, spec, place, op, key);
}

std::vector<Wrapped>& all_wrapped() {
  static auto* all = [] {
    auto* made = new std::vector<Wrapped>();
    auto& dispatcher = c10::Dispatcher::singleton();
    for (auto key : kKeys) {
      for (const Operator& spec : kOperators) {
        auto op = dispatcher.findSchema({std::string("c10d::") + spec.name, ""});
        if (!op || !op->hasKernelForDispatchKey(key) || !op->schema().argumentIndexWithName("process_group")) continue;
        made->push_back(wrapped(*op, key, spec, made->size()));
      }
      auto wait = dispatcher.findSchema({"_c10d_functional::wait_tensor", ""});
      if (wait) made->push_back(boxed<ObservedWait>(wait->operator_name(), key));
    }
    return made;
  }();
  return *all;
}

std::vector<c10::RegistrationHandleRAII>& registrations() {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  return *all;
}

void unwrap() {
  record_with(nullptr);
  registrations().clear();
}

void wrap(std::shared_ptr<Session> session) {
  auto& dispatcher = c10::Dispatcher::singleton();
  Silent silent;  // torch warns of every kernel that takes another one's place
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  session->kernels.resize(all_wrapped().size());
  for (Wrapped& each : all_wrapped()) {
    auto op = dispatcher.findSchema(each.name);
    if (!op) continue;
    auto original = std::make_shared<const c10::KernelFunction>(kernel_in_place(*op, each.key));
    session->kernels[&each - all_wrapped().data()] = original;
    std::atomic_store(each.original, std::move(original));
    registrations().push_back(
        dispatcher.registerImpl(each.name, each.key, each.replacement, std::nullopt, nullptr, "lens"));
  }
  record_with(std::move(session));
}

// A lock may have been held in another thread, which the child does not have: nothing of the session is touched again.
void in_forked_child() {
  recording = nullptr;
  new (&slot()) std::shared_ptr<Session>();
  new (&here.session) std::shared_ptr<Session>();
}

// --- for Python -------------------------------------------------------------------------------------------------

PyObject* call_without_gil(const std::function<void()>& act) {
  std::string failure;
  Py_BEGIN_ALLOW_THREADS;
  try {
    act();
  } catch (const std::exception& error) {
    failure = *error.what() ? error.what() : "unknown";
  }
  Py_END_ALLOW_THREADS;
  if (failure.empty()) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, failure.c_str());
  return nullptr;
}

PyObject* install(PyObject*, PyObject* arguments) {
  const char *directory, *main;
  if (!PyArg_ParseTuple(arguments, "ss", &directory, &main)) return nullptr;
  return call_without_gil([&] {
    const int descriptor = open(main, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    struct stat found {};
    if (descriptor < 0 || fstat(descriptor, &found)) throw std::runtime_error("the main ring cannot be opened");
    auto mapping = std::make_unique<Mapping>(descriptor, found.st_size, false);
    close(descriptor);
    if (!mapping->words) throw std::runtime_error("the main ring cannot be mapped");
    auto session = std::make_shared<Session>(directory, std::move(mapping));
    if (!session->ring()) throw std::runtime_error("no room for a ring");
    told.spent = 0;
    told.waiting = told.strangers = false;
    try {
      wrap(session);
    } catch (...) {
      unwrap();
      throw;
    }
  });
}

PyObject* remove(PyObject*, PyObject* arguments) {
  int clean;
  if (!PyArg_ParseTuple(arguments, "p", &clean)) return nullptr;
  return call_without_gil([&] {
    auto session = current();
    unwrap();
    if (session) session->close(clean);
  });
}

PyObject* tell_group(PyObject*, PyObject* arguments) {
  const char *process_group, *name;
  PyObject* listed;
  if (!PyArg_ParseTuple(arguments, "ssO!", &process_group, &name, &PyTuple_Type, &listed)) return nullptr;
  std::vector<int64_t> ranks;
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(listed); ++index)
    ranks.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(listed, index)));
  if (PyErr_Occurred()) return nullptr;
  if (auto session = current()) {
    std::lock_guard guard(session->lock);
    session->tell(process_group, name, std::move(ranks));
  }
  Py_RETURN_NONE;
}

// What another observer has counted so far: the numbers go on from there.
PyObject* resume_group(PyObject*, PyObject* arguments) {
  const char* process_group;
  long long offset, counted;
  PyObject* listed;
  if (!PyArg_ParseTuple(arguments, "sLLO!", &process_group, &offset, &counted, &PyTuple_Type, &listed)) return nullptr;
  auto session = current();
  if (!session) Py_RETURN_NONE;
  std::lock_guard guard(session->lock);
  Group& group = *session->group(process_group);
  group.offset = offset;
  group.counted = counted;
  group.as_expected = 0;
  for (Py_ssize_t index = 0; index < PyTuple_GET_SIZE(listed); ++index) {
    long long source, target, count;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(listed, index), "LLL", &source, &target, &count)) return nullptr;
    session->pair(group, source, target).count = count;
  }
  Py_RETURN_NONE;
}

PyObject* forget_group(PyObject*, PyObject* process_group) {
  const char* name = PyUnicode_AsUTF8(process_group);
  if (!name) return nullptr;
  if (auto session = current()) {
    std::lock_guard guard(session->lock);
    session->forget(name);
  }
  Py_RETURN_NONE;
}

void sweep_alone() {
  auto session = current();
  if (!session) return;
  const int64_t began = now();
  session->sweep(false);
  told.spent.fetch_add(now() - began, std::memory_order_relaxed);
}

// (ns that observing took since the last call, collectives that could not be recorded so far, strangers met)
PyObject* sweep(PyObject*, PyObject*) {
  auto session = current();
  if (!session) return Py_BuildValue("LLO", 0LL, 0LL, Py_False);
  sweep_alone();
  const int64_t spent = told.spent.exchange(0);
  const bool strangers = told.strangers.exchange(false);
  return Py_BuildValue("LLO", (long long)spent, (long long)session->unrecorded.load(), strangers ? Py_True : Py_False);
}

PyObject* tell_timeline(PyObject*, PyObject*) {
  told.sweep = sweep_alone;
  return PyCapsule_New(&told, kTold, nullptr);
}

PyObject* begin_scope(PyObject*, PyObject*) {
  if (!here.scope && current()) here.scope = new std::vector<FlightPtr>();
  Py_RETURN_NONE;
}

PyObject* end_scope(PyObject*, PyObject*) {
  std::unique_ptr<std::vector<FlightPtr>> flights(here.scope);
  here.scope = nullptr;
  auto session = current();
  if (flights && session) session->close_scope(*flights);
  Py_RETURN_NONE;
}

PyObject* original_wait = nullptr;

const void* address_of(PyObject* work) {
  auto* instance = reinterpret_cast<pybind11::detail::instance*>(work);
  return instance->simple_layout ? instance->simple_value_holder[0] : nullptr;
}

PyObject* call_original_wait(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
  const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  // At most a timeout is given.
  PyObject* few[4] = {self};
  std::vector<PyObject*> many;
  PyObject** all = few;
  if (count + named >= 4) {
    many.assign(1 + count + named, self);
    all = many.data();
  }
  std::copy(given, given + count + named, all + 1);
  return PyObject_Vectorcall(original_wait, all, count + 1, names);
}

// `Work.wait`
PyObject* wait(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
  Thread& mine = here;
  const auto session = joined(mine);
  if (!session) return call_original_wait(self, given, count, names);
  const void* work = address_of(self);
  if (mine.call.t0 && mine.call.work == work) {
    Call call = mine.call;
    mine.call.t0 = 0;
    PyObject* result = call_original_wait(self, given, count, names);
    const int64_t t1 = now();
    if (mine.session != session || !mine.ring) return result;
    if (!result) return session->leave_open(call), nullptr;
    session->land(call, t1);
    told.spent.fetch_add(now() - t1, std::memory_order_relaxed);
    return result;
  }
  const int64_t t_wait = now();
  const FlightPtr flight = session->claim([work](const Flight& each) { return each.work == work; });
  if (flight) session->begin_wait(*flight, t_wait);
  const int64_t before = now();
  PyObject* result = call_original_wait(self, given, count, names);
  if (!flight || !result) return result;  // an error leaves it open: the ring says what this rank was in
  const int64_t t1 = now();
  session->land(*flight, t1);
  told.spent.fetch_add(before - t_wait + now() - t1, std::memory_order_relaxed);
  return result;
}

PyMethodDef wait_method = {"wait", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(wait)),
                           METH_FASTCALL | METH_KEYWORDS, nullptr};

// (Work, its own wait as its dictionary has it) -> what takes its place
PyObject* observed_wait(PyObject*, PyObject* arguments) {
  PyObject *type, *original;
  if (!PyArg_ParseTuple(arguments, "O!O", &PyType_Type, &type, &original)) return nullptr;
  PyObject* function = PyInstanceMethod_Check(original) ? PyInstanceMethod_GET_FUNCTION(original) : original;
  Py_INCREF(function);
  Py_XSETREF(original_wait, function);
  return PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type), &wait_method);
}

PyMethodDef methods[] = {
    {"install", install, METH_VARARGS, "install(directory, main_ring): begin to record"},
    {"remove", remove, METH_VARARGS, "remove(clean): put everything back, close the rings"},
    {"tell_group", tell_group, METH_VARARGS, "tell_group(process_group_name, name, global_ranks)"},
    {"resume_group", resume_group, METH_VARARGS, "resume_group(process_group_name, offset, counted, messages)"},
    {"forget_group", forget_group, METH_O, "forget_group(process_group_name)"},
    {"sweep", sweep, METH_NOARGS, "once a step -> (ns spent, collectives not recorded, strangers met)"},
    {"tell_timeline", tell_timeline, METH_NOARGS, "what a compiled timeline hears of it at the end of a step"},
    {"begin_scope", begin_scope, METH_NOARGS, "what this thread issues now is waited for before end_scope"},
    {"end_scope", end_scope, METH_NOARGS, "see begin_scope"},
    {"observed_wait", observed_wait, METH_VARARGS, "observed_wait(Work, Work.__dict__['wait'])"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "lens_observer", nullptr, -1, methods};

}  // namespace
}  // namespace lens

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_lens_observer() {
  pthread_atfork(nullptr, nullptr, lens::in_forked_child);
  return PyModule_Create(&lens::module);
}
