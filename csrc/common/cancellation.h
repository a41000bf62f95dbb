// Whether the user wants a call to end before it is done, as by Ctrl-C.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace fewshot_ext {

// Of one call; made on the thread that calls, and asked by all that work for it. A signal's handler in Python runs on
// the thread that the interpreter calls its main one, which waits for this call: so that thread looks for signals, a
// few times a second, and the others see what it found.
class Cancellation {
 public:
  // Cheap, but not free: to be asked every few microseconds at most.
  bool requested();

  bool is_caller() const { return std::this_thread::get_id() == caller_; }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds between_looks{100};

  void look();

  const std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<bool> requested_{false};
  Clock::time_point next_look_ = Clock::now() + between_looks;
};

}  // namespace fewshot_ext
