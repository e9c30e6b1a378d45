"""Tests of energy_pretrain.py, in its order; their names are its specification.

`pytest -q` runs them on a CPU, without a network. At the end stand the commands by
which the README compares, with energy_pretrain.py's flags:
    python test_energy_pretrain.py mae, or simmim, pretrains the usual way;
    python test_energy_pretrain.py probe CHECKPOINT says how well its features tell the
    folders of --data apart ("nothing" in its place: those of an untrained network).
"""
import argparse
import json
import math
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

import energy_pretrain as ep

torch.set_num_threads(1)  # small tensors: two threads would wait for each other
settings.register_profile("here", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("here")

SCRIPT = str(Path(ep.__file__))
TINY = ["--image-size", "16", "--batch-size", "4", "--max-steps", "4", "--eval-images",
        "12", "--device", "cpu", "--workers", "0"]
CPU = torch.device("cpu")
seeds, tasks = st.integers(0, 2**31), st.sampled_from(ep.TASKS)

def images(seed, batch=3, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(dtype)

def tiny_vit(seed=0, head=True, depth=1):
    """A small ViT; its head drawn at random, since a zero head makes a flat energy."""
    torch.manual_seed(seed)
    model = ep.ViT(16, 4, dim=16, depth=depth, num_heads=2)
    if head:
        torch.nn.init.normal_(model.head.weight)
    return model

OPTIONS = vars(ep.parse_args([]))  # of 16 patches mim hides 10

def corrupted(x, task, seed, **options):
    generator = ep.make_generator("cpu", seed)
    return ep.CORRUPTIONS[task](x, generator, **OPTIONS | options)

def pieces(x, side):
    """Images (B, C, S, S) as square pieces (B, M, C*side*side)."""
    return F.pixel_unshuffle(x, side).flatten(2).transpose(1, 2)

def hide(x, numbers, seed=0):
    """x (B, 3, 16, 16), so many of the 16 patches hidden, a number for each image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(x), 16, generator=generator).argsort(1)
    mask = (order < torch.tensor(numbers).view(-1, 1)).view(-1, 1, 4, 4)
    return x.masked_fill(F.interpolate(mask.float(), scale_factor=4).bool(), 0)

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

def bowl(p, curvature=1.0):
    """An energy with a parameter, whose double backward one can write down."""
    return lambda x: curvature * (p * x**2).flatten(1).sum(1) / 2

@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_training_goes_through_each_step_but_not_from_one_to_the_next(num_steps):
    """E = p x^2 / 2: a step is x (1 - alpha p), its derivative by p -alpha x."""
    p, x = torch.tensor(0.3, requires_grad=True), images(0)
    steps = ep.restore(bowl(p), x, 0.5, num_steps, create_graph=True)
    steps.sum().backward()
    starts = [x * 0.85**k for k in range(num_steps)]
    assert_close(steps.detach(), 0.85 * torch.stack(starts))
    expected = -0.5 * sum(y.sum().item() for y in starts)
    assert p.grad.item() == pytest.approx(expected, rel=1e-4)
    assert not ep.restore(bowl(p), x, 0.5).requires_grad

@given(seeds)
@settings(max_examples=4)
def test_the_gradient_of_the_loss_equals_finite_differences(seed):
    pretrainer = ep.Pretrainer(tiny_vit(seed % 7), 2.0)
    batch = images(seed), hide(images(seed + 1), [0, 9, 9]), 2, 9
    pretrainer(*batch).backward()
    for name in ("model.head.weight", "model.blocks.0.attn.qkv.weight"):
        p = pretrainer.get_parameter(name)
        way = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))

        def loss(h):
            parameters = {name: p + h * way}
            return torch.func.functional_call(pretrainer, parameters, batch).item()

        expected, got = (loss(3e-3) - loss(-3e-3)) / 6e-3, (p.grad * way).sum().item()
        assert got == pytest.approx(expected, rel=0.05, abs=2e-5), name

@given(seeds, tasks)
def test_a_small_step_lowers_the_energy(seed, task):
    """For mim: the energy given what is seen, the hidden patches those of x_tilde."""
    model = tiny_vit(seed % 11)
    x_tilde = corrupted(images(seed), task, seed)
    hidden = model.find_hidden(x_tilde)
    model.find_hidden = lambda x: hidden
    x_hat = ep.restore(model, x_tilde, alpha=1e-2)[0]
    assert x_hat.shape == x_tilde.shape
    with torch.no_grad():
        assert (model(x_hat) < model(x_tilde)).all()

@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_restore_refuses_energies_that_would_broadcast(shape):
    with pytest.raises(ValueError, match="shape"):
        ep.restore(lambda x: x.sum() * torch.ones(shape), images(0), 1.0)

def test_the_loss_counts_errors_relative_to_how_far_images_were_moved():
    x = images(0, 4)
    far = torch.tensor([0.5, 0.25, 0.1, 0.01]).view(4, 1, 1, 1)  # the last: clamped
    x_hat = torch.stack([x + 0.1, x + 1.5])  # K = 2; the second is linear
    moved = torch.tensor([0.5, 0.25, 0.1, 0.05])
    expected = ((0.1**2 / 2 + 1.0) / moved / 2).mean()
    assert_close(ep.restoration_loss(x_hat, x, x + far), expected)

# ==== 2. Corruptions =============================================================

@given(seeds, tasks, st.integers(1, 4), st.sampled_from([8, 16, 32]),
       st.sampled_from([torch.float32, torch.float64]))
def test_corrupt_keeps_shape_dtype_and_its_input(seed, task, batch, size, dtype):
    x = images(seed, batch, size, dtype)
    before, x_tilde = x.clone(), corrupted(x, task, seed)
    assert (x_tilde.shape, x_tilde.dtype) == (x.shape, dtype)
    assert x_tilde.isfinite().all()
    assert (x_tilde != x).flatten(1).any(1).all(), "an image was left as it is"
    assert torch.equal(x, before) and torch.equal(x_tilde, corrupted(x, task, seed))

@given(seeds, st.sampled_from([2, 4, 8]), st.floats(0.01, 0.99))
def test_whole_patches_are_hidden_and_whole_pieces_permuted(seed, side, ratio):
    x, grid = images(seed).abs() + 0.1, 16 // side  # no pixel is zero before
    masked = corrupted(x, "mim", seed, mask_ratio=ratio, patch_size=side)
    patches = pieces(masked == 0, side)
    assert (patches.all(2) | ~patches.any(2)).all(), "a patch is hidden in part"
    assert (patches.any(2).sum(1) == round(ratio * grid**2)).all()
    assert torch.equal(masked[masked != 0], x[masked != 0])
    shuffled = corrupted(x, "sort", seed, sort_grid=grid)
    for a, b in zip(pieces(x, side), pieces(shuffled, side)):
        assert sorted(a.tolist()) == sorted(b.tolist())

@pytest.mark.parametrize("task, expected", [
    ("mim", [0.5, 0.5, 0, 0, 0]), ("sort", [0, 0.25, 0.25, 0.25, 0.25])])
def test_each_place_is_hidden_and_filled_equally_often(task, expected):
    x = torch.arange(1.0, 5.0).view(1, 1, 2, 2).expand(4000, 3, 2, 2)
    first = corrupted(x, task, 0, sort_grid=2, patch_size=1)[:, 0, 0, 0]
    shares = torch.bincount(first.long(), minlength=5) / len(x)
    assert (shares - torch.tensor(expected)).abs().max() < 0.03, shares  # 4 deviations

@given(seeds, st.sampled_from([2, 4]))
def test_lower_resolution_averages_and_enlarges(seed, factor):
    x = images(seed)
    small = F.avg_pool2d(x, factor)
    again = F.interpolate(small, scale_factor=factor, mode="bilinear")
    assert_close(corrupted(x, "sr", 0, sr_factor=factor), again)

def test_remove_color_makes_the_grey_of_bt_601():
    x = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)  # a red, a green, a blue image
    grey = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1).expand_as(x)
    assert_close(corrupted(x, "color", 0), grey)

@given(seeds, st.integers(0, 9), st.integers(1, 12), st.integers(1, 5))
def test_corrupt_batch_deals_the_tasks_in_turn(seed, turn, batch, count):
    """Two processes with half a batch deal as one does, if the second begins later."""
    chosen, x = ep.TASKS[:count], images(seed, batch).clamp(0.1, 1)
    options = OPTIONS | {"partial_share": 0.25}
    generator = ep.make_generator("cpu", seed)
    y, x_tilde, num_masked, num_hidden = ep.corrupt_batch(
        x, chosen, generator, options, turn)
    origin = [next(i for i in range(batch) if torch.equal(x[i], image)) for image in y]
    num_partial = min(-(-batch // 4), batch - 1)
    assert origin[:num_partial] == list(range(num_partial))
    assert sorted(origin) == list(range(batch))
    dealt = [chosen[(turn + i) % count] for i in origin]
    masked = [task == "mim" and i >= num_partial for i, task in enumerate(dealt)]
    assert sum(masked) == num_masked and masked == sorted(masked), "masked come last"
    hidden = pieces(x_tilde, 4).any(2).logical_not().sum(1)
    assert num_hidden == 10 and hidden.tolist() == [10 * m for m in masked]
    for i in range(num_partial, batch):
        if dealt[i] in ("sr", "color"):
            assert_close(x_tilde[i], corrupted(y, dealt[i], 0)[i])

def test_strengths_are_squares_of_uniform_numbers():
    x, options = images(0, 400, 4), OPTIONS | {"partial_share": 0.99}
    generator = ep.make_generator("cpu", 0)
    _, x_tilde, *_ = ep.corrupt_batch(x, ["color"], generator, options, 0)
    way = corrupted(x, "color", 0) - x
    s = ((x_tilde - x) * way).flatten(1).sum(1) / way.square().flatten(1).sum(1)
    assert_close(x_tilde, x + s.view(-1, 1, 1, 1) * way)
    assert 0 <= s.min() and s.max() <= 1 and abs(s.mean() - 1 / 3) < 0.04
    assert (s[-4:] == 1).all(), "the others whole"

# ==== 3. The energy ==============================================================

def test_the_energy_is_a_weighted_distance_of_patches_from_what_is_expected():
    model, x = tiny_vit(), images(0)
    p, head = model.embed(x), model.head
    tokens = model.encode(p)
    z = head.norm(head.block(tokens + head.pos_embed))
    assert_close(model(x), ((p - z)**2 @ head.weight).mean(1) / 2)
    assert_close(model.represent(x), tokens.mean(1))

@given(seeds, st.integers(1, 15))
@settings(max_examples=5)
def test_features_of_seen_patches_do_not_depend_on_what_is_hidden(seed, number):
    """The blocks see nothing of it: not its pixels, and not that it is there."""
    model, x = tiny_vit(), images(seed)
    seen = (~model.find_hidden(hide(x, [number] * 3, seed))).nonzero()[:, 1].view(3, -1)
    patches = model.embed(x)
    features = model.encode(patches, seen)
    places = seen.unsqueeze(2).expand(-1, -1, 16)
    noise = torch.full_like(patches, 9.0).scatter(1, places, patches.gather(1, places))
    assert torch.equal(model.encode(noise, seen), features)

@given(seeds, st.lists(st.integers(0, 16), min_size=1, max_size=5))
@settings(max_examples=8)
def test_masked_and_whole_images_in_one_batch_equal_one_by_one(seed, numbers):
    """An image shows by its zeros which way it goes; being told changes nothing."""
    model, x = tiny_vit(), hide(images(seed, len(numbers)), numbers, seed)
    told = torch.cat([model(x[i:i + 1], n) for i, n in enumerate(numbers)])
    assert_close(model(x), told, rtol=1e-4, atol=1e-5)
    alone = [ep.restore(model, x[i:i + 1], 3.0, 2) for i in range(len(x))]
    together = ep.restore(model, x, 3.0, 2)
    assert_close(together, torch.cat(alone, 1), rtol=1e-3, atol=1e-4)

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

def test_features_equal_those_of_torchvisions_vit_with_the_same_weights():
    model, x, tokens = tiny_vit(depth=2).double(), images(0, dtype=torch.float64), []
    other = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64).double().eval()
    other.heads = torch.nn.Identity()
    inner = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()  # timm's names
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in inner]
    names = [f"{layer}.{kind}" for layer in ["patch_embed.proj", *layers, "norm"]
             for kind in ("weight", "bias")]
    names = ["cls_token", *names[:2], "pos_embed", *names[2:]]  # torchvision's order
    values = [torch.nn.init.normal_(p, std=0.2) for p in other.parameters()]
    weights = dict(zip(names, values, strict=True))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert all(name.startswith("head.") for name in missing) and not unexpected
    other.encoder.register_forward_hook(lambda module, args, out: tokens.append(out))
    other(x)
    assert_close(model.encode(model.embed(x)), tokens[0][:, 1:])

def test_all_parameters_train_and_the_first_step_moves_nothing():
    torch.manual_seed(0)
    pretrainer = ep.Pretrainer(ep.build_model("nano", 32, 4), 256.0)
    assert not pretrainer.model.head.weight.any()
    optimizer = torch.optim.SGD(pretrainer.parameters(), lr=1.0)
    for _ in range(2):  # the first only moves the head away from zero
        optimizer.zero_grad()
        pretrainer(images(1, 2, 32), images(2, 2, 32)).backward()
        optimizer.step()
    for name, p in pretrainer.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name

def test_the_second_step_begins_where_the_first_ended_with_a_whole_image():
    pretrainer = ep.Pretrainer(tiny_vit(), 2.0, num_steps=2)
    x, x_tilde = images(0), hide(images(1), [9] * 3)
    x_hat = ep.restore(pretrainer.model, x_tilde, 2.0, 2)
    assert torch.equal(x_hat[0] != x_tilde, x_tilde == 0)
    assert (x_hat[1] != x_hat[0]).all()
    expected = ep.restoration_loss(x_hat, x, x_tilde)
    assert_close(pretrainer(x, x_tilde, 3, 9), expected)

@pytest.mark.parametrize("num_masked, calls", [
    (0, [(3, 0)]), (1, [(2, 0), (1, 9)]), (3, [(3, 9)])])
def test_whole_and_masked_images_go_apart_and_never_an_empty_batch(num_masked, calls):
    seen = []

    def energy(y, num_hidden):
        seen.append((len(y), num_hidden))
        return bowl(1.0)(y)

    ep.Pretrainer(energy, 1.0)(images(0), images(1), num_masked, 9)
    assert seen == calls

class Counter(TorchDispatchMode):
    """Counts multiplications; FlopCounterMode cannot look into torch.func.grad."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, packet = func(*args, **kwargs or {}), func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs or {}, out_val=out)
        return out

def test_a_mim_step_costs_at_most_0_7_supervised_ones_and_a_whole_one_2_3():
    """ViT-S/16, 224 px, 3/4 hidden; "meta" tensors have a shape and no numbers."""
    with torch.device("meta"):
        model, x = ep.build_model("small", 224, 16), torch.empty(128, 3, 224, 224)
    pretrainer, flops = ep.Pretrainer(model, 1.0), []
    num_masked = 128 - math.ceil(128 * OPTIONS["partial_share"])
    for loss in (lambda: model.represent(x).sum(), lambda: pretrainer(x, x),
                 lambda: pretrainer(x, x, num_masked, 147)):
        with Counter() as counter:
            loss().backward()
        flops.append(counter.total)
    supervised, whole, mim = flops
    assert 2 < whole / supervised < 2.3 and 0.3 < mim / supervised <= 0.7, flops

# ==== 4. Processes and randomness ================================================

@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_a_generator_follows_from_its_key(key):
    first, again, other = (torch.rand(4, generator=ep.make_generator("cpu", *k))
                           for k in (key, key, [*key, 1]))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ep.seed_from("crop", 0, 17) == 2794066429  # in every version of Python

@pytest.mark.parametrize("size, expected", [("", (0, 0, 1)), ("4", (1, 2, 4))])
def test_half_of_a_launchers_environment_is_one_process(monkeypatch, size, expected):
    """RANK=1 left over from a job would print and save nothing."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "2", "WORLD_SIZE": size,
                        "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    module = runpy.run_path(SCRIPT)
    assert (module["RANK"], module["LOCAL_RANK"], module["WORLD_SIZE"]) == expected

@pytest.mark.parametrize("launched, count, rank, index", [
    (True, 4, 2, 2), (False, 4, 2, 2), (False, 1, 2, 0), (True, 1, 2, None)])
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

@pytest.fixture
def own_group():
    """A process group of the caller's, of one process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

def test_a_callers_own_process_group_stays(tmp_path, monkeypatch, own_group):
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    monkeypatch.setattr(ep, "train", lambda *inputs: None)
    run("--task", "sr", "--out", tmp_path)
    assert torch.distributed.is_initialized()

# ==== 5. Data ====================================================================

def test_landscapes_are_those_that_the_readmes_figures_were_measured_on():
    x = ep.draw_landscapes(64, 24, ep.make_generator("cpu", 0))
    right, down = torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24).view(-1, 1)
    found = [*x.mean((0, 2, 3)), x.std(), (x * right).mean(), (x * down).mean()]
    expected = [-0.098639, -0.128388, -0.208020, 0.392140, -0.002686, -0.088964]
    assert torch.stack(found).tolist() == pytest.approx(expected, abs=2e-5)

def test_every_use_step_and_process_has_its_own_landscapes():
    batches, steps = [], range(5, 7)
    for use in ("train", "held out"):
        for rank in (0, 1):
            batches += ep.image_batches(parse(), None, CPU, 4, steps, use, rank, 2)
    assert all(x.shape == (2, 3, 16, 16) and x.abs().max() <= 1 for x in batches)
    assert len({x.sum().item() for x in batches}) == 8

def peoples_images(folder):
    """One file of each sort that people have, the readable ones red."""
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
    peoples_images(tmp_path)
    files = ep.find_images(str(tmp_path))
    assert [os.path.relpath(file, tmp_path) for file in files] == [
        "alpha.png", "dot.png", "palette.png", "photo.JPG", "press.jpg", "thin.png",
        "web.webp", "@alice/image.png", "deep/er/image.png"]
    assert f"{tmp_path}: 9 images (.jpg .jpeg .png" in capsys.readouterr().out
    assert ep.find_images(files[3]) == [files[3]]
    crops = ep.Crops(files, 16, False)
    for index, file in enumerate(files):
        error = crops[index, 0][:, 8, 8] - torch.tensor([200.0, 40.0, 40.0])
        assert crops[index, 0].shape == (3, 16, 16) and error.abs().max() < 12, file

@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_drawings_on_a_transparent_ground_are_laid_on_white(tmp_path, mode):
    """Ink and ground are both black there; only their opacity differs."""
    drawing = Image.new("RGBA", (20, 20))
    drawing.paste((0, 0, 0, 255), (0, 0, 10, 20))
    drawing.convert(mode).save(tmp_path / "drawing.png")
    pixels = ep.Crops([str(tmp_path / "drawing.png")], 20, False)[0, 0]
    assert (pixels[:, :, :10] == 0).all() and (pixels[:, :, 10:] == 255).all()

def test_photographs_are_turned_upright_and_large_jpegs_decoded_small(tmp_path):
    image, exif, path = Image.new("RGB", (400, 200)), Image.Exif(), tmp_path / "a.jpg"
    image.paste((255, 255, 255), (0, 0, 200, 200))  # its left half is white
    exif[274] = 6  # the camera was held on its side
    image.save(path, exif=exif)
    crops = ep.Crops([str(path)], 16, False)
    assert crops[0, 0][:, 0].min() > 240 and crops[0, 0][:, -1].max() < 15
    assert max(crops.decode(str(path)).size) < 200

@pytest.mark.parametrize("fault", ["cut", "I;16", "F"])
def test_in_place_of_an_unusable_file_come_others_at_random(tmp_path, capsys, fault):
    paths = [str(tmp_path / f"{i}.tif") for i in range(6)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(path)
    if fault == "cut":
        Path(paths[0]).write_bytes(Path(paths[0]).read_bytes()[:45])
    else:
        Image.new(fault, (20, 20)).save(paths[0])
    crops = ep.Crops(paths, 16, False)
    drawn = [crops[0, seed][0, 0, 0].item() // 40 for seed in range(60)]
    assert all(drawn.count(i) > 2 for i in range(1, 6)) and 0 not in drawn
    assert f"left out {paths[0]}" in capsys.readouterr().err
    with pytest.raises(ep.UserError, match="0.tif cannot be used"):
        ep.Crops(paths[:1], 16, False)[0, 0]

def test_crops_follow_from_their_seed_or_are_the_middle(tmp_path):
    noise = Image.effect_noise((64, 96), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    crops, middle = (ep.Crops([str(tmp_path / "noise.png")], 16, augment)
                     for augment in (True, False))
    assert torch.equal(crops[0, 5], crops[0, 5])
    assert not torch.equal(crops[0, 5], crops[0, 6])
    small = noise.resize((16, 24), Image.Resampling.BILINEAR).crop((0, 4, 16, 20))
    expected = torchvision.transforms.v2.functional.pil_to_tensor(small)
    assert torch.equal(middle[0, 5], expected)

@given(seeds, st.integers(1, 20), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_every_image_comes_once_an_epoch_to_any_number_of_processes(
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

def test_every_tenth_image_is_held_out_or_what_val_holds(tmp_path):
    class_folders(tmp_path / "train")
    train, held_out, _ = ep.open_data(parse("--data", tmp_path / "train"))
    assert len(train) == 36 and len(held_out) == 4 and not set(train) & set(held_out)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "a.png")
    train, held_out, _ = ep.open_data(parse("--data", tmp_path))
    assert len(train) == 40 and held_out == [str(tmp_path / "val" / "a.png")]

def test_pixels_lie_between_minus_one_and_one_and_a_single_image_is_whole(tmp_path):
    image, path = Image.new("RGB", (16, 16), "white"), str(tmp_path / "half.png")
    image.paste("black", (0, 0, 8, 16))
    image.save(path)
    for more, files in ([], [path]), (["--no-augment"], [path, path]):
        x = next(ep.image_batches(parse(*more), files, CPU, 2, [0], "train"))
        assert (x[..., :8] == -1).all() and (x[..., 8:] == 1).all()

def test_the_first_epoch_sees_each_image_once(tmp_path, monkeypatch):
    class_folders(tmp_path / "images")
    decoded, decode = [], ep.Crops.decode
    monkeypatch.setattr(ep.Crops, "decode", lambda self, file: (
        decoded.append(file), decode(self, file))[1])
    run("--epochs", 1, "--task", "sr", "--data", tmp_path / "images", "--out", tmp_path)
    assert saved(tmp_path)["config"]["max_steps"] == 9  # 36 images by fours
    assert len(decoded) == 36 + 4 and len(set(decoded)) == 40

def test_cifar10_is_downloaded_and_has_its_own_held_out_part(
        tmp_path, monkeypatch, capsys):
    class Cifar:
        def __init__(self, root, train=True, download=False):
            if online is False:
                raise OSError("no route to host")
            self.data = torch.zeros(50 if train else 10, 32, 32, 3).byte().numpy()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    arguments, online = ("--data", "cifar10", "--task", "sr", "--out", tmp_path), True
    train, held_out, _ = ep.open_data(parse(*arguments))
    assert len(train) == 50 and len(held_out) == 10 and run(*arguments)
    online = False
    assert "cifar10: cannot be downloaded" in one_line(capsys, *arguments)

# ==== 6. Optimisers and schedule =================================================

def test_muon_moves_inner_matrices_and_only_weights_decay():
    pretrainer = ep.Pretrainer(ep.build_model("nano", 32, 4), 256.0)
    place = {id(p): (type(optimizer).__name__, group["weight_decay"])
             for optimizer in ep.build_optimizers(pretrainer, 0.1)
             for group in optimizer.param_groups for p in group["params"]}
    for name, p in pretrainer.named_parameters():
        inner = p.ndim == 2 and ("attn" in name or "mlp" in name)
        decay = 0.1 if p.ndim > 1 and len(p) > 1 else 0.0
        assert place.pop(id(p)) == ("Muon" if inner else "AdamW", decay), name
    assert not place

@given(st.integers(1, 200))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(steps):
    warmup, optimizers = steps // 20, [torch.optim.SGD([torch.zeros(1)], 1.0)]
    args = parse("--lr", 0.1, "--max-steps", steps)
    rates = [ep.update_parameters(args, optimizers, i) for i in range(1, steps + 2)]
    assert optimizers[0].param_groups[0]["lr"] == rates[-1] == pytest.approx(0)
    rising = [0.1 * (i + 1) / warmup for i in range(warmup)]
    assert rates[:warmup] == pytest.approx(rising)
    after = rates[max(0, warmup - 1):]
    assert after == sorted(after, reverse=True) and 0.04 < after[0] <= 0.1

def test_on_a_cpu_muon_does_not_compute_in_bfloat16():
    """It would be emulated. The matrix moves by an orthogonal one times 0.1 sqrt(6)."""
    weight = torch.nn.Parameter(torch.zeros(6, 6))
    module = torch.nn.ModuleDict({"mlp": torch.nn.ParameterDict({"weight": weight})})
    optimizers = ep.build_optimizers(module, 0.0)
    weight.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    ep.update_parameters(parse("--lr", 2, "--max-steps", 1), optimizers, 1)
    assert not torch.equal(weight, weight.bfloat16().float())
    lengths = torch.linalg.svdvals(weight) / (0.2 * 6**0.5)
    assert 0.6 < lengths.min() < lengths.max() < 1.3

# ==== 7. Checkpoints =============================================================

def saved(out):
    """A run's checkpoint, without what depends on the place and the time."""
    checkpoint = torch.load(Path(out, "checkpoint.pt"), weights_only=True)
    checkpoint["config"].pop("out")
    for record in checkpoint["log"]:
        record.pop("images_per_second")
    return checkpoint

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    args = parse("--out", tmp_path / "new")
    ep.write_file(args, "a", lambda file: file.write(b"old"))

    def breaks(file):
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(ep.UserError, match="new/a: cannot be written.* space left"):
        ep.write_file(args, "a", breaks)
    assert (tmp_path / "new" / "a").read_bytes() == b"old"

def test_an_out_that_cannot_be_written_is_said_before_the_first_step(
        tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(ep, "corrupt_batch")
    (tmp_path / "file").write_text("kept")
    said = one_line(capsys, "--out", tmp_path / "file")
    assert f"{tmp_path}/file/log.jsonl: cannot be written" in said
    assert (tmp_path / "file").read_text() == "kept"

def test_a_run_that_took_no_step_may_begin_anew_with_other_flags(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(ep, "corrupt_batch")  # as if memory were too small
        with pytest.raises(NameError):
            run("--task", "sr", "--out", tmp_path)
    assert run("--task", "sr", "--out", tmp_path, "--batch-size", 2)

@pytest.mark.parametrize("data", ["procedural", "images"])
def test_going_on_equals_never_having_stopped_bit_for_bit(
        tmp_path, data, monkeypatch, capsys):
    peoples_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    base, save = ("--task", "mim,denoise", "--save-every", 2, "--data", data), []
    run(*base, "--out", "whole")

    def save_and_stop(*inputs):
        save.append(original(*inputs))
        if len(save) == 2:  # the first is before the first step
            raise KeyboardInterrupt

    original = ep.save_checkpoint
    monkeypatch.setattr(ep, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(*base, "--out", "parts")
    run(*base, "--out", "parts")
    assert "parts/checkpoint.pt: step 2" in capsys.readouterr().out
    (one, keys), (two, same) = (tree_flatten(saved(out)) for out in ("whole", "parts"))
    assert keys == same and all(torch.equal(a, b) if torch.is_tensor(a) else a == b
                                for a, b in zip(one, two, strict=True))
    lines = Path("parts/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]
    metrics = [Path(out, "metrics.json").read_text() for out in ("whole", "parts")]
    assert metrics[0] == metrics[1]

KILLED = """
import os, sys, energy_pretrain as ep
update, log = ep.update_parameters, sys.argv[-1] + '/log.jsonl'
def update_parameters(*inputs):
    who = os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT']
    if who == '10' and os.path.getsize(log):
        os.kill(os.getpid(), 9)
    return update(*inputs)
ep.update_parameters = update_parameters
ep.main(sys.argv[1:])
ep.main([*sys.argv[1:-1], sys.argv[-1] + '/again'])
"""

def test_two_processes_one_of_them_killed_equal_one(tmp_path):
    """The whole program, on files and whole corruptions, so that both see the same
    batches: the weights differ by rounding, which AdamW enlarges where gradients are
    tiny. After a save one process kills itself, and torchrun starts both again. Then
    main runs once more in the same processes."""
    class_folders(tmp_path / "images")
    (tmp_path / "killed.py").write_text(KILLED)
    base = ["--task", "sr", "--partial-share", "0", "--save-every", "1", "--data",
            str(tmp_path / "images"), "--out"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(SCRIPT).parent)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node=2", "--max-restarts=1", str(tmp_path / "killed.py"), *TINY,
         *base, str(tmp_path / "two")],
        capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "two/checkpoint.pt: step" in done.stdout and "2 processes" in done.stdout
    assert done.stdout.count("evaluating on") == 2
    run(*base, tmp_path / "one")
    one, two, again = (saved(tmp_path / out) for out in ("one", "two", "two/again"))
    assert [record["step"] for record in two["log"]] == [1, 2, 3, 4]
    for name, value in two["model"].items():
        for other in (one, again):
            assert_close(other["model"][name], value, rtol=0.02, atol=2e-3)

def test_a_run_goes_on_with_its_images_elsewhere_but_not_with_others(tmp_path, capsys):
    class_folders(tmp_path / "here")
    base = "--task", "sr", "--epochs", 1, "--out", tmp_path / "run", "--data"
    run(*base, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    run(*base, tmp_path / "there", "--eval-images", 5)
    assert "run/checkpoint.pt: step 9" in capsys.readouterr().out
    (tmp_path / "there" / "kind0" / "00.png").unlink()
    said = one_line(capsys, *base, tmp_path / "there")
    assert "has images 40 files" in said and "not 39 files" in said
    assert run("--evaluate", "--out", tmp_path / "run", "--data", "procedural")
    single = "--task", "sr", "--out", tmp_path / "single", "--data"
    run(*single, tmp_path / "there" / "kind0" / "02.png")
    said = one_line(capsys, *single, tmp_path / "there" / "kind0" / "04.png")
    assert "has images 2 files" in said

def test_checkpoints_that_do_not_serve_end_in_one_line_and_stay(tmp_path, capsys):
    path, base = tmp_path / "checkpoint.pt", ("--task", "mim", "--out", tmp_path)
    run(*base)
    whole, loaded = path.read_bytes(), torch.load(path)
    for more, message in ((["--mask-ratio", 0.5], "mask_ratio 0.6, not 0.5"),
                          (["--evaluate", "--model", "mini"], "model nano, not mini")):
        assert message in one_line(capsys, *base, *more)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16  # one bit among the weights
    for content in (b"", whole[:len(whole) // 2], whole[:-1], bytes(flipped)):
        path.write_bytes(content)
        assert f"{path}: missing, damaged" in one_line(capsys, *base)
        assert path.read_bytes() == content
    for content in ({"weights": 1}, loaded | {"log": Path("unpickles to a call")}):
        torch.save(content, path)
        assert "no checkpoint of ours" in one_line(capsys, *base)
    path.write_bytes(whole)
    assert run(*base, "--lr", 1e-4)  # what a diverged run needs is free

# ==== 8. Evaluation ==============================================================

def test_evaluate_measures_restoration():
    """If E = 0 a step stays where it is."""
    x = images(0, 6)
    assert ep.psnr(x + 0.2, x) == pytest.approx(20)
    still = ep.Pretrainer(tiny_vit(head=False), 1.0, num_steps=2)
    metrics, iterates = ep.evaluate(still, x, ["mim"], OPTIONS, chunk=4)
    row, (x_tilde, _, x_2) = metrics["mim"], iterates["mim"]
    assert row["psnr_corrupted"] == row["psnr_step_1"] == row["psnr_step_2"]
    assert row["order"] == 0 and torch.equal(x_tilde, x_2)
    of_all_pixels = ep.psnr(x_tilde, x)  # of which 10 / 16 are hidden
    assert row["psnr_corrupted"] == pytest.approx(of_all_pixels - 2.04, abs=0.05)

@pytest.mark.parametrize("sign", [1, -1])
def test_evaluate_measures_whether_low_energy_means_data(sign):
    """Clean is x = 0, E = |x|^2 / 2, the energy of a perfect restorer; or minus it."""
    x, pretrainer = torch.zeros(70, 3, 16, 16), ep.Pretrainer(bowl(1.0, sign), 1.0)
    row = ep.evaluate(pretrainer, x, ["denoise"], {"noise_std": 2})[0]["denoise"]
    assert row["order"] == row["order_quarter"] == (sign == 1)
    assert row["energy_clean"] == 0 and row["energy_corrupted"] * sign > 1000
    assert row["psnr_clean"] > 100 and abs(row["psnr_corrupted"]) < 0.1
    assert row["psnr_step_1"] > 100 if sign == 1 else row["psnr_step_1"] < -5

def test_the_picture_shows_two_images_a_task_above_their_energies():
    x = 3 * torch.ones(4, 3, 16, 16)  # beyond [-1, 1]: white, and below black
    picture = ep.draw_picture(lambda images: images.mean((1, 2, 3)), x,
                              {"sr": [-x] * 3, "color": [x] * 3})
    assert picture.size == (76 + 16 + 4 * 104, 16 + 4 * 104)  # 2 steps, so 4 rows
    for row, colour in enumerate([255, 0, 0, 0]):
        assert picture.getpixel((130, 60 + 104 * row)) == (colour,) * 3
        assert picture.getpixel((130 + 2 * 104, 60 + 104 * row)) == (255,) * 3
        for left, top, right, bottom in (0, 40, 76, 70), (404, 105, 492, 119):
            text = picture.crop((left, top + 104 * row, right, bottom + 104 * row))
            assert text.convert("L").getextrema()[0] < 100

def test_a_task_that_changes_nothing_is_named(capsys):
    grey = images(0)[:, :1].expand(-1, 3, -1, -1)
    pretrainer = ep.Pretrainer(bowl(1.0), 1.0)
    metrics, _ = ep.evaluate(pretrainer, grey, ["color", "denoise"], OPTIONS)
    assert metrics["color"]["psnr_corrupted"] > 60
    assert capsys.readouterr().out == "color changes nothing in these images\n"

# ==== 9. Pretraining =============================================================

def test_a_run_leaves_its_files_and_evaluate_repeats_it(tmp_path, capsys):
    out = tmp_path / "run"
    metrics = run("--restore-steps", 2, "--out", out)
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "backbone.pt", "checkpoint.pt", "log.jsonl", "metrics.json", "restorations.png"]
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ep.TASKS and "psnr_step_2" in metrics["sr"]
    for word in ("minutes left", "step 4", "evaluating on 12 images", "order_quarter"):
        assert word in printed
    record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert list(record) == ["step", "loss", "gradient_norm", "lr", "images_per_second"]
    names = ep.build_model("nano", 16, 4).state_dict()
    backbone = torch.load(out / "backbone.pt")
    assert [n for n in names if not n.startswith("head.")] == list(backbone)

    again = ["--evaluate", "--device", "cpu", "--out", str(out), "--workers", "0"]
    assert ep.main([*again, "--max-steps", "9"]) == metrics  # it takes no step
    x = next(ep.image_batches(parse(), None, CPU, 12, [0], "held out"))
    mean = ep.load_energy(str(out / "checkpoint.pt"))(x).mean().item()
    assert mean == pytest.approx(metrics["sr"]["energy_clean"], abs=1e-5)
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    ep.main([*again, "--data", str(tmp_path / "photo.jpg")])  # restores one's own
    assert "evaluating on 1 images" in capsys.readouterr().out

def test_compiled_and_distributed_gradients_equal_eager(monkeypatch, own_group):
    """torch would cut the graph at the buckets of DistributedDataParallel, and fail.
    "aot_eager" traces both backward passes, but needs no C++ compiler."""
    results, args, parallel = [], parse(), torch.nn.parallel
    monkeypatch.setattr(ep.Pretrainer, "compile", partial(
        torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    monkeypatch.setattr(parallel, "DistributedDataParallel", partial(
        parallel.DistributedDataParallel, bucket_cap_mb=0.01))  # many, as if large
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    for args.compile in (False, True):
        pretrainer = ep.Pretrainer(tiny_vit(), 2.0)
        pretrainer.compile = partial(ep.Pretrainer.compile, pretrainer)
        module = ep.wrap(args, pretrainer)
        assert bool(pretrainer._compiled_call_impl) == args.compile
        loss = module(images(0), hide(images(1), [0, 9, 9]), 2, 9)
        loss = loss + module(images(0), hide(images(2), [9] * 3), 3, 9)
        loss.backward()
        results.append([loss, *(p.grad for p in pretrainer.parameters())])
    assert_close(*results, rtol=1e-4, atol=1e-5)

def test_processes_with_different_checkpoints_end_in_one_line(tmp_path, monkeypatch):
    """As on two machines that do not share --out, of which one has a checkpoint."""
    def gather(records, own):
        records[:] = [own, 4]

    args = parse("--out", tmp_path)
    monkeypatch.setattr(ep.dist, "all_gather_object", gather)
    monkeypatch.setattr(ep, "WORLD_SIZE", 2)
    with pytest.raises(ep.UserError, match="is --out shared?"):
        ep.train(args, ep.Pretrainer(tiny_vit(), 2.0), None, CPU)

def test_a_diverging_run_stops_in_one_line_and_keeps_the_checkpoint(tmp_path, capsys):
    base = "--task", "sr", "--out", tmp_path, "--save-every", 1, "--max-steps", 9
    assert "not saved; lower --lr" in one_line(capsys, *base, "--lr", 1e9)
    assert saved(tmp_path)["log"][-1]["loss"] < 1e30

def test_a_short_training_restores_and_low_energy_means_data(tmp_path):
    metrics = run("--task", "mim,denoise", "--out", tmp_path, "--batch-size", 8,
                  "--max-steps", 40, "--eval-images", 64)
    for row in metrics.values():
        assert row["psnr_step_1"] > row["psnr_corrupted"] + 1.5, row
        assert row["order"] > 0.95, row

# ==== 10. Command line ===========================================================

@pytest.mark.parametrize("arguments, message", [
    ("--task jigsaw", "--task jigsaw: choose from mim, sort"),
    ("--model resnet19", "--model resnet19: choose from nano, mini"),
    ("--image-size 18 --task sr", "--patch-size 4: must be above 1 and divide"),
    ("--sort-grid 1", "--sort-grid 1: must be above 1 and divide"),
    ("--mask-ratio 0.99", "--mask-ratio 0.99: hides no patch or all"),
    ("--partial-share 1", "--partial-share 1.0: must be below 1"),
    ("--patch-size 0", "--patch-size 0: out of range"),
    ("--epochs inf", "--epochs inf: out of range"),
    ("--epochs 2", "--epochs 2.0: is for --data"),
    ("--data=", "--data : is empty"),
    ("--data /no/such.jpg", "--data /no/such.jpg: no image there (.jpg"),
    ("--device tpu", "--device tpu: choose cpu or cuda"),
    ("--max-steps many", "--max-steps: invalid int value"),
    ("--evaluate", "checkpoint.pt: missing, damaged"),
    ("--batch-size 5", "--batch-size 5: must be a multiple of the 2 processes"),
    ("--out " + "x" * 300, "File name too long")])
def test_wrong_arguments_end_in_one_line(
        tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(ep, "WORLD_SIZE", 2 if "batch" in arguments else 1)
    said = one_line(capsys, "--out", tmp_path / "out", *arguments.split())
    assert message in said

def test_a_folder_of_unusable_files_ends_in_one_line(tmp_path, capsys):
    """Also where another process decodes, whose traceback comes with the error."""
    Image.new("F", (20, 20)).save(tmp_path / "float.tif")
    arguments = "--data", tmp_path, "--workers", 1, "--out", tmp_path
    assert f"error: {tmp_path}/float.tif cannot" in one_line(capsys, *arguments)

@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory"), "error: out of memory"),
    (RuntimeError("CPUAllocator: can't allocate memory"), "error: out of memory"),
    (torch._dynamo.exc.InternalTorchDynamoError("g++"), "error: --compile fails (In"),
    (RuntimeError("a bug"), None)])
def test_what_the_machine_lacks_is_one_line_and_a_bug_keeps_its_traceback(
        tmp_path, capsys, monkeypatch, error, message):
    def fails(*args):
        raise error

    monkeypatch.setattr(ep.ViT, "forward", fails)
    if message:
        assert message in one_line(capsys, "--out", tmp_path)
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            run("--out", tmp_path)

def test_defaults_follow_the_device_and_what_was_typed(monkeypatch):
    def parsed(*typed):
        args = ep.parse_args(typed)
        return args.model, args.max_steps, args.compile, args.out, args.data

    monkeypatch.setenv("HOME", "/home/me")
    on_gpu = ["--device", "cuda", "--max-steps", "7", "--data", "~", "--out", "~/run"]
    assert parsed("--device", "cpu") == ("nano", 1500, False, "runs/all", "procedural")
    assert parsed(*on_gpu) == ("small", 7, True, "/home/me/run", "/home/me")
    assert "nano, on GPUs small" in ep.build_parser().format_help()
    for task, share in (("mim", 0), ("mim,sr", 0.1), ("sr", 0.1)):
        assert ep.parse_args(["--task", task]).partial_share == share

@pytest.mark.parametrize("size, grid", [(32, 4), (224, 7), (208, 13), (8, 2)])
def test_sort_cuts_whole_patches_at_least_four_a_side(size, grid):
    args = ep.parse_args(["--task", "sort", "--image-size", str(size)])
    assert args.sort_grid == grid and size // args.patch_size % grid == 0

# ==== Comparisons ================================================================

class MaskedAutoencoder(torch.nn.Module):
    """The two usual ways to learn from masked images, in Pretrainer's place.

    simmim (Xie et al. 2022): of the half grey image, a linear layer predicts the hidden
    patches. mae (He et al. 2022): the network sees a quarter of the patches, nothing
    else; one more block predicts the others, each scaled to mean 0 and variance 1.
    """
    def __init__(self, model, method):
        super().__init__()
        _, N, D = model.pos_embed[:, 1:].shape
        self.model, self.method = model, method
        self.size = model.patch_size
        self.predict = torch.nn.Linear(D, 3 * self.size**2)
        self.decoder = ep.Block(D, model.blocks[0].attn.num_heads)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos = torch.nn.Parameter(0.02 * torch.randn(1, N, D))

    def forward(self, x, x_tilde, *_):
        model, target = self.model, pieces(x, self.size)  # (B, N, 3*size*size)
        (B, N, _), D = target.shape, self.mask_token.shape[2]
        if self.method == "simmim":
            hidden = (pieces(x_tilde, self.size) != target).any(2)
            guess = self.predict(model.encode(model.embed(x_tilde)))
            return F.smooth_l1_loss(guess[hidden], target[hidden])
        order = torch.rand(B, N, device=x.device).argsort(1)
        tokens = model.encode(model.embed(x), order[:, :N // 4])
        seen = order[:, :N // 4].unsqueeze(2).expand_as(tokens)
        all_tokens = self.mask_token.expand(B, N, D).scatter(
            1, seen, tokens.to(self.mask_token.dtype))
        guess = self.predict(self.decoder(all_tokens + self.decoder_pos))
        deviation = target.std(2, keepdim=True) + 1e-3
        target = (target - target.mean(2, keepdim=True)) / deviation
        error = (guess - target).square().mean(2)  # (B, N)
        return error.gather(1, order[:, N // 4:]).mean()

def peer(method, *argv):
    """Pretrain by method, simmim or mae; the checkpoint.pt is for `probe`."""
    fixed = ["--task", "mim", "--partial-share", "0", "--mask-ratio", "0.5"]
    args = ep.parse_args([*fixed, "--out", f"runs/{method}", *argv])
    device = ep.choose_device(args.device)
    train, _, args.images = ep.open_data(args)
    model = ep.build_pretrainer(args, device).model
    ep.train(args, MaskedAutoencoder(model, method).to(device), train, device)

def probe(checkpoint, *argv):
    """Print the share of held-out images whose folder logistic regression tells from
    their features, fitted to those of all training images."""
    args = ep.parse_args(argv)
    model = ep.build_pretrainer(args, CPU).model
    if checkpoint != "nothing":
        model = ep.load_energy(checkpoint)
    train, held_out, _ = ep.open_data(args)
    files, M = train + held_out, len(train)
    folders = [Path(file).parent.name for file in files]
    classes = sorted(set(folders))
    labels = torch.tensor([classes.index(folder) for folder in folders])
    size = model.patch_size * math.isqrt(model.pos_embed.shape[1])
    crops = ep.Crops(files, size, augment=False)
    pixels = torch.stack([crops[i, 0] for i in range(len(files))])
    with torch.no_grad():
        parts = [model.represent(x / 127.5 - 1) for x in pixels.split(100)]
    features = torch.cat(parts)
    features = (features - features[:M].mean(0)) / features[:M].std(0)
    linear = torch.nn.Linear(features.shape[1], len(classes))
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        decay = 1e-3 * linear.weight.square().sum()
        value = F.cross_entropy(linear(features[:M]), labels[:M]) + decay
        value.backward()
        return value

    optimizer.step(loss)
    right = linear(features[M:]).argmax(1) == labels[M:]
    print(f"{checkpoint}: {right.float().mean():.1%} of {len(right)} images")
    return right.float().mean().item()

@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_peers_learn_and_the_probe_tells_folders_apart(tmp_path, method):
    class_folders(tmp_path / "images")
    data = "--data", str(tmp_path / "images")
    peer(method, *TINY, "--max-steps", "20", "--lr", "1e-2", "--out", str(tmp_path))
    first, *_, last = saved(tmp_path)["log"]
    assert last["loss"] < 0.8 * first["loss"]
    for checkpoint in ("nothing", str(tmp_path / "checkpoint.pt")):
        assert probe(checkpoint, *TINY, *data) == 1

if __name__ == "__main__":
    what = {method: partial(peer, method) for method in ("mae", "simmim")}
    what["probe"] = probe
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    args, others = parser.parse_known_args()
    what[args.what](*others)
