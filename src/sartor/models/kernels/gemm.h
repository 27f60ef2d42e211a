// Products of a base's weights, or of LoRA factors, with a few tokens. A token's result depends on that token alone. There are
// plain vectors for any processor and type, and AMX tiles or AVX-512's products of bf16 pairs if the processor has them.
// Weights are (outputs, inputs), as stored in memory.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define SARTOR_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using V = Lanes<float>::V;
constexpr Long W = LANES<float>;

inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
// by intrinsics where available: GCC 12 compiles the plain code to five instructions with a detour over the stack
inline V load(const bf16* from) {
#if defined(__AVX512F__)
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
#elif defined(__AVX2__)
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t Whole __attribute__((vector_size(VECTOR_BYTES)));
  Half half;
  std::memcpy(&half, from, sizeof(Half));
  Whole whole = __builtin_convertvector(half, Whole) << 16;
  V value;
  std::memcpy(&value, &whole, sizeof(V));
  return value;
#endif
}
inline void store(float* to, V value) { std::memcpy(to, &value, sizeof(V)); }

template <int N> inline float sum_lanes(const float* lanes) { return sum_lanes<N / 2>(lanes) + sum_lanes<N / 2>(lanes + N / 2); }
template <> inline float sum_lanes<1>(const float* lanes) { return *lanes; }
inline float sum(V v) {
  float lanes[W];
  store(lanes, v);
  return sum_lanes<W>(lanes);
}

#if defined(__AVX512F__)
// The same as `sum` of each of 16 vectors, added in the same order: neighbours, then neighbouring pairs, and so on.
inline V sums_of_sixteen(const V* v) {
  auto pairs = [](V a, V b) {
    return (V)_mm512_add_ps(_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88), _mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD));
  };
  auto quarters = [](V a, V b) {
    return (V)_mm512_add_ps(_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88), _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xDD));
  };
  V four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = pairs(pairs(v[4 * i], v[4 * i + 1]), pairs(v[4 * i + 2], v[4 * i + 3]));
  return quarters(quarters(four[0], four[1]), quarters(four[2], four[3]));
}
#endif

// Implementations of products. span: y = w x for tokens [t0, t1) and outputs [n0, n1) of w, whose rows are `ld` numbers apart

// Dot products of up to four outputs and four tokens at once, computed by Maker::tile. A token's input is In[Maker::wide(ins)].
template <class Maker, class T, class In> struct Dotted {
  static Long size(Long tokens, Long ins) { return tokens * Maker::wide(ins); }
  static void begin() {}
  static void end() {}

  template <int N>
  static void rows(const T* w, Long ld, Long depth, const In* x, Long wide, Long t0, Long t1, float* y, Long ldy) {
    Long t = t0;
    for (; t + 4 <= t1; t += 4) Maker::template tile<N, 4>(w, ld, depth, x + t * wide, wide, y + t * ldy, ldy);
    for (; t < t1; ++t) Maker::template tile<N, 1>(w, ld, depth, x + t * wide, wide, y + t * ldy, ldy);
  }

  static void span(const T* w, Long ld, Long n0, Long n1, Long depth, const In* x, Long ins, Long t0, Long t1, float* y,
                   Long ldy) {
    // as many tokens at a time as stay in the L1 cache while all outputs read them
    Long wide = Maker::wide(ins), block = std::max(Long(4), 32768 / (wide * Long(sizeof(In))) / 4 * 4);
    for (Long t = t0; t < t1; t += block) {
      Long end = std::min(t + block, t1), n = n0;
      for (; n + 4 <= n1; n += 4) rows<4>(w + n * ld, ld, depth, x, wide, t, end, y + n, ldy);
      for (; n < n1; ++n) rows<1>(w + n * ld, ld, depth, x, wide, t, end, y + n, ldy);
    }
  }

  static void narrow(float* low, Long rank) {}

  // y[t][0, outs) += b low[t] for M tokens, at most 16 outputs
  template <int M> static void raise(const T* b, Long rank, const float* low, Long ldlow, float* y, Long ldy, Long outs) {
    float sums[M][16] = {};
    for (Long r = 0; r < rank; ++r)
      for (int m = 0; m < M; ++m) {
#pragma omp simd
        for (Long n = 0; n < 16; ++n) sums[m][n] = fused(low[m * ldlow + r], get(b[r * 16 + n]), sums[m][n]);
      }
    for (int m = 0; m < M; ++m)
      for (Long n = 0; n < outs; ++n) y[m * ldy + n] += sums[m][n];
  }
};

template <class T> struct Plain : Dotted<Plain<T>, T, float> {
  using In = float;
  static Long wide(Long ins) { return padded<float>(ins); }

  // numbers [from, from + count) of a token's input; `in` is as wide as `ins`
  static void put(In* in, Long ins, Long token, Long from, Long count, const float* line) {
    std::copy(line, line + count, in + token * wide(ins) + from);
  }

  template <int N, int M>
  static void tile(const T* w, Long ld, Long depth, const float* x, Long wide, float* y, Long ldy) {
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
        for (int n = 0; n < N; ++n) sums[n][m] = fused(weights[n], value, sums[n][m]);
      }
    }
#if defined(__AVX512F__)
    if constexpr (N == 4 && M == 4) {
      if (k == depth) {
        V all[16];
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) all[4 * m + n] = sums[n][m];
        float totals[16];
        store(totals, sums_of_sixteen(all));
        for (int m = 0; m < 4; ++m) std::memcpy(y + m * ldy, totals + 4 * m, 4 * sizeof(float));
        return;
      }
    }
#endif
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) {
        float total = sum(sums[n][m]);
        for (Long i = k; i < depth; ++i) total = fused(get(w[n * ld + i]), x[m * wide + i], total);
        y[m * ldy + n] = total;
      }
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define SARTOR_PAIRS
// Inputs in bf16 too, and pairs of products by one instruction: half the work of Plain, for processors without tiles.
struct Pairs : Dotted<Pairs, bf16, bf16> {
  using In = bf16;
  static Long wide(Long ins) { return padded<bf16>(ins); }

  static void put(In* in, Long ins, Long token, Long from, Long count, const float* line) {
    In* to = in + token * wide(ins) + from;
#pragma omp simd
    for (Long i = 0; i < count; ++i) ::put(to[i], line[i]);
  }

  template <int N, int M>
  static void tile(const bf16* w, Long ld, Long depth, const In* x, Long wide, float* y, Long ldy) {
    __m512 sums[N][M] = {};
    Long k = 0;
    for (; k + 32 <= depth; k += 32) add<N, M>(w + k, ld, x + k, wide, ~__mmask32(0), sums);
    if (k < depth) add<N, M>(w + k, ld, x + k, wide, (__mmask32(1) << (depth - k)) - 1, sums);
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m) y[m * ldy + n] = sum((V)sums[n][m]);
  }

  template <int N, int M>
  static inline __attribute__((always_inline)) void add(const bf16* w, Long ld, const In* x, Long wide, __mmask32 some,
                                                        __m512 (&sums)[N][M]) {
    __m512bh weights[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) weights[n] = (__m512bh)_mm512_maskz_loadu_epi16(some, w + n * ld);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      __m512bh value = (__m512bh)_mm512_maskz_loadu_epi16(some, x + m * wide);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[n][m] = _mm512_dpbf16_ps(sums[n][m], weights[n], value);
    }
  }
};
bool has_pairs() { return true; }
#else
bool has_pairs() { return false; }
#endif

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
  static void take(const float* tile, float* y, Long ldy, Long low, Long high) {
    if (high - low > 3) {
      __m512 lines[16];
      transpose(tile, lines);
      for (Long t = low; t < high; ++t) _mm512_storeu_ps(y + t * ldy, lines[t]);
    } else {
      for (Long t = low; t < high; ++t)
        for (Long n = 0; n < 16; ++n) y[t * ldy + n] = tile[n * 16 + t];
    }
  }

  // in place, as pairs of bf16
  static void narrow(float* low, Long rank) {
    bf16* to = reinterpret_cast<bf16*>(low);
    for (Long r = 0; r < rank; ++r) ::put(to[r], low[r]);
  }

  template <int M> static void raise(const bf16* b, Long rank, const float* low, Long ldlow, float* y, Long ldy, Long outs) {
    __m512 even[M] = {}, odd[M] = {};
    for (Long r = 0; r < rank / 2; r += 2) {
      __m512bh one = line(b + r * 32), other = line(b + r * 32 + 32);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int* pairs = reinterpret_cast<const int*>(low + m * ldlow);
        even[m] = _mm512_dpbf16_ps(even[m], one, (__m512bh)_mm512_set1_epi32(pairs[r]));
        odd[m] = _mm512_dpbf16_ps(odd[m], other, (__m512bh)_mm512_set1_epi32(pairs[r + 1]));
      }
    }
    __mmask16 some = outs < 16 ? (1 << outs) - 1 : 0xffff;
    for (int m = 0; m < M; ++m, y += ldy)
      _mm512_mask_storeu_ps(y, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, y), _mm512_add_ps(even[m], odd[m])));
  }
  static __m512bh line(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

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

  static void span(const bf16* w, Long ld, Long n0, Long n1, Long depth, const In* x, Long ins, Long t0, Long t1, float* y,
                   Long ldy) {
    alignas(64) float out[4 * 256];
    Long block = 16 * wide(ins), full = n0 + (n1 - n0) / 16 * 16, lines = t1 - t0 > 32 ? 32 * 32 / (t1 - t0) : 0;
    for (Long n = n0; n < full;) {
      bool two = n + 32 <= full;
      const char* next = reinterpret_cast<const char*>(w + (n + (two ? 32 : 16)) * ld);
      for (Long b = t0 / 16; b * 16 < t1;) {
        bool both = (b + 1) * 16 < t1;
        auto run = two ? both ? tiles<true, true> : tiles<true, false> : both ? tiles<false, true> : tiles<false, false>;
        // prefetch: with many tokens the next rows during this product; with few, the beginnings of the rows while results
        // are stored
        run(w + n * ld, ld, depth, x + b * block, block, out, next, lines);
        next += lines * depth * 2;
        if (!lines && b == t0 / 16)
          for (Long j = 0; j < 32; ++j) __builtin_prefetch(next + j * ld * 2), __builtin_prefetch(next + j * ld * 2 + 64);
        for (Long i = 0; i <= both; ++i, ++b)
          for (Long j = 0; j <= two; ++j)
            take(out + (2 * i + j) * 256, y + b * 16 * ldy + n + 16 * j, ldy, std::max(t0 - b * 16, Long(0)),
                 std::min(t1 - b * 16, Long(16)));
      }
      n += two ? 32 : 16;
    }
    if (full < n1) rest(w + full * ld, ld, n1 - full, depth, x, block, t0, t1, y + full, ldy);
  }

  // fewer than 16 outputs: their rows are copied, so that nothing behind them is read
  static void rest(const bf16* w, Long ld, Long outs, Long depth, const In* x, Long block, Long t0, Long t1, float* y,
                   Long ldy) {
    alignas(64) float out[256];
    std::vector<bf16> copy(16 * wide(depth), bf16{0});
    for (Long n = 0; n < outs; ++n) std::copy(w + n * ld, w + n * ld + depth, copy.data() + n * wide(depth));
    for (Long b = t0 / 16; b * 16 < t1; ++b) {
      tiles<false, false>(copy.data(), wide(depth), depth, x + b * block, block, out, nullptr, 0);
      for (Long t = std::max(t0, b * 16); t < std::min(t1, b * 16 + 16); ++t)
        for (Long n = 0; n < outs; ++n) y[t * ldy + n] = out[n * 16 + t % 16];
    }
  }
};

bool amx_is_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#else
bool amx_is_allowed() { return false; }
#endif

}  // namespace
