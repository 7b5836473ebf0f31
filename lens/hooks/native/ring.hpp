// A ring as lens/recorder.py lays it out, written by one thread of C++. See there for what each word holds.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

namespace lens {

constexpr int64_t kNull = INT64_MIN;
constexpr int64_t kPage = 4096, kStringBytes = 64 * 1024, kSlotBytes = 128;
constexpr int64_t kCollective = 3, kVector = 6;
constexpr int64_t kFirstPayload = 8, kNextPayload = 14;
constexpr int kSlotCountWord = 2, kStringsAtWord = 3;
constexpr int kThreadWord = 7, kClosedWord = 8, kStringsUsedWord = 9, kStringsRefusedWord = 10;
constexpr int kBlockedWord = 16, kPhaseWord = 24, kStepWord = 32;
constexpr int kFlightsWord = 64, kFlightWords = 8, kFlights = 48;

inline int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Stores and loads that another process or thread may look at; the compiler must not move or split them.
inline void put(int64_t* word, int64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
inline int64_t get(const int64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

// A file in memory, for as long as this lives.
class Mapping {
 public:
  Mapping(int descriptor, size_t size, bool writable) : size_(size) {
    void* found = mmap(nullptr, size, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                       MAP_SHARED | (writable ? MAP_POPULATE : 0), descriptor, 0);
    words = found == MAP_FAILED ? nullptr : static_cast<int64_t*>(found);
  }
  ~Mapping() {
    if (words) munmap(words, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  int64_t* words;

 private:
  size_t size_;
};

class Ring {
 public:
  // Null where there is no room or no right: this thread then records nothing.
  static std::shared_ptr<Ring> create(const std::string& directory, int64_t slots) {
    const size_t size = 2 * kPage + kStringBytes + slots * kSlotBytes;
    std::string path;
    int descriptor = -1;
    for (int number = 1; descriptor < 0 && number < 1000; ++number) {
      path = directory + "/native-" + std::to_string(gettid()) + (number > 1 ? "-" + std::to_string(number) : "") +
             ".ring";
      descriptor = open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0600);
      if (descriptor < 0 && errno != EEXIST) return nullptr;
    }
    // Reserved before it is mapped: writing to a hole on a full disk would kill the process with SIGBUS.
    std::unique_ptr<Mapping> mapping;
    if (descriptor >= 0 && posix_fallocate(descriptor, 0, size) == 0)
      mapping = std::make_unique<Mapping>(descriptor, size, true);
    if (descriptor >= 0) close(descriptor);
    if (!mapping || !mapping->words) {
      unlink(path.c_str());
      return nullptr;
    }
    return std::shared_ptr<Ring>(new Ring(std::move(mapping), slots));
  }

  int64_t* words() { return words_; }
  bool writable() const { return pid_ == getpid(); }

  // The id of a text that lives as long as the ring, by its address; 0 when the table is full.
  int64_t intern(const std::string* text) {
    if (!text) return 0;
    // Few lines of memory in front of the large table. Those that are met together came together.
    for (size_t place = 0; place < kRecent; ++place)
      if (recent_[place] == text) return recent_ids_[place];
    const size_t place = next_recent_++ % kRecent;
    recent_[place] = text;
    return recent_ids_[place] = text->empty() ? 0 : find(text);
  }

  // The next slot, begun; `finish` makes it whole.
  int64_t* begin(int64_t kind) {
    int64_t* slot = at(next_);
    put(slot, next_);
    slot[1] = kind;
    return slot;
  }

  void finish(int64_t* slot) { put(slot + 15, next_++); }

  // The next slot will be written soon.
  void expect() {
    const int64_t* slot = at(next_);
    __builtin_prefetch(slot, 1);
    __builtin_prefetch(slot + 8, 1);
  }

  // A vector: the payload goes on in continuation slots where it is long.
  void vector(int64_t ids, int64_t t, int64_t step, const double* values, int64_t count) {
    const int64_t more = count <= kFirstPayload ? 0 : (count - kFirstPayload + kNextPayload - 1) / kNextPayload;
    int64_t* slot = begin(kVector | more << 8);
    slot[2] = t;
    slot[3] = kNull;
    slot[4] = step;
    slot[5] = ids;
    slot[6] = count;
    memcpy(slot + 7, values, 8 * std::min(count, kFirstPayload));
    finish(slot);
    for (int64_t place = kFirstPayload; place < count; place += kNextPayload) {
      int64_t* next = at(next_);
      put(next, next_);
      memcpy(next + 1, values + place, 8 * std::min(count - place, kNextPayload));
      put(next + 15, -next_);
      ++next_;
    }
  }

  // A free place among the words of collectives in flight, begun; null when all are taken.
  int64_t* take_place() {
    for (int tried = 0; tried < kFlights; ++tried) {
      int64_t* place = words() + kFlightsWord + kFlightWords * (next_place_++ % kFlights);
      if (get(place) == 0) return place;
    }
    return nullptr;
  }

 private:
  static constexpr size_t kRecent = 24;

  int64_t find(const std::string* text) {
    auto found = ids_.find(text);
    if (found != ids_.end()) return found->second;
    int64_t& id = ids_[text];
    auto same = texts_.find(*text);
    if (same != texts_.end()) return id = same->second;
    const int64_t needed = 4 + static_cast<int64_t>(text->size());
    if (used_ + needed > kStringBytes) {
      put(words() + kStringsRefusedWord, words()[kStringsRefusedWord] + 1);
      return id = 0;
    }
    char* at = reinterpret_cast<char*>(words()) + 2 * kPage + used_;
    const uint32_t length = text->size();
    memcpy(at, &length, 4);
    memcpy(at + 4, text->data(), text->size());
    used_ += needed;
    id = texts_[*text] = static_cast<int64_t>(texts_.size()) + 1;
    // Written last: a reader that sees the new size sees the text too.
    put(words() + kStringsUsedWord, used_);
    return id;
  }

  Ring(std::unique_ptr<Mapping> mapping, int64_t slots)
      : mapping_(std::move(mapping)), words_(mapping_->words), mask_(slots - 1) {
    int64_t* word = words();
    memcpy(word, "LENSRNG1", 8);
    const int64_t head[] = {1, slots, 2 * kPage, kStringBytes, 2 * kPage + kStringBytes, pid_, gettid(), 0};
    memcpy(word + 1, head, sizeof head);
  }

  int64_t* at(int64_t sequence) {
    return words() + (2 * kPage + kStringBytes) / 8 + ((sequence - 1) & mask_) * (kSlotBytes / 8);
  }

  std::unique_ptr<Mapping> mapping_;
  int64_t* words_;
  int64_t mask_, next_ = 1, used_ = 0;
  const std::string* recent_[kRecent] = {};
  uint32_t recent_ids_[kRecent] = {};
  unsigned next_recent_ = 0, next_place_ = 0;
  pid_t pid_ = getpid();
  std::unordered_map<const std::string*, int64_t> ids_;
  std::unordered_map<std::string, int64_t> texts_;
};

}  // namespace lens
