// Which queries attend to which tiles on which thread: many queries in blocks, as flash attention (Dao et al. 2022) has
// them, or few that share the slots among the threads, as flash-decoding does.
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

constexpr int64_t kBlock = 192;  // queries at most that share a tile once it is laid out

struct Shape {
  int64_t batch, tokens, heads, kv_heads, slots, dim;
  int64_t rows() const { return batch * tokens; }
  int64_t group() const { return heads / kv_heads; }
  int64_t pairs() const { return batch * kv_heads; }
};

// What each token sees, [B, T]: the slots [from, to), where `from` may be null, which is 0; with segments, [B, T] and
// [B, S], only those of its own id, and with a negative id nothing.
struct Seen {
  const int32_t *from, *to, *segments = nullptr, *slot_segments = nullptr;

  // The query of token r: no slot before `from` or from `to` on is seen.
  Query Of(const Shape& z, int64_t r, const float* vector, Attended* result) const {
    Query q{vector, from ? from[r] : 0, to[r], result};
    if (!segments || q.from >= q.to) return q;
    const int32_t* ids = slot_segments + r / z.tokens * z.slots;
    q.id = segments[r];
    if (q.id < 0) q.to = q.from;
    while (q.from + 16 <= q.to && !std::count(ids + q.from, ids + q.from + 16, q.id)) q.from += 16;
    while (q.from < q.to && ids[q.from] != q.id) q.from++;
    while (q.from + 16 <= q.to && !std::count(ids + q.to - 16, ids + q.to, q.id)) q.to -= 16;
    while (q.from < q.to && ids[q.to - 1] != q.id) q.to--;
    if (std::any_of(ids + q.from, ids + q.to, [&](int32_t id) { return id != q.id; })) q.ids = ids;
    return q;
  }
};

// A thread's tiles, one at a time: laid out for many queries in memory of its own.
template <class T>
class Tiles {
 public:
  Tiles(const Shape& z, const T* keys, const T* values)
      : z_(z), keys_(keys), values_(values), transposed_(z.dim * kTile), floats_(sizeof(T) == 4 ? 0 : z.dim * kTile) {}

  // Queries of a pair of a row and a kv head against slots [begin, end), in tiles that are laid out for `many` or more.
  void Attend(int64_t pair, int64_t begin, int64_t end, const std::vector<Query>& queries, size_t many, float scale) {
    for (int64_t s = begin; s < end; s += kTile) {
      const int64_t count = std::min(kTile, end - s);
      some_.clear();
      for (const Query& q : queries) {
        const int64_t from = std::max<int64_t>(q.from - s, 0), to = std::min(q.to - s, count);
        if (from < to) some_.push_back({q.vector, from, to, q.result, q.ids ? q.ids + s : nullptr, q.id});
      }
      if (!some_.empty()) AttendAll(some_, At(pair, s, count, some_.size() >= many), scale);
    }
  }

 private:
  // Slots [s, s + count).
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

// Tokens [first, past) of a row and the query heads [head, head + group) of one kv head.
struct QueryBlock {
  int64_t pair, first, past, head;

  // Block n of all, the last ones first: of a causal sequence they see the most.
  QueryBlock(const Shape& z, int64_t n, int64_t blocks, int64_t tokens) : pair(n % z.pairs()) {
    const int64_t begin = (blocks - 1 - n / z.pairs()) * tokens;
    first = pair / z.kv_heads * z.tokens + begin;
    past = first + std::min(tokens, z.tokens - begin);
    head = pair % z.kv_heads * z.group();
  }
};

// Many queries: query(r, h) is the vector of token r and head h, done(r, h, attended) takes what it has found.
template <class T, class Vector, class Done>
void AttendInBlocks(Team& team, const Shape& z, const T* keys, const T* values, const Seen& seen, float scale,
                    const Vector& query, const Done& done) {
  const int64_t even = (z.tokens * z.pairs() + 4 * team.size() - 1) / (4 * team.size());  // four blocks a thread
  const int64_t tokens = std::max<int64_t>(1, std::min(even, kBlock / z.group()));
  const int64_t blocks = (z.tokens + tokens - 1) / tokens;
  std::atomic<int64_t> next{0};
  team.Run([&](int) {
    Tiles<T> tiles(z, keys, values);
    std::vector<Attended> results(tokens * z.group());
    std::vector<Query> queries;
    for (int64_t n; (n = next++) < blocks * z.pairs();) {
      const QueryBlock block(z, n, blocks, tokens);
      const auto each = [&](const auto& part) {
        for (int64_t r = block.first, i = 0; r < block.past; r++) {
          for (int64_t h = block.head; h < block.head + z.group(); h++) part(r, h, results[i++]);
        }
      };
      int64_t low = z.slots, high = 0;
      queries.clear();
      each([&](int64_t r, int64_t h, Attended& result) {
        result.Clear(z.dim);
        queries.push_back(seen.Of(z, r, query(r, h), &result));
        low = std::min(low, queries.back().from), high = std::max(high, queries.back().to);
      });
      tiles.Attend(block.pair, low / kTile * kTile, high, queries, 0, scale);
      each(done);
    }
  });
}

// Few queries [R, H, D]: each thread attends to a share of the slots for all of them, so that keys and values are read
// once. results [R, H, threads], to be merged.
template <class T>
void AttendToShares(Team& team, const Shape& z, const T* keys, const T* values, const Seen& seen, float scale,
                    const float* query, Attended* results) {
  constexpr size_t kMany = 8;  // queries, from which on laying out a tile pays
  team.Run([&](int i) {
    Tiles<T> tiles(z, keys, values);
    std::vector<Query> queries;
    for (int64_t pair = 0; pair < z.pairs(); pair++) {
      const QueryBlock block(z, pair, 1, z.tokens);
      queries.clear();
      for (int64_t r = block.first; r < block.past; r++) {
        for (int64_t n = r * z.heads + block.head; n < r * z.heads + block.head + z.group(); n++) {
          Attended& result = results[n * team.size() + i];
          result.Clear(z.dim);
          queries.push_back(seen.Of(z, r, query + n * z.dim, &result));
        }
      }
      const Share share(*std::max_element(seen.to + block.first, seen.to + block.past), i, team.size());
      tiles.Attend(pair, share.begin, share.end, queries, kMany, scale);
    }
  });
}

// The threads' shares of a query together.
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

}  // namespace rag
