// A few tokens through all layers of a decoder with int8 weights, in one call: what XLA does in forty small steps a
// layer, each of which wakes its threads anew. Called through jax.ffi by rag/ops/native.py, which builds this file
// and says what every argument is; rag/models/llama.py has the same maths in JAX.
//
// Letters: B batch, T tokens a row of it, R = B * T, M width, F ffn, H query heads, K kv heads, D head dim,
// S slots of the cache, N outputs.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <immintrin.h>
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using S32 = ffi::Buffer<ffi::S32>;

namespace {

// ---- Threads

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

// The process's one team, for one call at a time. Its threads live as long as the process.
struct Turn {
  explicit Turn(int64_t threads) : lock(mutex) {
    if (!made) made = new Team(static_cast<int>(threads));
  }
  Team* operator->() const { return made; }

  static inline std::mutex mutex;
  static inline Team* made = nullptr;
  std::lock_guard<std::mutex> lock;
};

// The n of [0, count) that are thread i's of `threads`, in whole blocks of 16 but for the last.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int i, int threads) : begin(Start(count, i, threads)), end(Start(count, i + 1, threads)) {}
  static int64_t Start(int64_t count, int i, int threads) { return i == threads ? count : count / 16 * i / threads * 16; }
};

// ---- Vectors: as wide as the processor's, by AVX512 or else AVX2 (compilers make poor code of int8 to float)

#ifdef __AVX512F__
constexpr int kLanes = 16, kMostTokens = 8;  // of a block of products: its sums stay in registers
#else
constexpr int kLanes = 8, kMostTokens = 4;
#endif
using Vec = float __attribute__((vector_size(4 * kLanes)));

Vec Floats(const float* from) {
  Vec to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

#ifdef __AVX512F__
Vec Floats(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
float Sum(Vec v) { return _mm512_reduce_add_ps(v); }

// The sums of 16 vectors, in half the instructions of 16 sums: neighbours are added while they are put side by side.
Vec Sums(const Vec* v) {
  Vec fours[4];
  for (int i = 0; i < 4; i++, v += 4) {
    const __m512 a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)) + _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  const auto halves = [](Vec a, Vec b) -> Vec {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}
#else
Vec Floats(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

float Sum(Vec v) {
  const __m128 fours = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
  const __m128 twos = fours + _mm_movehl_ps(fours, fours);
  return _mm_cvtss_f32(twos + _mm_movehdup_ps(twos));
}

Vec Sums(const Vec* v) {
  Vec sums;
  for (int i = 0; i < kLanes; i++) sums[i] = Sum(v[i]);
  return sums;
}
#endif

// e^x for x <= 0, to float32's last digits: 2^n times a polynomial of the rest (Cephes, S. Moshier). The C library's is
// not computed for a vector at a time without -ffast-math.
inline float Exp(float x) {
  x = std::max(x, -87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return (p * r * r + r + 1) * power;
}

inline float Silu(float x) {
  const float e = Exp(-std::fabs(x));
  return x * (x < 0 ? e : 1.0f) / (1 + e);
}

// A buffer that begins on a cache line, so that no vector of it lies on two.
class Buffer {
 public:
  explicit Buffer(int64_t size) : vectors_((size + kLanes - 1) / kLanes) {}
  float* data() { return reinterpret_cast<float*>(vectors_.data()); }
  float& operator[](int64_t i) { return data()[i]; }

 private:
  std::vector<Vec> vectors_;
};

// ---- Products with int8 weights, converted as they are read

struct Weight {
  const int8_t* values;
  const float* scale;
  int64_t outputs, width;

  Weight(const S8& v, const F32& s)
      : values(v.typed_data()), scale(s.typed_data()), outputs(v.dimensions()[0]), width(v.dimensions()[1]) {}
};

// N rows of the weight from n on, times T tokens: out(t, n, product).
template <int N, int T, class Out>
void Block(const Weight& w, int64_t n, const float* x, int64_t t0, const Out& out) {
  const int8_t *rows = w.values + n * w.width, *next = rows + N * w.width;
  for (int64_t i = 0; i < N * w.width; i += 64) __builtin_prefetch(next + i);
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
      out(t0 + t, n + i, totals[i][t] * w.scale[n + i]);
    }
  }
}

template <int T, class Out>
void Tokens(const Weight& w, int64_t n, int64_t end, const float* x, int64_t t0, const Out& out) {
  constexpr int N = T < 4 ? 4 : kLanes / T;
  for (; n + N <= end; n += N) Block<N, T>(w, n, x, t0, out);
  for (; n < end; n++) Block<1, T>(w, n, x, t0, out);
}

// A share of the outputs for all tokens, in parts whose weights stay in the first cache from one block to the next.
template <class Out>
void MultiplyFloats(const Weight& w, const float* x, int64_t tokens, Share share, const Out& out) {
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

// Whether the kernel lets this process use the matrix unit's tiles: asked once.
bool HasTiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Eight tokens in two signed digits each, as rag/ops/linear.py has them, laid out as the second factor of tiles: for
// each 64 of the width [16][16][4], where column c < 8 is the first digit of token c, and column 8 + c its second.
constexpr int64_t kTogether = 8;

struct Digits {
  int64_t width, tokens;
  std::vector<int8_t> tiles;  // [tokens / 8, width / 64, 16, 16, 4]
  std::vector<float> step;

  Digits(int64_t tokens, int64_t width)
      : width(width), tokens(tokens), tiles((tokens + 7) / 8 * 16 * width), step((tokens + 7) / 8 * 8) {}

  void Write(const float* x, int64_t t) {
    float most = 0;
    for (int64_t m = 0; m < width; m++) most = std::max(most, std::fabs(x[m]));
    step[t] = std::max(most / 127, 1.17549435e-38f);
    const float by = 1 / step[t];
    int8_t* out = tiles.data() + t / 8 * 16 * width + t % 8 * 4;
    for (int64_t m = 0; m < width; m += 4, out += 64) {
      for (int i = 0; i < 4; i++) {
        const float first = std::nearbyint(x[m + i] * by);
        out[i] = static_cast<int8_t>(first);
        out[32 + i] = static_cast<int8_t>(std::nearbyint((x[m + i] * by - first) * 254));
      }
    }
  }
};

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 16 or 32 rows of the weight from n on, times 8 or 16 tokens from t on: out(t, n, product).
template <class Out>
void TileBlock(const Weight& w, int64_t n, bool more_rows, const Digits& x, int64_t t, const Out& out) {
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
  for (int tile = 0; tile < 4; tile++) {
    const int64_t t0 = t + tile % 2 * kTogether, n0 = n + tile / 2 * 16;
    if ((tile % 2 && !more_tokens) || (tile / 2 && !more_rows)) continue;
    const int64_t count = std::min(kTogether, x.tokens - t0);
    for (int64_t i = 0; i < 16; i++) {
      float products[kTogether];
      for (int c = 0; c < kTogether; c++) {
        products[c] = (sums[tile][i][c] + sums[tile][i][8 + c] * (1 / 254.0f)) * x.step[t0 + c] * w.scale[n0 + i];
      }
      for (int64_t c = 0; c < count; c++) out(t0 + c, n0 + i, products[c]);
    }
  }
}

template <class Out>
void MultiplyTiles(const Weight& w, const Digits& x, Share share, const Out& out) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t n = share.begin; n < share.end; n += 32) {
    for (int64_t t = 0; t < x.tokens; t += 2 * kTogether) TileBlock(w, n, n + 32 <= share.end, x, t, out);
  }
  _tile_release();
}

#endif

// What a weight is multiplied with: `tokens` rows of floats, and for the matrix unit their digits too.
class Input {
 public:
  Input(int64_t tokens, int64_t width) : tokens(tokens), width(width), floats_(tokens * width) {
#ifdef __AMX_INT8__
    if (tokens > 1 && width % 64 == 0 && HasTiles()) digits_ = std::make_unique<Digits>(tokens, width);
#endif
  }

  const int64_t tokens, width;
  float* row(int64_t t) { return floats_.data() + t * width; }

  // Call once a row is written, and before it is multiplied with.
  void Finish(int64_t t) {
#ifdef __AMX_INT8__
    if (digits_) digits_->Write(row(t), t);
#endif
  }

  // A share of the weight's outputs for all tokens.
  template <class Out>
  void Multiply(const Weight& w, Share share, const Out& out) {
#ifdef __AMX_INT8__
    if (digits_ && w.outputs % 16 == 0) return MultiplyTiles(w, *digits_, share, out);
#endif
    MultiplyFloats(w, floats_.data(), tokens, share, out);
  }

 private:
  Buffer floats_;
#ifdef __AMX_INT8__
  std::unique_ptr<Digits> digits_;
#endif
};

// ---- The other parts of a layer

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
constexpr int64_t kTile = 64;      // slots that are read at once: they stay in the first cache for all queries

// What a query has attended to: the largest score, the sum of the exponentials, and the values they weigh.
struct Attended {
  float top, total, values[kMostDim];

  void Clear(int64_t dim) {
    top = -1e30f;
    total = 0;
    std::fill(values, values + dim, 0.0f);
  }
};

float Dot(const float* a, const float* b, int64_t size) {
  Vec sums = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) sums += Floats(a + d) * Floats(b + d);
  float sum = Sum(sums);
  for (; d < size; d++) sum += a[d] * b[d];
  return sum;
}

// sum = by * sum + weights . values, C vectors of it from d on.
template <int C>
void Weigh(const float* weights, const float* values, int64_t slots, int64_t dim, float by, float* sum) {
  Vec sums[C];
  for (int c = 0; c < C; c++) sums[c] = by * Floats(sum + c * kLanes);
  for (int64_t s = 0; s < slots; s++) {
    for (int c = 0; c < C; c++) sums[c] += weights[s] * Floats(values + s * dim + c * kLanes);
  }
  std::memcpy(sum, sums, sizeof(sums));
}

// One query against up to kTile slots more (online softmax, Milakov and Gimelshein 2018).
void Attend(const float* q, const float* keys, const float* values, int64_t slots, int64_t dim, float scale,
            Attended& result) {
  float weights[kTile], top = result.top, total = 0;
  for (int64_t s = 0; s < slots; s++) weights[s] = scale * Dot(q, keys + s * dim, dim);
  for (int64_t s = 0; s < slots; s++) top = std::max(top, weights[s]);
  for (int64_t s = 0; s < slots; s++) weights[s] = Exp(weights[s] - top);
  for (int64_t s = 0; s < slots; s++) total += weights[s];
  const float by = Exp(result.top - top);
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) Weigh<4>(weights, values + d, slots, dim, by, result.values + d);
  for (; d + kLanes <= dim; d += kLanes) Weigh<1>(weights, values + d, slots, dim, by, result.values + d);
  for (; d < dim; d++) {
    result.values[d] *= by;
    for (int64_t s = 0; s < slots; s++) result.values[d] += weights[s] * values[s * dim + d];
  }
  result.total = by * result.total + total;
  result.top = top;
}

// The threads' shares of a query together, as flash-decoding does it.
void Merge(const Attended* shares, int64_t count, int64_t dim, float* out) {
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
};

// A thread's share of the slots of every row, for all of its queries [R, H, D]; results [R, H, threads].
void AttendShare(const Shape& z, const float* query, const float* keys, const float* values, const int32_t* positions,
                 int i, int threads, Attended* results) {
  const float scale = 1 / std::sqrt(static_cast<float>(z.dim));
  const int64_t group = z.heads / z.kv_heads;
  for (int64_t n = 0; n < z.rows() * z.heads; n++) results[n * threads + i].Clear(z.dim);
  for (int64_t b = 0; b < z.batch; b++) {
    const int32_t* at = positions + b * z.tokens;
    const Share share(*std::max_element(at, at + z.tokens) + 1, i, threads);
    for (int64_t kv = 0; kv < z.kv_heads; kv++) {
      const int64_t first = (b * z.kv_heads + kv) * z.slots;
      for (int64_t s = share.begin; s < share.end; s += kTile) {
        for (int64_t t = 0; t < z.tokens; t++) {
          const int64_t seen = std::min({s + kTile, share.end, static_cast<int64_t>(at[t]) + 1}) - s;
          if (seen <= 0) continue;
          for (int64_t g = 0; g < group; g++) {
            const int64_t n = (b * z.tokens + t) * z.heads + kv * group + g;
            const int64_t offset = (first + s) * z.dim;
            Attend(query + n * z.dim, keys + offset, values + offset, seen, z.dim, scale, results[n * threads + i]);
          }
        }
      }
    }
  }
}

struct Layer {
  const float* norm_1;
  Weight q, k, v, o;
  const float* norm_2;
  Weight gate, up, down;
  float *keys, *values;  // [B, K, S, D]
};

// What layers write on their way, one after another.
struct Scratch {
  Input h, attended, middle;
  Buffer query, gate;
  std::vector<Attended> results;  // [R, H, threads]

  Scratch(const Shape& z, int64_t ffn, int threads)
      : h(z.rows(), z.width), attended(z.rows(), z.heads * z.dim), middle(z.rows(), ffn),
        query(z.rows() * z.heads * z.dim), gate(z.rows() * ffn), results(z.rows() * z.heads * threads) {}
};

// One layer, in place: x [R, M].
void Run(Team& team, const Layer& l, const Shape& z, float eps, const int32_t* positions, const float* cos,
         const float* sin, float* x, Scratch& scratch) {
  const int64_t rows = z.rows(), width = z.width, ffn = l.gate.outputs, half = z.dim / 2;
  const int threads = team.size();
  Input &h = scratch.h, &attended = scratch.attended, &middle = scratch.middle;
  float *query = scratch.query.data(), *gate = scratch.gate.data();
  Attended* results = scratch.results.data();
  const auto place = [&](int64_t r, int64_t n) {  // of kv output n of row r in the cache
    return (((r / z.tokens) * z.kv_heads + n / z.dim) * z.slots + positions[r]) * z.dim + n % z.dim;
  };
  const auto add = [&](int64_t r, int64_t n, float value) { x[r * width + n] += value; };
  const auto each_row = [&](const auto& part) {  // a row alone is not worth a thread's while
    if (rows == 1) return part(0);
    team.Run([&](int i) {
      for (int64_t r = i; r < rows; r += threads) part(r);
    });
  };

  each_row([&](int64_t r) {
    Normalise(x + r * width, l.norm_1, eps, width, h.row(r));
    h.Finish(r);
  });
  team.Run([&](int i) {
    const Share share(l.k.outputs, i, threads);
    h.Multiply(l.q, Share(l.q.outputs, i, threads),
               [&](int64_t r, int64_t n, float value) { query[r * l.q.outputs + n] = value; });
    h.Multiply(l.k, share, [&](int64_t r, int64_t n, float value) { l.keys[place(r, n)] = value; });
    h.Multiply(l.v, share, [&](int64_t r, int64_t n, float value) { l.values[place(r, n)] = value; });
  });
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t n = 0; n < z.kv_heads; n++) Rotate(l.keys + place(r, n * z.dim), cos + r * half, sin + r * half, half);
    for (int64_t n = 0; n < z.heads; n++) Rotate(query + (r * z.heads + n) * z.dim, cos + r * half, sin + r * half, half);
  }
  team.Run([&](int i) { AttendShare(z, query, l.keys, l.values, positions, i, threads, results); });
  each_row([&](int64_t r) {
    for (int64_t n = 0; n < z.heads; n++) {
      Merge(results + (r * z.heads + n) * threads, threads, z.dim, attended.row(r) + n * z.dim);
    }
    attended.Finish(r);
  });
  team.Run([&](int i) { attended.Multiply(l.o, Share(width, i, threads), add); });
  each_row([&](int64_t r) {
    Normalise(x + r * width, l.norm_2, eps, width, h.row(r));
    h.Finish(r);
  });
  team.Run([&](int i) {
    const Share share(ffn, i, threads);
    h.Multiply(l.gate, share, [&](int64_t r, int64_t n, float value) { gate[r * ffn + n] = value; });
    h.Multiply(l.up, share, [&](int64_t r, int64_t n, float value) { middle.row(r)[n] = value; });
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t n = share.begin; n < share.end; n++) middle.row(r)[n] *= Silu(gate[r * ffn + n]);
    }
  });
  if (rows > 1) each_row([&](int64_t r) { middle.Finish(r); });
  team.Run([&](int i) { middle.Multiply(l.down, Share(width, i, threads), add); });
}

// ---- What jax.ffi calls

constexpr int64_t kLayerArguments = 18;  // two norms, seven weights with their scales, keys and values

ffi::Error Decoder(int64_t threads, float eps, F32 x, S32 at, F32 cos, F32 sin, ffi::RemainingArgs arguments,
                   ffi::ResultBuffer<ffi::F32> y, ffi::RemainingRets caches) {
  Turn team(threads);
  const auto f32 = [&](size_t i) { return *arguments.get<F32>(i); };
  const auto weight = [&](size_t i) { return Weight(*arguments.get<S8>(i), *arguments.get<F32>(i + 1)); };
  const auto cache = [&](size_t i) { return *caches.get<F32>(i); };
  const auto shape = cache(0)->dimensions(), in = x.dimensions();
  const Shape z{in[0], in[1], in[2], weight(1).outputs / shape[3], shape[1], shape[2], shape[3]};

  std::vector<int32_t> positions(at.typed_data(), at.typed_data() + z.rows());
  for (int32_t& position : positions) position = std::min<int32_t>(position, z.slots - 1);
  std::copy(x.typed_data(), x.typed_data() + x.element_count(), y->typed_data());
  Scratch scratch(z, weight(10).outputs, team->size());
  for (size_t n = 0; n < arguments.size() / kLayerArguments; n++) {
    const size_t i = n * kLayerArguments;
    const Layer layer{f32(i).typed_data(),      weight(i + 1),  weight(i + 3),  weight(i + 5),
                      weight(i + 7),            f32(i + 9).typed_data(), weight(i + 10), weight(i + 12),
                      weight(i + 14),           cache(2 * n)->typed_data(), cache(2 * n + 1)->typed_data()};
    Run(*team.made, layer, z, eps, positions.data(), cos.typed_data(), sin.typed_data(), y->typed_data(), scratch);
  }
  return ffi::Error::Success();
}

ffi::Error Linear(int64_t threads, F32 x, S8 values, F32 scale, ffi::ResultBuffer<ffi::F32> y) {
  Turn team(threads);
  const Weight weight(values, scale);
  Input input(x.dimensions()[0], x.dimensions()[1]);
  for (int64_t r = 0; r < input.tokens; r++) {
    std::copy(x.typed_data() + r * input.width, x.typed_data() + (r + 1) * input.width, input.row(r));
    input.Finish(r);
  }
  float* out = y->typed_data();
  team->Run([&](int i) {
    input.Multiply(weight, Share(weight.outputs, i, team->size()),
                   [&](int64_t r, int64_t n, float value) { out[r * weight.outputs + n] = value; });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagDecoder, Decoder,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("threads")
                                  .Attr<float>("eps")
                                  .Arg<F32>()       // x [B, T, M]
                                  .Arg<S32>()       // positions [B, T]
                                  .Arg<F32>()       // cos [B, T, D/2]
                                  .Arg<F32>()       // sin [B, T, D/2]
                                  .RemainingArgs()  // kLayerArguments of each layer
                                  .Ret<F32>()       // x [B, T, M]
                                  .RemainingRets());  // keys and values of each layer, in the arguments' memory

XLA_FFI_DEFINE_HANDLER_SYMBOL(RagLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("threads")
                                  .Arg<F32>()     // x [R, M]
                                  .Arg<S8>()      // values [N, M]
                                  .Arg<F32>()     // scale [N]
                                  .Ret<F32>());   // [R, N]

// Whether several tokens cost hardly more than one: products then go through the matrix unit.
extern "C" bool RagHasTiles() {
#ifdef __AMX_INT8__
  return HasTiles();
#else
  return false;
#endif
}
