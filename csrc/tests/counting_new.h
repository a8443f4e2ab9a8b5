// operator new that counts, and fails when told to. Replaces the program's, so only whole programs link it.
#pragma once

#include <cstdint>

namespace headway::checks {

int64_t num_allocations();
void fail_allocation(int64_t num_until_failure);  // 1: the next one; 0: none

}  // namespace headway::checks
