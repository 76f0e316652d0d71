// Standard normal numbers from a seed.
//
// A counter-based generator: number i depends on the seed and on i alone, so that any thread can make any part of a tensor. The
// generator is Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, 2011, doi:10.1145/2063384.2063405), which turns a
// counter into two random words. The Box-Muller transform turns the two words into two normal numbers; its logarithm, sine and
// cosine are the polynomials of the Cephes library.
//
// A seed gives the same bits on every processor:
// - Numbers come in groups of 32: 16 cosines, then the 16 sines of the same counters. The group is the same for every vector width.
// - Every multiplication that is followed by an addition is an explicit fused multiply-add, rounded once. The compiler has no such
//   choice left to make, which it would make differently with and without such an instruction.

#include "vectors.h"

#if defined(__x86_64__) && defined(__FMA__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyrovae {

constexpr int GROUP = 16;  // counters, each of which gives two numbers
static_assert(GROUP % LANES == 0, "a group is a whole number of vectors");

typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// a * b + c, rounded once.
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__FMA__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Floats result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = std::fma(a[lane], b[lane], c[lane]);
  return result;
#endif
}

static inline Floats fused(Floats a, Floats b, float c) { return fused(a, b, broadcast(c)); }
static inline Floats fused(Floats a, float b, float c) { return fused(a, broadcast(b), broadcast(c)); }

static inline void threefry(const uint32_t (&key)[3], Words& first, Words& second) {
  constexpr int ROTATIONS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  first += key[0];
  second += key[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; i++) {
#pragma GCC unroll 4
    for (int bits : ROTATIONS[i % 2]) {
      first += second;
      second = ((second << bits) | (second >> (32 - bits))) ^ first;
    }
    first += key[(i + 1) % 3];
    second += key[(i + 2) % 3] + i + 1;
  }
}

// x is 2^exponent (1 + f), with 1 + f between the square roots of 1/2 and 2; the polynomial is log(1 + f).
static inline Floats natural_log(Floats x) {
  Ints exponent = (((Ints)x - 0x3f3504f3) >> 23);
  Floats f = (Floats)((Ints)x - (exponent << 23)) - 1.0f, square = f * f;
  Floats tail = fused(f, 7.0376836292e-2f, -1.1514610310e-1f);
  tail = fused(tail, f, 1.1676998740e-1f);
  tail = fused(tail, f, -1.2420140846e-1f);
  tail = fused(tail, f, 1.4249322787e-1f);
  tail = fused(tail, f, -1.6668057665e-1f);
  tail = fused(tail, f, 2.0000714765e-1f);
  tail = fused(tail, f, -2.4999993993e-1f);
  tail = fused(tail, f, 3.3333331174e-1f);
  Floats log_mantissa = fused(tail * f, square, -0.5f * square) + f;
  return fused(__builtin_convertvector(exponent, Floats), broadcast(0.6931471805599453f), log_mantissa);
}

// x times its inverse square root: a first guess from the exponent's bits, and three of Newton's steps.
static inline Floats square_root(Floats x) {
  Floats inverse = (Floats)(0x5f3759df - ((Ints)x >> 1));
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) inverse *= fused(-(0.5f * x * inverse), inverse, 1.5f);
  return x * inverse;
}

// cos and sin of pi times t, for t in [-1, 1]: the nearest multiple of pi / 2, and polynomials on the angle that is left.
static inline void cos_and_sin_of_pi(Floats t, Floats& cosine, Floats& sine) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which is then in the last bits
  Floats shifted = fused(t, 2.0f, SHIFT);
  Ints quarter = (Ints)shifted;
  Floats angle = fused(t, broadcast(2.0f), SHIFT - shifted) * 1.5707963267948966f, s = angle * angle;
  Floats odd = fused(s, -1.9515295891e-4f, 8.3321608736e-3f);
  odd = fused(fused(odd, s, -1.6666654611e-1f) * s, angle, angle);
  Floats even = fused(s, 2.443315711809948e-5f, -1.388731625493765e-3f);
  even = fused(fused(even, s, 4.166664568298827e-2f) * s, s, -0.5f * s) + 1.0f;
  Ints swap = -(quarter & 1);
  Ints a = ((Ints)even & ~swap) | ((Ints)odd & swap), b = ((Ints)odd & ~swap) | ((Ints)even & swap);
  cosine = (Floats)(a ^ (((quarter + 1) & 2) << 30));
  sine = (Floats)(b ^ ((quarter & 2) << 30));
}

static inline void make_key(uint64_t seed, uint32_t (&key)[3]) {
  key[0] = static_cast<uint32_t>(seed);
  key[1] = static_cast<uint32_t>(seed >> 32);
  key[2] = 0x1BD11BDA ^ key[0] ^ key[1];
}

// The 32 numbers of the counters from `counter` on, which is a multiple of 16: its low word does not overflow within a group.
static inline void normal_group(const uint32_t (&key)[3], uint64_t counter, float* out) {
  Words lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
#pragma GCC unroll 4
  for (int i = 0; i < GROUP; i += LANES) {
    Words first = lanes + static_cast<uint32_t>(counter + i), second = Words{} + static_cast<uint32_t>(counter >> 32);
    threefry(key, first, second);
    Floats uniform = fused(__builtin_convertvector((Ints)(first >> 1), Floats), 0x1p-31f, 0x1p-32f);
    Floats radius = square_root(-2.0f * natural_log(uniform)), cosine, sine;
    cos_and_sin_of_pi(__builtin_convertvector((Ints)second, Floats) * 0x1p-31f, cosine, sine);
    store(out + i, radius * cosine);
    store(out + GROUP + i, radius * sine);
  }
}

// The first `size` numbers of a seed.
extern "C" void pyrovae_standard_normals(float* out, int64_t size, uint64_t seed) {
  uint32_t key[3];
  make_key(seed, key);
  int64_t place = 0;
  for (; place + 2 * GROUP <= size; place += 2 * GROUP) normal_group(key, place / 2, out + place);
  if (place < size) {
    alignas(64) float rest[2 * GROUP];
    normal_group(key, place / 2, rest);
    std::memcpy(out + place, rest, (size - place) * sizeof(float));
  }
}

// One block of Threefry, which the tests compare with its published values.
extern "C" void pyrovae_threefry_block(uint32_t* words, uint64_t seed) {
  uint32_t key[3];
  make_key(seed, key);
  Words first = Words{} + words[0], second = Words{} + words[1];
  threefry(key, first, second);
  words[0] = first[0];
  words[1] = second[LANES - 1];
}

}  // namespace pyrovae
