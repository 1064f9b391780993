// Attention of a few queries to one tile of keys and values, by online softmax. flash.h decides which queries attend to
// which tiles.
//
// Letters: D head dim.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace rag {

constexpr int64_t kMostDim = 256;  // of a head
constexpr int64_t kTile = 64;      // slots of a tile: they stay in the L1 cache for all queries
constexpr int kQueries = kLanes == 16 ? 6 : 2;  // of a block: its sums fit the registers

// The state of a query's online softmax: running maximum, denominator (the sum of the exponentials), and accumulator
// (the sum of the values, weighted by them).
struct SoftmaxState {
  float running_max, denominator, accumulator[kMostDim];

  void Clear(int64_t dim) {
    running_max = -1e30f;
    denominator = 0;
    std::fill(accumulator, accumulator + dim, 0.0f);
  }

  void Write(int64_t dim, float* out) const {  // zeros for a fully masked query
    const float by = denominator == 0 ? 0 : 1 / denominator;
    for (int64_t d = 0; d < dim; d++) out[d] = by * accumulator[d];
  }
};

// Up to kTile slots of a head: keys and values [slots, dim], float32 or float16. If many queries share the tile, also
// the keys transposed to [dim, kTile] and the values in float32; else these two are null.
template <class T>
struct Tile {
  const T *keys, *values;
  const float *transposed, *floats;
  int64_t slots, dim;
};

// Writes the tile's keys as [dim, kTile].
template <class T>
void Transpose(const Tile<T>& tile, float* transposed) {
  const int64_t squares = tile.dim % kSquare ? 0 : tile.slots / kSquare * kSquare;
  for (int64_t s = 0; s < squares; s += kSquare) {
    for (int64_t d = 0; d < tile.dim; d += kSquare) {
      SquareRow rows[kSquare];
      for (int i = 0; i < kSquare; i++) rows[i] = LoadRow(tile.keys + (s + i) * tile.dim + d);
      Transpose(rows);
      for (int i = 0; i < kSquare; i++) std::memcpy(transposed + (d + i) * kTile + s, &rows[i], sizeof(rows[i]));
    }
  }
  for (int64_t s = squares; s < tile.slots; s++) {
    for (int64_t d = 0; d < tile.dim; d++) transposed[d * kTile + s] = Float(tile.keys[s * tile.dim + d]);
  }
}

// The slots that a query sees: those of [from, to), and with `ids`, the segment ids of the slots, only those of its own
// id and of its prefix.
struct VisibleSlots {
  int64_t from, to;
  const int32_t* ids = nullptr;
  int32_t id = 0, prefix = 0;

  bool All(int64_t slots) const { return from == 0 && to == slots && !ids; }
  bool Has(int64_t s) const { return s >= from && s < to && (!ids || ids[s] == id || ids[s] == prefix); }

  // Returns the visible ones of the slots [begin, end), counted from `begin`; from >= to if there are none.
  VisibleSlots Part(int64_t begin, int64_t end) const {
    VisibleSlots part{std::max<int64_t>(from - begin, 0), std::min(to, end) - begin};
    if (!ids) return part;
    part.ids = ids + begin, part.id = id, part.prefix = prefix;
    part.Narrow();
    return part;
  }

 private:
  // Narrows [from, to) to the slots of its ids, and drops the ids if these are all of them.
  void Narrow() {
    const auto has = [this](int32_t n) { return n == id || n == prefix; };
    const auto some = [&](int64_t s) { return std::count_if(ids + s, ids + s + 16, has) > 0; };
    while (from + 16 <= to && !some(from)) from += 16;
    while (from < to && !has(ids[from])) from++;
    while (from + 16 <= to && !some(to - 16)) to -= 16;
    while (from < to && !has(ids[to - 1])) to--;
    if (from < to && std::count_if(ids + from, ids + to, has) == to - from) ids = nullptr;
  }
};

struct Query {
  const float* vector;
  SoftmaxState* state;  // to update
  VisibleSlots slots;
};

// Computes sums[i] += a[i] . b, where a[i] has an element every `step` floats, and b [size, stride] is C vectors wide.
template <int A, int C, class T>
void Accumulate(const float* const* a, const T* b, int64_t stride, int64_t size, Vec (&sums)[A][C], int64_t step = 1) {
  for (int64_t n = 0; n < size; n++, b += stride) {
    Vec row[C];
    for (int c = 0; c < C; c++) row[c] = Floats(b + c * kLanes);
    for (int i = 0; i < A; i++) {
      for (int c = 0; c < C; c++) sums[i][c] += a[i][n * step] * row[c];
    }
  }
}

// Computes the scores of A queries; those past the tile's slots are undefined.
template <int A, class T>
void Score(const Query* q, const Tile<T>& tile, float (*scores)[kTile]) {
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
      const T* key = tile.keys + (s + n) * tile.dim;
      Vec sums[A] = {};
      for (int64_t d = 0; d < whole; d += kLanes) {
        const Vec some = Floats(key + d);
        for (int i = 0; i < A; i++) sums[i] += Floats(q[i].vector + d) * some;
      }
      for (int i = 0; i < A; i++) {
        for (int64_t d = whole; d < tile.dim; d++) sums[i][0] += q[i].vector[d] * Float(key[d]);
        dots[i][n] = sums[i];
      }
    }
    for (int i = 0; i < A; i++) {
      const Vec sums = Sums(dots[i]);
      std::memcpy(scores[i] + s, &sums, sizeof(sums));
    }
  }
}

// Updates C vectors of the accumulators from d on: rescales them by `by` and adds the tile's values times their
// weights.
template <int A, int C, class T>
void Weigh(const float* const* weights, const Tile<T>& tile, int64_t d, const float* by, const Query* q) {
  Vec sums[A][C];
  for (int i = 0; i < A; i++) {
    for (int c = 0; c < C; c++) sums[i][c] = by[i] * Floats(q[i].state->accumulator + d + c * kLanes);
  }
  if (tile.floats) {
    Accumulate<A, C, float>(weights, tile.floats + d, tile.dim, tile.slots, sums);
  } else {
    Accumulate<A, C, T>(weights, tile.values + d, tile.dim, tile.slots, sums);
  }
  for (int i = 0; i < A; i++) std::memcpy(q[i].state->accumulator + d, sums[i], sizeof(sums[i]));
}

// Adds one tile to the online softmax of A queries (Milakov and Gimelshein 2018).
template <int A, class T>
void Attend(const Query* q, const Tile<T>& tile, float scale) {
  alignas(64) float weights[A][kTile];
  const float* rows[A];
  float by[A];
  Score<A>(q, tile, weights);
  for (int i = 0; i < A; i++) {
    const auto only_seen = [&](float* w, float unseen) {
      if (q[i].slots.All(kTile)) return;
      for (int64_t s = 0; s < kTile; s++) w[s] = q[i].slots.Has(s) ? w[s] : unseen;
    };
    SoftmaxState& state = *q[i].state;
    float total = 0, *w = weights[i];
    for (int64_t s = 0; s < kTile; s++) w[s] *= scale;
    only_seen(w, -1e30f);
    Vec most = Floats(w);
    for (int64_t s = kLanes; s < kTile; s += kLanes) most = Larger(most, Floats(w + s));
    const float new_max = std::max(state.running_max, Largest(most));
    for (int64_t s = 0; s < kTile; s++) w[s] = Exp(w[s] - new_max);
    only_seen(w, 0);
    for (int64_t s = 0; s < kTile; s++) total += w[s];
    by[i] = Exp(state.running_max - new_max);
    state.running_max = new_max;
    state.denominator = by[i] * state.denominator + total;
    rows[i] = w;
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= tile.dim; d += 4 * kLanes) Weigh<A, 4>(rows, tile, d, by, q);
  for (; d + 2 * kLanes <= tile.dim; d += 2 * kLanes) Weigh<A, 2>(rows, tile, d, by, q);
  for (; d + kLanes <= tile.dim; d += kLanes) Weigh<A, 1>(rows, tile, d, by, q);
  for (int i = 0; i < A; i++) {
    for (int64_t rest = d; rest < tile.dim; rest++) {
      float sum = by[i] * q[i].state->accumulator[rest];
      for (int64_t s = 0; s < tile.slots; s++) sum += weights[i][s] * Float(tile.values[s * tile.dim + rest]);
      q[i].state->accumulator[rest] = sum;
    }
  }
}

template <class T>
void AttendAll(const std::vector<Query>& q, const Tile<T>& tile, float scale) {
  size_t n = 0;
  for (; n + kQueries <= q.size(); n += kQueries) Attend<kQueries>(&q[n], tile, scale);
  for (; n + 3 <= q.size(); n += 3) Attend<3>(&q[n], tile, scale);
  for (; n < q.size(); n++) Attend<1>(&q[n], tile, scale);
}

}  // namespace rag
