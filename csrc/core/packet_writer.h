// Lays a drafted step out as a packet (step_layout.h).
#pragma once

#include <cstdint>

#include "core/planner.h"

namespace headway {

// Writes into entry_bytes of 64-byte aligned memory; returns the packet's bytes.
uint32_t write_packet(const StepDraft& draft, const RowTable& rows, uint8_t* entry, int64_t entry_bytes);

}  // namespace headway
