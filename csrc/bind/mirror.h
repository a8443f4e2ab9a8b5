// The device mirror as Python passes it.
#pragma once

#include <pybind11/pybind11.h>

#include "bind/address.h"
#include "core/step_layout.h"

namespace headway {

// Python passes records as tuples, in the order of the fields.
inline int64_t number_at(const pybind11::tuple& record, size_t field) {
  return pybind11::cast<int64_t>(record[field]);
}
inline Address address_at(const pybind11::tuple& record, size_t field) {
  return pybind11::cast<Address>(record[field]);
}

inline DeviceMirror mirror_from(const pybind11::tuple& record) {
  return {.max_rows = static_cast<int32_t>(number_at(record, 0)),
          .max_blocks_per_row = static_cast<int32_t>(number_at(record, 1)),
          .max_model_len = static_cast<int32_t>(number_at(record, 2)),
          .mask_words = static_cast<int32_t>(number_at(record, 18)),
          .state_window = {.num_tokens = static_cast<int32_t>(number_at(record, 19)),
                           .max_rewind = static_cast<int32_t>(number_at(record, 20))},
          .last_token = address_at(record, 3),
          .num_computed = address_at(record, 4),
          .state_base = address_at(record, 5),
          .slot = address_at(record, 6),
          .stopped = address_at(record, 7),
          .block_table = address_at(record, 8),
          .history = address_at(record, 9),
          .sampling = address_at(record, 10),
          .stop_ids = address_at(record, 11),
          .bias_ids = address_at(record, 12),
          .bias_values = address_at(record, 13),
          .bad_words = address_at(record, 16),
          .token_masks = address_at(record, 17),
          .live = address_at(record, 14),
          .counter = address_at(record, 15)};
}

}  // namespace headway
