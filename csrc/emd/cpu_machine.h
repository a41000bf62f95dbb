// What ExactSimplex runs on here: one thread, and its vectors. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see
// common/isa.h.
#pragma once

#include "common/cancellation.h"
#include "common/memory.h"
#include "common/simd.h"
#include "emd/exact_simplex.h"
#include "emd/vector_min.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

class CpuMachine {
 public:
  static constexpr int lanes = 1;

  explicit CpuMachine(Cancellation& cancellation) : cancellation_(cancellation) {}

  bool stopped() { return cancellation_.requested(); }
  int lane() const { return 0; }
  template <class Work>
  void one(const Work& work) {
    work();
  }
  template <class T>
  T least(T value) const {
    return value;
  }
  void agree(const Scaled&, int64_t) const {}

  // For one problem, until the next asks for some.
  unsigned char* memory(int64_t bytes) {
    if (!memory_ || capacity_ < bytes) {
      capacity_ = bytes;
      memory_.emplace(static_cast<size_t>(bytes));
    }
    return static_cast<unsigned char*>(memory_->data());
  }

  // The lowest of what the reduced costs of a row are at most; below 0 where an arc of the row is sure to be worth a
  // pivot.
  template <bool forbids, class Float>
  double lowest_of_row(const ExactRow<Float>& row) const {
    using V = Vector<double>;
    constexpr int lanes = Simd<double>::lanes;
    const double u = row.dual, size = std::abs(u), limit = row.limit, factor = row.factor, constant = row.constant;
    const double* const columns = row.columns;
    const int32_t own_level = row.level;
    V lowest = splat(std::numeric_limits<double>::infinity());
    for (int64_t j = 0; j < row.padded_count; j += lanes) {
      typedef Float Narrow __attribute__((vector_size(lanes * sizeof(Float))));
      Narrow narrow;
      std::memcpy(&narrow, row.cost + j, sizeof(narrow));
      V c = __builtin_convertvector(narrow, V);
      const V v = load(columns + j);
      if constexpr (forbids) {
        typedef int32_t Levels __attribute__((vector_size(lanes * sizeof(int32_t))));
        Levels at;
        std::memcpy(&at, row.levels + j, sizeof(at));
        const auto banned = c > limit;
        V level = __builtin_convertvector(at, V) - double(own_level);
        level = banned ? level + 1.0 : level;
        c = banned ? V{} : c;
        const V r = (c - u) + v, error = factor * ((c < 0 ? -c : c) + size + (v < 0 ? -v : v)) + constant;
        const V high = r + error;
        lowest = smaller<double>(level < 0 ? splat(-std::numeric_limits<double>::max())
                                           : (level > 0 ? splat(std::numeric_limits<double>::max()) : high),
                                 lowest);
      } else {
        const V r = (c - u) + v, error = factor * ((c < 0 ? -c : c) + size + (v < 0 ? -v : v)) + constant;
        lowest = smaller<double>(r + error, lowest);
      }
    }
    return horizontal_min<double>(lowest);
  }

 private:
  Cancellation& cancellation_;
  std::optional<Workspace> memory_;
  int64_t capacity_ = 0;
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
