// The CPU operators: unpack tensors, choose types, split the work over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "../sorted_tokens.h"
#include "embedding_grad.h"
#include "entries.h"
#include "sddmm.h"

namespace sprand::cpu {
namespace {

constexpr int64_t kGrain = 16384;        // entries worth a thread in a pass over entries
constexpr int64_t kAdamWEntries = 4096;  // entries updated, then patched while they are in the first-level cache
constexpr int64_t kDrawGrain = 2048;     // positions worth a thread in a draw
constexpr int64_t kAddGrain = 16384;     // additions worth a thread in an embedding gradient

// Calls f with a null pointer of the element type of `type`.
template <class F>
void with_weight_type(ScalarType type, F&& f) {
  THO_DISPATCH_V2(type, "sprand", AT_WRAP([&] { f(static_cast<scalar_t*>(nullptr)); }), AT_EXPAND(AT_FLOATING_TYPES),
                  ScalarType::Half, ScalarType::BFloat16);
}

template <class F>
void with_index_type(const char* op, const Tensor& indices, F&& f) {
  if (long_indices(op, indices))
    f(indices.const_data_ptr<int64_t>());
  else
    f(indices.const_data_ptr<int32_t>());
}

// Sorted indices are below `limit` if the first and the last one are.
void check_range(const char* op, const Tensor& indices, int64_t limit) {
  if (indices.numel() == 0) return;
  with_index_type(op, indices, [&](const auto* index) {
    const int64_t first = index[0], last = index[indices.numel() - 1];
    STD_TORCH_CHECK(first >= 0 && last < limit, op, ": expected indices in [0, ", limit, "), got ", first, " to ", last,
                    "; they belong to another weight");
  });
}

template <class T>
const T* values(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* written(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

void run_parallel(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(begin, end, grain, f);
}

DType sddmm_type(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16");
  }
  return DType::f32;
}

// The entries at `indices` of grad_output^T input, or all of them, as a vector.
Tensor product(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor* indices) {
  check_product(op, grad_output, input);
  const Tensor g = torch::stable::contiguous(grad_output), x = torch::stable::contiguous(input);
  const int64_t nnz = indices ? indices->numel() : g.size(1) * x.size(1);
  const bool is_long = indices && long_indices(op, *indices);
  Tensor result = torch::stable::new_empty(g, {nnz}, sum_type(g));
  sddmm({g.const_data_ptr(), x.const_data_ptr(), indices ? indices->const_data_ptr() : nullptr, result.mutable_data_ptr(),
         g.size(0), g.size(1), x.size(1), nnz, is_long, sddmm_type(op, g.scalar_type())},
        {static_cast<int64_t>(torch::stable::get_num_threads()),
         [](int64_t n, const std::function<void(int64_t, int64_t)>& f) { run_parallel(0, n, 1, f); }});
  return result;
}

// table and launch are a GPU's schedule.
Tensor sddmm_op(const Tensor& grad_output, const Tensor& input, const Tensor& indices, const std::optional<Tensor>&,
                const std::vector<int64_t>&) {
  check_product("sddmm", grad_output, input);
  check_range("sddmm", indices, grad_output.size(1) * input.size(1));
  return product("sddmm", grad_output, input, &indices);
}

Tensor linear_grad_op(const Tensor& grad_output, const Tensor& input) {
  return torch::stable::view(product("linear_grad", grad_output, input, nullptr), {grad_output.size(1), input.size(1)});
}

Tensor embedding_grad_op(const Tensor& grad_output, const Tensor& tokens, const Tensor& indices,
                         std::optional<int64_t> padding_idx) {
  check_embedding_grad(grad_output, tokens, indices);
  const Tensor g = torch::stable::contiguous(grad_output);
  const SortedTokens sorted = sort_tokens(tokens);
  Tensor result = torch::stable::new_zeros(g, {indices.numel()}, sum_type(g));
  const int64_t features = g.size(1), *order = sorted.order.const_data_ptr<int64_t>();
  with_index_type("embedding_grad", indices, [&](const auto* index) {
    std::vector<EmbeddingPiece> pieces;
    with_index_type("embedding_grad", sorted.values, [&](const auto* token) {
      pieces = embedding_pieces(token, tokens.numel(), index, indices.numel(), features, padding_idx.value_or(-1));
    });
    if (pieces.empty()) return;
    const int64_t additions = pieces.back().before + pieces.back().entries * pieces.back().tokens;
    with_weight_type(g.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      run_parallel(0, additions, kAddGrain, [&](int64_t begin, int64_t end) {
        const auto starts_before = [](const EmbeddingPiece& piece, int64_t work) { return piece.before < work; };
        auto piece = std::lower_bound(pieces.begin(), pieces.end(), begin, starts_before);
        for (; piece != pieces.end() && piece->before < end; ++piece)
          sum_piece(*piece, values<T>(g), order, index, written<Sum<T>>(result), features);
      });
    });
  });
  return result;
}

Tensor gather_op(const Tensor& weight, const Tensor& indices) {
  check_weight("gather", weight, indices);
  check_range("gather", indices, weight.numel());
  Tensor out = torch::stable::new_empty(weight, {indices.numel()});
  with_weight_type(weight.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_index_type("gather", indices, [&](const auto* index) {
      run_parallel(0, indices.numel(), kGrain, [&](int64_t begin, int64_t end) {
        gather(values<T>(weight), index + begin, written<T>(out) + begin, end - begin);
      });
    });
  });
  return out;
}

Places checked_places(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& base) {
  const Places places = places_in(op, weight, indices, base.numel());
  check_range(op, indices, places.row_numel / places.run);
  check_entries(op, "base", base, places.nnz, weight.scalar_type());
  return places;
}

Places check_patch(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& base, const Tensor* delta) {
  const Places places = checked_places(op, weight, indices, base);
  if (delta) check_entries(op, "delta", *delta, places.nnz, sum_type(weight));
  return places;
}

void check_scatter_add(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& addends) {
  check_weight(op, weight, indices);
  check_range(op, indices, weight.numel());
  check_entries(op, "values", addends, indices.numel(), sum_type(weight));
}

// Entries [begin, end) of one target, without delta the base; on the calling thread.
void patch_range(const char* op, const Tensor& weight, const Tensor& indices, const Places& places, const Tensor& base,
                 const Tensor* delta, double scale, int64_t begin, int64_t end) {
  with_weight_type(weight.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const entries = written<T>(weight);
    const T* const before = values<T>(base);
    const Sum<T>* const change = delta ? values<Sum<T>>(*delta) : nullptr;
    with_index_type(op, indices, [&](const auto* index) {
      over_stretches(places, index, begin, end, [&](int64_t offset, auto position, int64_t p, int64_t n) {
        patch(entries + offset, position, before + p, change ? change + p : nullptr, static_cast<Sum<T>>(scale), n);
      });
    });
  });
}

void scatter_add_range(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& addends, double scale,
                       int64_t begin, int64_t end) {
  with_weight_type(weight.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_index_type(op, indices, [&](const auto* index) {
      scatter_add(written<T>(weight), index + begin, values<Sum<T>>(addends) + begin, static_cast<Sum<T>>(scale), end - begin);
    });
  });
}

// f(target, begin, end) for ranges that together are all entries of all targets, in one parallel region. Each target has one of
// the `entries`.
template <class F>
void over_all_entries(const std::vector<Tensor>& entries, F&& f) {
  std::vector<int64_t> first(1, 0);  // entries before each target
  for (const Tensor& own : entries) first.push_back(first.back() + own.numel());
  run_parallel(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      if (begin < stop) f(i, begin - first[i], stop - first[i]);
      begin = stop;
    }
  });
}

void check_lists(const char* op, bool equal) {
  STD_TORCH_CHECK(equal, op, ": expected lists of one length, one element per target");
}

void patch_op(Tensor weight, const Tensor& indices, const Tensor& base, std::optional<Tensor> delta, double scale) {
  const Tensor* change = delta ? &*delta : nullptr;
  const Places places = check_patch("patch_", weight, indices, base, change);
  run_parallel(0, places.nnz, kGrain, [&](int64_t begin, int64_t end) {
    patch_range("patch_", weight, indices, places, base, change, scale, begin, end);
  });
}

void patch_all_op(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<Tensor> bases,
                  std::optional<std::vector<Tensor>> deltas, std::vector<double> scales) {
  constexpr const char* op = "patch_all_";
  const size_t targets = weights.size();
  check_lists(op, indices.size() == targets && bases.size() == targets && (!deltas || deltas->size() == targets) &&
                      scales.size() == targets);
  const auto delta = [&](size_t i) { return deltas ? &(*deltas)[i] : nullptr; };
  std::vector<Places> places;
  for (size_t i = 0; i < targets; ++i) places.push_back(check_patch(op, weights[i], indices[i], bases[i], delta(i)));
  over_all_entries(bases, [&](size_t i, int64_t begin, int64_t end) {
    patch_range(op, weights[i], indices[i], places[i], bases[i], delta(i), scales[i], begin, end);
  });
}

void scatter_add_all_op(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<Tensor> addends,
                        std::vector<double> scales) {
  constexpr const char* op = "scatter_add_all_";
  const size_t targets = weights.size();
  check_lists(op, indices.size() == targets && addends.size() == targets && scales.size() == targets);
  for (size_t i = 0; i < targets; ++i) check_scatter_add(op, weights[i], indices[i], addends[i]);
  over_all_entries(addends, [&](size_t i, int64_t begin, int64_t end) {
    scatter_add_range(op, weights[i], indices[i], addends[i], scales[i], begin, end);
  });
}

double number(const Tensor& t) {
  double value = 0;
  THO_DISPATCH_V2(t.scalar_type(), "sparse_adamw_", AT_WRAP([&] { value = *t.const_data_ptr<scalar_t>(); }),
                  AT_EXPAND(AT_FLOATING_TYPES));
  return value;
}

void sparse_adamw_op(std::vector<Tensor> weights, std::vector<Tensor> indices, std::vector<Tensor> bases,
                     std::vector<Tensor> deltas, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                     std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, std::vector<double> scales, double lr,
                     double beta1, double beta2, double eps, double weight_decay, bool maximize, std::optional<Tensor> lr_tensor,
                     std::optional<Tensor> grad_coef, std::optional<Tensor> found_inf) {
  if (found_inf && number(*found_inf) != 0) return;
  if (lr_tensor) lr = number(*lr_tensor);
  const double coef = (maximize ? -1.0 : 1.0) * (grad_coef ? number(*grad_coef) : 1.0);
  const size_t targets = weights.size();
  std::vector<std::pair<size_t, int64_t>> blocks;  // (target, first entry)
  std::vector<Places> places;
  for (size_t i = 0; i < targets; ++i) {
    places.push_back(checked_places("sparse_adamw_", weights[i], indices[i], bases[i]));
    for (const Tensor* t : {&deltas[i], &grads[i], &exp_avgs[i], &exp_avg_sqs[i]})
      check_entries("sparse_adamw_", "delta, grad, exp_avg and exp_avg_sq", *t, places[i].nnz, sum_type(weights[i]));
    for (int64_t p = 0; p < places[i].nnz; p += kAdamWEntries) blocks.emplace_back(i, p);
  }
  run_parallel(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto [i, first] = blocks[b];
      const int64_t p = first, n = std::min(kAdamWEntries, places[i].nnz - p);
      const double step = number(steps[i]);
      with_weight_type(weights[i].scalar_type(), [&, i = i](auto* type) {
        using S = Sum<std::remove_pointer_t<decltype(type)>>;
        const AdamW<S> a = adamw_step<S>(lr, beta1, beta2, eps, weight_decay, step, coef);
        adamw(a, written<S>(deltas[i]) + p, values<S>(grads[i]) + p, written<S>(exp_avgs[i]) + p, written<S>(exp_avg_sqs[i]) + p,
              n);
      });
      patch_range("sparse_adamw_", weights[i], indices[i], places[i], bases[i], &deltas[i], scales[i], p, p + n);
    }
  });
}

// Writes entry(p) to indices[p] for every p.
template <class Entry>
void fill(const char* op, Tensor& indices, Entry&& entry) {
  with_index_type(op, indices, [&](const auto* index) {
    auto* out = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(index)>>*>(index);
    run_parallel(0, indices.numel(), kDrawGrain, [&](int64_t begin, int64_t end) { entry(out, begin, end); });
  });
}

void stratified_indices_op(Tensor indices, int64_t rows, int64_t cols, int64_t key, int64_t run_rows, int64_t run_cols) {
  check_runs("stratified_indices_", indices, rows, cols, run_rows, run_cols);
  const Stratified draw(rows, cols, indices.numel(), static_cast<uint64_t>(key), run_rows, run_cols);
  fill("stratified_indices_", indices, [&](auto* out, int64_t begin, int64_t end) {
    uint64_t row = draw.row_of(begin), first = draw.entries_before(row), next = draw.entries_before(row + 1);
    for (uint64_t p = begin; p < static_cast<uint64_t>(end); ++p) {
      while (p >= next) {
        first = next;
        next = draw.entries_before(++row + 1);
      }
      out[p] = draw.position(row, next - first, p - first);
    }
  });
}

void uniform_indices_op(Tensor indices, int64_t numel, int64_t key) {
  fill("uniform_indices_", indices, [&](auto* out, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) out[p] = uniform_entry(numel, static_cast<uint64_t>(key), p);
  });
}

std::string instruction_set_op() { return instruction_set(); }

}  // namespace
}  // namespace sprand::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(sprand, m) { m.def("_instruction_set() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(sprand, CompositeExplicitAutograd, m) {
  m.impl("_instruction_set", TORCH_BOX(&sprand::cpu::instruction_set_op));
}

STABLE_TORCH_LIBRARY_IMPL(sprand, CPU, m) {
  m.impl("sddmm", TORCH_BOX(&sprand::cpu::sddmm_op));
  m.impl("linear_grad", TORCH_BOX(&sprand::cpu::linear_grad_op));
  m.impl("embedding_grad", TORCH_BOX(&sprand::cpu::embedding_grad_op));
  m.impl("gather", TORCH_BOX(&sprand::cpu::gather_op));
  m.impl("patch_", TORCH_BOX(&sprand::cpu::patch_op));
  m.impl("patch_all_", TORCH_BOX(&sprand::cpu::patch_all_op));
  m.impl("scatter_add_all_", TORCH_BOX(&sprand::cpu::scatter_add_all_op));
  m.impl("sparse_adamw_", TORCH_BOX(&sprand::cpu::sparse_adamw_op));
  m.impl("stratified_indices_", TORCH_BOX(&sprand::cpu::stratified_indices_op));
  m.impl("uniform_indices_", TORCH_BOX(&sprand::cpu::uniform_indices_op));
}
