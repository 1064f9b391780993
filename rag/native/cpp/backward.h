// The backward pass of flash attention (Dao et al. 2022), which recomputes the weights of each tile from the saved
// log-sum-exp. With w = exp(scale * q k^T - lse) and delta = rowsum(dout * out) - dlse:
//
//   dv = w^T dout,   ds = scale * w * (dout v^T - delta),   dq = ds k,   dk = ds^T q
//
// Letters: T tokens, G query heads of a kv head, D head dim, S slots. A pair is a row of the batch and a kv head; its
// rows, R = G * T, are the tokens of its first query head, then those of the next.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attend.h"
#include "flash.h"
#include "team.h"

namespace rag {

constexpr int64_t kRows = 64;  // of a block

// A matrix whose element (i, n) is data[i * stride + n * step].
struct Matrix {
  const float* data;
  int64_t stride, step = 1;
};

// Adds the product of a [A, size] and b [size, C vectors] to `out`.
template <int A, int C>
void AddBlock(const Matrix& a, const Matrix& b, int64_t size, float* out, int64_t stride) {
  const float* rows[A];
  for (int i = 0; i < A; i++) rows[i] = a.data + i * a.stride;
  Vec sums[A][C] = {};
  Accumulate<A, C, float>(rows, b.data, b.stride, size, sums, a.step);
  for (int i = 0; i < A; i++) {
    for (int c = 0; c < C; c++) sums[i][c] += Floats(out + i * stride + c * kLanes);
    std::memcpy(out + i * stride, sums[i], sizeof(sums[i]));
  }
}

// Adds the product of a [A, size] and b [size, columns] to `out`.
template <int A>
void AddRows(const Matrix& a, Matrix b, int64_t size, int64_t columns, float* out, int64_t stride) {
  const float* end = out + columns;
  for (; out + 4 * kLanes <= end; out += 4 * kLanes, b.data += 4 * kLanes) AddBlock<A, 4>(a, b, size, out, stride);
  for (; out + 2 * kLanes <= end; out += 2 * kLanes, b.data += 2 * kLanes) AddBlock<A, 2>(a, b, size, out, stride);
  for (; out + kLanes <= end; out += kLanes, b.data += kLanes) AddBlock<A, 1>(a, b, size, out, stride);
  for (; out < end; out++, b.data++) {
    for (int i = 0; i < A; i++) {
      float sum = 0;
      for (int64_t n = 0; n < size; n++) sum += a.data[i * a.stride + n * a.step] * b.data[n * b.stride];
      out[i * stride] += sum;
    }
  }
}

// Adds the product of a [rows, size] and b [size, columns] to `out`.
inline void AddProduct(Matrix a, const Matrix& b, int64_t rows, int64_t size, int64_t columns, float* out,
                       int64_t stride) {
  const auto next = [&](int64_t count) { rows -= count, a.data += count * a.stride, out += count * stride; };
  for (; rows >= kQueries; next(kQueries)) AddRows<kQueries>(a, b, size, columns, out, stride);
  for (; rows >= 3; next(3)) AddRows<3>(a, b, size, columns, out, stride);
  for (; rows >= 1; next(1)) AddRows<1>(a, b, size, columns, out, stride);
}

// The arrays of the forward pass with the cotangents of its results, and the gradients to write.
struct Backward {
  const float *q, *k, *v, *out, *lse, *dout, *dlse;
  float *dq, *dk, *dv;
};

// The visible slots of every token [B, T], and delta [B, H, T]; dq becomes zero.
struct Prepared {
  std::vector<VisibleSlots> visible;
  std::vector<float> delta;

  Prepared(Team& team, const Shape& z, const Mask& mask, const Backward& x)
      : visible(z.rows()), delta(z.rows() * z.heads) {
    EachRow(team, z.rows(), [&](int64_t r) { visible[r] = mask.SlotsOf(z, r); });
    EachRow(team, z.rows() * z.heads, [&](int64_t r) {
      const float *out = x.out + r * z.dim, *dout = x.dout + r * z.dim;
      float sum = 0;
      for (int64_t d = 0; d < z.dim; d++) sum += dout[d] * out[d];
      delta[r] = sum - x.dlse[r];
      std::fill_n(x.dq + r * z.dim, z.dim, 0.0f);
    });
  }
};

// The work of one thread: for one tile of keys after the other it adds to the gradients, block by block of the rows.
class TileGradients {
 public:
  TileGradients(const Shape& z, const Backward& x, const Prepared& prepared, float scale)
      : z_(z), x_(x), prepared_(prepared), scale_(scale), keys_(z.dim * kTile), values_(z.dim * kTile) {}

  // Begins with a pair's tile at `slot`, whose rows of dk and dv become zero.
  void Begin(int64_t pair, int64_t slot) {
    pair_ = pair, slot_ = slot, count_ = std::min(kTile, z_.slots - slot);
    const int64_t at = offset(0);
    std::fill_n(x_.dk + at, count_ * z_.dim, 0.0f);
    std::fill_n(x_.dv + at, count_ * z_.dim, 0.0f);
    Transpose(Tile<float>{x_.k + at, nullptr, nullptr, nullptr, count_, z_.dim}, keys_.data());
    Transpose(Tile<float>{x_.v + at, nullptr, nullptr, nullptr, count_, z_.dim}, values_.data());
  }

  // Finds the rows among [begin, end) that see the tile, and the slots that they see; returns whether there are any.
  bool FindRows(int64_t begin, int64_t end) {
    int64_t past = begin;
    row_ = end, from_ = kTile, to_ = 0;
    for (int64_t r = begin; r < end; r++) {
      VisibleSlots& slots = slots_[r - begin];
      slots = prepared_.visible[pair_ / z_.kv_heads * z_.tokens + r % z_.tokens].Part(slot_, slot_ + count_);
      if (slots.from >= slots.to) continue;
      row_ = std::min(row_, r), past = r + 1;
      from_ = std::min(from_, slots.from), to_ = std::max(to_, slots.to);
    }
    rows_ = past - row_, from_ = from_ / kLanes * kLanes;
    first_ = slots_ + row_ - begin;
    row_ += pair_ * z_.group() * z_.tokens;
    return rows_ > 0;
  }

  // Adds these rows' products to dk and dv; AddToQueries then adds to their dq.
  void AddToKeys() {
    const int64_t width = (to_ - from_ + kLanes - 1) / kLanes * kLanes;
    const Matrix q{x_.q + row_ * z_.dim, z_.dim}, dout{x_.dout + row_ * z_.dim, z_.dim};
    for (int64_t i = 0; i < rows_; i++) {
      std::fill_n(weights_[i], width, 0.0f);
      std::fill_n(dscores_[i], width, -prepared_.delta[row_ + i]);
    }
    AddProduct(q, {keys_.data() + from_, kTile}, rows_, z_.dim, width, weights_[0], kTile);
    AddProduct(dout, {values_.data() + from_, kTile}, rows_, z_.dim, width, dscores_[0], kTile);
    for (int64_t i = 0; i < rows_; i++) {
      float *w = weights_[i], *ds = dscores_[i];
      const float lse = x_.lse[row_ + i];
      for (int64_t s = 0; s < width; s++) {
        w[s] = Exp(scale_ * w[s] - lse);
        ds[s] *= scale_ * w[s];
      }
      const VisibleSlots& slots = first_[i];
      if (slots.from <= from_ && slots.to >= to_ && !slots.ids) continue;
      for (int64_t s = 0; s < width; s++) {
        const bool visible = slots.Has(from_ + s);
        w[s] = visible ? w[s] : 0;
        ds[s] = visible ? ds[s] : 0;
      }
    }
    AddProduct({weights_[0], 1, kTile}, dout, to_ - from_, rows_, z_.dim, x_.dv + offset(from_), z_.dim);
    AddProduct({dscores_[0], 1, kTile}, q, to_ - from_, rows_, z_.dim, x_.dk + offset(from_), z_.dim);
  }

  void AddToQueries() {
    const Matrix keys{x_.k + offset(from_), z_.dim};
    AddProduct({dscores_[0], kTile}, keys, rows_, to_ - from_, z_.dim, x_.dq + row_ * z_.dim, z_.dim);
  }

 private:
  int64_t offset(int64_t s) const { return (pair_ * z_.slots + slot_ + s) * z_.dim; }  // of a slot of the tile

  const Shape& z_;
  const Backward& x_;
  const Prepared& prepared_;
  const float scale_;
  Buffer keys_, values_;         // of the tile, transposed to [D, kTile]
  int64_t pair_, slot_, count_;  // the tile: its pair, its first slot, its slots
  VisibleSlots slots_[kRows];    // that the rows of a block see
  const VisibleSlots* first_;    // of the first row that sees any
  int64_t row_, rows_;           // this row, and the number of rows up to the last such row
  int64_t from_, to_;            // the slots that these rows see
  alignas(64) float weights_[kRows][kTile], dscores_[kRows][kTile];
};

// Computes the gradients of all queries, keys and values. A tile of keys is the work of one thread, so no other writes
// to its rows of dk and dv. To a block of dq its tiles add in their order. So the result has the same bits in every
// run and for any number of threads. No thread waits for a tile that has not been begun.
inline void AttendBackward(Team& team, const Shape& z, const Mask& mask, float scale, const Backward& x) {
  const Prepared prepared(team, z, mask, x);
  const int64_t rows = z.group() * z.tokens, blocks = (rows + kRows - 1) / kRows;
  const int64_t tiles = (z.slots + kTile - 1) / kTile;
  std::vector<std::atomic<int64_t>> turns(z.pairs() * blocks);  // of blocks: the tile that adds next to dq
  std::atomic<int64_t> next{0};
  team.Run([&](int) {
    TileGradients gradients(z, x, prepared, scale);
    for (int64_t n; (n = next++) < tiles * z.pairs();) {
      const int64_t pair = n % z.pairs(), tile = n / z.pairs();
      gradients.Begin(pair, tile * kTile);
      for (int64_t block = 0; block < blocks; block++) {
        const bool any = gradients.FindRows(block * kRows, std::min((block + 1) * kRows, rows));
        if (any) gradients.AddToKeys();
        std::atomic<int64_t>& turn = turns[pair * blocks + block];
        while (turn.load(std::memory_order_acquire) != tile) _mm_pause();
        if (any) gradients.AddToQueries();
        turn.store(tile + 1, std::memory_order_release);
      }
    }
  });
}

}  // namespace rag
