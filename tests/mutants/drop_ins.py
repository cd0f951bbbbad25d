"""Mutants of the drop-ins under the names of other libraries; their tests need those libraries."""

from __future__ import annotations

from mutant import Mutant

LIGHTLY, OPEN_CLIP = "tests/test_integrations_lightly.py::", "tests/test_integrations_open_clip.py::"
METRIC = "tests/test_integrations_pytorch_metric_learning.py::"
RANKING = "tests/test_integrations_sentence_transformers.py::"
DROP_IN_RANKS = "tests/test_integrations_ranks.py::test_ranks"
LIGHTLY_FILE, OPEN_CLIP_FILE = "fastcl/integrations/lightly.py", "fastcl/integrations/open_clip.py"
METRIC_FILE = "fastcl/integrations/pytorch_metric_learning.py"
RANKING_FILE = "fastcl/integrations/sentence_transformers.py"
MUTANTS = [
    Mutant(
        "lightly: keys run over the end of the bank",
        LIGHTLY_FILE,
        "keys[: len(self.rows) - int(self.position)]",
        "keys[: len(self.rows)]",
        LIGHTLY + "test_bank_over_steps[(4, 4, 4, 4)]",
    ),
    Mutant(
        "lightly: the bank has the keys before the loss",
        LIGHTLY_FILE,
        "        loss = info_nce(out0,",
        "        self.memory_bank.enqueue(out1)\n        loss = info_nce(out0,",
        LIGHTLY + "test_bank_over_steps[(5, 5, 5)]",
    ),
    Mutant(
        "lightly: an evaluation fills the bank",
        LIGHTLY_FILE,
        "if out0.requires_grad and torch.is_grad_enabled():",
        "if True:",
        LIGHTLY + "test_bank_is_kept_where_nothing_is_learned",
    ),
    Mutant(
        "lightly: bank of this rank's keys",
        LIGHTLY_FILE,
        "keys = batch.ranks.gather_rows(keys)",
        "keys = keys * 1",
        DROP_IN_RANKS + "[lightly_fills_its_bank_from_all_ranks-2]",
    ),
    Mutant(
        "open_clip: a bias that moves the loss",
        OPEN_CLIP_FILE,
        "loss = loss + 0.0 * logit_bias.sum()",
        "loss = loss + 0.01 * logit_bias.sum()",
        OPEN_CLIP + "test_bias_of_a_softmax_has_a_gradient_of_zero",
    ),
    Mutant(
        "open_clip: one process over all ranks",
        OPEN_CLIP_FILE,
        'return "local"',
        "return None",
        DROP_IN_RANKS + "[open_clip_of_one_process-2]",
    ),
    Mutant(
        "PML: rows count as their own positives",
        METRIC_FILE,
        "(len(ids) if diagonal else 0)",
        "0",
        METRIC + "test_value_and_gradient[NTXentLoss-NTXentLoss-some of each-0.3]",
    ),
    Mutant(
        "PML: other positives are negatives",
        METRIC_FILE,
        'z, scale, ids, "drop", dtype',
        'z, scale, ids, "keep", dtype',
        METRIC + "test_value_and_gradient[NTXentLoss-NTXentLoss-some of each-0.3]",
    ),
    Mutant(
        "PML: one label alone has a loss",
        METRIC_FILE,
        "torch.where((ids != ids[:1]).any(), loss, 0.0)",
        "loss",
        METRIC + "test_value_and_gradient[SupConLoss-SupConLoss-all the same-0.3]",
    ),
    Mutant(
        "sentence_transformers: one column of hard negatives",
        RANKING_FILE,
        "enumerate(rest)])",
        "enumerate(rest[:2])])",
        RANKING + "test_columns[5-2-forward]",
    ),
    Mutant(
        "sentence_transformers: both directions added",
        RANKING_FILE,
        "(loss + reduce_rows(back, \"mean\", batch)) / 2",
        "loss + reduce_rows(back, \"mean\", batch)",
        RANKING + "test_columns[3-2-symmetric]",
    ),
    Mutant(
        "sentence_transformers: hard negatives of this rank",
        RANKING_FILE,
        "False, own, dtype, bound, batch.ranks, NAME",
        "False, own, dtype, bound, batch.ranks if own else None, NAME",
        DROP_IN_RANKS + "[ranking-symmetric=False-2]",
    ),
]
