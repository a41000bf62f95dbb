// Fused signed-margin softmax on the CPU. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// The N x C logits are needed twice: for the log-sum-exp of each row, and, once that is known, for the gradient. They
// are neither stored whole nor computed twice (which would cost 8NDC operations instead of 6NDC) as long as N <= D:
// the gradient of the weight is an output of C x D elements, and until a block of its rows is written, the memory of
// those rows holds the logits of the same classes. Samples beyond D go to a bounded workspace, and what does not fit
// there either is computed again.
//
//   pass A, a thread's classes block by block: logits = scale * s, running max and sum-exp of each row
//   rows:                                       loss, and the coefficients of the softmax gradient
//   pass B, block by block:                     G = dL/ds from the kept logits, dX += G W, dW = G^T X
//
// Layout: samples come in panels of `width` (two vectors). A block of classes holds its logits and its gradient G as
// [panel][class][width]: as it stands, that is the output tile of X W^T, operand A of G W and operand A of G^T X.
// Cosine needs no normalized copies: 1 / |w_j| and 1 / |x_i| scale the logits and G, and the projections
// (I - xhat xhat^T) of the backward of the normalization become one multiple of the raw row, whose factor is a sum
// over G * s that pass B has at hand.
//
// Threads own classes. Each sums the features' gradient over its own classes, and the sums are added at the end; with
// fewer classes than dimensions, G is the smaller thing to hand over, and each thread finishes samples instead.
#pragma once

#include "common/long_rows.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/tile_gemm.h"
#include "margin_softmax/cpu_rows.h"
#include "margin_softmax/problem.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// Logits kept outside the memory of grad_weight, at most.
constexpr int64_t logits_workspace_bytes = int64_t(12) << 20;
// Operands of one block of classes that should stay in a core's second-level cache together.
constexpr int64_t block_bytes = int64_t(384) << 10;
// Features that every thread packs for itself, at most.
constexpr int64_t own_packing_bytes = int64_t(1) << 20;
// Samples for which the weight's rows are read as they lie, at most.
constexpr int64_t samples_reading_rows = 256;
// Work that is worth a thread of its own.
constexpr double flops_per_thread = 2e5;

// T accumulates, Storage is what features, weight and gradients are made of.
template <class T, class Storage>
class MarginSoftmax {
  using Int = typename Simd<T>::Int;
  static constexpr int lanes = Simd<T>::lanes;
  static constexpr int width = panel_width<T>;
  static constexpr int pack = packed_rows<T>;

 public:
  // Cosines of long rows are wrong unless they have been shortened; without `any_length` the kernel looks for them.
  MarginSoftmax(const MarginSoftmaxProblem& problem, bool backward, bool any_length = false)
      : problem_(problem),
        any_length_(any_length),
        backward_only_(backward),
        samples_(problem.samples),
        classes_(problem.classes),
        dimensions_(problem.dimensions),
        panels_(divide_up(problem.samples, width)),
        column_panels_(divide_up(problem.dimensions, width)),
        features_(static_cast<const Storage*>(problem.features)),
        weight_(static_cast<const Storage*>(problem.weight)),
        grad_features_(static_cast<Storage*>(problem.grad_features)),
        grad_weight_(static_cast<Storage*>(problem.grad_weight)) {
    // Lines that one core packs and all others read must be fetched back at the next call; small enough features are
    // packed faster than that.
    own_packing_ = samples_ * dimensions_ * int64_t(sizeof(T)) <= own_packing_bytes;
    const double flops = 2.0 * double(samples_) * double(classes_) * double(dimensions_);
    threads_ = std::min(available_threads(), std::min(divide_up(classes_, 4), int64_t(flops / flops_per_thread) + 1));
    const int64_t wanted =
        std::min(block_bytes / int64_t(sizeof(T)) / std::max(dimensions_, panels_ * width), run_terms);
    const int64_t thread_classes = divide_up(classes_, threads_);
    block_classes_ = std::min(std::max<int64_t>(wanted, 2 * tile_rows), thread_classes);
    features_by_sample_ = grad_features_ && classes_ <= dimensions_ && thread_classes <= 2 * wanted;
    if (features_by_sample_) block_classes_ = thread_classes;
    // Rows a power of two apart meet in few sets of a cache: panels of their own pay off once they are read often.
    const bool as_they_lie = panels_as_they_lie<T, Storage>(dimensions_);
    packs_features_ = grad_weight_ && !as_they_lie;
    packs_weight_ =
        (grad_features_ || grad_weight_) && !(as_they_lie && (features_by_sample_ || samples_ <= samples_reading_rows));
    gradient_step_ = (features_by_sample_ ? classes_ : block_classes_) * width;

    // The backward pass by itself finds no logits: pass B computes them again.
    if (!backward && grad_weight_)
      panels_in_place_ = std::min<int64_t>(panels_, dimensions_ * sizeof(Storage) / (width * sizeof(T)));
    if (!backward && (grad_features_ || grad_weight_))
      panels_kept_ = std::min<int64_t>(
          panels_, panels_in_place_ + logits_workspace_bytes / (classes_ * width * int64_t(sizeof(T))));

    const int64_t padded = panels_ * width;
    Arena<T> sizes;
    lay_out(sizes, padded);
    workspace_.emplace(sizes.used * sizeof(T));
    Arena<T> arena{static_cast<T*>(workspace_->data())};
    lay_out(arena, padded);
  }

  bool found_long_rows() const { return found_long_rows_; }

  // Loss, predictions, row statistics, and for a scalar reduction the gradients for an upstream gradient of 1.
  void forward() {
    pack_features();
    parallel_tasks(threads_, [this](int64_t thread) { pass_a(thread); });
    if (found_long_rows_) return;
    finish_rows();
    if (grad_features_ || grad_weight_) gradients();
  }

  // Gradients for the upstream gradient problem.grad_loss of each row.
  void backward() {
    pack_features();
    const T* statistics = static_cast<const T*>(problem_.row_statistics);
    const T* upstream = static_cast<const T*>(problem_.grad_loss);
    for (int64_t i = 0; i < samples_; ++i)
      set_coefficients(i, statistics[samples_ + i], Gap<double>(double(statistics[i]) - statistics[samples_ + i]),
                       upstream[i]);
    gradients();
  }

 private:
  struct Thread {
    T* features_transposed;  // [panel][D][width]; the threads' own or one for all, see own_packing_
    T* inverse_x;            // [padded N], likewise
    Int* target;             // [padded N], likewise; -1 where the row is ignored
    T* weight_transposed;    // [tile][D][pack]
    T* weight_panels;        // [column panel][block][width]
    T* gradient;             // [panel][block][width], panels gradient_step_ apart: G, or in pass A logits nobody keeps
    SumOfProducts<T> grad_features;  // [N, column_panels * width], unless features_by_sample_
    T* tile;                         // [tile_rows, width]
    RowStatistics<T> rows;
    T* features_dot;  // [padded N], sum_j dL/ds_ij s_ij * scale
    T* features_dot_excess;
    T* weight_dot;           // [block][lanes], sum_i likewise, lane by lane, over a run of samples
    double* weight_dot_sum;  // [block], over all of them
    T* weight_factor;        // [block], of the raw row in the weight's gradient
  };

  void lay_out(Arena<T>& arena, int64_t padded) {
    features_packed_ = packs_features_ ? arena.take(column_panels_ * samples_ * width) : nullptr;
    kept_ = arena.take((panels_kept_ - panels_in_place_) * width * classes_);
    for (T** row :
         {&coefficients_.log_sum, &coefficients_.probability, &coefficients_.uniform, &coefficients_.at_target})
      *row = arena.take(padded);
    inverse_w_ = arena.take(classes_);
    conversions_ = arena.take(std::is_same_v<T, Storage> ? 0 : threads_ * lanes * dimensions_);
    per_thread_.resize(threads_);
    const int64_t gradient_size = (grad_features_ || grad_weight_ ? panels_ : 1) * gradient_step_;
    const int64_t weight_panels_size = packs_weight_ ? column_panels_ * gradient_step_ : 0;
    const int64_t grad_features_size = grad_features_ && !features_by_sample_ ? samples_ * column_panels_ * width : 0;
    // What pass A packed is of no use to pass B where all logits are kept. Results of pass B in its place are warm in
    // the cache, and less memory is touched.
    const bool reuse = panels_kept_ == panels_;
    const bool reuse_features = reuse && own_packing_, reuse_weight = reuse && !features_by_sample_;
    T* shared_gradient = features_by_sample_ ? arena.take(gradient_size) : nullptr;
    weight_packed_ = features_by_sample_ ? arena.take(weight_panels_size) : nullptr;
    for (Thread& t : per_thread_) {
      if (own_packing_ || &t == &per_thread_[0]) {
        t.features_transposed =
            arena.take(std::max(panels_ * dimensions_ * width, reuse_features ? grad_features_size : 0));
        t.inverse_x = arena.take(padded);
        t.target = reinterpret_cast<Int*>(arena.take(padded));
      } else {
        t.features_transposed = per_thread_[0].features_transposed;
        t.inverse_x = per_thread_[0].inverse_x;
        t.target = per_thread_[0].target;
      }
      T* run = !grad_features_size ? nullptr : reuse_features ? t.features_transposed : arena.take(grad_features_size);
      t.grad_features.lay_out(arena, run, grad_features_size ? samples_ : 0, column_panels_,
                              divide_up(classes_, threads_));
      t.weight_transposed = arena.take(
          std::max(divide_up(block_classes_, tile_rows) * dimensions_ * pack, reuse_weight ? gradient_size : 0));
      const int64_t own_rows = class_begin(&t - per_thread_.data()) * width;
      t.weight_panels = features_by_sample_ ? offset(weight_packed_, own_rows) : arena.take(weight_panels_size);
      t.gradient = features_by_sample_ ? offset(shared_gradient, own_rows)
                   : reuse_weight      ? t.weight_transposed
                                       : arena.take(gradient_size);
      t.tile = arena.take(tile_rows * width);
      RowStatistics<T>& rows = t.rows;
      for (T** row : {&rows.max, &rows.sum_exp, &rows.sum_exp_excess, &rows.sum_logits, &rows.sum_logits_excess,
                      &rows.target_logit, &rows.best, &t.features_dot, &t.features_dot_excess})
        *row = arena.take(padded);
      rows.best_class = reinterpret_cast<Int*>(arena.take(padded));
      t.weight_dot = arena.take(block_classes_ * lanes);
      t.weight_dot_sum = reinterpret_cast<double*>(arena.take(block_classes_ * (sizeof(double) / sizeof(T))));
      t.weight_factor = arena.take(block_classes_);
    }
  }

  // Null stays null: while sizes are added up there is no memory yet.
  static T* offset(T* base, int64_t elements) { return base ? base + elements : nullptr; }

  int64_t class_begin(int64_t thread) const { return classes_ * thread / threads_; }
  int64_t panel_samples(int64_t panel) const { return std::min<int64_t>(width, samples_ - panel * width); }

  T inverse_norm(T squares) {
    if (problem_.cosine && is_long(squares) && !any_length_) found_long_rows_ = true;
    return problem_.cosine ? T(1) / std::max(std::sqrt(squares), T(norm_floor)) : T(1);
  }

  // Factor of the raw row in the backward of the normalization; a clamped norm is a constant and has none.
  T projection(T inverse) const { return problem_.cosine && inverse < T(1 / norm_floor) ? inverse * inverse : T(0); }

  void pack_features() {
    if (grad_weight_)
      features_panels_ =
          pack_panels(features_, problem_.features_stride, samples_, dimensions_, features_packed_, samples_ * width);
    coefficients_.reset(panels_ * width);
    if (own_packing_) return;
    const int64_t tasks = std::min(threads_, panels_);
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t panel = panels_ * task / tasks; panel < panels_ * (task + 1) / tasks; ++panel)
        pack_panel(per_thread_[task], task, panel);
    });
  }

  void pack_panel(const Thread& t, int64_t thread, int64_t panel) {
    const int64_t first = panel * width;
    T squares[width];
    pack_transposed(features_ + first * problem_.features_stride, problem_.features_stride, panel_samples(panel),
                    dimensions_, width, t.features_transposed + first * dimensions_, squares,
                    conversions_ + thread * lanes * dimensions_);
    for (int64_t i = first; i < first + width; ++i) {
      const bool real = i < samples_;
      t.inverse_x[i] = real ? inverse_norm(squares[i - first]) : T(0);
      t.target[i] = real && !ignored(i) ? static_cast<Int>(problem_.target[i]) : Int(-1);
    }
  }

  void pack_own_features(const Thread& t, int64_t thread) {
    if (own_packing_)
      for (int64_t panel = 0; panel < panels_; ++panel) pack_panel(t, thread, panel);
  }

  bool ignored(int64_t i) const { return problem_.target[i] == problem_.ignore_index; }

  void pack_weight(Thread& t, int64_t thread, int64_t first, const Tiles& tiles) {
    T squares[pack];
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t begin = first + tiles.begin(tile);
      pack_transposed(weight_ + begin * problem_.weight_stride, problem_.weight_stride, tiles.rows(tile), dimensions_,
                      pack, t.weight_transposed + tile * dimensions_ * pack, squares,
                      conversions_ + thread * lanes * dimensions_);
      for (int r = 0; r < tiles.rows(tile); ++r) inverse_w_[begin + r] = inverse_norm(squares[r]);
    }
  }

  // Where pass A leaves the logits of a panel, [class][width]; null where it keeps none.
  T* kept_logits(int64_t panel, int64_t first, int64_t count) {
    if (panel < panels_in_place_)
      return reinterpret_cast<T*>(grad_weight_ + first * dimensions_) + panel * count * width;
    if (panel < panels_kept_) return kept_ + ((panel - panels_in_place_) * classes_ + first) * width;
    return nullptr;
  }

  void similarities(const Thread& t, int64_t panel, int64_t tile, int rows, T* to) const {
    tile_product<T, 1>(rows, dimensions_, {t.weight_transposed + tile * dimensions_ * pack, pack, dimensions_, 0},
                       {t.features_transposed, width * dimensions_, width}, panel, to, width, false);
  }

  void pass_a(int64_t thread) {
    Thread& t = per_thread_[thread];
    t.rows.reset(panels_ * width);
    pack_own_features(t, thread);
    const int64_t end = class_begin(thread + 1);
    for (int64_t first = class_begin(thread); first < end; first += block_classes_) {
      const Tiles tiles(std::min(block_classes_, end - first));
      pack_weight(t, thread, first, tiles);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        T* kept = kept_logits(panel, first, tiles.n);
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          T* logits = kept ? kept + tiles.begin(tile) * width : t.gradient;
          similarities(t, panel, tile, tiles.rows(tile), logits);
          for (int half = 0; half < width; half += lanes) {
            const int64_t sample = panel * width + half, first_class = first + tiles.begin(tile);
            t.rows.add_tile(sample, load(t.inverse_x + sample) * T(problem_.scale), inverse_w_ + first_class,
                            load_int<T>(t.target + sample), first_class, tiles.rows(tile), logits + half,
                            problem_.label_smoothing != 0, problem_.prediction != nullptr);
          }
        }
      }
    }
  }

  // Joins the threads' statistics; loss and coefficients of every row.
  void finish_rows() {
    T* statistics = static_cast<T*>(problem_.row_statistics);
    T* loss = static_cast<T*>(problem_.loss);
    const bool mean = problem_.reduction == Reduction::mean;
    int64_t counted = 0;
    for (int64_t i = 0; i < samples_; ++i) counted += !ignored(i);
    const double row_weight = mean ? 1.0 / double(counted) : 1.0;
    double total = 0;
    for (int64_t i = 0; i < samples_; ++i) {
      JoinedRow<T> joined;
      for (const Thread& t : per_thread_) joined.add(t.rows, i);
      if (problem_.prediction) problem_.prediction[i] = std::max<Int>(joined.best_class, 0);
      const double others = joined.log_sum_exp();
      const double target = joined.target_logit - problem_.scale * problem_.margin;
      const Gap<double> gap(others - target);
      double row = 0;
      if (!ignored(i)) {
        const double mean_logit = (joined.sum_logits - problem_.scale * problem_.margin) / problem_.total_classes;
        row = row_loss(gap, target, mean_logit, problem_.label_smoothing);
      }
      total += row;
      statistics[i] = T(others);
      statistics[samples_ + i] = T(target);
      statistics[2 * samples_ + i] = T(joined.sum_logits);
      statistics[3 * samples_ + i] = joined.best;
      if (problem_.reduction == Reduction::none)
        loss[i] = T(row);
      else
        set_coefficients(i, target, gap, row_weight);
    }
    // The mean over no row at all is NaN, as in torch.nn.functional.cross_entropy.
    if (problem_.reduction != Reduction::none) *loss = T(mean ? total / double(counted) : total);
  }

  void set_coefficients(int64_t i, double target, const Gap<double>& gap, double upstream) {
    if (ignored(i)) return;
    coefficients_.set(i, GradientCoefficients<double>::of(gap, target, upstream * problem_.scale,
                                                          problem_.label_smoothing, problem_.total_classes));
  }

  void gradients() {
    parallel_tasks(threads_, [this](int64_t thread) { pass_b(thread); });
    if (!grad_features_) return;
    if (features_by_sample_) {
      const int64_t tasks = std::min(threads_, panels_);
      parallel_tasks(tasks, [&](int64_t task) {
        for (int64_t panel = panels_ * task / tasks; panel < panels_ * (task + 1) / tasks; ++panel)
          write_features(per_thread_[task], panel);
      });
    } else {
      const int64_t tasks = std::min(threads_, samples_);
      parallel_tasks(tasks, [&](int64_t task) {
        for (int64_t i = samples_ * task / tasks; i < samples_ * (task + 1) / tasks; ++i) add_features_row(i);
      });
    }
  }

  void pass_b(int64_t thread) {
    Thread& t = per_thread_[thread];
    for (T* row : {t.features_dot, t.features_dot_excess}) std::fill(row, row + panels_ * width, T(0));
    if (backward_only_) pack_own_features(t, thread);
    t.grad_features.start();
    const int64_t begin = class_begin(thread), end = class_begin(thread + 1);
    for (int64_t first = begin; first < end; first += block_classes_) {
      const Tiles tiles(std::min(block_classes_, end - first));
      if (panels_kept_ < panels_) pack_weight(t, thread, first, tiles);
      std::fill(t.weight_dot, t.weight_dot + tiles.n * lanes, T(0));
      std::fill(t.weight_dot_sum, t.weight_dot_sum + tiles.n, 0.0);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        softmax_gradient(t, panel, first, tiles);
        if ((panel + 1) * width % run_terms == 0 || panel + 1 == panels_) add_weight_dots(t, tiles.n);
      }
      const Panels<T> weight = pack_panels(weight_ + first * problem_.weight_stride, problem_.weight_stride, tiles.n,
                                           dimensions_, packs_weight_ ? t.weight_panels : nullptr, gradient_step_);
      if (t.grad_features.samples) t.grad_features.add(t.gradient, gradient_step_, tiles.n, weight);
      if (grad_weight_) write_weight(t, weight, first, tiles);
    }
    t.grad_features.finish();
  }

  void add_weight_dots(const Thread& t, int64_t classes) const {
    for (int64_t j = 0; j < classes; ++j) {
      t.weight_dot_sum[j] += horizontal_sum<T>(load(t.weight_dot + j * lanes));
      store(t.weight_dot + j * lanes, Vector<T>{});
    }
  }

  // G of one panel and one block: dL/ds / (|x_i| |w_j|), and the sums of dL/ds * logit over each row and column.
  void softmax_gradient(Thread& t, int64_t panel, int64_t first, const Tiles& tiles) {
    const T* logits = kept_logits(panel, first, tiles.n);
    T* gradient = t.gradient + panel * gradient_step_;
    const bool recompute = logits == nullptr;
    if (recompute) {
      for (int64_t tile = 0; tile < tiles.count; ++tile)
        similarities(t, panel, tile, tiles.rows(tile), gradient + tiles.begin(tile) * width);
      logits = gradient;
    }
    for (int half = 0; half < width; half += lanes) {
      const int64_t sample = panel * width + half;
      const Vector<T> inverse_x = load(t.inverse_x + sample);
      const auto finish = [&](auto products) {
        return coefficients_.template gradient<products>(sample, logits + half, inverse_x * T(problem_.scale),
                                                         inverse_x, inverse_w_ + first, load_int<T>(t.target + sample),
                                                         first, tiles.n, gradient + half, t.weight_dot);
      };
      const Vector<T> dot = recompute ? finish(std::true_type{}) : finish(std::false_type{});
      add_without_excess<T>(dot, load(t.features_dot + sample), load(t.features_dot_excess + sample),
                            t.features_dot + sample, t.features_dot_excess + sample);
    }
  }

  void write_weight(Thread& t, const Panels<T>& weight, int64_t first, const Tiles& tiles) {
    for (int64_t j = 0; j < tiles.n; ++j)
      t.weight_factor[j] = T(t.weight_dot_sum[j] / problem_.scale) * projection(inverse_w_[first + j]);
    for (int64_t column = 0; column < column_panels_; ++column) {
      const int64_t columns = std::min<int64_t>(width, dimensions_ - column * width);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        product_over_samples<T>(tiles.rows(tile), samples_,
                                {t.gradient + tiles.begin(tile) * width, 1, width, gradient_step_}, features_panels_,
                                column, t.tile);
        for (int r = 0; r < tiles.rows(tile); ++r) {
          const int64_t j = tiles.begin(tile) + r;
          const T* raw = weight.data + column * weight.panel_step + j * weight.row_step;
          Storage* out = grad_weight_ + (first + j) * dimensions_ + column * width;
          for (int64_t k = 0; k < columns; ++k)
            out[k] = from_accumulate<Storage>(t.tile[r * width + k] - t.weight_factor[j] * raw[k]);
        }
      }
    }
  }

  // The features' gradient of one panel of samples, over all classes at once.
  void write_features(const Thread& t, int64_t panel) {
    Panels<T> weight{weight_packed_, gradient_step_, width};
    if constexpr (std::is_same_v<T, Storage>) {
      if (!packs_weight_) weight = {weight_, width, problem_.weight_stride};
    }
    const T* gradient = per_thread_[0].gradient + panel * gradient_step_;
    const Tiles tiles(panel_samples(panel));
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      T factors[tile_rows];
      const int64_t first = panel * width + tiles.begin(tile);
      for (int r = 0; r < tiles.rows(tile); ++r) factors[r] = features_factor(first + r);
      for (int64_t column = 0; column < column_panels_; ++column) {
        tile_product<T, 1>(tiles.rows(tile), classes_, {gradient + tiles.begin(tile), width, classes_, 0}, weight,
                           column, t.tile, width, false);
        for (int r = 0; r < tiles.rows(tile); ++r)
          write_features_row(first + r, column * width, factors[r], t.tile + r * width);
      }
    }
  }

  // One row of the features' gradient as the sum of what the threads found. The parts are only read: a part written
  // here would have to come back to its thread at the next call.
  void add_features_row(int64_t i) {
    const T factor = features_factor(i);
    for (int64_t first = 0; first < dimensions_; first += width) {
      T sum[width] = {};
      for (const Thread& t : per_thread_) {
        const T* part = t.grad_features.row(i) + first;
        for (int k = 0; k < width; ++k) sum[k] += part[k];
      }
      write_features_row(i, first, factor, sum);
    }
  }

  T features_factor(int64_t i) const {
    double dot = 0;
    for (const Thread& t : per_thread_) dot += double(t.features_dot[i]) - t.features_dot_excess[i];
    return T(dot / problem_.scale) * projection(per_thread_[0].inverse_x[i]);
  }

  FEWSHOT_EXT_INLINE void write_features_row(int64_t i, int64_t first, T factor, const T* sum) {
    const Storage* raw = features_ + i * problem_.features_stride + first;
    Storage* out = grad_features_ + i * dimensions_ + first;
    const int64_t columns = std::min<int64_t>(width, dimensions_ - first);
    for (int64_t k = 0; k < columns; ++k) out[k] = from_accumulate<Storage>(sum[k] - factor * T(to_accumulate(raw[k])));
  }

  const MarginSoftmaxProblem& problem_;
  const bool any_length_, backward_only_;
  std::atomic<bool> found_long_rows_{false};
  const int64_t samples_, classes_, dimensions_;
  const int64_t panels_;         // of samples
  const int64_t column_panels_;  // of dimensions
  const Storage* const features_;
  const Storage* const weight_;
  Storage* const grad_features_;
  Storage* const grad_weight_;
  int64_t threads_, block_classes_;
  int64_t panels_in_place_ = 0;         // panels whose logits wait in the memory of grad_weight
  int64_t panels_kept_ = 0;             // those, and the ones in kept_
  bool features_by_sample_;             // each thread finishes samples' gradients over all classes
  int64_t gradient_step_;               // elements between panels of G and of the packed weight
  bool packs_features_, packs_weight_;  // as operand B; they serve as they lie otherwise
  bool own_packing_;                    // each thread packs the features for itself

  std::optional<Workspace> workspace_;
  Panels<T> features_panels_;  // [N, D] as operand B
  T* features_packed_;         // its memory, where the rows do not serve as they lie
  T* weight_packed_;           // [column panel][C][width], likewise, where features_by_sample_
  T* kept_;                    // [panel][C][width]
  T* conversions_;             // [thread][lanes, D]
  T* inverse_w_;               // [C]
  RowCoefficients<T> coefficients_;
  std::vector<Thread> per_thread_;
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
