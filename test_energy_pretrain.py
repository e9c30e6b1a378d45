"""Tests of energy_pretrain.py, in its order; the names of the tests are its specification.

`pytest -q` runs them on a CPU, without a network. What the README measures beside the script:
`python test_energy_pretrain.py curves [OUT]` draws the energies of a trained run, and
`python test_energy_pretrain.py mae` (or simmim), with the script's own flags, pretrains the
usual way, to compare.
"""
import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

import energy_pretrain as ep

torch.set_num_threads(1)      # small tensors: two threads would wait for each other
settings.register_profile("here", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("here")

SCRIPT = str(Path(ep.__file__))
TINY = ["--image-size", "16", "--batch-size", "4", "--max-steps", "4", "--eval-images", "12",
        "--device", "cpu", "--workers", "0"]
seeds, tasks = st.integers(0, 2**31), st.sampled_from(ep.TASKS)

def images(seed, batch=3, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(dtype)

def tiny_vit(seed=0, head=True, depth=1):
    """A small ViT; with a head drawn at random, since a zero head makes a flat energy."""
    torch.manual_seed(seed)
    model = ep.ViT(16, 4, dim=16, depth=depth, num_heads=2)
    if head:
        torch.nn.init.normal_(model.head.weight)
    return model

OPTIONS = vars(ep.parse_args([]))       # of 16 patches mim hides 10

def corrupted(x, task, seed, **options):
    return ep.corrupt(x, task, ep.make_generator("cpu", seed), OPTIONS | options)

def pieces(x, side):
    """Images (B, C, S, S) as square pieces (B, M, C*side*side)."""
    return torch.nn.functional.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)

# ==== 1. Restoration and loss ================================================
def bowl(p, curvature=1.0):
    """An energy with a parameter, whose double backward one can write down."""
    return lambda x: curvature * (p * x**2).flatten(1).sum(1) / 2

@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_training_goes_through_each_step_but_not_from_one_to_the_next(num_steps):
    """With E = p x^2 / 2 a step is x (1 - alpha p); its derivative by p is -alpha x, x cut off."""
    p, x = torch.tensor(0.3, requires_grad=True), images(0)
    steps = ep.restore(bowl(p), x, 0.5, num_steps, create_graph=True)
    steps.sum().backward()
    starts = [x * 0.85**k for k in range(num_steps)]
    torch.testing.assert_close(steps.detach(), torch.stack([y * 0.85 for y in starts]))
    assert p.grad.item() == pytest.approx(-0.5 * sum(y.sum().item() for y in starts), rel=1e-4)

@given(seeds)
@settings(max_examples=4)
def test_the_gradient_of_the_loss_equals_finite_differences(seed):
    pretrainer = ep.Pretrainer(tiny_vit(seed % 7), 2.0)
    pair = images(seed), hide(images(seed + 1), [0, 9, 9]), 1, 2, 9    # one whole, two masked
    pretrainer(*pair).backward()
    for name in ("model.head.weight", "model.blocks.0.attn.qkv.weight"):
        p = pretrainer.get_parameter(name)
        way = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        def loss(h):
            return torch.func.functional_call(pretrainer, {name: p + h * way}, pair).item()
        expected, got = (loss(3e-3) - loss(-3e-3)) / 6e-3, (p.grad * way).sum().item()
        assert got == pytest.approx(expected, rel=0.05, abs=2e-5), name

@given(seeds, tasks)
def test_a_small_step_lowers_the_energy(seed, task):
    """For mim: the energy given what is seen, hidden patches staying those of x_tilde."""
    model = tiny_vit(seed % 11)
    x_tilde = corrupted(images(seed), task, seed)
    hidden = model.find_hidden(x_tilde)
    model.find_hidden = lambda x: hidden
    x_hat = ep.restore(model, x_tilde, alpha=1e-2)[0]
    assert x_hat.shape == x_tilde.shape
    with torch.no_grad():
        assert (model(x_hat) < model(x_tilde)).all()

@given(seeds, st.integers(1, 4), st.booleans())
@settings(max_examples=8)
def test_k_steps_equal_k_times_one_step(seed, num_steps, create_graph):
    model, x = tiny_vit(), images(seed)
    steps = ep.restore(model, x, 3.0, num_steps, create_graph)
    assert steps.shape == (num_steps, *x.shape) and steps.requires_grad == create_graph
    for x_k in steps:
        x = ep.restore(model, x, 3.0)[0]
        assert torch.equal(x, x_k)

@given(seeds, st.integers(2, 4))
@settings(max_examples=5)
def test_an_images_energy_and_restoration_do_not_depend_on_its_batch(seed, batch):
    model, x = tiny_vit(), images(seed, batch)
    alone = torch.cat([model(x[i:i + 1]) for i in range(batch)])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)
    alone = torch.cat([ep.restore(model, x[i:i + 1], 3.0, 2) for i in range(batch)], 1)
    torch.testing.assert_close(ep.restore(model, x, 3.0, 2), alone, rtol=1e-3, atol=1e-4)

def test_restore_works_without_gradients_and_leaves_none():
    model = tiny_vit()
    with torch.no_grad():
        quiet = ep.restore(model, images(0), 3.0)
    assert torch.equal(quiet, ep.restore(model, images(0), 3.0)) and not quiet.requires_grad
    assert all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_restore_refuses_energies_that_would_broadcast(shape):
    with pytest.raises(ValueError, match="shape"):
        ep.restore(lambda x: x.sum() * torch.ones(shape), images(0), 1.0)

def test_the_restoration_loss_counts_errors_relative_to_how_far_images_were_moved():
    x = images(0, 4)
    far = torch.tensor([0.5, 0.25, 0.1, 0.01]).view(4, 1, 1, 1)     # the last below the clamp
    x_hat = torch.stack([x + 0.1, x + 1.5])                         # K = 2; the second is linear
    expected = ((0.1**2 / 2 + 1.0) / torch.tensor([0.5, 0.25, 0.1, 0.05]) / 2).mean()
    torch.testing.assert_close(ep.restoration_loss(x_hat, x, x + far), expected)

@pytest.mark.parametrize("curvature, alpha, missing", [
    (1, 1, 0), (0.25, 1, 0), (0.1, 1, 0.15), (0.1, 2, 0.05), (0, 1, 0.25), (-1, 1, 1.25)])
def test_the_order_loss_is_the_missing_share_of_the_rise(curvature, alpha, missing):
    """Clean is x = 0; with E = |x|^2 / 2 and alpha = 1 every step would be perfect."""
    loss = ep.order_loss(bowl(1.0, curvature), torch.zeros(3, 3, 16, 16), images(0), alpha)
    assert loss.item() == pytest.approx(missing, abs=1e-5)

def test_the_order_loss_passes_over_images_that_their_corruption_leaves_as_they_are():
    model, x = tiny_vit(), images(0)
    loss = ep.order_loss(model, x, x + torch.tensor([0, 0, 1e-4]).view(3, 1, 1, 1), 1.0)
    loss.backward()
    assert loss < 1e-3 and all(p.grad.isfinite().all() for p in model.parameters())

# ==== 2. Corruptions =========================================================
@given(seeds, tasks, st.integers(1, 4), st.sampled_from([8, 16, 32]),
       st.sampled_from([torch.float32, torch.float64]))
def test_corrupt_keeps_shape_dtype_and_its_input(seed, task, batch, size, dtype):
    x = images(seed, batch, size, dtype)
    before, x_tilde = x.clone(), corrupted(x, task, seed)
    assert x_tilde.shape == x.shape and x_tilde.dtype == dtype and x_tilde.isfinite().all()
    assert (x_tilde != x).flatten(1).any(1).all(), "an image was left as it is"
    assert torch.equal(x, before) and torch.equal(x_tilde, corrupted(x, task, seed))

@given(seeds, st.sampled_from([2, 4, 8]), st.floats(0.01, 0.99))
def test_the_share_asked_for_is_hidden_in_whole_patches_and_whole_pieces_permuted(
        seed, side, ratio):
    x, grid = images(seed).abs() + 0.1, 16 // side          # no pixel is zero before
    masked = corrupted(x, "mim", seed, mask_ratio=ratio, patch_size=side)
    patches = pieces(masked == 0, side)
    assert (patches.all(2) | ~patches.any(2)).all(), "a patch is hidden in part"
    assert (patches.any(2).sum(1) == round(ratio * grid**2)).all()
    assert torch.equal(masked[masked != 0], x[masked != 0])
    for a, b in zip(pieces(x, side), pieces(corrupted(x, "sort", seed, sort_grid=grid), side)):
        assert sorted(a.tolist()) == sorted(b.tolist())

@pytest.mark.parametrize("task", ["mim", "sort"])
def test_each_place_is_hidden_and_filled_equally_often(task):
    x = torch.arange(1.0, 5.0).view(1, 1, 2, 2).expand(4000, 3, 2, 2)
    first = corrupted(x, task, 0, sort_grid=2, patch_size=1)[:, 0, 0, 0]
    shares = torch.bincount(first.long(), minlength=5) / len(x)
    expected = torch.tensor([0.5, 0.5, 0, 0, 0] if task == "mim" else [0, 0.25, 0.25, 0.25, 0.25])
    assert (shares - expected).abs().max() < 0.03, shares      # nearly 4 standard deviations

@given(seeds, st.sampled_from([2, 4]))
def test_lower_resolution_averages_and_enlarges(seed, factor):
    x = images(seed)
    small = torch.nn.functional.avg_pool2d(x, factor)
    again = torch.nn.functional.interpolate(small, scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(corrupted(x, "sr", 0, sr_factor=factor), again)

def test_remove_color_makes_the_grey_of_bt_601():
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        x = torch.zeros(1, 3, 4, 4)
        x[:, channel] = 1
        torch.testing.assert_close(corrupted(x, "color", 0), torch.full_like(x, weight))

@given(seeds, st.integers(0, 9), st.integers(1, 12), st.integers(1, 5))
def test_corrupt_batch_deals_the_tasks_in_turn_and_corrupts_the_first_in_part(
        seed, turn, batch, count):
    """Two processes with half a batch each deal as one does, if the second begins later."""
    chosen, x = ep.TASKS[:count], images(seed, batch).clamp(0.1, 1)
    y, x_tilde, num_partial, num_masked, num_hidden = ep.corrupt_batch(
        x, chosen, ep.make_generator("cpu", seed), OPTIONS | {"partial_share": 0.25}, turn)
    assert num_partial == -(-batch // 4) and num_hidden in (0, 10) and x_tilde.shape == x.shape
    assert torch.equal(y[:num_partial], x[:num_partial])
    origin = [next(i for i in range(batch) if torch.equal(x[i], image)) for image in y]
    assert sorted(origin) == list(range(batch))
    dealt = [chosen[(turn + i) % count] for i in origin]
    masked = [task == "mim" and i >= num_partial for i, task in enumerate(dealt)]
    assert sum(masked) == num_masked and masked == sorted(masked), "masked images come last"
    assert pieces(x_tilde, 4).any(2).logical_not().sum(1).tolist() == [10 * m for m in masked]
    for i in range(num_partial, batch):
        if dealt[i] in ("sr", "color"):
            torch.testing.assert_close(x_tilde[i], corrupted(y, dealt[i], 0)[i])
        if dealt[i] == "denoise":
            assert 0.45 < (x_tilde[i] - y[i]).std() < 0.55

def test_strengths_are_squares_of_uniform_numbers():
    x = images(0, 400, 4)
    _, x_tilde, *_ = ep.corrupt_batch(
        x, ["color"], ep.make_generator("cpu", 0), {"partial_share": 1.0})
    way = corrupted(x, "color", 0) - x
    s = ((x_tilde - x) * way).flatten(1).sum(1) / way.square().flatten(1).sum(1)
    torch.testing.assert_close(x_tilde, x + s.view(-1, 1, 1, 1) * way)
    assert 0 <= s.min() and s.max() <= 1 and abs(s.mean() - 1 / 3) < 0.04

# ==== 3. The energy ==========================================================
def test_the_vit_reads_out_a_weighted_distance_of_patches_from_what_is_expected():
    model, x = tiny_vit(), images(0)
    p, head = model.embed(x), model.head
    tokens = model.encode(p)
    z = head.norm(head.block(tokens + head.pos_embed))
    torch.testing.assert_close(model(x), ((p - z)**2 @ head.weight).mean(1) / 2)
    torch.testing.assert_close(model.represent(x), tokens.mean(1))

def hide(x, numbers, seed=0):
    """x (B, 3, 16, 16) with so many of the 16 patches hidden, a number for each image."""
    order = torch.rand(len(x), 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    mask = (order < torch.tensor(numbers).view(-1, 1)).view(-1, 1, 4, 4)
    return x.masked_fill(mask.repeat_interleave(4, 2).repeat_interleave(4, 3), 0)

@given(seeds, st.integers(1, 15))
@settings(max_examples=5)
def test_features_of_seen_patches_do_not_depend_on_what_is_hidden(seed, number):
    """The blocks see nothing of it: not its pixels, and not that it is there."""
    model, x = tiny_vit(), images(seed)
    seen = (~model.find_hidden(hide(x, [number] * 3, seed))).nonzero()[:, 1].view(3, -1)
    patches = model.embed(x)
    features = model.encode(patches, seen)
    assert features.shape == (3, 16 - number, 16)
    places = seen.unsqueeze(2).expand(-1, -1, 16)
    noise = torch.full_like(patches, 9.0).scatter(1, places, patches.gather(1, places))
    assert torch.equal(model.encode(noise, seen), features)
    tokens = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1),
                        (patches + model.pos_embed[:, 1:]).gather(1, places)], 1)
    alone = model.norm(torch.nn.Sequential(*model.blocks)(tokens))[:, 1:]
    assert torch.equal(alone, features)

@given(seeds, st.lists(st.integers(0, 16), min_size=1, max_size=5))
@settings(max_examples=8)
def test_masked_and_whole_images_in_one_batch_equal_one_by_one(seed, numbers):
    """An image shows by its zeros which way it goes; to be told how many changes nothing."""
    model, x = tiny_vit(), hide(images(seed, len(numbers)), numbers, seed)
    told = torch.cat([model(x[i:i + 1], n) for i, n in enumerate(numbers)])
    torch.testing.assert_close(model(x), told, rtol=1e-4, atol=1e-5)
    alone = torch.cat([ep.restore(model, x[i:i + 1], 3.0, 2) for i in range(len(x))], 1)
    torch.testing.assert_close(ep.restore(model, x, 3.0, 2), alone, rtol=1e-3, atol=1e-4)

@given(seeds, st.integers(1, 15))
@settings(max_examples=8)
def test_a_step_moves_hidden_pixels_alone(seed, number):
    x_tilde = hide(images(seed), [number] * 3, seed)
    x_hat = ep.restore(tiny_vit(seed % 7), x_tilde, 3.0)[0]
    assert torch.equal(x_hat != x_tilde, x_tilde == 0)

def test_energies_stay_float32_under_autocast():
    """In bfloat16, with its three digits, neighbouring energies would be one."""
    model, x = ep.build_model("nano", 32, 4), images(0, 2, 32)
    torch.nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(x), model(x).bfloat16().float())

def test_vit_features_equal_torchvisions_vit_with_the_same_weights():
    model, x, tokens = tiny_vit(depth=2).double(), images(0, dtype=torch.float64), []
    other = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64).double().eval()
    other.heads = torch.nn.Identity()
    layers = ["patch_embed.proj", *(f"blocks.{i}.{layer}" for i in range(2) for layer in
              "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()), "norm"]    # timm's names
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    names = ["cls_token", *names[:2], "pos_embed", *names[2:]]      # in torchvision's order
    values = [torch.nn.init.normal_(p, std=0.2) for p in other.parameters()]
    missing = model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    assert all(name.startswith("head.") for name in missing.missing_keys) and not missing[1]
    other.encoder.register_forward_hook(lambda module, args, out: tokens.append(out))
    other(x)
    torch.testing.assert_close(model.encode(model.embed(x)), tokens[0][:, 1:])

def test_positions_are_alike_where_they_are_near():
    """As exp(-(0.7 d)^2 / 2) at distance d, but for what is left to chance."""
    torch.manual_seed(1)
    position = ep.random_waves(8, 96)[0] / 0.6                                  # (N, D)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    expected = (-(0.7 * torch.cdist(place, place))**2 / 2).exp()
    error = (position @ position.T / position.shape[1] - expected).abs()
    assert error.mean() < 0.1 and error.max() < 0.5, error

def test_all_parameters_train_through_the_gradient_and_the_first_step_moves_nothing():
    torch.manual_seed(0)
    pretrainer = ep.Pretrainer(ep.build_model("nano", 32, 4), 256.0)
    assert not pretrainer.model.head.weight.any()
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=1.0)
    for _ in range(2):      # the first step only moves the head away from zero
        optimizer.zero_grad()
        pretrainer(images(1, 2, 32), images(2, 2, 32)).backward()
        optimizer.step()
    for name, p in pretrainer.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name

def test_the_loss_adds_the_order_of_the_first_images():
    x, x_tilde = images(0), images(1)
    pretrainer = ep.Pretrainer(tiny_vit(), 2.0, order_weight=3.0)
    expected = ep.order_loss(pretrainer.model, x[:2], x_tilde[:2], 2.0)
    assert expected > 0.1
    torch.testing.assert_close(pretrainer(x, x_tilde, 2) - pretrainer(x, x_tilde), 3 * expected)

def test_the_second_step_begins_where_the_first_ended_with_a_whole_image():
    pretrainer, x, x_tilde = ep.Pretrainer(tiny_vit(), 2.0, 2), images(0), hide(images(1), [9] * 3)
    x_hat = ep.restore(pretrainer.model, x_tilde, 2.0, 2)
    assert ((x_hat[0] != x_tilde) == (x_tilde == 0)).all() and (x_hat[1] != x_hat[0]).all()
    expected = ep.restoration_loss(x_hat, x, x_tilde)
    torch.testing.assert_close(pretrainer(x, x_tilde, 0, 3, 9), expected)

class Counter(TorchDispatchMode):
    """Counts multiplications. (FlopCounterMode itself cannot look into torch.func.grad.)"""
    total = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, packet = func(*args, **kwargs or {}), func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs or {}, out_val=out)
        return out

def test_a_mim_step_costs_at_most_0_7_supervised_ones_and_a_whole_one_2_3():
    """In multiplications, of ViT-S/16 at 224 px; "meta" tensors have a shape and no numbers."""
    with torch.device("meta"):
        model, x = ep.build_model("small", 224, 16), torch.empty(128, 3, 224, 224)
    pretrainer, flops = ep.Pretrainer(model, 1.0), []
    num_hidden, num_partial = ep.count_hidden(224, 0.75, 16), math.ceil(128 * OPTIONS["partial_share"])
    for loss in (lambda: model.represent(x).sum(), lambda: pretrainer(x, x),
                 lambda: pretrainer(x, x, num_partial, 128 - num_partial, num_hidden)):
        with Counter() as counter:
            loss().backward()
        flops.append(counter.total)
    supervised, whole, mim = flops
    assert 2 < whole / supervised < 2.3 and 0.3 < mim / supervised <= 0.7, flops

# ==== 4. Processes and randomness ============================================
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_a_generator_follows_from_its_key(key):
    first, again, other = (torch.rand(4, generator=ep.make_generator("cpu", *k))
                           for k in (key, key, [*key, 1]))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ep.seed_from("crop", 0, 17) == 2794066429       # in every version of Python

def test_half_of_a_launchers_environment_is_one_process(monkeypatch):
    """RANK=1 left over from a job would print and save nothing."""
    def loaded():
        spec = importlib.util.spec_from_file_location("fresh", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.RANK, module.LOCAL_RANK, module.WORLD_SIZE
    values = {"RANK": "1", "LOCAL_RANK": "2", "WORLD_SIZE": "", "MASTER_ADDR": "localhost",
              "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert loaded() == (0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert loaded() == (1, 2, 4)

@pytest.mark.parametrize("launched, count, rank, index", [
    (True, 4, 2, 2), (False, 4, 2, 2), (False, 1, 2, 0), (True, 1, 2, None), (False, 0, 0, None)])
def test_a_process_takes_its_own_gpu(monkeypatch, launched, count, rank, index):
    """srun shows each process one GPU alone; torchrun shows all to each."""
    monkeypatch.setattr(ep, "LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(ep.dist, "is_torchelastic_launched", lambda: launched)
    if index is None:
        with pytest.raises(ep.UserError, match=f"cuda:{rank}: not on this machine"):
            ep.choose_device("cuda")
    else:
        assert ep.choose_device("cuda") == torch.device("cuda", index)
        torch.set_float32_matmul_precision("highest")

def test_a_callers_own_process_group_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    monkeypatch.setattr(ep, "train", lambda *inputs: None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    ep.main([*TINY, "--task", "sr", "--out", str(tmp_path)])
    assert torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()

# ==== 5. Data ================================================================
def test_landscapes_are_those_that_the_readmes_figures_were_measured_on():
    x, kind = ep.draw_landscapes(64, 24, ep.make_generator("cpu", 0))
    right, down = torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24).view(-1, 1)
    found = [*x.mean((0, 2, 3)), x.std(), (x * right).mean(), (x * down).mean()]
    assert torch.stack(found).tolist() == pytest.approx(
        [-0.103097, -0.111182, -0.196050, 0.400237, -0.004598, -0.086577], abs=2e-5)
    assert torch.bincount(kind).tolist() == [20, 16, 13, 15] and x.abs().max() <= 1

def test_every_use_step_and_process_has_its_own_landscapes():
    args, device = ep.parse_args(TINY), torch.device("cpu")
    batches = [x for use in ("train", "held out") for rank in (0, 1) for x, _ in
               ep.image_batches(args, None, device, 4, range(5, 7), use, rank, 2)]
    assert all(x.shape == (2, 3, 16, 16) for x in batches)
    assert len({x.sum().item() for x in batches}) == 8

def people_s_images(folder):
    """One file of each sort that people have, the readable ones red, and some that are no data."""
    red = Image.new("RGB", (40, 30), (200, 40, 40))
    for name in ("@alice", "deep/er", ".hidden", "@eaDir"):
        (folder / name).mkdir(parents=True)
        red.save(folder / name / "image.png")
    red.save(folder / "photo.JPG", "JPEG")
    red.save(folder / "web.webp")
    red.convert("CMYK").save(folder / "press.jpg")
    red.convert("P").save(folder / "palette.png")
    red.convert("RGBA").save(folder / "alpha.png")
    red.resize((1, 1)).save(folder / "dot.png")
    red.resize((2, 900)).save(folder / "thin.png")
    red.save(folder / "restorations.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "link").symlink_to(folder / "deep", target_is_directory=True)
    (folder / "deep" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "same.png").symlink_to(folder / "palette.png")

def class_folders(folder):
    """20 dark images and 20 bright ones, each sort in a folder of its own."""
    for i in range(40):
        (folder / f"kind{i % 2}").mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((20, 20), 60).point(lambda v: v // 2 + 100 * (i % 2))
        noise.convert("RGB").save(folder / f"kind{i % 2}" / f"{i:02}.png")

def test_a_folders_images_are_found_and_what_is_left_out_is_said(tmp_path, capsys):
    people_s_images(tmp_path)
    pairs = ep.find_images(str(tmp_path))
    assert [(os.path.relpath(file, tmp_path), folder) for file, folder in pairs] == [
        *((name, ".") for name in ("alpha.png", "dot.png", "palette.png", "photo.JPG",
                                   "press.jpg", "thin.png", "web.webp")),
        ("@alice/image.png", "@alice"), ("deep/er/image.png", "deep")]
    assert f"{tmp_path}: 9 images (.jpg .jpeg .png" in capsys.readouterr().out
    photo = str(tmp_path / "photo.JPG")
    assert ep.find_images(photo) == [(photo, "..")]
    crops = ep.Crops(pairs, 16, False)
    for index, (file, _) in enumerate(pairs):
        pixels, _ = crops[index, 0]
        assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
        error = pixels[:, 8, 8].float() - torch.tensor([200.0, 40.0, 40.0])
        assert error.abs().max() < 12, file

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_drawings_on_a_transparent_ground_are_laid_on_white(tmp_path, mode):
    """Ink and ground are both black there; only their opacity differs."""
    drawing = Image.new("RGBA", (20, 20))
    drawing.paste((0, 0, 0, 255), (0, 0, 10, 20))
    drawing.convert(mode).save(tmp_path / "drawing.png")
    pixels, _ = ep.Crops([(str(tmp_path / "drawing.png"), 0)], 20, False)[0, 0]
    assert (pixels[:, :, :10] == 0).all() and (pixels[:, :, 10:] == 255).all()

def test_photographs_are_turned_upright_and_large_jpegs_decoded_small(tmp_path):
    image, exif = Image.new("RGB", (400, 200)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 200, 200))      # its left half is white
    exif[274] = 6                                       # the camera was held on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    crops = ep.Crops([(str(tmp_path / "turned.jpg"), 0)], 16, False)
    pixels, _ = crops[0, 0]
    assert pixels[:, 0].min() > 240 and pixels[:, -1].max() < 15       # now the upper half is
    crops.crop = lambda image: image.size
    assert max(crops[0, 0][0]) < 200

@pytest.mark.parametrize("fault", ["cut", "16 bits", "float"])
def test_in_place_of_an_unusable_file_come_others_drawn_at_random(tmp_path, capsys, fault):
    pairs = [(str(tmp_path / f"{i}.tif"), i) for i in range(6)]
    for path, i in pairs:
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(path)
    if fault == "cut":
        Path(pairs[0][0]).write_bytes(Path(pairs[0][0]).read_bytes()[:45])
    else:
        Image.new("F" if fault == "float" else "I;16", (20, 20)).save(pairs[0][0])
    crops, labels = ep.Crops(pairs, 16, False), []
    for seed in range(60):
        pixels, label = crops[0, seed]
        assert (pixels[0] == 40 * label).all() and label > 0
        labels.append(label)
    assert min(map(labels.count, range(1, 6))) > 2
    assert f"left out {pairs[0][0]}" in capsys.readouterr().err
    with pytest.raises(ep.UserError, match="0.tif cannot be used"):
        ep.Crops(pairs[:1], 16, False)[0, 0]

def test_crops_follow_from_their_seed_and_without_augmentation_are_the_middle():
    noise = Image.effect_noise((64, 96), 80)
    crops, middle = (ep.Crops([(noise, 3)], 16, augment) for augment in (True, False))
    assert torch.equal(crops[0, 5][0], crops[0, 5][0]) and crops[0, 5][1] == 3
    assert not torch.equal(crops[0, 5][0], crops[0, 6][0])
    expected = torchvision.transforms.v2.functional.pil_to_tensor(
        noise.convert("RGB").resize((16, 24), Image.Resampling.BILINEAR).crop((0, 4, 16, 20)))
    assert torch.equal(middle[0, 5][0], expected)

@given(seeds, st.integers(1, 20), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_every_image_comes_once_an_epoch_however_many_processes(seed, count, world_size, part):
    batch = world_size * part
    def row(world_size):
        ranks = [ep.crop_keys(count, batch, range(3 * count), ("train", seed), rank, world_size)
                 for rank in range(world_size)]
        return [key for step in zip(*ranks) for keys in step for key in keys]
    keys = row(world_size)
    assert keys == row(1) and len(set(keys)) == len(keys)
    for epoch in range(len(keys) // count):
        assert sorted(index for index, _ in keys[epoch * count:][:count]) == list(range(count))

def test_every_tenth_image_is_held_out_or_what_val_holds(tmp_path, capsys):
    class_folders(tmp_path / "train")
    args = ep.parse_args([*TINY, "--data", str(tmp_path / "train"), "--no-augment"])
    data = ep.open_data(args)
    assert (len(data.train), len(data.held_out), data.num_classes) == (36, 4, 2)
    assert not set(data.train) & set(data.held_out)
    (x, labels), = ep.image_batches(args, data.train, torch.device("cpu"), 36, [0], "train")
    assert torch.equal(labels, (x.mean((1, 2, 3)) > -0.1).long()) and x.min() >= -1 and x.max() <= 1
    (tmp_path / "val" / "kind1").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "kind1" / "a.png")
    data = ep.open_data(ep.parse_args([*TINY, "--data", str(tmp_path)]))
    assert (len(data.train), data.num_classes) == (40, 2)
    assert data.held_out == [(str(tmp_path / "val" / "kind1" / "a.png"), 1)]
    assert f"{tmp_path}/val: 1 images" in capsys.readouterr().out

@given(seeds, st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_labels_takes_as_many_of_each_class_as_there_are(seed, labels, count):
    pairs = list(enumerate(labels))
    subset = ep.balanced_subset(pairs, count, torch.Generator().manual_seed(seed))
    taken = [label for _, label in subset]
    assert len(set(subset)) == min(count, len(labels))
    for a in set(labels):
        missing = taken.count(a) < labels.count(a)
        assert not missing or taken.count(a) >= max(map(taken.count, labels)) - 1, (a, taken)

def test_epochs_count_images_and_the_first_epoch_sees_each_once(tmp_path, monkeypatch):
    class_folders(tmp_path / "images")
    decoded, decode = [], ep.Crops.decode
    monkeypatch.setattr(ep.Crops, "decode", lambda self, source: (
        decoded.append(source), decode(self, source))[1])
    ep.main([*TINY[:4], "--epochs", "1", "--task", "sr", "--eval-images", "1", "--workers", "0",
             "--device", "cpu", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")])
    assert saved(tmp_path / "run")["config"]["max_steps"] == 9              # 36 images by fours
    assert len(decoded) == 37 and len(set(decoded[:36])) == 36

def test_cifar10_has_its_own_held_out_part(monkeypatch):
    calls = []
    def cifar(root, train=True, download=False):
        calls.append(download)
        if len(calls) > 3:
            raise OSError("no route to host")
        return [(Image.new("RGB", (32, 32)), train)] * (50 if train else 10)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar)
    args = ep.parse_args([*TINY, "--data", "cifar10"])
    data = ep.open_data(args)
    assert (len(data.train), len(data.held_out), data.num_classes) == (50, 10, 10)
    assert calls == [True, False, False]
    with pytest.raises(ep.UserError, match="--data cifar10: cannot be downloaded.*no route"):
        ep.open_data(args)

# ==== 6. Optimisers and schedule =============================================
def test_muon_moves_inner_matrices_and_only_weights_decay():
    pretrainer = ep.Pretrainer(ep.build_model("nano", 32, 4), 256.0)
    adamw, muon = ep.build_optimizers(pretrainer, 0.1)
    assert adamw.defaults["betas"] == (0.9, 0.95) and muon.defaults["momentum"] == 0.9
    assert muon.defaults["adjust_lr_fn"] == "match_rms_adamw"       # one rate serves both
    place = {id(p): (type(optimizer).__name__, group["weight_decay"])
             for optimizer in (adamw, muon)
             for group in optimizer.param_groups for p in group["params"]}
    for name, p in pretrainer.named_parameters():
        inner = p.ndim == 2 and ("attn" in name or "mlp" in name)
        expected = ("Muon" if inner else "AdamW", 0.1 if p.ndim > 1 and len(p) > 1 else 0.0)
        assert place.pop(id(p)) == expected, name
    assert not place and muon.param_groups[0]["params"]

@given(st.integers(1, 200))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(steps):
    warmup, optimizers = steps // 20, [torch.optim.SGD([torch.zeros(1)], 1.0)]
    args = ep.parse_args(["--lr", "0.1", "--max-steps", str(steps)])
    rates = [ep.update_parameters(args, optimizers, step) for step in range(1, steps + 2)]
    assert optimizers[0].param_groups[0]["lr"] == rates[-1] == pytest.approx(0)
    assert rates[:warmup] == pytest.approx([0.1 * (i + 1) / warmup for i in range(warmup)])
    after = rates[max(0, warmup - 1):]
    assert after == sorted(after, reverse=True) and after[0] > 0.04 and max(rates) <= 0.1

def test_on_a_cpu_no_optimiser_computes_in_bfloat16():
    """It would be emulated. The matrix moves by an orthogonal one times a known factor."""
    seen, weight = set(), torch.nn.Parameter(torch.zeros(6, 6))
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(getattr(out := function(*args, **(kwargs or {})), "dtype", None))
            return out
    module = torch.nn.ModuleDict({"mlp": torch.nn.ParameterDict({"weight": weight})})
    optimizers = ep.build_optimizers(module, 0.0)
    weight.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    with Watch():
        ep.update_parameters(ep.parse_args(["--lr", "1", "--max-steps", "1"]), optimizers, 1)
    assert torch.float32 in seen and torch.bfloat16 not in seen
    lengths = torch.linalg.svdvals(weight) / (0.1 * 6**0.5)         # half the rate
    assert 0.6 < lengths.min() < lengths.max() < 1.3

# ==== 7. Checkpoints =========================================================
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    args = ep.parse_args(["--out", str(tmp_path / "new")])
    ep.make_out(args)
    ep.write_file(args, "a", lambda file: file.write(b"old"))
    def breaks(file):
        file.write(b"ne")
        raise OSError("no space left")
    with pytest.raises(ep.UserError, match="new/a: cannot be written; is there room.* space left"):
        ep.write_file(args, "a", breaks)
    assert (tmp_path / "new" / "a").read_bytes() == b"old"

def saved(out):
    """A run's checkpoint, without what depends on the place and the time."""
    checkpoint = torch.load(Path(out, "checkpoint.pt"), weights_only=True)
    checkpoint["config"].pop("out")
    for record in checkpoint["log"]:
        record.pop("images_per_second")
    return checkpoint

@pytest.mark.parametrize("data", ["procedural", "folder"])
def test_going_on_equals_never_having_stopped_bit_for_bit(tmp_path, data, monkeypatch, capsys):
    people_s_images(tmp_path / "images")
    base = [*TINY, "--task", "mim,denoise", "--save-every", "2"]
    base += ["--data", str(tmp_path / "images")] if data == "folder" else []
    ep.main([*base, "--out", str(tmp_path / "whole")])
    save = ep.save_checkpoint
    def save_and_stop(*inputs):
        save(*inputs)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(ep, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            ep.main([*base, "--out", str(tmp_path / "parts")])
    ep.main([*base, "--out", str(tmp_path / "parts")])
    assert "going on after step 2" in capsys.readouterr().out
    (one, keys), (two, same) = (tree_flatten(saved(tmp_path / run)) for run in ("whole", "parts"))
    assert keys == same and all(torch.equal(a, b) if torch.is_tensor(a) else a == b
                                for a, b in zip(one, two, strict=True))
    lines = (tmp_path / "parts" / "log.jsonl").open()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]
    metrics = [(tmp_path / run / "metrics.json").read_text() for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(SCRIPT).parent)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

def test_two_processes_one_of_them_killed_equal_one(tmp_path):
    """The whole program, on files and by restoration alone, so that both see the same batches: the
    weights differ by rounding only, which AdamW enlarges where gradients are tiny. After a save
    one of them kills itself, and torchrun starts both again."""
    class_folders(tmp_path / "images")
    base = ["--task", "sr", "--partial-share", "0", *TINY, "--save-every", "1", "--data",
            str(tmp_path / "images"), "--out"]
    (tmp_path / "killed.py").write_text(
        "import os, sys, energy_pretrain as ep\n"
        "rate, saved = ep.update_parameters, sys.argv[-1] + '/checkpoint.pt'\n"
        "def update_parameters(*inputs):\n"
        "    if os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10' "
        "and os.path.exists(saved):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return rate(*inputs)\n"
        "ep.update_parameters = update_parameters\nep.main(sys.argv[1:])\n"
        "ep.main([*sys.argv[1:-1], sys.argv[-1] + '/again'])")
    done = subprocess.run([*TORCHRUN, "--max-restarts=1", str(tmp_path / "killed.py"), *base,
                           str(tmp_path / "two")], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr
    assert done.stdout.count("evaluating on") == 2 and "2 processes on cpu" in done.stdout
    ep.main([*base, str(tmp_path / "one")])
    one, two, again = (saved(tmp_path / run) for run in ("one", "two", "two/again"))
    for name, value in again["model"].items():      # main twice in one process
        torch.testing.assert_close(two["model"][name], value, rtol=0.02, atol=2e-3)
    assert [r["step"] for r in two["log"]] == [1, 2, 3, 4]
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0.02, atol=2e-3)

def test_a_run_goes_on_with_its_images_elsewhere_but_not_with_others(tmp_path, capsys):
    class_folders(tmp_path / "here")
    base = [*TINY, "--task", "sr", "--out", str(tmp_path / "run"), "--data"]
    ep.main([*base, str(tmp_path / "here")])
    (tmp_path / "here").rename(tmp_path / "there")
    ep.main([*base, str(tmp_path / "there"), "--eval-images", "5"])
    assert "going on after step 4" in capsys.readouterr().out
    (tmp_path / "there" / "kind0" / "00.png").unlink()
    said = one_line(capsys, [*base, str(tmp_path / "there")])
    assert "has images 40 files" in said and "not 39 files" in said

def one_line(capsys, arguments):
    """What main prints when it refuses; UserErrors are one line and status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ep.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said

def test_checkpoints_that_do_not_serve_end_in_one_line_and_stay(tmp_path, capsys):
    base, path = [*TINY, "--task", "mim", "--out", str(tmp_path)], tmp_path / "checkpoint.pt"
    ep.main(base)
    whole, loaded = path.read_bytes(), torch.load(path)
    assert "mask_ratio 0.6, not 0.5" in one_line(capsys, [*base, "--mask-ratio", "0.5"])
    said = one_line(capsys, [*base, "--evaluate", "--model", "mini"])
    assert f"{path} is not of --model mini at 16 pixels" in said
    assert path.read_bytes() == whole
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16                      # one bit among the weights
    for content in (b"", whole[:len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        said = one_line(capsys, base)
        assert "damaged" in said and str(path) in said and path.read_bytes() == content
    for content in ({"weights": 1}, loaded | {"log": Path("unpickles to a call")}):
        torch.save(content, path)
        assert "no checkpoint of ours" in one_line(capsys, base)
    path.write_bytes(whole)
    assert ep.main([*base, "--lr", "1e-4"])             # what a diverged run needs is free

# ==== 8. Evaluation ==========================================================
def test_evaluate_measures_restoration():
    """With E = 0 a step stays where it is; with E = |x|^2 / 2 and alpha = 1 it ends at zero."""
    x = images(0, 6)
    assert ep.psnr(x + 2, x) == pytest.approx(0) and ep.psnr(x + 0.2, x) == pytest.approx(20)
    still = ep.Pretrainer(tiny_vit(head=False), 1.0, num_steps=2)
    metrics, iterates = ep.evaluate(still, x, ["mim"], OPTIONS, chunk=4)
    row, (x_tilde, _, x_2) = metrics["mim"], iterates["mim"]
    assert row["psnr_corrupted"] == row["psnr_step_1"] == row["psnr_step_2"] and row["order"] == 0
    assert row["psnr_corrupted"] == pytest.approx(ep.psnr(x_tilde, x) - 2.0412, abs=1e-3)
    assert torch.equal(x_tilde, x_2)            # above: 10 of 16 patches are hidden
    (row,) = ep.evaluate(ep.Pretrainer(bowl(1.0), 1.0), x, ["denoise"], OPTIONS)[0].values()
    assert row["psnr_clean"] == pytest.approx(ep.psnr(0 * x, x)) == row["psnr_step_1"]

@pytest.mark.parametrize("sign", [1, -1])
def test_evaluate_measures_whether_low_energy_means_data(sign):
    """Clean is x = 0 and E = |x|^2 / 2, the energy of a perfect restorer; or minus it."""
    x, pretrainer = torch.zeros(70, 3, 16, 16), ep.Pretrainer(bowl(1.0, sign), 1.0)
    row = ep.evaluate(pretrainer, x, ["denoise"], {"noise_std": 2})[0]["denoise"]
    assert row["auroc"] == row["order"] == row["order_quarter"] == (sign == 1)
    assert row["energy_clean"] == 0 and row["energy_corrupted"] * sign > 1000
    assert row["psnr_clean"] > 100 and row["psnr_corrupted"] == pytest.approx(0, abs=0.1)
    assert row["psnr_step_1"] > 100 if sign == 1 else row["psnr_step_1"] < -5

def test_the_table_has_a_column_for_each_task_and_a_row_for_each_metric(capsys):
    ep.print_table({"mim": {"psnr_step_1": 1.234, "order": 0.5},
                    "sr": {"psnr_step_1": 20.5, "order": 1.0}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["mim", "sr"], ["psnr_step_1", "1.23", "20.50"], ["order", "0.50", "1.00"]]

def test_the_picture_shows_two_images_a_task_above_their_energies():
    x = 3 * torch.ones(4, 3, 16, 16)                # beyond [-1, 1]: white, and below black
    energies = []
    def energy(images):
        energies.append(images.mean((1, 2, 3)))
        return energies[-1]
    picture = ep.draw_picture(energy, x, {"sr": [-x] * 3, "color": [x] * 3})
    assert picture.size == (78 + 4 * 92, 16 + 4 * 106)      # clean, corrupted, two restored
    for row, colour in enumerate([255, 0, 0, 0]):
        assert picture.getpixel((120, 60 + 106 * row)) == (colour,) * 3
        assert picture.getpixel((120 + 2 * 92, 60 + 106 * row)) == (255,) * 3
        for name in (picture.crop((0, 106 * row + 40, 78, 106 * row + 70)),
                     picture.crop((78, 106 * row + 105, 166, 106 * row + 121))):
            assert name.convert("L").getextrema()[0] < 100
    assert [e.tolist() for e in energies[1:3]] == [[3, -3, -3, -3], [3, 3, 3, 3]]

def test_a_task_that_changes_nothing_is_named(capsys):
    grey = images(0)[:, :1].expand(-1, 3, -1, -1)
    ep.evaluate(ep.Pretrainer(bowl(1.0), 1.0), grey, ["color", "denoise"], OPTIONS)
    assert capsys.readouterr().out == "color changes nothing in these images\n"

# ==== 9. Pretraining =========================================================
def test_a_run_leaves_its_weights_log_metrics_and_picture_and_evaluate_repeats_it(tmp_path, capsys):
    out = tmp_path / "run"
    metrics = ep.main([*TINY, "--restore-steps", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.pt", "checkpoint.pt", "log.jsonl", "metrics.json", "restorations.png"]
    assert list(metrics) == ep.TASKS and metrics == json.loads((out / "metrics.json").read_text())
    assert "psnr_step_2" in metrics["sr"]
    for word in ("minutes left", "step 1", "evaluating on 12 images"):
        assert word in printed
    record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 4 and record.keys() == {
        "step", "loss", "gradient_norm", "lr", "images_per_second"}
    names = ep.build_model("nano", 16, 4).state_dict().keys()
    backbone = torch.load(out / "backbone.pt")
    assert [name for name in names if not name.startswith("head.")] == list(backbone)
    assert Image.open(out / "restorations.png").size == (78 + 10 * 92, 16 + 4 * 106)
    assert ep.main(["--evaluate", "--device", "cpu", "--out", str(out)]) == metrics
    energy = ep.load_energy(str(out / "checkpoint.pt"))
    x, _ = next(ep.image_batches(ep.parse_args(TINY), None, torch.device("cpu"), 12, [0], "held out"))
    assert energy(x).mean().item() == pytest.approx(metrics["sr"]["energy_clean"], abs=1e-5)
    assert not energy(x).requires_grad
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")     # restores one's own picture
    ep.main(["--evaluate", "--device", "cpu", "--data", str(tmp_path / "photo.jpg"), "--out",
             str(out), "--workers", "0"])
    assert "evaluating on 1 images" in capsys.readouterr().out

def test_compiled_loss_and_gradients_equal_eager_also_of_several_processes(monkeypatch):
    """Of one whole image and two masked ones. torch would cut the graph at the buckets of
    DistributedDataParallel, and fail. "aot_eager" traces both backward passes, but needs no C++."""
    results, args = [], ep.parse_args(TINY)
    monkeypatch.setattr(ep.Pretrainer, "compile", partial(
        torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    parallel = torch.nn.parallel        # with many small buckets, as large networks have
    monkeypatch.setattr(parallel, "DistributedDataParallel", partial(
        parallel.DistributedDataParallel, bucket_cap_mb=0.01))
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    for args.compile in (False, True):
        pretrainer = ep.Pretrainer(tiny_vit(), 2.0)
        pretrainer.compile = partial(ep.Pretrainer.compile, pretrainer)
        module = ep.wrap(args, pretrainer)
        assert bool(pretrainer._compiled_call_impl) == args.compile
        loss = module(images(0), hide(images(1), [0, 9, 9]), 1, 2, 9)
        loss.backward()
        results.append([loss, *(p.grad for p in pretrainer.parameters())])
    torch.distributed.destroy_process_group()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

def test_processes_that_begin_at_different_steps_end_in_one_line(tmp_path, monkeypatch, capsys):
    """As on two machines that do not share --out, of which one has a checkpoint."""
    def gather(began, last):
        began[:] = [last, 4]
    monkeypatch.setattr(ep.dist, "all_gather_object", gather)
    args = ep.parse_args([*TINY, "--out", str(tmp_path)])
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    with pytest.raises(ep.UserError, match=r"after steps \[0, 4\]: is --out shared?"):
        ep.train(args, ep.Pretrainer(tiny_vit(), 2.0), None, torch.device("cpu"))

def test_a_diverging_run_stops_in_one_line_and_keeps_the_checkpoint(tmp_path, capsys):
    base = [*TINY, "--task", "sr", "--out", str(tmp_path), "--save-every", "1"]
    said = one_line(capsys, [*base, "--lr", "1e9", "--max-steps", "9"])
    assert "not saved; lower --lr" in said and saved(tmp_path)["log"][-1]["loss"] < 1e30
    fine = [*TINY, "--finetune", "scratch", "--labels", "6", "--out", str(tmp_path / "fine")]
    assert "step 4: loss nan; lower --lr" in one_line(capsys, [*fine, "--lr", "1e9"])

def test_a_short_training_restores_and_low_energy_means_data(tmp_path):
    metrics = ep.main(["--task", "mim,denoise", "--image-size", "16", "--device", "cpu", "--out",
                       str(tmp_path), "--batch-size", "8", "--max-steps", "40", "--eval-images",
                       "64"])
    for row in metrics.values():
        assert row["psnr_step_1"] > row["psnr_corrupted"] + 1.5, row
        assert row["order"] > 0.95 and row["auroc"] > 0.8, row

# ==== 10. Use of the weights =================================================
@pytest.mark.parametrize("freeze", [[], ["--freeze"]])
def test_finetune_starts_from_the_checkpoint_and_freeze_keeps_it(tmp_path, freeze):
    class_folders(tmp_path / "data")
    ep.main([*TINY, "--task", "sr", "--data", str(tmp_path / "data"), "--out", str(tmp_path)])
    before = saved(tmp_path)["model"]
    metrics = ep.main(["--finetune", str(tmp_path / "checkpoint.pt"), *freeze, "--batch-size", "8",
                       "--max-steps", "30", "--workers", "0", "--device", "cpu", "--out",
                       str(tmp_path / "fine")])
    assert metrics == {"accuracy": 1} == json.loads((tmp_path / "fine/metrics.json").read_text())
    after = torch.load(tmp_path / "fine" / "classifier.pt", weights_only=True)
    same = [torch.equal(after[f"0.{name}"], value)
            for name, value in before.items() if "head" not in name]
    assert all(same) if freeze else sum(same) < len(same) / 4

def test_the_probe_ends_where_logistic_regression_has_its_minimum():
    """Of mean cross-entropy plus 1e-3 |w|^2 on standardised features; so no rate matters."""
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    labels = (features[:, 0] > 5).long()
    norm, linear = torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 2)
    ep.fit_probe(norm, linear, features, labels)
    x = norm.eval()(features)       # by the statistics of all of them
    torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(linear(x), labels)
    loss = loss + 1e-3 * linear.weight.square().sum()
    slopes = torch.autograd.grad(loss, list(linear.parameters()))
    assert max(slope.abs().max() for slope in slopes) < 1e-3, slopes

@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_peers_learn_and_can_be_finetuned(tmp_path, monkeypatch, method):
    monkeypatch.setattr(ep, "Pretrainer", ep.Pretrainer)            # peer replaces it
    peer(method, *TINY, "--max-steps", "20", "--lr", "1e-2", "--out", str(tmp_path))
    first, *_, last = saved(tmp_path)["log"]
    assert last["loss"] < 0.8 * first["loss"]
    monkeypatch.undo()
    ep.main([*TINY, "--finetune", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path / "fine")])

def test_maes_loss_sees_nothing_of_hidden_patches():
    """Their targets have mean 0: who brightens a hidden patch changes no target, and no guess."""
    module, x, losses = MaskedAutoencoder(tiny_vit(), "mae"), images(0), []
    for brighter in (slice(0), slice(4, 16), slice(4)):     # the first 4 of 16 patches are seen
        torch.manual_seed(1)
        order = torch.rand(3, 16).argsort(1)[:, brighter]
        bright = torch.zeros(3, 16).scatter(1, order, 1.0).view(3, 1, 4, 4)
        torch.manual_seed(1)
        y = x + torch.nn.functional.interpolate(bright, scale_factor=4)
        losses.append(module(y, x).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] != pytest.approx(losses[0], abs=1e-3)

# ==== 11. Command line =======================================================
@pytest.mark.parametrize("arguments, message", [
    (["--task", "jigsaw"], "--task jigsaw: choose from mim, sort"),
    (["--model", "resnet19"], "--model resnet19: choose from nano, mini"),
    (["--patch-size", "0"], "--patch-size 0: out of range"),
    (["--image-size", "18", "--task", "denoise"], "--patch-size 4: must be above 1 and divide"),
    (["--sr-factor", "5"], "--sr-factor 5: must be above 1 and divide"),
    (["--sort-grid", "1"], "--sort-grid 1: must be above 1 and divide"),
    (["--mask-ratio", "0.99"], "--mask-ratio 0.99: hides no patch or all"),
    (["--mask-ratio", "0.01"], "--mask-ratio 0.01: hides no patch or all"),
    (["--partial-share", "1"], "--partial-share 1.0: must be below 1"),
    (["--max-steps", "0"], "--max-steps 0: out of range"),
    (["--seed", "-1"], "--seed -1: out of range"),
    (["--epochs", "inf", "--data", "x"], "--epochs inf: out of range"),
    (["--data", ""], "--data : is empty"),
    (["--epochs", "2"], "--epochs 2.0: is for --data"),
    (["--finetune", "scratch", "--batch-size", "1"], "--batch-size 1: --finetune needs 2"),
    (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
    (["--freeze"], "--freeze True: is for --finetune"),
    (["--finetune", "scratch", "--freeze"], "--freeze True: landscapes have no end: --labels"),
    (["--data", "/no/such/photo.jpg"], "--data /no/such/photo.jpg: no image there (.jpg"),
    (["--out", "x" * 300], "File name too long")])
def test_wrong_arguments_end_in_one_line(tmp_path, capsys, arguments, message):
    assert message in one_line(capsys, [*TINY, "--out", str(tmp_path / "out"), *arguments])

def test_an_out_that_cannot_be_written_is_said_before_the_first_step(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for more in ([], ["--finetune", "scratch"]):
        said = one_line(capsys, [*TINY, *more, "--out", str(tmp_path / "file")])
        assert f"--out {tmp_path}/file: cannot be written (File exists)" in said
    assert (tmp_path / "file").read_text() == "kept"

def test_processes_share_the_batch_and_finetuning_takes_one(monkeypatch, capsys):
    monkeypatch.setattr(ep, "WORLD_SIZE", 3)
    assert "must be a multiple of the 3 processes" in one_line(capsys, TINY)
    assert "takes one process" in one_line(capsys, [*TINY, "--finetune", "scratch"])

def test_a_folder_that_does_not_serve_ends_in_one_line_too(tmp_path, capsys):
    Image.new("F", (20, 20)).save(tmp_path / "float.tif")
    base = [*TINY, "--data", str(tmp_path)]
    said = one_line(capsys, [*base, "--workers", "1"])      # from a process that decodes
    assert f"error: {tmp_path}/float.tif cannot be used" in said
    said = one_line(capsys, [*base, "--finetune", "scratch"])
    assert "needs a folder for each class" in said

@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory"),
    (torch._dynamo.exc.InternalTorchDynamoError("g++"), "error: --compile fails (Internal")])
def test_what_the_machine_lacks_is_said_in_one_line(capsys, monkeypatch, error, message):
    def fails(*args):
        raise error
    monkeypatch.setattr(ep, "train", fails)
    assert message in one_line(capsys, TINY)

def test_defaults_follow_the_device_the_purpose_and_what_was_typed(tmp_path):
    def parsed(names, *typed):
        args = vars(ep.parse_args(typed))
        return tuple(args[name] for name in names.split())
    on_cpu, on_gpu, data = ("--device", "cpu"), ("--device", "cuda"), ("--data", str(tmp_path))
    assert parsed("model max_steps epochs compile", *on_cpu) == ("nano", 1500, None, False)
    assert parsed("model max_steps epochs compile", *on_gpu) == ("small", 2000, None, True)
    assert parsed("epochs", *on_gpu, *data) == (100,)
    assert parsed("max_steps epochs", *on_gpu, *data, "--max-steps", "7") == (7, None)
    assert parsed("max_steps lr", *on_gpu, "--finetune", "scratch") == (600, 2e-3)
    assert parsed("lr", "--finetune", "scratch", "--lr", "1") == (1,)
    assert parsed("out", "--finetune", "scratch") == ("runs/scratch",)
    assert parsed("task out", "--task", "all") == (",".join(ep.TASKS), "runs/all")
    spelled = parsed("data", "--data", f"{tmp_path}/../{tmp_path.name}")
    assert spelled == (os.path.realpath(tmp_path),)
    help = " ".join(ep.build_parser().format_help().split())
    assert "w in Eq. (4); default: 0.007" in help and "default: nano, on GPUs small" in help

@pytest.mark.parametrize("size, grid", [(32, 4), (224, 7), (208, 13), (352, 11), (16, 4), (8, 2)])
def test_sort_cuts_whole_patches_at_least_four_a_side(size, grid):
    args = ep.parse_args(["--task", "sort", "--image-size", str(size)])
    assert args.sort_grid == grid and size // args.patch_size % grid == 0

def test_paths_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = ep.parse_args(["--out", "~/runs", "--data", "~"])
    assert (args.out, args.data) == (f"{tmp_path}/runs", str(tmp_path))

@pytest.mark.parametrize("error, message", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory"),
    (RuntimeError("a bug"), None)])
def test_a_bug_keeps_its_traceback(capsys, monkeypatch, error, message):
    """In a contributor's network, say; only what the machine lacks is one line."""
    def fails(*args):
        raise error
    monkeypatch.setattr(ep.ViT, "forward", fails)
    if message:
        assert message in one_line(capsys, TINY)
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            ep.main(TINY)

# ==== Curves =================================================================
def energy_curves(out="runs/all"):
    """Draw OUT/energies.png: how the mean energy of 64 held-out images rises from clean to
    corrupted, as a share of the whole rise. Drawn at four times the size, and reduced."""
    args = ep.parse_args(["--evaluate", "--out", out])
    device = ep.choose_device(args.device)
    energy = ep.load_energy(args.weights).to(device)
    x, _ = next(ep.image_batches(args, ep.open_data(args).held_out, device, 64, [0], "held out"))
    picture = Image.new("RGB", (2800, 1440), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(60)
    def place(share, height):
        return 200 + 2500 * share, 1200 - 1080 * height
    draw.line([place(0, 1), place(0, 0), place(1, 0)], fill="black", width=5)
    draw.line([place(0.25, 0), place(0.25, 1)], fill="lightgrey", width=5)
    draw.text(place(0.26, 0.99), "a quarter", fill="grey", font=font)
    draw.text(place(0.3, -0.11), "share of the corruption", fill="black", font=font)
    draw.text(place(0.01, 1.08), "(E - E(clean)) / (E(corrupted) - E(clean))", fill="black", font=font)
    for value in (0, 1):
        draw.text(place(value - 0.01, -0.02), str(value), fill="black", font=font)
        draw.text(place(-0.03, value + 0.03), str(value), fill="black", font=font)
    colours = ["firebrick", "darkorange", "seagreen", "royalblue", "purple"]
    for i, (task, colour) in enumerate(zip(args.task.split(","), colours)):
        x_tilde = ep.corrupt(x, task, ep.make_generator(device, "curves", task), vars(args))
        shares = torch.linspace(0, 1, 21).tolist()
        # at 1 hidden patches would join late: that is another way to the energy
        mean = torch.stack([energy(x.lerp(x_tilde, min(s, 0.999))).mean() for s in shares])
        heights = ((mean - mean[0]) / (mean[-1] - mean[0])).tolist()
        draw.line([place(*point) for point in zip(shares, heights)], fill=colour, width=12)
        draw.text(place(0.05, 0.95 - 0.08 * i), task, fill=colour, font=font)
    picture.resize((700, 360), Image.Resampling.LANCZOS).save(os.path.join(out, "energies.png"))

# ==== Peers ==================================================================
class MaskedAutoencoder(torch.nn.Module):
    """The two usual ways to learn from masked images, in Pretrainer's place.
    simmim (Xie et al. 2022): of the half grey image, a linear layer predicts the hidden patches.
    mae (He et al. 2022): the network sees a quarter of the patches and nothing else; one more
    block predicts the others, each shifted and scaled to mean 0 and variance 1."""
    def __init__(self, model, method):
        super().__init__()
        _, N, D = model.pos_embed[:, 1:].shape
        self.model, self.method, self.size = model, method, model.patch_embed.proj.stride[0]
        self.predict = torch.nn.Linear(D, 3 * self.size**2)
        self.decoder = ep.Block(D, model.blocks[0].attn.num_heads)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos = torch.nn.Parameter(0.02 * torch.randn(1, N, D))
    def forward(self, x, x_tilde, *_):
        model, target = self.model, pieces(x, self.size)            # (B, N, 3*size*size)
        (B, N, _), D = target.shape, self.mask_token.shape[2]
        if self.method == "simmim":
            hidden = (pieces(x_tilde, self.size) != target).any(2)
            guess = self.predict(model.encode(model.embed(x_tilde)))
            return torch.nn.functional.smooth_l1_loss(guess[hidden], target[hidden])
        order = torch.rand(B, N, device=x.device).argsort(1)
        seen = order[:, :N // 4]
        tokens = model.encode(model.embed(x), seen)
        seen = seen.unsqueeze(2).expand_as(tokens)
        tokens = self.mask_token.expand(B, N, D).scatter(1, seen, tokens.to(self.mask_token.dtype))
        guess = self.predict(self.decoder(tokens + self.decoder_pos))
        target = (target - target.mean(2, keepdim=True)) / (target.std(2, keepdim=True) + 1e-3)
        error = (guess - target).square().mean(2)                   # (B, N)
        return error.gather(1, order[:, N // 4:]).mean()

def peer(method, *argv):
    """Pretrain by method, simmim or mae; argv is energy_pretrain.py's. The checkpoint.pt is for
    `energy_pretrain.py --finetune`."""
    fixed = ["--task", "mim", "--partial-share", "0", "--mask-ratio", "0.5", "--out",
             f"runs/{method}"]
    args = ep.parse_args([*fixed, *argv])
    device = ep.choose_device(args.device)
    ep.make_out(args)
    ep.Pretrainer = lambda model, *_: MaskedAutoencoder(model, method).to(device)
    data = ep.open_data(args)
    args.images = data.images
    if args.epochs:
        args.max_steps = math.ceil(args.epochs * len(data.train) / args.batch_size)
    ep.train(args, ep.build_pretrainer(args, device), data.train, device)

if __name__ == "__main__":
    what = {"curves": energy_curves, "simmim": partial(peer, "simmim"), "mae": partial(peer, "mae")}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    args, others = parser.parse_known_args()
    what[args.what](*others)
