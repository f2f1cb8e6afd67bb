// A device that calls itself cuda:0, keeps its tensors in host memory and computes with the CPU's kernels.
//
// Every operation without a kernel of its own here goes through `on_cpu`: its tensors are shown to the CPU as tensors on
// the same memory, and what comes back is shown as cuda:0 again. What a real device refuses is refused: an operation
// over tensors of both, or with a generator of the other.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::DispatchKey, c10::DispatchKeySet, c10::IValue, c10::Storage;
using std::optional;

static const Device CUDA(DeviceType::CUDA, 0), CPU(DeviceType::CPU);

// One device with one stream, on which everything is done at once.

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
  Device exchangeDevice(Device) const override { return CUDA; }
  Device getDevice() const override { return CUDA; }
  c10::Stream getStream(Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(Device) const override { return stream(); }
  c10::Stream getNewStream(Device, int) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// The CPU's, by another name but for the time of an operation.
struct Generator : at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) { device_ = CUDA; }
  void be(Device device) { device_ = device; }
};

struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  int getNumGPUs() const override { return 1; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Generator>(); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void deviceSynchronize(DeviceIndex) const override {}
};
using at::CUDAHooksArgs, at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// Memory, counted.

static std::atomic<int64_t> allocated{0}, peak{0};

struct Held {
  Storage storage;
  int64_t bytes;
};

static void drop(void* held) {
  allocated -= static_cast<Held*>(held)->bytes;
  delete static_cast<Held*>(held);
}

static Storage on_device(const Storage& host) {
  auto* held = new Held{host, static_cast<int64_t>(host.nbytes())};
  int64_t now = allocated += held->bytes, before = peak;
  while (now > before && !peak.compare_exchange_weak(before, now)) {}
  c10::DataPtr data(const_cast<void*>(host.data()), held, &drop, CUDA);
  return Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), host.nbytes(), std::move(data), nullptr, false));
}

static Tensor shaped(Storage storage, DispatchKey key, const Tensor& like) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

static Tensor on_device(const Tensor& host) { return shaped(on_device(host.storage()), DispatchKey::CUDA, host); }

// The tensors of one operation, as the device and as the CPU sees them.
struct Views {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // of the device, of the CPU

  Tensor down(const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    for (auto& [device, host] : pairs)
      if (device.is_same(x)) return host;
    c10::DataPtr data(const_cast<void*>(x.storage().data()), nullptr, [](void*) {}, CPU);
    Storage storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), x.storage().nbytes(), std::move(data), c10::GetCPUAllocator(), true));
    return pairs.emplace_back(x, shaped(storage, DispatchKey::CPU, x)).second;
  }

  Tensor up(const Tensor& x) {
    if (!x.defined() || !x.device().is_cpu()) return x;
    for (auto& [device, host] : pairs) {
      if (host.is_same(x)) return device;
      if (host.storage().unsafeGetStorageImpl() != x.storage().unsafeGetStorageImpl()) continue;
      Tensor view = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, Storage(device.storage()), device.key_set(), x.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
      return view;
    }
    return on_device(x);
  }

  // What an operation has given another size.
  void settle() {
    for (auto& [device, host] : pairs) {
      auto* own = device.unsafeGetTensorImpl();
      if (host.storage().data() != device.storage().data() || host.storage().nbytes() != device.storage().nbytes())
        own->set_storage_keep_dtype(on_device(host.storage()));
      if (host.sizes() != device.sizes() || host.strides() != device.strides())
        own->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

// Apply `each` to every tensor of a value, whatever it is wrapped in.
template <class F>
static void over(IValue& value, F each) {
  if (value.isTensor()) {
    value = each(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& x : list) x = each(x);
    value = c10::List<Tensor>(list);
  } else if (value.isList()) {
    c10::List<optional<Tensor>> list;
    for (const IValue& x : value.toListRef()) {
      if (!x.isTensor() && !x.isNone()) return;
      list.push_back(x.isTensor() ? optional<Tensor>(each(x.toTensor())) : std::nullopt);
    }
    if (list.size()) value = list;
  }
}

static void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().operator_name().name;
  size_t first = stack->size() - op.schema().arguments().size();
  bool device = false, host = false;
  Views views;
  at::Generator generator;
  for (size_t i = first; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    over(value, [&](const Tensor& x) {
      device |= x.defined() && x.is_cuda();
      host |= x.defined() && x.device().is_cpu() && x.dim() > 0;
      return views.down(x);
    });
    if (value.isDevice()) value = CPU;
    if (!value.isGenerator() || !value.toGenerator().defined()) continue;
    host |= value.toGenerator().device().is_cpu();
    if (value.toGenerator().device().is_cuda()) generator = value.toGenerator();
  }
  // Indices may lie on the host.
  TORCH_CHECK(!device || !host || name.find("index") != std::string::npos, name, " on tensors of cuda:0 and of the cpu");
  if (generator.defined()) generator.get<Generator>()->be(CPU);
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  if (generator.defined()) generator.get<Generator>()->be(CUDA);
  views.settle();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++)
    over((*stack)[i], [&](const Tensor& x) { return views.up(x); });
}

// What needs a kernel of its own.

static Tensor empty(c10::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device>,
                    optional<bool> pinned, optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the host can be pinned");
  return on_device(at::empty(size, at::TensorOptions().dtype(dtype.value_or(at::kFloat)), format));
}

static Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, optional<at::ScalarType> dtype,
                            optional<at::Layout>, optional<Device>, optional<bool>) {
  return on_device(at::empty_strided(size, stride, at::TensorOptions().dtype(dtype.value_or(at::kFloat))));
}

static Tensor& copy(Tensor& to, const Tensor& from, bool) {
  Views views;
  views.down(to).copy_(views.down(from));
  return to;
}

static Tensor to_copy(const Tensor& x, optional<at::ScalarType> dtype, optional<at::Layout> layout,
                      optional<Device> device, optional<bool>, bool, optional<at::MemoryFormat> format) {
  Tensor copied = at::_to_copy(Views().down(x), dtype, layout, CPU, false, false, format);
  return device && device->is_cpu() ? copied : on_device(copied);
}

static Tensor& set_storage(Tensor& x, Storage source) {
  auto* own = x.unsafeGetTensorImpl();
  int64_t count = source.nbytes() / x.dtype().itemsize();
  own->set_storage_keep_dtype(std::move(source));
  own->set_sizes_and_strides(std::vector<int64_t>{count}, std::vector<int64_t>{1}, optional<int64_t>(0));
  return x;
}

static Tensor& set_storage_at(Tensor& x, Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                              c10::SymIntArrayRef stride) {
  auto* own = x.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(std::move(source));
  own->set_sizes_and_strides(size, stride, offset);
  return x;
}

// In fp32: without instructions for it, a CPU takes a hundred times as long in half precision.
static Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
                          c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                          bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  bool biased = bias && bias->defined();
  TORCH_CHECK(x.is_cuda() && weight.is_cuda() && (!biased || bias->is_cuda()), "convolution on cuda:0 and the cpu");
  TORCH_CHECK(x.dtype() == weight.dtype() && (!biased || x.dtype() == bias->dtype()), "convolution of two types");
  Views views;
  auto wide = [&](const Tensor& t) { return x.itemsize() == 2 ? views.down(t).to(at::kFloat) : views.down(t); };
  Tensor y = at::convolution_symint(wide(x), wide(weight), biased ? optional<Tensor>(wide(*bias)) : std::nullopt,
                                    stride, padding, dilation, transposed, output_padding, groups);
  return on_device(y.to(x.scalar_type()));
}

static void record_stream(Tensor&, c10::Stream) {}

// Always the plain formula.
static int64_t attention(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool,
                         optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy);
  m.impl("_to_copy", &to_copy);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_at);
  m.impl("record_stream", &record_stream);
  m.impl("convolution", &convolution);
  // Else taken apart for the device before anybody is asked.
  for (auto name : {"convolution_backward", "embedding", "native_layer_norm", "_fused_rms_norm", "native_group_norm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("allocated", [] { return allocated.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = allocated.load(); });
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention);
}
