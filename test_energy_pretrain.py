"""Tests of energy_pretrain.py, in the script's order; each holds one property.

`pytest -q` runs them on a CPU, without a network, in under two minutes. Images are drawn as seeds,
never pixel by pixel: hypothesis varies what matters, the shapes, tasks and strengths.
"""

import argparse
import json
import os
import resource
import runpy
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from PIL import Image

import energy_pretrain as ep

torch.set_num_threads(1)      # small tensors: two threads wait for each other, on a busy CPU most
settings.register_profile("here", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("here")

SCRIPT = str(Path(ep.__file__))
FULL = ["--full-share", "1", "--walk-every", "0"]       # no image is corrupted in part, none walks
TINY = ["--model", "nano", "--image-size", "16", "--mask-grid", "4", "--batch-size", "4",
        "--max-steps", "4", "--device", "cpu", "--workers", "0"]
seeds, tasks = st.integers(0, 2**31), st.sampled_from(ep.TASKS)


@pytest.fixture(autouse=True)
def few_held_out_images(monkeypatch):
    monkeypatch.setattr(ep, "HELD_OUT", 24)


def images(seed, batch=3, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(dtype)


def tiny_vit(seed=0, head=True, **sizes):
    """A small ViT; with a head drawn at random, since a zero head makes a flat energy."""
    torch.manual_seed(seed)
    model = ep.ViT(16, 4, **{"dim": 16, "depth": 2, "num_heads": 2, **sizes})
    if head:
        torch.nn.init.normal_(model.head.weight)
    return model


def corrupted(x, task, seed, strength=1.0, **options):
    options = {"mask_grid": 4, **options}
    return ep.corrupt(x, task, ep.make_generator("cpu", seed), strength, **options)


# ---- 1. Images and patches ---------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_patchify_round_trip(seed, batch, patch, rows, columns):
    x = torch.randn(batch, 3, rows * patch, columns * patch)
    patches = ep.patchify(x, patch)
    assert patches.shape == (batch, rows * columns, 3 * patch**2)
    assert torch.equal(patches[:, columns], ep.patchify(x[:, :, patch:2 * patch], patch)[:, 0]) \
        if rows > 1 else True
    assert torch.equal(ep.unpatchify(patches, patch, rows * patch), x)


def test_psnr_of_known_errors():
    assert ep.psnr(4.0) == 0 and ep.psnr(0.04) == pytest.approx(20)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_make_generator_is_a_pure_function_of_its_key(key):
    first, again, other = (torch.rand(4, generator=ep.make_generator("cpu", *k))
                           for k in (key, key, [*key, 1]))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- 2. Corruptions ----------------------------------------------------------------------------


@given(seeds, tasks, st.integers(1, 4), st.sampled_from([8, 16, 32]),
       st.sampled_from([torch.float32, torch.float64]), st.floats(0, 1))
def test_corrupt_keeps_shape_dtype_and_its_input(seed, task, batch, size, dtype, strength):
    x = images(seed, batch, size, dtype)
    before = x.clone()
    x_tilde = corrupted(x, task, seed, strength)
    assert x_tilde.shape == x.shape and x_tilde.dtype == x.dtype and x_tilde.isfinite().all()
    x_tilde += 1
    assert torch.equal(x, before), "the input was written to, or shares memory with the output"


@given(seeds, tasks)
def test_corrupt_is_deterministic_and_changes_something(seed, task):
    x = images(seed)
    assert torch.equal(corrupted(x, task, seed), corrupted(x, task, seed))
    assert (corrupted(x, task, seed) != x).flatten(1).any(1).all()


@given(seeds, tasks)
def test_corrupt_strength_goes_from_nothing_to_all_image_by_image(seed, task):
    x = images(seed)
    full, mixed = corrupted(x, task, seed), corrupted(x, task, seed, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(corrupted(x, task, seed, 0.0), x)
    assert torch.equal(mixed[0], x[0]) and torch.equal(mixed[2], full[2])
    assert corrupted(x.double(), task, seed, torch.ones(3)).dtype == torch.float64
    torch.testing.assert_close(mixed[1], (x[1] + full[1]) / 2)


@given(seeds, st.sampled_from([2, 4, 8]), st.floats(0.01, 0.99))
def test_hide_blocks_hides_exactly_the_share_in_whole_blocks(seed, grid, ratio):
    x = images(seed).abs() + 0.1                        # no pixel is zero before
    hidden = corrupted(x, "mim", seed, mask_ratio=ratio, mask_grid=grid) == 0
    blocks = ep.patchify(hidden, 16 // grid)
    assert (blocks.all(2) | ~blocks.any(2)).all(), "a block is hidden in part"
    assert (blocks.any(2).sum(1) == round(ratio * grid**2)).all()
    masked = corrupted(x, "mim", seed, mask_ratio=ratio, mask_grid=grid)
    assert torch.equal(masked[~hidden], x[~hidden])


@given(seeds, st.sampled_from([2, 4, 8]))
def test_shuffle_patches_is_a_permutation_of_whole_pieces(seed, grid):
    x = images(seed)
    before, after = (ep.patchify(y, 16 // grid)
                     for y in (x, corrupted(x, "sort", seed, sort_grid=grid)))
    for a, b in zip(before, after):
        assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))


def test_shuffle_patches_is_uniform_and_differs_between_images():
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(4000, 3, 2, 2)
    first = corrupted(x, "sort", 0, sort_grid=2)[:, 0, 0, 0]
    shares = torch.bincount(first.long(), minlength=4) / len(x)
    assert (shares - 0.25).abs().max() < 0.03, shares      # more than 4 standard deviations


@given(seeds)
def test_lower_resolution_keeps_what_survives_averaging(seed):
    x = images(seed)
    constant = x[:, :, :1, :1].expand_as(x)
    torch.testing.assert_close(corrupted(constant, "sr", 0), constant)
    assert corrupted(x, "sr", 0).var() < 0.3 * x.var()


def test_remove_color_weighs_the_primaries_as_bt_601_does():
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        x = torch.zeros(1, 3, 4, 4)
        x[:, channel] = 1
        torch.testing.assert_close(corrupted(x, "color", 0), torch.full_like(x, weight))


def test_add_noise_has_the_standard_deviation_asked_for():
    x = images(0, 64)
    noise = corrupted(x, "denoise", 0, noise_std=0.25) - x
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 0.25) < 0.01


@given(seeds)
def test_remove_color_is_an_idempotent_grey(seed):
    grey = corrupted(images(seed), "color", 0)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(corrupted(grey, "color", 0), grey)
    torch.testing.assert_close(corrupted(torch.ones(1, 3, 4, 4), "color", 0),
                               torch.ones(1, 3, 4, 4))


# ---- 3. The energy -----------------------------------------------------------------------------


@given(seeds, st.integers(2, 5))
def test_energy_of_an_image_is_independent_of_its_batch(seed, batch):
    model, x = tiny_vit().double(), images(seed, batch, dtype=torch.float64)
    alone = torch.cat([model(x[i:i + 1]) for i in range(batch)])
    assert model(x).shape == (batch,)
    torch.testing.assert_close(model(x), alone)


@pytest.mark.parametrize("name", ["nano", "resnet18"])
def test_energies_stay_float32_under_autocast(name):
    """In bfloat16, with its three digits, neighbouring energies would be one."""
    model, x = ep.build_model(name, 32), images(0, 2, 32)
    torch.nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32
        assert not torch.equal(model(x), model(x).bfloat16().float())


def test_vit_features_equal_torchvisions_vit_with_the_same_weights():
    model = tiny_vit().double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    other = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64).double().eval()
    names = {"cls_token": "class_token",
             "pos_embed": "encoder.pos_embedding", "norm.": "encoder.ln.",
             "patch_embed.proj": "conv_proj", "blocks.": "encoder.layers.encoder_layer_",
             "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "self_attention.in_proj_",
             "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    state = {}
    for name, value in ep.backbone_state(model).items():
        for ours, theirs in names.items():
            name = (name.replace(ours, theirs, 1)
                    if ours != "norm." or name.startswith(ours) else name)
        state[name] = value
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert all("heads" in name for name in missing) and not unexpected
    other.heads = torch.nn.Identity()
    x = images(0, dtype=torch.float64)
    torch.testing.assert_close(model.encode(model.embed(x))[:, 0], other(x))
    torch.testing.assert_close(model.represent(x), model.encode(model.embed(x))[:, 1:].mean(1))


def test_vit_names_and_shapes_are_timms():
    state = {name: tuple(value.shape)
             for name, value in ep.build_model("small", 224).state_dict().items()}
    block = {"norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384),
             "attn.qkv.bias": (1152,), "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
             "norm2.weight": (384,), "norm2.bias": (384,), "mlp.fc1.weight": (1536, 384),
             "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,)}
    expected = {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    expected |= {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "norm.weight": (384,),
                 "norm.bias": (384,), "patch_embed.proj.weight": (384, 3, 16, 16),
                 "patch_embed.proj.bias": (384,), "head.weight": (1, 384)}
    assert state == expected


def test_patches_attend_to_their_neighbours_from_the_start():
    torch.manual_seed(1)
    model = ep.build_model("nano", 32)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    distance = torch.cdist(place, place)                                        # (N, N)
    position = model.pos_embed.detach()[0, 1:] / 0.6                            # (N, D)
    alike = position @ position.T / position.shape[1]
    error = (alike - (-(0.7 * distance)**2 / 2).exp()).abs()
    assert error.mean() < 0.1 and error.max() < 0.5, error
    seen = []
    for block in model.blocks:
        def attend(q, k, v, block=block):
            seen.append((q @ k.transpose(2, 3) / q.shape[3]**0.5).softmax(3)[:, :, 1:, 1:].mean(1))
            return type(block.attn).attend(block.attn, q, k, v)
        block.attn.attend = attend
    model(images(0, 8, 32))
    near, far = distance == 1, distance >= 3
    for depth, weights in enumerate(seen):                                      # (B, N, N) each
        ratio = (weights[:, near].mean() / weights[:, far].mean()).item()
        assert ratio > 1.5, f"block {depth}: a neighbour gets {ratio:.2f} times a far one's weight"


def test_attention_begins_by_taking_away_what_it_sees():
    torch.manual_seed(0)
    for block in ep.build_model("nano", 32).blocks:
        block.attn.attend = lambda q, k, v: v           # every token sees itself alone
        x = torch.randn(1, 65, 96)
        likeness = torch.nn.functional.cosine_similarity(block.attn(x), x, dim=2).mean()
        assert likeness < -0.5, likeness


def test_vit_refuses_an_image_size_that_patches_do_not_fill():
    with pytest.raises(ValueError, match="divisible"):
        ep.ViT(30, 4)


@pytest.mark.parametrize("name, frozen", [
    ("resnet18", []), ("convnext_tiny", ["net.classifier.0.bias"]), ("swin_t", ["net.norm.bias"]),
    ("vit_b_16", ["net.encoder.ln.bias"])])
def test_torchvision_networks_train_through_their_gradient(name, frozen):
    torch.manual_seed(0)
    pretrainer = ep.Pretrainer(ep.build_model(name, 32))
    ep.freeze_unused(pretrainer, images(0, 2, 32))
    trained = [p for p in pretrainer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):      # the first step only moves the head away from zero
        loss = pretrainer(images(1, 2, 32), images(2, 2, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    # in a ReLU network dE/dx depends on a bias only where a unit switches: a derivative of zero
    assert sum(bool(p.grad.any()) for p in trained) > 0.6 * len(trained)
    assert [n for n, p in pretrainer.named_parameters() if not p.requires_grad] == [
        "model." + name for name in frozen]
    keys = ep.backbone_state(pretrainer.model).keys()
    assert not any(key.startswith(("fc.", "head", "classifier.2")) for key in keys)
    assert torchvision.models.get_model(name, **{"image_size": 32} if "vit" in name else {}
                                        ).state_dict().keys() > keys


def test_backbones_load_into_torchvision(tmp_path):
    model = ep.build_model("mnasnet0_5", 32)            # it asks the file for its version
    torch.save(ep.backbone_state(model), tmp_path / "backbone.pt")
    theirs = torchvision.models.mnasnet0_5()
    theirs.classifier[1] = torch.nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pt"), strict=True)
    assert torch.equal(theirs.layers[0].weight, model.net.layers[0].weight)


# ---- 4. Restoration and loss -------------------------------------------------------------------


@given(seeds)
def test_gradient_of_the_energy_equals_finite_differences(seed):
    model, x = tiny_vit(seed % 7).double(), images(seed, 1, dtype=torch.float64)
    direction = images(seed + 1, 1, dtype=torch.float64)
    step = x - ep.restore(model, x, 1.0)[0]                                     # alpha 1: dE/dx
    numeric = (model(x + 1e-5 * direction) - model(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((step * direction).sum(), numeric.sum(), rtol=1e-5, atol=1e-8)


@given(seeds, st.integers(1, 3))
@settings(max_examples=4)
def test_gradient_through_the_restoration_equals_finite_differences(seed, num_steps):
    """The gradient of Eq. (3) with respect to parameters and alpha. The iterates are detached, so
    the numeric derivative starts every step from the iterates of the unchanged network."""
    pretrainer = ep.Pretrainer(tiny_vit(seed % 7, depth=1), 2.0, num_steps).double()
    x, x_tilde = images(seed, 2, dtype=torch.float64), images(seed + 1, 2, dtype=torch.float64)
    pretrainer(x, x_tilde).backward()
    starts = [x_tilde, *ep.restore(pretrainer.model, x_tilde, 2.0, num_steps)][:num_steps]

    def loss():
        alpha = pretrainer.log_alpha.exp().item()
        return sum(ep.energy_loss(pretrainer.model, x, start, alpha).item()
                   for start in starts) / num_steps
    for name, p in pretrainer.named_parameters():
        if p.grad is None:
            continue
        direction = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            p += 1e-5 * direction
            above = loss()
            p -= 2e-5 * direction
            below = loss()
            p += 1e-5 * direction
        expected, got = (above - below) / 2e-5, (p.grad * direction).sum().item()
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-8), name


def test_the_loss_is_a_mean_of_the_images_losses_by_their_weights():
    model, x, x_tilde = (tiny_vit().double(), images(0, dtype=torch.float64),
                         images(1, dtype=torch.float64))
    losses = [ep.energy_loss(model, x[i:i + 1], x_tilde[i:i + 1], 2.0, 2) for i in range(3)]
    torch.testing.assert_close(ep.energy_loss(model, x, x_tilde, 2.0, 2), sum(losses) / 3)
    weight = torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64)
    pretrainer = ep.Pretrainer(model, 2.0, num_steps=2)
    torch.testing.assert_close(pretrainer(x, x_tilde, weight), (2 * losses[1] + losses[2]) / 3,
                               rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature, alpha, missing", [
    (1, 1, 0), (0.25, 1, 0), (0.1, 1, 0.15), (0.1, 2, 0.05), (0, 1, 0.25), (-1, 1, 1.25)])
def test_order_loss_is_the_missing_share_of_the_rise(curvature, alpha, missing):
    """Clean is x = 0; with E = |x|^2 / 2 and alpha = 1 every step would be perfect."""
    x = torch.zeros(3, 3, 16, 16)
    def energy(y):
        return curvature * y.square().flatten(1).sum(1) / 2
    assert ep.order_loss(energy, x, images(0), alpha).item() == pytest.approx(missing, abs=1e-5)


def test_order_loss_passes_over_images_that_their_corruption_leaves_as_they_are():
    model, x = tiny_vit(), images(0)
    loss = ep.order_loss(model, x, x + torch.tensor([0, 0, 1e-4]).view(3, 1, 1, 1), 1.0)
    loss.backward()
    assert loss < 1e-3 and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_adds_the_order_of_the_first_images_and_leaves_alpha_to_restoration():
    x, x_tilde, x_s = images(0), images(1), images(2, 2)
    flat = tiny_vit(head=False)             # no order at all: a quarter is missing
    assert ep.Pretrainer(flat, order_weight=4.0)(x, x, x_s=x_s).item() == pytest.approx(1.0)
    pretrainer, slopes, losses = ep.Pretrainer(tiny_vit(), 2.0, order_weight=3.0), [], []
    for way in (None, x_s):
        losses.append(pretrainer(x, x_tilde, x_s=way))
        slopes.append(torch.autograd.grad(losses[-1], pretrainer.log_alpha)[0])
    expected = ep.order_loss(pretrainer.model, x[:2], x_s, 2.0)
    torch.testing.assert_close(losses[1] - losses[0], 3 * expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("head", [False, True])
def test_every_trainable_parameter_gets_a_gradient_and_the_frozen_are_known(head):
    pretrainer = ep.Pretrainer(tiny_vit(head=head))
    ep.freeze_unused(pretrainer, images(0))
    assert all(p.requires_grad and p.grad is None for p in pretrainer.parameters())
    pretrainer(images(0), images(1)).backward()
    missing = [n for n, p in pretrainer.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    if head:
        flat = [n for n, p in pretrainer.named_parameters() if p.requires_grad and not p.grad.any()]
        assert not flat


@pytest.mark.parametrize("name, size", [("googlenet", 32), ("inception_v3", 80)])
def test_networks_with_side_outputs_have_one_while_batch_norm_is_measured(name, size):
    assert ep.build_model(name, size).train()(images(0, 2, size)).shape == (2,)


def test_freeze_unused_refuses_networks_that_cannot_be_trained():
    with pytest.raises(RuntimeError, match="derivative for"):
        ep.freeze_unused(ep.Pretrainer(ep.build_model("mobilenet_v3_small", 32)), images(0, 2, 32))
    flat = torch.nn.Conv2d(3, 1, 16)                            # a ReLU behind a zero read-out
    torch.nn.init.zeros_(flat.weight)
    torch.nn.init.zeros_(flat.bias)
    with pytest.raises(ep.UserError, match="no gradient"):
        ep.freeze_unused(ep.Pretrainer(torch.nn.Sequential(flat, torch.nn.ReLU())), images(0))


@given(seeds, tasks)
def test_a_small_step_lowers_the_energy(seed, task):
    model = tiny_vit(seed % 11).double()
    x_tilde = corrupted(images(seed, dtype=torch.float64), task, seed)
    x_hat = ep.restore(model, x_tilde, alpha=1e-4)[0]
    assert x_hat.shape == x_tilde.shape
    with torch.no_grad():
        assert (model(x_hat) < model(x_tilde)).all()


@given(seeds, st.integers(1, 4), st.booleans())
def test_k_steps_equal_k_times_one_step(seed, num_steps, create_graph):
    model, x = tiny_vit(), images(seed)
    walk = ep.restore(model, x, 3.0, num_steps, create_graph)
    assert walk.shape == (num_steps, *x.shape) and walk.requires_grad == create_graph
    for x_k in walk:
        x = ep.restore(model, x, 3.0)[0]
        assert torch.equal(x, x_k)


@given(seeds, st.integers(2, 4))
def test_restoration_of_an_image_is_independent_of_its_batch(seed, batch):
    model, x = tiny_vit().double(), images(seed, batch, dtype=torch.float64)
    alone = torch.cat([ep.restore(model, x[i:i + 1], 3.0, 2) for i in range(batch)], 1)
    torch.testing.assert_close(ep.restore(model, x, 3.0, 2), alone)


def test_restore_works_without_gradients_and_leaves_none():
    model = tiny_vit()
    with torch.no_grad():
        quiet = ep.restore(model, images(0), 3.0, 2)
    assert (torch.equal(quiet, ep.restore(model, images(0), 3.0, 2))
            and not torch.equal(quiet[1], images(0)))
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_head_makes_restoration_the_identity():
    assert torch.equal(ep.restore(tiny_vit(head=False), images(0), 64.0)[0], images(0))


def test_compiled_loss_and_gradients_equal_eager():
    pretrainer = ep.Pretrainer(tiny_vit(), 2.0, num_steps=2)
    results = []
    # "aot_eager" traces forward and both backward passes as the default does, but needs no C++
    for loss_fn in (ep.energy_loss,
                    torch.compile(ep.energy_loss, fullgraph=True, backend="aot_eager")):
        pretrainer.loss_fn = loss_fn
        pretrainer.zero_grad()
        loss = pretrainer(images(0), images(1))
        loss.backward()
        results.append([loss, *(p.grad for p in pretrainer.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# ---- 6. Data -----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 5), st.sampled_from([16, 31, 64]))
def test_landscapes_are_images_and_follow_from_the_seed(seed, batch, size):
    x, kind = ep.draw_landscapes(batch, size, ep.make_generator("cpu", seed))
    again, _ = ep.draw_landscapes(batch, size, ep.make_generator("cpu", seed))
    assert x.shape == (batch, 3, size, size) and kind.shape == (batch,) and torch.equal(x, again)
    assert x.min() >= -1 and x.max() <= 1 and x.flatten(1).std(1).min() > 0.1
    assert 0 <= kind.min() and kind.max() < 4


def test_every_step_and_every_process_draws_its_own_landscapes():
    args = ep.parse_args(TINY)
    batches = [x for rank in (0, 1) for x, _ in ep.image_batches(
        args, None, torch.device("cpu"), 4, range(5, 7), seed=0, rank=rank, world_size=2)]
    assert all(x.shape == (2, 3, 16, 16) for x in batches)
    assert len({x.sum().item() for x in batches}) == 4


def people_s_images(folder):
    """One file of each sort that people have, all of one colour, and one that is broken."""
    red = Image.new("RGB", (40, 30), (200, 40, 40))
    (folder / "deep" / "er").mkdir(parents=True)
    red.save(folder / "photo.JPG", "JPEG")
    red.save(folder / "deep" / "image.png")
    red.save(folder / "deep" / "er" / "web.webp")
    red.convert("CMYK").save(folder / "press.jpg")
    red.convert("P").save(folder / "palette.gif")
    red.convert("RGBA").save(folder / "alpha.png")
    red.convert("L").save(folder / "grey.png")
    Image.new("I;16", (20, 20), 128 * 256).save(folder / "deep16.png")
    red.resize((1, 1)).save(folder / "dot.png")
    red.resize((2, 900)).save(folder / "thin.png")
    (folder / "broken.jpg").write_bytes((folder / "photo.JPG").read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")


def test_read_image_decodes_what_people_have(tmp_path):
    people_s_images(tmp_path)
    for path in sorted(tmp_path.rglob("*.*")):
        if path.suffix != ".txt" and "broken" not in path.name:
            image = ep.read_image(path, 16)
            assert image.mode == "RGB" and min(image.size) <= 16, path
            expected = ((87, 87, 87) if path.stem == "grey"
                        else (128,) * 3 if path.stem == "deep16" else (200, 40, 40))
            got = image.getpixel((0, 0))
            assert all(abs(a - b) < 12 for a, b in zip(got, expected)), (path.name, got)


def test_read_image_turns_photographs_upright_and_knows_scans_and_papers_transparency(tmp_path):
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[274] = 6                                       # the camera was held on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert ep.read_image(tmp_path / "turned.jpg", 64).size == (20, 40)
    Image.new("I;16B", (4, 4), 128 * 256).save(tmp_path / "scan.tif")
    assert ep.read_image(tmp_path / "scan.tif", 64).getpixel((0, 0)) == (128, 128, 128)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert ep.read_image(tmp_path / "clear.png", 64).getpixel((0, 0)) == (255, 255, 255)


def test_folder_names_each_unreadable_file_once(tmp_path, capfd):
    people_s_images(tmp_path)
    args = ep.parse_args([*TINY, "--data", str(tmp_path)])
    train, held_out, classes = ep.open_data(args)
    assert (len(train.source) == 9 and len(held_out.source) == 2
            and not {*train.source} & {*held_out.source})
    assert classes == 2       # deep, and what lies in the folder itself
    for x, _ in ep.image_batches(args, train, torch.device("cpu"), 9, range(3), seed=0):
        assert x.shape == (9, 3, 16, 16) and x.min() >= -1 and x.max() <= 1
    assert capfd.readouterr().err.count("broken.jpg") == 1


class Heedless(ep.Crops):
    """White where neither Ctrl-C nor SIGTERM would end the process that decodes."""

    def __getitem__(self, key):
        deaf = all(signal.getsignal(number) is signal.SIG_IGN
                   for number in (signal.SIGINT, signal.SIGTERM))
        return torch.full((3, 16, 16), 255 * deaf, dtype=torch.uint8), 0, ""


def test_no_decoder_keeps_a_run_that_failed_from_ending(tmp_path):
    """They ignore SIGTERM, by which Python would end them, and wait."""
    for i in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    (tmp_path / "fails.py").write_text(
        "import runpy, torch; torch.nn.utils.clip_grad_norm_ = lambda *a, **k: 1 / 0; "
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, str(tmp_path / "fails.py"), *TINY, "--workers", "2",
                           "--max-steps", "99", "--data", str(tmp_path), "--out", str(tmp_path)],
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_decoders_leave_signals_to_the_training_loop():
    """Spawned ones, as on macOS, inherit no handlers: Ctrl-C would end them before the run."""
    crops = Heedless([None] * 4, 16, False)
    (x, _), = ep.image_batches(None, crops, torch.device("cpu"), 4, [0], seed=0, workers=1)
    assert (x == 1).all() and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def test_what_odd_files_make_pillow_raise_does_not_end_a_run(monkeypatch):
    white = Image.new("RGB", (20, 20), "white")
    def read_image(path, short_side):
        if path == "odd":           # as photographs with odd EXIF tags do
            raise struct.error("ushort format requires 0 <= number <= 65535")
        return white
    monkeypatch.setattr(ep, "read_image", read_image)
    pixels, _, unreadable = ep.Crops([("odd", 0), ("good", 1)], 16, False)[0, 0]
    assert (pixels == 255).all() and unreadable == "odd (error)"         # struct's name for it


def test_an_unreadable_file_is_replaced_by_the_next_readable_one_round_the_end(tmp_path):
    source = [(str(tmp_path / f"{i}.png"), i) for i in range(4)]
    for path, i in source:
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(path)
    for broken in (0, 3):
        Path(source[broken][0]).write_bytes(b"no image")
    crops = ep.Crops(source, 16, False)
    for index, used, named in ((0, 1, [0]), (1, 1, []), (2, 2, []), (3, 1, [3, 0])):
        pixels, label, unreadable = crops[index, 0]
        assert (pixels[0] == 60 * used).all() and label == used, index
        assert unreadable == "\0".join(
            f"{source[i][0]} (UnidentifiedImageError)" for i in named), index


def test_crops_follow_from_their_seed_and_leave_the_global_state():
    noise = Image.effect_noise((64, 96), 80)
    crops, middle = (ep.Crops([(noise, 3)], 16, augment) for augment in (True, False))
    state = torch.get_rng_state()
    assert crops[0, 5][1] == 3
    assert (torch.equal(crops[0, 5][0], crops[0, 5][0])
            and not torch.equal(crops[0, 5][0], crops[0, 6][0]))
    expected = torchvision.transforms.v2.functional.pil_to_tensor(
        noise.convert("RGB").resize((16, 24), Image.Resampling.BILINEAR).crop((0, 4, 16, 20)))
    assert torch.equal(middle[0, 5][0], expected) and torch.equal(middle[0, 6][0], expected)
    assert torch.equal(state, torch.get_rng_state())


@given(seeds, st.integers(1, 20), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_every_image_comes_once_an_epoch_however_many_processes(seed, count, world_size, part):
    batch = world_size * part
    def row(world_size):
        ranks = [ep.crop_keys(count, batch, range(3 * count), seed, rank, world_size)
                 for rank in range(world_size)]
        return [key for step in zip(*ranks) for keys in step for key in keys]
    keys = row(world_size)
    assert keys == row(1)
    for epoch in range(len(keys) // count):
        assert sorted(index for index, _ in keys[epoch * count:][:count]) == list(range(count))
    assert list(ep.crop_keys(count, batch, [2], seed, 0, 1))[0] == row(1)[2 * batch:3 * batch]


# ---- 7. Optimiser and schedule -----------------------------------------------------------------


def test_muon_moves_the_inner_matrices_and_only_matrices_decay():
    pretrainer = ep.Pretrainer(tiny_vit())
    ep.freeze_unused(pretrainer, images(0))
    adamw, muon = ep.build_optimizers(pretrainer, 0.1)
    place = {id(p): (type(optimizer).__name__, group["weight_decay"])
             for optimizer in (adamw, muon)
             for group in optimizer.param_groups for p in group["params"]}
    assert len(place) == len(list(pretrainer.parameters()))
    for name, p in pretrainer.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        inner = matrix and "blocks" in name
        assert place[id(p)] == ("Muon" if inner else "AdamW", 0.1 if matrix else 0.0), name
    _, muon = ep.build_optimizers(torch.nn.Linear(2, 2), 0.1)       # no inner matrices
    muon.step()


@pytest.mark.parametrize("name", ["vit_b_16", "swin_v2_t", "convnext_tiny"])
def test_positions_and_scales_in_torchvision_networks_do_not_decay(name):
    pretrainer = ep.Pretrainer(ep.build_model(name, 32))
    exempt = {id(p) for p in ep.build_optimizers(pretrainer, 0.1)[0].param_groups[1]["params"]}
    spared = [p for name, p in pretrainer.named_parameters()
              if p.ndim > 1 and ("pos_" in name or "_table" in name or "_scale" in name)]
    assert spared and all(id(p) in exempt for p in spared)


@given(st.integers(0, 20), st.integers(1, 200), st.sampled_from([64, 256, 1024]))
def test_learning_rate_rises_to_its_peak_and_falls_to_zero(warmup, rest, batch):
    args = argparse.Namespace(lr=0.1, batch_size=batch, warmup_steps=warmup,
                              max_steps=warmup + rest)
    rates = [ep.learning_rate(args, step) for step in range(warmup + rest + 1)]
    peak = 0.1 * (batch / 256) ** 0.5
    assert rates[warmup] == pytest.approx(max(rates)) == pytest.approx(peak)
    assert rates[-1] == pytest.approx(0)
    assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# ---- 5. and 8. to 13. Through the command line -------------------------------------------------


def test_corrupt_batch_draws_anew_for_every_step_and_process(monkeypatch):
    args = ep.parse_args([*TINY, "--task", "mim,denoise", *FULL])
    x, drawn = images(0, 4), set()
    for rank in (0, 1):
        monkeypatch.setattr(ep, "RANK", rank)
        for step in range(8):
            drawn.add(ep.corrupt_batch(args, None, x, step)[0].double().sum().item())
    assert len(drawn) == 16


@given(st.integers(0, 30), st.sampled_from([1, 2, 4, 8]))
def test_corrupt_batch_deals_the_tasks_in_turn_over_all_processes(step, processes):
    args = ep.parse_args([*TINY, "--task", "color,denoise,mim", "--batch-size", "8", *FULL])
    x, part, turns = images(0, 8).clamp(0.1, 1), 8 // processes, []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(processes):
            patch.setattr(ep, "RANK", rank)
            x_tilde, weight, _ = ep.corrupt_batch(args, None, x[rank * part:][:part], step)
            assert x_tilde.shape == (part, 3, 16, 16) and weight.shape == (part,)
            for i, image in enumerate(x_tilde):
                grey, holes = torch.equal(image[0], image[1]), (image == 0).any().item()
                turns.append([(True, False), (False, False), (False, True)].index((grey, holes)))
                assert weight[i] == pytest.approx((1.5, 0.75, 0.75)[turns[-1]])
    assert turns == [(turns[0] + i) % 3 for i in range(8)]      # 4, 2, 2 by their mean, above


def test_every_task_comes_first_at_times():
    args = ep.parse_args([*TINY, *FULL, "--task", "color,denoise,mim,sort,sr", "--batch-size", "5"])
    x = images(0, 5).clamp(0.1, 1)
    firsts = [ep.corrupt_batch(args, None, x, step)[0][0] for step in range(40)]
    grey = sum(torch.equal(image[0], image[1]) for image in firsts)
    assert 2 <= grey <= 16, grey


@pytest.mark.parametrize("batch, count", [(4, 1), (16, 1), (48, 3)])
def test_the_order_is_asked_for_along_the_way_of_the_first_sixteenth(batch, count):
    args = ep.parse_args([*TINY, "--task", "denoise", *FULL])
    x, strengths = images(0, batch), []
    for step in range(1, 200):
        x_tilde, _, x_s = ep.corrupt_batch(args, None, x, step)
        assert len(x_s) == count
        way = (x_tilde - x)[:count]
        s = ((x_s - x[:count]) * way).flatten(1).sum(1) / way.square().flatten(1).sum(1)
        torch.testing.assert_close(x_s, x[:count] + s.view(-1, 1, 1, 1) * way)
        strengths += s.tolist()
    strengths = torch.tensor(strengths)
    assert strengths.min() > 0.0499 and strengths.max() <= 1 and abs(strengths.mean() - 0.5) < 0.08
    args.order_weight = 0
    assert ep.corrupt_batch(args, None, x, 1)[2] is None


def test_images_corrupted_in_part_weigh_more_by_what_their_strength_lacks():
    x = images(0, 200)
    full, part = (ep.corrupt_batch(ep.parse_args(
        [*TINY, "--task", "denoise", "--walk-every", "0", "--full-share", share]), None, x, 1)
        for share in ("1", "0.4"))
    s = (part[0] - x).flatten(1).norm(dim=1) / (full[0] - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(part[0], torch.lerp(x, full[0], s.view(-1, 1, 1, 1)))
    torch.testing.assert_close(part[1], 1 / s.clamp(min=0.2), rtol=1e-4, atol=1e-4)
    rest = s[s < 0.9999]
    assert abs(len(rest) / 200 - 0.6) < 0.1 and abs(rest.mean() - 1 / 3) < 0.1     # squares


@settings(max_examples=10)
@given(st.integers(1, 30), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_one_of_so_many_images_in_each_task_is_trained_where_a_walk_ends(step, processes, every):
    still, walking = (ep.parse_args([*TINY, "--task", "mim,sr", "--batch-size", "8", "--num-steps",
                                     "2", "--walk-every", str(n)])
                      for n in (0, every))
    pretrainer, x, part, walked = ep.Pretrainer(tiny_vit(), 3.0), images(0, 8), 8 // processes, []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(processes):
            patch.setattr(ep, "RANK", rank)
            start, given = (ep.corrupt_batch(args, pretrainer, x[rank * part:][:part], step)[0]
                            for args in (still, walking))
            assert not given.requires_grad
            end = ep.restore(pretrainer.model, start, 3.0, 2)[-1]
            assert (end != start).flatten(1).any(1).all()
            for i in range(part):
                walked.append(not torch.equal(given[i], start[i]))
                torch.testing.assert_close(given[i], (end if walked[-1] else start)[i])
    for i in range(9 - 2 * every):                          # two tasks in turn, one image of each
        assert sum(walked[i:i + 2 * every:2]) == sum(walked[i + 1:i + 2 * every:2]) == 1, walked


def test_one_compilation_serves_all_tasks(tmp_path, monkeypatch):
    compile, graphs = torch.compile, []
    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **k, backend=backend))
    ep.main([*TINY, "--task", "all", "--compile", "--out", str(tmp_path)])
    assert len(graphs) == 1


def test_a_failed_compilation_is_said_in_one_line_and_done_without(tmp_path, capsys, monkeypatch):
    def compile(*args, **options):
        return lambda *inputs: [][0]
    monkeypatch.setattr(torch, "compile", compile)
    assert "sr" in ep.main([*TINY, "--task", "sr", "--compile", "--out", str(tmp_path)])
    assert capsys.readouterr().err == ("warning: process 0 goes on without compiling "
                                       "(IndexError: list index out of range)\n")


def test_running_out_of_memory_is_no_failed_compilation(tmp_path, capsys, monkeypatch):
    def compile(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile)
    with pytest.raises(SystemExit):
        ep.main([*TINY, "--task", "sr", "--compile", "--out", str(tmp_path)])
    assert capsys.readouterr().err.startswith("energy_pretrain.py: error: out of memory")


def files_equal(one, other):
    """Whether two saved dicts hold the same tensors, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    flat = [[value for key in ("module",) for value in d.get(key, d).values()] for d in (a, b)]
    moments = [[v for o in d.get("optimizers", []) for state in o["state"].values()
                for v in state.values()] for d in (a, b)]
    return all(torch.equal(x, y)
               for x, y in zip(flat[0] + moments[0], flat[1] + moments[1], strict=True))


def test_a_finished_run_compiles_nothing(tmp_path, monkeypatch):
    metrics = ep.main([*TINY, "--task", "sr", "--out", str(tmp_path)])
    monkeypatch.setattr(ep, "try_compile", None)        # calling it would raise TypeError
    assert ep.main([*TINY, "--task", "sr", "--compile", "--out", str(tmp_path)]) == metrics


def test_logging_looks_at_few_images_and_its_time_counts(tmp_path, monkeypatch):
    real, sizes, found = ep.evaluate, [], []
    def evaluate(pretrainer, x, *more):
        sizes.append(len(x))
        if not found:                   # the first takes long, the others no time at all
            found.append(real(pretrainer, x, *more))
            time.sleep(1)
        return found[0]
    monkeypatch.setattr(ep, "evaluate", evaluate)
    monkeypatch.setattr(ep, "LOG_EVERY", 1)
    ep.main([*TINY, "--task", "sr", "--batch-size", "40", "--max-steps", "3",
             "--out", str(tmp_path)])
    rates = [json.loads(line)["images_per_second"] for line in (tmp_path / "log.jsonl").open()]
    assert sizes == [32, 32, 32, 24] and rates[1] < 40 and rates[2] > 2 * rates[1], rates


def test_the_log_does_not_depend_on_when_checkpoints_are_saved(tmp_path):
    records = []
    for every in ("3", "4"):
        ep.main([*TINY, "--task", "sr", "--save-every", every, "--out", str(tmp_path / every)])
        records.append(json.loads((tmp_path / every / "log.jsonl").read_text()))
    assert records[0]["loss"] == records[1]["loss"]


def test_command_line_end_to_end(tmp_path, capsys):
    out = tmp_path / "run"
    metrics = ep.main([*TINY, "--task", "all", "--num-steps", "2", "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.pt", "checkpoint.pt", "log.jsonl", "metrics.json", "restorations.png"]
    assert (list(metrics) == list(ep.TASKS)
            and metrics == json.loads((out / "metrics.json").read_text()))
    assert len(metrics["sr"]["psnr_restored"]) == 2 and 0 <= metrics["sr"]["order"] <= 1
    record = json.loads((out / "log.jsonl").read_text())
    assert (record["step"] == 4
            and {"loss", "alpha", "lr", "gradient_norm", "images_per_second"} <= record.keys())
    picture = Image.open(out / "restorations.png")
    assert picture.size == (8 * 100 + 4 + 120, 5 * 4 * 100 + 4)  # 8 columns; 4 rows for each task
    model = ep.build_model("nano", 16)
    missing, unexpected = model.load_state_dict(torch.load(out / "backbone.pt"), strict=False)
    assert missing == ["head.weight"] and not unexpected
    printed = capsys.readouterr().out
    assert all(word in printed
               for word in ("device", "parameters", "drawn as needed", "PSNR in dB"))
    assert ep.main(["--evaluate", "--device", "cpu", "--out", str(out)]) == metrics


def bowl(energy):
    """A Pretrainer at alpha = 1 whose energy is this function of |x|^2 / 2."""
    pretrainer = ep.Pretrainer(tiny_vit(), 1.0)
    pretrainer.model = torch.nn.Module()
    pretrainer.model.forward = lambda x: energy(x.square().flatten(1).sum(1) / 2)
    return pretrainer


def test_evaluate_measures_restoration():
    """With E = 0 the walk stays where it is; with E = |x|^2 / 2 and alpha = 1 it ends at zero."""
    x, options = images(0, 6), {"mask_grid": 4}
    still = ep.Pretrainer(tiny_vit(head=False), 1.0)
    row = ep.evaluate(still, x, ["mim"], options, chunk=4)["mim"]
    assert row["psnr_restored"][0] == row["psnr_corrupted"] and row["order"] == row["descent"] == 0
    assert row["psnr_corrupted_hidden"] == pytest.approx(row["psnr_corrupted"] - 3.0103, abs=1e-3)
    assert row["rank_correlation"] == 0         # all energies tie
    row = ep.evaluate(bowl(lambda e: e), x, ["denoise"], {"noise_std": 2.0})["denoise"]
    assert row["psnr_restored"][0] == pytest.approx(ep.psnr(x.square().mean().item()))
    assert row["energy_restored"] == 0 and row["order"] == 1 and row["descent"] == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_evaluate_measures_whether_low_energy_means_data(sign):
    """Clean is x = 0 and E = |x|^2 / 2, the energy of a perfect restorer; or minus it."""
    row = ep.evaluate(bowl(lambda e: sign * e), torch.zeros(70, 3, 16, 16), ["denoise"],
                      {"noise_std": 2.0})["denoise"]
    assert row["auroc"] == row["order"] == row["order_quarter"] == (sign == 1)
    assert row["rank_correlation"] == pytest.approx(sign) and row["slope"] == pytest.approx(sign)
    before, after = row["psnr_quarter"]
    assert row["psnr_clean"] > 100 and before == pytest.approx(ep.psnr(0.25), abs=0.1)
    assert after > 100 if sign == 1 else after == pytest.approx(ep.psnr(1.0), abs=0.1)


def test_evaluate_passes_over_images_without_colour():
    x = images(0, 6)
    x[:2] = corrupted(x, "color", 0)[:2]
    row = ep.evaluate(ep.Pretrainer(tiny_vit()), x, ["color"], {})["color"]
    assert abs(row["slope"]) < 1e6
    row = ep.evaluate(ep.Pretrainer(tiny_vit()), x[2:3], ["color"], {})["color"]
    assert row["rank_correlation"] == 0     # of a single image: not NaN, which JSON has not
    row = ep.evaluate(ep.Pretrainer(tiny_vit()), 0 * x, ["sort"], {})["sort"]
    assert row["slope"] == 0                # of black images: not NaN either


def test_the_table_has_a_column_for_each_task_and_a_row_for_each_metric(capsys):
    row = {"psnr_restored": [1.234, 20.5], "order": 0.5}
    ep.print_table({"mim": row | {"psnr_restored_hidden": [3.0, 4.0]}, "sr": row}, 2)
    head, *lines = capsys.readouterr().out.splitlines()[1:]
    column = head.index("sr")
    assert [(line[:column].split(), line[column:].split()) for line in lines] == [
        (["psnr_restored", "1.23", "20.50"], ["1.23", "20.50"]), (["order", "0.500"], ["0.500"]),
        (["psnr_restored_hidden", "3.00", "4.00"], [])]


@pytest.mark.parametrize("data", ["procedural", "folder"])
def test_resuming_equals_never_having_stopped_bit_for_bit(tmp_path, data, monkeypatch):
    (tmp_path / "images").mkdir()
    people_s_images(tmp_path / "images")
    monkeypatch.setattr(ep, "LOG_EVERY", 1)
    base = [*TINY, "--task", "mim,denoise", "--save-every", "2"]
    base += ["--data", str(tmp_path / "images")] if data == "folder" else []
    ep.main([*base, "--out", str(tmp_path / "whole")])
    save, saved = ep.save_checkpoint, []
    monkeypatch.setattr(ep, "save_checkpoint", lambda *a: (save(*a), saved.append(1), 1 / 0))
    with pytest.raises(ZeroDivisionError):          # "the power went" right after the first save
        ep.main([*base, "--out", str(tmp_path / "parts")])
    monkeypatch.setattr(ep, "save_checkpoint", save)
    log = tmp_path / "parts" / "log.jsonl"
    with log.open("ab") as file:            # a step after the save, damaged lines, and a torn one
        file.write(b'{"step": 3, "loss": 1}\n\n\0\n\xff\n{"step": 4, "lo')
    ep.main([*base, "--out", str(tmp_path / "parts")])
    assert [json.loads(line)["step"] for line in log.open()] == [1, 2, 3, 4]
    for name in ("checkpoint.pt", "backbone.pt"):
        assert files_equal(tmp_path / "whole" / name, tmp_path / "parts" / name)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(SCRIPT).parent)}


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators decide for themselves")
def test_the_allocator_keeps_what_a_step_frees():
    ep.set_up_device(argparse.Namespace(device="cpu"))
    def pages_after_a_step():
        [torch.ones(2**19) for _ in range(32)]          # 64 MiB, 16,384 pages of 4 KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first, second = pages_after_a_step(), pages_after_a_step()
    assert second - first < 1000, f"{second - first} pages were cleared anew"


def test_restarted_workers_do_not_read_what_their_predecessors_left(monkeypatch):
    shared, stores = torch.distributed.HashStore(), []
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    monkeypatch.setattr(ep.dist, "rendezvous", lambda url: iter([(shared, 0, 2)]))
    monkeypatch.setattr(ep.dist, "init_process_group", lambda *a, store, **k: stores.append(store))
    for attempt, local in (("0", "2"), ("1", "2"), ("1", "1")):     # the last on two machines
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        ep.set_up_device(argparse.Namespace(device="cpu"))
    stores[0].set("address", "old")
    assert stores[0].check(["address"]) and not stores[1].check(["address"]) and stores[2] is shared


def test_beginning_anew_leaves_no_checkpoint_to_go_on_from_but_restarts_go_on(
        tmp_path, capsys, monkeypatch):
    base = [*TINY, "--task", "sr", "--out", str(tmp_path)]
    ep.main(base)
    old = (tmp_path / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ep, "train", lambda *a: 1 / 0)            # "the power went" before a save
        with pytest.raises(ZeroDivisionError):
            ep.main([*base, "--no-resume"])
    assert not (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "previous-checkpoint.pt").read_bytes() == old
    ep.main(base)
    assert "resuming" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ep.main([*base, "--no-resume"])
    assert "resuming  after step 4" in capsys.readouterr().out


def test_two_processes_one_of_them_killed_equal_one(tmp_path):
    """The whole program, on files and without random strengths, so that both see the same batches:
    the weights must differ by rounding only, which AdamW enlarges where gradients are tiny. After
    the first save a process is killed, and torchrun starts both again."""
    (tmp_path / "images").mkdir()
    for i, x in enumerate(images(0, 9, 32)):
        torchvision.utils.save_image(x, tmp_path / "images" / f"{i}.png", normalize=True)
    base = [*TINY, "--task", "sr", "--full-share", "1", "--order-weight", "0",
            "--data", str(tmp_path / "images"), "--out"]
    (tmp_path / "killed.py").write_text(
        "import os, sys, energy_pretrain as ep; "
        "step, saved = ep.train_step, sys.argv[-1] + '/checkpoint.pt'\n"
        "def train_step(*inputs):\n"
        "    if os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10' "
        "and os.path.exists(saved):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return step(*inputs)\n"
        "ep.train_step = train_step; ep.main(sys.argv[1:])")
    done = subprocess.run([*TORCHRUN, "--max-restarts=1", str(tmp_path / "killed.py"),
                           "--save-every", "1", *base, str(tmp_path / "two")],
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "resuming  after step" in done.stdout, done.stderr
    assert (done.stdout.count("2 process(es)") == 2
            and (tmp_path / "two" / "restorations.png").exists())
    ep.main([*base, str(tmp_path / "one")])
    one, two = (torch.cat([p.flatten()
                           for p in torch.load(tmp_path / name / "backbone.pt").values()])
                for name in ("one", "two"))
    torch.manual_seed(0)
    start = torch.cat([p.flatten() for p in ep.backbone_state(ep.build_model("nano", 16)).values()])
    difference = ((two - one).norm() / (one - start).norm()).item()
    assert difference < 0.02, difference


def test_torchrun_says_mistakes_once(tmp_path):
    bad = subprocess.run([*TORCHRUN, SCRIPT, *TINY, "--out", str(tmp_path), "--batch-size", "3"],
                         env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert (bad.returncode != 0
            and bad.stderr.count("energy_pretrain.py: error: --batch-size 3") == 1)


@pytest.mark.parametrize("arguments, message", [
    (["--task", "jigsaw"], "--task jigsaw: choose from mim, sort"),
    (["--model", "resnet19"], "--model resnet19: choose from nano"),
    (["--model", "mobilenet_v3_small"], "mobilenet_v3_small at 16 pixels: derivative for"),
    (["--model", "inception_v3"], "--model inception_v3 at 16 pixels: "),
    (["--model", "vit_b_32"], "--model vit_b_32 at 16 pixels: Input shape indivisible by patch"),
    (["--image-size", "18", "--task", "denoise"],
     "--model nano at 18 pixels: image size 18 is not divisible by patch size 4"),
    (["--benchmark", "--model", "squeezenet1_0"], "does not end in a linear layer"),
    (["--image-size", "16", "--sr-factor", "5"], "--sr-factor 5: must divide the image size, 16"),
    (["--mask-ratio", "1.5"], "--mask-ratio 1.5: must hide some of the 16 blocks and leave some"),
    (["--mask-ratio", "0.01"], "--mask-ratio 0.01: must hide some of the 16 blocks and leave some"),
    (["--mask-ratio", "0.99"], "--mask-ratio 0.99: must hide some of the 16 blocks and leave some"),
    (["--full-share", "1.5"], "--full-share 1.5: must be 1 or less"),
    (["--lr", "nan"], "--lr nan: must be above 0"),
    (["--epochs", "0"], "--epochs 0: must be above 0"),
    (["--finetune", "scratch", "--batch-size", "1"], "--batch-size 1: --finetune needs two images"),
    (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
    (["--device", "cuda:x"], "--device cuda:x: give cpu, cuda or cuda:N"),
    (["--device", "cpu:1"], "--device cpu:1: give cpu, cuda or cuda:N"),
    (["--freeze"], "--freeze True: is for --finetune"),
    (["--device", "meta"], "--device meta: give cpu, cuda or cuda:N"),
    (["--seed", str(2**63)], f"--seed {2**63}: must be 0 or more, below 2^63"),
    (["--sort-grid", "1"], "--sort-grid 1: must divide the image size, 16, and be above 1"),
    (["--sr-factor", "1"], "--sr-factor 1: must divide the image size, 16, and be above 1"),
    (["--data", "/no/such/folder"], "--data /no/such/folder: no such folder"),
    (["--evaluate"], "no checkpoint there"),
    (["--out", "x" * 300], "File name too long"),
    (["--nonsense"], "unrecognized arguments: --nonsense")])
def test_wrong_arguments_end_in_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        ep.main([*TINY, "--out", str(tmp_path / "out"), *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said, said


def test_any_number_of_processes_may_evaluate_but_not_train(tmp_path, monkeypatch):
    ep.main([*TINY, "--task", "sr", "--out", str(tmp_path)])
    monkeypatch.setattr(ep, "WORLD_SIZE", 3)
    assert ep.parse_args(["--evaluate", "--out", str(tmp_path)]).batch_size == 4
    with pytest.raises(ep.UserError, match="must be a multiple of the 3 processes"):
        ep.parse_args([*TINY, "--out", str(tmp_path)])


class RunsCode:
    """Pickles to a call: whoever unpickles it carelessly makes this folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_wrong_checkpoints_end_in_one_line_and_stay(tmp_path, capsys):
    base, path = [*TINY, "--task", "mim", "--out", str(tmp_path)], tmp_path / "checkpoint.pt"
    def refused(*arguments):
        before = path.read_bytes()
        with pytest.raises(SystemExit) as stop:
            ep.main([*base, *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and path.read_bytes() == before
        return said
    ep.main(base)
    said = refused("--max-steps", "5", "--mask-ratio", "0.75")
    assert "mask_ratio (0.5 there, 0.75 now)" in said and "max_steps (4 there, 5 now)" in said
    assert "no checkpoint of" in refused("--evaluate", "--model", "tiny")
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "no checkpoint of" in refused()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 16                       # one bit among the weights
    path.write_bytes(middle)
    assert "damaged" in refused() and "damaged" in refused("--evaluate")
    torch.save({"weights": 1}, path)
    assert "no checkpoint of" in refused()
    torch.save(RunsCode(str(tmp_path / "canary")), path)
    assert "no checkpoint of" in refused() and not (tmp_path / "canary").exists()
    path.write_bytes(whole)
    assert ep.main([*base, "--lr", "1e-4"])             # what a diverged run needs is free
    ep.main([*base, "--no-resume", "--max-steps", "5"])


@pytest.mark.parametrize("where", ["run", "build_model"])
@pytest.mark.parametrize("error, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory"),
    (RuntimeError("illegal memory access"), None)])
def test_only_a_lack_of_memory_is_called_one(capsys, monkeypatch, error, said, where):
    def fails(*args):
        raise error
    monkeypatch.setattr(ep, where, fails)
    with pytest.raises(RuntimeError if where == "run" and not said else SystemExit):
        ep.main(TINY)
    assert (said or "illegal" * (where != "run")) in capsys.readouterr().err


@pytest.mark.parametrize("error, said", [
    (RuntimeError("No working C++ compiler found"), "error: to compile needs a C++ compiler"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback\nshm: no space"),
     "error: a decoder failed (shm: no space); try fewer --workers"),
    (RuntimeError("[gloo/pair.cc:534] Connection closed by peer"), "another process has ended"),
    (RuntimeError("Storage size calculation overflowed with sizes"), "error: out of memory"),
    (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken pipe")])
def test_what_the_machine_lacks_is_said_in_one_line(capsys, monkeypatch, error, said):
    monkeypatch.setattr(ep, "set_up_device", lambda args: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit):
        ep.main(TINY)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told


def test_training_held_out_and_calibration_images_are_drawn_apart(tmp_path, monkeypatch):
    real, seeds = ep.image_batches, []
    def batches(args, crops, device, batch_size, steps, seed, *more):
        seeds.append(seed)
        return real(args, crops, device, batch_size, steps, seed, *more)
    monkeypatch.setattr(ep, "image_batches", batches)
    ep.main([*TINY, "--out", str(tmp_path)])
    assert len({hash(seed) for seed in seeds}) == 3, seeds      # hash(-1) == hash(-2)


def test_processes_that_see_different_checkpoints_do_not_train(tmp_path, monkeypatch):
    args, other = argparse.Namespace(resume=True, out=str(tmp_path)), [0]
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object",
                        lambda steps, own: steps.__setitem__(slice(None), [own, *other]))
    assert ep.resume(args, None, []) == 0
    other[0] = 4
    with pytest.raises(ep.UserError, match="share --out among machines"):
        ep.resume(args, None, [])


def test_folders_behind_links_are_read_once_and_a_run_s_own_picture_is_not(tmp_path):
    (tmp_path / "far" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").mkdir(parents=True)
    for path in ("far/cat/0.png", "data/dog/1.png", "data/2.png", "data/dog/restorations.png",
                 "data/dog/unfinished-restorations.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / path)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "far" / "cat")
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")        # in circles
    (tmp_path / "data" / "ape").symlink_to(tmp_path / "data" / "dog")       # gives way to the real
    train, held_out, _ = ep.open_data(ep.parse_args([*TINY, "--data", str(tmp_path / "data")]))
    paths = {os.path.relpath(path, tmp_path / "data") for path, _ in train.source + held_out.source}
    assert paths == {"2.png", "cat/0.png", "dog/1.png"}


def test_evaluate_says_when_the_data_are_no_longer_those_of_the_training(tmp_path, capsys):
    people_s_images(tmp_path)
    base = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    ep.main([*base, *TINY, "--data", str(tmp_path), "--task", "sr"])
    ep.main([*base, "--evaluate"])
    classifier = ["--out", str(tmp_path / "classifier"), "--device", "cpu"]
    ep.main([*classifier, *TINY, "--data", str(tmp_path), "--finetune", "scratch"])
    ep.main([*classifier, "--evaluate", "--labels", "4"])           # fewer, but by order
    assert "to train on, now" not in capsys.readouterr().err
    for i in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"more{i}.png")
    ep.main([*base, "--evaluate"])
    assert "had 9 images to train on, now 12" in capsys.readouterr().err


def test_an_empty_folder_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ep.main([*TINY, "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "0 image files there or below" in capsys.readouterr().err


def test_a_disk_that_takes_no_more_ends_in_one_line_and_loses_nothing(
        tmp_path, capsys, monkeypatch):
    """The second save finds the disk full; and OUT may be no folder at all."""
    out, save, kept = tmp_path / "run", ep.save_checkpoint, {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    def save_once(*arguments):
        save(*arguments)
        kept.update({path.name: path.read_bytes() for path in out.iterdir()})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))      # no file may grow beyond
    monkeypatch.setattr(ep, "save_checkpoint", save_once)
    (tmp_path / "file").touch()
    try:
        for path, name, why in ((out, "backbone.pt", "too large"),
                                (tmp_path / "file", "log.jsonl", "exists")):
            with pytest.raises(SystemExit) as stop:
                ep.main([*TINY, "--task", "sr", "--save-every", "2", "--out", str(path)])
            said = capsys.readouterr().err
            assert stop.value.code == 2 and said.count("\n") == 1, said
            assert f"{path / name}: cannot be written (" in said and why in said, said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    assert left.pop("log.jsonl") != kept.pop("log.jsonl") and left == kept and len(kept) == 2


def test_a_diverging_run_stops_with_step_and_value_and_keeps_the_checkpoint(tmp_path, capsys):
    base = [*TINY, "--task", "mim", "--out", str(tmp_path), "--save-every", "1"]
    real = ep.train_step
    def broken(module, optimizers, inputs, rate):
        values = real(module, optimizers, inputs, rate)
        return (values * float("nan")
                if optimizers[0].state[module.log_alpha]["step"] == 3 else values)
    ep.train_step = broken
    try:
        with pytest.raises(SystemExit) as stop:
            ep.main(base)
    finally:
        ep.train_step = real
    assert stop.value.code == 2 and "step 3: loss nan" in capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2
    assert all(v.isfinite().all() for v in checkpoint["module"].values())


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_one_line_on_a_terminal_and_tells_the_time_left(
        tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    record = {"loss": 0.5, "accuracy": 0.5, "gradient_norm": 1.0, "lr": 0.1}
    args = argparse.Namespace(out=str(tmp_path), max_steps=3, batch_size=1, finetune="scratch")
    said = []
    for step, rate in ((1, 2 / 119.7), (2, 5.0), (3, 5.0)):
        ep.log_progress({**record, "step": step, "images_per_second": rate}, args)
        said.append(capsys.readouterr().out)
    assert "1:59 left" in said[0] and "0:00 left" in said[1]
    assert all(line.startswith("\r\033[K") == terminal for line in said)
    assert [line.endswith("\n") for line in said] == [not terminal, not terminal, True]


@pytest.mark.parametrize("task, gain", [("mim", 3), ("denoise", 5)])
def test_a_short_training_restores_and_low_energy_means_data(tmp_path, task, gain):
    """The whole claim in small, after 60 steps: held-out images are restored; clean ones have the
    lower energy even if little is wrong with the others, by half a squared distance over alpha; the
    learned step walks downhill, and leaves alone what is clean."""
    row = ep.main(["--task", task, "--image-size", "16", "--mask-grid", "4", "--max-steps", "60",
                   "--device", "cpu", "--out", str(tmp_path)])[task]
    assert row["psnr_restored"][0] > row["psnr_corrupted"] + gain, row
    assert row["order"] > 0.95 and row["descent"] > 0.95, row
    assert row["energy_restored"] < row["energy_corrupted"], row

    pretrainer = ep.Pretrainer(ep.build_model("nano", 16))
    ep.load_checkpoint(tmp_path / "checkpoint.pt", pretrainer)
    model, alpha = pretrainer.model, pretrainer.log_alpha.exp().item()
    with torch.no_grad():
        x, _ = ep.draw_landscapes(128, 16, ep.make_generator("cpu", 777))
        quarter = corrupted(x, task, 1, 0.25)
        order = (model(x) < model(quarter)).double().mean().item()
        assert order > 0.95, order
        rest = ep.psnr((ep.restore(model, x, alpha)[0] - x).square().mean().item())
        assert rest > 24, rest
        x_s = corrupted(x, task, 2, torch.linspace(0.1, 1, 128))
        rise, distance = model(x_s) - model(x), (x_s - x).square().flatten(1).sum(1)
        ranks = torch.stack([values.argsort().argsort().double() for values in (rise, distance)])
        assert torch.corrcoef(ranks)[0, 1] > 0.9, torch.corrcoef(ranks)
        slope = (2 * alpha * rise / distance).median().item()
        assert 0.25 < slope < 1.2, slope


def test_finetune_starts_from_the_checkpoint_and_freeze_keeps_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ep, "LABELLED", 40)
    ep.main([*TINY, "--task", "mim", "--image-size", "20", "--mask-grid", "5",  # 8, the default,
             "--out", str(tmp_path / "pretrained")])                            # does not divide 20
    assert len(ep.whole_images(ep.parse_args(TINY), None, torch.device("cpu"), 0)[0]) == 10
    before = torch.load(tmp_path / "pretrained" / "backbone.pt")
    for name, flags, kept in (("probe", ["--freeze"], True), ("tuned", ["--labels", "8"], False)):
        metrics = ep.main([
            "--finetune", str(tmp_path / "pretrained" / "checkpoint.pt"), *flags, "--device", "cpu",
            "--max-steps", "3", "--batch-size", "4", "--out", str(tmp_path / name)])
        assert metrics.keys() == {"knn", "accuracy"} and all(0 <= v <= 1 for v in metrics.values())
        after = torch.load(tmp_path / name / "backbone.pt")
        assert all(torch.equal(before[key], after[key]) for key in before) == kept
        assert max((before[key] - after[key]).abs().max() for key in before) < 0.02
        assert "accuracy" in json.loads((tmp_path / name / "log.jsonl").read_text())
        assert ep.main(["--evaluate", "--device", "cpu", "--out", str(tmp_path / name)]) == metrics
    assert "to train on: 8 images" in capsys.readouterr().out


def test_finetune_does_not_go_on_when_the_weights_it_began_with_have_changed(tmp_path, capsys):
    start, tuned = tmp_path / "start", ["--device", "cpu", "--out", str(tmp_path / "tuned")]
    tuned += ["--finetune", str(start / "checkpoint.pt"), "--labels", "4", "--max-steps", "2"]
    for seed in "01":
        ep.main([*TINY, "--task", "sr", "--seed", seed, "--no-resume", "--out", str(start)])
        if seed == "0":
            assert ep.main(tuned) == ep.main(tuned)
    with pytest.raises(SystemExit):
        ep.main(tuned)
    assert "another configuration, finetune_crc (" in capsys.readouterr().err


def test_images_to_classify_fit_a_laptop(monkeypatch):
    counts = []
    monkeypatch.setattr(ep, "image_batches", lambda *a: iter([counts.append(a[3])]))
    for size in (32, 224):
        args, many = ep.parse_args([*TINY, "--image-size", str(size)]), ep.Crops(range(9000), 1, 0)
        for crops in (None, many):
            ep.whole_images(args, crops, None, 0)
    assert counts == [1024, 4096, 445, 1783]


def test_one_process_takes_the_vote_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ep, "RANK", 1)
    monkeypatch.setattr(ep, "knn_accuracy", None)       # calling it would raise TypeError
    assert ep.main([*TINY, "--finetune", "scratch", "--labels", "4", "--out", str(tmp_path)]) == {}


def test_labels_are_the_first_folders_and_stay_with_their_images(tmp_path):
    for i, (name, value) in enumerate([("ant", 0), ("bee", 255)] * 12):
        (tmp_path / name / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / name / "deep" / f"{i}.png")
    args = ep.parse_args([*TINY, "--data", str(tmp_path), "--finetune", "scratch", "--labels", "6"])
    train, held_out, classes = ep.open_data(args)
    assert (len(train.source), len(held_out.source), classes) == (6, 3, 2)
    for crops in (train, held_out):
        x, labels = ep.whole_images(args, crops, torch.device("cpu"), seed=0)
        assert len(x) == len(crops.source) and torch.equal(x.mean((1, 2, 3)), labels * 2.0 - 1)


def test_named_data_train_and_classify(tmp_path, monkeypatch):
    """The named sets' path through the script, with a torchvision set that needs no network."""
    def pictures(root, download, train):
        return torchvision.datasets.FakeData(20 if train else 10, (3, 32, 32), 10)
    monkeypatch.setitem(ep.NAMED_DATA, "cifar10", (pictures, {"train": True}, {"train": False}, 10))
    base = [*TINY, "--data", "cifar10", "--out"]
    assert "sr" in ep.main([*base, str(tmp_path / "a"), "--task", "sr"])
    assert ep.main([*base, str(tmp_path / "b"), "--finetune", "scratch"])["accuracy"] <= 1


def test_classifiers_from_a_checkpoint_and_from_scratch_have_folders_of_their_own(tmp_path):
    ep.main([*TINY, "--out", str(tmp_path)])
    outs = [ep.parse_args(["--finetune", start]).out
            for start in ("scratch", str(tmp_path / "checkpoint.pt"))]
    assert outs == ["runs/scratch", "runs/finetune"]


@given(seed=seeds, scale=st.floats(0.1, 10), shift=st.floats(-3, 3))
def test_classifier_looks_at_what_tells_images_apart(seed, scale, shift):
    """Not at what their representations share, nor at its size; an image's class needs no
    company."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.head, model.represent = torch.nn.Linear(3, 1), lambda x: x
    classifier = ep.Classifier(model, 4)
    x, labels = 5 * torch.randn(16, 3), torch.randint(4, (16,))
    torch.testing.assert_close(classifier(shift + scale * x, labels), classifier(x, labels),
                               rtol=1e-3, atol=1e-3)
    for _ in range(100):
        classifier(x, labels)
    score = classifier.linear((x - x.mean(0)) / x.std(0)).argmax(1)
    for chunk in (1, 16):
        assert classifier.accuracy(x, labels, chunk) == (score == labels).double().mean()
    assert classifier.norm.training


def test_knn_counts_the_votes_of_the_nearest():
    model = torch.nn.Module()
    model.represent = lambda x: x
    east, north = (torch.tensor([[1.0, 0.1], [2.0, 0.0], [3.0, 0.3]]),
                   torch.tensor([[0.1, 1.0], [0.0, 5.0]]))
    x, labels = torch.cat([east, north]), torch.tensor([0, 0, 0, 1, 1])
    test = torch.tensor([[9.0, 1.0], [0.2, 0.9], [0.1, 7.0], [1.0, 0.0]])
    assert ep.knn_accuracy(model, x, labels, test, torch.tensor([0, 1, 1, 1]), k=2, chunk=2) == 0.75


def test_a_stopped_run_saves_says_so_and_goes_on_bit_for_bit(tmp_path, capsys, monkeypatch):
    """The step ends, a checkpoint is written, the status is the signal's; and nothing is lost."""
    monkeypatch.setattr(ep, "LOG_EVERY", 1)
    options, step = [*TINY, "--task", "mim", "--max-steps", "12", "--out"], ep.train_step

    def interrupted(*inputs):
        if (tmp_path / "stopped" / "log.jsonl").read_text().count("step") == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*inputs)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ep, "train_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        ep.main([*options, str(tmp_path / "stopped")])
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().err.count("SIGINT: saved after step 3;") == 1
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt")["step"] == 3
    monkeypatch.setattr(ep, "train_step", step)
    for name in ("whole", "stopped"):
        ep.main([*options, str(tmp_path / name)])
    assert files_equal(tmp_path / "whole" / "checkpoint.pt", tmp_path / "stopped" / "checkpoint.pt")
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "log.jsonl").open()]
    assert steps == list(range(1, 13))


def test_when_one_of_two_processes_is_told_to_stop_both_do(tmp_path):
    (tmp_path / "often.py").write_text(
        "import os, sys, energy_pretrain as ep; ep.LOG_EVERY = 1; "
        "open(sys.argv[1] + os.environ['RANK'], 'w').write(str(os.getpid())); "
        "ep.main(sys.argv[2:])")
    command = [*TORCHRUN, str(tmp_path / "often.py"), str(tmp_path / "pid"), *TINY, "--task", "mim",
               "--max-steps", "30", "--out", str(tmp_path)]
    stopped = subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while "step     2" not in stopped.stdout.readline():
        assert stopped.poll() is None
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    said = stopped.communicate(timeout=60)[1]
    assert said.count("SIGTERM: saved after step") == 1, said
    assert 2 <= torch.load(tmp_path / "checkpoint.pt")["step"] < 30


def test_fused_attention_computes_the_same():
    torch.manual_seed(0)
    attention, x = ep.Attention(16, 2), torch.randn(2, 5, 16)
    expected = attention(x)
    attention.attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attention(x), expected)


def test_benchmark_supervises_with_fused_attention_but_counts_without(monkeypatch):
    count, counted = ep.FlopCounterMode.get_total_flops, []     # it knows not all fused kernels
    monkeypatch.setattr(ep.FlopCounterMode, "get_total_flops",
                        lambda self: counted.append(count(self)) or counted[-1])
    monkeypatch.setattr(ep.F, "scaled_dot_product_attention", lambda q, k, v: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ep.main([*TINY, "--benchmark"])
    assert len(counted) == 3 and all(counted)


def test_benchmark_times_every_way_and_counts_operations(capsys, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **k, backend="aot_eager"))
    build, built = ep.build_pretrainer, []
    monkeypatch.setattr(ep, "build_pretrainer", lambda *a: built.append(build(*a)) or built[0])
    monkeypatch.setattr(ep, "WORLD_SIZE", 4)    # one of four processes, its images alone
    monkeypatch.setattr(ep, "set_up_device", lambda args: torch.device("cpu"))
    medians = ep.main([*TINY, "--benchmark", "--batch-size", "4", "--num-steps", "2"])
    assert built[0].num_steps == 1              # as in the row that is written for one step only
    assert len(medians) == 6 and all(seconds > 0 for seconds in medians.values())
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert "16 px, batch 1;" in first
    ops = [float(line.split()[-3]) for line in lines]
    assert ops[1:3] == [1, 1] and ops[0] == pytest.approx(1 / 3, abs=0.05)
    assert all(1.9 < ratio < 2.5 for ratio in ops[3:])


def test_help_says_every_default_in_words(capsys):
    with pytest.raises(SystemExit) as stop:
        ep.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "None" not in said
    for default in ("1500; with CUDA no limit", "no limit; with CUDA 100", "False; with CUDA True"):
        assert f"(default: {default})" in said
    assert "of all that is random (default: 0)" in said


def test_with_cuda_the_batch_grows_with_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = {flag: default for flag, _, default, _ in runpy.run_path(SCRIPT)["FLAGS"]}
    assert flags["--batch-size"] == (32, 512)


def test_importing_the_module_does_nothing(capsys):
    assert "main" in runpy.run_path(SCRIPT, run_name="imported")
    assert capsys.readouterr() == ("", "")
