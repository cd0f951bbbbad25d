"""Every loss that compares rows: formula, what it replaces, and its measured memory.

    python benchmarks/loss_table.py
    python benchmarks/loss_table.py --m 8192 --d 128 --out losses.md

Prints a markdown table. MiB is the peak of forward + backward beyond the inputs at M rows (both views, all four views,
both operands together, or the rows of the queue or bank of 256 queries) of D features in float32; "eager" is that of
`benchmarks/eager.py`, "-" where it has no such form. A matrix of M x M float32 alone takes 4 M^2 bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import memory, reporting
from benchmarks.workloads import WORKLOADS

# Workload: (name, formula, peers' classes). lse: log-sum-exp; S: products / temperature; p: the positive.
LOSSES = {
    "nt_xent": ("`nt_xent`", "lse over k ≠ i of S_ik, less S_ip", "lightly `NTXentLoss`"),
    "nt_xent_views": ("`nt_xent_views`", "the same, mean over all other views p", "-"),
    "dcl_loss": ("`dcl_loss`", "lse over k ≠ i, p, less S_ip", "lightly `DCLLoss`"),
    "decoupled_nt_xent": ("`decoupled_nt_xent`", "weight · lse over k ≠ i, less ⟨z_i, z_p⟩", "-"),
    "supcon_loss": (
        "`supcon_loss`", "lse over k ≠ i, less the mean over p of S_ip", "pytorch-metric-learning `SupConLoss`",
    ),
    "info_nce": (
        "`info_nce`, in-batch", "lse over keys, less S_ii",
        "sentence-transformers `MultipleNegativesRankingLoss`, `CachedMultipleNegativesRankingLoss`",
    ),
    "info_nce, queue": (
        "`info_nce`, queue", "lse over key and queue, less S_ii", "lightly `NTXentLoss(memory_bank_size=...)`",
    ),
    "clip_loss": ("`clip_loss`", "lse over rows and over columns, less S_ii", "open_clip `ClipLoss`"),
    "siglip_loss": ("`siglip_loss`", "softplus of ±(S_ij + bias), summed over j", "open_clip `SigLipLoss`"),
    "instance_discrimination_loss": ("`instance_discrimination_loss`", "lse over the bank, less the own row", "-"),
    "uniformity_loss": ("`uniformity_loss`", "lse of −t ‖z_i − z_j‖² over all pairs", "-"),
    "contrastive_stats": ("`contrastive_stats`", "top-1, similarities, entropy", "-"),
}  # fmt: skip
# Two operands of M / 2 rows each make M rows.
HALVED = ("clip_loss", "siglip_loss")


def markdown(m: int, d: int) -> str:
    cases = [
        memory.Case(side, m // 2 if kind in HALVED else m, d, kind=kind)
        for kind in LOSSES for side in ("fastcl", "eager") if side in WORKLOADS[kind].sides
    ]  # fmt: skip
    peaks = {(case.kind, case.side): peak for case, peak in zip(cases, memory.resident_peaks(cases), strict=True)}
    lines = [
        [*text, *(reporting.mebibytes(peaks.get((kind, side))) for side in ("fastcl", "eager"))]
        for kind, text in LOSSES.items()
    ]
    size = f"M = {m:,}, D = {d}"
    return reporting.table(["loss", "of row i", "replaces", f"MiB, {size}", "eager MiB"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=8192, help="rows")
    parser.add_argument("--d", type=int, default=128, help="features")
    parser.add_argument("--out", type=Path, help="write the table here")
    args = parser.parse_args()
    if args.m < 1024 or args.m % 4 or args.d < 1:
        parser.error(f"--m must be a multiple of 4 and at least 1024, --d at least 1, got {args.m} and {args.d}")
    table = markdown(args.m, args.d)
    print(table)
    if args.out:
        args.out.write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
