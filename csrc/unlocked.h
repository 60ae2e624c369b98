// Releases Python's lock while a kernel works.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/arguments.h"

namespace fastdiff {

// Other Python threads may run meanwhile. Not for what takes microseconds: handing the lock over would take longer.
class Unlocked {
 public:
  explicit Unlocked(const Layout& layout) : state_(layout.elements > 16384 ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fastdiff
