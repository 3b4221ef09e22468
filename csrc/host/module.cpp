// sprand._host: Python's way to merge.h and order.h. Memory is passed as addresses, so that neither torch nor numpy is needed
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/merge.h"
#include "host/order.h"

namespace py = pybind11;

namespace sprand::host {

struct List {
  uintptr_t address;
  size_t count;
  template <class Index>
  std::span<const Index> as() const {
    return {reinterpret_cast<const Index*>(address), count};
  }
};
using Entry = std::pair<uintptr_t, size_t>;

// Calls f with a value of the integer type of that many bytes.
template <class F>
auto with_index_type(int itemsize, F f) {
  if (itemsize == 4) return f(int32_t{});
  if (itemsize == 8) return f(int64_t{});
  throw std::invalid_argument("expected indices of 4 or 8 bytes, got " + std::to_string(itemsize));
}

int64_t first_bad_index_at(uintptr_t address, size_t count, int itemsize, int64_t numel) {
  py::gil_scoped_release released;
  return with_index_type(itemsize, [&](auto zero) { return first_bad_index(List{address, count}.as<decltype(zero)>(), numel); });
}

size_t merge_at(const std::vector<Entry>& lists, int itemsize, uintptr_t out, const std::vector<uintptr_t>& places) {
  if (lists.size() != places.size()) throw std::invalid_argument("expected one output of positions per list");
  py::gil_scoped_release released;
  return with_index_type(itemsize, [&](auto zero) {
    using Index = decltype(zero);
    std::vector<std::span<const Index>> views;
    for (const auto& [address, count] : lists) views.push_back(List{address, count}.as<Index>());
    const std::vector<Index> all = merge(views);
    if (!all.empty()) std::memcpy(reinterpret_cast<void*>(out), all.data(), all.size() * sizeof(Index));
    for (size_t i = 0; i < views.size(); ++i) {
      positions(views[i], std::span<const Index>(all), reinterpret_cast<int64_t*>(places[i]));
    }
    return all.size();
  });
}

py::bytes bytes_of(const std::vector<int32_t>& v) {
  return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(int32_t)};
}

py::tuple order_rows_at(uintptr_t address, size_t count, int itemsize, int64_t out_features, int64_t in_features, int64_t threads,
                        int64_t rows_per_lane, int64_t slots, int64_t columns) {
  Ordered ordered;
  {
    py::gil_scoped_release released;
    ordered = with_index_type(itemsize, [&](auto zero) {
      return order_rows(List{address, count}.as<decltype(zero)>(), out_features, in_features, {threads, rows_per_lane, slots},
                        columns);
    });
  }
  return py::make_tuple(bytes_of(ordered.window_begin), bytes_of(ordered.rows), bytes_of(ordered.entries), ordered.phases,
                        ordered.wavefronts);
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side work on sorted index lists; sprand.kernels.host is its door.";
  m.def("first_bad_index", &first_bad_index_at, py::arg("address"), py::arg("count"), py::arg("itemsize"), py::arg("numel"));
  m.def("merge_indices", &merge_at, py::arg("lists"), py::arg("itemsize"), py::arg("out"), py::arg("places"));
  m.def("order_rows", &order_rows_at, py::arg("address"), py::arg("count"), py::arg("itemsize"), py::arg("out_features"),
        py::arg("in_features"), py::arg("threads"), py::arg("rows_per_lane"), py::arg("slots"), py::arg("columns"));
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
}

}  // namespace sprand::host
