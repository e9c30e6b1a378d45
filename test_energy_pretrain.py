"""Tests of energy_pretrain.py, in its order; their names are its specification.

`pytest -q` runs them on a CPU, without a network. The commands behind the README's
comparisons come last; they take energy_pretrain.py's flags.
    python test_energy_pretrain.py mae, or simmim       pretrain in the usual ways
    python test_energy_pretrain.py probe CHECKPOINT     linear probe of its features
    python test_energy_pretrain.py finetune CHECKPOINT  fine-tuned on 2,000 labels
    python test_energy_pretrain.py cost                 time of a step of each method
The first folder below --data, or below its train/ and val/, is an image's class.
"nothing" in place of CHECKPOINT is an untrained network.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import energy_pretrain as ep

torch.set_num_threads(1)  # small tensors: two threads would wait for each other
settings.register_profile("here", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("here")

TINY = ["--image-size", "16", "--batch-size", "4", "--max-steps", "4", "--eval-images",
        "12", "--device", "cpu", "--workers", "0"]
CPU = torch.device("cpu")
seeds, tasks = st.integers(0, 2**31), st.sampled_from(ep.TASKS)

def images(seed, batch=3, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(dtype)

def tiny_vit(seed=0, depth=2):
    """A small ViT. Its head is drawn at random, since a zero head makes E flat."""
    torch.manual_seed(seed)
    model = ep.ViT(16, 4, dim=16, depth=depth, num_heads=2)
    torch.nn.init.normal_(model.head)
    return model

OPTIONS = vars(ep.parse_args(["--device", "cpu"]))  # mim hides 10 of 16 patches

def visible(seed, batch=3, ratio=0.6, size=16):
    generator = torch.Generator().manual_seed(seed)
    return ep.draw_visible(torch.empty(batch, 3, size, size), generator, ratio, 4)

def corrupt(x, task, seed, **options):
    """(x_tilde, seen)"""
    return ep.corrupt(x, task, ep.make_generator("cpu", seed), OPTIONS | options)

def pieces(x, side):
    """Images (B, C, S, S) as square pieces (B, M, C*side*side)."""
    return F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)

def parse(*arguments):
    return ep.parse_args([*TINY, *map(str, arguments)])

def run(*arguments):
    return ep.main([*TINY, *map(str, arguments)])

def one_line(capsys, *arguments):
    """What main prints when it refuses: one line, and status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said

# ==== 1. Restoration and loss ====================================================
def bowl(p):
    """An energy with a parameter, whose derivatives one can write down."""
    return lambda x, seen=None: (p * x**2).flatten(1).sum(1) / 2

@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_gradients_pass_through_each_step_but_not_between_steps(num_steps):
    """E = p x^2 / 2: a step is x (1 - alpha p), with derivative -alpha x in p."""
    p, x = torch.tensor(0.3, requires_grad=True), images(0)
    steps = ep.restore(bowl(p), x, 0.5, num_steps, create_graph=True)
    steps.sum().backward()
    starts = [x * 0.85**k for k in range(num_steps)]
    assert_close(steps.detach(), 0.85 * torch.stack(starts))
    expected = -0.5 * sum(y.sum().item() for y in starts)
    assert p.grad.item() == pytest.approx(expected, rel=1e-4)
    assert not ep.restore(bowl(p), x, 0.5).requires_grad

def test_the_gradient_of_the_loss_equals_finite_differences():
    """In float64: no part of the energy may use less."""
    pretrainer = ep.Pretrainer(tiny_vit(), 0.01).double()
    x, x_tilde = images(0, dtype=torch.float64), images(1, dtype=torch.float64)
    groups = [(x, x_tilde, visible(0)), (x, x_tilde, None)]
    names, values = zip(*pretrainer.named_parameters())
    assert torch.autograd.gradcheck(lambda *p: torch.func.functional_call(
        pretrainer, dict(zip(names, p)), (groups,)), values, rtol=1e-5, fast_mode=True)

@given(seeds, tasks)
def test_a_small_step_lowers_the_energy(seed, task):
    x_tilde, seen = corrupt(images(seed), task, seed)
    energy = partial(tiny_vit(seed % 11), seen=seen)
    x_hat = ep.restore(energy, x_tilde, alpha=1e-4)[0]
    assert x_hat.shape == x_tilde.shape
    with torch.no_grad():
        assert (energy(x_hat) < energy(x_tilde)).all()

def test_the_loss_counts_errors_relative_to_how_far_images_were_moved():
    x = images(0, 4)
    far = torch.tensor([0.5, 0.25, 0.1, 0.01]).view(4, 1, 1, 1)  # the last: clamped
    x_hat = torch.stack([x + 0.1, x + 1.5])  # K = 2; the second is linear
    expected = (0.1**2 / 2 + 1.0) / torch.tensor([0.5, 0.25, 0.1, 0.05]) / 2
    assert_close(ep.restoration_loss(x_hat, x, x + far), expected)

# ==== 2. Corruptions =============================================================
@given(seeds, tasks, st.integers(1, 4), st.sampled_from([8, 16, 32]),
       st.sampled_from([torch.float32, torch.float64]))
def test_corrupt_keeps_shape_dtype_and_its_input(seed, task, batch, size, dtype):
    x = images(seed, batch, size, dtype)
    before, (x_tilde, seen) = x.clone(), corrupt(x, task, seed)
    assert (x_tilde.shape, x_tilde.dtype) == (x.shape, dtype)
    assert x_tilde.isfinite().all() and (seen is not None) == (task == "mim")
    assert (x_tilde != x).flatten(1).any(1).all(), "an image was left as it is"
    again, _ = corrupt(x, task, seed)
    assert torch.equal(x, before) and torch.equal(x_tilde, again)

@given(seeds, st.sampled_from([2, 4, 8]), st.floats(0.01, 0.99))
def test_whole_patches_are_hidden_and_whole_pieces_permuted(seed, side, ratio):
    x, grid = images(seed).abs() + 0.1, 16 // side  # no pixel is zero before
    masked, seen = corrupt(x, "mim", seed, mask_ratio=ratio, patch_size=side)
    hidden = ep.hidden_pixels(x, seen, side)
    assert torch.equal(masked, torch.where(hidden, 0, x))
    patches = pieces(hidden, side)  # (B, N, side*side)
    assert (patches.all(2) == patches.any(2)).all(), "a patch is hidden in part"
    assert (patches.any(2).sum(1) == round(ratio * grid**2)).all()
    assert not patches.any(2).gather(1, seen).any(), "a seen patch is hidden"
    shuffled, _ = corrupt(x, "sort", seed, sort_grid=grid)
    for a, b in zip(pieces(x, side), pieces(shuffled, side)):
        assert sorted(a.tolist()) == sorted(b.tolist())

@pytest.mark.parametrize("task, expected", [
    ("mim", [0.5, 0.5, 0, 0, 0]), ("sort", [0, 0.25, 0.25, 0.25, 0.25])])
def test_a_place_is_hidden_and_filled_equally_often(task, expected):
    x = torch.arange(1.0, 5.0).view(1, 1, 2, 2).expand(4000, 3, 2, 2)
    x_tilde, _ = corrupt(x, task, 0, sort_grid=2, patch_size=1)
    shares = torch.bincount(x_tilde[:, 0, 0, 0].long(), minlength=5) / len(x)
    assert (shares - torch.tensor(expected)).abs().max() < 0.03, shares  # 4 deviations

def test_low_resolution_noise_and_grey_are_as_described():
    x, small = images(0), F.avg_pool2d(images(0), 4)
    again = F.interpolate(small, scale_factor=4, mode="bilinear")
    assert_close(corrupt(x, "sr", 0, sr_factor=4)[0], again)
    x = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 64, 64)  # red, green, blue images
    grey = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1).expand_as(x)
    assert_close(corrupt(x, "color", 0)[0], grey)
    noise = corrupt(x, "denoise", 0, noise_std=0.7)[0] - x
    assert abs(noise.mean()) < 0.02 and noise.std().item() == pytest.approx(0.7, 0.02)

@given(seeds, st.integers(0, 9), st.integers(1, 12), st.integers(1, 5))
def test_tasks_share_a_batch_in_rotation(seed, shift, batch, count):
    chosen, x = ep.TASKS[:count], images(seed, batch)
    groups = ep.corrupt_batch(x, chosen, ep.make_generator("cpu", seed),
                              OPTIONS | {"partial_share": 0}, shift)
    order = [ep.TASKS[(shift + i) % count] for i in range(count)]
    number = {t: batch // count + (i < batch % count) for i, t in enumerate(order)}
    expected = (number["mim"], True), (batch - number["mim"], False)
    found = [(len(y), seen is not None) for y, _, seen in groups]
    assert found == [size for size in expected if size[0]]
    clean = torch.cat([y for y, _, _ in groups])
    assert all((clean == image).flatten(1).all(1).sum() == 1 for image in x)
    y, x_tilde, seen = groups[-1]
    for task in {"sr", "color"} & set(chosen) if seen is None else ():
        again = (x_tilde - corrupt(y, task, 0)[0]).abs().flatten(1).amax(1) < 1e-5
        assert again.sum() == number[task], task

def test_a_share_of_the_images_is_corrupted_in_part_mostly_lightly():
    """Strengths are squares of uniform numbers."""
    (x, x_tilde, _), = ep.corrupt_batch(
        images(0, 1000, 8), ["color"], ep.make_generator("cpu", 0),
        OPTIONS | {"partial_share": 0.4}, 0)
    way = corrupt(x, "color", 0)[0] - x
    s = ((x_tilde - x) * way).flatten(1).sum(1) / way.square().flatten(1).sum(1)
    assert_close(x_tilde, x + s.view(-1, 1, 1, 1) * way)
    partly = s[s < 0.9999]
    assert 0 <= s.min() and s.max() <= 1.0001 and abs(len(partly) - 400) < 60
    assert abs(partly.mean() - 1 / 3) < 0.06 and abs((partly < 0.25).sum() - 200) < 40

# ==== 3. The energy ==============================================================
def test_the_energy_is_a_weighted_distance_of_patches_from_what_the_network_expects():
    model, x, seen = tiny_vit(), images(0), visible(0)
    p = model.embed(x)
    z = model.norm(model.blocks(model.add_positions(p)))[:, 1:]
    assert_close(model(x), 48 * (model.head * (p - z)**2).mean(2).sum(1))
    assert_close(model.represent(x), z.mean(1))
    for i in range(3):  # one image, with no gather: patches leave by a boolean mask
        keep = torch.zeros(17, dtype=torch.bool)
        keep[F.pad(seen[i] + 1, (1, 0))] = True  # the class token, and those seen
        tokens = model.add_positions(p[i:i + 1])
        both = torch.cat([model.blocks[0](tokens[:, keep]), tokens[:, ~keep]], 1)
        z = model.norm(model.blocks[1](both))[:, keep.sum():]
        distance = (model.head * (p[i:i + 1, ~keep[1:]] - z)**2).mean(2)
        assert_close(model(x, seen)[i], 48 * distance.sum())
    x_hat = ep.restore(partial(model, seen=seen), x, 3.0)[0]
    assert torch.equal(x_hat != x, ep.hidden_pixels(x, seen, 4).expand_as(x))

def test_the_loss_is_the_mean_over_all_images_of_all_groups_after_k_steps():
    x, y, seen, model = images(0), images(1), visible(0), tiny_vit()
    groups = (x[:1], y[:1], None), (x[1:], y[1:], seen[1:])
    x_hat = torch.cat([ep.restore(partial(model, seen=some), start, 0.01, 2)
                       for _, start, some in groups], 1)
    loss = ep.Pretrainer(model, 0.01, 2)(groups)
    assert_close(loss, ep.restoration_loss(x_hat, x, y).mean())

def test_energies_stay_float32_under_autocast():
    """bfloat16's three digits would make neighbouring energies equal."""
    model, x = tiny_vit(), images(0)
    with torch.autocast("cpu", torch.bfloat16):
        for energy in (model(x), model(x, visible(0))):
            assert not torch.equal(energy, energy.bfloat16().float())

def test_near_patches_have_similar_positions():
    torch.manual_seed(0)
    waves, row = ep.random_waves(6, 20000)[0], torch.arange(6.0)
    places = torch.cartesian_prod(row, row)
    expected = 0.36 * (-(0.7 * torch.cdist(places, places))**2 / 2).exp()
    assert (waves @ waves.T / 20000 - expected).abs().max() < 0.015

def test_features_equal_those_of_torchvisions_vit_with_the_same_weights():
    model, x = tiny_vit().double(), images(0, dtype=torch.float64)
    other = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64).double().eval()
    other.heads = torch.nn.Identity()
    inner = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()  # timm's names
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in inner]
    names = [f"{layer}.{kind}" for layer in ["patch_embed.proj", *layers, "norm"]
             for kind in ("weight", "bias")]
    names = ["cls_token", *names[:2], "pos_embed", *names[2:]]  # torchvision's order
    values = [torch.nn.init.normal_(p, std=0.2) for p in other.parameters()]
    weights = dict(zip(names, values, strict=True))
    assert model.load_state_dict(weights, strict=False) == (["head"], [])
    outputs = model.norm(model.blocks(model.add_positions(model.embed(x))))
    assert_close(outputs[:, 0], other(x))

@pytest.mark.parametrize("name", ["nano", "resnet18"])
@pytest.mark.parametrize("seen", [None, visible(0, 2, size=32)])
def test_all_parameters_train_and_the_first_step_moves_nothing(name, seen):
    torch.manual_seed(0)
    pretrainer = ep.Pretrainer(ep.build_model(name, 32, 4), 1e-3)
    assert not pretrainer.model.head.any()
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=1e-2)
    for _ in range(2):  # the first only moves the head away from zero
        optimizer.zero_grad()
        pretrainer([(images(1, 2, 32), images(2, 2, 32), seen)]).backward()
        optimizer.step()
    for key, p in pretrainer.named_parameters():
        linear = name == "resnet18" and p.ndim == 1  # dE/dx ignores biases before ReLUs
        assert p.grad.isfinite().all() and (p.grad.any() or linear), key

def test_torchvisions_networks_are_energies_and_unfit_ones_are_refused(tmp_path):
    for name in ("swin_t", "resnet18"):
        torch.manual_seed(0)
        model, x = ep.build_model(name, 32, 4), images(0, 2, 32)
        torch.nn.init.normal_(model.head)
        seen = visible(0, 2, size=32)
        x_hat = ep.restore(partial(model, seen=seen), x, 1e-4)[0]
        hidden = ep.hidden_pixels(x, seen, 4).expand_as(x)
        assert ((x_hat != x) <= hidden).all() and (x_hat != x).any()
        assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=0.5)
        assert_close(model(x), 3 * 32**2 * model.represent(x) @ model.head)
        fixed = [key for key, p in model.named_parameters() if not p.requires_grad]
        assert fixed == ["net.norm.bias"] * (name == "swin_t"), "DDP would wait"
    ep.save_checkpoint(parse("--out", tmp_path), model, [], [])
    missing = torchvision.models.resnet18().load_state_dict(
        torch.load(tmp_path / "backbone.pt"), strict=False)
    assert missing == (["fc.weight", "fc.bias"], [])
    for name in ("mobilenet_v3_small", "squeezenet1_0", "vit_b_16", "resnet19"):
        with pytest.raises(ep.UserError, match=f"--model {name} cannot.*nano, mini"):
            ep.build_model(name, 32, 4)

def test_torchvisions_attention_can_be_differentiated_twice(monkeypatch):
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32)
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: vit)
    assert ep.build_model("vit", 32, 8).head.shape == (16,)

# ==== 4. Processes and randomness ================================================
def test_a_generator_follows_from_its_key():
    assert ep.make_generator("cpu", "crop", 0, 17).initial_seed() == 2794066429
    assert ep.seed_from("crop", 0, 17) == 2794066429  # in every version of Python

def test_a_process_takes_its_own_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ep, "LOCAL_RANK", 1)
    assert ep.choose_device("cuda") == torch.device("cuda", 1) and taken == [1, "high"]
    monkeypatch.setattr(ep, "LOCAL_RANK", 2)
    with pytest.raises(ep.UserError, match="no device 2"):
        ep.choose_device("cuda")

# ==== 5. Data ====================================================================
def test_landscapes_are_those_behind_the_readmes_figures():
    x = ep.draw_landscapes(64, 24, ep.make_generator("cpu", 0))
    right, down = torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24).view(-1, 1)
    found = [*x.mean((0, 2, 3)), x.std(), (x * right).mean(), (x * down).mean()]
    expected = [-0.098639, -0.128388, -0.208020, 0.392140, -0.002686, -0.088964]
    assert torch.stack(found).tolist() == pytest.approx(expected, abs=2e-5)

def test_every_use_step_and_process_has_its_own_landscapes():
    x = [ep.image_batches(parse(), None, CPU, 4, range(5, 7), use, rank, 2)
         for use in ("train", "held out") for rank in (0, 1)]
    x = torch.stack([batch for batches in x for batch in batches])
    assert x.shape == (8, 2, 3, 16, 16) and x.abs().max() <= 1
    assert len(x.flatten(1).sum(1).unique()) == 8

def peoples_images(folder):
    """One file of each kind that people have; the readable ones are red."""
    red = Image.new("RGB", (40, 30), (200, 40, 40))
    for name in ("@alice", "deep/er", ".hidden", *(ep.NO_DATA - {"restorations.png"})):
        (folder / name).mkdir(parents=True)
        red.save(folder / name / "image.png")
    red.save(folder / "photo.JPG", "JPEG")
    for name, mode in (("web.webp", "RGB"), ("press.jpg", "CMYK"), ("palette.png", "P"),
                       ("alpha.png", "RGBA"), ("restorations.png", "RGB")):
        red.convert(mode).save(folder / name)
    red.resize((2, 900)).save(folder / "thin.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / "deep" / "up").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe.jpg")

def class_folders(folder):
    """20 dark images and 20 bright ones, each kind in a folder of its own."""
    for i in range(40):
        (folder / f"kind{i % 2}").mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((20, 20), 60).point(lambda v: v // 2 + 100 * (i % 2))
        noise.convert("RGB").save(folder / f"kind{i % 2}" / f"{i:02}.png")

def test_a_folders_images_are_each_found_once_whatever_else_is_there(tmp_path, capsys):
    peoples_images(tmp_path)
    files = ep.find_images(str(tmp_path))
    assert [os.path.relpath(file, tmp_path) for file in files] == [
        "alpha.png", "palette.png", "photo.JPG", "press.jpg", "thin.png", "web.webp",
        "@alice/image.png", "deep/er/image.png"]
    assert f"{tmp_path}: 8 images" in capsys.readouterr().out
    assert ep.find_images(files[3]) == [files[3]]
    for file in files:
        x = ep.Crops(files, 16, False).load(file)
        error = x[:, 8, 8] - torch.tensor([200.0, 40.0, 40.0])
        assert x.shape == (3, 16, 16) and error.abs().max() < 12, file

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_drawings_get_a_white_background(tmp_path, mode):
    """Ink and background are both black; only opacity differs."""
    drawing = Image.new("RGBA", (20, 20))
    drawing.paste((0, 0, 0, 255), (0, 0, 10, 20))
    drawing.convert(mode).save(tmp_path / "drawing.png")
    pixels = ep.Crops([], 20, False).load(tmp_path / "drawing.png")
    assert (pixels[:, :, :10] == 0).all() and (pixels[:, :, 10:] == 255).all()

def test_photographs_are_turned_upright_and_large_jpegs_decoded_small(tmp_path):
    image, exif, loaded = Image.new("RGB", (400, 200)), Image.Exif(), []
    image.paste((255, 255, 255), (0, 0, 200, 200))  # its left half is white
    exif[274] = 6  # the camera was held on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    crops = ep.Crops([], 16, False)
    x = crops.load(tmp_path / "a.jpg")
    assert x[:, 0].min() > 240 and x[:, -1].max() < 15
    crops.crop = loaded.append
    crops.load(tmp_path / "a.jpg")
    assert max(loaded[0].size) < 200

@pytest.mark.parametrize("fault", ["cut", "L", "LA", "RGB", "RGBA"])
def test_training_replaces_an_unusable_file_by_others_at_random(
        tmp_path, capsys, fault):
    """Pillow writes no PNG of 16 bits: we edit the header of an 8-bit one."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(path)
    if fault == "cut":
        paths[0].write_bytes(paths[0].read_bytes()[:45])
    else:
        Image.new(fault, (40, 20)).save(paths[0])
        data = bytearray(paths[0].read_bytes())
        data[16:20], data[24] = (20).to_bytes(4, "big"), 16  # half as wide, 16 bits
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        paths[0].write_bytes(data)
    crops = ep.Crops(paths, 16, False)
    drawn = [crops[0, seed][0, 0, 0].item() // 40 for seed in range(60)]
    assert all(drawn.count(i) > 2 for i in range(1, 6)) and 0 not in drawn
    assert f"left out {paths[0]}" in capsys.readouterr().err
    with pytest.raises(ep.UserError, match="no usable image in 100 draws.*0.png"):
        ep.Crops(paths[:1], 16, False)[0, 0]

def test_crops_follow_from_their_seed_or_are_centred(tmp_path):
    noise, path = Image.effect_noise((64, 96), 80).convert("RGB"), tmp_path / "a.png"
    noise.save(path)
    crops, centred = ep.Crops([path], 16, True), ep.Crops([path], 16, False)
    state = torch.get_rng_state()
    assert torch.equal(crops[0, 5], crops[0, 5])
    assert not torch.equal(crops[0, 5], crops[0, 6])
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator moved"
    small = noise.resize((16, 24), Image.Resampling.BILINEAR).crop((0, 4, 16, 20))
    expected = torchvision.transforms.v2.functional.pil_to_tensor(small)
    assert torch.equal(centred[0, 5], expected)
    Image.linear_gradient("L").rotate(90).save(path)
    ramps = ep.Crops([path], 16, True)
    rising = [bool(ramps[0, s][0, 8, 0] < ramps[0, s][0, 8, 15]) for s in range(40)]
    assert 10 < sum(rising) < 30, "not half are flipped"

@given(seeds, st.integers(1, 20), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_every_image_comes_once_an_epoch_for_any_number_of_processes(
        seed, count, world_size, part):
    def row(world):
        steps, batch = range(3 * count), world_size * part
        ranks = [ep.crop_keys(count, batch, steps, ("train", seed), rank, world)
                 for rank in range(world)]
        return [key for step in zip(*ranks) for keys in step for key in keys]
    keys = row(world_size)
    assert keys == row(1) and len(set(keys)) == len(keys)
    for first in range(0, len(keys) - count + 1, count):
        epoch = sorted(index for index, _ in keys[first:first + count])
        assert epoch == list(range(count))

def test_held_out_images_are_every_tenth_or_those_in_val_or_test(tmp_path):
    class_folders(tmp_path / "train")
    train, held_out, _ = ep.open_data(parse("--data", tmp_path / "train"))
    assert held_out == sorted(train + held_out)[::10]
    assert len(train) == 36 and not set(train) & set(held_out)
    for part in ("test", "val"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / part / "a.png")
        train, held_out, _ = ep.open_data(parse("--data", tmp_path))
        assert len(train) == 40 and held_out == [str(tmp_path / part / "a.png")]
    x = [next(ep.image_batches(parse("--seed", seed), train, CPU, 4, [0], "train"))
         for seed in (0, 1)]
    assert not torch.equal(*x), "--seed changes no crops"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train").symlink_to(tmp_path / "train")
    assert len(ep.find_images(str(tmp_path / "links"))) == 40

def test_pixels_lie_between_minus_one_and_one_and_a_single_image_is_uncropped(tmp_path):
    image, path = Image.new("RGB", (16, 16), "white"), str(tmp_path / "half.png")
    image.paste("black", (0, 0, 8, 16))
    image.save(path)
    for more, files in ([], [path]), (["--no-augment"], [path, path]):
        x = next(ep.image_batches(parse(*more), files, CPU, 2, [0], "train"))
        assert (x[..., :8] == -1).all() and (x[..., 8:] == 1).all()

# ==== 6. Optimisers and schedule =================================================
def test_muon_moves_inner_matrices_and_only_weights_decay():
    pretrainer = ep.Pretrainer(ep.build_model("nano", 32, 4), 1.0)
    adamw, muon = ep.build_optimizers(pretrainer)
    place = {id(p): (optimizer, group["weight_decay"]) for optimizer in (adamw, muon)
             for group in optimizer.param_groups for p in group["params"]}
    for name, p in pretrainer.named_parameters():
        inner = p.ndim == 2 and ("attn" in name or "mlp" in name)
        decay = 0.05 if p.ndim > 1 and len(p) > 1 else 0.0
        assert place.pop(id(p)) == (muon if inner else adamw, decay), name
    assert not place and len(ep.build_optimizers(torch.nn.Conv2d(3, 3, 3))) == 1
    table = torch.nn.ParameterDict({"bias_table": torch.zeros(4, 4)})
    assert len(ep.build_optimizers(torch.nn.ModuleDict({"attn": table}))) == 1
    assert adamw.defaults["betas"] == (0.9, 0.95) and muon.defaults["momentum"] == 0.9

@given(st.integers(1, 200))
def test_the_learning_rate_rises_to_its_peak_and_then_falls(steps):
    warmup, optimizers = steps // 20, [torch.optim.SGD([torch.zeros(1)], 1.0)]
    args = parse("--lr", 0.1, "--max-steps", steps)
    rates = [ep.update_parameters(args, optimizers, i) for i in range(1, steps + 2)]
    assert optimizers[0].param_groups[0]["lr"] == rates[-1] == pytest.approx(0)
    rising = [0.1 * (i + 1) / warmup for i in range(warmup)]
    assert rates[:warmup] == pytest.approx(rising)
    after = rates[max(0, warmup - 1):]
    assert after == sorted(after, reverse=True) and 0.04 < after[0] <= 0.1

def test_muon_computes_in_float32():
    """The matrix moves by 0.2 sqrt(6) times a nearly orthogonal one."""
    module = torch.nn.ModuleDict({"mlp": torch.nn.Linear(6, 6, bias=False)})
    weight = torch.nn.init.zeros_(module.mlp.weight)
    weight.grad, optimizers = images(0, 1, 6)[0, 0], ep.build_optimizers(module)
    ep.update_parameters(parse("--lr", 2, "--max-steps", 1), optimizers, 1)  # rate 1
    orthogonal = weight.detach() / (0.2 * 6**0.5)
    assert (orthogonal - orthogonal.bfloat16()).abs().max() > 1e-4
    lengths = torch.linalg.svdvals(orthogonal)
    assert 0.6 < lengths.min() < lengths.max() < 1.3

# ==== 7. Checkpoints =============================================================
def saved(out):
    """A run's checkpoint, minus what depends on place and time."""
    checkpoint = torch.load(Path(out, "checkpoint.pt"), weights_only=True)
    checkpoint["config"].pop("out")
    for record in checkpoint["log"]:
        record.pop("images_per_second")
    return checkpoint

def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    args, synced, replace = parse("--out", tmp_path / "new"), [], os.replace
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "replace", lambda *paths: replace(*paths) or synced.pop())
    ep.write_file(args, "a", lambda file: file.write(b"old"))
    breaks = mock.Mock(side_effect=OSError("no space left"))
    with pytest.raises(ep.UserError, match="new/a: cannot write .no space left"):
        ep.write_file(args, "a", breaks)
    assert (tmp_path / "new" / "a").read_bytes() == b"old" and not synced

@pytest.mark.parametrize("data", ["procedural", "images"])
def test_resuming_equals_never_having_stopped_bit_for_bit(
        tmp_path, data, monkeypatch, capsys):
    peoples_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    base = "--task", "mim,denoise", "--save-every", 2, "--data", data
    whole = run(*base, "--out", "whole")
    batches = ep.image_batches
    with monkeypatch.context() as patch:  # stops after two steps
        patch.setattr(ep, "image_batches", lambda *inputs: islice(batches(*inputs), 2))
        run(*base, "--out", "parts")
    assert run(*base, "--out", "parts") == whole
    assert "parts/checkpoint.pt: step 2" in capsys.readouterr().out
    one, two = (tree_map_only(torch.Tensor, torch.Tensor.tolist, saved(out))
                for out in ("whole", "parts"))
    assert one == two and [record["step"] for record in one["log"]] == [1, 2, 4]

KILLED = """
import os, sys, energy_pretrain as ep
update = ep.update_parameters
def update_parameters(args, optimizers, step):
    if os.environ['RANK'] > os.environ['TORCHELASTIC_RESTART_COUNT'] and step > 2:
        os.kill(os.getpid(), 9)
    return update(args, optimizers, step)
ep.update_parameters = update_parameters
ep.main(sys.argv[1:])
"""

def test_two_processes_one_of_them_killed_equal_one(tmp_path):
    """The whole program, on files and with full corruptions, so that both see the same
    batches. Weights differ by rounding, which AdamW enlarges where gradients are
    tiny. After a save one process kills itself, and torchrun starts both again."""
    class_folders(tmp_path / "images")
    (tmp_path / "killed.py").write_text(KILLED)
    base = ["--task", "sr", "--partial-share", "0", "--save-every", "1", "--data",
            str(tmp_path / "images"), "--out"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(ep.__file__)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", "--max-restarts=1", str(tmp_path / "killed.py"), *TINY,
         *base, str(tmp_path / "two")],
        capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "two/checkpoint.pt: step" in done.stdout and "2 processes" in done.stdout
    assert done.stdout.count("evaluating on") == 1
    run(*base, tmp_path / "one")
    one, two = (saved(tmp_path / out) for out in ("one", "two"))
    assert [record["step"] for record in two["log"]] == [1, 2, 3, 4]
    for name, value in two["model"].items():
        assert_close(one["model"][name], value, rtol=0.02, atol=2e-3)

def test_a_run_resumes_with_moved_images_but_not_with_others(tmp_path, capsys):
    class_folders(tmp_path / "here")
    base = "--task", "sr", "--epochs", 1.1, "--out", tmp_path / "run", "--data"
    run(*base, tmp_path / "here")
    assert saved(tmp_path / "run")["config"]["max_steps"] == 10  # 39.6 images
    (tmp_path / "here").rename(tmp_path / "there")
    run(*base, tmp_path / "there", "--eval-images", 5)
    printed = capsys.readouterr().out
    assert "run/checkpoint.pt: step 10" in printed and "on 4 images" in printed
    image = tmp_path / "there" / "kind0" / "00.png"
    image.rename(image.with_name("01.png"))
    said = one_line(capsys, *base, tmp_path / "there")
    assert "has files 40 files" in said and "not 40 files" in said

def test_unusable_checkpoints_end_in_one_line_and_are_kept(tmp_path, capsys):
    path, base = tmp_path / "checkpoint.pt", ("--task", "mim", "--out", tmp_path)
    run(*base)
    whole, loaded = path.read_bytes(), torch.load(path)
    said = one_line(capsys, *base, "--mask-ratio", 0.5)
    assert f"{path} has mask_ratio 0.6, not 0.5" in said
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16  # one bit among the weights
    for content in (b"", whole[:len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        assert f"{path}: missing, damaged" in one_line(capsys, *base)
        assert path.read_bytes() == content
    for content in ({"weights": 1}, loaded | {"log": Path("unpickles to a call")}):
        torch.save(content, path)
        assert "missing, damaged, or not ours" in one_line(capsys, *base)
    path.write_bytes(whole)
    assert run(*base, "--lr", 1e-4)  # a run that diverged resumes with less

# ==== 8. Evaluation ==============================================================
def test_evaluate_measures_restoration():
    """If E = 0, a step changes nothing."""
    x = images(0, 40)
    assert ep.psnr(x + 0.2, x) == pytest.approx(20)
    still = ep.Pretrainer(ep.ViT(16, 4, 16, 2, 2), 1.0, num_steps=2)
    metrics, pictures = ep.evaluate(still, x, ["mim"], OPTIONS)
    row, (rows, energies) = metrics["mim"], pictures["mim"]
    assert rows.shape == (4, 2, 3, 16, 16) and energies.shape == (4, 2)
    assert torch.equal(rows[0], x[:2]) and torch.equal(rows[1], rows[3])
    assert row["psnr_corrupted"] == row["psnr_step_1"] == row["psnr_step_2"]
    assert row["order"] == row["order_other"] == 0 and row["psnr_clean"] > 100
    generator = ep.make_generator("cpu", "evaluate", "mim")
    x_tilde, _ = ep.corrupt(x, "mim", generator, OPTIONS)
    assert torch.equal(rows[1], x_tilde[:2])
    of_all_pixels = ep.psnr(x_tilde, x)  # of which 10 / 16 are hidden
    assert row["psnr_corrupted"] == pytest.approx(of_all_pixels - 2.04, abs=0.05)

def test_evaluate_measures_whether_low_energy_means_data():
    """Clean is x = 0, so the bowl is the energy of a perfect restorer."""
    def hill(x, seen):  # 0 at clean, above it at a quarter, below it beyond a half
        return (1 - x.square().mean((1, 2, 3))) * x.square().mean((1, 2, 3))
    rows = [ep.evaluate(ep.Pretrainer(energy, 1.0), torch.zeros(70, 3, 16, 16),
                        ["denoise"], {"noise_std": 2})[0]["denoise"]
            for energy in (bowl(1.0), hill)]
    assert [(row["order"], row["order_quarter"]) for row in rows] == [(1, 1), (0, 1)]
    assert rows[0]["psnr_clean"] > 100 and rows[0]["psnr_step_1"] > 100
    assert abs(rows[0]["psnr_corrupted"]) < 0.1

def test_in_mim_all_energies_are_given_the_same_patches():
    """Here E adds the visible pixels, which all versions of an image share."""
    def energy(x, seen):
        hidden = ep.hidden_pixels(x, seen, 4)
        return (x.abs() * hidden).flatten(1).sum(1) + 1e3 * (x * ~hidden).sum((1, 2, 3))
    x = torch.linspace(1, 0.1, 40).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)  # fainter
    row = ep.evaluate(ep.Pretrainer(energy, 0.0), x, ["mim"], OPTIONS)[0]["mim"]
    assert row["order"] == row["order_quarter"] == 0, "hidden zeros have the lowest E"
    assert row["order_other"] == pytest.approx(39 / 40)  # the neighbour is stronger

def test_the_picture_shows_two_images_a_task_above_their_energies():
    x = 3 * torch.ones(2, 3, 16, 16)  # beyond [-1, 1]: white, and below black
    pictures = {"sr": (torch.stack([x, -x, -x, -x]), torch.zeros(4, 2)),
                "color": (torch.stack([x] * 4), torch.zeros(4, 2))}
    picture = ep.draw_picture(pictures)
    assert picture.size == (76 + 16 + 4 * 80, 16 + 4 * 80)  # 2 steps, so 4 rows
    for row, colour in enumerate([255, 0, 0, 0]):
        assert picture.getpixel((130, 60 + 80 * row)) == (colour,) * 3
        assert picture.getpixel((130 + 2 * 80, 60 + 80 * row)) == (255,) * 3
        text = picture.crop((332, 81 + 80 * row, 396, 95 + 80 * row))
        assert text.convert("L").getextrema()[0] < 100
    names, box = Image.new("RGB", picture.size, "white"), (4, 112, 74, 124)
    ImageDraw.Draw(names).text((4, 112), "corrupted", "black")
    assert picture.crop(box).tobytes() == names.crop(box).tobytes()

def test_a_task_that_changes_nothing_is_named(capsys):
    grey = images(0)[:, :1].expand(-1, 3, -1, -1)
    pretrainer = ep.Pretrainer(bowl(1.0), 1.0)
    metrics, _ = ep.evaluate(pretrainer, grey, ["color", "denoise"], OPTIONS)
    assert metrics["color"]["psnr_corrupted"] > 60
    assert capsys.readouterr().out == "color changes nothing in these images\n"

# ==== 9. Pretraining =============================================================
def test_a_short_run_restores_ranks_and_leaves_its_files(tmp_path, capsys):
    metrics = run("--task", "mim,denoise", "--out", tmp_path, "--batch-size", 8,
                  "--max-steps", 40, "--eval-images", 64, "--alpha", 0.5)
    for row in metrics.values():
        assert row["psnr_step_1"] > row["psnr_corrupted"] + 1.5, row
        assert row["order"] > 0.9, row
    printed = capsys.readouterr().out
    assert "minutes left" in printed and "evaluating on 64 images" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backbone.pt", "checkpoint.pt", "metrics.json", "restorations.png"]
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    first, last = saved(tmp_path)["log"]
    assert last["loss"] < 0.9 * first["loss"] and last["step"] == 40
    energy = ep.load_energy(tmp_path / "checkpoint.pt")
    names = [name for name in energy.state_dict() if name != "head"]
    assert names == list(torch.load(tmp_path / "backbone.pt"))
    x = next(ep.image_batches(parse(), None, CPU, 64, [0], "held out"))
    psnr = ep.psnr(ep.restore(energy, x, energy.alpha)[0], x)
    assert psnr == pytest.approx(metrics["denoise"]["psnr_clean"], abs=0.01)

def test_restore_steps_are_used():
    assert ep.build_pretrainer(parse("--restore-steps", 2), CPU).num_steps == 2

def test_every_step_process_and_seed_has_its_own_corruptions(tmp_path, monkeypatch):
    """And the rotation of tasks differs between neighbouring steps and processes."""
    spy = mock.Mock(wraps=ep.corrupt_batch)
    monkeypatch.setattr(ep, "corrupt_batch", spy)
    for rank, seed in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(ep, "RANK", rank)
        out = tmp_path / f"{rank}{seed}"
        args = parse("--max-steps", 2, "--seed", seed, "--out", out)
        ep.train(args, ep.Pretrainer(tiny_vit(), 1.0), None, CPU)
    seeds = {call.args[2].initial_seed() for call in spy.call_args_list}
    shifts = [call.args[4] for call in spy.call_args_list]
    assert len(seeds) == 6 and shifts == [1, 2, 2, 3, 1, 2]

def test_gradients_are_clipped_and_infinite_ones_stop_the_run(tmp_path):
    pretrainer, args = ep.Pretrainer(tiny_vit(), 10.0), parse("--out", tmp_path)
    args.max_steps = 1
    ep.train(args, pretrainer, None, CPU)
    assert saved(tmp_path)["log"][-1]["gradient_norm"] > 1
    norm = torch.nn.utils.get_total_norm([p.grad for p in pretrainer.parameters()])
    assert norm.item() == pytest.approx(1.0, rel=1e-3)
    pretrainer.model.cls_token.register_hook(lambda gradient: gradient * torch.inf)
    args.out = str(tmp_path / "other")
    with pytest.raises(ep.UserError, match="gradient norm (inf|nan)"):
        ep.train(args, pretrainer, None, CPU)
    assert not os.path.exists(args.out)

def test_compiled_and_distributed_gradients_equal_eager(monkeypatch):
    """By default torch cuts the graph at DistributedDataParallel's buckets, and fails.
    "aot_eager" traces both backward passes, but needs no C++ compiler."""
    results, args, parallel = [], parse(), torch.nn.parallel
    ep.dist.init_process_group("gloo", store=ep.dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(ep.Pretrainer, "compile", partialmethod(
        torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(parallel, "DistributedDataParallel", partial(
        parallel.DistributedDataParallel, bucket_cap_mb=0.01))  # many, as if large
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    groups = [(images(0), images(1), visible(0)), (images(2), images(3), None)]
    for args.compile, world_size in ((False, 1), (True, 2)):
        monkeypatch.setattr(ep, "WORLD_SIZE", world_size)
        pretrainer = ep.Pretrainer(tiny_vit(), 0.1)
        module = ep.wrap(args, pretrainer)
        assert bool(pretrainer._compiled_call_impl) == args.compile
        assert (module is pretrainer) == (world_size == 1)
        loss = module(groups)
        loss.backward()
        results.append([loss, *(p.grad for p in pretrainer.parameters())])
    ep.dist.destroy_process_group()
    assert_close(*results, rtol=1e-4, atol=1e-5)

def test_processes_with_different_checkpoints_end_in_one_line(tmp_path, monkeypatch):
    """As on two machines that do not share --out, one of which has a checkpoint."""
    def gather(counts, own):
        counts[:] = [own, 4]
    monkeypatch.setattr(ep.dist, "all_gather_object", gather)
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    with pytest.raises(ep.UserError, match="is --out shared?"):
        ep.resume(parse("--out", tmp_path), tiny_vit(), [])

# ==== 10. Command line ===========================================================
@pytest.mark.parametrize("arguments, message", [
    ("--task sr,sr", "--task sr,sr: choose from mim, sort, sr, denoise, color, each"),
    ("--image-size 18", "--patch-size 4: must divide --image-size"),
    ("--sort-grid 3", "--sort-grid 3: must divide --image-size"),
    ("--sr-factor 1", "--sr-factor: 1: not in [2"),
    ("--mask-ratio 0.99", "--mask-ratio 0.99: hides no patch or all"),
    ("--partial-share 1", "--partial-share: 1: not in [0, 1)"),
    ("--epochs 2", "--epochs 2.0: needs --data"),
    ("--data /no/such.jpg", "--data /no/such.jpg: [Errno 2] No such file"),
    ("--batch-size 5", "--batch-size 5: must be a multiple of the 2 processes"),
    ("--data . --workers 1", "float.tif (more than 8 bits"),  # one line from a worker
    ("--data empty", "empty: no images (.jpg"),
    ("--out " + "x" * 300, "x/backbone.pt: cannot write ([Errno 36] File name")])
def test_wrong_arguments_and_unusable_data_end_in_one_line(
        tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    Image.new("F", (20, 20)).save("float.tif")
    monkeypatch.setattr(ep, "WORLD_SIZE", 2 if "batch" in arguments else 1)
    assert message in one_line(capsys, *arguments.split())

def test_defaults_follow_the_device_and_what_was_given(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    given = vars(ep.parse_args("--device cuda --max-steps 7 --out ~/run".split()))
    names = "model", "max_steps", "compile", "out", "patch_size"
    assert [OPTIONS[name] for name in names] == ["nano", 1500, False, "runs/all", 4]
    assert [given[name] for name in names] == ["small", 7, True, "/home/me/run", 16]
    assert OPTIONS["task"] == "mim,sort,sr,denoise,color"
    with pytest.raises(SystemExit):
        ep.parse_args(["--help"])
    assert "torchrun --nproc_per_node=8" in capsys.readouterr().out

# ==== Comparisons ================================================================
class MaskedAutoencoder(torch.nn.Module):
    """Two usual masked-image methods, in Pretrainer's place.

    simmim (Xie et al. 2022): the network sees hidden patches as grey, and a linear
    layer predicts their pixels. mae (He et al. 2022): it sees visible patches alone;
    one more block predicts the others, each scaled to mean 0 and variance 1.
    """
    def __init__(self, model, method):
        super().__init__()
        D, P = model.head.numel(), model.patch_embed.proj.kernel_size[0]
        self.model, self.method, self.patch_size = model, method, P
        self.predict = torch.nn.Linear(D, 3 * P**2)
        self.decoder = ep.Block(D, model.blocks[0].num_heads)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, D))
        self.positions = torch.nn.Parameter(0.02 * torch.randn(model.pos_embed.shape))

    def forward(self, groups):
        (x, x_tilde, seen), = groups
        target, model = pieces(x, self.patch_size), self.model  # (B, N, 3*P*P)
        hidden = torch.ones(target.shape[:2], device=x.device).scatter(1, seen, 0) > 0
        if self.method == "simmim":
            tokens = model.norm(model.blocks(model.add_positions(model.embed(x_tilde))))
            guess = self.predict(tokens)[:, 1:]
            return F.smooth_l1_loss(guess[hidden], target[hidden])
        tokens = model.add_positions(model.embed(x))
        index = F.pad(seen + 1, (1, 0)).unsqueeze(2).expand(-1, -1, tokens.shape[2])
        features = model.norm(model.blocks(tokens.gather(1, index)))
        tokens = self.mask_token.expand_as(tokens).scatter(1, index, features)
        guess = self.predict(self.decoder(tokens + self.positions))[:, 1:]
        deviation = target.std(2, keepdim=True) + 1e-3
        target = (target - target.mean(2, keepdim=True)) / deviation
        return (guess - target).square()[hidden].mean()

RATIO = {"simmim": 0.5, "mae": 0.75}  # of hidden patches, as in the papers

def peer(method, *argv):
    """Pretrain by simmim or mae."""
    args = ep.parse_args(["--task", "mim", "--partial-share", "0", "--mask-ratio",
                          str(RATIO[method]), "--out", f"runs/{method}", *argv])
    device = ep.choose_device(args.device)
    train, _, args.files = ep.open_data(args)
    model = ep.build_pretrainer(args, device).model
    ep.train(args, MaskedAutoencoder(model, method).to(device), train, device)

def cost(*argv):
    """Print the median CPU time of each method's forward and backward pass."""
    args = ep.parse_args(["--device", "cpu", *argv])
    model, times = ep.build_pretrainer(args, CPU).model, {}
    x = images(0, args.batch_size, args.image_size)
    steps = {"supervised": lambda: model.represent(x).sum()}
    for name in ("simmim", "mae", "mim", "denoise", "all"):
        options = vars(args) | {"mask_ratio": RATIO.get(name, args.mask_ratio)}
        chosen = {"all": ep.TASKS, "denoise": ["denoise"]}.get(name, ["mim"])
        module = (MaskedAutoencoder(model, name) if name in RATIO
                  else ep.Pretrainer(model, args.alpha))
        steps[name] = partial(module, ep.corrupt_batch(
            x, chosen, torch.Generator(), options, 0))
    for _ in range(9):  # in turn, so that all meet the same disturbances
        for name, step in steps.items():
            start = time.process_time()
            step().backward()
            times.setdefault(name, []).append(time.process_time() - start)
    for name, seconds in times.items():
        print(f"{name:<11} {torch.tensor(seconds).median():.3f} s")

def labelled(checkpoint, argv):
    """A checkpoint's network, and (file, class) of training and held-out images."""
    args = ep.parse_args(["--device", "cpu", *argv])
    def class_of(file):
        folders = Path(file).relative_to(args.data).parts
        return folders[folders[0] in ("train", "val", "test")]
    parts = [part or [] for part in ep.open_data(args)[:2]]
    names, others = (sorted({class_of(file) for file in part}) for part in parts)
    if len(names) < 2 or not set(others) <= set(names):
        raise ep.UserError(f"--data {args.data}: needs a folder for each class")
    train, held_out = ([(file, names.index(class_of(file))) for file in part]
                       for part in parts)
    model = (ep.build_pretrainer(args, CPU).model if checkpoint == "nothing"
             else ep.load_energy(checkpoint).requires_grad_(True))
    return args, model, train, held_out

def by_parts(function, samples, args):
    """function of all centre crops, a hundred at a time; and the labels."""
    load, parts = ep.Crops([], args.image_size, augment=False).load, []
    with torch.no_grad():
        for i in range(0, len(samples), 100):
            x = torch.stack([load(file) for file, _ in samples[i:i + 100]])
            parts.append(function(x / 127.5 - 1))
    return torch.cat(parts), torch.tensor([label for _, label in samples])

def accuracy(checkpoint, guess, labels):
    share = (guess.argmax(1) == labels).float().mean().item()
    print(f"{checkpoint}: {share:.1%} of {len(labels)} held-out images", flush=True)
    return share

def probe(checkpoint="nothing", *argv):
    """Logistic regression on the features of all training images."""
    args, model, train, held_out = labelled(checkpoint, argv)
    x, y = by_parts(model.represent, train, args)
    mean, deviation = x.mean(0), x.std(0)
    x, linear = (x - mean) / deviation, torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), y) + 1e-3 * linear.weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    x, y = by_parts(model.represent, held_out, args)
    return accuracy(checkpoint, linear((x - mean) / deviation), y)

def finetune(checkpoint="nothing", *argv, steps=400):
    """Train all parameters on 2,000 labels; --seed chooses which."""
    args, model, train, held_out = labelled(checkpoint, argv)
    args.max_steps, args.lr = steps, 6e-3
    torch.manual_seed(args.seed)
    chosen, D = torch.randperm(len(train))[:2000], model.head.numel()
    classes = 1 + max(label for _, label in train)
    last = torch.nn.Sequential(
        torch.nn.BatchNorm1d(D, affine=False), torch.nn.Linear(D, classes))
    module = torch.nn.ModuleList([model, last])
    optimizers = ep.build_optimizers(module)
    crops = ep.Crops([file for file, _ in train], args.image_size, augment=True)
    for step in range(1, steps + 1):
        i = chosen[torch.randint(len(chosen), (64,))].tolist()
        x = torch.stack([crops[j, step * 64 + k] for k, j in enumerate(i)])
        module.zero_grad()
        guess = last(model.represent(x / 127.5 - 1))
        F.cross_entropy(guess, torch.tensor([train[j][1] for j in i])).backward()
        ep.update_parameters(args, optimizers, step)
    last.eval()
    return accuracy(checkpoint, *by_parts(
        lambda x: last(model.represent(x)), held_out, args))

@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_peers_learn_and_their_features_tell_folders_apart(tmp_path, method):
    class_folders(tmp_path / "images")
    data = "--data", str(tmp_path / "images")
    peer(method, *TINY, "--max-steps", "20", "--lr", "1e-2", "--out", str(tmp_path))
    first, *_, last = saved(tmp_path)["log"]
    assert last["loss"] < 0.8 * first["loss"]
    assert probe("nothing", *TINY, *data) == 1
    assert finetune(str(tmp_path / "checkpoint.pt"), *TINY, *data, steps=10) == 1
    with pytest.raises(ep.UserError, match="needs a folder for each class"):
        probe("nothing", *TINY, "--data", str(tmp_path / "images" / "kind0"))

if __name__ == "__main__":
    commands = {"mae": partial(peer, "mae"), "simmim": partial(peer, "simmim"),
                "probe": probe, "finetune": finetune, "cost": cost}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    args, others = parser.parse_known_args()
    try:
        commands[args.command](*others)
    except ep.UserError as error:
        parser.exit(2, f"error: {error}\n")
