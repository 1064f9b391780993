// The threads that share the work of a call.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace rag {

// Threads that wait by spinning for a while: the next part of a layer comes in microseconds, waking takes longer.
class Team {
 public:
  explicit Team(int threads) {
    for (int i = 1; i < threads; i++) helpers_.emplace_back([this, i] { Serve(i); });
  }

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  // part(0) .. part(size() - 1), one on each thread; returns when all are done.
  template <class Part>
  void Run(const Part& part) {
    call_ = [](const void* p, int i) { (*static_cast<const Part*>(p))(i); };
    part_ = &part;
    busy_.store(static_cast<int>(helpers_.size()));
    turn_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    part(0);
    while (busy_.load(std::memory_order_acquire) > 0) std::atomic_signal_fence(std::memory_order_seq_cst);
  }

 private:
  void Serve(int i) {
    for (uint64_t seen = 0;;) {
      for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && spins < kSpins; spins++) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
      }
      if (turn_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return turn_.load() != seen; });
        asleep_.fetch_sub(1);
      }
      seen++;
      call_(part_, i);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  static constexpr int kSpins = 200000;  // well under a millisecond
  std::vector<std::thread> helpers_;
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> busy_{0}, asleep_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* part_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The process's one team, for one call at a time. Its threads live as long as the process.
struct Turn {
  explicit Turn(int64_t threads) : lock(mutex) {
    if (!made) made = new Team(static_cast<int>(threads));
  }
  Team* operator->() const { return made; }

  static inline std::mutex mutex;
  static inline Team* made = nullptr;
  std::lock_guard<std::mutex> lock;
};

// The n of [0, count) that are thread i's of `threads`, in whole blocks of 16 but for the last.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int i, int threads) : begin(Start(count, i, threads)), end(Start(count, i + 1, threads)) {}
  static int64_t Start(int64_t count, int i, int threads) { return i == threads ? count : count / 16 * i / threads * 16; }
};

}  // namespace rag
