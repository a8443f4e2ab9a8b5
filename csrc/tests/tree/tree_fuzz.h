// Random operations on one prefix tree, and on its host tier where it has one, told line by line (main.cpp).
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/host_tier.h"
#include "core/prefix_tree.h"
#include "tests/sim/rng.h"

namespace headway::sim {

class TreeFuzz {
 public:
  TreeFuzz(Rng& rng, bool is_quiet);

  void run_one();
  void drain();  // all that is held is let go; then the tree can spare everything
  void check() const;

 private:
  struct Row {
    int32_t salt;
    int32_t node;
  };

  static constexpr int32_t kNumSalts = 2;

  void say(const char* what, int32_t salt, const std::string& tokens, const std::string& more = "") const;
  static std::string text(std::span<const int32_t> tokens);
  static std::string path(const PrefixTree& tree, int32_t node);
  static int32_t salt_of(const PrefixTree& tree, int32_t node);
  std::string path(int32_t node) const { return path(tree_, node); }
  int32_t salt_of(int32_t node) const { return salt_of(tree_, node); }
  std::vector<int32_t> random_tokens();

  void walk();
  int32_t add(const PrefixTree::Key& key);
  void drop();
  void match();
  void read(int32_t salt, int32_t node);
  void snap();
  void leave();
  void take();
  bool evict();
  void thin();
  void hide();
  void reset();

  void run_tier();
  void save();
  void load();
  void finish();
  bool can_load(int32_t host_node, const PrefixMatch& match) const;
  void say_transfers();
  void say_all(const std::string& what, const std::string& before) const;
  std::string nodes(const PrefixTree& tree) const;

  Rng& rng_;
  const bool is_quiet_;
  const LedgerConfig config_;
  const StepClock clock_;
  BlockPool blocks_;
  SlotPool slots_;
  PrefixTree tree_;
  std::unique_ptr<HostTier> tier_;  // null: there is none
  std::array<int32_t, 2> num_moving_ = {};  // back, out
  std::vector<int32_t> roots_;
  std::vector<Row> rows_;
  Row last_leaf_ = {};
  std::vector<int32_t> last_leaf_tokens_;
};

}  // namespace headway::sim
