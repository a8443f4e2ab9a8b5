#include "core/packet_writer.h"

#include <cstring>

#include "core/error.h"

namespace headway {
namespace {

constexpr uint32_t kSectionAlignment = 16;

// Hands out the sections one after the other, each 16-byte aligned.
class SectionWriter {
 public:
  explicit SectionWriter(uint8_t* entry) : entry_(entry) {}

  template <typename T>
  T* place(size_t num_items, uint32_t& offset) {
    offset = num_bytes_;
    num_bytes_ +=
        static_cast<uint32_t>(num_items * sizeof(T) + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
    return reinterpret_cast<T*>(entry_ + offset);
  }
  uint32_t num_bytes() const { return num_bytes_; }

 private:
  uint8_t* entry_;
  uint32_t num_bytes_ = sizeof(PacketHeader);
};

template <typename T>
T* copy_items(T* to, const T* from, size_t num_items) {
  if (num_items > 0) std::memcpy(to, from, num_items * sizeof(T));
  return to + num_items;
}

int32_t* write_words(const Request& request, int32_t* words) {
  words = copy_items(words, request.stop_ids.data(), request.stop_ids.size());
  for (const auto& [token, bias] : request.logit_bias) *words++ = token;
  for (const auto& [token, bias] : request.logit_bias) std::memcpy(words++, &bias, sizeof(bias));
  return copy_items(words, request.bad_words.data(), request.bad_words.size());
}

void write_inits(const StepDraft& draft, const RowTable& rows, RowInit* inits, int32_t* words) {
  const int32_t* first_word = words;
  for (const int32_t row : draft.admitted) {
    const Request& request = *rows.request(row);
    *inits++ = {row, rows.slot(row), static_cast<int32_t>(words - first_word), 0, request.sampling};
    words = write_words(request, words);
  }
}

void write_prompt_tokens(const StepDraft& draft, int32_t* tokens) {
  for (size_t i = draft.num_decode_rows; i < draft.rows.size(); ++i) {
    const StepRow& row = draft.rows[i];
    copy_items(tokens + row.prompt_begin - row.num_history,
               draft.requests[i]->tokens.data() + row.start - row.num_history, row.num_history + row.num_tokens);
  }
}

void write_masks(const StepDraft& draft, int32_t* mask_rows, uint32_t* bits) {
  for (const auto& [row, request] : draft.masks) {
    *mask_rows++ = row;
    bits = copy_items(bits, request->token_mask.data(), request->token_mask.size());
  }
}

}  // namespace

uint32_t write_packet(const StepDraft& draft, const RowTable& rows, uint8_t* entry, int64_t entry_bytes) {
  PacketHeader header = {};
  header.step = draft.step;
  header.num_rows = static_cast<int32_t>(draft.rows.size());
  header.num_decode_rows = draft.num_decode_rows;
  header.num_sampled = draft.num_sampled;
  header.num_tokens = draft.num_tokens;
  header.num_inits = static_cast<int32_t>(draft.admitted.size());
  header.num_words = draft.num_words;
  header.num_grants = static_cast<int32_t>(draft.grants.size());
  header.num_prompt_tokens = draft.num_prompt_tokens;
  header.num_snapshots = static_cast<int32_t>(draft.snapshots.size());
  header.num_copies = static_cast<int32_t>(draft.copies.size());
  header.num_rewinds = static_cast<int32_t>(draft.rewinds.size());
  header.num_masks = static_cast<int32_t>(draft.masks.size());
  header.num_scored = static_cast<int32_t>(draft.scores.size());

  SectionWriter sections(entry);
  auto* inits = sections.place<RowInit>(draft.admitted.size(), header.inits_offset);
  auto* words = sections.place<int32_t>(draft.num_words, header.words_offset);
  auto* grants = sections.place<BlockGrant>(draft.grants.size(), header.grants_offset);
  auto* step_rows = sections.place<StepRow>(draft.rows.size(), header.rows_offset);
  auto* tokens = sections.place<int32_t>(header.num_prompt_tokens, header.tokens_offset);
  auto* snapshots = sections.place<StateSnapshot>(draft.snapshots.size(), header.snapshots_offset);
  auto* copies = sections.place<StateCopy>(draft.copies.size(), header.copies_offset);
  auto* rewinds = sections.place<RowRewind>(draft.rewinds.size(), header.rewinds_offset);
  auto* mask_rows = sections.place<int32_t>(draft.masks.size(), header.mask_rows_offset);
  const size_t mask_words = draft.masks.empty() ? 0 : draft.masks.front().request->token_mask.size();
  auto* mask_bits = sections.place<uint32_t>(draft.masks.size() * mask_words, header.mask_bits_offset);
  auto* scores = sections.place<ScoredToken>(draft.scores.size(), header.scores_offset);
  header.num_bytes = sections.num_bytes();
  require_integrity(header.num_bytes <= entry_bytes, "a packet is larger than its ring entry");

  std::memcpy(entry, &header, sizeof(header));
  write_inits(draft, rows, inits, words);
  copy_items(grants, draft.grants.data(), draft.grants.size());
  copy_items(step_rows, draft.rows.data(), draft.rows.size());
  write_prompt_tokens(draft, tokens);
  copy_items(snapshots, draft.snapshots.data(), draft.snapshots.size());
  copy_items(copies, draft.copies.data(), draft.copies.size());
  copy_items(rewinds, draft.rewinds.data(), draft.rewinds.size());
  write_masks(draft, mask_rows, mask_bits);
  copy_items(scores, draft.scores.data(), draft.scores.size());
  return header.num_bytes;
}

}  // namespace headway
