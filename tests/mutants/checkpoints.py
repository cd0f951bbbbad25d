"""Mutants of the trainer's checkpoints: what a run is taken up from, and the files it lies in."""

from __future__ import annotations

from mutant import Mutant

FILE, FILES = "examples/simclr/checkpoint.py", "examples/simclr/files.py"
CHECKPOINT, ON_DISK = "tests/test_trainer_checkpoint.py::", "tests/test_trainer_checkpoint_files.py::"
RESUME = "tests/test_trainer_resume.py::"
BESIDE = """            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
"""
READ = [
    Mutant(
        "the hash of a checkpoint is not compared",
        FILE,
        "if found != digest:",
        "if False:",
        CHECKPOINT + "test_damaged_files_are_refused_and_not_unpickled",
    ),
    Mutant(
        "the hash of a checkpoint is compared after it was unpickled",
        FILE,
        "    found = hashlib.sha256(payload).digest()\n",
        "    _unpack(path, payload)\n    found = hashlib.sha256(payload).digest()\n",
        CHECKPOINT + "test_damaged_files_are_refused_and_not_unpickled",
    ),
    Mutant(
        "a byte of the magic is not compared",
        FILE,
        "if not header.startswith(MAGIC):",
        "if header[: len(MAGIC) - 1] != MAGIC[:-1]:",
        CHECKPOINT + "test_every_bit_of_the_header_counts",
    ),
    Mutant(
        "the length of a checkpoint is not compared",
        FILE,
        "if size != HEADER.size + length:",
        "if False:",
        CHECKPOINT + "test_every_bit_of_the_header_counts",
    ),
    Mutant(
        "a checkpoint of this trainer may hold any pickle",
        FILE,
        "weights_only=True",
        "weights_only=False",
        CHECKPOINT + "test_a_whole_file_of_something_else_is_refused[pickle]",
    ),
]
KEPT = [
    Mutant(
        "one checkpoint too many is kept",
        FILE,
        "older[self.keep - 1 :]",
        "older[self.keep :]",
        CHECKPOINT + "test_the_newest_are_kept",
    ),
    Mutant(
        "checkpoints of later steps are removed",
        FILE,
        "if saved < step]",
        "if saved != step]",
        CHECKPOINT + "test_the_newest_are_kept",
    ),
    Mutant(
        "the best is the last",
        FILE,
        "if score > self.best:",
        "if True:",
        CHECKPOINT + "test_the_best_is_kept_and_its_score_too",
    ),
    Mutant(
        "the best score starts anew",
        FILE,
        "self.best = self._score(best)",
        "self._score(best)",
        CHECKPOINT + "test_the_best_is_kept_and_its_score_too",
    ),
    Mutant(
        "the best of another run counts",
        FILE,
        "        self._check(best, contents)\n",
        "",
        CHECKPOINT + "test_the_best_of_another_run_is_refused",
    ),
    Mutant(
        "leftovers stay",
        FILE,
        'self.folder.glob("*.ckpt.tmp")',
        'self.folder.glob("*.none")',
        CHECKPOINT + "test_leftovers_of_killed_runs_are_removed",
    ),
]
LOADED = [
    Mutant(
        "the optimizer starts anew",
        FILE,
        'module.load_state_dict(contents["modules"][name])',
        'name == "optimizer" or module.load_state_dict(contents["modules"][name])',
        RESUME + "test_killed_and_taken_up_again",
    ),
    Mutant(
        "random numbers start anew",
        FILE,
        'torch.set_rng_state(state["cpu"])',
        "torch.get_rng_state()",
        CHECKPOINT + "test_states_and_random_numbers_come_back",
    ),
    Mutant(
        "a checkpoint of other settings",
        FILE,
        "if expected != got:",
        "if False:",
        CHECKPOINT + "test_another_run_is_refused[a value]",
    ),
    Mutant(
        "a setting that was not there before is no difference",
        FILE,
        "for key in {**own, **saved}:",
        "for key in saved:",
        CHECKPOINT + "test_another_run_is_refused[a new setting]",
    ),
    Mutant(
        "another number of processes",
        FILE,
        'if len(contents["random"]) != self.world:',
        "if False:",
        CHECKPOINT + "test_another_run_is_refused[processes]",
    ),
    Mutant(
        "the newest checkpoint by name",
        FILE,
        "if match), reverse=True)",
        "if match), key=lambda pair: pair[1].name, reverse=True)",
        CHECKPOINT + "test_auto_falls_back_and_says_so",
    ),
    Mutant(
        "a run begins beside the checkpoints of another",
        FILE,
        "            if found:\n",
        "            if False:\n",
        CHECKPOINT + "test_a_run_from_its_start_leaves_others_alone",
    ),
]
WRITTEN = [
    Mutant(
        "a checkpoint is written in place",
        FILES,
        BESIDE + "            os.replace(temporary, path)\n",
        BESIDE.replace("temporary", "path"),
        ON_DISK + "test_files_are_on_the_disk_before_they_take_their_place",
    ),
    Mutant(
        "a checkpoint takes its place before it is on the disk",
        FILES,
        "os.fsync(file.fileno())",
        "pass",
        ON_DISK + "test_files_are_on_the_disk_before_they_take_their_place",
    ),
    Mutant(
        "the name of a checkpoint is not on the disk",
        FILES,
        "        _sync_folder(path.parent)\n",
        "",
        ON_DISK + "test_files_are_on_the_disk_before_they_take_their_place",
    ),
    Mutant(
        "half of a checkpoint stays on a full disk",
        FILES,
        "temporary.unlink(missing_ok=True)",
        "pass",
        ON_DISK + "test_a_full_disk[28]",
    ),
    Mutant(
        "folders have to be synchronised everywhere",
        FILES,
        "if error.errno not in (errno.EINVAL, errno.ENOTSUP):",
        "if True:",
        ON_DISK + "test_folders_that_cannot_be_synchronised",
    ),
    Mutant(
        "a folder that is not synchronised passes",
        FILES,
        "if error.errno not in (errno.EINVAL, errno.ENOTSUP):",
        "if False:",
        ON_DISK + "test_folders_that_cannot_be_synchronised",
    ),
    Mutant(
        "ranks take random numbers of rank 0",
        FILE,
        'contents["random"][self.rank]',
        'contents["random"][0]',
        ON_DISK + "test_ranks[save_and_load]",
    ),
    Mutant(
        "what rank 0 could not do is its own affair",
        FILE,
        "result, failure = outcome[0], failure or outcome[1]",
        "result = outcome[0]",
        ON_DISK + "test_ranks[failures_reach_all]",
    ),
    Mutant(
        "an encoder with weights of its own",
        FILE,
        "    encoder.load_state_dict(weights)\n",
        "",
        ON_DISK + "test_an_exported_encoder_is_the_same[convnet-48]",
    ),
]
MUTANTS = [*READ, *KEPT, *LOADED, *WRITTEN]
