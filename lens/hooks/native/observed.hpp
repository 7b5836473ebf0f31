// What stands in the place of c10d's kernels: notes entry and end of a collective, and calls what it stands for.
//
// A kernel that knows the types of its operator's arguments is called with them as they are. One that does not gets
// them packed into boxes, which alone costs more than all that is done here; that is left for what is seldom called,
// and for a torch whose operators are not as they are known.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "flights.hpp"
#include "operators.hpp"

namespace lens {

using torch::jit::Stack;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// The session that records; null while nothing is wrapped, and in forked children. Never destroyed: threads of torch
// may outlive static objects.
inline std::shared_ptr<Session>& slot() {
  static auto* session = new std::shared_ptr<Session>();
  return *session;
}
inline std::atomic<const Session*> recording{nullptr};  // the same, to compare with

inline std::shared_ptr<Session> current() { return std::atomic_load(&slot()); }

inline void record_with(std::shared_ptr<Session> session) {
  recording = session.get();
  std::atomic_store(&slot(), std::move(session));
}

// The session that records, joined by this thread. A thread keeps the one it has joined, so that as a rule nothing
// shared is written here.
inline std::shared_ptr<Session> joined(Thread& mine) {
  const Session* wanted = recording.load(std::memory_order_acquire);
  if (!wanted) return nullptr;
  if (mine.session.get() == wanted) return mine.session;
  auto session = current();
  if (session) session->join();
  return session;
}

// The kernel that calls find in place. torch gives it out for calls with boxes only, and notes at the kernel, for ever,
// each time it was given out. This names the member that leads to the table that calls look into.
template <auto Definition>
struct Table {
  friend const c10::KernelFunction& kernel_in_place(const c10::OperatorHandle& op, c10::DispatchKey key) {
    return (op.*Definition)->op.lookup(c10::DispatchKeySet(key));
  }
};
const c10::KernelFunction& kernel_in_place(const c10::OperatorHandle&, c10::DispatchKey);
template struct Table<&c10::OperatorHandle::operatorDef_>;

// What every kernel in an operator's place does, however it is called.
class Observed {
 public:
  Observed(const Operator& spec, size_t place, const c10::OperatorHandle& op, c10::DispatchKey key)
      : op_(op), place_(place), completes_(key == c10::DispatchKey::CPU), on_cpu_(completes_), spec_(spec), record_(spec.record) {
    auto index = [&](const char* name) {
      auto found = *name ? op.schema().argumentIndexWithName(name) : std::nullopt;
      return found ? *found : -1;
    };
    count_ = op.schema().arguments().size();
    group_ = index("process_group");
    input_ = index(spec.input);
    output_ = index(spec.output);
    peer_ = index(spec.peer);
    async_ = index("async_op");
    splits_ = index("input_split_sizes");
    is_message_ = record_ == "send" || record_ == "recv";
    if (is_message_ || *spec.peer) completes_ = false;
    gives_ = splits_ >= 0 || spec.name == std::string("alltoall_");
  }

  std::shared_ptr<const c10::KernelFunction> kernel;  // the one replaced last

 protected:
  // From entry to return. Args: what the arguments say, and the call of the kernel that this stands for.
  template <typename Given, typename Run>
  auto observe(const std::shared_ptr<Session>& session, Thread& mine, int64_t t0, const Given& given, Run&& run) {
    const bool is_async = given.is_async();
    if (!is_async && !is_message_ && mine.ring && !mine.scope) return call(*session, mine, t0, given, run);
    FlightPtr flight;
    try {
      flight = enter(*session, given, is_async, t0);
    } catch (...) {
      ++session->unrecorded;
    }
    const int64_t before = now();
    auto result = [&] {
      try {
        return run();
      } catch (...) {
        if (flight) session->drop(*flight);
        throw;
      }
    }();
    const int64_t after = now();
    if (flight) {
      try {
        leave(session, given.group(), flight, work_in(result), after);
      } catch (...) {
        ++session->unrecorded;
      }
    }
    told.spent.fetch_add(before - t0 + now() - after, std::memory_order_relaxed);
    return result;
  }

  const c10::OperatorHandle op_;
  const size_t place_;  // among those that are wrapped
  int count_, group_, input_, output_, peer_, async_, splits_;
  bool is_message_, gives_;

 private:
  // One that its own call waits for. The call and its wait are one thread's, one after the other.
  template <typename Given, typename Run>
  auto call(Session& session, Thread& mine, int64_t t0, const Given& given, Run&& run) {
    if (mine.call.t0) session.leave_behind(mine.call);
    Call entered;
    std::shared_ptr<Group> group;
    try {
      auto& process_group = given.group();
      entered.t0 = t0;
      entered.is_async = false;
      entered.completes = on_cpu_;
      measure(entered, given);
      session.locate(entered, mine);
      group = group_of(session, mine, process_group);
      entered.group = group->name;
      entered.number = group->next([&] { return process_group.getSequenceNumberForGroup(); });
      if (gives_) add_given(session, *group, entered, given);
      session.enter(*mine.ring, entered);
    } catch (...) {
      entered.t0 = 0;
      ++session.unrecorded;
    }
    const int64_t before = now();
    auto result = [&] {
      try {
        return run();
      } catch (...) {
        if (entered.t0) {
          group->take_back();
          session.unblock(now());
        }
        throw;
      }
    }();
    if (!entered.t0) return result;
    const int64_t after = now();
    entered.t_return = after;
    entered.work = work_in(result);
    if (mine.session.get() == &session) {
      if (!entered.work)
        session.land(entered, after);  // the backend has waited itself
      else if (mine.ring)
        mine.call = entered;
    }
    told.spent.fetch_add(before - t0 + now() - after, std::memory_order_relaxed);
    return result;
  }

  template <typename Given>
  FlightPtr enter(Session& session, const Given& given, bool is_async, int64_t t0) {
    auto flight = std::make_shared<Flight>();
    flight->t0 = t0;
    flight->is_message = is_message_;
    flight->is_async = is_async;
    measure(*flight, given);
    if (is_async)
      given.each_output([&](const at::Tensor& tensor) { flight->results.push_back(storage_of(tensor)); });
    session.locate(*flight, here);
    auto& process_group = given.group();
    const std::shared_ptr<Group> group = group_of(session, here, process_group);
    if (is_message_) {
      flight->own_before = own_number(*group, process_group);
      number_message(session, *group, process_group.getRank(), *flight, given.peer());
    } else {
      flight->group = group->name;
      flight->number = group->next([&] { return process_group.getSequenceNumberForGroup(); });
      if (gives_) add_given(session, *group, *flight, given);
    }
    session.enter(*flight);
    return flight;
  }

  template <typename Given>
  void measure(Entry& entry, const Given& given) const {
    entry.op = &record_;
    given.each_input([&](const at::Tensor& tensor) {
      if (!entry.dtype) entry.dtype = dtype_name(tensor.scalar_type());
      entry.size += tensor.nbytes();
    });
  }

  static std::shared_ptr<Group> group_of(Session& session, Thread& mine, const c10d::ProcessGroup& process_group) {
    const int64_t heard = session.heard.load(std::memory_order_acquire);
    for (const Thread::Known& known : mine.known)
      if (known.process_group == &process_group && known.heard == heard) return known.group;
    // Asked before the lock is taken: a process group written in Python takes the GIL to answer.
    const std::string own_name = process_group.getGroupName();
    std::lock_guard guard(session.lock);
    auto group = session.group(own_name);
    if (group->name) mine.known[mine.next_known++ % Thread::kGroups] = {&process_group, group, heard};
    return group;
  }

  // What a collective has returned, to compare with what somebody waits for.
  static c10d::Work* work_in(const WorkPtr& work) { return work.get(); }
  template <typename Results>
  static c10d::Work* work_in(const std::tuple<Results, WorkPtr>& result) {
    return std::get<1>(result).get();
  }
  static c10d::Work* work_in(const c10::IValue* result) {
    return result && result->isCustomClass() ? result->toCustomClass<c10d::Work>().get() : nullptr;
  }

  void leave(const std::shared_ptr<Session>& session, c10d::ProcessGroup& process_group, const FlightPtr& flight,
             c10d::Work* work, int64_t after) {
    flight->t_return = after;
    if (is_message_) {
      // Where the backend numbers messages too, they must not shift the numbers of collectives.
      const std::shared_ptr<Group> group = group_of(*session, here, process_group);
      group->offset -= own_number(*group, process_group) - flight->own_before;
    }
    if (!work) {
      flight->is_async = false;  // the backend has waited itself
      session->land(*flight, after);
      return;
    }
    flight->work = work;
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

  void number_message(Session& session, Group& group, int64_t own_rank, Flight& flight, int64_t to_or_from) {
    std::lock_guard guard(session.lock);
    auto global = [&](int64_t rank) {
      return rank >= 0 && rank < static_cast<int64_t>(group.ranks.size()) ? group.ranks[rank] : -1;
    };
    const int64_t own = global(own_rank);
    const int64_t peer = global(to_or_from);
    const bool sends = *spec_.peer == 'd';
    Pair& pair = sends ? session.pair(group, own, peer) : session.pair(group, peer, own);
    flight.group = pair.name;
    flight.peer = peer;
    // From anyone: the sender is not known before, and so neither is the number.
    flight.number = peer >= 0 ? ++pair.count : kNull;
  }

  template <typename Given>
  void add_given(Session& session, Group& group, const Entry& flight, const Given& given) {
    std::lock_guard guard(session.lock);
    const size_t members = group.ranks.size();
    if (!members) return;
    std::vector<double> each(members, 0.0);
    if (splits_ < 0) {
      size_t place = 0;
      given.each_input([&](const at::Tensor& tensor) {
        if (place < members) each[place++] = tensor.nbytes();
      });
    } else {
      const std::vector<int64_t> splits = given.splits();
      int64_t rows = 0;
      given.each_input([&](const at::Tensor& tensor) { rows = tensor.dim() ? tensor.size(0) : 0; });
      const double row = rows ? double(flight.size) / rows : 0;
      for (size_t place = 0; place < members; ++place)
        each[place] = splits.empty() ? double(flight.size) / members : place < splits.size() ? splits[place] * row : 0;
    }
    if (group.given.size() != members || group.given_step != flight.step) group.given.assign(members, 0.0);
    group.given_step = flight.step;
    session.gave = told.waiting = true;
    for (size_t place = 0; place < members; ++place) group.given[place] += each[place];
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

  std::atomic<bool> completes_;
  const bool on_cpu_;
  const Operator& spec_;
  const std::string record_;
};

// The kernel of an operator whose arguments have these types.
template <typename Signature, int Input, int Output, int Splits>
class Typed;

template <typename Result, typename... Arguments, int Input, int Output, int Splits>
class Typed<Result(Arguments...), Input, Output, Splits> final : public c10::OperatorKernel, public Observed {
  struct Given {
    std::tuple<const std::remove_reference_t<Arguments>&...> all;

    c10d::ProcessGroup& group() const { return *std::get<const c10::intrusive_ptr<c10d::ProcessGroup>&>(all); }
    bool is_async() const { return std::get<const bool&>(all); }
    template <typename Use>
    void each_input(Use&& use) const {
      if constexpr (Input >= 0) each_tensor(std::get<size_t(Input)>(all), use);
    }
    template <typename Use>
    void each_output(Use&& use) const {
      if constexpr (Output >= 0) each_tensor(std::get<size_t(Output)>(all), use);
    }
    std::vector<int64_t> splits() const {
      if constexpr (Splits >= 0) return std::get<size_t(Splits)>(all);
      return {};
    }
    int64_t peer() const { return -1; }
  };

 public:
  using Observed::Observed;

  // Whether the operator's arguments stand where they are looked for.
  bool fits() const { return input_ == Input && output_ == Output && splits_ == Splits && async_ >= 0 && !is_message_; }

  Result operator()(c10::DispatchKeySet keys, Arguments... arguments) {
    Thread& mine = here;
    const auto session = joined(mine);
    if (!session)
      return std::atomic_load(&kernel)->template call<Result, Arguments...>(op_, keys, std::forward<Arguments>(arguments)...);
    const int64_t t0 = now();
    const auto& original = *static_cast<const c10::KernelFunction*>(session->kernels[place_].get());
    return observe(session, mine, t0, Given{{arguments...}}, [&]() -> Result {
      return original.template call<Result, Arguments...>(op_, keys, std::forward<Arguments>(arguments)...);
    });
  }
};

// The kernel of any other.
class Boxed final : public c10::OperatorKernel, public Observed {
  struct Given {
    const Boxed& of;
    const c10::IValue* arguments;

    c10d::ProcessGroup& group() const { return *arguments[of.group_].toCustomClass<c10d::ProcessGroup>(); }
    bool is_async() const { return of.async_ >= 0 ? arguments[of.async_].toBool() : of.is_message_; }
    template <typename Use>
    void each_input(Use&& use) const {
      if (of.input_ >= 0) each_tensor(arguments[of.input_], use);
    }
    template <typename Use>
    void each_output(Use&& use) const {
      if (of.output_ >= 0) each_tensor(arguments[of.output_], use);
    }
    std::vector<int64_t> splits() const { return arguments[of.splits_].toIntVector(); }
    int64_t peer() const { return of.peer_ >= 0 ? arguments[of.peer_].toInt() : -1; }
  };

 public:
  using Observed::Observed;

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    Thread& mine = here;
    const auto session = joined(mine);
    if (!session) return std::atomic_load(&kernel)->callBoxed(op, keys, stack);
    const int64_t t0 = now();
    const auto& original = *static_cast<const c10::KernelFunction*>(session->kernels[place_].get());
    // The arguments lie on the stack until the kernel takes them; what is read of them afterwards is kept alive here.
    const std::vector<c10::IValue> arguments(stack->end() - count_, stack->end());
    observe(session, mine, t0, Given{*this, arguments.data()}, [&]() -> const c10::IValue* {
      original.callBoxed(op, keys, stack);
      return stack->empty() ? nullptr : &stack->back();
    });
  }
};

// `wait_tensor`: how functional collectives and DTensor wait.
class ObservedWait final : public c10::OperatorKernel {
 public:
  std::shared_ptr<const c10::KernelFunction> kernel;

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    auto original = std::atomic_load(&kernel);
    auto session = joined(here);
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

}  // namespace lens
