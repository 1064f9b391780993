// The threads that share the work of a call: the caller's, and the idle ones of XLA's pool.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace rag {

// Threads of our own would compete for the cores with XLA's, which spin for a while after their work. So helpers are
// tasks of XLA's pool that live as long as the call and take parts of its work when they are free. The call never waits
// for a helper that has not started: the caller does those parts. One call runs at a time in the process.
class Team {
 public:
  Team(xla::ffi::ThreadPool pool, int64_t threads) : lock_(OneAtATime()), state_(std::make_shared<State>()) {
    const int64_t helpers = std::min({threads, pool.num_threads(), kMost}) - 1;
    state_->size = static_cast<int>(std::max<int64_t>(helpers, 0)) + 1;
    for (int i = 1; i < state_->size; i++) {
      pool.Schedule([state = state_, caller = std::this_thread::get_id()] {
        if (std::this_thread::get_id() == caller) return;  // a full queue runs the task at once
        while (!state->over.load(std::memory_order_acquire)) {
          if (!state->TakePart()) _mm_pause();
        }
      });
    }
  }

  ~Team() { state_->over.store(true, std::memory_order_release); }

  int size() const { return state_->size; }

  // Runs part(0) .. part(size() - 1), in any order and on any thread; returns when all are done.
  template <class Part>
  void Run(const Part& part) {
    State& s = *state_;
    s.call = [](const void* p, int i) { (*static_cast<const Part*>(p))(i); };
    s.part = &part;
    s.done.store(0, std::memory_order_relaxed);
    s.next.store(++run_ << kShift, std::memory_order_release);
    while (s.TakePart()) {
    }
    while (s.done.load(std::memory_order_acquire) < s.size) _mm_pause();
  }

 private:
  static constexpr int64_t kMost = 64;  // threads; below 1 << kShift
  static constexpr int kShift = 8;

  struct State {
    std::atomic<uint64_t> next{kMost};  // the number of the run, and in the lowest bits its next part
    std::atomic<int> done{0};
    std::atomic<bool> over{false};
    int size = 1;
    void (*call)(const void*, int) = nullptr;
    const void* part = nullptr;

    // Runs one part and returns whether there was one. `call` and `part` are written before `next` and do not change
    // until all parts are done.
    bool TakePart() {
      uint64_t seen = next.load(std::memory_order_acquire);
      const int i = static_cast<int>(seen & ((1 << kShift) - 1));
      if (i >= size) return false;
      if (next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) {
        call(part, i);
        done.fetch_add(1, std::memory_order_release);
      }
      return true;
    }
  };

  static std::mutex& OneAtATime() {  // calls reuse static memory
    static std::mutex mutex;
    return mutex;
  }

  std::lock_guard<std::mutex> lock_;
  std::shared_ptr<State> state_;
  uint64_t run_ = 0;
};

// Rows that one thread writes: the digits of so many are interleaved, and a cache line should have one writer.
constexpr int64_t kTogether = 8;

// Runs part(r) for every row.
template <class Part>
void EachRow(Team& team, int64_t rows, const Part& part) {
  const auto block = [&](int64_t first) {
    for (int64_t r = first; r < std::min(first + kTogether, rows); r++) part(r);
  };
  if (rows <= kTogether) return block(0);
  team.Run([&](int i) {
    for (int64_t first = i * kTogether; first < rows; first += team.size() * kTogether) block(first);
  });
}

// The range of [0, count) for thread i of `threads`: whole blocks of 16, except for the last thread.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int i, int threads) : begin(Start(count, i, threads)), end(Start(count, i + 1, threads)) {}
  static int64_t Start(int64_t count, int i, int threads) {
    return i == threads ? count : count / 16 * i / threads * 16;
  }
};

}  // namespace rag
