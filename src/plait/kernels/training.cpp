// What lies between the matrix products of a block in training, forward and backward, in few passes over memory: norms,
// gates, activations, losses, and attention whole. `kernels/training.py` calls it; what it computes in
// PyTorch is `model/transformer.py`.
//
// Activations are fp32 or, where the processor has units for its products, bf16; the residual stream and all sums are fp32.
#include "products.h"

// --- a team of threads -----------------------------------------------------------------------------------------------

template <class Work>
static void together(int64_t threads, int64_t items, Work work) {  // work(thread, begin, end)
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
            work(i, items * i / n, items * (i + 1) / n);
        }
        return;
    }
#endif
    work((int64_t)0, (int64_t)0, items);
}

// --- attention: causal, over what each row holds itself ----------------------------------------------------------------

template <class T>
struct Attention {  // mirrored in training.py
    int64_t batch, length, heads, kv_heads, width;  // a head's width is a multiple of 32
    float eps;
    const T *qkv;                  // (batch, length, heads + 2 kv_heads, width)
    const float *q_norm, *k_norm;  // (width,), or null
    const float *cosines, *sines;  // (1 or batch, length, width), the sines of the first half negated; or null
    int64_t stride;                // of a batch row in those
    T *mixed;                      // (batch, length, heads, width)
    float *logs;                   // (batch, heads, length): of each softmax's normaliser, to base 2
    int64_t dropped;               // of 2^32 chances, how many dropout takes; which, `seed` says
    int64_t seed;

    int64_t all_heads() const { return heads + 2 * kv_heads; }
    int64_t at(int64_t b, int64_t l, int64_t head) const { return ((b * length + l) * all_heads() + head) * width; }
};

struct Scratch {
    char *at;
    template <class T>
    T *take(int64_t count) {
        T *here = (T *)at;
        at += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }
};

#if defined(BF16_UNITS)
#include "attention_bf16.h"
#endif

constexpr int64_t BLOCK = 32;  // queries that are taken at a time
static inline int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// 1 / rms of a head's values.
INLINE float scale_of(const float *from, int64_t width, float eps) {
    vec squares = {};
    for (int64_t i = 0; i < width; i += LANES) squares += load(from + i) * load(from + i);
    return 1.0f / std::sqrt(total(squares) / width + eps);
}

// A head of queries or keys as rows (padded length, width), normed and rotated; zeros beyond.
static void turned_rows(const Attention<float> &x, int64_t b, int64_t head, const float *norm, float *to) {
    const int64_t width = x.width, middle = width / 2;
    for (int64_t l = 0; l < x.length; l++, to += width) {
        const float *from = x.qkv + x.at(b, l, head);
        const float scale = norm ? scale_of(from, width, x.eps) : 1.0f;
        for (int64_t i = 0, j = middle; i < middle; i += LANES, j += LANES) {
            vec a = load(from + i), c = load(from + j);
            if (norm) a = a * scale * load(norm + i), c = c * scale * load(norm + j);
            if (x.cosines) {
                const int64_t at = b * x.stride + l * width;
                const vec cosine = load(x.cosines + at + i), sine = load(x.sines + at + j), before = a;
                a = a * cosine - c * sine;
                c = c * cosine + before * sine;
            }
            store(to + i, a);
            store(to + j, c);
        }
    }
    std::memset(to, 0, (padded(x.length) - x.length) * width * 4);
}

// The gradient to what `turned_rows` read, from that to what it gave, (length, width), which it overwrites; `to_norm`
// (width,) is added to.
static void turned_back(const Attention<float> &x, int64_t b, int64_t head, const float *norm, float *grads, float *to_qkv, float *to_norm) {
    const int64_t width = x.width, middle = width / 2;
    for (int64_t l = 0; l < x.length; l++, grads += width) {
        const float *from = x.qkv + x.at(b, l, head);
        float *to = to_qkv + x.at(b, l, head);
        if (x.cosines)  // the rotation back
            for (int64_t i = 0, j = middle; i < middle; i += LANES, j += LANES) {
                const int64_t at = b * x.stride + l * width;
                const vec cosine = load(x.cosines + at + i), sine = load(x.sines + at + j);
                const vec a = load(grads + i), c = load(grads + j);
                store(grads + i, a * cosine + c * sine);
                store(grads + j, c * cosine - a * sine);
            }
        if (!norm) {
            std::memcpy(to, grads, width * 4);
            continue;
        }
        const float scale = scale_of(from, width, x.eps);
        vec along = {};
        for (int64_t i = 0; i < width; i += LANES) along += load(from + i) * load(grads + i) * load(norm + i);
        const float mean = total(along) * scale * scale / width;
        for (int64_t i = 0; i < width; i += LANES) {
            const vec v = load(from + i), g = load(grads + i);
            store(to_norm + i, load(to_norm + i) + g * v * scale);
            store(to + i, (g * load(norm + i) - v * mean) * scale);
        }
    }
}

// (length, width) of a tensor whose rows lie `stride` apart, as rows (padded length, width).
static void plain_rows(const float *from, int64_t stride, int64_t length, int64_t width, float *to) {
    for (int64_t l = 0; l < length; l++, from += stride) std::memcpy(to + l * width, from, width * 4);
    std::memset(to + length * width, 0, (padded(length) - length) * width * 4);
}

// What dropout multiplies the chances of a query l with, for LANES keys from t on: a function of the place and the seed.
INLINE vec kept(const Attention<float> &x, int64_t head, int64_t t, int64_t l) {
    uvec bits = (uvec)lanes() * (uint32_t)x.length + (uint32_t)((head * x.length + t) * x.length + l);
    bits ^= (uint32_t)x.seed;
    bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
    bits = (bits ^ (bits >> 13)) * 0xc2b2ae35u;
    bits ^= bits >> 16;  // murmur3's finaliser
    const ivec stays = bits >= (uint32_t)x.dropped;
    return where(stays, splat((float)(1.0 / (1.0 - x.dropped / 4294967296.0))), vec{});
}

static int64_t fp32_scratch(int64_t length, int64_t width) {
    const int64_t n = padded(length);
    return (n * width * 9 + 2 * BLOCK * n + BLOCK * width) * 4 + 16 * 64;
}

static void attend(const Attention<float> &x, int64_t b, int64_t kv, Scratch room) {
    const int64_t length = x.length, n = padded(length), width = x.width, group = x.heads / x.kv_heads;
    float *queries = room.take<float>(n * width), *keys = room.take<float>(n * width), *turned = room.take<float>(n * width);
    float *values = room.take<float>(n * width), *scores = room.take<float>(BLOCK * n), *out = room.take<float>(BLOCK * width);
    const float unit = LOG2E / std::sqrt((float)width);
    turned_rows(x, b, x.heads + kv, x.k_norm, keys);
    columns_of(keys, n, width, turned);
    plain_rows(x.qkv + x.at(b, 0, x.heads + x.kv_heads + kv), x.all_heads() * width, length, width, values);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        turned_rows(x, b, h, x.q_norm, queries);
        for (int64_t l = 0; l < length; l += BLOCK) {
            const int64_t held = l + BLOCK, here = std::min(length - l, BLOCK);
            product(queries + l * width, width, 1, here, turned, n, width, held, scores, held, false);
            float shares[BLOCK];
            for (int64_t q = 0; q < here; q++) {
                float *row = scores + q * held;
                const int64_t seen = l + q + 1, whole = (seen + LANES - 1) / LANES * LANES;
                for (int64_t t = seen; t < whole; t++) row[t] = -INFINITY;
                vec greatest = load(row);
                for (int64_t t = LANES; t < whole; t += LANES) greatest = larger(greatest, load(row + t));
                const float top = most(greatest) * unit;
                vec sums = {};
                for (int64_t t = 0; t < whole; t += LANES) {
                    vec chance = power(load(row + t) * unit - top);
                    if (t + LANES > seen) chance = where(lanes() < (int32_t)(seen - t), chance, vec{});
                    sums += chance;
                    store(row + t, x.dropped ? chance * kept(x, b * x.heads + h, t, l + q) : chance);
                }
                for (int64_t t = whole; t < held; t++) row[t] = 0.0f;
                const float sum = total(sums);
                shares[q] = 1.0f / sum;
                x.logs[(b * x.heads + h) * length + l + q] = top + std::log2(sum);
            }
            product(scores, held, 1, here, values, width, held, width, out, width, false);
            for (int64_t q = 0; q < here; q++) {
                float *to = x.mixed + ((b * length + l + q) * x.heads + h) * width;
                for (int64_t i = 0; i < width; i += LANES) store(to + i, load(out + q * width + i) * shares[q]);
            }
        }
    }
}

// As in FlashAttention (Dao et al., 2022): chances are computed again from the logs.
static void attend_back(const Attention<float> &x, int64_t b, int64_t kv, const float *grad, float *to_qkv, float *to_norms, Scratch room) {
    const int64_t length = x.length, n = padded(length), width = x.width, group = x.heads / x.kv_heads;
    float *queries = room.take<float>(n * width), *keys = room.take<float>(n * width), *turned_keys = room.take<float>(n * width);
    float *values = room.take<float>(n * width), *turned_values = room.take<float>(n * width), *grads = room.take<float>(n * width);
    float *to_query = room.take<float>(n * width), *to_key = room.take<float>(n * width), *to_value = room.take<float>(n * width);
    float *chances = room.take<float>(BLOCK * n), *slopes = room.take<float>(BLOCK * n);
    const float scale = 1.0f / std::sqrt((float)width), unit = scale * LOG2E;
    turned_rows(x, b, x.heads + kv, x.k_norm, keys);
    columns_of(keys, n, width, turned_keys);
    plain_rows(x.qkv + x.at(b, 0, x.heads + x.kv_heads + kv), x.all_heads() * width, length, width, values);
    columns_of(values, n, width, turned_values);
    std::memset(to_key, 0, n * width * 4);
    std::memset(to_value, 0, n * width * 4);
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        turned_rows(x, b, h, x.q_norm, queries);
        plain_rows(grad + (b * length * x.heads + h) * width, x.heads * width, length, width, grads);
        for (int64_t l = 0; l < length; l += BLOCK) {
            const int64_t held = l + BLOCK, here = std::min(length - l, BLOCK);
            product(queries + l * width, width, 1, here, turned_keys, n, width, held, chances, held, false);
            product(grads + l * width, width, 1, here, turned_values, n, width, held, slopes, held, false);
            for (int64_t q = 0; q < here; q++) {
                const float *mixed = x.mixed + ((b * length + l + q) * x.heads + h) * width, *own = grads + (l + q) * width;
                vec sum = {};
                for (int64_t i = 0; i < width; i += LANES) sum += load(mixed + i) * load(own + i);
                const float mean = total(sum), log = x.logs[(b * x.heads + h) * length + l + q];
                float *p = chances + q * held, *s = slopes + q * held;
                const int64_t seen = l + q + 1;
                int64_t t = 0;
                for (; t < seen; t += LANES) {
                    vec chance = power(load(p + t) * unit - log), slope = load(s + t);
                    if (t + LANES > seen) chance = where(lanes() < (int32_t)(seen - t), chance, vec{});
                    if (x.dropped) {
                        const vec keep = kept(x, b * x.heads + h, t, l + q);
                        store(s + t, chance * (slope * keep - mean) * scale);
                        store(p + t, chance * keep);
                    } else {
                        store(s + t, chance * (slope - mean) * scale);
                        store(p + t, chance);
                    }
                }
                for (; t < held; t += LANES) store(p + t, vec{}), store(s + t, vec{});
            }
            product(slopes, held, 1, here, keys, width, held, width, to_query + l * width, width, false);
            product(chances, 1, held, held, grads + l * width, width, here, width, to_value, width, true);
            product(slopes, 1, held, held, queries + l * width, width, here, width, to_key, width, true);
        }
        turned_back(x, b, h, x.q_norm, to_query, to_qkv, to_norms);
    }
    turned_back(x, b, x.heads + kv, x.k_norm, to_key, to_qkv, to_norms + width);
    for (int64_t l = 0; l < length; l++)
        std::memcpy(to_qkv + x.at(b, l, x.heads + x.kv_heads + kv), to_value + l * width, width * 4);
}

// --- between the products ----------------------------------------------------------------------------------------------

INLINE vec open(vec x) {  // the sigmoid; what is not a number stays so
#if defined(WIDE)
    const __m512 y = 1.0f + (__m512)power((vec)_mm512_min_ps(_mm512_set1_ps(126.0f), -LOG2E * (__m512)x));
    const __m512 guess = _mm512_rcp14_ps(y);
    return (vec)(guess * (2.0f - y * guess));  // to 2^-28, faster than a division
#else
    const vec y = -LOG2E * x;
    return 1.0f / (1.0f + power(y > 126.0f ? splat(126.0f) : y));
#endif
}

// sum = x + more, both (n,).
template <class T>
static void add(const float *x, const T *more, int64_t n, float *sum, int64_t threads) {
    together(threads, (n + LANES - 1) / LANES, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = LANES * begin; i < std::min(LANES * end, n); i += LANES)
            store(sum + i, load(x + i, n - i) + load(more + i, n - i), n - i);
    });
}

// out (rows, width) = x / rms(x) * weight or, where there is a bias, the layer norm of x; where `more` is given, it is
// added to x before, in `sum`.
template <class T>
static void norm(const float *x, const T *more, const float *weight, const float *bias, float eps, int64_t rows, int64_t width,
                 float *sum, T *out, int64_t threads) {
    together(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const float *row = x + r * width;
            if (more) {
                for (int64_t i = 0; i < width; i += LANES)
                    store(sum + r * width + i, load(row + i, width - i) + load(more + r * width + i, width - i), width - i);
                row = sum + r * width;
            }
            float mean = 0.0f;
            if (bias) {
                vec sums = {};
                for (int64_t i = 0; i < width; i += LANES) sums += load(row + i, width - i);
                mean = total(sums) / width;
            }
            vec squares = {};
            for (int64_t i = 0; i < width; i += LANES) {
                vec v = load(row + i, width - i) - mean;
                if (bias && i + LANES > width) v = where(lanes() < (int32_t)(width - i), v, vec{});
                squares += v * v;
            }
            const float scale = 1.0f / std::sqrt(total(squares) / width + eps);
            for (int64_t i = 0; i < width; i += LANES) {
                vec y = (load(row + i, width - i) - mean) * scale * load(weight + i, width - i);
                if (bias) y += load(bias + i, width - i);
                store(out + r * width + i, y, width - i);
            }
        }
    });
}

// The gradient to x, from that to its norm and, where `past` is given, that to x itself; the same in `to_more` where that
// is given. `to_weight` and, of a layer norm, `to_bias` (threads, width) are zero at first.
template <class T>
static void norm_back(const float *x, const float *weight, float eps, const T *grad, const float *past, int64_t rows, int64_t width,
                      float *to_x, T *to_more, float *to_weight, float *to_bias, int64_t threads) {
    together(threads, rows, [&](int64_t thread, int64_t begin, int64_t end) {
        float *sums = to_weight + thread * width, *biases = to_bias ? to_bias + thread * width : nullptr;
        for (int64_t r = begin; r < end; r++) {
            const float *row = x + r * width;
            const T *g = grad + r * width;
            float middle = 0.0f;
            if (to_bias) {
                vec all = {};
                for (int64_t i = 0; i < width; i += LANES) all += load(row + i, width - i);
                middle = total(all) / width;
            }
            vec squares = {}, along = {}, across = {};
            for (int64_t i = 0; i < width; i += LANES) {
                vec v = load(row + i, width - i) - middle;
                if (to_bias && i + LANES > width) v = where(lanes() < (int32_t)(width - i), v, vec{});
                const vec w = load(g + i, width - i) * load(weight + i, width - i);
                squares += v * v;
                along += v * w;
                across += w;
            }
            const float scale = 1.0f / std::sqrt(total(squares) / width + eps);
            const float mean = total(along) * scale * scale / width, level = to_bias ? total(across) / width : 0.0f;
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t left = width - i;
                const vec v = load(row + i, left) - middle, w = load(g + i, left);
                store(sums + i, load(sums + i, left) + w * v * scale, left);
                if (biases) store(biases + i, load(biases + i, left) + w, left);
                vec to = (w * load(weight + i, left) - level - v * mean) * scale;
                if (past) to += load(past + r * width + i, left);
                store(to_x + r * width + i, to, left);
                if (to_more) store(to_more + r * width + i, to, left);
            }
        }
    });
}

// Logits (rows, width) become the gradients of losses (rows,), which are -log P of the targets in nats; `smoothing` is the
// share of each target that is spread evenly.
template <class T>
static void loss(T *logits, const int64_t *targets, int64_t rows, int64_t width, float smoothing, float *losses, int64_t threads) {
    together(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            T *row = logits + r * width;
            vec greatest = splat(-INFINITY), sums = {}, chances = {};
            for (int64_t i = 0; i < width; i += LANES) {
                vec v = load(row + i, width - i);
                if (smoothing) sums += v;
                if (i + LANES > width) v = where(lanes() < (int32_t)(width - i), v, splat(-INFINITY));
                greatest = larger(greatest, v);
            }
            const float top = most(greatest), mean = total(sums) / width;
            for (int64_t i = 0; i < width; i += LANES) {
                vec e = power((load(row + i, width - i) - top) * LOG2E);
                if (i + LANES > width) e = where(lanes() < (int32_t)(width - i), e, vec{});
                chances += e;
            }
            const float log = top + std::log(total(chances)), wanted = one(row + targets[r]);
            losses[r] = log - (1.0f - smoothing) * wanted - smoothing * mean;
            const float share = std::exp(wanted - log), evenly = smoothing / width;
            for (int64_t i = 0; i < width; i += LANES)
                store(row + i, power((load(row + i, width - i) - log) * LOG2E) - evenly, width - i);
            put(row + targets[r], share - evenly - (1.0f - smoothing));
        }
    });
}

// out (rows, width) = silu(gate) * up, where x (rows, 2, width) holds both.
template <class T>
static void gate(const T *x, int64_t rows, int64_t width, T *out, int64_t threads) {
    together(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t i = 0; i < width; i += LANES) {
                const vec g = load(x + 2 * r * width + i, width - i);
                store(out + r * width + i, g * open(g) * load(x + (2 * r + 1) * width + i, width - i), width - i);
            }
    });
}
template <class T>
static void gate_back(const T *x, const T *grad, int64_t rows, int64_t width, T *to_x, int64_t threads) {
    together(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t i = 0; i < width; i += LANES) {
                const int64_t at = 2 * r * width + i, left = width - i;
                const vec g = load(x + at, left), up = load(x + at + width, left), s = load(grad + r * width + i, left);
                const vec o = open(g);
                store(to_x + at, s * up * o * (1.0f + g * (1.0f - o)), left);
                store(to_x + at + width, s * g * o, left);
            }
    });
}

// GELU of x (n,), exact or by tanh.
template <class T>
static void curve(const T *x, int64_t n, bool by_tanh, T *out, int64_t threads) {
    together(threads, (n + LANES - 1) / LANES, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = LANES * begin; i < std::min(LANES * end, n); i += LANES)
            store(out + i, gelu(load(x + i, n - i), by_tanh), n - i);
    });
}
template <class T>
static void curve_back(const T *x, const T *grad, int64_t n, bool by_tanh, T *to_x, int64_t threads) {
    together(threads, (n + LANES - 1) / LANES, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = LANES * begin; i < std::min(LANES * end, n); i += LANES) {
            const vec v = load(x + i, n - i);
            vec slope;
            if (by_tanh) {
                const vec o = open(1.5957691216f * (v + 0.044715f * v * v * v));
                slope = o + v * o * (1.0f - o) * 1.5957691216f * (1.0f + 0.134145f * v * v);
            } else {  // Phi(x) + x phi(x)
                const vec z = v * 0.70710678f, a = z < 0.0f ? -z : z, t = 1.0f / (1.0f + 0.3275911f * a);
                const vec e = exponential(-a * a);
                const vec p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
                const vec tail = 0.5f * p * e;
                slope = (v < 0.0f ? tail : 1.0f - tail) + v * e * 0.39894228f;
            }
            store(to_x + i, load(grad + i, n - i) * slope, n - i);
        }
    });
}

extern "C" {

// What bf16 products use here: 0 nothing, for want of units; 1 AVX512-BF16; 2 AMX. To be called first.
int plait_products() {
#if defined(BF16_UNITS)
#ifdef AMX
    units::tiles = !syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM for the tiles' data
#endif
    return units::tiles ? 2 : 1;
#else
    return 0;
#endif
}

// In all that follows, `halved` says that activations are bf16; attention takes these only where there are units.

int64_t plait_scratch(int64_t length, int64_t width, int64_t halved) {
#if defined(BF16_UNITS)
    if (halved) return units::scratch_size(length, width);
#endif
    return fp32_scratch(length, width);
}

// Fills `mixed` and `logs`; `scratch` has `plait_scratch` bytes a thread.
void plait_attend(const void *call, int64_t halved, char *scratch, int64_t threads) {
    const auto *x = (const Attention<float> *)call;
    const int64_t size = plait_scratch(x->length, x->width, halved);
    together(threads, x->batch * x->kv_heads, [&](int64_t thread, int64_t begin, int64_t end) {
        const Scratch room{scratch + thread * size};
#if defined(BF16_UNITS)
        if (halved) {
            const units::Tiled tiled;
            for (int64_t i = begin; i < end; i++)
                units::attend(*(const Attention<bf16> *)call, i / x->kv_heads, i % x->kv_heads, room);
            return;
        }
#endif
        for (int64_t i = begin; i < end; i++) attend(*x, i / x->kv_heads, i % x->kv_heads, room);
    });
}

// From the gradient to `mixed`: that to `qkv`, all of it, and to both norms, (threads, 2, width), zero at first.
void plait_attend_back(const void *call, int64_t halved, const void *grad, void *to_qkv, float *to_norms, char *scratch, int64_t threads) {
    const auto *x = (const Attention<float> *)call;
    const int64_t size = plait_scratch(x->length, x->width, halved);
    together(threads, x->batch * x->kv_heads, [&](int64_t thread, int64_t begin, int64_t end) {
        const Scratch room{scratch + thread * size};
        float *norms = to_norms + thread * 2 * x->width;
#if defined(BF16_UNITS)
        if (halved) {
            const units::Tiled tiled;
            for (int64_t i = begin; i < end; i++)
                units::attend_back(*(const Attention<bf16> *)call, i / x->kv_heads, i % x->kv_heads, (const bf16 *)grad,
                                   (bf16 *)to_qkv, norms, room);
            return;
        }
#endif
        for (int64_t i = begin; i < end; i++)
            attend_back(*x, i / x->kv_heads, i % x->kv_heads, (const float *)grad, (float *)to_qkv, norms, room);
    });
}

void plait_add(int64_t halved, const float *x, const void *more, int64_t n, float *sum, int64_t threads) {
    if (halved)
        add(x, (const bf16 *)more, n, sum, threads);
    else
        add(x, (const float *)more, n, sum, threads);
}
void plait_norm(int64_t halved, const float *x, const void *more, const float *weight, const float *bias, float eps, int64_t rows,
                int64_t width, float *sum, void *out, int64_t threads) {
    if (halved)
        norm(x, (const bf16 *)more, weight, bias, eps, rows, width, sum, (bf16 *)out, threads);
    else
        norm(x, (const float *)more, weight, bias, eps, rows, width, sum, (float *)out, threads);
}
void plait_norm_back(int64_t halved, const float *x, const float *weight, float eps, const void *grad, const float *past, int64_t rows,
                     int64_t width, float *to_x, void *to_more, float *to_weight, float *to_bias, int64_t threads) {
    if (halved)
        norm_back(x, weight, eps, (const bf16 *)grad, past, rows, width, to_x, (bf16 *)to_more, to_weight, to_bias, threads);
    else
        norm_back(x, weight, eps, (const float *)grad, past, rows, width, to_x, (float *)to_more, to_weight, to_bias, threads);
}
void plait_loss(int64_t halved, void *logits, const int64_t *targets, int64_t rows, int64_t width, float smoothing, float *losses,
                int64_t threads) {
    if (halved)
        loss((bf16 *)logits, targets, rows, width, smoothing, losses, threads);
    else
        loss((float *)logits, targets, rows, width, smoothing, losses, threads);
}
void plait_gate(int64_t halved, const void *x, int64_t rows, int64_t width, void *out, int64_t threads) {
    if (halved)
        gate((const bf16 *)x, rows, width, (bf16 *)out, threads);
    else
        gate((const float *)x, rows, width, (float *)out, threads);
}
void plait_gate_back(int64_t halved, const void *x, const void *grad, int64_t rows, int64_t width, void *to_x, int64_t threads) {
    if (halved)
        gate_back((const bf16 *)x, (const bf16 *)grad, rows, width, (bf16 *)to_x, threads);
    else
        gate_back((const float *)x, (const float *)grad, rows, width, (float *)to_x, threads);
}
void plait_gelu(int64_t halved, const void *x, int64_t n, int64_t by_tanh, void *out, int64_t threads) {
    if (halved)
        curve((const bf16 *)x, n, by_tanh, (bf16 *)out, threads);
    else
        curve((const float *)x, n, by_tanh, (float *)out, threads);
}
void plait_gelu_back(int64_t halved, const void *x, const void *grad, int64_t n, int64_t by_tanh, void *to_x, int64_t threads) {
    if (halved)
        curve_back((const bf16 *)x, (const bf16 *)grad, n, by_tanh, (bf16 *)to_x, threads);
    else
        curve_back((const float *)x, (const float *)grad, n, by_tanh, (float *)to_x, threads);
}

// Floats that a thread needs beside for a product of n outputs.
int64_t plait_product_scratch(int64_t n, int64_t threads) {
    const int64_t share = ((n + STRIP - 1) / STRIP + threads - 1) / threads * STRIP;
    return DEPTH * share + HEIGHT * STRIP;
}

// out (m, n) = x (m, k) times w (k, n) in fp32; items of x lie `row` and `column` apart, those of w `down` and `across`. Each
// thread has `plait_product_scratch` floats of `room`, and a share of the outputs, so that a sum is the same for any number.
void plait_product(const float *x, int64_t row, int64_t column, int64_t m, const float *w, int64_t down, int64_t across, int64_t k,
                   int64_t n, float *out, float *room, int64_t threads) {
    const int64_t size = plait_product_scratch(n, threads);
    together(threads, (n + STRIP - 1) / STRIP, [&](int64_t thread, int64_t begin, int64_t end) {
        if (begin < end)
            large_product(x, row, column, m, w, down, across, k, begin * STRIP, std::min(end * STRIP, n), out, n, room + thread * size);
    });
}
}
