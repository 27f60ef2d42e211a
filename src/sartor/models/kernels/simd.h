// Shared by the kernels: vector types as wide as the machine's, bf16, exp and tanh as plain arithmetic, work split by rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

extern "C" {
void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace {

using Long = int64_t;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class C> struct Lanes { typedef C V __attribute__((vector_size(VECTOR_BYTES))); };
template <class C> constexpr Long LANES = VECTOR_BYTES / sizeof(C);

template <class C> inline Long padded(Long n) { return (n + LANES<C> - 1) / LANES<C> * LANES<C>; }

struct bf16 { uint16_t bits; };

inline float get(float x) { return x; }
inline double get(double x) { return x; }
inline float get(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void put(float& to, float x) { to = x; }
inline void put(double& to, double x) { to = x; }
inline void put(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // round to nearest, ties to even; a NaN stays a NaN
  bits = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  to.bits = uint16_t(bits >> 16);
}

// a b + c, rounded once if the processor has an instruction for it. decode_kernels.cpp is compiled with -ffp-contract=off, so
// that the compiler fuses no product with a sum by itself: it would do so in one copy of a loop and not in another, and the
// last bit of a result would depend on the copy.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Lanes<float>::V fused(Lanes<float>::V a, Lanes<float>::V b, Lanes<float>::V c) {
#if defined(__AVX512F__)
  return (Lanes<float>::V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Lanes<float>::V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Lanes<float>::V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

template <class T> using Compute = typename std::conditional<std::is_same<T, double>::value, double, float>::type;

// exp by 2^n e^r with |r| <= ln 2 / 2 (Cephes' polynomial), plain arithmetic so that loops of it become vector code.
// Within 2 ulp; below -87 it is 0; a NaN stays a NaN.
inline float exponential(float x) {
  float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float n = fused(clamped, 1.44269504f, 12582912.0f) - 12582912.0f;
  float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, clamped));
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p * r, r, r) + 1.0f;
  int32_t exponent = (int32_t(n == n ? n : 0.0f) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return x < -87.0f ? 0.0f : p * scale;
}
inline double exponential(double x) { return std::exp(x); }

// tanh by exp; near 0, where that cancels, by its series (next term below 1e-8 of the value)
inline float hyperbolic(float y) {
  float y2 = y * y;
  float series = y * (1.0f + y2 * (-0.333333333f + y2 * (0.133333333f + y2 * (-0.0539682540f + y2 * 0.0218694885f))));
  float by_exp = 1.0f - 2.0f / (exponential(2.0f * y) + 1.0f);
  return y2 < 0.04f ? series : by_exp;
}
inline double hyperbolic(double y) { return std::tanh(y); }

// Run body(own, count) in `threads` threads: own is the thread's number in [0, count). The parallel region starts through the
// entry point of the OpenMP runtime that torch has loaded (libgomp's, which LLVM's also exports) and not by a pragma. So any
// compiler works, also one without an OpenMP runtime, such as zig's.
template <class F> void in_parallel(int threads, F body) {
  auto run = [](void* data) { (*static_cast<F*>(data))(Long(omp_get_thread_num()), Long(omp_get_num_threads())); };
  GOMP_parallel(run, &body, unsigned(threads), 0);
}

template <class F> void over_rows(Long rows, int threads, F body) {
  in_parallel(threads, [&](Long own, Long count) {
    for (Long row = rows * own / count; row < rows * (own + 1) / count; ++row) body(row);
  });
}

}  // namespace
