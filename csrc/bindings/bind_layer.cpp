#include <string>

#include "bind.h"
#include "block_table.h"
#include "inferlab/layer.h"
#include "inferlab/linear.h"
#include "tensor.h"

namespace inferlab {
namespace {

// The elements between rows, where all dimensions but the last fold into one.
int64_t row_stride(const Tensor& t) {
  const int last = t.ndim() - 1;
  require(t.ndim() >= 1, [&] { return std::string(t.name()) + " has no dimensions"; });
  t.last_dim_contiguous();
  int64_t stride = 0, rows = 1;
  for (int i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (stride == 0) {
      stride = t.stride(i);
    } else {
      require(t.stride(i) == stride * rows, [&] {
        return std::string(t.name()) + " must have evenly spaced rows (shape " + t.shape_str() +
               ")";
      });
    }
    rows *= t.size(i);
  }
  return stride == 0 ? t.size(last) : stride;
}

void rms_norm(py::handle x_, py::handle weight_, py::handle out_, double eps, double offset) {
  Tensor x(x_, "x"), weight(weight_, "weight"), out(out_, "out");
  const Place place = x.place();
  RmsNormParams p{};
  p.x_stride = row_stride(x);
  p.dim = x.size(x.ndim() - 1);
  weight.shape({p.dim}).contiguous().on(place);
  check_same_dtype(weight, x);
  check_same_dtype(out, x);
  p.out_stride = row_stride(out);
  require(out.numel() == x.numel() && out.size(out.ndim() - 1) == p.dim, [&] {
    return "out has shape " + out.shape_str() + "; it must be like x, " + x.shape_str();
  });
  out.on(place);
  require(eps >= 0, [&] { return "eps is " + std::to_string(eps) + "; it must be >= 0"; });
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.rows = p.dim == 0 ? 0 : x.numel() / p.dim;
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  p.dtype = x.float_dtype();
  if (place.cuda) {
    run_cuda(x_, place, "rms_norm", [&](void* stream) { return cuda::rms_norm(p, stream); });
  } else {
    run_cpu("rms_norm", [&] { return cpu::rms_norm(p); });
  }
}

void silu_mul(py::handle x_, py::handle out_) {
  Tensor x(x_, "x"), out(out_, "out");
  const Place place = x.place();
  x.contiguous();
  out.contiguous().on(place);
  check_same_dtype(out, x);
  SiluMulParams p{};
  p.dim = out.size(out.ndim() - 1);
  require(
      x.ndim() == out.ndim() && x.size(x.ndim() - 1) == 2 * p.dim && x.numel() == 2 * out.numel(),
      [&] {
        return "x has shape " + x.shape_str() + "; its last dimension must be twice that of out, " +
               out.shape_str();
      });
  p.x = x.data();
  p.out = out.data();
  p.rows = p.dim == 0 ? 0 : out.numel() / p.dim;
  p.dtype = x.float_dtype();
  if (place.cuda) {
    run_cuda(x_, place, "silu_mul", [&](void* stream) { return cuda::silu_mul(p, stream); });
  } else {
    run_cpu("silu_mul", [&] { return cpu::silu_mul(p); });
  }
}

// False where the device has no kernel for these: the caller takes the framework's product.
bool linear(py::handle x_, py::handle weight_, py::handle bias_, py::handle residual_,
            py::handle y_, bool constant_weight) {
  Tensor x(x_, "x"), weight(weight_, "weight"), y(y_, "y");
  OptionalTensor bias(bias_, "bias"), residual(residual_, "residual");
  const Place place = x.place();
  weight.dims(2).contiguous().on(place);
  LinearParams p{};
  p.out = weight.size(0);
  p.in = weight.size(1);
  x.shape({Tensor::kAny, p.in}).last_dim_contiguous();
  p.rows = x.size(0);
  p.x_stride = x.stride(0);
  y.shape({p.rows, p.out}).contiguous().on(place);
  check_same_dtype(x, weight);
  check_same_dtype(y, weight);
  if (bias) check_same_dtype(bias->shape({p.out}).contiguous().on(place), weight);
  if (residual) check_same_dtype(residual->shape({p.rows, p.out}).contiguous().on(place), weight);
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.ptr<const void>();
  p.residual = residual.ptr<const void>();
  p.y = y.data();
  p.dtype = weight.float_dtype();
  p.weight_is_constant = constant_weight;
  if (p.rows == 0 || p.out == 0) return true;
  if (!place.cuda) {
    run_cpu("linear", [&] { return cpu::linear(p); });
    return true;
  }
#if defined(INFERLAB_WITH_CUDA)
  if (!cuda::can_linear(p)) return false;
  run_cuda(x_, place, "linear", [&](void* stream) { return cuda::linear(p, stream); });
#endif
  return true;
}

// [B, N, H, D] with contiguous heads; fills the strides of b and n.
void check_heads(const Tensor& t, int64_t stride[2]) {
  require(t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3)),
          [&] { return std::string(t.name()) + " must be contiguous in its last two dimensions"; });
  stride[0] = t.stride(0);
  stride[1] = t.stride(1);
}

void rope_append(py::handle q_, py::handle k_, py::handle v_, py::handle cos_, py::handle sin_,
                 py::handle k_pages_, py::handle v_pages_, py::handle block_table_,
                 py::handle seq_lens_, int64_t node_offset, py::handle num_nodes_) {
  Tensor q(q_, "q"), k(k_, "k"), v(v_, "v"), cos(cos_, "cos"), sin(sin_, "sin");
  Tensor k_pages(k_pages_, "k_pages"), v_pages(v_pages_, "v_pages");
  Tensor table(block_table_, "block_table"), seq_lens(seq_lens_, "seq_lens");
  OptionalTensor num_nodes(num_nodes_, "num_nodes");
  const Place place = q.place();
  k_pages.dims(4).contiguous().on(place);
  const PagedLayout layout = paged_layout(k_pages);
  RopeAppendParams p{};
  p.kv_heads = k_pages.size(2);
  p.head_dim = k_pages.size(3);
  v_pages.shape({layout.pages, layout.page_size, p.kv_heads, p.head_dim}).contiguous().on(place);
  q.dims(4);
  p.batch = q.size(0);
  p.nodes = q.size(1);
  p.q_heads = q.size(2);
  q.shape({p.batch, p.nodes, p.q_heads, p.head_dim});
  k.shape({p.batch, p.nodes, p.kv_heads, p.head_dim}).on(place);
  v.shape({p.batch, p.nodes, p.kv_heads, p.head_dim}).on(place);
  cos.dims(3).contiguous().on(place);
  p.rotary = cos.size(2);
  require((cos.size(0) == p.batch || cos.size(0) == 1) && cos.size(1) == p.nodes, [&] {
    return "cos has shape " + cos.shape_str() + "; it must be [" + std::to_string(p.batch) +
           " or 1, " + std::to_string(p.nodes) + ", rotary]";
  });
  require(p.rotary % 2 == 0 && p.rotary <= p.head_dim, [&] {
    return "cos has " + std::to_string(p.rotary) +
           " channels; it must be even and at most the head dimension, " +
           std::to_string(p.head_dim);
  });
  sin.shape({cos.size(0), cos.size(1), cos.size(2)}).contiguous().on(place);
  for (const Tensor* t : {&q, &k, &v, &cos, &sin, &v_pages}) check_same_dtype(*t, k_pages);
  check_heads(q, p.q_stride);
  check_heads(k, p.k_stride);
  check_heads(v, p.v_stride);
  check_block_table(table, p.batch, place);
  check_seq_lens(seq_lens, p.batch, place);
  check_num_nodes(num_nodes, p.batch, p.nodes, place);
  require(node_offset >= 0,
          [&] { return "node_offset is " + std::to_string(node_offset) + "; it must be >= 0"; });
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.cos = cos.data();
  p.sin = sin.data();
  p.cos_stride = cos.size(0) == 1 ? 0 : p.nodes * p.rotary;
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.num_nodes = num_nodes.ptr<const int32_t>();
  p.pages = layout.pages;
  p.page_size = layout.page_size;
  p.max_pages = table.size(1);
  p.node_offset = node_offset;
  p.dtype = k_pages.float_dtype();
  if (place.cuda) {
    run_cuda(q_, place, "rope_append", [&](void* stream) { return cuda::rope_append(p, stream); });
    return;
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t first = p.seq_lens[b] + node_offset;
    const int64_t count = p.num_nodes != nullptr ? p.num_nodes[b] : p.nodes;
    check_slots(table, b, first, first + count, layout);
  }
  run_cpu("rope_append", [&] { return cpu::rope_append(p); });
}

}  // namespace

void bind_layer(py::module_& m) {
  m.def("rms_norm", &rms_norm);
  m.def("silu_mul", &silu_mul);
  m.def("rope_append", &rope_append);
  m.def("linear", &linear);
}

}  // namespace inferlab
