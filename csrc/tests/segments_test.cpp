// Tests of the launch arithmetic of csrc/cuda/segments.h: which targets share a launch, and which block works on which entries.
#include "../cuda/segments.h"

#include <string>

#include "expect.h"

namespace {

using namespace sprand::cuda;
using tests::expect;

template <class P>
P* address(uintptr_t value) {
  return reinterpret_cast<P*>(value);
}
template <class P>
int64_t bytes_between(const P* from, const P* to) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from));
}

// Nothing reads the memory that these point to.
Target<AdamWSegment> target(int64_t nnz, DType dtype = DType::bf16, IndexType index_type = IndexType::i32) {
  const uintptr_t at = uintptr_t{1} << 44;
  return {{.weight = address<void>(at),
           .indices = address<void>(2 * at),
           .base = address<void>(3 * at),
           .delta = address<float>(4 * at),
           .grad = address<float>(5 * at),
           .exp_avg = address<float>(6 * at),
           .exp_avg_sq = address<float>(7 * at),
           .step = address<float>(8 * at),
           .columns = {},
           .nnz = nnz,
           .numel = int64_t{1} << 40,
           .scale = 1.f,
           .first_block = 0},
          dtype,
          index_type};
}

using Targets = std::vector<Target<AdamWSegment>>;
using View = std::span<const Target<AdamWSegment>>;

constexpr int kLarge = kMostSegments<AdamWSegment>;

// Every entry of every target lies in the chunk of exactly one block, and that block finds it.
void expect_covered(const std::string& name, const Targets& targets, size_t capacity, int64_t most_blocks) {
  std::vector<int64_t> next(targets.size(), 0);
  for (const Batch& batch : batches_of(View(targets), capacity, most_blocks)) {
    expect(!batch.pieces.empty() && batch.pieces.size() <= capacity, name + ": pieces fit into the table");
    expect(batch.blocks > 0 && batch.blocks <= most_blocks, name + ": blocks fit into the grid");
    Table<AdamWSegment, kLarge> table;
    fill(table, batch, View(targets));
    int64_t block = 0;
    for (size_t i = 0; i < batch.pieces.size(); ++i) {
      const Piece& piece = batch.pieces[i];
      const auto& [whole, dtype, index_type] = targets[piece.target];
      const AdamWSegment& s = table.segments[i];
      expect(dtype == batch.dtype && index_type == batch.index_type, name + ": one kernel per launch");
      expect(piece.begin == next[piece.target] && piece.nnz > 0, name + ": pieces follow each other");
      expect(s.first_block == block && s.nnz == piece.nnz, name + ": blocks follow each other");
      expect(s.weight == whole.weight && s.step == whole.step, name + ": positions count from the weight's beginning");
      const bool in_columns = s.columns.per_row != 0;
      expect(bytes_between(whole.indices, s.indices) == (in_columns ? 0 : piece.begin * size_of(index_type)), name + ": indices");
      expect(s.columns.begin == (in_columns ? piece.begin : 0), name + ": a piece of columns knows its first entry");
      expect(bytes_between(whole.base, s.base) == piece.begin * size_of(dtype), name + ": base");
      expect(bytes_between<void>(whole.delta, s.delta) == piece.begin * 4, name + ": delta");
      expect(bytes_between<void>(whole.grad, s.grad) == piece.begin * 4, name + ": grad");
      expect(bytes_between<void>(whole.exp_avg, s.exp_avg) == piece.begin * 4, name + ": exp_avg");
      expect(bytes_between<void>(whole.exp_avg_sq, s.exp_avg_sq) == piece.begin * 4, name + ": exp_avg_sq");
      const int64_t blocks = (piece.nnz + kChunk - 1) / kChunk;
      for (int64_t mine : {block, block + blocks / 2, block + blocks - 1})
        expect(segment_of(table, static_cast<uint32_t>(mine)) == static_cast<int>(i), name + ": a block finds its target");
      block += blocks;
      next[piece.target] += piece.nnz;
    }
    expect(block == batch.blocks, name + ": no block is left over");
  }
  for (size_t i = 0; i < targets.size(); ++i) expect(next[i] == (targets[i].segment.nnz), name + ": every entry has its block");
}

void test_cover() {
  constexpr int64_t k31 = int64_t{1} << 31;
  Targets many;
  for (int i = 0; i < 2 * kLarge + 7; ++i) many.push_back(target(i % 5 * 1000 + 1));
  Targets mixed;
  for (int i = 0; i < 100; ++i)
    mixed.push_back(target(i % 7 * 700, static_cast<DType>(i % 3), static_cast<IndexType>(i / 3 % 2)));
  const Targets edges = {target(0), target(1), target(kChunk - 1), target(0), target(kChunk), target(kChunk + 1), target(0)};
  Targets columns(3, target(5 * kChunk + 1));
  columns[1].segment.columns = {.per_row = 7, .run = 1, .begin = 0, .row_numel = 50};
  const Targets huge = {target(k31 + 5), target(3), target(40 * k31 + 1, DType::bf16, IndexType::i64), target(k31 * kChunk + 9)};
  for (size_t capacity : {size_t{1}, size_t{3}, size_t{kLarge}}) {
    expect_covered("nothing", {}, capacity, kMostBlocks);
    expect_covered("empty targets", {target(0), target(0)}, capacity, kMostBlocks);
    expect_covered("edges", edges, capacity, kMostBlocks);
    expect_covered("edges, few blocks", edges, capacity, 1);
    expect_covered("mixed", mixed, capacity, kMostBlocks);
    expect_covered("mixed, few blocks", mixed, capacity, 3);
    expect_covered("columns, few blocks", columns, capacity, 2);
    expect_covered("many", many, capacity, kMostBlocks);
    expect_covered("huge", huge, capacity, kMostBlocks);
  }
}

void test_launches() {
  const auto launches = [](const Targets& targets) { return batches_of(View(targets)).size(); };
  expect(launches({}) == 0 && launches({target(0)}) == 0, "no entries, no launch");
  expect(launches(Targets(kLarge, target(5))) == 1, "a full table is one launch");
  expect(launches(Targets(kLarge + 1, target(5))) == 2, "one target more takes a further launch");
  expect(launches({target(5), target(5, DType::f32), target(5), target(5, DType::f32)}) == 2, "one launch per weight dtype");
  expect(launches({target(5), target(5, DType::bf16, IndexType::i64), target(5)}) == 2, "one launch per index dtype");
  expect(launches({target(kMostBlocks * kChunk), target(1)}) == 2, "a full grid");
  expect(launches({target(kMostBlocks * kChunk + 1)}) == 2, "a target that one grid cannot cover");
}

void test_sizes() {
  constexpr size_t kParameters = 32764;  // of a kernel, in bytes
  constexpr size_t kOptions = 128;
  expect(sizeof(Table<AdamWSegment, kLarge>) + kOptions <= kParameters, "the table of AdamW and its options are parameters");
  expect(sizeof(Table<PatchSegment, kMostSegments<PatchSegment>>) <= kParameters, "the table of patch is a parameter");
  expect(sizeof(Table<ScatterAddSegment, kMostSegments<ScatterAddSegment>>) <= kParameters, "the table of scatter_add too");
  expect(kLarge >= 224, "the linear layers of a model of 32 blocks take one launch");
}

void test_pieces_of_patch_and_scatter_add() {
  const uintptr_t at = uintptr_t{1} << 44;
  const std::vector<Target<PatchSegment>> patches = {
      {{address<void>(at), address<void>(2 * at), address<void>(3 * at), nullptr, {}, 2 * kChunk, int64_t{1} << 40, 1.f, 0},
       DType::f32,
       IndexType::i64}};
  const std::vector<Target<ScatterAddSegment>> adds = {
      {{address<void>(at), address<void>(2 * at), address<float>(3 * at), 2 * kChunk, int64_t{1} << 40, 1.f, 0},
       DType::f16,
       IndexType::i32}};
  Table<PatchSegment, 1> patch;
  Table<ScatterAddSegment, 1> add;
  const std::span<const Target<PatchSegment>> patch_view(patches);
  const std::span<const Target<ScatterAddSegment>> add_view(adds);
  fill(patch, batches_of(patch_view, 1, 1)[1], patch_view);
  fill(add, batches_of(add_view, 1, 1)[1], add_view);
  expect(bytes_between<void>(address<void>(2 * at), patch.segments[0].indices) == 8 * kChunk, "patch: indices");
  expect(bytes_between<void>(address<void>(3 * at), patch.segments[0].base) == 4 * kChunk, "patch: base");
  expect(patch.segments[0].delta == nullptr, "patch: no delta stays none");
  expect(bytes_between<void>(address<void>(2 * at), add.segments[0].indices) == 4 * kChunk, "scatter_add: indices");
  expect(bytes_between<void>(address<void>(3 * at), add.segments[0].values) == 4 * kChunk, "scatter_add: values");
}

}  // namespace

int main() {
  test_cover();
  test_launches();
  test_sizes();
  test_pieces_of_patch_and_scatter_add();
  return tests::finish();
}
