// One sampler step in one launch. Compiled with -fmad=false: the noise must have the bits that it has elsewhere, and the
// rest those of the reference.
#include "step_group.h"

namespace fastdiff {
namespace cuda {

namespace {

// Of a block. A small sample is spread over more of the device's processors.
constexpr unsigned kThreads = 256, kFewThreads = 64, kFewGroups = 1 << 16;

// Blocks that a processor is to hold at least: 64 registers a thread, or 80 where all options at once need them.
template <bool kFull, bool kVector>
constexpr int kBlocks = kFull && kVector ? 3 : 4;

template <int kCode, bool kFull, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocks<kFull, kVector>) step_kernel(const __grid_constant__ StepArguments a) {
  const uint32_t group = blockIdx.x * blockDim.x + threadIdx.x;
  if (group < a.groups) step_group<kCode, kFull, kVector>(a, group);
  if (a.ticket) {
    // Every thread of this block has used the index. The last block of all to get here moves it on.
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      if (atomicInc(a.ticket, gridDim.x - 1) == gridDim.x - 1) *a.index += 1;
    }
  }
}

// What there is: one for each dtype where all data is aligned and of that dtype, and two for all else.
const void* kernel_for(const StepArguments& a, bool vector) {
  if (!vector) return (const void*)step_kernel<kAny, true, false>;
  if (!simple(a)) return (const void*)step_kernel<kAny, true, true>;
  if (a.x.code == kF32) return (const void*)step_kernel<kF32, false, true>;
  if (a.x.code == kBF16) return (const void*)step_kernel<kBF16, false, true>;
  return (const void*)step_kernel<kF16, false, true>;
}

// Makes `device` the current one for a while.
class Guard {
 public:
  explicit Guard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return int(error);
}

}  // namespace

int launch(const StepArguments& a, bool vector, int device, void* stream) {
  const Guard guard(device);
  if (guard.error != cudaSuccess) return cleared(guard.error);
  const unsigned threads = a.groups < kFewGroups ? kFewThreads : kThreads;
  const unsigned blocks = a.groups / threads + (a.groups % threads != 0);
  void* parameters[] = {(void*)&a};
  return cleared(cudaLaunchKernel(kernel_for(a, vector), dim3(blocks), dim3(threads), parameters, 0, (cudaStream_t)stream));
}

int load(int device) {
  const Guard guard(device);
  if (guard.error != cudaSuccess) return cleared(guard.error);
  const void* kernels[] = {(const void*)step_kernel<kAny, true, false>, (const void*)step_kernel<kAny, true, true>,
                           (const void*)step_kernel<kF32, false, true>, (const void*)step_kernel<kBF16, false, true>,
                           (const void*)step_kernel<kF16, false, true>};
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return cleared(error);
  }
  return 0;
}

const char* error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace cuda
}  // namespace fastdiff
