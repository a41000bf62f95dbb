#include "common/cancellation.h"

#include <dlfcn.h>

namespace fewshot_ext {
namespace {

// What is needed of CPython's stable interface, looked up at run time: the library also serves processes without
// Python.
struct Python {
  using Object = void;
  template <class Function>
  static Function* find(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  }

  int (*is_initialized)() = find<int()>("Py_IsInitialized");
  int (*ensure)() = find<int()>("PyGILState_Ensure");
  void (*release)(int) = find<void(int)>("PyGILState_Release");
  int (*check_signals)() = find<int()>("PyErr_CheckSignals");
  void (*fetch)(Object**, Object**, Object**) = find<void(Object**, Object**, Object**)>("PyErr_Fetch");
  void (*restore)(Object*, Object*, Object*) = find<void(Object*, Object*, Object*)>("PyErr_Restore");
  int (*add_pending_call)(int (*)(void*), void*) = find<int(int (*)(void*), void*)>("Py_AddPendingCall");

  bool found() const {
    return is_initialized && ensure && release && check_signals && fetch && restore && add_pending_call;
  }
};

const Python& python() {
  static const Python found;
  return found;
}

struct Exception {
  Python::Object *type, *value, *traceback;
};

// Run by the interpreter as soon as it executes Python again.
int raise_again(void* context) {
  auto* const exception = static_cast<Exception*>(context);
  python().restore(exception->type, exception->value, exception->traceback);
  delete exception;
  return -1;
}

}  // namespace

// Out of line: inside the loops that ask, it would take their registers.
bool Cancellation::requested() {
  if (!requested_.load(std::memory_order_relaxed) && is_caller() && Clock::now() >= next_look_) look();
  return requested_.load(std::memory_order_relaxed);
}

// An exception that a handler raised cannot pass through torch, which makes a RuntimeError of everything: the call ends
// with one, and in Python's next step the exception takes its place.
void Cancellation::look() {
  const Python& py = python();
  next_look_ = Clock::now() + between_looks;
  if (!py.found() || !py.is_initialized()) return;
  const int state = py.ensure();
  if (py.check_signals() != 0) {
    auto* const exception = new Exception;
    py.fetch(&exception->type, &exception->value, &exception->traceback);
    py.add_pending_call(raise_again, exception);
    requested_.store(true, std::memory_order_relaxed);
  }
  py.release(state);
}

}  // namespace fewshot_ext
