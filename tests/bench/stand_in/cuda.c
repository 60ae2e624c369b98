// Stands in for the CUDA driver, libcuda.so.1: Triton's launchers and fastdiff._C load modules and launch kernels through
// it. Nothing runs. Launches are checked, counted and written down.

#include <cuda.h>
#include <pthread.h>
#include <string.h>

#define MOST_WRITTEN 65536
#define MOST_PARAMETERS 96
#define MOST_FUNCTIONS 65536

static int modules, functions, launched, refused;

int stand_in_modules(void) { return modules; }
int stand_in_launched(void) { return launched; }
int stand_in_refused(void) { return refused; }

// What a thread's calls are made in: its device, the stream that PyTorch would say is current, and whether launches on it
// are captured. A number of one's own tells threads apart.
static _Thread_local long device_here, stream_here, capturing_here, thread_here;

void stand_in_here(long device, long stream, long capturing, long thread) {
  device_here = device, stream_here = stream, capturing_here = capturing, thread_here = thread;
}
long stand_in_stream(void) { return stream_here; }

// The bytes of each parameter of a function, so that launches of it are written down.
static unsigned char sizes[MOST_FUNCTIONS][MOST_PARAMETERS];
static int counts[MOST_FUNCTIONS];

int stand_in_parameters(size_t function, const unsigned char *bytes, int count) {
  if (function >= MOST_FUNCTIONS || count > MOST_PARAMETERS)
    return 0;
  memcpy(sizes[function], bytes, count);
  counts[function] = count;
  if (functions <= (int)function)
    functions = (int)function + 1;
  return 1;
}

struct written {
  long function, grid[2], threads, shared, stream, device, thread, count;
  unsigned long values[MOST_PARAMETERS];
};
static struct written log_[MOST_WRITTEN];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

const struct written *stand_in_written(int launch) { return launch < MOST_WRITTEN ? &log_[launch] : 0; }

// PyTorch's table of DLPack's functions (DLPack 1.1), but that tensors lie on this thread's GPU, and its stream is current.
struct view;
struct table {
  void *version, *older, *allocate, *own, *give;
  int (*view)(void *tensor, struct view *out);
  int (*stream)(int type, int id, void **out);
};
struct view {
  void *data;
  int type, id;
};
static struct table table;
static int (*view_of_cpu)(void *, struct view *);

static int view_here(void *tensor, struct view *out) {
  int failed = view_of_cpu(tensor, out);
  if (!failed)
    out->type = 2, out->id = (int)device_here;
  return failed;
}

static int current_here(int type, int id, void **out) {
  *out = (void *)stream_here;
  return type != 2 || id != device_here;
}

const void *stand_in_table(const struct table *pytorch) {
  table = *pytorch;
  view_of_cpu = table.view;
  table.view = view_here;
  table.stream = current_here;
  return &table;
}

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
  *context = (CUcontext)(device_here + 1);
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

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  (void)stream;
  *status = capturing_here ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
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
  pthread_mutex_lock(&lock);
  size_t which = (size_t)function;
  if (launched < MOST_WRITTEN && which < MOST_FUNCTIONS) {
    struct written *to = &log_[launched];
    *to = (struct written){(long)which, {config->gridDimX, config->gridDimY}, config->blockDimX, config->sharedMemBytes,
                           (long)config->hStream, device_here, thread_here, counts[which], {0}};
    for (int k = 0; k < counts[which]; k++)
      memcpy(&to->values[k], parameters[k], sizes[which][k]);
  }
  launched++;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
