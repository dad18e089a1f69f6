// The kernels of the Hopper scan, and their launch. Compiled for sm_90a only: wgmma and setmaxnreg exist
// there alone.
#include "cuda/sm90/mips_topk_scan.h"

#include "cuda/load_kernel.h"
#include "cuda/sm90/scan.h"

namespace realm_kernels {
namespace cuda {
namespace sm90 {
namespace {

// One block a multiprocessor: the 1 lets setmaxnreg share out all of its registers.
template <class Element, Shape kShape, bool kWithMaxima>
__global__ void __launch_bounds__(kThreads, 1)
    mips_topk_scan_kernel(const __grid_constant__ ScanArguments arguments,
                          const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap queries) {
  scan<Element, kShape, kWithMaxima>(arguments, &rows, &queries);
}

using Kernel = void (*)(ScanArguments, TensorMap, TensorMap);

// Every instantiation, and why it is here. [shape][Scanned]
constexpr Kernel kKernels[3][3] = {
    {mips_topk_scan_kernel<BFloat16, Shape::kWide, true>,  // D <= 256, more than 64 queries: REALM's training
     mips_topk_scan_kernel<Float16, Shape::kWide, true>,   // the same for tables of float16
     mips_topk_scan_kernel<Int8, Shape::kWide, true>},     // half the bytes, twice the matrix rate
    {mips_topk_scan_kernel<BFloat16, Shape::kDeep, true>,  // D = 768, more than 64 queries
     mips_topk_scan_kernel<Float16, Shape::kDeep, true>,   //
     mips_topk_scan_kernel<Int8, Shape::kDeep, true>},     //
    {mips_topk_scan_kernel<BFloat16, Shape::kNarrow, true>,  // up to 64 queries: serving, evaluation
     mips_topk_scan_kernel<Float16, Shape::kNarrow, true>,   //
     mips_topk_scan_kernel<Int8, Shape::kNarrow, true>}};    //
// Empty epilogues, for the benchmark: what the maxima cost is the difference. float16 is as fast as bfloat16.
constexpr Kernel kEmptyKernels[3][3] = {
    {mips_topk_scan_kernel<BFloat16, Shape::kWide, false>, nullptr,
     mips_topk_scan_kernel<Int8, Shape::kWide, false>},
    {mips_topk_scan_kernel<BFloat16, Shape::kDeep, false>, nullptr, nullptr},
    {mips_topk_scan_kernel<BFloat16, Shape::kNarrow, false>, nullptr,
     mips_topk_scan_kernel<Int8, Shape::kNarrow, false>}};

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(int blocks, int cluster, int shared_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;
};

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there: the module does not link libcuda, and imports without one.
cudaError_t find_encode(Encode* encode) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  *encode = reinterpret_cast<Encode>(entry);
  return status != cudaSuccess                  ? status
         : found == cudaDriverEntryPointSuccess ? cudaSuccess
                                                : cudaErrorSymbolNotFound;
}

// Boxes one panel wide, swizzled as the descriptors of wgmma have it. Outside the matrix are zeros.
cudaError_t encode_map(Encode encode, TensorMap* map, const Matrix& m, Scanned scanned) {
  const auto bytes = static_cast<cuuint64_t>(bytes_of(scanned));
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(m.pitch) * bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kPanelBytes / bytes),
                             static_cast<cuuint32_t>(m.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = scanned == Scanned::kBFloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : scanned == Scanned::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUresult result = encode(map, type, 2, const_cast<void*>(m.base), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_scan(const SearchPlan& plan, const SearchArguments& arguments, bool with_maxima,
                        cudaStream_t stream) {
  const Scanned scanned = arguments.codes != nullptr               ? Scanned::kInt8
                          : arguments.row_type == Number::kFloat16 ? Scanned::kFloat16
                                                                   : Scanned::kBFloat16;
  const auto& kernels = with_maxima ? kKernels : kEmptyKernels;
  const Kernel kernel = kernels[static_cast<int>(plan.shape)][static_cast<int>(scanned)];
  if (kernel == nullptr) {
    return cudaErrorInvalidValue;
  }
  Encode encode = nullptr;
  TensorMap rows, queries;
  cudaError_t status = find_encode(&encode);
  status = status == cudaSuccess ? encode_map(encode, &rows, scanned_rows(arguments), scanned) : status;
  status = status == cudaSuccess ? encode_map(encode, &queries, scanned_queries(arguments), scanned) : status;
  if (status != cudaSuccess) {
    return status;
  }
  Launch launch(plan.scan_blocks, plan.cluster, plan.shared.bytes(), stream);
  return cudaLaunchKernelEx(&launch.config, kernel, scan_arguments(plan, arguments), rows, queries);
}

cudaError_t load_scan(int* large_clusters) {
  for (const auto* kernels : {&kKernels, &kEmptyKernels}) {
    for (const auto& of_shape : *kernels) {
      for (const Kernel kernel : of_shape) {
        if (const cudaError_t status = kernel == nullptr ? cudaSuccess : load_kernel(kernel);
            status != cudaSuccess) {
          return status;
        }
      }
    }
  }
  Launch launch(kLargeCluster, kLargeCluster, kSharedBytes, nullptr);
  return cudaOccupancyMaxActiveClusters(large_clusters, kKernels[static_cast<int>(Shape::kDeep)][0],
                                        &launch.config);
}

}  // namespace sm90
}  // namespace cuda
}  // namespace realm_kernels
