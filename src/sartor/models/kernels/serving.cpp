// Serving on a CPU: one walk of N tokens through all layers of a Llama-shaped base, over a paged cache, every token with the
// LoRA factors of its own adapter or none.
//
// What becomes of a token is computed from that token, its adapter and the cached positions of its row, in an order that
// nothing else changes: not the tokens beside it, not their number, not the number of threads. So a prompt has the same bits
// in chunks of any size, a reply the same with any neighbours, and keys and values of a reply may serve as a later prompt's.
//
// Weights are read as they stand in memory, (outputs, inputs), so a base that is mapped from its files is shared by all
// processes that serve it. Products have two makers: AMX tiles for bf16, where the processor has them, and plain vectors.
//
// Threads share the work by claiming pieces of it, each first its own part and then what others left; they go on when every
// piece of a stage is done, not when every thread has come: one that another process has put aside is not waited for, unless
// it was put aside within a piece.
#include "vectors.h"

#include <atomic>
#include <chrono>
#include <limits>
#include <thread>

#if defined(__AMX_BF16__) && defined(__linux__)
#define SARTOR_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// What Python describes: kernels/walk.py has the same structures.

struct Product {  // linear modules that read the same input; outputs stand side by side
  Long count, ins, outs[3];
  const void *weight[3], *bias[3];
  Long total() const { return outs[0] + outs[1] + outs[2]; }
};
struct Layer {
  const void *norm, *mlp_norm, *after[2], *head_norms[2];
  Product products[4];
  void* cache;  // (pages, groups): keys (width, PAGE), then values (PAGE, padded width)
  Long turns, window;
};
struct Model {
  Long layers, width, heads, groups, head, rotary, gelu, vocabulary;
  double scale, cap, eps, offset, head_cap;
  const Layer* layer;
  const void *norm, *lm_head;
};
struct Factor { const void *a, *b; Long rank; };  // a (rank, ins), b (outs, rank), scaled; rank is a multiple of 16
struct Batch {
  Long tokens, most_pages, rank;  // rank: room for any factor's, a multiple of 32
  const Long *positions, *rows, *pages;  // pages: (rows, most_pages)
  const Factor* const* factors;  // of each token: one Factor for each linear module of each layer; null for none
  const float *cos[2], *sin[2];  // (positions, rotary), both halves written out
  float* x;  // (tokens, width), in and out
};

constexpr Long PAGE = 64, MOST_HEADS = 4;

using V = Lanes<float>::V;
constexpr Long W = LANES<float>;

inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
inline V load(const bf16* from) {
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t Whole __attribute__((vector_size(VECTOR_BYTES)));
  Half half;
  std::memcpy(&half, from, sizeof(Half));
  Whole whole = __builtin_convertvector(half, Whole) << 16;
  V value;
  std::memcpy(&value, &whole, sizeof(V));
  return value;
}
inline void store(float* to, V value) { std::memcpy(to, &value, sizeof(V)); }

template <int N> inline float sum_lanes(const float* lanes) { return sum_lanes<N / 2>(lanes) + sum_lanes<N / 2>(lanes + N / 2); }
template <> inline float sum_lanes<1>(const float* lanes) { return *lanes; }
inline float sum(V v) {
  float lanes[W];
  store(lanes, v);
  return sum_lanes<W>(lanes);
}

// Makers of products. span: y (+)= w x for tokens [t0, t1) and outputs [n0, n1) of w, whose rows are `ld` numbers apart
template <class T> struct Plain {
  using In = float;
  static Long size(Long tokens, Long ins) { return tokens * padded<float>(ins); }
  static void begin() {}
  static void end() {}

  // numbers [from, from + count) of a token's input; `in` is as wide as `ins`
  static void put(In* in, Long ins, Long token, Long from, Long count, const float* line) {
    std::copy(line, line + count, in + token * padded<float>(ins) + from);
  }

  template <int N, int M>
  static void tile(const T* w, Long ld, Long depth, const float* x, Long wide, float* y, Long ldy, bool add) {
    V sums[N][M] = {};
    Long k = 0;
    for (; k + W <= depth; k += W) {
      V weights[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weights[n] = load(w + n * ld + k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        V value = load(x + m * wide + k);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[n][m] += weights[n] * value;
      }
    }
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) {
        float total = sum(sums[n][m]);
        for (Long i = k; i < depth; ++i) total += get(w[n * ld + i]) * x[m * wide + i];
        y[m * ldy + n] = add ? y[m * ldy + n] + total : total;
      }
  }

  template <int N>
  static void rows(const T* w, Long ld, Long depth, const float* x, Long wide, Long t0, Long t1, float* y, Long ldy, bool add) {
    Long t = t0;
    for (; t + 4 <= t1; t += 4) tile<N, 4>(w, ld, depth, x + t * wide, wide, y + t * ldy, ldy, add);
    for (; t < t1; ++t) tile<N, 1>(w, ld, depth, x + t * wide, wide, y + t * ldy, ldy, add);
  }

  static void span(const T* w, Long ld, Long n0, Long n1, Long depth, const In* x, Long ins, Long t0, Long t1, float* y,
                   Long ldy, bool add) {
    Long wide = padded<float>(ins), n = n0;
    for (; n + 4 <= n1; n += 4) rows<4>(w + n * ld, ld, depth, x, wide, t0, t1, y + n, ldy, add);
    for (; n < n1; ++n) rows<1>(w + n * ld, ld, depth, x, wide, t0, t1, y + n, ldy, add);
  }
};

#ifdef SARTOR_AMX
// A tile of w (16 outputs, 32 inputs) times a tile of x (32 inputs, 16 tokens): every element of the result is summed over
// the inputs in their order. Inputs stand in pairs, (ins / 2, 16 tokens, 2), a block of 16 tokens after the other.
struct Amx {
  using In = bf16;
  static Long wide(Long ins) { return (ins + 31) / 32 * 32; }
  static Long size(Long tokens, Long ins) { return (tokens + 15) / 16 * 16 * wide(ins); }

  static void begin() {
    struct alignas(64) { uint8_t palette = 1, start = 0, unused[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
    for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
  }
  static void end() { _tile_release(); }

  static void put(In* in, Long ins, Long token, Long from, Long count, const float* line) {
    char* to = reinterpret_cast<char*>(in + token / 16 * 16 * wide(ins) + token % 16 * 2 + from / 2 * 32);
    for (Long i = 0; i < count; i += 32) {
      bf16 narrow[32];
      Long here = std::min(count - i, Long(32));
#pragma omp simd
      for (Long j = 0; j < here; ++j) ::put(narrow[j], line[i + j]);
      for (Long j = 0; j < here; j += 2, to += 64) std::memcpy(to, narrow + j, 4);
    }
  }

  // columns [low, high) of a tile (16 outputs, 16 tokens) to lines of y
  static void take(const float* tile, float* y, Long ldy, Long low, Long high, bool add) {
    auto give = [&](Long t, __m512 line) {
      float* to = y + t * ldy;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), line) : line);
    };
    if (high - low > 3) {
      __m512 lines[16];
      transpose(tile, lines);
      for (Long t = low; t < high; ++t) give(t, lines[t]);
    } else {
      const __m512i steps = _mm512_mullo_epi32(_mm512_set1_epi32(16), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
      for (Long t = low; t < high; ++t) give(t, _mm512_i32gather_ps(steps, tile + t, 4));
    }
  }

  static void transpose(const float* tile, __m512* out) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(tile + 16 * i);
    for (int i = 0; i < 8; ++i) b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) {
        __m512d low = _mm512_castps_pd(b[4 * i + j]), high = _mm512_castps_pd(b[4 * i + 2 + j]);
        a[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        a[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    for (int j = 0; j < 4; ++j) {
      __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
      out[j] = _mm512_shuffle_f32x4(low, high, 0x88), out[8 + j] = _mm512_shuffle_f32x4(low, high, 0xdd);
      low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd), high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
      out[4 + j] = _mm512_shuffle_f32x4(low, high, 0x88), out[12 + j] = _mm512_shuffle_f32x4(low, high, 0xdd);
    }
  }

  // 16 or 32 outputs of 16 or 32 tokens
  template <bool TWO, bool BOTH>
  static void tiles(const bf16* w, Long ld, Long depth, const In* x, Long block, float* out, const char* ahead, Long lines) {
    _tile_zero(0);
    if (TWO) _tile_zero(1);
    if (BOTH) _tile_zero(2);
    if (TWO && BOTH) _tile_zero(3);
    for (Long k = 0; k < depth; k += 32) {
      for (Long i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      _tile_loadd(6, x + k * 16, 64);
      _tile_loadd(4, w + k, ld * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (TWO) {
        _tile_loadd(5, w + 16 * ld + k, ld * 2);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (BOTH) {
        _tile_loadd(7, x + block + k * 16, 64);
        _tile_dpbf16ps(2, 4, 7);
        if (TWO) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, 64);
    if (TWO) _tile_stored(1, out + 256, 64);
    if (BOTH) _tile_stored(2, out + 512, 64);
    if (TWO && BOTH) _tile_stored(3, out + 768, 64);
  }

  // fetch what is multiplied next: the beginnings of the next 32 rows, or a stretch further on where rows are short
  static void beckon(const bf16* w, Long ld) {
    if (ld >= 128) {
      for (Long j = 32; j < 64; ++j) __builtin_prefetch(w + j * ld), __builtin_prefetch(w + j * ld + 32);
    } else {
      for (Long j = 0; j < 32 * ld; j += 32) __builtin_prefetch(w + 2048 + j);
    }
  }

  static void span(const bf16* w, Long ld, Long n0, Long n1, Long depth, const In* x, Long ins, Long t0, Long t1, float* y,
                   Long ldy, bool add) {
    alignas(64) float out[4 * 256];
    Long block = 16 * wide(ins), full = n0 + (n1 - n0) / 16 * 16, lines = t1 - t0 > 32 ? 32 * 32 / (t1 - t0) : 0;
    for (Long n = n0; n < full;) {
      bool two = n + 32 <= full;
      const char* next = reinterpret_cast<const char*>(w + (n + 32) * ld);
      for (Long b = t0 / 16; b * 16 < t1;) {
        bool both = (b + 1) * 16 < t1;
        auto run = two ? both ? tiles<true, true> : tiles<true, false> : both ? tiles<false, true> : tiles<false, false>;
        // with many tokens the next rows come while these are multiplied; with few, their beginnings while results are put away
        run(w + n * ld, ld, depth, x + b * block, block, out, next, lines);
        next += lines * depth * 2;
        if (!lines && b == t0 / 16) beckon(w + n * ld, ld);
        for (Long i = 0; i <= both; ++i, ++b)
          for (Long j = 0; j <= two; ++j)
            take(out + (2 * i + j) * 256, y + b * 16 * ldy + n + 16 * j, ldy, std::max(t0 - b * 16, Long(0)),
                 std::min(t1 - b * 16, Long(16)), add);
      }
      n += two ? 32 : 16;
    }
    if (full < n1) rest(w + full * ld, ld, n1 - full, depth, x, block, t0, t1, y + full, ldy, add);
  }

  // fewer than 16 outputs: their rows are copied, so that nothing behind them is read
  static void rest(const bf16* w, Long ld, Long outs, Long depth, const In* x, Long block, Long t0, Long t1, float* y, Long ldy,
                   bool add) {
    alignas(64) float out[256];
    std::vector<bf16> copy(16 * wide(depth), bf16{0});
    for (Long n = 0; n < outs; ++n) std::copy(w + n * ld, w + n * ld + depth, copy.data() + n * wide(depth));
    for (Long b = t0 / 16; b * 16 < t1; ++b) {
      tiles<false, false>(copy.data(), wide(depth), depth, x + b * block, block, out, nullptr, 0);
      for (Long t = std::max(t0, b * 16); t < std::min(t1, b * 16 + 16); ++t)
        for (Long n = 0; n < outs; ++n) {
          float value = out[n * 16 + t % 16], &to = y[t * ldy + n];
          to = add ? to + value : value;
        }
    }
  }
};

bool amx_is_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#else
bool amx_is_allowed() { return false; }
#endif

// Memory that will be read soon, fetched a line at a time between other work.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  void operator()() {
    if (next < end) __builtin_prefetch(next, 0, 2), next += 64;
  }
};

// Counters of every stage of a walk: pieces that each thread's part has given out, and pieces that are done.
struct Stages {
  std::vector<std::atomic<int>> counters;
  Long threads, stride;
  Stages(Long stages, Long threads)
      : counters(stages * padded_to_line(threads)), threads(threads), stride(padded_to_line(threads)) {}
  static Long padded_to_line(Long threads) { return (threads + 1 + 15) / 16 * 16; }
};

struct Worker {
  Stages& stages;
  Long own, at = 0;

  // `body` for every piece of [0, pieces), by whichever thread; returns when all are done
  template <class F> void share(Long pieces, F body) {
    std::atomic<int>*next = stages.counters.data() + at++ * stages.stride, &done = next[stages.threads];
    int made = 0;
    for (Long turn = 0; turn < stages.threads; ++turn) {
      Long part = (own + turn) % stages.threads, low = pieces * part / stages.threads;
      Long size = pieces * (part + 1) / stages.threads - low;
      for (Long piece; (piece = next[part].fetch_add(1, std::memory_order_relaxed)) < size; ++made) body(low + piece);
    }
    if (made) done.fetch_add(made, std::memory_order_release);
    for (Long tries = 0; done.load(std::memory_order_acquire) < pieces; ++tries) pause(tries);
  }

  static void pause(Long tries) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    // about 50 us: the thread that is waited for was put aside; on an idle processor it can go on
    if (tries > 1000) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
};

template <class T> void rms_norm(const float* x, const T* w, float* y, Long width, float eps, float offset) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (Long i = 0; i < width; ++i) total += x[i] * x[i];
  float scale = 1.0f / std::sqrt(total / float(width) + eps);
#pragma omp simd
  for (Long i = 0; i < width; ++i) y[i] = x[i] * scale * (offset + get(w[i]));
}

inline void turn(float* line, const float* cos, const float* sin, Long rotary) {
  Long half = rotary / 2;
#pragma omp simd
  for (Long i = 0; i < half; ++i) {
    float one = line[i], other = line[i + half];
    line[i] = one * cos[i] - other * sin[i];
    line[i + half] = other * cos[i + half] + one * sin[i + half];
  }
}

// scores of R heads with the first `count` keys of a page (and some more): keys (width, PAGE)
template <class T, int R>
void score(const float* q, const T* keys, Long width, Long count, float* scores, Long reach, Ahead& ahead) {
  constexpr int N = 2;
  for (Long half = 0; half * W < std::min(count, PAGE); half += N) {
    V sums[R][N] = {};
    for (Long i = 0; i < width; ++i) {
      ahead();
      V key[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) key[j] = load(keys + i * PAGE + (half + j) * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V factor = V{} + q[r * width + i];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sums[r][j] += factor * key[j];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < N; ++j) store(scores + r * reach + (half + j) * W, sums[r][j]);
  }
}

inline void soften(float* scores, Long low, Long high, float cap) {
  float top = -INFINITY, total = 0;
  if (cap > 0) {
#pragma omp simd
    for (Long i = low; i < high; ++i) scores[i] = cap * hyperbolic(scores[i] / cap);
  }
#pragma omp simd reduction(max : top)
  for (Long i = low; i < high; ++i) top = std::max(top, scores[i]);
#pragma omp simd reduction(+ : total)
  for (Long i = low; i < high; ++i) {
    scores[i] = exponential(scores[i] - top);
    total += scores[i];
  }
  float share = 1.0f / total;
#pragma omp simd
  for (Long i = low; i < high; ++i) scores[i] *= share;
}

// mixed (R, wide) += scores of places [low, high) of a page times its values (PAGE, wide)
template <class T, int R>
void mix(const float* scores, Long reach, const T* values, Long wide, Long low, Long high, float* mixed, Ahead& ahead) {
  for (Long from = 0; from < wide; from += W) {
    V sums[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = load(mixed + r * wide + from);
    for (Long i = low; i < high; ++i) {
      ahead();
      V value = load(values + i * wide + from);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] += scores[r * reach + i] * value;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(mixed + r * wide + from, sums[r]);
  }
}

// R heads of one group: q (R, width), turned -> mixed (R, wide)
template <class T, int R>
void look(const Model& m, const Layer& l, const Long* pages, Long group, Long position, const float* q, float* scores, Long reach,
          float* mixed, Ahead& ahead) {
  Long wide = padded<float>(m.head), low = l.window ? std::max(Long(0), position + 1 - l.window) : 0;
  auto page = [&](Long p) { return static_cast<const T*>(l.cache) + (pages[p] * m.groups + group) * PAGE * (m.head + wide); };
  for (Long p = low / PAGE; p <= position / PAGE; ++p) 
    score<T, R>(q, page(p), m.head, position + 1 - p * PAGE, scores + p * PAGE, reach, ahead);
  for (int r = 0; r < R; ++r) soften(scores + r * reach, low, position + 1, float(m.cap));
  std::fill(mixed, mixed + R * wide, 0.0f);
  for (Long p = low / PAGE; p <= position / PAGE; ++p)
    mix<T, R>(scores + p * PAGE, reach, page(p) + m.head * PAGE, wide, std::max(low - p * PAGE, Long(0)),
              std::min(position + 1 - p * PAGE, PAGE), mixed, ahead);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }
inline float gelu(float x) {
  return 0.5f * x * (1.0f + hyperbolic(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

struct Room {  // what threads share while they walk
  float* y;  // (tokens, most outputs of a product)
  float* lows;  // (3, tokens, rank): x A^T of each part of a product
  void *in, *low_in[3];  // inputs of products, as their maker wants them
};

template <class Op, class T> struct Walk {
  using In = typename Op::In;
  const Model& m;
  const Batch& b;
  Room& room;
  Worker worker;
  std::vector<float> line;  // a token's numbers
  Long reach;
  std::vector<float> own;  // scores (MOST_HEADS, reach) and heads of one look
  std::vector<Long> runs;  // where the adapter changes: tokens [runs[i], runs[i + 1]) have one
  bool adapted = false;

  static Long most_outs(const Model& m) {
    Long most = 0;
    for (const Product& p : m.layer[0].products) most = std::max(most, p.total());
    return most;
  }
  static Long most_ins(const Model& m) {
    Long most = 0;
    for (const Product& p : m.layer[0].products) most = std::max(most, p.ins);
    return most;
  }

  Walk(const Model& m, const Batch& b, Room& room, Stages& stages, Long thread)
      : m(m), b(b), room(room), worker{stages, thread}, line(std::max(most_outs(m), m.width)),
        reach(b.most_pages * PAGE), own(MOST_HEADS * (reach + padded<float>(m.head))) {
    for (Long t = 0; t < b.tokens; ++t) {
      if (!t || b.factors[t] != b.factors[t - 1]) runs.push_back(t);
      adapted = adapted || b.factors[t];
    }
    runs.push_back(b.tokens);
  }

  const Long* pages(Long t) const { return b.pages + b.rows[t] * b.most_pages; }
  In* in() { return static_cast<In*>(room.in); }

  void all() {
    Long part = 0;
    for (Long i = 0; i < m.layers; ++i) {
      const Layer& l = m.layer[i];
      worker.share(b.tokens, [&](Long t) { enter(i, t); });
      product(l.products[0], part);
      worker.share(b.tokens, [&](Long t) { remember(l, t); });
      worker.share(b.tokens * m.groups, [&](Long piece) { attend(l, piece / m.groups, piece % m.groups); });
      product(l.products[1], part + l.products[0].count);
      worker.share(b.tokens, [&](Long t) {
        add(l.after[0], t);
        norm(l.mlp_norm, t);
      });
      product(l.products[2], part + l.products[0].count + 1);
      worker.share(b.tokens, [&](Long t) { activate(l.products[3].ins, t); });
      product(l.products[3], part + l.products[0].count + 1 + l.products[2].count);
      part += l.products[0].count + l.products[2].count + 2;
    }
    worker.share(b.tokens, [&](Long t) { add(m.layer[m.layers - 1].after[1], t); });
  }

  void enter(Long layer, Long t) {
    if (layer) add(m.layer[layer - 1].after[1], t);
    norm(m.layer[layer].norm, t);
  }

  void add(const void* after, Long t) {
    float *x = b.x + t * m.width, *y = room.y + t * m.width;
    if (after) rms_norm(y, static_cast<const T*>(after), y, m.width, float(m.eps), float(m.offset));
#pragma omp simd
    for (Long i = 0; i < m.width; ++i) x[i] += y[i];
  }

  void norm(const void* weight, Long t) {
    rms_norm(b.x + t * m.width, static_cast<const T*>(weight), line.data(), m.width, float(m.eps), float(m.offset));
    Op::put(in(), m.width, t, 0, m.width, line.data());
  }

  // room.y (tokens, total) = all parts of a product, adapters added; `first`: the number of its first part among all modules
  void product(const Product& p, Long first) {
    constexpr Long SPAN = 512;  // outputs of a factor B at once: a few pages of memory
    Long total = p.total(), lowered = adapted ? p.count * (Long(runs.size()) - 1) : 0, pieces = 0, raised = 0, ends[3], spans[3];
    for (Long i = 0; i < p.count; ++i) ends[i] = pieces += (p.outs[i] + 31) / 32, spans[i] = raised += (p.outs[i] + SPAN - 1) / SPAN;
    raised *= runs.size() - 1;
    worker.share(pieces + lowered, [&](Long piece) {
      if (piece >= pieces) return lower(p, first, (piece - pieces) % p.count, (piece - pieces) / p.count);
      Long part = 0;
      while (piece >= ends[part]) ++part;
      Long n0 = (piece - (part ? ends[part - 1] : 0)) * 32, n1 = std::min(n0 + 32, p.outs[part]);
      float* y = start(p, part);
      Op::span(static_cast<const T*>(p.weight[part]), p.ins, n0, n1, p.ins, in(), p.ins, 0, b.tokens, y, total, false);
      if (const T* bias = static_cast<const T*>(p.bias[part]))
        for (Long t = 0; t < b.tokens; ++t)
          for (Long n = n0; n < n1; ++n) y[t * total + n] += get(bias[n]);
    });
    if (adapted)
      worker.share(raised, [&](Long piece) {
        Long run = piece % (runs.size() - 1), part = 0;
        for (piece /= runs.size() - 1; piece >= spans[part];) ++part;
        Long n0 = (piece - (part ? spans[part - 1] : 0)) * SPAN, n1 = std::min(n0 + SPAN, p.outs[part]);
        if (const Factor* f = factor(first + part, run))
          Op::span(static_cast<const T*>(f->b), f->rank, n0, n1, f->rank, static_cast<const In*>(room.low_in[part]), b.rank,
                   runs[run], runs[run + 1], start(p, part), total, true);
      });
  }

  float* start(const Product& p, Long part) {
    return room.y + (part > 0 ? p.outs[0] : 0) + (part > 1 ? p.outs[1] : 0);
  }

  const Factor* factor(Long module, Long run) {
    const Factor* all = b.factors[runs[run]];
    return all && all[module].rank ? all + module : nullptr;
  }

  // of a product's weights, what stands by this piece of the work before it
  Ahead weights(const Product& p, Long piece, Long pieces) {
    if (pieces > 200) return {};
    const char* from = static_cast<const char*>(p.weight[0]);
    Long bytes = p.outs[0] * p.ins * Long(sizeof(T));
    return {from + bytes * piece / pieces, from + bytes * (piece + 1) / pieces};
  }

  // x A^T of one part for the tokens of a run, laid out as the input of B
  void lower(const Product& p, Long first, Long part, Long run) {
    const Factor* f = factor(first + part, run);
    if (!f) return;
    float* low = room.lows + part * b.tokens * b.rank;
    Op::span(static_cast<const T*>(f->a), p.ins, 0, f->rank, p.ins, in(), p.ins, runs[run], runs[run + 1], low, b.rank, false);
    for (Long t = runs[run]; t < runs[run + 1]; ++t) {
      Long depth = std::min((f->rank + 31) / 32 * 32, b.rank);
      std::fill(low + t * b.rank + f->rank, low + t * b.rank + depth, 0.0f);
      Op::put(static_cast<In*>(room.low_in[part]), b.rank, t, 0, depth, low + t * b.rank);
    }
  }

  // the token's queries turned and scaled where they stand, its keys and values put into the cache
  void remember(const Layer& l, Long t) {
    Long wide = padded<float>(m.head), position = b.positions[t], page = pages(t)[position / PAGE];
    const float *cos = b.cos[l.turns] + position * m.rotary, *sin = b.sin[l.turns] + position * m.rotary;
    float* y = room.y + t * l.products[0].total();
    for (Long h = 0; h < m.heads + m.groups; ++h, y += m.head) {
      if (const void* weight = l.head_norms[h >= m.heads])
        rms_norm(y, static_cast<const T*>(weight), y, m.head, float(m.eps), float(m.offset));
      turn(y, cos, sin, m.rotary);
      for (Long i = 0; h < m.heads && i < m.head; ++i) y[i] *= float(m.scale);
    }
    y -= m.groups * m.head;
    for (Long g = 0; g < m.groups; ++g, y += m.head) {
      T *keys = static_cast<T*>(l.cache) + (page * m.groups + g) * PAGE * (m.head + wide), *values = keys + m.head * PAGE;
      for (Long i = 0; i < m.head; ++i) ::put(keys[i * PAGE + position % PAGE], y[i]);
      for (Long i = 0; i < m.head; ++i) ::put(values[position % PAGE * wide + i], y[m.groups * m.head + i]);
    }
  }

  void attend(const Layer& l, Long t, Long group) {
    Long share = m.heads / m.groups, wide = padded<float>(m.head);
    Ahead ahead = weights(l.products[1], t * m.groups + group, b.tokens * m.groups);
    float *scores = own.data(), *mixed = scores + MOST_HEADS * reach;
    for (Long low = 0; low < share; low += MOST_HEADS) {
      Long head = group * share + low, count = std::min(share - low, MOST_HEADS);
      const float* q = room.y + t * l.products[0].total() + head * m.head;
      auto heads = count == 4 ? look<T, 4> : count == 3 ? look<T, 3> : count == 2 ? look<T, 2> : look<T, 1>;
      heads(m, l, pages(t), group, b.positions[t], q, scores, reach, mixed, ahead);
      for (Long r = 0; r < count; ++r)
        Op::put(in(), l.products[1].ins, t, (head + r) * m.head, m.head, mixed + r * wide);
    }
  }

  void activate(Long width, Long t) {
    const float *gate = room.y + t * 2 * width, *up = gate + width;
    if (m.gelu) {
#pragma omp simd
      for (Long i = 0; i < width; ++i) line[i] = gelu(gate[i]) * up[i];
    } else {
#pragma omp simd
      for (Long i = 0; i < width; ++i) line[i] = silu(gate[i]) * up[i];
    }
    Op::put(in(), width, t, 0, width, line.data());
  }
};

// pieces of the scratch memory that Python gives, each on a line of its own
struct Scratch {
  char* at;
  Long used = 0;
  void* piece(Long bytes) {
    void* found = at ? at + used : nullptr;
    used += (bytes + 63) / 64 * 64;
    return found;
  }
};

template <class Op, class T> Room rooms(const Model& m, Long tokens, Long rank, Scratch& scratch) {
  using In = typename Op::In;
  using Made = Walk<Op, T>;
  Room room;
  room.y = static_cast<float*>(scratch.piece(tokens * std::max(Made::most_outs(m), m.width) * sizeof(float)));
  room.in = scratch.piece(Op::size(tokens, std::max(Made::most_ins(m), m.width)) * sizeof(In));
  room.lows = static_cast<float*>(scratch.piece(3 * tokens * rank * sizeof(float)));
  for (void*& low : room.low_in) low = scratch.piece(Op::size(tokens, rank) * sizeof(In));
  return room;
}

template <class Op, class T> void walk(const Model& m, const Batch& b, char* memory, int threads) {
  Scratch scratch{memory};
  Room room = rooms<Op, T>(m, b.tokens, b.rank, scratch);
  Stages stages(m.layers * 13 + 1, threads);
#pragma omp parallel num_threads(threads)
  {
    Op::begin();
    Walk<Op, T>(m, b, room, stages, omp_get_thread_num()).all();
    Op::end();
  }
}

// logits (tokens, vocabulary) of x (tokens, width); best (tokens): where the largest stands, -1 if any is not finite
template <class Op, class T>
void head(const Model& m, const float* x, Long tokens, float* logits, Long* best, char* memory, int threads) {
  using In = typename Op::In;
  constexpr Long ROWS = 256;
  In* in = reinterpret_cast<In*>(memory);
  Long pieces = (m.vocabulary + ROWS - 1) / ROWS;
  std::vector<float> tops(pieces * tokens);
  std::vector<Long> places(pieces * tokens);
  Stages stages(2, threads);
#pragma omp parallel num_threads(threads)
  {
    Op::begin();
    Worker worker{stages, omp_get_thread_num()};
    std::vector<float> line(m.width);
    worker.share(tokens, [&](Long t) {
      rms_norm(x + t * m.width, static_cast<const T*>(m.norm), line.data(), m.width, float(m.eps), float(m.offset));
      Op::put(in, m.width, t, 0, m.width, line.data());
    });
    worker.share(pieces, [&](Long piece) {
      Long n0 = piece * ROWS, n1 = std::min(n0 + ROWS, m.vocabulary);
      Op::span(static_cast<const T*>(m.lm_head), m.width, n0, n1, m.width, in, m.width, 0, tokens, logits, m.vocabulary, false);
      for (Long t = 0; t < tokens; ++t) {
        float *to = logits + t * m.vocabulary, top = -INFINITY, waste = 0;
        if (m.head_cap > 0)
          for (Long n = n0; n < n1; ++n) to[n] = float(m.head_cap) * hyperbolic(to[n] / float(m.head_cap));
#pragma omp simd reduction(max : top) reduction(+ : waste)
        for (Long n = n0; n < n1; ++n) top = std::max(top, to[n]), waste += to[n] * 0.0f;  // 0, or NaN where one is not finite
        tops[piece * tokens + t] = top;
        places[piece * tokens + t] = waste == 0 ? std::find(to + n0, to + n1, top) - to : -1;
      }
    });
    Op::end();
  }
  for (Long t = 0; t < tokens; ++t) {
    best[t] = places[t];
    float top = tops[t];
    for (Long piece = 1; piece < pieces && best[t] >= 0; ++piece) {
      Long at = piece * tokens + t;
      if (places[at] < 0 || tops[at] > top) best[t] = places[at], top = tops[at];
    }
  }
}

template <class Op, class T> Long room_bytes(const Model& m, Long tokens, Long rank) {
  Scratch scratch{nullptr};
  rooms<Op, T>(m, tokens, rank, scratch);
  return scratch.used;
}

}  // namespace

extern "C" int sartor_amx() { return amx_is_allowed(); }

#define EXPORT(OP, T, NAME)                                                                                                     \
  extern "C" Long sartor_walk_bytes_##NAME(const Model* m, Long tokens, Long rank) { return room_bytes<OP, T>(*m, tokens, rank); } \
  extern "C" void sartor_walk_##NAME(const Model* m, const Batch* b, char* memory, int threads) {                              \
    walk<OP, T>(*m, *b, memory, threads);                                                                                      \
  }                                                                                                                            \
  extern "C" void sartor_head_##NAME(const Model* m, const float* x, Long tokens, float* logits, Long* best, char* memory,     \
                                     int threads) {                                                                            \
    head<OP, T>(*m, x, tokens, logits, best, memory, threads);                                                                 \
  }

EXPORT(Plain<float>, float, f32)
EXPORT(Plain<bf16>, bf16, bf16)
#ifdef SARTOR_AMX
EXPORT(Amx, bf16, amx)
#endif
