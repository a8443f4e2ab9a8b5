// Lays a drafted step out as a packet (step_layout.h).
#pragma once

#include <cstdint>

#include "core/planner.h"

namespace headway {

// Writes into memory of packet_entry_bytes, 64-byte aligned; returns the packet's bytes.
uint32_t write_packet(const StepDraft& draft, const RowTable& rows, uint8_t* entry);

}  // namespace headway
