#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bind.h"
#include "inferlab/bandwidth.h"
#include "inferlab/cuda_device.h"
#include "inferlab/noise.h"
#include "inferlab/sampling.h"
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {

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
    d["isas"] = std::vector<std::string>{"avx2", "avx512"};
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

  // The noise itself, for known-answer tests and for the reference: where `out` is, on its device.
  m.def(
      "philox4x32_10",
      [](const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key, py::handle out) {
        require(counter.size() == 4, "counter must have 4 words");
        require(key.size() == 2, "key must have 2 words");
        if (out.is_none()) {
          const PhiloxBlock b =
              philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
          return py::cast(std::vector<uint32_t>(b.w, b.w + 4));
        }
        Tensor t(out, "out");
        const Place place = t.i32().shape({4}).contiguous().place();
        require(place.cuda, "out must be on a CUDA device; leave it out for the CPU's words");
        cuda::PhiloxParams p{};
        std::copy(counter.begin(), counter.end(), p.counter);
        std::copy(key.begin(), key.end(), p.key);
        p.out = t.ptr<uint32_t>();
        run_cuda(out, place, "philox4x32_10",
                 [&](void* stream) { return cuda::philox_block(p, stream); });
        return py::reinterpret_borrow<py::object>(out);
      },
      py::arg("counter"), py::arg("key"), py::arg("out") = py::none());
  m.def("gumbel_row", [](int64_t seed, uint32_t position, uint32_t purpose, py::handle out) {
    Tensor t(out, "out");
    const Place place = t.dims(1).f32().contiguous().place();
    const cuda::GumbelRowParams p{static_cast<uint64_t>(seed), position, purpose, t.ptr<float>(),
                                  t.size(0)};
    if (place.cuda) {
      run_cuda(out, place, "gumbel_row", [&](void* stream) { return cuda::gumbel_row(p, stream); });
      return;
    }
    cpu::gumbel_row(p.seed, position, purpose, p.out, p.tokens);
  });
}

}  // namespace inferlab
