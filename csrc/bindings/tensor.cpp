#include "tensor.h"

#include <algorithm>
#include <cstring>

namespace inferlab {
namespace {

// The exchange API of an exporter's type, read once per type. Types are never freed here: a program
// has a handful of tensor classes.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Entry cache[8];
  static int used = 0;
  for (int i = 0; i < used; ++i) {
    if (cache[i].type == type) return cache[i].api;
  }
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* attr =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (attr == nullptr) {
    PyErr_Clear();
  } else {
    if (PyCapsule_IsValid(attr, "dlpack_exchange_api")) {
      auto* header = static_cast<dlpack::ExchangeApiHeader*>(
          PyCapsule_GetPointer(attr, "dlpack_exchange_api"));
      while (header != nullptr && header->version.major != 1) header = header->prev_api;
      api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
      if (api != nullptr && api->dltensor_from_py_object_no_sync == nullptr) api = nullptr;
    }
    Py_DECREF(attr);
  }
  if (used < 8) {
    Py_INCREF(type);
    cache[used++] = Entry{type, api};
  }
  return api;
}

dlpack::DataType from_buffer_format(const Py_buffer& view, const char* name) {
  const char* f = view.format == nullptr ? "B" : view.format;
  if (*f == '@' || *f == '=' || *f == '<') ++f;
  const auto bits = static_cast<uint8_t>(8 * view.itemsize);
  if (std::strlen(f) == 1) {
    if (std::strchr("bhilqn", *f)) return {dlpack::kInt, bits, 1};
    if (std::strchr("BHILQN", *f)) return {dlpack::kUInt, bits, 1};
    if (std::strchr("efd", *f)) return {dlpack::kFloat, bits, 1};
    if (*f == '?') return {dlpack::kBool, bits, 1};
  }
  throw py::type_error(std::string(name) + ": arrays of format '" + f + "' are not supported");
}

// For arrays whose type does not tell (torch before 2.10, CuPy): torch's current stream, or the
// default one in a process where torch has not touched CUDA.
void* torch_stream(int device_id) {
  const py::module_ cuda = py::module_::import("torch.cuda");
  if (!cuda.attr("is_initialized")().cast<bool>()) return nullptr;
  const py::object stream = cuda.attr("current_stream")(device_id);
  return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
}

}  // namespace

void Tensor::view(py::handle object, const char* name) {
  name_ = name;
  given_ = true;
  PyObject* o = object.ptr();
  bool done = false;
  if (const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(o))) {
    if (api->dltensor_from_py_object_no_sync(o, &tensor_) != 0) throw py::error_already_set();
    done = true;
  } else if (PyObject_CheckBuffer(o)) {
    if (PyObject_GetBuffer(o, &buffer_, PyBUF_RECORDS_RO) == 0) {
      has_buffer_ = true;
      tensor_.data = buffer_.buf;
      tensor_.device = {dlpack::kDLCPU, 0};
      tensor_.ndim = buffer_.ndim;
      done = buffer_.ndim <= kMaxDims;
      for (int i = 0; done && i < buffer_.ndim; ++i) {
        shape_[i] = buffer_.shape[i];
        strides_[i] = buffer_.strides[i] / buffer_.itemsize;
      }
      try {
        tensor_.dtype = from_buffer_format(buffer_, name);
      } catch (...) {
        PyBuffer_Release(&buffer_);
        throw;
      }
    } else {
      PyErr_Clear();  // e.g. a bfloat16 array: it may still speak DLPack
    }
  }
  if (!done && !has_buffer_ && PyObject_HasAttrString(o, "__dlpack__")) {
    owner_ = object.attr("__dlpack__")();
    auto* managed =
        static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    tensor_ = managed->dl_tensor;
    done = true;
  }
  if (!done && !has_buffer_) {
    throw py::type_error(std::string(name) +
                         " must be a tensor or an array (DLPack or NumPy), not " +
                         Py_TYPE(o)->tp_name);
  }
  if (tensor_.ndim > kMaxDims) {
    const std::string message = std::string(name) + " has " + std::to_string(tensor_.ndim) +
                                " dimensions; at most 6 are supported";
    if (has_buffer_) PyBuffer_Release(&buffer_);
    throw py::value_error(message);
  }
  if (!has_buffer_) {
    int64_t expected = 1;
    for (int i = tensor_.ndim - 1; i >= 0; --i) {
      shape_[i] = tensor_.shape[i];
      strides_[i] = tensor_.strides != nullptr ? tensor_.strides[i] : expected;
      expected *= shape_[i];
    }
  }
  tensor_.shape = shape_;
}

void Tensor::view_torch(py::handle object, const char* name) {
  struct Known {
    const char* name;
    dlpack::DataType type;
  };
  static constexpr Known kKnown[] = {
      {"torch.float32", {dlpack::kFloat, 32, 1}},   {"torch.float16", {dlpack::kFloat, 16, 1}},
      {"torch.bfloat16", {dlpack::kBfloat, 16, 1}}, {"torch.float64", {dlpack::kFloat, 64, 1}},
      {"torch.int32", {dlpack::kInt, 32, 1}},       {"torch.int64", {dlpack::kInt, 64, 1}},
      {"torch.uint64", {dlpack::kUInt, 64, 1}},     {"torch.uint8", {dlpack::kUInt, 8, 1}},
      {"torch.int16", {dlpack::kInt, 16, 1}},       {"torch.int8", {dlpack::kInt, 8, 1}},
      {"torch.bool", {dlpack::kBool, 8, 1}},
  };
  name_ = name;
  given_ = true;
  if (!py::hasattr(object, "storage_offset")) {
    throw py::type_error(std::string(name) + " must be a tensor of torch, not " +
                         Py_TYPE(object.ptr())->tp_name);
  }
  const auto dtype = py::str(object.attr("dtype")).cast<std::string>();
  const auto known = std::find_if(std::begin(kKnown), std::end(kKnown),
                                  [&](const Known& k) { return dtype == k.name; });
  if (known == std::end(kKnown)) {
    throw py::type_error(std::string(name) + " has dtype " + dtype + ", which no op takes");
  }
  tensor_.dtype = known->type;
  const py::tuple shape = object.attr("shape"), strides = object.attr("stride")();
  tensor_.ndim = static_cast<int>(shape.size());
  require(tensor_.ndim <= kMaxDims, [&] {
    return std::string(name) + " has " + std::to_string(tensor_.ndim) +
           " dimensions; at most 6 are supported";
  });
  for (int i = 0; i < tensor_.ndim; ++i) {
    shape_[i] = shape[i].cast<int64_t>();
    strides_[i] = strides[i].cast<int64_t>();
  }
  tensor_.shape = shape_;
  constexpr uintptr_t kSomewhere = 1 << 16;
  const auto offset = object.attr("storage_offset")().cast<uintptr_t>();
  tensor_.data = numel() == 0
                     ? nullptr
                     : reinterpret_cast<void*>(kSomewhere + offset * tensor_.dtype.bits / 8);
}

Tensor::~Tensor() {
  if (has_buffer_) PyBuffer_Release(&buffer_);
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int i = 0; i < tensor_.ndim; ++i) n *= shape_[i];
  return n;
}

Place Tensor::place() const {
  const int32_t type = tensor_.device.device_type;
#if defined(INFERLAB_CUDA_SHIM)
  const bool cuda = type == dlpack::kDLCPU;  // the tests' stand-in for a GPU
#else
  const bool cuda = type == dlpack::kDLCUDA || type == dlpack::kDLCUDAManaged;
#endif
  if (!cuda) {
    cpu();
    return {Place::kCpu, 0};
  }
#if !defined(INFERLAB_WITH_CUDA)
  throw py::value_error(std::string(name_) +
                        " is on a CUDA device, but inferlab was built without CUDA: put nvcc on "
                        "PATH and install it again");
#endif
  return {Place::kCuda, tensor_.device.device_id};
}

std::string Tensor::shape_str() const {
  std::string s = "[";
  for (int i = 0; i < tensor_.ndim; ++i) s += (i ? ", " : "") + std::to_string(shape_[i]);
  return s + "]";
}

std::string Tensor::dtype_str() const {
  const char* kind = "unknown";
  switch (tensor_.dtype.code) {
    case dlpack::kInt:
      kind = "int";
      break;
    case dlpack::kUInt:
      kind = "uint";
      break;
    case dlpack::kFloat:
      kind = "float";
      break;
    case dlpack::kBfloat:
      kind = "bfloat";
      break;
    case dlpack::kBool:
      return "bool";
    default:
      break;
  }
  return kind + std::to_string(tensor_.dtype.bits);
}

const Tensor& Tensor::shape(std::initializer_list<int64_t> expected) const {
  bool ok = tensor_.ndim == static_cast<int>(expected.size());
  int i = 0;
  for (const int64_t want : expected) {
    if (!ok) break;
    ok = want == kAny || shape_[i] == want;
    ++i;
  }
  if (!ok) {
    std::string want = "[";
    for (const int64_t n : expected) {
      want += (want.size() > 1 ? ", " : "") + (n == kAny ? std::string("*") : std::to_string(n));
    }
    throw py::value_error(std::string(name_) + " has shape " + shape_str() + "; it must be " +
                          want + "]");
  }
  return *this;
}

const Tensor& Tensor::dims(int ndim) const {
  if (tensor_.ndim != ndim) {
    throw py::value_error(std::string(name_) + " has shape " + shape_str() + "; it must have " +
                          std::to_string(ndim) + " dimensions");
  }
  return *this;
}

const Tensor& Tensor::contiguous() const {
  int64_t expected = 1;
  for (int i = tensor_.ndim - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != expected && numel() != 0) {
      throw py::value_error(std::string(name_) + " must be contiguous");
    }
    expected *= shape_[i];
  }
  return *this;
}

const Tensor& Tensor::last_dim_contiguous() const {
  const int last = tensor_.ndim - 1;
  if (last < 0 || (strides_[last] != 1 && shape_[last] > 1)) {
    throw py::value_error(std::string(name_) + " must be contiguous in its last dimension");
  }
  return *this;
}

const Tensor& Tensor::cpu() const {
  const int32_t type = tensor_.device.device_type;
  if (type != dlpack::kDLCPU && type != dlpack::kDLCUDAHost) {
    throw py::value_error(std::string(name_) + " must be on the CPU, like the other arguments");
  }
  return *this;
}

const Tensor& Tensor::on(const Place& place) const {
  if (place.kind == Place::kCpu) return cpu();
  const int32_t type = tensor_.device.device_type;
  const bool cuda = type == dlpack::kDLCUDA || type == dlpack::kDLCUDAManaged;
#if defined(INFERLAB_CUDA_SHIM)
  if (type == dlpack::kDLCPU) return *this;
#endif
  if (!cuda || tensor_.device.device_id != place.device) {
    throw py::value_error(std::string(name_) + " must be on CUDA device " +
                          std::to_string(place.device) + ", like the other arguments");
  }
  return *this;
}

void Tensor::fail_type(const std::string& expected) const {
  throw py::type_error(std::string(name_) + " has dtype " + dtype_str() + "; it must be " +
                       expected);
}

const Tensor& Tensor::i32() const {
  if (tensor_.dtype.code != dlpack::kInt || tensor_.dtype.bits != 32) fail_type("int32");
  return *this;
}

const Tensor& Tensor::i64() const {
  const bool integer = tensor_.dtype.code == dlpack::kInt || tensor_.dtype.code == dlpack::kUInt;
  if (!integer || tensor_.dtype.bits != 64) fail_type("int64 or uint64");
  return *this;
}

const Tensor& Tensor::f32() const {
  if (tensor_.dtype.code != dlpack::kFloat || tensor_.dtype.bits != 32) fail_type("float32");
  return *this;
}

const Tensor& Tensor::u8() const {
  if (tensor_.dtype.code != dlpack::kUInt || tensor_.dtype.bits != 8) fail_type("uint8");
  return *this;
}

const Tensor& Tensor::order() const {
  i32();
  std::vector<bool> seen(static_cast<size_t>(size(0)));
  for (int64_t i = 0; i < size(0); ++i) {
    const int32_t place = ptr<const int32_t>()[i];
    if (place < 0 || place >= size(0) || seen[place]) {
      throw py::value_error(std::string(name_) + "[" + std::to_string(i) + "] is " +
                            std::to_string(place) + "; each number in [0, " +
                            std::to_string(size(0)) + ") must be there once");
    }
    seen[place] = true;
  }
  return *this;
}

DType Tensor::float_dtype() const {
  if (tensor_.dtype.code == dlpack::kFloat && tensor_.dtype.bits == 32) return DType::kF32;
  if (tensor_.dtype.code == dlpack::kFloat && tensor_.dtype.bits == 16) return DType::kF16;
  if (tensor_.dtype.code == dlpack::kBfloat && tensor_.dtype.bits == 16) return DType::kBF16;
  fail_type("float32, float16 or bfloat16");
  return DType::kF32;
}

PageFormat Tensor::page_format() const {
  if (tensor_.dtype.bits != 8) return PageFormat::kSame;
  if (tensor_.dtype.code == dlpack::kInt) return PageFormat::kInt8;
  return tensor_.dtype.code == dlpack::kUInt ? PageFormat::kE4M3 : PageFormat::kSame;
}

void* current_cuda_stream(py::handle tensor, int device_id) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(tensor.ptr()));
  if (api == nullptr || api->current_work_stream == nullptr) return torch_stream(device_id);
  void* stream = nullptr;
  if (api->current_work_stream(dlpack::kDLCUDA, device_id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

void check_status(Status status, const char* op) {
  if (status == Status::kOk) return;
  std::string what = std::string("inferlab: ") + op;
  switch (status) {
    case Status::kBadArgument:
      what += " was called with arguments it does not support";
      break;
    case Status::kOutOfMemory:
      PyErr_SetString(PyExc_MemoryError, (what + " ran out of memory").c_str());
      throw py::error_already_set();
    case Status::kNoKernelImage:
      what +=
          " has no kernel for this GPU: install again with "
          "-Ccmake.define.INFERLAB_CUDA_ARCHITECTURES set to its compute capability";
      break;
    default:
      what += " failed on the device";
#if defined(INFERLAB_WITH_CUDA)
      what += std::string(": ") + cuda::last_error();
#endif
  }
  throw std::runtime_error(what);
}

}  // namespace inferlab
