"""Mutants of what ranks exchange block by block, of what they agree on, and of runs that are taken up again."""

from __future__ import annotations

from mutant import Mutant

RING = "tests/test_distributed_ring.py::test_ranks"
AGREEMENT = "tests/test_distributed_agreement.py::test_ranks"
RESUME = "tests/test_trainer_resume.py::"

RANKS_FILE, JOINING_FILE = "fastcl/distributed.py", "fastcl/ops/joining.py"
EXCHANGE = [
    Mutant(
        "the same block handed on for ever",
        RANKS_FILE,
        "held, owner = coming, source",
        "held, owner = held, source",
        RING + "[blocks_come_while_others_are_worked_on-3]",
    ),
    Mutant(
        "every block has the first rank's numbers",
        RANKS_FILE,
        "x[self.first : self.first + self.rows.shape[0]]",
        "x[: self.rows.shape[0]]",
        RING + "[contract-2]",
    ),
    Mutant(
        "log-sum-exp of the largest block",
        JOINING_FILE,
        "torch.logaddexp(total[0], lse)",
        "torch.maximum(total[0], lse)",
        RING + "[contract-2]",
    ),
    Mutant(
        "sums of the positives of the first block",
        JOINING_FILE,
        "(x + y for x, y in",
        "(x + 0 * y for x, y in",
        RING + "[contract_of_pairs-family=supcon-3]",
    ),
    Mutant(
        "gradient of the first block",
        JOINING_FILE,
        "x.add_(y) for",
        "x.add_(0 * y) for",
        RING + "[contract-2]",
    ),
    Mutant(
        "every block taken for the first rank's",
        "fastcl/ops/similarity.py",
        "scale, ctx.bound, first - block.first,",
        "scale, ctx.bound, first,",
        RING + "[contract-2]",
    ),
    Mutant(
        "columns' log-sum-exp in the order of their arrival",
        "fastcl/ops/pairs.py",
        "sorted(ends, key=lambda end: end[0])",
        "ends",
        RING + "[contract_of_pairs-family=clip-3]",
    ),
    Mutant(
        "a rank that dies is not named",
        RANKS_FILE,
        'f"{name}: {what} over ranks failed: {error}"',
        'f"{error}"',
        "tests/test_distributed_ring.py::test_a_rank_that_dies_is_noticed[backward-ring]",
    ),
]
AGREED = [
    Mutant(
        "ranks differ on who gets a gradient",
        "fastcl/losses/clip.py",
        'own = {"requires_grad": needs_grad(image, text, logit_scale)}',
        "own = {}",
        AGREEMENT + "[gradients_are_wanted_together-2]",
    ),
    Mutant(
        "gradients that nobody records are wanted",
        "fastcl/losses/batch.py",
        'torch.is_grad_enabled() and getattr(x, "requires_grad", False)',
        'getattr(x, "requires_grad", False)',
        AGREEMENT + "[gradients_are_wanted_together-2]",
    ),
    Mutant(
        "memories of other sizes",
        "fastcl/memory.py",
        '"size": len(rows)',
        '"size": 0',
        AGREEMENT + "[memories_of_other_sizes-2]",
    ),
    Mutant(
        "rows where the group does not work",
        RANKS_FILE,
        "if x.device.type not in backends:",
        "if False:",
        AGREEMENT + "[a_group_of_nccl_without_a_gpu-2]",
    ),
    Mutant(
        "ids without keys of the batch ignored",
        "fastcl/losses/info_nce.py",
        "if not within and (given",
        "if False and (given",
        "tests/test_pair_inputs.py::test_refused_by_name[info_nce ids of a queue]",
    ),
    Mutant(
        "a NaN stays in the bank",
        "fastcl/memory.py",
        "torch.where(mixed.isfinite().all(1, keepdim=True), mixed, old)",
        "mixed",
        "tests/test_pair_good_inputs.py::test_a_feature_that_is_not_finite_leaves_its_row",
    ),
    Mutant(
        "PML: the very labels say nothing",
        "fastcl/integrations/pytorch_metric_learning.py",
        "diagonal = ref_labels is labels",
        "diagonal = False",
        "tests/test_integrations_pytorch_metric_learning.py::test_reference_rows_with_the_very_labels",
    ),
]
RESUMED = [
    Mutant(
        "batches start anew",
        "examples/simclr/batches.py",
        "divmod(self.done * self.batch, self.length)",
        "divmod(0, self.length)",
        RESUME + "test_one_process",
    ),
]

CACHE_FILE = "fastcl/gradient_cache.py"
CACHE, CACHE_RANKS = "tests/test_gradient_cache.py::", "tests/test_gradient_cache_ranks.py::test_ranks"
CACHED = [
    Mutant(
        "second pass with other random numbers",
        CACHE_FILE,
        "torch.set_rng_state(self.cpu)",
        "torch.get_rng_state()",
        CACHE + "test_dropout_and_the_generator_afterwards[3-True]",
    ),
    Mutant(
        "gradients reduced in every chunk",
        CACHE_FILE,
        "if last or not isinstance(encode, nn.Module):",
        "if True:",
        CACHE_RANKS + "[one_reduction_for_each_bucket-2]",
    ),
    Mutant(
        "gradients never reduced",
        CACHE_FILE,
        "index == last[id(part.encode)]",
        "False",
        CACHE_RANKS + "[one_reduction_for_each_bucket-2]",
    ),
    Mutant(
        "ranks order the exchanges of a compiled loss by themselves",
        RANKS_FILE,
        "if torch.compiler.is_compiling():",
        "if False:",
        "tests/test_distributed_compiled.py::test_ranks[all_compiled-what=siglip-2]",
    ),
]
MUTANTS = [*EXCHANGE, *AGREED, *RESUMED, *CACHED]
