// Attention of a few tokens to a cache of keys and values, tile by tile with online softmax.
//
// Letters: B batch, T tokens a row of it, R = B * T, H query heads, K kv heads, D head dim, S slots of the cache.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace rag {

constexpr int64_t kMostDim = 256;     // of a head
constexpr int64_t kTile = 64;         // slots that are read at once: they stay in the first cache for all queries
constexpr int kQueries = kLanes / 4;  // of a block: its sums stay in registers
constexpr int64_t kManyQueries = 8;   // from here on transposing a tile's keys pays

// What a query has attended to: the largest score, the sum of the exponentials, and the values they weigh.
struct Attended {
  float top, total, values[kMostDim];

  void Clear(int64_t dim) {
    top = -1e30f;
    total = 0;
    std::fill(values, values + dim, 0.0f);
  }
};

// Up to kTile slots of a head: keys and values [slots, dim]; where many queries share them also as floats, the keys
// transposed, [dim, kTile].
struct Tile {
  const Half *keys, *values;
  const float *transposed, *floats;
  int64_t slots, dim;
};

// Its keys as [dim, kTile].
inline void Transpose(const Tile& tile, float* transposed) {
  const auto four = [](const Half* from) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  };
  const int64_t fours = tile.dim % 4 ? 0 : tile.slots / 4 * 4;
  for (int64_t s = 0; s < fours; s += 4) {
    for (int64_t d = 0; d < tile.dim; d += 4) {
      const Half* from = tile.keys + s * tile.dim + d;
      __m128 rows[] = {four(from), four(from + tile.dim), four(from + 2 * tile.dim), four(from + 3 * tile.dim)};
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int i = 0; i < 4; i++) _mm_storeu_ps(transposed + (d + i) * kTile + s, rows[i]);
    }
  }
  for (int64_t s = fours; s < tile.slots; s++) {
    for (int64_t d = 0; d < tile.dim; d++) transposed[d * kTile + s] = _cvtsh_ss(tile.keys[s * tile.dim + d]);
  }
}

// A query against a tile: the slots it sees of it, and where what it finds goes.
struct Query {
  const float* vector;
  int64_t seen;
  Attended* result;
};

// sums[i] += a[i] . b, where b [size, stride] is C vectors wide.
template <int A, int C, class T>
void Accumulate(const float* const* a, const T* b, int64_t stride, int64_t size, Vec (&sums)[A][C]) {
  for (int64_t n = 0; n < size; n++, b += stride) {
    Vec row[C];
    for (int c = 0; c < C; c++) row[c] = Floats(b + c * kLanes);
    for (int i = 0; i < A; i++) {
      for (int c = 0; c < C; c++) sums[i][c] += a[i][n] * row[c];
    }
  }
}

// Scores of A queries; those behind the tile's slots are of no meaning.
template <int A>
void Score(const Query* q, const Tile& tile, float (*scores)[kTile]) {
  if (tile.transposed) {
    const float* vectors[A];
    for (int i = 0; i < A; i++) vectors[i] = q[i].vector;
    for (int64_t s = 0; s < kTile; s += 4 * kLanes) {
      Vec sums[A][4] = {};
      Accumulate<A, 4, float>(vectors, tile.transposed + s, kTile, tile.dim, sums);
      for (int i = 0; i < A; i++) std::memcpy(scores[i] + s, sums[i], sizeof(sums[i]));
    }
    return;
  }
  const int64_t whole = tile.dim / kLanes * kLanes;
  for (int64_t s = 0; s < tile.slots; s += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, tile.slots - s);
    Vec dots[A][kLanes] = {};
    for (int64_t n = 0; n < count; n++) {
      const Half* key = tile.keys + (s + n) * tile.dim;
      Vec sums[A] = {};
      for (int64_t d = 0; d < whole; d += kLanes) {
        const Vec some = Floats(key + d);
        for (int i = 0; i < A; i++) sums[i] += Floats(q[i].vector + d) * some;
      }
      for (int i = 0; i < A; i++) {
        for (int64_t d = whole; d < tile.dim; d++) sums[i][0] += q[i].vector[d] * _cvtsh_ss(key[d]);
        dots[i][n] = sums[i];
      }
    }
    for (int i = 0; i < A; i++) {
      const Vec sums = Sums(dots[i]);
      std::memcpy(scores[i] + s, &sums, sizeof(sums));
    }
  }
}

// C vectors of the results from d on: what they were, times `by`, and the tile's values by their weights.
template <int A, int C>
void Weigh(const float* const* weights, const Tile& tile, int64_t d, const float* by, const Query* q) {
  Vec sums[A][C];
  for (int i = 0; i < A; i++) {
    for (int c = 0; c < C; c++) sums[i][c] = by[i] * Floats(q[i].result->values + d + c * kLanes);
  }
  if (tile.floats) {
    Accumulate<A, C, float>(weights, tile.floats + d, tile.dim, tile.slots, sums);
  } else {
    Accumulate<A, C, Half>(weights, tile.values + d, tile.dim, tile.slots, sums);
  }
  for (int i = 0; i < A; i++) std::memcpy(q[i].result->values + d, sums[i], sizeof(sums[i]));
}

// A queries against one tile more (online softmax, Milakov and Gimelshein 2018).
template <int A>
void Attend(const Query* q, const Tile& tile, float scale) {
  alignas(64) float weights[A][kTile];
  const float* rows[A];
  float by[A];
  Score<A>(q, tile, weights);
  for (int i = 0; i < A; i++) {
    Attended& result = *q[i].result;
    float top = result.top, total = 0, *w = weights[i];
    for (int64_t s = 0; s < kTile; s++) w[s] = s < q[i].seen ? scale * w[s] : -1e30f;
    for (int64_t s = 0; s < kTile; s++) top = std::max(top, w[s]);
    for (int64_t s = 0; s < kTile; s++) w[s] = s < q[i].seen ? Exp(w[s] - top) : 0;
    for (int64_t s = 0; s < kTile; s++) total += w[s];
    by[i] = Exp(result.top - top);
    result.top = top;
    result.total = by[i] * result.total + total;
    rows[i] = w;
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= tile.dim; d += 4 * kLanes) Weigh<A, 4>(rows, tile, d, by, q);
  for (; d + kLanes <= tile.dim; d += kLanes) Weigh<A, 1>(rows, tile, d, by, q);
  for (int i = 0; i < A; i++) {
    for (int64_t rest = d; rest < tile.dim; rest++) {
      float sum = by[i] * q[i].result->values[rest];
      for (int64_t s = 0; s < tile.slots; s++) sum += weights[i][s] * _cvtsh_ss(tile.values[s * tile.dim + rest]);
      q[i].result->values[rest] = sum;
    }
  }
}

// The threads' shares of a query together, as flash-decoding does it.
inline void Merge(const Attended* shares, int64_t count, int64_t dim, float* out) {
  float top = -1e30f, total = 0;
  for (int64_t i = 0; i < count; i++) top = std::max(top, shares[i].top);
  std::fill(out, out + dim, 0.0f);
  for (int64_t i = 0; i < count; i++) {
    const float by = Exp(shares[i].top - top);
    total += by * shares[i].total;
    for (int64_t d = 0; d < dim; d++) out[d] += by * shares[i].values[d];
  }
  for (int64_t d = 0; d < dim; d++) out[d] /= total;
}

struct Shape {
  int64_t batch, tokens, width, heads, kv_heads, slots, dim;
  int64_t rows() const { return batch * tokens; }

  // Many rows are shared out among the threads; of few each thread attends to a share of the slots for all of them, so
  // that the cache is read once, and a query has as many results as there are threads.
  bool by_rows(int threads) const { return rows() >= 16 * threads; }
  int shares(int threads) const { return by_rows(threads) ? 1 : threads; }
};

// Thread i's part of attending, for queries [R, H, D]; results [R, H, shares].
inline void AttendShare(const Shape& z, const float* query, const Half* keys, const Half* values,
                        const int32_t* positions, int i, int threads, Attended* results) {
  const float scale = 1 / std::sqrt(static_cast<float>(z.dim));
  const int64_t group = z.heads / z.kv_heads;
  const bool by_rows = z.by_rows(threads);
  const auto ours = [&](int64_t r) { return !by_rows || r / kTogether % threads == i; };
  Buffer transposed(z.dim * kTile), floats(z.dim * kTile);
  std::vector<Query> q;
  const auto result = [&](int64_t n) { return by_rows ? results + n : results + n * threads + i; };
  for (int64_t n = 0; n < z.rows() * z.heads; n++) {
    if (ours(n / z.heads)) result(n)->Clear(z.dim);
  }
  for (int64_t b = 0; b < z.batch; b++) {
    const int32_t* at = positions + b * z.tokens;
    const int64_t slots = *std::max_element(at, at + z.tokens) + 1;
    const Share share = by_rows ? Share(slots, 0, 1) : Share(slots, i, threads);
    for (int64_t kv = 0; kv < z.kv_heads; kv++) {
      for (int64_t s = share.begin; s < share.end; s += kTile) {
        const int64_t offset = ((b * z.kv_heads + kv) * z.slots + s) * z.dim;
        Tile tile{keys + offset, values + offset, nullptr, nullptr, std::min(kTile, share.end - s), z.dim};
        q.clear();
        for (int64_t r = b * z.tokens; r < (b + 1) * z.tokens; r++) {
          if (positions[r] < s || !ours(r)) continue;
          for (int64_t n = r * z.heads + kv * group; n < r * z.heads + (kv + 1) * group; n++) {
            q.push_back({query + n * z.dim, std::min(tile.slots, positions[r] + 1 - s), result(n)});
          }
        }
        if (static_cast<int64_t>(q.size()) >= kManyQueries) {
          Transpose(tile, transposed.data());
          Copy(tile.values, tile.slots * z.dim, floats.data());
          tile.transposed = transposed.data();
          tile.floats = floats.data();
        }
        size_t n = 0;
        for (; n + kQueries <= q.size(); n += kQueries) Attend<kQueries>(&q[n], tile, scale);
        for (; n + 3 <= q.size(); n += 3) Attend<3>(&q[n], tile, scale);
        for (; n < q.size(); n++) Attend<1>(&q[n], tile, scale);
      }
    }
  }
}

}  // namespace rag
