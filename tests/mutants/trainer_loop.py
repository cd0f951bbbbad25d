"""Mutants of the trainer's methods and of its loop."""

from __future__ import annotations

from mutant import Mutant

METHODS, METHODS_TEST = "examples/simclr/methods.py", "tests/test_trainer_methods.py::test_"
TRAIN, LOOP_TEST = "examples/simclr/train.py", "tests/test_trainer_loop.py::test_"

MUTANTS = [
    Mutant(
        "hard negatives that nobody looks at",
        METHODS,
        "self.temperature, negative_indices=chosen",
        "self.temperature, negative_indices=None",
        METHODS_TEST + "moco_with_hard_negatives_sees_the_chosen_keys",
    ),
    Mutant(
        "keys in the order that they went through the network",
        METHODS,
        "[order.argsort()], self.queue.rows",
        ", self.queue.rows",
        METHODS_TEST + "moco_keys_are_those_of_the_second_view_in_the_queries_order",
    ),
    Mutant(
        "MoCo's top-1 among its own keys",
        METHODS,
        "return nearest_is_positive(rows[0], keys, queue)",
        "return nearest_is_positive(rows[0], keys, self.queue.rows)",
        METHODS_TEST + "moco_is_cross_entropy_of_the_key_against_the_queue",
    ),
    Mutant(
        "the moving average moves the wrong share",
        METHODS,
        "parameter.lerp_(live[name], 1 - momentum)",
        "parameter.lerp_(live[name], momentum)",
        METHODS_TEST + "moco_update_enqueues_and_averages",
    ),
    Mutant(
        "BYOL predicts its own view",
        METHODS,
        "alignment_loss(rows[0], targets[1]) + alignment_loss(rows[1], targets[0])",
        "alignment_loss(rows[0], targets[0]) + alignment_loss(rows[1], targets[1])",
        METHODS_TEST + "byol_is_two_minus_two_cosines_of_the_other_view",
    ),
    Mutant(
        "BYOL's momentum stays as it is",
        METHODS,
        "(math.cos(math.pi * progress) + 1) / 2)",
        "(math.cos(0.0 * progress) + 1) / 2)",
        METHODS_TEST + "byol_momentum_grows_to_one",
    ),
    Mutant(
        "the loss is not scaled for float16",
        TRAIN,
        "return self.scaler.scale(loss)",
        "return loss",
        LOOP_TEST + "fp16_takes_the_gradients_of_fp32",
    ),
    Mutant(
        "half of the rows' gradient",
        TRAIN,
        "rows.backward(leaf.grad)",
        "rows.backward(leaf.grad / 2)",
        LOOP_TEST + "the_split_backward_is_the_plain_one_to_the_bit",
    ),
    Mutant(
        "losses that are not finite pass",
        TRAIN,
        "if not math.isfinite(value):",
        "if False:",
        LOOP_TEST + "nan_names_its_step_and_the_last_checkpoint",
    ),
    Mutant(
        "a network that is not finite is kept",
        TRAIN,
        "if not torch.stack(finite).all():",
        "if False:",
        LOOP_TEST + "a_ruined_network_is_not_kept",
    ),
    Mutant(
        "SIGTERM ends the processes that read pictures",
        "examples/simclr/batches.py",
        "os.setpgrp()",
        "pass",
        LOOP_TEST + "a_signal_leaves_a_checkpoint",
    ),
    Mutant(
        "the log's seconds of a loss are the encoder's",
        "examples/simclr/clock.py",
        "self._parts.append(part)",
        'self._parts.append("a" if part else part)',
        LOOP_TEST + "clock_tells_the_parts_apart",
    ),
]
