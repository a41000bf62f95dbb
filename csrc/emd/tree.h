// The spanning tree of a basis, put into an order from supplier 0 outward, along which duals and flows are computed.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

class SpanningTree {
 public:
  template <class Arena>
  void lay_out(Arena& arena, int64_t nodes) {
    first_end_ = arena.template take<int32_t>(nodes);
    next_end_ = arena.template take<int32_t>(2 * nodes);
    slots_ = arena.template take<int32_t>(nodes);
    children_ = arena.template take<int32_t>(nodes);
  }

  // Nodes are rows first, then columns; slot s holds the arc (row_of[s], column_of[s]).
  void order(int64_t rows, int64_t columns, const int32_t* row_of, const int32_t* column_of) {
    rows_ = rows;
    arcs_ = rows + columns - 1;
    row_of_ = row_of;
    column_of_ = column_of;
    std::fill(first_end_, first_end_ + rows + columns, -1);
    for (int64_t slot = 0; slot < arcs_; ++slot) {
      add_end(2 * slot, row_of[slot]);
      add_end(2 * slot + 1, rows + column_of[slot]);
    }
    int64_t found = 1;
    children_[0] = 0;
    slots_[0] = -1;
    for (int64_t k = 0; k < found; ++k) {
      for (int32_t end = first_end_[children_[k]]; end >= 0; end = next_end_[end]) {
        const int32_t slot = end >> 1;
        if (slot == slots_[k]) continue;
        children_[found] = end & 1 ? row_of[slot] : static_cast<int32_t>(rows + column_of[slot]);
        slots_[found++] = slot;
      }
    }
  }

  // Calls visit(arc) for all arcs, those nearer to supplier 0 first.
  template <class Visit>
  void outward(const Visit& visit) const {
    for (int64_t k = 1; k <= arcs_; ++k) visit(arc(k));
  }

  template <class Visit>
  void inward(const Visit& visit) const {
    for (int64_t k = arcs_; k > 0; --k) visit(arc(k));
  }

  struct Arc {
    int64_t position;  // in the order, from 0
    int64_t row, column;
    int64_t child, parent;  // nodes
  };

 private:
  void add_end(int64_t end, int64_t node) {
    next_end_[end] = first_end_[node];
    first_end_[node] = static_cast<int32_t>(end);
  }

  Arc arc(int64_t k) const {
    const int64_t row = row_of_[slots_[k]], column = column_of_[slots_[k]], child = children_[k];
    return {k - 1, row, column, child, child == row ? rows_ + column : row};
  }

  int64_t rows_, arcs_;
  const int32_t* row_of_;
  const int32_t* column_of_;
  int32_t* first_end_;  // [nodes]: ends of arcs at a node, as lists; end 2s is the row's end of slot s
  int32_t* next_end_;   // [2 arcs]
  int32_t* slots_;      // [nodes]: of the arc that leads to the k-th node
  int32_t* children_;   // [nodes]: the k-th node
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
