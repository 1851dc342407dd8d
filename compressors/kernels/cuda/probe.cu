// Show that kernels can be compiled, loaded and launched.

extern "C" __global__ void probe(int* out, int value) { out[threadIdx.x] = value + threadIdx.x; }
