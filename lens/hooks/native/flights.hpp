// Collectives between entry and end: where each stands, who waits for it, and what is written once that is known.
//
// Knows nothing of torch. A flight is noted in the ring's header when it is entered, so that it is seen after a kill;
// its slot is written when it has landed: when the call or the wait for it is over, or when nobody will wait.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

#include "groups.hpp"
#include "ring.hpp"
#include "told.hpp"

namespace lens {

constexpr int64_t kAsync = 1;
// Sweeps after which a collective that nobody has waited for counts as never waited for.
constexpr int kPatience = 2;
constexpr size_t kMostParked = 4096;

// What is written of a collective, whoever waits for it.
struct Entry {
  const std::string *op = nullptr, *group = nullptr, *dtype = nullptr, *phase = nullptr;
  int64_t t0 = 0, step = kNull, number = kNull, size = 0, peer = -1;
  int64_t t_return = 0, t_wait = kNull;
  bool is_async = true, is_message = false;
  const void* work = nullptr;  // only ever compared
};

// One that the call itself waits for, in the thread that made it: nobody else needs to hear of it, so it takes no lock
// and no memory of its own. In the ring's header it is the collective its thread is in; a place of its own it needs
// only when it is left behind.
struct Call : Entry {
  int64_t ids = 0;         // of its operation and group in its thread's ring
  bool completes = false;  // whoever has waited knows that it is completed
};

struct Flight : Entry {
  Flight() = default;
  explicit Flight(const Entry& entry) : Entry(entry) {}

  int64_t own_before = 0;  // the backend's number before a message
  std::atomic<int64_t> done{0};
  std::vector<const void*> results;  // storages of the outputs, only ever compared
  int graph_task = -1;
  int64_t backward_done = 0, backward_left = 0;  // when its backward pass had computed, and when it was left
  bool over_in_backward = false;                 // it was completed by then
  std::function<bool()> completed;               // asks, until its backward pass is left: `done` is told late on a busy machine
  int sweeps = 0;
  std::shared_ptr<Ring> ring;  // keeps `place` mapped for whoever completes it
  int64_t ids = 0;             // of its operation and group in that ring
  int64_t* place = nullptr;

  void complete(int64_t t) {
    done.store(t, std::memory_order_release);
    if (place && get(place) == t0) put(place + 6, t);
  }
};
using FlightPtr = std::shared_ptr<Flight>;

class Session;
inline Told told;

// What one thread keeps between two collectives: above all what it need not look up again, since in the midst of a
// training step every line of memory that is touched for the first time costs more than the work itself.
struct Thread {
  static constexpr size_t kGroups = 4, kPhases = 32;
  struct Known {
    const void* process_group = nullptr;
    std::shared_ptr<Group> group;
    int64_t heard = -1;  // `Session::heard` when it was looked up: of no use after the next news of a group
  };

  std::shared_ptr<Session> session;
  std::shared_ptr<Ring> ring;
  Call call;                                // made last and not waited for yet
  FlightPtr last;                           // issued last and not waited for yet
  std::vector<FlightPtr>* scope = nullptr;  // what is issued now is waited for before this is over
  int graph_task = -1;
  size_t next_known = 0;
  Known known[kGroups];
  const std::string* phases[kPhases] = {};
  ~Thread();
};
inline thread_local Thread here;

class Session : public std::enable_shared_from_this<Session> {
 public:
  // Args: the folder of this process's rings, and the ring that Python writes, mapped.
  Session(std::string directory, std::unique_ptr<Mapping> main)
      : main_words_(main->words), directory_(std::move(directory)), main_(std::move(main)) {}

  std::atomic<int64_t> unrecorded{0};
  std::atomic<int64_t> heard{0};  // news of groups so far
  std::vector<std::shared_ptr<const void>> kernels;  // those replaced, by their place: in use as long as this is
  bool gave = false;                   // all-to-alls since the last sweep; under the lock
  std::mutex lock;                     // held for table look-ups only, never around a call

  // --- under the lock -----------------------------------------------------------------------------------------

  std::shared_ptr<Group> group(const std::string& process_group) {
    std::shared_ptr<Group>& found = groups_[process_group];
    if (!found) found = std::make_shared<Group>();
    if (!found->name) told.strangers = true;
    return found;
  }

  const std::string* keep(const std::string& text) { return &*texts_.insert(text).first; }

  void tell(const std::string& process_group, const std::string& name, std::vector<int64_t> ranks) {
    std::shared_ptr<Group>& group = groups_[process_group];
    if (!group) group = std::make_shared<Group>();
    if (group->name && *group->name.load() != name) group->pairs.clear();
    group->name = keep(name);
    group->ranks = std::move(ranks);
    group->labels = keep("{\"group\":\"" + name + "\",\"op\":\"all_to_all\"}");
    ++heard;
  }

  void forget(const std::string& process_group) {
    groups_.erase(process_group);
    ++heard;
  }

  Pair& pair(Group& group, int64_t source, int64_t target) {
    Pair& found = group.pairs[{source, target}];
    if (!found.name) {
      const std::string from = source < 0 ? "any" : std::to_string(source);
      found.name = keep((group.name ? *group.name.load() : "") + ":" + from + "-" + std::to_string(target));
    }
    return found;
  }

  // --- by the thread that calls -------------------------------------------------------------------------------

  // Makes this thread, and what it keeps, one of this session.
  void join() {
    here.last = nullptr;
    here.call = {};
    here.ring = nullptr;
    std::fill(std::begin(here.known), std::end(here.known), Thread::Known{});
    std::fill(std::begin(here.phases), std::end(here.phases), nullptr);
    std::lock_guard guard(lock);
    if (!spare_.empty()) {
      here.ring = spare_.back();
      spare_.pop_back();
      here.ring->words()[kThreadWord] = gettid();
    } else if ((here.ring = Ring::create(directory_, main_->words[kSlotCountWord]))) {
      rings_.push_back(here.ring);
    }
    here.session = shared_from_this();
  }

  // Null where there was no room for one.
  Ring* ring() {
    if (here.session.get() != this) join();
    return here.ring.get();
  }

  // Where the training is: its step, and the name of its phase.
  void locate(Entry& entry, Thread& mine) {
    const int64_t* word = main_words_;
    entry.step = get(word + kStepWord) ? get(word + kStepWord + 1) : kNull;
    const size_t id = get(word + kPhaseWord) ? get(word + kPhaseWord + 1) : 0;
    if (!id) return;
    entry.phase = id < Thread::kPhases ? mine.phases[id] : nullptr;
    if (entry.phase) return;
    std::lock_guard guard(lock);
    while (id >= phases_.size() && strings_read_ < get(word + kStringsUsedWord)) {
      const char* at = reinterpret_cast<const char*>(word) + word[kStringsAtWord] + strings_read_;
      uint32_t length;
      memcpy(&length, at, 4);
      phases_.push_back(keep(std::string(at + 4, length)));
      strings_read_ += 4 + length;
    }
    entry.phase = id < phases_.size() ? phases_[id] : nullptr;
    if (id < Thread::kPhases) mine.phases[id] = entry.phase;
  }

  void give_back(std::shared_ptr<Ring> ring) {
    std::lock_guard guard(lock);
    if (ring) spare_.push_back(std::move(ring));
  }

  void enter(Flight& flight) {
    Ring* own = ring();
    if (!own) return;
    flight.ring = here.ring;
    take_place(*own, flight);
    block(flight);
  }

  // A collective that its own call waits for: its ring is known to be there.
  void enter(Ring& own, Call& call) {
    call.ids = own.intern(call.op) | own.intern(call.group) << 32;
    block(own, call, call.ids);
    own.expect();
  }

  // The wait for it is over; so that wait and call are one, nothing is told of the wait.
  void land(Call& call, int64_t t1) {
    Ring& own = *here.ring;
    write(own, call, call.ids, t1, call.completes ? t1 : kNull);
    if (get(own.words() + kBlockedWord) == call.t0) unblock(t1);
    call.t0 = 0;
  }

  // Another one begins, or the step ends, and nobody has waited for it: as if it had been asynchronous.
  void leave_behind(Call& call) {
    auto flight = std::make_shared<Flight>(call);
    call.t0 = 0;
    take_place(*here.ring, *flight);
    park(flight);
  }

  // The wait for it has failed: the ring says what this rank was in.
  void leave_open(Call& call) {
    Flight flight(call);
    call.t0 = 0;
    take_place(*here.ring, flight);
  }

  // This thread is in the collective.
  void block(Flight& flight) {
    if (Ring* own = ring()) block(*own, flight, ids(*own, flight));
  }

  void unblock(int64_t t) {
    if (Ring* own = ring()) {
      put(own->words() + kBlockedWord + 5, t);
      put(own->words() + kBlockedWord, 0);
    }
  }

  // The call has returned and left something to wait for.
  void park(const FlightPtr& flight) {
    here.last = flight;
    if (here.scope) {
      here.scope->push_back(flight);
      return;
    }
    FlightPtr oldest;
    {
      told.waiting = true;
      std::lock_guard guard(lock);
      parked_.push_back(flight);
      if (parked_.size() > kMostParked) {
        oldest = parked_.front();
        parked_.erase(parked_.begin());
      }
    }
    if (oldest) land(*oldest, oldest->t_return);
  }

  // The flight that somebody begins to wait for, now his; null for what was not seen or has landed.
  template <typename Match>
  FlightPtr claim(Match match) {
    std::lock_guard guard(lock);
    for (auto each = parked_.rbegin(); each != parked_.rend(); ++each) {
      if (!match(**each)) continue;
      FlightPtr found = *each;
      parked_.erase(std::next(each).base());
      return found;
    }
    return nullptr;
  }

  void begin_wait(Flight& flight, int64_t t) {
    // Waited for at once by who issued it: that is what a blocking call does.
    if (flight.is_message && here.last.get() == &flight) flight.is_async = false;
    here.last = nullptr;
    if (flight.is_async) flight.t_wait = t;
    if (flight.place) put(flight.place + 5, t);
    block(flight);
  }

  // Its end is known: write it.
  void land(Flight& flight, int64_t t1) {
    if (flight.place && get(flight.place) == flight.t0) put(flight.place, 0);
    flight.place = nullptr;
    Ring* own = ring();
    if (!own) {
      ++unrecorded;
      return;
    }
    int64_t done = flight.done.load(std::memory_order_acquire);
    // Who waits may be woken before the one who takes the time: it was completed by the end of the wait.
    if (done && flight.t_wait != kNull) done = std::min(done, t1);
    write(*own, flight, ids(*own, flight), t1, done ? done : kNull);
    if (get(own->words() + kBlockedWord) == flight.t0) unblock(t1);
  }

  void drop(Flight& flight) {
    if (flight.place && get(flight.place) == flight.t0) put(flight.place, 0);
    flight.place = nullptr;
    unblock(now());
  }

  // The scope in which C++ waited for all that it had issued is over.
  void close_scope(std::vector<FlightPtr>& flights) {
    for (auto& flight : flights) {
      flight->is_async = false;
      land(*flight, std::max(flight->t_return, flight->done.load()));
    }
    flights.clear();
  }

  // A backward pass has computed; what it issued is waited for now, in order, before the pass is left.
  void mark_backward(int graph_task, int64_t t, bool left) {
    std::lock_guard guard(lock);
    for (auto& flight : parked_) {
      if (flight->graph_task != graph_task) continue;
      (left ? flight->backward_left : flight->backward_done) = t;
      if (left && flight->completed) {
        flight->over_in_backward = flight->done || flight->completed();
        flight->completed = nullptr;
      }
      if (flight->place && !flight->done) put(flight->place + 5, left ? 0 : t);
    }
  }

  // Once a step: write what nobody waits for any more, and what the step's all-to-alls gave to whom.
  void sweep(bool all) {
    if (here.session.get() == this && here.call.t0) leave_behind(here.call);
    told.waiting = false;
    std::vector<FlightPtr> landed, waiting;
    bool given;
    {
      std::lock_guard guard(lock);
      given = std::exchange(gave, false);
      // As a rule: everything was waited for, and cold code would only cost.
      if (parked_.empty() && !given) return;
      for (auto& flight : parked_) {
        const bool over = all || flight->over_in_backward || ++flight->sweeps >= kPatience;
        (over ? landed : waiting).push_back(std::move(flight));
      }
      parked_.swap(waiting);
      if (!parked_.empty()) told.waiting = true;
    }
    std::map<int, int64_t> reached;
    for (auto& flight : landed) {
      const int64_t done = flight->done;
      if (!flight->over_in_backward) {
        land(*flight, flight->is_async ? flight->t_return : std::max(flight->t_return, done));
        continue;
      }
      const int64_t left = flight->backward_left;
      int64_t& at = reached[flight->graph_task];
      flight->t_wait = at = std::max({at, flight->backward_done, flight->t_return});
      at = std::max(at, done ? std::min(done, left) : left);
      if (!done) flight->done = left;
      land(*flight, at);
    }
    if (given) record_given();
  }

  void close(bool clean) {
    sweep(true);
    std::lock_guard guard(lock);
    for (auto& ring : rings_) put(ring->words() + kClosedWord, clean ? 1 : 0);
  }

 private:
  static void block(Ring& ring, const Entry& entry, int64_t ids) {
    int64_t* word = ring.words() + kBlockedWord;
    put(word, 0);
    word[1] = ids;
    word[2] = entry.number;
    word[3] = entry.size;
    word[4] = entry.step;
    put(word + 5, 0);
    put(word, entry.t0);
  }

  static void write(Ring& ring, const Entry& entry, int64_t ids, int64_t t1, int64_t done) {
    int64_t* slot = ring.begin(kCollective);
    slot[2] = entry.t0;
    slot[3] = std::max(t1, entry.t0);
    slot[4] = entry.step;
    slot[5] = ids;
    slot[6] = entry.number;
    slot[7] = entry.size;
    slot[8] = entry.t_wait;
    slot[9] = done;
    slot[10] = ring.intern(entry.dtype) | ring.intern(entry.phase) << 32;
    slot[11] = 0;
    slot[12] = (entry.peer + 1) | (entry.is_async ? kAsync : 0) << 32;
    ring.finish(slot);
  }

  void take_place(Ring& ring, Flight& flight) {
    flight.place = ring.take_place();
    if (!flight.place) return;
    int64_t* word = flight.place;
    word[1] = ids(ring, flight);
    word[2] = flight.number;
    word[3] = flight.size;
    word[4] = flight.step;
    put(word + 5, 0);
    put(word + 6, 0);
    word[7] = flight.is_async || flight.is_message ? kAsync : 0;
    put(word, flight.t0);
  }

  int64_t ids(Ring& ring, Flight& flight) {
    const bool own = &ring == flight.ring.get();
    if (own && flight.ids) return flight.ids;
    const int64_t found = ring.intern(flight.op) | ring.intern(flight.group) << 32;
    if (own) flight.ids = found;
    return found;
  }

  void record_given() {
    static const std::string metric = "comm.given.bytes";
    Ring* own = ring();
    if (!own) return;
    const int64_t t = now();
    std::lock_guard guard(lock);
    for (auto& [name, group] : groups_) {
      if (group->given.empty() || !group->labels) continue;
      own->vector(own->intern(&metric) | own->intern(group->labels) << 32, t, group->given_step,
                  group->given.data(), group->given.size());
      group->given.clear();
    }
  }

  const int64_t* const main_words_;
  const std::string directory_;
  std::unique_ptr<Mapping> main_;
  std::unordered_map<std::string, std::shared_ptr<Group>> groups_;
  std::unordered_set<std::string> texts_;
  std::vector<const std::string*> phases_{nullptr};
  int64_t strings_read_ = 0;
  std::vector<FlightPtr> parked_;
  std::vector<std::shared_ptr<Ring>> rings_, spare_;
};

inline Thread::~Thread() {
  if (session) session->give_back(std::move(ring));
}

}  // namespace lens
