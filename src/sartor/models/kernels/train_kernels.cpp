// The elementwise parts and the attention of the Llama-shaped block, for CPUs: everything but the matrix products.
//
// Plain C++17 with GCC's vector extensions, so one source serves AVX2, AVX-512 and NEON: the compiler uses the machine's own
// vector width. Called through ctypes (kernels/cpu.py). Every function has its torch counterpart in kernels/reference.py,
// against which it is checked when the library is loaded. Storage T is float, bf16 or double; arithmetic C is float (double
// for double).
//
// Work is split into contiguous ranges by a rule that depends on sizes and the number of threads alone. So sums are taken in
// the same order in every run, which exact resume needs.
#include "simd.h"

namespace {

// y (rows, width) = x / rms(x) * (offset + w) (Zhang & Sennrich 2019); rstd (rows) = 1 / rms is kept for the backward
template <class T, class C = Compute<T>>
void rms_norm(const T* x, const T* w, T* y, C* rstd, Long rows, Long width, C eps, C offset, int threads) {
  over_rows(rows, threads, [=](Long row) {
    const T* in = x + row * width;
    T* out = y + row * width;
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Long i = 0; i < width; ++i) sum += get(in[i]) * get(in[i]);
    C scale = C(1) / std::sqrt(sum / C(width) + eps);
    rstd[row] = scale;
#pragma omp simd
    for (Long i = 0; i < width; ++i) put(out[i], get(in[i]) * scale * (offset + get(w[i])));
  });
}

// dx (rows, width) = add + rstd g - x rstd^3 <g, x> / width, with g = dy (offset + w) and <g, x> per row
template <class T, class C = Compute<T>>
void rms_norm_backward(const T* dy, const T* x, const T* w, const C* rstd, const T* add, T* dx, Long rows, Long width, C offset,
                       int threads) {
  over_rows(rows, threads, [=](Long row) {
    const T *g = dy + row * width, *in = x + row * width, *more = add ? add + row * width : nullptr;
    T* out = dx + row * width;
    C dot = 0, scale = rstd[row];
#pragma omp simd reduction(+ : dot)
    for (Long i = 0; i < width; ++i) dot += get(g[i]) * (offset + get(w[i])) * get(in[i]);
    C back = dot * scale * scale * scale / C(width);
    if (more) {
#pragma omp simd
      for (Long i = 0; i < width; ++i)
        put(out[i], get(more[i]) + get(g[i]) * (offset + get(w[i])) * scale - get(in[i]) * back);
    } else {
#pragma omp simd
      for (Long i = 0; i < width; ++i) put(out[i], get(g[i]) * (offset + get(w[i])) * scale - get(in[i]) * back);
    }
  });
}

struct Silu {
  template <class C> static void both(C g, C& value, C& slope) {
    C sigmoid = C(1) / (C(1) + exponential(-g));
    value = g * sigmoid;
    slope = sigmoid * (C(1) + g * (C(1) - sigmoid));
  }
};
struct GeluTanh {
  template <class C> static void both(C g, C& value, C& slope) {
    const C a = C(0.7978845608028654), b = C(0.044715);
    C t = hyperbolic(a * (g + b * g * g * g));
    value = C(0.5) * g * (C(1) + t);
    slope = C(0.5) * (C(1) + t) + C(0.5) * g * (C(1) - t * t) * a * (C(1) + C(3) * b * g * g);
  }
};

// out (rows, width) = act(gate) up, from rows [gate | up] (rows, 2 width) (Shazeer 2020)
template <class A, class T, class C = Compute<T>> void glu(const T* gate_up, T* out, Long rows, Long width, int threads) {
  over_rows(rows, threads, [=](Long row) {
    const T *gate = gate_up + row * 2 * width, *up = gate + width;
    T* to = out + row * width;
#pragma omp simd
    for (Long i = 0; i < width; ++i) {
      C value, slope;
      A::both(C(get(gate[i])), value, slope);
      put(to[i], value * get(up[i]));
    }
  });
}

// dgate = d up act'(gate), dup = d act(gate), each (rows, width), overwrite gate_up; out = act(gate) up is computed again,
// since the forward did not keep it
template <class A, class T, class C = Compute<T>>
void glu_backward(const T* d, T* gate_up, T* out, Long rows, Long width, int threads) {
  over_rows(rows, threads, [=](Long row) {
    T *gate = gate_up + row * 2 * width, *up = gate + width, *to = out + row * width;
    const T* grad = d + row * width;
#pragma omp simd
    for (Long i = 0; i < width; ++i) {
      C value, slope, u = get(up[i]), g = get(grad[i]);
      A::both(C(get(gate[i])), value, slope);
      put(to[i], value * u);
      put(gate[i], g * u * slope);
      put(up[i], g * value);
    }
  });
}

// loss = log sum_v exp(y_v) - y_target in nats, y = cap tanh(z / cap) or z; cap: Gemma's soft-cap of logits, 0 for none.
// With `gradient` the logits z become dloss/dz = (softmax(y) - onehot(target)) (1 - (y / cap)^2)
template <class T, class C = Compute<T>>
void cross_entropy(T* logits, const Long* targets, C* losses, Long rows, Long width, C cap, int gradient, int threads) {
  over_rows(rows, threads, [=](Long row) {
    T* line = logits + row * width;
    if (cap > 0) {
#pragma omp simd
      for (Long i = 0; i < width; ++i) put(line[i], cap * hyperbolic(C(get(line[i])) / cap));
    }
    C top = get(line[0]), sum = 0, aim = get(line[targets[row]]);
#pragma omp simd reduction(max : top)
    for (Long i = 0; i < width; ++i) top = std::max(top, C(get(line[i])));
#pragma omp simd reduction(+ : sum)
    for (Long i = 0; i < width; ++i) sum += exponential(C(get(line[i])) - top);
    losses[row] = std::log(sum) + top - aim;
    if (!gradient) return;
    C share = C(1) / sum;
    auto slope = [cap](C y) { return cap > 0 ? C(1) - y * y / (cap * cap) : C(1); };
#pragma omp simd
    for (Long i = 0; i < width; ++i) {
      C y = get(line[i]);
      put(line[i], exponential(y - top) * share * slope(y));
    }
    put(line[targets[row]], (exponential(aim - top) * share - C(1)) * slope(aim));
  });
}

// C (M, N) (+)= A (M, K) B (K, N), row-major; with TA the first factor is stored as (K, M). N is a multiple of LANES.
template <class C, int R, bool TA>
inline void product_rows(const C* a, Long lda, const C* b, Long ldb, C* c, Long ldc, Long depth, Long n, bool add) {
  typedef typename Lanes<C>::V V;
  constexpr Long W = LANES<C>;
  Long j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    V sums[R][2];
    for (int r = 0; r < R; ++r) {
      if (add) {
        std::memcpy(&sums[r][0], c + r * ldc + j, sizeof(V));
        std::memcpy(&sums[r][1], c + r * ldc + j + W, sizeof(V));
      } else {
        sums[r][0] = sums[r][1] = V{};
      }
    }
    for (Long k = 0; k < depth; ++k) {
      V b0, b1;
      std::memcpy(&b0, b + k * ldb + j, sizeof(V));
      std::memcpy(&b1, b + k * ldb + j + W, sizeof(V));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        C factor = TA ? a[k * lda + r] : a[r * lda + k];
        sums[r][0] += factor * b0;
        sums[r][1] += factor * b1;
      }
    }
    for (int r = 0; r < R; ++r) {
      std::memcpy(c + r * ldc + j, &sums[r][0], sizeof(V));
      std::memcpy(c + r * ldc + j + W, &sums[r][1], sizeof(V));
    }
  }
  for (; j < n; j += W) {
    V sums[R];
    for (int r = 0; r < R; ++r) {
      if (add) std::memcpy(&sums[r], c + r * ldc + j, sizeof(V));
      else sums[r] = V{};
    }
    for (Long k = 0; k < depth; ++k) {
      V b0;
      std::memcpy(&b0, b + k * ldb + j, sizeof(V));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r] += (TA ? a[k * lda + r] : a[r * lda + k]) * b0;
    }
    for (int r = 0; r < R; ++r) std::memcpy(c + r * ldc + j, &sums[r], sizeof(V));
  }
}

template <bool TA, class C>
void product(const C* a, Long lda, const C* b, Long ldb, C* c, Long ldc, Long m, Long n, Long depth, bool add) {
  Long i = 0;
  auto at = [&](Long row) { return TA ? a + row : a + row * lda; };
  // six rows by two vectors: twelve sums in flight hide the latency of a multiply-add, and fit sixteen registers
  for (; i + 6 <= m; i += 6) product_rows<C, 6, TA>(at(i), lda, b, ldb, c + i * ldc, ldc, depth, n, add);
  for (; i + 3 <= m; i += 3) product_rows<C, 3, TA>(at(i), lda, b, ldb, c + i * ldc, ldc, depth, n, add);
  for (; i < m; ++i) product_rows<C, 1, TA>(at(i), lda, b, ldb, c + i * ldc, ldc, depth, n, add);
}

// The forest of segments of a pack (packing.py) and the layer's heads. cos, sin: (T, rotary), both halves written out.
template <class C> struct Geometry {
  const Long *start, *length, *first, *ancestors, *ancestor_ends;
  Long segments, tokens, heads, groups, width, rotary, window;
  const C *cos, *sin;
  C scale, cap;
  Long row() const { return (heads + 2 * groups) * width; }
};

// out (width) = R_t in, the rotary embedding (Su et al. 2021) at token `t`, or its transpose R_t^T in if `back`
template <class C> void rotate(const Geometry<C>& g, const C* in, C* out, Long t, bool back) {
  const C *c = g.cos + t * g.rotary, *s = g.sin + t * g.rotary;
  Long half = g.rotary / 2;
  C turn = back ? C(-1) : C(1);
  for (Long i = 0; i < half; ++i) {
    C a = in[i], b = in[i + half];
    // the transpose takes each sine at the place that it was multiplied into
    out[i] = a * c[i] - turn * b * (back ? s[i + half] : s[i]);
    out[i + half] = b * c[i + half] + turn * a * (back ? s[i] : s[i + half]);
  }
  for (Long i = g.rotary; i < g.width; ++i) out[i] = in[i];
}

template <class T, class C> void fetch(const T* from, C* to, Long n) {
#pragma omp simd
  for (Long i = 0; i < n; ++i) to[i] = get(from[i]);
}

template <class C, class F> void over_path(const Geometry<C>& g, Long segment, F body) {
  Long place = 0, from = segment ? g.ancestor_ends[segment - 1] : 0;
  for (Long i = from; i <= g.ancestor_ends[segment]; ++i) {
    Long span = i == g.ancestor_ends[segment] ? segment : g.ancestors[i];
    for (Long t = g.start[span]; t < g.start[span] + g.length[span]; ++t) body(t, place++);
  }
}

constexpr Long TILE = 36;  // queries at once

// Buffers of one thread: keys and values of a path, a tile of queries, their scores.
template <class C> struct Scratch {
  Long reach, row;  // padded keys and padded head width
  std::vector<C> keys_t, keys, values, values_t, q, scores, mixed, grads, dkeys, dvalues, line;
  Scratch(Long most, Long width, bool backward) : reach(padded<C>(most)), row(padded<C>(width)) {
    keys_t.assign(width * reach, 0), q.assign(TILE * row, 0), scores.assign(TILE * reach, 0), mixed.assign(TILE * row, 0);
    line.assign(2 * row, 0);
    (backward ? values_t : values).assign(backward ? width * reach : reach * row, 0);
    if (backward)
      keys.assign(reach * row, 0), grads.assign(TILE * reach, 0), dkeys.assign(reach * row, 0), dvalues.assign(reach * row, 0);
  }
};

template <class T, class C>
void load_path(const Geometry<C>& g, const T* qkv, Long segment, Long group, Scratch<C>& s, bool backward) {
  Long keys = g.first[segment] + g.length[segment], end = padded<C>(keys);
  over_path(g, segment, [&](Long t, Long place) {
    const T* k = qkv + t * g.row() + (g.heads + group) * g.width;
    fetch(k, s.line.data(), g.width);
    C* turned = backward ? s.keys.data() + place * s.row : s.line.data() + s.row;
    rotate(g, s.line.data(), turned, t, false);
    for (Long i = 0; i < g.width; ++i) s.keys_t[i * s.reach + place] = turned[i];
    const T* v = k + g.groups * g.width;
    if (backward)
      for (Long i = 0; i < g.width; ++i) s.values_t[i * s.reach + place] = get(v[i]);
    else
      fetch(v, s.values.data() + place * s.row, g.width);
  });
  for (Long i = 0; i < g.width; ++i)  // clear what an earlier, longer path left in the padding
    for (Long j = keys; j < end; ++j) {
      s.keys_t[i * s.reach + j] = 0;
      if (backward) s.values_t[i * s.reach + j] = 0;
    }
  Long row = s.row;
  if (backward) std::fill(s.keys.begin() + keys * row, s.keys.begin() + end * row, C(0));
  else std::fill(s.values.begin() + keys * row, s.values.begin() + end * row, C(0));
}

struct Tile { Long from, count, low, high; };  // queries of a segment; keys [low, high) that any of them sees

template <class C> Tile tile_at(const Geometry<C>& g, Long segment, Long from) {
  Long count = std::min(TILE, g.length[segment] - from), position = g.first[segment] + from;
  Long low = g.window ? std::max(Long(0), position - g.window + 1) / LANES<C> * LANES<C> : 0;
  return {from, count, low, padded<C>(position + count)};
}

// scores (count, reach) = cap(q k^T): queries scaled and rotated in s.q, only columns [low, high) are written
template <class T, class C>
void score(const Geometry<C>& g, const T* qkv, Long segment, Long head, const Tile& tile, Scratch<C>& s) {
  for (Long i = 0; i < tile.count; ++i) {
    Long t = g.start[segment] + tile.from + i;
    fetch(qkv + t * g.row() + head * g.width, s.line.data(), g.width);
    for (Long j = 0; j < g.width; ++j) s.line[j] *= g.scale;
    rotate(g, s.line.data(), s.q.data() + i * s.row, t, false);
  }
  product<false>(s.q.data(), s.row, s.keys_t.data() + tile.low, s.reach, s.scores.data() + tile.low, s.reach, tile.count,
                 tile.high - tile.low, g.width, false);
  if (g.cap > 0)
    for (Long i = 0; i < tile.count; ++i)
#pragma omp simd
      for (Long j = tile.low; j < tile.high; ++j) s.scores[i * s.reach + j] = g.cap * hyperbolic(s.scores[i * s.reach + j] / g.cap);
}

// keys [low, high) that the query at `position` sees
template <class C> void visible(const Geometry<C>& g, Long position, Long& low, Long& high) {
  low = g.window ? std::max(Long(0), position - g.window + 1) : 0;
  high = position + 1;
}

template <class C> void normalise(C* line, const Tile& tile, Long low, Long high, C& lse) {
  C top = line[low], sum = 0;
#pragma omp simd reduction(max : top)
  for (Long j = low; j < high; ++j) top = std::max(top, line[j]);
#pragma omp simd reduction(+ : sum)
  for (Long j = low; j < high; ++j) {
    line[j] = exponential(line[j] - top);
    sum += line[j];
  }
  C share = C(1) / sum;
#pragma omp simd
  for (Long j = low; j < high; ++j) line[j] *= share;
  std::fill(line + tile.low, line + low, C(0));
  std::fill(line + high, line + tile.high, C(0));
  lse = top + std::log(sum);
}

template <class T, class C>
void attend(const Geometry<C>& g, const T* qkv, T* out, C* lse, Long segment, Long group, Scratch<C>& s) {
  load_path(g, qkv, segment, group, s, false);
  Long share = g.heads / g.groups;
  for (Long head = group * share; head < (group + 1) * share; ++head)
    for (Long from = 0; from < g.length[segment]; from += TILE) {
      Tile tile = tile_at(g, segment, from);
      score(g, qkv, segment, head, tile, s);
      for (Long i = 0; i < tile.count; ++i) {
        Long low, high, t = g.start[segment] + from + i;
        visible(g, g.first[segment] + from + i, low, high);
        normalise(s.scores.data() + i * s.reach, tile, low, high, lse[t * g.heads + head]);
      }
      product<false>(s.scores.data() + tile.low, s.reach, s.values.data() + tile.low * s.row, s.row, s.mixed.data(), s.row,
                     tile.count, s.row, tile.high - tile.low, false);
      for (Long i = 0; i < tile.count; ++i) {
        T* to = out + ((g.start[segment] + from + i) * g.heads + head) * g.width;
        for (Long j = 0; j < g.width; ++j) put(to[j], s.mixed[i * s.row + j]);
      }
    }
}

// P in scores and dS in grads for a tile of q queries and k keys (Dao 2023, algorithm 2):
//   P = exp(S - lse) (q, k),  dP = dO V^T (q, k),  delta = sum_j O_j dO_j (q),  dS = P (dP - delta) (1 - (S / cap)^2)
// S are the capped scores; s.mixed holds dO (q, width), and P = dS = 0 for keys that a query does not see.
template <class T, class C>
void score_gradient(const Geometry<C>& g, const T* mixed, const C* lse, Long segment, Long head, const Tile& tile, Scratch<C>& s) {
  product<false>(s.mixed.data(), s.row, s.values_t.data() + tile.low, s.reach, s.grads.data() + tile.low, s.reach, tile.count,
                 tile.high - tile.low, g.width, false);
  for (Long i = 0; i < tile.count; ++i) {
    Long low, high, t = g.start[segment] + tile.from + i;
    visible(g, g.first[segment] + tile.from + i, low, high);
    const T* o = mixed + (t * g.heads + head) * g.width;
    C *line = s.scores.data() + i * s.reach, *grad = s.grads.data() + i * s.reach, delta = 0, norm = lse[t * g.heads + head];
    for (Long j = 0; j < g.width; ++j) delta += get(o[j]) * s.mixed[i * s.row + j];
    C bend = g.cap > 0 ? C(1) / (g.cap * g.cap) : C(0);
#pragma omp simd
    for (Long j = low; j < high; ++j) {
      C y = line[j], p = exponential(y - norm);
      line[j] = p;
      grad[j] = p * (grad[j] - delta) * (C(1) - y * y * bend);
    }
    for (C* part : {line, grad}) {
      std::fill(part + tile.low, part + low, C(0));
      std::fill(part + high, part + tile.high, C(0));
    }
  }
}

// dq is written to dqkv; dk (still rotated) and dv are added to `sums` (T, groups, 2, width). For each head and tile:
//   dV += P^T dO (k, width),  dK += dS^T (scale Q) (k, width),  dQ = scale R^T (dS K) (q, width)
template <class T, class C>
void attend_backward(const Geometry<C>& g, const T* d, const T* qkv, const T* mixed, const C* lse, T* dqkv, C* sums, Long segment,
                     Long group, Scratch<C>& s) {
  load_path(g, qkv, segment, group, s, true);
  Long share = g.heads / g.groups, end = padded<C>(g.first[segment] + g.length[segment]);
  std::fill(s.dkeys.begin(), s.dkeys.begin() + end * s.row, C(0));
  std::fill(s.dvalues.begin(), s.dvalues.begin() + end * s.row, C(0));
  for (Long head = group * share; head < (group + 1) * share; ++head)
    for (Long from = 0; from < g.length[segment]; from += TILE) {
      Tile tile = tile_at(g, segment, from);
      Long span = tile.high - tile.low;
      score(g, qkv, segment, head, tile, s);
      for (Long i = 0; i < tile.count; ++i)
        fetch(d + ((g.start[segment] + from + i) * g.heads + head) * g.width, s.mixed.data() + i * s.row, g.width);
      score_gradient(g, mixed, lse, segment, head, tile, s);
      product<true>(s.scores.data() + tile.low, s.reach, s.mixed.data(), s.row, s.dvalues.data() + tile.low * s.row, s.row, span,
                    s.row, tile.count, true);
      product<true>(s.grads.data() + tile.low, s.reach, s.q.data(), s.row, s.dkeys.data() + tile.low * s.row, s.row, span, s.row,
                    tile.count, true);
      product<false>(s.grads.data() + tile.low, s.reach, s.keys.data() + tile.low * s.row, s.row, s.q.data(), s.row, tile.count,
                     s.row, span, false);
      for (Long i = 0; i < tile.count; ++i) {
        Long t = g.start[segment] + from + i;
        rotate(g, s.q.data() + i * s.row, s.line.data(), t, true);
        T* to = dqkv + t * g.row() + head * g.width;
        for (Long j = 0; j < g.width; ++j) put(to[j], s.line[j] * g.scale);
      }
    }
  over_path(g, segment, [&](Long t, Long place) {
    C* to = sums + (t * g.groups + group) * 2 * g.width;
    for (Long j = 0; j < g.width; ++j) to[j] += s.dkeys[place * s.row + j];
    for (Long j = 0; j < g.width; ++j) to[g.width + j] += s.dvalues[place * s.row + j];
  });
}

// Contiguous ranges of (group, segment) tasks of about equal work, one per thread.
template <class C, class F> void over_tasks(const Geometry<C>& g, int threads, bool backward, F body) {
  std::vector<Long> ends(g.segments);
  Long total = 0, most = 1;
  for (Long i = 0; i < g.segments; ++i) {
    Long reach = g.first[i] + g.length[i];
    most = std::max(most, reach);
    ends[i] = total += g.length[i] * (g.first[i] + g.length[i] / 2 + 1) + 2 * reach;
  }
  in_parallel(threads, [&](Long own, Long count) {
    Scratch<C> scratch(most, g.width, backward);
    for (Long task = 0; task < g.groups * g.segments; ++task) {
      Long group = task / g.segments, segment = task % g.segments;
      Long done = group * total + ends[segment] - 1;
      if (done * count / (total * g.groups) == own) body(segment, group, own, scratch);
    }
  });
}

template <class T, class C = Compute<T>>
void attention(const Geometry<C>& g, const T* qkv, T* out, C* lse, int threads) {
  over_tasks(g, threads, false,
             [&](Long segment, Long group, Long, Scratch<C>& s) { attend(g, qkv, out, lse, segment, group, s); });
}

template <class T, class C = Compute<T>>
void attention_backward(const Geometry<C>& g, const T* d, const T* qkv, const T* mixed, const C* lse, T* dqkv, int threads) {
  // In a forest, child segments add to their ancestors' keys from several threads. Each thread then has its own sums, which
  // are added in the order of the threads.
  bool is_forest = g.segments && g.ancestor_ends[g.segments - 1] > 0;
  Long size = g.tokens * g.groups * 2 * g.width, copies = is_forest ? threads : 1;
  std::vector<C> sums(size * copies, C(0));
  over_tasks(g, threads, true, [&](Long segment, Long group, Long own, Scratch<C>& s) {
    attend_backward(g, d, qkv, mixed, lse, dqkv, sums.data() + (is_forest ? own * size : 0), segment, group, s);
  });
  over_rows(g.tokens, threads, [&](Long t) {
    std::vector<C> line(g.width);
    for (Long group = 0; group < g.groups; ++group) {
      C* sum = sums.data() + (t * g.groups + group) * 2 * g.width;
      for (Long copy = 1; copy < copies; ++copy)
        for (Long j = 0; j < 2 * g.width; ++j) sum[j] += sum[copy * size + j];
      rotate(g, sum, line.data(), t, true);
      T* to = dqkv + t * g.row() + (g.heads + group) * g.width;
      for (Long j = 0; j < g.width; ++j) put(to[j], line[j]);
      for (Long j = 0; j < g.width; ++j) put(to[g.groups * g.width + j], sum[g.width + j]);
    }
  });
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                        \
  extern "C" void sartor_rms_norm_##NAME(const T* x, const T* w, T* y, Compute<T>* rstd, Long rows, Long width, double eps,    \
                                         double offset, int threads) {                                                        \
    rms_norm<T>(x, w, y, rstd, rows, width, Compute<T>(eps), Compute<T>(offset), threads);                                     \
  }                                                                                                                            \
  extern "C" void sartor_rms_norm_backward_##NAME(const T* dy, const T* x, const T* w, const Compute<T>* rstd, const T* add,   \
                                                  T* dx, Long rows, Long width, double offset, int threads) {                  \
    rms_norm_backward<T>(dy, x, w, rstd, add, dx, rows, width, Compute<T>(offset), threads);                                   \
  }                                                                                                                            \
  extern "C" void sartor_glu_##NAME(const T* gate_up, T* out, Long rows, Long width, int gelu, int threads) {                  \
    gelu ? glu<GeluTanh, T>(gate_up, out, rows, width, threads) : glu<Silu, T>(gate_up, out, rows, width, threads);            \
  }                                                                                                                            \
  extern "C" void sartor_glu_backward_##NAME(const T* d, T* gate_up, T* out, Long rows, Long width, int gelu, int threads) {   \
    gelu ? glu_backward<GeluTanh, T>(d, gate_up, out, rows, width, threads)                                                    \
         : glu_backward<Silu, T>(d, gate_up, out, rows, width, threads);                                                       \
  }                                                                                                                            \
  extern "C" void sartor_cross_entropy_##NAME(T* logits, const Long* targets, Compute<T>* losses, Long rows, Long width,       \
                                              double cap, int gradient, int threads) {                                         \
    cross_entropy<T>(logits, targets, losses, rows, width, Compute<T>(cap), gradient, threads);                                \
  }                                                                                                                            \
  extern "C" void sartor_attention_##NAME(const Geometry<Compute<T>>* g, const T* qkv, T* out, Compute<T>* lse, int threads) { \
    attention<T>(*g, qkv, out, lse, threads);                                                                                  \
  }                                                                                                                            \
  extern "C" void sartor_attention_backward_##NAME(const Geometry<Compute<T>>* g, const T* d, const T* qkv, const T* mixed,    \
                                                   const Compute<T>* lse, T* dqkv, int threads) {                              \
    attention_backward<T>(*g, d, qkv, mixed, lse, dqkv, threads);                                                              \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
EXPORT(double, f64)
