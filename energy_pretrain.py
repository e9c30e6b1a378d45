"""Energy-inspired self-supervised pretraining for vision models, in one file.

One vision network is an energy: its forward pass gives one number per image, low for
data. Its backward pass restores: a corrupted image steps down the energy, to where the
network expects the clean one.

    E(x)                              one number per image: the forward pass         (1)
    x_{k+1} = x_k - alpha dE/dx(x_k)  the backward pass: K steps from x_tilde        (2)
    loss = mean_k d(x_k, x)           every step should end at the clean image x     (3)
         + w relu(1/4 - r)            r: E's rise from x, over a perfect restorer's  (4)

(1) to (3) are the paper's (Wang, Wang, Liu, Qiu: Energy-Inspired Self-Supervised
Pretraining for Vision Models, ICLR 2023). (4) is ours: a network that learns only to
restore may rank nearly clean images below clean ones. Of the paper we had the abstract
and the introduction; what they leave open is ours, too, every number included.

Why does an energy appear? By squared error the best restoration of x plus Gaussian
noise of deviation sigma is x_tilde + sigma^2 grad log p_sigma(x_tilde) (Tweedie). So,
by (2), alpha E is -sigma^2 log p_sigma, up to a constant (Vincent 2011).

    python energy_pretrain.py                                  # all tasks, drawn images
    python energy_pretrain.py --task color --data ~/Pictures   # any folder of images
    torchrun --nproc_per_node=8 energy_pretrain.py --task mim  # eight GPUs or processes

Sections 1 to 3 are the method. Letters: B images, C channels, S by S pixels, N patches,
D width, h heads, K restoration steps, M whatever the line counts. x is clean, x_tilde
corrupted, x_hat restored; pixels lie in [-1, 1].
"""
import argparse
import collections
import json
import math
import os
import re
import sys
import tempfile
import time
import zipfile
import zlib

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist, nn
from torch.overrides import TorchFunctionMode
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms import v2

class UserError(Exception):
    """What the person at the command line can put right: one line, exit status 2."""

# ==== 1. Restoration and loss ====================================================
# There are two backward passes. The first differentiates the energy by the image:
# dE/dx is the restoring step, so this pass is the decoder. The second differentiates
# the loss by the parameters, back through the first, and trains the decoder.

def restore(energy_fn, x_tilde, alpha, num_steps=1, create_graph=False):
    """K = num_steps steps down the energy from x_tilde: x_1 ... x_K, (K, B, 3, S, S).

    energy_fn: any callable from (B, 3, S, S) to (B,), else ValueError. It must not mix
    images, so a network of yours must be in evaluation mode. Fused attention must run
    under torch.nn.attention's sdpa_kernel(SDPBackend.MATH). create_graph: for training.
    """
    def total_energy(x):
        energy = energy_fn(x)
        if energy.shape != x.shape[:1]:
            raise ValueError(f"energies: shape {tuple(energy.shape)}, not ({len(x)},)")
        return energy.float().sum()  # no image sees another: each has its own gradient

    # unlike torch.autograd.grad, this works in torch.compile and under torch.no_grad()
    gradient = torch.func.grad(total_energy)
    iterates = [x_tilde]
    with torch.set_grad_enabled(create_graph):
        for _ in range(num_steps):
            x = iterates[-1].detach()  # each step learns alone, not through the next
            iterates.append(x - alpha * gradient(x))  # Eq. (2)
    return torch.stack(iterates[1:])

def restoration_loss(x_hat, x, x_tilde):
    """Eq. (3): the mean over images and steps of smooth_l1(x_k, x) / rms(x_tilde - x).

    The error is divided by how far the image was moved, at least 0.05 (ours). Else
    tasks that move images far drown the others, and full corruptions partial ones.
    """
    error = F.smooth_l1_loss(x_hat, x.expand_as(x_hat), reduction="none")
    moved = (x_tilde - x).square().flatten(1).mean(1).sqrt()  # (B,)
    return (error.flatten(2).mean(2) / moved.clamp(min=0.05)).mean()  # Eq. (3)

def order_loss(energy_fn, x, x_s, alpha):
    """Eq. (4) for images x_s on the way from x to x_tilde.

    If a step from any point of this way ended at x, dE/dx would be (x_s - x) / alpha
    there, and the rise E(x_s) - E(x) would be |x_s - x|^2 / (2 alpha). r is the real
    rise over this one. Real steps fall short of x, so a quarter is asked for.
    """
    full_rise = (x_s - x).square().flatten(1).sum(1) / 2  # times alpha, (B,)
    above, below = energy_fn(torch.cat([x_s, x])).chunk(2)
    missing = F.relu(full_rise / 4 - alpha * (above - below))
    return (missing / full_rise.clamp(min=0.5)).mean()  # Eq. (4), not over zero

# ==== 2. Corruptions =============================================================
# Five verbs of one signature. A sixth task is one more, and its name in CORRUPTIONS.

def count_hidden(image_size, mask_ratio, patch_size):
    """How many patches of an image `hide_patches` hides."""
    return round(mask_ratio * (image_size // patch_size)**2)

def hide_patches(x, generator, mask_ratio, patch_size, **_):
    """Masked image modelling: hide a share of the patches.

    A hidden patch is one of zeros, and no other is: 8-bit pixels scaled to [-1, 1] are
    odd multiples of 1/255, and a drawn patch is never zero all over.
    """
    side = x.shape[2] // patch_size
    num_hidden = count_hidden(x.shape[2], mask_ratio, patch_size)
    order = torch.rand(len(x), side**2, generator=generator, device=x.device).argsort(1)
    mask = (order < num_hidden).view(-1, 1, side, side)
    mask = mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return x.masked_fill(mask, 0)  # mask: (B, 1, S, S)

def shuffle_patches(x, generator, sort_grid, **_):
    """Patch sorting: permute sort_grid x sort_grid pieces."""
    side = x.shape[2] // sort_grid
    pieces = F.pixel_unshuffle(x, side).flatten(2)  # (B, C*side*side, M)
    order = torch.rand(len(x), sort_grid**2, generator=generator, device=x.device)
    order = order.argsort(1).unsqueeze(1).expand_as(pieces)
    pieces = pieces.gather(2, order).unflatten(2, (sort_grid, sort_grid))
    return F.pixel_shuffle(pieces, side)

def lower_resolution(x, generator, sr_factor, **_):
    """Super-resolution: average squares of sr_factor pixels, and enlarge again."""
    small = F.avg_pool2d(x, sr_factor)  # (B, C, S/factor, S/factor)
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)

def add_noise(x, generator, noise_std, **_):
    """Denoising: add Gaussian noise, not clipped, or it would no longer be Gaussian."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + noise_std * noise

def remove_color(x, generator, **_):
    """Colourisation: keep the luma (ITU-R BT.601), repeated in all three channels."""
    red, green, blue = x.split(1, dim=1)  # (B, 1, S, S)
    return (0.299 * red + 0.587 * green + 0.114 * blue).expand_as(x)

CORRUPTIONS = {
    "mim": hide_patches,
    "sort": shuffle_patches,
    "sr": lower_resolution,
    "denoise": add_noise,
    "color": remove_color,
}
TASKS = list(CORRUPTIONS)

def corrupt(x, task, generator, options):
    """New images like x (B, 3, S, S). options: {flag: value}; a verb takes its own."""
    return CORRUPTIONS[task](x, generator, **options)

def corrupt_batch(x, tasks, generator, options, turn=0):
    """What Pretrainer takes: (x, x_tilde, num_partial, num_masked, num_hidden).

    Image i of x (B, 3, S, S) gets task turn + i, round and round. The first num_partial
    are corrupted only in part, by a share u^2, mostly a little; else restoration would
    not learn to leave alone what is nearly clean. The others are sorted: masked ones,
    num_masked of num_hidden hidden patches each, come last.
    """
    num_partial = math.ceil(options["partial_share"] * len(x))
    dealt = [tasks[(turn + i) % len(tasks)] for i in range(len(x))]
    order = sorted(range(len(x)), key=lambda i: i >= num_partial and dealt[i] == "mim")
    x, dealt = x[order], [dealt[i] for i in order]
    x_tilde = torch.empty_like(x)
    for task in tasks:
        places = [i for i, other in enumerate(dealt) if other == task]
        if places:
            x_tilde[places] = corrupt(x[places], task, generator, options)

    u = torch.rand(num_partial, 1, 1, 1, generator=generator, device=x.device)
    x_tilde[:num_partial] = x[:num_partial].lerp(x_tilde[:num_partial], u**2)
    num_masked = dealt[num_partial:].count("mim")
    num_hidden = 0
    if num_masked:
        ratio, patch_size = options["mask_ratio"], options["patch_size"]
        num_hidden = count_hidden(x.shape[2], ratio, patch_size)
    return x, x_tilde, num_partial, num_masked, num_hidden

# ==== 3. The energy ==============================================================
# A network of your own needs ViT's `forward`, `represent` and `num_features`; what is
# called head.* is not for others. No image of a batch may change another's energy, so
# batch norm must be in evaluation mode. What has no part in dE/dx must be frozen, since
# DistributedDataParallel fails where a gradient is missing.

class Attention(nn.Module):
    """Multi-head self-attention by hand: fused kernels have no second derivative."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, M, D)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, M, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, M, D/h) each
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, h, M, M)
        x = scores.softmax(3) @ v  # (B, h, M, D/h)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, M, D)

class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):  # (B, M, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

def random_waves(side, dim):
    """Positions (1, side * side, D): waves of random direction, frequency and phase.

    Near patches have similar ones, and attend to each other from the first step on. The
    similarity at distance d is exp(-(0.7 d)^2 / 2), and the rms of a position 0.6.
    """
    steps = torch.arange(float(side))
    place = torch.cartesian_prod(steps, steps)  # (N, 2)
    waves = 0.7 * place @ torch.randn(2, dim) + 2 * math.pi * torch.rand(dim)
    return 0.85 * waves.cos().unsqueeze(0)

class ReadOut(nn.Module):
    """Eq. (1) as a distance: E = 1/2 mean_n sum_d v_d (p_nd - z_nd)^2.

    p_n is an embedded patch, z_n what one more block, having seen all tokens, expects
    there. So the block says directly which way patch n should go: dE/dp_n is
    v (p_n - z_n) / N plus what comes back through the layers. v may have any sign.
    """
    def __init__(self, pos_embed, num_heads):
        super().__init__()
        dim = pos_embed.shape[2]
        self.pos_embed = nn.Parameter(pos_embed)
        self.block = Block(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.weight = nn.Parameter(torch.zeros(dim))  # v: at first no step moves

    def forward(self, p, tokens):  # (B, N, D) each
        z = self.norm(self.block(tokens + self.pos_embed))  # (B, N, D)
        distance = self.weight * (p - z).float().square()  # (B, N, D)
        return distance.sum(2).mean(1) / 2  # Eq. (1): (B,)

class ViT(nn.Module):
    """A Vision Transformer under timm's names, and the read-out `head`: Eq. (1).

    Hidden patches join late (ours): only seen ones pass the blocks, then the hidden
    ones join for the read-out. So all that they need must stand in the features of the
    seen ones, and these are what one pretrains for. If all passed the blocks, hidden
    patches would take what they need layer by layer, and the last features be idle.
    """
    def __init__(self, image_size, patch_size, dim, depth, num_heads):
        super().__init__()
        side = image_size // patch_size
        self.patch_size = patch_size
        self.num_features = dim
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))  # for timm; not read out
        waves = random_waves(side, dim)
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, 1, dim), waves], 1))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = ReadOut(waves, num_heads)

    def embed(self, x):
        """One linear map of each patch: (B, 3, S, S) -> (B, N, D)."""
        return self.patch_embed.proj(x).flatten(2).transpose(1, 2)

    def encode(self, patches, seen=None):
        """Features of embedded patches (B, N, D), or of those M in seen (B, M)."""
        x = patches + self.pos_embed[:, 1:]
        if seen is not None:
            x = x.gather(1, seen.unsqueeze(2).expand(-1, -1, x.shape[2]))  # (B, M, D)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)  # (B, M+1, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]

    def represent(self, x):
        """Features for a classifier: (B, 3, S, S) -> (B, D)."""
        return self.encode(self.embed(x)).mean(1)

    def find_hidden(self, x):
        """Which patches are all zeros: (B, 3, S, S) -> (B, N)."""
        largest = F.max_pool2d(x.detach().abs(), self.patch_size).amax(1)
        return largest.flatten(1) == 0

    def forward(self, x, num_hidden=None):
        """num_hidden: how many patches of each image are hidden.

        torch.compile must be told. Else the images show it, and each may have its own.
        """
        if num_hidden is None:
            numbers = self.find_hidden(x).sum(1)  # (B,)
            energies = x.new_zeros(len(x))
            for n in numbers.unique().tolist():
                energies[numbers == n] = self(x[numbers == n], n)
            return energies
        p = self.embed(x)  # (B, N, D)
        if num_hidden == 0:
            return self.head(p, self.encode(p))

        # What is seen is given: dE/dx is 0 there, and no inner gradient enters a block.
        given = self.embed(x.detach())
        hidden = self.find_hidden(x)
        p = torch.where(hidden.unsqueeze(2), p, given)
        num_seen = hidden.shape[1] - num_hidden
        seen = hidden.int().argsort(dim=1, stable=True)[:, :num_seen]  # (B, M)
        features = self.encode(given, seen)  # (B, M, D)
        seen = seen.unsqueeze(2).expand_as(features)
        return self.head(p, p.to(features.dtype).scatter(1, seen, features))

class Pretrainer(nn.Module):
    """Energy and loss in one module, as DistributedDataParallel needs them.

    alpha is large because a ViT's E is a mean over patches, and not learned because the
    read-out's scale is.
    """
    def __init__(self, model, alpha, num_steps=1, order_weight=0.0):
        super().__init__()
        self.model = model
        self.alpha = alpha
        self.num_steps = num_steps
        self.order_weight = order_weight

    def forward(self, x, x_tilde, num_partial=0, num_masked=0, num_hidden=0):
        """The loss of images (B, 3, S, S).

        The first num_partial enter Eq. (4). The last num_masked have num_hidden hidden
        patches each; after a step they are whole, too.
        """
        def whole(y):  # numbers given, not found: torch.compile cannot look
            return self.model(y, 0)

        def as_dealt(y):
            y, masked = y.split([len(y) - num_masked, num_masked])
            return torch.cat([whole(y), self.model(masked, num_hidden)])

        energy = as_dealt if num_masked else whole
        x_hat = restore(energy, x_tilde, self.alpha, 1, create_graph=True)
        if self.num_steps > 1:
            num_more = self.num_steps - 1
            more = restore(whole, x_hat[0], self.alpha, num_more, create_graph=True)
            x_hat = torch.cat([x_hat, more])
        loss = restoration_loss(x_hat, x, x_tilde)
        if num_partial:
            x, x_s = x[:num_partial], x_tilde[:num_partial]
            loss = loss + self.order_weight * order_loss(whole, x, x_s, self.alpha)
        return loss

VIT_SIZES = {  # name: (width D, depth, heads h)
    "nano": (96, 1, 3), "mini": (96, 4, 3), "tiny": (192, 12, 3),
    "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

def build_model(name, image_size, patch_size):
    """An energy by its name. A network of your own would be made here."""
    return ViT(image_size, patch_size, *VIT_SIZES[name])

# ==== 4. Processes and randomness ================================================
# A launcher says in the environment who is who. Less than all of it is a leftover.

LAUNCHED = all(os.environ.get(name) for name in (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
GROUPS = []  # the names of the process groups joined so far

def print0(*values):
    if RANK == 0:
        print(*values, flush=True)

def seed_from(*key):
    """A seed from its use, as ("corrupt", 0, 17): a resumed run draws what it would."""
    return zlib.crc32(repr(key).encode())

def make_generator(device, *key):
    return torch.Generator(device).manual_seed(seed_from(*key))

def choose_device(name):
    """The CPU, or this process's GPU."""
    if name == "cpu":
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), LOCAL_RANK
    if count == 1 and not dist.is_torchelastic_launched():
        index = 0  # srun shows each process its own GPU alone
    if index >= count:
        raise UserError(f"--device cuda:{index}: not on this machine")
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    return torch.device("cuda", index)

def join_processes(device):
    """Join the other processes. False if there are none, or the caller has done it."""
    if WORLD_SIZE == 1 or dist.is_initialized():
        return False
    # All groups share one store. Under a name of its own none reads what an earlier
    # group has left there, or a process that died (pytorch issue 135712).
    GROUPS.append(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')}-{len(GROUPS)}")
    store, _, _ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=RANK, world_size=WORLD_SIZE,
        store=dist.PrefixStore(GROUPS[-1], store))
    return True

def autocast(device):
    """bfloat16 on GPUs that compute in it; float16 would need scaling, twice."""
    on = device.type == "cuda"
    on = on and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=on)

# ==== 5. Data ====================================================================

def draw_landscapes(batch_size, size, generator):
    """Images (B, 3, S, S) and the kind of their objects (B,), 0 ... 3: sky at some time
    of day, furrowed ground, three objects whose colour follows from their shape."""
    B, device = batch_size, generator.device

    def uniform(low, high):
        u = torch.rand(B, 1, 1, 1, generator=generator, device=device)
        return low + (high - low) * u

    def rgb(*values):
        return torch.tensor(values, device=device).view(-1, 3, 1, 1)

    u = torch.linspace(0, 1, size, device=device).view(1, 1, 1, size)  # to the right
    v = u.transpose(2, 3)  # downwards
    wave = torch.sin(2 * math.pi * (uniform(0.5, 1.5) * u + uniform(0, 1)))
    horizon = uniform(0.3, 0.6) + uniform(0.02, 0.08) * wave  # (B, 1, 1, S)
    evening = uniform(0, 1)
    zenith = torch.lerp(rgb(0.25, 0.45, 0.85), rgb(0.25, 0.15, 0.4), evening)
    haze = torch.lerp(rgb(0.75, 0.88, 0.97), rgb(0.98, 0.6, 0.3), evening)
    sky = torch.lerp(zenith, haze, (v / horizon).clamp(0, 1))  # (B, 3, S, S)
    below = (v - horizon).clamp(min=0)  # (B, 1, S, S)
    furrows = torch.sin(uniform(6, 14) * torch.log(below + 0.05) + uniform(-4, 4) * u)
    soil = torch.lerp(rgb(0.2, 0.5, 0.2), rgb(0.6, 0.5, 0.25), uniform(0, 1))
    ground = soil * (0.75 + 0.5 * below + 0.15 * furrows) * (1.1 - 0.4 * evening)
    x = torch.lerp(sky, ground, ((v - horizon) * size + 0.5).clamp(0, 1))
    kind = torch.randint(4, (B,), generator=generator, device=device)
    paint = rgb(0.9, 0.2, 0.2, 0.95, 0.8, 0.2, 0.25, 0.4, 0.9, 0.75, 0.3, 0.8)[kind]
    nearness = torch.rand(B, 3, generator=generator, device=device).sort(1).values
    nearness = nearness.mul(0.85).add(0.15).view(B, 3, 1, 1, 1)
    for near in nearness.unbind(1):  # far ones first
        radius = 0.06 + 0.12 * near  # near: large, low
        du = (u - uniform(0, 1)) / radius  # (B, 1, 1, S)
        dv = (v - horizon - near * (0.9 - horizon)) / radius + 1  # (B, 1, S, S)
        distance = (du**2 + dv**2).sqrt()
        shapes = torch.cat([  # inside > 0: ball, box, tree, ring
            1 - distance,
            1 - 1.15 * torch.maximum(du.abs(), dv.abs()),
            torch.minimum(0.9 - dv, (1 + dv - 2 * du.abs()) / 2),
            0.35 - (distance - 0.65).abs()], 1)
        inside = shapes.gather(1, kind.view(B, 1, 1, 1).expand_as(distance))
        shade = (0.75 - 0.35 * du - 0.15 * dv).clamp(0.25, 1.2)  # lit from the left
        x = torch.lerp(x, paint * shade, (inside * radius * size + 0.5).clamp(0, 1))
    return x.clamp(0, 1) * 2 - 1, kind

def find_images(root):
    """All images at or below root, each once, as (file, folder right in root) pairs.
    Left out: what is hidden, @eaDir, a run's pictures, what has no image's ending."""
    walk = os.walk(root, followlinks=True)
    if os.path.isfile(root):
        walk = [(os.path.dirname(root), [], [os.path.basename(root)])]
    found, entered = {}, set()
    for folder, subfolders, names in walk:
        if os.path.realpath(folder) in entered:  # by a link, perhaps from below
            subfolders.clear()
        entered.add(os.path.realpath(folder))
        subfolders[:] = sorted(n for n in subfolders if n[0] != "." and n != "@eaDir")
        for name in sorted(names):
            if is_image_file(name) and name[0] != "." and name != "restorations.png":
                file = os.path.join(folder, name)
                found.setdefault(os.path.realpath(file), file)
    print0(f"{root}: {len(found)} images ({' '.join(IMG_EXTENSIONS)})")
    if not found:
        raise UserError(f"--data {root}: no image there ({' '.join(IMG_EXTENSIONS)})")
    return [(file, os.path.relpath(os.path.dirname(file), root).split(os.sep)[0])
            for file in found.values()]

class Crops(torch.utils.data.Dataset):
    """Crops of (file or PIL image, label) pairs: item (index, seed) is a uint8 image
    (3, S, S) and its label. augment: crop and flip as the seed says, else take the
    middle. What cannot be used is named, and another drawn at random in its place."""

    def __init__(self, pairs, size, augment):
        self.pairs, self.size = pairs, size
        crop = [v2.Resize(size), v2.CenterCrop(size)]
        if augment:
            crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.crop = v2.Compose([*crop, v2.PILToTensor()])

    def decode(self, source):
        image = Image.open(source) if isinstance(source, str) else source
        if image.mode[0] in "IF":  # 16 or 32 bits: white may be any number
            raise ValueError("more than 8 bits a channel")
        image.draft("RGB", (3 * self.size, 3 * self.size))  # decodes large JPEGs faster
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # lay it on white, as viewers do
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def __getitem__(self, key):
        index, seed = key
        torch.manual_seed(seed)  # torchvision draws from the global state
        for _ in range(100):
            source, label = self.pairs[index]
            try:
                return self.crop(self.decode(source)), label
            except Exception as error:  # Pillow raises anything
                print(f"warning: left out {source} ({error})", file=sys.stderr)
                index = int(torch.randint(len(self.pairs), ()))
        raise UserError(f"{source} cannot be used, nor 99 others drawn before it")

# train, held_out: (file or image, label) pairs; None: endless landscapes, of 4 kinds.
# images: a text that tells these from others, wherever they lie.
Data = collections.namedtuple("Data", "train held_out num_classes images")

def open_data(args):
    """The Data that --data and --labels ask for. Of a folder, val/ or test/ is held out
    if it stands beside train/, else every tenth image."""
    train, held_out, num_classes, images = None, None, 4, args.data
    generator = make_generator("cpu", "labels", args.seed)
    if args.data == "cifar10":
        cifar = torchvision.datasets.CIFAR10
        try:
            if RANK == 0:
                cifar("data", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data cifar10: cannot be downloaded to ./data ({error})")
        if WORLD_SIZE > 1:
            dist.barrier()  # until the files are there
        train, held_out, num_classes = cifar("data"), cifar("data", train=False), 10
    elif args.data != "procedural":
        parts = [os.path.join(args.data, part) for part in ("train", "val", "test")]
        parts = [part for part in parts if os.path.isdir(part)]
        if len(parts) > 1 and parts[0].endswith("train"):
            train, held_out = find_images(parts[0]), find_images(parts[1])
        else:
            found = find_images(args.data)
            train = [pair for i, pair in enumerate(found) if i % 10] or found
            held_out = found[::10]
        names = [os.path.relpath(file, args.data) for file, _ in train + held_out]
        images = f"{len(names)} files, whose names hash to {seed_from(*names):x}"
        classes = sorted({folder for _, folder in train + held_out})
        num_classes = len(classes)
        train = [(file, classes.index(folder)) for file, folder in train]
        held_out = [(file, classes.index(folder)) for file, folder in held_out]
    elif args.labels:
        drawn, kinds = draw_landscapes(args.labels, args.image_size, generator)
        drawn = [v2.functional.to_pil_image(x / 2 + 0.5) for x in drawn]
        train = list(zip(drawn, kinds.tolist()))
    if args.labels:
        train = balanced_subset(train, args.labels, generator)
    return Data(train, held_out, num_classes, images)

def balanced_subset(pairs, count, generator):
    """count of the pairs, drawn at random, as many of each class if there are."""
    labels = [label for _, label in pairs]
    order = torch.randperm(len(pairs), generator=generator).tolist()
    rank, seen = {}, collections.Counter()
    for i in order:
        rank[i] = seen[labels[i]]
        seen[labels[i]] += 1
    order.sort(key=rank.get)  # the first of every class, then the second, and so on
    return torch.utils.data.Subset(pairs, order[:count])

def crop_keys(num_images, batch_size, steps, key, rank, world):
    """For every step this process's keys (index, seed) of Crops. Each epoch is a
    permutation, the epochs are one endless row, and step n takes batch n of it."""
    part, epoch = batch_size // world, None
    for step in steps:
        keys, first = [], step * batch_size + rank * part
        for i in range(first, first + part):
            if epoch != i // num_images:
                epoch = i // num_images
                generator = make_generator("cpu", *key, "epoch", epoch)
                order = torch.randperm(num_images, generator=generator).tolist()
            keys.append((order[i % num_images], seed_from(*key, "crop", i)))
        yield keys

def image_batches(args, pairs, device, batch_size, steps, purpose, rank=0, world=1):
    """Yield this process's images (B, 3, S, S) and labels (B,) for each step. purpose
    is part of the seed. Held-out images are cropped at random, as in training, but in
    the middle for a classifier, and a person's single picture."""
    if pairs is None:
        for step in steps:
            generator = make_generator(device, purpose, args.seed, step, rank)
            yield draw_landscapes(batch_size // world, args.image_size, generator)
        return
    middle = purpose == "held out" and (args.finetune or len(pairs) == 1)
    crops = Crops(pairs, args.image_size, args.augment and not middle)
    keys = crop_keys(len(pairs), batch_size, steps, (purpose, args.seed), rank, world)
    for x, labels in torch.utils.data.DataLoader(
            crops, batch_sampler=keys, num_workers=args.workers,
            pin_memory=device.type == "cuda"):
        x = x.to(device, non_blocking=True) / 127.5 - 1
        yield x, labels.to(device, non_blocking=True)

# ==== 6. Optimisers and schedule =================================================

class WithoutBfloat16(TorchFunctionMode):
    """torch's Muon computes in bfloat16, which most CPUs emulate, 20 times slower."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()
        return function(*args, **(kwargs or {}))

def build_optimizers(module, weight_decay):
    """[AdamW, Muon], Muon (Jordan et al., 2024) for the matrices of attention and MLPs.
    It turns momentum into roughly the nearest orthogonal matrix, so all directions move
    equally far. AdamW alone needs several times the steps."""
    inner, decaying, others = [], [], []
    for name, p in module.named_parameters():
        if p.ndim == 2 and re.search("(attn|mlp).*weight", name):
            inner.append(p)
        elif p.ndim > 1 and len(p) > 1:
            decaying.append(p)
        else:  # biases and norms; positions and class token, (1, ...)
            others.append(p)
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    common = {"lr": 0.0, "weight_decay": weight_decay}
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), **common), torch.optim.Muon(
        [{"params": inner}], momentum=0.9, adjust_lr_fn="match_rms_adamw", **common)]

def update_parameters(args, optimizers, step):
    """Take step 1 ... max_steps, after loss.backward(), and return its learning rate:
    linear in the first twentieth, up to args.lr, then half a cosine to zero."""
    warmup = args.max_steps // 20
    rate = args.lr * step / max(1, warmup)
    if step >= warmup:
        done = (step - warmup) / (args.max_steps + 1 - warmup)
        rate = args.lr * (1 + math.cos(math.pi * done)) / 2
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with WithoutBfloat16():
            optimizer.step()
    return rate

# ==== 7. Checkpoints =============================================================
# Plain dicts of tensors, numbers and strings: loading one can run no code. Pretraining
# that was interrupted goes on if the same command is given again; these flags may
# differ (that the images are the same shows in their names).
MAY_DIFFER = ("out", "data", "device", "workers", "compile", "lr", "save_every",
              "eval_images")

def write_file(args, name, write):
    """Let write(file) fill OUT/name, whole or not at all."""
    path = os.path.join(args.out, name)
    try:
        with open(path + ".unfinished", "wb") as file:
            write(file)
        os.replace(path + ".unfinished", path)
    except (OSError, RuntimeError) as error:  # the latter by torch.save
        error = error.__context__ or error
        raise UserError(f"{path}: cannot be written; is there room? ({error})")

def make_out(args):
    """UserError if --out cannot be written, at once and not at the first save."""
    try:
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})")

def load_checkpoint(path):
    """Read a checkpoint.pt. UserError if there is none, or it is damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not check the checksums
            raise ValueError("checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("model", "optimizers", "config", "log")}
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = f"missing, damaged, or no checkpoint of ours ({error!r:.60})"
        raise UserError(f"{path}: {reason}")

def load_energy(path):
    """The trained energy of a checkpoint.pt, (B, 3, S, S) -> (B,), low for data.
    `restore` takes it, with the alpha that it was trained with."""
    saved = load_checkpoint(path)
    config = saved["config"]
    energy = build_model(config["model"], config["image_size"], config["patch_size"])
    energy.load_state_dict(saved["model"])
    return energy.requires_grad_(False)

def resume(args, model, optimizers):
    """Go on from OUT's checkpoint if there is one, and return its log."""
    path, log = os.path.join(args.out, "checkpoint.pt"), []
    if os.path.exists(path):
        saved = load_checkpoint(path)
        for name, value in vars(args).items():
            old = saved["config"].get(name)
            if name not in MAY_DIFFER and value != old:
                raise UserError(f"{path} has {name} {old}, not {value}: another --out?")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        log = saved["log"]
        print0(f"going on after step {log[-1]['step']}")
    if WORLD_SIZE > 1:
        began = [None] * WORLD_SIZE
        dist.all_gather_object(began, len(log) and log[-1]["step"])
        if len(set(began)) > 1:
            raise UserError(f"processes go on after steps {began}: is --out shared?")
    return log

def save_checkpoint(args, model, optimizers, log):
    """Write log.jsonl, backbone.pt, which other programs load, and checkpoint.pt."""
    backbone = {name: p for name, p in model.state_dict().items()
                if not name.startswith("head.")}
    checkpoint = {"model": model.state_dict(), "config": vars(args), "log": log,
                  "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    lines = "".join(json.dumps(record) + "\n" for record in log)
    write_file(args, "log.jsonl", lambda file: file.write(lines.encode()))
    write_file(args, "backbone.pt", lambda file: torch.save(backbone, file))
    write_file(args, "checkpoint.pt", lambda file: torch.save(checkpoint, file))

# ==== 8. Evaluation ==============================================================

def psnr(y, x):
    """Peak signal-to-noise ratio in dB of y against x, in [-1, 1], whose range is 2."""
    return 10 * math.log10(4 / max((y - x).square().mean().item(), 1e-12))

@torch.no_grad()
def evaluate(pretrainer, x, tasks, options, chunk=32):
    """{task: {metric: value}}, {task: iterates} of images x (M, 3, S, S).

    psnr_clean: of a clean image after a step. psnr_corrupted, psnr_step_k after step k:
    of all pixels, for mim of the hidden ones. order: share of images lower clean than
    corrupted; order_quarter: than a quarter corrupted; auroc: share of all pairs of a
    clean and a corrupted image, ties half.
    """
    def energy(y):  # (M,)
        return torch.cat([pretrainer.model(part) for part in y.split(chunk)])

    def steps(y, num_steps):  # (K, M, 3, S, S)
        return torch.cat([restore(pretrainer.model, part, pretrainer.alpha, num_steps)
                          for part in y.split(chunk)], 1)

    metrics, iterates = {}, {}
    energy_clean, psnr_clean = energy(x), psnr(steps(x, 1)[0], x)
    for task in tasks:
        x_tilde = corrupt(x, task, make_generator(x.device, "evaluate", task), options)
        if (x_tilde - x).abs().max() < 1e-3:
            print(f"{task} changes nothing in these images")
        iterates[task] = [x_tilde, *steps(x_tilde, pretrainer.num_steps)]
        counted = torch.ones_like(x, dtype=torch.bool)
        if task == "mim":
            counted = x_tilde != x
        psnrs = [psnr(x_k[counted], x[counted]) for x_k in iterates[task]]
        energy_corrupted = energy(x_tilde)
        energy_quarter = energy(x.lerp(x_tilde, 0.25))
        rises = energy_corrupted - energy_clean[:, None]  # (M, M)
        metrics[task] = {
            "psnr_clean": psnr_clean, "psnr_corrupted": psnrs[0],
            **{f"psnr_step_{k}": psnrs[k] for k in range(1, len(psnrs))},
            "energy_clean": energy_clean.mean().item(),
            "energy_corrupted": energy_corrupted.mean().item(),
            "order": (energy_clean < energy_corrupted).float().mean().item(),
            "order_quarter": (energy_clean < energy_quarter).float().mean().item(),
            "auroc": 0.5 + rises.sign().mean().item() / 2}
    return metrics, iterates

def print_table(metrics):
    """A row for each metric of `evaluate`, a column for each task."""
    print("\n" + " " * 20 + "".join(f"{task:>9}" for task in metrics))
    for name in next(iter(metrics.values())):
        print(f"{name:<20}" + "".join(f"{row[name]:9.2f}" for row in metrics.values()))

def draw_picture(energy_fn, x, iterates):
    """Two images a task, clean, corrupted and restored, each above its energy."""
    side = max(88, x.shape[3])
    left, width, height = 78, side + 4, side + 18
    num_steps = len(next(iter(iterates.values()))) - 1
    names = ["clean", "corrupted", *["restored"] * num_steps]
    columns = [(task, i) for task in iterates for i in range(len(x[:2]))]
    size = left + width * len(columns), 16 + height * len(names)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        middle = 16 + height * row + side // 2
        draw.text((2, middle - 6), name, fill="black")
        if row > 1:  # an arrow from the row above
            draw.text((2, middle - 34), "- alpha dE/dx", fill="black")
            draw.line((36, middle - height + 12, 36, middle - 46), fill="black")
            draw.regular_polygon((36, middle - 44, 5), 3, 180, fill="black")
    for column, (task, i) in enumerate(columns):
        images = torch.stack([x[i], *(x_k[i] for x_k in iterates[task])])  # K+2 of them
        tiles = F.interpolate(images, size=(side, side), mode="bicubic")
        tiles = tiles.clamp(-1, 1).cpu() / 2 + 0.5
        place = left + width * column
        draw.text((place, 2), task, fill="black")
        for row, energy in enumerate(energy_fn(images).tolist()):
            top = 16 + height * row
            picture.paste(v2.functional.to_pil_image(tiles[row]), (place, top))
            draw.text((place, top + side + 2), f"E {energy:.3f}", fill="black")
    return picture

# ==== 9. Pretraining =============================================================

def build_pretrainer(args, device):
    """The energy in its Pretrainer, its weights from the seed or from args.weights."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, args.image_size, args.patch_size).to(device)
    if args.weights:
        try:
            model.load_state_dict(load_checkpoint(args.weights)["model"])
        except RuntimeError:
            raise UserError(f"{args.weights} is not of --model {args.model} at "
                            f"{args.image_size} pixels")
    print0(f"{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters; "
           f"{args.data}; {WORLD_SIZE} processes on {device}")
    return Pretrainer(model, args.alpha, args.restore_steps, args.order_weight)

def wrap(args, pretrainer):
    """The module whose call is a step's loss, compiled and distributed as asked for."""
    if args.compile:
        # else the graph is cut where DistributedDataParallel's buckets end, which may
        # be in the middle of the inner gradient
        torch._dynamo.config.optimize_ddp = False
        pretrainer.compile(fullgraph=True, dynamic=False)
    if WORLD_SIZE == 1:
        return pretrainer
    return nn.parallel.DistributedDataParallel(pretrainer)

def train(args, pretrainer, pairs, device):
    """Take the steps that OUT's checkpoint has not taken yet, and save on the way."""
    model, tasks = pretrainer.model, args.task.split(",")
    optimizers = build_optimizers(pretrainer, args.weight_decay)
    log = resume(args, model, optimizers)
    module = wrap(args, pretrainer)
    last, start, losses = log[-1]["step"] if log else 0, time.time(), []
    batches = image_batches(args, pairs, device, args.batch_size,
                            range(last, args.max_steps), "train", RANK, WORLD_SIZE)
    for step, (x, _) in enumerate(batches, last + 1):
        # corrupt: the tasks in turn, through all processes' images
        generator = make_generator(device, "corrupt", args.seed, step, RANK)
        batch = corrupt_batch(x, tasks, generator, vars(args), step + RANK * len(x))

        # restore, and compare
        with autocast(device):
            loss = module(*batch)  # Eq. (3) and (4)

        # back through dE/dx; DistributedDataParallel averages
        pretrainer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(pretrainer.parameters(), max_norm=1.0)
        rate = update_parameters(args, optimizers, step)

        # log and save
        losses.append(loss.detach())
        save = step % args.save_every == 0 or step == args.max_steps
        if save or step % 50 == 0 or step == 1:
            mean = torch.stack(losses).mean().item()  # since the last record
            if not math.isfinite(mean + norm.item()):
                raise UserError(f"step {step}: loss {mean}; not saved; lower --lr")
            speed = (step - last) / (time.time() - start)
            last, start, losses = step, time.time(), []
            log.append({"step": step, "loss": mean, "gradient_norm": norm.item(),
                        "lr": rate, "images_per_second": args.batch_size * speed})
            print0(*(f"{name} {value:<9.4g}" for name, value in log[-1].items()),
                   f"{(args.max_steps - step) / speed / 60:.1f} minutes left")
        if save and RANK == 0:
            save_checkpoint(args, model, optimizers, log)

def pretrain(args, data, device, leave_group):
    """Train, then measure on held-out images: {task: {metric: value}}."""
    pretrainer = build_pretrainer(args, device)
    if not args.evaluate:
        train(args, pretrainer, data.train, device)
    if leave_group:
        dist.destroy_process_group()
    if RANK > 0:
        return {}
    count = min(args.eval_images, len(data.held_out or range(args.eval_images)))
    print(f"evaluating on {count} images", flush=True)
    x, _ = next(image_batches(args, data.held_out, device, count, [0], "held out"))
    with autocast(device):
        metrics, iterates = evaluate(pretrainer, x, args.task.split(","), vars(args))
        picture = draw_picture(pretrainer.model, x, iterates)
    print_table(metrics)
    text = json.dumps(metrics, indent=1).encode()
    write_file(args, "metrics.json", lambda file: file.write(text))
    write_file(args, "restorations.png", lambda file: picture.save(file, "png"))
    return metrics

# ==== 10. Use of the weights =====================================================
# Did pretraining pay? Compare a classifier from a checkpoint with one from scratch.

@torch.no_grad()
def run_over(model, args, pairs, device, count):
    """Outputs (count, ...) for the first images, cropped in the middle, and labels."""
    steps = range(math.ceil(count / 32))
    batches = image_batches(args, pairs, device, 32, steps, "held out")
    with autocast(device):
        outputs, labels = zip(*((model(x).float(), labels) for x, labels in batches))
    return torch.cat(outputs)[:count], torch.cat(labels)[:count]

def fit_probe(norm, linear, features, labels):
    """Logistic regression on features (M, D). L-BFGS needs no learning rate."""
    norm.momentum = 1.0  # keep the statistics of this one batch of all images
    features = norm(features)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        decay = 1e-3 * linear.weight.square().sum()
        value = F.cross_entropy(linear(features), labels) + decay
        value.backward()
        return value

    optimizer.step(loss)

def fit_classifier(args, classifier, pairs, device):
    """All layers, for --max-steps, by the optimisers of pretraining."""
    optimizers = build_optimizers(classifier, args.weight_decay)
    steps = range(args.max_steps)
    batches = image_batches(args, pairs, device, args.batch_size, steps, "train")
    for step, (x, labels) in enumerate(batches, 1):
        with autocast(device):
            loss = F.cross_entropy(classifier(x), labels)
        classifier.zero_grad()
        loss.backward()
        update_parameters(args, optimizers, step)
        if step % 50 == 0 or step == args.max_steps:
            if not math.isfinite(loss.item()):
                raise UserError(f"step {step}: loss {loss.item()}; lower --lr")
            print(f"step {step}/{args.max_steps}  loss {loss.item():.4f}", flush=True)

def finetune(args, data, device):
    """A classifier on a checkpoint's network or a new one: {"accuracy": share}."""
    if data.num_classes < 2:
        raise UserError(f"--data {args.data}: --finetune needs a folder for each class")
    model = build_pretrainer(args, device).model.requires_grad_(not args.freeze)
    model.forward = model.represent  # the energy has no part
    norm = nn.BatchNorm1d(model.num_features, affine=False)  # one rate fits all weights
    linear = nn.Linear(model.num_features, data.num_classes)
    classifier = nn.Sequential(model, norm, linear).to(device)
    if args.freeze:
        count = len(data.train)
        fit_probe(norm, linear, *run_over(model, args, data.train, device, count))
    else:
        fit_classifier(args, classifier, data.train, device)
    classifier.eval()  # the norm's running statistics, not a batch's
    count = min(args.eval_images, len(data.held_out or range(args.eval_images)))
    scores, labels = run_over(classifier, args, data.held_out, device, count)
    metrics = {"accuracy": (scores.argmax(1) == labels).float().mean().item()}
    print(f"{metrics['accuracy']:.1%} of {count} held-out images are classified right")
    state, text = classifier.state_dict(), json.dumps(metrics).encode()
    write_file(args, "classifier.pt", lambda file: torch.save(state, file))
    write_file(args, "metrics.json", lambda file: file.write(text))
    return metrics

# ==== 11. Command line ===========================================================

home_path = os.path.expanduser  # ~ is the home folder, also where no shell says so

def data_path(name):
    """The whole path of what exists, else a name, as cifar10."""
    path = home_path(name)
    return os.path.realpath(path) if os.path.exists(path) else name

FLAGS = [  # name, type, default or (on a CPU, on GPUs), meaning; None: see below
    ("task", str, "all", f"{', '.join(TASKS)}, a comma list, or all"),
    ("evaluate", bool, False, "train nothing: table and picture of --out"),
    ("finetune", home_path, None, "train a classifier: a checkpoint.pt, or scratch"),
    ("freeze", bool, False, "--finetune only a linear probe"),
    ("out", home_path, None, "folder; default: runs/TASK, /finetune or /scratch"),
    ("device", str, None, "cpu or cuda; default: cuda, if there is one"),
    ("data", data_path, "procedural", "folder, image, cifar10 or drawn landscapes"),
    ("labels", int, None, "train on so many images in all, classes balanced"),
    ("image_size", int, (32, 224), "side in pixels"),
    ("augment", bool, True, "random crops and flips"),
    ("workers", int, min(8, os.cpu_count()), "decoders per process"),
    ("model", str, ("nano", "small"), f"size of the ViT: {', '.join(VIT_SIZES)}"),
    ("patch_size", int, None, "default: 4 below 128 pixels, else 16"),
    ("restore_steps", int, 1, "K, steps down the energy"),
    ("alpha", float, 256.0, "restoration's step size"),
    ("order_weight", float, 0.007, "w in Eq. (4)"),
    ("partial_share", float, 0.05, "of a process's images, corrupted in part"),
    ("mask_ratio", float, 0.6, "mim: share of hidden patches"),
    ("sort_grid", int, None, "sort: pieces a side; default: 4 or the next divisor"),
    ("sr_factor", int, 4, "sr: how many times smaller"),
    ("noise_std", float, 0.5, "denoise: pixels in [-1, 1]"),
    ("max_steps", int, (1500, 2000), "optimiser steps; for --finetune 600"),
    ("epochs", float, (None, 100), "over --data, instead of --max-steps"),
    ("batch_size", int, (32, 128 * WORLD_SIZE), "images a step, of all processes"),
    ("lr", float, (8.5e-3, 1.5e-3), "peak learning rate, whatever the batch; for "
                                    "--finetune 0.002"),
    ("weight_decay", float, 0.05, "not of biases, norms and positions"),
    ("seed", int, 0, "of all that is random"),
    ("save_every", int, (100, 500), "steps between checkpoints"),
    ("eval_images", int, 256, "held-out images to measure on; for --finetune 5000"),
    ("compile", bool, (False, True), "torch.compile the loss"),
]
FINETUNE = {"lr": 2e-3, "max_steps": 600, "epochs": None, "eval_images": 5000}
OF_A_NETWORK = ["model", "image_size", "patch_size", "alpha", "data", "augment"]
OF_A_CALL = ["evaluate", "finetune", "freeze", "out", "device", "workers", "compile"]

def build_parser():
    """A parser that invents nothing: what is not typed is not there."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for name, kind, default, meaning in FLAGS:
        flag = "--" + name.replace("_", "-")
        if isinstance(default, tuple):
            meaning += f"; default: {default[0]}, on GPUs {default[1]}"
        elif default:
            meaning += f"; default: {default}"
        if kind is bool:
            kind = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=kind, help=meaning)
        else:
            parser.add_argument(flag, type=kind, help=meaning)

    def refuse(message):
        raise UserError(f"{message}; see --help")

    parser.error = refuse
    return parser

def parse_args(argv=None):
    """What was typed, over a checkpoint's configuration (all of it for --evaluate, the
    network and its data for --finetune), over the defaults for the device."""
    typed = vars(build_parser().parse_args(argv))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = typed.setdefault("device", device) == "cuda"
    args = argparse.Namespace(**{
        name: default[on_gpu] if isinstance(default, tuple) else default
        for name, _, default, _ in FLAGS})
    config = vars(args)
    config.update(typed)  # it decides on the rest
    if args.out is None:
        args.out = f"runs/{args.task}"
        if args.finetune:
            args.out = "runs/scratch" if args.finetune == "scratch" else "runs/finetune"
    args.weights = None if args.finetune == "scratch" else args.finetune
    if args.evaluate:
        args.weights = os.path.join(args.out, "checkpoint.pt")

    config.update(FINETUNE if args.finetune else {})
    if args.weights:
        saved = load_checkpoint(args.weights)["config"]
        whole_run = [name for name, *_ in FLAGS if name not in OF_A_CALL]
        names = whole_run if args.evaluate else OF_A_NETWORK
        config.update({name: saved[name] for name in names})
    config.update(typed)

    if "max_steps" in typed or "epochs" in typed:  # either one replaces both defaults
        args.max_steps, args.epochs = typed.get("max_steps"), typed.get("epochs")
    elif args.data == "procedural":
        args.epochs = None  # landscapes have no end
    if args.task == "all":
        args.task = ",".join(TASKS)
    if args.patch_size is None:
        args.patch_size = 4 if args.image_size < 128 else 16
    if args.sort_grid is None:
        patches = args.image_size // max(1, args.patch_size)
        grids = [n for n in range(4, patches + 1) if patches % n == 0]
        args.sort_grid = min(grids, default=patches)
    check_args(args)
    return args

def check_args(args):
    """UserError at the first value that makes no sense."""
    def check(name, holds, expected):
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(args, name)}: {expected}")

    zero_too = "weight_decay workers seed order_weight partial_share".split()
    for name, value in vars(args).items():
        check(name, value != "", "is empty")
        if type(value) in (int, float):
            fits = 0 < value < 2**32 or value == 0 and name in zero_too
            check(name, fits, "out of range")
    check("model", args.model in VIT_SIZES, f"choose from {', '.join(VIT_SIZES)}")
    check("device", args.device in ("cpu", "cuda"), "choose cpu or cuda")
    tasks = [] if args.finetune else args.task.split(",")
    check("task", set(tasks) <= set(TASKS), f"choose from {', '.join(TASKS)}, or all")
    for name, used in (("patch_size", True), ("sort_grid", "sort" in tasks),
                       ("sr_factor", "sr" in tasks)):
        value = getattr(args, name)
        check(name, not used or value > 1 and args.image_size % value == 0,
              "must be above 1 and divide --image-size")
    if "mim" in tasks:
        hidden = count_hidden(args.image_size, args.mask_ratio, args.patch_size)
        check("mask_ratio", 0 < hidden < (args.image_size // args.patch_size)**2,
              "hides no patch or all")
    check("partial_share", args.partial_share < 1, "must be below 1")
    check("epochs", args.data != "procedural" or not args.epochs, "is for --data")
    check("freeze", args.finetune or not args.freeze, "is for --finetune")
    check("freeze", not args.freeze or args.labels or args.data != "procedural",
          "landscapes have no end: --labels says how many")
    check("evaluate", not args.evaluate or not args.finetune, "is not for --finetune")
    check("finetune", WORLD_SIZE == 1 or not args.finetune, "takes one process")
    check("batch_size", args.batch_size > 1 or not args.finetune, "--finetune needs 2")
    check("batch_size", args.batch_size % WORLD_SIZE == 0 or args.evaluate,
          f"must be a multiple of the {WORLD_SIZE} processes")

def main(argv=None):
    """Return, on the first process, {task: {metric: value}}, or after --finetune
    {"accuracy": share}. A mistake of the user's is one line and SystemExit(2)."""
    try:
        args = parse_args(argv)
        make_out(args)
        device = choose_device(args.device)
        joined = join_processes(device)
        data = open_data(args)
        args.images = data.images
        if args.epochs:
            args.max_steps = math.ceil(args.epochs * len(data.train) / args.batch_size)
        if args.finetune:
            return finetune(args, data, device)
        return pretrain(args, data, device, leave_group=joined)
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # without a worker's traceback
    except torch._dynamo.exc.TorchDynamoException as error:
        message = f"--compile fails ({type(error).__name__}); --no-compile does without"
    except (MemoryError, RuntimeError) as error:
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not no_memory and "allocate memory" not in str(error):  # a CPU's words
            raise
        message = "out of memory; a smaller --batch-size, --image-size or --model fits"
    sys.stderr.write(f"energy_pretrain.py: error: {' '.join(message.split())}\n")
    sys.exit(2)

if __name__ == "__main__":
    main()
