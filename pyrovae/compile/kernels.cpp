// A decoder's linear layers and the Bernoulli log-likelihood of their logits in one pass over blocks of rows; normal numbers; and
// products of matrices. See kernels.py.
//
// A tile of eight rows and three vectors of columns is summed over a layer's depth in registers and finished there: a hidden
// layer's by its activation, the logits' by adding their log-likelihood to running sums of the row. So logits, of which there are
// more than of anything else, are written nowhere, and hidden values no farther than the second-level cache. The weights are first
// copied to panels of as many columns as a tile has, which stay in the first-level cache while a block of rows passes by.
//
// The factors of the products may be rounded to bfloat16, all else staying in float32; where the processor multiplies those, they
// lie in pairs along the depth, as it adds two products at a time.
//
// Vectors are GCC's and Clang's own, so the same text serves any processor that either of them compiles for.

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // 24 sums, 3 columns and 1 row in 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // 12 sums, 3 columns and 1 row in 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 8;
#else
constexpr int LANES = 4, ROWS = 4;
#endif

// Compiled graphs look for some of these functions among all of the process: no name may be another library's.
namespace pyrovae {

constexpr int VECTORS = 3, PANEL = LANES * VECTORS;
constexpr int BLOCK = 120;        // rows that pass all layers together: their hidden values stay in the second-level cache
constexpr int MOST_FACTORS = 64;  // of 1 to 2, as many as a float32 multiplies without overflow, and adds terms without drift

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
static inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
static inline Floats all(float value) { return value - Floats{}; }
static inline Floats least(Floats a, Floats b) { return a < b ? a : b; }  // b where either is NaN
static inline Floats most(Floats a, Floats b) { return a > b ? a : b; }

// Numbers on a vector's boundary: a load across two lines of the cache takes twice as long.
class Room {
  std::vector<float> numbers;

 public:
  explicit Room(int64_t size) : numbers(size + LANES) {}
  float* begin() {
    float* place = numbers.data();
    while (reinterpret_cast<uintptr_t>(place) % (4 * LANES)) place++;
    return place;
  }
};

// The upper half of a float32, to the nearest and to even, as bfloat16 has it; NaN stays one.
static inline Ints upper_half(Floats value) {
  Ints bits = (Ints)value, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (value == value ? near : 0x7fc0 + Ints{}) & 0xffff;
}

// How the factors of products lie in memory, in words of four bytes: one number to a word,
template <bool rounded>
struct Numbers {
  static constexpr int EACH = 1;

  static inline Floats everywhere(const float* word) { return all(*word); }
  static inline Floats product(Floats left, Floats right, Floats sum) { return sum + left * right; }

  static inline void put(float* row, int64_t column, Floats value, int64_t columns) {
    if (rounded) value = (Floats)(upper_half(value) << 16);
    if (column + LANES <= columns)
      store(row + column, value);
    else
      std::memcpy(row + column, &value, (columns - column) * sizeof(float));
  }

  static inline void put_deep(float* word, int64_t, float value) {
    *word = rounded ? ((Floats)(upper_half(all(value)) << 16))[0] : value;
  }

  // Words of numbers one beneath the other (here each its own), and of numbers one after the other.
  static inline Floats beneath(Floats value, Floats) { return rounded ? (Floats)(upper_half(value) << 16) : value; }
  static inline Floats after(const float* from) { return beneath(load(from), Floats{}); }
};

// or, rounded, two that follow each other.
struct Pairs {
  static constexpr int EACH = 2;

  static inline Floats everywhere(const float* word) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return (Floats)(bits + Ints{});  // not as a number, which a pair is not
  }

#if defined(__AVX512BF16__)
  static inline Floats product(Floats left, Floats right, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
#endif

  static inline void put(float* row, int64_t column, Floats value, int64_t columns) {
    Halves halves = __builtin_convertvector(upper_half(value), Halves);
    char* to = reinterpret_cast<char*>(row) + column * sizeof(uint16_t);
    if (column + LANES <= columns) {
      std::memcpy(to, &halves, sizeof halves);
    } else {
      // With what lies beyond the last of an odd number, whose weights are zero: no infinity of another row may stay there.
      std::memcpy(to, &halves, (columns - column + 1) / 2 * sizeof(float));
    }
  }

  static inline void put_deep(float* word, int64_t place, float value) {
    uint16_t half = upper_half(all(value))[0];
    std::memcpy(reinterpret_cast<char*>(word) + place * sizeof half, &half, sizeof half);
  }

  static inline Floats beneath(Floats first, Floats second) { return (Floats)(upper_half(first) | upper_half(second) << 16); }

  static inline Floats after(const float* from) {
    Halves halves[2] = {__builtin_convertvector(upper_half(load(from)), Halves),
                        __builtin_convertvector(upper_half(load(from + LANES)), Halves)};
    Floats words;
    std::memcpy(&words, halves, sizeof words);
    return words;
  }
};

#if defined(__AVX512BF16__)
typedef Pairs Rounded;
#else
typedef Numbers<true> Rounded;
#endif
typedef Numbers<false> Exact;

// To the sums of a tile, the products of its rows and the panel's columns over the whole depth.
template <class Factors, int R, int V>
static inline void add_products(Floats (&sum)[R][V], const float* left, int64_t along_rows, int64_t along_depth, int64_t deep,
                                const float* panel, int64_t along_panel = V * LANES) {
  for (int64_t k = 0; k < deep; k++) {
    Floats right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) right[v] = load(panel + k * along_panel + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats one = Factors::everywhere(left + r * along_rows + k * along_depth);
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sum[r][v] = Factors::product(one, right[v], sum[r][v]);
    }
  }
}

template <class Factors>
static inline int64_t words(int64_t numbers) {
  return (numbers + Factors::EACH - 1) / Factors::EACH;
}

struct Relu {
  static inline void apply(Floats (&x)[VECTORS]) {
#pragma GCC unroll 3
    for (Floats& value : x) value = most(Floats{}, value);
  }
};

// x P(x^2) / Q(x^2), within 4e-7 of tanh x (experiments/minimax.py); one division for three, as it takes longest.
struct Tanh {
  static inline void parts(Floats x, Floats& above, Floats& below) {
    x = least(all(8.0f), most(all(-8.0f), x));
    Floats s = x * x;
    above = s * 1.523061009625666e-08f + 2.1894799482147274e-05f;
    above = above * s + 0.003571606367429252f;
    above = above * s + 0.1344450501004544f;
    above = (above * s + 0.9999999935788794f) * x;
    below = s * 8.522524893850866e-07f + 0.00034113056644328934f;
    below = below * s + 0.026164474688748766f;
    below = below * s + 0.46777832332818475f;
    below = below * s + 1.0f;
  }

  static inline void apply(Floats (&x)[VECTORS]) {
    Floats above[VECTORS], below[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) parts(x[v], above[v], below[v]);
    Floats first_two = below[0] * below[1], each = 1.0f / (first_two * below[2]), first = each * below[2];
    x[0] = above[0] * (below[1] * first);
    x[1] = above[1] * (below[0] * first);
    x[2] = above[2] * (first_two * each);
  }
};

// e^-a for a >= 0, log(1 + e^-a) within 1e-7: a power of two by the exponent's bits, times a polynomial for the rest of the power
// (experiments/minimax.py).
static inline Floats exp_of_minus(Floats a) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, in its last bits
  a = least(all(87.0f), a);
  Floats shifted = a * -1.4426950408889634f + SHIFT;
  Floats left = a * -1.4426950408889634f - (shifted - SHIFT);
  Floats value = left * 0.001327647151901107f + 0.00967554133067915f;
  value = value * left + 0.05550713274962918f;
  value = value * left + 0.240221197239339f;
  value = value * left + 0.6931469670638646f;
  value = value * left + 1.0000000716546562f;
  return (Floats)((Ints)value + ((Ints)shifted << 23));
}

// What becomes of a hidden layer's tile: `row` is counted within the block.
template <class Activation, class Factors>
struct Hidden {
  float* out;
  int64_t columns;

  template <int R, int V>
  inline void take(Floats (&sum)[R][V], int64_t row, int64_t column) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats value[VECTORS] = {};
      for (int v = 0; v < V; v++) value[v] = sum[r][v];
      Activation::apply(value);
      float* to = out + (row + r) * words<Factors>(columns);
      for (int v = 0; v < V; v++) {
        int64_t end = column + (v + 1) * LANES;
        Factors::put(to, end - LANES, value[v], v < V - 1 ? end : columns);
      }
    }
  }

  void end_of_panel(int64_t, bool) {}
};

struct Bernoulli {
  int64_t columns;
  const float* data[BLOCK];
  double totals[BLOCK];
  alignas(64) float product[BLOCK * LANES];  // of 1 + e^-|l|
  alignas(64) float plain[BLOCK * LANES];    // the sum of x l - max(l, 0)
  int factors = 0;

  Bernoulli(const float* x, int64_t num_data, int64_t columns, int64_t top, int64_t rows) : columns(columns) {
    for (int64_t row = 0; row < rows; row++) {
      data[row] = x + (top + row) % num_data * columns;
      totals[row] = 0.0;
    }
    std::fill(product, product + rows * LANES, 1.0f);
    std::fill(plain, plain + rows * LANES, 0.0f);
  }

  template <int R, int V>
  inline void take(Floats (&sum)[R][V], int64_t row, int64_t column) {
    if (column + V * LANES <= columns)
      add<R, V, true>(sum, row, column);
    else
      add<R, V, false>(sum, row, column);
  }

  template <int R, int V, bool whole>
  inline void add(Floats (&sum)[R][V], int64_t row, int64_t column) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats factor = load(product + (row + r) * LANES), term = load(plain + (row + r) * LANES);
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) {
        Floats datum = {}, logit = sum[r][v];
        const float* from = data[row + r] + column + v * LANES;
        if (whole || v < V - 1)
          datum = load(from);
        else
          std::memcpy(&datum, from, (columns - column - v * LANES) * sizeof(float));
        term += datum * logit - most(logit, Floats{});
        factor += factor * exp_of_minus((Floats)((Ints)logit & 0x7fffffff));
      }
      store(product + (row + r) * LANES, factor);
      store(plain + (row + r) * LANES, term);
    }
  }

  // A product's logarithm is that of its lanes' exponents, added, and of their mantissas, multiplied: one logarithm for a row.
  void end_of_panel(int64_t rows, bool last) {
    factors += VECTORS;
    if (factors + VECTORS <= MOST_FACTORS && !last) return;
    factors = 0;
    for (int64_t row = 0; row < rows; row++) {
      Ints bits = (Ints)load(product + row * LANES), exponent = (bits >> 23) - 127;
      Floats mantissa = (Floats)((bits & 0x7fffff) | 0x3f800000);
      int exponents = 0;
      double even = 1.0, odd = 1.0, terms = 0.0;
      for (int lane = 0; lane < LANES; lane += 2) {
        exponents += exponent[lane] + exponent[lane + 1];
        even *= mantissa[lane];
        odd *= mantissa[lane + 1];
        terms += plain[row * LANES + lane] + plain[row * LANES + lane + 1];
      }
      totals[row] += terms - exponents * 0.6931471805599453 - std::log(even * odd);
      store(product + row * LANES, all(1.0f));
      store(plain + row * LANES, Floats{});
    }
  }

  void write(float* out, int64_t rows) const {
    for (int64_t row = 0; row < rows; row++) out[row] = static_cast<float>(totals[row]);
  }
};

// A layer as Python hands it over; its weights are (depth, columns), of any strides.
struct Layer {
  const float* weights;
  const float* bias;
  int64_t depth, columns, along_depth, along_columns, activation;
};

// The same by panels, with columns added up to a whole vector: of a hidden layer the last one again, which is as finite as that
// is, and of logits what has a log-likelihood of 0 at x = 0.
template <class Factors>
class Panels {
  Room room;

  // Columns of the panel that begins here: few sizes of tiles, so that this text compiles in seconds.
  int64_t width_at(int64_t first) const { return padded - first >= PANEL ? PANEL : LANES; }

  template <int R, int V, class Finish>
  static inline void tile(const float* left, int64_t deep, const float* panel, const float* bias, Finish& finish, int64_t row,
                          int64_t column) {
    Floats sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sum[r][v] = load(bias + v * LANES);
    add_products<Factors>(sum, left, deep, 1, deep, panel);
    finish.template take<R, V>(sum, row, column);
  }

  template <int V, class Finish>
  void pass(const float* left, int64_t rows, int64_t first, Finish& finish) {
    const float *panel = panels + first * deep, *bias = biases + first;
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) tile<ROWS, V>(left + row * deep, deep, panel, bias, finish, row, first);
    for (; row < rows; row++) tile<1, V>(left + row * deep, deep, panel, bias, finish, row, first);
  }

 public:
  Layer layer;
  int64_t padded, deep;  // columns and words of depth
  float *panels, *biases;

  Panels(const Layer& layer, bool hidden)
      : room((layer.columns + LANES) * (layer.depth + 1)),
        layer(layer),
        padded((layer.columns + LANES - 1) / LANES * LANES),
        deep(words<Factors>(layer.depth)) {
    panels = room.begin();
    biases = panels + padded * deep;
    int64_t last = layer.columns - 1;
    for (int64_t column = 0; column < padded; column++)
      biases[column] = column <= last || hidden ? layer.bias[std::min(column, last)] : -1e4f;
    for (int64_t first = 0, width; first < padded; first += width) {
      width = width_at(first);
      float* panel = panels + first * deep;
      for (int64_t c = 0; c < width && (first + c <= last || hidden); c++) {
        const float* from = layer.weights + std::min(first + c, last) * layer.along_columns;
        for (int64_t k = 0; k < layer.depth; k++)
          Factors::put_deep(panel + k / Factors::EACH * width + c, k % Factors::EACH, from[k * layer.along_depth]);
      }
    }
  }

  template <class Finish>
  void run(const float* left, int64_t rows, Finish& finish) {
    for (int64_t first = 0, width; first < padded; first += width) {
      width = width_at(first);
      if (width == PANEL)
        pass<VECTORS>(left, rows, first, finish);
      else
        pass<1>(left, rows, first, finish);
      finish.end_of_panel(rows, first + width >= padded);
    }
  }
};

template <class Factors>
static void decoder(const float* left, int64_t rows, const Layer* layers, int64_t num_layers, const float* x, int64_t num_data,
                    float* out, int64_t threads) {
  constexpr bool AS_GIVEN = std::is_same<Factors, Exact>::value;
  std::vector<Panels<Factors>> panels;
  panels.reserve(num_layers);
  int64_t depth = layers[0].depth, widest = AS_GIVEN ? 0 : words<Factors>(depth);
  for (int64_t i = 0; i < num_layers; i++) {
    panels.emplace_back(layers[i], i + 1 < num_layers);
    if (i + 1 < num_layers) widest = std::max(widest, words<Factors>(layers[i].columns));
  }
  int64_t share = (rows + threads * ROWS - 1) / (threads * ROWS) * ROWS;  // few rows are spread over all threads
  int64_t block = std::min<int64_t>(BLOCK, share), blocks = (rows + block - 1) / block;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room one(block * widest), other(block * widest);
#pragma omp for
    for (int64_t b = 0; b < blocks; b++) {
      int64_t top = b * block, here = std::min(block, rows - top);
      const float* now = left + top * depth;
      float *next = one.begin(), *free = other.begin();
      if (!AS_GIVEN) {
        for (int64_t row = 0; row < here; row++)
          for (int64_t column = 0; column < depth; column += LANES) {
            Floats value = {};
            std::memcpy(&value, now + row * depth + column, std::min<int64_t>(LANES, depth - column) * sizeof(float));
            Factors::put(next + row * words<Factors>(depth), column, value, depth);
          }
        now = next;
        std::swap(next, free);
      }
      for (int64_t i = 0; i + 1 < num_layers; i++) {
        if (layers[i].activation == 0) {
          Hidden<Tanh, Factors> finish{next, layers[i].columns};
          panels[i].run(now, here, finish);
        } else {
          Hidden<Relu, Factors> finish{next, layers[i].columns};
          panels[i].run(now, here, finish);
        }
        now = next;
        std::swap(next, free);
      }
      Bernoulli finish(x, num_data, layers[num_layers - 1].columns, top, here);
      panels[num_layers - 1].run(now, here, finish);
      finish.write(out + top, here);
    }
  }
}

// log p(x | z) of each row, in nats: hidden layers with their activations (0 tanh, 1 relu), the last one's sums are the logits;
// with `rounded`, of products whose factors are in bfloat16.
extern "C" void pyrovae_bernoulli_decoder(const float* left, int64_t rows, const Layer* layers, int64_t num_layers,
                                          const float* x, int64_t num_data, float* out, int64_t threads, bool rounded) {
  (rounded ? decoder<Rounded> : decoder<Exact>)(left, rows, layers, num_layers, x, num_data, out, threads);
}

// The product of two matrices of any strides, by tiles of some rows and a panel of the right factor's columns; MKL clears the
// product before it adds to it. Where rows of that factor lie together, panels are read from where they are; else each thread
// copies those that it needs. Few rows do not repay that: each number is then the sum of a product of two vectors along the depth.
// Rounded factors are copied both; a bfloat16 unit takes subnormal numbers for zero.

#if defined(__clang__)
constexpr bool SHUFFLES = false;
template <class Factors>
static inline bool transposed(const float*, int64_t, float*, int64_t) {
  return false;
}
template <int STEP>
static inline void add_lanes(Floats (&)[LANES]) {}
#else
constexpr bool SHUFFLES = true;

// Every second run of STEP lanes of the one for every other of the other.
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

// Into each lane of the first, the sum of a vector's lanes.
template <int STEP>
static inline void add_lanes(Floats (&x)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2 * STEP) {
    exchange_lanes<STEP>(x[i], x[i + STEP]);
    x[i] += x[i + STEP];
  }
  if constexpr (2 * STEP < LANES) add_lanes<2 * STEP>(x);
}

// A block of as many rows and columns of words as a vector has lanes.
template <class Factors>
static inline bool transposed(const float* from, int64_t along, float* to, int64_t width) {
  Floats x[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = Factors::after(from + i * along);
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

// Where a product is written: its rows one after the other, or each at a place of its own.
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

// As many of the numbers as there are, and zeros.
static inline Floats load_first(const float* from, int64_t number) {
  if (number >= LANES) return load(from);
  Floats value = {};
  if (number > 0) std::memcpy(&value, from, number * sizeof(float));
  return value;
}

// A panel of `width` columns, of which the last may lie beyond the matrix.
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
        store(to + column, Factors::beneath(load_first(at, here - column), next));
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
        if (c < here) Factors::put_deep(word, k % EACH, numbers[c * from.along_columns + k * from.along_rows]);
      }
  }
}

// Columns of the right factor as tiles read them, `along` from row to row; the first `skip` are another panel's too.
struct Panel {
  const float* numbers;
  int64_t along, column, skip;
};

// All bits of the lanes from here on.
static inline Ints lanes_from(int64_t first) {
  Ints lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  return lanes >= static_cast<int32_t>(first);
}

// The sum of many squares: of few tiles in float32, of those in double.
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
    // Neither what is another panel's too nor what lies beyond the matrix, which an infinite row makes NaN.
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
      Exact::put(to, end - LANES, sum[r][v], v < V - 1 ? end : columns);
    }
  }
}

template <class Factors, int V>
static void product_rows(const Matrix& left, int64_t row, int64_t end, const Panel& panel, const Product& out, Squares* squares) {
  for (; row + ROWS <= end; row += ROWS) product_tile<Factors, ROWS, V>(left, row, panel, out, squares);
  for (; row + ROWS / 2 <= end; row += ROWS / 2) product_tile<Factors, ROWS / 2, V>(left, row, panel, out, squares);
  for (; row < end; row++) product_tile<Factors, 1, V>(left, row, panel, out, squares);
}

// A thread's part of a product, some rows and vectors of columns, in pieces: a panel, and a block of rows that pass it while it is
// near. A thread takes those of its own part, and then what is left of others', as another program may hold one up.
struct Part {
  static constexpr int64_t BLOCK = 128;

  int64_t row, end, vector, last;
  int64_t wide, panels, blocks;  // `wide` panels are of as many columns as a tile has, the others of a vector
  bool in_place;

  Part(const Matrix& right, int64_t row, int64_t end, int64_t vector, int64_t last)
      : row(row), end(end), vector(vector), last(last) {
    wide = (std::min(last, right.columns / LANES) - vector) / VECTORS;
    panels = wide + last - vector - wide * VECTORS;
    blocks = (end - row + BLOCK - 1) / BLOCK;
    // A copy is read faster where many rows pass a deep panel, whose rows may lie so that they crowd each other out of the caches.
    in_place = right.along_columns == 1 && right.columns >= LANES && (right.rows <= 256 || end - row <= 128);
  }

  int64_t pieces() const { return panels * blocks; }
};

// Which pieces of a part are taken, on a line of the cache of its own.
class alignas(64) Taken {
  std::atomic<int64_t> pieces{0};

 public:
  int64_t next() { return pieces.fetch_add(1, std::memory_order_relaxed); }
};

// Returns the sum of the piece's squares, if asked. The panel is copied unless this thread has just done so.
static double product_piece(const Matrix& left, const Matrix& right, const Product& out, const Part& part, int64_t piece, bool copied,
                            bool squared) {
  Squares squares, *sum = squared ? &squares : nullptr;
  int64_t columns = right.columns, deep = right.rows, which = piece / part.blocks, row = part.row + piece % part.blocks * Part::BLOCK;
  int64_t end = std::min(part.end, row + Part::BLOCK), wide = which < part.wide ? VECTORS : 1;
  int64_t column = (part.vector + which + (VECTORS - 1) * std::min(which, part.wide)) * LANES;
  thread_local std::vector<float> kept;  // from one step to the next
  if (!part.in_place && kept.size() < static_cast<size_t>(PANEL * deep + LANES)) kept.resize(PANEL * deep + LANES);
  float* room = kept.data();
  while (reinterpret_cast<uintptr_t>(room) % (4 * LANES)) room++;
  Panel panel{room, wide * LANES, column, 0};
  if (part.in_place) {  // the last of all lies farther left, so that it is whole
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

// The same of rounded factors, which are copied both: panels as many as stay near, and then rows by as many as a vector has lanes.
static double rounded_part(const Matrix& left, const Matrix& right, const Product& out, const Part& part, bool squared) {
  constexpr int64_t NEAR = 1 << 17;  // words
  Squares squares, *sum = squared ? &squares : nullptr;
  int64_t deep = words<Rounded>(right.rows), along = LANES * deep;
  int64_t most = std::max<int64_t>(VECTORS, NEAR / std::max<int64_t>(1, along) / VECTORS * VECTORS);
  Matrix flipped{left.numbers, left.columns, left.rows, left.along_columns, left.along_rows};
  thread_local std::vector<float> kept;  // from one step to the next
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

constexpr int DOT_ROWS = 4, DOT_COLUMNS = LANES / DOT_ROWS;  // a vector of sums

static inline void add_dots(Floats (&sum)[LANES], const float* const (&left)[DOT_ROWS], const float* const (&right)[DOT_COLUMNS],
                            int64_t k, Ints kept) {
  Floats other[DOT_COLUMNS];
#pragma GCC unroll 4
  for (int c = 0; c < DOT_COLUMNS; c++) other[c] = (Floats)((Ints)load(right[c] + k) & kept);
#pragma GCC unroll 4
  for (int r = 0; r < DOT_ROWS; r++) {
    Floats one = (Floats)((Ints)load(left[r] + k) & kept);
#pragma GCC unroll 4
    for (int c = 0; c < DOT_COLUMNS; c++) sum[r * DOT_COLUMNS + c] += one * other[c];
  }
}

// Some rows and columns, of which the last may lie beyond the matrices.
static inline void dot_tile(const Matrix& left, const Matrix& right, const Product& out, int64_t row, int64_t column) {
  Floats sum[LANES] = {};
  const float *one[DOT_ROWS], *other[DOT_COLUMNS];
#pragma GCC unroll 4
  for (int r = 0; r < DOT_ROWS; r++) one[r] = left.numbers + std::min(row + r, left.rows - 1) * left.along_rows;
#pragma GCC unroll 4
  for (int c = 0; c < DOT_COLUMNS; c++) other[c] = right.numbers + std::min(column + c, right.columns - 1) * right.along_columns;
  int64_t deep = left.columns, k = 0;
  for (; k + LANES <= deep; k += LANES) add_dots(sum, one, other, k, ~Ints{});
  // The last whole vector again, without the lanes that are counted already.
  if (k < deep) add_dots(sum, one, other, deep - LANES, lanes_from(LANES + k - deep));
  add_lanes<1>(sum);
  Floats sums = sum[0];
  if (row + DOT_ROWS <= left.rows && column + DOT_COLUMNS <= right.columns) {
#pragma GCC unroll 4
    for (int r = 0; r < DOT_ROWS; r++)
      std::memcpy(out.row(row + r) + column, reinterpret_cast<const float*>(&sums) + r * DOT_COLUMNS, DOT_COLUMNS * sizeof(float));
  } else {
    for (int64_t r = 0; r < DOT_ROWS && row + r < left.rows; r++)
      for (int64_t c = 0; c < DOT_COLUMNS && column + c < right.columns; c++) out.row(row + r)[column + c] = sums[r * DOT_COLUMNS + c];
  }
}

static void whole_product(const Matrix* left, const Matrix* right, const Product& out, int64_t threads, float* squares,
                          bool rounded) {
  constexpr int64_t FEW = 48, DEEP = 96;        // fewer rows, of so deep a product, do not repay a copy of the other factor
  constexpr int64_t TOO_FEW_TO_SHARE = 400000;  // multiplications: waking another thread takes longer
  constexpr int64_t TALL = 5 * ROWS;            // rows that repay a part of their own
  constexpr int64_t MANY = 256;                 // and of many, a copy too
  int64_t rows = left->rows, deep = left->columns, columns = right->columns;
  if (rows * deep * columns < TOO_FEW_TO_SHARE) threads = 1;
  if (SHUFFLES && !squares && !rounded && left->along_columns == 1 && right->along_rows == 1 && rows <= FEW && deep >= DEEP) {
    int64_t tiles = (columns + DOT_COLUMNS - 1) / DOT_COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t row = 0; row < rows; row += DOT_ROWS) dot_tile(*left, *right, out, row, tile * DOT_COLUMNS);
    return;
  }
  // A part for each thread: of the rows where the other factor is read in place, else of its columns, so that none of it is copied
  // twice.
  int64_t strips = (rows + ROWS - 1) / ROWS, vectors = (columns + LANES - 1) / LANES, down, across;
  if (right->along_columns == 1 || rows >= MANY * threads) {
    down = std::clamp<int64_t>(rows / TALL, 1, threads);
    across = std::min(threads / down, vectors);
  } else {
    across = std::clamp<int64_t>(vectors / VECTORS, 1, threads);
    down = std::min(threads / across, strips);
  }
  int64_t number = down * across;
  std::vector<Part> parts;
  std::vector<int64_t> before = {0};  // pieces of other parts
  for (int64_t i = 0; i < number; i++) {
    int64_t place = i / across, column = i % across;
    parts.emplace_back(*right, strips * place / down * ROWS, std::min(rows, strips * (place + 1) / down * ROWS),
                       vectors * column / across, vectors * (column + 1) / across);
    before.push_back(before[i] + (rounded ? 1 : parts[i].pieces()));
  }
  std::vector<double> of_pieces(before[number]);
  std::vector<Taken> taken(number);
  // As many threads as everywhere: where they are fewer for once, OpenMP ends the others.
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t thread = 0; thread < threads; thread++) {
    if (rounded) {
      if (thread < number) of_pieces[before[thread]] = rounded_part(*left, *right, out, parts[thread], squares != nullptr);
      continue;
    }
    for (int64_t turn = thread; turn < thread + number; turn++) {
      int64_t i = turn % number, panel = -1;
      const Part& part = parts[i];
      for (int64_t piece; (piece = taken[i].next()) < part.pieces(); panel = piece / part.blocks)
        of_pieces[before[i] + piece] =
            product_piece(*left, *right, out, part, piece, piece / part.blocks == panel, squares != nullptr);
    }
  }
  if (squares) *squares = static_cast<float>(std::accumulate(of_pieces.begin(), of_pieces.end(), 0.0));
}

static bool is_zero(const float* row, int64_t size) {
  Ints seen = {};
  for (int64_t k = 0; k < size; k += LANES) {
    seen |= (Ints)load_first(row + k, size - k) & 0x7fffffff;
    if (k > 0 && k + LANES < size) continue;  // most other rows show it at once
    for (int lane = 0; lane < LANES; lane++)
      if (seen[lane]) return false;
  }
  return true;
}

// Of a factor whose rows or columns lie together; zero times infinity is no number, which leaving out the zero would hide.
static bool is_finite(const Matrix& matrix, int64_t threads) {
  bool by_rows = matrix.along_columns == 1, finite = by_rows || matrix.along_rows == 1;
  int64_t number = finite ? by_rows ? matrix.rows : matrix.columns : 0, size = by_rows ? matrix.columns : matrix.rows;
  int64_t along = by_rows ? matrix.along_rows : matrix.along_columns;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : finite) if (threads > 1)
  for (int64_t row = 0; row < number; row++) {
    Ints odd = {};
    for (int64_t k = 0; k < size; k += LANES)
      odd |= ((Ints)load_first(matrix.numbers + row * along + k, size - k) & 0x7f800000) == 0x7f800000;
    for (int lane = 0; lane < LANES; lane++) finite = finite && !odd[lane];
  }
  return finite;
}

// Whether there are many rows of zeros, which some tell of all; if so, the others, and a product's rows of zeros are written.
static bool has_many_zeros(const float* rows, int64_t number, int64_t along, int64_t size, int64_t threads,
                           std::vector<int64_t>& others, const Product* out = nullptr) {
  constexpr int64_t MANY = 256, SEEN = 32, ONE_OF = 8;
  int64_t zeros = 0;
  if (number < MANY) return false;
  for (int64_t i = 0; i < SEEN; i++) zeros += is_zero(rows + i * number / SEEN * along, size);
  if (zeros * ONE_OF < SEEN) return false;
  std::vector<char> zero(number);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < number; row++) {
    zero[row] = is_zero(rows + row * along, size);
    if (zero[row] && out) std::fill_n(out->row(row), out->columns, 0.0f);
  }
  for (int64_t row = 0; row < number; row++)
    if (!zero[row]) others.push_back(row);
  return true;
}

static void copy_rows(const float* from, int64_t along, int64_t size, const std::vector<int64_t>& rows, float* to,
                      int64_t threads) {
  int64_t number = rows.size();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < number; row++) std::memcpy(to + row * size, from + rows[row] * along, size * sizeof(float));
}

// `squares`, unless it is null, becomes the sum of the product's squares; with `rounded`, factors are taken in bfloat16.
//
// The gradients of particles that weigh next to nothing are rows of zeros, in training often half of them. Where they are many they
// are left out, be they rows of the product or along its depth.
static void product(const Matrix* left, const Matrix* right, float* numbers, int64_t threads, float* squares, bool rounded) {
  constexpr int64_t FEW = 4000000;  // multiplications that do not repay a look
  int64_t rows = left->rows, deep = left->columns, columns = right->columns;
  Product out{numbers, columns, nullptr};
  std::vector<int64_t> others;
  if (rows * deep * columns < FEW) {
    whole_product(left, right, out, threads, squares, rounded);
  } else if (left->along_columns == 1 && has_many_zeros(left->numbers, rows, left->along_rows, deep, threads, others, &out) &&
             is_finite(*right, threads)) {
    int64_t number = others.size();
    std::unique_ptr<float[]> some(new float[number * deep]);
    copy_rows(left->numbers, left->along_rows, deep, others, some.get(), threads);
    Matrix a{some.get(), number, deep, deep, 1};
    whole_product(&a, right, {numbers, columns, others.data()}, threads, squares, rounded);
  } else if (left->along_rows == 1 && right->along_columns == 1 &&
             has_many_zeros(left->numbers, deep, left->along_columns, rows, threads, others) && is_finite(*right, threads)) {
    int64_t number = others.size();
    std::unique_ptr<float[]> room(new float[number * (rows + columns)]);
    float *some = room.get(), *of_right = some + number * rows;
    copy_rows(left->numbers, left->along_columns, rows, others, some, threads);
    copy_rows(right->numbers, right->along_rows, columns, others, of_right, threads);
    Matrix a{some, rows, number, 1, rows}, b{of_right, number, columns, columns, 1};
    whole_product(&a, &b, out, threads, squares, rounded);
  } else {
    whole_product(left, right, out, threads, squares, rounded);
  }
}

// The same for torch's dispatcher, by torch's own stable functions, so that a compiled graph calls it without Python.

typedef void* Handle;

struct Torch {
  int32_t (*data)(Handle, void**);
  int32_t (*type)(Handle, int32_t*);
  int32_t (*dimensions)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  int32_t (*drop)(Handle);
};

static Torch torch_functions;
constexpr int32_t FLOAT32 = 6, CPU = 0;  // as torch's own functions number them

extern "C" void pyrovae_use_torch(const Torch* functions) { torch_functions = *functions; }

static float* numbers_of(Handle tensor) {
  void* place;
  if (torch_functions.data(tensor, &place)) throw std::runtime_error("torch does not say where a tensor lies");
  return static_cast<float*>(place);
}

static Matrix matrix_of(Handle tensor) {
  int32_t type;
  int64_t dimensions, *sizes, *strides;
  const Torch& torch = torch_functions;
  bool failed = torch.type(tensor, &type) || torch.dimensions(tensor, &dimensions) || torch.sizes(tensor, &sizes) ||
                torch.strides(tensor, &strides);
  if (failed || type != FLOAT32 || dimensions != 2) throw std::runtime_error("pyrovae::product takes two float32 matrices");
  return {numbers_of(tensor), sizes[0], sizes[1], strides[0], strides[1]};
}

// A tensor that is dropped unless it is handed on.
class Held {
 public:
  Handle tensor = nullptr;

  explicit Held(uint64_t handle) : tensor(reinterpret_cast<Handle>(handle)) {}
  Held(int64_t dimensions, int64_t rows, int64_t columns) {
    int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
    if (torch_functions.empty(dimensions, sizes, strides, FLOAT32, CPU, 0, &tensor)) throw std::runtime_error("no memory for a product");
  }
  Held(const Held&) = delete;
  ~Held() {
    if (tensor) torch_functions.drop(tensor);
  }

  Handle hand_on() {
    Handle given = tensor;
    tensor = nullptr;
    return given;
  }
};

// The product of tensors that stay their owner's, and the sum of its squares if asked.
static void product_of(Handle left, Handle right, int64_t threads, bool rounded, Handle* product_to, Handle* squares_to) {
  Matrix a = matrix_of(left), b = matrix_of(right);
  if (a.columns != b.rows) throw std::runtime_error("pyrovae::product takes matrices of sizes (m, k) and (k, n)");
  Held out(2, a.rows, b.columns), squares(0, 0, 0);
  product(&a, &b, numbers_of(out.tensor), threads, squares_to ? numbers_of(squares.tensor) : nullptr, rounded);
  *product_to = out.hand_on();
  if (squares_to) *squares_to = squares.hand_on();
}

// (left, right, threads, rounded) in the words of torch's dispatcher, which hands the tensors over.
static void product_of(uint64_t* stack, bool squared) {
  Held left(stack[0]), right(stack[1]);
  Handle found[2];
  product_of(left.tensor, right.tensor, static_cast<int64_t>(stack[2]), stack[3], &found[0], squared ? &found[1] : nullptr);
  stack[0] = reinterpret_cast<uint64_t>(found[0]);
  if (squared) stack[1] = reinterpret_cast<uint64_t>(found[1]);
}

extern "C" void pyrovae_product_of_tensors(uint64_t* stack, uint64_t, uint64_t) { product_of(stack, false); }
extern "C" void pyrovae_product_and_squares_of_tensors(uint64_t* stack, uint64_t, uint64_t) { product_of(stack, true); }

// The same past the dispatcher, under the names by which a compiled graph calls them; 0 where all went well.
extern "C" int32_t aoti_torch_cpu_product_and_squares(Handle left, Handle right, int64_t threads, int32_t rounded, Handle* out,
                                                      Handle* squares) {
  try {
    product_of(left, right, threads, rounded, out, squares);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());  // the caller raises, but knows no reason
    return 1;
  }
}

extern "C" int32_t aoti_torch_cpu_product(Handle left, Handle right, int64_t threads, int32_t rounded, Handle* out) {
  return aoti_torch_cpu_product_and_squares(left, right, threads, rounded, out, nullptr);
}

// Standard normals of a seed, by any thread: Threefry-2x32 with 20 rounds (Salmon and others, Parallel Random Numbers, 2011) on a
// counter, then Box and Muller's transform, whose functions are those of Cephes.

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline void threefry(const uint32_t (&key)[3], Words& first, Words& second) {
  constexpr int TURNS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  first += key[0];
  second += key[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; i++) {
#pragma GCC unroll 4
    for (int turn : TURNS[i % 2]) {
      first += second;
      second = ((second << turn) | (second >> (32 - turn))) ^ first;
    }
    first += key[(i + 1) % 3];
    second += key[(i + 2) % 3] + i + 1;
  }
}

static inline Floats natural_log(Floats x) {
  Ints exponent = (((Ints)x - 0x3f3504f3) >> 23);  // so that what is left lies between the roots of 1/2 and 2
  Floats f = (Floats)((Ints)x - (exponent << 23)) - 1.0f, square = f * f;
  Floats tail = f * 7.0376836292e-2f - 1.1514610310e-1f;
  tail = tail * f + 1.1676998740e-1f;
  tail = tail * f - 1.2420140846e-1f;
  tail = tail * f + 1.4249322787e-1f;
  tail = tail * f - 1.6668057665e-1f;
  tail = tail * f + 2.0000714765e-1f;
  tail = tail * f - 2.4999993993e-1f;
  tail = tail * f + 3.3333331174e-1f;
  return tail * f * square - 0.5f * square + f + __builtin_convertvector(exponent, Floats) * 0.6931471805599453f;
}

static inline Floats square_root(Floats x) {
  Floats inverse = (Floats)(0x5f3759df - ((Ints)x >> 1));
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) inverse *= 1.5f - 0.5f * x * inverse * inverse;
  return x * inverse;
}

// cos and sin of pi times t in [-1, 1].
static inline void on_circle(Floats t, Floats& cosine, Floats& sine) {
  constexpr float SHIFT = 12582912.0f;
  Floats shifted = t * 2.0f + SHIFT;
  Ints quarter = (Ints)shifted;
  Floats angle = (t * 2.0f - (shifted - SHIFT)) * 1.5707963267948966f, s = angle * angle;
  Floats odd = s * -1.9515295891e-4f + 8.3321608736e-3f;
  odd = (odd * s - 1.6666654611e-1f) * s * angle + angle;
  Floats even = s * 2.443315711809948e-5f - 1.388731625493765e-3f;
  even = (even * s + 4.166664568298827e-2f) * s * s - 0.5f * s + 1.0f;
  Ints swap = -(quarter & 1);
  Ints a = ((Ints)even & ~swap) | ((Ints)odd & swap), b = ((Ints)odd & ~swap) | ((Ints)even & swap);
  cosine = (Floats)(a ^ (((quarter + 1) & 2) << 30));
  sine = (Floats)(b ^ ((quarter & 2) << 30));
}

extern "C" void pyrovae_standard_normals(float* out, int64_t size, uint64_t seed) {
  uint32_t key[3] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0};
  key[2] = 0x1BD11BDA ^ key[0] ^ key[1];
  Words lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  for (int64_t at = 0; at < size; at += 2 * LANES) {
    uint64_t counter = at / 2;  // a multiple of the lanes, so its low word does not overflow within a vector
    Words first = lanes + static_cast<uint32_t>(counter), second = Words{} + static_cast<uint32_t>(counter >> 32);
    threefry(key, first, second);
    Floats uniform = __builtin_convertvector((Ints)(first >> 1), Floats) * 0x1p-31f + 0x1p-32f;
    Floats radius = square_root(-2.0f * natural_log(uniform)), cosine, sine;
    on_circle(__builtin_convertvector((Ints)second, Floats) * 0x1p-31f, cosine, sine);
    if (at + 2 * LANES <= size) {
      store(out + at, radius * cosine);
      store(out + at + LANES, radius * sine);
    } else {
      alignas(64) float rest[2 * LANES];
      store(rest, radius * cosine);
      store(rest + LANES, radius * sine);
      std::memcpy(out + at, rest, (size - at) * sizeof(float));
    }
  }
}

// One block of Threefry, for its published values.
extern "C" void pyrovae_threefry_block(uint32_t* words, uint64_t seed) {
  uint32_t key[3] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0};
  key[2] = 0x1BD11BDA ^ key[0] ^ key[1];
  Words first = Words{} + words[0], second = Words{} + words[1];
  threefry(key, first, second);
  words[0] = first[0];
  words[1] = second[LANES - 1];
}

}  // namespace pyrovae
