// The functions that jax.ffi calls. rag/native/build.py builds this file, rag/native/__init__.py documents the
// arguments.
//
// Letters: B batch, T tokens a row of it, R rows of a product, M width, H query heads, K kv heads, D head dim,
// S slots of keys and values, O outputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "backward.h"
#include "decoder.h"
#include "flash.h"
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

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kLayerArguments = 18;  // two norms, seven weights with their scales, keys and values

ffi::Error Decoder(ffi::ThreadPool pool, int64_t threads, float eps, F32 x, S32 at, F32 cos, F32 sin,
                   ffi::RemainingArgs arguments, ffi::ResultBuffer<ffi::F32> y, ffi::RemainingRets caches) {
  Team team(pool, threads);
  const auto f32 = [&](size_t i) { return *arguments.get<F32>(i); };
  const auto weight = [&](size_t i) { return WeightOf(*arguments.get<S8>(i), *arguments.get<F32>(i + 1)); };
  const auto cache = [&](size_t i) { return *caches.get<F16>(i); };
  const auto shape = cache(0)->dimensions(), in = x.dimensions();
  const Shape z{in[0], in[1], weight(1).outputs / shape[3], shape[1], shape[2], shape[3]};

  std::vector<int32_t> past(at.typed_data(), at.typed_data() + z.rows());
  for (int32_t& slot : past) {
    if (slot < 0 || slot >= z.slots) return ffi::Error::InvalidArgument("a token's position is outside of the cache");
    slot++;
  }
  std::copy(x.typed_data(), x.typed_data() + x.element_count(), y->typed_data());
  static Scratch scratch;  // safe: Team admits one call at a time
  scratch.Resize(z, in[2], weight(10).outputs, team.size());
  for (size_t n = 0; n < arguments.size() / kLayerArguments; n++) {
    const size_t i = n * kLayerArguments;
    const Layer layer{f32(i).typed_data(),      weight(i + 1),  weight(i + 3),  weight(i + 5),
                      weight(i + 7),            f32(i + 9).typed_data(), weight(i + 10), weight(i + 12),
                      weight(i + 14),           cache(2 * n)->typed_data(), cache(2 * n + 1)->typed_data()};
    Run(team, layer, z, eps, past.data(), cos.typed_data(), sin.typed_data(), y->typed_data(), scratch);
  }
  return ffi::Error::Success();
}

Shape ShapeOf(const F32& q, const F32& k) {
  const auto queries = q.dimensions(), keys = k.dimensions();
  return {queries[0], queries[2], queries[1], keys[1], keys[2], keys[3]};
}

Mask MaskOf(const S32& from, const S32& to, const S32& segments, const S32& slot_segments, const S32& prefixes) {
  if (!segments.element_count()) return {from.typed_data(), to.typed_data()};
  return {from.typed_data(), to.typed_data(), segments.typed_data(), slot_segments.typed_data(), prefixes.typed_data()};
}

ffi::Error Attention(ffi::ThreadPool pool, int64_t threads, float scale, F32 q, F32 k, F32 v, S32 from, S32 to,
                     S32 segments, S32 slot_segments, S32 prefixes, ffi::ResultBuffer<ffi::F32> out,
                     ffi::ResultBuffer<ffi::F32> lse) {
  Team team(pool, threads);
  const Shape z = ShapeOf(q, k);
  const auto index = [&](int64_t r, int64_t h) { return (r / z.tokens * z.heads + h) * z.tokens + r % z.tokens; };
  const auto query = [&](int64_t r, int64_t h) { return q.typed_data() + index(r, h) * z.dim; };
  const auto done = [&](int64_t r, int64_t h, const SoftmaxState& state) {
    state.Write(z.dim, out->typed_data() + index(r, h) * z.dim);
    float& row_lse = lse->typed_data()[index(r, h)];
    row_lse = state.denominator == 0 ? -kInfinity : state.running_max + std::log(state.denominator);
  };
  const Mask mask = MaskOf(from, to, segments, slot_segments, prefixes);
  AttendInBlocks(team, z, k.typed_data(), v.typed_data(), mask, scale, query, done);
  return ffi::Error::Success();
}

ffi::Error AttentionBackward(ffi::ThreadPool pool, int64_t threads, float scale, F32 q, F32 k, F32 v, S32 from, S32 to,
                             S32 segments, S32 slot_segments, S32 prefixes, F32 out, F32 lse, F32 dout, F32 dlse,
                             ffi::ResultBuffer<ffi::F32> dq, ffi::ResultBuffer<ffi::F32> dk,
                             ffi::ResultBuffer<ffi::F32> dv) {
  Team team(pool, threads);
  const Backward arrays{q.typed_data(),    k.typed_data(),    v.typed_data(),   out.typed_data(), lse.typed_data(),
                        dout.typed_data(), dlse.typed_data(), dq->typed_data(), dk->typed_data(), dv->typed_data()};
  const Mask mask = MaskOf(from, to, segments, slot_segments, prefixes);
  AttendBackward(team, ShapeOf(q, k), mask, scale, arrays);
  return ffi::Error::Success();
}

ffi::Error Linear(ffi::ThreadPool pool, int64_t threads, F32 x, S8 values, F32 scale, ffi::ResultBuffer<ffi::F32> y) {
  Team team(pool, threads);
  const Weight weight = WeightOf(values, scale);
  const int64_t rows = x.dimensions()[0];
  static Input input;  // safe: Team admits one call at a time
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagAttention, rag::Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Attr<float>("scale")
                                  .Arg<F32>()     // q [B, H, T, D]
                                  .Arg<F32>()     // k [B, K, S, D]
                                  .Arg<F32>()     // v [B, K, S, D]
                                  .Arg<S32>()     // from [B, T]
                                  .Arg<S32>()     // to [B, T]
                                  .Arg<S32>()     // segments [B, T], or empty
                                  .Arg<S32>()     // segments of slots [B, S], or empty
                                  .Arg<S32>()     // segments of the prefixes [B, T], or empty
                                  .Ret<F32>()     // [B, H, T, D]
                                  .Ret<F32>());   // log-sum-exp [B, H, T]

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagAttentionBackward, rag::AttentionBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Attr<float>("scale")
                                  .Arg<F32>()     // q, k, v and the mask: as of RagAttention
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<F32>()     // its results [B, H, T, D] and [B, H, T]
                                  .Arg<F32>()
                                  .Arg<F32>()     // the cotangents of these
                                  .Arg<F32>()
                                  .Ret<F32>()     // the gradients of q, k and v
                                  .Ret<F32>()
                                  .Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagLinear, rag::Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<F32>()     // x [R, M]
                                  .Arg<S8>()      // values [O, M]
                                  .Arg<F32>()     // scale [O]
                                  .Ret<F32>());   // [R, O]

// Whether products use the tiles of AMX: several tokens then cost hardly more than one.
extern "C" bool RagHasTiles() {
#ifdef __AMX_INT8__
  return rag::HasTiles();
#else
  return false;
#endif
}
