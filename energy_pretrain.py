"""Energy-inspired self-supervised pretraining for vision models, in one file.

A vision network is an energy: its forward pass gives each image one number,
which should be lower clean than corrupted. Its backward pass restores: a
corrupted image takes a gradient step down the energy, and training asks the
step to end at the clean image.

    E(x)                              forward pass: one number per image   (1)
    x_{k+1} = x_k - alpha dE/dx(x_k)  backward pass: K steps from x_tilde  (2)
    loss = mean_k d(x_k, x)           each step should end at the clean x  (3)

The idea is the paper's (Wang, Wang, Liu, Qiu: Energy-Inspired Self-Supervised
Pretraining for Vision Models, ICLR 2023). We read its abstract and
introduction. The rest is ours: distance d, how a network becomes an energy,
when hidden patches join, partial corruptions, the optimiser, and all numbers.

Why an energy? Under squared error, the best restoration of x plus Gaussian
noise of deviation sigma is x_tilde + sigma^2 grad log p_sigma (Tweedie). So
(2) is trained as if alpha E were -sigma^2 log p_sigma (Vincent 2011). Only "as
if": our d is not squared error, and our tasks are not noise of one sigma.

    python energy_pretrain.py                         # all tasks, drawn images
    python energy_pretrain.py --task color --data DIR      # a folder of images
    torchrun --nproc_per_node=8 energy_pretrain.py --task mim      # eight GPUs

Sections 1 to 3 are the method. x is clean, x_tilde corrupted, x_hat restored:
B images of S x S pixels in [-1, 1], N patches of P x P, M of them visible. D
is the network's width, h its number of heads, K that of restoration steps.
"""
import argparse
import json
import math
import os
import sys
import time
import zipfile
import zlib
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms import v2

class UserError(Exception):
    """An error to show the user in one line, without a traceback."""

# ==== 1. Restoration and loss =========================================
# There are two backward passes. The first differentiates the energy with
# respect to the image: dE/dx restores, in place of a decoder. The second
# differentiates the loss with respect to the parameters, through the first.

def restore(energy_fn, x_tilde, alpha, num_steps=1, create_graph=False):
    """Take K = num_steps steps down the energy from x_tilde: (K, B, 3, S, S).

    energy_fn maps (B, 3, S, S) to (B,). It must not mix images, as batch norm
    does in training mode; only then does the gradient of the summed energies
    hold each image's own dE/dx. create_graph: to train through the steps.
    """
    # torch.autograd.grad would fail in torch.compile and under torch.no_grad()
    gradient = torch.func.grad(lambda x: energy_fn(x).sum())
    iterates = [x_tilde]
    with torch.set_grad_enabled(create_graph):
        for _ in range(num_steps):
            x = iterates[-1].detach()  # each step learns from its own loss
            iterates.append(x - alpha * gradient(x))  # Eq. (2)
    return torch.stack(iterates[1:])

def restoration_loss(x_hat, x, x_tilde):
    """Eq. (3) per image, (B,): mean_k smooth_l1(x_k, x) / rms(x_tilde - x).

    x_hat: (K, B, 3, S, S). We divide by how far the corruption moved an image,
    otherwise large corruptions would drown small ones. Smooth L1 is half the
    squared error up to 1 and linear beyond, so that outliers do not dominate.
    """
    error = F.smooth_l1_loss(x_hat, x.expand_as(x_hat), reduction="none")
    error = error.flatten(2).mean(2).mean(0)  # (B,)
    moved = (x_tilde - x).square().flatten(1).mean(1).sqrt()  # (B,)
    return error / moved.clamp(min=0.05)  # Eq. (3)

# ==== 2. Corruptions ==================================================
# Each takes images (B, 3, S, S), a generator and its flags (**_: the others),
# and returns images of that shape. A sixth task needs a function here, a line
# in CORRUPTIONS, its flag in FLAGS, and perhaps a check in check_args.

def draw_visible(x, generator, mask_ratio, patch_size, **_):
    """Choose which patches of each image stay visible: indices seen (B, M)."""
    N = (x.shape[2] // patch_size)**2
    noise = torch.rand(len(x), N, generator=generator, device=x.device)
    return noise.argsort(1)[:, round(mask_ratio * N):]

def hidden_pixels(x, seen, patch_size):
    """True at every pixel of a hidden patch: (B, 1, S, S)."""
    side = x.shape[2] // patch_size
    hidden = torch.ones(len(x), side**2, device=x.device).scatter(1, seen, 0.0)
    return F.interpolate(hidden.view(-1, 1, side, side), scale_factor=patch_size).bool()

def hide_patches(x, generator, seen, patch_size, **_):
    """Masked image modelling: set the pixels of hidden patches to zero."""
    return x.masked_fill(hidden_pixels(x, seen, patch_size), 0)

def shuffle_patches(x, generator, sort_grid, **_):
    """Patch sorting: shuffle sort_grid x sort_grid pieces of each image."""
    count, side = sort_grid**2, x.shape[2] // sort_grid
    pieces = F.pixel_unshuffle(x, side).flatten(2)  # (B, 3*side*side, count)
    noise = torch.rand(len(x), count, generator=generator, device=x.device)
    order = noise.argsort(1).unsqueeze(1).expand_as(pieces)
    pieces = pieces.gather(2, order).unflatten(2, (sort_grid, sort_grid))
    return F.pixel_shuffle(pieces, side)

def lower_resolution(x, generator, sr_factor, **_):
    """Super-resolution: average squares of sr_factor pixels, enlarge again."""
    small = F.avg_pool2d(x, sr_factor)  # (B, 3, S/factor, S/factor)
    return F.interpolate(small, size=x.shape[2:], mode="bilinear")

def add_noise(x, generator, noise_std, **_):
    """Denoising: add Gaussian noise, unclipped, so that it stays Gaussian."""
    return x + noise_std * torch.empty_like(x).normal_(generator=generator)

def remove_color(x, generator, **_):
    """Colourisation: keep the luma (ITU-R BT.601) in all three channels."""
    red, green, blue = x.split(1, dim=1)  # (B, 1, S, S)
    return (0.299 * red + 0.587 * green + 0.114 * blue).expand_as(x)

CORRUPTIONS = {
    "mim": hide_patches, "sort": shuffle_patches, "sr": lower_resolution,
    "denoise": add_noise, "color": remove_color}
TASKS = list(CORRUPTIONS)

def corrupt(x, task, generator, options):
    """Return x_tilde (B, 3, S, S), and seen (B, M) for mim, else None."""
    seen = draw_visible(x, generator, **options) if task == "mim" else None
    return CORRUPTIONS[task](x, generator, seen=seen, **options), seen

def corrupt_batch(x, tasks, generator, options, shift):
    """Corrupt images (B, 3, S, S) for a training step. Return up to two groups
    (x, x_tilde, seen): mim's, and that of all other tasks, with seen None.

    The tasks share the images equally; shift rotates which get the odd ones. A
    partial_share of the images is corrupted only in part, mostly lightly
    (ours). A network that never sees nearly clean images may give them a lower
    energy than clean ones, and its step damages clean images.
    """
    shift, share = shift % len(tasks), options["partial_share"]
    tasks = tasks[shift:] + tasks[:shift]
    masked, others = [], []
    for task, x in zip(tasks, x.tensor_split(len(tasks))):
        if len(x):
            x_tilde, seen = corrupt(x, task, generator, options)
            u = torch.rand(len(x), generator=generator, device=x.device)
            strength = torch.where(u < share, (u / share)**2, 1.0)
            x_tilde = x.lerp(x_tilde, strength.view(-1, 1, 1, 1))
            (others if seen is None else masked).append((x, x_tilde, seen))
    if others:
        x, x_tilde, _ = zip(*others)
        others = [(torch.cat(x), torch.cat(x_tilde), None)]
    return masked + others

# ==== 3. The energy ===================================================
# forward(x, seen=None) maps images (B, 3, S, S) to energies (B,). Given seen
# (B, M), visible patches are constants: dE/dx is zero there, and E rates the
# content of the hidden ones. Only gradients of E are trained. So energies of
# different images, or given different patches, cannot be compared.

class Block(nn.Module):
    """Attention and MLP. By hand: fused attention has no second derivative."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):  # (B, T, D), T tokens
        qkv = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, T, D/h) each
        q = q / math.sqrt(q.shape[3])
        weights = (q @ k.transpose(2, 3)).softmax(3)  # (B, h, T, T)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

def random_waves(side, dim):
    """Positions (1, N, D), ours: waves of random direction, frequency, phase.

    Near patches get similar positions, so they attend to each other from the
    start. Their correlation at distance r is exp(-(0.7 r)^2 / 2).
    """
    place = torch.ones(side, side).nonzero().float()  # (N, 2): row, column
    waves = 0.7 * place @ torch.randn(2, dim) + 2 * math.pi * torch.rand(dim)
    return 0.85 * waves.cos().unsqueeze(0)

class ViT(nn.Module):
    """A plain Vision Transformer under timm's names, plus a vector v, `head`.

    E (ours) is a weighted distance between the patch embeddings p_n and the
    network's outputs z_n, which say what it expects there; v may be negative:

        E = 3 P^2 sum_n mean_d v_d (p_nd - z_nd)^2

    So dE/dp_n contains v (p_n - z_n): which way patch n should go. The sum over
    patches and the factor 3 P^2 keep steps equally long for all S and P. Given
    seen, n runs over the hidden patches, and these join late (ours): visible
    ones pass all blocks but the last among themselves. So their features must
    predict the hidden ones.
    """
    def __init__(self, image_size, patch_size, dim, depth, num_heads):
        super().__init__()
        proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        waves = random_waves(image_size // patch_size, dim)
        self.pos_embed = nn.Parameter(F.pad(waves, (0, 0, 1, 0)))  # (1, N+1, D)
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Parameter(torch.zeros(dim))  # v = 0: at first, no step

    def embed(self, x):
        """One linear map of each patch: (B, 3, S, S) -> (B, N, D)."""
        return self.patch_embed.proj(x).flatten(2).transpose(1, 2)

    def add_positions(self, p):
        """Class token first, then the patches: (B, N, D) -> (B, N+1, D)."""
        return torch.cat([self.cls_token.expand(len(p), 1, -1), p], 1) + self.pos_embed

    def represent(self, x):
        """Features (B, D) of images, for other uses."""
        tokens = self.add_positions(self.embed(x))
        return self.norm(self.blocks(tokens))[:, 1:].mean(1)

    def forward(self, x, seen=None):
        p = self.embed(x)  # (B, N, D)
        tokens = self.add_positions(p)  # (B, N+1, D)
        if seen is None:
            tokens = self.blocks[:-1](tokens)
        else:
            visible = self.add_positions(self.embed(x.detach()))  # x is constant here
            index = F.pad(seen + 1, (1, 0)).unsqueeze(2)  # 0: the class token
            index = index.expand(-1, -1, p.shape[2])  # (B, M+1, D)
            visible = self.blocks[:-1](visible.gather(1, index))
            tokens = tokens.scatter(1, index, visible)
        z = self.norm(self.blocks[-1](tokens))[:, 1:]  # (B, N, D), float32
        distance = (self.head * (p - z).square()).mean(2)  # (B, N)
        if seen is not None:
            distance = distance.scatter(1, seen, 0.0)
        patch_pixels = self.patch_embed.proj.weight[0].numel()  # 3 P^2
        return patch_pixels * distance.sum(1)

class Pretrainer(nn.Module):
    """Energy and loss in one module, as DistributedDataParallel needs them."""
    def __init__(self, model, alpha, num_steps=1):
        super().__init__()
        self.model, self.alpha, self.num_steps = model, alpha, num_steps

    def forward(self, groups):
        """The mean loss over the images of all groups (x, x_tilde, seen)."""
        losses = []
        for x, x_tilde, seen in groups:
            energy = partial(self.model, seen=seen)
            x_hat = restore(energy, x_tilde, self.alpha, self.num_steps, True)
            losses.append(restoration_loss(x_hat, x, x_tilde))
        return torch.cat(losses).mean()

class TorchvisionNet(nn.Module):
    """A classifier of torchvision: E = 3 S^2 v . features. v, `head`, is in
    place of the last linear layer; visible pixels are constants. In evaluation
    mode: batch norm keeps the statistics it starts with."""
    def __init__(self, name, image_size, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.net = torchvision.models.get_model(name, weights=None)
        *_, (last_name, last) = self.net.named_modules()
        self.head = nn.Parameter(torch.zeros(last.in_features))
        self.net.set_submodule(last_name, nn.Identity())

    def represent(self, x):
        with sdpa_kernel(SDPBackend.MATH):  # can be differentiated twice
            return self.net(x)  # (B, D)

    def forward(self, x, seen=None):
        if seen is not None:
            hidden = hidden_pixels(x, seen, self.patch_size)
            x = x.where(hidden, x.detach())
        return x[0].numel() * (self.head * self.represent(x)).sum(1)

VIT_SIZES = {  # name: (width D, depth, heads h)
    "nano": (96, 2, 3), "mini": (96, 4, 3), "tiny": (192, 12, 3),
    "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

def build_model(name, image_size, patch_size):
    """An energy by its name. A network of your own would be made here: it needs
    `head`, `represent`, and a `forward` that mixes no images and can be
    differentiated twice."""
    if name in VIT_SIZES:
        return ViT(image_size, patch_size, *VIT_SIZES[name])
    try:
        model = TorchvisionNet(name, image_size, patch_size).eval()
        x = torch.zeros(1, 3, image_size, image_size)
        restore(model, x, 1.0, create_graph=True).sum().backward()
    except Exception as error:  # e.g. unknown, a wrong size, no linear layer
        raise UserError(
            f"--model {name} cannot be an energy here: {error}. Choose "
            f"{', '.join(VIT_SIZES)}, or one of torchvision, as resnet18")
    for p in model.parameters():  # a last bias is not in dE/dx: DDP would wait for it
        p.requires_grad_(p.grad is not None)
    return model

# ==== 4. Processes and randomness =====================================
# torchrun and other launchers number the processes in environment variables.

RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1  # LOCAL_RANK: among this machine's
if "LOCAL_RANK" in os.environ:
    RANK, LOCAL_RANK, WORLD_SIZE = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))

def print0(*values):
    if RANK == 0:
        print(*values, flush=True)

def seed_from(*key):
    """A seed that follows from its use, as ("corrupt", 0, 17); none is saved."""
    return zlib.crc32(repr(key).encode())

def make_generator(device, *key):
    return torch.Generator(device).manual_seed(seed_from(*key))

def choose_device(name):
    if name == "cpu":
        return torch.device("cpu")
    if LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"--device cuda: there is no device {LOCAL_RANK} here")
    torch.cuda.set_device(LOCAL_RANK)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    return torch.device("cuda", LOCAL_RANK)

def join_processes(device):
    # the prefix hides what dead processes left in the store (pytorch 135712)
    store, _, _ = next(dist.rendezvous("env://"))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=RANK,
        world_size=WORLD_SIZE, store=dist.PrefixStore(restarts, store))

def autocast(device):
    """bfloat16 where a GPU computes in it; float16 would need loss scaling."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

# ==== 5. Data =========================================================

def draw_landscapes(batch_size, size, generator):
    """Images (B, 3, S, S) of sky, furrows and three balls, near ones red."""
    device = generator.device
    def uniform(low, high):
        u = torch.rand(batch_size, 1, 1, 1, generator=generator, device=device)
        return low + (high - low) * u
    def mix(share, *colors):  # two of them, red, green and blue in [0, 1]
        colors = torch.tensor(colors, device=device).view(2, 1, 3, 1, 1)
        return torch.lerp(*colors, share)

    u = torch.linspace(0, 1, size, device=device).view(1, 1, 1, size)  # right
    v = u.transpose(2, 3)  # down
    wave = torch.sin(2 * math.pi * (uniform(0.5, 1.5) * u + uniform(0, 1)))
    horizon = uniform(0.3, 0.6) + uniform(0.02, 0.08) * wave  # (B, 1, 1, S)
    evening = uniform(0, 1)
    zenith = mix(evening, (0.25, 0.45, 0.85), (0.25, 0.15, 0.4))
    haze = mix(evening, (0.75, 0.88, 0.97), (0.98, 0.6, 0.3))
    sky = torch.lerp(zenith, haze, (v / horizon).clamp(0, 1))  # (B, 3, S, S)
    below = (v - horizon).clamp(min=0)  # (B, 1, S, S)
    waves = uniform(6, 14) * torch.log(below + 0.05) + uniform(-4, 4) * u
    soil = mix(uniform(0, 1), (0.2, 0.5, 0.2), (0.6, 0.5, 0.25))
    ground = soil * (0.75 + 0.5 * below + 0.15 * waves.sin()) * (1.1 - 0.4 * evening)
    x = torch.lerp(sky, ground, ((v - horizon) * size + 0.5).clamp(0, 1))

    balls = torch.cat([uniform(0.15, 1) for _ in range(3)], 1)
    for near in balls.sort(1).values.split(1, 1):  # far balls first
        radius = 0.06 + 0.12 * near  # near: large and low
        du = (u - uniform(0, 1)) / radius  # (B, 1, 1, S)
        dv = (v - horizon - near * (0.9 - horizon)) / radius + 1
        inside = 1 - (du**2 + dv**2).sqrt()  # (B, 1, S, S)
        shade = (0.75 - 0.35 * du - 0.15 * dv).clamp(0.25, 1.2)
        ball = shade * mix(near, (0.25, 0.4, 1.0), (1.0, 0.3, 0.1))
        x = torch.lerp(x, ball, (inside * radius * size + 0.5).clamp(0, 1))
    return x.clamp(0, 1) * 2 - 1

NO_DATA = {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "lost+found",
           "restorations.png"}

def find_images(root):
    """The image files below a folder, or root itself, if it is a file.
    Hidden files, recycle bins and the pictures of runs are left out."""
    if os.path.isfile(root):
        return [root]
    def fail(error):
        raise UserError(f"--data {root}: {error}")
    files, entered = [], set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        for part in subfolders, names:
            part[:] = sorted(n for n in part if n[0] != "." and n not in NO_DATA)
        if os.path.realpath(folder) in entered:  # links can lead in a circle
            subfolders[:] = names[:] = []
        entered.add(os.path.realpath(folder))
        paths = (os.path.join(folder, n) for n in names if is_image_file(n))
        files += filter(os.path.isfile, paths)  # no pipes, no broken links
    if not files:
        fail(f"no images ({' '.join(IMG_EXTENSIONS)})")
    print0(f"{root}: {len(files)} images")
    return files

class Crops(torch.utils.data.Dataset):
    """Crops of image files: item (index, seed) is (3, S, S) in uint8. The seed
    chooses crop and flip; without augment it is the centre crop."""
    def __init__(self, files, size, augment):
        self.files, self.size = files, size
        crop = [v2.Resize(size), v2.CenterCrop(size)]
        if augment:
            crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.crop = v2.Compose([*crop, v2.PILToTensor()])

    def load(self, file):
        """A file's crop. ValueError for more than 8 bits a channel, since the
        white level is unknown then."""
        image = Image.open(file)
        if image.mode[0] in "IF" or ";16" in str(image.tile):
            raise ValueError("more than 8 bits a channel")
        image.draft("RGB", (3 * self.size, 3 * self.size))  # for speed
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return self.crop(image.convert("RGB"))

    def __getitem__(self, key):
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # torchvision's transforms draw from it
            for _ in range(100):  # a damaged file must not end a training
                try:
                    return self.load(self.files[index])
                except Exception as error:  # Pillow raises anything
                    reason = f"{self.files[index]} ({error})"
                    print(f"warning: left out {reason}", file=sys.stderr)
                    index = int(torch.randint(len(self.files), ()))
        raise UserError(f"no usable image in 100 draws, the last {reason}")

def open_data(args):
    """Training and held-out files (both None: landscapes), and a fingerprint of
    them for resume. Held out: val/ or test/ beside train/, else every tenth."""
    if args.data == "procedural":
        return None, None, args.data
    train, val, test = (os.path.join(args.data, n) for n in ("train", "val", "test"))
    held_out = val if os.path.isdir(val) else test
    if os.path.isdir(train) and os.path.isdir(held_out):
        train, held_out = find_images(train), find_images(held_out)
    else:
        found = find_images(args.data)
        train = [file for i, file in enumerate(found) if i % 10] or found
        held_out = found[::10]
    names = "\n".join(os.path.basename(file) for file in train + held_out)
    checksum = zlib.crc32(names.encode(errors="surrogateescape"))
    return train, held_out, f"{len(train + held_out)} files, checksum {checksum:x}"

def crop_keys(count, batch_size, steps, key, rank, world):
    """Yield this process's keys (index, seed) of Crops for each step. Every
    epoch has a new order; step n takes the n-th batch of all in a row."""
    part, epoch = batch_size // world, None
    for step in steps:
        keys, first = [], step * batch_size + rank * part
        for i in range(first, first + part):
            if epoch != i // count:
                epoch = i // count
                generator = make_generator("cpu", *key, "epoch", epoch)
                order = torch.randperm(count, generator=generator)
            keys.append((int(order[i % count]), seed_from(*key, "crop", i)))
        yield keys

def image_batches(args, files, device, batch_size, steps, use, rank=0, world=1):
    """Yield this process's images (B, 3, S, S) for each step; use seeds them."""
    if files is None:
        for step in steps:
            generator = make_generator(device, use, args.seed, step, rank)
            yield draw_landscapes(batch_size // world, args.image_size, generator)
        return
    crops = Crops(files, args.image_size, args.augment and len(files) > 1)
    keys = crop_keys(len(files), batch_size, steps, (use, args.seed), rank, world)
    for x in torch.utils.data.DataLoader(
            crops, batch_sampler=keys, num_workers=args.workers,
            pin_memory=device.type == "cuda"):
        yield x.to(device, non_blocking=True) / 127.5 - 1

# ==== 6. Optimisers and schedule ======================================

def build_optimizers(module):
    """AdamW, and Muon (Jordan et al., 2024) for matrices named "att" or "mlp":
    its updates are nearly orthogonal, so all directions move equally far.
    Biases, norms, positions and v do not decay, as is customary."""
    inner, decaying, others = [], [], []
    for name, p in module.named_parameters():
        if p.ndim == 2 and name.endswith("weight") and ("att" in name or "mlp" in name):
            inner.append(p)
        elif p.ndim > 1 and len(p) > 1:
            decaying.append(p)
        else:  # positions and class token are (1, ...)
            others.append(p)
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    common = {"lr": 0.0, "weight_decay": 0.05}
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), **common)
    if not inner:
        return [adamw]
    return [adamw, torch.optim.Muon(
        inner, momentum=0.9, adjust_lr_fn="match_rms_adamw", **common)]

def update_parameters(args, optimizers, step):
    """Take a step of 1 ... max_steps and return its learning rate: linear over
    a twentieth of the steps, then half a cosine, as is customary."""
    warmup = args.max_steps // 20
    rate = args.lr * step / max(1, warmup)
    if step >= warmup:
        done = (step - warmup) / (args.max_steps + 1 - warmup)
        rate = args.lr * (1 + math.cos(math.pi * done)) / 2
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Muon calls bfloat16(), slow on most CPUs; clone() stays in float32
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            optimizer.step()
    return rate

# ==== 7. Checkpoints ==================================================
# Dicts of tensors, numbers and strings: loading one cannot run code. The same
# command, given again, resumes; these flags may change then.
MAY_DIFFER = set("out data device workers compile lr save_every eval_images".split())

def write_file(args, name, write):
    """Let write(file) fill OUT/name, completely or not at all."""
    path = os.path.join(args.out, name)
    try:
        os.makedirs(args.out, exist_ok=True)
        with open(path + ".unfinished", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it replaces the old
        os.replace(path + ".unfinished", path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise UserError(f"{path}: cannot write ({error.__context__ or error})")

def load_checkpoint(path):
    """Read a checkpoint.pt. UserError if it is missing or damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load ignores the checksums
            raise ValueError("checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("model", "config", "optimizers", "log")}
    except Exception as error:  # the unpickler raises anything
        raise UserError(f"{path}: missing, damaged, or not ours: {error!r:.60}")

def load_energy(path):
    """The trained energy of a checkpoint.pt: energy(x, seen=None) is (B,). It
    brings its step size: restore(energy, x_tilde, energy.alpha)."""
    saved = load_checkpoint(path)
    config = argparse.Namespace(**saved["config"])
    energy = build_model(config.model, config.image_size, config.patch_size)
    energy.load_state_dict(saved["model"])
    energy.alpha = config.alpha
    return energy.requires_grad_(False)

def resume(args, model, optimizers):
    """Load OUT's checkpoint, if there is one, and return its log."""
    path, log = os.path.join(args.out, "checkpoint.pt"), []
    if os.path.exists(path):
        saved = load_checkpoint(path)
        log = saved["log"]
        for name in sorted(vars(args).keys() - MAY_DIFFER):
            old, new = saved["config"].get(name), getattr(args, name)
            if old != new:
                raise UserError(f"{path} has {name} {old}, not {new}; "
                                "choose another --out for a new run")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        print0(f"{path}: step {log[-1]['step']}")
    if WORLD_SIZE > 1:
        counts = [None] * WORLD_SIZE
        dist.all_gather_object(counts, len(log))
        if len(set(counts)) > 1:
            raise UserError("processes find different checkpoints; is --out shared?")
    return log

def save_checkpoint(args, model, optimizers, log):
    """Write checkpoint.pt, and backbone.pt for other programs. Use the mean of
    its patches' outputs as features: a ViT's class token is not trained."""
    backbone = {name.removeprefix("net."): p.cpu()
                for name, p in model.state_dict().items() if name != "head"}
    checkpoint = {"model": model.state_dict(), "config": vars(args), "log": log,
                  "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    write_file(args, "backbone.pt", partial(torch.save, backbone))
    write_file(args, "checkpoint.pt", partial(torch.save, checkpoint))

# ==== 8. Evaluation ===================================================

def psnr(y, x):
    """Peak signal-to-noise ratio of y in dB; pixels have a range of 2."""
    return 10 * math.log10(4 / max((y - x).square().mean().item(), 1e-12))

@torch.no_grad()
def evaluate(pretrainer, x, tasks, options):
    """Measure images x: {task: metrics}, {task: (images, energies)}.

    psnr_corrupted, psnr_step_k, psnr_clean: of the pixels that the task
    changes, before and after k steps, and after a step from the clean image.
    order: share of images with a lower energy clean than corrupted;
    order_quarter: than corrupted by 1/4; order_other (mim): than with another
    image's hidden patches. images (K+2, 2, 3, S, S): two of x to x_K.
    """
    metrics, pictures = {}, {}
    alpha, K = pretrainer.alpha, pretrainer.num_steps
    for task in tasks:
        generator = make_generator(x.device, "evaluate", task)
        x_tilde, seen = corrupt(x, task, generator, options)
        parts, other = [], x
        if seen is not None:
            hidden = hidden_pixels(x, seen, options["patch_size"])
            other = x.roll(1, 0).where(hidden, x)
        for i in torch.arange(len(x)).split(32):
            energy = partial(pretrainer.model, seen=None if seen is None else seen[i])
            images = torch.stack([
                x[i], x_tilde[i], *restore(energy, x_tilde[i], alpha, K),
                *restore(energy, x[i], alpha),
                x[i].lerp(x_tilde[i], 0.25), other[i]])
            parts.append((images, torch.stack([energy(y) for y in images])))
        images, energies = (torch.cat(part, 1) for part in zip(*parts))
        pictures[task] = images[:K + 2, :2].clone(), energies[:K + 2, :2]
        changed = (x_tilde - x).abs() > 1e-3
        if not changed.any():
            print(f"{task} changes nothing in these images")
            changed = ~changed
        names = ["corrupted", *(f"step_{k + 1}" for k in range(K)), "clean"]
        row = {f"psnr_{name}": psnr(y[changed], x[changed])
               for name, y in zip(names, images[1:])}
        above = (energies > energies[0]).float().mean(1).tolist()  # K+5 shares
        row |= {"order": above[1], "order_quarter": above[-2]}
        if seen is not None and len(x) > 1:
            row["order_other"] = above[-1]
        metrics[task] = row
    return metrics, pictures

def draw_picture(pictures):
    """Two images a task: clean, corrupted, restored, each above its energy."""
    images, energies = (torch.cat(part, 1) for part in zip(*pictures.values()))
    count, side = images.shape[1], max(64, images.shape[4])
    tiles = F.interpolate(images.flatten(0, 1), size=(side, side), mode="bicubic")
    tiles = tiles.clamp(-1, 1) / 2 + 0.5
    grid = torchvision.utils.make_grid(tiles, count, padding=16, pad_value=1)
    picture = v2.functional.to_pil_image(F.pad(grid, (76, 0, 0, 0), value=1))

    draw, pitch = ImageDraw.Draw(picture), side + 16
    for i, task in enumerate(pictures):
        what = f"{task}: {CORRUPTIONS[task].__name__.replace('_', ' ')}"
        draw.text((92 + i * count // len(pictures) * pitch, 2), what, "black")
    names = ["clean", "corrupted"] + ["- alpha dE/dx\n= restored"] * len(images)
    for i, row in enumerate(energies.tolist()):
        draw.text((4, i * pitch + side // 2), names[i], "black")
        for j, energy in enumerate(row):
            draw.text((92 + j * pitch, (i + 1) * pitch + 2), f"E {energy:.1f}", "black")
    return picture

# ==== 9. Pretraining ==================================================

def build_pretrainer(args, device):
    """A new network, initialised from the seed, in its Pretrainer."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, args.image_size, args.patch_size)
    print0(f"{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters; "
           f"{args.data}; {WORLD_SIZE} processes on {device}")
    return Pretrainer(model, args.alpha, args.restore_steps).to(device)

def wrap(args, pretrainer):
    """The module whose call is a step's loss, as flags and launcher ask."""
    if args.compile:
        # At most two graphs: as tasks rotate, groups vary by one image.
        # DistributedDataParallel's graph splits would cut the inner gradient.
        torch._dynamo.reset()
        torch._dynamo.config.optimize_ddp = False
        pretrainer.compile(fullgraph=True, dynamic=False)
    if WORLD_SIZE == 1:
        return pretrainer
    return nn.parallel.DistributedDataParallel(pretrainer)

def train(args, pretrainer, files, device):
    """Take the steps that OUT's checkpoint lacks."""
    if args.epochs:
        args.max_steps = math.ceil(args.epochs * len(files) / args.batch_size)
    model, tasks = pretrainer.model, args.task.split(",")
    optimizers = build_optimizers(pretrainer)
    log = resume(args, model, optimizers)
    module = wrap(args, pretrainer)
    last, start, losses = log[-1]["step"] if log else 0, time.time(), []
    batches = image_batches(args, files, device, args.batch_size,
                            range(last, args.max_steps), "train", RANK, WORLD_SIZE)
    for step, x in enumerate(batches, last + 1):
        # corrupt
        generator = make_generator(device, "corrupt", args.seed, step, RANK)
        groups = corrupt_batch(x, tasks, generator, vars(args), step + RANK)

        # restore, and compare
        pretrainer.zero_grad()
        with autocast(device):
            loss = module(groups)  # Eq. (3)

        # back through dE/dx; clip, as norms of convolutional networks pass 100
        loss.backward()
        norm = nn.utils.clip_grad_norm_(pretrainer.parameters(), max_norm=1.0)
        rate = update_parameters(args, optimizers, step)

        # log and save
        losses.append(loss.detach())
        save = step % args.save_every == 0 or step == args.max_steps
        if save or step % 50 == 0 or step == 1:
            mean = torch.stack(losses).mean().item()  # of this process
            if not math.isfinite(mean + norm.item()):
                raise UserError(f"step {step}: loss {mean}, gradient norm {norm}; "
                                "resume from the last checkpoint with a lower --lr")
            speed = (step - last) / (time.time() - start)
            last, start, losses = step, time.time(), []
            log.append({"step": step, "loss": mean, "gradient_norm": norm.item(),
                        "lr": rate, "images_per_second": args.batch_size * speed})
            print0(*(f"{name} {value:<9.5g}" for name, value in log[-1].items()),
                   f"{(args.max_steps - step) / speed / 60:.1f} minutes left")
        if save and RANK == 0:
            save_checkpoint(args, model, optimizers, log)

def measure(args, pretrainer, files, device):
    """Write metrics and a picture of held-out images, cropped as in training."""
    count = min(args.eval_images, len(files)) if files else args.eval_images
    print0(f"evaluating on {count} images")
    x = next(image_batches(args, files, device, count, [0], "held out"))
    with autocast(device):
        metrics, pictures = evaluate(pretrainer, x, args.task.split(","), vars(args))
    for task, row in metrics.items():
        print(f"{task:<8}", *(f"{name} {row[name]:<7.4g}" for name in row))
    text, picture = json.dumps(metrics, indent=1), draw_picture(pictures)
    write_file(args, "metrics.json", lambda file: file.write(text.encode()))
    write_file(args, "restorations.png", partial(picture.save, format="png"))
    return metrics

# ==== 10. Command line ================================================

def number(kind, low, high=2**32):
    """Keywords of add_argument for a number in [low, high)."""
    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text}: not in [{low}, {high})")
        return kind(text)
    return {"type": number}

SWITCH, TEXT = {"action": argparse.BooleanOptionalAction}, {"type": os.path.expanduser}
NATURAL, COUNT, ABOVE_1 = (number(int, low) for low in (0, 1, 2))
SHARE, POSITIVE = number(float, 0, 1), number(float, 1e-9)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FLAGS = {  # group: (name, what it takes, default, meaning)
    "run": [
        ("task", TEXT, "all", f"{', '.join(TASKS)}, some with commas, or all"),
        ("out", TEXT, None, "folder for results; None: runs/TASK"),
        ("device", {"choices": ["cpu", "cuda"]}, DEVICE, "device"),
        ("seed", NATURAL, 0, "the evaluation's corruptions ignore it"),
        ("max_steps", COUNT, 1500, "optimiser steps"),
        ("epochs", POSITIVE, None, "passes over --data, not --max-steps"),
        ("save_every", COUNT, 100, "steps between checkpoints"),
        ("eval_images", COUNT, 256, "held-out images to measure on"),
        ("compile", SWITCH, False, "torch.compile the loss")],
    "data": [
        ("data", TEXT, "procedural", "folder, image file, or procedural"),
        ("image_size", COUNT, 32, "side in pixels"),
        ("augment", SWITCH, True, "random crops and flips"),
        ("workers", NATURAL, min(8, os.cpu_count()), "decoders of a process"),
        ("batch_size", COUNT, 32, "images a step, over all processes")],
    "network": [
        ("model", TEXT, "nano", f"{', '.join(VIT_SIZES)}, or torchvision's"),
        ("patch_size", ABOVE_1, None, "None: 4 below 128 pixels, else 16"),
        ("restore_steps", COUNT, 1, "K, steps down the energy"),
        ("alpha", POSITIVE, 1.0, "size of these steps")],
    "corruption": [
        ("partial_share", SHARE, 0.1, "share of images corrupted in part"),
        ("mask_ratio", SHARE, 0.6, "mim: share of hidden patches"),
        ("sort_grid", ABOVE_1, 4, "sort: pieces a side"),
        ("sr_factor", ABOVE_1, 4, "sr: how many times smaller"),
        ("noise_std", POSITIVE, 0.5, "denoise: pixels lie in [-1, 1]")],
    "optimiser": [("lr", POSITIVE, 8.5e-3, "peak learning rate")]}
ON_GPUS = {"model": "small", "image_size": 224, "batch_size": 128 * WORLD_SIZE,
           "max_steps": 2000, "lr": 1.5e-3, "compile": True}

def parse_args(argv=None):
    """Flags as given, else the device's defaults. UserError if they do not fit."""
    title, *_, commands, _ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{title}\n\n{commands}\n\nDefaults on GPUs: {ON_GPUS}")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, takes, default, meaning in flags:
            group.add_argument("--" + name.replace("_", "-"), default=default,
                               help=f"{meaning} (default: {default})", **takes)
    if parser.parse_args(argv).device == "cuda":
        parser.set_defaults(**ON_GPUS)
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.task}"
    args.task = ",".join(TASKS) if args.task == "all" else args.task
    args.patch_size = args.patch_size or (4 if args.image_size < 128 else 16)
    check_args(args)
    return args

def check_args(args):
    tasks, S = args.task.split(","), args.image_size
    N, must_divide = (S // args.patch_size)**2, "must divide --image-size"
    patches = args.model in VIT_SIZES or "mim" in tasks
    for name, holds, expected in [
            ("task", sorted(tasks) == sorted(set(tasks) & set(TASKS)),
             f"choose from {', '.join(TASKS)}, each once, or all"),
            ("patch_size", not patches or S % args.patch_size == 0, must_divide),
            ("sort_grid", "sort" not in tasks or S % args.sort_grid == 0, must_divide),
            ("sr_factor", "sr" not in tasks or S % args.sr_factor == 0, must_divide),
            ("mask_ratio", "mim" not in tasks or 0 < round(args.mask_ratio * N) < N,
             "hides no patch or all"),
            ("epochs", not args.epochs or args.data != "procedural", "needs --data"),
            ("batch_size", args.batch_size % WORLD_SIZE == 0,
             f"must be a multiple of the {WORLD_SIZE} processes")]:
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(args, name)}: {expected}")

def main(argv=None):
    """Return {task: metrics}, on the first process. UserError: status 2."""
    try:
        args = parse_args(argv)
        device = choose_device(args.device)
        if WORLD_SIZE > 1:
            join_processes(device)
        files, held_out, args.files = open_data(args)
        pretrainer = build_pretrainer(args, device)
        train(args, pretrainer, files, device)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        return measure(args, pretrainer, held_out, device) if RANK == 0 else {}
    except UserError as error:
        line = str(error).split("UserError: ")[-1]  # no decoder's traceback
        sys.stderr.write(f"energy_pretrain.py: error: {' '.join(line.split())}\n")
        sys.exit(2)

if __name__ == "__main__":
    main()
