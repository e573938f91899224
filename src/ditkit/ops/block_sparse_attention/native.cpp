// Block-sparse attention on a processor in float32: forward with the log-sum-exp, and backward.
//
// Every product is made by one kernel of MR rows and two vectors of columns, whose sums stay in registers; its second
// operand is packed in panels of that width. Scores of a few rows against one key block stay in the first-level cache
// (FlashAttention 2, Dao 2023, algorithm 1). Compiled on the machine that runs it, by `native.py`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
constexpr int PANEL = 2 * WIDE;
constexpr int STRIP = 24;  // rows that meet a panel while it is in the first-level cache
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

typedef float V __attribute__((vector_size(WIDE * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(WIDE * 4)));

static inline V load(const float* x) { return *reinterpret_cast<const V*>(x); }
static inline void store(float* x, V value) { *reinterpret_cast<V*>(x) = value; }
static inline V all(float x) { return x - V{}; }  // x - 0 is x, so this is a broadcast and no sum
static inline int64_t whole(int64_t n, int64_t side) { return (n + side - 1) / side * side; }

// 2^x for x <= 0 to 2e-7 (the polynomial of Cephes' exp2f); 0 below 2^-126, also for -inf
static inline V exp2_of(V x) {
    const V least = all(-126.0f), held = x < least ? least : x;
    const V whole_part = (held + 12582912.0f) - 12582912.0f, f = held - whole_part;
    V y = all(1.535336188319500e-4f);
    y = y * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    const I bits = (__builtin_convertvector(whole_part, I) + 127) << 23;
    V power;
    std::memcpy(&power, &bits, sizeof power);
    return x < least ? V{} : y * power;  // NaN stays what it is
}

// C[MR, PANEL] = or += sum over depth of A[r, d] B[d, PANEL]
template <int MR, bool ADD>
static inline void product(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, float* c,
                           int64_t c_row) {
    V left[MR], right[MR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
        left[r] = ADD ? load(c + r * c_row) : V{};
        right[r] = ADD ? load(c + r * c_row + WIDE) : V{};
    }
    for (int64_t d = 0; d < depth; ++d) {
        V b0 = load(b + d * PANEL), b1 = load(b + d * PANEL + WIDE);
#if defined(__x86_64__)
        asm("" : "+x"(b0), "+x"(b1));  // once into registers, not MR times from memory
#endif
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const V x = all(a[r * a_row + d * a_depth]);
            left[r] += x * b0;
            right[r] += x * b1;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
        store(c + r * c_row, left[r]);
        store(c + r * c_row + WIDE, right[r]);
    }
}

// the same for any even number of rows from 4 on, in sixes and fours
template <bool ADD>
static inline void products(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                            float* c, int64_t c_row) {
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r;
        if (left >= 6 && left != 8) {
            product<6, ADD>(depth, a + r * a_row, a_row, a_depth, b, c + r * c_row, c_row);
            r += 6;
        } else {
            product<4, ADD>(depth, a + r * a_row, a_row, a_depth, b, c + r * c_row, c_row);
            r += 4;
        }
    }
}

// rows [rows, width] to panels of columns [panels, rows, PANEL], zeros beyond the width
static void pack(const float* x, int64_t rows, int64_t width, float* out) {
    for (int64_t first = 0; first < width; first += PANEL) {
        const int64_t held = std::min<int64_t>(PANEL, width - first);
        for (int64_t r = 0; r < rows; ++r, out += PANEL) {
            std::memcpy(out, x + r * width + first, held * sizeof(float));
            std::fill(out + held, out + PANEL, 0.0f);
        }
    }
}

// rows [rows, width] to panels of rows [panels, width, PANEL], zeros beyond the last row
static void pack_transposed(const float* x, int64_t rows, int64_t width, float* out) {
    for (int64_t first = 0; first < rows; first += PANEL, out += width * PANEL) {
        const int64_t held = std::min<int64_t>(PANEL, rows - first);
        if (held < PANEL) std::fill(out, out + width * PANEL, 0.0f);
        for (int64_t j = 0; j < held; ++j)
            for (int64_t d = 0; d < width; ++d) out[d * PANEL + j] = x[(first + j) * width + d];
    }
}

// Exceptions of a task end the others and reach the caller; where no more threads can be had, those there do it all.
template <class Work>
static void in_parallel(int64_t tasks, int64_t threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failing;
    const auto run = [&] {
        try {
            for (int64_t task; (task = next++) < tasks;) work(task);
        } catch (...) {
            const std::lock_guard<std::mutex> held(failing);
            failure = std::current_exception(), next = tasks;
        }
    };
    std::vector<std::thread> others;
    try {
        others.reserve(threads);
        for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(run);
    } catch (...) {
    }
    run();
    for (auto& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

// 0, or 1 where memory was short: nothing may be thrown through C
template <class Work>
static int guarded(const Work& work) {
    try {
        work();
        return 0;
    } catch (...) {
        return 1;
    }
}

struct Plan {
    int64_t heads, own_heads, batches, rows, columns, query_side, key_side, width, value_width, threads;
    const int32_t *start, *index, *tile;
    const uint8_t* tiles;
    float scale;

    int64_t list(int64_t head, int64_t row, int64_t per_sample) const {
        return (head / per_sample % batches * own_heads + head % per_sample % own_heads) * rows + row;
    }
    int64_t keys_wide() const { return whole(key_side, PANEL); }
    int64_t width_wide() const { return whole(width, PANEL); }
    int64_t values_wide() const { return whole(value_width, PANEL); }
};

// panels of all blocks of `side` rows of all heads, by `packed` of one
template <class Packed>
static std::unique_ptr<float[]> packed_blocks(const Plan& plan, const float* x, int64_t blocks, int64_t side, int64_t width,
                                        int64_t size, const Packed& packed) {
    std::unique_ptr<float[]> out(new float[plan.heads * blocks * size]);
    in_parallel(plan.heads * blocks, plan.threads,
                [&](int64_t at) { packed(x + at * side * width, side, width, out.get() + at * size); });
    return out;
}

// scores of rows [first, first + count) of a block against a key block, times log2(e), -inf where hidden
static void scores(const Plan& plan, int64_t first, int64_t count, const float* q, const float* keys, int32_t tile,
                   float* out) {
    const int64_t wide = plan.keys_wide();
    for (int64_t panel = 0; panel < wide; panel += PANEL)
        products<false>(count, plan.width, q + first * plan.width, plan.width, 1, keys + panel * plan.width, out + panel, wide);
    for (int64_t r = 0; r < count; ++r) {
        float* row = out + r * wide;
        if (tile) {
            const uint8_t* seen = plan.tiles + (tile * plan.query_side + first + r) * plan.key_side;
            for (int64_t j = 0; j < plan.key_side; ++j) row[j] = seen[j] ? row[j] : NEVER;
        }
        for (int64_t j = plan.key_side; j < wide; ++j) row[j] = NEVER;
    }
}

static float greatest(const float* x, int64_t n) {
    V top = load(x);
    for (int64_t j = WIDE; j < n; j += WIDE) {
        const V y = load(x + j);
        top = y > top ? y : top;
    }
    float found = top[0];
    for (int j = 1; j < WIDE; ++j) found = top[j] > found ? top[j] : found;
    return found;
}

// x = 2^(x - base), and its sum
static float weigh(float* x, int64_t n, float base) {
    V sum = {};
    for (int64_t j = 0; j < n; j += WIDE) {
        const V y = exp2_of(load(x + j) - base);
        store(x + j, y);
        sum += y;
    }
    float found = 0;
    for (int j = 0; j < WIDE; ++j) found += sum[j];
    return found;
}

static void forward(const Plan& plan, int64_t per_sample, const float* q, const float* k, const float* v,
                               float* out, float* lse) {
    const int64_t bq = plan.query_side, bk = plan.key_side, wide = plan.keys_wide(), kv = plan.values_wide();
    const int64_t key_size = wide * plan.width, value_size = bk * kv;
    const auto keys = packed_blocks(plan, k, plan.columns, bk, plan.width, key_size, pack_transposed);
    const auto values = packed_blocks(plan, v, plan.columns, bk, plan.value_width, value_size, pack);
    in_parallel(plan.heads * plan.rows, plan.threads, [&](int64_t task) {
        const int64_t head = task / plan.rows, row = task % plan.rows, list = plan.list(head, row, per_sample);
        static thread_local std::vector<float> queries, strip, sums, top, total;
        queries.resize(bq * plan.width), strip.resize(STRIP * wide);
        sums.assign(bq * kv, 0.0f), top.assign(bq, NEVER), total.assign(bq, 0.0f);
        for (int64_t i = 0; i < bq * plan.width; ++i)
            queries[i] = q[task * bq * plan.width + i] * (plan.scale * LOG2_E);
        for (int32_t entry = plan.start[list]; entry < plan.start[list + 1]; ++entry) {
            const int64_t column = head * plan.columns + plan.index[entry];
            for (int64_t first = 0; first < bq; first += STRIP) {
                const int64_t count = std::min<int64_t>(STRIP, bq - first);
                scores(plan, first, count, queries.data(), &keys[column * key_size], plan.tile[entry], strip.data());
                for (int64_t r = 0; r < count; ++r) {
                    float &best = top[first + r], *sum = &sums[(first + r) * kv], *weights = &strip[r * wide];
                    const float met = greatest(weights, wide), now = met > best ? met : best;
                    if (now != best && best != NEVER) {
                        const float keep = std::exp2(best - now);
                        for (int64_t j = 0; j < kv; j += WIDE) store(sum + j, load(sum + j) * keep);
                        total[first + r] *= keep;
                    }
                    total[first + r] += weigh(weights, wide, now == NEVER ? 0.0f : now);
                    best = now;
                }
                for (int64_t panel = 0; panel < kv; panel += PANEL)
                    products<true>(count, bk, strip.data(), wide, 1, &values[column * value_size + panel * bk],
                             &sums[first * kv + panel], kv);
            }
        }
        for (int64_t r = 0; r < bq; ++r) {
            const bool blind = total[r] == 0;
            const float share = blind ? 0.0f : 1 / total[r];
            for (int64_t j = 0; j < plan.value_width; ++j)
                out[(task * bq + r) * plan.value_width + j] = sums[r * kv + j] * share;
            lse[task * bq + r] = blind ? NEVER : (top[r] + std::log2(total[r])) * LN_2;
        }
    });
}

// A head is one thread's, so that nothing is added by two and gradients repeat to the bit.
// inner: d_out . out - d_lse of each query; shift: the log-sum-exp, +inf where a query sees no key.
static void backward(const Plan& plan, int64_t per_sample, const float* q, const float* k, const float* v,
                                const float* d_out, const float* inner, const float* shift, float* d_q, float* d_k,
                                float* d_v) {
    const int64_t bq = plan.query_side, bk = plan.key_side, wide = plan.keys_wide();
    const int64_t K = plan.width, KV = plan.value_width, kw = plan.width_wide(), vw = plan.values_wide();
    const int64_t key_size = wide * K, value_size = wide * KV, flat_size = bk * kw;
    const auto keys = packed_blocks(plan, k, plan.columns, bk, K, key_size, pack_transposed);
    const auto values = packed_blocks(plan, v, plan.columns, bk, KV, value_size, pack_transposed);
    const auto flat_keys = packed_blocks(plan, k, plan.columns, bk, K, flat_size, pack);
    in_parallel(plan.heads, plan.threads, [&](int64_t head) {
        std::vector<float> queries(bq * K), flat_queries(bq * kw), flat_outs(bq * vw), sum_q(bq * kw);
        std::vector<float> weight(bq * wide), slope(bq * wide), sum_k(plan.columns * bk * kw), sum_v(plan.columns * bk * vw);
        for (int64_t row = 0; row < plan.rows; ++row) {
            const int64_t task = head * plan.rows + row, list = plan.list(head, row, per_sample);
            const float *query = q + task * bq * K, *d_row = d_out + task * bq * KV;
            for (int64_t i = 0; i < bq * K; ++i) queries[i] = query[i] * (plan.scale * LOG2_E);
            pack(query, bq, K, flat_queries.data()), pack(d_row, bq, KV, flat_outs.data());
            std::fill(sum_q.begin(), sum_q.end(), 0.0f);
            for (int32_t entry = plan.start[list]; entry < plan.start[list + 1]; ++entry) {
                const int64_t place = plan.index[entry], column = head * plan.columns + place;
                for (int64_t first = 0; first < bq; first += STRIP) {
                    const int64_t count = std::min<int64_t>(STRIP, bq - first);
                    float *weights = &weight[first * wide], *slopes = &slope[first * wide];
                    scores(plan, first, count, queries.data(), &keys[column * key_size], plan.tile[entry], weights);
                    for (int64_t panel = 0; panel < wide; panel += PANEL)
                        products<false>(count, KV, d_row + first * KV, KV, 1, &values[column * value_size + panel * KV],
                                 slopes + panel, wide);
                    for (int64_t r = 0; r < count; ++r) {
                        const int64_t at = task * bq + first + r;
                        weigh(weights + r * wide, wide, shift[at] * LOG2_E);
                        for (int64_t j = r * wide; j < (r + 1) * wide; j += WIDE)
                            store(slopes + j, load(weights + j) * (load(slopes + j) - inner[at]));
                    }
                    for (int64_t panel = 0; panel < kw; panel += PANEL)
                        products<true>(count, bk, slopes, wide, 1, &flat_keys[column * flat_size + panel * bk],
                                 &sum_q[first * kw + panel], kw);
                }
                for (int64_t panel = 0; panel < vw; panel += PANEL)
                    products<true>(bk, bq, weight.data(), 1, wide, &flat_outs[panel * bq], &sum_v[place * bk * vw + panel], vw);
                for (int64_t panel = 0; panel < kw; panel += PANEL)
                    products<true>(bk, bq, slope.data(), 1, wide, &flat_queries[panel * bq], &sum_k[place * bk * kw + panel],
                             kw);
            }
            for (int64_t r = 0; r < bq; ++r)
                for (int64_t j = 0; j < K; ++j) d_q[(task * bq + r) * K + j] = sum_q[r * kw + j] * plan.scale;
        }
        for (int64_t r = 0; r < plan.columns * bk; ++r) {
            const int64_t at = head * plan.columns * bk + r;
            for (int64_t j = 0; j < K; ++j) d_k[at * K + j] = sum_k[r * kw + j] * plan.scale;
            for (int64_t j = 0; j < KV; ++j) d_v[at * KV + j] = sum_v[r * vw + j];
        }
    });
}

extern "C" int ditkit_forward(const Plan* plan, int64_t per_sample, const float* q, const float* k, const float* v,
                              float* out, float* lse) {
    return guarded([&] { forward(*plan, per_sample, q, k, v, out, lse); });
}

extern "C" int ditkit_backward(const Plan* plan, int64_t per_sample, const float* q, const float* k, const float* v,
                               const float* d_out, const float* inner, const float* shift, float* d_q, float* d_k,
                               float* d_v) {
    return guarded([&] { backward(*plan, per_sample, q, k, v, d_out, inner, shift, d_q, d_k, d_v); });
}
