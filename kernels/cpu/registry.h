// The instruction sets of this build.
#pragma once

#include "isa.h"

namespace llmq {

int32_t isa_count();
const IsaKernels* known_isa(int32_t isa);   // null for a number that is none
const IsaKernels* usable_isa(int32_t isa);  // null for those this machine cannot run, too

}  // namespace llmq
