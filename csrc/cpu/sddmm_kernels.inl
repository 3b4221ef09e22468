// The inner SDDMM kernels of one instruction set: packing and dot products, written over a vector type V.
//
// Included by sddmm_kernels.cpp once per instruction set, inside an anonymous namespace, after V (float lanes) is
// defined. Only the transpose of a 4-column tile and the reduction of four vectors differ between them.

// Four samples share each load of the row; their sums are reduced together. A remainder takes its last column again.
template <class Vector, class Index>
void dots(const void* row_, const void* panel_, const Index* indices, int64_t n, int64_t origin, int64_t vectors, void* out_) {
  using Element = typename Vector::Element;
  using Sum = typename Vector::Sum;
  constexpr int64_t column = kPanelBytes / sizeof(Element), full = column / Vector::kLanes;
  const Element* row = static_cast<const Element*>(row_);
  const Element* panel = static_cast<const Element*>(panel_);
  Sum* out = static_cast<Sum*>(out_);
  for (int64_t p = 0; p < n; p += 4) {
    const Element* c[4];
    for (int64_t i = 0; i < 4; ++i) c[i] = panel + (indices[p + i < n ? p + i : n - 1] - origin) * column;
    Vector a0{}, a1{}, a2{}, a3{};
    auto step = [&](int64_t v) __attribute__((always_inline)) {
      const auto& r = Vector::load(row + v * Vector::kLanes);
      a0.fma(r, c[0] + v * Vector::kLanes);
      a1.fma(r, c[1] + v * Vector::kLanes);
      a2.fma(r, c[2] + v * Vector::kLanes);
      a3.fma(r, c[3] + v * Vector::kLanes);
    };
    if (vectors == full) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < full; ++v) step(v);
    } else {
      for (int64_t v = 0; v < vectors; ++v) step(v);
    }
    if (p + 4 <= n) {
      Vector::add4(a0, a1, a2, a3, out + p);
    } else {
      Sum sums[4] = {};
      Vector::add4(a0, a1, a2, a3, sums);
      for (int64_t i = p; i < n; ++i) out[i] += sums[i - p];
    }
  }
}

// Any source to any panel, element by element: the edges of pack, and the panels without a transpose of their own.
template <class Source, class Element>
void pack_plain(const Source* src, int64_t stride, int64_t tokens, int64_t padded, int64_t cols, Element* panel) {
  constexpr int64_t column = kPanelBytes / sizeof(Element);
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t t = 0; t < tokens; ++t) panel[c * column + t] = Convert<Element>::from(src[t * stride + c]);
    for (int64_t t = tokens; t < padded; ++t) panel[c * column + t] = Element{};
  }
}

// Tiles of kTileTokens x kTileCols through Vector::transpose, the edges plainly, tokens padded with zeros.
template <class Vector, class Source>
void pack(const void* src_, int64_t stride, int64_t tokens, int64_t cols, void* panel_) {
  using Element = typename Vector::Element;
  constexpr int64_t column = kPanelBytes / sizeof(Element);
  const Source* src = static_cast<const Source*>(src_);
  Element* panel = static_cast<Element*>(panel_);
  const int64_t padded = (tokens + Vector::kLanes - 1) / Vector::kLanes * Vector::kLanes;
  const int64_t whole_tokens = tokens / Vector::kTileTokens * Vector::kTileTokens,
                whole_cols = cols / Vector::kTileCols * Vector::kTileCols;
  for (int64_t t = 0; t < whole_tokens; t += Vector::kTileTokens)
    for (int64_t c = 0; c < whole_cols; c += Vector::kTileCols)
      Vector::transpose(src + t * stride + c, stride, panel + c * column + t, column);
  if (whole_tokens < padded)
    pack_plain(src + whole_tokens * stride, stride, tokens - whole_tokens, padded - whole_tokens, whole_cols,
               panel + whole_tokens);
  pack_plain(src + whole_cols, stride, tokens, padded, cols - whole_cols, panel + whole_cols * column);
}

template <class Vector, class Source>
SddmmKernels kernels_of() {
  return {kPanelBytes / (int64_t)sizeof(typename Vector::Element), Vector::kLanes, pack<Vector, Source>, dots<Vector, int32_t>,
          dots<Vector, int64_t>};
}
