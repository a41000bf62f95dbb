// The emulator's errors as Python exceptions, in a module that pybind11 binds.
#pragma once

#include <pybind11/pybind11.h>

#include "simt/errors.h"

namespace simt {

inline void register_errors(pybind11::module_& module) {
  // Local to the module: several modules may hold an emulator of their own.
  const auto base = pybind11::register_local_exception<KernelError>(module, "KernelError", PyExc_RuntimeError);
  const pybind11::handle parent = base;
  pybind11::register_local_exception<LaunchError>(module, "LaunchError", parent);
  pybind11::register_local_exception<DivergentBarrier>(module, "DivergentBarrier", parent);
  pybind11::register_local_exception<MissingLane>(module, "MissingLane", parent);
  pybind11::register_local_exception<MissingBarrier>(module, "MissingBarrier", parent);
  pybind11::register_local_exception<PendingCopy>(module, "PendingCopy", parent);
  pybind11::register_local_exception<OutOfBounds>(module, "OutOfBounds", parent);
  pybind11::register_local_exception<Misaligned>(module, "Misaligned", parent);
  pybind11::register_local_exception<UninitializedShared>(module, "UninitializedShared", parent);
  pybind11::register_local_exception<Deadlock>(module, "Deadlock", parent);
  pybind11::register_local_exception<Trap>(module, "Trap", parent);
}

}  // namespace simt
