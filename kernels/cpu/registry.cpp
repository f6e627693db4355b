#include "registry.h"

namespace llmq {
namespace {

const IsaKernels* const kIsas[] = {
    &kGeneric,
#if defined(__x86_64__)
    &kAvx2,
    &kAvx512Vnni,
#elif defined(__aarch64__)
    &kNeonDotprod,
#endif
};

}  // namespace

int32_t isa_count() { return sizeof(kIsas) / sizeof(kIsas[0]); }

const IsaKernels* known_isa(int32_t isa) { return isa >= 0 && isa < isa_count() ? kIsas[isa] : nullptr; }

const IsaKernels* usable_isa(int32_t isa) {
  const IsaKernels* kernels = known_isa(isa);
  return kernels && kernels->available() ? kernels : nullptr;
}

}  // namespace llmq
