// The distribution of attention to threads: many queries in blocks, as in flash attention (Dao et al. 2022), or few
// queries with the slots split among the threads, as in flash-decoding (Dao et al. 2023).
//
// Letters: B batch, T tokens a row of it, R = B * T, H query heads, K kv heads, D head dim, S slots of keys and values.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "team.h"

namespace rag {

constexpr int64_t kBlock = 192;  // the most queries that share a tile once it is prepared

struct Shape {
  int64_t batch, tokens, heads, kv_heads, slots, dim;
  int64_t rows() const { return batch * tokens; }
  int64_t group() const { return heads / kv_heads; }
  int64_t pairs() const { return batch * kv_heads; }
};

// The attention mask. Each token sees the slots [from, to), both [B, T]; `from` may be null, which is 0. With segments,
// [B, T] and [B, S], it sees only slots of its own id and of its prefix's [B, T], and with a negative id none.
struct Mask {
  const int32_t *from, *to, *segments = nullptr, *slot_segments = nullptr, *prefixes = nullptr;

  VisibleSlots SlotsOf(const Shape& z, int64_t r) const {
    VisibleSlots slots{from ? from[r] : 0, to[r]};
    if (!segments) return slots;
    slots.ids = slot_segments + r / z.tokens * z.slots;
    slots.id = segments[r], slots.prefix = prefixes[r];
    if (slots.id < 0) slots.to = slots.from;
    return slots.Part(0, z.slots);
  }
};

// Makes the tiles of one thread, one at a time; for many queries in memory of its own.
template <class T>
class Tiles {
 public:
  Tiles(const Shape& z, const T* keys, const T* values)
      : z_(z), keys_(keys), values_(values), transposed_(z.dim * kTile), floats_(sizeof(T) == 4 ? 0 : z.dim * kTile) {}

  // Attends with the queries of a pair of a row and a kv head to the slots [begin, end). A tile that at least `many`
  // queries see is prepared: its keys transposed, its values converted.
  void Attend(int64_t pair, int64_t begin, int64_t end, const std::vector<Query>& queries, size_t many, float scale) {
    for (int64_t s = begin; s < end; s += kTile) {
      const int64_t count = std::min(kTile, end - s);
      some_.clear();
      for (const Query& q : queries) {
        const VisibleSlots slots = q.slots.Part(s, s + count);
        if (slots.from < slots.to) some_.push_back({q.vector, q.state, slots});
      }
      if (!some_.empty()) AttendAll(some_, At(pair, s, count, some_.size() >= many), scale);
    }
  }

 private:
  // Returns the tile of the slots [s, s + count).
  Tile<T> At(int64_t pair, int64_t s, int64_t count, bool many) {
    const int64_t offset = (pair * z_.slots + s) * z_.dim;
    Tile<T> tile{keys_ + offset, values_ + offset, nullptr, nullptr, count, z_.dim};
    if (!many) return tile;
    Transpose(tile, transposed_.data());
    tile.transposed = transposed_.data();
    tile.floats = AsFloats(tile.values, count * z_.dim);
    return tile;
  }

  const float* AsFloats(const float* values, int64_t) { return values; }
  const float* AsFloats(const Half* values, int64_t size) {
    Copy(values, size, floats_.data());
    return floats_.data();
  }

  const Shape& z_;
  const T *keys_, *values_;
  Buffer transposed_, floats_;
  std::vector<Query> some_;
};

// A block of queries: the tokens [first, past) of a row and the query heads [head, head + group) of one kv head.
struct QueryBlock {
  int64_t pair, first, past, head;

  // Block n of all, the last tokens first: in a causal sequence they see the most slots.
  QueryBlock(const Shape& z, int64_t n, int64_t blocks, int64_t tokens) : pair(n % z.pairs()) {
    const int64_t begin = (blocks - 1 - n / z.pairs()) * tokens;
    first = pair / z.kv_heads * z.tokens + begin;
    past = first + std::min(tokens, z.tokens - begin);
    head = pair % z.kv_heads * z.group();
  }
};

// Attention of many queries: query(r, h) returns the vector of token r and head h, done(r, h, state) takes its result.
template <class T, class Vector, class Done>
void AttendInBlocks(Team& team, const Shape& z, const T* keys, const T* values, const Mask& mask, float scale,
                    const Vector& query, const Done& done) {
  const int64_t even = (z.tokens * z.pairs() + 4 * team.size() - 1) / (4 * team.size());  // four blocks a thread
  const int64_t tokens = std::max<int64_t>(1, std::min(even, kBlock / z.group()));
  const int64_t blocks = (z.tokens + tokens - 1) / tokens;
  std::atomic<int64_t> next{0};
  team.Run([&](int) {
    Tiles<T> tiles(z, keys, values);
    std::vector<SoftmaxState> states(tokens * z.group());
    std::vector<Query> queries;
    for (int64_t n; (n = next++) < blocks * z.pairs();) {
      const QueryBlock block(z, n, blocks, tokens);
      const auto each = [&](const auto& part) {
        for (int64_t r = block.first, i = 0; r < block.past; r++) {
          for (int64_t h = block.head; h < block.head + z.group(); h++) part(r, h, states[i++]);
        }
      };
      int64_t low = z.slots, high = 0;
      queries.clear();
      each([&](int64_t r, int64_t h, SoftmaxState& state) {
        state.Clear(z.dim);
        queries.push_back({query(r, h), &state, mask.SlotsOf(z, r)});
        low = std::min(low, queries.back().slots.from), high = std::max(high, queries.back().slots.to);
      });
      tiles.Attend(block.pair, low / kTile * kTile, high, queries, 0, scale);
      each(done);
    }
  });
}

// Attention of few queries [R, H, D]: each thread attends with all of them to a share of the slots, so that keys and
// values are read once. Writes states [R, H, threads], to be merged.
template <class T>
void AttendToShares(Team& team, const Shape& z, const T* keys, const T* values, const Mask& mask, float scale,
                    const float* query, SoftmaxState* states) {
  constexpr size_t kMany = 8;  // queries from which on it pays to prepare a tile
  team.Run([&](int i) {
    Tiles<T> tiles(z, keys, values);
    std::vector<Query> queries;
    for (int64_t pair = 0; pair < z.pairs(); pair++) {
      const QueryBlock block(z, pair, 1, z.tokens);
      queries.clear();
      for (int64_t r = block.first; r < block.past; r++) {
        for (int64_t n = r * z.heads + block.head; n < r * z.heads + block.head + z.group(); n++) {
          SoftmaxState& state = states[n * team.size() + i];
          state.Clear(z.dim);
          queries.push_back({query + n * z.dim, &state, mask.SlotsOf(z, r)});
        }
      }
      const Share share(*std::max_element(mask.to + block.first, mask.to + block.past), i, team.size());
      tiles.Attend(pair, share.begin, share.end, queries, kMany, scale);
    }
  });
}

// Merges the threads' states of one query and writes the output: zeros if none of them saw a slot.
inline void Merge(const SoftmaxState* states, int64_t count, int64_t dim, float* out) {
  SoftmaxState merged;
  merged.Clear(dim);
  for (int64_t i = 0; i < count; i++) merged.running_max = std::max(merged.running_max, states[i].running_max);
  for (int64_t i = 0; i < count; i++) {
    const float by = Exp(states[i].running_max - merged.running_max);
    merged.denominator += by * states[i].denominator;
    for (int64_t d = 0; d < dim; d++) merged.accumulator[d] += by * states[i].accumulator[d];
  }
  merged.Write(dim, out);
}

}  // namespace rag
