// Exact top-k by inner product on a Hopper GPU. Raw device pointers, sizes and a stream; launchers return
// what CUDA said, allocate nothing and wait for nothing. Python has validated every argument.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/mips_topk_params.h"

namespace realm_kernels {
namespace cuda {

// What a plan is. batch: queries of a pass, over which the caller loops; bytes: of the workspace of a pass.
struct MipsTopkPlan {
  int64_t batch, bytes;
  int shape;           // of the scan: 0 wide, 1 deep, 2 narrow
  int kept, selected;  // tiles of a query, and groups of these that are rescored at most
  int stages, shared_bytes, blocks;
  int cluster;           // blocks of one
  int64_t words, pitch;  // where the maxima [B, pitch] of a pass lie in the workspace
};

MipsTopkPlan plan_mips_topk(const SearchShape& shape);

// Once for each device, before anything is launched on it and not while a graph is captured: loads all
// kernels and tells how many clusters of the scan run at once, which plans ask for.
cudaError_t load_mips_topk(int* large_clusters);

struct MipsTopkLaunch {
  SearchShape shape;         // of the whole batch, as it was planned
  MipsTopkParams params;     // of one pass: at most plan.batch queries
  unsigned char* workspace;  // plan.bytes, 256-byte aligned
  bool with_maxima =
      true;           // false: a scan with an empty epilogue, for the benchmark; the rest is then not run
  bool whole = true;  // false: nothing after the scan
};

cudaError_t launch_mips_topk(const MipsTopkLaunch& launch, cudaStream_t stream);

}  // namespace cuda
}  // namespace realm_kernels
