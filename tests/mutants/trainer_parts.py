"""Mistakes in what the trainer of examples/ learns from and with: batches, views, encoders, heads, norms, steps."""

from __future__ import annotations

from mutant import Mutant

AUGMENT, BACKBONES, BATCHES = (f"examples/simclr/{name}.py" for name in ("augment", "backbones", "batches"))
DATA, MODEL, OPTIM = (f"examples/simclr/{name}.py" for name in ("data", "model", "optim"))
TEST_AUGMENT, TEST_DATA, TEST_MODEL, TEST_OPTIM = (
    f"tests/test_trainer_{name}.py::test_" for name in ("augment", "data", "model", "optim")
)

DEALT = [
    Mutant(
        "a batch has a picture of both epochs",
        BATCHES,
        "torch.cat([head[~again], head[again], tail])",
        "torch.cat([head, tail])",
        TEST_DATA + "every_epoch_has_every_picture_once[0-50-16-3]",
    ),
    Mutant(
        "pictures that would repeat are lost",
        BATCHES,
        "torch.cat([head[~again], head[again], tail])",
        "torch.cat([head[~again], tail, tail])[: self.length]",
        TEST_DATA + "every_epoch_has_every_picture_once[0-50-16-3]",
    ),
    Mutant(
        "an order follows from the last one alone",
        BATCHES,
        "if self.length >= 2 * self.batch else 0",
        "if self.length >= self.batch else 0",
        TEST_DATA + "going_on_is_going_there[10-9-1]",
    ),
    Mutant(
        "all orders are drawn to go on late",
        BATCHES,
        "epoch = max(0, first - 1) if",
        "epoch = 0 if",
        TEST_DATA + "going_on_late_draws_few_orders",
    ),
    Mutant(
        "every epoch has one order",
        BATCHES,
        "seed_of(self.seed, epoch, self.length)",
        "seed_of(self.seed, 0, self.length)",
        TEST_DATA + "orders_differ_from_epoch_to_epoch_and_by_seed",
    ),
    Mutant(
        "ranks with overlapping shares",
        BATCHES,
        "(rank + 1) * batch // world)",
        "(rank + 1) * batch // world + 1)",
        TEST_DATA + "ranks_share_every_batch[50-16-3]",
    ),
    Mutant(
        "the last epoch is not whole",
        BATCHES,
        "return -(-epochs * length // batch)",
        "return epochs * length // batch",
        TEST_DATA + "steps_of_whole_epochs[1-11-5-3]",
    ),
    Mutant(
        "views are the same in every epoch",
        BATCHES,
        "seed_of(self.seed, epoch, index)",
        "seed_of(self.seed, index)",
        TEST_DATA + "views_depend_on_seed_epoch_and_index_alone",
    ),
    Mutant(
        "always two views",
        BATCHES,
        "for _ in range(self.count)]",
        "for _ in range(2)]",
        TEST_DATA + "a_batch_is_views_index_and_names[3]",
    ),
    Mutant(
        "the index is not pinned",
        BATCHES,
        "self.index.pin_memory()",
        "self.index",
        TEST_DATA + "pinning_reaches_every_tensor",
    ),
    Mutant(
        "views instead of raw pictures",
        BATCHES,
        "(source.raw, 1, None) if on_device",
        "(source.views, 1, None) if on_device",
        TEST_DATA + "raw_pictures_come_once",
    ),
    Mutant(
        "synthetic splits with the same pictures",
        DATA,
        "default_rng((self.split, index))",
        "default_rng((0, index))",
        TEST_DATA + "synthetic_pictures_are_made_from_their_index",
    ),
    Mutant(
        "five synthetic classes look like the other five",
        DATA,
        "        if crossed:",
        "        if False:",
        TEST_DATA + "synthetic_classes_have_structures_of_their_own",
    ),
]
VIEWS = [
    Mutant(
        "hue as strong as brightness",
        AUGMENT,
        "0.8 * strength, 0.2 * strength",
        "0.8 * strength, 0.4 * strength",
        TEST_AUGMENT + "views_of_photographs_follow_the_recipe",
    ),
    Mutant(
        "blur along rows alone",
        AUGMENT,
        "blurred, kernel_size=[1, down]",
        "blurred, kernel_size=[1, 1]",
        TEST_AUGMENT + "blur_by_rows_and_columns_is_blur[0.7]",
    ),
    Mutant(
        "small pictures are blurred",
        DATA,
        "size > augment.SMALL if blur is None",
        "True if blur is None",
        TEST_AUGMENT + "small_pictures_are_blurred_only_on_demand[64-None-False]",
    ),
    Mutant(
        "device: the digits' crops of photographs",
        AUGMENT,
        "blur: bool = True, crop=CROP) -> nn.Module",
        "blur: bool = True, crop=DIGIT_CROP) -> nn.Module",
        TEST_AUGMENT + "crops_and_flips_on_a_device_are_those_of_one_picture",
    ),
    Mutant(
        "device: colours always change",
        AUGMENT,
        "*_jitter(strength), p=0.8)",
        "*_jitter(strength), p=1.0)",
        TEST_AUGMENT + "colours_on_a_device_are_those_of_one_picture",
    ),
    Mutant(
        "device: one draw for a batch",
        AUGMENT,
        "*_jitter(strength), p=0.8)",
        "*_jitter(strength), p=0.8, same_on_batch=True)",
        TEST_AUGMENT + "colours_on_a_device_are_those_of_one_picture",
    ),
    Mutant(
        "device: half as many are grey",
        AUGMENT,
        "kornia.RandomGrayscale(p=0.2)",
        "kornia.RandomGrayscale(p=0.1)",
        TEST_AUGMENT + "colours_on_a_device_are_those_of_one_picture",
    ),
    Mutant(
        "device: less blur",
        AUGMENT,
        "* 2, BLUR, p=0.5)",
        "* 2, (0.1, 1.0), p=0.5)",
        TEST_AUGMENT + "blur_on_a_device_is_that_of_one_picture",
    ),
    Mutant(
        "device: bytes are not brought to 0..1",
        AUGMENT,
        "pictures.float() / 255",
        "pictures.float()",
        TEST_AUGMENT + "raw_pictures_become_views[digits-None-1]",
    ),
]
NETWORKS = [
    Mutant(
        "small pictures in large patches",
        BACKBONES,
        "size // patch < PATCHES and patch > 2",
        "size // patch < 4 and patch > 2",
        TEST_MODEL + "small_pictures_get_small_patches[32-4]",
    ),
    Mutant(
        "the rest of a picture beside its patches is left out",
        BACKBONES,
        "        if size % patch:",
        "        if False:",
        TEST_MODEL + "what_cannot_be_built_is_one_line[eva02_tiny_patch14_224-48"
        "---image-size: expected a multiple of 14 pixels]",
    ),
    Mutant(
        "timm's own number of features",
        BACKBONES,
        "encoder.num_features = _feature_width(encoder, channels, image_size)",
        "_feature_width(encoder, channels, image_size)",
        TEST_MODEL + "encoders[mobilenetv3_small_050-64-1024]",
    ),
    Mutant(
        "an encoder begins in evaluation",
        BACKBONES,
        "    encoder.train()\n",
        "",
        TEST_MODEL + "encoders[resnet18-32-512]",
    ),
    Mutant(
        "a deep stem shrinks small pictures",
        BACKBONES,
        "resnet.conv1[0].stride = (1, 1)",
        "pass",
        TEST_MODEL + "small_pictures_get_the_stem_that_keeps_their_size",
    ),
    Mutant(
        "a predictor that is normalised",
        MODEL,
        "normed = last_norm or not last",
        "normed = True",
        TEST_MODEL + "a_predictor_ends_with_a_linear_layer",
    ),
    Mutant(
        "heads in groups of few numbers",
        MODEL,
        "max(1, min(32, channels // 16))",
        "32",
        TEST_MODEL + "groups_divide_the_channels[BatchNorm1d-128-8]",
    ),
    Mutant(
        "group norm with weights of its own",
        MODEL,
        "new.weight, new.bias = norm.weight, norm.bias",
        "pass",
        TEST_MODEL + "group_norm_takes_the_place_of_every_batch_norm",
    ),
    Mutant(
        "group norm loses an activation",
        MODEL,
        'if hasattr(norm, "act") else new',
        "if False else new",
        TEST_MODEL + "activations_inside_a_norm_stay",
    ),
    Mutant(
        "parts of one row",
        MODEL,
        "len(rows) >= 2 * self.splits",
        "len(rows) >= self.splits + 2",
        TEST_MODEL + "split_batch_norm_in_evaluation_and_with_few_rows_is_batch_norm",
    ),
    Mutant(
        "split in evaluation",
        MODEL,
        "split = self.training and len(rows)",
        "split = len(rows)",
        TEST_MODEL + "split_batch_norm_in_evaluation_and_with_few_rows_is_batch_norm",
    ),
    Mutant(
        "running statistics of one part",
        MODEL,
        "torch.stack(found).mean(0)",
        "found[0]",
        TEST_MODEL + "split_batch_norm_is_the_norm_of_each_part[12-2d]",
    ),
    Mutant(
        "a cumulative mean that forgets",
        MODEL,
        "1 / self.num_batches_tracked if self.momentum is None",
        "0.1 if self.momentum is None",
        TEST_MODEL + "split_batch_norm_is_the_norm_of_each_part[12-cumulative]",
    ),
    Mutant(
        "a split norm loses an activation",
        MODEL,
        'getattr(norm, "act", nn.Identity())',
        "nn.Identity()",
        TEST_MODEL + "split_batch_norm_is_the_norm_of_each_part[12-timm]",
    ),
]
OPTIMISERS = [
    Mutant(
        "tokens and positions are decayed",
        OPTIM,
        "if parameter.ndim <= 1 or name in exempt else",
        "if parameter.ndim <= 1 else",
        TEST_OPTIM + "tokens_and_positions_of_a_vit_are_left_alone",
    ),
    Mutant(
        "timm's names count from the outermost module",
        OPTIM,
        'f"{prefix}.{name}".lstrip(".")',
        "name",
        TEST_OPTIM + "tokens_and_positions_of_a_vit_are_left_alone",
    ),
    Mutant(
        "frozen parameters are trained",
        OPTIM,
        "if parameter.requires_grad and parameter not in seen:",
        "if parameter not in seen:",
        TEST_OPTIM + "several_modules_share_their_groups_and_a_parameter_counts_once",
    ),
    Mutant(
        "LARS adapts biases",
        OPTIM,
        '        groups[1]["adapt"] = False\n',
        "",
        TEST_OPTIM + "only_weights_are_decayed_and_adapted[lars]",
    ),
    Mutant(
        "SGD without momentum",
        OPTIM,
        "lr=lr, momentum=0.9)",
        "lr=lr)",
        TEST_OPTIM + "sgd_has_momentum_and_no_lookahead",
    ),
    Mutant(
        "linear scaling from a batch of 128",
        OPTIM,
        "lambda batch: batch / 256",
        "lambda batch: batch / 128",
        TEST_OPTIM + "scaling[linear-0.3]",
    ),
]
MUTANTS = [*DEALT, *VIEWS, *NETWORKS, *OPTIMISERS]
