"""Energy-inspired self-supervised pretraining for vision models, in one file.

One vision network is an energy: its forward pass gives one number per image, low for data.
Its backward pass restores: a corrupted image steps down the energy and comes back clean.

    E(x)                               one number per image: the forward pass            (1)
    x_{k+1} = x_k - alpha dE/dx(x_k)   the backward pass restores, K steps from x_tilde  (2)
    loss = mean_k d(x_k, x)            every step should end at the clean image x        (3)
         + w relu(1/4 - r)             r: E's rise on the way to x_tilde, over an ideal  (4)

(1) to (3) are the paper's (Wang, Wang, Liu, Qiu: Energy-Inspired Self-Supervised Pretraining
for Vision Models, ICLR 2023). (4) is ours: a network that learns only to restore may rank
nearly clean images below clean ones. Of the paper we had the abstract and the introduction;
what they leave open is ours, too, every number included.

Why does an energy appear? By squared error the best restoration of x plus Gaussian noise of
standard deviation sigma is x_tilde + sigma^2 grad log p_sigma(x_tilde) (Tweedie's formula).
Compare with (2): alpha E is -sigma^2 log p_sigma, up to a constant (Vincent 2011).

    python energy_pretrain.py                                  # all tasks, built-in images
    python energy_pretrain.py --task color --data ~/Pictures   # any folder of images
    torchrun --nproc_per_node=8 energy_pretrain.py --task mim  # eight GPUs or CPU processes

Sections 1 to 3 are the method. Letters: B images, C channels, S by S pixels, N patches,
D width, h heads, K restoration steps, M whatever the line counts. x is clean, x_tilde
corrupted, x_hat restored; pixels lie in [-1, 1].
"""
import argparse
import collections
import glob
import json
import math
import os
import re
import sys
import time
import zipfile
import zlib

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2

class UserError(Exception):
    """What the person at the command line can put right: one line, exit status 2."""

# ==== 1. Corruptions =================================================
# Five verbs of one signature. A sixth task is one more, and its name in CORRUPTIONS.
def count_hidden(image_size, mask_ratio, patch_size):
    """How many patches `hide_patches` hides."""
    return round(mask_ratio * (image_size // patch_size)**2)

def hide_patches(x, generator, mask_ratio, patch_size, **_):
    """Masked image modelling: hide a share of the patches. A hidden patch is one of zeros, and
    no other is: 8-bit pixels scaled to [-1, 1] are odd multiples of 1/255, never 0."""
    side = x.shape[2] // patch_size
    order = torch.rand(len(x), side**2, generator=generator, device=x.device).argsort(1)
    mask = order < count_hidden(x.shape[2], mask_ratio, patch_size)         # (B, N)
    mask = mask.view(-1, 1, side, side).repeat_interleave(patch_size, 2)
    return x.masked_fill(mask.repeat_interleave(patch_size, 3), 0)

def shuffle_patches(x, generator, sort_grid, **_):
    """Patch sorting: permute sort_grid x sort_grid pieces."""
    side = x.shape[2] // sort_grid
    pieces = F.pixel_unshuffle(x, side).flatten(2)     # (B, C*side*side, M)
    order = torch.rand(len(x), sort_grid**2, generator=generator, device=x.device).argsort(1)
    pieces = pieces.gather(2, order.unsqueeze(1).expand_as(pieces))
    return F.pixel_shuffle(pieces.unflatten(2, (sort_grid, sort_grid)), side)

def lower_resolution(x, generator, sr_factor, **_):
    """Super-resolution: average squares of sr_factor pixels, and enlarge again."""
    small = F.avg_pool2d(x, sr_factor)                 # (B, C, S/factor, S/factor)
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)

def add_noise(x, generator, noise_std, **_):
    """Denoising: add Gaussian noise, not clipped, or it would no longer be Gaussian."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + noise_std * noise

def remove_color(x, generator, **_):
    """Colourisation: keep the luma (ITU-R BT.601), repeated in all three channels."""
    red, green, blue = x.split(1, dim=1)               # (B, 1, H, W)
    return (0.299 * red + 0.587 * green + 0.114 * blue).expand_as(x)

CORRUPTIONS = {"mim": hide_patches, "sort": shuffle_patches, "sr": lower_resolution,
               "denoise": add_noise, "color": remove_color}
TASKS = list(CORRUPTIONS)

def corrupt(x, task, generator, options):
    """New images like x (B, 3, S, S). options: {flag: value}; a verb takes those it names."""
    return CORRUPTIONS[task](x, generator, **options)

# ==== 2. The energy ==================================================
# A plain Vision Transformer with timm's parameter names; only `head`, the read-out, is ours.
class Attention(nn.Module):
    """Multi-head self-attention by hand: fused kernels have no second derivative."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
    def forward(self, x):                                         # (B, N+1, D)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))   # (B, N+1, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                      # (B, h, N+1, D/h) each
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])    # (B, h, N+1, N+1)
        x = scores.softmax(3) @ v                                 # (B, h, N+1, D/h)
        return self.proj(x.transpose(1, 2).flatten(2))            # (B, N+1, D)

class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
    def forward(self, x):                                         # (B, N+1, D)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

def random_waves(side, dim):
    """Positions (1, side * side, D) of patches: D waves over the grid, each of random direction,
    frequency and phase. Near ones are alike, and attend to each other at once."""
    place = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))  # (N, 2)
    waves = 0.7 * place @ torch.randn(2, dim) + 2 * math.pi * torch.rand(dim)
    return 0.85 * waves.cos().unsqueeze(0)

class ReadOut(nn.Module):
    """The energy as a distance, E = 1/2 mean_n sum_d v_d (p_nd - z_nd)^2: how far each embedded
    patch p_n is from z_n, what one more block, having seen all tokens, expects in its place. So
    the block says directly which way patch n should go: dE/dp_n = v (p_n - z_n) / N plus what
    comes back through the layers. v, learned from 0, may have any sign."""
    def __init__(self, pos_embed, num_heads):
        super().__init__()
        dim = pos_embed.shape[2]
        self.pos_embed = nn.Parameter(pos_embed)
        self.block = Block(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.weight = nn.Parameter(torch.zeros(dim))              # v; at first no step moves
    def forward(self, p, tokens):   # embedded patches, and their tokens: (B, N, D) each
        z = self.norm(self.block(tokens + self.pos_embed))        # (B, N, D)
        distance = self.weight * (p - z).float().square()         # (B, N, D)
        return distance.sum(2).mean(1) / 2                        # Eq. (1): (B,)

class ViT(nn.Module):
    """Vision Transformer whose forward pass is the energy, Eq. (1): (B, 3, S, S) -> (B,).
    Hidden patches join late: only what is seen walks through the blocks, then the hidden patches
    join for the read-out. So what they need must stand in the features of the seen ones, which
    are the features that one wants. If they walked along they would read it on the way."""
    def __init__(self, image_size=32, patch_size=4, dim=96, depth=1, num_heads=3):
        super().__init__()
        side = image_size // patch_size
        self.patch_size, self.num_features = patch_size, dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))     # for timm; not read out
        waves = random_waves(side, dim)
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, 1, dim), waves], 1))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = ReadOut(waves, num_heads)                     # all above is timm's
    def embed(self, x):             # one linear map of each patch: (B, 3, S, S) -> (B, N, D)
        return self.patch_embed.proj(x).flatten(2).transpose(1, 2)
    def encode(self, patches, seen=None):
        """Features (B, M, D) of patches (B, N, D), or of those M alone that seen says."""
        x = patches + self.pos_embed[:, 1:]
        if seen is not None:
            x = x.gather(1, seen)                                 # (B, M, D)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1)         # (B, M+1, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]
    def represent(self, x):         # for a classifier: (B, 3, S, S) -> (B, D)
        return self.encode(self.embed(x)).mean(1)
    def find_hidden(self, x):       # which patches are all zeros: (B, 3, S, S) -> (B, N)
        return F.max_pool2d(x.detach().abs(), self.patch_size).amax(1).flatten(1) == 0
    def forward(self, x, num_hidden=None):
        """num_hidden: how many patches of each image are hidden. torch.compile must be told,
        else the images themselves show it, and may differ."""
        if num_hidden is None:
            numbers = self.find_hidden(x).sum(1)                  # (B,)
            energies = x.new_zeros(len(x))
            for n in numbers.unique().tolist():
                energies[numbers == n] = self(x[numbers == n], n)
            return energies
        p = self.embed(x)                                         # (B, N, D)
        if num_hidden == 0:
            return self.head(p, self.encode(p))
        # What is seen is given: dE/dx is zero there, and no inner gradient enters the blocks.
        given, hidden = self.embed(x.detach()), self.find_hidden(x)
        p = torch.where(hidden.unsqueeze(2), p, given)
        seen = hidden.int().argsort(dim=1, stable=True)[:, :hidden.shape[1] - num_hidden]   # (B, M)
        seen = seen.unsqueeze(2).expand(-1, -1, self.num_features)                      # (B, M, D)
        features = self.encode(given, seen)                       # (B, M, D)
        return self.head(p, p.to(features.dtype).scatter(1, seen, features))

class TorchvisionEnergy(nn.Module):
    """A torchvision network with the read-out as last layer: (B, 3, S, S) -> (B,).
    ValueError if its own last layer is not linear."""
    def __init__(self, name, image_size):
        super().__init__()
        options = {"image_size": image_size} if name.startswith("vit") else {}
        self.net = torchvision.models.get_model(name, weights=None, **options)
        path, last = list(self.net.named_modules())[-1]
        if not isinstance(last, nn.Linear):
            raise ValueError("this network does not end in a linear layer")
        self.net.set_submodule(path, nn.Identity())
        self.num_features = last.in_features
        self.head = nn.Linear(last.in_features, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        for module in self.net.modules():
            if hasattr(module, "inplace"):      # would overwrite what the second backward
                module.inplace = False          # pass still needs
    def represent(self, x):                     # (B, 3, S, S) -> (B, D)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):    # twice differentiable
            return self.net(x)
    def forward(self, x, num_hidden=None):      # knows no patches: all go one way
        # not self.head(...), which autocast would round to bfloat16
        return (self.represent(x) * self.head.weight).sum(1)

VIT_SIZES = {  # name: (width D, depth, heads h)
    "nano": (96, 1, 3), "mini": (96, 4, 3), "tiny": (192, 12, 3),
    "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

def build_model(name, image_size=32, patch_size=4):
    """An energy, (B, 3, S, S) -> (B,). It trains in evaluation mode, too: neither dropout nor
    the other images of a batch may change an image's energy."""
    model = (ViT(image_size, patch_size, *VIT_SIZES[name]) if name in VIT_SIZES else
             TorchvisionEnergy(name, image_size))
    return model.eval()

# ==== 3. Restoration and loss ========================================
# There are two backward passes. The first differentiates the energy by the image: dE/dx is
# the restoring step, so this pass is the decoder. The second differentiates the loss by the
# parameters, back through the first (d/dtheta of dE/dx), and trains the decoder.
def restore(energy_fn, x_tilde, alpha=1.0, num_steps=1, create_graph=False):
    """K = num_steps steps down the energy: x_1 ... x_K, (K, B, 3, S, S).
    energy_fn: any callable from (B, 3, S, S) to (B,), else ValueError; it must not mix images,
    so a network of yours must be in evaluation mode. Fused attention must run under
    torch.nn.attention's sdpa_kernel(SDPBackend.MATH). create_graph: for training."""
    def total_energy(x):
        energy = energy_fn(x)
        if energy.shape != x.shape[:1]:
            raise ValueError(f"an energy is of shape ({len(x)},), not {tuple(energy.shape)}")
        return energy.float().sum()     # its gradient is each image's own: none sees another
    # unlike torch.autograd.grad, this works in torch.compile and under torch.no_grad()
    gradient = torch.func.grad(total_energy)
    iterates = [x_tilde]
    with torch.set_grad_enabled(create_graph):
        for _ in range(num_steps):
            x = iterates[-1].detach()   # no gradient from a step to the one before it
            iterates.append(x - alpha * gradient(x))              # Eq. (2)
    return torch.stack(iterates[1:])

def restoration_loss(x_hat, x, x_tilde):
    """Eq. (3): the mean over images and steps of smooth_l1(x_k, x) / rms(x_tilde - x).
    The error is divided by how far the image was moved, at least 0.05 (ours); else tasks that
    move images far drown the others, and full corruptions the partial ones."""
    error = F.smooth_l1_loss(x_hat, x.expand_as(x_hat), reduction="none")
    moved = (x_tilde - x).square().flatten(1).mean(1).sqrt()      # (B,)
    return (error.flatten(2).mean(2) / moved.clamp(min=0.05)).mean()    # Eq. (3)

def order_loss(energy_fn, x, x_s, alpha):
    """Eq. (4) for images x_s between x and x_tilde. If all steps from there ended at x, dE/dx
    would be (x_s - x) / alpha, and E(x_s) - E(x) = |x_s - x|^2 / (2 alpha). r is the rise as
    a share of this ideal; real steps fall short, so a quarter is asked for."""
    ideal = (x_s - x).square().flatten(1).sum(1) / 2              # times alpha, (B,)
    above, below = energy_fn(torch.cat([x_s, x])).chunk(2)
    missing = F.relu(ideal / 4 - alpha * (above - below))
    return (missing / ideal.clamp(min=0.5)).mean()                # Eq. (4), not over zero

class Pretrainer(nn.Module):
    """Energy and loss in one module, as DistributedDataParallel needs. alpha is large because
    a ViT's E is a mean over patches; it is not learned, since the read-out's scale is."""
    def __init__(self, model, alpha=256.0, num_steps=1, order_weight=0.007):
        super().__init__()
        self.model, self.alpha = model, alpha
        self.num_steps, self.order_weight = num_steps, order_weight
    def forward(self, x, x_tilde, num_partial=0, num_masked=0, num_hidden=0):
        """The loss of images (B, 3, S, S). The first num_partial enter Eq. (4). The last
        num_masked have num_hidden hidden patches each; after a step they are whole, too."""
        def whole(y):
            return self.model(y, 0)
        def as_dealt(y):
            y, masked = y.split([len(y) - num_masked, num_masked])
            return torch.cat([whole(y), self.model(masked, num_hidden)])
        energy = as_dealt if num_masked else whole
        x_hat = restore(energy, x_tilde, self.alpha, 1, create_graph=True)
        if self.num_steps > 1:
            more = restore(whole, x_hat[0], self.alpha, self.num_steps - 1, create_graph=True)
            x_hat = torch.cat([x_hat, more])
        loss = restoration_loss(x_hat, x, x_tilde)
        if num_partial:
            x, x_s = x[:num_partial], x_tilde[:num_partial]
            loss = loss + self.order_weight * order_loss(whole, x, x_s, self.alpha)
        return loss

def corrupt_batch(x, tasks, generator, options, turn=0):
    """(x, x_tilde, num_partial, num_masked, num_hidden) for images x (B, 3, S, S), as Pretrainer
    takes them. Image i gets task turn + i, round and round. The first num_partial are corrupted
    only in part, mostly a little; else restoration would not learn to leave alone what is nearly
    clean. Of the others, masked images come last."""
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
    num_hidden = num_masked and count_hidden(
        x.shape[2], options["mask_ratio"], options["patch_size"])
    return x, x_tilde, num_partial, num_masked, num_hidden

def freeze_unused(pretrainer, x):
    """Freeze parameters that have no part in dE/dx, found by a dry run with images x. They
    get no gradient, for which DistributedDataParallel would wait in vain."""
    pretrainer(x, x / 2).backward()  # behind a zero read-out most gradients are 0, not None
    for p in pretrainer.parameters():
        p.requires_grad_(p.grad is not None)
    pretrainer.zero_grad()

# ==== 4. Processes and randomness ====================================
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

def print0(*values):
    if RANK == 0:
        print(*values, flush=True)

def seed_from(*key):
    """A seed from its use, as ("corrupt", 0, 17): a resumed run draws as an unbroken one."""
    return zlib.crc32(repr(key).encode())

def make_generator(device, *key):
    return torch.Generator(device).manual_seed(seed_from(*key))

def join_processes(name):
    """Join the other processes, if any, and return this one's device."""
    device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
    if name == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"--device {device}: not on this machine")
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if WORLD_SIZE > 1:  # a restarted worker must not read its predecessor's entries
        store, _, _ = next(dist.rendezvous("env://"))  # pytorch/pytorch#135712
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(store=store, rank=RANK, world_size=WORLD_SIZE,
                                backend="nccl" if name == "cuda" else "gloo")
    return device

def autocast(device):
    """bfloat16 on GPUs that compute in it; float16 would need a scaler for both passes."""
    on = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=on)

# ==== 5. Data ========================================================
def draw_landscapes(batch_size, size, generator):
    """Images (B, 3, S, S) and the kind of their objects (B,), 0 ... 3: sky at some time of
    day, furrowed ground, three objects whose colour follows from their shape."""
    B, device = batch_size, generator.device
    def uniform(low, high):
        return low + (high - low) * torch.rand(B, 1, 1, 1, generator=generator, device=device)
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
    for near in nearness.mul(0.85).add(0.15).view(B, 3, 1, 1, 1).unbind(1):  # far ones first
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
    """All images at or below root, (file, class) pairs. Each folder right in it is a class.
    Left out is what is hidden (. or @ first), has no image's ending, or is a run's picture."""
    files = [root, *sorted(glob.glob(f"{glob.escape(root)}/**", recursive=True))]
    images = [file for file in files
              if os.path.isfile(file) and torchvision.datasets.folder.is_image_file(file)
              and not re.search("/@|/restorations.png$", file[len(root):])]
    endings = " ".join(torchvision.datasets.folder.IMG_EXTENSIONS)
    print0(f"{root}: {len(images)} images ({endings})")
    if not images:
        raise UserError(f"--data {root}: no image there ({endings})")
    folders = [os.path.relpath(os.path.dirname(file), root).split(os.sep)[0] for file in images]
    classes = sorted(set(folders))
    return [(file, classes.index(folder)) for file, folder in zip(images, folders)]

class Crops(torch.utils.data.Dataset):
    """Crops of (file or PIL image, label) pairs: item (index, seed) -> uint8 (3, S, S), label.
    augment: crop and flip as the seed says, else take the middle. What cannot be used is
    named, and another drawn at random in its place."""
    def __init__(self, pairs, size, augment):
        self.pairs, self.size = pairs, size
        crop = ([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if augment else
                [v2.Resize(size), v2.CenterCrop(size)])
        self.crop = v2.Compose([*crop, v2.PILToTensor()])
    def __getitem__(self, key):
        index, seed = key
        torch.manual_seed(seed)  # torchvision draws from the global state
        for _ in range(100):
            source, label = self.pairs[index]
            try:
                image = Image.open(source) if isinstance(source, str) else source
                if image.mode[0] in "IF":  # 16 or 32 bits: white may be any number
                    raise ValueError("more than 8 bits a channel")
                image.draft("RGB", (3 * self.size,) * 2)  # decodes large JPEGs faster
                return self.crop(ImageOps.exif_transpose(image).convert("RGB")), label
            except Exception as error:  # Pillow raises anything
                print(f"warning: left out {source} ({error})", file=sys.stderr)
                index = int(torch.randint(len(self.pairs), ()))
        raise UserError(f"{source} cannot be used, nor 99 others drawn at random before it")

def open_data(args):
    """(File or image, label) pairs to train on, held-out ones (of a folder every tenth), and
    the number of classes. None instead of pairs: endless landscapes."""
    train, held_out, classes = None, None, 4
    generator = make_generator("cpu", "labels", args.seed)
    if args.data in ("cifar10", "cifar100"):
        dataset, classes = getattr(torchvision.datasets, args.data.upper()), int(args.data[5:])
        try:
            if RANK == 0:
                dataset("data", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {args.data}: cannot be downloaded to ./data ({error})")
        if WORLD_SIZE > 1:
            dist.barrier()  # until the files are there
        train, held_out = dataset("data", train=True), dataset("data", train=False)
    elif args.data != "procedural":
        pairs = find_images(args.data)
        train, held_out = [p for i, p in enumerate(pairs) if i % 10] or pairs, pairs[::10]
        classes = 1 + max(label for _, label in pairs)
    elif args.labels:
        drawn = draw_landscapes(args.labels, args.image_size, generator)
        train = [(v2.functional.to_pil_image(x / 2 + 0.5), int(k)) for x, k in zip(*drawn)]
    if args.labels:
        order = torch.randperm(len(train), generator=generator).tolist()
        labels, rank, seen = [label for _, label in train], {}, collections.Counter()
        for i in order:
            rank[i] = seen[labels[i]]
            seen[labels[i]] += 1
        order.sort(key=rank.get)  # the first of every class, then the second, and so on
        train = torch.utils.data.Subset(train, order[:args.labels])
    args.num_images = train and len(train)
    if args.epochs:
        args.max_steps = math.ceil(args.epochs * args.num_images / args.batch_size)
    return train, held_out, classes

def crop_keys(num_images, batch_size, steps, key, rank, world_size):
    """For every step this process's keys (index, seed) of Crops. Each epoch is a permutation,
    the epochs are one endless row, and step n takes batch n of it, from 0 on."""
    part, epoch = batch_size // world_size, None
    for step in steps:
        keys, first = [], step * batch_size + rank * part
        for i in range(first, first + part):
            if epoch != i // num_images:
                epoch = i // num_images
                generator = make_generator("cpu", *key, "epoch", epoch)
                order = torch.randperm(num_images, generator=generator).tolist()
            keys.append((order[i % num_images], seed_from(*key, "crop", i)))
        yield keys

def image_batches(args, pairs, device, batch_size, steps, use, rank=0, world_size=1):
    """Yield this process's images (B, 3, S, S) and labels (B,) for each step. use goes into
    the seed. Held-out images are cropped as those trained on, but not for a classifier."""
    if pairs is None:
        for step in steps:
            generator = make_generator(device, use, args.seed, step, rank)
            yield draw_landscapes(batch_size // world_size, args.image_size, generator)
        return
    middle = use == "held out" and (args.finetune or len(pairs) == 1)  # one's own picture, too
    crops = Crops(pairs, args.image_size, args.augment and not middle)
    keys = crop_keys(len(pairs), batch_size, steps, (use, args.seed), rank, world_size)
    for x, labels in torch.utils.data.DataLoader(
            crops, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda"):
        yield x.to(device, non_blocking=True) / 127.5 - 1, labels.to(device, non_blocking=True)

# ==== 6. Optimisers and schedule =====================================
class WithoutBfloat16(TorchFunctionMode):
    """torch's Muon computes in bfloat16. Most CPUs emulate it, some twenty times slower."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        emulated = function is torch.Tensor.bfloat16 and args[0].device.type == "cpu"
        return args[0].clone() if emulated else function(*args, **(kwargs or {}))

def build_optimizers(module, weight_decay):
    """[AdamW, Muon]. Muon (Jordan et al., 2024), for the matrices of attention and MLPs, turns
    momentum into roughly the nearest orthogonal matrix: all directions move equally far.
    AdamW alone needs several times the steps."""
    inner, others = [], []  # a convolutional network has no inner ones
    for name, p in module.named_parameters():
        is_inner = p.ndim == 2 and re.search("(attn|attention|mlp).*weight", name)
        (inner if is_inner else others).append(p)
    def spared(p):  # biases and norms; positions, class token and read-out, of shape (1, ...)
        return p.ndim < 2 or len(p) == 1
    groups = [{"params": [p for p in others if not spared(p)]},
              {"params": [p for p in others if spared(p)], "weight_decay": 0.0}]
    common = {"lr": 0.0, "weight_decay": weight_decay}
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), **common), torch.optim.Muon(
        [{"params": inner}], momentum=0.9, adjust_lr_fn="match_rms_adamw", **common)]

def update_parameters(args, optimizers, step):
    """Take step 1 ... max_steps, after loss.backward(), and return its learning rate: linear
    in the first twentieth, up to args.lr, then half a cosine to zero."""
    warmup = args.max_steps // 20
    done = (step - warmup) / (args.max_steps + 1 - warmup)
    rate = args.lr * (step / warmup if step < warmup else (1 + math.cos(math.pi * done)) / 2)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with WithoutBfloat16():
            optimizer.step()
    return rate

# ==== 7. Checkpoints =================================================
# Plain dicts of tensors, numbers and strings: loading one can run no code. Pretraining that was
# interrupted goes on if the same command is given again; only these flags may differ.
FREE = ("out", "compile", "workers", "device", "save_every", "lr")

def write_file(args, name, write):
    """Let write(file) fill OUT/name, whole or not at all."""
    path = os.path.join(args.out, name)
    try:
        os.makedirs(args.out, exist_ok=True)
        with open(path + ".unfinished", "wb") as file:
            write(file)
        os.replace(path + ".unfinished", path)
    except (OSError, RuntimeError) as error:  # the latter by torch.save
        raise UserError(f"{path}: cannot be written; is there room? ({error.__context__ or error})")

def load_checkpoint(path):
    """Read a checkpoint.pt. UserError if there is none, or it is damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not check the checksums
            raise ValueError("checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in ("pretrainer", "optimizers", "config", "log")}
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise UserError(f"{path}: missing, damaged, or no checkpoint of ours ({error!r:.60})")

def resume(args, pretrainer, optimizers):
    """Go on from OUT's checkpoint if there is one, and return its log."""
    path = f"{args.out}/checkpoint.pt"
    if not os.path.exists(path):
        return []
    saved = load_checkpoint(path)
    for name, value in vars(args).items():
        old = saved["config"].get(name)
        if name not in FREE and value != old:
            raise UserError(f"{path} has {name} {old}, not {value}: give another --out")
    pretrainer.load_state_dict(saved["pretrainer"])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    print0(f"going on after step {saved['log'][-1]['step']}")
    return saved["log"]

def save_checkpoint(args, pretrainer, optimizers, log):
    """Write log.jsonl, checkpoint.pt and backbone.pt, the network without its read-out."""
    backbone = getattr(pretrainer.model, "net", pretrainer.model).state_dict()
    if isinstance(pretrainer.model, ViT):
        backbone = {name: p for name, p in backbone.items() if not name.startswith("head.")}
    checkpoint = {"pretrainer": pretrainer.state_dict(), "config": vars(args), "log": log,
                  "optimizers": [o.state_dict() for o in optimizers]}
    lines = "".join(json.dumps(record) + "\n" for record in log)
    write_file(args, "log.jsonl", lambda file: file.write(lines.encode()))
    write_file(args, "backbone.pt", lambda file: torch.save(backbone, file))
    write_file(args, "checkpoint.pt", lambda file: torch.save(checkpoint, file))

# ==== 8. Evaluation ==================================================
def psnr(y, x):
    """Peak signal-to-noise ratio in dB of y against x, in [-1, 1], whose peak-to-peak is 2."""
    return 10 * math.log10(4 / max((y - x).square().mean().item(), 1e-12))

@torch.no_grad()
def evaluate(pretrainer, x, tasks, options, chunk=32):
    """Corrupt and restore images x (M, 3, S, S): {task: {metric: value}}, {task: iterates}.
    psnr_clean: of a clean image after a step. psnr_corrupted, and psnr_step_k after each
    restoration step: of all pixels, for mim of the hidden ones. order: share of images lower
    clean than corrupted; order_quarter: than a quarter corrupted; auroc: of all pairs."""
    model, metrics, iterates = pretrainer.model, {}, {}
    def energy(y):  # (M,)
        return torch.cat([model(part) for part in y.split(chunk)])
    def steps(y, num_steps=1):  # (K, M, 3, S, S)
        return torch.cat([restore(model, part, pretrainer.alpha, num_steps)
                          for part in y.split(chunk)], 1)
    clean, psnr_clean = energy(x), psnr(steps(x)[0], x)
    for task in tasks:
        x_tilde = corrupt(x, task, make_generator(x.device, "evaluate", task), options)
        corrupted, quarter = energy(x_tilde), energy(x.lerp(x_tilde, 0.25))
        iterates[task] = [x_tilde, *steps(x_tilde, pretrainer.num_steps)]
        counted = x_tilde != x if task == "mim" else torch.ones_like(x, dtype=torch.bool)
        values = [psnr(x_k[counted], x[counted]) for x_k in iterates[task]]
        metrics[task] = {
            "psnr_clean": psnr_clean, "psnr_corrupted": values[0],
            **{f"psnr_step_{k}": value for k, value in enumerate(values[1:], 1)},
            "energy_clean": clean.mean().item(), "energy_corrupted": corrupted.mean().item(),
            "order": (clean < corrupted).float().mean().item(),
            "order_quarter": (clean < quarter).float().mean().item(),
            "auroc": (clean[:, None] < corrupted).float().mean().item()}
    return metrics, iterates

def print_table(metrics):
    """A row for each metric of `evaluate`, a column for each task."""
    print("\n" + " " * 20 + "".join(f"{task:>9}" for task in metrics))
    for name in next(iter(metrics.values())):
        print(f"{name:<20}" + "".join(f"{row[name]:9.2f}" for row in metrics.values()))

def draw_picture(x, iterates):
    """Named rows of images: for each task the clean x (M, 3, S, S), and its iterates."""
    rows = []
    for task, (x_tilde, *x_hat) in iterates.items():
        rows += [(f"{task}: clean", x), ("corrupted", x_tilde)]
        rows += [(f"restored, step {k}", x_k) for k, x_k in enumerate(x_hat, 1)]
    tiles = torch.cat([row[:len(x)] for _, row in rows]).cpu().clamp(-1, 1) / 2 + 0.5
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // tiles.shape[3]))
    grid = torchvision.utils.make_grid(tiles, nrow=len(x), padding=4, pad_value=1.0)
    picture = ImageOps.expand(v2.functional.to_pil_image(grid), (120, 0, 0, 0), "white")
    for i, (name, _) in enumerate(rows):
        ImageDraw.Draw(picture).text((8, (i + 0.4) * (tiles.shape[2] + 4)), name, fill="black")
    return picture

# ==== 9. Pretraining =================================================
def build_pretrainer(args, pairs, device):
    """The energy in its Pretrainer, its weights drawn from the seed or read from args.weights."""
    x, _ = next(image_batches(args, pairs, device, 32, [0], "statistics"))
    torch.manual_seed(args.seed)
    try:
        model = build_model(args.model, args.image_size, args.patch_size).to(device)
        # batch norm becomes a fixed map of each image: the statistics of one batch, for good
        torch.optim.swa_utils.update_bn([x], model)
        pretrainer = Pretrainer(model, args.alpha, args.restore_steps, args.order_weight)
        freeze_unused(pretrainer, x[:2])
        if args.weights:
            pretrainer.load_state_dict(load_checkpoint(args.weights)["pretrainer"])
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # torchvision's, too
        reason = " ".join(str(error).split())[:200]
        weights = f", with the weights of {args.weights}" * bool(args.weights)
        raise UserError(f"--model {args.model} at {args.image_size} pixels{weights}: {reason}")
    print0(f"{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters; {args.data}; "
           f"{WORLD_SIZE} processes on {device}")
    return pretrainer

def wrap(args, pretrainer):
    """The module whose call is the loss of a step, compiled and distributed as asked for."""
    if args.compile:
        # else the graph is cut where DistributedDataParallel's buckets end, which may be in the
        # middle of the inner gradient
        torch._dynamo.config.optimize_ddp = False
        pretrainer.compile(fullgraph=True, dynamic=False)
    return pretrainer if WORLD_SIZE == 1 else nn.parallel.DistributedDataParallel(pretrainer)

def train(args, pretrainer, pairs, device):
    """Take the steps that OUT's checkpoint has not taken yet, and save on the way."""
    optimizers = build_optimizers(pretrainer, args.weight_decay)
    log = resume(args, pretrainer, optimizers)
    last, start, losses = log[-1]["step"] if log else 0, time.time(), []
    if WORLD_SIZE > 1:
        began = [None] * WORLD_SIZE
        dist.all_gather_object(began, last)
        if len(set(began)) > 1:
            raise UserError(f"processes go on after steps {began}: all machines must share --out")
    module = wrap(args, pretrainer)
    steps, tasks = range(last, args.max_steps), args.task.split(",")
    batches = image_batches(args, pairs, device, args.batch_size, steps, "train", RANK, WORLD_SIZE)
    for step, (x, _) in enumerate(batches, last + 1):
        generator = make_generator(device, "corrupt", args.seed, step, RANK)
        batch = corrupt_batch(x, tasks, generator, vars(args), step + RANK * len(x))
        with autocast(device):
            loss = module(*batch)  # Eq. (3) and (4)
        pretrainer.zero_grad()
        loss.backward()  # back through dE/dx; DistributedDataParallel averages
        norm = nn.utils.clip_grad_norm_(pretrainer.parameters(), max_norm=1.0)
        rate = update_parameters(args, optimizers, step)
        save = step % args.save_every == 0 or step == args.max_steps
        losses.append(loss.detach())
        if save or step % 50 == 0 or step == 1:
            mean = torch.stack(losses).mean().item()  # since the last record
            if not math.isfinite(mean + norm.item()):
                raise UserError(f"step {step}: loss {mean}; not saved; lower --lr")
            speed, last, start = (step - last) / (time.time() - start), step, time.time()
            losses.clear()
            log.append({"step": step, "loss": mean, "gradient_norm": norm.item(),
                        "lr": rate, "images_per_second": args.batch_size * speed})
            print0(*(f"{name} {value:<9.4g}" for name, value in log[-1].items()),
                   f"{(args.max_steps - step) / speed / 60:.1f} minutes left")
        if save and RANK == 0:
            save_checkpoint(args, pretrainer, optimizers, log)

def pretrain(args, device):
    """Train, unless --evaluate, then measure on held-out images: {task: {metric: value}}."""
    pairs, held_out, _ = open_data(args)
    pretrainer = build_pretrainer(args, pairs, device)
    if not args.evaluate:
        train(args, pretrainer, pairs, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if RANK > 0:
        return {}
    count = min(args.eval_images, len(held_out or range(args.eval_images)))
    print(f"evaluating on {count} images", flush=True)
    x, _ = next(image_batches(args, held_out, device, count, [0], "held out"))
    with autocast(device):
        metrics, iterates = evaluate(pretrainer, x, args.task.split(","), vars(args))
    print_table(metrics)
    write_file(args, "metrics.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    write_file(args, "restorations.png", lambda f: draw_picture(x[:8], iterates).save(f, "png"))
    return metrics

# ==== 10. Use of the weights =========================================
# Did pretraining pay? Compare a classifier from a checkpoint with one from scratch.
@torch.no_grad()
def run_over(model, args, pairs, device, count):
    """The model's outputs (count, ...) of the first images, cropped in the middle, and labels."""
    batches = image_batches(args, pairs, device, 32, range(math.ceil(count / 32)), "held out")
    with autocast(device):
        outputs, labels = zip(*[(model(x), labels) for x, labels in batches])
    return torch.cat(outputs)[:count].float(), torch.cat(labels)[:count]

def fit_probe(classifier, features, labels):
    """Logistic regression on fixed features (M, D). L-BFGS needs no learning rate."""
    _, norm, linear = classifier
    norm.momentum = 1.0  # keep the statistics of this one batch of all images
    features = norm(features)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear(features), labels) + 1e-3 * linear.weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)

def finetune(args, device):
    """Train a classifier on a checkpoint's network, or on a new one: {"accuracy": share}."""
    pairs, held_out, num_classes = open_data(args)
    if num_classes < 2:
        raise UserError(f"--data {args.data}: --finetune needs a folder for each of its classes")
    model = build_pretrainer(args, pairs, device).model.requires_grad_(not args.freeze)
    model.forward = model.represent  # the energy has no part
    norm = nn.BatchNorm1d(model.num_features, affine=False)  # one learning rate fits all networks
    linear = nn.Linear(model.num_features, num_classes)
    classifier = nn.Sequential(model, norm, linear).to(device)
    if args.freeze:
        count = len(pairs or range(5000))
        fit_probe(classifier, *run_over(model, args, pairs, device, count))
    else:
        train_classifier(args, classifier, pairs, device)
    classifier.eval()  # the norm's running statistics, not a batch's
    count = min(args.eval_images, len(held_out or range(args.eval_images)))
    scores, labels = run_over(classifier, args, held_out, device, count)
    metrics = {"accuracy": (scores.argmax(1) == labels).float().mean().item()}
    print(f"{metrics['accuracy']:.1%} of {count} held-out images are classified right")
    write_file(args, "classifier.pt", lambda file: torch.save(classifier.state_dict(), file))
    write_file(args, "metrics.json", lambda file: file.write(json.dumps(metrics).encode()))
    return metrics

def train_classifier(args, classifier, pairs, device):
    optimizers = build_optimizers(classifier, args.weight_decay)
    batches = image_batches(args, pairs, device, args.batch_size, range(args.max_steps), "train")
    for step, (x, labels) in enumerate(batches, 1):
        with autocast(device):
            loss = F.cross_entropy(classifier(x), labels)
        classifier.zero_grad()
        loss.backward()
        update_parameters(args, optimizers, step)
        if step % 50 == 0 or step in (1, args.max_steps):
            if not math.isfinite(loss.item()):
                raise UserError(f"step {step}: loss {loss.item()}; lower --lr")
            print(f"step {step}/{args.max_steps}  loss {loss.item():.4f}", flush=True)

# ==== 11. Command line ===============================================
CPU = {"model": "nano", "image_size": 32, "batch_size": 32, "lr": 8.5e-3,
       "max_steps": 1500, "epochs": None, "save_every": 100, "compile": False}
GPU = {"model": "small", "image_size": 224, "batch_size": 128 * WORLD_SIZE, "lr": 1.5e-3,
       "max_steps": 2000, "epochs": 100, "save_every": 500, "compile": True}
FINETUNE = {"lr": 2e-3, "max_steps": 600, "epochs": None, "eval_images": 5000}
NETWORK = ("model", "image_size", "patch_size", "alpha", "data", "augment")  # go with weights

def build_parser():
    parser, switch = argparse.ArgumentParser(), argparse.BooleanOptionalAction
    parser.epilog = f"Defaults on a CPU: {CPU}; on GPUs, epochs with --data only: {GPU}."
    group = parser.add_argument_group("what to do")
    add, one = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--task", default="all", help=f"{', '.join(TASKS)}, a comma list, or all")
    one("--evaluate", action="store_true", help="train nothing: table and picture of --out")
    one("--init", metavar="FILE", help="begin with the weights of this checkpoint.pt")
    one("--finetune", metavar="FILE", help="train a classifier: a checkpoint.pt, or scratch")
    add("--freeze", action="store_true", help="--finetune only a linear probe")
    add("--out", help="folder; default: runs/TASK, runs/finetune or runs/scratch")
    add("--device", choices=["cpu", "cuda"], help="default: cuda, if there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="procedural", help="folder, image file, cifar10 or cifar100",
        type=lambda name: os.path.realpath(name) if os.path.exists(name) else name)
    add("--labels", type=int, help="train on so many images only")
    add("--image-size", type=int, help="side in pixels")
    add("--augment", action=switch, default=True, help="random crops and flips")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="decoders per process")
    add = parser.add_argument_group("energy, loss and corruptions").add_argument
    add("--model", help=f"{', '.join(VIT_SIZES)}, or torchvision's, as resnet18")
    add("--patch-size", type=int, help="of a ViT; default: 4 below 128 pixels, else 16")
    add("--restore-steps", type=int, default=1, help="K, steps down the energy")
    add("--alpha", type=float, default=256.0, help="restoration's step size")
    add("--order-weight", type=float, default=0.007, help="w in Eq. (4)")
    add("--partial-share", type=float, default=0.05, help="of a process's images, corrupted in part")
    add("--mask-ratio", type=float, default=0.6, help="mim: share of hidden patches")
    add("--sort-grid", type=int, help="sort: pieces a side; default: 7 or fewer, whole patches")
    add("--sr-factor", type=int, default=4, help="sr: how many times smaller")
    add("--noise-std", type=float, default=0.5, help="denoise: pixels in [-1, 1]")
    add = parser.add_argument_group("training").add_argument
    add("--max-steps", type=int, help="optimiser steps")
    add("--epochs", type=float, help="over --data, instead of --max-steps")
    add("--batch-size", type=int, help="images a step, of all processes")
    add("--lr", type=float, help="peak learning rate; default for convolutions: a tenth")
    add("--weight-decay", type=float, default=0.05, help="not of biases and norms")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--eval-images", type=int, help="default: up to 256, fewer after a short run")
    add("--compile", action=switch, help="torch.compile the loss")
    return parser

def parse_args(argv):
    """What was typed, over a checkpoint's configuration (all of it for --evaluate, the network
    and its data for --init and --finetune), over the defaults for the device."""
    parser = build_parser()
    def refuse(message):
        raise UserError(f"{message}; see --help")
    parser.error = refuse
    typed = parser.parse_args(argv)  # it decides on the defaults: parse again
    name = {None: typed.task, "scratch": "scratch"}.get(typed.finetune, "finetune")
    parser.set_defaults(out=f"runs/{name}", **(GPU if typed.device == "cuda" else CPU))
    parser.set_defaults(**(FINETUNE if typed.finetune else {}))
    args = parser.parse_args(argv)
    weights = args.init or {"scratch": None}.get(args.finetune, args.finetune)
    weights = f"{args.out}/checkpoint.pt" if args.evaluate else weights
    if weights:
        saved = load_checkpoint(weights)["config"]
        parser.set_defaults(**{name: saved[name] for name in saved if
                               name in NETWORK or args.evaluate and name not in FREE})
        args = parser.parse_args(argv)
    args.weights = weights
    if typed.max_steps or typed.epochs:  # either one replaces both defaults
        args.max_steps, args.epochs = typed.max_steps, typed.epochs
    elif args.data == "procedural":
        args.epochs = None  # landscapes have no end
    if typed.lr is None and not args.model.startswith((*VIT_SIZES, "vit", "swin")):
        args.lr /= 10  # convolutions train by AdamW alone, too fast at Muon's rate
    args.task = ",".join(TASKS) if args.task == "all" else args.task
    args.patch_size = args.patch_size or (4 if args.image_size < 128 else 16)
    patches = args.image_size // args.patch_size
    grids = [n for n in range(1, 9) if patches % n == 0]  # of whole patches
    args.sort_grid = args.sort_grid or max(n for n in grids if n < 8)
    if not args.eval_images:  # at most a tenth of the run's time
        args.eval_images = min(256, 8 + (args.max_steps or 2**20) * args.batch_size // 100)
    check_args(args)
    return args

def check_args(args):
    """UserError at the first value that makes no sense."""
    def check(name, holds, expected):
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: {expected}")
    zero_too = "weight_decay workers seed order_weight partial_share".split()
    for name, value in vars(args).items():
        check(name, value != "", "is empty")
        if type(value) in (int, float):
            check(name, 0 < value < 2**32 or value == 0 and name in zero_too, "out of range")
    check("model", args.model in (*VIT_SIZES, *torchvision.models.list_models(torchvision.models)),
          f"choose from {', '.join(VIT_SIZES)}, or a classifier of torchvision")
    tasks = set() if args.finetune else set(args.task.split(","))
    check("task", tasks <= set(TASKS), f"choose from {', '.join(TASKS)}, or all")
    for name, used in (("patch_size", args.model in VIT_SIZES), ("patch_size", "mim" in tasks),
                       ("sort_grid", "sort" in tasks), ("sr_factor", "sr" in tasks)):
        check(name, not used or 1 < getattr(args, name) and
              args.image_size % getattr(args, name) == 0, "must be above 1 and divide --image-size")
    check("mask_ratio", "mim" not in tasks or 0 < count_hidden(
          args.image_size, args.mask_ratio, args.patch_size) < (args.image_size // args.patch_size)**2, "hides no patch or all")
    check("partial_share", args.partial_share < 1, "must be below 1")
    check("epochs", args.data != "procedural" or not args.epochs, "is for --data")
    check("freeze", args.finetune or not args.freeze, "is for --finetune")
    check("finetune", WORLD_SIZE == 1 or not args.finetune, "takes one process")
    check("batch_size", args.batch_size > 1 or not args.finetune, "--finetune needs two or more")
    check("batch_size", args.batch_size % WORLD_SIZE == 0 or args.evaluate,
          f"must be a multiple of the {WORLD_SIZE} processes")

def main(argv=None):
    """Return, on the first process, {task: {metric: value}}, or after --finetune {"accuracy":
    share}. A mistake of the user's is one line and SystemExit(2)."""
    try:
        args = parse_args(argv)
        return (finetune if args.finetune else pretrain)(args, join_processes(args.device))
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # a worker's comes behind its traceback
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory; a smaller --batch-size, --image-size or --model would fit"
    except torch._dynamo.exc.TorchDynamoException as error:
        message = f"--compile fails ({type(error).__name__}); --no-compile does without"
    sys.stderr.write(f"energy_pretrain.py: error: {' '.join(message.split())}\n")
    sys.exit(2)

if __name__ == "__main__":
    main()
