// The part of the DLPack standard, version 1, that direct calls need: a tensor's description, and
// the table of functions behind `torch.Tensor.__dlpack_c_exchange_api__`.
#pragma once

#include <cstdint>

namespace fastdit::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

struct Tensor {  // DLTensor
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {  // DLPackExchangeAPI
  uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace fastdit::dlpack
