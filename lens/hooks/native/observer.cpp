// Sees every collective of every caller: DDP's reducer, functional collectives, DTensor, FSDP2, torch.distributed.
//
// They all call operators of c10d through torch's dispatcher. Their kernels are wrapped in kernels of C++, which need
// no GIL, and are taken out again. `Work.wait` and `wait_tensor` are wrapped to see when somebody waits. What a
// collective computes, and the objects it returns, are untouched.
#include <Python.h>
#include <pthread.h>
#include <pybind11/detail/common.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "flights.hpp"
#include "operators.hpp"

namespace lens {
namespace {

using torch::jit::Stack;

// The session that records; null while nothing is wrapped, and in forked children. Never destroyed: threads of torch
// may outlive static objects.
std::shared_ptr<Session>& slot() {
  static auto* session = new std::shared_ptr<Session>();
  return *session;
}
std::atomic<const Session*> recording{nullptr};  // the same, to compare with

std::shared_ptr<Session> current() { return std::atomic_load(&slot()); }

void record_with(std::shared_ptr<Session> session) {
  recording = session.get();
  std::atomic_store(&slot(), std::move(session));
}

// The session that records, joined by this thread. A thread keeps the one it has joined, so that as a rule nothing
// shared is written here.
std::shared_ptr<Session> joined() {
  const Session* wanted = recording.load(std::memory_order_acquire);
  if (!wanted) return nullptr;
  if (here.session.get() == wanted) return here.session;
  auto session = current();
  if (session) session->join();
  return session;
}

// The kernel in place of an operator's own: notes entry and end around it.
class Observed final : public c10::OperatorKernel {
 public:
  Observed(const Operator& spec, size_t place, const c10::FunctionSchema& schema, c10::DispatchKey key)
      : spec_(spec),
        record_(spec.record),
        place_(place),
        on_cpu_(key == c10::DispatchKey::CPU),
        completes_(on_cpu_ && !*spec.peer) {
    auto index = [&](const char* name) {
      auto found = *name ? schema.argumentIndexWithName(name) : std::nullopt;
      return found ? *found : -1;
    };
    count_ = schema.arguments().size();
    group_ = index("process_group");
    input_ = index(spec.input);
    output_ = index(spec.output);
    peer_ = index(spec.peer);
    async_ = index("async_op");
    splits_ = index("input_split_sizes");
    is_message_ = std::string(spec.record) == "send" || std::string(spec.record) == "recv";
    if (is_message_) completes_ = false;
    gives_ = splits_ >= 0 || spec.name == std::string("alltoall_");
  }

  std::shared_ptr<c10::SafeKernelFunction> kernel;

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto session = joined();
    if (!session) return std::atomic_load(&kernel)->callBoxed(op, keys, stack);
    const int64_t t0 = now();
    const auto& original = *static_cast<const c10::SafeKernelFunction*>(session->kernels[place_].get());
    const c10::IValue* arguments = stack->data() + stack->size() - count_;
    const bool is_async = async_ >= 0 ? arguments[async_].toBool() : is_message_;
    if (!is_async && !is_message_ && here.ring && !here.scope)
      return call(*session, original, op, keys, stack, t0);
    c10::intrusive_ptr<c10d::ProcessGroup> group;
    FlightPtr flight;
    try {
      group = arguments[group_].toCustomClass<c10d::ProcessGroup>();
      flight = enter(*session, *group, arguments, is_async, t0);
    } catch (...) {
      ++session->unrecorded;
    }
    const int64_t before = now();
    try {
      original.callBoxed(op, keys, stack);
    } catch (...) {
      if (flight) session->drop(*flight);
      throw;
    }
    const int64_t after = now();
    if (flight) {
      try {
        leave(session, *group, flight, result_of(stack), after);
      } catch (...) {
        ++session->unrecorded;
      }
    }
    told.spent.fetch_add(before - t0 + now() - after, std::memory_order_relaxed);
  }

 private:
  // One that its own call waits for. The call and its wait are one thread's, one after the other.
  void call(Session& session, const c10::SafeKernelFunction& original, const c10::OperatorHandle& op,
            c10::DispatchKeySet keys, Stack* stack, int64_t t0) {
    if (here.call.t0) session.leave_behind(here.call);
    Call entered;
    std::shared_ptr<Group> group;
    try {
      const c10::IValue* arguments = stack->data() + stack->size() - count_;
      const auto& process_group = arguments[group_].toCustomClass<c10d::ProcessGroup>();
      entered.t0 = t0;
      entered.is_async = false;
      entered.completes = on_cpu_;
      measure(entered, arguments);
      session.locate(entered);
      group = group_of(session, *process_group);
      entered.group = group->name;
      entered.number = group->next([&] { return process_group->getSequenceNumberForGroup(); });
      if (gives_) add_given(session, *group, entered, arguments);
      session.enter(entered);
    } catch (...) {
      entered.t0 = 0;
      ++session.unrecorded;
    }
    const int64_t before = now();
    try {
      original.callBoxed(op, keys, stack);
    } catch (...) {
      if (entered.t0) {
        group->take_back();
        session.unblock(now());
      }
      throw;
    }
    if (!entered.t0) return;
    const int64_t after = now();
    entered.t_return = after;
    entered.work = work_of(result_of(stack)).get();
    if (entered.work && here.ring && here.session.get() == &session)
      here.call = entered;
    else if (!entered.work && here.session.get() == &session)
      session.land(entered, after);  // the backend has waited itself
    told.spent.fetch_add(before - t0 + now() - after, std::memory_order_relaxed);
  }

  FlightPtr enter(Session& session, c10d::ProcessGroup& process_group, const c10::IValue* arguments, bool is_async,
                  int64_t t0) {
    auto flight = std::make_shared<Flight>();
    flight->t0 = t0;
    flight->is_message = is_message_;
    flight->is_async = is_async;
    measure(*flight, arguments);
    if (is_async && output_ >= 0)
      each_tensor(arguments[output_], [&](const at::Tensor& tensor) { flight->results.push_back(storage_of(tensor)); });
    session.locate(*flight);
    const std::shared_ptr<Group> group = group_of(session, process_group);
    if (is_message_) {
      const int64_t own_rank = process_group.getRank();
      flight->own_before = own_number(*group, process_group);
      number_message(session, *group, own_rank, *flight, arguments);
    } else {
      flight->group = group->name;
      flight->number = group->next([&] { return process_group.getSequenceNumberForGroup(); });
      if (gives_) add_given(session, *group, *flight, arguments);
    }
    session.enter(*flight);
    return flight;
  }

  void measure(Entry& entry, const c10::IValue* arguments) const {
    entry.op = &record_;
    if (input_ < 0) return;
    each_tensor(arguments[input_], [&](const at::Tensor& tensor) {
      if (!entry.dtype) entry.dtype = dtype_name(tensor.scalar_type());
      entry.size += tensor.nbytes();
    });
  }

  static std::shared_ptr<Group> group_of(Session& session, const c10d::ProcessGroup& process_group) {
    const int64_t heard = session.heard.load(std::memory_order_acquire);
    for (const Thread::Known& known : here.known)
      if (known.process_group == &process_group && known.heard == heard) return known.group;
    // Asked before the lock is taken: a process group written in Python takes the GIL to answer.
    const std::string own_name = process_group.getGroupName();
    std::lock_guard guard(session.lock);
    auto group = session.group(own_name);
    if (group->name) here.known[here.next_known++ % Thread::kGroups] = {&process_group, group, heard};
    return group;
  }

  static c10::IValue result_of(Stack* stack) { return stack->empty() ? c10::IValue() : stack->back(); }

  static c10::intrusive_ptr<c10d::Work> work_of(const c10::IValue& result) {
    return result.isCustomClass() ? result.toCustomClass<c10d::Work>() : nullptr;
  }

  void leave(const std::shared_ptr<Session>& session, c10d::ProcessGroup& process_group, const FlightPtr& flight,
             const c10::IValue& result, int64_t after) {
    flight->t_return = after;
    if (is_message_) {
      // Where the backend numbers messages too, they must not shift the numbers of collectives.
      const std::shared_ptr<Group> group = group_of(*session, process_group);
      group->offset -= own_number(*group, process_group) - flight->own_before;
    }
    const auto work = work_of(result);
    if (!work) {
      flight->is_async = false;  // the backend has waited itself
      session->land(*flight, after);
      return;
    }
    flight->work = work.get();
    if (flight->is_async) {
      session->unblock(after);
      watch_backward(session, *flight);
    }
    watch_completion(*work, flight);
    session->park(flight);
  }

  static int64_t own_number(Group& group, c10d::ProcessGroup& process_group) {
    if (group.asked && !group.numbered) return 0;
    try {
      const int64_t number = process_group.getSequenceNumberForGroup();
      group.asked = group.numbered = true;
      return number;
    } catch (...) {
      // Backends without numbers say so in several ways; all of them mean: count ourselves.
      group.asked = true;
      group.numbered = false;
      return 0;
    }
  }

  void number_message(Session& session, Group& group, int64_t own_rank, Flight& flight,
                      const c10::IValue* arguments) {
    std::lock_guard guard(session.lock);
    auto global = [&](int64_t rank) {
      return rank >= 0 && rank < static_cast<int64_t>(group.ranks.size()) ? group.ranks[rank] : -1;
    };
    const int64_t own = global(own_rank);
    const int64_t peer = peer_ >= 0 ? global(arguments[peer_].toInt()) : -1;
    const bool sends = *spec_.peer == 'd';
    Pair& pair = sends ? session.pair(group, own, peer) : session.pair(group, peer, own);
    flight.group = pair.name;
    flight.peer = peer;
    // From anyone: the sender is not known before, and so neither is the number.
    flight.number = peer >= 0 ? ++pair.count : kNull;
  }

  void add_given(Session& session, Group& group, const Entry& flight, const c10::IValue* arguments) {
    std::lock_guard guard(session.lock);
    const size_t members = group.ranks.size();
    if (!members) return;
    std::vector<double> given(members, 0.0);
    if (splits_ < 0) {
      size_t place = 0;
      each_tensor(arguments[input_], [&](const at::Tensor& tensor) {
        if (place < members) given[place++] = tensor.nbytes();
      });
    } else {
      const auto splits = arguments[splits_].toIntVector();
      const at::Tensor& input = arguments[input_].toTensor();
      const double row = input.dim() && input.size(0) ? double(flight.size) / input.size(0) : 0;
      for (size_t place = 0; place < members; ++place)
        given[place] = splits.empty() ? double(flight.size) / members : place < splits.size() ? splits[place] * row : 0;
    }
    if (group.given.size() != members || group.given_step != flight.step) group.given.assign(members, 0.0);
    group.given_step = flight.step;
    session.gave = told.waiting = true;
    for (size_t place = 0; place < members; ++place) group.given[place] += given[place];
  }

  // Only where it costs no work of a device: a callback on a card's future would occupy a stream.
  void watch_completion(c10d::Work& work, const FlightPtr& flight) {
    if (!completes_) return;
    try {
      auto future = work.getFuture();
      if (!future) return;
      if (flight->graph_task >= 0) flight->completed = [future] { return future->completed(); };
      future->addCallback([flight](c10::ivalue::Future&) { flight->complete(now()); }, /*uses_future=*/false);
    } catch (...) {
      completes_ = false;  // this backend has none for this operator: asking costs more than all the rest
    }
  }

  // DDP's reducer waits in C++, when the backward pass has computed: that time is taken by the pass's own callbacks.
  static void watch_backward(const std::shared_ptr<Session>& session, Flight& flight) {
    const int task = torch::autograd::get_current_graph_task_id();
    flight.graph_task = task;
    if (task < 0 || here.graph_task == task) return;
    here.graph_task = task;
    std::weak_ptr<Session> known = session;
    auto mark = [known, task](bool left) {
      if (auto found = known.lock()) found->mark_backward(task, now(), left);
    };
    torch::autograd::Engine::get_default_engine().queue_callback([mark] {
      mark(false);
      // Stands behind what others have queued for the end of the pass, so it comes when they have waited.
      torch::autograd::Engine::get_default_engine().queue_callback([mark] { mark(true); });
    });
  }

  const Operator& spec_;
  const std::string record_;
  const size_t place_;  // among those that are wrapped
  const bool on_cpu_;
  int count_, group_, input_, output_, peer_, async_, splits_;
  bool is_message_, gives_;
  std::atomic<bool> completes_;
};

// `wait_tensor`: how functional collectives and DTensor wait.
class ObservedWait final : public c10::OperatorKernel {
 public:
  std::shared_ptr<c10::SafeKernelFunction> kernel;

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    auto original = std::atomic_load(&kernel);
    auto session = joined();
    FlightPtr flight;
    const int64_t t_wait = now();
    if (session && stack->back().isTensor()) {
      const void* storage = storage_of(stack->back().toTensor());
      flight = session->claim([&](const Flight& each) {
        return std::find(each.results.begin(), each.results.end(), storage) != each.results.end();
      });
      if (flight) session->begin_wait(*flight, t_wait);
    }
    const int64_t before = now();
    original->callBoxed(op, keys, stack);
    if (!flight) return;
    const int64_t t1 = now();
    session->land(*flight, t1);
    told.spent.fetch_add(before - t_wait + now() - t1, std::memory_order_relaxed);
  }
};

// --- wrapping and unwrapping ------------------------------------------------------------------------------------

struct Wrapped {
  c10::OperatorName name;
  c10::DispatchKey key;
  c10::KernelFunction replacement;  // keeps the kernel object alive for threads that are in it, whatever is undone
  std::shared_ptr<c10::SafeKernelFunction>* original;
};

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

template <typename Kernel, typename... Arguments>
Wrapped wrapped(const c10::OperatorName& name, c10::DispatchKey key, Arguments&&... arguments) {
  auto kernel = std::make_unique<Kernel>(std::forward<Arguments>(arguments)...);
  auto* original = &kernel->kernel;
  return {name, key, c10::KernelFunction::makeFromBoxedFunctor(std::move(kernel)), original};
}

std::vector<Wrapped>& all_wrapped() {
  static auto* all = [] {
    auto* made = new std::vector<Wrapped>();
    auto& dispatcher = c10::Dispatcher::singleton();
    for (auto key : kKeys) {
      for (const Operator& spec : kOperators) {
        auto op = dispatcher.findSchema({std::string("c10d::") + spec.name, ""});
        if (!op || !op->hasKernelForDispatchKey(key) || !op->schema().argumentIndexWithName("process_group")) continue;
        made->push_back(wrapped<Observed>(op->operator_name(), key, spec, made->size(), op->schema(), key));
      }
      auto wait = dispatcher.findSchema({"_c10d_functional::wait_tensor", ""});
      if (wait) made->push_back(wrapped<ObservedWait>(wait->operator_name(), key));
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
    auto original = std::make_shared<c10::SafeKernelFunction>(op->getComputedKernelForDispatchKey(each.key));
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
  const auto session = joined();
  if (!session) return call_original_wait(self, given, count, names);
  const void* work = address_of(self);
  if (here.call.t0 && here.call.work == work) {
    Call call = std::exchange(here.call, {});
    PyObject* result = call_original_wait(self, given, count, names);
    const int64_t t1 = now();
    if (here.session != session || !here.ring) return result;
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
