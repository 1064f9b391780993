// One token through one decoder layer with int8 weights, in one call: what XLA does in forty small steps, each of
// which wakes its threads anew. Called through jax.ffi by rag/ops/native.py, which builds this file and says what
// every argument is; rag/models/llama.py has the same maths in JAX.
//
// Letters: M width, F ffn, H query heads, K kv heads, G = H/K, D head dim, S slots of the cache, N outputs.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;

namespace {

// Threads that wait by spinning for a while: the next part of a layer comes in microseconds, waking takes longer.
class Team {
 public:
  explicit Team(int threads) {
    for (int i = 1; i < threads; i++) helpers_.emplace_back([this, i] { Serve(i); });
  }

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  // part(0) .. part(size() - 1), one on each thread; returns when all are done.
  template <class Part>
  void Run(const Part& part) {
    call_ = [](const void* p, int i) { (*static_cast<const Part*>(p))(i); };
    part_ = &part;
    busy_.store(static_cast<int>(helpers_.size()));
    turn_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    part(0);
    while (busy_.load(std::memory_order_acquire) > 0) std::atomic_signal_fence(std::memory_order_seq_cst);
  }

 private:
  void Serve(int i) {
    for (uint64_t seen = 0;;) {
      for (int spins = 0; turn_.load(std::memory_order_acquire) == seen && spins < kSpins; spins++) {
        std::atomic_signal_fence(std::memory_order_seq_cst);
      }
      if (turn_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return turn_.load() != seen; });
        asleep_.fetch_sub(1);
      }
      seen++;
      call_(part_, i);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  static constexpr int kSpins = 200000;  // well under a millisecond
  std::vector<std::thread> helpers_;
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> busy_{0}, asleep_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* part_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

struct Weight {
  const int8_t* values;
  const float* scale;
  int64_t outputs, width;

  Weight(const S8& v, const F32& s)
      : values(v.typed_data()), scale(s.typed_data()), outputs(v.dimensions()[0]), width(v.dimensions()[1]) {}

  float Row(int64_t n, const float* x) const {
    const int8_t* row = values + n * width;
    float sum = 0;
    for (int64_t m = 0; m < width; m++) sum += static_cast<float>(row[m]) * x[m];
    return sum * scale[n];
  }
};

// The n of [0, count) that are thread i's of `threads`.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int i, int threads) : begin(count * i / threads), end(count * (i + 1) / threads) {}
};

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

constexpr int64_t kMostDim = 256;  // of a head

// What one head has attended to: the largest score, the sum of the exponentials, and the values they weigh.
struct Attended {
  float top, total, values[kMostDim];
};

// One head's query against the slots of a share; `weights` is scratch.
void Attend(const float* q, const float* keys, const float* values, Share slots, int64_t dim, float* weights,
            Attended& result) {
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  float top = -1e30f, total = 0, sum[kMostDim] = {};
  for (int64_t s = slots.begin; s < slots.end; s++) {
    float score = 0;
    for (int64_t d = 0; d < dim; d++) score += q[d] * keys[s * dim + d];
    weights[s] = score * scale;
    top = std::max(top, weights[s]);
  }
  for (int64_t s = slots.begin; s < slots.end; s++) {
    weights[s] = std::exp(weights[s] - top);
    total += weights[s];
  }
  for (int64_t s = slots.begin; s < slots.end; s++) {
    const float weight = weights[s];
    for (int64_t d = 0; d < dim; d++) sum[d] += weight * values[s * dim + d];
  }
  result.top = top;
  result.total = total;
  std::copy(sum, sum + dim, result.values);
}

// The shares of one head together, as flash-decoding does it.
void Merge(const std::vector<Attended>& shares, int64_t dim, float* out) {
  float top = -1e30f, total = 0;
  for (const Attended& share : shares) top = std::max(top, share.top);
  std::fill(out, out + dim, 0.0f);
  for (const Attended& share : shares) {
    const float by = std::exp(share.top - top);
    total += by * share.total;
    for (int64_t d = 0; d < dim; d++) out[d] += by * share.values[d];
  }
  for (int64_t d = 0; d < dim; d++) out[d] /= total;
}

ffi::Error DecoderLayer(int64_t threads, float eps, F32 x, ffi::Buffer<ffi::S32> position, F32 cos, F32 sin,
                        F32 norm_1, S8 q, F32 q_s, S8 k, F32 k_s, S8 v, F32 v_s, S8 o, F32 o_s, F32 norm_2, S8 gate,
                        F32 gate_s, S8 up, F32 up_s, S8 down, F32 down_s, F32, F32, ffi::ResultBuffer<ffi::F32> y,
                        ffi::ResultBuffer<ffi::F32> keys, ffi::ResultBuffer<ffi::F32> values) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  static Team* team = new Team(static_cast<int>(threads));  // its threads live as long as the process

  const Weight w_q(q, q_s), w_k(k, k_s), w_v(v, v_s), w_o(o, o_s), w_gate(gate, gate_s), w_up(up, up_s),
      w_down(down, down_s);
  const auto cache = keys->dimensions();  // [1, K, S, D], the same memory as the arguments'
  const int64_t kv_heads = cache[1], slots = cache[2], dim = cache[3], heads = w_q.outputs / dim;
  const int64_t at = std::min<int64_t>(position.typed_data()[0], slots - 1), width = w_q.width;
  const float* in = x.typed_data();
  float *out = y->typed_data(), *K = keys->typed_data(), *V = values->typed_data();

  std::vector<float> h(width), query(heads * dim), attended(heads * dim), middle(w_gate.outputs), x_2(width),
      weights(heads * (at + 1));
  std::vector<std::vector<Attended>> shares(heads, std::vector<Attended>(team->size()));

  Normalise(in, norm_1.typed_data(), eps, width, h.data());
  team->Run([&](int i) {
    const Share a(w_q.outputs, i, team->size()), b(w_k.outputs, i, team->size());
    for (int64_t n = a.begin; n < a.end; n++) query[n] = w_q.Row(n, h.data());
    for (int64_t n = b.begin; n < b.end; n++) {
      const int64_t place = ((n / dim) * slots + at) * dim + n % dim;
      K[place] = w_k.Row(n, h.data());
      V[place] = w_v.Row(n, h.data());
    }
  });
  for (int64_t n = 0; n < kv_heads; n++) {
    Rotate(K + (n * slots + at) * dim, cos.typed_data(), sin.typed_data(), dim / 2);
  }
  for (int64_t n = 0; n < heads; n++) Rotate(&query[n * dim], cos.typed_data(), sin.typed_data(), dim / 2);
  team->Run([&](int i) {  // a share of the slots each, so that the cache is read once
    for (int64_t n = 0; n < heads; n++) {
      const int64_t kv = n / (heads / kv_heads);
      Attend(&query[n * dim], K + kv * slots * dim, V + kv * slots * dim, Share(at + 1, i, team->size()), dim,
             &weights[n * (at + 1)], shares[n][i]);
    }
  });
  for (int64_t n = 0; n < heads; n++) Merge(shares[n], dim, &attended[n * dim]);
  team->Run([&](int i) {
    const Share a(width, i, team->size());
    for (int64_t n = a.begin; n < a.end; n++) x_2[n] = in[n] + w_o.Row(n, attended.data());
  });
  Normalise(x_2.data(), norm_2.typed_data(), eps, width, h.data());
  team->Run([&](int i) {
    const Share a(w_gate.outputs, i, team->size());
    for (int64_t n = a.begin; n < a.end; n++) {
      const float g = w_gate.Row(n, h.data());
      middle[n] = g / (1 + std::exp(-g)) * w_up.Row(n, h.data());
    }
  });
  team->Run([&](int i) {
    const Share a(width, i, team->size());
    for (int64_t n = a.begin; n < a.end; n++) out[n] = x_2[n] + w_down.Row(n, middle.data());
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagDecoderLayer, DecoderLayer,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("threads")
                                  .Attr<float>("eps")
                                  .Arg<F32>()                    // x [1, 1, M]
                                  .Arg<ffi::Buffer<ffi::S32>>()  // position [1]
                                  .Arg<F32>()                    // cos [D/2]
                                  .Arg<F32>()                    // sin [D/2]
                                  .Arg<F32>()                    // input_layernorm [M]
                                  .Arg<S8>()                     // q [HD, M]
                                  .Arg<F32>()
                                  .Arg<S8>()  // k [KD, M]
                                  .Arg<F32>()
                                  .Arg<S8>()  // v [KD, M]
                                  .Arg<F32>()
                                  .Arg<S8>()  // o [M, HD]
                                  .Arg<F32>()
                                  .Arg<F32>()  // post_attention_layernorm [M]
                                  .Arg<S8>()   // gate [F, M]
                                  .Arg<F32>()
                                  .Arg<S8>()  // up [F, M]
                                  .Arg<F32>()
                                  .Arg<S8>()  // down [M, F]
                                  .Arg<F32>()
                                  .Arg<F32>()    // keys [1, K, S, D], aliased with the result
                                  .Arg<F32>()    // values [1, K, S, D], aliased with the result
                                  .Ret<F32>()    // x [1, 1, M]
                                  .Ret<F32>()    // keys
                                  .Ret<F32>());  // values
