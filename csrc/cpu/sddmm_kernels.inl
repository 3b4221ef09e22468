// The inner SDDMM kernels of one instruction set: packing and dot products, written over a vector type V.
//
// Included by sddmm_kernels.cpp once per instruction set, inside an anonymous namespace, after V (float lanes) is
// defined. Only the transpose of a 4-column tile and the reduction of four vectors differ between them.

// f(0), ..., f(N - 1) with constants: arrays of vectors indexed by them stay in registers.
template <int64_t N, class F>
[[gnu::always_inline]] inline void each(F&& f) {
  [&]<int64_t... I>(std::integer_sequence<int64_t, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int64_t, I>()), ...);
  }(std::make_integer_sequence<int64_t, N>());
}

// Adds the lanes of a[r][0..3] to out[r * stride + 0..3]; two rows at once where the vector type can.
template <class Vector, int64_t Rows>
[[gnu::always_inline]] inline void add_rows(const Vector (&a)[Rows][4], typename Vector::Sum* out, int64_t stride) {
  if constexpr (Rows % 2 == 0 && requires { &Vector::add8; }) {
    each<Rows / 2>([&](auto i) __attribute__((always_inline)) {
      constexpr int64_t r = 2 * i;
      Vector::add8(a[r], a[r + 1], out + r * stride, out + (r + 1) * stride);
    });
  } else {
    each<Rows>([&](auto r)
                   __attribute__((always_inline)) { Vector::add4(a[r][0], a[r][1], a[r][2], a[r][3], out + r * stride); });
  }
}

// Four columns share each load of a row and `Rows` rows each load of a column, in tiles of Vector::kTileRows rows that fit the
// registers; the sums of four columns are reduced together. A remainder takes its last column again. An entry is summed in the
// same order whatever the tile.
template <class Vector, class Index, int64_t Rows>
void dots(const void* rows_, const void* panel_, const Index* indices, int64_t n, int64_t origin, int64_t vectors, void* out_,
          int64_t stride) {
  constexpr int64_t tile = Rows < Vector::kTileRows ? Rows : Vector::kTileRows;
  using Element = typename Vector::Element;
  using Sum = typename Vector::Sum;
  constexpr int64_t column = kPanelBytes / sizeof(Element), full = column / Vector::kLanes;
  const Element* rows = static_cast<const Element*>(rows_);
  const Element* panel = static_cast<const Element*>(panel_);
  Sum* out = static_cast<Sum*>(out_);
  for (int64_t p = 0; p < n; p += 4) {
    const Element* c[4];
    for (int64_t i = 0; i < 4; ++i) c[i] = panel + (indices[p + i < n ? p + i : n - 1] - origin) * column;
    for (int64_t first = 0; first < Rows; first += tile) {
      const Element* row = rows + first * column;
      Vector a[tile][4];
      each<4 * tile>([&](auto i) __attribute__((always_inline)) { a[i / 4][i % 4] = Vector{}; });
      auto step = [&](int64_t v) __attribute__((always_inline)) {
        each<4>([&](auto i) __attribute__((always_inline)) {
          const auto& x = Vector::load(c[i] + v * Vector::kLanes);
          each<tile>([&](auto r)
                         __attribute__((always_inline)) { a[r][i].fma(Vector::load(row + r * column + v * Vector::kLanes), x); });
        });
      };
      if (vectors == full) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < full; ++v) step(v);
      } else {
        for (int64_t v = 0; v < vectors; ++v) step(v);
      }
      Sum* sums = out + first * stride + p;
      if (p + 4 <= n) {
        add_rows<Vector, tile>(a, sums, stride);
      } else {
        Sum last[tile * 4] = {};
        add_rows<Vector, tile>(a, last, 4);
        for (int64_t r = 0; r < tile; ++r)
          for (int64_t i = 0; i < n - p; ++i) sums[r * stride + i] += last[r * 4 + i];
      }
    }
  }
}

template <class Vector, class Index>
void dots_of_rows(int64_t count, const void* rows, const void* panel, const Index* indices, int64_t n, int64_t origin,
                  int64_t vectors, void* out, int64_t stride) {
  if (count == 1)
    dots<Vector, Index, 1>(rows, panel, indices, n, origin, vectors, out, stride);
  else if (count == 2)
    dots<Vector, Index, 2>(rows, panel, indices, n, origin, vectors, out, stride);
  else
    dots<Vector, Index, 4>(rows, panel, indices, n, origin, vectors, out, stride);
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
  return {kPanelBytes / (int64_t)sizeof(typename Vector::Element), Vector::kLanes, pack<Vector, Source>,
          dots_of_rows<Vector, int32_t>, dots_of_rows<Vector, int64_t>};
}
