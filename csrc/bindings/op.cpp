#include "op.h"

#include <pybind11/stl.h>

#include <cstring>
#include <new>

namespace inferlab {

// ---- the arguments ------------------------------------------------------------------------------

Call::~Call() {
  for (int i = 0; i < num_tensors_; ++i) args_[i].~Arg();
}

PyObject* Call::next(const char* name, const char* type) {
  const int index = taken_++;
  if (args_given_ != nullptr) return args_given_[index];
  parts_.push_back({name, type, nullptr});
  return nullptr;
}

Arg& Call::add(const char* name, Type type, std::initializer_list<Size> shape, bool written) {
  if (num_tensors_ == kMaxTensors) throw std::runtime_error("an op has too many tensors");
  Arg& arg = *new (&args_[num_tensors_++]) Arg(type);
  arg.name_ = name;
  for (const Size& size : shape) arg.shape_[arg.dims_++] = size;
  arg.written_ = written;
  arg.object_ = next(name, nullptr);
  if (args_given_ == nullptr) parts_.back().arg = &arg;
  return arg;
}

Arg& Call::in(const char* name, Type type, std::initializer_list<Size> shape) {
  return add(name, type, shape, false);
}

Arg& Call::out(const char* name, Type type, std::initializer_list<Size> shape) {
  return add(name, type, shape, true);
}

Arg& Call::workspace() {
  Arg& arg = add("workspace", kU8, {}, true).optional();
  arg.dims_ = -1;
  arg.scratch_ = true;
  return arg;
}

namespace {

[[noreturn]] void fail_scalar(const char* name, PyObject* object, const char* wanted) {
  PyErr_Clear();
  throw py::type_error(std::string(name) + " is a " + Py_TYPE(object)->tp_name + "; it must be " +
                       wanted);
}

}  // namespace

int64_t Call::integer(const char* name) {
  PyObject* object = next(name, "int");
  if (object == nullptr) return 0;
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) fail_scalar(name, object, "an integer of 64 bits");
  return value;
}

double Call::number(const char* name) {
  PyObject* object = next(name, "float");
  if (object == nullptr) return 0.0;
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) fail_scalar(name, object, "a number");
  return value;
}

bool Call::flag(const char* name) {
  PyObject* object = next(name, "bool");
  if (object == nullptr) return false;
  const int value = PyObject_IsTrue(object);
  if (value < 0) fail_scalar(name, object, "True or False");
  return value != 0;
}

std::string Call::schema() const {
  std::string text;
  char alias = 'a';
  for (const Part& part : parts_) {
    if (!text.empty()) text += ", ";
    if (part.type != nullptr) {
      text += part.type;
    } else {
      text += "Tensor";
      if (part.arg->written_) text += std::string("(") + alias++ + "!)";
      if (part.arg->optional_) text += "?";
    }
    const char* dot = std::strrchr(part.name, '.');
    text += std::string(" ") + (dot != nullptr ? dot + 1 : part.name);
  }
  return text;
}

std::vector<int> Call::written() const {
  std::vector<int> numbers;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const Arg* arg = parts_[i].arg;
    if (arg != nullptr && arg->written_ && !arg->scratch_) numbers.push_back(static_cast<int>(i));
  }
  return numbers;
}

// ---- checks -------------------------------------------------------------------------------------

bool Call::ready() {
  if (args_given_ == nullptr) return false;
  for (int i = 0; i < num_tensors_; ++i) {
    Arg& arg = args_[i];
    if (arg.optional_ && arg.object_ == Py_None) continue;
    if (launch_ != nullptr) {
      arg.view_torch(arg.object_, arg.name_);
    } else {
      arg.view(arg.object_, arg.name_);
    }
  }
  if (launch_ != nullptr) {
    place_ = {Place::kMetal, 0};
    check_same_device();
  } else {
    place_ = args_[0].place();
    for (int i = 1; i < num_tensors_; ++i) {
      if (args_[i].given()) args_[i].on(place_);
    }
  }
  for (int i = 0; i < num_tensors_; ++i) {
    if (args_[i].decides_) check(args_[i]);
  }
  for (int i = 0; i < num_tensors_; ++i) {
    if (!args_[i].decides_ && args_[i].given()) check(args_[i]);
  }
  return true;
}

void Call::check_same_device() const {
  const py::object home = py::handle(args_[0].object_).attr("device");
  for (int i = 1; i < num_tensors_; ++i) {
    if (!args_[i].given()) continue;
    const py::object device = py::handle(args_[i].object_).attr("device");
    require(device.equal(home), [&] {
      return std::string(args_[i].name()) + " must be on " + py::str(home).cast<std::string>() +
             ", like the other arguments";
    });
  }
}

void Call::check(const Arg& arg) {
  check_type(arg);
  if (arg.dims_ >= 0) check_shape(arg);
  if (arg.layout_ == Arg::kDense) arg.contiguous();
  if (arg.layout_ == Arg::kLastDim) arg.last_dim_contiguous();
}

void Call::fail_type(const Arg& arg, const Tensor& like) {
  throw py::type_error(std::string(arg.name()) + " has dtype " + arg.dtype_str() +
                       "; it must be that of " + like.name() + ", " + like.dtype_str());
}

void Call::check_element(const Arg& arg, Element& element) {
  const DType type = arg.float_dtype();
  if (element.like_ == nullptr) {
    element.like_ = &arg;
    element.value_ = type;
  } else if (type != element.value_) {
    fail_type(arg, *element.like_);
  }
}

void Call::check_stored(const Arg& arg, Stored& stored) {
  const PageFormat format = arg.page_format();
  if (stored.like_ == nullptr) {
    stored.like_ = &arg;
    stored.format_ = format;
  } else if (format != stored.format_) {
    fail_type(arg, *stored.like_);
  }
  if (format == PageFormat::kSame) return check_element(arg, *stored.element_);
  require(arg.ndim() == 0 || stored.numbers(arg.size(arg.ndim() - 1)) >= 0, [&] {
    return std::string(arg.name()) + " has shape " + arg.shape_str() +
           "; its last dimension must hold numbers and the 4 bytes of their scale";
  });
  require(on_cpu(), [&] {
    return std::string(arg.name()) + " has dtype " + arg.dtype_str() +
           "; pages of 8 bits are of the CPU's kernels alone";
  });
}

void Call::check_type(const Arg& arg) {
  if (arg.type_.element != nullptr) return check_element(arg, *arg.type_.element);
  if (arg.type_.stored != nullptr) return check_stored(arg, *arg.type_.stored);
  switch (arg.type_.fixed) {
    case kI32:
      arg.i32();
      break;
    case kI64:
      arg.i64();
      break;
    case kF32:
      arg.f32();
      break;
    case kU8:
      arg.u8();
      break;
  }
}

namespace {

// False: the size is known to be another one.
bool agrees(int64_t& known, int64_t size) {
  if (known < 0) known = size;
  return known == size;
}

}  // namespace

void Call::check_shape(const Arg& arg) {
  Lead* lead = arg.dims_ > 0 ? arg.shape_[0].lead : nullptr;
  const int named = arg.dims_ - (lead != nullptr ? 1 : 0);
  const int front = arg.ndim() - named;
  bool ok = front == 0;
  if (lead != nullptr) {
    ok = lead->ndim_ < 0 ? lead->least_ <= front && front <= lead->most_ : lead->ndim_ == front;
  }
  if (ok && lead != nullptr) {
    for (int i = 0; i < front; ++i) {
      if (lead->ndim_ < 0) lead->sizes_[i] = arg.size(i);
      ok = ok && lead->sizes_[i] == arg.size(i);
    }
    lead->ndim_ = front;
    if (ok && front > 0 && lead->first_ != nullptr) ok = agrees(lead->first_->value_, arg.size(0));
  }
  for (int i = 0; ok && i < named; ++i) {
    const Size& want = arg.shape_[arg.dims_ - named + i];
    int64_t have = arg.size(front + i);
    if (arg.type_.stored != nullptr && i == named - 1) have = arg.type_.stored->numbers(have);
    ok = want.dim != nullptr ? agrees(want.dim->value_, have) : want.number == have;
  }
  if (!ok) fail_shape(arg);
}

void Call::fail_shape(const Arg& arg) const {
  std::string want;
  const auto add = [&](const std::string& size) { want += (want.empty() ? "" : ", ") + size; };
  for (int i = 0; i < arg.dims_; ++i) {
    const Size& size = arg.shape_[i];
    if (size.lead != nullptr && size.lead->ndim_ < 0) add(size.lead->name_);
    for (int j = 0; size.lead != nullptr && j < size.lead->ndim_; ++j) {
      add(std::to_string(size.lead->sizes_[j]));
    }
    if (size.lead != nullptr) continue;
    if (size.dim != nullptr && size.dim->value_ < 0) {
      add(size.dim->name_);
    } else {
      add(std::to_string(size.dim != nullptr ? size.dim->value_ : size.number));
    }
  }
  throw py::value_error(std::string(arg.name()) + " has shape " + arg.shape_str() +
                        "; it must be [" + want + "]");
}

void Call::check_aligned(const Tensor& t) {
  require(reinterpret_cast<uintptr_t>(t.data()) % 16 == 0, [&] {
    return std::string(t.name()) + " starts at an address that is no multiple of 16 bytes; it must";
  });
}

// ---- what a device needs beside -----------------------------------------------------------------

void* Call::reserve(Arg& workspace, int64_t bytes) {
  if (!workspace.given() && bytes > 0) {
    const py::module_ torch = py::module_::import("torch");
    py::dict options;
    options["dtype"] = torch.attr("uint8");
    options["device"] = py::handle(args_[0].object_).attr("device");
    replace(workspace, torch.attr("empty")(bytes, **options));
  }
  const int64_t have = workspace.given() ? workspace.bytes() : 0;
  require(have >= bytes, [&] {
    return "workspace has " + std::to_string(have) + " bytes; it must have at least " +
           std::to_string(bytes);
  });
  if (workspace.given()) check_aligned(workspace);
  workspace.reserved_ = true;
  return workspace.data();
}

void Call::widen(Arg& arg) { replace(arg, py::handle(arg.object_).attr("float")()); }

void Call::replace(Arg& arg, py::object object) {
  py::object& held = held_[num_held_++];
  held = std::move(object);
  arg.object_ = held.ptr();
  if (launch_ != nullptr) {
    arg.view_torch(held, arg.name_);
  } else {
    arg.view(held, arg.name_);
  }
}

// ---- Metal --------------------------------------------------------------------------------------

void Call::run_metal(const void* params, size_t words, const MetalGrid& grid,
                     std::initializer_list<Macro> macros) {
  py::handle stand_in;
  for (int i = 0; i < num_tensors_ && !stand_in; ++i) {
    if (args_[i].data() != nullptr) stand_in = args_[i].object_;
  }
  if (!stand_in) return;  // nothing to read or write
  py::list buffers;
  for (int i = 0; i < num_tensors_; ++i) {
    const Arg& arg = args_[i];
    if (arg.scratch_ && !arg.reserved_) continue;
    buffers.append(arg.data() != nullptr ? py::handle(arg.object_) : stand_in);
  }
  py::list numbers;
  for (size_t i = 0; i < words; ++i) numbers.append(static_cast<const int64_t*>(params)[i]);
  buffers.append(std::move(numbers));
  py::dict options;
  options["threads"] = grid.threads;
  options["kernel"] = name_;
  for (const Macro& macro : macros) options[macro.name] = macro.value;
  const py::handle launch(launch_);
  launch(grid.source != nullptr ? grid.source : name_, buffers,
         py::make_tuple(grid.x, grid.y, grid.z), **options);
}

// ---- the module ---------------------------------------------------------------------------------

namespace {

struct Bound {
  const char* name;
  void (*run)(Call&);
  int arguments;
  PyMethodDef method, metal_method;
};

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count, bool metal) {
  const auto* op = static_cast<const Bound*>(PyCapsule_GetPointer(self, nullptr));
  try {
    const int given = static_cast<int>(count) - (metal ? 1 : 0);
    if (given != op->arguments) {
      throw py::type_error(std::string(op->name) + " was given " + std::to_string(given) +
                           " arguments; it takes " + std::to_string(op->arguments));
    }
    Call c(op->name, args + (metal ? 1 : 0), metal ? args[0] : nullptr);
    op->run(c);
    return c.result();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const py::builtin_exception& e) {
    e.set_error();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

PyObject* call_native(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return call(self, args, count, false);
}

PyObject* call_metal(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return call(self, args, count, true);
}

PyMethodDef method(const char* name, PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL,
          nullptr};
}

// Binds the op as it was described.
void bind(py::module_& m, Bound& op, const Call& described) {
  op.arguments = described.num_arguments();
  const py::capsule self(&op);
  const auto add = [&](const py::object& module, PyMethodDef* method) {
    module.attr(op.name) =
        py::reinterpret_steal<py::object>(PyCFunction_NewEx(method, self.ptr(), nullptr));
  };
  add(m, &op.method);
  add(m.attr("metal"), &op.metal_method);
}

// Lives as long as the process, as the module does.
Bound& new_op(const char* name, void (*run)(Call&)) {
  return *new Bound{name, run, 0, method(name, call_native), method(name, call_metal)};
}

}  // namespace

PyObject* Call::result() const {
  if (answer_ >= 0) return PyLong_FromLongLong(answer_);
  PyObject* value = declined_ ? Py_False : Py_None;
  Py_INCREF(value);
  return value;
}

void define(py::module_& m, const char* name, void (*op)(Call&)) {
  Call described(name, nullptr, nullptr);
  op(described);
  bind(m, new_op(name, op), described);
  m.attr("OPS")[name] = py::make_tuple(std::string(name) + "(" + described.schema() + ") -> ()",
                                       py::tuple(py::cast(described.written())));
}

void define_query(py::module_& m, const char* name, void (*query)(Call&)) {
  Call described(name, nullptr, nullptr);
  query(described);
  bind(m, new_op(name, query), described);
}

}  // namespace inferlab
