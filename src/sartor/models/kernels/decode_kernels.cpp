// Serving on a CPU: one forward pass ("walk") of N tokens through all layers of a Llama-shaped base, over a paged cache. Every
// token has the LoRA factors of its own adapter or none.
//
// A token's result is computed from that token, its adapter and the cached positions of its row, in an order that nothing else
// changes: not the other tokens, not their number, not the number of threads. So a prompt has the same bits in chunks of any
// size, a reply has the same bits beside any other requests, and keys and values of a reply can be reused for a later prompt.
//
// Weights are read as stored in memory, (outputs, inputs), so a base that is mapped from its files is shared by all processes
// that serve it. Products have three implementations: for bf16 AMX tiles or AVX-512's products of pairs, if the processor has
// them, and plain vectors.
//
// Threads share the work by claiming pieces of it, each first its own part and then the rest of others'. They continue when
// every piece of a stage is done, not when every thread has arrived: a thread that the system has descheduled delays nobody,
// unless it was descheduled within a piece.
#include "paged_attention.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace {

// Structures filled by Python: kernels/cpu_forward.py has the same ones.

struct Product {  // linear modules that read the same input; outputs stand side by side
  Long count, ins, outs[3];
  const void *weight[3], *bias[3];
  Long total() const { return outs[0] + outs[1] + outs[2]; }
};
struct Layer {
  const void *norm, *mlp_norm, *after[2], *head_norms[2];
  Product products[4];
  void* cache;  // (pages, groups): keys and values, as paged_attention.h has them
  Long turns, window;
};
struct Model {
  Long layers, width, heads, groups, head, rotary, gelu, vocabulary;
  double scale, cap, eps, offset, head_cap;
  const Layer* layer;
  const void *norm, *lm_head;
};
// LoRA on a module: a (rank, ins); b (outs / 16, rank, 16), scaled, or (outs / 16, rank / 2, 16, 2) for tiles, outputs filled
// up to 16s; rank is a multiple of 16, 0 for none
struct Factor { const void *a, *b; Long rank; };
struct Batch {
  Long tokens, most_pages, rank;  // rank: the largest of any factor
  const Long *positions, *rows, *pages;  // pages: (rows, most_pages)
  const Factor* const* factors;  // of each token: one Factor for each linear module of each layer; null for none
  const float *cos[2], *sin[2];  // (positions, rotary), both halves written out
  float* x;  // (tokens, width), in and out
};

// Counters of every stage of a walk: pieces claimed from each thread's part, and pieces done.
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
    // after about 50 us of spinning: the awaited thread was descheduled; sleep, so that it can run on this processor
    if (tries > 1000) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
};

template <class T> void rms_norm(const float* x, const T* w, float* y, Long width, float eps, float offset) {
  V sums = {};
  Long whole = width / W * W;
  for (Long i = 0; i < whole; i += W) sums = fused(load(x + i), load(x + i), sums);
  float total = sum(sums);
  for (Long i = whole; i < width; ++i) total = fused(x[i], x[i], total);
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

inline float silu(float x) { return x / (1.0f + exponential(-x)); }
inline float gelu(float x) {
  return 0.5f * x * (1.0f + hyperbolic(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

struct Room {  // buffers that the threads of a walk share
  float* y;  // (tokens, most outputs of a product)
  float* lows;  // (3, tokens, rank): x A^T of each part of a product
  void* in;  // inputs of products, in the layout of their implementation
};

struct Span { Long first, count; };  // consecutive tokens of one row

template <class Op, class Look, class T> struct Walk {
  using In = typename Op::In;
  const Model& m;
  const Batch& b;
  Room& room;
  Worker worker;
  std::vector<float> line;  // work row of one token
  Long reach;
  std::vector<float> own;  // work buffer of one call of Look::look
  std::vector<Span> spans;  // tokens that attend together
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
        reach(b.most_pages * PAGE), own(Look::room(m.head, reach) + 16) {
    for (Long t = 0; t < b.tokens; ++t) {
      if (!t || b.factors[t] != b.factors[t - 1]) runs.push_back(t);
      adapted = adapted || b.factors[t];
    }
    runs.push_back(b.tokens);
    Long most = Look::JOINS_TOKENS ? std::max(Long(1), Look::COLUMNS / (m.heads / m.groups)) : 1;
    for (Long t = 0; t < b.tokens; ++t) {
      bool joins = t && spans.back().count < most && b.rows[t] == b.rows[t - 1] && b.positions[t] == b.positions[t - 1] + 1;
      joins ? void(++spans.back().count) : spans.push_back({t, 1});
    }
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
      worker.share(Long(spans.size()) * m.groups, [&](Long piece) { attend(l, piece / m.groups, piece % m.groups); });
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
    if (b.positions[t] % PAGE == 0)
      for (Long g = 0; g < m.groups; ++g) Look::begin(page(m.layer[layer], t, g), m.head);
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
    Long each = raised;
    raised *= runs.size() - 1;
    worker.share(pieces + lowered, [&](Long piece) {
      if (piece >= pieces) return lower(p, first, (piece - pieces) % p.count, (piece - pieces) / p.count);
      Long part = 0;
      while (piece >= ends[part]) ++part;
      Long n0 = (piece - (part ? ends[part - 1] : 0)) * 32, n1 = std::min(n0 + 32, p.outs[part]);
      float* y = start(p, part);
      Op::span(static_cast<const T*>(p.weight[part]), p.ins, n0, n1, p.ins, in(), p.ins, 0, b.tokens, y, total);
      if (const T* bias = static_cast<const T*>(p.bias[part]))
        for (Long t = 0; t < b.tokens; ++t)
          for (Long n = n0; n < n1; ++n) y[t * total + n] += get(bias[n]);
    });
    if (adapted)
      worker.share(raised, [&](Long piece) {
        Long run = piece / each, part = 0;
        for (piece %= each; piece >= spans[part];) ++part;
        Long n0 = (piece - (part ? spans[part - 1] : 0)) * SPAN, n1 = std::min(n0 + SPAN, p.outs[part]);
        if (const Factor* f = factor(first + part, run)) raise(p, part, *f, run, n0, n1);
      });
  }

  float* start(const Product& p, Long part) {
    return room.y + (part > 0 ? p.outs[0] : 0) + (part > 1 ? p.outs[1] : 0);
  }

  const Factor* factor(Long module, Long run) {
    const Factor* all = b.factors[runs[run]];
    return all && all[module].rank ? all + module : nullptr;
  }

  // the part of a product's weights to prefetch during this piece of the work before it
  Ahead weights(const Product& p, Long piece, Long pieces) {
    if (pieces > 200) return {};
    const char* from = static_cast<const char*>(p.weight[0]);
    Long bytes = p.outs[0] * p.ins * Long(sizeof(T));
    return {from + bytes * piece / pieces, from + bytes * (piece + 1) / pieces};
  }

  float* low(Long part, Long t) { return room.lows + (part * b.tokens + t) * b.rank; }

  // x A^T of one part for the tokens of a run
  void lower(const Product& p, Long first, Long part, Long run) {
    const Factor* f = factor(first + part, run);
    if (!f) return;
    Op::span(static_cast<const T*>(f->a), p.ins, 0, f->rank, p.ins, in(), p.ins, runs[run], runs[run + 1], low(part, 0), b.rank);
    for (Long t = runs[run]; t < runs[run + 1]; ++t) Op::narrow(low(part, t), f->rank);
  }

  // and that times B^T for outputs [n0, n1), n0 a multiple of 16
  void raise(const Product& p, Long part, const Factor& f, Long run, Long n0, Long n1) {
    Long ldy = p.total(), end = runs[run + 1];
    auto over = [&](Long t, auto some) {
      float* y = start(p, part) + t * ldy;
      for (Long n = n0; n < n1; n += 16) {
        const T* of = static_cast<const T*>(f.b) + n * f.rank;
        if (t == runs[run])
          for (Long i = 0; i < 16 * f.rank; i += 64 / Long(sizeof(T))) __builtin_prefetch(of + 1024 + i);
        Op::template raise<some()>(of, f.rank, low(part, t), b.rank, y + n, ldy, std::min(n1 - n, Long(16)));
      }
    };
    Long t = runs[run];
    for (; t + 4 <= end; t += 4) over(t, std::integral_constant<int, 4>());
    for (; t < end; ++t) over(t, std::integral_constant<int, 1>());
  }

  // rotate and scale the token's queries in place; store its keys and values in the cache
  void remember(const Layer& l, Long t) {
    Long position = b.positions[t];
    const float *cos = b.cos[l.turns] + position * m.rotary, *sin = b.sin[l.turns] + position * m.rotary;
    float* y = room.y + t * l.products[0].total();
    for (Long h = 0; h < m.heads + m.groups; ++h, y += m.head) {
      if (const void* weight = l.head_norms[h >= m.heads])
        rms_norm(y, static_cast<const T*>(weight), y, m.head, float(m.eps), float(m.offset));
      turn(y, cos, sin, m.rotary);
      for (Long i = 0; h < m.heads && i < m.head; ++i) y[i] *= float(m.scale);
    }
    y -= m.groups * m.head;
    for (Long g = 0; g < m.groups; ++g, y += m.head) Look::keep(page(l, t, g), m.head, position % PAGE, y, y + m.groups * m.head);
  }

  // the page that holds a token's key and value of a group
  T* page(const Layer& l, Long t, Long group) {
    return static_cast<T*>(l.cache) + (pages(t)[b.positions[t] / PAGE] * m.groups + group) * Look::page_size(m.head);
  }

  void attend(const Layer& l, Long number, Long group) {
    Span span = spans[number];
    Long share = m.heads / m.groups, pieces = Long(spans.size()) * m.groups, total = l.products[0].total();
    float* work = own.data() + (-reinterpret_cast<uintptr_t>(own.data()) & 63) / sizeof(float);  // aligned to a cache line
    Ahead ahead = weights(l.products[1], number * m.groups + group, pieces);
    View<T> view{static_cast<const T*>(l.cache), pages(span.first), m.groups, group, m.head, l.window, Look::page_size(m.head),
                 float(m.cap)};
    for (Long low = 0; low < span.count * share; low += Look::COLUMNS) {
      Column columns[Look::COLUMNS];
      Long count = std::min(span.count * share - low, Look::COLUMNS);
      auto token = [&](Long c) { return span.first + (low + c) / share; };
      auto head = [&](Long c) { return group * share + (low + c) % share; };
      for (Long c = 0; c < count; ++c) columns[c] = {room.y + token(c) * total + head(c) * m.head, b.positions[token(c)]};
      Look::look(view, columns, count, work, reach, ahead, [&](Long c, Long from, Long some, const float* numbers) {
        Op::put(in(), l.products[1].ins, token(c), head(c) * m.head + from, some, numbers);
      });
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

// pieces of the scratch memory that Python provides, each aligned to a cache line
struct Scratch {
  char* at;
  Long used = 0;
  void* piece(Long bytes) {
    void* found = at ? at + used : nullptr;
    used += (bytes + 63) / 64 * 64;
    return found;
  }
};

template <class Op, class Look, class T> Room rooms(const Model& m, Long tokens, Long rank, Scratch& scratch) {
  using In = typename Op::In;
  using Made = Walk<Op, Look, T>;
  Room room;
  room.y = static_cast<float*>(scratch.piece(tokens * std::max(Made::most_outs(m), m.width) * sizeof(float)));
  room.in = scratch.piece(Op::size(tokens, std::max(Made::most_ins(m), m.width)) * sizeof(In));
  room.lows = static_cast<float*>(scratch.piece(3 * tokens * rank * sizeof(float)));
  return room;
}

template <class Op, class Look, class T> void walk(const Model& m, const Batch& b, char* memory, int threads) {
  Scratch scratch{memory};
  Room room = rooms<Op, Look, T>(m, b.tokens, b.rank, scratch);
  Stages stages(m.layers * 13 + 1, threads);
  in_parallel(threads, [&](Long own, Long) {
    Op::begin();
    Walk<Op, Look, T>(m, b, room, stages, own).all();
    Op::end();
  });
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
  in_parallel(threads, [&](Long own, Long) {
    Op::begin();
    Worker worker{stages, own};
    std::vector<float> line(m.width);
    worker.share(tokens, [&](Long t) {
      rms_norm(x + t * m.width, static_cast<const T*>(m.norm), line.data(), m.width, float(m.eps), float(m.offset));
      Op::put(in, m.width, t, 0, m.width, line.data());
    });
    worker.share(pieces, [&](Long piece) {
      Long n0 = piece * ROWS, n1 = std::min(n0 + ROWS, m.vocabulary);
      Op::span(static_cast<const T*>(m.lm_head), m.width, n0, n1, m.width, in, m.width, 0, tokens, logits, m.vocabulary);
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
  });
  for (Long t = 0; t < tokens; ++t) {
    best[t] = places[t];
    float top = tops[t];
    for (Long piece = 1; piece < pieces && best[t] >= 0; ++piece) {
      Long at = piece * tokens + t;
      if (places[at] < 0 || tops[at] > top) best[t] = places[at], top = tops[at];
    }
  }
}

template <class Op, class Look, class T> Long room_bytes(const Model& m, Long tokens, Long rank) {
  Scratch scratch{nullptr};
  rooms<Op, Look, T>(m, tokens, rank, scratch);
  return scratch.used;
}

}  // namespace

extern "C" int sartor_amx() { return amx_is_allowed(); }
extern "C" int sartor_pairs() { return has_pairs(); }

#define EXPORT(OP, LOOK, T, NAME)                                                                                                     \
  extern "C" Long sartor_page_numbers_##NAME(Long head) { return LOOK::page_size(head); }                                             \
  extern "C" Long sartor_walk_bytes_##NAME(const Model* m, Long tokens, Long rank) { return room_bytes<OP, LOOK, T>(*m, tokens, rank); } \
  extern "C" void sartor_walk_##NAME(const Model* m, const Batch* b, char* memory, int threads) {                              \
    walk<OP, LOOK, T>(*m, *b, memory, threads);                                                                                      \
  }                                                                                                                            \
  extern "C" void sartor_head_##NAME(const Model* m, const float* x, Long tokens, float* logits, Long* best, char* memory,     \
                                     int threads) {                                                                            \
    head<OP, T>(*m, x, tokens, logits, best, memory, threads);                                                                 \
  }

EXPORT(Plain<float>, PlainLook<float>, float, f32)
EXPORT(Plain<bf16>, PlainLook<bf16>, bf16, bf16)
#ifdef SARTOR_PAIRS
EXPORT(Pairs, PlainLook<bf16>, bf16, pairs)
#endif
#ifdef SARTOR_AMX
EXPORT(Amx, AmxLook, bf16, amx)
#endif
