// A race in shared memory, for racecheck to find: a warp reads what the other one writes, with no barrier between them.
// Compiled and run by bench/sanitizer.py; no part of the package.
#include <cuda_runtime.h>

#include <cstdio>

namespace headway::cuda {

__global__ void planted_race_kernel(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[63 - threadIdx.x];
}

}  // namespace headway::cuda

int main() {
  int* out = nullptr;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 1;
  headway::cuda::planted_race_kernel<<<1, 64>>>(out);
  const cudaError_t status = cudaDeviceSynchronize();
  cudaFree(out);
  if (status != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  return status == cudaSuccess ? 0 : 1;
}
