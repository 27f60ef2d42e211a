// Attention of a few queries over the pages of one row. A query's result depends on itself and on the keys that it sees alone.
//
// A page of one key head holds PAGE keys and PAGE values. Columns are queries that attend to the same pages: heads of one
// token, and for AMX tiles heads of several consecutive tokens.
#pragma once
#include "gemm.h"

namespace {

constexpr Long PAGE = 64;

// Memory that will be read soon, fetched a line at a time between other work.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  void operator()() {
    if (next < end) __builtin_prefetch(next, 0, 2), next += 64;
  }
};

template <class T> struct View {
  const T* cache;  // (pages, groups): a page of a group
  const Long* pages;
  Long groups, group, head, window, page_size;
  float cap;
  const T* page(Long position) const { return cache + (pages[position / PAGE] * groups + group) * page_size; }
  Long first(Long position) const { return window ? std::max(Long(0), position + 1 - window) : 0; }
};

struct Column { const float* q; Long position; };  // q: (head), rotated and scaled

// keys (head, PAGE), values (PAGE, padded head); columns are heads of one token
template <class T> struct PlainLook {
  static constexpr Long COLUMNS = 4;
  static constexpr bool JOINS_TOKENS = false;
  static Long page_size(Long head) { return PAGE * (head + padded<float>(head)); }
  static Long room(Long head, Long reach) { return COLUMNS * (reach + padded<float>(head)); }
  static void begin(T* page, Long head) {}

  static void keep(T* page, Long head, Long place, const float* key, const float* value) {
    T* values = page + head * PAGE + place * padded<float>(head);
    for (Long i = 0; i < head; ++i) put(page[i * PAGE + place], key[i]), put(values[i], value[i]);
  }

  // give(column, first dimension, count, numbers)
  template <class F>
  static void look(const View<T>& v, const Column* columns, Long count, float* room, Long reach, Ahead& ahead, F give) {
    auto some = count == 4 ? heads<4> : count == 3 ? heads<3> : count == 2 ? heads<2> : heads<1>;
    float* mixed = room + COLUMNS * reach;
    some(v, columns, room, reach, mixed, ahead);
    for (Long r = 0; r < count; ++r) give(r, 0, v.head, mixed + r * padded<float>(v.head));
  }

  template <int R>
  static void heads(const View<T>& v, const Column* columns, float* scores, Long reach, float* mixed, Ahead& ahead) {
    Long wide = padded<float>(v.head), last = columns[0].position, low = v.first(last);
    for (Long at = low / PAGE * PAGE; at <= last; at += PAGE)
      score<R>(columns, v.page(at), v.head, std::min(last + 1 - at, PAGE), scores + at, reach, ahead);
    for (int r = 0; r < R; ++r) soften(scores + r * reach, low, last + 1, v.cap);
    std::fill(mixed, mixed + R * wide, 0.0f);
    for (Long at = low / PAGE * PAGE; at <= last; at += PAGE)
      mix<R>(scores + at, reach, v.page(at) + v.head * PAGE, wide, std::max(low - at, Long(0)), std::min(last + 1 - at, PAGE),
             mixed, ahead);
  }

  // scores of R heads with the first `count` keys of a page, rounded up to whole vectors
  template <int R>
  static void score(const Column* columns, const T* keys, Long width, Long count, float* scores, Long reach, Ahead& ahead) {
    constexpr int N = 2;
    for (Long from = 0; from < count; from += N * W) {
      V sums[R][N] = {};
      for (Long i = 0; i < width; ++i) {
        ahead();
        V key[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) key[j] = load(keys + i * PAGE + from + j * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          V factor = columns[r].q[i] - V{};
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) sums[r][j] = fused(factor, key[j], sums[r][j]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < N; ++j) store(scores + r * reach + from + j * W, sums[r][j]);
    }
  }

  static void soften(float* scores, Long low, Long high, float cap) {
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

  // mixed (R, wide) += weights (R, high - low) of positions [low, high) of a page times its values (high - low, wide)
  template <int R>
  static void mix(const float* scores, Long reach, const T* values, Long wide, Long low, Long high, float* mixed,
                  Ahead& ahead) {
    for (Long from = 0; from < wide; from += W) {
      V sums[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] = load(mixed + r * wide + from);
      for (Long i = low; i < high; ++i) {
        ahead();
        V value = load(values + i * wide + from);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] = fused(scores[r * reach + i] - V{}, value, sums[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store(mixed + r * wide + from, sums[r]);
    }
  }
};

#ifdef SARTOR_AMX
// keys (PAGE, wide), values (wide, PAGE), wide a multiple of 32. A column is a column of every tile: scores (keys, columns),
// their softmax down the columns, mixtures (dimensions, columns). Keys that a column does not see weigh exactly 0 for it.
struct AmxLook {
  static constexpr Long COLUMNS = 16;
  static constexpr bool JOINS_TOKENS = true;
  static Long wide(Long head) { return (head + 31) / 32 * 32; }
  static Long page_size(Long head) { return 2 * PAGE * wide(head); }
  static Long room(Long head, Long reach) { return (wide(head) / 2 + reach + 32) * COLUMNS; }

  // unwritten positions of a page get weight 0, so they must hold finite numbers
  static void begin(bf16* page, Long head) { std::fill(page + PAGE * wide(head), page + 2 * PAGE * wide(head), bf16{0}); }

  static void keep(bf16* page, Long head, Long place, const float* key, const float* value) {
    bf16 *keys = page + place * wide(head), *values = page + PAGE * wide(head) + place;
    for (Long i = 0; i < head; ++i) ::put(keys[i], key[i]), ::put(values[i * PAGE], value[i]);
    std::fill(keys + head, keys + wide(head), bf16{0});
  }

  template <class F>
  static void look(const View<bf16>& v, const Column* columns, Long count, float* room, Long reach, Ahead& ahead, F give) {
    Long last = columns[count - 1].position, from = v.first(columns[0].position) / 32 * 32, keys = (last - from) / 32 * 32 + 32;
    bf16* query = reinterpret_cast<bf16*>(room);
    float* scores = room + wide(v.head) / 2 * COLUMNS;
    std::memset(query, 0, wide(v.head) * COLUMNS * 2);
    for (Long c = 0; c < count; ++c) Amx::put(query, v.head, c, 0, v.head, columns[c].q);
    for (Long k = 0; k < keys; k += 32) {
      const bf16* key = v.page(from + k) + (from + k) % PAGE * wide(v.head);
      for (int i = 0; i < 16; ++i) ahead();
      _tile_zero(0); _tile_zero(1);
      for (Long d = 0; d < wide(v.head); d += 32) {
        _tile_loadd(6, query + d * COLUMNS, 64);
        _tile_loadd(4, key + d, wide(v.head) * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, key + 16 * wide(v.head) + d, wide(v.head) * 2);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, scores + k * 16, 64);
      _tile_stored(1, scores + k * 16 + 256, 64);
    }
    V share = soften(v, columns, count, from, keys, scores);
    for (Long d = 0; d < v.head; d += 64) mix(v, d, std::min(v.head - d, Long(64)), from, keys, scores, share, count, ahead, give);
  }

  // scores (keys, 16) become unnormalised weights in the layout of a tile's second factor, (keys / 2, 16, 2); returns 1 / their
  // sums
  static V soften(const View<bf16>& v, const Column* columns, Long count, Long from, Long keys, float* scores) {
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    I low = {}, high = {};
    for (int c = 0; c < 16; ++c) {
      Long position = columns[std::min(Long(c), count - 1)].position;
      low[c] = v.first(position), high[c] = position;
    }
    const V never = V{} - INFINITY;
    V top = never, total = {};
    for (Long k = 0; k < keys; ++k) {
      V score = load(scores + k * 16);
      if (v.cap > 0)
        for (int c = 0; c < 16; ++c) score[c] = v.cap * hyperbolic(score[c] / v.cap);
      I here = I{} + int32_t(from + k);
      score = (here >= low) & (here <= high) ? score : never;
      top = score > top ? score : top;
      store(scores + k * 16, score);
    }
    for (Long k = 0; k < keys; k += 2) {
      V even = exponential(load(scores + k * 16) - top), odd = exponential(load(scores + k * 16 + 16) - top);
      total += even;
      total += odd;
      __m512i first = _mm512_srli_epi32(rounded(even), 16), upper = _mm512_set1_epi32(0xffff0000);
      __m512i pairs = _mm512_or_si512(first, _mm512_and_si512(rounded(odd), upper));
      _mm512_storeu_si512(scores + k * 8, pairs);
    }
    return 1.0f / total;
  }

  // to bf16 in the upper half of each number, ties to even
  static __m512i rounded(V x) {
    __m512i bits = _mm512_castps_si512((__m512)x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q), bits);
  }

  static V exponential(V x) {
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    V clamped = x < -87.0f ? V{} - 87.0f : x;
    auto with = [](V a, V b, float c) { return fused(a, b, V{} + c); };
    V n = with(clamped, V{} + 1.44269504f, 12582912.0f) - 12582912.0f;
    V r = fused(n, V{} + 2.12194440e-4f, fused(n, V{} - 0.693359375f, clamped));
    V p = with(r, V{} + 1.9875691500e-4f, 1.3981999507e-3f);
    p = with(p, r, 8.3334519073e-3f);
    p = with(p, r, 4.1665795894e-2f);
    p = with(p, r, 1.6666665459e-1f);
    p = with(p, r, 5.0000001201e-1f);
    p = fused(p * r, r, r) + 1.0f;
    I exponent = (__builtin_convertvector(n == n ? n : V{}, I) + 127) << 23;
    return x < -87.0f ? V{} : p * (V)exponent;
  }

  template <class F>
  static void mix(const View<bf16>& v, Long d, Long dimensions, Long from, Long keys, const float* weights, V share, Long count,
                  Ahead& ahead, F give) {
    alignas(64) float out[4 * 256];
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (Long k = 0; k < keys; k += 32) {
      const bf16* values = v.page(from + k) + PAGE * wide(v.head) + d * PAGE + (from + k) % PAGE;
      for (int i = 0; i < 16; ++i) ahead();
      _tile_loadd(6, weights + k * 8, 64);
      _tile_loadd(4, values, PAGE * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (dimensions > 16) {
        _tile_loadd(5, values + 16 * PAGE, PAGE * 2);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (dimensions > 32) {
        _tile_loadd(4, values + 32 * PAGE, PAGE * 2);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (dimensions > 48) {
        _tile_loadd(5, values + 48 * PAGE, PAGE * 2);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    _tile_stored(0, out, 64); _tile_stored(1, out + 256, 64); _tile_stored(2, out + 512, 64); _tile_stored(3, out + 768, 64);
    for (Long i = 0; i < dimensions; i += 16) {
      __m512 lines[16];
      for (Long j = 0; j < 16; ++j) store(out + (i + j) * 16, load(out + (i + j) * 16) * share);
      Amx::transpose(out + i * 16, lines);
      for (Long c = 0; c < count; ++c) {
        alignas(64) float line[16];
        _mm512_store_ps(line, lines[c]);
        give(c, d + i, std::min(dimensions - i, Long(16)), line);
      }
    }
  }
};
#endif

}  // namespace
