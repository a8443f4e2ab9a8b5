// headway_tree [--ops N] [--seed S] [--quiet 1]
//
// Random operations on prefix trees with tiny pools, hash values of one bit up to all, and few different tokens, so
// that prefixes meet. Each operation and what the tree answered goes to standard output as one line, for a trie in
// Python (tests/core/prefix_model.py) to judge; with --quiet only integrity is checked. A tree lives for some hundred
// operations.
//
//   new BLOCK_SIZE HAS_BLOCKS HAS_STATES HOST_BLOCKS HOST_SLOTS HOST_NODES   a tree, with a host tier or without
//   hold SALT TOKENS                       a row that has pinned all above finds this node and pins it
//   add SALT TOKENS BLOCK                  or does not find it, adds and pins it
//   drop SALT TOKENS                       a row of that path unpins it
//   match SALT TOKENS KV START             tokens whose KV is there, and where computing could begin
//   snap SALT TOKENS SLOT                  a snapshot at the path's end; 0: there is one already
//   read SALT TOKENS                       of that snapshot, in a step that is retired at once
//   leaf SALT TOKENS BLOCK SLOT            a sequence that ended within a block leaves a short node with its snapshot
//   take SALT TOKENS                       and another row takes it
//   evict SALT TOKENS | evict -            the leaf that went, or none could
//   thin SALT TOKENS | thin -              the snapshot that went
//   hide SALT TOKENS                       a failed request's node is detached
//   reset
//
// Of the host tier, with all nodes that can be found as SALT/TOKENS/BLOCK/SLOT/KIND: the device's before and after, and
// the host's.
//
//   move out|in SOURCE>TARGET ... / SOURCE>TARGET ...   a copy of blocks and of slots that is begun
//   save | BEFORE | AFTER | HOST           what is evicted soon moves out
//   seek SALT TOKENS END                   where a prompt could go on if that came back; 0: nowhere further
//   load SALT TOKENS | BEFORE | AFTER | HOST   it is to come back
//   finish | BEFORE | AFTER | HOST         the oldest copy is done
#include <cstdio>
#include <exception>

#include "tests/sim/options.h"
#include "tests/sim/rng.h"
#include "tests/tree/tree_fuzz.h"

int main(int argc, char** argv) {
  using namespace headway::sim;
  const Options options(argc, argv, {"--ops", "--seed", "--quiet"});
  const int64_t num_ops = options.get("--ops", 100000);
  Rng rng(static_cast<uint64_t>(options.get("--seed", 1)));
  try {
    for (int64_t op = 0; op < num_ops;) {
      TreeFuzz fuzz(rng, options.get("--quiet", 0) != 0);
      for (const int64_t end = op + rng.draw(50, 500); op < end; ++op) {
        fuzz.run_one();
        fuzz.check();
      }
      fuzz.drain();
      fuzz.check();
    }
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
  std::printf("end\n");
  return 0;
}
