#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bind.h"
#include "inferlab/bandwidth.h"
#include "inferlab/cuda_device.h"
#include "inferlab/memory.h"
#include "inferlab/noise.h"
#include "isa.h"
#include "op.h"
#include "parallel.h"

namespace inferlab {
namespace {

void philox_block(Call& c) {
  static constexpr const char* kWords[] = {"c0", "c1", "c2", "c3", "k0", "k1"};
  PhiloxParams p{};
  const Arg& out = c.out("out", kI32, {int64_t{4}});
  for (int i = 0; i < 6; ++i) {
    (i < 4 ? p.counter[i] : p.key[i - 4]) = static_cast<uint32_t>(c.integer(kWords[i]));
  }
  if (!c.ready()) return;
  p.out = out.ptr<uint32_t>();
  c.cpu([&] {
    const PhiloxBlock block =
        philox4x32_10(p.counter[0], p.counter[1], p.counter[2], p.counter[3], p.key[0], p.key[1]);
    std::copy(block.w, block.w + 4, p.out);
    return Status::kOk;
  });
  c.cuda([&](void* stream) { return cuda::philox_block(p, stream); });
  c.metal(p, {1, 1, 1, kMetalSimd, "noise"}, {});
}

void gumbel_row(Call& c) {
  Dim tokens("tokens");
  const int64_t seed = c.integer("seed"), position = c.integer("position");
  const int64_t purpose = c.integer("purpose");
  const Arg& out = c.out("out", kF32, {tokens});
  if (!c.ready()) return;
  const GumbelRowParams p{static_cast<uint64_t>(seed), static_cast<uint32_t>(position),
                          static_cast<uint32_t>(purpose), out.ptr<float>(), tokens};
  c.cpu([&] { return cpu::gumbel_row(p); });
  c.cuda([&](void* stream) { return cuda::gumbel_row(p, stream); });
  const int64_t groups = (tokens + kMetalThreads - 1) / kMetalThreads;
  c.metal(p, {groups, 1, 1, kMetalThreads, "noise"}, {});
}

}  // namespace

void bind_system(py::module_& m) {
  m.def("build_info", [] {
    py::dict d;
    d["version"] = INFERLAB_VERSION;
    d["compiler"] = INFERLAB_COMPILER;
#if defined(INFERLAB_WITH_CUDA)
    d["cuda"] = INFERLAB_CUDA_VERSION;
    d["cuda_architectures"] = INFERLAB_CUDA_ARCHS;
#else
    d["cuda"] = py::none();
    d["cuda_architectures"] = py::none();
#endif
#if defined(INFERLAB_X86)
    d["isas"] = std::vector<std::string>{"avx2", "avx512", "avx512_bf16", "amx"};
#else
    d["isas"] = std::vector<std::string>{"generic"};
#endif
    return d;
  });
  m.def("cuda_device_count", [] {
#if defined(INFERLAB_WITH_CUDA)
    return cuda::device_count();
#else
    return 0;
#endif
  });
  m.def("active_isa", [] { return cpu::isa_name(cpu::active_isa()); });
  m.def("force_isa", [](const std::string& name) {
    require(cpu::force_isa(name.c_str()),
            "isa is '" + name + "'; this build and processor do not offer it");
  });
  m.def("num_threads", [] { return cpu::num_threads(); });
  m.def("set_num_threads", [](int n) {
    require(n >= 0, "num_threads is " + std::to_string(n) + "; it must be >= 0 (0: all cores)");
    cpu::set_num_threads(n);
  });
  m.def("threading_backend", [] { return cpu::threading_backend(); });

  // Reads a float32 array once, with all threads: time it to get the read bandwidth.
  m.def("read_memory", [](py::handle data) {
    Tensor t(data, "data");
    t.dims(1).f32().contiguous().cpu();
    require(t.size(0) % 64 == 0,
            "data has " + std::to_string(t.size(0)) + " elements; it must be a multiple of 64");
    ReadParams params{t.ptr<const float>(), t.size(0), 0.0f};
    {
      py::gil_scoped_release release;
      check_status(cpu::read_memory(params), "read_memory");
    }
    return params.sum;
  });

  m.def("advise_large_pages", [](py::handle data) {
    Tensor t(data, "data");
    t.contiguous().cpu();
    return cpu::advise_large_pages(t.ptr<void>(), t.bytes());
  });
  m.def("discard_pages", [](py::handle data) {
    Tensor t(data, "data");
    t.contiguous().cpu();
    return cpu::discard_pages(t.ptr<void>(), t.bytes());
  });

  // The noise itself, for known-answer tests, as each backend has it.
  m.attr("metal").attr("SIMD_WIDTH") = kMetalSimd;
  define(m, "philox_block", philox_block);
  define(m, "gumbel_row", gumbel_row);
  m.attr("PURPOSE_TOKEN") = static_cast<int>(kPurposeToken);
  m.attr("PURPOSE_DRAFT") = static_cast<int>(kPurposeDraft);
  m.attr("PURPOSE_ACCEPT") = static_cast<int>(kPurposeAccept);
  m.attr("PURPOSE_RECOVERY") = static_cast<int>(kPurposeRecovery);
}

}  // namespace inferlab
