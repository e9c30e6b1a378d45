"""Energy-inspired self-supervised pretraining for vision models, in one file.

One vision network is an energy: its forward pass gives one number per image, low for
data. Its backward pass restores: a corrupted image steps down the energy, to where the
network expects the clean one.

    E(x)                              one number per image: the forward pass         (1)
    x_{k+1} = x_k - alpha dE/dx(x_k)  the backward pass: K steps from x_tilde        (2)
    loss = mean_k d(x_k, x)           every step should end at the clean image x     (3)

This is the paper's (Wang, Wang, Liu, Qiu: Energy-Inspired Self-Supervised Pretraining
for Vision Models, ICLR 2023). We had its abstract and introduction; what they leave
open is ours: d, partial corruptions, the network behind E and when patches join it, the
optimiser, and every number.

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
import json
import math
import os
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
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms import v2

class UserError(Exception):
    """A mistake of the user's: one line, exit status 2."""

# ==== 1. Restoration and loss =========================================
# There are two backward passes. The first differentiates the energy by the image:
# dE/dx is the restoring step, so this pass is the decoder. The second differentiates
# the loss by the parameters, back through the first, and trains the decoder.

def restore(energy_fn, x_tilde, alpha, num_steps=1, create_graph=False):
    """K = num_steps steps down the energy from x_tilde: x_1 ... x_K, (K, B, 3, S, S).

    energy_fn: any callable from (B, 3, S, S) to (B,), else ValueError. It must not mix
    images, so a network of yours must be in evaluation mode. create_graph: for training
    (fused attention then needs torch's sdpa_kernel(SDPBackend.MATH)).
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
            x = iterates[-1].detach()  # each step learns alone: the graph stays small
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

# ==== 2. Corruptions ==================================================
# Five verbs: images (B, 3, S, S), a generator and **options (the flags, of which each
# takes its own) give new images. A sixth task is one more, and its name in CORRUPTIONS.

def count_hidden(image_size, mask_ratio, patch_size):
    """How many patches of an image `hide_patches` hides."""
    return round(mask_ratio * (image_size // patch_size)**2)

def hide_patches(x, generator, mask_ratio, patch_size, **_):
    """Masked image modelling: hide a share of the patches.

    A hidden patch is one of zeros, and no other is: 8-bit pixels in [-1, 1] are odd
    multiples of 1/255, and a drawn patch is never zero all over.
    """
    side = x.shape[2] // patch_size
    num_hidden = count_hidden(x.shape[2], mask_ratio, patch_size)
    order = torch.rand(len(x), side**2, generator=generator, device=x.device).argsort(1)
    mask = (order < num_hidden).view(-1, 1, side, side).float()
    mask = F.interpolate(mask, scale_factor=patch_size)  # (B, 1, S, S)
    return x.masked_fill(mask.bool(), 0)

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

def corrupt_batch(x, tasks, generator, options, turn):
    """What Pretrainer takes: (x, x_tilde, num_masked, num_hidden).

    Image i of x (B, 3, S, S) gets task turn + i, round and round. The first ones, a
    partial_share, are corrupted only in part, by u^2, mostly a little; else a step
    spoils nearly clean images. (In mim alone they spoil the features.) The others are
    sorted: masked ones, num_masked of num_hidden hidden patches each, come last.
    """
    num_partial = min(math.ceil(options["partial_share"] * len(x)), len(x) - 1)
    dealt = [tasks[(turn + i) % len(tasks)] for i in range(len(x))]
    order = sorted(range(len(x)), key=lambda i: i >= num_partial and dealt[i] == "mim")
    x, dealt = x[order], [dealt[i] for i in order]
    x_tilde = torch.empty_like(x)
    for task in tasks:
        places = [i for i, other in enumerate(dealt) if other == task]
        if places:
            x_tilde[places] = CORRUPTIONS[task](x[places], generator, **options)

    u = torch.rand(num_partial, 1, 1, 1, generator=generator, device=x.device)
    x_tilde[:num_partial] = x[:num_partial].lerp(x_tilde[:num_partial], u**2)
    num_hidden = count_hidden(x.shape[2], options["mask_ratio"], options["patch_size"])
    return x, x_tilde, dealt[num_partial:].count("mim"), num_hidden

# ==== 3. The energy ===================================================
# A network of your own needs ViT's `forward`; backbone.pt leaves out what is called
# head.*. Freeze what has no part in dE/dx, since DistributedDataParallel fails where a
# gradient is missing.

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
    v (p_n - z_n) / N plus what comes back through the layers. v may have any sign, so
    only differences of E mean anything.
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
        """Features (B, D) of images, for other uses."""
        return self.encode(self.embed(x)).mean(1)

    def find_hidden(self, x):
        """Which patches are zeros: (B, 3, S, S) -> (B, N)."""
        largest = F.max_pool2d(x.detach().abs(), self.patch_size).amax(1)
        return largest.flatten(1) == 0

    def forward(self, x, num_hidden=None):
        """num_hidden: how many patches of each image are hidden. torch.compile must be
        told. Else the images show it, and each may have its own."""
        if num_hidden is None:
            numbers = self.find_hidden(x).sum(1)  # (B,)
            energies = x.new_zeros(len(x))
            for n in numbers.unique().tolist():
                energies[numbers == n] = self(x[numbers == n], n)
            return energies
        p = self.embed(x)  # (B, N, D)
        if num_hidden == 0:
            return self.head(p, self.encode(p))

        # What is seen is given: dE/dx is 0 there, no inner gradient enters self.blocks.
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
    def __init__(self, model, alpha, num_steps=1):
        super().__init__()
        self.model = model
        self.alpha = alpha
        self.num_steps = num_steps

    def forward(self, x, x_tilde, num_masked=0, num_hidden=0):
        """The loss of images (B, 3, S, S). The last num_masked have num_hidden hidden
        patches each; after a step they are whole, too."""
        def whole(y):  # told what is hidden: torch.compile cannot look
            return self.model(y, 0)

        def as_dealt(y):
            parts = zip(y.split([len(y) - num_masked, num_masked]), (0, num_hidden))
            return torch.cat([self.model(part, n) for part, n in parts if len(part)])

        x_hat = restore(as_dealt, x_tilde, self.alpha, create_graph=True)
        for _ in range(self.num_steps - 1):
            x_k = restore(whole, x_hat[-1], self.alpha, create_graph=True)
            x_hat = torch.cat([x_hat, x_k])
        return restoration_loss(x_hat, x, x_tilde)

VIT_SIZES = {  # name: (width D, depth, heads h)
    "nano": (96, 1, 3), "mini": (96, 4, 3), "tiny": (192, 12, 3),
    "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}

def build_model(name, image_size, patch_size):
    """An energy by its name in VIT_SIZES. A network of yours would be made here."""
    return ViT(image_size, patch_size, *VIT_SIZES[name])

# ==== 4. Processes and randomness =====================================
# A launcher says in the environment who is who; less than all of it is a leftover.

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
    """A seed from its use, as ("corrupt", 0, 17), so resumed runs draw the same."""
    return zlib.crc32(repr(key).encode())

def make_generator(device, *key):
    return torch.Generator(device).manual_seed(seed_from(*key))

def choose_device(name):
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
    """Join the other processes; False if there are none, or the caller has done it."""
    if WORLD_SIZE == 1 or dist.is_initialized():
        return False
    # All groups share one store. Names keep each from reading what an earlier group,
    # or a process that died, left there (pytorch issue 135712).
    GROUPS.append(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')}-{len(GROUPS)}")
    store, _, _ = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=RANK, world_size=WORLD_SIZE,
        store=dist.PrefixStore(GROUPS[-1], store))
    return True

def autocast(device):
    """bfloat16 on GPUs that compute in it; float16 would need scaling, twice."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

# ==== 5. Data =========================================================

def draw_landscapes(batch_size, size, generator):
    """Images (B, 3, S, S): sky at some time of day, furrowed ground, and three balls,
    far ones blue, near ones red."""
    device = generator.device

    def uniform(low, high):
        u = torch.rand(batch_size, 1, 1, 1, generator=generator, device=device)
        return low + (high - low) * u

    def mix(share, first, second):  # two colours, red, green and blue in [0, 1]
        first, second = torch.tensor([first, second], device=device).view(2, 1, 3, 1, 1)
        return torch.lerp(first, second, share)

    u = torch.linspace(0, 1, size, device=device).view(1, 1, 1, size)  # to the right
    v = u.transpose(2, 3)  # downwards
    wave = torch.sin(2 * math.pi * (uniform(0.5, 1.5) * u + uniform(0, 1)))
    horizon = uniform(0.3, 0.6) + uniform(0.02, 0.08) * wave  # (B, 1, 1, S)
    evening = uniform(0, 1)
    zenith = mix(evening, (0.25, 0.45, 0.85), (0.25, 0.15, 0.4))
    haze = mix(evening, (0.75, 0.88, 0.97), (0.98, 0.6, 0.3))
    sky = torch.lerp(zenith, haze, (v / horizon).clamp(0, 1))  # (B, 3, S, S)
    below = (v - horizon).clamp(min=0)  # (B, 1, S, S)
    furrows = torch.sin(uniform(6, 14) * torch.log(below + 0.05) + uniform(-4, 4) * u)
    soil = mix(uniform(0, 1), (0.2, 0.5, 0.2), (0.6, 0.5, 0.25))
    ground = soil * (0.75 + 0.5 * below + 0.15 * furrows) * (1.1 - 0.4 * evening)
    x = torch.lerp(sky, ground, ((v - horizon) * size + 0.5).clamp(0, 1))

    nearness = torch.cat([uniform(0.15, 1) for _ in range(3)], 1).sort(1).values
    for near in nearness.split(1, 1):  # far ones first
        radius = 0.06 + 0.12 * near  # near: large, low
        du = (u - uniform(0, 1)) / radius  # (B, 1, 1, S)
        dv = (v - horizon - near * (0.9 - horizon)) / radius + 1  # (B, 1, S, S)
        inside = 1 - (du**2 + dv**2).sqrt()
        shade = (0.75 - 0.35 * du - 0.15 * dv).clamp(0.25, 1.2)  # lit from the left
        ball = shade * mix(near, (0.25, 0.4, 1.0), (1.0, 0.3, 0.1))
        x = torch.lerp(x, ball, (inside * radius * size + 0.5).clamp(0, 1))
    return x.clamp(0, 1) * 2 - 1

def find_images(root):
    """The image files below root, each once, or root itself. Left out: what is hidden,
    @eaDir, a run's picture, what has no image's ending."""
    if os.path.isfile(root):
        return [root]
    found, entered = {}, set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in entered:  # by a link, perhaps from below
            subfolders.clear()
        entered.add(os.path.realpath(folder))
        subfolders[:] = sorted(n for n in subfolders if n[0] != "." and n != "@eaDir")
        for name in sorted(names):
            if is_image_file(name) and name[0] != "." and name != "restorations.png":
                file = os.path.join(folder, name)
                found.setdefault(os.path.realpath(file), file)
    endings = " ".join(IMG_EXTENSIONS)
    if not found:
        raise UserError(f"--data {root}: no image there ({endings})")
    print0(f"{root}: {len(found)} images ({endings})")
    return list(found.values())

class Crops(torch.utils.data.Dataset):
    """Crops of files or arrays (H, W, 3): item (index, seed) is (3, S, S) in uint8.

    augment: crop and flip as the seed says, else take the middle. What cannot be used
    is named, and another drawn at random in its place.
    """
    def __init__(self, images, size, augment):
        self.images, self.size = images, size
        crop = [v2.Resize(size), v2.CenterCrop(size)]
        if augment:
            crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self.crop = v2.Compose([*crop, v2.PILToTensor()])

    def decode(self, source):
        if not isinstance(source, str):
            return Image.fromarray(source)
        image = Image.open(source)
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
            source = self.images[index]
            try:
                return self.crop(self.decode(source))
            except Exception as error:  # Pillow raises anything
                print(f"warning: left out {source} ({error})", file=sys.stderr)
                index = int(torch.randint(len(self.images), ()))
        raise UserError(f"{source} cannot be used, nor 99 others drawn before it")

def open_data(args):
    """Training images, held-out ones (None: endless landscapes), and a text that tells
    them from others, wherever they lie. Of a folder, val/ or test/ beside train/ is
    held out, else every tenth image."""
    if args.data == "procedural":
        return None, None, args.data
    if args.data == "cifar10":
        cifar = torchvision.datasets.CIFAR10
        try:
            if RANK == 0:
                cifar("data", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data cifar10: cannot be downloaded to ./data ({error})")
        if WORLD_SIZE > 1:
            dist.barrier()  # until the files are there
        return cifar("data").data, cifar("data", train=False).data, args.data

    parts = [os.path.join(args.data, part) for part in ("train", "val", "test")]
    parts = [part for part in parts if os.path.isdir(part)]
    if len(parts) > 1 and parts[0].endswith("train"):
        train, held_out = find_images(parts[0]), find_images(parts[1])
    else:
        found = find_images(args.data)
        train = [file for i, file in enumerate(found) if i % 10] or found
        held_out = found[::10]
    root = args.data if os.path.isdir(args.data) else os.path.join(args.data, "..")
    names = [os.path.relpath(file, root) for file in train + held_out]
    return train, held_out, f"{len(names)} files, names hash to {seed_from(*names):x}"

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

def image_batches(args, images, device, batch_size, steps, purpose, rank=0, world=1):
    """Yield this process's images (B, 3, S, S) for each step. purpose is part of the
    seed. Held-out images are cropped at random; a single one in the middle."""
    if images is None:
        for step in steps:
            generator = make_generator(device, purpose, args.seed, step, rank)
            yield draw_landscapes(batch_size // world, args.image_size, generator)
        return
    crops = Crops(images, args.image_size, args.augment and len(images) > 1)
    keys = crop_keys(len(images), batch_size, steps, (purpose, args.seed), rank, world)
    for x in torch.utils.data.DataLoader(
            crops, batch_sampler=keys, num_workers=args.workers,
            pin_memory=device.type == "cuda"):
        yield x.to(device, non_blocking=True) / 127.5 - 1

# ==== 6. Optimisers and schedule ======================================

class WithoutBfloat16(TorchFunctionMode):
    """torch's Muon computes in bfloat16, which most CPUs must emulate."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()
        return function(*args, **(kwargs or {}))

def build_optimizers(module, weight_decay):
    """[AdamW, Muon], Muon (Jordan et al., 2024) for the matrices of attention and MLPs.
    It turns momentum into roughly the nearest orthogonal matrix, so all directions move
    equally far."""
    inner, decaying, others = [], [], []
    for name, p in module.named_parameters():
        if p.ndim == 2 and ("attn" in name or "mlp" in name):
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
    """Take step 1 ... max_steps and return its learning rate: linear in the first
    twentieth, up to args.lr, then half a cosine to zero."""
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

# ==== 7. Checkpoints ==================================================
# Plain dicts of tensors, numbers and strings: loading one can run no code. The same
# command, given again, goes on from its checkpoint. These flags may differ (that the
# images are the same shows in their names); for --evaluate all but the network's.
MAY_DIFFER = ("out", "data", "device", "workers", "compile", "lr", "save_every",
              "eval_images")

def write_file(args, name, write):
    """Let write(file) fill OUT/name, whole or not at all."""
    path = os.path.join(args.out, name)
    try:
        os.makedirs(args.out, exist_ok=True)
        with open(path + ".unfinished", "wb") as file:
            write(file)
        os.replace(path + ".unfinished", path)
    except (OSError, RuntimeError) as error:  # the latter by torch.save
        error = error.__context__ or error
        raise UserError(f"{path}: cannot be written; is there room? ({error})")

def load_checkpoint(path):
    """Read a checkpoint.pt. UserError if there is none, or it is damaged."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not check the checksums
            raise ValueError("checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("model", "config", "optimizers", "log")}
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise UserError(f"{path}: missing, damaged, or no checkpoint of ours "
                        f"({error!r:.60})")

def load_energy(path):
    """The trained energy of a checkpoint.pt, (B, 3, S, S) -> (B,), low for data.
    `restore` takes it, with the alpha of its training."""
    saved = load_checkpoint(path)
    config = saved["config"]
    energy = build_model(config["model"], config["image_size"], config["patch_size"])
    energy.load_state_dict(saved["model"])
    return energy.requires_grad_(False)

def resume(args, model, optimizers):
    """Go on from OUT's checkpoint, if it took a step, and return its log."""
    path, log = os.path.join(args.out, "checkpoint.pt"), []
    if os.path.exists(path):
        saved = load_checkpoint(path)
        log = saved["log"]
    if log:
        for name, value in vars(args).items():
            fixed = name not in MAY_DIFFER
            if args.evaluate:
                fixed = name in ("model", "image_size", "patch_size")
            old = saved["config"].get(name)
            if fixed and value != old:
                raise UserError(f"{path} has {name} {old}, not {value}: another --out?")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        print0(f"{path}: step {log[-1]['step']}")
    if WORLD_SIZE > 1:
        records = [None] * WORLD_SIZE
        dist.all_gather_object(records, len(log))
        if len(set(records)) > 1:
            raise UserError("processes find different checkpoints: is --out shared?")
    return log

def save_checkpoint(args, model, optimizers, log):
    """Write log.jsonl, backbone.pt, which other programs load, and checkpoint.pt."""
    backbone = {name: p.cpu() for name, p in model.state_dict().items()
                if not name.startswith("head.")}
    checkpoint = {"model": model.state_dict(), "config": vars(args), "log": log,
                  "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    lines = "".join(json.dumps(record) + "\n" for record in log)
    write_file(args, "log.jsonl", lambda file: file.write(lines.encode()))
    write_file(args, "backbone.pt", lambda file: torch.save(backbone, file))
    write_file(args, "checkpoint.pt", lambda file: torch.save(checkpoint, file))

# ==== 8. Evaluation ===================================================

def psnr(y, x):
    """Peak signal-to-noise ratio of y against x, in dB; pixels have a range of 2."""
    return 10 * math.log10(4 / max((y - x).square().mean().item(), 1e-12))

@torch.no_grad()
def evaluate(pretrainer, x, tasks, options, chunk=32):
    """{task: {metric: value}}, {task: iterates} of images x (M, 3, S, S).

    psnr_clean: of a clean image after a step. psnr_corrupted, psnr_step_k after step k:
    of the pixels that the task changes. order: share of images lower clean than
    corrupted; order_quarter: than a quarter corrupted.
    """
    def energy(y):  # (M,)
        return torch.cat([pretrainer.model(part) for part in y.split(chunk)])

    def steps(y, num_steps):  # (K, M, 3, S, S)
        return torch.cat([restore(pretrainer.model, part, pretrainer.alpha, num_steps)
                          for part in y.split(chunk)], 1)

    metrics, iterates = {}, {}
    energy_clean, psnr_clean = energy(x), psnr(steps(x, 1)[0], x)
    for task in tasks:
        generator = make_generator(x.device, "evaluate", task)
        x_tilde = CORRUPTIONS[task](x, generator, **options)
        changed = (x_tilde - x).abs() > 1e-3
        if not changed.any():
            print(f"{task} changes nothing in these images")
            changed = ~changed
        iterates[task] = [x_tilde, *steps(x_tilde, pretrainer.num_steps)]
        psnrs = [psnr(x_k[changed], x[changed]) for x_k in iterates[task]]
        energy_corrupted = energy(x_tilde)
        energy_quarter = energy(x.lerp(x_tilde, 0.25))
        metrics[task] = {
            "psnr_clean": psnr_clean, "psnr_corrupted": psnrs[0],
            **{f"psnr_step_{k}": psnrs[k] for k in range(1, len(psnrs))},
            "energy_clean": energy_clean.mean().item(),
            "energy_corrupted": energy_corrupted.mean().item(),
            "order": (energy_clean < energy_corrupted).float().mean().item(),
            "order_quarter": (energy_clean < energy_quarter).float().mean().item()}
    return metrics, iterates

def print_table(metrics):
    print("\n" + " " * 20 + "".join(f"{task:>9}" for task in metrics))
    for name in next(iter(metrics.values())):
        print(f"{name:<20}" + "".join(f"{row[name]:9.2f}" for row in metrics.values()))

def draw_picture(energy_fn, x, iterates):
    """Two images a task, clean, corrupted and restored, each above its energy."""
    columns = [(task, torch.stack([x[i], *(x_k[i] for x_k in iterates[task])]))
               for task in iterates for i in range(len(x[:2]))]  # (K+2, 3, S, S) each
    rows = torch.stack([images for _, images in columns], 1)  # (K+2, M, 3, S, S)
    side = max(88, x.shape[3])
    tiles = F.interpolate(rows.flatten(0, 1), size=(side, side), mode="bicubic")
    tiles = tiles.clamp(-1, 1) / 2 + 0.5
    grid = torchvision.utils.make_grid(tiles, len(columns), padding=16, pad_value=1)
    picture = v2.functional.to_pil_image(F.pad(grid, (76, 0, 0, 0), value=1))

    draw, pitch = ImageDraw.Draw(picture), side + 16
    names = ["clean", "corrupted"] + ["- alpha dE/dx\n= restored"] * (len(rows) - 2)
    for row, name in enumerate(names):
        draw.text((4, row * pitch + side // 2), name, "black")
    for column, (task, images) in enumerate(columns):
        left = 92 + column * pitch
        draw.text((left, 2), task, "black")
        for row, energy in enumerate(energy_fn(images).tolist(), 1):
            draw.text((left, row * pitch + 2), f"E {energy:.3f}", "black")
    return picture

# ==== 9. Pretraining ==================================================

def build_pretrainer(args, device):
    """A new energy, drawn from the seed, in its Pretrainer."""
    torch.manual_seed(args.seed)
    model = build_model(args.model, args.image_size, args.patch_size)
    print0(f"{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters; "
           f"{args.data}; {WORLD_SIZE} processes on {device}")
    return Pretrainer(model, args.alpha, args.restore_steps).to(device)

def wrap(args, pretrainer):
    """The module whose call is a step's loss, compiled and distributed as asked."""
    if args.compile:
        # else DistributedDataParallel's buckets cut the graph in the inner gradient
        torch._dynamo.config.optimize_ddp = False
        pretrainer.compile(fullgraph=True, dynamic=False)
    if WORLD_SIZE == 1:
        return pretrainer
    return nn.parallel.DistributedDataParallel(pretrainer)

def train(args, pretrainer, images, device):
    """Take the steps that OUT's checkpoint has not taken; none for --evaluate."""
    if args.epochs:
        args.max_steps = math.ceil(args.epochs * len(images) / args.batch_size)
    model, tasks = pretrainer.model, args.task.split(",")
    optimizers = build_optimizers(pretrainer, args.weight_decay)
    log = resume(args, model, optimizers)
    if args.evaluate:
        return
    if not log and RANK == 0:
        save_checkpoint(args, model, optimizers, log)  # says at once if it cannot
    module = wrap(args, pretrainer)
    last, start, losses = log[-1]["step"] if log else 0, time.time(), []
    batches = image_batches(args, images, device, args.batch_size,
                            range(last, args.max_steps), "train", RANK, WORLD_SIZE)
    for step, x in enumerate(batches, last + 1):
        # corrupt: the tasks in turn, through all processes' images
        generator = make_generator(device, "corrupt", args.seed, step, RANK)
        batch = corrupt_batch(x, tasks, generator, vars(args), step + RANK * len(x))

        # restore, and compare
        with autocast(device):
            loss = module(*batch)  # Eq. (3)

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

def measure(args, pretrainer, images, device):
    """Write and return {task: {metric: value}} of held-out images. Draw a picture."""
    count = args.eval_images
    if images is not None:
        count = min(count, len(images))
    print0(f"evaluating on {count} images")
    x = next(image_batches(args, images, device, count, [0], "held out"))
    with autocast(device):
        metrics, iterates = evaluate(pretrainer, x, args.task.split(","), vars(args))
        picture = draw_picture(pretrainer.model, x, iterates)
    print_table(metrics)
    text = json.dumps(metrics, indent=1).encode()
    write_file(args, "metrics.json", lambda file: file.write(text))
    write_file(args, "restorations.png", lambda file: picture.save(file, "png"))
    return metrics

# ==== 10. Command line ================================================

FLAGS = [  # name, type, default or (on a CPU, on GPUs), meaning; None: see below
    ("task", str, "all", f"{', '.join(TASKS)}, a comma list, or all"),
    ("evaluate", bool, False, "train nothing: table and picture of --out"),
    ("out", os.path.expanduser, None, "folder; default: runs/TASK"),
    ("device", str, None, "cpu or cuda; default: cuda, if there is one"),
    ("data", os.path.expanduser, "procedural", "folder, image, cifar10, or drawn"),
    ("image_size", int, (32, 224), "side in pixels"),
    ("augment", bool, True, "random crops and flips"),
    ("workers", int, min(8, os.cpu_count()), "decoders per process"),
    ("model", str, ("nano", "small"), f"size of the ViT: {', '.join(VIT_SIZES)}"),
    ("patch_size", int, None, "default: 4 below 128 pixels, else 16"),
    ("restore_steps", int, 1, "K, steps down the energy"),
    ("alpha", float, 256.0, "restoration's step size"),
    ("partial_share", float, None, "partly corrupted share; default: 0.1, mim alone 0"),
    ("mask_ratio", float, 0.6, "mim: share of hidden patches"),
    ("sort_grid", int, None, "sort: pieces a side; default: 4 or the next divisor"),
    ("sr_factor", int, 4, "sr: how many times smaller"),
    ("noise_std", float, 0.5, "denoise: pixels in [-1, 1]"),
    ("max_steps", int, (1500, 2000), "optimiser steps"),
    ("epochs", float, None, "over --data, in place of --max-steps"),
    ("batch_size", int, (32, 128 * WORLD_SIZE), "images a step, of all processes"),
    ("lr", float, (8.5e-3, 1.5e-3), "peak learning rate, whatever the batch"),
    ("weight_decay", float, 0.05, "not of biases, norms and positions"),
    ("seed", int, 0, "of all randomness"),
    ("save_every", int, (100, 500), "steps between checkpoints"),
    ("eval_images", int, 256, "held-out images to measure on"),
    ("compile", bool, (False, True), "torch.compile the loss"),
]

def build_parser():
    """A parser that invents nothing: what is not typed is not there."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS)
    for name, kind, default, meaning in FLAGS:
        flag = "--" + name.replace("_", "-")
        if isinstance(default, tuple):
            meaning += f"; default: {default[0]}, on GPUs {default[1]}"
        elif default:
            meaning += f"; default: {default}"
        what = {"type": kind}
        if kind is bool:
            what = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag, help=meaning, **what)
    return parser

def parse_args(argv=None):
    """What was typed, over a checkpoint's configuration for --evaluate, over the
    defaults for the device."""
    typed = vars(build_parser().parse_args(argv))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = typed.setdefault("device", device) == "cuda"
    config = {name: default[on_gpu] if isinstance(default, tuple) else default
              for name, _, default, _ in FLAGS}
    out = typed.setdefault("out", f"runs/{typed.get('task', 'all')}")
    if typed.get("evaluate"):
        config |= load_checkpoint(os.path.join(out, "checkpoint.pt"))["config"]
        config["epochs"] = None
    args = argparse.Namespace(**config | typed)

    if args.task == "all":
        args.task = ",".join(TASKS)
    if args.partial_share is None:
        args.partial_share = 0.0 if args.task == "mim" else 0.1
    if args.patch_size is None:
        args.patch_size = 4 if args.image_size < 128 else 16
    if args.sort_grid is None:
        patches = args.image_size // max(1, args.patch_size)
        grids = [n for n in range(4, patches + 1) if patches % n == 0]
        args.sort_grid = min(grids, default=patches)
    check_args(args)
    return args

def check_args(args):
    """UserError at the first senseless value."""
    def check(name, holds, expected):
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(args, name)}: {expected}")

    zero_too = "weight_decay workers seed partial_share".split()
    for name, value in vars(args).items():
        check(name, value != "", "is empty")
        if type(value) in (int, float):
            fits = 0 < value < 2**32 or value == 0 and name in zero_too
            check(name, fits, "out of range")
    check("model", args.model in VIT_SIZES, f"choose from {', '.join(VIT_SIZES)}")
    check("device", args.device in ("cpu", "cuda"), "choose cpu or cuda")
    tasks = args.task.split(",")
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
    check("batch_size", args.batch_size % WORLD_SIZE == 0 or args.evaluate,
          f"must be a multiple of the {WORLD_SIZE} processes")

def main(argv=None):
    """Return {task: {metric: value}} on the first process. A mistake of the user's is
    one line and SystemExit(2)."""
    try:
        args = parse_args(argv)
        device = choose_device(args.device)
        joined = join_processes(device)
        images, held_out, args.images = open_data(args)
        pretrainer = build_pretrainer(args, device)
        train(args, pretrainer, images, device)
        if joined:
            dist.destroy_process_group()
        return measure(args, pretrainer, held_out, device) if RANK == 0 else {}
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # without a worker's traceback
    except torch._dynamo.exc.TorchDynamoException as error:
        message = f"--compile fails ({type(error).__name__}); --no-compile does without"
    except RuntimeError as error:
        no_memory = isinstance(error, torch.OutOfMemoryError)
        if not no_memory and "allocate memory" not in str(error):  # a CPU's words
            raise
        message = "out of memory; a smaller --batch-size, --image-size or --model fits"
    sys.stderr.write(f"energy_pretrain.py: error: {' '.join(message.split())}\n")
    sys.exit(2)

if __name__ == "__main__":
    main()
