// Vectors of float32 by AVX512 or else AVX2, with intrinsics: compilers generate slow code for int8 to float.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rag {

#ifdef __AVX512F__
constexpr int kLanes = 16, kMostTokens = 8;  // of a block of products: its sums fit the registers
#else
constexpr int kLanes = 8, kMostTokens = 4;
#endif
using Vec = float __attribute__((vector_size(4 * kLanes)));

inline Vec Floats(const float* from) {
  Vec to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

using Half = uint16_t;  // the bits of a float16
inline float Float(float x) { return x; }
inline float Float(Half x) { return _cvtsh_ss(x); }

#ifdef __AVX512F__
inline Vec Floats(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void Store(Vec v, Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec Floats(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void Store(Vec v, Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

inline void Copy(const float* from, int64_t size, Half* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) Store(Floats(from + i), to + i);
  for (; i < size; i++) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

inline void Copy(const Half* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec v = Floats(from + i);
    std::memcpy(to + i, &v, sizeof(v));
  }
  for (; i < size; i++) to[i] = _cvtsh_ss(from[i]);
}

#ifdef __AVX512F__
inline Vec Floats(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline float Sum(Vec v) { return _mm512_reduce_add_ps(v); }

constexpr int kSquare = 16;  // the size of a square that Transpose takes
using SquareRow = Vec;
template <class T>
SquareRow LoadRow(const T* from) {
  return Floats(from);
}

// Transposes within groups of four, then the groups.
inline void Transpose(Vec (&v)[16]) {
  __m512d pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
    pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
  }
  Vec fours[4][4];  // [column in its four][row's four]: lane 4 c + r is row r of column 4 c + ...
  for (int i = 0; i < 4; i++) {
    const __m512d *a = pairs + 4 * i, *b = a + 2;
    fours[0][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a[0], b[0]));
    fours[1][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a[0], b[0]));
    fours[2][i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a[1], b[1]));
    fours[3][i] = _mm512_castpd_ps(_mm512_unpackhi_pd(a[1], b[1]));
  }
  for (int i = 0; i < 4; i++) {
    const Vec even_1 = _mm512_shuffle_f32x4(fours[i][0], fours[i][1], 0x88);  // columns' fours 0, 2 of both
    const Vec odd_1 = _mm512_shuffle_f32x4(fours[i][0], fours[i][1], 0xdd);
    const Vec even_2 = _mm512_shuffle_f32x4(fours[i][2], fours[i][3], 0x88);
    const Vec odd_2 = _mm512_shuffle_f32x4(fours[i][2], fours[i][3], 0xdd);
    v[i] = _mm512_shuffle_f32x4(even_1, even_2, 0x88);
    v[4 + i] = _mm512_shuffle_f32x4(odd_1, odd_2, 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(even_1, even_2, 0xdd);
    v[12 + i] = _mm512_shuffle_f32x4(odd_1, odd_2, 0xdd);
  }
}

// Returns the sums of 16 vectors, in half the instructions of 16 sums: neighbours are added while they are interleaved.
inline Vec Sums(const Vec* v) {
  Vec fours[4];
  for (int i = 0; i < 4; i++, v += 4) {
    const __m512 a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)) + _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  const auto halves = [](Vec a, Vec b) -> Vec {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}
#else
inline Vec Floats(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

constexpr int kSquare = 4;  // the size of a square that Transpose takes
using SquareRow = __m128;
inline SquareRow LoadRow(const float* from) { return _mm_loadu_ps(from); }
inline SquareRow LoadRow(const Half* from) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
inline void Transpose(SquareRow (&v)[4]) { _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]); }

inline float Sum(Vec v) {
  const __m128 fours = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
  const __m128 twos = fours + _mm_movehl_ps(fours, fours);
  return _mm_cvtss_f32(twos + _mm_movehdup_ps(twos));
}

inline Vec Sums(const Vec* v) {
  Vec sums;
  for (int i = 0; i < kLanes; i++) sums[i] = Sum(v[i]);
  return sums;
}
#endif

// The maximum of each lane; compilers vectorise it only where they may ignore NaN.
inline Vec Larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec Larger(Vec a, Vec b, Vec c) { return Larger(Larger(a, b), c); }
inline float Largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; i++) most = std::max(most, v[i]);
  return most;
}

// Returns e^x for x <= 0 to float32 precision: 2^n times a polynomial of the rest (Cephes, S. Moshier). Compilers do
// not vectorise the C library's without -ffast-math.
inline float Exp(float x) {
  x = std::max(x, -87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * r + c;
  }
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return (p * r * r + r + 1) * power;
}

inline float Silu(float x) {
  const float e = Exp(-std::fabs(x));
  return x * (x < 0 ? e : 1.0f) / (1 + e);
}

// A buffer that begins on a cache line, so that no vector crosses two.
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) { Resize(size); }
  void Resize(int64_t size) { vectors_.resize((size + kLanes - 1) / kLanes); }
  float* data() { return reinterpret_cast<float*>(vectors_.data()); }
  float& operator[](int64_t i) { return data()[i]; }

 private:
  std::vector<Vec> vectors_;
};

}  // namespace rag
