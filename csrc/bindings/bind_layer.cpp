#include <string>

#include "bind.h"
#include "block_table.h"
#include "inferlab/layer.h"
#include "inferlab/linear.h"
#include "inferlab/packed_weight.h"
#include "op.h"

namespace inferlab {
namespace {

// The elements between rows, where all dimensions but the last fold into one.
int64_t row_stride(const Tensor& t) {
  const int last = t.ndim() - 1;
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

void rms_norm(Call& c) {
  Lead rows;
  Dim dim("dim");
  Element T;
  const Arg& x = c.in("x", T, {rows, dim}).rows().decides();
  const Arg& weight = c.in("weight", T, {dim});
  const Arg& out = c.out("out", T, {rows, dim}).rows();
  const double eps = c.number("eps"), offset = c.number("offset");
  if (!c.ready()) return;
  require(eps >= 0, [&] { return "eps is " + std::to_string(eps) + "; it must be >= 0"; });
  RmsNormParams p{};
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.rows = dim == 0 ? 0 : x.numel() / dim;
  p.dim = dim;
  p.x_stride = row_stride(x);
  p.out_stride = row_stride(out);
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  p.dtype = T;
  c.cpu([&] { return cpu::rms_norm(p); });
  c.cuda([&](void* stream) { return cuda::rms_norm(p, stream); });
  c.metal(p, {p.rows}, {{"ELEMENT", p.dtype}});
}

void silu_mul(Call& c) {
  Lead rows;
  Dim both("2 * dim"), dim("dim");
  Element T;
  const Arg& x = c.in("x", T, {rows, both});
  const Arg& out = c.out("out", T, {rows, dim});
  if (!c.ready()) return;
  require(both == 2 * dim, [&] {
    return "x has shape " + x.shape_str() + "; its last dimension must be twice that of out, " +
           out.shape_str();
  });
  SiluMulParams p{};
  p.x = x.data();
  p.out = out.data();
  p.rows = dim == 0 ? 0 : out.numel() / dim;
  p.dim = dim;
  p.dtype = T;
  c.cpu([&] { return cpu::silu_mul(p); });
  c.cuda([&](void* stream) { return cuda::silu_mul(p, stream); });
  c.metal(p, {(dim + kMetalThreads - 1) / kMetalThreads, p.rows}, {{"ELEMENT", p.dtype}});
}

// What products have in common, whatever their weight is: x [rows, in], y [rows, out].
LinearParams product_of(const Tensor& x, const Tensor& weight, const Tensor& bias,
                        const Tensor& residual, const Tensor& y, DType dtype) {
  LinearParams p{};
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.data();
  p.residual = residual.data();
  p.y = y.data();
  p.rows = x.size(0);
  p.in = x.size(1);
  p.out = y.size(1);
  p.x_stride = x.stride(0);
  p.dtype = dtype;
  return p;
}

void linear(Call& c) {
  Dim rows("rows"), in("in"), outputs("out");
  Element T;
  const Arg& x = c.in("x", T, {rows, in}).rows();
  const Arg& weight = c.in("weight", T, {outputs, in}).decides();
  const Arg& bias = c.in("bias", T, {outputs}).optional();
  const Arg& residual = c.in("residual", T, {rows, outputs}).optional();
  const Arg& y = c.out("out", T, {rows, outputs});
  const bool constant_weight = c.flag("constant_weight");
  if (!c.ready()) return;
  LinearParams p = product_of(x, weight, bias, residual, y, T);
  p.weight_is_constant = constant_weight;
  if (p.rows == 0 || p.out == 0) return;
  if (c.on_metal()) return c.decline();
#if defined(INFERLAB_WITH_CUDA)
  if (c.on_cuda() && !cuda::can_linear(p)) return c.decline();
#endif
  c.cpu([&] { return cpu::linear(p); });
  c.cuda([&](void* stream) { return cuda::linear(p, stream); });
}

void packed_linear(Call& c) {
  Dim rows("rows"), in("in"), outputs("out"), tiles("tiles"), bytes("tile_bytes");
  Element T;
  const Arg& x = c.in("x", T, {rows, in}).rows().decides();
  const Arg& weight = c.in("weight", kU8, {tiles, bytes});
  const int64_t bits = c.integer("bits"), group = c.integer("group");
  const bool zeros = c.flag("zeros");
  const Arg& order = c.in("order", kI32, {in}).optional();
  const Arg& bias = c.in("bias", T, {outputs}).optional();
  const Arg& residual = c.in("residual", T, {rows, outputs}).optional();
  const Arg& y = c.out("out", T, {rows, outputs});
  if (!c.ready()) return;
  require(bits == 8 || bits == 4,
          [&] { return "bits is " + std::to_string(bits) + "; it must be 8 or 4"; });
  require(group == 32 || group == 64 || group == 128,
          [&] { return "group is " + std::to_string(group) + "; it must be 32, 64 or 128"; });
  require(bits == 4 || !zeros, "zeros is set with 8 bits; only weights of 4 bits have them");
  LinearParams p = product_of(x, weight, bias, residual, y, T);
  p.bits = static_cast<int>(bits);
  p.group = group;
  p.zeros = zeros;
  p.order = order.ptr<const int32_t>();
  if (order.given() && c.on_cpu()) order.order();
  require(tiles == packed_tiles(p) && bytes == packed_tile_bytes(p), [&] {
    return "weight has shape " + weight.shape_str() + "; packed for " + std::to_string(p.out) +
           " outputs and " + std::to_string(p.in) + " inputs it must be [" +
           std::to_string(packed_tiles(p)) + ", " + std::to_string(packed_tile_bytes(p)) + "]";
  });
  if (p.rows == 0 || p.out == 0) return;
  if (!c.on_cpu()) return c.decline();
  c.cpu([&] { return cpu::linear(p); });
}

// Strides of b and n of [B, N, H, D] with contiguous heads.
void take_heads(const Tensor& t, int64_t stride[2]) {
  require(t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3)),
          [&] { return std::string(t.name()) + " must be contiguous in its last two dimensions"; });
  stride[0] = t.stride(0);
  stride[1] = t.stride(1);
}

void rope_append(Call& c) {
  Dim B("B"), N("N"), Hq("Hq"), Hkv("Hkv"), D("D"), P("P"), S("page_size"), M("max_pages");
  Dim angles("B or 1"), rotary("rotary");
  Element T;
  Stored pages(T);
  const Arg& q = c.out("q", T, {B, N, Hq, D}).strided();
  const Arg& k = c.in("k", T, {B, N, Hkv, D}).strided();
  const Arg& v = c.in("v", T, {B, N, Hkv, D}).strided();
  const Arg& cos = c.in("cos", T, {angles, N, rotary});
  const Arg& sin = c.in("sin", T, {angles, N, rotary});
  const Arg& k_pages = c.out("k_pages", pages, {P, S, Hkv, D}).decides();
  const Arg& v_pages = c.out("v_pages", pages, {P, S, Hkv, D});
  const Arg& table = c.in("block_table", kI32, {B, M}).rows();
  const Arg& seq_lens = c.in("seq_lens", kI32, {B});
  const int64_t node_offset = c.integer("node_offset");
  const Arg& num_nodes = c.in("num_nodes", kI32, {B}).optional();
  if (!c.ready()) return;
  const PagedLayout layout = paged_layout(k_pages);
  require(angles == B || angles == 1, [&] {
    return "cos has shape " + cos.shape_str() + "; it must be [" + std::to_string(B) + " or 1, " +
           std::to_string(N) + ", rotary]";
  });
  require(rotary % 2 == 0 && rotary > 0 && rotary <= D, [&] {
    return "cos has " + std::to_string(rotary) +
           " channels; it must be even, above 0 and at most the head dimension, " +
           std::to_string(D);
  });
  require(pages.format() == PageFormat::kSame || D <= kMaxHeadDim, [&] {
    return "k has head dimension " + std::to_string(D) +
           "; for pages of 8 bits it must be at most " + std::to_string(kMaxHeadDim);
  });
  check_offset(node_offset);
  RopeAppendParams p{};
  take_heads(q, p.q_stride);
  take_heads(k, p.k_stride);
  take_heads(v, p.v_stride);
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.cos = cos.data();
  p.sin = sin.data();
  p.cos_stride = angles == 1 ? 0 : N * rotary;
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.num_nodes = num_nodes.ptr<const int32_t>();
  p.batch = B;
  p.nodes = N;
  p.q_heads = Hq;
  p.kv_heads = Hkv;
  p.head_dim = D;
  p.rotary = rotary;
  p.pages = P;
  p.page_size = S;
  p.max_pages = M;
  p.node_offset = node_offset;
  p.dtype = T;
  p.format = pages.format();
  if (c.on_cpu()) check_new_rows(table, seq_lens, p, layout);
  c.cpu([&] { return cpu::rope_append(p); });
  c.cuda([&](void* stream) { return cuda::rope_append(p, stream); });
  c.metal(p, {N, B}, {{"ELEMENT", p.dtype}});
}

}  // namespace

void bind_layer(py::module_& m) {
  define(m, "rms_norm", rms_norm);
  define(m, "silu_mul", silu_mul);
  define(m, "rope_append", rope_append);
  define(m, "linear", linear);
  define(m, "packed_linear", packed_linear);
}

}  // namespace inferlab
