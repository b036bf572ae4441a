// An op, described once. A binding declares the arguments in the order in which Python gives them,
// each with its name, element type and shape in named sizes:
//
//   void silu_mul(Call& c) {
//     Lead rows;
//     Dim two{"2 * dim"}, dim{"dim"};
//     Element T;
//     const Arg& x = c.in("x", T, {rows, two});
//     const Arg& out = c.out("out", T, {rows, dim});
//     if (!c.ready()) return;
//     ... what shapes cannot say, and the parameters ...
//     c.cpu([&] { return cpu::silu_mul(p); });
//     c.cuda([&](void* stream) { return cuda::silu_mul(p, stream); });
//     c.metal(p, {blocks, p.rows}, {{"ELEMENT", p.dtype}});
//   }
//
// ready() checks them all; errors name the argument, what it was and what it must be. At import the
// same lines run without arguments, up to ready(), and make the op's schema for torch.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "inferlab/metal_launch.h"
#include "tensor.h"

namespace inferlab {

// A size that several arguments share: the first that has it says what it is.
class Dim {
 public:
  explicit Dim(const char* name) : name_(name) {}
  operator int64_t() const { return value_ < 0 ? 0 : value_; }  // 0: of what was not given

 private:
  friend class Call;
  friend class Lead;
  const char* name_;
  int64_t value_ = -1;
};

// All dimensions in front of the last ones, shared by several arguments: at least and at most so
// many. `first`: the first of them.
class Lead {
 public:
  explicit Lead(const char* name = "...") : name_(name) {}
  Lead(const char* name, Dim& first, int least, int most)
      : name_(name), first_(&first), least_(least), most_(most) {}
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim_; ++i) n *= sizes_[i];
    return n;
  }

 private:
  friend class Call;
  const char* name_;
  Dim* first_ = nullptr;
  int least_ = 0, most_ = Tensor::kMaxDims;
  int ndim_ = -1;
  int64_t sizes_[Tensor::kMaxDims];
};

// f32, f16 or bf16, shared by several arguments.
class Element {
 public:
  operator DType() const { return value_; }

 private:
  friend class Call;
  const Tensor* like_ = nullptr;
  DType value_ = DType::kF32;
};

// What K/V pages are made of, shared by several arguments: an Element, or on the CPU 8 bits.
class Stored {
 public:
  Stored() : element_(&own_) {}  // pages alone, whose rows are moved as they are
  // Pages that are written from `e` or read into it, and of it themselves if not of 8 bits; then D,
  // their last size, is without a scale.
  explicit Stored(Element& e) : element_(&e), counts_numbers_(true) {}
  PageFormat format() const { return format_; }
  int64_t bytes() const { return format_ == PageFormat::kSame ? dtype_size(*element_) : 1; }

 private:
  friend class Call;
  // Of a head, whose row is so wide.
  int64_t numbers(int64_t width) const {
    const bool scaled = counts_numbers_ && format_ == PageFormat::kInt8;
    return scaled ? width - kPageScaleBytes : width;
  }

  Element own_;
  Element* element_;
  bool counts_numbers_ = false;
  const Tensor* like_ = nullptr;
  PageFormat format_ = PageFormat::kSame;
};

enum Fixed { kI32, kI64, kF32, kU8 };  // kI64: or uint64, for bit words and seeds

struct Type {
  Type(Element& e) : element(&e) {}
  Type(Stored& s) : stored(&s) {}
  Type(Fixed f) : fixed(f) {}
  Element* element = nullptr;
  Stored* stored = nullptr;
  Fixed fixed = kI32;
};

// One size of a shape: named, a number, or all those in front.
struct Size {
  Size() = default;
  Size(Dim& d) : dim(&d) {}
  Size(Lead& l) : lead(&l) {}
  Size(int64_t n) : number(n) {}
  Dim* dim = nullptr;
  Lead* lead = nullptr;
  int64_t number = 0;
};

// A tensor argument: contiguous and given, unless it says otherwise.
class Arg : public Tensor {
 public:
  Arg& rows() { return layout_ = kLastDim, *this; }        // contiguous in the last dimension
  Arg& strided() { return layout_ = kAnyStrides, *this; }  // any strides
  Arg& optional() { return optional_ = true, *this; }      // may be None
  Arg& decides() { return decides_ = true, *this; }  // the others are held to it, not it to them

 private:
  friend class Call;
  enum Layout { kDense, kLastDim, kAnyStrides };
  explicit Arg(Type type) : type_(type) {}

  PyObject* object_ = nullptr;  // borrowed
  Type type_;
  std::array<Size, Tensor::kMaxDims> shape_;
  int dims_ = 0;  // -1: any shape
  Layout layout_ = kDense;
  bool optional_ = false, decides_ = false, written_ = false;
  bool scratch_ = false, reserved_ = false;
};

// What a Metal source is compiled with: INFERLAB_<name>.
struct Macro {
  Macro(const char* n, int64_t v) : name(n), value(v) {}
  Macro(const char* n, DType t) : name(n), value(static_cast<int64_t>(t)) {}
  const char* name;
  int64_t value;
};

struct MetalGrid {
  int64_t x, y = 1, z = 1;          // threadgroups
  int64_t threads = kMetalThreads;  // of each, in one dimension
  const char* source = nullptr;     // the .metal file, if not named as the op
};

class Call {
 public:
  // args: null where the op is only described. launch: what launches Metal kernels, or null.
  Call(const char* name, PyObject* const* args, PyObject* launch)
      : name_(name), args_given_(args), launch_(launch) {}
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // ---- the arguments, in order
  Arg& in(const char* name, Type type, std::initializer_list<Size> shape);
  Arg& out(const char* name, Type type, std::initializer_list<Size> shape);  // or in and out
  Arg& workspace();  // bytes for what a device keeps in between; see reserve
  int64_t integer(const char* name);
  double number(const char* name);
  bool flag(const char* name);

  // Checks the tensors. False: there are none, the op is only being described.
  bool ready();

  bool on_cpu() const { return place_.kind == Place::kCpu; }
  bool on_cuda() const { return place_.kind == Place::kCuda; }
  bool on_metal() const { return place_.kind == Place::kMetal; }
  const Place& place() const { return place_; }

  // At least so many bytes, from the caller's workspace or, where that is None, of the framework.
  void* reserve(Arg& workspace, int64_t bytes);
  // Metal: the argument becomes a float32 copy of itself.
  void widen(Arg& arg);
  // Kernels that move 16 bytes at a time.
  static void check_aligned(const Tensor& t);

  // ---- the backends; each acts where the arguments are its own
  template <typename Op>
  void cpu(Op op) {
    if (on_cpu()) run_cpu(name_, op);
  }
  template <typename Op>
  void cuda(Op op) {
    if (on_cuda()) run_cuda(args_[0].object_, place_, name_, op);
  }
  // Buffers of the kernel: the tensors in their order (and the workspace, if any was reserved),
  // then the parameters. Absent and empty ones are stood in for.
  template <typename Params>
  void metal(const Params& params, const MetalGrid& grid, std::initializer_list<Macro> macros) {
    static_assert(sizeof(Params) % 8 == 0, "travels as 64-bit words");
    if (on_metal()) run_metal(&params, sizeof(Params) / 8, grid, macros);
  }
  // No kernel for these arguments here: the caller takes the framework's operations.
  void decline() { declined_ = true; }
  void answer(int64_t value) { answer_ = value; }  // of a query

  // ---- what came of it
  PyObject* result() const;
  int num_arguments() const { return taken_; }
  std::string schema() const;        // its arguments, as torch.library writes them
  std::vector<int> written() const;  // which of them are

 private:
  static constexpr int kMaxTensors = 26;
  Arg& add(const char* name, Type type, std::initializer_list<Size> shape, bool written);
  PyObject* next(const char* name, const char* type);
  void check_same_device() const;
  void check(const Arg& arg);
  void check_type(const Arg& arg);
  void check_element(const Arg& arg, Element& element);
  void check_stored(const Arg& arg, Stored& stored);
  [[noreturn]] static void fail_type(const Arg& arg, const Tensor& like);
  void check_shape(const Arg& arg);
  [[noreturn]] void fail_shape(const Arg& arg) const;
  void replace(Arg& arg, py::object object);
  void run_metal(const void* params, size_t words, const MetalGrid& grid,
                 std::initializer_list<Macro> macros);

  const char* name_;
  PyObject* const* args_given_;  // null: the op is being described
  PyObject* launch_;             // Metal: what launches; null elsewhere
  int taken_ = 0;
  struct Part {
    const char* name;
    const char* type;  // null: a tensor
    const Arg* arg;
  };
  std::vector<Part> parts_;  // of the schema; empty in a call
  Place place_{Place::kCpu, 0};
  py::object held_[3];  // what reserve and widen made
  int num_held_ = 0;
  bool declined_ = false;
  int64_t answer_ = -1;
  int num_tensors_ = 0;
  union {
    Arg args_[kMaxTensors];  // the first num_tensors_ live
  };
};

// Adds an op to the module: as m.<name>(*arguments), as m.metal.<name>(launch, *arguments) with the
// Metal kernels, and its schema to m.OPS. None comes back, or False where there is no kernel for
// the arguments.
void define(py::module_& m, const char* name, void (*op)(Call&));
// The same for what answers with a number of bytes; no op for torch.
void define_query(py::module_& m, const char* name, void (*query)(Call&));

}  // namespace inferlab
