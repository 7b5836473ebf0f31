// The operators of c10d that are collectives, and what their arguments say.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <array>
#include <string>
#include <utility>

namespace lens {

struct Operator {
  const char* name;    // in c10d
  const char* record;  // in records
  const char* input;   // its argument that holds this rank's input; none for barriers
  const char* output;  // its argument that holds the results
  const char* peer;    // its argument that names the other rank of a message
};

constexpr Operator kOperators[] = {
    {"allreduce_", "all_reduce", "tensors", "tensors", ""},
    {"allreduce_coalesced_", "all_reduce", "tensors", "tensors", ""},
    {"broadcast_", "broadcast", "tensors", "tensors", ""},
    {"reduce_", "reduce", "tensors", "tensors", ""},
    {"allgather_", "all_gather", "input_tensors", "output_tensors", ""},
    {"_allgather_base_", "all_gather", "input_tensor", "output_tensor", ""},
    {"allgather_coalesced_", "all_gather", "input_list", "output_lists", ""},
    {"allgather_into_tensor_coalesced_", "all_gather", "inputs", "outputs", ""},
    {"reduce_scatter_", "reduce_scatter", "input_tensors", "output_tensors", ""},
    {"_reduce_scatter_base_", "reduce_scatter", "input_tensor", "output_tensor", ""},
    {"reduce_scatter_tensor_coalesced_", "reduce_scatter", "inputs", "outputs", ""},
    {"alltoall_", "all_to_all", "input_tensors", "output_tensors", ""},
    {"alltoall_base_", "all_to_all", "input", "output", ""},
    {"gather_", "gather", "input_tensors", "output_tensors", ""},
    {"scatter_", "scatter", "input_tensors", "output_tensors", ""},
    {"barrier", "barrier", "", "", ""},
    {"monitored_barrier_", "barrier", "", "", ""},
    {"send", "send", "tensors", "", "dst"},
    {"recv_", "recv", "tensors", "tensors", "src"},
    {"recv_any_source_", "recv", "tensors", "tensors", ""},
};
constexpr c10::DispatchKey kKeys[] = {c10::DispatchKey::CPU, c10::DispatchKey::CUDA};

inline const std::string* dtype_name(c10::ScalarType type) {
  static const auto* names = [] {
    auto* made = new std::array<std::string, 64>();
    const std::pair<c10::ScalarType, const char*> known[] = {
        {at::kByte, "uint8"},           {at::kChar, "int8"},
        {at::kShort, "int16"},          {at::kInt, "int32"},
        {at::kLong, "int64"},           {at::kHalf, "float16"},
        {at::kFloat, "float32"},        {at::kDouble, "float64"},
        {at::kComplexHalf, "complex32"}, {at::kComplexFloat, "complex64"},
        {at::kComplexDouble, "complex128"}, {at::kBool, "bool"},
        {at::kBFloat16, "bfloat16"},    {at::kFloat8_e5m2, "float8_e5m2"},
        {at::kFloat8_e4m3fn, "float8_e4m3fn"},
    };
    for (auto [each, name] : known) (*made)[size_t(each)] = name;
    return made;
  }();
  const auto place = static_cast<size_t>(type);
  return place < names->size() && !(*names)[place].empty() ? &(*names)[place] : nullptr;
}

template <typename Use>
void each_tensor(const at::Tensor& tensor, Use&& use) {
  if (tensor.defined()) use(tensor);
}

template <typename Use>
void each_tensor(at::TensorList tensors, Use&& use) {
  for (const at::Tensor& tensor : tensors) each_tensor(tensor, use);
}

template <typename Use>
void each_tensor(const std::vector<std::vector<at::Tensor>>& lists, Use&& use) {
  for (const auto& list : lists) each_tensor(at::TensorList(list), use);
}

template <typename Use>
void each_tensor(const c10::IValue& value, Use&& use) {
  if (value.isTensor()) {
    each_tensor(value.toTensor(), use);
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef()) each_tensor(item, use);
  }
}

inline const void* storage_of(const at::Tensor& tensor) {
  return tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
}

}  // namespace lens
