// The tensors of an operator as what its launcher takes, with the last checks: dtypes, sizes, one device. O(1) each.
#pragma once
#include <optional>

#include "../checks.h"
#include "segments.h"
#include "types.h"

namespace sprand::cuda {

inline DType value_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16 on CUDA, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_device(const char* op, const Tensor& t, const Tensor& other) {
  STD_TORCH_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), op,
                  ": expected all tensors on one device");
}

inline IndexType index_type(const char* op, const Tensor& indices) {
  return long_indices(op, indices) ? IndexType::i64 : IndexType::i32;
}

inline Indices positions_of(const char* op, const Tensor& indices, const Tensor& other) {
  check_device(op, indices, other);
  return {indices.const_data_ptr(), index_type(op, indices), indices.numel()};
}

inline Indices positions_in(const char* op, const Tensor& weight, const Tensor& indices) {
  check_weight(op, weight, indices);
  return positions_of(op, indices, weight);
}

// The chosen entries of a weight, and where they are if these are whole columns.
struct Chosen {
  Indices positions;
  Columns columns;
};

inline Chosen chosen_in(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& base) {
  const Places places = places_in(op, weight, indices, base.numel());
  Chosen chosen{positions_of(op, indices, weight), {}};
  if (places.nnz == indices.numel()) return chosen;
  STD_TORCH_CHECK(places.nnz < int64_t{1} << 32, op, ": expected fewer than 2**32 entries in whole columns of one weight, got ",
                  places.nnz);
  chosen.positions.nnz = places.nnz;
  chosen.columns = {static_cast<uint32_t>(places.per_row), static_cast<uint32_t>(places.run), 0, places.row_numel};
  return chosen;
}

inline const void* entries_of(const char* op, const char* name, const Tensor& t, const Indices& positions, const Tensor& weight,
                              ScalarType type) {
  check_entries(op, name, t, positions.nnz, type);
  check_device(op, t, weight);
  return t.const_data_ptr();
}

inline const float* floats_of(const char* op, const char* name, const Tensor& t, const Indices& positions, const Tensor& weight) {
  return static_cast<const float*>(entries_of(op, name, t, positions, weight, ScalarType::Float));
}

inline float* written_floats_of(const char* op, const char* name, const Tensor& t, const Indices& positions,
                                const Tensor& weight) {
  entries_of(op, name, t, positions, weight, ScalarType::Float);
  return static_cast<float*>(t.mutable_data_ptr());
}

inline const float* number_of(const char* op, const char* name, const Tensor& t, const Tensor& indices) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, op, ": expected ", name, " as one float32");
  check_device(op, t, indices);
  return static_cast<const float*>(t.const_data_ptr());
}

inline const float* number_of(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& indices) {
  return t ? number_of(op, name, *t, indices) : nullptr;
}

}  // namespace sprand::cuda
