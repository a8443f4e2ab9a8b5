"""Times the kernels on the device present, beside their byte floors and the peers installed, in one table.

usage: python -m bench.ops [--all | --only NAME ...] [--out FILE] [--commit HASH]

Without arguments the shapes that docs/performance.md speaks of, in under a minute on a GPU, or some minutes where vLLM
is installed. The floor is a kernel's fewest bytes over the copy bandwidth measured in the same run. A peer that fails
leaves its reason in its cell.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.ops import bench_attention, bench_layer, bench_linear, bench_mamba, bench_moe, bench_sample
from bench.ops.command import add_arguments
from bench.ops.report import Report
from bench.ops.timing import bytes_per_us

GPU_BENCHES = (bench_attention, bench_moe, bench_sample, bench_linear, bench_layer, bench_mamba)
CPU_BENCHES = (bench_layer,)
HEADLINES = (
    "decode/nano30b/b1/8192",
    "decode/nano30b/b8/8192",
    "decode/nano30b/b64/8192",
    "decode/nano30b/b256/1024",
    "decode/gqa4/b64/8192",
    "decode/nano9b/b64/8192",
    "verify4/nano30b",
    "prefill/nano30b",
    "prefill/nano9b/1x8192",
    "prefill/gqa4/1x8192",
    "prefill/hd64/1x8192",
    "prefill/mha/1x8192",
    *(f"experts/nano30b/b{batch}" for batch in (1, 8, 64, 256)),
    *(
        f"sample/{kind}/b64/v131072"
        for kind in ("greedy", "temperature", "top_p", "top_k_top_p", "penalties")
    ),
    *(
        f"norm_linear/nano9b/{name}/b{batch}"
        for name in ("in_proj", "out_proj", "mlp_out")
        for batch in (1, 8)
    ),
    *(f"layer/nano30b/b64/{op}" for op in ("add_rms_norm", "gated_rms_norm", "rotary", "kv_write", "route")),
    *(f"{kernel}/{shape}" for kernel in ("ssd", "conv") for shape in bench_mamba.SHAPES),
    *(
        f"{kernel}/{shape}/8x2048"
        for kernel in ("gated_norm_prefill", "chain")
        for shape in bench_mamba.SHAPES
    ),
    *(
        f"{kernel}/{shape}/b{batch}"
        for kernel in ("decode_chain", "decode_window")
        for shape in bench_mamba.SHAPES
        for batch in (1, 8, 64, 256)
    ),
    *(f"decode_window_4_tokens/{shape}/b64" for shape in bench_mamba.SHAPES),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--all", action="store_true", help="every shape")
    arguments = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    chosen = () if arguments.all or not is_cuda else HEADLINES
    report = Report(bytes_per_us(), tuple(arguments.only) or chosen, arguments.out, arguments.commit)
    for bench in GPU_BENCHES if is_cuda else CPU_BENCHES:
        bench.run(report)
    report.write()
    if not report.results:
        print("nothing is called that; --all --out FILE has all names", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
