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

// This module has its own (static) CUDA runtime, so the device is named in every call. It becomes the current one of the
// thread, for every runtime in it: losia_pro/_cuda_ops.py puts back what was.
void use(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess)
    throw std::runtime_error("CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
}

void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void gather_columns(uintptr_t x, uintptr_t in_idx, uintptr_t out, int64_t tokens, int64_t n_in, int64_t stride_t,
                    int64_t stride_c, int unit, int step, int device, uintptr_t stream) {
  use(device);
  check("gather_columns",
        losia::gather_columns(pointer<const void>(x), pointer<const int64_t>(in_idx), pointer<void>(out), tokens,
                              n_in, stride_t, stride_c, unit, step, pointer<CUstream_st>(stream)));
}

void importance_update(uintptr_t importance, uintptr_t uncertainty, uintptr_t weight, uintptr_t product,
                       uintptr_t grad, int64_t rows, int64_t columns, int64_t weight_stride_r,
                       int64_t weight_stride_c, float beta1, float rest1, float beta2, float rest2, float scale,
                       int variant, int weight_dtype, int kept_dtype, int device, uintptr_t stream) {
  use(device);
  const losia::ImportanceUpdate update{
      pointer<void>(importance), pointer<void>(uncertainty),  pointer<const void>(weight),
      pointer<const float>(product), pointer<const float>(grad), rows, columns, weight_stride_r, weight_stride_c,
      beta1, rest1, beta2, rest2, scale, variant, losia::Dtype(weight_dtype), losia::Dtype(kept_dtype)};
  check("importance_update", losia::importance_update(update, pointer<CUstream_st>(stream)));
}

void write_back(uintptr_t layers, uintptr_t parts, int64_t n_parts, int log2_columns, int weight_dtype,
                int subnet_dtype, uint64_t key, int device, uintptr_t stream) {
  use(device);
  check("write_back", losia::write_back(pointer<const int64_t>(layers), pointer<const int32_t>(parts), n_parts,
                                        log2_columns, losia::Dtype(weight_dtype), losia::Dtype(subnet_dtype),
                                        key, pointer<CUstream_st>(stream)));
}

void adamw(uintptr_t tensors, uintptr_t factors, uintptr_t parts, int64_t n_parts, float keep, float rest1,
           float beta2, float rest2, float eps, float sign, int device, uintptr_t stream) {
  use(device);
  check("adamw", losia::adamw(pointer<const int64_t>(tensors), pointer<const float>(factors),
                              pointer<const int32_t>(parts), n_parts, {keep, rest1, beta2, rest2, eps, sign},
                              pointer<CUstream_st>(stream)));
}

void lerp(uintptr_t tensors, uintptr_t weight, uintptr_t parts, int64_t n_parts, int dtype, int other_dtype,
          int device, uintptr_t stream) {
  use(device);
  check("lerp", losia::lerp(pointer<const int64_t>(tensors), pointer<const float>(weight),
                            pointer<const int32_t>(parts), n_parts, losia::Dtype(dtype), losia::Dtype(other_dtype),
                            pointer<CUstream_st>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("ARCHS") = LOSIA_CUDA_ARCHS;  // as CMake names them: 80-real is machine code alone, 120 with PTX too
  m.attr("TOOLKIT") = CUDART_VERSION;
  m.attr("PART") = losia::PART;
  m.attr("ADAMW_PART") = losia::ADAMW_PART;
  m.attr("LERP_PART") = losia::LERP_PART;
  m.def("gather_columns", &gather_columns);
  m.def("importance_update", &importance_update);
  m.def("write_back", &write_back);
  m.def("adamw", &adamw);
  m.def("lerp", &lerp);
}
