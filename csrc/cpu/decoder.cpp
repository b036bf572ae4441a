// All threads go through the layers together (stages.h): a stage per product, per norm, per layer
// of attention. Rows are packed: sequence b's stand at [starts[b], starts[b + 1]).
#include "inferlab/decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "arena.h"
#include "attention_tasks.h"
#include "experts.h"
#include "layer_rows.h"
#include "linear_tasks.h"
#include "stages.h"
#include "with_dtype.h"

namespace inferlab::cpu {
namespace {

constexpr int64_t kThreadBytes = 256 * 1024;  // of weights that a thread is worth
constexpr int64_t kRowBytes = 16 * 1024;      // of rows that a task of a norm is worth
constexpr size_t kStagesPerLayer = 18;
constexpr size_t kStagesOfExperts = 14;  // more, in a layer that has them

// A real row: its sequence, node, and place among B * N.
struct Row {
  int64_t b, n, place;
};

// What a layer does in this pass.
struct LayerTasks {
  LinearTasks qkv, output, up, down, router, shared_gate;
  AttentionTasks attention;
  RopeAppendParams rope{};
  LayerExperts* experts = nullptr;
};

class Forward {
 public:
  Forward(const Decoder& decoder, const DecoderPass& pass)
      : d_(decoder), p_(pass), size_(dtype_size(decoder.dtype)) {
    starts_.reserve(pass.batch + 1);
    for (int64_t b = 0; b < pass.batch; ++b) {
      starts_.push_back(static_cast<int64_t>(rows_.size()));
      const int64_t count = pass.num_nodes != nullptr ? pass.num_nodes[b] : pass.nodes;
      for (int64_t n = 0; n < count; ++n) rows_.push_back({b, n, b * pass.nodes + n});
    }
    ragged_ = count() < pass.batch * pass.nodes;
    if (!pass.all_scored) find_scored();
    const bool all_normed = pass.all_scored || wants(-1);
    normed_rows_ = all_normed ? count() : pass.num_scored;
  }

  Status run() {
    if (!take_memory()) return Status::kOutOfMemory;
    int64_t bytes = head_.bytes();
    for (const LayerTasks& layer : layers_) {
      bytes += layer.qkv.bytes() + layer.output.bytes() + layer.up.bytes() + layer.down.bytes();
    }
    size_t stages = kStagesPerLayer * (layers_.size() + 2);
    for (const DecoderLayer& layer : d_.layers) {
      const Experts& experts = layer.experts;
      if (experts.count > 0) stages += kStagesOfExperts;
      const int64_t used = std::min(experts.count, count() * experts.chosen);
      bytes += used * (experts.gate_up.bytes + experts.down.bytes);
    }
    const auto threads = std::clamp<int64_t>(bytes / kThreadBytes, 1, num_threads());
    Stages::run(static_cast<int>(threads), stages, [&](Stages::Walk walk) { this->walk(walk); });
    if (!enough_memory_.load()) return Status::kOutOfMemory;
    spread_logits();
    return Status::kOk;
  }

 private:
  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  bool wants(int layer) const {
    return std::find(p_.feature_layers.begin(), p_.feature_layers.end(), layer) !=
           p_.feature_layers.end();
  }

  void find_scored() {
    for (int64_t i = 0; i < p_.num_scored; ++i) {
      const int64_t place = p_.scored[i];
      scored_.push_back(starts_[place / p_.nodes] + place % p_.nodes);
    }
  }

  // Buffers for rows, and what the products and attention need beside them.
  bool take_memory() {
    const int64_t rows = std::max(count(), p_.num_scored);
    int64_t qkv = 0, heads = 0, gates = 0, gated = 0, scores = 0, chosen = 0;
    for (const DecoderLayer& layer : d_.layers) {
      qkv = std::max(qkv, layer.qkv.out);
      heads = std::max(heads, layer.output.in);
      gates = std::max(gates, layer.up.out);
      gated = std::max(gated, layer.down.in);
      const Experts& experts = layer.experts;
      gates = std::max(gates, experts.chosen * 2 * experts.inner);
      gated = std::max(gated, experts.chosen * experts.inner);
      scores = std::max(scores, experts.count);
      chosen = std::max(chosen, experts.chosen);
    }
    const auto floats = [&](int64_t width) { return (rows * width * size_ + 63) / 64 * 16; };
    thread_local Arena memory, products, partials, of_experts;
    float* at = memory.get(floats(d_.hidden) * 2 + floats(qkv) + floats(heads) + floats(gates) +
                           floats(gated) + floats(scores) + floats(chosen * d_.hidden) + floats(1));
    if (at == nullptr) return false;
    const auto take = [&](int64_t width) {
      char* taken = reinterpret_cast<char*>(at);
      at += floats(width);
      return taken;
    };
    hidden_ = take(d_.hidden);
    normed_ = take(d_.hidden);
    qkv_ = take(qkv);
    attended_ = take(heads);
    gates_ = take(gates);
    gated_ = take(gated);
    scores_ = take(scores);
    slots_ = take(chosen * d_.hidden);
    shares_ = take(1);
    expert_memory_ = &of_experts;
    layers_.reserve(d_.layers.size());
    for (size_t i = 0; i < d_.layers.size(); ++i) plan(static_cast<int64_t>(i));
    head_ = product(d_.head, !p_.all_scored && wants(-1) ? gathered() : normed_, d_.head.in,
                    nullptr, p_.logits, !p_.all_scored ? p_.num_scored : count());
    int64_t most_scratch = head_.scratch_floats(), most_partials = 0;
    for (const LayerTasks& layer : layers_) {
      for (const LinearTasks* each :
           {&layer.qkv, &layer.output, &layer.up, &layer.down, &layer.router, &layer.shared_gate}) {
        most_scratch = std::max(most_scratch, each->scratch_floats());
      }
      most_partials = std::max(most_partials, layer.attention.partial_floats());
    }
    scratch_ = products.get(most_scratch);
    partials_ = partials.get(most_partials);
    return scratch_ != nullptr && partials_ != nullptr;
  }

  // Of every layer; kept for the next pass, so that nothing is allocated then.
  LayerExperts* layer_experts() const {
    thread_local std::vector<LayerExperts> kept;
    if (kept.size() < d_.layers.size()) kept.resize(d_.layers.size());
    return kept.data();
  }

  // Where the scored ones of all normed rows go: the layers are through with it.
  char* gathered() const { return hidden_; }

  LinearTasks product(const Matrix& matrix, const void* x, int64_t x_stride, const void* residual,
                      void* y, int64_t rows) const {
    return LinearTasks({x, matrix.weight, matrix.bias, residual, y, rows, matrix.in, matrix.out,
                        x_stride, d_.dtype, true, matrix.bits, matrix.group, matrix.zeros,
                        matrix.order});
  }

  void plan(int64_t index) {
    const DecoderLayer& layer = d_.layers[index];
    const int64_t width = layer.qkv.out;
    const int64_t rows = count();
    LayerTasks& tasks = layers_.emplace_back();
    tasks.qkv = product(layer.qkv, normed_, d_.hidden, nullptr, qkv_, rows);
    // A branch that is normed before it is added waits where its input has been read.
    const auto branch = [&](const Matrix& matrix, const char* x, const Norm& norm) {
      const bool waits = norm.weight != nullptr;
      return product(matrix, x, matrix.in, waits ? nullptr : hidden_, waits ? normed_ : hidden_,
                     rows);
    };
    tasks.output = branch(layer.output, attended_, layer.attention_norm);
    const Experts& experts = layer.experts;
    if (layer.up.out > 0) {
      tasks.up = product(layer.up, normed_, d_.hidden, nullptr, gates_, rows);
      tasks.down = experts.count > 0
                       ? product(layer.down, gated_, layer.down.in, nullptr, normed_, rows)
                       : branch(layer.down, gated_, layer.down_norm);
    }
    if (experts.count > 0) {
      tasks.experts = &layer_experts()[index];
      tasks.experts->rows.resize(rows * experts.chosen);
      tasks.router = product(experts.router, normed_, d_.hidden, nullptr, scores_, rows);
    }
    if (experts.shared_gate.out > 0) {
      tasks.shared_gate = product(experts.shared_gate, normed_, d_.hidden, nullptr, shares_, rows);
    }

    const int64_t k_heads = layer.by_head ? 1 : layer.q_heads;  // in front of k's first
    const int64_t v_heads = layer.by_head ? 2 : layer.q_heads + layer.kv_heads;
    RopeAppendParams& rope = tasks.rope;
    rope.q = rope_base(0);
    rope.k = rope_base(k_heads * layer.head_dim);
    rope.v = rope_base(v_heads * layer.head_dim);
    rope.cos = p_.cos;
    rope.sin = p_.sin;
    rope.k_pages = static_cast<char*>(p_.k_pages) + index * p_.layer_bytes;
    rope.v_pages = static_cast<char*>(p_.v_pages) + index * p_.layer_bytes;
    rope.block_table = p_.block_table;
    rope.table_stride = p_.table_stride;
    rope.seq_lens = p_.seq_lens;
    rope.q_heads = layer.q_heads;
    rope.kv_heads = layer.kv_heads;
    rope.head_dim = layer.head_dim;
    rope.rotary = p_.rotary;
    rope.page_size = p_.page_size;
    rope.node_offset = p_.node_offset;
    rope.dtype = d_.dtype;
    rope.format = p_.format;

    AttentionParams attention{};
    attention.q = qkv_;
    attention.q_stride[1] = width;
    attention.q_stride[2] = head_stride(layer);
    attention.k_pages = rope.k_pages;
    attention.v_pages = rope.v_pages;
    attention.block_table = p_.block_table;
    attention.table_stride = p_.table_stride;
    attention.seq_lens = p_.seq_lens;
    attention.ancestors = p_.ancestors;
    attention.num_nodes = p_.num_nodes;
    attention.out = attended_;
    attention.batch = p_.batch;
    attention.nodes = p_.nodes;
    attention.words = p_.words;
    attention.q_heads = layer.q_heads;
    attention.kv_heads = layer.kv_heads;
    attention.head_dim = layer.head_dim;
    attention.pages = p_.pages;
    attention.max_pages = p_.max_pages;
    attention.page_size = p_.page_size;
    attention.node_offset = p_.node_offset;
    attention.window = layer.window;
    attention.scale = layer.scale;
    attention.softcap = layer.softcap;
    attention.dtype = d_.dtype;
    attention.format = p_.format;
    tasks.attention = AttentionTasks(attention, starts_.data());
  }

  void* rope_base(int64_t elements) const { return qkv_ + elements * size_; }

  // From a head of q, k or v to the next.
  static int64_t head_stride(const DecoderLayer& layer) {
    return layer.by_head ? 3 * layer.head_dim : layer.head_dim;
  }

  // What every thread does.
  void walk(Stages::Walk& walk) {
    each_row(walk, count(), d_.hidden, [&](int64_t row) { embed(row); });
    for (size_t i = 0; i < layers_.size(); ++i) {
      run_layer(walk, d_.layers[i], layers_[i]);
      if (wants(static_cast<int>(i))) keep_features(walk, static_cast<int>(i), hidden_);
    }
    const bool gathers = !p_.all_scored && !wants(-1);
    each_row(walk, normed_rows_, d_.hidden, [&](int64_t row) {
      norm_row(d_.norm, hidden_, normed_, d_.hidden, gathers ? scored_[row] : row, row);
    });
    if (wants(-1)) keep_features(walk, -1, normed_);
    if (!p_.all_scored && wants(-1)) {
      each_row(walk, p_.num_scored, d_.hidden, [&](int64_t row) {
        std::memcpy(gathered() + row * d_.hidden * size_,
                    normed_ + scored_[row] * d_.hidden * size_, d_.hidden * size_);
      });
    }
    run_product(walk, head_);
    if (d_.softcap == 0) return;
    const int64_t scores = d_.head.out;
    each_row(walk, p_.all_scored ? count() : p_.num_scored, scores, [&](int64_t row) {
      const SoftcapRow cap{static_cast<char*>(p_.logits) + row * scores * size_, scores, d_.softcap,
                           d_.dtype};
      INFERLAB_DISPATCH(softcap_row, cap);
    });
  }

  void embed(int64_t row) const {
    const int64_t bytes = d_.hidden * size_, place = rows_[row].place;
    const char* token = static_cast<const char*>(d_.embedding) + p_.tokens[place] * bytes;
    char* out = hidden_ + row * bytes;
    if (d_.places == nullptr && d_.embedding_scale == 1) {
      std::memcpy(out, token, bytes);
      return;
    }
    const char* added = nullptr;
    if (d_.places != nullptr) {
      added = static_cast<const char*>(d_.places) + (p_.positions[place] + d_.first_place) * bytes;
    }
    const SumRow sum{d_.embedding_scale, token, added, out, d_.hidden, d_.dtype};
    INFERLAB_DISPATCH(sum_row, sum);
  }

  void run_layer(Stages::Walk& walk, const DecoderLayer& layer, const LayerTasks& tasks) {
    norm(walk, layer.input_norm);
    run_product(walk, tasks.qkv);
    const int64_t width = layer.qkv.out;
    each_row(walk, count(), width, [&](int64_t row) {
      char* x = qkv_ + row * width * size_;
      norm_heads(layer.q_norm, x, layer.q_heads, layer.head_dim);
      norm_heads(layer.k_norm, x + layer.q_heads * layer.head_dim * size_, layer.kv_heads,
                 layer.head_dim);
      const auto [b, n, place] = rows_[row];
      const int64_t at_position = p_.positions != nullptr ? p_.positions[place] : place;
      const RopeRow at{row * width,
                       row * width,
                       row * width,
                       head_stride(layer),
                       at_position * d_.num_angles + layer.angles,
                       b,
                       n};
      INFERLAB_DISPATCH(rope_append_row, tasks.rope, at);
    });
    const AttentionTasks& attention = tasks.attention;
    walk.stage(attention.count(), [&](int64_t i) { check(attention.run(i, partials_)); });
    if (attention.merge_count() > 0) {
      walk.stage(attention.merge_count(), [&](int64_t i) { check(attention.merge(i, partials_)); });
    }
    if (layer.parallel) norm(walk, layer.mlp_norm);
    run_product(walk, tasks.output);
    add_branch(walk, layer.attention_norm);
    if (!layer.parallel) norm(walk, layer.mlp_norm);
    if (layer.experts.count > 0) {
      run_experts(walk, layer, tasks);
    } else {
      run_mlp(walk, layer, tasks);
      add_branch(walk, layer.down_norm);
    }
  }

  void run_mlp(Stages::Walk& walk, const DecoderLayer& layer, const LayerTasks& tasks) {
    run_product(walk, tasks.up);
    each_row(walk, count(), layer.up.out,
             [&](int64_t row) { activate(layer.activation, layer.gated, layer.down.in, row); });
    run_product(walk, tasks.down);
  }

  // A row of `gates_`, of `dim` values or twice as many, to one of `gated_`.
  void activate(Activation activation, bool gated, int64_t dim, int64_t row) const {
    const char* gate = gates_ + row * (gated ? 2 : 1) * dim * size_;
    const char* up = gated ? gate + dim * size_ : nullptr;
    const ActivationRow params{activation, gate, up, gated_ + row * dim * size_, dim, d_.dtype};
    INFERLAB_DISPATCH(activation_row, params);
  }

  // Each row's experts, then the layer's own MLP, whose result stands where its input did.
  void run_experts(Stages::Walk& walk, const DecoderLayer& layer, const LayerTasks& tasks) {
    const Experts& experts = layer.experts;
    const int64_t slots = count() * experts.chosen, bytes = d_.hidden * size_;
    LayerExperts& chosen = *tasks.experts;
    run_product(walk, tasks.router);
    each_row(walk, count(), experts.count, [&](int64_t row) {
      with_dtype(d_.dtype, [&](auto zero) {
        const auto* scores = reinterpret_cast<const decltype(zero)*>(scores_);
        chosen.rows.choose(experts, scores + row * experts.count, row);
      });
    });
    walk.stage(1, [&](int64_t) { plan_experts(experts, chosen); });
    each_row(walk, slots, d_.hidden, [&](int64_t place) {
      std::memcpy(slots_ + place * bytes, normed_ + chosen.rows.row_at(place) * bytes, bytes);
    });
    run_products(walk, chosen.up);
    each_row(walk, slots, 2 * experts.inner,
             [&](int64_t place) { activate(layer.activation, true, experts.inner, place); });
    run_products(walk, chosen.down);
    if (experts.shared_gate.out > 0) {
      run_product(walk, tasks.shared_gate);
      run_mlp(walk, layer, tasks);
    }
    each_row(walk, count(), d_.hidden,
             [&](int64_t row) { add_experts(experts, chosen.rows, row); });
  }

  // The rows of each expert, and its products with them; by one thread.
  void plan_experts(const Experts& experts, LayerExperts& chosen) {
    chosen.up.clear();
    chosen.down.clear();
    const auto part = [&](char* from, int64_t row, int64_t width) {
      return from + row * width * size_;
    };
    const auto product_of = [&](Matrix matrix, int64_t expert, char* x, char* y, int64_t rows) {
      matrix.weight = static_cast<const char*>(matrix.weight) + expert * matrix.bytes;
      return product(matrix, x, matrix.in, nullptr, y, rows);
    };
    chosen.rows.group(experts, count(), [&](int64_t expert, int64_t first, int64_t rows) {
      char* slots = part(slots_, first, d_.hidden);
      char* gated = part(gated_, first, experts.inner);
      chosen.up.add(
          product_of(experts.gate_up, expert, slots, part(gates_, first, 2 * experts.inner), rows));
      chosen.down.add(product_of(experts.down, expert, gated, slots, rows));
    });
    const int64_t floats = std::max(chosen.up.scratch_floats(), chosen.down.scratch_floats());
    expert_scratch_ = expert_memory_->get(floats);
    if (expert_scratch_ != nullptr) return;
    check(false);
    chosen.up.clear();
    chosen.down.clear();
  }

  void run_products(Stages::Walk& walk, const ExpertProducts& products) {
    if (products.scratch_floats() > 0) {
      walk.stage(products.parts(), [&](int64_t i) { products.prepare(i, expert_scratch_); });
    }
    walk.stage(products.count(), [&](int64_t i) { products.run(i, expert_scratch_); });
  }

  // To a row of `hidden_` what its experts say, by their weights, and the layer's own MLP by its
  // share. The sum stands in the first slot.
  void add_experts(const Experts& experts, const ExpertRows& rows, int64_t row) const {
    const int64_t first = row * experts.chosen, bytes = d_.hidden * size_;
    char* sum = slots_ + rows.place(first) * bytes;
    const auto add = [&](float weight, const void* said, const void* to, void* out) {
      const SumRow params{weight, said, to, out, d_.hidden, d_.dtype};
      INFERLAB_DISPATCH(sum_row, params);
    };
    add(rows.weight(first), sum, nullptr, sum);
    for (int64_t slot = first + 1; slot < first + experts.chosen; ++slot) {
      add(rows.weight(slot), slots_ + rows.place(slot) * bytes, sum, sum);
    }
    if (experts.shared_gate.out > 0) add(share_of(row), normed_ + row * bytes, sum, sum);
    add(1, sum, hidden_ + row * bytes, hidden_ + row * bytes);
  }

  float share_of(int64_t row) const {
    float share = 0;
    with_dtype(d_.dtype, [&](auto zero) {
      using T = decltype(zero);
      const float x = to_float(reinterpret_cast<const T*>(shares_)[row]);
      share = to_float(from_float<T>(1.0f / (1.0f + std::exp(-x))));
    });
    return share;
  }

  // What waits in `normed_`, normed; a branch without a norm was added when it was computed.
  void add_branch(Stages::Walk& walk, const Norm& norm) {
    if (norm.weight == nullptr) return;
    each_row(walk, count(), d_.hidden, [&](int64_t row) {
      norm_row(norm, normed_, normed_, d_.hidden, row, row);
      char* into = hidden_ + row * d_.hidden * size_;
      const SumRow sum{1, normed_ + row * d_.hidden * size_, into, into, d_.hidden, d_.dtype};
      INFERLAB_DISPATCH(sum_row, sum);
    });
  }

  void run_product(Stages::Walk& walk, const LinearTasks& tasks) {
    if (tasks.scratch_floats() > 0) walk.stage(1, [&](int64_t) { tasks.prepare(scratch_); });
    walk.stage(tasks.count(), [&](int64_t i) { tasks.run(i, scratch_); });
  }

  // body(row) for all rows, some in a task.
  template <typename F>
  void each_row(Stages::Walk& walk, int64_t rows, int64_t width, const F& body) {
    const int64_t some = std::max<int64_t>(1, kRowBytes / (width * size_));
    walk.stage((rows + some - 1) / some, [&](int64_t task) {
      const int64_t end = std::min(rows, (task + 1) * some);
      for (int64_t row = task * some; row < end; ++row) body(row);
    });
  }

  void norm(Stages::Walk& walk, const Norm& norm) {
    each_row(walk, count(), d_.hidden,
             [&](int64_t row) { norm_row(norm, hidden_, normed_, d_.hidden, row, row); });
  }

  void norm_row(const Norm& norm, const char* x, char* out, int64_t dim, int64_t from,
                int64_t to) const {
    if (norm.centred) {
      const LayerNormRow params{x + from * dim * size_,
                                norm.weight,
                                norm.bias,
                                out + to * dim * size_,
                                dim,
                                norm.eps,
                                d_.dtype};
      INFERLAB_DISPATCH(layer_norm_row, params);
      return;
    }
    const RmsNormParams params{x + from * dim * size_,
                               norm.weight,
                               out + to * dim * size_,
                               1,
                               dim,
                               dim,
                               dim,
                               norm.eps,
                               norm.offset,
                               d_.dtype};
    INFERLAB_DISPATCH(rms_norm_row, params, 0);
  }

  void norm_heads(const Norm& norm, char* x, int64_t heads, int64_t dim) const {
    if (norm.weight == nullptr) return;
    for (int64_t head = 0; head < heads; ++head) norm_row(norm, x, x, dim, head, head);
  }

  void check(bool ran) {
    if (!ran) enough_memory_.store(false, std::memory_order_relaxed);
  }

  void keep_features(Stages::Walk& walk, int layer, const char* from) {
    const auto& wanted = p_.feature_layers;
    const int64_t bytes = d_.hidden * size_, all = static_cast<int64_t>(wanted.size()) * bytes;
    each_row(walk, count(), d_.hidden, [&](int64_t row) {
      char* to = static_cast<char*>(p_.features) + rows_[row].place * all;
      for (size_t i = 0; i < wanted.size(); ++i) {
        if (wanted[i] == layer) std::memcpy(to + i * bytes, from + row * bytes, bytes);
      }
    });
  }

  // From the front to where they belong, and zeros between them.
  void spread_logits() const {
    if (!ragged_) return;
    const int64_t features = static_cast<int64_t>(p_.feature_layers.size()) * d_.hidden * size_;
    int64_t row = count() - 1;
    for (int64_t place = p_.batch * p_.nodes - 1; place >= 0; --place) {
      const bool real = row >= 0 && rows_[row].place == place;
      if (!real && features > 0) {
        std::memset(static_cast<char*>(p_.features) + place * features, 0, features);
      }
      if (p_.all_scored) {
        const int64_t bytes = d_.head.out * size_;
        char* logits = static_cast<char*>(p_.logits);
        if (!real) {
          std::memset(logits + place * bytes, 0, bytes);
        } else if (row != place) {
          std::memcpy(logits + place * bytes, logits + row * bytes, bytes);
        }
      }
      row -= real;
    }
  }

  const Decoder& d_;
  const DecoderPass& p_;
  const int64_t size_;
  std::vector<Row> rows_;
  std::vector<int64_t> starts_, scored_;
  std::vector<LayerTasks> layers_;
  LinearTasks head_;
  Arena* expert_memory_ = nullptr;
  float* expert_scratch_ = nullptr;
  bool ragged_ = false;
  int64_t normed_rows_ = 0;
  char *hidden_ = nullptr, *normed_ = nullptr, *qkv_ = nullptr, *attended_ = nullptr,
       *gates_ = nullptr, *gated_ = nullptr, *scores_ = nullptr, *slots_ = nullptr,
       *shares_ = nullptr;
  float *scratch_ = nullptr, *partials_ = nullptr;
  std::atomic<bool> enough_memory_{true};
};

}  // namespace

Status forward(const Decoder& decoder, const DecoderPass& pass) {
  if (pass.batch == 0 || pass.nodes == 0) return Status::kOk;
  return Forward(decoder, pass).run();
}

}  // namespace inferlab::cpu
