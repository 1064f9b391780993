// Products of tokens with int8 weights: in float32 by weights that are converted as they are read, or by AMX with
// tokens in two signed 8-bit digits (rag/ops/linear.py), which is as exact as 15 bits.
//
// Letters: O outputs, M width, T tokens. As template arguments N and T are the outputs and tokens of a block.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "team.h"
#include "vectors.h"

namespace rag {

struct Weight {
  const int8_t* values;
  const float* scale;
  int64_t outputs, width;
};

// The destination of products, [T, O]: written, or added to.
struct Output {
  float* to;
  int64_t outputs;
  bool add;

  void Put(int64_t t, int64_t n, float value) const {
    float* at = to + t * outputs + n;
    *at = add ? *at + value : value;
  }
  void Put(int64_t t, int64_t n, Vec values) const {
    float* at = to + t * outputs + n;
    if (add) values += Floats(at);
    std::memcpy(at, &values, sizeof(values));
  }
};

// Multiplies N rows of the weight from n on by T tokens from t0 on.
template <int N, int T>
void Block(const Weight& w, int64_t n, const float* x, int64_t t0, const Output& out) {
  const int8_t *rows = w.values + n * w.width, *next = rows + 2 * N * w.width;
  for (int64_t i = 0; i < N * w.width; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
  x += t0 * w.width;
  Vec sums[N][T] = {};
  int64_t m = 0;
  for (; m + kLanes <= w.width; m += kLanes) {
    Vec row[N];
    for (int i = 0; i < N; i++) row[i] = Floats(rows + i * w.width + m);
    for (int t = 0; t < T; t++) {
      const Vec token = Floats(x + t * w.width + m);
      for (int i = 0; i < N; i++) sums[i][t] += row[i] * token;
    }
  }
  float totals[N][T];
  if constexpr (N * T == kLanes) {
    const Vec all = Sums(sums[0]);
    std::memcpy(totals, &all, sizeof(all));
  } else {
    for (int i = 0; i < N; i++) {
      for (int t = 0; t < T; t++) totals[i][t] = Sum(sums[i][t]);
    }
  }
  for (int i = 0; i < N; i++) {
    for (int t = 0; t < T; t++) {
      for (int64_t rest = m; rest < w.width; rest++) totals[i][t] += rows[i * w.width + rest] * x[t * w.width + rest];
      out.Put(t0 + t, n + i, totals[i][t] * w.scale[n + i]);
    }
  }
}

template <int T>
void Tokens(const Weight& w, int64_t n, int64_t end, const float* x, int64_t t0, const Output& out) {
  constexpr int N = T < 4 ? 4 : kLanes / T;
  for (; n + N <= end; n += N) Block<N, T>(w, n, x, t0, out);
  for (; n < end; n++) Block<1, T>(w, n, x, t0, out);
}

// Computes a share of the outputs for all tokens, in parts whose weights stay in the L1 cache from block to block.
inline void MultiplyFloats(const Weight& w, const float* x, int64_t tokens, Share share, const Output& out) {
  constexpr int64_t kPart = 32;
  for (int64_t n = share.begin; n < share.end; n += kPart) {
    const int64_t end = std::min(n + kPart, share.end);
    int64_t t = 0;
    for (; t + kMostTokens <= tokens; t += kMostTokens) Tokens<kMostTokens>(w, n, end, x, t, out);
    for (; t + 4 <= tokens; t += 4) Tokens<4>(w, n, end, x, t, out);
    for (; t + 2 <= tokens; t += 2) Tokens<2>(w, n, end, x, t, out);
    for (; t < tokens; t++) Tokens<1>(w, n, end, x, t, out);
  }
}

#ifdef __AMX_INT8__

// Whether the operating system lets this process use the tiles of AMX; asked once.
inline bool HasTiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// kTogether tokens, eight, in two signed digits each (rag/ops/linear.py), laid out as the second factor of tile
// products: for each 64 of the width [16][16][4], where column c < 8 is the first digit of token c, and 8 + c its
// second.
struct Digits {
  int64_t width = 0, tokens = 0;
  std::vector<int8_t> tiles;  // [tokens / 8, width / 64, 16, 16, 4]
  std::vector<float> step;

  // Digits past the last token are stale, and their products unused.
  void Resize(int64_t new_tokens, int64_t new_width) {
    tokens = new_tokens;
    width = new_width;
    tiles.resize((tokens + 7) / 8 * 16 * width);
    step.resize((tokens + 7) / 8 * 8);
  }

  void Write(const float* x, int64_t t) {
    Vec most = {};
    for (int64_t m = 0; m < width; m += kLanes) most = Larger(most, Floats(x + m), -Floats(x + m));
    step[t] = std::max(Largest(most) / 127, 1.17549435e-38f);
    const float by = 1 / step[t];
    int8_t* out = tiles.data() + t / 8 * 16 * width + t % 8 * 4;
    for (int64_t m = 0; m < width; m += 16) {
      const Vec scaled = by * Floats(x + m);
      const __m512i first = _mm512_cvtps_epi32(scaled);
      const Vec rest = 254 * (scaled - Vec(_mm512_cvtepi32_ps(first)));
      int32_t digits[2][4];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits[0]), _mm512_cvtepi32_epi8(first));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits[1]), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rest)));
      for (int i = 0; i < 4; i++, out += 64) {
        std::memcpy(out, &digits[0][i], 4);
        std::memcpy(out + 32, &digits[1][i], 4);
      }
    }
  }
};

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Writes 16 outputs of up to 8 tokens from the sums of their digits, [output][digit, token].
inline void PutTile(const int32_t (*sums)[16], const Weight& w, int64_t n, const Digits& x, int64_t t,
                    const Output& out) {
  Vec rows[16];
  for (int i = 0; i < 16; i++) rows[i] = _mm512_cvtepi32_ps(_mm512_load_si512(sums[i]));
  Transpose(rows);
  const Vec scale = Floats(w.scale + n);
  const int64_t count = std::min(kTogether, x.tokens - t);
  for (int64_t c = 0; c < count; c++) {
    out.Put(t + c, n, (rows[c] + rows[kTogether + c] * (1 / 254.0f)) * x.step[t + c] * scale);
  }
}

// Multiplies 16 or 32 rows of the weight from n on by up to 16 tokens from t on.
inline void TileBlock(const Weight& w, int64_t n, bool more_rows, const Digits& x, int64_t t, const Output& out) {
  const bool more_tokens = t + kTogether < x.tokens;
  const int8_t *a = w.values + n * w.width, *b = x.tiles.data() + t / 8 * 16 * w.width;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t m = 0; m < w.width; m += 64) {
    _tile_loadd(4, a + m, w.width);
    _tile_loadd(6, b + 16 * m, 64);
    _tile_dpbssd(0, 4, 6);
    if (more_tokens) {
      _tile_loadd(7, b + 16 * (w.width + m), 64);
      _tile_dpbssd(1, 4, 7);
    }
    if (more_rows) {
      _tile_loadd(5, a + 16 * w.width + m, w.width);
      _tile_dpbssd(2, 5, 6);
      if (more_tokens) _tile_dpbssd(3, 5, 7);
    }
  }
  alignas(64) int32_t sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  PutTile(sums[0], w, n, x, t, out);
  if (more_tokens) PutTile(sums[1], w, n, x, t + kTogether, out);
  if (more_rows) PutTile(sums[2], w, n + 16, x, t, out);
  if (more_rows && more_tokens) PutTile(sums[3], w, n + 16, x, t + kTogether, out);
}

// Computes a share of the outputs, except those past its last whole 16.
inline void MultiplyTiles(const Weight& w, const Digits& x, Share share, const Output& out) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t n = share.begin; n + 16 <= share.end; n += 32) {
    for (int64_t t = 0; t < x.tokens; t += 2 * kTogether) TileBlock(w, n, n + 32 <= share.end, x, t, out);
  }
  _tile_release();
}

#endif

// The tokens that a weight is multiplied by: rows of float32, and for AMX their digits too. Its memory is reused from
// call to call, since new memory costs more than the product of a few tokens.
class Input {
 public:
  // Prepares for rows to be written through `row`, or for those at `given`.
  void Resize(int64_t tokens, int64_t width, const float* given = nullptr) {
    tokens_ = tokens;
    width_ = width;
    if (!given) own_.Resize(tokens * width);
    floats_ = given ? given : own_.data();
#ifdef __AMX_INT8__
    tiles_ = tokens > 1 && width % 64 == 0 && HasTiles();
    if (tiles_) digits_.Resize(tokens, width);
#endif
  }

  float* row(int64_t t) { return own_.data() + t * width_; }

  // Call after a row is written and before Multiply.
  void Finish(int64_t t) {
#ifdef __AMX_INT8__
    if (tiles_) digits_.Write(floats_ + t * width_, t);
#endif
  }

  // Computes thread i's share of the products [tokens, outputs]; they are written to `to`, or added.
  void Multiply(const Weight& w, int i, int threads, float* to, bool add = false) const {
    const Output out{to, w.outputs, add};
    Share share(w.outputs, i, threads);
#ifdef __AMX_INT8__
    if (tiles_) {
      MultiplyTiles(w, digits_, share, out);
      share.begin = share.end / 16 * 16;  // the last outputs, fewer than a tile
    }
#endif
    MultiplyFloats(w, floats_, tokens_, share, out);
  }

 private:
  int64_t tokens_ = 0, width_ = 0;
  Buffer own_;
  const float* floats_ = nullptr;
#ifdef __AMX_INT8__
  bool tiles_ = false;
  Digits digits_;
#endif
};

}  // namespace rag
