// The emulator's test kernels for Python. Arrays come in with the right type and shape: the tests see to it.
#include <vector>

#include "bind_faulty.h"
#include "cooperative_kernels.cuh"
#include "faulty_kernels.cuh"
#include "kernels.cuh"
#include "simt/python.h"

using namespace fewshot_ext;

namespace {

unsigned blocks_for(py::ssize_t items, int each) { return static_cast<unsigned>((items + each - 1) / each); }

template <class T>
Array<T> bind_sum_rows(const Array<T>& x, int threads, uint64_t seed) {
  Array<T> sums(x.shape(0));
  simt::launch<sum_rows<T>>(blocks_for(x.shape(0), 1), threads, 0, seed, x.data(), sums.mutable_data(),
                            static_cast<int>(x.shape(1)));
  return sums;
}

// Half types travel as their bits.
template <class Storage, class T>
Array<T> bind_softmax_rows(const Array<T>& x, uint64_t seed) {
  Array<T> y({x.shape(0), x.shape(1)});
  simt::launch<softmax_rows<Storage>>(
      blocks_for(x.shape(0), 4), dim3(32, 4), 0, seed, reinterpret_cast<const Storage*>(x.data()),
      reinterpret_cast<Storage*>(y.mutable_data()), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)));
  return y;
}

Array<float> bind_transpose(const Array<float>& x, uint64_t seed) {
  Array<float> y({x.shape(1), x.shape(0)});
  simt::launch<transpose>(dim3(blocks_for(x.shape(1), 32), blocks_for(x.shape(0), 32)), dim3(32, 8), 0, seed, x.data(),
                          y.mutable_data(), static_cast<int>(x.shape(0)), static_cast<int>(x.shape(1)));
  return y;
}

Array<int> bind_histogram(const Array<int>& x, int bins, uint64_t seed) {
  Array<int> counts(bins);
  std::fill_n(counts.mutable_data(), bins, 0);
  simt::launch<histogram>(3, 96, bins * sizeof(int), seed, x.data(), counts.mutable_data(),
                          static_cast<int>(x.shape(0)), bins);
  return counts;
}

Array<float> bind_matmul(const Array<float>& a, const Array<float>& b, uint64_t seed) {
  Array<float> c({a.shape(0), b.shape(0)});
  simt::launch<matmul>(dim3(blocks_for(b.shape(0), 32), blocks_for(a.shape(0), 32)), 64, 0, seed, a.data(), b.data(),
                       c.mutable_data(), static_cast<int>(a.shape(0)), static_cast<int>(b.shape(0)),
                       static_cast<int>(a.shape(1)));
  return c;
}

Array<int> bind_warp_intrinsics(const Array<int>& x, uint64_t seed) {
  Array<int> y({12, 64});
  simt::launch<warp_intrinsics>(1, 64, 0, seed, x.data(), y.mutable_data());
  return y;
}

Array<double> bind_math_functions(const Array<float>& x, uint64_t seed) {
  Array<double> y({20, 32});
  simt::launch<math_functions>(1, 32, 0, seed, x.data(), y.mutable_data());
  return y;
}

template <class T>
Array<T> bind_warp_intrinsics_of(const Array<T>& x, uint64_t seed) {
  Array<T> y({4, 32});
  simt::launch<warp_intrinsics_of<T>>(1, 32, 0, seed, x.data(), y.mutable_data());
  return y;
}

Array<float> bind_vectors(const Array<float>& x, uint64_t seed) {
  Array<float> y(x.shape(0));
  simt::launch<vectors>(1, static_cast<unsigned>(x.shape(0) / 4), 0, seed, reinterpret_cast<const float4*>(x.data()),
                        reinterpret_cast<float4*>(y.mutable_data()));
  return y;
}

Array<unsigned> bind_counters(int threads, uint64_t seed) {
  Array<unsigned> counts(4);
  std::fill_n(counts.mutable_data(), 4, 0);
  simt::launch<counters>(2, threads, 0, seed, counts.mutable_data());
  return counts;
}

Array<unsigned char> bind_swap_bytes(const Array<unsigned char>& x, uint64_t seed) {
  Array<unsigned char> y(x.shape(0));
  simt::launch<swap_bytes>(1, static_cast<unsigned>(x.shape(0)), 0, seed, x.data(), y.mutable_data());
  return y;
}

// By launch or launch_cooperative, which take the same arguments.
template <auto kernel, class... Arguments>
void launch_either(bool cooperative, Arguments... arguments) {
  if (cooperative)
    simt::launch_cooperative<kernel>(arguments...);
  else
    simt::launch<kernel>(arguments...);
}

Array<int> bind_arrivals(int blocks, int threads, uint64_t seed, bool cooperative) {
  Array<int> order(blocks * threads);
  int counter = 0;
  launch_either<arrivals>(cooperative, blocks, threads, 0, seed, &counter, order.mutable_data());
  return order;
}

int bind_barriers(int blocks, int threads, int count, uint64_t seed) {
  int passed = 0;
  simt::launch<barriers>(blocks, threads, 0, seed, count, &passed);
  return passed;
}

template <bool synchronized>
Array<float> bind_sum_over_grid(const Array<float>& x, uint64_t seed, bool cooperative) {
  const int blocks = static_cast<int>(x.shape(0)) / 32;
  Array<float> sums(blocks);
  std::vector<float> partial(blocks, NAN);
  launch_either<sum_over_grid<synchronized>>(cooperative, blocks, 32, 0, seed, x.data(), partial.data(),
                                             sums.mutable_data());
  return sums;
}

template <bool synchronized>
Array<int> bind_scan_grid(const Array<int>& x, int threads, uint64_t seed) {
  Array<int> sums(x.shape(0));
  std::copy_n(x.data(), x.shape(0), sums.mutable_data());
  simt::launch_cooperative<scan_grid<synchronized>>(blocks_for(x.shape(0), threads), threads, 0, seed,
                                                    sums.mutable_data());
  return sums;
}

Array<float> bind_keep_shared_memory(const Array<float>& x, int blocks, uint64_t seed) {
  Array<float> y(x.shape(0));
  const auto threads = static_cast<unsigned>(x.shape(0)) / blocks;
  simt::launch_cooperative<keep_shared_memory>(blocks, threads, threads * sizeof(float), seed, x.data(),
                                               y.mutable_data());
  return y;
}

Array<int> bind_wait_for_all_blocks(int blocks, int threads, uint64_t seed, bool cooperative) {
  Array<int> seen(blocks);
  int arrived = 0;
  launch_either<wait_for_all_blocks>(cooperative, blocks, threads, 0, seed, &arrived, seen.mutable_data());
  return seen;
}

Array<int> bind_order_of_blocks(int blocks, int phases, uint64_t seed) {
  Array<int> order({phases, blocks});
  int counter = 0;
  simt::launch_cooperative<order_of_blocks>(blocks, 32, 0, seed, &counter, order.mutable_data(), phases);
  return order;
}

void bind_point_into_another_block(uint64_t seed) {
  std::vector<float*> rows(2);
  simt::launch_cooperative<point_into_another_block>(2, 64, 0, seed, rows.data());
}

}  // namespace

PYBIND11_MODULE(simt_kernels, module) {
  simt::register_errors(module);
  module.def("sum_rows", &bind_sum_rows<double>);
  module.def("sum_rows", &bind_sum_rows<float>);
  module.def("softmax_float32", &bind_softmax_rows<float, float>);
  module.def("softmax_bfloat16", &bind_softmax_rows<BFloat16, uint16_t>);
  module.def("softmax_float16", &bind_softmax_rows<Float16, uint16_t>);
  module.def("transpose", &bind_transpose);
  module.def("histogram", &bind_histogram);
  module.def("matmul", &bind_matmul);
  module.def("warp_intrinsics", &bind_warp_intrinsics);
  module.def("swap_bytes", &bind_swap_bytes);
  module.def("math_functions", &bind_math_functions);
  module.def("warp_intrinsics_float", &bind_warp_intrinsics_of<float>);
  module.def("warp_intrinsics_double", &bind_warp_intrinsics_of<double>);
  module.def("warp_intrinsics_int", &bind_warp_intrinsics_of<int>);
  module.def("warp_intrinsics_long", &bind_warp_intrinsics_of<long>);
  module.def("warp_intrinsics_long_long", &bind_warp_intrinsics_of<long long>);
  module.def("vectors", &bind_vectors);
  module.def("counters", &bind_counters);
  module.def("arrivals", &bind_arrivals, py::arg("blocks"), py::arg("threads"), py::arg("seed"),
             py::arg("cooperative") = false);
  module.def("barriers", &bind_barriers);
  module.def("sum_over_grid", &bind_sum_over_grid<true>, py::arg("x"), py::arg("seed"), py::arg("cooperative") = true);
  module.def("sum_over_grid_without_barrier", &bind_sum_over_grid<false>, py::arg("x"), py::arg("seed"),
             py::arg("cooperative") = true);
  module.def("scan_grid", &bind_scan_grid<true>);
  module.def("scan_grid_with_one_barrier", &bind_scan_grid<false>);
  module.def("keep_shared_memory", &bind_keep_shared_memory);
  module.def("order_of_blocks", &bind_order_of_blocks);
  module.def("wait_for_all_blocks", &bind_wait_for_all_blocks, py::arg("blocks"), py::arg("threads"), py::arg("seed"),
             py::arg("cooperative") = true);

  bind_faulty<reverse<true>>(module, "reverse");
  bind_faulty<reverse<false>>(module, "reverse_without_barrier");
  bind_faulty<reverse_twice>(module, "reverse_twice");
  bind_faulty<reverse_in_warp<true>>(module, "reverse_in_warp");
  bind_faulty<reverse_in_warp<false>>(module, "reverse_in_warp_without_barrier");
  bind_faulty<synchronize_half_warps>(module, "synchronize_half_warps");
  bind_faulty<mix_atomic_and_plain>(module, "mix_atomic_and_plain");
  bind_faulty<leave_before_barrier>(module, "leave_before_barrier");
  bind_faulty<wait_at_two_barriers>(module, "wait_at_two_barriers");
  bind_faulty<leave_before_shuffle>(module, "leave_before_shuffle");
  bind_faulty<wait_elsewhere_than_the_shuffle>(module, "wait_elsewhere_than_the_shuffle");
  bind_faulty<differ_in_masks>(module, "differ_in_masks");
  bind_faulty<differ_in_intrinsics>(module, "differ_in_intrinsics");
  bind_faulty<leave_oneself_out>(module, "leave_oneself_out");
  bind_faulty<read_outside_the_mask>(module, "read_outside_the_mask");
  bind_faulty<trust_active_mask>(module, "trust_active_mask");
  bind_faulty<index_past_the_array<1>>(module, "index_past_the_array");
  bind_faulty<index_past_the_array<-3>>(module, "index_before_the_array");
  bind_faulty<leave_the_row_of_a_tile>(module, "leave_the_row_of_a_tile");
  bind_faulty<ask_for_too_little>(module, "ask_for_too_little");
  bind_faulty<read_fours_of_floats>(module, "read_fours_of_floats");
  bind_faulty<read_fours_from_the_next_float_on>(module, "read_fours_from_the_next_float_on");
  bind_faulty<read_before_writing>(module, "read_before_writing");
  bind_faulty<keep_between_blocks>(module, "keep_between_blocks");
  bind_faulty<wait_for_nobody>(module, "wait_for_nobody");
  bind_faulty<give_up>(module, "give_up");
  bind_faulty<break_an_assertion>(module, "break_an_assertion");
  bind_faulty<declare_too_much>(module, "declare_too_much");
  bind_faulty<write_past_global_memory>(module, "write_past_global_memory");

  bind_faulty<overwrite_behind_grid_barrier>(module, "wait_for_grid_in_a_plain_launch");
  bind_faulty_together<leave_before_grid_barrier>(module, "leave_before_grid_barrier");
  bind_faulty_together<leave_between_grid_barriers>(module, "leave_between_grid_barriers");
  bind_faulty_together<leave_block_before_grid_barrier>(module, "leave_block_before_grid_barrier");
  bind_faulty_together<wait_for_grid_and_for_block>(module, "wait_for_grid_and_for_block");
  bind_faulty_together<wait_at_two_grid_barriers>(module, "wait_at_two_grid_barriers");
  bind_faulty_together<shuffle_with_lanes_at_grid_barrier>(module, "shuffle_with_lanes_at_grid_barrier");
  bind_faulty_together<spin_while_others_wait>(module, "spin_while_others_wait");
  bind_faulty_together<trust_shared_memory_of_another_block>(module, "trust_shared_memory_of_another_block");
  bind_faulty_together<overwrite_behind_grid_barrier>(module, "overwrite_behind_grid_barrier");
  bind_faulty_together<reverse<true>>(module, "reverse_together");
  module.def("point_into_another_block", &bind_point_into_another_block);
}
