// Tensor arguments: any DLPack tensor or NumPy array, seen as a pointer with a shape, without a
// copy. Checks live here, once; they raise TypeError or ValueError naming the argument, what it was
// and what it must be.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "dlpack_abi.h"
#include "inferlab/cuda_device.h"
#include "inferlab/dtype.h"
#include "inferlab/status.h"

namespace inferlab {

namespace py = pybind11;

// Where an op runs; all of its tensors are there.
struct Place {
  bool cuda;
  int device;
};

class Tensor {
 public:
  static constexpr int kMaxDims = 6;
  static constexpr int64_t kAny = -1;

  // Views `object`. Borrowed where the exporter allows it, otherwise held until destruction.
  Tensor(py::handle object, const char* name);
  ~Tensor();
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const char* name() const { return name_; }
  int ndim() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  int64_t stride(int dim) const { return strides_[dim]; }  // in elements
  int64_t numel() const;
  int64_t bytes() const { return numel() * tensor_.dtype.bits / 8; }
  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data());
  }
  Place place() const;  // ValueError for devices without kernels
  std::string shape_str() const;
  std::string dtype_str() const;

  // Each check returns *this, so that they chain: t.i32().shape({B, N}).contiguous().cpu()
  const Tensor& shape(std::initializer_list<int64_t> expected) const;  // kAny matches anything
  const Tensor& dims(int ndim) const;
  const Tensor& contiguous() const;
  const Tensor& last_dim_contiguous() const;
  const Tensor& cpu() const;
  const Tensor& on(const Place& place) const;
  const Tensor& i32() const;
  const Tensor& i64() const;  // int64 or uint64: bit words and seeds are stored in either
  const Tensor& f32() const;
  const Tensor& u8() const;   // scratch memory
  DType float_dtype() const;  // f32, f16 or bf16; TypeError otherwise

 private:
  void fail_type(const std::string& expected) const;

  const char* name_;
  dlpack::DLTensor tensor_{};
  int64_t strides_[kMaxDims] = {};
  int64_t shape_[kMaxDims] = {};
  Py_buffer buffer_{};
  bool has_buffer_ = false;
  py::object owner_;
};

// None -> no tensor.
class OptionalTensor {
 public:
  OptionalTensor(py::handle object, const char* name) : present_(!object.is_none()) {
    if (present_) new (&storage_) Tensor(object, name);
  }
  ~OptionalTensor() {
    if (present_) get().~Tensor();
  }
  OptionalTensor(const OptionalTensor&) = delete;
  OptionalTensor& operator=(const OptionalTensor&) = delete;
  explicit operator bool() const { return present_; }
  const Tensor* operator->() const { return &get(); }
  const Tensor& operator*() const { return get(); }
  template <typename T>
  T* ptr() const {
    return present_ ? get().ptr<T>() : nullptr;
  }

 private:
  const Tensor& get() const { return *reinterpret_cast<const Tensor*>(&storage_); }
  alignas(Tensor) unsigned char storage_[sizeof(Tensor)];
  bool present_;
};

// ValueError unless `ok`; the message should name the argument, its value and what is allowed.
inline void require(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

// The same with a message that is only put together when it is needed: require(ok, [&] { ... }).
template <typename F>
auto require(bool ok, const F& message) -> decltype(static_cast<void>(message())) {
  if (!ok) throw py::value_error(message());
}

// RuntimeError or MemoryError if the op failed.
void check_status(Status status, const char* op);

// The current stream on a CUDA device, of the tensor's framework or, where that does not tell, of
// torch.
void* current_cuda_stream(py::handle tensor, int device_id);

// Calls op(stream) -> Status on the CUDA device of `place`, on the current stream of `like`'s
// framework, without the GIL.
template <typename Op>
void run_cuda(py::handle like, const Place& place, const char* name, Op op) {
#if defined(INFERLAB_WITH_CUDA)
  void* stream = current_cuda_stream(like, place.device);
  Status status;
  {
    const py::gil_scoped_release release;
    const cuda::DeviceGuard guard(place.device);
    status = op(stream);
  }
  check_status(status, name);
#else
  (void)like;
  (void)place;
  (void)name;
  (void)op;
#endif
}

// Calls op() -> Status on the CPU, without the GIL.
template <typename Op>
void run_cpu(const char* name, Op op) {
  Status status;
  {
    const py::gil_scoped_release release;
    status = op();
  }
  check_status(status, name);
}

}  // namespace inferlab
