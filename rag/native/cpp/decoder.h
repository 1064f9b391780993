// A layer of a decoder with int8 weights; rag/models/llama/model.py has the same maths in JAX.
//
// Letters: B batch, T tokens a row of it, R = B * T, M width, F ffn, H query heads, K kv heads, D head dim,
// S slots of the cache.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "flash.h"
#include "products.h"
#include "team.h"

namespace rag {

inline void Normalise(const float* x, const float* weight, float eps, int64_t width, float* out) {
  float sum = 0;
  for (int64_t m = 0; m < width; m++) sum += x[m] * x[m];
  const float by = 1 / std::sqrt(sum / width + eps);
  for (int64_t m = 0; m < width; m++) out[m] = x[m] * by * weight[m];
}

inline void Rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t r = 0; r < half; r++) {
    const float first = x[r], second = x[r + half];
    x[r] = first * cos[r] - second * sin[r];
    x[r + half] = second * cos[r] + first * sin[r];
  }
}

struct Layer {
  const float* norm_1;
  Weight q, k, v, o;
  const float* norm_2;
  Weight gate, up, down;
  Half *keys, *values;  // [B, K, S, D]
};

// Whether the tokens are distributed to the threads, and not the slots that they see.
inline bool InBlocks(const Shape& z, int threads) { return z.rows() >= 16 * threads; }

// Intermediate results of a layer, reused by the next.
struct Scratch {
  Input h, attended, middle;
  Buffer q, k, v, gate, up;
  std::vector<SoftmaxState> states;  // [R, H, threads]

  void Resize(const Shape& z, int64_t width, int64_t ffn, int threads) {
    const int64_t rows = z.rows(), kv = rows * z.kv_heads * z.dim;
    h.Resize(rows, width);
    attended.Resize(rows, z.heads * z.dim);
    middle.Resize(rows, ffn);
    q.Resize(rows * z.heads * z.dim), k.Resize(kv), v.Resize(kv);
    gate.Resize(rows * ffn), up.Resize(rows * ffn);
    if (!InBlocks(z, threads)) states.resize(rows * z.heads * threads);
  }
};

// Computes the attention of all tokens to the cache, from s.q to s.attended; token r sees the slots [0, past[r]).
inline void AttendToCache(Team& team, const Shape& z, const Layer& l, const int32_t* past, Scratch& s) {
  const Mask mask{nullptr, past};
  const float scale = 1 / std::sqrt(static_cast<float>(z.dim));
  const auto out = [&](int64_t r, int64_t h) { return s.attended.row(r) + h * z.dim; };
  if (InBlocks(z, team.size())) {
    const auto query = [&](int64_t r, int64_t h) { return &s.q[(r * z.heads + h) * z.dim]; };
    const auto done = [&](int64_t r, int64_t h, const SoftmaxState& state) { state.Write(z.dim, out(r, h)); };
    AttendInBlocks(team, z, l.keys, l.values, mask, scale, query, done);
  } else {
    AttendToShares(team, z, l.keys, l.values, mask, scale, s.q.data(), s.states.data());
    EachRow(team, z.rows(), [&](int64_t r) {
      for (int64_t h = 0; h < z.heads; h++) {
        Merge(&s.states[(r * z.heads + h) * team.size()], team.size(), z.dim, out(r, h));
      }
    });
  }
  EachRow(team, z.rows(), [&](int64_t r) { s.attended.Finish(r); });
}

// Runs one layer in place: x [R, M]. Token r sees the slots [0, past[r]), and its key and value are written to the last
// of these.
inline void Run(Team& team, const Layer& l, const Shape& z, float eps, const int32_t* past, const float* cos,
                const float* sin, float* x, Scratch& s) {
  const int64_t rows = z.rows(), width = l.q.width, ffn = l.gate.outputs, half = z.dim / 2;
  const int threads = team.size();
  const auto each_row = [&](const auto& part) { EachRow(team, rows, part); };
  const auto normalised = [&](const float* weight) {
    each_row([&](int64_t r) {
      Normalise(x + r * width, weight, eps, width, s.h.row(r));
      s.h.Finish(r);
    });
  };

  normalised(l.norm_1);
  team.Run([&](int i) {
    s.h.Multiply(l.q, i, threads, s.q.data());
    s.h.Multiply(l.k, i, threads, s.k.data());
    s.h.Multiply(l.v, i, threads, s.v.data());
  });
  each_row([&](int64_t r) {
    for (int64_t n = 0; n < z.heads; n++) Rotate(&s.q[(r * z.heads + n) * z.dim], cos + r * half, sin + r * half, half);
    for (int64_t n = 0; n < z.kv_heads; n++) {
      Rotate(&s.k[(r * z.kv_heads + n) * z.dim], cos + r * half, sin + r * half, half);
    }
  });
  for (int64_t r = 0; r < rows; r++) {  // by one thread, since several padding tokens may have the same slot
    for (int64_t n = 0; n < z.kv_heads; n++) {
      const int64_t slot = ((r / z.tokens * z.kv_heads + n) * z.slots + past[r] - 1) * z.dim;
      Copy(&s.k[(r * z.kv_heads + n) * z.dim], z.dim, l.keys + slot);
      Copy(&s.v[(r * z.kv_heads + n) * z.dim], z.dim, l.values + slot);
    }
  }
  AttendToCache(team, z, l, past, s);
  team.Run([&](int i) { s.attended.Multiply(l.o, i, threads, x, true); });
  normalised(l.norm_2);
  team.Run([&](int i) {
    s.h.Multiply(l.gate, i, threads, s.gate.data());
    s.h.Multiply(l.up, i, threads, s.up.data());
    const Share share(ffn, i, threads);
    for (int64_t r = 0; r < rows; r++) {
      const float *gate = &s.gate[r * ffn], *up = &s.up[r * ffn];
      for (int64_t n = share.begin; n < share.end; n++) s.middle.row(r)[n] = Silu(gate[n]) * up[n];
    }
  });
  each_row([&](int64_t r) { s.middle.Finish(r); });
  team.Run([&](int i) { s.middle.Multiply(l.down, i, threads, x, true); });
}

}  // namespace rag
