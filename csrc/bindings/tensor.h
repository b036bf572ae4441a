// Tensor arguments: any DLPack tensor or NumPy array, seen as a pointer with a shape, without a
// copy. Checks live here, once; they raise TypeError or ValueError naming the argument, what it was
// and what it must be.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "dlpack_abi.h"
#include "inferlab/cuda_device.h"
#include "inferlab/page_format.h"
#include "inferlab/status.h"

namespace inferlab {

namespace py = pybind11;

// Where an op runs; all of its tensors are there.
struct Place {
  enum Kind { kCpu, kCuda, kMetal };
  Kind kind;
  int device;
};

class Tensor {
 public:
  static constexpr int kMaxDims = 6;
  static constexpr int64_t kAny = -1;

  Tensor() = default;
  // Views `object`. Borrowed where the exporter allows it, otherwise held until destruction.
  Tensor(py::handle object, const char* name) { view(object, name); }
  ~Tensor();
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  void view(py::handle object, const char* name);
  // A torch tensor by its attributes: of a device whose memory only Metal can name. What stands for
  // its address has its alignment, and is null where it has no elements.
  void view_torch(py::handle object, const char* name);

  const char* name() const { return name_; }
  bool given() const { return given_; }  // false: None, without dimensions or memory
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
  const Tensor& u8() const;     // scratch memory
  const Tensor& order() const;  // int32, each number below its size once
  DType float_dtype() const;    // f32, f16 or bf16; TypeError otherwise
  // Of K/V pages: int8 is kInt8, uint8 kE4M3, all else kSame.
  PageFormat page_format() const;

 protected:
  const char* name_ = "";

 private:
  void fail_type(const std::string& expected) const;

  dlpack::DLTensor tensor_{};
  int64_t strides_[kMaxDims];
  int64_t shape_[kMaxDims];
  Py_buffer buffer_;
  bool has_buffer_ = false;
  bool given_ = false;
  py::object owner_;
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
