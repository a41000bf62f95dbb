// Sums over many classes or samples whose rounding error does not grow with their number: what a run of terms adds up
// to in the working type enters a compensated sum. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/memory.h"
#include "common/tile_gemm.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// Terms of a run: their plain sum is off by a few units in the last place, and the work of ending a run is lost in
// theirs.
constexpr int64_t run_terms = 2048;

// Kahan's sum: before + term, with the excess of what rounding has added so far.
template <class T>
FEWSHOT_EXT_INLINE void add_without_excess(const Vector<T>& term, const Vector<T>& before, const Vector<T>& excess,
                                           T* sum, T* new_excess) {
  const Vector<T> rest = term - excess;
  const Vector<T> after = before + rest;
  store(sum, after);
  store(new_excess, (after - before) - rest);
}

// sum [count] += term, for whole vectors.
template <class T>
void add_without_excess(const T* term, T* sum, T* excess, int64_t count) {
  for (int64_t k = 0; k < count; k += Simd<T>::lanes)
    add_without_excess<T>(load(term + k), load(sum + k), load(excess + k), sum + k, excess + k);
}

// G W for all samples, [N, column panels * width], whose classes come block by block.
template <class T>
struct SumOfProducts {
  static constexpr int width = panel_width<T>;

  T* run = nullptr;       // over the run under way
  T* finished = nullptr;  // over the runs before; null where there is but one
  T* excess = nullptr;
  int64_t samples = 0, column_panels = 0;
  int64_t terms = 0;  // of the run under way

  // A thread's part: over so many classes at most, each run in `memory`.
  void lay_out(Arena<T>& arena, T* memory, int64_t rows, int64_t columns, int64_t classes) {
    run = memory;
    samples = rows;
    column_panels = columns;
    if (rows == 0 || classes <= run_terms) return;
    finished = arena.take(size());
    excess = arena.take(size());
  }

  int64_t size() const { return samples * column_panels * width; }

  void start() {
    terms = 0;
    if (finished)
      for (T* array : {finished, excess}) std::fill(array, array + size(), T(0));
  }

  // G of a block of classes lies [panel][class][width], panels gradient_step apart.
  void add(const T* gradient, int64_t gradient_step, int64_t classes, const Panels<T>& weight) {
    const int64_t stride = column_panels * width;
    for (int64_t panel = 0; panel * width < samples; ++panel) {
      const Tiles tiles(std::min<int64_t>(width, samples - panel * width));
      for (int64_t column = 0; column < column_panels; ++column)
        for (int64_t tile = 0; tile < tiles.count; ++tile)
          tile_product<T, 1>(tiles.rows(tile), classes,
                             {gradient + panel * gradient_step + tiles.begin(tile), width, classes, 0}, weight, column,
                             run + (panel * width + tiles.begin(tile)) * stride + column * width, stride, terms > 0);
    }
    terms += classes;
    if (terms >= run_terms) finish();
  }

  void finish() {
    if (!finished) return;
    if (terms > 0) add_without_excess(run, finished, excess, size());
    terms = 0;
  }

  const T* row(int64_t i) const { return (finished ? finished : run) + i * column_panels * width; }
};

// tile_product over samples, whose A lies [panel][...][width] and whose B has a row for each.
template <class T>
void product_over_samples(int rows, int64_t samples, TileA<T> a, Panels<T> b, int64_t column, T* tile) {
  constexpr int width = panel_width<T>;
  static_assert(run_terms % width == 0, "runs are whole panels");
  tile_product<T, width>(rows, std::min(samples, run_terms), a, b, column, tile, width, false);
  if (samples <= run_terms) return;
  T part[tile_rows * width], excess[tile_rows * width] = {};
  for (int64_t first = run_terms; first < samples; first += run_terms) {
    a.data += run_terms / width * a.outer_step;
    b.data += run_terms * b.row_step;
    tile_product<T, width>(rows, std::min(samples - first, run_terms), a, b, column, part, width, false);
    add_without_excess(part, tile, excess, rows * width);
  }
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
