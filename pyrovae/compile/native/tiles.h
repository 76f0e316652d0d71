#pragma once
// Tiles of a product of two matrices with any strides; products.cpp shares them among threads.
//
// A tile reads a panel of the right factor, a few vectors of columns. If rows of the right factor are contiguous, the panel is read
// where it is; else each thread copies the panels that it needs. Rounded factors are both copied; the instruction that multiplies
// bfloat16 numbers takes subnormal ones for zero.

#pragma once
#include "vectors.h"

namespace pyrovae {

#if defined(__clang__)  // which has no __builtin_shuffle
constexpr bool SHUFFLES = false;
template <class Factors>
static inline bool transposed(const float*, int64_t, float*, int64_t) {
  return false;
}
template <int STEP>
static inline void add_lanes(Floats (&)[LANES]) {}
#else
constexpr bool SHUFFLES = true;

// Exchanges every second run of STEP lanes of the first vector with the other runs of the second.
template <int STEP>
static inline void exchange_lanes(Floats& one, Floats& other) {
  Ints low, high;
  for (int lane = 0; lane < LANES; lane++) {
    low[lane] = lane & STEP ? LANES + lane - STEP : lane;
    high[lane] = lane & STEP ? LANES + lane : lane + STEP;
  }
  Floats first = __builtin_shuffle(one, other, low);
  other = __builtin_shuffle(one, other, high);
  one = first;
}

template <int STEP>
static inline void exchange(Floats (&x)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & STEP)) exchange_lanes<STEP>(x[i], x[i + STEP]);
  if constexpr (2 * STEP < LANES) exchange<2 * STEP>(x);
}

// Lane i of the first vector becomes the sum of all lanes of vector i.
template <int STEP>
static inline void add_lanes(Floats (&x)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2 * STEP) {
    exchange_lanes<STEP>(x[i], x[i + STEP]);
    x[i] += x[i + STEP];
  }
  if constexpr (2 * STEP < LANES) add_lanes<2 * STEP>(x);
}

// Writes the transpose of a block of LANES rows and LANES columns of words.
template <class Factors>
static inline bool transposed(const float* from, int64_t along, float* to, int64_t width) {
  Floats x[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = Factors::words_of_one_row(from + i * along);
  exchange<1>(x);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(to + i * width, x[i]);
  return true;
}
#endif

struct Matrix {
  const float* numbers;
  int64_t rows, columns, along_rows, along_columns;
};

// Where a product is written: row i at row i of `numbers`, or at row places[i].
struct Product {
  float* numbers;
  int64_t columns;
  const int64_t* places;

  float* row(int64_t row) const { return numbers + (places ? places[row] : row) * columns; }
  Product from(int64_t row) const {
    if (places) return {numbers, columns, places + row};
    return {numbers + row * columns, columns, nullptr};
  }
};

// The first `number` of a vector's numbers, and zeros.
static inline Floats load_first(const float* from, int64_t number) {
  if (number >= LANES) return load(from);
  Floats value = {};
  if (number > 0) std::memcpy(&value, from, number * sizeof(float));
  return value;
}

// Copies a panel of `width` columns; those beyond the matrix become zeros.
template <class Factors>
static void copy_panel(const Matrix& from, int64_t first, int64_t width, float* to) {
  constexpr int64_t EACH = Factors::EACH;
  int64_t here = std::min(width, from.columns - first), deep = from.rows;
  const float* numbers = from.numbers + first * from.along_columns;
  if (from.along_columns == 1) {
    for (int64_t k = 0; k < deep; k += EACH, to += width)
      for (int64_t column = 0; column < width; column += LANES) {
        const float* at = numbers + k * from.along_rows + column;
        Floats next = EACH == 2 && k + 1 < deep ? load_first(at + from.along_rows, here - column) : Floats{};
        store(to + column, Factors::words_of_two_rows(load_first(at, here - column), next));
      }
    return;
  }
  for (int64_t column = 0; column < width; column += LANES) {
    int64_t k = 0;
    if (column + LANES <= here && from.along_rows == 1)
      while (k + LANES * EACH <= deep && transposed<Factors>(numbers + column * from.along_columns + k, from.along_columns,
                                                             to + k / EACH * width + column, width))
        k += LANES * EACH;
    for (; k < deep; k++)
      for (int64_t c = column; c < column + LANES; c++) {
        float* word = to + k / EACH * width + c;
        if (k % EACH == 0) *word = 0.0f;
        if (c < here) Factors::store_number(word, k % EACH, numbers[c * from.along_columns + k * from.along_rows]);
      }
  }
}

// Columns of the right factor as tiles read them; `along` is the distance from row to row. The first `skip` columns belong to the
// previous panel too.
struct Panel {
  const float* numbers;
  int64_t along, column, skip;
};

// A mask of the lanes from `first` on.
static inline Ints lanes_from(int64_t first) {
  Ints lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  return lanes >= static_cast<int32_t>(first);
}

// A sum of many squares: in float32 over 32 tiles, and in double over those.
struct Squares {
  Floats few = {};
  int tiles = 0;
  double total = 0.0;

  void add(Floats of_tile) {
    few += of_tile;
    if (++tiles == 32) add_up();
  }

  double add_up() {
    for (int lane = 0; lane < LANES; lane++) total += few[lane];
    few = Floats{};
    tiles = 0;
    return total;
  }
};

template <class Factors, int R, int V>
static inline void product_tile(const Matrix& left, int64_t row, const Panel& panel, const Product& out, Squares* squares) {
  Floats sum[R][V] = {};
  int64_t columns = out.columns;
  const float* from = left.numbers + row * left.along_rows;
  add_products<Factors>(sum, from, left.along_rows, left.along_columns, left.columns, panel.numbers, panel.along);
  if (squares) {
    Floats total = {};
    // Without the columns of the previous panel and those beyond the matrix, which an infinite row makes NaN.
    Ints own = lanes_from(panel.skip), last = ~lanes_from(std::min<int64_t>(LANES, columns - panel.column - (V - 1) * LANES));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) {
        Floats counted = v < V - 1 ? sum[r][v] : (Floats)((Ints)sum[r][v] & own & last);
        total += counted * counted;
      }
    squares->add(total);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    float* to = out.row(row + r);
    if (V == 1 && panel.skip) {
      const float* numbers = reinterpret_cast<const float*>(&sum[r][0]);
      std::memcpy(to + panel.column + panel.skip, numbers + panel.skip, (LANES - panel.skip) * sizeof(float));
      continue;
    }
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      int64_t end = panel.column + (v + 1) * LANES;
      Exact::store_row(to, end - LANES, sum[r][v], v < V - 1 ? end : columns);
    }
  }
}

template <class Factors, int V>
static void product_rows(const Matrix& left, int64_t row, int64_t end, const Panel& panel, const Product& out, Squares* squares) {
  for (; row + ROWS <= end; row += ROWS) product_tile<Factors, ROWS, V>(left, row, panel, out, squares);
  for (; row + ROWS / 2 <= end; row += ROWS / 2) product_tile<Factors, ROWS / 2, V>(left, row, panel, out, squares);
  for (; row < end; row++) product_tile<Factors, 1, V>(left, row, panel, out, squares);
}

// The part of a product that one thread computes: a range of rows and of vectors of columns, cut into pieces of one panel and one
// block of rows. A thread takes the pieces of its own part, then what is left of the others', which another program may delay.
struct Part {
  static constexpr int64_t BLOCK = 128;

  int64_t row, end, vector, last;
  int64_t wide, panels, blocks;  // the first `wide` panels have VECTORS vectors, the others one
  bool in_place;

  Part(const Matrix& right, int64_t row, int64_t end, int64_t vector, int64_t last)
      : row(row), end(end), vector(vector), last(last) {
    wide = (std::min(last, right.columns / LANES) - vector) / VECTORS;
    panels = wide + last - vector - wide * VECTORS;
    blocks = (end - row + BLOCK - 1) / BLOCK;
    // Many rows on a deep panel repay a copy: in place, its rows may share cache sets and evict each other.
    in_place = right.along_columns == 1 && right.columns >= LANES && (right.rows <= 256 || end - row <= 128);
  }

  int64_t pieces() const { return panels * blocks; }
};

// The next piece of a part to take, on a cache line of its own.
class alignas(64) NextPiece {
  std::atomic<int64_t> pieces{0};

 public:
  int64_t next() { return pieces.fetch_add(1, std::memory_order_relaxed); }
};

// Computes a piece; returns the sum of its squares if `squared`. `copied` says that this thread has just copied the panel.
static double product_piece(const Matrix& left, const Matrix& right, const Product& out, const Part& part, int64_t piece, bool copied,
                            bool squared) {
  Squares squares, *sum = squared ? &squares : nullptr;
  int64_t columns = right.columns, deep = right.rows, which = piece / part.blocks, row = part.row + piece % part.blocks * Part::BLOCK;
  int64_t end = std::min(part.end, row + Part::BLOCK), wide = which < part.wide ? VECTORS : 1;
  int64_t column = (part.vector + which + (VECTORS - 1) * std::min(which, part.wide)) * LANES;
  thread_local std::vector<float> kept;  // the buffer is kept from step to step
  if (!part.in_place && kept.size() < static_cast<size_t>(PANEL * deep + LANES)) kept.resize(PANEL * deep + LANES);
  float* room = kept.data();
  while (reinterpret_cast<uintptr_t>(room) % (4 * LANES)) room++;
  Panel panel{room, wide * LANES, column, 0};
  if (part.in_place) {  // the last panel starts farther left, so that it is whole
    panel.skip = std::max<int64_t>(0, column + LANES - columns);
    panel.column -= panel.skip;
    panel.numbers = right.numbers + panel.column;
    panel.along = right.along_rows;
  } else if (!copied) {
    copy_panel<Exact>(right, column, wide * LANES, room);
  }
  if (wide == VECTORS)
    product_rows<Exact, VECTORS>(left, row, end, panel, out, sum);
  else
    product_rows<Exact, 1>(left, row, end, panel, out, sum);
  return squares.add_up();
}

// A part with rounded factors, which are both copied: as many panels as stay in the cache, and then PANEL rows at a time.
static double rounded_part(const Matrix& left, const Matrix& right, const Product& out, const Part& part, bool squared) {
  constexpr int64_t NEAR = 1 << 17;  // words of panels that stay in the cache
  Squares squares, *sum = squared ? &squares : nullptr;
  int64_t deep = words<Rounded>(right.rows), along = LANES * deep;
  int64_t most = std::max<int64_t>(VECTORS, NEAR / std::max<int64_t>(1, along) / VECTORS * VECTORS);
  Matrix flipped{left.numbers, left.columns, left.rows, left.along_columns, left.along_rows};
  thread_local std::vector<float> kept;  // the buffer is kept from step to step
  size_t size = along * (std::min(most, part.last - part.vector) + VECTORS) + LANES;
  if (kept.size() < size) kept.resize(size);
  float* room = kept.data();
  while (reinterpret_cast<uintptr_t>(room) % (4 * LANES)) room++;
  float* panels = room + VECTORS * along;
  auto width = [](int64_t from, int64_t to) { return from + VECTORS <= to ? VECTORS : 1; };
  for (int64_t vector = part.vector; vector < part.last; vector += most) {
    int64_t to = std::min(part.last, vector + most);
    for (int64_t v = vector; v < to; v += width(v, to))
      copy_panel<Rounded>(right, v * LANES, width(v, to) * LANES, panels + (v - vector) * along);
    for (int64_t top = part.row; top < part.end; top += PANEL) {
      copy_panel<Rounded>(flipped, top, PANEL, room);
      Matrix rows{room, std::min<int64_t>(PANEL, part.end - top), deep, 1, PANEL};
      for (int64_t v = vector; v < to; v += width(v, to)) {
        Panel panel{panels + (v - vector) * along, width(v, to) * LANES, v * LANES, 0};
        if (width(v, to) == VECTORS)
          product_rows<Rounded, VECTORS>(rows, 0, rows.rows, panel, out.from(top), sum);
        else
          product_rows<Rounded, 1>(rows, 0, rows.rows, panel, out.from(top), sum);
      }
    }
  }
  return squares.add_up();
}

}  // namespace pyrovae
