// Products of two float32 matrices, and the sum of a product's squares, which a gradient's norm needs.
//
// These exist beside MKL for three reasons: MKL is slow on processors that Intel did not make, the squares come while the product
// is in registers, and rows of zeros are left out. PYROVAE_NATIVE=decoder leaves all products to torch's libraries; kernels.py
// registers the functions at the end of this file with torch's dispatcher.

#include "tiles.h"

namespace pyrovae {

// Few rows do not repay a copy of the right factor. If both factors are contiguous along the depth, each number of the product is
// then a dot product by vectors; a tile has one number for each lane.
constexpr int DOT_ROWS = 4, DOT_COLUMNS = LANES / DOT_ROWS;

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

// A tile of dot products; rows and columns beyond the matrices repeat the last one and are not written.
static inline void dot_tile(const Matrix& left, const Matrix& right, const Product& out, int64_t row, int64_t column) {
  Floats sum[LANES] = {};
  const float *one[DOT_ROWS], *other[DOT_COLUMNS];
#pragma GCC unroll 4
  for (int r = 0; r < DOT_ROWS; r++) one[r] = left.numbers + std::min(row + r, left.rows - 1) * left.along_rows;
#pragma GCC unroll 4
  for (int c = 0; c < DOT_COLUMNS; c++) other[c] = right.numbers + std::min(column + c, right.columns - 1) * right.along_columns;
  int64_t deep = left.columns, k = 0;
  for (; k + LANES <= deep; k += LANES) add_dots(sum, one, other, k, ~Ints{});
  // The rest: the last whole vector, without the lanes that are counted already.
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
  constexpr int64_t FEW = 48, DEEP = 96;        // at most FEW rows of a product at least DEEP use dot products
  constexpr int64_t TOO_FEW_TO_SHARE = 400000;  // multiplications: waking a second thread takes longer
  constexpr int64_t TALL = 5 * ROWS;            // rows that repay a thread of their own
  constexpr int64_t MANY = 256;                 // rows for each thread that repay a copy of the right factor in each
  int64_t rows = left->rows, deep = left->columns, columns = right->columns;
  if (rows * deep * columns < TOO_FEW_TO_SHARE) threads = 1;
  if (SHUFFLES && !squares && !rounded && left->along_columns == 1 && right->along_rows == 1 && rows <= FEW && deep >= DEEP) {
    int64_t tiles = (columns + DOT_COLUMNS - 1) / DOT_COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; tile++)
      for (int64_t row = 0; row < rows; row += DOT_ROWS) dot_tile(*left, *right, out, row, tile * DOT_COLUMNS);
    return;
  }
  // One part for each thread: rows are shared out if the right factor is read in place, else its columns, so that no panel is copied
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
  std::vector<int64_t> first_piece = {0};  // the number of pieces in the parts before each
  for (int64_t i = 0; i < number; i++) {
    int64_t place = i / across, column = i % across;
    parts.emplace_back(*right, strips * place / down * ROWS, std::min(rows, strips * (place + 1) / down * ROWS),
                       vectors * column / across, vectors * (column + 1) / across);
    first_piece.push_back(first_piece[i] + (rounded ? 1 : parts[i].pieces()));
  }
  std::vector<double> squares_of_pieces(first_piece[number]);
  std::vector<NextPiece> next_piece(number);
  // Always the same number of threads: OpenMP would end the idle ones.
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t thread = 0; thread < threads; thread++) {
    if (rounded) {
      if (thread < number)
        squares_of_pieces[first_piece[thread]] = rounded_part(*left, *right, out, parts[thread], squares != nullptr);
      continue;
    }
    for (int64_t turn = thread; turn < thread + number; turn++) {
      int64_t i = turn % number, panel = -1;
      const Part& part = parts[i];
      for (int64_t piece; (piece = next_piece[i].next()) < part.pieces(); panel = piece / part.blocks)
        squares_of_pieces[first_piece[i] + piece] =
            product_piece(*left, *right, out, part, piece, piece / part.blocks == panel, squares != nullptr);
    }
  }
  if (squares) *squares = static_cast<float>(std::accumulate(squares_of_pieces.begin(), squares_of_pieces.end(), 0.0));
}

static bool is_zero(const float* row, int64_t size) {
  Ints bits = {};
  for (int64_t k = 0; k < size; k += LANES) {
    bits |= (Ints)load_first(row + k, size - k) & 0x7fffffff;
    if (k > 0 && k + LANES < size) continue;  // most rows that are not zero return here
    for (int lane = 0; lane < LANES; lane++)
      if (bits[lane]) return false;
  }
  return true;
}

// Whether a factor has no infinity and no NaN; false if neither its rows nor its columns are contiguous. Rows of zeros may be left
// out only then: zero times infinity is NaN.
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

// Whether many rows are zero, judged by 32 of them. If so, lists the others, and writes the zeros of the product's rows.
static bool has_many_zeros(const float* rows, int64_t number, int64_t along, int64_t size, int64_t threads,
                           std::vector<int64_t>& others, const Product* out = nullptr) {
  constexpr int64_t MANY = 256, SAMPLED = 32, ONE_OF = 8;
  int64_t zeros = 0;
  if (number < MANY) return false;
  for (int64_t i = 0; i < SAMPLED; i++) zeros += is_zero(rows + i * number / SAMPLED * along, size);
  if (zeros * ONE_OF < SAMPLED) return false;
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

// The product; `squares`, unless it is null, becomes the sum of its squares; with `rounded`, factors are rounded to bfloat16.
//
// Gradients of particles with negligible weights are rows of zeros, in training often half of all rows. If there are many they are
// left out, whether they are rows of the product or lie along its depth.
static void product(const Matrix* left, const Matrix* right, float* numbers, int64_t threads, float* squares, bool rounded) {
  constexpr int64_t FEW = 4000000;  // multiplications that do not repay a search for zeros
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

// The same for torch's dispatcher. Tensors are handled by torch's stable C functions, whose addresses kernels.py passes, so that a
// compiled graph calls a product without Python and this file needs no header of torch.

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
constexpr int32_t FLOAT32 = 6, CPU = 0;  // the numbers that torch gives its types

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

// A tensor that this object owns until it is released.
class OwnedTensor {
 public:
  Handle tensor = nullptr;

  explicit OwnedTensor(uint64_t handle) : tensor(reinterpret_cast<Handle>(handle)) {}
  OwnedTensor(int64_t dimensions, int64_t rows, int64_t columns) {
    int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
    if (torch_functions.empty(dimensions, sizes, strides, FLOAT32, CPU, 0, &tensor)) throw std::runtime_error("no memory for a product");
  }
  OwnedTensor(const OwnedTensor&) = delete;
  ~OwnedTensor() {
    if (tensor) torch_functions.drop(tensor);
  }

  Handle release() {
    Handle released = tensor;
    tensor = nullptr;
    return released;
  }
};

// The product of two tensors that stay their owner's, and the sum of its squares if `squares_to` is not null.
static void product_of(Handle left, Handle right, int64_t threads, bool rounded, Handle* product_to, Handle* squares_to) {
  Matrix a = matrix_of(left), b = matrix_of(right);
  if (a.columns != b.rows) throw std::runtime_error("pyrovae::product takes matrices of sizes (m, k) and (k, n)");
  OwnedTensor out(2, a.rows, b.columns), squares(0, 0, 0);
  product(&a, &b, numbers_of(out.tensor), threads, squares_to ? numbers_of(squares.tensor) : nullptr, rounded);
  *product_to = out.release();
  if (squares_to) *squares_to = squares.release();
}

// The calling convention of torch's dispatcher: (left, right, threads, rounded) on a stack of words; the tensors become ours.
static void product_of(uint64_t* stack, bool squared) {
  OwnedTensor left(stack[0]), right(stack[1]);
  Handle found[2];
  product_of(left.tensor, right.tensor, static_cast<int64_t>(stack[2]), stack[3], &found[0], squared ? &found[1] : nullptr);
  stack[0] = reinterpret_cast<uint64_t>(found[0]);
  if (squared) stack[1] = reinterpret_cast<uint64_t>(found[1]);
}

extern "C" void pyrovae_product_of_tensors(uint64_t* stack, uint64_t, uint64_t) { product_of(stack, false); }
extern "C" void pyrovae_product_and_squares_of_tensors(uint64_t* stack, uint64_t, uint64_t) { product_of(stack, true); }

// The same without the dispatcher, under the names by which compiled graphs call them; returns 0 if nothing failed.
extern "C" int32_t aoti_torch_cpu_product_and_squares(Handle left, Handle right, int64_t threads, int32_t rounded, Handle* out,
                                                      Handle* squares) {
  try {
    product_of(left, right, threads, rounded, out, squares);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());  // the caller raises, but does not know the reason
    return 1;
  }
}

extern "C" int32_t aoti_torch_cpu_product(Handle left, Handle right, int64_t threads, int32_t rounded, Handle* out) {
  return aoti_torch_cpu_product_and_squares(left, right, threads, rounded, out, nullptr);
}

}  // namespace pyrovae
