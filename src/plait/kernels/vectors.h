// Vectors of 4, 8 or 16 floats, as long as the processor's registers: what all kernels are written over. They are the
// compiler's own; intrinsics stand only where the compiler would do worse. PLAIT_LANES asks for a length without them, so
// that the arithmetic of any processor can be tested on any other.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(PLAIT_LANES)
constexpr int LANES = PLAIT_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#if !defined(PLAIT_LANES) && defined(__AVX2__)
#include <immintrin.h>
#define X86 1
#endif
#if defined(X86) && defined(__AVX512F__)
#define WIDE 1
#endif
#if defined(WIDE) && defined(__AVX512BF16__)
#define BF16_UNITS 1
#endif
#if defined(BF16_UNITS) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AMX 1
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
struct half {  // IEEE's 16 bits
    uint16_t bits;
};
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float f4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));

constexpr float LOG2E = 1.44269504f;

template <class To, class From>
INLINE To bits_of(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "");
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// --- one number ------------------------------------------------------------------------------------------------------

INLINE float one(const float *p) { return *p; }
INLINE float one(const bf16 *p) { return bits_of<float>((uint32_t)*p << 16); }
INLINE float one(const half *p) {
    const uint32_t sign = (uint32_t)(p->bits & 0x8000) << 16, rest = p->bits & 0x7fff;
    if (rest < 0x400) return bits_of<float>(sign | bits_of<uint32_t>((float)rest * 5.9604644775390625e-8f));  // 2^-24
    return bits_of<float>(sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u)));
}
INLINE void put(float *p, float x) { *p = x; }
INLINE void put(bf16 *p, float x) {  // to the nearest, ties to even
    const uint32_t bits = bits_of<uint32_t>(x);
    *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}
INLINE void put(half *p, float x) {
    const uint32_t bits = bits_of<uint32_t>(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest >= 0x47800000) {  // too large, or not a number
        p->bits = sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00);
    } else if (rest < 0x38800000) {  // below the normal ones: adding .5 leaves the bits at the end
        p->bits = sign | (bits_of<uint32_t>(bits_of<float>(rest) + 0.5f) - 0x3f000000u);
    } else {
        p->bits = sign | ((rest + 0xfff + ((rest >> 13) & 1) - 0x38000000u) >> 13);
    }
}

// --- vectors ---------------------------------------------------------------------------------------------------------

INLINE vec splat(float x) { return x - vec{}; }  // taking off 0 is nothing, adding it would turn -0 into 0
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE vec load(const bf16 *p) {
#if defined(WIDE)  // the compiler would do it in halves
    return (vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#elif defined(X86)
    return (vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
#else
    return bits_of<vec>((uvec)(__builtin_convertvector(*(const hvec *)p, uvec) << 16));
#endif
}
INLINE vec load(const half *p) {
#if defined(WIDE)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(X86) && defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vec x;
    for (int i = 0; i < LANES; i++) x[i] = one(p + i);
    return x;
#endif
}
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE void store(bf16 *p, vec x) {
#if defined(BF16_UNITS)
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    uvec bits = bits_of<uvec>(x);
    const ivec number = x == x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = (bits & (uvec)number) | (0x7fc0 & ~(uvec)number);
    *(hvec *)p = __builtin_convertvector(bits, hvec);
#endif
}

// The first n items, zeros beyond; nothing beyond them is touched.
template <class T>
INLINE vec load(const T *p, int64_t n) {
    if (n >= LANES) return load(p);
    T all[LANES] = {};
    for (int64_t i = 0; i < n; i++) all[i] = p[i];
    return load(all);
}
template <class T>
INLINE void store(T *p, vec x, int64_t n) {
    if (n >= LANES) return store(p, x);
    T all[LANES];
    store(all, x);
    for (int64_t i = 0; i < n; i++) p[i] = all[i];
}
INLINE ivec lanes() {
    ivec x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x;
}
INLINE vec where(ivec condition, vec yes, vec no) { return condition ? yes : no; }
INLINE vec larger(vec a, vec b) { return b > a ? b : a; }  // b's not-a-number is lost, a's stays

INLINE f4 quarter(vec x) {  // the sum of its four quarters
    if constexpr (LANES == 4) {
        return bits_of<f4>(x);
    } else if constexpr (LANES == 8) {
        f4 a[2];
        std::memcpy(a, &x, 32);
        return a[0] + a[1];
    } else {
        f8 a[2];
        std::memcpy(a, &x, 64);
        const f8 sum = a[0] + a[1];
        f4 b[2];
        std::memcpy(b, &sum, 32);
        return b[0] + b[1];
    }
}
INLINE float total(vec x) {
    const f4 c = quarter(x);
    return (c[0] + c[1]) + (c[2] + c[3]);
}
INLINE f4 totals(vec x, vec y, vec z, vec w) {  // of each, as `total` adds
    const f4 a = quarter(x), b = quarter(y), c = quarter(z), d = quarter(w);
    const f4 ab = f4{a[0], b[0], a[2], b[2]} + f4{a[1], b[1], a[3], b[3]};
    const f4 cd = f4{c[0], d[0], c[2], d[2]} + f4{c[1], d[1], c[3], d[3]};
    return f4{ab[0], ab[1], cd[0], cd[1]} + f4{ab[2], ab[3], cd[2], cd[3]};
}
INLINE float most(vec x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = std::max(m, x[i]);
    return m;
}

// 2^x, relative error 2e-7, for x from -126 to 127: a polynomial fitted on half a unit to each side.
INLINE vec power(vec x) {
#if defined(WIDE)
    const __m512 n = _mm512_roundscale_ps((__m512)x, 0), r = (__m512)x - n;
    const __m512 p = ((((r * 0.00132765f + 0.00967554f) * r + 0.05550713f) * r + 0.24022120f) * r + 0.69314697f) * r + 1.0f;
    return (vec)_mm512_scalef_ps(p, n);
#else
    x = x < -126.0f ? splat(-126.0f) : x;  // below: 1e-38 in place of 0
    const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vec moved = x + shift, r = x - (moved - shift);
    const vec p = ((((r * 0.00132765f + 0.00967554f) * r + 0.05550713f) * r + 0.24022120f) * r + 0.69314697f) * r + 1.0f;
    return bits_of<vec>((ivec)(bits_of<ivec>(p) + (bits_of<ivec>(moved) << 23)));
#endif
}
INLINE vec exponential(vec x) {  // relative error 2e-7 (Cephes)
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const vec shift = splat(12582912.0f);
    const vec n = x * LOG2E + shift - shift;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_of<vec>((ivec)((__builtin_convertvector(n, ivec) + 127) << 23));
}
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE vec gelu(vec x, bool by_tanh) {
    if (by_tanh) return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    // x * Phi(x), erfc by Abramowitz and Stegun 7.1.26, error 1.5e-7
    const vec z = x * 0.70710678f, a = z < 0.0f ? -z : z, t = 1.0f / (1.0f + 0.3275911f * a);
    const vec p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const vec tail = 0.5f * p * exponential(-a * a);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}
