// A few tokens through all layers of a decoder with int8 weights, in one call: what XLA does in forty small steps a
// layer, each of which wakes its threads anew. Called through jax.ffi by rag/ops/native.py, which builds this file
// and says what every argument is; rag/models/llama.py has the same maths in JAX.
//
// Letters: B batch, T tokens a row of it, R = B * T, M width, F ffn, H query heads, K kv heads, D head dim,
// S slots of the cache, N outputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "products.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using F16 = ffi::Buffer<ffi::F16>;
using S32 = ffi::Buffer<ffi::S32>;

namespace rag {
namespace {

Weight WeightOf(const S8& values, const F32& scale) {
  return {values.typed_data(), scale.typed_data(), values.dimensions()[0], values.dimensions()[1]};
}

void Normalise(const float* x, const float* weight, float eps, int64_t width, float* out) {
  float sum = 0;
  for (int64_t m = 0; m < width; m++) sum += x[m] * x[m];
  const float by = 1 / std::sqrt(sum / width + eps);
  for (int64_t m = 0; m < width; m++) out[m] = x[m] * by * weight[m];
}

void Rotate(float* x, const float* cos, const float* sin, int64_t half) {
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

// What layers write on their way, one after another.
struct Scratch {
  Input h, attended, middle;
  Buffer q, k, v, gate, up;
  std::vector<Attended> results;  // [R, H, shares]

  void Resize(const Shape& z, int64_t ffn, int threads) {
    const int64_t rows = z.rows(), kv = rows * z.kv_heads * z.dim;
    h.Resize(rows, z.width);
    attended.Resize(rows, z.heads * z.dim);
    middle.Resize(rows, ffn);
    q.Resize(rows * z.heads * z.dim), k.Resize(kv), v.Resize(kv);
    gate.Resize(rows * ffn), up.Resize(rows * ffn);
    results.resize(rows * z.heads * z.shares(threads));
  }
};

// One layer, in place: x [R, M].
void Run(Team& team, const Layer& l, const Shape& z, float eps, const int32_t* positions, const float* cos,
         const float* sin, float* x, Scratch& s) {
  const int64_t rows = z.rows(), ffn = l.gate.outputs, half = z.dim / 2;
  const int threads = team.size(), shares = z.shares(threads);
  const auto each_row = [&](const auto& part) { EachRow(team, rows, part); };
  const auto normalised = [&](const float* weight) {
    each_row([&](int64_t r) {
      Normalise(x + r * z.width, weight, eps, z.width, s.h.row(r));
      s.h.Finish(r);
    });
  };

  normalised(l.norm_1);
  team.Run([&](int i) {
    s.h.Multiply(l.q, i, threads, s.q.data());
    s.h.Multiply(l.k, i, threads, s.k.data());
    s.h.Multiply(l.v, i, threads, s.v.data());
  });
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t n = 0; n < z.heads; n++) Rotate(&s.q[(r * z.heads + n) * z.dim], cos + r * half, sin + r * half, half);
    for (int64_t n = 0; n < z.kv_heads; n++) {
      float *k = &s.k[(r * z.kv_heads + n) * z.dim], *v = &s.v[(r * z.kv_heads + n) * z.dim];
      const int64_t slot = (((r / z.tokens) * z.kv_heads + n) * z.slots + positions[r]) * z.dim;
      Rotate(k, cos + r * half, sin + r * half, half);
      Copy(k, z.dim, l.keys + slot);
      Copy(v, z.dim, l.values + slot);
    }
  }
  team.Run([&](int i) { AttendShare(z, s.q.data(), l.keys, l.values, positions, i, threads, s.results.data()); });
  each_row([&](int64_t r) {
    for (int64_t n = 0; n < z.heads; n++) {
      Merge(&s.results[(r * z.heads + n) * shares], shares, z.dim, s.attended.row(r) + n * z.dim);
    }
    s.attended.Finish(r);
  });
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

// ---- What jax.ffi calls

constexpr int64_t kLayerArguments = 18;  // two norms, seven weights with their scales, keys and values

ffi::Error Decoder(ffi::ThreadPool pool, int64_t threads, float eps, F32 x, S32 at, F32 cos, F32 sin,
                   ffi::RemainingArgs arguments, ffi::ResultBuffer<ffi::F32> y, ffi::RemainingRets caches) {
  Team team(pool, threads);
  const auto f32 = [&](size_t i) { return *arguments.get<F32>(i); };
  const auto weight = [&](size_t i) { return WeightOf(*arguments.get<S8>(i), *arguments.get<F32>(i + 1)); };
  const auto cache = [&](size_t i) { return *caches.get<F16>(i); };
  const auto shape = cache(0)->dimensions(), in = x.dimensions();
  const Shape z{in[0], in[1], in[2], weight(1).outputs / shape[3], shape[1], shape[2], shape[3]};

  std::vector<int32_t> positions(at.typed_data(), at.typed_data() + z.rows());
  for (int32_t& position : positions) position = std::min<int32_t>(position, z.slots - 1);
  std::copy(x.typed_data(), x.typed_data() + x.element_count(), y->typed_data());
  static Scratch scratch;  // its turn is ours
  scratch.Resize(z, weight(10).outputs, team.size());
  for (size_t n = 0; n < arguments.size() / kLayerArguments; n++) {
    const size_t i = n * kLayerArguments;
    const Layer layer{f32(i).typed_data(),      weight(i + 1),  weight(i + 3),  weight(i + 5),
                      weight(i + 7),            f32(i + 9).typed_data(), weight(i + 10), weight(i + 12),
                      weight(i + 14),           cache(2 * n)->typed_data(), cache(2 * n + 1)->typed_data()};
    Run(team, layer, z, eps, positions.data(), cos.typed_data(), sin.typed_data(), y->typed_data(), scratch);
  }
  return ffi::Error::Success();
}

ffi::Error Linear(ffi::ThreadPool pool, int64_t threads, F32 x, S8 values, F32 scale, ffi::ResultBuffer<ffi::F32> y) {
  Team team(pool, threads);
  const Weight weight = WeightOf(values, scale);
  const int64_t rows = x.dimensions()[0];
  static Input input;  // its turn is ours
  input.Resize(rows, weight.width, x.typed_data());
  EachRow(team, rows, [&](int64_t r) { input.Finish(r); });
  team.Run([&](int i) { input.Multiply(weight, i, team.size(), y->typed_data()); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace rag

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagDecoder, rag::Decoder,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Attr<float>("eps")
                                  .Arg<F32>()       // x [B, T, M]
                                  .Arg<S32>()       // positions [B, T]
                                  .Arg<F32>()       // cos [B, T, D/2]
                                  .Arg<F32>()       // sin [B, T, D/2]
                                  .RemainingArgs()  // kLayerArguments of each layer
                                  .Ret<F32>()       // x [B, T, M]
                                  .RemainingRets());  // keys and values of each layer, in the arguments' memory

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagLinear, rag::Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<F32>()     // x [R, M]
                                  .Arg<S8>()      // values [N, M]
                                  .Arg<F32>()     // scale [N]
                                  .Ret<F32>());   // [R, N]

// Whether several tokens cost hardly more than one: products then go through the matrix unit.
extern "C" bool RagHasTiles() {
#ifdef __AMX_INT8__
  return rag::HasTiles();
#else
  return false;
#endif
}
