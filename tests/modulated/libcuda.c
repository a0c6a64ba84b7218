/* A CUDA driver without a device: what Triton's own launcher hands over is written to a file, and nothing runs. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define cuTensorMapEncodeTiled declared_tiled
#define cuTensorMapEncodeIm2col declared_im2col
#include "cuda.h"
#undef cuTensorMapEncodeTiled
#undef cuTensorMapEncodeIm2col

#define NOTHING(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define GIVES(name, value, ...) CUresult name(__VA_ARGS__) { *to = value; return CUDA_SUCCESS; }

/* Loaded as a module, and its only function. */
typedef struct {
  char name[256];
  int count, sizes[512];
} Kernel;

/* The sizes in bytes of the parameters of a function. */
void describe(Kernel *kernel, int count, const int *sizes) {
  kernel->count = count;
  memcpy(kernel->sizes, sizes, count * sizeof(int));
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **params, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  FILE *file = fopen(getenv("LAUNCHES"), "a");
  fprintf(file, "%s %u,%u,%u %u %u %zu", kernel->name, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
          c->sharedMemBytes, (size_t)c->hStream);
  for (int i = 0; i < kernel->count; ++i) {
    unsigned long long value = 0;
    memcpy(&value, params[i], kernel->sizes[i]);
    fprintf(file, " %llu", value);
  }
  fputc('\n', file);
  fclose(file);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *to, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *to = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *to = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *to = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *to = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *to = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *to = 32; break;
  default: *to = 65536;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *to, CUmodule module, const char *name) {
  strncpy(((Kernel *)module)->name, name, sizeof(((Kernel *)module)->name) - 1);
  *to = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *to, CUfunction_attribute attribute, CUfunction function) {
  *to = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **to, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; ++i) *(CUdeviceptr *)to[i] = pointer;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *to, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)to = pointer;
  return CUDA_SUCCESS;
}

GIVES(cuDeviceGetCount, 1, int *to)
GIVES(cuDeviceGet, 0, CUdevice *to, int ordinal)
GIVES(cuDevicePrimaryCtxRetain, (CUcontext)1, CUcontext *to, CUdevice device)
GIVES(cuCtxGetCurrent, (CUcontext)1, CUcontext *to)
GIVES(cuCtxGetDevice, 0, CUdevice *to)
GIVES(cuCtxGetLimit, 0, size_t *to, CUlimit limit)
GIVES(cuDriverGetVersion, 13000, int *to)
GIVES(cuGetErrorString, "an error", CUresult error, const char **to)
GIVES(cuModuleLoadData, (CUmodule)calloc(1, sizeof(Kernel)), CUmodule *to, const void *image)
GIVES(cuStreamIsCapturing, CU_STREAM_CAPTURE_STATUS_NONE, CUstream stream, CUstreamCaptureStatus *to)
GIVES(cuOccupancyMaxActiveClusters, 1, int *to, CUfunction function, const CUlaunchConfig *config)
NOTHING(cuInit, unsigned flags)
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
NOTHING(cuModuleUnload, CUmodule module)
NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
NOTHING(cuTensorMapEncodeTiled, void)
NOTHING(cuTensorMapEncodeIm2col, void)
