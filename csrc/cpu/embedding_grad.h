// The CPU embedding gradient: result[p] = sum over the tokens t at row p of grad_output[t, column p]. Raw pointers, no torch.
//
// The sorted tokens of one row are a run. A run with chosen entries is cut into pieces of some entries each, which walk all
// tokens of the run: the rows of grad_output are read one after the other, and an entry's sum belongs to one piece, so its
// order (embedding_math.h) does not depend on how the pieces fall to threads. Frequent tokens make long runs, so pieces
// are told apart by their work, not counted.
#pragma once
#include <algorithm>
#include <vector>

#include "../embedding_math.h"
#include "entries.h"

namespace sprand::cpu {

constexpr int64_t kPieceEntries = 64;

// Entries [entry, entry + entries) of `row`, and sorted tokens [first, first + tokens); `before` counts the additions of all
// pieces before it.
struct EmbeddingPiece {
  int64_t row, entry, entries, first, tokens, before;
};

template <class Token, class Index>
std::vector<EmbeddingPiece> embedding_pieces(const Token* sorted, int64_t tokens, const Index* indices, int64_t nnz,
                                             int64_t features, int64_t padding) {
  std::vector<EmbeddingPiece> pieces;
  if (nnz == 0) return pieces;
  int64_t begin = 0, before = 0;
  for (int64_t first = 0, next; first < tokens; first = next) {
    const int64_t row = sorted[first];
    next = first + 1;
    while (next < tokens && sorted[next] == sorted[first]) ++next;
    if (!is_trained_row(row, indices[nnz - 1], features, padding)) continue;
    begin = first_not_below(indices, begin, nnz, row * features);
    const int64_t end = first_not_below(indices, begin, nnz, (row + 1) * features);
    for (; begin < end; begin += pieces.back().entries) {
      pieces.push_back({row, begin, std::min(kPieceEntries, end - begin), first, next - first, before});
      before += pieces.back().entries * pieces.back().tokens;
    }
  }
  return pieces;
}

// Adds the sums of one piece to `out`, which holds zeros.
template <class T, class Index>
void sum_piece(const EmbeddingPiece& p, const T* grad_output, const int64_t* order, const Index* indices, Sum<T>* out,
               int64_t features) {
  int64_t column[kPieceEntries];
  for (int64_t e = 0; e < p.entries; ++e) column[e] = column_of(indices[p.entry + e], p.row * features, features);
  for (int64_t begin = p.first; begin < p.first + p.tokens; begin += kTokenGroup) {
    const int64_t end = std::min(begin + kTokenGroup, p.first + p.tokens);
    Sum<T> group[kPieceEntries] = {};
    for (int64_t j = begin; j < end; ++j) {
      const T* row = grad_output + order[j] * features;
      for (int64_t e = 0; e < p.entries; ++e) group[e] += static_cast<Sum<T>>(row[column[e]]);
    }
    for (int64_t e = 0; e < p.entries; ++e) out[p.entry + e] += group[e];
  }
}

}  // namespace sprand::cpu
