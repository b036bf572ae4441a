// The decoder: weights are taken once, with everything about them checked; a forward checks what
// changes from call to call.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"
#include "block_table.h"
#include "inferlab/decoder.h"
#include "inferlab/draft_chain.h"
#include "inferlab/packed_weight.h"
#include "planner/watch.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {
namespace {

// None leaves a tensor that is not given.
void view_optional(Tensor& tensor, py::handle object, const char* name) {
  if (!object.is_none()) tensor.view(object, name);
}

// A model's weights, which stay where they are while it lives.
class CompiledDecoder {
 public:
  CompiledDecoder(py::object embedding, double embedding_scale, py::object places,
                  int64_t first_place, py::object norm, py::object head, double softcap,
                  int64_t num_angles) {
    const Tensor table(embedding, "embedding");
    table.dims(2).contiguous().cpu();
    decoder_.embedding = table.data();
    decoder_.embedding_scale = static_cast<float>(embedding_scale);
    decoder_.vocab = table.size(0);
    decoder_.hidden = table.size(1);
    decoder_.dtype = table.float_dtype();
    keep(std::move(embedding));
    if (!places.is_none()) {
      const Tensor rows(places, "places");
      rows.shape({Tensor::kAny, decoder_.hidden}).contiguous().cpu();
      require(rows.float_dtype() == decoder_.dtype, "all weights must be of one type");
      require(first_place >= 0 && first_place <= rows.size(0), "first_place must be one of places");
      decoder_.places = rows.data();
      decoder_.num_places = rows.size(0);
      decoder_.first_place = first_place;
      keep(std::move(places));
    }
    decoder_.norm = norm_of(norm, decoder_.hidden, "norm");
    decoder_.head = matrix_of(head, decoder_.hidden, "head");
    decoder_.softcap = static_cast<float>(softcap);
    require(num_angles >= 1, "num_angles must be at least 1");
    decoder_.num_angles = num_angles;
  }

  // Norms: None, or weight, bias (LayerNorm; None), eps, offset and whether it is a LayerNorm.
  // Matrices: weight and bias, or None for it. Experts: None, or router, gate_up, down, how many
  // are chosen, whether their weights are normed and rounded, and the gate of the shared MLP or
  // None.
  void add_layer(py::object input_norm, py::object attention_norm, py::object mlp_norm,
                 py::object down_norm, py::object q_norm, py::object k_norm, py::object qkv,
                 py::object output, py::object up, py::object down, py::object experts,
                 const std::string& activation, bool gated, bool parallel, bool by_head,
                 int64_t angles, int64_t q_heads, int64_t kv_heads, int64_t head_dim, double scale,
                 int64_t window, double softcap) {
    const int64_t hidden = decoder_.hidden;
    cpu::DecoderLayer layer;
    layer.activation = activation_of(activation);
    layer.gated = gated;
    layer.parallel = parallel;
    layer.by_head = by_head;
    layer.angles = angles;
    layer.q_heads = q_heads;
    layer.kv_heads = kv_heads;
    layer.head_dim = head_dim;
    layer.window = window;
    layer.scale = static_cast<float>(scale);
    layer.softcap = static_cast<float>(softcap);
    layer.input_norm = norm_of(input_norm, hidden, "input_norm");
    layer.attention_norm = norm_of(attention_norm, hidden, "attention_norm");
    layer.mlp_norm = norm_of(mlp_norm, hidden, "mlp_norm");
    layer.down_norm = norm_of(down_norm, hidden, "down_norm");
    layer.q_norm = norm_of(q_norm, head_dim, "q_norm");
    layer.k_norm = norm_of(k_norm, head_dim, "k_norm");
    layer.qkv = matrix_of(qkv, hidden, "qkv");
    layer.output = matrix_of(output, q_heads * head_dim, "output");
    if (!experts.is_none()) layer.experts = experts_of(experts);
    const bool has_mlp = !up.is_none();
    if (has_mlp) {
      layer.up = matrix_of(up, hidden, "up");
      layer.down = matrix_of(down, gated ? layer.up.out / 2 : layer.up.out, "down");
    }
    require(head_dim > 0 && head_dim % 8 == 0 && kv_heads > 0 && q_heads % kv_heads == 0,
            "head_dim must be a multiple of 8, and q_heads one of kv_heads");
    require(layer.qkv.out == (q_heads + 2 * kv_heads) * head_dim && layer.output.out == hidden &&
                (!has_mlp || ((!gated || layer.up.out % 2 == 0) && layer.down.out == hidden)),
            "the weights of a layer do not fit each other");
    require(has_mlp == (layer.experts.count == 0 || layer.experts.shared_gate.out > 0),
            "a layer has an mlp, experts, or both with a gate between them");
    require(layer.experts.count == 0 || (gated && !parallel && layer.down_norm.weight == nullptr),
            "experts are gated, behind attention, and their sum is not normed");
    require(layer.input_norm.weight != nullptr && layer.mlp_norm.weight != nullptr,
            "a layer must norm what attention and its mlp read");
    require(!(parallel && layer.attention_norm.weight != nullptr),
            "attention_norm is of layers that are not parallel");
    require(!by_head || (q_heads == kv_heads && layer.q_norm.weight == nullptr &&
                         layer.k_norm.weight == nullptr),
            "by_head is of layers with as many heads of q as of k and v, and without their norms");
    require(angles >= 0 && angles < decoder_.num_angles, "angles must be below num_angles");
    decoder_.layers.push_back(layer);
  }

  // The same with its first layers alone.
  std::unique_ptr<CompiledDecoder> first(size_t layers) const {
    require(layers <= decoder_.layers.size(), "there are not so many layers");
    auto shallow = std::make_unique<CompiledDecoder>(*this);
    shallow->decoder_.layers.resize(layers);
    return shallow;
  }

  // 0, or how many positions cos and sin would have to have: then nothing was done.
  int64_t forward(py::handle tokens, py::handle positions, py::handle cos, py::handle sin,
                  py::handle seq_lens, py::handle block_table, py::handle ancestors,
                  py::handle num_nodes, int64_t node_offset, py::handle k_pages, py::handle v_pages,
                  py::handle scored, py::handle logits, std::vector<int> feature_layers,
                  py::handle features) const {
    const Tensor ids(tokens, "tokens"), cosines(cos, "cos"), sines(sin, "sin"),
        lens(seq_lens, "seq_lens"), table(block_table, "block_table"), keys(k_pages, "k_pages"),
        values(v_pages, "v_pages"), out(logits, "logits");
    Tensor places, tree, counts, asked, seen;
    view_optional(places, positions, "positions");
    view_optional(tree, ancestors, "ancestors");
    view_optional(counts, num_nodes, "num_nodes");
    view_optional(asked, scored, "scored");
    view_optional(seen, features, "features");
    ids.dims(2).i64().contiguous().cpu();
    cpu::DecoderPass p;
    p.batch = ids.size(0);
    p.nodes = ids.size(1);
    p.tokens = ids.ptr<const int64_t>();
    lens.i32().shape({p.batch}).contiguous().cpu();
    p.seq_lens = lens.ptr<const int32_t>();
    check_seq_lens(lens);
    if (counts.given()) {
      counts.i32().shape({p.batch}).contiguous().cpu();
      p.num_nodes = counts.ptr<const int32_t>();
      check_num_nodes(p.num_nodes, p.batch, p.nodes);
    }
    check_offset(node_offset);
    p.node_offset = node_offset;
    take_pages(keys, values, table, p);
    if (tree.given()) {
      tree.i64().dims(3).shape({p.batch, p.nodes, Tensor::kAny}).contiguous().cpu();
      p.ancestors = tree.ptr<const uint64_t>();
      p.words = tree.size(2);
    }
    const int64_t missing = take_angles(places, cosines, sines, p);
    if (missing > 0) return missing;
    check_tokens(p);
    if (asked.given()) {
      asked.i64().dims(1).contiguous().cpu();
      p.all_scored = false;
      p.scored = asked.ptr<const int64_t>();
      p.num_scored = asked.size(0);
      for (int64_t i = 0; i < p.num_scored; ++i) {
        const int64_t place = p.scored[i];
        require(place >= 0 && place < p.batch * p.nodes && is_real(p, place),
                "scored has a row that is none, or padding");
      }
    }
    const int64_t scores = asked.given() ? p.num_scored : p.batch * p.nodes;
    require(out.float_dtype() == decoder_.dtype && out.numel() == scores * decoder_.head.out,
            "logits must hold a row of the head's size for each that is scored");
    out.contiguous().cpu();
    p.logits = out.data();
    if (!feature_layers.empty()) {
      seen.contiguous().cpu();
      require(seen.float_dtype() == decoder_.dtype &&
                  seen.numel() == p.batch * p.nodes * static_cast<int64_t>(feature_layers.size()) *
                                      decoder_.hidden,
              "features must hold all feature layers of each row");
      p.features = seen.data();
      p.feature_layers = std::move(feature_layers);
    }
    run_cpu("decoder", [&] { return cpu::forward(decoder_, p); });
    return 0;
  }

  // Chains of R sequences, by `draft_chain`: fills tokens [R, 1 + levels] behind the roots. Returns
  // how many positions cos and sin would have to have (0: they do), the levels, and how many tokens
  // of each the judge wants verified (None without one).
  py::tuple draft_chain(py::handle tokens, py::handle logits, int64_t allowed_vocab,
                        py::handle roots, py::handle seq_lens, py::handle cos, py::handle sin,
                        py::handle block_table, py::handle k_pages, py::handle v_pages,
                        py::handle temperature, py::handle top_k, py::handle top_p,
                        py::handle min_p, py::handle seed, uint32_t purpose, planner::Judge* judge,
                        std::vector<int64_t> requests) const {
    const Tensor out(tokens, "tokens"), scores(logits, "logits"), first(roots, "roots"),
        lens(seq_lens, "seq_lens"), cosines(cos, "cos"), sines(sin, "sin"),
        table(block_table, "block_table"), keys(k_pages, "k_pages"), values(v_pages, "v_pages"),
        heat(temperature, "temperature"), most(top_k, "top_k"), mass(top_p, "top_p"),
        share(min_p, "min_p"), seeds(seed, "seed");
    out.i32().dims(2).contiguous().cpu();
    const int64_t size = out.size(0), levels = out.size(1) - 1;
    require(size > 0 && levels > 0, "tokens must have a row for each sequence, and a level");
    scores.shape({size, 1, decoder_.head.out}).last_dim_contiguous().cpu();
    require(scores.float_dtype() == decoder_.dtype, "logits must be of the model's type");
    cpu::DraftChain chain;
    cpu::DecoderPass& p = chain.pass;
    p.batch = size;
    p.nodes = levels;
    lens.i32().shape({size}).contiguous().cpu();
    p.seq_lens = lens.ptr<const int32_t>();
    check_seq_lens(lens);
    take_pages(keys, values, table, p);
    take_tables(cosines, sines, p);
    const int64_t longest = *std::max_element(p.seq_lens, p.seq_lens + size) + levels;
    if (longest > cosines.size(0)) return py::make_tuple(longest, 0, py::none());
    check_place(longest - 1);
    first.i32().shape({size}).contiguous().cpu();
    for (const Tensor* each : {&heat, &mass, &share}) each->f32().shape({size}).contiguous().cpu();
    most.i32().shape({size}).contiguous().cpu();
    seeds.i64().shape({size}).contiguous().cpu();
    SampleParams& sample = chain.sample;
    sample.logits = {scores.data(), decoder_.dtype, scores.stride(0), 0,
                     std::min(allowed_vocab, decoder_.head.out)};
    require(allowed_vocab >= 1 && requests.size() == static_cast<size_t>(size),
            "allowed_vocab must be at least 1, and requests one number for each sequence");
    sample.sampling = {};
    sample.sampling.temperature = heat.ptr<const float>();
    sample.sampling.top_k = most.ptr<const int32_t>();
    sample.sampling.top_p = mass.ptr<const float>();
    sample.sampling.min_p = share.ptr<const float>();
    sample.sampling.seed = seeds.ptr<const int64_t>();
    sample.batch = size;
    sample.nodes = 1;
    sample.purpose = purpose;
    chain.decoder = &decoder_;
    chain.roots = first.ptr<const int32_t>();
    chain.levels = levels;
    chain.tokens = out.ptr<int32_t>();
    std::optional<planner::Watch> watch;
    if (judge != nullptr) {
      watch.emplace(*judge, std::move(requests));
      chain.goes_on = [&](const float* best) { return watch->goes_on(best); };
    }
    int64_t drafted = 0;
    run_cpu("draft_chain", [&] { return cpu::draft_chain(chain, &drafted); });
    if (!watch) return py::make_tuple(0, drafted, py::none());
    return py::make_tuple(0, drafted, watch->counts());
  }

 private:
  void keep(py::object owner) { owners_.push_back(std::move(owner)); }

  static cpu::Activation activation_of(const std::string& name) {
    if (name == "silu") return cpu::Activation::kSilu;
    if (name == "gelu") return cpu::Activation::kGelu;
    if (name == "gelu_tanh") return cpu::Activation::kGeluTanh;
    require(name == "relu", "activation must be silu, gelu, gelu_tanh or relu");
    return cpu::Activation::kRelu;
  }

  cpu::Norm norm_of(const py::object& given, int64_t size, const char* name) {
    if (given.is_none()) return {};
    const py::tuple parts = given;
    cpu::Norm norm;
    norm.weight = vector_of(parts[0], size, name);
    norm.bias = vector_of(parts[1], size, name);
    norm.eps = parts[2].cast<float>();
    norm.offset = parts[3].cast<float>();
    norm.centred = parts[4].cast<bool>();
    require(norm.centred || norm.bias == nullptr, "RMSNorm has no bias");
    return norm;
  }

  cpu::Experts experts_of(const py::object& given) {
    const py::tuple parts = given;
    const int64_t hidden = decoder_.hidden;
    cpu::Experts experts;
    experts.router = matrix_of(parts[0], hidden, "router");
    experts.count = experts.router.out;
    experts.gate_up = weight_of(parts[1], hidden, "gate_up", experts.count);
    require(experts.gate_up.out % 2 == 0, "gate_up must hold a gate and as much again");
    experts.inner = experts.gate_up.out / 2;
    experts.down = weight_of(parts[2], experts.inner, "down", experts.count);
    require(experts.down.out == hidden, "down must lead back to the hidden size");
    experts.chosen = parts[3].cast<int64_t>();
    require(experts.chosen >= 1 && experts.chosen <= experts.count,
            "as many experts are chosen as there are, at most, and one at least");
    experts.normed = parts[4].cast<bool>();
    experts.rounded = parts[5].cast<bool>();
    if (!parts[6].is_none()) {
      experts.shared_gate = matrix_of(parts[6], hidden, "shared_gate");
      require(experts.shared_gate.out == 1, "shared_gate must have one output");
    }
    return experts;
  }

  // [size], or null for None.
  const void* vector_of(py::object given, int64_t size, const char* name) {
    if (given.is_none()) return nullptr;
    const Tensor t(given, name);
    t.shape({size}).contiguous().cpu();
    require(t.float_dtype() == decoder_.dtype, "all weights must be of one type");
    keep(std::move(given));
    return t.data();
  }

  // A weight and a bias or None.
  cpu::Matrix matrix_of(const py::object& given, int64_t in, const char* name) {
    const py::tuple parts = given;
    cpu::Matrix matrix = weight_of(parts[0], in, name, 0);
    matrix.bias = vector_of(parts[1], matrix.out, name);
    return matrix;
  }

  // A weight [out, in], or a packed one (data, bits, group, out, in, zeros, order). Where `count`
  // is not 0, the first of so many that stand behind each other: [count, out, in], or data of
  // [count, ..].
  cpu::Matrix weight_of(py::object weight, int64_t in, const char* name, int64_t count) {
    cpu::Matrix matrix;
    matrix.in = in;
    const auto check = [&](const Tensor& t, int64_t rows, int64_t width) {
      (count > 0 ? t.shape({count, rows, width}) : t.shape({rows, width})).contiguous().cpu();
    };
    if (py::isinstance<py::tuple>(weight)) {
      const py::tuple packed = weight;
      LinearParams p{};
      p.bits = packed[1].cast<int>();
      p.group = packed[2].cast<int64_t>();
      p.out = packed[3].cast<int64_t>();
      p.in = packed[4].cast<int64_t>();
      p.zeros = packed[5].cast<bool>();
      const Tensor data(packed[0], name);
      check(data.u8(), packed_tiles(p), packed_tile_bytes(p));
      require(p.in == in, "a packed weight is for another number of inputs");
      matrix.weight = data.data();
      matrix.out = p.out;
      matrix.bits = p.bits;
      matrix.group = p.group;
      matrix.zeros = p.zeros;
      if (!packed[6].is_none()) {
        const Tensor order(packed[6], "order");
        matrix.order = order.i32().shape({in}).contiguous().cpu().order().ptr<const int32_t>();
      }
      matrix.bytes = packed_tiles(p) * packed_tile_bytes(p);
    } else {
      const Tensor w(weight, name);
      check(w, Tensor::kAny, in);
      require(w.float_dtype() == decoder_.dtype, "all weights must be of one type");
      matrix.weight = w.data();
      matrix.out = w.size(count > 0 ? 1 : 0);
      matrix.bytes = matrix.out * in * dtype_size(decoder_.dtype);
    }
    keep(std::move(weight));
    return matrix;
  }

  static bool is_real(const cpu::DecoderPass& p, int64_t place) {
    return p.num_nodes == nullptr || place % p.nodes < p.num_nodes[place / p.nodes];
  }

  void take_pages(const Tensor& keys, const Tensor& values, const Tensor& table,
                  cpu::DecoderPass& p) const {
    const auto layers = static_cast<int64_t>(decoder_.layers.size());
    const cpu::DecoderLayer& layer = decoder_.layers.front();
    p.format = keys.page_format();
    const bool same = p.format == PageFormat::kSame;
    const int64_t bytes = page_head_bytes(p.format, layer.head_dim, decoder_.dtype);
    const int64_t width = same ? layer.head_dim : bytes;
    for (const Tensor* pages : {&keys, &values}) {
      pages->dims(5)
          .shape({Tensor::kAny, keys.size(1), keys.size(2), layer.kv_heads, width})
          .contiguous()
          .cpu();
      const bool fits = same ? pages->float_dtype() == decoder_.dtype
                             : pages->page_format() == p.format && layer.head_dim <= kMaxHeadDim;
      require(pages->size(0) >= layers && fits, "the pages are of another model");
    }
    table.i32().dims(2).shape({p.batch, Tensor::kAny}).last_dim_contiguous().cpu();
    p.k_pages = keys.data();
    p.v_pages = values.data();
    p.layer_bytes = keys.bytes() / keys.size(0);
    p.block_table = table.ptr<const int32_t>();
    p.table_stride = table.stride(0);
    p.max_pages = table.size(1);
    const PagedLayout layout = paged_layout(keys);
    p.pages = layout.pages;
    p.page_size = layout.page_size;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t count = p.num_nodes != nullptr ? p.num_nodes[b] : p.nodes;
      if (count > 0) check_slots(table, b, 0, p.seq_lens[b] + p.node_offset + count, layout);
    }
  }

  void take_tables(const Tensor& cos, const Tensor& sin, cpu::DecoderPass& p) const {
    cos.dims(2);
    p.rotary = cos.size(1) / decoder_.num_angles;
    require(p.rotary % 2 == 0 && p.rotary <= decoder_.layers.front().head_dim,
            "cos and sin are wider than a head");
    for (const Tensor* angles : {&cos, &sin}) {
      angles->shape({Tensor::kAny, p.rotary * decoder_.num_angles}).contiguous().cpu();
      require(angles->float_dtype() == decoder_.dtype && angles->size(0) == cos.size(0),
              "cos and sin must be of the model's type, and of one size");
    }
    p.cos = cos.data();
    p.sin = sin.data();
  }

  int64_t take_angles(const Tensor& places, const Tensor& cos, const Tensor& sin,
                      cpu::DecoderPass& p) const {
    take_tables(cos, sin, p);
    if (!places.given()) {
      require(cos.size(0) == p.batch * p.nodes && decoder_.places == nullptr,
              "without positions there must be angles per row");
      return 0;
    }
    places.i64().shape({p.batch, p.nodes}).contiguous().cpu();
    p.positions = places.ptr<const int64_t>();
    int64_t last = 0;
    for (int64_t place = 0; place < p.batch * p.nodes; ++place) {
      if (!is_real(p, place)) continue;
      require(p.positions[place] >= 0, "positions must be at least 0");
      last = std::max(last, p.positions[place]);
    }
    check_place(last);
    return last < cos.size(0) ? 0 : last + 1;
  }

  void check_place(int64_t position) const {
    const int64_t places = decoder_.num_places - decoder_.first_place;
    if (decoder_.places == nullptr || position < places) return;
    throw py::index_error("positions has " + std::to_string(position) +
                          "; the model has learnt those in [0, " + std::to_string(places) + ")");
  }

  void check_tokens(const cpu::DecoderPass& p) const {
    for (int64_t place = 0; place < p.batch * p.nodes; ++place) {
      const int64_t token = p.tokens[place];
      if ((token < 0 || token >= decoder_.vocab) && is_real(p, place)) {
        throw py::index_error("tokens has " + std::to_string(token) +
                              "; the model's ids are in [0, " + std::to_string(decoder_.vocab) +
                              ")");
      }
    }
  }

  cpu::Decoder decoder_;
  std::vector<py::object> owners_;
};

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<CompiledDecoder>(m, "Decoder", py::module_local())
      .def(py::init<py::object, double, py::object, int64_t, py::object, py::object, double,
                    int64_t>(),
           py::kw_only(), py::arg("embedding"), py::arg("embedding_scale"), py::arg("places"),
           py::arg("first_place"), py::arg("norm"), py::arg("head"), py::arg("softcap"),
           py::arg("num_angles"))
      .def("add_layer", &CompiledDecoder::add_layer, py::kw_only(), py::arg("input_norm"),
           py::arg("attention_norm"), py::arg("mlp_norm"), py::arg("down_norm"), py::arg("q_norm"),
           py::arg("k_norm"), py::arg("qkv"), py::arg("output"), py::arg("up"), py::arg("down"),
           py::arg("experts"), py::arg("activation"), py::arg("gated"), py::arg("parallel"),
           py::arg("by_head"), py::arg("angles"), py::arg("q_heads"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("scale"), py::arg("window"), py::arg("softcap"))
      .def("first", &CompiledDecoder::first)
      .def("forward", &CompiledDecoder::forward)
      .def("draft_chain", &CompiledDecoder::draft_chain);
}

}  // namespace inferlab
