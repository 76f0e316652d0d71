// A decoder and its Bernoulli log-likelihood in one pass.
//
// Scoring needs only the sum of each row's log-likelihood, and the logits are the largest tensor of all: writing and reading them
// costs more than computing them. Here a tile of logits is finished in registers: its log-likelihood is added to running sums of
// its rows, and the logits are written nowhere.
//
// A block of rows passes all layers together, so that its hidden values stay in the second-level cache. Weights are first copied
// to panels, as many columns as a tile has, which stay in the first-level cache while a block passes. The factors of products may
// be rounded to bfloat16; sums, biases and activations stay in float32.

#include "vectors.h"

namespace pyrovae {

constexpr int BLOCK = 120;        // rows that pass all layers together
constexpr int MOST_FACTORS = 64;  // factors between 1 and 2 whose product cannot overflow a float32

struct Relu {
  static inline void apply(Floats (&x)[VECTORS]) {
#pragma GCC unroll 3
    for (Floats& value : x) value = upper(Floats{}, value);
  }
};

// tanh x as x P(x^2) / Q(x^2), within 4e-7 (experiments/minimax.py finds the coefficients; rewrites.py has the same ones).
// Division is slow: the three quotients of a tile share one.
struct Tanh {
  static inline void parts(Floats x, Floats& above, Floats& below) {
    x = lower(broadcast(8.0f), upper(broadcast(-8.0f), x));
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

// e^-a for a >= 0: a whole power of two, set in the exponent's bits, times a polynomial for the fraction (experiments/minimax.py).
// log(1 + e^-a) is then within 1e-7.
static inline Floats exp_of_minus(Floats a) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which is then in the last bits
  a = lower(broadcast(87.0f), a);
  Floats shifted = a * -1.4426950408889634f + SHIFT;
  Floats left = a * -1.4426950408889634f - (shifted - SHIFT);
  Floats value = left * 0.001327647151901107f + 0.00967554133067915f;
  value = value * left + 0.05550713274962918f;
  value = value * left + 0.240221197239339f;
  value = value * left + 0.6931469670638646f;
  value = value * left + 1.0000000716546562f;
  return (Floats)((Ints)value + ((Ints)shifted << 23));
}

// Finishes a tile of a hidden layer: applies the activation and writes the values, as factors of the next product. `row` counts
// within the block.
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
        Factors::store_row(to, end - LANES, value[v], v < V - 1 ? end : columns);
      }
    }
  }

  void end_of_panel(int64_t, bool) {}
};

// Finishes a tile of logits: adds their Bernoulli log-likelihood, x l - max(l, 0) - log(1 + e^-|l|), to sums of the rows. The factors
// 1 + e^-|l| are multiplied, so that up to MOST_FACTORS of them need one logarithm.
struct Bernoulli {
  int64_t columns;
  const float* data[BLOCK];
  double totals[BLOCK];
  alignas(64) float product[BLOCK * LANES];  // the product of 1 + e^-|l|
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
        term += datum * logit - upper(logit, Floats{});
        factor += factor * exp_of_minus((Floats)((Ints)logit & 0x7fffffff));
      }
      store(product + (row + r) * LANES, factor);
      store(plain + (row + r) * LANES, term);
    }
  }

  // Adds the logarithms of the products to the totals. Exponents are added and mantissas multiplied over the lanes, so that each row
  // takes a single logarithm.
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
      store(product + row * LANES, broadcast(1.0f));
      store(plain + row * LANES, Floats{});
    }
  }

  void write(float* out, int64_t rows) const {
    for (int64_t row = 0; row < rows; row++) out[row] = static_cast<float>(totals[row]);
  }
};

// A layer as Python passes it; its weights are (depth, columns), with any strides.
struct Layer {
  const float* weights;
  const float* bias;
  int64_t depth, columns, along_depth, along_columns, activation;
};

// The weights of a layer, copied into panels. Columns are padded to a whole vector: a hidden layer repeats its last column, so that
// padding is finite if and only if that column is; logits are padded with -1e4, whose log-likelihood at x = 0 is 0.
template <class Factors>
class Panels {
  AlignedBuffer room;

  // Columns of the panel that begins at `first`. Two widths only, so that this file compiles in seconds.
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
          Factors::store_number(panel + k / Factors::EACH * width + c, k % Factors::EACH, from[k * layer.along_depth]);
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
  int64_t share = (rows + threads * ROWS - 1) / (threads * ROWS) * ROWS;  // a block is smaller if all threads would not get one
  int64_t block = std::min<int64_t>(BLOCK, share), blocks = (rows + block - 1) / block;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    AlignedBuffer one(block * widest), other(block * widest);
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
            Factors::store_row(next + row * words<Factors>(depth), column, value, depth);
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

// log p(x | z) of each row, in nats. Hidden layers have an activation (0: tanh, 1: relu); the last layer gives the logits. With
// `rounded`, the factors of products are rounded to bfloat16.
extern "C" void pyrovae_bernoulli_decoder(const float* left, int64_t rows, const Layer* layers, int64_t num_layers,
                                          const float* x, int64_t num_data, float* out, int64_t threads, bool rounded) {
  (rounded ? decoder<Rounded> : decoder<Exact>)(left, rows, layers, num_layers, x, num_data, out, threads);
}

// What this source was compiled for, which `pyrovae doctor` prints: numbers in a vector, and whether bfloat16 has an instruction.
extern "C" int32_t pyrovae_lanes() { return LANES; }
extern "C" bool pyrovae_multiplies_bfloat16() { return std::is_same<Rounded, Pairs>::value; }

}  // namespace pyrovae
