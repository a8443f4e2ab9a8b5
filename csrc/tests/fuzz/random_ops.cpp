#include "tests/fuzz/random_ops.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "tests/check.h"

namespace headway::sim {

RandomOps::RandomOps(Host& host, Rng& rng, int32_t max_unfinished)
    : host_(host), rng_(rng), max_unfinished_(max_unfinished), device_delay_(rng.draw(1, 6)) {
  const auto set = [this](Op op, int32_t weight) { weights_[static_cast<size_t>(op)] = weight; };
  set(Op::kAdd, rng.draw(2, 12));
  set(Op::kAddInvalid, rng.draw(0, 1));
  set(Op::kPlan, rng.draw(15, 40));
  set(Op::kCommit, rng.draw(15, 40));
  for (const Op op : {Op::kAbort, Op::kPause, Op::kResume, Op::kEvict, Op::kFinish, Op::kRewind}) {
    set(op, rng.one_in(3) ? 0 : rng.draw(1, 4));
  }
  set(Op::kRead, 1);
  set(Op::kResetCache, rng.one_in(8));
  total_weight_ = std::accumulate(weights_, weights_ + kNumOps, 0);
}

void RandomOps::run_one() {
  while (rng_.one_in(device_delay_) && host_.device.advance()) {
  }
  while (rng_.one_in(device_delay_) && host_.run_transfer(rng_.one_in(2))) {
  }
  const Op op = draw_op();
  num_done_[static_cast<size_t>(op)] += run(op);
}

Op RandomOps::draw_op() {
  const bool rewinds = weights_[static_cast<size_t>(Op::kRewind)] > 0;
  if (rewinds && rng_.one_in(2) && find_recomputed() != 0) return Op::kRewind;
  int32_t left = rng_.draw(0, total_weight_ - 1);
  int32_t op = 0;
  while (left >= weights_[op]) left -= weights_[op++];
  return static_cast<Op>(op);
}

bool RandomOps::run(Op op) {
  switch (op) {
    case Op::kAdd:
      return add();
    case Op::kAddInvalid:
      return add_invalid();
    case Op::kPlan:
      return host_.plan();
    case Op::kCommit:
      return host_.commit();
    case Op::kAbort:
      return host_.client.abort(draw_id());
    case Op::kPause:
      return host_.pause(draw_id());
    case Op::kResume:
      return host_.resume(draw_id());
    case Op::kEvict:
      return host_.evict(draw_id());
    case Op::kFinish:
      return finish();
    case Op::kRewind:
      return rewind();
    case Op::kResetCache:
      host_.reset_prefix_cache();
      break;
    case Op::kRead:
      read();
  }
  return true;
}

bool RandomOps::add() {
  if (host_.client.num_unfinished() >= max_unfinished_) return false;
  const auto number = static_cast<uint64_t>(host_.client.newest_id()) + 1;
  RequestSpec request = random_request(rng_, host_.ledger.config(), number);
  begin_like(rng_, host_.ledger.config(), host_.client.tokens_of_one(rng_), request);
  const bool is_added = host_.client.add(request) != 0;
  if (!rng_.one_in(4)) return is_added;
  RequestSpec twin = random_request(rng_, host_.ledger.config(), number + is_added);
  twin.prompt = request.prompt;
  return host_.client.add(twin) != 0;
}

bool RandomOps::add_invalid() {
  const RequestSpec spec = invalid_request(rng_, host_.ledger.config());
  const Stats before = host_.ledger.stats();
  EXPECT_THROW(host_.ledger.add(spec.prompt, spec.sampling, spec.max_new_tokens), RequestError);
  EXPECT_EQ(host_.ledger.stats().num_waiting, before.num_waiting);
  return true;
}

// The host's own stop at any time, keeping any part of the outputs.
bool RandomOps::finish() {
  const int64_t id = draw_id();
  const Conversation* conversation = host_.client.find(id);
  const bool is_open = conversation != nullptr && !conversation->is_over();
  const auto num_outputs = is_open ? static_cast<int32_t>(conversation->outputs.size()) : 0;
  if (is_open && rng_.one_in(4)) {
    EXPECT_THROW(host_.ledger.finish(id, rng_.one_in(2) ? -1 : num_outputs + 1), RequestError);
    return false;
  }
  return host_.client.finish(id, rng_.draw(0, num_outputs));
}

// Mostly by a few positions, at times by more than there are.
bool RandomOps::rewind() {
  const int64_t recomputed = rng_.one_in(4) ? 0 : find_recomputed();
  const int64_t id = recomputed != 0 ? recomputed : draw_id();
  return host_.client.rewind(id, rng_.one_in(16) ? rng_.draw(-1, 40) : rng_.draw(0, 4));
}

// A request whose prompt, outputs among it, is computed in part: seldom and not for long; 0: there is none.
int64_t RandomOps::find_recomputed() const {
  const RowTable& rows = host_.ledger.rows();
  for (const int32_t row : rows.running()) {
    const bool is_cut = !rows.is_decoding(row) && rows.launched_len(row) > 0;
    if (is_cut && rows.request(row)->num_outputs() > 0) return rows.request(row)->id;
  }
  return 0;
}

void RandomOps::read() {
  const int64_t id = draw_id();
  host_.client.check_outputs(id);
  if (host_.ledger.find(id) == nullptr) EXPECT_THROW(host_.ledger.output_tokens(id), RequestError);
}

// Mostly one that lives, at times one that is over, forgotten or never was.
int64_t RandomOps::draw_id() {
  const auto newest = static_cast<int32_t>(host_.client.newest_id());
  return rng_.one_in(16) ? rng_.draw(-1, newest + 1) : rng_.draw(std::max(1, newest - 2 * max_unfinished_), newest + 1);
}

}  // namespace headway::sim
