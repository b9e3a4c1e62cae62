// losia_pro._cuda: the kernels for Python, pointers and the stream as integers. losia_pro/_cuda_ops.py calls it.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "losia.h"

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// This module has its own (static) CUDA runtime, so the device is named in every call.
void use(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess)
    throw std::runtime_error("CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
}

void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void gather_columns(uintptr_t x, uintptr_t in_idx, uintptr_t out, int64_t tokens, int64_t n_in, int64_t stride_t,
                    int64_t stride_c, int itemsize, int device, uintptr_t stream) {
  use(device);
  check("gather_columns",
        losia::gather_columns(pointer<const void>(x), pointer<const int64_t>(in_idx), pointer<void>(out), tokens,
                              n_in, stride_t, stride_c, itemsize, pointer<CUstream_st>(stream)));
}

void subnet_grad(uintptr_t dy, uintptr_t x_sub, uintptr_t out_idx, uintptr_t out, uintptr_t parts, int64_t tokens,
                 int64_t n_out, int64_t n_in, int64_t dy_stride_t, int64_t dy_stride_c, int64_t x_stride_t,
                 int64_t x_stride_c, int splits, int in_dtype, int out_dtype, int device, uintptr_t stream) {
  use(device);
  check("subnet_grad",
        losia::subnet_grad(pointer<const void>(dy), pointer<const void>(x_sub), pointer<const int64_t>(out_idx),
                           pointer<void>(out), pointer<float>(parts), tokens, n_out, n_in, dy_stride_t,
                           dy_stride_c, x_stride_t, x_stride_c, splits, losia::Dtype(in_dtype),
                           losia::Dtype(out_dtype), pointer<CUstream_st>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("ARCHS") = LOSIA_CUDA_ARCHS;  // as CMake names them: 80-real is machine code alone, 120 with PTX too
  m.attr("TOOLKIT") = CUDART_VERSION;
  m.attr("SUBNET_GRAD_TILE") = losia::subnet_grad_tile();
  m.def("gather_columns", &gather_columns);
  m.def("subnet_grad", &subnet_grad);
}
