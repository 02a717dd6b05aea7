/* A CUDA driver that runs nothing and refuses what a real one would refuse.
 *
 * Built as libcuda.so.1 by stub_driver.py, so that Triton loads kernels, encodes tensor maps and
 * launches as it does on a GPU, on a machine without one. The rules are those of the CUDA driver
 * API's reference (cuTensorMapEncodeTiled, cuLaunchKernelEx, cuFuncSetAttribute). What was refused
 * last, and why, is cuGetErrorString's answer, and so part of the error that Triton raises.
 *
 * Addresses are those of the CPU's memory. One thread at a time.
 */
#define _GNU_SOURCE
#include <cuda.h>

#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LATEST_DRIVER 13020
#define MACHINE_CUDA 190    /* e_machine of a cubin */
#define UNASKED_SHARED 49152 /* bytes that a kernel may take without asking for more */

struct module {
  size_t size;
  char image[];
};

struct function {
  int shared_allowed;
};

static struct { int major, minor, multiprocessors, shared; } gpu = {9, 0, 132, 232448};
static unsigned long long launches;
static char reason[512] = "no error";
static CUcontext current;

static CUresult refuse(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  return CUDA_ERROR_INVALID_VALUE;
}

/* For the tests: which GPU this is, and how many kernels it was given. */

void stub_be(int major, int minor, int multiprocessors, int shared) {
  gpu.major = major, gpu.minor = minor;
  gpu.multiprocessors = multiprocessors, gpu.shared = shared;
}

unsigned long long stub_launches(void) { return launches; }

/* Errors, device, context */

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "no error" : reason;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS ? "CUDA_SUCCESS" : "CUDA_ERROR_INVALID_VALUE";
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned int flags) { return flags ? refuse("cuInit takes 0") : CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = LATEST_DRIVER;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : refuse("there is no device %d", ordinal);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  if (device != 0)
    return refuse("there is no device %d", device);
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = gpu.major; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = gpu.minor; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = gpu.multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = gpu.shared; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = gpu.shared + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
  default: return refuse("the stub does not know device attribute %d", (int)attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)&gpu;
  return device == 0 ? CUDA_SUCCESS : refuse("there is no device %d", device);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return limit < CU_LIMIT_MAX ? CUDA_SUCCESS : refuse("there is no limit %d", (int)limit);
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return limit < CU_LIMIT_MAX ? CUDA_SUCCESS : refuse("no limit %d to set to %zu", limit, value);
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return stream == NULL ? CUDA_SUCCESS : refuse("the stub has the default stream alone");
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return refuse("the stub does not know pointer attribute %d", (int)attribute);
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

/* Modules and functions */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != MACHINE_CUDA)
    return refuse("the image to load is no cubin");
  size_t sections = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t segments = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  size_t size = sections > segments ? sections : segments;
  struct module *made = malloc(sizeof *made + size);
  if (made == NULL)
    return refuse("no memory for a module of %zu bytes", size);
  made->size = size;
  memcpy(made->image, image, size);
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const struct module *in = (const struct module *)module;
  if (memmem(in->image, in->size, name, strlen(name) + 1) == NULL)
    return refuse("the module has no function %.200s", name);
  struct function *made = malloc(sizeof *made);
  if (made == NULL)
    return refuse("no memory for a function");
  made->shared_allowed = UNASKED_SHARED;
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS:
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  default: return refuse("the stub does not know function attribute %d", (int)attribute);
  }
  return function ? CUDA_SUCCESS : refuse("no function");
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return refuse("the stub cannot set function attribute %d", (int)attribute);
  if (value < 0 || value > gpu.shared)
    return refuse("%d bytes of shared memory asked for, a block may have %d", value, gpu.shared);
  ((struct function *)function)->shared_allowed = value;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return function && config <= CU_FUNC_CACHE_PREFER_EQUAL ? CUDA_SUCCESS : refuse("no such cache");
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *c) {
  *count = 1;
  return function && c ? CUDA_SUCCESS : refuse("no function");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments,
                          void **extra) {
  if (current == NULL)
    return refuse("a launch without a context");
  if (function == NULL || arguments == NULL || extra != NULL)
    return refuse("a launch without its function or arguments");
  if (c->gridDimX == 0 || c->gridDimY == 0 || c->gridDimZ == 0 || c->gridDimX > INT32_MAX ||
      c->gridDimY > 65535 || c->gridDimZ > 65535)
    return refuse("a grid of %u x %u x %u", c->gridDimX, c->gridDimY, c->gridDimZ);
  unsigned long long threads = (unsigned long long)c->blockDimX * c->blockDimY * c->blockDimZ;
  if (threads == 0 || threads > 1024 || c->blockDimZ > 64)
    return refuse("a block of %u x %u x %u threads", c->blockDimX, c->blockDimY, c->blockDimZ);
  int allowed = ((struct function *)function)->shared_allowed;
  if (c->sharedMemBytes > (unsigned)allowed)
    return refuse("%u bytes of shared memory, the kernel may have %d", c->sharedMemBytes, allowed);
  for (unsigned i = 0; i < c->numAttrs; i++) {
    if (c->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      continue;
    unsigned x = c->attrs[i].value.clusterDim.x;
    if (gpu.major < 9 || x == 0 || x > 8 || c->gridDimX % x)
      return refuse("a cluster of %u in a grid of %u", x, c->gridDimX);
  }
  launches++;
  return CUDA_SUCCESS;
}

/* Tensor maps: dimension 0 is the innermost, sizes and strides of the tensor in 64 bits */

static int size_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_UINT32:
  case CU_TENSOR_MAP_DATA_TYPE_INT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 0;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *size, const cuuint64_t *stride,
                                const cuuint32_t *box, const cuuint32_t *step,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned long long bytes = size_of(type);
  if (gpu.major < 9)
    return refuse("tensor maps need compute capability 9.0");
  if (bytes == 0 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return refuse("the stub does not know type %d, interleave %d", (int)type, (int)interleave);
  if ((uintptr_t)map % 64)
    return refuse("the map is not aligned to 64 bytes");
  if (rank < 1 || rank > 5)
    return refuse("a tensor of %u dimensions", rank);
  if (address == NULL || (uintptr_t)address % 16)
    return refuse("the tensor's address %p is not aligned to 16 bytes", address);
  for (unsigned i = 0; i < rank; i++) {
    if (size[i] == 0 || size[i] > 1ull << 32)
      return refuse("dimension %u has %llu elements", i, (unsigned long long)size[i]);
    if (box[i] == 0 || box[i] > 256)
      return refuse("dimension %u of the box is %u, beyond 1 to 256", i, box[i]);
    if (step[i] == 0 || step[i] > 8)
      return refuse("dimension %u has an element stride of %u, beyond 1 to 8", i, step[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    unsigned long long outer = stride[i], inner = i ? stride[i - 1] : bytes;
    if (outer % 16 || outer >= 1ull << 40)
      return refuse("a stride of %llu bytes, no multiple of 16 below 2^40", outer);
    if (outer < inner * size[i])
      return refuse("a stride of %llu bytes overlaps %llu elements %llu bytes apart", outer,
                    (unsigned long long)size[i], inner);
    if (outer % inner)
      return refuse("a stride of %llu bytes is no multiple of %llu", outer, inner);
  }
  unsigned long long across = box[0] * bytes, most = across;
  if (across % 16)
    return refuse("the box is %llu bytes across, no multiple of 16", across);
  switch (swizzle) {
  case CU_TENSOR_MAP_SWIZZLE_NONE: break;
  case CU_TENSOR_MAP_SWIZZLE_32B: most = 32; break;
  case CU_TENSOR_MAP_SWIZZLE_64B: most = 64; break;
  case CU_TENSOR_MAP_SWIZZLE_128B: most = 128; break;
  default: return refuse("the stub does not know swizzle %d", (int)swizzle);
  }
  if (across > most)
    return refuse("the box is %llu bytes across, swizzled by %llu", across, most);
  if (promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B)
    return refuse("there is no L2 promotion %d", (int)promotion);
  int is_float = (type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_float)
    return refuse("NaN beyond the edges of a tensor of integers");
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}
