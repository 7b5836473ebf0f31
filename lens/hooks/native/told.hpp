// What the observer tells the timeline without a detour through Python. They are built apart and live in one process.
#pragma once

#include <atomic>
#include <cstdint>

namespace lens {

constexpr char kTold[] = "lens.told";  // of the capsule that hands it over

struct Told {
  std::atomic<int64_t> spent{0};        // ns that observing took since it was asked last
  std::atomic<bool> waiting{false};     // something is to be swept at the end of the step
  std::atomic<bool> strangers{false};   // a group was met that Python has not told of
  void (*sweep)() = nullptr;
};

}  // namespace lens
