// What the launchers know of tensors: element types, index types and the chosen entries of a weight. Plain C++.
#pragma once
#include <cstdint>

namespace sprand::cuda {

enum class DType { f32, f16, bf16 };
enum class IndexType { i32, i64 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
constexpr int64_t size_of(IndexType type) { return type == IndexType::i32 ? 4 : 8; }

// The chosen entries of one weight: flat positions, ascending and unique.
struct Indices {
  const void* data;
  IndexType type;
  int64_t nnz;
};

}  // namespace sprand::cuda
