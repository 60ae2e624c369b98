// Stands in for the CUDA driver, libcuda.so.1: Triton's launchers load modules and launch kernels through it. Nothing
// runs. Launches are checked and counted.

#include <cuda.h>
#include <string.h>

static int modules, functions, launched, refused;

int stand_in_modules(void) { return modules; }
int stand_in_launched(void) { return launched; }
int stand_in_refused(void) { return refused; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : "the stand-in refuses this";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 232448;  // bytes of shared memory, for the rest
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&modules;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  (void)context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(context);
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_SUCCESS;
}

// A module is machine code for sm_90, in ELF; its handle is the order in which it was loaded.
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4))
    return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)(size_t)++modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  if ((size_t)module > (size_t)modules || !name[0])
    return CUDA_ERROR_NOT_FOUND;
  functions = modules;
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  (void)function, (void)attribute, (void)value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function, (void)config;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  (void)extra;
  int whole = config->gridDimX > 0 && config->gridDimY > 0 && config->gridDimY < 65536 && config->gridDimZ == 1;
  int threads = config->blockDimX == 128 && config->blockDimY == 1 && config->blockDimZ == 1;
  if (!whole || !threads || !parameters || !function || (size_t)function > (size_t)functions) {
    refused++;
    return CUDA_ERROR_INVALID_VALUE;
  }
  launched++;
  return CUDA_SUCCESS;
}
