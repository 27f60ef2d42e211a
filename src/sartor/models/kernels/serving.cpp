// Serving on a CPU: attention over a paged cache, and LoRA of many adapters in one batch.
//
// A row's result is computed from that row's own numbers in one order, whatever rows stand beside it and however many
// threads there are: a reply does not depend on its neighbours. Checked against kernels/serving.py's torch twin when loaded.
#include "vectors.h"

namespace {

// sum of x[i] w[i]: LANES sums side by side, added up in a fixed order
template <class T, class C = Compute<T>> inline C dot(const C* x, const T* w, Long n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Long i = 0; i < n; ++i) sum += x[i] * get(w[i]);
  return sum;
}

template <class T, class C = Compute<T>> inline void add_scaled(C* to, const T* from, C by, Long n) {
#pragma omp simd
  for (Long i = 0; i < n; ++i) to[i] += by * get(from[i]);
}

struct Paged {
  const Long *table, *positions;  // (rows, most) pages of each row; the position of its query
  Long rows, most, page, heads, groups, width, rotary, window;
  const float *cos, *sin;  // (positions, rotary)
  double scale, cap;
};

template <class T, class C> void turn(const Paged& g, const T* from, C* to, Long position) {
  const float *cos = g.cos + position * g.rotary, *sin = g.sin + position * g.rotary;
  Long half = g.rotary / 2;
  for (Long i = 0; i < half; ++i) {
    C one = get(from[i]), other = get(from[i + half]);
    to[i] = one * C(cos[i]) - other * C(sin[i]);
    to[i + half] = other * C(cos[i + half]) + one * C(sin[i + half]);
  }
  for (Long i = g.rotary; i < g.width; ++i) to[i] = get(from[i]);
}

// One row, one group: its key and value go into the cache, its heads look at everything up to there.
template <class T, class C = Compute<T>>
void look(const Paged& g, const T* qkv, T* keys, T* values, T* out, Long row, Long group, std::vector<C>& room) {
  Long share = g.heads / g.groups, position = g.positions[row], line = g.heads + 2 * g.groups;
  const Long* table = g.table + row * g.most;
  const T* own = qkv + row * line * g.width;
  auto at = [&](T* cache, Long place) {
    return cache + ((table[place / g.page] * g.groups + group) * g.page + place % g.page) * g.width;
  };
  room.resize(2 * g.width + position + 1);
  C *query = room.data(), *mixed = query + g.width, *scores = mixed + g.width;
  turn(g, own + (g.heads + group) * g.width, query, position);
  T *key = at(keys, position), *value = at(values, position);
  for (Long i = 0; i < g.width; ++i) put(key[i], query[i]);
  std::copy(own + (g.heads + g.groups + group) * g.width, own + (g.heads + g.groups + group + 1) * g.width, value);
  Long first = g.window ? std::max(Long(0), position + 1 - g.window) : 0;
  for (Long head = group * share; head < (group + 1) * share; ++head) {
    turn(g, own + head * g.width, query, position);
    C most = -INFINITY, sum = 0;
    for (Long place = first; place <= position; ++place) {
      C score = dot<T>(query, at(keys, place), g.width) * C(g.scale);
      if (g.cap != 0) score = C(g.cap) * C(hyperbolic(score / C(g.cap)));
      scores[place] = score;
      most = score > most || score != score ? score : most;
    }
#pragma omp simd
    for (Long place = first; place <= position; ++place) scores[place] = exponential(scores[place] - most);
    for (Long place = first; place <= position; ++place) sum += scores[place];
    std::fill(mixed, mixed + g.width, C(0));
    for (Long place = first; place <= position; ++place) add_scaled<T>(mixed, at(values, place), scores[place], g.width);
    T* to = out + (row * g.heads + head) * g.width;
    for (Long i = 0; i < g.width; ++i) put(to[i], mixed[i] / sum);
  }
}

template <class T, class C = Compute<T>>
void paged_attention(const Paged& g, const T* qkv, T* keys, T* values, T* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<C> room;
#pragma omp for schedule(dynamic)
    for (Long task = 0; task < g.rows * g.groups; ++task)
      if (g.positions[task / g.groups] >= 0) look<T>(g, qkv, keys, values, out, task / g.groups, task % g.groups, room);
  }
}

// y[:, low:high] += scale x A^T B^T for each module m of each row, with the row's own A, B: slot -1 has none.
// a: (slots, sum of ranks, width); b: (slots, sum of rank (high - low)), each module's as (rank, high - low)
struct Modules {
  Long count;
  const Long *ranks, *low, *high;
};

template <class T, class C = Compute<T>>
void lora_rows(const Modules& m, const T* x, T* y, const T* a, const T* b, const Long* slots, const C* scales, Long rows,
               Long width, Long out, int threads) {
  Long ranks = 0, wide = 0;
  for (Long i = 0; i < m.count; ++i) ranks += m.ranks[i], wide += m.ranks[i] * (m.high[i] - m.low[i]);
#pragma omp parallel num_threads(threads)
  {
    std::vector<C> in(width), sum(out), low(ranks);
#pragma omp for schedule(dynamic)
    for (Long row = 0; row < rows; ++row) {
      Long slot = slots[row];
      if (slot < 0) continue;
      for (Long i = 0; i < width; ++i) in[i] = get(x[row * width + i]);
      const T *own_a = a + slot * ranks * width, *own_b = b + slot * wide;
      for (Long i = 0; i < m.count; ++i) {
        C scale = scales[slot * m.count + i];
        Long span = m.high[i] - m.low[i];
        if (scale != 0) {
          for (Long r = 0; r < m.ranks[i]; ++r) low[r] = scale * dot<T>(in.data(), own_a + r * width, width);
          std::fill(sum.begin(), sum.begin() + span, C(0));
          for (Long r = 0; r < m.ranks[i]; ++r) add_scaled<T>(sum.data(), own_b + r * span, low[r], span);
          T* to = y + row * out + m.low[i];
          for (Long j = 0; j < span; ++j) put(to[j], get(to[j]) + sum[j]);
        }
        own_a += m.ranks[i] * width;
        own_b += m.ranks[i] * span;
      }
    }
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                        \
  extern "C" void sartor_paged_attention_##NAME(const Paged* g, const T* qkv, T* keys, T* values, T* out, int threads) {       \
    paged_attention<T>(*g, qkv, keys, values, out, threads);                                                                   \
  }                                                                                                                            \
  extern "C" void sartor_lora_rows_##NAME(const Modules* m, const T* x, T* y, const T* a, const T* b, const Long* slots,       \
                                          const Compute<T>* scales, Long rows, Long width, Long out, int threads) {            \
    lora_rows<T>(*m, x, y, a, b, slots, scales, rows, width, out, threads);                                                    \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
EXPORT(double, f64)
