#include "core/block_pool.h"
#include "core/error.h"
#include "core/slot_pool.h"
#include "tests/check.h"

namespace headway {
namespace {

LedgerConfig pool_config(int32_t num_ids) {
  LedgerConfig config;
  config.num_blocks = config.num_slots = num_ids;
  config.max_launch_depth = 1;
  return config;
}

}  // namespace

CHECK_CASE(fenced_pool_hands_out_each_id_once_and_never_the_dummy) {
  StepClock clock;
  FencedPool pool(3, 1, clock);
  std::vector<int> times(4, 0);
  while (pool.num_free() > 0) ++times[pool.take()];
  EXPECT_EQ(times[0], 0);
  for (int id = 1; id <= 3; ++id) EXPECT_EQ(times[id], 1);
  EXPECT_THROW(pool.take(), IntegrityError);
  pool.check_integrity("ids");
}

CHECK_CASE(fenced_pool_keeps_an_id_until_its_step_has_retired) {
  StepClock clock{.launched = 6, .retired = 4};
  FencedPool pool(1, 2, clock);
  pool.release(pool.take(), 6);
  EXPECT_EQ(pool.num_fenced(), 1);
  clock.retired = 5;
  pool.retire(5);
  EXPECT_EQ(pool.num_free(), 0);
  pool.check_integrity("ids");
  clock.retired = 6;
  pool.retire(6);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.num_fenced(), 0);
  pool.check_integrity("ids");
}

CHECK_CASE(fenced_pool_frees_at_once_what_no_launched_step_names) {
  StepClock clock{.launched = 6, .retired = 4};
  FencedPool pool(1, 2, clock);
  pool.release(pool.take(), 4);
  EXPECT_EQ(pool.num_free(), 1);
}

CHECK_CASE(fenced_pool_refuses_a_second_release) {
  StepClock clock{.launched = 1, .retired = 0};
  FencedPool pool(2, 1, clock);
  const int32_t id = pool.take();
  pool.release(id, 1);
  EXPECT_THROW(pool.release(id, 1), IntegrityError);
  EXPECT_THROW(pool.release(0, 1), IntegrityError);
}

CHECK_CASE(block_pool_counts_references) {
  StepClock clock;
  BlockPool pool(pool_config(2), clock);
  const int32_t block = pool.acquire();
  EXPECT_EQ(pool.ref_count(block), 1);
  pool.release(block, 0);
  EXPECT_EQ(pool.ref_count(block), 0);
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_THROW(pool.release(block, 0), IntegrityError);
}

CHECK_CASE(slot_ticket_gives_its_slot_back_when_dropped) {
  StepClock clock;
  SlotPool pool(pool_config(1), clock);
  {
    const SlotTicket ticket = pool.acquire();
    EXPECT_EQ(ticket.slot(), 1);
    EXPECT_TRUE(!pool.has_room());
  }
  EXPECT_EQ(pool.num_free(), 1);
}

CHECK_CASE(slot_ticket_dropped_in_flight_waits_for_the_newest_step) {
  StepClock clock{.launched = 2, .retired = 1};
  SlotPool pool(pool_config(1), clock);
  {
    const SlotTicket ticket = pool.acquire();
  }
  EXPECT_EQ(pool.num_fenced(), 1);
  clock.retired = 2;
  pool.retire(2);
  EXPECT_EQ(pool.num_free(), 1);
}

CHECK_CASE(slot_ticket_moves_its_ownership) {
  StepClock clock;
  SlotPool pool(pool_config(2), clock);
  SlotTicket first = pool.acquire();
  SlotTicket second = std::move(first);
  EXPECT_EQ(pool.num_free(), 1);
  second = SlotTicket();
  EXPECT_EQ(pool.num_free(), 2);
}

CHECK_CASE(slot_pool_without_slots_hands_out_the_dummy) {
  StepClock clock;
  SlotPool pool(pool_config(0), clock);
  EXPECT_TRUE(pool.has_room());
  EXPECT_EQ(pool.acquire().slot(), kDummySlot);
}

}  // namespace headway
