#pragma once
// Vectors of float32 numbers, and the inner loop that the decoder and the products share.
//
// kernels.py joins all files of this folder into one source and compiles it. `Floats` is a vector type of GCC and Clang: arithmetic
// on it compiles to the vector instructions of the processor at hand, so that the same text serves SSE, AVX2, AVX-512 and NEON.
//
// The inner loop computes a tile of a product, ROWS rows by VECTORS vectors of columns, whose sums stay in registers over the whole
// depth. Each step loads a row of the right factor once for all rows of the tile, and a number of the left factor once for all its
// columns.

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
constexpr int LANES = 16, ROWS = 8;  // of 32 registers, 24 hold sums, 3 the columns, 1 the row
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // of 16 registers, 12 hold sums, 3 the columns, 1 the row
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 8;
#else
constexpr int LANES = 4, ROWS = 4;
#endif

// The library is loaded so that compiled graphs find its functions: the namespace keeps its other names from clashing.
namespace pyrovae {

constexpr int VECTORS = 3, PANEL = LANES * VECTORS;

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
static inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
static inline Floats broadcast(float value) { return value - Floats{}; }
static inline Floats lower(Floats a, Floats b) { return a < b ? a : b; }  // b if either is NaN
static inline Floats upper(Floats a, Floats b) { return a > b ? a : b; }

// A buffer that starts at a multiple of a vector's size: a load that crosses two cache lines takes twice as long.
class AlignedBuffer {
  std::vector<float> numbers;

 public:
  explicit AlignedBuffer(int64_t size) : numbers(size + LANES) {}
  float* begin() {
    float* place = numbers.data();
    while (reinterpret_cast<uintptr_t>(place) % (4 * LANES)) place++;
    return place;
  }
};

// float32 rounded to bfloat16 (to nearest, ties to even), in the lower 16 bits; NaN stays NaN.
static inline Ints upper_half(Floats value) {
  Ints bits = (Ints)value, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (value == value ? near : 0x7fc0 + Ints{}) & 0xffff;
}

// How factors of products are stored, in words of four bytes. `Numbers`: one float32 in each word, rounded to bfloat16 or not.
template <bool rounded>
struct Numbers {
  static constexpr int EACH = 1;

  static inline Floats broadcast_word(const float* word) { return broadcast(*word); }
  static inline Floats product(Floats left, Floats right, Floats sum) { return sum + left * right; }

  static inline void store_row(float* row, int64_t column, Floats value, int64_t columns) {
    if (rounded) value = (Floats)(upper_half(value) << 16);
    if (column + LANES <= columns)
      store(row + column, value);
    else
      std::memcpy(row + column, &value, (columns - column) * sizeof(float));
  }

  static inline void store_number(float* word, int64_t, float value) {
    *word = rounded ? ((Floats)(upper_half(broadcast(value)) << 16))[0] : value;
  }

  // Words made of two rows, one below the other (here of the first alone), and of numbers along one row.
  static inline Floats words_of_two_rows(Floats value, Floats) { return rounded ? (Floats)(upper_half(value) << 16) : value; }
  static inline Floats words_of_one_row(const float* from) { return words_of_two_rows(load(from), Floats{}); }
};

// `Pairs`: two bfloat16 numbers that follow each other along the depth, as the instruction that multiplies them wants them.
struct Pairs {
  static constexpr int EACH = 2;

  static inline Floats broadcast_word(const float* word) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return (Floats)(bits + Ints{});  // copied as bits: a pair is no float32
  }

#if defined(__AVX512BF16__)
  static inline Floats product(Floats left, Floats right, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
#endif

  static inline void store_row(float* row, int64_t column, Floats value, int64_t columns) {
    Halves halves = __builtin_convertvector(upper_half(value), Halves);
    char* to = reinterpret_cast<char*>(row) + column * sizeof(uint16_t);
    if (column + LANES <= columns) {
      std::memcpy(to, &halves, sizeof halves);
    } else {
      // The last word of an odd number of columns is half empty, and has weights of zero. It is written too, since zero times an
      // infinity left there would be NaN.
      std::memcpy(to, &halves, (columns - column + 1) / 2 * sizeof(float));
    }
  }

  static inline void store_number(float* word, int64_t place, float value) {
    uint16_t half = upper_half(broadcast(value))[0];
    std::memcpy(reinterpret_cast<char*>(word) + place * sizeof half, &half, sizeof half);
  }

  static inline Floats words_of_two_rows(Floats first, Floats second) { return (Floats)(upper_half(first) | upper_half(second) << 16); }

  static inline Floats words_of_one_row(const float* from) {
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

// Adds to the sums of a tile the products of R rows of the left factor and V vectors of columns of the panel.
template <class Factors, int R, int V>
static inline void add_products(Floats (&sum)[R][V], const float* left, int64_t along_rows, int64_t along_depth, int64_t deep,
                                const float* panel, int64_t along_panel = V * LANES) {
  for (int64_t k = 0; k < deep; k++) {
    Floats right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) right[v] = load(panel + k * along_panel + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats one = Factors::broadcast_word(left + r * along_rows + k * along_depth);
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sum[r][v] = Factors::product(one, right[v], sum[r][v]);
    }
  }
}

template <class Factors>
static inline int64_t words(int64_t numbers) {
  return (numbers + Factors::EACH - 1) / Factors::EACH;
}

}  // namespace pyrovae
