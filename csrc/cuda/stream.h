// The device and stream of a launch through torch's stable ABI, and the check of its error.
//
// torch's getter of the current CUDA stream lives in libtorch_cuda, which a CPU build of torch does not have. It is looked up at
// run time in the copy that torch has loaded already, so one binary imports under both. Under SPRAND_SIMT, where kernels
// run on the host, there is neither device nor stream.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef SPRAND_SIMT

namespace sprand::cuda {

class Launch {
 public:
  explicit Launch(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  void check(cudaError_t error, const char* op) const {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error ", static_cast<int>(error));
  }
};

}  // namespace sprand::cuda

#else

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

namespace sprand::cuda {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

inline GetStream find_get_stream() {
  static const GetStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // NOLOAD: only if torch has loaded it
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return found;
}

// While it lives the device of `tensor` is the current one; `stream` is torch's current stream there.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    const GetStream get_stream = find_get_stream();
    STD_TORCH_CHECK(get_stream != nullptr, "sprand: expected a torch with CUDA, got one without; install a CUDA build of torch");
    TORCH_ERROR_CODE_CHECK(get_stream(tensor.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
  void check(cudaError_t error, const char* op) const {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace sprand::cuda

#endif
