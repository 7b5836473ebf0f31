// Process groups, and the number of each one's next collective.
//
// A backend numbers its collectives, but asking it costs more than most of what is done for one. As in `lens.hooks.
// groups`: once it has agreed with our own count for a while it is asked about one in so many, the same ones on every
// rank.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ring.hpp"

namespace lens {

constexpr int kAskedFirst = 64, kAskedEvery = 64, kAskedAtMost = 1 << 20;

struct Pair {
  const std::string* name;
  int64_t count = 0;
};

// A process group, as Python has told of it.
struct Group {
  // What every collective asks for stands in one line of memory, and is used without the session's lock:
  std::atomic<const std::string*> name{nullptr};  // null: not told of yet
  std::atomic<int64_t> offset{1};   // backend's number of the last collective + offset = number of the next
  std::atomic<int64_t> counted{0};  // number of the last collective that we have given one
  std::atomic<int> as_expected{0};  // times in a row that the backend has agreed
  std::atomic<int> wanted{kAskedFirst};
  std::atomic<bool> asked{false}, numbered{false};
  // And what is not:
  const std::string* labels = nullptr;
  std::vector<int64_t> ranks;  // global, in the order of ranks in the group
  std::map<std::pair<int64_t, int64_t>, Pair> pairs;  // messages, by global source and target
  std::vector<double> given;                          // bytes of all-to-alls in a step, by rank in the group
  int64_t given_step = kNull;

  // The number of the collective that begins now. `ask`: the backend's number of the last one; may throw.
  template <typename Ask>
  int64_t next(Ask&& ask) {
    const int64_t expected = ++counted;
    if (asked && !numbered) return expected;
    if (as_expected >= wanted && expected % kAskedEvery) return expected;
    int64_t last;
    try {
      last = ask();
    } catch (...) {
      // Backends without numbers say so in several ways; all of them mean: count ourselves.
      asked = true;
      numbered = false;
      return expected;
    }
    const int64_t actual = last + offset;
    if (actual == expected) {
      ++as_expected;
    } else if (as_expected.exchange(0)) {
      // Collectives pass us by. The more often, the longer until we count by ourselves again.
      wanted = std::min(2 * wanted.load(), kAskedAtMost);
    }
    asked = numbered = true;
    counted = actual;
    return actual;
  }

  // It has come to nothing: the backend may or may not have counted it.
  void take_back() {
    --counted;
    as_expected = 0;
  }
};

}  // namespace lens
