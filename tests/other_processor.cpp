// Runs the kernels on a processor that this process does not have, under an emulator: `test_neon.py` compiles it for that one.
// It calls one kernel with numbers from a file and writes what it gives: other_processor CALL IN OUT SIZES...
// Arrays of floats follow each other in the files, in the order in which they are read and written here.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef GENERATION
#include "generation.cpp"
#else
#include "training.cpp"
#endif

typedef std::vector<float> Floats;
static FILE *from, *to;

static Floats read(int64_t n) {
    Floats values(n);
    if (fread(values.data(), 4, n, from) != (size_t)n) exit(2);
    return values;
}
static void write(const float *values, int64_t n) {
    if (fwrite(values, 4, n, to) != (size_t)n) exit(3);
}
static void write(const Floats &values) { write(values.data(), values.size()); }

#ifdef GENERATION

static std::vector<std::vector<char>> kept;  // what pointers point to
static std::vector<Floats> floats;

static const float *keep(int64_t n) {
    floats.push_back(read(n));
    return floats.back().data();
}
static Linear linear(int64_t out, int64_t in, int64_t format) {
    const Floats weight = read(out * in);
    kept.emplace_back(plait_packed_size(out, in, format) + 64);
    char *packed = kept.back().data();
    packed += -(intptr_t)packed & 63;
    plait_pack(weight.data(), 0, out, in, format, packed);
    return {packed, nullptr, in, out, format};
}

// The product of rows with a weight in a format.
static void product(const int64_t *size) {
    const int64_t out = size[0], in = size[1], rows = size[2], format = size[3], stride = padded(out);
    const Linear layer = linear(out, in, format);
    const Floats x = read(rows * in);
    Floats result(whole_rows(rows) * stride);
    std::vector<char> scratch(plait_linear_scratch(in, rows));
    plait_linear(&layer, 0, x.data(), rows, result.data(), scratch.data(), 1);
    for (int64_t r = 0; r < rows; r++) write(result.data() + r * stride, out);
}

// A step of a small transformer with RMS norms, rotary positions and SwiGLU, of rows whose cache holds one position less each.
static void one_step(const int64_t *size) {
    const int64_t layers = size[0], width = size[1], heads = size[2], kv_heads = size[3], deep = size[4], hidden = size[5];
    const int64_t rows = size[6], capacity = size[7], format = size[8];
    std::vector<Layer> blocks;
    floats.reserve(100), kept.reserve(100);
    Model model{layers, width, heads, kv_heads, deep, hidden, capacity, 0, 0, 1e-6f, keep(capacity * deep), nullptr, nullptr, {keep(width), nullptr}};
    for (int64_t l = 0; l < layers; l++) {
        Layer block{{keep(width), nullptr}, {keep(width), nullptr}};
        block.qkv = linear((heads + 2 * kv_heads) * deep, width, format);
        block.attention_out = linear(width, heads * deep, format);
        block.feed_in = linear(2 * hidden, width, format);
        block.feed_out = linear(width, hidden, format);
        block.q_norm = keep(deep), block.k_norm = keep(deep);
        blocks.push_back(block);
    }
    model.layer = blocks.data();
    Floats x = read(rows * width), keys = read(layers * rows * kv_heads * capacity * deep), values = read(keys.size());
    std::vector<int64_t> lengths;
    for (int64_t r = 0; r < rows; r++) lengths.push_back(capacity - 1 - r);
    Floats out(rows * width);
    std::vector<char> scratch(plait_scratch(&model, rows, capacity, 1));
    plait_step(&model, x.data(), out.data(), keys.data(), values.data(), lengths.data(), rows, rows, capacity, scratch.data(), 1);
    write(out);
}

#else

// A product of training, its right side turned.
static void product(const int64_t *size) {
    const int64_t rows = size[0], inner = size[1], outputs = size[2];
    const Floats x = read(rows * inner), w = read(outputs * inner);
    Floats out(rows * outputs), room(plait_product_scratch(outputs, 1));
    plait_product(x.data(), inner, 1, rows, w.data(), 1, inner, inner, outputs, out.data(), room.data(), 1);
    write(out);
}

// Attention with norms and rotary positions, forward and backward.
static void attention(const int64_t *size) {
    const int64_t batch = size[0], length = size[1], heads = size[2], kv_heads = size[3], width = size[4];
    const int64_t count = batch * length * (heads + 2 * kv_heads) * width;
    const Floats qkv = read(count), q_norm = read(width), k_norm = read(width), cosines = read(length * width), sines = read(length * width);
    const Floats grad = read(batch * length * heads * width);
    Floats mixed(grad.size()), logs(batch * heads * length), to_qkv(count), to_norms(2 * width);
    const Attention<float> call{batch, length, heads, kv_heads, width, 1e-6f, qkv.data(), q_norm.data(), k_norm.data(), cosines.data(),
                                sines.data(), 0, mixed.data(), logs.data(), 0, 0};
    std::vector<char> scratch(plait_scratch(length, width, 0));
    plait_attend(&call, 0, scratch.data(), 1);
    plait_attend_back(&call, 0, grad.data(), to_qkv.data(), to_norms.data(), scratch.data(), 1);
    write(mixed), write(to_qkv), write(to_norms);
}

// What lies between the products: layer norm, gate, GELU and loss, each forward and backward.
static void between(const int64_t *size) {
    const int64_t rows = size[0], width = size[1];
    const Floats x = read(rows * width), grad = read(rows * width), weight = read(width), bias = read(width), gates = read(rows * 2 * width);
    Floats sum(x.size()), out(x.size()), to_x(x.size()), to_weight(width), to_bias(width), to_gates(gates.size());
    plait_norm(0, x.data(), nullptr, weight.data(), bias.data(), 1e-5f, rows, width, sum.data(), out.data(), 1);
    plait_norm_back(0, x.data(), weight.data(), 1e-5f, grad.data(), nullptr, rows, width, to_x.data(), nullptr, to_weight.data(), to_bias.data(), 1);
    write(out), write(to_x), write(to_weight), write(to_bias);
    plait_gate(0, gates.data(), rows, width, out.data(), 1);
    plait_gate_back(0, gates.data(), grad.data(), rows, width, to_gates.data(), 1);
    write(out), write(to_gates);
    for (int tanh = 0; tanh < 2; tanh++) {
        plait_gelu(0, x.data(), rows * width, tanh, out.data(), 1);
        plait_gelu_back(0, x.data(), grad.data(), rows * width, tanh, to_x.data(), 1);
        write(out), write(to_x);
    }
    Floats logits = x, losses(rows);
    std::vector<int64_t> targets;
    for (int64_t r = 0; r < rows; r++) targets.push_back(r % width);
    plait_loss(0, logits.data(), targets.data(), rows, width, 0.1f, losses.data(), 1);
    write(losses), write(logits);
}

#endif

int main(int count, char **words) {
    std::vector<int64_t> size;
    for (int i = 4; i < count; i++) size.push_back(atoll(words[i]));
    from = fopen(words[2], "rb"), to = fopen(words[3], "wb");
    if (!from || !to) return 1;
    const char *call = words[1];
#ifdef GENERATION
    !strcmp(call, "product") ? product(size.data()) : one_step(size.data());
#else
    !strcmp(call, "product") ? product(size.data()) : !strcmp(call, "attention") ? attention(size.data()) : between(size.data());
#endif
    return fclose(to);
}
