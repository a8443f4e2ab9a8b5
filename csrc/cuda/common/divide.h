// Whole numbers of pieces, on the host.
#pragma once

namespace headway::cuda {

constexpr int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

}  // namespace headway::cuda
