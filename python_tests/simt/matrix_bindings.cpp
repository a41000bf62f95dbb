// The kernels of matrix instructions and asynchronous copies for Python. Half types travel as their bits, and arrays
// come in with the right type and shape: the tests see to it.
#include <vector>

#include "bind_faulty.h"
#include "faulty_copies.cuh"
#include "matrix_kernels.cuh"
#include "simt/python.h"

using namespace fewshot_ext;

namespace {

// [lanes, elements, 2] of each operand.
template <class T>
py::dict layout() {
  using Layout = MmaLayout<T>;
  const auto table = [](int elements, Place (*place)(int, int)) {
    Array<int> places({32, elements, 2});
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < elements; ++i) {
        const Place at = place(lane, i);
        places.mutable_at(lane, i, 0) = at.row;
        places.mutable_at(lane, i, 1) = at.column;
      }
    return places;
  };
  py::dict tables;
  tables["a"] = table(Layout::elements_a, &Layout::of_a);
  tables["b"] = table(Layout::elements_b, &Layout::of_b);
  tables["c"] = table(Layout::elements_c, &Layout::of_c);
  return tables;
}

// a, b and c of [warps, 32, registers].
template <class T>
Array<float> bind_multiply_registers(const Array<uint32_t>& a, const Array<uint32_t>& b, const Array<float>& c,
                                     uint64_t seed) {
  Array<float> sums({c.shape(0), c.shape(1), c.shape(2)});
  std::copy_n(c.data(), c.size(), sums.mutable_data());
  simt::launch<multiply_registers<T>>(
      static_cast<unsigned>(a.shape(0)), 32, 0, seed, reinterpret_cast<const FragmentA<T>*>(a.data()),
      reinterpret_cast<const FragmentB<T>*>(b.data()), reinterpret_cast<FragmentC*>(sums.mutable_data()));
  return sums;
}

template <bool transposed>
Array<uint16_t> bind_load_registers(const Array<uint16_t>& rows, uint64_t seed) {  // [32, 8] to [32, 4, 2]
  Array<uint16_t> loaded({32, 4, 2});
  const std::vector<uint4> aligned(reinterpret_cast<const uint4*>(rows.data()),
                                   reinterpret_cast<const uint4*>(rows.data()) + 32);
  simt::launch<load_registers<transposed>>(1, 32, 0, seed, aligned.data(),
                                           reinterpret_cast<FragmentA<uint16_t>*>(loaded.mutable_data()));
  return loaded;
}

template <class Storage, Way way, class T>
Array<float> bind_multiply_by_layout(const Array<T>& a, const Array<T>& b, const Array<float>& c, uint64_t seed) {
  Array<float> sums({16, 8});
  std::copy_n(c.data(), c.size(), sums.mutable_data());
  simt::launch<multiply_by_layout<Storage, way>>(1, 32, 0, seed, reinterpret_cast<const Storage*>(a.data()),
                                                 reinterpret_cast<const Storage*>(b.data()), sums.mutable_data(),
                                                 static_cast<int>(a.shape(1)));
  return sums;
}

// depth is that of the factors, however they are stored.
template <class Storage, Stored stored_a, Stored stored_b, Load load, class T>
Array<float> bind_multiply_loaded(const Array<T>& a, const Array<T>& b, uint64_t seed) {
  Array<float> c({16, 16});
  simt::launch<multiply_loaded<Storage, stored_a, stored_b, load>>(
      1, 32, 0, seed, reinterpret_cast<const Storage*>(a.data()), reinterpret_cast<const Storage*>(b.data()),
      c.mutable_data(), static_cast<int>(a.size() / 16));
  return c;
}

template <auto kernel>
Array<float> bind_multiply_pipelined(const Array<uint16_t>& a, const Array<uint16_t>& b, int depth, uint64_t seed) {
  const auto aligned = [](const Array<uint16_t>& x) {
    const auto* fours = reinterpret_cast<const uint4*>(x.data());
    return std::vector<uint4>(fours, fours + x.size() / 8);
  };
  const std::vector<uint4> left = aligned(a), right = aligned(b);
  Array<float> c({32, 16});
  simt::launch<kernel>(1, 64, 0, seed, reinterpret_cast<const BFloat16*>(left.data()),
                       reinterpret_cast<const BFloat16*>(right.data()), c.mutable_data(), depth,
                       static_cast<int>(a.shape(1)));
  return c;
}

float bind_copy_what_changes(uint64_t seed) {
  float4 x = {1, 1, 1, 1};
  float y = NAN;
  simt::launch<copy_what_changes>(1, 32, 0, seed, &x.x, &y);
  return y;
}

template <class Storage, class T>
void bind_type(py::module_& module, const std::string& type) {
  const auto name = [&](const char* what) { return std::string(what) + "_" + type; };
  const auto by_layout = [&]<Way way>(const char* what) {
    module.def(name(what).c_str(), &bind_multiply_by_layout<Storage, way, T>);
  };
  by_layout.template operator()<Way::right>("multiply_by_layout");
  by_layout.template operator()<Way::swapped_registers_of_a>("swapped_registers_of_a");
  by_layout.template operator()<Way::swapped_registers_of_b>("swapped_registers_of_b");
  by_layout.template operator()<Way::exchanged_factors>("exchanged_factors");
  by_layout.template operator()<Way::transposed_result>("transposed_result");
  const auto loaded = [&]<Stored stored_a, Stored stored_b, Load load>(const char* what) {
    module.def(name(what).c_str(), &bind_multiply_loaded<Storage, stored_a, stored_b, load, T>);
  };
  constexpr Stored by_rows = Stored::by_rows, by_columns = Stored::by_columns;
  loaded.template operator()<by_rows, by_columns, Load::right>("multiply_loaded_rows_columns");
  loaded.template operator()<by_rows, by_columns, Load::row_of_the_other_factor>("row_of_the_other_factor");
  loaded.template operator()<by_rows, by_columns, Load::row_past_the_tile>("row_past_the_tile");
  loaded.template operator()<by_rows, by_columns, Load::misaligned_rows>("misaligned_rows");
  loaded.template operator()<by_rows, by_columns, Load::without_barrier>("load_without_barrier");
  loaded.template operator()<by_rows, by_columns, Load::overwritten_without_barrier>("overwritten_without_barrier");
  loaded.template operator()<by_rows, by_columns, Load::from_global_memory>("load_from_global_memory");
  loaded.template operator()<by_rows, by_columns, Load::lane_missing>("lane_missing");
  if constexpr (sizeof(Storage) == 2) {
    by_layout.template operator()<Way::exchanged_elements>("exchanged_elements");
    loaded.template operator()<by_rows, by_rows, Load::right>("multiply_loaded_rows_rows");
    loaded.template operator()<by_columns, by_rows, Load::right>("multiply_loaded_columns_rows");
    loaded.template operator()<by_columns, by_columns, Load::right>("multiply_loaded_columns_columns");
    loaded.template operator()<by_columns, by_rows, Load::plain_for_transposed>("plain_for_transposed");
  }
}

}  // namespace

PYBIND11_MODULE(simt_matrix_kernels, module) {
  simt::register_errors(module);
  module.def("layout_of_halves", &layout<BFloat16>);
  module.def("layout_of_tf32", &layout<Tf32>);
  module.def("multiply_registers_bfloat16", &bind_multiply_registers<BFloat16>);
  module.def("multiply_registers_float16", &bind_multiply_registers<Float16>);
  module.def("multiply_registers_tf32", &bind_multiply_registers<Tf32>);
  module.def("load_registers", &bind_load_registers<false>);
  module.def("load_registers_transposed", &bind_load_registers<true>);
  module.def("round_to_tf32", [](float x) { return round_to_tf32(x).bits; });

  bind_type<BFloat16, uint16_t>(module, "bfloat16");
  bind_type<Float16, uint16_t>(module, "float16");
  bind_type<float, float>(module, "tf32");
  module.def("multiply_unrounded", &bind_multiply_by_layout<float, Way::unrounded, float>);
  module.def("multiply_threefold", &bind_multiply_by_layout<float, Way::threefold, float>);
  module.def("multiply_threefold_in_slabs", &bind_multiply_by_layout<float, Way::threefold_in_slabs, float>);
  module.def("threefold_without_small_terms", &bind_multiply_by_layout<float, Way::without_small_terms, float>);
  module.def("threefold_without_rounding", &bind_multiply_by_layout<float, Way::threefold_without_rounding, float>);

  module.def("multiply_pipelined", &bind_multiply_pipelined<multiply_pipelined<1, true, true>>);
  module.def("pipelined_with_two_pending", &bind_multiply_pipelined<multiply_pipelined<2, true, true>>);
  module.def("pipelined_without_barrier_before", &bind_multiply_pipelined<multiply_pipelined<1, false, true>>);
  module.def("pipelined_without_barrier_after", &bind_multiply_pipelined<multiply_pipelined<1, true, false>>);

  module.def("copy_what_changes", &bind_copy_what_changes);
  bind_faulty<mirror_async<true, 0>>(module, "mirror_async");
  bind_faulty<mirror_async<true, 1>>(module, "wait_for_all_but_the_last");
  bind_faulty<mirror_async<false, 0>>(module, "wait_without_commit");
  bind_faulty<read_before_the_wait>(module, "read_before_the_wait");
  bind_faulty<read_ones_own_before_the_wait>(module, "read_ones_own_before_the_wait");
  bind_faulty<wait_without_barrier>(module, "wait_without_barrier");
  bind_faulty<write_before_the_wait>(module, "write_before_the_wait");
  bind_faulty<copy_twice>(module, "copy_twice");
  bind_faulty<copy_over_what_is_read>(module, "copy_over_what_is_read");
  bind_faulty<exit_before_the_wait>(module, "exit_before_the_wait");
  bind_faulty<copy_to_a_misaligned_address>(module, "copy_to_a_misaligned_address");
  bind_faulty<copy_from_a_misaligned_address>(module, "copy_from_a_misaligned_address");
  bind_faulty<copy_past_the_array>(module, "copy_past_the_array");
  bind_faulty<copy_to_global_memory>(module, "copy_to_global_memory");
  bind_faulty<copy_too_many_bytes>(module, "copy_too_many_bytes");
  bind_faulty<multiply_at_two_places>(module, "multiply_at_two_places");
  bind_faulty<load_ones_own_rows_without_barrier>(module, "load_ones_own_rows_without_barrier");
  bind_faulty<load_one_row_too_far>(module, "load_one_row_too_far");
  bind_faulty<multiply_without_a_lane>(module, "multiply_without_a_lane");
}
